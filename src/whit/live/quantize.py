"""`quantize` and `freeze`: a model's layers replaced by twins on grids, then by codes.

    quantize(model, weights=qint8, activations=qint8)
    with calibrate(model):
        model(**batch)
    freeze(model)

Replacing is done in place and by structure: what a module computes decides, not which architecture it is in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from whit.allocator import return_memory
from whit.errors import BadWeightsError, RecipeError
from whit.grids.grid import Grid
from whit.grids.named import grid_name
from whit.live.attention import attend_natively
from whit.live.experts import NAMES, QExperts, has_experts
from whit.live.feedback import Progress, feedback
from whit.live.inputs import Inputs
from whit.live.modules import QConv1D, QEmbedding, QLinear, quantize_outputs, run_as_written
from whit.live.report import Left, Replaced, Report
from whit.live.run import Batch, Call, calls_of
from whit.live.salient import Beside, check_salient, split, squares_of
from whit.live.stored import Frozen, Stored, settle
from whit.live.twin import Ties, Twin, part
from whit.live.types import fitted, out_of_reach, type_named
from whit.pipeline.effort import PRESETS
from whit.recipes.quantizers import quantizer_named
from whit.rounding.methods import METHODS as LEARNED
from whit.rounding.named import ROUNDINGS, check_rounding
from whit.rounding.nearest import Rounding

Patterns = str | Sequence[str] | None
Text = Batch | str | Iterable[Any]  # of what `calls_of` takes
METHODS = (*ROUNDINGS, *LEARNED)
NEAREST = "nearest"
KINDS = {"qint8": "int8", "qfloat8": "fp8"}  # types of activations
HOOKS = (  # where torch keeps what is called around a module's forward and backward
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)
FACTOR = "embed_scale"  # what transformers' scaled embeddings call their factor


def quantize(
    model: nn.Module,
    weights: Grid | str | None = None,
    activations: Grid | str | None = None,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    method: str = "nearest",
    salient: float | None = None,
    calibration: Text | None = None,
    tokenizer: Callable[..., Any] | None = None,
    preset: str = "fast",
    progress: Progress | None = None,
) -> Report:
    """Replace layers by twins on grids, in place; weights stay float, and are seen rounded, until `freeze`.

    weights      a type such as `qint4`, a quantizer such as "kmeans4" or "kl4-g64", or the name of a grid; None leaves
                 all matrices float
    activations  `qint8` or `qfloat8`: what arrives at layers and what norms return is quantized too
    include      shell patterns of module names; None for all
    exclude      likewise; wins
    method       how codes are chosen: "nearest" from the range of a group, "search" for the least squared error,
                 "kl" for the distribution nearest to the weights', "feedback" for the least error at the layer's
                 output on the calibration text, "fisher" for the least change of the predictions on it, "weighted",
                 "gptq" and "fisher-feedback" as for files (docs/rounding.md)
    salient      share of the input channels of every linear layer, such as 0.01, that stay float beside the codes:
                 those with the largest second moment times the norm of their column on the calibration text
    calibration  for all from "feedback" on, and for `salient`: token ids [n, length] int64, or batches as the model
                 takes them, lists of token ids or texts in any iterable, such as a DataLoader
    tokenizer    for texts
    preset       how much work these do
    progress     told (steps done, steps in all, what)
    Modules that already are twins stay as they are, so that calls for different layers add up.
    Returns what was replaced and what was left alone with the reason.
    Raises RecipeError for a type that is not known or does not fit, BadWeightsError for NaN and infinities.
    """
    grid, kind, method = type_named(weights), _kind(activations), _method(weights, method)
    if grid is None and kind is not None:
        raise RecipeError("Activations are quantized together with the weights they meet: give weights=, too.")
    names = [name for name, _ in model.named_modules()]
    if include is not None and not any(_matches(name, include, True) for name in names):
        raise RecipeError(f"include={include!r} matches no module; {names[-1]!r} is one.")
    if salient is not None and grid is None:
        raise RecipeError("salient= keeps channels beside codes: give weights=, too.")
    if salient is not None and grid is not None:
        check_salient(salient, grid)
    calls = _calls(method, calibration, tokenizer, preset, salient is not None)
    replaced: list[Replaced] = []
    left: list[Left] = []
    twins: dict[int, nn.Module] = {}  # a module that is used twice is replaced once
    homes: dict[int, str] = {}  # parameters and who has them first
    total = sum(each.numel() for each in model.parameters())

    def chosen(name: str) -> bool:
        return _matches(name, include, True) and not _matches(name, exclude, False)

    if grid is not None:
        for name, parameter in model.named_parameters():  # before anything is changed
            if parameter.dim() in (2, 3) and chosen(name.rpartition(".")[0]):
                _check(name, parameter)
    squares: dict[str, Tensor] = {}
    if salient is not None and grid is not None:
        squares = squares_of(model, _splittable(model, chosen), calls or ())
    for name, module in list(model.named_modules()):
        if isinstance(module, Twin | Beside | QExperts | Stored | Inputs | nn.ModuleList | nn.ModuleDict):
            continue
        if module is model and not _is_norm(module):
            twin: tuple[nn.Module | None, Replaced] | str = "the model itself: nothing holds it, so nothing replaces it"
        else:
            twin = (_sizes(module, grid) or twin_of(name, module, grid, kind)) if chosen(name) else "excluded"
        if isinstance(twin, str):
            own = sum(each.numel() for each in module.parameters(recurse=False))
            if own:
                left.append(Left(name, type(module).__name__, own, twin))
            continue
        made, found = twin
        if salient is not None and name in squares and isinstance(made, QLinear | QConv1D):
            made = split(made, squares[name], salient)
            notes = found.note, f"{made.columns.numel()} inputs in float"
            found = replace(found, note="; ".join(filter(None, notes)))
        weight = module._parameters.get("weight")
        first = homes.setdefault(id(weight), name) if weight is not None else name
        if first != name and found.weights:
            found = replace(found, n_parameters=0, note=f"tied to {first}")
        replaced.append(found)
        if made is not None:
            twins[id(module)] = made
    swap(model, twins)
    new = {name: each for name, each in model.named_modules() if isinstance(each, Twin) and _is_new(each, twins)}
    if method != NEAREST:
        parted = part(model, new.values())
        replaced = [_parted(each) if any(new.get(each.name) is one for one in parted) else each for each in replaced]
    if method in ROUNDINGS and method != NEAREST:  # which is what twins do by themselves
        _fixed(new, ROUNDINGS[method])
    elif method in LEARNED:
        assert calls is not None
        feedback(model, new, calls, PRESETS[preset].effort, progress, method)
    return Report(tuple(replaced), tuple(left), total)


@dataclass(frozen=True)
class Memory:
    """Bytes of all parameters and buffers, shared ones once."""

    before: int
    after: int

    def __str__(self) -> str:
        share = self.after / max(1, self.before)
        return f"{self.before / 1e6:,.1f} MB before, {self.after / 1e6:,.1f} MB after ({share:.3f}x)"


def freeze(model: nn.Module) -> Memory:
    """Keep codes instead of float weights, everywhere in the model, in place.

    Gradients do not reach frozen matrices. Returns the bytes before and after.
    Raises BadWeightsError, before anything is changed, for NaN, infinities and weights beyond their grid's range.
    """
    before = n_bytes(model)
    loose = {name: each for name, each in model.named_modules() if isinstance(each, Twin) and each.frozen is None}
    for name, twin in loose.items():
        _check(name, twin.matrix)
        try:
            if out_of_reach(twin.grid, twin.matrix):
                twin.quantized()  # which knows for certain
        except BadWeightsError as error:
            raise BadWeightsError(f"{name}: {error}") from None
    ties = Ties()
    for twin in loose.values():
        ties.freeze(twin, lambda twin=twin: Frozen.of(twin.quantized()))  # type: ignore[misc]
    del ties
    settle(model)
    attend_natively(model)
    return_memory()
    return Memory(before, n_bytes(model))


def twins_of(model: nn.Module) -> Iterator[Twin]:
    """All twins, in the model's order."""
    return (module for module in model.modules() if isinstance(module, Twin))


