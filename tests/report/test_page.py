"""The page: one file, safe with hostile names and texts, sound HTML; and in a browser at two widths and two schemes."""

from __future__ import annotations

import re
import shutil
import struct
import zlib
from base64 import b64decode
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from facts import coverage, file, report
from whit.report.facts import Prompt, Report, Said
from whit.report.page import experts, page
from whit.report.pictures import pictures

NAME = '<img src=x onerror="document.title=1"> {{ 7 * 7 }}.gguf'
TEXT = "</p><script>document.title = 'taken'</script>\x00\u202e{{ 7 * 7 }}"


class Outline(HTMLParser):
    """What the tests ask of a page."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


@pytest.fixture(scope="module")
def made() -> Report:
    said = (Said("Same ", TEXT, 3, 10), Said(TEXT, "", 10, 10))
    return replace(
        report(
            file(NAME, 90_000_000, 0.3, said=said, origin=TEXT.replace("\x00", "")),
            file("b.gguf", 140_000_000, 0.002, faults=["blk.0.attn_q: <b>a scale is zero</b>"]),
            file("broken", 7, None),
            coverage=coverage(),
        ),
        prompts=(Prompt(TEXT, TEXT), Prompt("How much", "All of it.")),
    )


@pytest.fixture(scope="module")
def html(made: Report) -> str:
    return page(made, pictures(made))


def test_the_page_is_sound(html: str) -> None:
    outline = Outline(html)
    assert not outline.open
    assert len(outline.all("h1")) == 1
    levels = [int(tag[1]) for tag, _ in outline.found if re.fullmatch(r"h[1-6]", tag)]
    assert all(after <= before + 1 for before, after in pairwise(levels))
    for landmark in ("header", "nav", "main", "footer"):
        assert len(outline.all(landmark)) == 1
    assert len(outline.all("caption")) == len(outline.all("table")) > 3
    assert all(each.get("scope") in ("row", "col") for each in outline.all("th"))
    assert all(each.get("role") == "img" and each.get("aria-label") for each in outline.all("svg"))
    ids = [attributes["id"] for _, attributes in outline.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    named = [each["aria-labelledby"] for _, each in outline.found if "aria-labelledby" in each]
    links = [(each["href"] or "")[1:] for each in outline.all("a")]
    assert set(named) | set(links) <= set(ids)


def test_nothing_is_loaded_and_nothing_runs(html: str) -> None:
    outline = Outline(html)
    policy = [each["content"] for each in outline.all("meta") if each.get("http-equiv") == "Content-Security-Policy"]
    assert policy[0] is not None
    assert "default-src 'none'" in policy[0]
    tags = {tag for tag, _ in outline.found}
    assert not tags & {"script", "img", "iframe", "link", "object", "embed", "b"}
    assert not [each for _, each in outline.found if any(name.startswith("on") for name in each)]
    assert all((each.get("href") or "#").startswith("#") for _, each in outline.found)
    assert not re.search(r"https?://(?!www\.w3\.org)", html)


def test_names_and_texts_are_shown_as_letters(html: str) -> None:
    text = Outline(html).text
    assert NAME in text
    assert TEXT.replace("\x00", "\ufffd") in text
    assert "<b>a scale is zero</b>" in text
    assert "\x00" not in html


def test_first_differences_are_marked_and_said(html: str) -> None:
    assert len(Outline(html).all("mark")) == 2  # the first prompt, two files
    assert "Token 4 of 10 is the first difference." in html
    assert "The same for all 10 tokens." in html


def test_everything_that_was_found_is_on_it(html: str) -> None:
    text = Outline(html).text
    for part in ("not measured: it is truncated", "0.3 ± ", f"Take {NAME}", "1 of them: 1", "25.0 % of blk.0"):
        assert part in text
    for part in ("Loss over size", "Token by token", "Layer by layer", "Calibration", "In their own words"):
        assert part in text


def test_what_is_not_known_is_left_out() -> None:
    bare = report(file("a", 7, None))
    text = Outline(page(replace(bare, prompts=()), pictures(bare))).text
    for part in ("Loss over size", "Token by token", "Layer by layer", "Calibration", "In their own words"):
        assert part not in text
    assert "None of these: a is broken." in text


def test_experts_of_a_layer_that_got_the_same_are_one_line() -> None:
    (line,) = experts(coverage((5, 0, 3, 8)))
    assert line.name == "blk.0: ffn_up_exps, ffn_down_exps"
    assert (line.n, line.least, line.median, line.most, line.unseen) == (4, 0, 4.0, 8, "1 of them: 1")


def colours(html: str) -> list[dict[str, str]]:
    """The two palettes, light and dark."""
    roots = re.findall(r":root \{(.*?)\}", html, re.DOTALL)
    return [dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", root)) for root in roots]


def luminance(colour: str) -> float:
    """Source: WCAG 2.2, relative luminance."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_letters_can_be_read_in_both_schemes(html: str) -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    schemes = colours(html)
    assert len(schemes) == 2
    for scheme in schemes:
        for letters in ("ink", "soft", "link"):
            assert min(contrast(scheme[letters], scheme[ground]) for ground in ("page", "card")) >= 4.5
        assert contrast(scheme["mark-ink"], scheme["mark"]) >= 4.5


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium, driver = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser here: apt-get install chromium chromium-driver")
    webdriver = pytest.importorskip("selenium.webdriver", reason="pip install selenium")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    quiet = (
        "no-first-run",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        "disable-quic",
    )
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *quiet):
        options.add_argument(f"--{flag}")
    opened = webdriver.Chrome(options, webdriver.ChromeService(driver))
    yield opened
    opened.quit()


