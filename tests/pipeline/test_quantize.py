import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from bench.measure import run
from safetensors.torch import load_file, save_file

from llamacpp import llama_cpp_logits
from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.checkpoints.gguf import GGUFFile
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import predicted_bytes, write_gguf
from whit.recipes.named import RECIPES, recipe_named
from whit.recipes.recipe import Recipe, Rule


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantize") / "llama"
    save_tiny("llama", folder, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", folder)
    return folder


def written(model: Path | str, recipe: str, out: Path, rounding: str = "nearest") -> GGUFFile:
    write_gguf(open_model(model), recipe_named(recipe, rounding), out)
    return GGUFFile(out)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_predicted_size_is_the_written_size(llama: Path, tmp_path: Path, recipe: str) -> None:
    file = written(llama, recipe, tmp_path / "a.gguf")
    assert predicted_bytes(open_model(llama), recipe_named(recipe)) == file.n_bytes


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("rounding", ["nearest", "search"])
def test_the_same_input_gives_the_same_bytes(llama: Path, tmp_path: Path, recipe: str, rounding: str) -> None:
    written(llama, recipe, tmp_path / "a.gguf", rounding)
    written(llama, recipe, tmp_path / "b.gguf", rounding)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


@pytest.mark.parametrize("recipe", ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0"])
def test_every_matrix_holds_what_the_gguf_package_would_write(llama: Path, tmp_path: Path, recipe: str) -> None:
    exact, file = written(llama, "f32", tmp_path / "f32.gguf"), written(llama, recipe, tmp_path / "q.gguf")
    for name in file.names():
        kind = gguf.GGMLQuantizationType[file.info(name).dtype]
        expected = gguf.quants.quantize(exact.read(name).numpy(), kind)
        np.testing.assert_array_equal(file.raw(name).numpy(), expected.reshape(-1).view(np.uint8))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_file_runs_in_llama_cpp_close_to_the_original(llama: Path, tmp_path: Path, recipe: str) -> None:
    tokens = random_tokens(24)
    written(llama, recipe, tmp_path / "a.gguf")
    with torch.no_grad():
        expected = load_module(open_model(tmp_path / "a.gguf"))(torch.tensor([tokens])).logits[0].numpy()
    found = llama_cpp_logits(tmp_path / "a.gguf", tokens)[:, : expected.shape[1]]
    # the runtime rounds activations too: to half precision, to bfloat16, or to 8 bits
    tolerance = {"f32": 1e-4, "f16": 1e-2, "bf16": 3e-2}.get(recipe, 0.1)
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_a_copy_of_the_same_type_is_bit_exact(llama: Path, tmp_path: Path) -> None:
    first = written(llama, "q4_0", tmp_path / "a.gguf")
    second = written(tmp_path / "a.gguf", "q4_0", tmp_path / "b.gguf")
    assert all(torch.equal(first.raw(name), second.raw(name)) for name in first.names())
    assert second.metadata == first.metadata
    assert second.types == first.types


def test_a_gguf_source_gives_the_bytes_of_the_folder(llama: Path, tmp_path: Path) -> None:
    exact = written(llama, "f32", tmp_path / "f32.gguf")
    assert exact.n_bytes > 0
    from_folder, from_file = (
        written(source, "q5_0", tmp_path / f"{i}.gguf") for i, source in enumerate([llama, tmp_path / "f32.gguf"])
    )
    assert from_file.names() == from_folder.names()
    assert all(torch.equal(from_file.raw(name), from_folder.raw(name)) for name in from_file.names())


def test_shards_and_half_precision_sources_are_read(llama: Path, tmp_path: Path) -> None:
    tensors = {name: W.bfloat16() for name, W in load_file(llama / "model.safetensors").items()}
    half = tmp_path / "half"
    half.mkdir()
    for file in llama.iterdir():
        (half / file.name).write_bytes(file.read_bytes())
    save_file(tensors, half / "model.safetensors")
    assert torch.equal(
        written(half, "f32", tmp_path / "a.gguf").read("token_embd.weight"),
        tensors["model.embed_tokens.weight"].float(),
    )


def test_rows_that_no_block_divides_are_listed_and_kept_in_float16(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "odd", intermediate_size=100, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", tmp_path / "odd")
    result = write_gguf(open_model(tmp_path / "odd"), recipe_named("q4_0"), tmp_path / "a.gguf")
    odd = [step for step in result.plan.exceptions if step.type == "F16"]
    assert {step.tensor.name for step in odd} == {f"blk.{i}.ffn_down.weight" for i in range(2)}
    assert all("rows of 100 weights do not divide into Q4_0 blocks of 32" in step.exception for step in odd)


def test_every_exception_has_a_reason(llama: Path, tmp_path: Path) -> None:
    result = write_gguf(open_model(llama), recipe_named("q4_0"), tmp_path / "a.gguf")
    for step in result.plan.steps:
        by_rule = step.type == "Q4_0"
        assert by_rule != bool(step.exception)


def test_rules_choose_tensor_by_tensor(llama: Path, tmp_path: Path) -> None:
    recipe = Recipe("mine", (Rule("blk.0.*", "q8_0"), Rule("blk.*", "q5_1", "search"), Rule("*", "f16")))
    write_gguf(open_model(llama), recipe, tmp_path / "a.gguf")
    file = GGUFFile(tmp_path / "a.gguf")
    kinds = {name: file.info(name).dtype for name in file.names()}
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"
    assert kinds["blk.1.ffn_up.weight"] == "Q5_1"
    assert kinds["token_embd.weight"] == "F16"


def test_metadata_say_what_the_file_is_and_where_it_is_from(llama: Path, tmp_path: Path) -> None:
    metadata = written(llama, "q4_0", tmp_path / "a.gguf", "search").metadata
    assert metadata["general.file_type"] == 2
    assert metadata["general.quantization_version"] == 2
    assert metadata["general.quantized_by"].startswith("Whit ")
    assert metadata["whit.recipe"] == "q4_0: output.weight -> q6_k by search, * -> q4_0 by search"
    assert metadata["tokenizer.ggml.tokens"]


def test_smollm2_as_q8_0_predicts_in_llama_cpp_what_the_original_predicts(tmp_path: Path) -> None:
    model = open_model("smollm2-135m")
    write_gguf(model, recipe_named("q8_0"), tmp_path / "a.gguf")
    tokens = load_tokenizer(model).encode("The capital of France is Paris, and the capital of Italy is Rome. " * 4)
    with torch.no_grad():
        expected = load_module(model)(torch.tensor([tokens])).logits[0]
    found = torch.from_numpy(llama_cpp_logits(tmp_path / "a.gguf", tokens))
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.9
    log_p, log_q = expected.double().log_softmax(-1), found.double().log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 0.03


@pytest.mark.parametrize("recipe", ["q8_0", "f32"])
def test_smollm2_is_converted_in_less_than_600_mb(tmp_path: Path, recipe: str) -> None:
    whit = Path(sys.executable).with_name("whit")
    options = ("--recipe", recipe, "--rounding", "nearest", "--no-verify", "-o", tmp_path / "a.gguf")
    used = run(whit, "quantize", "smollm2-135m", *options).peak_bytes
    assert used < 600e6


def test_progress_ends_at_the_total(llama: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    write_gguf(
        open_model(llama),
        recipe_named("q8_0"),
        tmp_path / "a.gguf",
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1]
