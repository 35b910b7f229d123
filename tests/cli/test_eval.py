"""`whit eval` from the command line; truth for the figures is llama.cpp's logits of the same tokens."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from llamacpp import llama_cpp_logits
from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.calibration.text import default_text, windows
from whit.cli.eval import DEFAULT_WINDOWS, command
from whit.errors import ModelError, TextError
from whit.models.builtin import SMOLLM2
from whit.models.open import open_model
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

app = typer.Typer()
app.command()(command)

KEYS = {
    "kl_mean", "kl_mean_se", "kl_median", "kl_p99", "kl_p999", "kl_max",
    "perplexity", "perplexity_se", "perplexity_reference", "perplexity_reference_se",
    "perplexity_ratio", "perplexity_ratio_se", "log_ratio", "log_ratio_se", "same_top", "same_top_se", "tokens",
    "bytes", "bytes_reference", "bits_per_weight", "bits_per_weight_reference",
    "candidate", "reference", "text", "text_description", "windows", "windows_available", "window_tokens", "dtype",
    "seconds",
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama folder, its q4_0 file and a text of a few windows."""
    path = tmp_path_factory.mktemp("eval")
    save_tiny("llama", path / "llama", vocab_size=TOY_VOCAB, max_position_embeddings=512)
    save_toy_tokenizer("llama", path / "llama")
    write_gguf(open_model(path / "llama"), recipe_named("q4_0"), path / "q4_0.gguf")
    (path / "text.txt").write_text("The statement is an expression, and the object is a name of the class. " * 100)
    return path


def printed(*arguments: object) -> str:
    result = CliRunner(env={"COLUMNS": "100"}).invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None:
        raise result.exception
    assert result.stderr == ""  # no bar where there is no terminal
    return result.stdout


def measured(folder: Path, *options: object) -> dict[str, Any]:
    arguments = (folder / "q4_0.gguf", "--against", folder / "llama", "--text", folder / "text.txt", "--json")
    return json.loads(printed(*arguments, *options))


def test_json_has_exactly_these_flat_keys(folder: Path) -> None:
    figures = measured(folder)
    assert set(figures) == KEYS
    assert not any(isinstance(value, dict | list) for value in figures.values())


def test_figures_are_in_their_ranges_and_fit_together(folder: Path) -> None:
    figures = measured(folder)
    assert 0 < figures["kl_median"] <= figures["kl_p99"] <= figures["kl_p999"] <= figures["kl_max"]
    assert figures["perplexity_ratio"] == pytest.approx(figures["perplexity"] / figures["perplexity_reference"])
    assert math.log(figures["perplexity_ratio"]) == pytest.approx(figures["log_ratio"])
    assert figures["tokens"] == 255 * figures["windows"]
    assert figures["bytes"] == (folder / "q4_0.gguf").stat().st_size
    assert figures["text"] == "text.txt"


def test_bits_per_weight_count_the_whole_file(folder: Path) -> None:
    import gguf

    weights = sum(int(tensor.n_elements) for tensor in gguf.GGUFReader(folder / "q4_0.gguf").tensors)
    expected = 8 * (folder / "q4_0.gguf").stat().st_size / weights
    assert measured(folder)["bits_per_weight"] == pytest.approx(expected)


def test_windows_limit_what_is_read_and_both_counts_are_told(folder: Path) -> None:
    figures = measured(folder, "--windows", 1)
    assert figures["windows"] == 1
    assert figures["windows_available"] > 1
    assert figures["tokens"] == 255


def test_windows_are_no_longer_than_what_the_models_read(folder: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "short", vocab_size=TOY_VOCAB, max_position_embeddings=64)
    save_toy_tokenizer("llama", tmp_path / "short")
    arguments = (tmp_path / "short", "--against", tmp_path / "short", "--text", folder / "text.txt", "--windows", 2)
    figures = json.loads(printed(*arguments, "--json"))
    assert (figures["window_tokens"], figures["tokens"], figures["kl_mean"]) == (64, 2 * 31, 0)
    assert "64 tokens, no overlap, no BOS added; positions 32..62" in printed(*arguments)


def test_the_table_names_everything_needed_to_repeat_the_measurement(folder: Path) -> None:
    output = printed(folder / "q4_0.gguf", "--against", folder / "llama", "--text", folder / "text.txt", "--windows", 1)
    for part in ("perplexity", "KL divergence, nats: mean", "99.9 %", "same top token", "bits per weight", "text.txt"):
        assert part in output
    assert "1 of " in output
    assert "512 tokens, no overlap, no BOS added; positions 256..510" in output
    assert "255 tokens in all; float32" in output


def test_the_default_text_is_named_as_what_it_is(folder: Path) -> None:
    output = printed(folder / "q4_0.gguf", "--against", folder / "llama", "--windows", 1)
    assert "held-out half of the documentation that ships with Python" in output


def test_a_model_that_predicts_nothing_sensible_gives_null_and_valid_json(folder: Path, tmp_path: Path) -> None:
    module = save_tiny("llama", tmp_path / "wild", vocab_size=TOY_VOCAB, max_position_embeddings=512)
    with torch.no_grad():
        module.lm_head.weight.mul_(1e5)
    module.save_pretrained(tmp_path / "wild")
    save_toy_tokenizer("llama", tmp_path / "wild")
    options = ("--text", folder / "text.txt", "--windows", 1, "--json")
    figures = json.loads(printed(tmp_path / "wild", "--against", folder / "llama", *options))
    assert figures["perplexity"] is None


def test_a_text_too_short_to_score_is_an_error_for_the_user(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("Too short.")
    with pytest.raises(TextError, match="one window takes 512"):
        printed(folder / "q4_0.gguf", "--against", folder / "llama", "--text", tmp_path / "short.txt")


def test_a_reference_without_a_tokenizer_is_an_error_for_the_user(folder: Path, tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "bare", vocab_size=TOY_VOCAB, max_position_embeddings=512)
    with pytest.raises(ModelError, match="tokenizer"):
        printed(folder / "q4_0.gguf", "--against", tmp_path / "bare", "--text", folder / "text.txt")


def test_the_default_scores_enough_tokens_for_the_99_9th_percentile() -> None:
    assert DEFAULT_WINDOWS * 255 / 1000 > 5


@pytest.mark.real_model
def test_perplexity_of_smollm2_is_that_of_llama_cpp(tmp_path: Path) -> None:
    path = tmp_path / "f32.gguf"
    write_gguf(open_model(SMOLLM2), recipe_named("f32"), path)
    used = windows(load_tokenizer(open_model(SMOLLM2)).encode(default_text().content), limit=2)
    losses = []
    for window in used:
        logits = torch.from_numpy(llama_cpp_logits(path, window.tolist())).double()  # [512, vocab]
        losses.append(torch.nn.functional.cross_entropy(logits[256:511], window[257:512], reduction="none"))
    expected = torch.cat(losses).mean().exp().item()
    figures = json.loads(printed(path, "--against", SMOLLM2, "--windows", 2, "--json"))
    assert figures["perplexity"] == pytest.approx(expected, rel=1e-4)
    assert figures["perplexity_reference"] == pytest.approx(expected, rel=1e-4)
