"""The calibrated main loop on small models of several kinds."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from llamacpp import llama_cpp_logits
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.imatrix import read_imatrix, write_imatrix
from whit.errors import ModelError
from whit.evaluation.compare import compare
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.effort import Calibration
from whit.pipeline.quantize import Result, gather_importance, write_gguf
from whit.recipes.named import recipe_named
from whit.rounding.methods import Effort

WIDE = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": TOY_VOCAB, "head_dim": 64}


def text(n: int = 16, length: int = 64, seed: int = 0) -> Tensor:
    return torch.tensor(random_tokens(n * length, seed)).view(n, length)


def saved(kind: str, folder: Path, **changes: object) -> Path:
    save_tiny(kind, folder, **changes)
    save_toy_tokenizer("gpt2" if kind.startswith("gpt") else "llama", folder)
    return folder


def written(folder: Path, out: Path, recipe: str, rounding: str = "feedback", strength: float = 0.5) -> Result:
    calibration = Calibration(text(), strength, Effort(sweeps=2))
    return write_gguf(open_model(folder), recipe_named(recipe, rounding), out, calibration=calibration)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved("llama", tmp_path_factory.mktemp("wide"), **WIDE)


@pytest.mark.parametrize("recipe", ["q2_k", "q4_k_m", "iq4_xs", "q4_0"])
def test_the_model_loses_less_than_with_plain_rounding_and_with_weights_alone(
    wide: Path, tmp_path: Path, recipe: str
) -> None:
    held_out = text(8, seed=9)
    kl = {}
    for rounding in ("nearest", "weighted", "feedback"):
        out = tmp_path / f"{rounding}.gguf"
        written(wide, out, recipe, rounding)
        kl[rounding] = compare(open_model(out), open_model(wide), held_out).kl_mean
    assert kl["feedback"] < kl["weighted"] < kl["nearest"]


def test_the_same_input_gives_the_same_bytes(wide: Path, tmp_path: Path) -> None:
    for name in "ab":
        written(wide, tmp_path / name, "q4_k_m")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gpt_neox", "gemma3_text", "phi3", "opt", "mixtral", "qwen3_moe"])
@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_no_matrix_of_any_architecture_loses_more_than_with_plain_rounding(
    kind: str, strength: float, tmp_path: Path
) -> None:
    save_tiny(kind, tmp_path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2" if kind in ("gpt2", "gpt_neox", "opt") else "llama", tmp_path)
    result = written(tmp_path, tmp_path / "a.gguf", "q4_0", strength=strength)
    rounded = [step.tensor.name for step in result.plan.steps if step.needs_moments]
    assert {each.name for each in result.losses} == set(rounded)
    assert all(each.loss <= each.plain * (1 + 1e-5) for each in result.losses)
    assert all(torch.isfinite(GGUFFile(tmp_path / "a.gguf").read(name)).all() for name in rounded)


def test_a_calibrated_file_runs_in_llama_cpp_with_the_logits_of_its_decoded_weights(wide: Path, tmp_path: Path) -> None:
    from whit.models.skeleton import load_module

    out = tmp_path / "a.gguf"
    written(wide, out, "q6_k")
    ids = random_tokens(12)
    ours = load_module(open_model(out))(input_ids=torch.tensor([ids])).logits[0]
    theirs = torch.as_tensor(llama_cpp_logits(out, ids))
    assert (ours - theirs).norm() / ours.norm() < 0.05  # the runtime rounds activations to 8 bits


def test_experts_that_no_token_reached_are_rounded_and_noted(tmp_path: Path) -> None:
    folder = saved("qwen3_moe", tmp_path, vocab_size=TOY_VOCAB, num_experts=16, num_experts_per_tok=1)
    calibration = Calibration(text(1, 4), 0.0, Effort(sweeps=1))
    result = write_gguf(open_model(folder), recipe_named("q4_0", "feedback"), tmp_path / "a", calibration=calibration)
    unseen = [each for each in result.losses if not each.n_tokens and "exps" in each.name]
    assert unseen
    assert all("no calibration token" in each.note for each in unseen)
    assert all(each.loss <= each.plain * (1 + 1e-6) for each in result.losses)


def test_a_tied_head_is_rounded_for_the_final_hidden_states(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, **WIDE, tie_word_embeddings=True)
    result = written(folder, tmp_path / "a.gguf", "q4_k_m")
    head = next(each for each in result.losses if each.name == "token_embd.weight")
    assert head.n_tokens == text().numel()
    assert head.loss < head.plain


def test_an_importance_matrix_is_enough_to_beat_plain_rounding(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, **WIDE)
    model = open_model(folder)
    matrix = gather_importance(model, text(), "random tokens")
    write_imatrix(matrix, tmp_path / "m.gguf")
    calibration = Calibration.on_importance(read_imatrix(tmp_path / "m.gguf"), Effort(sweeps=1), "a file")
    for rounding in ("weighted", "feedback"):
        recipe = recipe_named("q3_k_m", rounding)
        result = write_gguf(model, recipe, tmp_path / "a.gguf", overwrite=True, calibration=calibration)
        assert len(result.losses) == len(matrix.means) + 1  # the embedding is no matrix that inputs arrive at
        known = [each for each in result.losses if each.n_tokens]
        assert sum(each.loss for each in known) < sum(each.plain for each in known)
        assert {each.n_tokens for each in known} == {text().numel()}


def test_an_importance_matrix_holds_the_diagonal_of_the_moments_of_the_original(tmp_path: Path) -> None:
    folder = saved("llama", tmp_path, **WIDE)
    model = open_model(folder)
    matrix = gather_importance(model, text(2), "random tokens")
    module = load_module(model)
    seen: list[torch.Tensor] = []
    linear = module.get_submodule("model.layers.1.mlp.down_proj")
    linear.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1])))
    with torch.no_grad():
        module(input_ids=text(2))
    expected = torch.cat(seen).square().mean(0)
    torch.testing.assert_close(matrix.means["blk.1.ffn_down.weight"][0], expected, rtol=1e-4, atol=1e-7)
    assert matrix.counts["output.weight"].tolist() == [text(2).numel()]


def test_an_importance_matrix_of_another_model_is_refused(tmp_path: Path) -> None:
    model = open_model(saved("llama", tmp_path, **WIDE))
    matrix = gather_importance(model, text(1), "random tokens")
    matrix.means["blk.0.attn_q.weight"] = torch.ones(1, 7)
    calibration = Calibration.on_importance(matrix, Effort(), "a file")
    with pytest.raises(ModelError, match=r"1 x 7 numbers for blk\.0\.attn_q\.weight, the model needs 1 x"):
        write_gguf(model, recipe_named("q4_0", "weighted"), tmp_path / "a.gguf", calibration=calibration)
