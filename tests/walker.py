"""A tiny Llama whose answers are known beforehand: every token is followed by its successor in a table.

What its blocks compute is multiplied by zero, so the next token follows from the last one alone, with a margin that no
order of summation can turn. A prompt that ends in another word therefore gets another answer, which a test can name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tiny import MemorySource
from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer
from whit.models.model import Model
from whit.models.open import open_model
from whit.models.tokenizer import Tokenizer, load_tokenizer
from whit.pipeline.quantize import write_gguf
from whit.recipes.named import recipe_named

HIDDEN, CONTEXT = 64, 1 << 17
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nContent-Type: application/json\r\n"
LAST = "!"  # the token that ends an answer follows


class Walker:
    """The model in a folder and in a GGUF file, and what it says.

    words  texts of one token each, whose answers differ from each other's
    """

    def __init__(self, place: Path) -> None:
        self.folder, self.file = place / "walker", place / "walker.gguf"
        save_toy_tokenizer("smollm", self.folder)
        settings = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>", "chat_template": TEMPLATE}
        (self.folder / "tokenizer_config.json").write_text(json.dumps(settings))
        config = LlamaConfig(
            vocab_size=TOY_VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=HIDDEN,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=CONTEXT,
        )
        config.architectures = ["LlamaForCausalLM"]
        (self.folder / "config.json").write_text(json.dumps(config.to_dict()))
        self.tokenizer: Tokenizer = load_tokenizer(Model("walker", {}, MemorySource({}), 0, tokenizer_dir=self.folder))
        self._next = self._table()
        self.words = [self.tokenizer.decode([token]) for token in self._next]
        ends = dict.fromkeys(self.tokenizer.encode(LAST), self.tokenizer.encode("<|im_end|>")[0])
        _model(config, self._next | ends).save_pretrained(self.folder)
        write_gguf(open_model(self.folder), recipe_named("f16"), self.file)

    def says(self, word: str, n: int) -> str:
        """The `n` tokens that follow a word of `words`."""
        token, said = self.tokenizer.encode(word)[-1], []
        for _ in range(n):
            token = self._next[token]
            said.append(token)
        return self.tokenizer.decode(said)

    def _table(self) -> dict[int, int]:
        """Successors: one circle through all words that begin with a space."""
        texts = {i: self.tokenizer.decode([i]) for i in range(self.tokenizer.vocab_size)}
        words = [i for i, text in texts.items() if text.isascii() and text[:1] == " " and text[1:].isalpha()]
        words = [i for i in words if self.tokenizer.encode(f"say{texts[i]}")[-1] == i]
        order = torch.randperm(len(words), generator=torch.Generator().manual_seed(0)).tolist()
        circle = [words[i] for i in order]
        return dict(zip(circle, circle[1:] + circle[:1], strict=True))


def _model(config: LlamaConfig, successors: Mapping[int, int]) -> LlamaForCausalLM:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).float().eval()
    signs = torch.randint(0, 2, (TOY_VOCAB, HIDDEN), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(signs)
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        for here, there in successors.items():
            model.lm_head.weight[there] = signs[here]
    return model


def posted(body: dict[str, object]) -> bytes:
    """A request to complete something, as it goes over a socket."""
    raw = json.dumps(body).encode()
    return HEAD + b"Content-Length: %d\r\n\r\n" % len(raw) + raw
