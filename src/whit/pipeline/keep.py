"""Tensors that somebody wants on a type of their own, whatever a recipe or a budget says: `PATTERN=TYPE`.

Patterns may name a matrix as a Hugging Face folder does (`lm_head`, `model.layers.0.mlp.down_proj`), as transformers'
module does, or as GGUF does (`blk.*.attn_v.weight`); all are turned into rules about GGUF names, which every recipe is
made of, so that mixtures, saved recipes and budgets need to know nothing of it. What is kept is kept exactly, or
refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from fnmatch import fnmatchcase

from whit.checkpoints.quantized import WEIGHT
from whit.errors import ModelError, RecipeError
from whit.grids.floats import Float
from whit.grids.named import GRIDS, grid_named
from whit.layouts.ggml import ggml_type_of
from whit.models.architecture import GGUFView, head_name
from whit.models.links import Links
from whit.models.model import Model
from whit.pipeline.folder import EMBEDDING, MODULE, plan_model
from whit.pipeline.plan import Plan, Step
from whit.pipeline.quantize import model_view, plan_gguf
from whit.pipeline.targets import GGUF, OUTER, fused
from whit.recipes import folders
from whit.recipes.recipe import Recipe, Rule

HEAD = "output.weight"
N_CLOSE = 3  # names that an error suggests
TOGETHER = (folders.GPTQ, folders.AWQ, folders.COMPRESSED)  # layouts of runtimes that multiply some matrices as one


@dataclass(frozen=True)
class _Matrix:
    """What a matrix is called.

    gguf   its name in GGUF files
    whole  names that mean all of it, with and without `.weight`
    head   names of the head, when it is one
    parts  per matrix of a folder that it is made of (experts, fused projections): the names of that one
    """

    gguf: str
    whole: tuple[str, ...]
    head: tuple[str, ...]
    parts: tuple[tuple[str, ...], ...]


def kept(model: Model, settings: Sequence[str], layout: str = GGUF, activations: str = "") -> dict[str, str]:
    """GGUF tensor -> name of a grid, for settings such as `lm_head=f16`; of two that match, the last one counts.

    layout, activations  of the output, as in a recipe
    Raises RecipeError for a setting of another form, a type that the output does not have, a pattern that matches no
    matrix or one that matches some part of a matrix alone.
    """
    matrices, found = _matrices(model), dict[str, str]()
    patterns: dict[str, tuple[str, str]] = {}
    for setting in settings:
        pattern, equals, kind = setting.rpartition("=")
        if not (pattern and equals and kind):
            raise RecipeError(f"--keep {setting!r} is not of the form 'pattern=type', such as 'lm_head=f16'.")
        grid = grid_for(kind, layout, activations)
        names = [each.gguf for each in matrices if _matches(each, pattern)]
        if not names:
            raise RecipeError(f"--keep {setting}: {pattern} matches no matrix.{_close(pattern, matrices)}")
        for name in names:
            role = _role(pattern, name, matrices)
            if found.get(name, grid) != grid and {patterns[name][1], role} == {"head", "embedding"}:
                raise RecipeError(
                    f"--keep: this model's head is its embedding, one matrix. {patterns[name][0]} wants it on "
                    f"{found[name]}, {pattern} on {grid}; give one of them."
                )
            found[name], patterns[name] = grid, (pattern, role)
    _check(model, found, layout, activations)
    return found


def keeping(model: Model, recipe: Recipe, settings: Sequence[str], rounding: str) -> tuple[Recipe, dict[str, str]]:
    """The recipe with settings in front, and GGUF tensor -> grid of what they are about. Raises what `kept` raises."""
    if not settings:
        return recipe, {}
    chosen = kept(model, settings, recipe.layout, recipe.activations)
    return with_kept(recipe, chosen, matrix_names(model), rounding), chosen


def with_kept(recipe: Recipe, chosen: Mapping[str, str], names: Sequence[str], rounding: str) -> Recipe:
    """The recipe with `chosen` (GGUF tensor -> grid) in front.

    names  of all matrices; where all of a kind are on one grid, one rule with a wildcard says so
    """
    rules = tuple(Rule(pattern, grid, rounding) for pattern, grid in _patterns(chosen, names))
    return replace(recipe, rules=(*rules, *recipe.rules), n_overrides=len(rules) + recipe.n_overrides)


def check_kept(plan: Plan, chosen: Mapping[str, str]) -> None:
    """Raise RecipeError when a plan breaks what runtimes need because of `chosen`."""
    if plan.recipe.layout in TOGETHER:
        check_together({step.tensor.name: step.type for step in plan.steps}, chosen)


def check_together(grids: Mapping[str, str], chosen: Mapping[str, str]) -> None:
    """Raise RecipeError when matrices that vLLM multiplies as one are on several grids and one of them is kept.

    grids   GGUF tensor -> what it is on
    chosen  as `kept` returns it
    """
    for group in fused(list(grids)):
        held = [name for name in group if name in chosen]
        if held and len({grids[name] for name in group}) > 1:
            wanted = {chosen[name] for name in held}
            others = [name for name in group if name not in chosen]
            advice = f"keep {' and '.join(others)} on {wanted.pop()}, too" if others else "keep all on one type"
            raise RecipeError(
                f"vLLM multiplies {', '.join(group)} as one matrix, so that they must be on one grid: {advice}."
            )


def matrix_names(model: Model) -> list[str]:
    """The GGUF names of all matrices that may be quantized, in the order of the file."""
    return [tensor.name for tensor in model_view(model).tensors if not tensor.keep_float]


def family(name: str) -> str:
    """A name with its numbers as wildcards: blk.*.attn_v.weight."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _matrices(model: Model) -> list[_Matrix]:
    view = model_view(model)
    names = {tensor.name for tensor in view.tensors}
    homes = _homes(view)
    head = (head_name(model.config), f"{MODULE}{WEIGHT}", HEAD)
    found = []
    for tensor in view.tensors:
        if tensor.keep_float:
            continue
        disks, parameters = homes.get(tensor.name, ([], []))
        whole = [tensor.name, *(parameters[:1] if len(set(parameters)) == 1 else [])]
        pairs = zip(disks, parameters, strict=True) if len(parameters) == len(disks) else ((each,) for each in disks)
        is_head = tensor.name == HEAD or (tensor.name == EMBEDDING and HEAD not in names)
        parts = tuple(_short(each) for each in pairs)
        found.append(_Matrix(tensor.name, _short(whole), _short(head) if is_head else (), parts))
    return found


