"""Folders of quantized live models: the same numbers after loading, and one clear error for every broken one."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    LlamaForCausalLM,
    PreTrainedModel,
)

from tiny import random_tokens, save_tiny, tiny_model
from whit.errors import BrokenFileError, ModelError, OutputError
from whit.grids.grid import Grid
from whit.grids.named import grid_named
from whit.grids.scaled import Scaled
from whit.live.calibrate import calibrate
from whit.live.inputs import Inputs
from whit.live.quantize import freeze, n_bytes, quantize, twins_of
from whit.live.save import load, save
from whit.live.types import BLOCKS, TYPES, grouped
from whit.models.open import open_model

TOKENS = torch.tensor([random_tokens(24)])
MODELS = ("llama", "llama-tied-biased", "gpt2", "gemma3_text", "phi3", "opt", "mixtral", "qwen3_moe", "gpt_neox")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def frozen(name: str = "llama", weights: str | Grid = "qint8", activations: str | None = None) -> PreTrainedModel:
    model = tiny_model(name)
    quantize(model, weights, activations)
    freeze(model)
    return model


def loaded(folder: Path, dtype: torch.dtype | None = None) -> nn.Module:
    model = load(folder, dtype=dtype)
    model.set_attn_implementation("eager")  # type: ignore[operator]  # as tiny models: sums in another order differ
    return model


class Plain(nn.Module):
    """transformers does not know it."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.words = nn.Embedding(50, 64)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64)) for _ in range(2))
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.words.weight
        self.register_buffer("shift", torch.arange(64.0))

    def forward(self, index: Tensor) -> Tensor:
        x = self.words(index)
        for block in self.blocks:
            x = block(x) + self.shift
        return self.head(x)


@pytest.mark.parametrize("activations", [None, "qint8"])
@pytest.mark.parametrize("name", MODELS)
def test_a_loaded_model_computes_the_same_to_the_last_bit(name: str, activations: str | None, tmp_path: Path) -> None:
    model = frozen(name, "qint8", activations)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert torch.equal(logits(other), logits(model))
    assert n_bytes(other) == n_bytes(model)
    assert not any(each.is_meta for each in [*other.parameters(), *other.buffers()])


@pytest.mark.parametrize("weights", [*TYPES, "kmeans3-g32", "kmeans4-tensor", "kmeans3+1%"])
def test_every_type_comes_back(weights: str, tmp_path: Path) -> None:
    model = frozen("llama", weights)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert torch.equal(logits(other), logits(model))
    for a, b in zip(twins_of(model), twins_of(other), strict=True):
        assert a.grid == b.grid
        assert torch.equal(a.frozen.quantized.codes, b.frozen.quantized.codes)


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("name", [key for key, it in TYPES.items() if isinstance(it, Scaled) and it not in BLOCKS])
def test_types_with_other_groups_come_back(name: str, size: int, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 24))
    quantize(model, grouped(TYPES[name], size))
    freeze(model)
    save(model, tmp_path / "out")
    other = load(tmp_path / "out", nn.Sequential(nn.Linear(64, 24)))
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_grid_without_a_name_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 24))
    quantize(model, replace(grid_named("nf4-g64"), scale_dtype=torch.float8_e4m3fn))
    freeze(model)
    with pytest.raises(OutputError, match="name"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["llama-tied-biased", "gpt2", "gemma3_text"])
def test_tied_layers_are_stored_once_and_tied_again(name: str, tmp_path: Path) -> None:
    model = frozen(name)
    save(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert not any(key.startswith("lm_head") for key in stored) or not any("embed_tokens" in key for key in stored)
    other = loaded(tmp_path / "out")
    assert other.get_output_embeddings().frozen is other.get_input_embeddings().frozen
    twin = copy.deepcopy(other)
    assert twin.get_output_embeddings().frozen is twin.get_input_embeddings().frozen


def test_tied_layers_in_float_are_one_parameter_again(tmp_path: Path) -> None:
    model = tiny_model("llama-tied-biased")
    quantize(model, "qint8", exclude=["*lm_head", "*embed_tokens"])
    freeze(model)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert other.lm_head.weight is other.model.embed_tokens.weight
    assert torch.equal(logits(other), logits(model))


def test_a_transposed_view_of_a_square_matrix_keeps_its_own_values(tmp_path: Path) -> None:
    def layers() -> nn.Sequential:
        made = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64))
        made[1].weight = nn.Parameter(made[0].weight.detach().t())
        return made

    model, x = layers(), torch.linspace(-1, 1, 64)
    quantize(model, "qint8", include="2")
    freeze(model)
    save(model, tmp_path / "out")
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "out", layers())(x), model(x))  # sums in another order


