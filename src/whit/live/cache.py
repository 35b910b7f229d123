"""A cache of keys and values in 8 or 4 bits, with the first and the latest tokens in float.

    model.generate(**inputs, past_key_values=QuantizedCache(model.config, bits=4))

Keys have channels that are large for every token, so a group of `group` tokens shares a scale and a zero point per
channel; values have none, so each token has them per head. The first tokens, which everything attends to, and the
window of the latest stay as they are; when the window holds a whole group beyond its size, its oldest group is rounded.
Source: arXiv 2402.02750 (KIVI); arXiv 2309.17453 for the first tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from whit.errors import RecipeError

FIRST = 4  # tokens that stay float at the beginning
BITS = (4, 8)


@dataclass
class _Rounded:
    """Some tokens of keys or values: uint8 codes (two in a byte at 4 bits), scale and minimum in the model's type."""

    codes: Tensor  # [batch, heads, tokens, width], at 4 bits half as wide
    scale: Tensor
    low: Tensor
    bits: int

    @classmethod
    def of(cls, x: Tensor, bits: int, dim: int) -> _Rounded:
        """x [batch, heads, tokens, width]; one scale along `dim`."""
        low, high = x.float().amin(dim, keepdim=True), x.float().amax(dim, keepdim=True)
        scale = ((high - low) / (2**bits - 1)).clamp(min=torch.finfo(torch.float32).tiny)
        scale, low = scale.to(x.dtype), low.to(x.dtype)  # codes are for what decoding will see
        inverse = scale.float().reciprocal().nan_to_num_(posinf=0.0)
        codes = ((x.float() - low.float()) * inverse).round_().clamp_(0, 2**bits - 1).to(torch.uint8)
        return cls(codes[..., ::2] | (codes[..., 1::2] << 4) if bits == 4 else codes, scale, low, bits)

    def decode(self) -> Tensor:
        """[batch, heads, tokens, width] in the model's type."""
        codes = self.codes
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return (codes.to(self.scale.dtype) * self.scale).add_(self.low)

    def map(self, change: Any) -> _Rounded:
        """With every tensor changed along the batch."""
        return _Rounded(change(self.codes), change(self.scale), change(self.low), self.bits)

    @property
    def n_bytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.low.nbytes


@dataclass
class _Half:
    """Keys or values of one layer.

    dim  along which a scale is shared: tokens for keys, channels for values
    """

    bits: int
    dim: int
    first: Tensor | None = None
    rounded: list[_Rounded] = field(default_factory=list)
    latest: Tensor | None = None

    def add(self, x: Tensor, window: int, group: int) -> Tensor:
        """All tokens so far, with x [batch, heads, tokens, width] at the end, unrounded in this step."""
        self.latest = x if self.latest is None else torch.cat([self.latest, x], -2)
        if self.first is None or self.first.shape[-2] < FIRST:
            there = 0 if self.first is None else self.first.shape[-2]
            more, self.latest = self.latest[..., : FIRST - there, :], self.latest[..., FIRST - there :, :]
            self.first = more if self.first is None else torch.cat([self.first, more], -2)
        whole = self.whole()
        while self.latest.shape[-2] >= window + group:
            self.rounded.append(_Rounded.of(self.latest[..., :group, :], self.bits, self.dim))
            self.latest = self.latest[..., group:, :].contiguous()
        return whole

    def whole(self) -> Tensor:
        """[batch, heads, tokens, width]."""
        parts = [self.first, *(each.decode() for each in self.rounded), self.latest]
        return torch.cat([each for each in parts if each is not None], -2)

    @property
    def n_latest(self) -> int:
        """Tokens after all that are rounded."""
        return 0 if self.latest is None else self.latest.shape[-2]

    def crop(self, n: int) -> None:
        """Without the last n tokens, none of which may be rounded."""
        of_first = max(0, n - self.n_latest)
        if self.latest is not None:
            self.latest = self.latest[..., : self.n_latest - (n - of_first), :]
        if self.first is not None and of_first:
            self.first = self.first[..., : self.first.shape[-2] - of_first, :]

    def map(self, change: Any) -> None:
        """Change every tensor along the batch."""
        self.first = None if self.first is None else change(self.first)
        self.latest = None if self.latest is None else change(self.latest)
        self.rounded = [each.map(change) for each in self.rounded]

    @property
    def n_bytes(self) -> int:
        floats = [each for each in (self.first, self.latest) if each is not None]
        return sum(each.nbytes for each in floats) + sum(each.n_bytes for each in self.rounded)


class QuantizedCacheLayer(DynamicLayer):
    """One layer's keys and values."""

    is_sliding = False

    def __init__(self, bits: int, window: int, group: int) -> None:
        """As in QuantizedCache."""
        super().__init__()
        self._window, self._group, self._bits = window, group, bits
        self._keys, self._values = _Half(bits, -2), _Half(bits, -1)
        self._n = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add [batch, heads, tokens, width] of each; returns all tokens so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._n += key_states.shape[-2]
        keys = self._keys.add(key_states, self._window, self._group)
        return keys, self._values.add(value_states, self._window, self._group)

    def get_seq_length(self) -> int:
        """Tokens so far."""
        return self._n

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what a mask covers."""
        return self._n + query_length, 0

    def reset(self) -> None:
        """Forget everything."""
        self._keys, self._values, self._n = _Half(self._bits, -2), _Half(self._bits, -1), 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Rows of the batch in another order."""
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row of the batch several times."""
        self._map(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Some rows of the batch."""
        self._map(lambda x: x[indices, ...])

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the latest tokens, as many as the negative number says, or all that there are.

        Raises ValueError for a positive number, as transformers does, and RecipeError when some of the tokens are
        rounded already: their groups cannot be cut.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): a negative number says how many tokens to remove.")
        n = min(-tokens_to_remove, self._n)
        if n == 0:
            return
        if self._keys.rounded and self._keys.n_latest < n:
            raise RecipeError(f"{n} tokens cannot be taken back from a quantized cache: its window is shorter.")
        self._keys.crop(n)
        self._values.crop(n)
        self._n -= n

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return self._keys.n_bytes + self._values.n_bytes

    def _map(self, change: Any) -> None:
        self._keys.map(change)
        self._values.map(change)


class QuantizedCache(Cache):
    """Keys and values in few bits.

    n_bytes  of all layers
    """

    def __init__(self, config: PreTrainedConfig, bits: int = 8, window: int = 128, group: int = 64) -> None:
        """One layer for each of the model's.

        bits    8 or 4
        window  latest tokens that are float at least
        group   tokens that are rounded together
        Raises RecipeError for other bits, and for models whose layers forget (sliding windows keep little already).
        """
        if bits not in BITS or window < 0 or group < 1:
            raise RecipeError(
                f"a cache has 4 or 8 bits, a window and a group of tokens; found {bits}, {window}, {group}."
            )
        text = config.get_text_config()
        window_of_all = getattr(text, "sliding_window", None)  # where kinds of layers are not listed
        kinds = set(getattr(text, "layer_types", None) or ["sliding_attention" if window_of_all else "full_attention"])
        if kinds != {"full_attention"}:
            raise RecipeError(
                f"layers of the kinds {sorted(kinds)} have caches of their own; full attention is quantized."
            )
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        if bits == 4 and width % 2:
            raise RecipeError(f"heads of {width} channels do not divide into pairs of 4 bits.")
        super().__init__(layers=[QuantizedCacheLayer(bits, window, group) for _ in range(text.num_hidden_layers)])

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors of all layers."""
        return sum(layer.n_bytes for layer in self.layers if isinstance(layer, QuantizedCacheLayer))
