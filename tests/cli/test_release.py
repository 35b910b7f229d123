"""The whole command on a small model: files, card, checksums, a second call, a choice."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import yaml

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run
from whit.errors import MissingPackageError
from whit.web.vendor import runtime_files

OPTIONS = ["--preset", "fast", "--calib-windows", "2", "--windows", "1", "--no-speed"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("release") / "Toy-1M"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB, max_position_embeddings=128)
    save_toy_tokenizer("llama", folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    return folder


@pytest.fixture(scope="module")
def release(llama: Path) -> Path:
    out = llama.parent / "out"
    variants = ["--variants", "q4_0,q8_0,gptq-4bit", "--base-model", "owner/Toy-1M"]
    assert run(["release", str(llama), "-o", str(out), *variants, *OPTIONS]) == 0
    return out


def content(out: Path) -> dict[str, bytes]:
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def test_everything_is_there_and_the_checksums_fit(release: Path) -> None:
    files = set(content(release))
    assert {"README.md", "SHA256SUMS", "release.json", "frontier.png", "frontier.svg", "Toy-1M.imatrix.gguf"} <= files
    assert {"Toy-1M.Q4_0.gguf", "Toy-1M.Q8_0.gguf", "Toy-1M-GPTQ-4bit/config.json"} <= files
    assert {"recipes/Toy-1M.Q4_0.json", "recipes/Toy-1M-GPTQ-4bit.json"} <= files
    checked = subprocess.run(["sha256sum", "-c", "SHA256SUMS", "--strict"], cwd=release, capture_output=True, text=True)
    assert checked.returncode == 0
    assert len(checked.stdout.splitlines()) == len(files) - 1
    assert not list(release.parent.glob(".*"))


def test_the_card_says_what_was_measured(release: Path) -> None:
    card, found = (release / "README.md").read_text(), json.loads((release / "release.json").read_text())
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["base_model"], front["license"]) == ("owner/Toy-1M", "mit")
    for each in found["variants"]:
        line = next(line for line in card.splitlines() if f"]({each['file']})" in line)
        assert f"{each['result']['kl_mean']:.2g}" in line
        assert f"{100 * each['result']['same_top']:.1f} %" in line
    assert "recommended" in card
    assert str(release.parent) not in card  # nobody's business


def test_a_second_call_changes_nothing(llama: Path, release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = content(release)
    variants = ["--variants", "q4_0,q8_0,gptq-4bit", "--base-model", "owner/Toy-1M"]
    assert run(["release", str(llama), "-o", str(release), *variants, *OPTIONS]) == 0
    assert capsys.readouterr().out.count("there already") == 3
    assert content(release) == before


def test_a_recipe_of_the_release_makes_its_file_again(llama: Path, release: Path, tmp_path: Path) -> None:
    recipe = release / "recipes" / "Toy-1M.Q4_0.json"
    assert run(["release", str(llama), "-o", str(tmp_path / "again"), "--variants", str(recipe), *OPTIONS]) == 0
    again = tmp_path / "again" / "Toy-1M.Q4_0.gguf"
    assert again.read_bytes() == (release / "Toy-1M.Q4_0.gguf").read_bytes()


def test_pick_answers_for_a_memory(release: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["release", str(release), "--pick", "1GB"]) == 0
    shown = capsys.readouterr().out
    assert "llama.cpp in 1 GB: Toy-1M.Q8_0.gguf" in shown
    assert "vLLM or transformers in 1 GB: Toy-1M-GPTQ-4bit" in shown
    assert run(["release", str(release), "--pick", "1KB"]) == 2
    assert "the smallest" in capsys.readouterr().err
    assert run(["release", str(release.parent), "--pick", "1GB"]) == 2
    assert "no finished release" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "-o DIR"),
        (["-o", "{tmp}/out", "--variants", "q9"], "no recipe called"),
        (["-o", "{tmp}/out", "--preset", "slow"], "Known presets"),
        (["-o", "{tmp}/no/out", "--no-speed"], "no such folder"),
        (["-o", "{tmp}/out", "--base-model", "x"], "OWNER/NAME"),
        (["-o", "{tmp}/out", "--push", "x"], "OWNER/NAME"),
    ],
)
def test_what_cannot_be_says_so_before_any_work(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert run(["release", str(llama), *(each.replace("{tmp}", str(tmp_path)) for each in options)]) == 2
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_variant_is_named_and_there_is_no_card(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from whit.pipeline import folder
    from whit.release import job

    def spoiled(*args: object, **more: object) -> object:
        result = folder.write_model(*args, **more)  # type: ignore[arg-type]
        raw = bytearray(result.path.read_bytes())
        raw[-2000:-1500] = bytes(500)
        result.path.write_bytes(raw)
        return result

    command = ["release", str(llama), "-o", str(tmp_path / "out"), "--variants", "q8_0", *OPTIONS]
    with monkeypatch.context() as patched:
        patched.setattr(job, "write_model", spoiled)
        assert run(command) == 1
    assert "Toy-1M.Q8_0.gguf" in capsys.readouterr().err
    assert not (tmp_path / "out" / "README.md").exists()
    assert run(command) == 0  # made again
    assert (tmp_path / "out" / "README.md").exists()


def test_a_page_for_browsers_is_added_when_there_is_a_file_for_it(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["release", str(llama), "-o", str(tmp_path / "out"), "--web", *OPTIONS]
    assert run([*command, "--variants", "gptq-4bit"]) == 2
    assert "--web wants a GGUF file" in capsys.readouterr().err
    try:
        runtime_files()
    except MissingPackageError as error:
        assert run([*command, "--variants", "q4_0"]) == 2  # before any work
        assert "npm" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        pytest.skip(str(error))
    assert run([*command, "--variants", "q4_0"]) == 0
    assert (tmp_path / "out" / "web" / "index.html").read_text().count("Toy-1M")