def n_bytes(model: nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    return sum({each.data_ptr() or id(each): each.nbytes for each in tensors}.values())


def _calls(
    method: str, calibration: Text | None, tokenizer: Callable[..., Any] | None, preset: str, salient: bool
) -> list[Call] | None:
    if method not in METHODS:
        raise RecipeError(f"There is no method called {method!r} for live models. Known: {', '.join(METHODS)}.")
    if preset not in PRESETS:
        raise RecipeError(f"There is no preset called {preset!r}. Known: {', '.join(PRESETS)}.")
    if method not in LEARNED and not salient:
        return None
    if calibration is None:
        what = f"The rounding {method!r} looks at" if method in LEARNED else "salient= chooses channels for"
        raise RecipeError(f"{what} what arrives at the layers: give it calibration=, ids or texts.")
    calls = calls_of(calibration, tokenizer)
    if not calls:
        raise RecipeError("The calibration text is empty.")
    return calls


def _splittable(model: nn.Module, chosen: Callable[[str], bool]) -> dict[str, nn.Module]:
    """Linear layers with a matrix of their own: a tied one is read elsewhere, too."""
    shared = Counter(id(each) for module in model.modules() for each in module._parameters.values() if each is not None)
    return {
        name: module
        for name, module in model.named_modules()
        if (type(module) is nn.Linear or type(module).__name__ == "Conv1D")
        and chosen(name)
        and shared[id(module._parameters.get("weight"))] == 1
    }


def _method(weights: Grid | str | None, method: str) -> str:
    """How codes are chosen: as was asked for, or in the only way that a quantizer has."""
    quantizer = quantizer_named(weights) if isinstance(weights, str) else None
    own = None if quantizer is None else quantizer.rounding
    if own is None or method == own:
        check_rounding(method if method in ROUNDINGS else NEAREST, type_named(weights))
        return method
    if method != NEAREST:
        raise RecipeError(f"{weights} chooses its ranges by {own}; leave method={method!r} or take uniform.")
    return own


def _fixed(twins: Mapping[str, Twin], rounding: Rounding) -> None:
    done: list[Twin] = []
    for twin in twins.values():
        other = next((each for each in done if each.tied_to(twin)), None)
        if other is None:
            twin.fix(rounding(twin.matrix.detach().float(), twin.grid))
            done.append(twin)
        else:
            twin.fix_as(other)


def _parted(found: Replaced) -> Replaced:
    notes = found.note, "no longer tied to layers that are not on this grid"
    return replace(found, note="; ".join(filter(None, notes)))


def _is_new(twin: Twin, twins: Mapping[int, nn.Module]) -> bool:
    return any(twin is made or any(twin is each for each in made.modules()) for made in twins.values())


def _kind(activations: Grid | str | None) -> str | None:
    if activations is None:
        return None
    for name, kind in KINDS.items():
        if type_named(activations) == type_named(name):
            return kind
    raise RecipeError(f"activations can be {' or '.join(KINDS)}, found {activations}.")


def twin_of(
    name: str, module: nn.Module, grid: Grid | None, kind: str | None
) -> tuple[nn.Module | None, Replaced] | str:
    """A module's twin and what to report, or why there is none; no twin for a norm, which is changed in place."""
    if "forward" in module.__dict__:
        return "its own forward was put in the place of its class's: what it computes is not known"
    if _is_norm(module):
        if kind is None or getattr(module, "quantized", False):
            return "a norm: its few weights stay float"
        quantize_outputs(module, kind)
        return None, Replaced(name, type(module).__name__, "", kind, 0)
    stacks = {key: value for key, value in module._parameters.items() if value is not None and value.dim() == 3}
    plain = module._parameters.get("weight")
    matrix = plain if plain is not None and plain.dim() == 2 else None
    if matrix is None and not stacks:
        return "no layer that can be on a grid"
    if grid is None:
        return "no type of weights was asked for"
    made: nn.Module
    try:
        if isinstance(module, nn.Linear):
            if type(module).forward is not nn.Linear.forward or isinstance(module, NonDynamicallyQuantizableLinear):
                return "a Linear that computes something else, or is read from outside"
            chosen, note = fitted(grid, module.weight.shape[1])
            made = QLinear(module, chosen, kind)
        elif type(module).__name__ == "Conv1D" and matrix is not None:
            chosen, note = fitted(grid, matrix.shape[0])
            made = QConv1D(module, chosen, kind)
        elif isinstance(module, nn.Embedding):
            factor = getattr(module, FACTOR, None)
            if type(module).forward is not nn.Embedding.forward and not isinstance(factor, Tensor):
                return "an Embedding that computes something else"
            if module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
                return "an Embedding that changes while it is read, or has gradients of its own kind"
            chosen, note = fitted(grid, module.weight.shape[1])
            made = QEmbedding(module, chosen, factor)
            kind = None
        elif stacks and has_experts(module):
            return _experts(name, module, stacks, grid, kind)
        elif module._parameters.keys() >= NAMES:
            return "experts that are not multiplied one by one"
        else:
            return (
                "no layer that can be on a grid" if matrix is None else "a matrix of its own kind, such as a router's"
            )
    except RecipeError as error:
        return str(error)
    n = matrix.numel() if matrix is not None else 0
    return made, Replaced(name, type(made).__name__, grid_name(chosen), kind or "", n, note)


def _sizes(module: nn.Module, grid: Grid | None) -> str:
    """Why a module's matrices are too large or too small for a grid; empty when they are not."""
    own = [each for each in module._parameters.values() if each is not None and each.dim() in (2, 3)]
    return "" if grid is None else next(filter(None, (out_of_reach(grid, each) for each in own)), "")


def _experts(
    name: str, module: nn.Module, stacks: Mapping[str, nn.Parameter], grid: Grid, kind: str | None
) -> tuple[nn.Module, Replaced]:
    turned, grids, notes = bool(getattr(module, "is_transposed", False)), dict[str, Grid](), list[str]()
    n = sum(stack.numel() for stack in stacks.values())
    for key, stack in stacks.items():
        one = stack[0].T if turned else stack[0]
        grids[key], note = fitted(grid, one.shape[1])
        notes += [note] if note else []
    label = ", ".join(dict.fromkeys(map(grid_name, grids.values())))
    return QExperts(module, grids, kind), Replaced(name, "QExperts", label, kind or "", n, "; ".join(notes))


def _check(name: str, W: Tensor) -> None:
    if not W.is_meta and not torch.isfinite(W.sum()) and not torch.isfinite(W).all():
        raise BadWeightsError(f"{name}: its weights hold NaN or infinities; nothing can be made of them.")


def _is_norm(module: nn.Module) -> bool:
    """One vector of weights, perhaps a second of biases, and a name that says it."""
    own = [each for each in module._parameters.values() if each is not None]
    return "Norm" in type(module).__name__ and bool(own) and all(each.dim() == 1 for each in own)


def _matches(name: str, patterns: Patterns, absent: bool) -> bool:
    if patterns is None:
        return absent
    return any(fnmatchcase(name, each) for each in ([patterns] if isinstance(patterns, str) else patterns))


def swap(model: nn.Module, twins: Mapping[int, nn.Module]) -> None:
    """Put twins where their originals are, wherever that is, with the originals' hooks."""
    for parent in list(model.modules()):
        for key, child in list(parent._modules.items()):
            if child is not None and id(child) in twins:
                twin = twins[id(child)]
                twin.train(child.training)
                _hand_over(child, twin)
                parent._modules[key] = twin
    run_as_written(model)


def _hand_over(original: nn.Module, twin: nn.Module) -> None:
    """The original's hooks become the twin's, before its own, in the dictionaries that handles remove them from."""
    for key in HOOKS:
        hooks = getattr(original, key)
        hooks.update(getattr(twin, key))
        setattr(twin, key, hooks)
    if original._is_full_backward_hook is not None:
        twin._is_full_backward_hook = original._is_full_backward_hook
