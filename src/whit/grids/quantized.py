"""A quantized matrix: codes, parameters and the grid they belong to; never bytes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from whit.grids.grid import Grid, Params


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A [rows, cols] matrix on a grid.

    grid     the grid, a value
    shape    (rows, cols) = (out, in)
    codes    [rows, cols // grid.step], of grid.code_spec(shape)
    params   exactly the entries of grid.schema(shape), already rounded to what is stored
    Raises ValueError when codes or parameters do not have the shapes and dtypes that the grid states.
    """

    grid: Grid
    shape: tuple[int, int]
    codes: Tensor
    params: Params

    def __post_init__(self) -> None:
        expected = {"codes": self.grid.code_spec(self.shape), **self.grid.schema(self.shape)}
        found = {"codes": self.codes, **self.params}
        if expected.keys() != found.keys():
            raise ValueError(f"{self.grid} stores {sorted(expected)}, but {sorted(found)} were given")
        for name, spec in expected.items():
            tensor = found[name]
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise ValueError(
                    f"{name} of {self.grid} must be {spec.dtype} {list(spec.shape)}, "
                    f"found {tensor.dtype} {list(tensor.shape)}"
                )

    def dequantize(self) -> Tensor:
        """[rows, cols] float32, equal to the runtime's own decode."""
        return self.grid.decode(self.codes, self.params)
