"""`PATTERN=TYPE`: which matrices a pattern names, what is refused, and files that hold what was asked for."""

from __future__ import annotations

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.errors import RecipeError
from whit.grids.named import grid_named
from whit.models.model import Model
from whit.models.open import open_model
from whit.pipeline.allocate import Allocator
from whit.pipeline.folder import plan_model, write_model
from whit.pipeline.keep import check_kept, kept, matrix_names, with_kept
from whit.pipeline.quantize import predicted_bytes
from whit.recipes.folders import INT8_TOKENS, folder_recipe
from whit.recipes.named import recipe_named
from whit.recipes.recipe import Recipe


def made(name: str, folder: Path, **changes: object) -> Model:
    save_tiny(name, folder, vocab_size=TOY_VOCAB, **changes)
    save_toy_tokenizer("llama", folder)
    return open_model(folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("llama", tmp_path_factory.mktemp("keep") / "llama")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("qwen2-tied", tmp_path_factory.mktemp("keep") / "tied")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return made("mixtral", tmp_path_factory.mktemp("keep") / "mixture")


def folder(name: str) -> Recipe:
    found = folder_recipe(name)
    assert found is not None
    return found


V = {"blk.0.attn_v.weight": "q8_0", "blk.1.attn_v.weight": "q8_0"}


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("lm_head=f16", {"output.weight": "f16"}),
        ("lm_head.weight=f16", {"output.weight": "f16"}),
        ("output.weight=F16", {"output.weight": "f16"}),
        ("output=bf16", {"output.weight": "bf16"}),
        ("model.embed_tokens=q8_0", {"token_embd.weight": "q8_0"}),
        ("*.v_proj=q8_0", V),
        ("blk.*.attn_v.weight=q8_0", V),
        ("blk.?.attn_v=q8_0", V),
        ("model.layers.0.mlp.down_proj=int4-g32", {"blk.0.ffn_down.weight": "q4_0"}),  # the same grid
    ],
)
def test_a_matrix_answers_to_the_names_that_people_know(llama: Model, setting: str, expected: dict[str, str]) -> None:
    assert kept(llama, [setting]) == expected


def test_the_last_pattern_that_matches_counts(llama: Model) -> None:
    found = kept(llama, ["*.v_proj=q8_0", "model.layers.0.*=f16"])
    assert found["blk.0.attn_v.weight"] == "f16"
    assert found["blk.1.attn_v.weight"] == "q8_0"
    assert len(found) == 8  # norms are no matrices


def test_a_layers_own_name_of_every_architecture(tmp_path: Path) -> None:
    for name, pattern, expected in (
        ("gpt2", "*.attn.c_attn", "blk.0.attn_qkv.weight"),
        ("gpt2", "transformer.h.*.mlp.c_proj", "blk.0.ffn_down.weight"),
        ("phi3", "*.gate_up_proj", "blk.0.ffn_up.weight"),
        ("opt", "*.fc1", "blk.0.ffn_up.weight"),
        ("mixtral", "*.experts.*", "blk.0.ffn_down_exps.weight"),
    ):
        save_tiny(name, tmp_path / name)
        assert expected in kept(open_model(tmp_path / name), [f"{pattern}=q8_0"]), name


def test_a_tied_head_is_one_matrix(tied: Model) -> None:
    assert kept(tied, ["lm_head=q8_0"]) == kept(tied, ["model.embed_tokens=q8_0"]) == {"token_embd.weight": "q8_0"}
    assert kept(tied, ["*=q4_0", "lm_head=f16"])["token_embd.weight"] == "f16"
    with pytest.raises(RecipeError, match="this model's head is its embedding, one matrix. lm_head wants it on f16"):
        kept(tied, ["lm_head=f16", "model.embed_tokens=q8_0"])


