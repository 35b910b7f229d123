"""`--keep` on the command line: what the option says, and what is printed of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from whit.models.model import Model
from whit.pipeline.keep import family, kept, matrix_names, with_kept
from whit.pipeline.plan import Plan
from whit.recipes.recipe import Recipe

KEEP_HELP = (
    "'pattern=type' for some matrices, such as 'lm_head=f16', '*.v_proj=q8_0' or 'blk.*.ffn_down=q6_k', by their names "
    "in the Hugging Face folder or in GGUF; kept exactly, or refused. May be repeated; the last that matches counts."
)


def keeping(model: Model, recipe: Recipe, settings: Sequence[str], rounding: str) -> tuple[Recipe, dict[str, str]]:
    """The recipe with `--keep` in front, and GGUF tensor -> grid of what it is about. Raises what `kept` raises."""
    if not settings:
        return recipe, {}
    chosen = kept(model, settings, recipe.layout, recipe.activations)
    return with_kept(recipe, chosen, matrix_names(model), rounding), chosen


def kept_lines(plan: Plan, chosen: Mapping[str, str], why: str = "kept") -> list[str]:
    """One line per type and kind of matrix: `  kept, Q8_0: 30 x blk.*.attn_v.weight`."""
    steps = [step for step in plan.steps if step.tensor.name in chosen]
    groups = Counter((step.type, family(step.tensor.name)) for step in steps)
    return [f"  {why}, {kind}: {n} x {name}" for (kind, name), n in groups.items()]
