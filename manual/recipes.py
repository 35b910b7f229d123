"""The page of recipes, written from the code's own tables: `python -m manual.recipes` writes docs/recipes.md.

Sizes are worked out for the shape of Llama 3.1 8B, whose rows every block divides: what a recipe says is what it does
there. They are the bytes of all tensors; a file's header with its tokenizer comes on top (some MB).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from manual.commands import ROOT
from whit.grids.named import GRIDS, grid_named
from whit.pipeline.effort import DEFAULT_PRESET, PRESETS
from whit.recipes.folders import EXAMPLES, folder_recipe
from whit.recipes.mixtures import Facts
from whit.recipes.named import RECIPES, recipe_named, resolved
from whit.recipes.recipe import Recipe
from whit.rounding.methods import METHODS
from whit.rounding.named import ROUNDINGS

PAGE = ROOT / "docs" / "recipes.md"
N_BLOCKS, WIDTH, INNER, KV, VOCABULARY = 32, 4096, 14336, 1024, 128256  # Llama 3.1 8B, from its config.json
NORM_BITS = 32
FOLDER_NORM_BITS = 16
TEXT = """# Recipes

A recipe says which grid every tensor gets. This page is made from Whit's own tables by `python -m manual.recipes`, and
a test fails when it is not what they say. Sizes are those of all tensors of a model of Llama 3.1 8B's shape
({n_weights:,} weights, 16.1 GB in 16 bits); `whit plan MODEL` says the exact bytes for yours, with every exception.

Which one to take: [Which method when](choosing.md).

## For llama.cpp, Ollama and LM Studio

`--recipe` NAME, and `-o` FILE.gguf. Names, and the type of every tensor, are those of llama.cpp's quantizer.

{gguf}

Types of matrices are in the order of how much they hold. Without a text (`--rounding nearest` or `search`) a few
tensors get other types, as they do in llama.cpp without an importance matrix.

## For vLLM, SGLang and transformers

`--recipe` NAME, and `-o` FOLDER. Embedding and head stay in 16 bits. Other bits and groups have names of the same
kind: [the page on these formats](gpu.md#recipes) has the patterns.

{folders}

## How much work: `--preset`

{presets}

## How codes are chosen: `--rounding`

{roundings}

Those without a text take seconds. All of them write any recipe, but for `kl`, which is for integer grids. Formulas:
[Grids and rounding](rounding.md).

## Grids by name

For `--types`, `--keep`, `--set`, `whit-GRID` recipes and live models: {grids}; `int2` to `int8` and `kmeans2` to
`kmeans8`, per output channel, in groups (`int4-g128`) or per tensor (`int8-tensor`), integers with a zero point
(`int4-g128-asym`) or a minimum (`int3-g64-min`).
"""


def page() -> str:
    """The whole page as Markdown."""
    return TEXT.format(
        n_weights=sum(rows * cols for _, (rows, cols) in shapes()),
        gguf=_table(("recipe", "GB", "bits per weight", "types of the matrices"), [_gguf_row(n) for n in RECIPES]),
        folders=_table(
            ("recipe", "GB", "bits per weight", "format", "weights", "activations"),
            [_folder_row(name) for name in EXAMPLES],
        ),
        presets=_table(
            ("preset", "windows of 512 tokens", "text when none is given"),
            [_preset_row(name) for name in PRESETS],
        ),
        roundings=_table(
            ("rounding", "looks at a text"),
            [*((f"`{name}`", "no") for name in ROUNDINGS), *((f"`{name}`", "yes") for name in METHODS)],
        ),
        grids=", ".join(f"`{name}`" for name in GRIDS if not name.startswith(("int", "kmeans"))),
    )


def shapes() -> list[tuple[str, tuple[int, int]]]:
    """GGUF names and [rows, cols] of all tensors; norms are one row."""
    block = {
        "attn_norm": (1, WIDTH),
        "attn_q": (WIDTH, WIDTH),
        "attn_k": (KV, WIDTH),
        "attn_v": (KV, WIDTH),
        "attn_output": (WIDTH, WIDTH),
        "ffn_norm": (1, WIDTH),
        "ffn_gate": (INNER, WIDTH),
        "ffn_up": (INNER, WIDTH),
        "ffn_down": (WIDTH, INNER),
    }
    blocks = [(f"blk.{i}.{name}.weight", shape) for i in range(N_BLOCKS) for name, shape in block.items()]
    outer = [("token_embd.weight", (VOCABULARY, WIDTH)), ("output.weight", (VOCABULARY, WIDTH))]
    return [*outer, *blocks, ("output_norm.weight", (1, WIDTH))]


def _gguf_row(name: str) -> tuple[str, ...]:
    facts = Facts(N_BLOCKS, n_experts=0, heads_per_kv=WIDTH // KV, tied=False, importance=True)
    recipe = resolved(recipe_named(name), [(tensor, shape) for tensor, shape in shapes() if shape[0] > 1], facts)
    n_bits, kinds = _bits(recipe, NORM_BITS)
    return (f"`{name}`", *_sizes(n_bits), ", ".join(kind for kind, _ in kinds.most_common()))


def _folder_row(name: str) -> tuple[str, ...]:
    recipe = folder_recipe(name)
    if recipe is None:
        raise ValueError(f"{name} is listed among the recipes of folders and is none")
    n_bits, _ = _bits(recipe, FOLDER_NORM_BITS)
    grid = recipe.rules[-1].grid
    return (f"`{name}`", *_sizes(n_bits), recipe.layout, f"`{grid}`", recipe.activations or "as they are")


def _preset_row(name: str) -> tuple[str, ...]:
    preset, mark = PRESETS[name], " (when nothing is said)" if name == DEFAULT_PRESET else ""
    return (f"`{name}`{mark}", str(preset.windows), f"`{preset.text}`")


def _bits(recipe: Recipe, norm_bits: int) -> tuple[float, Counter[str]]:
    """Bits of all tensors, and how many weights every type holds."""
    n_bits, kinds = 0.0, Counter[str]()
    for tensor, (rows, cols) in shapes():
        grid = recipe.rule_for([tensor]).grid
        n_bits += rows * cols * (norm_bits if rows == 1 else grid_named(grid).bits_per_weight(cols))
        kinds[grid] += rows * cols if rows > 1 else 0
    return n_bits, kinds


def _sizes(n_bits: float) -> tuple[str, str]:
    return f"{n_bits / 8e9:.2f}", f"{n_bits / sum(rows * cols for _, (rows, cols) in shapes()):.2f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    PAGE.write_text(page())
