"""What is wrong with one tensor of a file, seen from its values beside the original's.

A quantized matrix is the original plus a small error of no particular form. Faults have a form: rows in another order,
values of another tensor, blocks that are lost, a constant on every group. Each has a test here, and the first that
holds is the name of the fault. What "small" means is said by plain rounding of the same weights on the same grid; error
feedback, searched scales and training move weights further than that, hence the room in the limits below.

Left out: what a fault costs, which only the whole model can say (pipeline/spotcheck.py), and wrong codes in a few
groups, which cannot be told from what error feedback does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 16  # columns looked at together, at least: no block format shares a scale among fewer
SAMPLE = 1 << 15  # weights that plain rounding is tried on
WRONG = 0.5  # share of a matrix's energy that the best multiple of the original may leave unexplained, where plain
# rounding leaves little
FEW = 0.1  # share of chunks that may be far off in a matrix whose others are right
EXCESS = 16.0  # times the squared error of plain rounding, where that is ...
NOTICED = 0.03  # ... at least this share of the energy
SHIFTED = 0.6  # share of the error that one constant per chunk explains; 1/CHUNK for errors without form
LOST = 9.0  # error of a chunk as a share of its energy, when its scale is lost; feedback alone reaches 2 here and there
LOST_PLAIN = 100.0  # ... and times the squared error of plain rounding: at two bits feedback goes further still
HELD = 0.4  # share of a chunk's energy that plain rounding may lose there, for the loss to be a fault
SMALL = 0.25  # of the median energy; chunks with less are not looked at
SAME = 0.7  # cosine above which two rows hold the same values
MATCHED = 64  # rows (or columns) looked for in another order
VECTOR = 0.02  # squared error of norms and biases, as a share of their energy

Rounded = Callable[[Tensor], Tensor]  # [rows, cols] float32 -> the same by plain rounding, decoded


@dataclass(frozen=True)
class Damage:
    """One tensor beside the original.

    error     root of the squared error over the root of the squared weights
    expected  the same by plain rounding on the tensor's grid, of a sample of rows
    fault     what is wrong, in a clause; empty for a tensor that is as good as its grid
    """

    error: float
    expected: float
    fault: str = ""

    @property
    def ratio(self) -> float:
        """The error in units of what plain rounding on this grid gives."""
        return self.error / max(self.expected, 1e-7)


def matrix_damage(
    Q: Tensor, W: Tensor, rounded: Rounded, others: Mapping[str, Callable[[], Tensor]], width: int = CHUNK
) -> Damage:
    """Compare a decoded matrix with the original.

    Q, W     [rows, cols] float32
    rounded  plain rounding on the tensor's grid
    others   tensors of the original that might have been written in its place: how to read them
    width    columns that share a scale: feedback may leave a part of them zero, never all
    """
    finite = torch.isfinite(Q)
    if not finite.all():
        return Damage(float("inf"), 0.0, f"{int((~finite).sum()):,} of {Q.numel():,} values are not finite")
    rows = sample_rows(W)
    energy = _energy(W).item()
    plain = rounded(W[rows])
    expected = _share(_energy(plain - W[rows]).item(), _energy(W[rows]).item())
    found = _share(_energy(Q - W).item(), energy)
    unexplained = 1 - cosine(Q, W) ** 2
    if unexplained > max(WRONG, 1 - cosine(plain, W[rows]) ** 2 / 2):
        fault = _ruined(Q, W, expected, rounded, width) or _whose(Q, W, others)
    else:
        fault = _shifted(Q, W, found, expected) or _lost(Q, W, expected, rounded, width) or _form(Q, W, found, expected)
    return Damage(found**0.5, expected**0.5, fault)


def vector_damage(q: Tensor, w: Tensor, others: Mapping[str, Callable[[], Tensor]]) -> Damage:
    """The same for norms, biases and other tensors that stay in float: [n] float32 twice."""
    if not torch.isfinite(q).all():
        return Damage(float("inf"), 0.0, "it has values that are not finite")
    found = _share(_energy(q - w).item(), _energy(w).item())
    if found <= VECTOR:
        return Damage(found**0.5, 0.0)
    for name, read in others.items():
        if _share(_energy(q - read()).item(), _energy(w).item()) < found * 1e-3:
            return Damage(found**0.5, 0.0, f"it holds the values of {name}")
    return Damage(found**0.5, 0.0, f"it is {found**0.5:.0%} off the original's, and should be exact")


def sample_rows(W: Tensor) -> Tensor:
    """Numbers of rows of W [rows, cols], evenly spread, of SAMPLE weights in all."""
    n = min(W.shape[0], max(1, SAMPLE // W.shape[1]))
    return torch.linspace(0, W.shape[0] - 1, n).round().long()


def cosine(A: Tensor, B: Tensor) -> float:
    """Between two tensors of one shape; 0 when one is zero."""
    a, b = A.flatten(), B.flatten()
    return (torch.dot(a, b) / (a.norm() * b.norm()).clamp_min(1e-30)).item()


def _shifted(Q: Tensor, W: Tensor, found: float, expected: float) -> str:
    """Whether a constant per chunk is most of the error."""
    chunks = _chunks(Q - W)  # [rows, n, CHUNK]
    constant = chunks.mean(2).square().sum().item() * chunks.shape[2]
    energy = chunks.square().sum().item()
    if energy and found > 2 * expected and constant > SHIFTED * energy:
        return "a constant is added to every group, as by zero points of another version"
    return ""


def _form(Q: Tensor, W: Tensor, found: float, expected: float) -> str:
    """A fault of the whole matrix in values that are otherwise the right ones."""
    slope = (torch.dot(Q.flatten(), W.flatten()) / _energy(W).clamp_min(1e-30)).item()
    if abs(slope - 1) > 0.2 and found > EXCESS / 4 * expected and cosine(Q, W) > 0.9:
        return f"its values are {slope:.3g} times the original's"
    if found > NOTICED and found > EXCESS * expected:
        return _reordered(Q, W) or f"its error is {(found / expected) ** 0.5:.0f} times that of plain rounding"
    return ""


def _whose(Q: Tensor, W: Tensor, others: Mapping[str, Callable[[], Tensor]]) -> str:
    """What a matrix holds that is not the original's."""
    if not Q.any():
        return "it is zero everywhere"
    if Q.shape[0] == Q.shape[1] and abs(cosine(Q.T.contiguous(), W)) > SAME:
        return "it is transposed"
    if reordered := _reordered(Q, W):
        return reordered
    for name, read in others.items():
        other = read()
        if other.shape == Q.shape and cosine(Q, other) > SAME:
            return f"it holds the values of {name}"
    if cosine(Q, W) < 0.3:
        return "its values are not this model's"
    return _lost_share(Q, W) or "most of it is not what the original has"