@pytest.mark.parametrize("method", ["minmax", "kl"])
def test_calibrated_scales_come_back(method: str, tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize(model, "qint8", "qint8")
    with torch.no_grad(), calibrate(model, method):
        model(TOKENS)
    freeze(model)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert torch.equal(logits(other), logits(model))
    assert all(each.static for each in other.modules() if isinstance(each, Inputs))
    assert "QLlamaRMSNorm" in repr(other)


@pytest.mark.parametrize("meta", [False, True])
def test_modules_of_ones_own_come_back_in_their_own_shape(meta: bool, tmp_path: Path) -> None:
    model = Plain().eval()
    quantize(model, "qint4", "qint8")
    index = torch.arange(50)
    with torch.no_grad(), calibrate(model):
        model(index)
    freeze(model)
    save(model, tmp_path / "out")
    with torch.device("meta" if meta else "cpu"):
        empty = Plain(1)
    other = load(tmp_path / "out", empty)
    assert other is empty
    with torch.no_grad():
        assert torch.equal(other(index), model(index))
    assert other.head.frozen is other.words.frozen


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_model_without_memory_gets_the_buffers_that_no_file_has(name: str, tmp_path: Path) -> None:
    model = frozen(name)
    save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager")
    assert torch.equal(logits(load(tmp_path / "out", empty)), logits(model))


def test_a_buffer_that_nobody_can_make_is_named(tmp_path: Path) -> None:
    def layer() -> nn.Module:
        made = nn.Sequential(nn.Linear(64, 64))
        made.register_buffer("shift", torch.zeros(64), persistent=False)
        return made

    model = layer()
    quantize(model, "qint8")
    freeze(model)
    save(model, tmp_path / "out")
    with torch.device("meta"):
        empty = layer()
    with pytest.raises(ModelError, match="shift"):
        load(tmp_path / "out", empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_was_saved_in_a_type_comes_back_in_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = frozen("llama", "qint8")
    for each in model.modules():
        if not any(True for _ in each.children()) and "Rotary" not in type(each).__name__:
            each.to(dtype)  # as transformers casts: the frequencies stay float32
    for twin in twins_of(model):
        twin.to(dtype)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert {each.dtype for each in other.parameters()} == {dtype}
    assert other.get_input_embeddings()(TOKENS).dtype == dtype
    assert {each.weight.dtype for each in twins_of(other)} == {dtype}
    assert torch.equal(logits(other), logits(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_another_type_can_be_asked_for(dtype: torch.dtype, tmp_path: Path) -> None:
    model = frozen("gpt2", "qint4", "qint8")
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out", dtype)
    assert {each.dtype for each in other.parameters()} == {dtype}
    assert {each.weight.dtype for each in twins_of(other)} == {dtype}
    assert logits(other).dtype == dtype
    for a, b in zip(twins_of(model), twins_of(other), strict=True):
        assert torch.equal(a.frozen.quantized.dequantize(), b.frozen.quantized.dequantize())


def test_a_loaded_model_generates_and_can_be_saved_again(tmp_path: Path) -> None:
    model = frozen("llama", "qint8", "qint8")
    save(model, tmp_path / "one")
    save(loaded(tmp_path / "one"), tmp_path / "two")
    tokens = [
        loaded(tmp_path / each).generate(TOKENS[:, :5], max_new_tokens=10, do_sample=False) for each in ("one", "two")
    ]
    assert torch.equal(*tokens)
    assert torch.equal(tokens[0], model.generate(TOKENS[:, :5], max_new_tokens=10, do_sample=False))
    for name in ("model.safetensors", "whit.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_model_that_is_not_frozen_is_refused_and_nothing_is_left(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize(model, "qint8")
    with pytest.raises(OutputError, match="freeze"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_type_that_files_do_not_have_is_refused_by_name(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    model.register_buffer("turns", torch.ones(3, dtype=torch.complex64))
    quantize(model, "qint8")
    freeze(model)
    with pytest.raises(OutputError, match=r"turns is torch\.complex64"):
        save(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            raise KeyError("a vocabulary")

    with pytest.raises(KeyError):
        save(frozen(), tmp_path / "out", Tokenizer())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("custom", [False, True])
def test_folders_are_replaced_only_when_asked(custom: bool, tmp_path: Path) -> None:
    if custom:
        model: nn.Module = Plain()
        quantize(model, "qint8")
        freeze(model)
    else:
        model = frozen()
    save(model, tmp_path / "out")
    with pytest.raises(OutputError, match="exists"):
        save(model, tmp_path / "out")
    save(model, tmp_path / "out", overwrite=True)
    assert [each.name for each in tmp_path.iterdir()] == ["out"]


def test_what_lies_beside_an_older_model_stays_and_its_own_files_go(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    save(frozen(), folder)
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")
    (folder / "model.safetensors.index.json").write_text("{}")
    (folder / "notes.txt").write_text("dear")
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_model.safetensors").write_text("trained")
    model = nn.Sequential(nn.Linear(64, 24))
    quantize(model, "qint4")
    freeze(model)
    save(model, folder, overwrite=True)
    assert {each.name for each in folder.iterdir()} == {"model.safetensors", "whit.json", "notes.txt", "adapter"}
    assert (folder / "adapter" / "adapter_model.safetensors").read_text() == "trained"
    other = load(folder, nn.Sequential(nn.Linear(64, 24)))
    assert torch.equal(other[0].weight, model[0].weight)


def test_a_folder_of_other_things_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="other things"):
        save(frozen(), tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "letter.txt").read_text() == "dear"


_BERT = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 96,
}
_BART = {
    "vocab_size": 256,
    "d_model": 64,
    **{f"{half}_{key}": n for half in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 96))},
    **{f"{half}_attention_heads": 4 for half in ("encoder", "decoder")},
}
OTHER_CLASSES: dict[str, Callable[[], PreTrainedModel]] = {
    "body": lambda: AutoModel.from_config(tiny_model("llama").config),
    "sequences": lambda: AutoModelForSequenceClassification.from_config(tiny_model("llama", num_labels=3).config),
    "tokens": lambda: AutoModelForTokenClassification.from_config(tiny_model("qwen2").config),
    "answers": lambda: AutoModelForQuestionAnswering.from_config(tiny_model("llama").config),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_BERT, num_labels=3)),
    "bart": lambda: BartForConditionalGeneration(BartConfig(**_BART)),
}


@pytest.mark.parametrize("make", OTHER_CLASSES.values(), ids=OTHER_CLASSES)
def test_models_that_are_not_causal_come_back_as_what_they_were(
    make: Callable[[], PreTrainedModel], tmp_path: Path
) -> None:
    model = make().eval()
    model.set_attn_implementation("eager")
    quantize(model, "qint8")
    freeze(model)
    save(model, tmp_path / "out")
    other = loaded(tmp_path / "out")
    assert type(other) is type(model)
    with torch.no_grad():
        assert torch.equal(other(TOKENS)[0], model(TOKENS)[0])


def test_a_class_of_ones_own_must_be_given(tmp_path: Path) -> None:
    class Mine(LlamaForCausalLM):
        pass

    model = Mine(tiny_model("llama").config).eval()
    quantize(model, "qint8")
    freeze(model)
    save(model, tmp_path / "out")
    with pytest.raises(ModelError, match="'Mine'.*model="):
        load(tmp_path / "out")
    assert type(load(tmp_path / "out", Mine(model.config))) is Mine


@pytest.mark.parametrize("name", ["PreTrainedModel", "BertModel", "Trainer", "__name__", 3])
def test_only_classes_of_the_configuration_are_taken(name: object, whole: Path, tmp_path: Path) -> None:
    for file in whole.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {**json.loads((whole / "config.json").read_text()), "architectures": [name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=str(name)):
        load(tmp_path)


def change_map(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        content = json.loads((folder / "whit.json").read_text())
        change(content)
        (folder / "whit.json").write_text(json.dumps(content))

    return broken


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")

    return broken


def cut(name: str, share: float) -> Callable[[Path], None]:
    def broken(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return broken


HEAD = "lm_head.frozen"
BROKEN: dict[str, Callable[[Path], object]] = {
    "tensors cut short": cut("model.safetensors", 0.9),
    "tensors cut in the header": cut("model.safetensors", 0.001),
    "tensors empty": cut("model.safetensors", 0),
    "tensors missing": lambda folder: (folder / "model.safetensors").unlink(),
    "map cut short": cut("whit.json", 0.5),
    "map empty": cut("whit.json", 0),
    "map a list": lambda folder: (folder / "whit.json").write_text("[]"),
    "map no object": lambda folder: (folder / "whit.json").write_text("{}"),
    "config missing": lambda folder: (folder / "config.json").unlink(),
    "config cut short": cut("config.json", 0.5),
    "config of an unknown model": lambda folder: (folder / "config.json").write_text('{"model_type": "abacus"}'),
    "another version": change_map(lambda it: it.update(version=2)),
    "no version": change_map(lambda it: it.pop("version")),
    "no modules": change_map(lambda it: it.pop("modules")),
    "no ties": change_map(lambda it: it.pop("tied")),
    "modules a list": change_map(lambda it: it.update(modules=[1])),
    "ties a list": change_map(lambda it: it.update(tied=[1])),
    "an unknown grid": change_map(lambda it: it["modules"]["lm_head"].update(grid="int9-g7")),
    "a grid that is no text": change_map(lambda it: it["modules"]["lm_head"].update(grid=3)),
    "a grid that does not fit": change_map(lambda it: it["modules"]["lm_head"].update(grid="q4_k")),
    "another grid": change_map(lambda it: it["modules"]["lm_head"].update(grid="nf4-g64")),
    "unknown activations": change_map(lambda it: it["modules"]["lm_head"].update(activations="int3")),
    "unknown outputs": change_map(lambda it: it["modules"]["model.norm"].update(outputs="int3")),
    "a module that is not there": change_map(lambda it: it["modules"].update({"model.tail": {"grid": "int8:f32"}})),
    "a module that cannot be": change_map(lambda it: it["modules"].update({"model.rotary_emb": {"grid": "int8"}})),
    "an entry of nothing": change_map(lambda it: it["modules"].update(lm_head={})),
    "an entry too few": change_map(lambda it: it["modules"].pop("lm_head")),
    "experts where there are none": change_map(
        lambda it: it["modules"].update(lm_head={"experts": {"weight": "int8"}, "activations": None})
    ),
    "a tie to nothing": change_map(lambda it: it["tied"].update({"lm_head.weight": "nowhere"})),
    "a tensor too few": change_tensors(lambda it: it.pop(f"{HEAD}.codes")),
    "a norm too few": change_tensors(lambda it: it.pop("model.norm.weight")),
    "a tensor too many": change_tensors(lambda it: it.update(more=torch.ones(1))),
    "codes of another shape": change_tensors(lambda it: it.update({f"{HEAD}.codes": it[f"{HEAD}.codes"][:-1].clone()})),
    "codes of another type": change_tensors(lambda it: it.update({f"{HEAD}.codes": it[f"{HEAD}.codes"].float()})),
    "scales of another type": change_tensors(lambda it: it.update({f"{HEAD}.scale": it[f"{HEAD}.scale"].half()})),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("save") / "whole"
    save(frozen("llama", "qint8", "qint8"), folder)
    return folder


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_one_clear_error(damage: Callable[[Path], object], whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    for file in whole.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    with pytest.raises(ModelError) as error:
        load(folder)
    assert str(error.value)


def test_a_grid_with_other_levels_of_the_same_shape_is_found(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 24))
    quantize(model, "nf4")
    freeze(model)
    save(model, tmp_path / "out")
    change_map(lambda it: it["modules"]["0"].update(grid="fp4-g64"))(tmp_path / "out")
    with pytest.raises(BrokenFileError, match="levels"):
        load(tmp_path / "out", nn.Sequential(nn.Linear(64, 24)))


@pytest.mark.parametrize(
    "columns", [[1, 64, 65], [-1, 3, 9], [3, 1, 9], [3, 3, 9], [1.0, 3.0, 9.0]], ids=lambda it: str(it)
)
def test_salient_columns_that_are_none_are_found_on_loading(columns: list[float], tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 24))
    quantize(model, "qint4", salient=0.05, calibration=[torch.ones(2, 64)])
    freeze(model)
    save(model, tmp_path / "out")
    load(tmp_path / "out", nn.Sequential(nn.Linear(64, 24)))
    change_tensors(lambda it: it.update({"0.columns": torch.tensor(columns)}))(tmp_path / "out")
    with pytest.raises(BrokenFileError, match="columns"):
        load(tmp_path / "out", nn.Sequential(nn.Linear(64, 24)))


def test_a_missing_folder_and_a_needless_model_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        load(tmp_path / "nowhere")
    save_tiny("llama", tmp_path / "plain")
    with pytest.raises(ModelError, match=r"whit\.json"):
        load(tmp_path / "plain", tiny_model("llama"))


def test_a_model_of_another_shape_is_an_error(tmp_path: Path) -> None:
    model = Plain()
    quantize(model, "qint8")
    freeze(model)
    save(model, tmp_path / "out")
    with pytest.raises(BrokenFileError):
        load(tmp_path / "out", nn.Sequential(nn.Linear(64, 64)))
    with pytest.raises(ModelError):
        load(tmp_path / "out")  # transformers does not know it, and no model was given


def test_folders_of_floats_are_live_models_too(tmp_path: Path) -> None:
    model = save_tiny("llama", tmp_path / "plain")
    assert torch.equal(logits(loaded(tmp_path / "plain")), logits(model))


def test_the_configuration_and_the_tokenizer_lie_beside(tmp_path: Path) -> None:
    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    save(frozen(), tmp_path / "out", Tokenizer())
    names = {each.name for each in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "whit.json"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_command_line_says_what_a_live_folder_is(tmp_path: Path) -> None:
    model = tiny_model("llama")
    quantize(model, "qint8")
    freeze(model)
    save(model, tmp_path / "out")
    with pytest.raises(ModelError, match=r"whit\.load"):
        open_model(tmp_path / "out")
