"""Pages that run a model in the browser: their files, and what a visitor sees in Chromium."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chromium import FileServer, chromium, requested, wait_for
from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import Announced, GGUFFile, GGUFWriter
from whit.errors import MissingPackageError, ModelError, OutputError, RecipeError
from whit.models.open import open_model
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.runtime.generate import generate
from whit.web import page as page_module
from whit.web.page import PART_BYTES, STATIC, Page, write_page
from whit.web.vendor import runtime_files

TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}[assistant]"
PROMPT = "The sky is blue"
CONTEXT = 128


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Llama with a tokenizer and a chat template, as a GGUF file."""
    folder = tmp_path_factory.mktemp("web")
    save_tiny("llama", folder / "tiny", vocab_size=TOY_VOCAB, max_position_embeddings=CONTEXT)
    save_toy_tokenizer("smollm", folder / "tiny")
    (folder / "tiny" / "chat_template.jinja").write_text(TEMPLATE)
    write_gguf(open_model(str(folder / "tiny")), recipe_named("f32"), folder / "tiny.gguf")
    return folder / "tiny.gguf"


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Pages are written without the real runtime."""
    files = [tmp_path / name for name in ("wllama.js", "wllama.wasm", "compat.wasm")]
    for file in files:
        file.write_text(file.name)
    monkeypatch.setattr(page_module, "runtime_files", lambda: files)


@pytest.mark.usefixtures("runtime")
@pytest.mark.parametrize("most", [PART_BYTES, 100_000])
def test_the_parts_are_the_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(page_module, "PART_BYTES", most)
    written = write_page(model, tmp_path / "page")
    told = json.loads((tmp_path / "page" / "page.json").read_text())
    pieces = [(tmp_path / "page" / part["file"]).read_bytes() for part in told["parts"]]
    assert b"".join(pieces) == model.read_bytes()
    assert [len(piece) for piece in pieces] == [part["bytes"] for part in told["parts"]]
    assert max(map(len, pieces)) <= most
    assert (len(pieces) > 1) == (most < model.stat().st_size)
    usual = told["runtime"]["usual"]["file"]
    assert (tmp_path / "page" / usual).read_text() == "wllama.wasm"
    assert written.n_bytes == sum(path.stat().st_size for path in (tmp_path / "page").iterdir())


@pytest.mark.usefixtures("runtime")
def test_another_model_has_another_name_so_that_no_browser_keeps_the_old_one(model: Path, tmp_path: Path) -> None:
    first = write_page(model, tmp_path / "page")
    changed = bytearray(model.read_bytes())
    changed[-1] ^= 1
    (tmp_path / model.name).write_bytes(changed)
    with pytest.raises(OutputError, match="--force"):
        write_page(tmp_path / model.name, tmp_path / "page")
    second = write_page(tmp_path / model.name, tmp_path / "page", overwrite=True)
    assert first.parts != second.parts
    assert not (tmp_path / "page" / first.parts[0].file).exists()


@pytest.mark.usefixtures("runtime")
def test_titles_are_text_and_not_html(model: Path, tmp_path: Path) -> None:
    write_page(model, tmp_path / "page", title="<script>alert(1)</script>", about='"&<b>')
    html = (tmp_path / "page" / "index.html").read_text()
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "&#34;&amp;&lt;b&gt;" in html


@pytest.mark.usefixtures("runtime")
def test_files_that_no_page_can_run_are_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "mute.gguf").open("wb") as file:
        GGUFWriter({"general.architecture": "llama"}, []).write(file, [])
    with pytest.raises(ModelError, match="no tokenizer"):
        write_page(tmp_path / "mute.gguf", tmp_path / "page")
    with pytest.raises(RecipeError, match="1 or more"):
        write_page(model, tmp_path / "page", context=0)
    monkeypatch.setattr(page_module, "MOST_BYTES", 1000)
    with pytest.raises(RecipeError, match="do not fit in a web page"):
        write_page(model, tmp_path / "page")
    assert not (tmp_path / "page").exists()


def test_without_the_runtime_nothing_is_written(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "runtime_files", lambda: runtime_files(tmp_path))
    with pytest.raises(MissingPackageError, match=r"whit\.web\.vendor"):
        write_page(model, tmp_path / "page")
    assert not list(tmp_path.iterdir())


def test_no_file_of_the_page_names_another_server() -> None:
    for path in STATIC.iterdir():
        found = set(re.findall(r"(?:https?:)?//[\w.-]+\.\w+", path.read_text()))
        assert found <= {"http://www.w3.org"}, path.name  # the namespace of SVG


# From here on in a browser, one page after the other.


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with chromium(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture(scope="module")
def site(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Page, FileServer]]:
    """The page of the tiny model, in parts, on a server."""
    folder = tmp_path_factory.mktemp("site") / "page"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page_module, "PART_BYTES", 200_000)
        written = _page_or_skip(model, folder)
    server = FileServer(folder)
    yield written, server
    server.close()


def _page_or_skip(model: Path, folder: Path) -> Page:
    try:
        return write_page(model, folder)
    except MissingPackageError as error:
        pytest.skip(str(error))


def shown(driver: Any, name: str) -> str:
    return driver.find_element("id", name).text


def begin(driver: Any, server: FileServer) -> None:
    """A new conversation on the page."""
    if not driver.current_url.startswith(server.origin):
        visit(driver, server)
    driver.find_element("id", "reset").click()


def visit(driver: Any, server: FileServer) -> None:
    """Open the page, and load the model if it is not kept from an earlier visit."""
    driver.get(f"{server.origin}/index.html")
    wait_for(driver, "!document.getElementById('start').hidden || !document.getElementById('ask').hidden")
    if driver.find_element("id", "load").is_displayed():
        driver.find_element("id", "load").click()
    wait_for(driver, "!document.getElementById('ask').hidden")


def ask(driver: Any, text: str, tokens: int) -> str:
    """Send a message; the text of the complete answer."""
    before = len(driver.find_elements("class name", "answer"))
    driver.execute_script("document.getElementById('tokens').value = arguments[0]", tokens)
    driver.find_element("id", "prompt").send_keys(text + "\n")
    wait_for(driver, f"document.querySelectorAll('.answer').length > {before}")
    wait_for(driver, "!document.getElementById('send').hidden")
    return driver.execute_script("return [...document.querySelectorAll('.answer .text')].at(-1).textContent")


def test_a_visitor_gets_the_answer_of_llama_cpp_and_nothing_leaves_the_origin(
    browser: Any, site: tuple[Page, FileServer], model: Path
) -> None:
    visit(browser, site[1])
    assert shown(browser, "status") == "The model is ready."
    answer = ask(browser, PROMPT, 6)
    native = generate(model, PROMPT, 6, threads=1)
    assert answer == "".join(native)
    assert re.fullmatch(r"\d+\.\d tokens per second", shown(browser, "speed"))
    assert "cut off" in shown(browser, "status")
    addresses = requested(browser)
    assert {f"{site[1].origin}/{part.file}" for part in site[0].parts} <= set(addresses)
    assert [each for each in addresses if not each.removeprefix("blob:").startswith(site[1].origin + "/")] == []
    assert [entry["message"] for entry in browser.get_log("browser")] == []


def test_the_model_remembers_what_was_said_until_a_new_conversation(
    browser: Any, site: tuple[Page, FileServer]
) -> None:
    begin(browser, site[1])
    first = ask(browser, PROMPT, 4)
    assert ask(browser, PROMPT, 4) != first  # the same words, after more of them
    browser.find_element("id", "reset").click()
    assert not browser.find_elements("class name", "entry")
    assert ask(browser, PROMPT, 4) == first


def test_a_second_visit_downloads_no_model(browser: Any, site: tuple[Page, FileServer]) -> None:
    visit(browser, site[1])
    site[1].asked.clear()
    visit(browser, site[1])
    assert "/page.json" in site[1].asked
    assert not [path for path in site[1].asked if ".gguf" in path]


def test_an_answer_can_be_stopped_and_the_conversation_goes_on(browser: Any, site: tuple[Page, FileServer]) -> None:
    begin(browser, site[1])
    browser.execute_script(
        # as soon as there is something to read, before the next piece can come
        "new MutationObserver((_, observer) => document.querySelector('.answer .text')?.textContent &&"
        " (observer.disconnect(), document.getElementById('stop').click()))"
        ".observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true})"
    )
    stopped = ask(browser, PROMPT, 60)
    assert shown(browser, "status") == "Stopped."
    assert stopped
    browser.find_element("id", "reset").click()
    complete = ask(browser, PROMPT, 60)
    assert complete.startswith(stopped)
    assert len(complete) > len(stopped)


def test_a_conversation_longer_than_the_context_is_refused_in_plain_words(
    browser: Any, site: tuple[Page, FileServer]
) -> None:
    begin(browser, site[1])
    long = f"{PROMPT} " * CONTEXT
    browser.execute_script("document.getElementById('prompt').value = arguments[0]", long)
    browser.find_element("id", "send").click()
    wait_for(browser, "!document.getElementById('error').hidden")
    assert "Begin a new one" in shown(browser, "error")
    assert browser.find_element("id", "prompt").get_attribute("value") == long  # to be shortened
    assert not browser.find_elements("class name", "entry")


def test_a_file_that_llama_cpp_refuses_is_said_to_be_so(browser: Any, model: Path, tmp_path: Path) -> None:
    written = _page_or_skip(model, tmp_path / "page")
    file = tmp_path / "page" / written.parts[0].file
    file.write_bytes(b"FUGG" + file.read_bytes()[4:])
    server = FileServer(tmp_path / "page")
    browser.get(server.origin)
    wait_for(browser, "!document.getElementById('start').hidden")
    browser.find_element("id", "load").click()
    wait_for(browser, "!document.getElementById('error').hidden")
    server.close()
    assert "invalid magic" in shown(browser, "error")


def test_a_file_without_a_template_is_gone_on_with(browser: Any, model: Path, tmp_path: Path) -> None:
    file = GGUFFile(model)
    metadata = {key: value for key, value in file.metadata.items() if key != "tokenizer.chat_template"}
    tensors = [Announced(name, file.info(name).shape, file.info(name).dtype) for name in file.names()]
    with (tmp_path / "plain.gguf").open("wb") as out:
        GGUFWriter(metadata, tensors, file.types).write(out, ((name, [file.raw(name)]) for name in file.names()))
    written = _page_or_skip(tmp_path / "plain.gguf", tmp_path / "page")
    server = FileServer(tmp_path / "page")
    visit(browser, server)
    answer = ask(browser, PROMPT, 6)
    server.close()
    assert not written.chat
    assert answer == "".join(generate(tmp_path / "plain.gguf", PROMPT, 6, threads=1))


def test_a_file_that_was_not_uploaded_is_named(browser: Any, model: Path, tmp_path: Path) -> None:
    written = _page_or_skip(model, tmp_path / "page")
    (tmp_path / "page" / written.parts[0].file).unlink()
    server = FileServer(tmp_path / "page")
    browser.get(server.origin)
    wait_for(browser, "!document.getElementById('start').hidden")
    browser.find_element("id", "load").click()
    wait_for(browser, "!document.getElementById('error').hidden")
    server.close()
    assert written.parts[0].file in shown(browser, "error")
    assert "404" in shown(browser, "error")
    assert browser.find_element("id", "load").is_displayed()  # to try again


def test_a_host_without_headers_gives_threads_all_the_same(browser: Any, site: tuple[Page, FileServer]) -> None:
    browser.execute_cdp_cmd("Emulation.setHardwareConcurrencyOverride", {"hardwareConcurrency": 4})
    visit(browser, site[1])
    browser.execute_cdp_cmd("Emulation.setHardwareConcurrencyOverride", {"hardwareConcurrency": 1})
    assert browser.execute_script("return crossOriginIsolated")
    assert "2 threads" in browser.find_element("id", "about-runtime").get_attribute("textContent")
    assert ask(browser, PROMPT, 2)


def test_a_phone_shows_the_page_without_scrolling_sideways(browser: Any, site: tuple[Page, FileServer]) -> None:
    phone = {"width": 360, "height": 740, "deviceScaleFactor": 2, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", phone)
    begin(browser, site[1])
    ask(browser, "w" * 100, 4)
    browser.execute_script("document.querySelector('details').open = true")
    assert browser.execute_script("return document.documentElement.scrollWidth") == 360
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_everything_that_can_be_used_has_a_name(browser: Any, site: tuple[Page, FileServer]) -> None:
    begin(browser, site[1])
    browser.execute_script("document.querySelector('details').open = true")
    ask(browser, PROMPT, 2)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    used = [
        (node["role"]["value"], node["name"]["value"])
        for node in nodes
        if node.get("role", {}).get("value") in ("button", "textbox", "spinbutton", "link", "log", "DisclosureTriangle")
    ]
    assert ("textbox", "Your message") in used
    assert ("button", "Send") in used
    assert len(used) == 10
    assert all(name for _, name in used), used
