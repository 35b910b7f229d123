"""The measuring loop: two models, the same windows of a text, one comparison.

The obvious way, both models in memory and all their logits in two arrays, needs twice the weights and gigabytes for
a large vocabulary. Here one model is in memory at a time: its body turns the windows into final hidden states, which
are small and kept, and is dropped; only its head stays. Logits of both are then made for a few positions at a time.

The recipe is that of llama.cpp's perplexity tool: windows of 512 tokens without overlap, and of each window only the
second half is scored, so that every scored token has at least 256 tokens of context. The logits at positions
256..510 are compared; they predict tokens 257..511: 255 scored tokens per window. No BOS token is added (llama.cpp
puts one in place of a window's first token, for models whose vocabulary asks for it).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from whit.devices import CPU
from whit.errors import BadWeightsError, ModelError, TextError
from whit.evaluation.divergence import Comparison, TokenMeasures, joined, measure, summarize
from whit.models.model import Model
from whit.models.skeleton import load_module, split

LOGITS = 2**22  # values in one piece of logits: 85 positions of a vocabulary of 49152, 32 MB in float64
Progress = Callable[[int, int, str], None]  # steps done, steps in all, what is being worked on


@dataclass(frozen=True)
class FinalStates:
    """What is left of a model that has read a text: enough to make its logits at the scored positions.

    label    the model, for messages
    hidden   [positions, hidden] float32   final hidden states of all scored positions, window after window
    head     hidden states -> logits [positions, vocab]
    n_vocab  columns of the logits
    """

    label: str
    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    n_vocab: int


def compare(
    candidate: Model, reference: Model, windows: Tensor, progress: Progress | None = None, device: torch.device = CPU
) -> Comparison:
    """Measure how far `candidate` is from `reference` on a text.

    windows   [windows, length] int64   token ids, as `whit.calibration.text.windows` cuts them
    progress  told (steps done, steps in all, what)
    device    where the models run
    Raises ModelError when the models cannot be loaded or do not share a vocabulary, BadWeightsError when logits are
    not finite, TextError when the windows do not fit the models.
    """
    n, tell = windows.shape[0], progress or _ignore

    def after(steps: int) -> Progress:
        return lambda done, _, what: tell(steps + done, 3 * n, what)

    states_reference = final_states(reference, windows, after(0), device=device)
    states_candidate = final_states(candidate, windows, after(n), device=device)
    return compare_states(states_candidate, states_reference, windows, after(2 * n))


def final_states(
    model: Model,
    windows: Tensor,
    progress: Progress | None = None,
    whole: Callable[[nn.Module], None] | None = None,
    device: torch.device = CPU,
) -> FinalStates:
    """Load a model, let it read every window, keep the hidden states of the scored positions and its head.

    windows  [windows, length] int64
    device   where it runs; what is kept of it is on the CPU, but for the head
    whole    is given the loaded model before it is cut in two, for what else is to be asked of it
    Raises ModelError, BadWeightsError, TextError as `compare` does. Several candidates may share a reference's states.
    """
    tell = progress or _ignore
    n, length = windows.shape
    tell(0, n, f"loading {model.label}")
    module = load_module(model).to(device)
    if whole is not None:
        whole(module)
    halves = split(module)
    del module
    if halves.longest is not None and length > halves.longest:
        raise TextError(
            f"{model.label} reads at most {halves.longest} tokens; windows of {length} are too long for it."
        )
    if windows.max() >= halves.n_vocab:
        raise ModelError(
            f"{model.label}: the text has token {windows.max().item()}, the model knows {halves.n_vocab}. "
            "Tokenizer and model do not belong together."
        )
    hidden = []
    for index in range(n):
        states = halves.body(windows[index : index + 1])[0, scored(length)]  # [positions, hidden]
        hidden.append(states.float().clone())  # a view would keep the whole window
        tell(index + 1, n, f"reading with {model.label}")
    kept = FinalStates(model.label, torch.cat(hidden), halves.head, halves.n_vocab)
    del halves
    gc.collect()  # modules hold cycles; the next model needs the room now
    return kept


def compare_states(
    candidate: FinalStates, reference: FinalStates, windows: Tensor, progress: Progress | None = None
) -> Comparison:
    """Compare two models that have read the same windows [windows, length] int64. Raises as `token_measures` does."""
    return summarize(token_measures(candidate, reference, windows, progress))


def token_measures(
    candidate: FinalStates, reference: FinalStates, windows: Tensor, progress: Progress | None = None
) -> TokenMeasures:
    """What `compare_states` sums up, token by token.

    Raises ModelError when their vocabularies differ, BadWeightsError when logits are not finite.
    """
    if candidate.n_vocab != reference.n_vocab:
        raise ModelError(
            f"{candidate.label} predicts {candidate.n_vocab} tokens, {reference.label} {reference.n_vocab}: "
            "they cannot be compared token by token. Give the model that the candidate was made from."
        )
    tell = progress or _ignore
    n, length = windows.shape
    targets = windows[:, scored(length, shift=1)].flatten()  # [positions]
    size = max(1, LOGITS // reference.n_vocab)
    n_chunks = math.ceil(targets.numel() / size)
    parts: list[TokenMeasures] = []
    for index in range(n_chunks):
        chunk = slice(index * size, (index + 1) * size)
        logits = [_logits(states, chunk) for states in (candidate, reference)]
        parts.append(measure(logits[0], logits[1], targets[chunk]))
        tell(math.floor(n * (index + 1) / n_chunks), n, "comparing")
    return joined(parts)


def scored(length: int, shift: int = 0) -> slice:
    """The positions of a window whose logits are scored; with shift=1, the tokens that they predict."""
    return slice(length // 2 + shift, length - 1 + shift)


def _logits(states: FinalStates, chunk: slice) -> Tensor:
    logits = states.head(states.hidden[chunk]).float()  # [positions, vocab]
    if not torch.isfinite(logits).all():
        raise BadWeightsError(
            f"{states.label}: predictions near scored position {chunk.start} are not finite although all weights are. "
            "The model overflows; get it again or quantize it with more bits."
        )
    return logits


def _ignore(done: int, total: int, what: str) -> None:
    """Nobody is watching."""
