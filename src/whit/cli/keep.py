"""`--keep` and `--salient` on the command line: what the options say, and what is printed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from whit.cli.budget import check_table, read_table, sweep
from whit.devices import CPU
from whit.errors import RecipeError
from whit.models.model import Model
from whit.pipeline.allocate import Allocator
from whit.pipeline.keep import family, grid_for
from whit.pipeline.plan import Plan
from whit.pipeline.salient import Raised, Salient
from whit.recipes.recipe import Recipe

KEEP_HELP = (
    "'pattern=type' for some matrices, such as 'lm_head=f16', '*.v_proj=q8_0' or 'blk.*.ffn_down=q6_k', by their names "
    "in the Hugging Face folder or in GGUF; kept exactly, or refused. May be repeated; the last that matches counts."
)
SALIENT_HELP = (
    "With --recipe: so much of the weights (such as 1%), whole matrices that lose most per byte, at the next better "
    "type: 8 bits, or 16-bit floats where the recipe has 8 already."
)
TYPES_HELP = (
    "The only types that a budget may choose from, with commas between them, such as q4_0,q8_0 or int4-g128,nvfp4,fp8."
)


def check_rules(named: bool, salient: str | None, types: str | None, table: Path | None) -> None:
    """Raise RecipeError for options that do not go together; `named` is whether a recipe says what is wanted."""
    if named and table is not None and not salient:
        raise RecipeError("--table saves the sweep of --fit, --bpw, --max-kl and --salient; a recipe needs none.")
    if named and types is not None:
        raise RecipeError("--types says what --fit, --bpw and --max-kl choose from; a recipe says its types itself.")
    if not named and salient:
        raise RecipeError("--salient is for recipes: --fit, --bpw and --max-kl weigh every matrix as it is.")


def types_of(text: str | None, layout: str) -> tuple[str, ...] | None:
    """What `--types` lists, None for nothing. Raises RecipeError for a type that the layout does not have."""
    if text is None:
        return None
    return tuple(dict.fromkeys(grid_for(each.strip(), layout, option="--types") for each in text.split(",")))


def check_types(allocator: Allocator, types: Sequence[str] | None) -> None:
    """Raise RecipeError for a type that no matrix of the model can be on."""
    used = {grid for grids in allocator.candidates.values() for grid in grids}
    for kind in types or ():
        if kind not in used:
            raise RecipeError(f"--types: no matrix of {allocator.model.label} can be on {kind} in this format.")


def raising(
    console: Console,
    model: Model,
    salient: Salient,
    windows: Tensor | None,
    table: Path | None,
    device: torch.device = CPU,
) -> tuple[Recipe, dict[str, str]]:
    """The recipe with what is salient in front, said on the console; and GGUF tensor -> grid of that.

    windows  the text of the sweep, None for documentation
    table    a file of `whit plan --save`, instead of the sweep
    device   where the model runs
    Raises RecipeError when the table does not have what is needed.
    """
    if table is None:
        damages = sweep(model, salient.candidates, windows, salient.plain, device)
    else:
        damages = read_table(table)
        check_table(table, damages, salient.candidates)
    chosen = salient.chosen(damages)
    for line in salient_lines(chosen):
        console.print(line, soft_wrap=True)
    return salient.recipe(chosen), {name: each.after for each in chosen for name in each.names}


def salient_lines(chosen: Sequence[Raised]) -> list[str]:
    """What goes to which type, what that adds and saves, the most worthy first."""
    n_weights, n_bytes = sum(each.n_weights for each in chosen), sum(each.n_bytes for each in chosen)
    gain = sum(each.lost - each.left for each in chosen)
    lines = [f"Salient: {n_weights:,} weights, {n_bytes:+,} bytes, predicted KL {-gain:+.2g}."]
    lines += [
        f"  {' with '.join(each.names)}: {each.before} -> {each.after}, {each.n_bytes:+,} bytes, predicted KL "
        f"{each.lost:.2g} -> {each.left:.2g}"
        for each in chosen
    ]
    return lines


def kept_lines(plan: Plan, chosen: Mapping[str, str]) -> list[str]:
    """One line per type and kind of matrix: `  kept, Q8_0: 30 x blk.*.attn_v.weight`."""
    steps = [step for step in plan.steps if step.tensor.name in chosen]
    groups = Counter((step.type, family(step.tensor.name)) for step in steps)
    return [f"  kept, {kind}: {n} x {name}" for (kind, name), n in groups.items()]
