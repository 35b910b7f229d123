"""Will it fit: figures by hand, and what is said when it does not."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.memory import RunMemory
from whit.models.open import open_model
from whit.pipeline.folder import write_model
from whit.pipeline.quantize import write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.named import recipe_named
from whit.runtime.choose import prepare
from whit.runtime.fit import check_fits, folder_needs, free_memory, gguf_needs, gguf_shape
from whit.shape import Shape

MB = 10**6


def linear(context: int) -> RunMemory:
    return RunMemory(100 * MB, 0.1 * MB * context, 10 * MB)


@pytest.mark.parametrize(("free", "context"), [(150, 256), (200, 768), (519, 3840)])
def test_the_largest_context_that_fits_is_named(free: int, context: int) -> None:
    with pytest.raises(RecipeError, match=rf"--context {context} would fit") as caught:
        check_fits("big.gguf", linear, 4096, free * MB)
    assert "0.52 GB of memory are needed (weights 0.10, keys and values of 4096 tokens 0.41, work 0.01)" in str(
        caught.value
    )
    check_fits("big.gguf", linear, context, free * MB)
    with pytest.raises(RecipeError):
        check_fits("big.gguf", linear, context + 256, free * MB)


def test_where_no_context_fits_a_smaller_file_is_named() -> None:
    with pytest.raises(RecipeError, match="whit quantize --fit"):
        check_fits("big.gguf", linear, 4096, 100 * MB)


def test_what_fits_is_left_alone() -> None:
    check_fits("big.gguf", linear, 4096, 520 * MB)


def test_a_container_s_limit_counts_and_its_file_cache_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    assert free_memory(tmp_path / "none") == 1000
    for name, text in {
        "memory.max": "700\n",
        "memory.current": "500\n",
        "memory.stat": "anon 1\ninactive_file 100\n",
    }.items():
        (tmp_path / name).write_text(text)
    assert free_memory(tmp_path) == 300
    (tmp_path / "memory.max").write_text("5000\n")
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_memory(tmp_path) == 1000
    (tmp_path / "memory.max").write_text("100\n")
    assert free_memory(tmp_path) == 0


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("fit")
    save_toy_tokenizer("smollm", place / "llama")
    save_tiny("llama", place / "llama", vocab_size=TOY_VOCAB)
    write_gguf(open_model(place / "llama"), recipe_named("q4_0"), place / "q4_0.gguf")
    recipe = folder_recipe("gptq-4bit-g32")
    assert recipe is not None
    write_model(open_model(place / "llama"), recipe, place / "gptq")
    return place


def test_a_file_takes_its_bytes_and_keys_and_values_for_every_slot(place: Path) -> None:
    one, four = gguf_needs(place / "q4_0.gguf"), gguf_needs(place / "q4_0.gguf", slots=4)
    assert one is not None
    assert four is not None
    assert one(100).weights == (place / "q4_0.gguf").stat().st_size
    assert one(100).kv_cache == 2 * 2 * 2 * 16 * 100 * 2  # k and v, layers, heads, width, tokens, bytes
    assert four(100).kv_cache == 4 * one(100).kv_cache


def test_a_float_folder_is_opened_in_float32_and_codes_stay_codes(place: Path) -> None:
    plain, small = folder_needs(open_model(place / "llama")), folder_needs(open_model(place / "gptq"))
    assert plain is not None
    assert small is not None
    assert plain(1).weights == pytest.approx((place / "llama" / "model.safetensors").stat().st_size, rel=0.02)
    assert plain(100).kv_cache == 2 * 2 * 2 * 16 * 100 * 4
    floats = 4 * 2 * TOY_VOCAB * 64  # embedding and head
    assert floats < small(1).weights < floats + 0.3 * (plain(1).weights - floats)


def test_an_unknown_architecture_is_read_by_its_own_keys() -> None:
    keys = {
        "block_count": 3,
        "embedding_length": 64,
        "attention.head_count": [0, 8],
        "attention.head_count_kv": 2,
        "feed_forward_length": 100,
    }
    metadata = {f"new.{name}": value for name, value in keys.items()} | {"tokenizer.ggml.tokens": ["a"] * 7}
    assert gguf_shape(metadata | {"general.architecture": "new"}) == Shape(3, 64, 8, 2, 8, 100, 7)
    assert gguf_shape({"general.architecture": "new"}) is None


@pytest.mark.parametrize("name", ["llama", "gptq", "q4_0.gguf"])
def test_nothing_is_loaded_that_does_not_fit_unless_it_is_asked_for(
    place: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whit.runtime.choose.free_memory", lambda: 1000)
    with pytest.raises(RecipeError, match="--anyway"):
        prepare(place / name, 64)
    assert prepare(place / name, 64, anyway=True)
    monkeypatch.setattr("whit.runtime.choose.free_memory", lambda: 10**9)
    assert prepare(place / name, 64)