def shown(browser: Any, path: Path, width: int, scheme: str) -> None:
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500},
    )
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    browser.get(path.as_uri())


def pixels(png: bytes) -> tuple[int, int, bytes]:
    """Width, height and the unfiltered bytes of a picture's first row of pixels."""
    width, height = struct.unpack(">II", png[16:24])
    data, position = b"", 8
    while position < len(png):
        (size,), kind = struct.unpack(">I", png[position : position + 4]), png[position + 4 : position + 8]
        data += png[position + 8 : position + 8 + size] if kind == b"IDAT" else b""
        position += 12 + size
    return width, height, zlib.decompress(data)[1:4]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_in_a_browser(browser: Any, html: str, tmp_path: Path, width: int, scheme: str) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    shown(browser, path, width, scheme)
    ask = browser.execute_script
    assert browser.title == "What the files of model lose"  # and not what a hostile text would have made of it
    assert ask("return document.documentElement.scrollWidth") <= width
    assert ask("return performance.getEntriesByType('resource').length") == 0
    outside = "[...document.querySelectorAll('h2,h3,p,svg,summary,mark')].filter(e => !e.closest('.scroll') &&"
    assert (
        ask(f"return {outside} e.getClientRects().length && e.getBoundingClientRect().right > {width} + 1).length") == 0
    )
    wide = "[...document.querySelectorAll('.scroll')].filter(e => e.getClientRects().length && e.tabIndex < 0).length"
    assert ask(f"return {wide}") == 0
    ink, ground = (colours(html)[scheme == "dark"][name] for name in ("ink", "page"))
    assert ask("return getComputedStyle(document.body).backgroundColor") == rgb(ground)
    assert ask("return getComputedStyle(document.querySelector('figure svg text')).fill") == rgb(ink)
    drawn = pixels(b64decode(browser.get_screenshot_as_base64()))
    assert drawn[0] == width
    assert tuple(drawn[2]) == tuple(bytes.fromhex(ground[1:]))


def test_by_keyboard(browser: Any, html: str, tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text(html, encoding="utf-8")
    shown(browser, path, 360, "light")
    keys = pytest.importorskip("selenium.webdriver.common.keys").Keys
    reached = []
    for _ in range(60):
        browser.switch_to.active_element.send_keys(keys.TAB)
        here = browser.switch_to.active_element
        reached.append((here.tag_name, here.get_attribute("class")))
        if here.tag_name == "summary":
            break
    assert reached[0] == ("a", "skip")
    assert ("div", "scroll") in reached
    ring = "return getComputedStyle(document.activeElement).outlineStyle"
    assert browser.execute_script(ring) == "solid"
    here.send_keys(keys.ENTER)
    assert browser.execute_script("return document.activeElement.parentElement.open")
    box = browser.find_element("class name", "scroll")
    browser.execute_script("arguments[0].focus()", box)
    box.send_keys(keys.ARROW_RIGHT)
    moved = "return new Promise(done => setTimeout(() => done(arguments[0].scrollLeft), 400))"
    assert browser.execute_script(moved, box) > 0


def rgb(colour: str) -> str:
    return "rgb({}, {}, {})".format(*bytes.fromhex(colour[1:]))
