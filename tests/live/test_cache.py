"""Keys and values in few bits: what is kept exactly, how far the rest is off, and what generation does with it."""

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from tiny import random_tokens, tiny_model
from whit.errors import RecipeError
from whit.live.cache import BITS, FIRST, QuantizedCache, QuantizedCacheLayer

TOKENS = torch.tensor([random_tokens(40)])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def filled(bits: int, steps: list[int], window: int = 8, group: int = 4) -> tuple[QuantizedCacheLayer, Tensor, Tensor]:
    """A layer after some steps of so many tokens, and all keys and values that it was given."""
    layer = QuantizedCacheLayer(bits, window, group)
    keys, values = normal(2, 3, sum(steps), 16), normal(2, 3, sum(steps), 16, seed=1)
    at = 0
    for n in steps:
        layer.update(keys[..., at : at + n, :], values[..., at : at + n, :])
        at += n
    return layer, keys, values


def whole(layer: QuantizedCacheLayer) -> tuple[Tensor, Tensor]:
    return layer._keys.whole(), layer._values.whole()


@pytest.mark.parametrize("steps", [[60], [1] * 60, [3, 17, 1, 1, 38], [2, 1, 57]])
@pytest.mark.parametrize("bits", BITS)
def test_tokens_are_off_by_half_a_step_and_the_newest_and_first_not_at_all(bits: int, steps: list[int]) -> None:
    layer, keys, values = filled(bits, steps)
    found = whole(layer)
    n_rounded = (60 - FIRST - 8) // 4 * 4
    end = FIRST + n_rounded
    for x, y in zip((keys, values), found, strict=True):
        assert torch.equal(y[..., :FIRST, :], x[..., :FIRST, :])
        assert torch.equal(y[..., end:, :], x[..., end:, :])
        assert 60 - end >= 8
        assert not torch.equal(y[..., FIRST:end, :], x[..., FIRST:end, :])
    groups = keys[..., FIRST:end, :].unflatten(-2, (-1, 4))  # a scale for four tokens of a channel
    step = (groups.amax(-2, keepdim=True) - groups.amin(-2, keepdim=True)) / (2**bits - 1)
    error = (found[0][..., FIRST:end, :].unflatten(-2, (-1, 4)) - groups).abs()
    assert (error <= 0.5001 * step + 1e-6).all()
    tokens = values[..., FIRST:end, :]  # a scale for every token
    step = (tokens.amax(-1, keepdim=True) - tokens.amin(-1, keepdim=True)) / (2**bits - 1)
    assert ((found[1][..., FIRST:end, :] - tokens).abs() <= 0.5001 * step + 1e-6).all()


def test_the_result_does_not_depend_on_the_steps() -> None:
    for a, b in zip(whole(filled(4, [60])[0]), whole(filled(4, [1] * 60)[0]), strict=True):
        assert torch.equal(a, b)


def test_new_tokens_are_seen_unrounded_in_their_own_step() -> None:
    layer = QuantizedCacheLayer(8, 0, 4)
    keys, values = normal(1, 2, 20, 8), normal(1, 2, 20, 8, seed=1)
    for found, given in zip(layer.update(keys, values), (keys, values), strict=True):
        assert torch.equal(found, given)
    assert not torch.equal(whole(layer)[0], keys)


