"""`whit memory` from the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import typer
from torch import Tensor
from typer.testing import CliRunner

from whit.checkpoints.source import TensorInfo
from whit.cli import memory
from whit.errors import ModelError, RecipeError
from whit.grids.named import GRIDS
from whit.memory import GIB
from whit.models.model import Model

app = typer.Typer()
app.command()(memory.command)


def printed(*arguments: str, width: int = 80) -> str:
    """What the command prints at a width."""
    result = CliRunner(env={"COLUMNS": str(width)}).invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.output


def figures(*arguments: str) -> dict[str, Any]:
    """What the command prints with --json."""
    return json.loads(printed(*arguments, "--json"))


class Headers:
    """Tensors that have shapes but no values: the command must not read any."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._shapes = shapes

    def names(self) -> Sequence[str]:
        """All names."""
        return list(self._shapes)

    def info(self, name: str) -> TensorInfo:
        """The shape, as float16."""
        shape = self._shapes[name]
        return TensorInfo(name, shape, "F16", 2 * len(shape))

    def read(self, name: str) -> Tensor:
        """Never to be called."""
        raise AssertionError(f"{name} was read")


SHAPES = {
    "model.embed_tokens.weight": (1000, 64),
    "model.layers.0.self_attn.q_proj.weight": (64, 64),
    "model.layers.0.mlp.up_proj.weight": (128, 64),
    "model.layers.0.mlp.experts": (4, 32, 64),
    "model.norm.weight": (64,),
    "lm_head.weight": (1000, 64),
}
CONFIG = {
    "num_hidden_layers": 1,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "intermediate_size": 128,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": True,
}
N_PARAMETERS = 64_000 + 4096 + 8192 + 8192 + 64


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> str:
    """A model that opens under its name."""
    made = Model("tiny", CONFIG, Headers(SHAPES), n_bytes=200_000)
    monkeypatch.setattr(memory, "open_model", lambda text, fetch: made)
    return "tiny"


# ---- the figures that must come out


@pytest.mark.parametrize("text", ["8e9", "8B", "8_000_000_000"])
def test_8_billion_at_16_8_and_4_bits(text: str) -> None:
    shown = figures(text)
    assert shown["store_float16_gib"] == shown["store_bfloat16_gib"] == 14.901161193847656
    assert shown["store_int8_gib"] == 7.450580596923828
    assert shown["store_int4_gib"] == 3.725290298461914


def test_70_billion_at_16_bits() -> None:
    assert figures("70e9")["store_float16_gib"] == 130.385160446167


def test_one_billion_loads_in_4_gb_and_trains_in_24_at_float32_and_half_of_it_at_16_bit() -> None:
    shown = figures("1B")
    assert (shown["store_float32_gb"], shown["train_float32_adam_gb"]) == (4, 24)
    assert (shown["store_float16_gb"], shown["train_16_bit_adam_gb"]) == (2, 12)


def test_published_llama_sizes_stand_beside_the_forecast() -> None:
    shown, output = figures("8B"), printed("8B")
    for model, at_16, at_4 in (("7b", 13, 3.9), ("13b", 24, 7.8), ("30b", 60, 19.5), ("65b", 120, 38.5)):
        assert shown[f"published_{model}_16_bit_gb"] == at_16
        assert shown[f"published_{model}_4_bit_gb"] == at_4
        forecast, off = shown[f"forecast_{model}_16_bit_gib"], shown[f"deviation_{model}_16_bit_gib_percent"]
        assert off == pytest.approx(100 * (forecast / at_16 - 1))
        assert f"{at_16} GB" in output
        assert f"{at_4} GB" in output
    assert shown["forecast_7b_16_bit_bytes"] == 2 * 6_738_415_616


def test_every_grid_is_listed_with_its_bits() -> None:
    shown = figures("8B")
    for name, grid in GRIDS.items():
        bits = grid.bits_per_weight(4096)
        key = f"grid_{name.replace('-', '_')}"
        assert shown[f"{key}_bits"] == bits
        assert shown[f"{key}_bytes"] == 8e9 * bits / 8


def test_gb_and_gib_are_the_same_bytes() -> None:
    shown = figures("8B")
    for key in [key for key in shown if key.endswith("_gib")]:
        stem = key.removesuffix("_gib")
        assert shown[f"{stem}_bytes"] == pytest.approx(shown[key] * GIB)
        assert shown[f"{stem}_bytes"] == pytest.approx(shown[f"{stem}_gb"] * 1e9)


def test_json_is_flat() -> None:
    assert all(isinstance(value, (int, float, str)) for value in figures("8B").values())


# ---- what a person sees


@pytest.mark.parametrize("count", ["1", "135M", "8B", "70B", "405B", "1e18"])
@pytest.mark.parametrize("width", [80, 120])
def test_nothing_is_too_wide(count: str, width: int) -> None:
    output = printed(count, width=width)
    assert max(map(len, output.splitlines())) <= width


