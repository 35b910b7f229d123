"""Calibration text that the model writes itself: nothing is needed but the model, in whatever language it speaks.

A text that is given can be made more of: the model draws some of its tokens anew.
Source: arXiv 2305.17888 (LLM-QAT) trains on text sampled like this; here it also says what arrives at the layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from whit.allocator import return_memory
from whit.calibration.text import TOGETHER
from whit.devices import CPU
from whit.models.model import Model
from whit.models.skeleton import load_module, quiet

SHARE = 0.25  # of the tokens of a text that are drawn anew
NOISE = 0.1  # of logits in bfloat16, whose errors alone are 0.07 for SmolLM2; two ways to the same differ by up to 0.03
Progress = Callable[[int, int, str], None]


def sampled_windows(
    model: Model,
    n_windows: int,
    length: int,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """Windows [n, length] int64 sampled at temperature 1, each from a random first token.

    device  where the model runs; tokens are drawn on the CPU
    The whole model is in memory, in bfloat16. Documents that end within a window are followed by what the model
    writes next. The same seed gives the same text on the same machine.
    """
    module = load_module(model, torch.bfloat16).to(device)
    vocabulary = cast(Any, module).get_input_embeddings().weight.shape[0]
    first = torch.randint(vocabulary, (n_windows, 1), generator=torch.Generator().manual_seed(seed))
    text = written(module, first, length, seed, progress)
    del module
    return_memory()
    return text


def resampled_windows(
    model: Model,
    text: Tensor,
    times: int,
    seed: int = 0,
    progress: Progress | None = None,
    device: torch.device = CPU,
) -> Tensor:
    """Windows [times * n, length] int64: a text in which a quarter of the tokens are drawn anew, other ones each time.

    text   [n, length] int64
    times  how often each window is taken
    device  where the model runs; tokens are drawn on the CPU
    A token is drawn from what the model predicts after the tokens of the text itself, so that one pass of the model
    does for all of a window's copies. They stay close to the text, unlike what a small model writes on its own.
    """
    tell = progress or (lambda done, total, what: None)
    module, random = load_module(model, torch.bfloat16).to(device), torch.Generator().manual_seed(seed)
    copies: list[list[Tensor]] = [[] for _ in range(times)]
    with torch.inference_mode():
        for done, window in enumerate(text):
            tell(done, len(text), "text from the model")
            logits = cast(Any, module)(input_ids=window[None].to(device), use_cache=False).logits[0, :-1].float().cpu()
            for copy in copies:
                anew = torch.rand(len(window) - 1, generator=random) < SHARE
                drawn = torch.where(anew, _drawn(logits, random)[:, 0], window[1:])
                copy.append(torch.cat([window[:1], drawn]))
    tell(len(text), len(text), "text from the model")
    del module
    return_memory()
    return torch.cat([torch.stack(copy) for copy in copies])


def written(module: nn.Module, prompts: Tensor, length: int, seed: int = 0, progress: Progress | None = None) -> Tensor:
    """[n, length]: prompts [n, tokens] and what follows, on the CPU; the module may be anywhere."""
    tell = progress or (lambda done, total, what: None)
    assert isinstance(module, PreTrainedModel)
    there = module.device
    random, parts = torch.Generator().manual_seed(seed), []
    with torch.inference_mode(), quiet():
        _choose_attention(module)
        for done in range(0, len(prompts), TOGETHER):
            tell(done, len(prompts), "text from the model")
            ids = prompts[done : done + TOGETHER]
            n_layers = module.config.get_text_config().num_hidden_layers
            cache = Cache(layers=[_Buffer(length) for _ in range(n_layers)])
            if ids.shape[1] > 1:  # without the head: logits of many tokens of many windows would fill the memory
                cast(Any, module).get_decoder()(input_ids=ids[:, :-1].to(there), past_key_values=cache, use_cache=True)
            while ids.shape[1] < length:
                out = cast(Any, module)(input_ids=ids[:, -1:].to(there), past_key_values=cache, use_cache=True)
                ids = torch.cat([ids, _drawn(out.logits[:, -1].float().cpu(), random)], 1)
            parts.append(ids)
    tell(len(prompts), len(prompts), "text from the model")
    return torch.cat(parts)


def _choose_attention(module: PreTrainedModel) -> None:
    """torch's own attention, three times as fast, where the model comes out the same with it."""
    if not module._supports_sdpa:
        return
    probe = torch.arange(min(16, module.config.get_text_config().vocab_size), device=module.device)[None]
    expected = module(input_ids=probe, use_cache=False).logits
    module.set_attn_implementation("sdpa")
    found = module(input_ids=probe, use_cache=False).logits
    if not (found - expected).norm() <= NOISE * expected.norm():
        module.set_attn_implementation("eager")


def _drawn(logits: Tensor, random: torch.Generator) -> Tensor:
    """A token [n, 1] for every row of logits [n, vocab], by its distribution function."""
    c = logits.softmax(-1).cumsum(-1)
    at = torch.rand(len(c), 1, generator=random) * c[:, -1:]
    return torch.searchsorted(c, at, right=True).clamp_(max=c.shape[1] - 1)


class _Buffer(DynamicLayer):
    """Keys and values of one layer in one piece of memory for all tokens that will come.

    A cache that grows leaves a kernel and a hole in memory per length; one that is always whole is read to its end.
    """

    is_sliding = False

    def __init__(self, length: int) -> None:
        """length  tokens at most"""
        super().__init__()
        self._length, self._n = length, 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [batch, heads, tokens, width] of each; returns all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (
                each.new_empty(*each.shape[:2], self._length, each.shape[-1]) for each in (key_states, value_states)
            )
        start, self._n = self._n, self._n + key_states.shape[-2]
        found = []
        for buffer, new in ((self.keys, key_states), (self.values, value_states)):
            buffer[:, :, start : self._n] = new
            found.append(buffer[:, :, : self._n])
        return found[0], found[1]

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._n

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask covers."""
        return self._n + query_length, 0
