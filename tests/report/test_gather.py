"""What a report measures is what the single measurements give; names and importance matrices are kept apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from trained import save_trained
from whit.calibration.text import Text
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.imatrix import ImportanceMatrix
from whit.errors import ModelError
from whit.evaluation.compare import compare
from whit.evaluation.verdict import BROKEN, DAMAGED
from whit.grids.named import grid_named
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.folder import FolderJob
from whit.pipeline.quantize import gather_importance, model_view, write_gguf
from whit.recipes.folders import folder_recipe
from whit.recipes.recipe import Recipe, Rule
from whit.report.facts import FileFacts, Report
from whit.report.gather import WRITTEN, covered, distinct, gathered, printable
from whit.rounding.nearest import nearest

TEXT = Text("held", "held-out text", "")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    """A trained model; a file of it, one with a fault, one that is cut short, and a folder."""
    folder = tmp_path_factory.mktemp("report")
    windows = save_trained(folder / "model", steps=60)[:4]
    model = open_model(folder / "model")
    write_gguf(model, Recipe("q4_0", (Rule("*", "q4_0"),)), folder / "sound.gguf")
    file = GGUFFile(folder / "sound.gguf")
    raw = file.raw("blk.1.ffn_up.weight")
    raw[:18] = 0
    with (folder / "faulty.gguf").open("wb") as written:
        file.with_changes(written, [("blk.1.ffn_up.weight", raw)])
    (folder / "cut.gguf").write_bytes((folder / "sound.gguf").read_bytes()[:5000])
    FolderJob(model, folder_recipe("gptq-4bit-g32")).write(folder / "gptq")
    return folder, windows


@pytest.fixture(scope="module")
def made(place: tuple[Path, torch.Tensor]) -> Report:
    folder, windows = place
    files = [folder / name for name in ("sound.gguf", "faulty.gguf", "cut.gguf", "gptq")]
    return gathered(files, open_model(folder / "model"), windows, TEXT)


def of(made: Report, name: str) -> FileFacts:
    (found,) = (each for each in made.files if each.name == name)
    return found


@pytest.mark.parametrize("name", ["sound.gguf", "gptq"])
def test_figures_are_those_of_single_measurements(name: str, made: Report, place: tuple[Path, torch.Tensor]) -> None:
    folder, windows = place
    alone = compare(open_model(folder / name), open_model(folder / "model"), windows)
    found = of(made, name)
    assert found.verified.result is not None
    assert found.verified.result.kl_mean == pytest.approx(alone.kl_mean, rel=1e-4)
    assert found.tokens is not None
    assert found.tokens.kl.mean().item() == found.verified.result.kl_mean
    assert len(found.tokens.kl) == alone.tokens


def test_matrices_have_the_error_types_and_bits_of_their_grids(made: Report, place: tuple[Path, torch.Tensor]) -> None:
    tensors = {tensor.name: tensor for tensor in model_view(open_model(place[0] / "model")).tensors}
    found = {each.name: each for each in of(made, "sound.gguf").matrices}
    assert {f"{name}.weight" for name in found} == {name for name in tensors if len(tensors[name].shape) == 2}
    W = tensors["blk.1.ffn_up.weight"].read()
    error = (nearest(W, grid_named("q4_0")).dequantize() - W).norm() / W.norm()
    up = found["blk.1.ffn_up"]
    assert (up.block, up.role, up.type, up.bits, up.n_weights) == (1, "ffn_up", "q4_0", 4.5, W.numel())
    assert up.error == pytest.approx(error.item(), rel=1e-3)
    assert (found["token_embd"].block, found["token_embd"].role) == (None, "token_embd")
    bits = {each.type: each.bits for each in of(made, "gptq").matrices}
    assert set(bits.values()) == {4 + 16 / 32, 16.0}  # codes and a scale per 32; embedding and head


def test_faults_and_broken_files_are_findings(made: Report) -> None:
    faulty, cut = of(made, "faulty.gguf"), of(made, "cut.gguf")
    assert faulty.verified.verdict.word == DAMAGED
    assert [each.name for each in faulty.matrices if each.fault] == ["blk.1.ffn_up"]
    assert (cut.verified.verdict.word, cut.tokens, cut.matrices, cut.said) == (BROKEN, None, (), ())
    assert cut.n_bytes == 5000


def test_words_are_those_that_the_models_write(made: Report, place: tuple[Path, torch.Tensor]) -> None:
    folder, windows = place
    tokenizer, written = load_tokenizer(open_model(folder / "model")), []
    for name in ("model", "sound.gguf"):
        module, ids = load_module(open_model(folder / name)), windows[:1, :32]
        with torch.inference_mode():
            for _ in range(WRITTEN):  # without a cache
                ids = torch.cat([ids, module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
        written.append(ids[0, 32:])
    assert made.original == "model"  # and not where it lies
    assert made.prompts[0].text == tokenizer.decode(windows[0, :32].tolist())
    assert made.prompts[0].original == tokenizer.decode(written[0].tolist())
    said = of(made, "sound.gguf").said[0]
    assert said.same + said.rest == tokenizer.decode(written[1].tolist())
    differ = (written[0] != written[1]).nonzero()
    assert said.n_same == (int(differ[0]) if len(differ) else WRITTEN)
    assert made.prompts[0].original.startswith(said.same)


def test_what_cannot_be_compared_ends_it_before_any_work(place: tuple[Path, torch.Tensor], tmp_path: Path) -> None:
    folder, windows = place
    original, sound = open_model(folder / "model"), folder / "sound.gguf"
    save_tiny("llama", tmp_path / "wide", vocab_size=TOY_VOCAB, intermediate_size=128)
    save_toy_tokenizer("llama", tmp_path / "wide")
    write_gguf(open_model(tmp_path / "wide"), Recipe("q4_0", (Rule("*", "q4_0"),)), tmp_path / "wide.gguf")

    def unheard(done: int, total: int, what: str) -> None:
        raise AssertionError(what)

    for other, said in (
        (tmp_path / "wide.gguf", "different models"),
        (tmp_path / "no.gguf", "no such file"),
        (folder / "model" / ".." / "sound.gguf", "given twice"),
    ):
        with pytest.raises(ModelError, match=said):
            gathered([sound, other], original, windows, TEXT, progress=unheard)


def test_an_importance_matrix_is_set_beside_the_model(tmp_path: Path) -> None:
    save_tiny("mixtral", tmp_path / "model", vocab_size=TOY_VOCAB)
    model = open_model(tmp_path / "model")
    ids = torch.randint(0, TOY_VOCAB, (1, 6), generator=torch.Generator().manual_seed(0))
    matrix = gather_importance(model, ids, "six tokens", lambda done, total, what: None)
    found = covered("imp", matrix, {tensor.name: tensor for tensor in model_view(model).tensors})
    by_name = {each.name: each for each in found.seen}
    assert by_name["blk.0.attn_q.weight"].tokens == (6,)
    experts = by_name["blk.0.ffn_up_exps.weight"].tokens
    assert len(experts) == 4
    assert sum(experts) == 2 * 6  # every token goes to two of them
    assert not found.unknown
    foreign = ImportanceMatrix({"blk.7.odd": torch.ones(1, 4)}, {"blk.7.odd": torch.ones(1)}, 1, 512, ())
    lost = covered("imp", foreign, {tensor.name: tensor for tensor in model_view(model).tensors})
    assert lost.unknown == ("blk.7.odd",)
    assert "blk.0.ffn_up_exps.weight" in lost.missing
    assert "token_embd.weight" not in lost.missing
    silent = {"blk.0.attn_q.weight": torch.tensor([[0.0, 1.0, 0.0, 2.0]])}
    half = ImportanceMatrix(silent, {"blk.0.attn_q.weight": torch.tensor([9])}, 1, 512, ())
    (seen,) = covered("imp", half, {tensor.name: tensor for tensor in model_view(model).tensors}).seen
    assert seen.silent == 0.5


def test_names_are_as_short_as_they_can_be() -> None:
    paths = [Path("a/x.gguf"), Path("b/x.gguf"), Path("b/y.gguf"), Path("c/b/z"), Path("d/b/z")]
    assert distinct(paths) == ["a/x.gguf", "b/x.gguf", "y.gguf", "c/b/z", "d/b/z"]


def test_a_name_is_one_line_of_letters() -> None:
    assert printable("a\nb\x1b[31m\u202egnp.exe \u00e9\u6f22") == "a\ufffdb\ufffd[31m\ufffdgnp.exe \u00e9\u6f22"
