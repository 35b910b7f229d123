"""Memory forecasts against published figures, llama.cpp's own reports and transformers' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.errors import RecipeError
from whit.memory import (
    GB,
    GIB,
    OPTIMIZERS,
    PLAIN_BITS,
    PRECISIONS,
    PUBLISHED,
    VLLM,
    Lora,
    kv_cache_bytes,
    looks_like_count,
    lora_parameters,
    parse_count,
    run_bytes,
    storage_bytes,
    storage_table,
    train_bytes,
    working_bytes,
)
from whit.shape import KNOWN_SHAPES, Shape

MIB = 2**20
BILLION = 10**9
SMOLLM2 = KNOWN_SHAPES["SmolLM2 135M"][1]
LLAMA_8B = KNOWN_SHAPES["Llama 3.1 8B"][1]


# ---- counts


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("8e9", 8 * BILLION),
        ("8B", 8 * BILLION),
        ("135M", 135_000_000),
        ("1.1b", 1_100_000_000),
        ("8_000_000_000", 8 * BILLION),
        (" 70 B ", 70 * BILLION),
        ("1.5e9", 1_500_000_000),
        ("350k", 350_000),
        ("1T", 10**12),
        ("+7g", 7 * BILLION),
        ("1", 1),
    ],
)
def test_counts_are_read_as_people_write_them(text: str, count: int) -> None:
    assert looks_like_count(text)
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["-5", "0", "1.5", "1e19", "1e-3", "0.0000000001B", "1e999"])
def test_counts_that_cannot_be_are_refused(text: str) -> None:
    assert looks_like_count(text)
    with pytest.raises(RecipeError, match="whole number from 1 to 1e18"):
        parse_count(text)


@pytest.mark.parametrize(
    "text", ["Qwen/Qwen3-8B", "model.gguf", "smollm2-135m", "8X", "", "nan", "inf", "0x10", "e9", "B"]
)
def test_names_of_models_are_no_counts(text: str) -> None:
    assert not looks_like_count(text)
    with pytest.raises(RecipeError, match="not a number of parameters"):
        parse_count(text)


@given(st.integers(1, 10**18))
@settings(max_examples=50, deadline=None, derandomize=True)
def test_every_written_out_count_comes_back(count: int) -> None:
    assert parse_count(str(count)) == parse_count(f"{count:_}") == count


# ---- storing


@pytest.mark.parametrize(
    ("n_parameters", "bits", "gib"),
    [
        (8 * BILLION, 16, 14.901161193847656),
        (8 * BILLION, 8, 7.450580596923828),
        (8 * BILLION, 4, 3.725290298461914),
        (70 * BILLION, 16, 130.385160446167),
    ],
)
def test_storage_reproduces_the_known_gib(n_parameters: int, bits: float, gib: float) -> None:
    assert storage_bytes(n_parameters, bits) / GIB == gib


def test_one_billion_parameters_load_in_4_gb_at_float32_and_2_at_16_bit() -> None:
    assert {name: size / GB for name, size in storage_table(BILLION, PLAIN_BITS).items()} == {
        "float32": 4,
        "float16": 2,
        "bfloat16": 2,
        "int8": 1,
        "int4": 0.5,
        "int2": 0.25,
    }


def test_llama_1_parameters_follow_from_its_dimensions() -> None:
    # width, layers, feed-forward width of 7B, 13B, 30B, 65B (arXiv 2302.13971, table 2, and the checkpoints)
    dimensions = (4096, 32, 11008), (5120, 40, 13824), (6656, 60, 17920), (8192, 80, 22016)
    counted = [2 * 32000 * d + n * (4 * d * d + 3 * d * f + 2 * d) + d for d, n, f in dimensions]
    assert [each.n_parameters for each in PUBLISHED if each.bits == 16] == counted
    assert [round(n / 1e9, 3) for n in counted] == [6.738, 13.016, 32.529, 65.286]


def test_published_sizes_are_the_ones_llama_cpp_printed() -> None:
    assert [each.published_gb for each in PUBLISHED if each.bits == 16] == [13, 24, 60, 120]
    assert [each.published_gb for each in PUBLISHED if each.bits == 4] == [3.9, 7.8, 19.5, 38.5]
    assert [each.published_gb for each in PUBLISHED if each.bits == 5] == [3.9, 7.8, 19.5, 38.5]


def test_read_as_gib_the_published_16_bit_sizes_are_forecast_within_rounding() -> None:
    off = {each.model: each.deviation_percent(GIB) for each in PUBLISHED if each.bits == 16}
    assert {model: round(percent, 1) for model, percent in off.items()} == {
        "7B": -3.5,
        "13B": 1.0,
        "30B": 1.0,
        "65B": 1.3,
    }


def test_read_as_gib_the_published_4_bit_sizes_are_five_bits_within_3_percent() -> None:
    assert max(abs(each.deviation_percent(GIB)) for each in PUBLISHED if each.bits == 5) < 2.95
    assert all(each.deviation_percent(GIB) < -19 for each in PUBLISHED if each.bits == 4)


# ---- running


def test_cache_and_working_memory_are_those_llama_cpp_reports_for_smollm2() -> None:
    # printed by llama-perplexity -v with fused attention: KV buffer, compute buffer and output buffer, in MiB
    assert kv_cache_bytes(SMOLLM2, 8192) / MIB == 180.00  # -c 8192 -b 512 -ub 512
    assert working_bytes(SMOLLM2, 8192) / MIB == pytest.approx(98.2520 + 0.19, abs=0.01)
    assert kv_cache_bytes(SMOLLM2, 512, batch=4) / MIB == 45.00  # -c 512 -b 2048 -ub 2048: four sequences
    assert working_bytes(SMOLLM2, 512, batch=4, chunk=2048) / MIB == pytest.approx(393.0078 + 0.75, abs=0.01)


def test_llama_8b_keeps_128_kib_per_position() -> None:
    # 32 layers x 8 heads x 128 x 2 (keys and values) x 2 bytes
    assert kv_cache_bytes(LLAMA_8B, 1) == 128 * 1024
    assert kv_cache_bytes(LLAMA_8B, 8192) == GIB


def test_the_cache_grows_with_batch_and_shrinks_with_bits() -> None:
    assert kv_cache_bytes(LLAMA_8B, 100, batch=3) == 3 * kv_cache_bytes(LLAMA_8B, 100)
    assert kv_cache_bytes(LLAMA_8B, 100, bits=8.5) == kv_cache_bytes(LLAMA_8B, 100) * 8.5 / 16


def test_sliding_layers_stop_growing_at_their_window() -> None:
    shape = Shape(6, 64, 4, 1, 16, 128, 100, sliding_layers=5, window=10)
    assert kv_cache_bytes(shape, 10) == 6 * 10 * 2 * 16 * 2
    assert kv_cache_bytes(shape, 1000) == (1000 + 5 * 10) * 2 * 16 * 2


def test_running_is_weights_cache_and_working_memory() -> None:
    run = run_bytes(1e9, SMOLLM2, 8192, batch=2)
    assert (run.weights, run.kv_cache) == (1e9, 360 * MIB)
    assert run.total == run.weights + run.kv_cache + run.working


# ---- training


@pytest.mark.parametrize(("precision", "load_gb", "train_gb"), [("float32", 4, 24), ("16-bit", 2, 12)])
def test_one_billion_parameters_train_in_24_gb_at_float32_and_12_at_16_bit(
    precision: str, load_gb: float, train_gb: float
) -> None:
    bill = train_bytes(BILLION, precision)
    assert (bill.part("weights") / GB, bill.total / GB) == (load_gb, train_gb)


def test_training_at_float32_takes_20_bytes_per_parameter_beside_the_weights() -> None:
    bill = train_bytes(1, "float32")
    parts = [bill.part(part) for part in ("weights", "optimizer", "gradients", "activations")]
    assert parts == [4, 8, 4, 8]


def test_mixed_precision_adam_takes_18_bytes_and_activations() -> None:
    # 6 weights + 8 optimizer + 4 gradients: transformers' documentation, "model memory anatomy"
    bill = train_bytes(1, "mixed")
    assert [bill.part(part) for part in ("weights", "optimizer", "gradients")] == [6, 8, 4]


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        ("adam", 8),
        ("adam-8bit", 2 + 2 * 4 / 256),
        ("sgd-momentum", 4),
        ("sgd", 0),
        ("adafactor", 4 * 2 * 4096 / 4096**2),
    ],
)
def test_optimizer_states_by_hand(optimizer: str, expected: float) -> None:
    assert train_bytes(1, "mixed", optimizer).part("optimizer") == expected


@pytest.mark.parametrize(
    ("optimizer", "make"),
    [
        ("adam", lambda p: torch.optim.Adam(p)),
        ("sgd", lambda p: torch.optim.SGD(p, lr=0.1)),
        ("sgd-momentum", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
    ],
)  # fmt: skip
def test_optimizer_states_are_those_torch_allocates(optimizer: str, make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(64, 64))
    optim = make([weight])
    weight.sum().backward()
    optim.step()
    states = (
        v for state in optim.state.values() for v in state.values() if isinstance(v, torch.Tensor) and v.ndim == 2
    )
    assert sum(v.nbytes for v in states) == train_bytes(64 * 64, "float32", optimizer).part("optimizer")


def test_vllm_tries_itself_out_with_as_many_tokens_and_sequences_as_it_serves() -> None:
    found = run_bytes(1e9, LLAMA_8B, 8192, runtime=VLLM)
    assert (found.weights, found.kv_cache) == (1e9, GIB)
    halves_and_product, logits = 2048 * (2 * 4096 + 3 * 14336) * 2, 256 * 128256 * 10
    assert found.working == halves_and_product + logits


def test_lora_trains_adapters_alone_on_a_frozen_base() -> None:
    bill = train_bytes(BILLION, "16-bit", lora=Lora(base_bits=4, trainable_parameters=10_000_000))
    assert bill.part("weights") == 0.5e9 + 4e7
    assert bill.part("optimizer") == 8e7
    assert bill.part("gradients") == 4e7
    assert bill.part("activations") == 4e9
    assert [line.why for line in bill.lines[:2]] == ["frozen base, 4 bits", "adapters"]


def test_rank_16_adapters_on_llama_8b_have_the_known_41943040_parameters() -> None:
    assert lora_parameters(LLAMA_8B.matrices(), 16) == 41_943_040


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_bill_adds_up(precision: str, optimizer: str) -> None:
    bill = train_bytes(1000, precision, optimizer)
    parts = sum(bill.part(part) for part in ("weights", "optimizer", "gradients", "activations"))
    assert bill.total == pytest.approx(parts)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(RecipeError, match="float32, 16-bit, mixed"):
        train_bytes(1, "fp4")
    with pytest.raises(RecipeError, match="adam, adam-8bit"):
        train_bytes(1, "mixed", "lion")
