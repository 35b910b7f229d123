"""Truth: both whole models in memory, all their logits at once, and torch's definitions."""

import gc

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div

from tiny import TINY, MemorySource, random_tokens, tiny_model
from whit.errors import BadWeightsError, ModelError, TextError
from whit.evaluation import compare as compare_module
from whit.evaluation.compare import compare, compare_states, final_states, scored
from whit.models.model import Model

LENGTH = 32
WINDOWS = torch.tensor(random_tokens(3 * LENGTH)).view(3, LENGTH)


def opened(module: nn.Module, label: str = "model") -> Model:
    return Model(label, module.config.to_dict(), MemorySource(module.state_dict()), 0)


def noisy(module: nn.Module, amount: float = 0.02) -> nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for W in module.parameters():
            W.add_(torch.randn(W.shape, generator=generator) * amount)
    return module


def n_linears() -> int:
    return sum(type(thing) is nn.Linear for thing in gc.get_objects())


def whole_logits(module: nn.Module) -> Tensor:
    with torch.inference_mode():
        return module(WINDOWS).logits.double()  # [windows, LENGTH, vocab]


@pytest.mark.parametrize("name", TINY)
def test_a_comparison_equals_the_one_with_all_logits_at_once(name: str) -> None:
    reference, candidate = tiny_model(name), noisy(tiny_model(name))
    found = compare(opened(candidate), opened(reference), WINDOWS)
    # Positions 16..30 predict tokens 17..31: with 512, positions 256..510 predict tokens 257..511.
    p, q = (whole_logits(module)[:, 16:31].flatten(0, 1).log_softmax(1) for module in (reference, candidate))
    targets = WINDOWS[:, 17:32].flatten()
    kl = kl_div(q, p, reduction="none", log_target=True).sum(1)
    assert found.tokens == 45
    assert found.kl_mean == pytest.approx(kl.mean().item(), rel=1e-4)
    assert found.kl_max == pytest.approx(kl.max().item(), rel=1e-4)
    assert found.perplexity == pytest.approx(cross_entropy(q, targets).exp().item(), rel=1e-5)
    assert found.perplexity_reference == pytest.approx(cross_entropy(p, targets).exp().item(), rel=1e-5)
    assert found.same_top == pytest.approx((p.argmax(1) == q.argmax(1)).double().mean().item())


def test_of_512_tokens_255_are_scored_as_in_llama_cpp() -> None:
    positions = range(512)[scored(512)]
    assert (positions[0], positions[-1], len(positions)) == (256, 510, 255)
    predicted = range(512)[scored(512, shift=1)]
    assert (predicted[0], predicted[-1]) == (257, 511)


def test_a_model_beside_itself_lost_nothing() -> None:
    model = opened(tiny_model("llama"))
    found = compare(model, model, WINDOWS)
    assert (found.kl_mean, found.kl_max, found.same_top, found.perplexity_ratio) == (0, 0, 1, 1)


def test_the_same_measurement_gives_the_same_numbers() -> None:
    models = opened(noisy(tiny_model("llama"))), opened(tiny_model("llama"))
    assert compare(*models, WINDOWS) == compare(*models, WINDOWS)


def test_small_pieces_of_logits_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    models = opened(noisy(tiny_model("gemma2"))), opened(tiny_model("gemma2"))
    whole = compare(*models, WINDOWS)
    monkeypatch.setattr(compare_module, "LOGITS", 1)  # one position at a time
    pieces = compare(*models, WINDOWS)
    assert pieces.kl_mean == pytest.approx(whole.kl_mean, rel=1e-4)
    assert pieces.perplexity == pytest.approx(whole.perplexity, rel=1e-6)


def test_the_first_model_is_gone_before_the_second_is_read() -> None:
    alive: list[int] = []

    class Watched(MemorySource):
        def read(self, name: str) -> Tensor:
            alive.append(n_linears())
            return super().read(name)

    reference = tiny_model("llama")
    state, config = reference.state_dict(), reference.config.to_dict()
    del reference
    before = n_linears()
    compare(Model("b", config, Watched(state), 0), Model("a", config, MemorySource(state), 0), WINDOWS)
    # Two layers of 7 and the head are the second model; of the first, its head alone is left.
    assert max(alive) - before == 2 * 7 + 1 + 1


def test_several_candidates_may_share_what_a_reference_read() -> None:
    reference, candidate = opened(tiny_model("llama")), opened(noisy(tiny_model("llama")))
    shared = final_states(reference, WINDOWS)
    first = compare_states(final_states(candidate, WINDOWS), shared, WINDOWS)
    assert first == compare(candidate, reference, WINDOWS)


def test_progress_reaches_its_end_and_never_goes_back() -> None:
    steps: list[tuple[int, int]] = []
    model = opened(tiny_model("llama"))
    compare(model, model, WINDOWS, lambda done, total, _: steps.append((done, total)))
    assert steps == sorted(steps)
    assert steps[-1] == (9, 9)  # each window is read twice and compared once


def test_models_of_different_vocabularies_are_refused_with_both_sizes() -> None:
    smaller = opened(tiny_model("llama", vocab_size=240), "small")
    with pytest.raises(ModelError, match=r"small predicts 240 tokens, large 256"):
        compare(smaller, opened(tiny_model("llama"), "large"), WINDOWS % 240)


def test_a_text_of_another_tokenizer_is_refused() -> None:
    model = opened(tiny_model("llama"))
    with pytest.raises(ModelError, match="token 300, the model knows 256"):
        compare(model, model, torch.full((1, LENGTH), 300))


def test_windows_longer_than_the_model_reads_are_refused() -> None:
    model = opened(tiny_model("gpt2"))
    with pytest.raises(TextError, match="at most 128 tokens; windows of 256"):
        compare(model, model, torch.zeros(1, 256, dtype=torch.int64))


def test_predictions_that_overflow_are_reported_as_the_model_s_fault() -> None:
    module = tiny_model("llama")
    with torch.no_grad():
        module.lm_head.weight.fill_(3e38)
    with pytest.raises(BadWeightsError, match=r"huge: predictions .* not finite"):
        compare(opened(module, "huge"), opened(tiny_model("llama")), WINDOWS)


def test_an_interrupt_passes_through() -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        if done == 4:
            raise KeyboardInterrupt

    model = opened(tiny_model("llama"))
    with pytest.raises(KeyboardInterrupt):
        compare(model, model, WINDOWS, interrupt)
