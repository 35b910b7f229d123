from pathlib import Path
from typing import Any

import pytest
import torch

from tiny import random_tokens, tiny_model
from whit.errors import RecipeError
from whit.grids.named import grid_name, grid_named
from whit.grids.scaled import PerChannel, PerGroup, Scaled
from whit.live.quantize import freeze, quantize
from whit.live.save import load, save
from whit.live.types import (
    BLOCKS,
    TYPES,
    fitted,
    grouped,
    kmeans3,
    mxfp4,
    nf4,
    out_of_reach,
    qfloat8,
    qfloat8_e5m2,
    qint4,
    qint8,
    type_named,
)
from whit.rounding.nearest import nearest


@pytest.mark.parametrize("name", TYPES)
def test_every_type_has_a_name_that_is_found_again(name: str) -> None:
    assert type_named(name) == TYPES[name]
    assert grid_named(grid_name(TYPES[name])) == TYPES[name]


@pytest.mark.parametrize("size", [8, 16, 32, 128, 24])
@pytest.mark.parametrize("name", [key for key, it in TYPES.items() if isinstance(it, Scaled) and it not in BLOCKS])
def test_types_with_other_groups_have_names_too(name: str, size: int) -> None:
    grid = grouped(TYPES[name], size)
    assert grid_named(grid_name(grid)) == grid


def test_grids_are_types_and_none_is_none() -> None:
    assert type_named(qint4) is qint4
    assert type_named(None) is None
    assert type_named("q4_k") == grid_named("q4_k")


def test_an_unknown_type_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(RecipeError, match="qint5.*qint8.*qint4.*nf4"):
        type_named("qint5")


@pytest.mark.parametrize("other", [8, torch.int8, torch.float8_e4m3fn, qint4.scheme])
def test_what_is_no_type_is_refused_with_the_names_there_are(other: Any) -> None:
    with pytest.raises(RecipeError, match="qint8.*qint4.*nf4"):
        type_named(other)
    with pytest.raises(RecipeError, match="found"):
        quantize(tiny_model("llama"), weights=other)


@pytest.mark.parametrize(("grid", "size"), [(mxfp4, 64), (kmeans3, 0), (qint4, 0), (grid_named("q4_k"), 64)])
def test_groups_that_belong_to_a_type_cannot_be_changed(grid: Scaled, size: int) -> None:
    with pytest.raises(RecipeError):
        grouped(grid, size)


def test_tables_can_be_of_groups() -> None:
    assert grouped(kmeans3, 32) == grid_named("kmeans3-g32")
    assert fitted(grouped(kmeans3, 64), 96)[0] == grouped(kmeans3, 32)
    assert fitted(grouped(kmeans3, 64), 50) == (kmeans3, "one table per row: no group divides 50 weights")


def test_eight_bit_floats_are_those_of_torch() -> None:
    for grid, dtype in ((qfloat8, torch.float8_e4m3fn), (qfloat8_e5m2, torch.float8_e5m2)):
        every = torch.arange(256, dtype=torch.uint8).view(dtype).float()
        finite = every[torch.isfinite(every)]
        assert torch.equal(torch.tensor(grid.levels.numbers), finite.unique())


@pytest.mark.parametrize(
    ("cols", "size"), [(128, 64), (64, 64), (96, 32), (48, 16), (24, 8), (40, 8), (320, 64), (72, 8)]
)
def test_the_largest_smaller_group_that_divides_is_taken(cols: int, size: int) -> None:
    grid, note = fitted(qint4, cols)
    assert isinstance(grid, Scaled)
    assert grid.scheme == PerGroup(size)
    assert (note == "") == (size == 64)


def test_rows_that_no_group_divides_get_one_scale() -> None:
    grid, note = fitted(nf4, 50)
    assert isinstance(grid, Scaled)
    assert grid.scheme == PerChannel()
    assert "50" in note


def test_one_scale_per_row_always_fits() -> None:
    assert fitted(qint8, 7) == (qint8, "")
    assert fitted(kmeans3, 7) == (kmeans3, "")


@pytest.mark.parametrize("name", ["mxfp4", "nvfp4", "q4_k", "iq2_xs"])
def test_blocks_that_do_not_divide_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="rows of 40"):
        fitted(grid_named(name), 40)


@pytest.mark.parametrize("method", ["nearest", "search", "feedback"])
@pytest.mark.parametrize("name", ["nf4", "fp4", "mxfp4", "nvfp4", "qfloat8", "qfloat8_e5m2", "fp4-g16", "fp8-g32"])
def test_floats_are_live_types_by_every_method_and_come_back_from_a_folder(
    tmp_path: Path, name: str, method: str
) -> None:
    """The same logits before freezing, after it and from a folder."""
    tokens, model = torch.tensor([random_tokens(24)]), tiny_model("llama")
    text = torch.tensor([random_tokens(24, seed) for seed in range(1, 5)])
    with torch.no_grad():
        original = model(tokens).logits
        quantize(model, name, method=method, calibration=text if method == "feedback" else None)
        seen = model(tokens).logits
        freeze(model)
        codes = model(tokens).logits
    save(model, tmp_path / "out")
    loaded = load(tmp_path / "out")
    loaded.set_attn_implementation("eager")  # type: ignore[operator]
    with torch.no_grad():
        again = loaded(tokens).logits
    torch.testing.assert_close(codes, seen, rtol=1e-3, atol=1e-3)
    assert torch.equal(again, codes)
    assert 0 < (codes - original).norm() < 0.9 * original.norm()


@pytest.mark.parametrize("name", [*TYPES, "q4_0", "q4_k", "iq4_nl", "int4-g64", "kmeans3+2%"])
def test_only_weights_without_a_scale_are_out_of_reach(name: str) -> None:
    grid = type_named(name)
    for size in (0.0, 1e-3, 0.02, 5.0):
        W = size * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        assert out_of_reach(grid, W) == ""
        assert out_of_reach(grid, W.bfloat16()) == ""
    for size in (1e-9, 1e7):
        W = size * torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
        try:
            held = nearest(W, grid).dequantize().any()
        except OverflowError:
            held = False
        assert bool(out_of_reach(grid, W)) != bool(held)
    assert out_of_reach(grid, torch.empty(4, 4, device="meta")) == ""
    assert out_of_reach(grid, torch.empty(0, 4)) == ""
