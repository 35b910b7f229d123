"""A model as a stream of blocks: one block's weights in memory at a time, whatever the depth.

transformers' own classes are built without memory; what is outside the blocks is filled, every block is replaced by
a pass-through that writes down its arguments, and one run per window gives the embeddings and the exact masks and
positions of every block. Then block after block is filled, run on its recorded arguments, and emptied.

There is no code per architecture: the blocks are the one list of modules as long as the configuration says, and
the recording checks that each block was handed the very tensor that the one before it returned.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.devices import CPU
from whit.errors import ModelError
from whit.models.model import Model
from whit.models.skeleton import check_finite, config_and_class, quiet

Weights = Mapping[str, Tensor]
FUSED = "sdpa"  # transformers' name
SAME = 1e-4  # relative difference of what a block adds
Read = Callable[[str, tuple[int, ...]], Tensor]  # name and shape of a parameter -> its values


@dataclass
class _Call:
    """The arguments of a block in one run, without the hidden states."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)


class _Recorder(nn.Module):
    """Stands where a block stood: writes its arguments down and returns the hidden states unchanged."""

    def __init__(self, label: str) -> None:
        super().__init__()
        self.call, self.given, self._label = _Call(), torch.empty(0), label

    def forward(self, hidden_states: Tensor | None = None, *args: Any, **kwargs: Any) -> Tensor:
        if hidden_states is None:
            raise ModelError(f"{self._label}: its blocks take no hidden states; it cannot be run block by block.")
        self.call, self.given = _Call(args, kwargs), hidden_states
        return hidden_states


