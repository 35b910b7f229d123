"""A model that is trained, cut between its final hidden states and its logits, so that logits are made in pieces.

The head is the causal model itself with its decoder replaced by a pass-through, as in models/skeleton.py, but alive:
gradients flow, and it is the very parameters that are trained. A model that cannot be cut so is called whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from whit.models.skeleton import PassThrough
from whit.products import has_bfloat16

PIECE = 64  # tokens whose logits are there at once: [64, vocab] fits the caches


def fast(device: torch.device) -> torch.autocast:
    """bfloat16 products where there are units for them."""
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type != "cpu" or has_bfloat16())


class Halves:
    """Both halves of one model.

    hidden  token ids [windows, length] int64 -> final hidden states [windows * length, width]
    logits  some of these rows -> logits [rows, vocab]
    Both are to be called under `fast`.
    """

    def __init__(self, model: nn.Module) -> None:
        """The model keeps working as a whole."""
        self.hidden, self.logits = _cut(model) or (_whole(model), _as_they_are)

    def only_logits(self) -> None:
        """Let go of the first half."""
        self.hidden = _gone


def _cut(model: nn.Module) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]] | None:
    """None when the halves do not add up to the model, or there are none."""
    if not isinstance(model, PreTrainedModel):
        return None
    decoder = cast(Any, model).get_decoder()
    name = next((name for name, part in model.named_children() if part is decoder), None)
    if name is None:
        return None
    vocabulary = model.config.get_text_config().vocab_size
    probe = torch.arange(min(4, vocabulary), device=model.device)[None]
    with torch.no_grad():
        expected = cast(Any, model)(input_ids=probe, use_cache=False).logits[0]
        output = type(decoder(input_ids=probe, use_cache=False))
    head = copy.copy(model)
    quick = {key: _in_bfloat16(part) for key, part in model.named_children() if _is_still(part)}
    head._modules = {**model._modules, **quick, name: PassThrough(output)}

    def hidden(ids: Tensor) -> Tensor:
        return cast(Tensor, decoder(input_ids=ids, use_cache=False).last_hidden_state.flatten(0, 1))

    def logits(rows: Tensor) -> Tensor:
        return cast(Tensor, cast(Any, head)(inputs_embeds=rows[None], use_cache=False).logits[0])

    with torch.no_grad(), fast(probe.device):
        found = logits(hidden(probe))
    close = (found - expected).norm() <= 0.05 * expected.norm()  # bfloat16 beside float32, not another function
    return (hidden, logits) if close else None


def _is_still(part: nn.Module) -> bool:
    """Whether it is a plain matrix that nobody trains."""
    return type(part) is nn.Linear and not part.weight.requires_grad and part.weight.dtype == torch.float32


def _in_bfloat16(part: nn.Module) -> nn.Module:
    """A stand-in with the weights that autocast would make anew for every piece; float32 where nothing is cast."""
    if not has_bfloat16() and part.weight.device.type == "cpu":
        return part
    made = copy.copy(part)
    made._parameters = {
        key: None if each is None else nn.Parameter(each.detach().to(torch.bfloat16), requires_grad=False)
        for key, each in part._parameters.items()
    }
    return made


def _whole(model: nn.Module) -> Callable[[Tensor], Tensor]:
    def hidden(ids: Tensor) -> Tensor:
        out = model(ids)
        return cast(Tensor, (out if isinstance(out, Tensor) else out.logits).flatten(0, 1))

    return hidden


def _gone(ids: Tensor) -> Tensor:
    raise RuntimeError("only the second half is left")


def _as_they_are(rows: Tensor) -> Tensor:
    return rows