@pytest.mark.parametrize("count", ["135M", "8B", "70B", "405B"])
def test_nothing_is_cut_off_at_80_columns(count: str) -> None:
    assert "…" not in printed(count)


def test_both_units_are_labelled() -> None:
    output = printed("8B")
    assert "1 GiB is 2^30 bytes" in output
    assert "GB" in output.split("To store")[1].splitlines()[1]
    assert "GiB" in output.split("To store")[1].splitlines()[1]


def test_the_assumed_shape_is_named() -> None:
    output = " ".join(printed("8B").split())
    assert "Shape assumed, that of Llama 3.1 8B: 32 layers, 8 KV heads of 128." in output


# ---- options


def test_a_given_shape_decides_the_cache() -> None:
    shown = figures("8B", "--layers", "10", "--kv-heads", "4", "--head-dim", "64", "--context", "1000", "--batch", "3")
    assert shown["kv_cache_bytes"] == 2 * 10 * 4 * 64 * 1000 * 3 * 2
    assert "but for what was given" in shown["shape_from"]


def test_the_cache_type_decides_its_bits() -> None:
    ratio = figures("8B", "--cache", "q8_0")["kv_cache_bytes"] / figures("8B")["kv_cache_bytes"]
    assert ratio == 8.5 / 16


def test_bits_ask_for_one_width_alone() -> None:
    shown = figures("8B", "--bits", "4.25")
    assert shown["store_4_25_bits_bytes"] == shown["run_4_25_bits_weights_bytes"] == 8e9 * 4.25 / 8
    assert not [key for key in shown if key.startswith("grid_") or key == "store_int4_bytes"]
    assert shown["train_lora_on_4_25_bits_weights_bytes"] > 8e9 * 4.25 / 8


def test_running_adds_up() -> None:
    shown = figures("8B", "--context", "8192")
    assert shown["kv_cache_gib"] == 1
    total = shown["run_q4_0_weights_bytes"] + shown["kv_cache_bytes"] + shown["working_bytes"]
    assert shown["run_q4_0_bytes"] == total


def test_lora_rank_16_trains_the_known_adapters() -> None:
    shown = figures("8B")
    assert shown["train_lora_on_16_bits_gradients_bytes"] == 4 * 41_943_040


# ---- models


def test_a_model_is_counted_from_its_headers_with_the_tied_head_once(model: str) -> None:
    shown = figures(model)
    assert shown["parameters"] == N_PARAMETERS
    assert shown["stored_bytes"] == shown["run_as_stored_weights_bytes"] == 200_000


def test_a_model_s_shape_comes_from_its_configuration(model: str) -> None:
    shown = figures(model)
    assert (shown["layers"], shown["kv_heads"], shown["head_dim"]) == (1, 2, 16)
    assert shown["context"] == 2048
    assert shown["kv_cache_bytes"] == 2 * 2 * 16 * 2048 * 2


def test_adapters_sit_on_every_matrix_of_the_blocks_and_on_every_expert(model: str) -> None:
    adapters = 8 * ((64 + 64) + (128 + 64) + 4 * (32 + 64))
    assert figures(model, "--lora-rank", "8")["train_lora_on_16_bits_gradients_bytes"] == 4 * adapters


def test_a_context_beyond_the_model_s_is_pointed_out(model: str) -> None:
    assert "made for 2048 positions" in printed(model, "--context", "4096")
    assert "made for" not in printed(model)


def test_the_built_in_model_is_counted_as_published() -> None:
    shown = figures("smollm2-135m")
    assert (shown["parameters"], shown["layers"], shown["kv_heads"]) == (134_515_008, 30, 3)


def test_a_folder_that_is_called_like_a_count_is_a_folder(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "8B").mkdir()
    assert figures("8B")["parameters"] == N_PARAMETERS


# ---- what cannot be answered


@pytest.mark.parametrize(
    "arguments",
    [
        ("0",),
        ("1.5",),
        ("8B", "--cache", "int4"),
        ("tiny", "--layers", "3"),
    ],
)
def test_requests_without_sense_are_refused_with_exit_status_2(model: str, arguments: Sequence[str]) -> None:
    error = CliRunner().invoke(app, arguments).exception
    assert isinstance(error, RecipeError)
    assert error.exit_status == 2


@pytest.mark.parametrize("option", [("--context", "0"), ("--batch", "-1"), ("--bits", "0"), ("--layers", "x")])
def test_numbers_out_of_range_are_refused_with_exit_status_2(option: tuple[str, str]) -> None:
    assert CliRunner().invoke(app, ["8B", *option]).exit_code == 2


def test_a_path_that_is_not_there_is_refused(tmp_path: Path) -> None:
    error = CliRunner().invoke(app, [str(tmp_path / "no.gguf")]).exception
    assert isinstance(error, ModelError)


def test_a_model_without_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "open_model", lambda text, fetch: Model("empty", CONFIG, Headers({}), 0))
    assert isinstance(CliRunner().invoke(app, ["empty"]).exception, ModelError)
