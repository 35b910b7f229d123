"""Live models that answer; truth is transformers' own `generate` on Whit's decoded weights."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from walker import LAST, Walker
from whit.errors import ModelError, RecipeError, TooLongError
from whit.live.modules import QLinear
from whit.live.save import load, save
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.folder import write_model
from whit.recipes.folders import folder_recipe
from whit.runtime import live
from whit.runtime.answer import Generation, Settings
from whit.runtime.choose import prepare
from whit.runtime.live import LiveRuntime, described, drawn

PROMPT = "The value of an expression is"
MODELS = ("llama", "gpt2", "gemma3_text", "mixtral", "opt", "gpt_neox")  # rotary, learned, sliding, experts
FORMATS = ("gptq-4bit-g32", "awq-4bit-g32", "w4a16-g32", "w8a8", "whit-int4-g32")


def tiny_folder(name: str, folder: Path) -> Path:
    save_toy_tokenizer("gpt2", folder)
    save_tiny(name, folder, vocab_size=TOY_VOCAB, eos_token_id=None)
    (folder / "generation_config.json").unlink()  # it would name an end of its own
    return folder


def generated(folder: Path, prompt: str, n: int) -> str:
    """As transformers does it, without this loop, its cache or its pieces of a prompt."""
    model = open_model(folder)
    module, tokenizer = load_module(model), load_tokenizer(model)
    ids = torch.tensor([tokenizer.encode(prompt)])
    with torch.inference_mode():
        out = module.generate(ids, max_new_tokens=n, do_sample=False, use_cache=False, eos_token_id=None)
    return tokenizer.decode(out[0, ids.shape[1] :].tolist())


def opened(folder: Path, remember: bool = False) -> LiveRuntime:
    runtime = prepare(folder, 4096, threads=1, anyway=True, remember=remember)()
    assert isinstance(runtime, LiveRuntime)
    return runtime


def read(answer: Generation) -> str:
    return "".join(answer)


@pytest.mark.parametrize("name", MODELS)
def test_greedy_answers_are_those_of_transformers(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "CHUNK", 5)  # the prompt goes in by pieces, longer than a sliding window
    folder = tiny_folder(name, tmp_path / name)
    answer = opened(folder).answer(PROMPT, Settings(24))
    assert read(answer) == generated(folder, PROMPT, 24)
    assert answer.timings.tokens == 24
    assert not answer.timings.ended


@pytest.mark.parametrize("kind", FORMATS)
def test_quantized_folders_answer_from_their_codes(kind: str, tmp_path: Path) -> None:
    recipe = folder_recipe(kind)
    assert recipe is not None
    write_model(open_model(tiny_folder("llama", tmp_path / "float")), recipe, tmp_path / "small")
    runtime = opened(tmp_path / "small")
    assert any(isinstance(each, QLinear) for each in runtime._module.modules())
    assert read(runtime.answer(PROMPT, Settings(12))) == generated(tmp_path / "small", PROMPT, 12)


def test_folders_of_whit_save_answer(tmp_path: Path) -> None:
    recipe = folder_recipe("w4a16-g32")
    assert recipe is not None
    write_model(open_model(tiny_folder("llama", tmp_path / "float")), recipe, tmp_path / "small")
    save(load(tmp_path / "small"), tmp_path / "saved")
    for part in (tmp_path / "float").glob("*token*"):
        (tmp_path / "saved" / part.name).write_bytes(part.read_bytes())
    answers = {read(opened(tmp_path / name).answer(PROMPT, Settings(12))) for name in ("small", "saved")}
    assert len(answers) == 1


@pytest.fixture(scope="module")
def walker(tmp_path_factory: pytest.TempPathFactory) -> Walker:
    return Walker(tmp_path_factory.mktemp("walker"))


@pytest.fixture(scope="module")
def walking(walker: Walker) -> LiveRuntime:
    return opened(walker.folder)


def test_the_model_s_own_end_ends_an_answer(walking: LiveRuntime) -> None:
    answer = walking.answer(LAST, Settings(50))
    assert read(answer) == ""
    assert answer.timings.ended
    assert answer.timings.tokens == 1


@given(at=st.integers(0, 40), n=st.integers(1, 12))
@settings(max_examples=12, deadline=None, derandomize=True)
def test_a_stop_text_cuts_wherever_tokens_begin(walking: LiveRuntime, walker: Walker, at: int, n: int) -> None:
    word = walker.words[1]
    said = walker.says(word, 16)
    stop = said[at : at + n]
    answer = walking.answer(f"say{word}", Settings(16, stop=(stop, "\0")))
    pieces = list(answer)
    assert "".join(pieces) == said[: said.index(stop)]
    assert answer.timings.ended


def test_text_that_only_looked_like_a_stop_comes_out(walking: LiveRuntime, walker: Walker) -> None:
    word = walker.words[1]
    said = walker.says(word, 4)
    assert read(walking.answer(f"say{word}", Settings(4, stop=(said + "more", said[-2:] + "x")))) == said


def test_a_prompt_longer_than_the_context_says_both_lengths(walker: Walker) -> None:
    runtime = prepare(walker.folder, 16, 1, anyway=True)()
    with pytest.raises(TooLongError, match=r"the prompt has \d+ tokens, the context holds 16"):
        read(runtime.answer("say it all " * 20, Settings(1)))
    cut = runtime.answer(f"say{walker.words[0]}", Settings(500))
    assert read(cut)
    assert len(walker.tokenizer.encode(f"say{walker.words[0]}")) + cut.timings.tokens == 16


def test_a_conversation_goes_on_from_what_was_read(walker: Walker) -> None:
    remembering, forgetting = opened(walker.folder, remember=True), opened(walker.folder)
    talk = [{"role": "user", "content": f"say{walker.words[0]}"}]
    for turn in range(3):
        first, second = (each.answer(talk, Settings(6)) for each in (remembering, forgetting))
        said = read(first)
        assert said == read(second)
        fresh = len(walker.tokenizer.encode("".join(each["content"] for each in talk)))
        assert second.timings.prompt_tokens == fresh
        assert first.timings.prompt_tokens < 8 if turn else first.timings.prompt_tokens == fresh
        talk += [{"role": "assistant", "content": said}, {"role": "user", "content": f" and{walker.words[turn]}"}]


def test_an_answer_that_is_left_early_harms_no_other(walking: LiveRuntime, walker: Walker) -> None:
    first = walking.answer(f"say{walker.words[0]}", Settings(1000))
    assert "".join(next(first) for _ in range(3))
    first.close()
    assert read(walking.answer(f"say{walker.words[2]}", Settings(5))) == walker.says(walker.words[2], 5)


def test_a_conversation_needs_a_template(tmp_path: Path) -> None:
    runtime = opened(tiny_folder("llama", tmp_path / "plain"))
    assert not runtime.has_template
    with pytest.raises(RecipeError, match="has no chat template"):
        read(runtime.answer([{"role": "user", "content": "Hi"}], Settings()))


def test_the_number_of_threads_is_put_back(walking: LiveRuntime) -> None:
    before = torch.get_num_threads()
    read(walking.answer("a", Settings(2)))
    assert torch.get_num_threads() == before


def test_memory_is_that_of_a_process(walking: LiveRuntime) -> None:
    assert 50e6 < walking.resident() < 50e9


def test_tokens_are_drawn_with_their_probabilities_among_the_likeliest() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    random, n = torch.Generator().manual_seed(0), 2000

    def shares(**how: float) -> torch.Tensor:
        tokens = torch.tensor([drawn(p.log(), Settings(**how), random) for _ in range(n)])
        return torch.bincount(tokens, minlength=4) / n

    assert (shares(temperature=1.0) - p).abs().max() < 0.04
    squared = p**2 / (p**2).sum()
    assert (shares(temperature=0.5) - squared).abs().max() < 0.04
    assert (shares(temperature=1.0, top_p=0.75) - torch.tensor([0.625, 0.375, 0, 0])).abs().max() < 0.04
    for surely in (Settings(temperature=1e-300), Settings(), Settings(temperature=1, top_p=1e-9)):
        assert {drawn(p.log(), surely, random) for _ in range(20)} == {0}


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such file or folder"):
        described(tmp_path / "absent")
