"""Twins of torch's and transformers' layers compute what the originals do with their matrix rounded."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from whit.grids.grid import Grid
from whit.live.calibrate import calibrate
from whit.live.modules import QConv1D, QEmbedding, QLinear, quantize_outputs
from whit.live.quantize import freeze, quantize
from whit.live.types import BLOCKS, TYPES, fitted, qint4, qint8
from whit.rounding.nearest import nearest

WIDTHS = (64, 96, 50)
FITTING = [
    (name, cols)
    for name, grid in TYPES.items()
    for cols in WIDTHS
    if grid not in BLOCKS or cols % grid.spans(cols)[0] == 0
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(W: Tensor, grid: Grid) -> Tensor:
    return nearest(W.detach(), grid).dequantize()


def frozen(twin: nn.Module) -> nn.Module:
    holder = nn.Sequential(copy.deepcopy(twin))
    freeze(holder)
    return holder[0]


def close(a: Tensor, b: Tensor) -> None:
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max().clamp(min=1)


@pytest.mark.parametrize(("name", "cols"), FITTING)
@torch.no_grad()
def test_a_linear_layer(name: str, cols: int) -> None:
    torch.manual_seed(0)
    original, (grid, _) = nn.Linear(cols, 21), fitted(TYPES[name], cols)
    twin, x = QLinear(original, grid), normal(2, 3, cols)
    expected = functional.linear(x, rounded(original.weight, grid), original.bias)
    close(twin(x), expected)
    close(frozen(twin)(x), expected)


@pytest.mark.parametrize(("name", "cols"), FITTING)
@torch.no_grad()
def test_a_layer_on_its_side(name: str, cols: int) -> None:
    torch.manual_seed(0)
    original, (grid, _) = Conv1D(21, cols), fitted(TYPES[name], cols)
    original.weight.copy_(normal(cols, 21))
    original.bias.copy_(normal(21))
    other = copy.deepcopy(original)
    other.weight.copy_(rounded(original.weight.T.contiguous(), grid).T)
    twin, x = QConv1D(original, grid), normal(2, 3, cols)
    close(twin(x), other(x))
    close(frozen(twin)(x), other(x))
    assert frozen(twin).weight.shape == original.weight.shape


@pytest.mark.parametrize(("name", "cols"), FITTING)
@torch.no_grad()
def test_an_embedding_is_exact(name: str, cols: int) -> None:
    torch.manual_seed(0)
    original, (grid, _) = nn.Embedding(37, cols, padding_idx=3), fitted(TYPES[name], cols)
    twin, index = QEmbedding(original, grid), torch.tensor([[0, 36, 3], [17, 16, 15]])
    expected = rounded(original.weight, grid)[index]
    assert torch.equal(twin(index), expected)
    assert torch.equal(frozen(twin)(index), expected)
    assert frozen(twin)(index[:0]).shape == (0, 3, cols)


@torch.no_grad()
def test_arguments_have_the_names_that_the_originals_give_them() -> None:
    for original, given in (
        (nn.Linear(8, 4), {"input": normal(2, 8)}),
        (Conv1D(4, 8), {"x": normal(2, 8)}),
        (nn.Embedding(8, 4), {"input": torch.arange(3)}),
    ):
        expected, model = original(**given), nn.Sequential(original)
        quantize(model, qint8)
        assert model[0](**given).shape == expected.shape
        freeze(model)
        assert model[0](**given).shape == expected.shape


@torch.no_grad()
def test_a_scaled_embedding_multiplies_what_is_looked_up() -> None:
    original = Gemma3TextScaledWordEmbedding(20, 32, 0, embed_scale=math.sqrt(32))
    twin, index = QEmbedding(original, qint8, original.embed_scale), torch.arange(20)
    other = copy.deepcopy(original)
    other.weight.copy_(rounded(original.weight, qint8))
    assert torch.equal(twin(index), other(index))
    assert torch.equal(frozen(twin)(index), other(index))
    close(frozen(twin).bfloat16()(index).float(), other.bfloat16()(index).float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@torch.no_grad()
def test_an_embedding_returns_the_type_that_the_module_was_cast_to(dtype: torch.dtype) -> None:
    twin, index = QEmbedding(nn.Embedding(20, 32), qint8), torch.arange(20)
    exact = frozen(twin)(index)
    after = frozen(twin).to(dtype)
    before = frozen(copy.deepcopy(twin).to(dtype))
    for each in (after, before):
        assert each(index).dtype == dtype
    assert torch.equal(after(index), exact.to(dtype))
    assert all(value.dtype in (torch.uint8, torch.float32) for value in after.frozen.buffers())


@torch.no_grad()
def test_a_state_dict_tells_an_embedding_its_type() -> None:
    twin, index = QEmbedding(nn.Embedding(20, 32), qint8), torch.arange(20)
    source, target = frozen(copy.deepcopy(twin).bfloat16()), frozen(twin)
    target.load_state_dict(source.state_dict(), assign=True)
    assert target(index).dtype == torch.bfloat16


@torch.no_grad()
def test_a_row_that_is_not_there_is_an_index_error() -> None:
    for twin in (QEmbedding(nn.Embedding(20, 32), qint8), frozen(QEmbedding(nn.Embedding(20, 64), qint4))):
        with pytest.raises(IndexError):
            twin(torch.tensor([20]))


def test_padding_gets_no_gradient() -> None:
    twin = QEmbedding(nn.Embedding(20, 32, padding_idx=2), qint8)
    twin(torch.tensor([2, 5])).sum().backward()
    assert (twin.weight.grad[2] == 0).all()
    assert (twin.weight.grad[5] == 1).all()


@pytest.mark.parametrize("kind", ["qint8", "qint4"])
@torch.no_grad()
def test_quantized_inputs_are_multiplied_rounded(kind: str) -> None:
    grid = TYPES[kind]
    twin, x = QLinear(nn.Linear(64, 21), grid, "int8"), normal(5, 64)
    step = x.abs().amax(1, keepdim=True) / 127
    expected = functional.linear((x / step).round() * step, rounded(twin.weight, grid), twin.bias)
    close(twin(x), expected)
    close(frozen(twin)(x), expected)


@pytest.mark.parametrize("norm", [nn.LayerNorm(16), nn.RMSNorm(16)])
@torch.no_grad()
def test_a_norm_keeps_its_parameters_and_rounds_what_it_returns(norm: nn.Module) -> None:
    original, x = copy.deepcopy(norm), normal(4, 16)
    twin = copy.deepcopy(norm)
    quantize_outputs(twin, "int8")
    assert torch.equal(twin(x), original(x))  # a scale per token: the layers that follow round
    twin.outputs.fix(1.27)
    close(twin(x), (original(x) / 0.01).round().clamp(-127, 127) * 0.01)
    assert isinstance(twin, type(norm))
    assert list(dict(twin.named_parameters())) == list(dict(original.named_parameters()))
    close(copy.deepcopy(twin)(x), twin(x))


@pytest.mark.parametrize("kind", [None, "qint8"])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_torchs_own_encoder_is_seen_rounded_without_gradients_too(kind: str | None) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    x, pad = normal(2, 7, 64), torch.arange(7).expand(2, 7) > torch.tensor([[6], [4]])
    quantize(model, "qint2", kind)
    expected = model(x, src_key_padding_mask=pad)
    with torch.no_grad():
        close(model(x, src_key_padding_mask=pad), expected)
        freeze(model)
        close(model(x, src_key_padding_mask=pad), expected)
        assert copy.deepcopy(model).bfloat16()(x.bfloat16(), src_key_padding_mask=pad).dtype == torch.bfloat16
        with calibrate(model) if kind else nullcontext():
            model(x)
    assert all(each.inputs.static for each in model.modules() if isinstance(each, QLinear) and kind)


def test_printed_forms_read_like_the_originals() -> None:
    linear, embedding, norm = nn.Linear(8, 4), nn.Embedding(5, 8), nn.LayerNorm(8)
    quantize_outputs(norm, "int8")
    assert "QLinear(" in repr(QLinear(linear, qint8))
    assert linear.extra_repr() in repr(QLinear(linear, qint8))
    assert "5, 8" in repr(QEmbedding(embedding, qint8))
    assert "nf=4, nx=8" in repr(QConv1D(Conv1D(4, 8), qint8))
    assert repr(norm).startswith("QLayerNorm(")
    assert "int8:f32" in repr(QLinear(linear, qint8))