def test_constant_channels_are_exact() -> None:
    layer = QuantizedCacheLayer(4, 0, 4)
    keys = torch.linspace(-3, 3, 8).expand(1, 2, 24, 8)
    layer.update(keys, torch.full((1, 2, 24, 8), 2.5))
    assert torch.allclose(whole(layer)[0], keys)
    assert torch.allclose(whole(layer)[1], torch.tensor(2.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", BITS)
def test_half_types_stay_what_they_are(bits: int, dtype: torch.dtype) -> None:
    layer = QuantizedCacheLayer(bits, 0, 4)
    keys = (normal(1, 2, 24, 8) * 5).to(dtype)
    layer.update(keys, keys)
    for found in whole(layer):
        assert found.dtype == dtype
        assert (found.float() - keys.float()).abs().max() < (0.6 if bits == 8 and dtype == torch.bfloat16 else 1.2)


def test_bytes_are_those_of_the_tensors() -> None:
    layer, keys, _ = filled(4, [60])
    rounded, floats = 48, 60 - 48
    codes = 2 * 2 * 3 * rounded * 16 // 2
    of_keys = 2 * 3 * (rounded // 4) * 16 * 4 * 2  # scale and minimum of every channel of a group
    of_values = 2 * 3 * rounded * 4 * 2  # of every token
    assert layer.n_bytes == codes + of_keys + of_values + 2 * 2 * 3 * floats * 16 * 4
    assert keys.nbytes == 2 * 3 * 60 * 16 * 4


def test_long_texts_take_a_quarter_or_an_eighth() -> None:
    """float32, groups of 64 and heads of 128."""
    for bits, most in ((8, 0.29), (4, 0.17)):
        layer = QuantizedCacheLayer(bits, 0, 64)
        keys = normal(1, 1, 4 + 64 * 32, 128)
        layer.update(keys, keys)
        assert layer.n_bytes < most * 2 * keys.nbytes


@pytest.mark.parametrize("bits", BITS)
def test_rows_of_a_batch_can_be_reordered_repeated_and_chosen(bits: int) -> None:
    for change, index in (
        (lambda layer: layer.reorder_cache(torch.tensor([1, 0])), [1, 0]),
        (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [1]),
    ):
        layer, _, _ = filled(bits, [30, 1])
        expected = [each[index] for each in whole(layer)]
        change(layer)
        for found, wanted in zip(whole(layer), expected, strict=True):
            assert torch.equal(found, wanted)


def test_the_latest_tokens_can_be_taken_back_and_rounded_ones_not() -> None:
    layer, keys, values = filled(8, [31])
    before = whole(layer)
    layer.crop(-3)
    assert layer.get_seq_length() == 28
    for found, wanted in zip(whole(layer), before, strict=True):
        assert torch.equal(found, wanted[..., :28, :])
    layer.crop(0)
    assert layer.get_seq_length() == 28
    layer.update(keys[..., 28:, :], values[..., 28:, :])
    assert torch.equal(whole(layer)[0], before[0])
    with pytest.raises(RecipeError, match="taken back"):
        layer.crop(-20)
    assert layer.get_seq_length() == 31


@pytest.mark.parametrize("removed", [1, 3, 6, 7, 9])
@pytest.mark.parametrize("steps", [[7], [3, 1, 3], [1] * 7])
def test_a_short_cache_can_be_cropped_into_its_first_tokens(steps: list[int], removed: int) -> None:
    """As transformers' own layer does, and what is added afterwards comes to the right places."""
    layer, keys, values = filled(8, steps)
    own = DynamicLayer()
    own.update(keys, values)
    for each in (layer, own):
        each.crop(-removed)
    assert layer.get_seq_length() == own.get_seq_length() == max(0, 7 - removed)
    more = normal(2, 3, 40, 16, seed=2)
    for found, wanted in zip(layer.update(more, more), own.update(more, more), strict=True):
        assert torch.equal(found, wanted)
    assert torch.equal(layer._keys.first, own.keys[..., :FIRST, :])


def test_a_positive_number_is_refused_as_transformers_does() -> None:
    for layer in (filled(8, [31])[0], DynamicLayer()):
        with pytest.raises(ValueError, match="negative"):
            layer.crop(10)


@pytest.mark.parametrize("n", [1, 2, 3, 6])
def test_another_model_can_draft_after_a_short_prompt(n: int) -> None:
    model, draft = tiny_model("llama"), tiny_model("llama", seed=1)
    options = {"max_new_tokens": 20, "do_sample": False}
    plain = model.generate(TOKENS[:, :n], **options)
    found = model.generate(
        TOKENS[:, :n], assistant_model=draft, past_key_values=QuantizedCache(model.config), **options
    )
    assert torch.equal(found, plain)


def test_an_empty_cache_can_be_cropped_by_nothing_and_reset() -> None:
    cache = QuantizedCache(tiny_model("llama").config)
    cache.crop(0)
    assert cache.get_seq_length() == 0
    assert cache.n_bytes == 0
    layer, keys, values = filled(8, [31])
    layer.reset()
    assert layer.get_seq_length() == 0
    layer.update(keys, values)
    assert torch.equal(layer._keys.whole()[..., :FIRST, :], keys[..., :FIRST, :])


@pytest.mark.parametrize(("bits", "most"), [(8, 0.02), (4, 0.3)])
def test_logits_stay_near_those_of_a_float_cache(bits: int, most: float) -> None:
    model = tiny_model("llama")
    caches = DynamicCache(config=model.config), QuantizedCache(model.config, bits, window=4, group=8)
    found = []
    with torch.no_grad():
        for cache in caches:
            model(TOKENS[:, :30], past_key_values=cache)
            found.append(
                torch.cat([model(TOKENS[:, k : k + 1], past_key_values=cache).logits for k in range(30, 40)], 1)
            )
    assert caches[1].get_seq_length() == caches[0].get_seq_length() == 40
    assert 0 < (found[0] - found[1]).abs().mean() < most * found[0].abs().mean()


def test_a_window_that_holds_everything_changes_nothing() -> None:
    model = tiny_model("llama")
    plain = model.generate(TOKENS, max_new_tokens=20, do_sample=False)
    cache = QuantizedCache(model.config, 4, window=200)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=20, do_sample=False, past_key_values=cache), plain)


def test_greedy_generation_with_eight_bits_is_that_with_floats() -> None:
    model = tiny_model("llama")
    plain = model.generate(TOKENS, max_new_tokens=12, do_sample=False)
    cache = QuantizedCache(model.config, 8, window=4, group=8)
    found = model.generate(TOKENS, max_new_tokens=12, do_sample=False, past_key_values=cache)
    assert torch.equal(found, plain)


@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_generation_of_other_kinds(options: dict) -> None:
    model = tiny_model("llama")
    torch.manual_seed(0)
    wide = model.generate(
        TOKENS, max_new_tokens=8, past_key_values=QuantizedCache(model.config, 8, window=200), **options
    )
    torch.manual_seed(0)
    assert torch.equal(wide, model.generate(TOKENS, max_new_tokens=8, **options))
    small = model.generate(
        TOKENS, max_new_tokens=8, past_key_values=QuantizedCache(model.config, 4, window=0, group=2), **options
    )
    assert small.shape[0] == wide.shape[0]


def test_batches_with_padding() -> None:
    model = tiny_model("llama")
    ids = torch.stack([TOKENS[0, :20], torch.cat([torch.zeros(6, dtype=torch.long), TOKENS[0, :14]])])
    mask = (ids != 0).long()
    plain = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    cache = QuantizedCache(model.config, 8, window=2, group=4)
    found = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert (found == plain).float().mean() > 0.9


@pytest.mark.parametrize("name", ["gemma3_text", "gemma2", "mistral"])
def test_models_that_forget_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="full attention"):
        QuantizedCache(tiny_model(name).config)


@pytest.mark.parametrize("options", [{"bits": 3}, {"bits": 16}, {"window": -1}, {"group": 0}])
def test_other_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match="bits"):
        QuantizedCache(tiny_model("llama").config, **options)


def test_heads_that_do_not_divide_into_bytes_are_refused() -> None:
    config = PreTrainedConfig()
    config.hidden_size, config.num_attention_heads, config.num_hidden_layers, config.head_dim = 60, 4, 1, 15
    with pytest.raises(RecipeError, match="15 channels"):
        QuantizedCache(config, 4)


@pytest.mark.parametrize("name", ["gpt2", "opt", "phi3", "gpt_neox", "mixtral", "qwen3"])
def test_other_architectures(name: str) -> None:
    model = tiny_model(name)
    plain = model.generate(TOKENS, max_new_tokens=6, do_sample=False)
    cache = QuantizedCache(model.config, 8, window=200)
    assert torch.equal(model.generate(TOKENS, max_new_tokens=6, do_sample=False, past_key_values=cache), plain)
    assert cache.n_bytes > 0
