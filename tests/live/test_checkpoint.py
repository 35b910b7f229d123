"""Files of every format as live modules: what they compute is what Whit's own decoder gives."""

from pathlib import Path

import pytest
import torch

from tiny import random_tokens, save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.live.checkpoint import live_checkpoint
from whit.live.experts import QExpert
from whit.live.quantize import n_bytes, twins_of
from whit.live.twin import Twin
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.pipeline.folder import write_model
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named

TOKENS = torch.tensor([random_tokens(24)])
MODELS = ("llama", "llama-tied-biased", "gpt2", "mixtral", "gemma3_text", "phi3", "gpt_neox")
TABLES = ("kmeans-4bit", "kmeans-3bit-g32", "kmeans-2bit-tensor", "kmeans-3bit+1%", "whit-int8-tensor")
FOLDERS = (
    "gptq-4bit-g32",
    "gptq-3bit-g32-asym",
    "awq-4bit-g32",
    "w4a16-g32",
    "w8a8",
    "fp8",
    "whit-int4-g32",
    "mxfp4",
    *TABLES,
)


def check(path: Path, tolerance: float = 1e-4) -> torch.nn.Module:
    live, reference = live_checkpoint(path, torch.float32), load_module(open_model(path))
    live.set_attn_implementation("eager")  # as the reference: rounded inputs flip on the last bit
    with torch.no_grad():
        found, expected = live(TOKENS).logits, reference(TOKENS).logits
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    assert not any(parameter.is_meta for parameter in [*live.parameters(), *live.buffers()])
    names = {name: twin for name, twin in live.named_modules() if isinstance(twin, Twin)}
    assert names
    for name, twin in names.items():
        assert twin.frozen is not None
        home, _, stack = name.partition(".stacks.")
        if not stack:
            expected = reference.get_parameter(f"{name}.weight")
        else:
            key, expert = stack.split(".")
            expected = reference.get_parameter(f"{home}.{key}")[int(expert)]
        assert torch.equal(twin.weight, expected), name
    return live


@pytest.mark.parametrize("kind", FOLDERS)
@pytest.mark.parametrize("name", ["llama", "mixtral", "gpt2"])
def test_folders(name: str, kind: str, tmp_path: Path) -> None:
    if name == "gpt2" and not kind.startswith(("gptq", "whit", "kmeans")):
        pytest.skip("these formats do not quantize Conv1D")
    save_tiny(name, tmp_path / "model")
    recipe = folder_recipe(kind, "nearest")
    assert recipe is not None
    write_model(open_model(tmp_path / "model"), recipe, tmp_path / "out")
    live = check(tmp_path / "out", 0.1 if kind in ("w8a8", "fp8") else 1e-4)  # codes of inputs flip on ties
    if name == "mixtral":
        assert sum(isinstance(twin, QExpert) for twin in twins_of(live)) == 2 * 4 * 2


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k_m"])
@pytest.mark.parametrize("name", MODELS)
def test_gguf_files(name: str, kind: str, tmp_path: Path) -> None:
    """Rotary rows lie in another order there, experts in one tensor, and q, k, v of some models in one."""
    save_tiny(name, tmp_path / "model", vocab_size=TOY_VOCAB)
    save_toy_tokenizer("gpt2" if name in ("gpt2", "gpt_neox") else "llama", tmp_path / "model")
    source = open_model(tmp_path / "model")
    write_model(source, recipe_named(kind, "nearest"), tmp_path / "small.gguf")
    live = check(tmp_path / "small.gguf")
    assert n_bytes(live) < n_bytes(load_module(source)) * (0.45 if kind == "q4_0" else 0.6)


def test_what_is_not_quantized_takes_the_type_that_was_asked_for(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path / "model")
    recipe = folder_recipe("gptq-4bit-g32", "nearest")
    assert recipe is not None
    write_model(open_model(tmp_path / "model"), recipe, tmp_path / "out")
    live = live_checkpoint(tmp_path / "out", torch.bfloat16)
    assert {parameter.dtype for parameter in live.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        exact = load_module(open_model(tmp_path / "out"))(TOKENS).logits
        assert (live(TOKENS).logits.float() - exact).abs().max() < 0.05 * exact.abs().max()