def _homes(view: GGUFView) -> dict[str, tuple[list[str], list[str]]]:
    """GGUF tensor -> the weights of a folder and the parameters of transformers' module that it is made of."""
    try:
        links = Links(view)
    except ModelError:  # a GGUF file of an architecture without a table has GGUF names alone
        return {}
    found: dict[str, tuple[list[str], list[str]]] = {}
    for disk in links.disk_names():
        for name in links.sources(disk):
            found.setdefault(name, ([], [parameter for parameter, _ in links.slots(name)]))[0].append(disk)
    return found


def _short(names: Sequence[str]) -> tuple[str, ...]:
    """With the names of the layers that the weights belong to."""
    return tuple(dict.fromkeys(each for name in names for each in (name, name.removesuffix(WEIGHT))))


def _matches(matrix: _Matrix, pattern: str) -> bool:
    if _any((*matrix.whole, *matrix.head), pattern):
        return True
    hits = [_any(names, pattern) for names in matrix.parts]
    if any(hits) and not all(hits):
        missing = matrix.parts[hits.index(False)][0]
        raise RecipeError(
            f"--keep {pattern}: {matrix.gguf} holds {len(hits)} matrices of the folder on one type, of which this "
            f"names {sum(hits)}; {missing} is another. Take a pattern that names all of them."
        )
    return bool(hits) and all(hits)


def _any(names: Sequence[str], pattern: str) -> bool:
    return any(fnmatchcase(name, pattern) for name in names)


def _role(pattern: str, name: str, matrices: Sequence[_Matrix]) -> str:
    """Which of its two names a pattern calls a tied head by; empty for both and for all other matrices."""
    matrix = next(each for each in matrices if each.gguf == name)
    if name != EMBEDDING or not matrix.head:
        return ""
    as_head, as_embedding = _any(matrix.head, pattern), _any(matrix.whole, pattern)
    return "" if as_head == as_embedding else "head" if as_head else "embedding"


