"""llama.cpp's runtime on real files; truth for what it says is transformers' greedy choice."""

import importlib.util
import os
from pathlib import Path

import psutil
import pytest
import torch

from llamacpp import llama_cpp_logits
from whit.errors import BrokenFileError, MissingPackageError, ModelError, RecipeError
from whit.models.builtin import SMOLLM2, packaged_smollm2
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named
from whit.runtime.generate import Generation, generate

PROMPT = "The most important thing about bread is"


def packaged(
    prompt: str = PROMPT, n_tokens: int = 32, raw: bool = True, seed: int = 0, temperature: float = 0
) -> Generation:
    # One thread: llama.cpp's threads wait for each other in busy loops, which tests that run side by side turn into
    # seconds per token.
    return generate(packaged_smollm2(), prompt, n_tokens, raw=raw, seed=seed, temperature=temperature, threads=1)


def workers() -> list[int]:
    return [child.pid for child in psutil.Process().children() if "whit.runtime.worker" in child.cmdline()]


@pytest.mark.real_model
def test_32_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    model = open_model(SMOLLM2)
    write_gguf(model, recipe_named("f32"), tmp_path / "f32.gguf")
    module, tokenizer = load_module(model), load_tokenizer(model)
    ids = torch.tensor([tokenizer.encode(PROMPT)])  # [1, tokens]
    with torch.inference_mode():
        expected = module.generate(ids, max_new_tokens=32, do_sample=False)[0, ids.shape[1] :]
    found = "".join(generate(tmp_path / "f32.gguf", PROMPT, 32, raw=True, threads=1))
    assert found == tokenizer.decode(expected.tolist())


@pytest.mark.real_model
def test_the_first_greedy_token_is_the_likeliest_in_llama_cpp_s_own_logits() -> None:
    tokenizer = load_tokenizer(open_model(packaged_smollm2()))
    best = llama_cpp_logits(packaged_smollm2(), tokenizer.encode(PROMPT))[-1].argmax()
    assert "".join(packaged(n_tokens=1)) == tokenizer.decode([int(best)])


@pytest.mark.real_model
def test_32_greedy_tokens_come_in_pieces_and_with_their_timings() -> None:
    answer = packaged()
    pieces = list(answer)
    assert len(pieces) > 16
    assert answer.timings.tokens == 32
    assert not answer.timings.ended  # it had more to say
    assert answer.timings.prompt_tokens == 7
    assert answer.tokens_per_second == answer.timings.tokens_per_second > 0


@pytest.mark.real_model
def test_a_chat_template_in_the_file_is_used_unless_raw() -> None:
    chat = packaged("Say hello.", n_tokens=16, raw=False)
    answered = "".join(chat)
    continued = packaged("Say hello.", n_tokens=16)
    assert "".join(continued) != answered
    assert chat.timings.prompt_tokens > continued.timings.prompt_tokens + 10
    assert "<|im_" not in answered


@pytest.mark.real_model
def test_equal_seeds_draw_equal_texts_and_others_do_not() -> None:
    first, again, other = ("".join(packaged(n_tokens=12, seed=seed, temperature=1.5)) for seed in (1, 1, 2))
    assert first == again != other


@pytest.mark.real_model
def test_the_model_may_end_the_answer_itself() -> None:
    answer = packaged("What is 1 + 1? Answer with one word.", n_tokens=200, raw=False)
    assert "".join(answer)
    assert answer.timings.ended
    assert answer.timings.tokens < 200


@pytest.mark.real_model
def test_an_answer_that_is_not_read_to_its_end_leaves_no_process() -> None:
    answer = packaged(n_tokens=5000)
    next(answer)
    assert len(workers()) == 1
    answer.close()
    assert workers() == []
    with pytest.raises(ValueError, match="not complete"):
        _ = answer.timings


@pytest.mark.real_model
def test_a_dead_runtime_is_an_error_and_not_a_silent_end() -> None:
    answer = packaged(n_tokens=5000)
    next(answer)
    os.kill(workers()[0], 9)
    with pytest.raises(BrokenFileError, match="llama.cpp has failed while it ran: .*status -9") as caught:
        list(answer)
    assert "this file" not in str(caught.value)  # it ran well until then


@pytest.mark.real_model
def test_the_runtime_writes_nothing_to_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    list(packaged(n_tokens=2))
    assert capfd.readouterr() == ("", "")


@pytest.mark.real_model
def test_a_prompt_longer_than_the_context_says_both_lengths() -> None:
    with pytest.raises(RecipeError, match=r"the prompt has 90\d\d tokens, the model reads at most 8192"):
        list(packaged("hello " * 9000))


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"no model at all")
    with pytest.raises(BrokenFileError, match="not a GGUF file"):
        generate(tmp_path / "a.gguf", PROMPT)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="absent.gguf"):
        generate(tmp_path / "absent.gguf", PROMPT)


def test_what_llama_cpp_cannot_load_comes_with_its_reason(tmp_path: Path) -> None:
    import gguf
    import numpy as np

    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(BrokenFileError, match=r"a\.gguf: llama\.cpp cannot run this file: .*context_length"):
        list(generate(tmp_path / "a.gguf", PROMPT))


def test_without_the_package_the_install_line_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'whit\[run\]'"):
        generate(Path("any.gguf"), PROMPT)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(RecipeError, match="empty"):
        generate(Path("any.gguf"), "")


def test_a_prompt_that_is_no_text_is_refused() -> None:
    with pytest.raises(RecipeError, match="The prompt is not UTF-8 from character 2 on"):
        generate(Path("any.gguf"), os.fsdecode(b"a\xff"))


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("n_tokens", 0),
        ("temperature", -0.1),
        ("threads", 0),
        ("threads", 100_000),
        ("seed", 2**63),
        ("seed", -(2**63) - 1),
    ],
)
def test_impossible_requests_are_refused(option: str, value: float) -> None:
    with pytest.raises(RecipeError, match=str(value)):
        generate(Path("any.gguf"), PROMPT, **{option: value})
