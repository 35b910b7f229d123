"""Live twins of torch's and transformers' layers: the same arguments, the same results, a matrix on a grid.

QLinear      nn.Linear
QConv1D      transformers' Conv1D, a linear layer whose matrix lies on its side (GPT-2's attention and MLP)
QEmbedding   nn.Embedding, only the rows that are asked for are decoded
Q<norm>      any norm; its outputs are quantized, its few weights stay float
"""

from __future__ import annotations

from functools import cache
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional

from whit.grids.grid import Grid
from whit.grids.named import grid_name
from whit.kernels.matmul import rows
from whit.live.inputs import Inputs
from whit.live.twin import Twin, multiplied


class QLinear(Twin):
    """y = x W^T + b with W [out, in] on a grid.

    in_features, out_features, bias  as in nn.Linear
    """

    def __init__(self, original: nn.Linear, grid: Grid, inputs: str | None = None) -> None:
        """original  its parameters are taken over."""
        super().__init__(original.weight, grid, inputs)
        self.in_features, self.out_features, self.bias = original.in_features, original.out_features, original.bias

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which it may be given
        """input [..., in] -> [..., out]."""
        return multiplied(self, input, self.bias)

    def extra_repr(self) -> str:
        """As nn.Linear, and the grid."""
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, weights={grid_name(self.grid)}"


class QConv1D(Twin):
    """y = x W + b with W [in, out]; the grid runs along the inputs, as everywhere.

    nx, nf, bias  as in transformers' Conv1D
    """

    turned = True

    def __init__(self, original: nn.Module, grid: Grid, inputs: str | None = None) -> None:
        """original  its parameters are taken over."""
        super().__init__(cast(Tensor, original.weight), grid, inputs)
        self.nx, self.nf = (int(n) for n in cast(Tensor, original.weight).shape)
        self.bias = cast("nn.Parameter | None", original.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out]."""
        return multiplied(self, x, self.bias)

    def extra_repr(self) -> str:
        """As Conv1D, and the grid."""
        return f"nf={self.nf}, nx={self.nx}, weights={grid_name(self.grid)}"


class QEmbedding(Twin):
    """Rows of W [tokens, width] on a grid, times a number where the original has one.

    num_embeddings, embedding_dim, padding_idx  as in nn.Embedding
    """

    def __init__(self, original: nn.Embedding, grid: Grid, factor: Tensor | None = None) -> None:
        """original  its parameters are taken over.

        factor  what rows are multiplied with when they are looked up
        """
        super().__init__(original.weight, grid, None)
        self.num_embeddings, self.embedding_dim = original.num_embeddings, original.embedding_dim
        self.padding_idx = original.padding_idx
        self.register_buffer("embed_scale", factor, persistent=False)

    told = True
    embed_scale: Tensor | None

    def forward(self, input: Tensor) -> Tensor:  # torch's name, by which it may be given
        """Token ids [...] int64 -> [..., width]."""
        if self.frozen is None:
            found = functional.embedding(input, self.seen(), self.padding_idx)
        else:
            found = rows(self.frozen.packed, input, self.like.dtype)
        return found if self.embed_scale is None else found * self.embed_scale.to(found.dtype)

    def extra_repr(self) -> str:
        """As nn.Embedding, and the grid."""
        return f"{self.num_embeddings}, {self.embedding_dim}, weights={grid_name(self.grid)}"


def run_as_written(model: nn.Module) -> None:
    """Let torch's encoder layers call their parts, in place: their fast path reads all weights itself, as floats.

    Whether it may be taken is decided by what torch has noted of the layer's activation. Encoders hand it what is
    padded as nested tensors, which nothing else takes.
    """
    for module in model.modules():
        if not isinstance(module, nn.TransformerEncoder | nn.TransformerEncoderLayer):
            continue
        if any(isinstance(each, Twin) or getattr(each, "quantized", False) is True for each in module.modules()):
            if isinstance(module, nn.TransformerEncoder):
                module.use_nested_tensor = False
            else:
                module.activation_relu_or_gelu = 0


def quantize_outputs(norm: nn.Module, kind: str) -> None:
    """Let a norm round what it returns, in place: its parameters and their names stay.

    kind  as in `Inputs`
    """
    norm.outputs = Inputs(kind, leaving=True)
    norm.__class__ = _rounding_class(cast(Any, type(norm)))


@cache
def _rounding_class(original: Any) -> type[nn.Module]:
    """A subclass of a norm's class that rounds; one for all norms of the class, so that they print and copy alike."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self.outputs(original.forward(self, *args, **kwargs))

    def reduce(self: Any) -> Any:
        return _empty, (original,), self.__dict__  # pickles find classes by name, and this one has none

    own = {"forward": forward, "__reduce__": reduce, "__module__": __name__, "quantized": True}
    return type(f"Q{original.__name__}", (original,), own)


def _empty(original: Any) -> Any:
    """A rounding norm that its state is still to be given to."""
    cls: Any = _rounding_class(original)
    return cls.__new__(cls)
