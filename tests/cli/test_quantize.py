from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.cli.app import run


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    save_tiny("llama", tmp_path / "model", intermediate_size=100, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "model")
    return tmp_path / "model"


def test_the_size_the_types_and_every_exception_are_printed(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["quantize", str(llama), "--recipe", "Q4_0", "-o", str(tmp_path / "a.gguf")]) == 0
    shown = capsys.readouterr().out
    assert f"{(tmp_path / 'a.gguf').stat().st_size / 1e6:.2f} MB" in shown
    assert "F32: 2 x blk.*.attn_norm.weight" in shown
    assert "F16: 2 x blk.*.ffn_down.weight (rows of 100 weights do not divide into Q4_0 blocks of 32)" in shown
    assert "already quantized" not in shown


def test_quantizing_a_quantized_file_warns(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(llama), "--recipe", "q8_0", "-o", str(tmp_path / "a.gguf")]) == 0
    assert run(["quantize", str(tmp_path / "a.gguf"), "--recipe", "q4_0", "-o", str(tmp_path / "b.gguf")]) == 0
    assert "already quantized (Q8_0)" in capsys.readouterr().out
