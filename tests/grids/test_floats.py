import pytest
import torch

from whit.grids.named import GRIDS
from whit.rounding.nearest import nearest


@pytest.mark.parametrize(("name", "dtype"), [("f32", torch.float32), ("f16", torch.float16), ("bf16", torch.bfloat16)])
def test_a_float_grid_is_a_cast(name: str, dtype: torch.dtype) -> None:
    W = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest(W, GRIDS[name]).dequantize(), W.to(dtype).float())


def test_a_weight_beyond_half_precision_is_refused() -> None:
    with pytest.raises(OverflowError, match="70000 does not fit float16"):
        nearest(torch.tensor([[7e4, 0.0]]), GRIDS["f16"])
