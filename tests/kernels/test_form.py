import pytest

from whit.grids.named import GRIDS, grid_named
from whit.kernels.form import Kind, form_of, planes


@pytest.mark.parametrize("n_bits", range(2, 9))
def test_planes_make_up_the_code(n_bits: int) -> None:
    found = planes(n_bits)
    assert sum(width for width, _ in found) == n_bits
    assert [shift for _, shift in found] == [sum(width for width, _ in found[:i]) for i in range(len(found))]


def test_rows_are_padded_to_blocks_and_groups_cover_them() -> None:
    form = form_of(GRIDS["int3"], (20, 100))
    assert (form.kind, form.tiles, form.padded, form.groups, form.group) == (Kind.TILES, 2, 128, 1, 128)
    form = form_of(GRIDS["q4_0"], (20, 128))
    assert (form.padded, form.groups, form.group, form.zero) == (128, 4, 32, 8)


def test_groups_with_a_table_of_their_own_are_as_wide_as_what_meets_one_table() -> None:
    kinds = {name: form_of(grid_named(name), (4, 192)).kind for name in ("kmeans4-g16", "kmeans3-g48", "kmeans8-g96")}
    assert set(kinds.values()) == {Kind.ROWS}
    for name in ("kmeans4-g24", "kmeans8-g48", "kmeans5", "kmeans1", "kmeans1+1%"):
        assert form_of(grid_named(name), (4, 192)).kind is Kind.PLAIN
    assert form_of(grid_named("kmeans3-g48"), (4, 144)).padded == 192  # the last block has no table of its own


def test_a_form_belongs_to_grid_and_shape_alone() -> None:
    assert form_of(GRIDS["q4_k"], (4, 256)).kind is Kind.PLAIN
    assert form_of(GRIDS["fp8"], (4, 256)).zero == -1
    assert form_of(GRIDS["nvfp4"], (4, 256)).unit == 2.0**-7
