"""What stands beside the variants."""

from pathlib import Path

import pytest

from tiny import save_tiny
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.model import Model
from whit.models.open import open_model
from whit.release.pages import prompt_template

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHATML


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pages") / "llama"
    save_tiny("llama", path, vocab_size=TOY_VOCAB)
    save_toy_tokenizer("llama", path)
    return path


def with_template(folder: Path, template: str) -> Model:
    (folder / "chat_template.jinja").write_text(template)
    return open_model(folder)


def test_the_prompt_template_is_filled_in_as_the_model_has_it(folder: Path) -> None:
    assert prompt_template(with_template(folder, CHATML)) == (
        "<|im_start|>system\n{system_prompt}<|im_end|>\n<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_without_a_system_prompt_is_asked_without(folder: Path) -> None:
    assert prompt_template(with_template(folder, NO_SYSTEM)) == (
        "<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_takes_nothing_is_left_out(folder: Path) -> None:
    assert prompt_template(with_template(folder, "{{ raise_exception('never') }}")) is None