def _reordered(Q: Tensor, W: Tensor) -> str:
    """Whether rows or columns are the original's in another order, which is named when it is a usual one."""
    rows = _order(Q, W)
    if rows is not None:
        return f"its rows are in another order{_known_rows(rows, W.shape[0])}"
    columns = _order(Q.T, W.T)
    if columns is not None:
        return f"its columns are in another order{_known_columns(columns)}"
    return ""


def _order(Q: Tensor, W: Tensor) -> dict[int, int] | None:
    """Where the first rows of Q lie in W; None when they are in place or not found."""
    n = min(Q.shape[0], MATCHED)
    q = torch.nn.functional.normalize(Q[:n], dim=1)
    w = torch.nn.functional.normalize(W[: 4 * MATCHED], dim=1)
    cos, place = (q @ w.T).max(1)  # [n]
    sure = cos > SAME
    if sure.sum() < 0.6 * n or (place[sure] == torch.arange(n)[sure]).float().mean() > 0.8:
        return None
    return dict(zip(torch.arange(n)[sure].tolist(), place[sure].tolist(), strict=True))


def _known_rows(order: Mapping[int, int], rows: int) -> str:
    for width in (32, 64, 80, 96, 128, 256, 16, 8):
        if rows % width:
            continue
        inside = torch.arange(width)
        halves = (inside % 2) * (width // 2) + inside // 2  # pairs next to each other <- halves
        for line in (halves, halves.argsort()):
            if all(line[i % width] + i // width * width == place for i, place in order.items()):
                return f": rotary halves and pairs are mixed up (heads of {width})"
    return ""


def _known_columns(order: Mapping[int, int]) -> str:
    if all(place == i ^ 1 for i, place in order.items()):
        return ": neighbours are swapped, as by the wrong nibble first"
    for half in (4, 16, 32, 64, 128):
        if all(place == (i // (2 * half) * 2 * half + (i + half) % (2 * half)) for i, place in order.items()):
            return f": halves of every {2 * half} are swapped, as by the wrong nibble first"
    return ""


def _ruined(Q: Tensor, W: Tensor, expected: float, rounded: Rounded, width: int) -> str:
    """A few chunks that are far off, in a matrix that is the original's but for them."""
    error, energy = _chunks(Q - W, width).square().sum(2), _chunks(W, width).square().sum(2)  # [rows, n]
    right = error < LOST * energy
    kept = right[..., None]
    if right.float().mean() < 1 - FEW or cosine(_chunks(Q, width) * kept, _chunks(W, width) * kept) < SAME:
        return ""
    return _lost(Q, W, expected, rounded, width)


def _lost(Q: Tensor, W: Tensor, expected: float, rounded: Rounded, width: int) -> str:
    """Chunks that hold nothing of the original although the grid could."""
    error, energy = _chunks(Q - W, width).square().sum(2), _chunks(W, width).square().sum(2)  # [rows, n]
    share = error / energy.clamp_min(1e-30)
    there = energy > SMALL * energy.median()
    limit = max(LOST, LOST_PLAIN * expected)
    flat = _flat(Q, width) & ~_flat(W, width)
    suspects = there & ((share >= limit) | flat)
    if not suspects.any():
        return ""
    rows = suspects.any(1).nonzero()[:, 0]
    some = rows[:: max(1, len(rows) // 32)]
    plain = rounded(W[some])
    kept = _chunks(plain - W[some], width).square().sum(2) <= HELD * energy[some]
    real = suspects[some] & kept
    if not real.any():
        return ""
    seen = real.any(1)
    first, last = int(some[seen][0]), int(some[seen][-1])
    k = int(real[seen.nonzero()[0, 0]].nonzero()[0, 0]) * _width(W, width)
    zeros = not _chunks(Q[some], width)[real].any()
    what = "zero" if zeros else "one value each" if bool(flat[some][real].all()) else "far off"
    n = int(suspects[rows].sum()) * _width(W, width)
    where = f"row {first} from column {k}" if first == last else f"rows {first} to {last}"
    return f"about {n:,} weights are {what}, but should not be ({where}): scales or bytes are lost there"


def _lost_share(Q: Tensor, W: Tensor) -> str:
    flat = _flat(Q) & ~_flat(W)
    share = flat.float().mean().item()
    rows = flat.all(1).nonzero()[:, 0]
    if share < 0.1:
        return ""
    where = f" (rows {int(rows[0])} to {int(rows[-1])})" if len(rows) else ""
    return f"{share:.0%} of it is zero or one value{where}: scales or bytes are lost there"


def _flat(W: Tensor, width: int = CHUNK) -> Tensor:
    """Chunks [rows, n] in which all values are the same."""
    low, high = _chunks(W, width).aminmax(dim=2)
    return low == high


def _chunks(W: Tensor, width: int = CHUNK) -> Tensor:
    """[rows, n, width]; what does not fill a chunk at the end of rows is left out."""
    width = _width(W, width)
    n = W.shape[1] // width
    return W[:, : n * width].reshape(W.shape[0], n, width)


def _width(W: Tensor, width: int) -> int:
    return min(width, W.shape[1])


def _energy(W: Tensor) -> Tensor:
    return W.square().sum(dtype=torch.float64)


def _share(error: float, energy: float) -> float:
    return error / energy if energy > 0 else (0.0 if error == 0 else float("inf"))