def _close(pattern: str, matrices: Sequence[_Matrix]) -> str:
    groups = [group for each in matrices for group in (each.whole, each.head, *each.parts)]
    names = [name for group in groups for name in group if pattern.endswith(WEIGHT) or not name.endswith(WEIGHT)]
    known = list(dict.fromkeys([*map(family, names), *names] if "*" in pattern else [*names, *map(family, names)]))
    found = get_close_matches(pattern, known, N_CLOSE, 0.5) or get_close_matches(pattern, known, N_CLOSE, 0.3)
    return f" Close to it: {', '.join(found)}." if found else " `whit inspect` lists the names."


def grid_for(kind: str, layout: str, activations: str = "", option: str = "--keep") -> str:
    """The name of the grid that a type somebody typed stands for in a layout.

    option  what the sentences of errors name
    Raises RecipeError for a type that the layout does not have.
    """
    kind = kind.lower()
    if layout == GGUF:
        return _ggml(kind, option)
    scheme = folders.folder_recipe(kind)
    if scheme is not None and (scheme.layout, scheme.activations) == (layout, activations):
        return scheme.rules[-1].grid
    try:
        grid = grid_named(kind)
    except RecipeError:
        if scheme is None:
            raise RecipeError(
                f"{option}: there is no type {kind}. In folders: a grid such as int8-g128, fp8, mxfp4, nvfp4, nf4-g64; "
                "a scheme such as w8a16 or gptq-8bit-g128; f16 or bf16."
            ) from None
        theirs, mine = _said(scheme.layout, scheme.activations), _said(layout, activations)
        raise RecipeError(f"{option}: {kind} is {theirs}, this folder {mine}; one folder has one of them.") from None
    if activations and not isinstance(grid, Float):
        raise RecipeError(
            f"{option}: this recipe rounds what arrives at every quantized layer ({activations}); a layer can be kept "
            f"in float (f16, bf16), not on {kind}."
        )
    return "f16" if isinstance(grid, Float) else kind  # the folder's own float, whichever it is


def _ggml(kind: str, option: str) -> str:
    try:
        wanted = ggml_type_of(grid_named(kind))
    except RecipeError:
        wanted = None
    if wanted is None:
        known = ", ".join(name for name, grid in GRIDS.items() if ggml_type_of(grid))
        raise RecipeError(f"{option}: GGUF has no type {kind}. It has: {known}.")
    return wanted.name.lower()


def _said(layout: str, activations: str) -> str:
    return f"{layout} with activations {activations}" if activations else layout


def _check(model: Model, chosen: Mapping[str, str], layout: str, activations: str) -> None:
    """Raise RecipeError when a matrix cannot be on the grid that it is wanted on."""
    for name, grid in chosen.items():
        if layout in TOGETHER and name in OUTER and not isinstance(grid_named(grid), Float):
            raise RecipeError(
                f"--keep: {name} stays in 16-bit float in {layout} folders, because their runtimes want it so; it "
                f"cannot be on {grid}."
            )
    rules = (*(Rule(name, grid) for name, grid in chosen.items()), Rule("*", "f16"))
    recipe = Recipe("--keep", rules, layout=layout, activations=activations)
    plan = plan_gguf(model, recipe) if layout == GGUF else plan_model(model, recipe)[0]
    for step in plan.steps:
        if step.tensor.name in chosen and step.exception:
            raise RecipeError(
                f"--keep: {step.tensor.name} cannot be on {chosen[step.tensor.name]}: {step.exception}. "
                f"Take {_instead(step)}."
            )


def _instead(step: Step) -> str:
    kind = step.type.lower()
    return "f16" if isinstance(step.grid, Float) else f"{kind} or f16"


def _patterns(chosen: Mapping[str, str], names: Sequence[str]) -> list[tuple[str, str]]:
    """(pattern, grid), as few as there can be without touching any other of `names`."""
    found: dict[str, str] = {}
    for name, grid in chosen.items():
        wide = family(name)
        same = [each for each in names if fnmatchcase(each, wide)]
        found[wide if all(chosen.get(each) == grid for each in same) else name] = grid
    return list(found.items())