class BlockStream:
    """The blocks of a model in order.

    n_blocks  how many there are
    device    where weights are and blocks run

    Whatever is given to it is taken there, and what it returns is where the hidden states were.
    """

    def __init__(self, model: Model, read: Read, device: torch.device = CPU) -> None:
        """Build the model without its weights.

        read    gives a parameter's values; called again each time that a block is filled
        device  as the attribute
        Raises ModelError when the architecture cannot be cut into blocks.
        """
        config, cls = config_and_class(model)
        with quiet(), torch.device("meta"):
            module = cls._from_config(config, attn_implementation="eager", experts_implementation="eager")
        self._module: PreTrainedModel = module.eval().requires_grad_(False)
        self._read, self._label, self.device = read, model.label, device
        depth = config.get_text_config().num_hidden_layers
        lists = {name: part for name, part in module.named_modules() if isinstance(part, nn.ModuleList)}
        found = [name for name, part in lists.items() if len(part) == depth and not _inside(name, lists)]
        if len(found) != 1:
            raise ModelError(f"{model.label}: {cls.__name__} has no single list of {depth} blocks.")
        self._path = found[0]
        self._blocks: list[nn.Module] = list(lists[self._path])
        self.n_blocks = depth
        self._calls: list[_Call] = []

    def start(self, windows: Tensor, take: Callable[[Tensor], None] | None = None) -> list[Tensor]:
        """Fill what is outside the blocks and run the embeddings.

        windows  [n, length] int64
        take     is given what would be returned, window by window; then nothing is
        Returns per window the hidden states [1, length, hidden] that the first block is given, on the CPU.
        """
        recorders = [_Recorder(self._label) for _ in range(self.n_blocks)]
        self._module.set_submodule(self._path, nn.ModuleList(recorders))
        make_buffers(self._module, self._module, self.device)
        self._fill(self._module, "")
        decoder = self._module.get_decoder()
        hidden: list[Tensor] = []
        with torch.no_grad():
            for window in windows:
                decoder(input_ids=window[None].to(self.device), use_cache=False)
                for before, after in pairwise(recorders):
                    if after.given is not before.given:
                        raise ModelError(f"{self._label}: something happens between its blocks.")
                (take or hidden.append)(recorders[0].given.to(CPU, copy=True))
        self._calls = [recorder.call for recorder in recorders]  # the same for all windows: they are equally long
        self._module.get_input_embeddings().to_empty(device="meta")
        return hidden

    def fill(self, index: int) -> nn.Module:
        """Block `index` with its weights."""
        block = self._blocks[index]
        make_buffers(self._module, block, self.device)
        self._fill(block, f"{self._path}.{index}.")
        return block

    def run(self, index: int, hidden: Tensor, weights: Weights | None = None) -> Tensor:
        """One window [1, length, hidden] through a filled block; differentiable where hidden asks for it.

        weights  parameters (names within the block) to use instead of its own
        """
        call = self._calls[index]
        with torch.set_grad_enabled(hidden.requires_grad):
            weights = None if weights is None else self._there(weights)
            out = _called(self._blocks[index], weights, (hidden.to(self.device), *call.args), call.kwargs)
        return (out[0] if isinstance(out, tuple) else out).to(hidden.device)

    def fuse_attention(self, hidden: Tensor) -> bool:
        """From now on compute attention in one fused operation, if that is the same; returns whether it is.

        hidden  what the first block is given, which must be filled
        Fused attention knows no caps on its scores and no sinks, so models that have them show it here.
        """
        config = self._module.config.get_text_config()
        plain, expected = config._attn_implementation, self.run(0, hidden)
        try:
            config._attn_implementation = FUSED
            fused = (self.run(0, hidden) - expected).norm() <= SAME * (expected - hidden).norm()
        except (RuntimeError, TypeError, ValueError):  # whatever a model's own attention does not take
            fused = torch.tensor(False)
        if not fused:
            config._attn_implementation = plain
        return bool(fused)

    def use_fused_attention(self) -> None:
        """As `fuse_attention`, where it has been found to be the same."""
        self._module.config.get_text_config()._attn_implementation = FUSED

    def prefix(self, index: int) -> str:
        """What stands before the names of a block's parameters in the whole model."""
        return f"{self._path}.{index}."

    def shapes(self, index: int) -> dict[str, tuple[int, ...]]:
        """The parameters of a block, by their names within it."""
        block = self._blocks[index]
        make_buffers(self._module, block)
        return {name: tuple(parameter.shape) for name, parameter in block.named_parameters()}

    def empty(self, index: int) -> None:
        """Give the memory of a block's weights back."""
        self._blocks[index].to_empty(device="meta")

    def final(self, hidden: Tensor) -> Tensor:
        """One window after the last block -> what the head is given, [length, hidden]; differentiable as `run` is."""
        found = self._after_blocks(self._module.get_decoder(), hidden).last_hidden_state[0]
        return cast(Tensor, found).to(hidden.device)

    def logits(self, hidden: Tensor, head: Tensor, weights: Weights | None = None) -> Tensor:
        """Any part [1, n, hidden] of a window after the last block -> logits [n, vocab], caps and scales included.

        head     [vocab, hidden] float32, the head's weights
        weights  other parameters, by their full names, to use instead of the model's own
        """
        output = self._module.get_output_embeddings()
        name = next(name for name, module in self._module.named_modules() if module is output)
        found = self._after_blocks(self._module, hidden, self._there({f"{name}.weight": head, **(weights or {})}))
        return cast(Tensor, found.logits[0]).to(hidden.device)

    def outer(self) -> dict[str, tuple[int, ...]]:
        """Parameters that come after the blocks, but for the head: full names and shapes."""
        given = self._module.get_input_embeddings(), self._module.get_output_embeddings()
        shapes: dict[str, tuple[int, ...]] = {}
        for name, module in self._module.named_modules():
            if module in given or name.startswith(f"{self._path}."):
                continue
            shapes |= {
                f"{name}.{key}": tuple(parameter.shape) for key, parameter in module.named_parameters(recurse=False)
            }
        return shapes

    def _after_blocks(self, part: nn.Module, hidden: Tensor, weights: Weights | None = None) -> Any:
        there = hidden.to(self.device)
        self._module.set_submodule(self._path, nn.ModuleList([_Replay(there)]))
        text = self._module.get_decoder().config
        depth, text.num_hidden_layers = text.num_hidden_layers, 1
        try:
            with torch.set_grad_enabled(hidden.requires_grad):
                return _called(part, weights, (), {"inputs_embeds": there, "use_cache": False})
        finally:
            text.num_hidden_layers = depth

    def _there(self, weights: Weights) -> Weights:
        return {name: values.to(self.device) for name, values in weights.items()}

    def _fill(self, part: nn.Module, prefix: str) -> None:
        head = self._module.get_output_embeddings()
        for name, module in part.named_modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                if module is head:  # the stream ends before it
                    continue
                full = prefix + (f"{name}.{key}" if name else key)
                values = self._read(full, tuple(parameter.shape)).to(torch.float32)
                check_finite(values, full, self._label)
                setattr(module, key, nn.Parameter(values.to(self.device), requires_grad=False))


class _Replay(nn.Module):
    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._hidden


def _called(part: nn.Module, weights: Weights | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if weights is None:
        return part(*args, **kwargs)
    return torch.func.functional_call(part, dict(weights), args, kwargs, tie_weights=False)


def _inside(name: str, lists: dict[str, nn.ModuleList]) -> bool:
    return any(name.startswith(f"{other}.") for other in lists)


def make_buffers(model: PreTrainedModel, part: nn.Module, device: torch.device = CPU) -> None:
    """Buffers are no weights: transformers computes them from the configuration."""
    for module in part.modules():
        own = dict(module.named_buffers(recurse=False))
        if not any(buffer.is_meta for buffer in own.values()):
            continue
        for name, buffer in own.items():
            module._buffers[name] = torch.empty_like(buffer, device="cpu")
        with torch.no_grad():
            model._init_weights(module)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = buffer.to(device)