@pytest.mark.parametrize(
    ("settings", "layout", "message"),
    [
        (["lm_haed=f16"], "gguf", "lm_haed matches no matrix. Close to it: lm_head"),
        (["*.vproj=f16"], "gguf", r"Close to it: .*\*.*v_proj"),
        (["blk.*.attn_norm.weight=f16"], "gguf", "matches no matrix"),
        (["lm_head"], "gguf", "not of the form 'pattern=type'"),
        (["=f16"], "gguf", "not of the form 'pattern=type'"),
        (["lm_head=nf4-g64"], "gguf", "GGUF has no type nf4-g64. It has: f32, f16"),
        (["lm_head=w8a16"], "gguf", "GGUF has no type w8a16"),
        (["*.v_proj=q6_k"], "gguf", "cannot be on q6_k: rows of 64 weights .* Take q8_0 or f16"),
        (["lm_head=int8"], "compressed-tensors", "output.weight stays in 16-bit float in compressed-tensors folders"),
        (["*.v_proj=huge"], "gptq", "there is no type huge"),
        (["*.v_proj=w8a8"], "compressed-tensors", "w8a8 is compressed-tensors with activations int8 per token"),
        (["*.v_proj=gptq-8bit"], "compressed-tensors", "gptq-8bit is gptq, this folder compressed-tensors"),
        (["*_proj=int8"], "awq", "blk.0.attn_q.weight cannot be on int8|quantizes nothing here"),
        (["*.mlp.*=int4-g128"], "compressed-tensors", "do not divide|quantizes nothing"),
    ],
)
def test_what_cannot_be_kept_is_refused(llama: Model, settings: list[str], layout: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        kept(llama, settings, layout)


def test_a_layer_of_a_w8a8_folder_is_kept_in_float_or_not_at_all(llama: Model) -> None:
    assert kept(llama, ["*.down_proj=bf16"], "compressed-tensors", INT8_TOKENS)["blk.0.ffn_down.weight"] == "f16"
    with pytest.raises(RecipeError, match="a layer can be kept in float"):
        kept(llama, ["*.down_proj=int8-g32"], "compressed-tensors", INT8_TOKENS)


def test_one_expert_alone_has_no_type_of_its_own(mixture: Model) -> None:
    with pytest.raises(RecipeError, match="holds 4 matrices of the folder on one type, of which this names 1"):
        kept(mixture, ["*.experts.1.*=q8_0"])
    assert len(kept(mixture, ["*.experts.*=q8_0"])) == 6


def test_what_vllm_multiplies_as_one_is_kept_as_one(llama: Model) -> None:
    recipe = folder("w4a16-g32")

    def planned(*settings: str) -> None:
        chosen = kept(llama, settings, recipe.layout)
        check_kept(plan_model(llama, with_kept(recipe, chosen, matrix_names(llama), "nearest"))[0], chosen)

    planned("*.[qkv]_proj=w8a16-g32", "*.down_proj=f16")
    with pytest.raises(RecipeError, match=r"keep blk.0.attn_q.weight and blk.0.attn_k.weight on int8-g32, too"):
        planned("*.v_proj=w8a16-g32")
    with pytest.raises(RecipeError, match="vLLM multiplies blk.0.ffn_gate.weight, blk.0.ffn_up.weight as one"):
        Allocator(llama, layout="compressed-tensors", keep=["*.up_proj=f16"])


def test_a_wildcard_says_what_all_of_a_kind_are_on(llama: Model) -> None:
    names = matrix_names(llama)
    found = with_kept(recipe_named("q4_0"), V | {"blk.0.ffn_up.weight": "f16"}, names, "nearest")
    assert [rule.pattern for rule in found.rules] == ["blk.*.attn_v.weight", "blk.0.ffn_up.weight"]


@pytest.mark.parametrize("name", ["q4_0", "w4a16-g32", "whit-nf4-g32", "gptq-4bit-g32"])
def test_a_file_holds_what_was_asked_for_in_the_predicted_bytes(llama: Model, tmp_path: Path, name: str) -> None:
    recipe = folder_recipe(name) or recipe_named(name)
    kind = "q8_0" if name == "q4_0" else "int8-g32"
    chosen = kept(llama, [f"model.layers.1.self_attn.[qkv]_proj={kind}"], recipe.layout)
    mixed = with_kept(recipe, chosen, matrix_names(llama), "nearest")
    plan, n_bytes = plan_model(llama, mixed)
    types = {step.tensor.name: step.type.lower() for step in plan.steps}
    assert len(chosen) == 3
    assert {types[each].partition(":")[0] for each in chosen} == {kind}
    assert types["blk.0.attn_q.weight"] != types["blk.1.attn_q.weight"]
    write_model(llama, mixed, tmp_path / "out.gguf")
    out = tmp_path / "out.gguf"
    files = [out] if out.is_file() else list(out.glob("model*"))
    assert sum(each.stat().st_size for each in files) == n_bytes


@pytest.mark.parametrize("layout", ["gguf", "compressed-tensors", "gptq", "whit"])
def test_a_budget_is_spent_on_the_rest(llama: Model, tmp_path: Path, layout: str) -> None:
    kind = "q8_0" if layout == "gguf" else "int8-g32"
    settings = [f"model.layers.1.self_attn.[qkv]_proj={kind}", "lm_head=f16"]
    allocator = Allocator(llama, rounding="nearest", layout=layout, keep=settings)
    assert allocator.least > Allocator(llama, layout=layout).least
    table = {
        name: {grid: 4.0 ** -grid_named(grid).bits_per_weight(256) for grid in grids}
        for name, grids in allocator.candidates.items()
    }
    sizes = []
    for share in (0, 1, 2):
        budget = allocator.least + (allocator.most - allocator.least) * share // 2
        found = allocator.fit(table, budget)
        grids = allocator.grids(found)
        assert {grids[f"blk.1.attn_{each}.weight"] for each in "qkv"} == {kind}
        assert grids.get("output.weight", "f16") == "f16"
        result = write_model(llama, found.recipe, tmp_path / "out", overwrite=True)
        assert result.n_bytes == found.n_bytes <= budget
        sizes.append(found.n_bytes)
    assert sizes == sorted(set(sizes))
    assert layout != "gguf" or predicted_bytes(llama, found.recipe) == found.n_bytes


def test_whits_own_folder_keeps_a_head_on_a_grid(llama: Model, tied: Model, tmp_path: Path) -> None:
    for model in (llama, tied):
        chosen = kept(model, ["lm_head=int8-g32"], "whit")
        mixed = with_kept(folder("whit-nf4-g32"), chosen, matrix_names(model), "nearest")
        result = write_model(model, mixed, tmp_path / "out", overwrite=True)
        found = open_model(tmp_path / "out")
        assert sum(each.stat().st_size for each in (tmp_path / "out").glob("model*")) == result.n_bytes
        head = "model.embed_tokens.weight" if model is tied else "lm_head.weight"
        step = next(each for each in result.plan.steps if each.tensor.name in chosen)
        error = (found.tensors.read(head).float() - model.tensors.read(head).float()).norm()
        assert step.type.startswith("int8-g32")
        assert 0 < error < 0.01 * model.tensors.read(head).float().norm()
