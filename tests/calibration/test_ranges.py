import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from whit.calibration.ranges import BINS, RANGES, Histogram, kl, mse, percentile


def of(x: torch.Tensor, parts: int = 1) -> Histogram:
    histogram = Histogram()
    for part in x.chunk(parts):
        histogram.add(part)
    return histogram


@given(st.integers(0, 10**6), st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_a_histogram_does_not_depend_on_the_order_or_on_the_parts(seed: int, parts: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(500, generator=generator) * torch.rand(500, generator=generator).mul(8).exp()
    whole, back = of(x), of(x.flip(0), parts)
    merged = of(x[:100])
    merged.merge(of(x[100:]))
    for other in (back, merged):
        # widths are powers of two, chosen by the first part and doubled: the coarser one may be coarser by design
        while other.width > whole.width:
            whole._reach(whole.width * BINS)
        while whole.width > other.width:
            other._reach(other.width * BINS)
        assert torch.equal(whole.counts, other.counts)
        assert whole.most == other.most


def test_counts_are_those_of_a_plain_count() -> None:
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    histogram = of(x, 10)
    expected = torch.histc(x.abs(), BINS, 0, histogram.width * BINS)
    assert histogram.n == 10_000
    assert (histogram.counts - expected).abs().sum() <= 2  # values on an edge, which histc puts by division


def test_nothing_but_zeros_and_nothing_at_all() -> None:
    for histogram in (Histogram(), of(torch.zeros(5))):
        assert all(method(histogram, 8) == 0.0 for method in RANGES.values())


def test_what_is_not_finite_is_left_out() -> None:
    histogram = of(torch.tensor([1.0, float("nan"), float("inf"), -3.0]))
    assert (histogram.n, histogram.most) == (2, 3.0)


def test_uniform_data_is_not_clipped() -> None:
    x = torch.linspace(0, 1, 200_001)
    for name, method in RANGES.items():
        assert method(of(x), 8) > (0.999 if name != "mse" else 0.96), name


@pytest.mark.parametrize(("name", "most"), [("percentile", 5), ("kl", 17), ("mse", 200), ("minmax", 300)])
def test_one_huge_outlier_is_clipped(name: str, most: float) -> None:
    x = torch.cat([torch.randn(100_000, generator=torch.Generator().manual_seed(1)), torch.tensor([300.0])])
    assert RANGES[name](of(x), 8) <= most  # its square still weighs a lot in `mse`


@pytest.mark.parametrize("name", list(RANGES))
def test_ranges_scale_with_the_data(name: str) -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(2)).exp()
    assert RANGES[name](of(x * 2**-7), 8) == RANGES[name](of(x), 8) * 2**-7
    assert RANGES[name](of(x * 3), 8) == pytest.approx(RANGES[name](of(x), 8) * 3, rel=0.1)


def test_percentile_keeps_its_share() -> None:
    x = torch.randn(50_000, generator=torch.Generator().manual_seed(3))
    cut = percentile(of(x), 8, 0.99)
    assert 0.99 <= (x.abs() <= cut).double().mean() < 0.992


def test_mse_is_near_the_best_of_all_cuts_on_the_data_itself() -> None:
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(4))

    def error(cut: float, bits: int) -> float:
        top = 2 ** (bits - 1) - 1
        return ((x * top / cut).round().clamp(-top, top) * cut / top - x).square().mean().item()

    for bits in (3, 4, 8):
        best = min(error(cut, bits) for cut in torch.linspace(0.3, x.abs().max().item(), 400).tolist())
        assert error(mse(of(x), bits), bits) < 1.02 * best


def test_kl_of_every_cut_is_that_of_a_plain_loop() -> None:
    x = torch.randn(3000, generator=torch.Generator().manual_seed(5)).abs().pow(2)
    histogram = of(x)
    counts, levels = histogram.all_counts().tolist(), 128

    def divergence(cut: int) -> float:
        P = counts[:cut]
        P[-1] += sum(counts[cut:])
        Q = [0.0] * cut
        for level in range(levels):
            bins = [i for i in range(cut) if i * levels // cut == level]
            filled = [i for i in bins if counts[i] > 0]
            for i in filled:
                Q[i] = sum(counts[j] for j in bins) / len(filled)
        p = [1e-4 / cut + (1 - 1e-4) * each / sum(P) for each in P]
        q = [1e-4 / cut + (1 - 1e-4) * each / sum(Q) for each in Q]
        return sum(a * torch.tensor(a / b).log().item() for a, b in zip(p, q, strict=True))

    cuts = [*range(levels, len(counts), 16), len(counts)]
    best = min(cuts[::12], key=divergence)  # every twelfth: a loop in Python is slow
    found = kl(histogram, 8)
    chosen = min(cuts, key=lambda cut: abs((cut + 0.5) * histogram.width - found))
    assert divergence(chosen) <= divergence(best) + 1e-9
