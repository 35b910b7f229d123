"""`--keep` and `--salient` on the command line: what the options say, and what is printed of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from torch import Tensor

from whit.cli.budget import check_table, read_table, sweep
from whit.models.model import Model
from whit.pipeline.keep import family, kept, matrix_names, with_kept
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


def keeping(model: Model, recipe: Recipe, settings: Sequence[str], rounding: str) -> tuple[Recipe, dict[str, str]]:
    """The recipe with `--keep` in front, and GGUF tensor -> grid of what it is about. Raises what `kept` raises."""
    if not settings:
        return recipe, {}
    chosen = kept(model, settings, recipe.layout, recipe.activations)
    return with_kept(recipe, chosen, matrix_names(model), rounding), chosen


def raising(
    console: Console, model: Model, salient: Salient, windows: Tensor | None, table: Path | None
) -> tuple[Recipe, dict[str, str]]:
    """The recipe with what is salient in front, said on the console; and GGUF tensor -> grid of that.

    windows  the text of the sweep, None for documentation
    table    a file of `whit plan --save`, instead of the sweep
    Raises RecipeError when the table does not have what is needed.
    """
    if table is None:
        damages = sweep(model, salient.candidates, windows)
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
