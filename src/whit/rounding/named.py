"""The roundings that need no calibration text, by name; those that do are in methods.py."""

from __future__ import annotations

from whit.errors import RecipeError
from whit.grids.floats import Float
from whit.grids.grid import Grid
from whit.grids.scaled import Scaled
from whit.rounding.density import kl
from whit.rounding.methods import METHODS
from whit.rounding.nearest import Rounding, nearest, search

KL = "kl"
ROUNDINGS: dict[str, Rounding] = {"nearest": nearest, "search": search, KL: kl}


def rounding_named(name: str) -> Rounding:
    """The rounding called `name`. Raises RecipeError that lists the names there are."""
    if name not in ROUNDINGS:
        raise RecipeError(f"There is no rounding called {name!r}. Known roundings: {', '.join(ROUNDINGS)}.")
    return ROUNDINGS[name]


def check_rounding(name: str, grid: Grid | None = None) -> None:
    """Raise RecipeError, listing the names there are, when no rounding is called `name`, or it is not for this grid."""
    if name not in ROUNDINGS and name not in METHODS:
        raise RecipeError(f"There is no rounding called {name!r}. Known: {', '.join([*ROUNDINGS, *METHODS])}.")
    if name == KL and grid is not None and not isinstance(grid, Scaled | Float):
        raise RecipeError("The rounding `kl` cuts ranges of scales: it is for integer grids such as int4-asym or q4_0.")
