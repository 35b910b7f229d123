import torch
from torch import Tensor

from whit.grids.grid import Adaptive
from whit.grids.named import grid_named
from whit.models.activations import InputScheme
from whit.rounding.nearest import nearest
from whit.transforms.awq import sampled
from whit.transforms.smooth import expected_error, smooth_factors

INT8 = grid_named("int8:f32")
INPUTS = InputScheme("int", token=True)


def data(outlier: float) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    W, x = torch.randn(96, 64, generator=generator) * 0.05, torch.randn(512, 64, generator=generator)
    x[:, 7] *= outlier
    return W, x


def factors(W: Tensor, x: Tensor, channel: Tensor) -> Tensor | None:
    adaptive: Adaptive = INT8  # type: ignore[assignment]
    return smooth_factors(sampled([(W, adaptive)]), x, x.square().mean(0), channel)


def lost(W: Tensor, x: Tensor, t: Tensor) -> float:
    """Mean squared error of the product with both sides rounded."""
    out = INPUTS.apply(x / t) @ nearest(W * t, INT8).dequantize().T
    return (out - x @ W.T).square().sum(1).mean().item()


def test_an_outlier_moves_into_the_weights() -> None:
    W, x = data(60.0)
    t = factors(W, x, torch.arange(64))
    assert t is not None
    assert t.argmax() == 7
    assert lost(W, x, t) < 0.2 * lost(W, x, torch.ones(64))


def test_the_expected_error_is_the_one_that_happens() -> None:
    for outlier in (1.0, 20.0):
        W, x = data(outlier)
        for t in (torch.ones(64), x.abs().amax(0).sqrt()):
            expected = expected_error(W, torch.ones(96), x, x.square().mean(0), t)
            assert 0.7 < expected / lost(W, x, t) < 1.4


def test_columns_of_one_channel_share_a_factor() -> None:
    W, x = data(60.0)
    t = factors(W, x, torch.arange(64) // 2)
    assert t is not None
    assert t.shape == (32,)
    assert t.argmax() == 3


def test_inputs_and_weights_of_zero_do_no_harm() -> None:
    W, x = data(60.0)
    W[:, 3], x[:, 4] = 0, 0
    t = factors(W, x, torch.arange(64))
    assert t is not None
    assert torch.isfinite(t).all()
