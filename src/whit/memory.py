"""Bytes to store, run and train a language model, before anything is downloaded or built.

The obvious estimate, parameters times bits, is right for the weights and silent about the rest. Running also
needs a KV cache that grows with the context, and working memory; training needs gradients, optimizer states and
activations. Every figure here is one formula over plain numbers, so that it can be checked with a pencil.

Left out: the exact size of one particular file (metadata, tokenizer, tensors that stay in float), which is known
when its plan is made; memory that a runtime or a driver takes for itself; caches that are compressed or paged.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from whit.errors import RecipeError
from whit.shape import Shape

GB = 10**9
GIB = 2**30

# Bits per parameter of bare numbers, without scales: what storage tables of papers and cards mean.
PLAIN_BITS: dict[str, int] = {"float32": 32, "float16": 16, "bfloat16": 16, "int8": 8, "int4": 4, "int2": 2}

_COUNT = re.compile(r"[+-]?(\d[\d_]*\.?[\d_]*|\.\d+)(e[+-]?\d{1,3})?\s*([kmbgt]?)", re.IGNORECASE)
_UNITS = {"": 0, "k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_MOST_PARAMETERS = 10**18


def looks_like_count(text: str) -> bool:
    """Whether a person means a number of parameters ("8B", "8e9", "135M") rather than the name of a model."""
    return _COUNT.fullmatch(text.strip()) is not None


def parse_count(text: str) -> int:
    """The number of parameters that a person typed: 8e9, 8B, 135M, 1.1b, 8_000_000_000.

    Raises RecipeError when it is no count, or not a whole number from 1 to 10^18.
    """
    match = _COUNT.fullmatch(text.strip())
    if match is None:
        raise RecipeError(f"{text!r} is not a number of parameters. Write it like 8e9, 8B, 135M or 8_000_000_000.")
    unit = match.group(3)
    number = text.strip().removesuffix(unit).strip().replace("_", "")
    count = Decimal(number).scaleb(_UNITS[unit.lower()])
    if not 1 <= count <= _MOST_PARAMETERS or count != count.to_integral_value():
        raise RecipeError(f"{text} parameters: a whole number from 1 to 1e18 is needed, such as 8B or 135M.")
    return int(count)


# ---- storing ---------------------------------------------------------------------------------------------------


def storage_bytes(n_parameters: int, bits: float) -> float:
    """Bytes of weights: n_parameters * bits / 8.

    bits  stored bits per weight, scales included (4 for bare int4, 4.5 for q4_0)

        storage_bytes(8 * 10**9, 16) / GIB  # 14.901161193847656
    """
    return n_parameters * bits / 8


def storage_table(n_parameters: int, bits: Mapping[str, float]) -> dict[str, float]:
    """Bytes of the weights in every format of `bits` (name -> bits per weight), in that order."""
    return {name: storage_bytes(n_parameters, each) for name, each in bits.items()}


# ---- running ---------------------------------------------------------------------------------------------------


def kv_cache_bytes(shape: Shape, context: int, batch: int = 1, bits: float = 16) -> float:
    """Bytes of cached keys and values: sum over layers of 2 * kv_heads * head_dim * positions * batch * bits / 8.

    context  positions per sequence; a sliding layer keeps min(context, window) of them
    batch    sequences at once
    bits     bits per cached number (16 for float16, 8.5 for q8_0)
    """
    positions = (shape.layers - shape.sliding_layers) * context + shape.sliding_layers * min(context, shape.window)
    return 2 * shape.kv_heads * shape.head_dim * positions * batch * bits / 8


def working_bytes(shape: Shape, context: int, batch: int = 1, chunk: int = 512) -> float:
    """Bytes of scratch space: 4 * c * (2 * hidden + max(vocab, 2 * intermediate)) + 4 * batch * vocab.

    c = min(chunk, context * batch) tokens pass through at once (llama.cpp's micro-batch), in float32. The widest
    moment is the head's logits or the two halves of a gated feed-forward layer, beside two residual streams; one
    row of logits per sequence is kept for sampling. Attention is fused: without it, heads * context scores per
    token may be wider still.
    Agrees with the buffers that llama.cpp reports for SmolLM2 (docs/memory.md).
    """
    tokens = min(chunk, context * batch)
    return 4.0 * tokens * (2 * shape.hidden + max(shape.vocab, 2 * shape.intermediate)) + 4.0 * batch * shape.vocab


LLAMA_CPP, VLLM = "llama.cpp", "vllm"
RUNTIMES = (LLAMA_CPP, VLLM)
VLLM_TOKENS, VLLM_SEQUENCES = 2048, 256  # at once, when nothing is said to `vllm serve` on a GPU of less than 70 GiB


def vllm_working_bytes(shape: Shape) -> float:
    """Bytes of scratch space that vLLM finds when it tries itself out: 2 * 2048 * (2 * hidden + 3 * intermediate)
    + 10 * 256 * vocab.

    As many tokens as it batches pass through in 16 bits: two residual streams, the two halves of a gated feed-forward
    layer and their product. Logits of as many sequences as it serves: in 16 bits, in float32, and their softmax.
    Reckoned from its defaults (vllm/engine/arg_utils.py), not measured; graphs that it captures come on top.
    """
    return 2.0 * VLLM_TOKENS * (2 * shape.hidden + 3 * shape.intermediate) + 10.0 * VLLM_SEQUENCES * shape.vocab


@dataclass(frozen=True)
class RunMemory:
    """Bytes to run a model: the three parts, and `total`."""

    weights: float
    kv_cache: float
    working: float

    @property
    def total(self) -> float:
        """weights + kv_cache + working."""
        return self.weights + self.kv_cache + self.working


def run_bytes(
    weights: float, shape: Shape, context: int, batch: int = 1, cache_bits: float = 16, runtime: str = LLAMA_CPP
) -> RunMemory:
    """Bytes to run a model whose weights take `weights` bytes: see `kv_cache_bytes` and `working_bytes`.

    runtime  one of RUNTIMES; vLLM's cache here is the least that does: it fills what it is allowed to take
    """
    working = vllm_working_bytes(shape) if runtime == VLLM else working_bytes(shape, context, batch)
    return RunMemory(weights, kv_cache_bytes(shape, context, batch, cache_bits), working)


# ---- training --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Precision:
    """Bytes per trained parameter by what it is for; activations per parameter are a generous rule of thumb."""

    copy: float  # the weights that compute
    master: float  # the weights that are updated, where they are not the same
    state: float  # one full-size optimizer state
    gradient: float
    activations: float


PRECISIONS: dict[str, Precision] = {
    "float32": Precision(copy=4, master=0, state=4, gradient=4, activations=8),
    "16-bit": Precision(copy=2, master=0, state=2, gradient=2, activations=4),
    # Gradients stay in float32, as transformers' trainer keeps them.
    "mixed": Precision(copy=2, master=4, state=4, gradient=4, activations=4),
}


@dataclass(frozen=True)
class Optimizer:
    """Full-size states per parameter; `bytes_per_parameter` where they are not stored in the training precision."""

    states: float
    why: str
    bytes_per_parameter: float | None = None


# A square matrix of this width stands for all in the share that Adafactor's sums take.
_TYPICAL_WIDTH = 4096

OPTIMIZERS: dict[str, Optimizer] = {
    "adam": Optimizer(2, "two moments"),
    "adam-8bit": Optimizer(2, "two moments of 1 byte, a float32 scale per 256 of them", 2 * (1 + 4 / 256)),
    "sgd-momentum": Optimizer(1, "one momentum"),
    "sgd": Optimizer(0, "no state"),
    "adafactor": Optimizer(2 / _TYPICAL_WIDTH, f"sums of rows and columns, here of {_TYPICAL_WIDTH}-wide matrices"),
}


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters beside a frozen base.

    base_bits            bits per frozen weight
    trainable_parameters weights in the adapters; they are trained in float32
    """

    base_bits: float
    trainable_parameters: int


@dataclass(frozen=True)
class TrainingLine:
    """One line of the bill. `part` is weights, optimizer, gradients or activations."""

    part: str
    why: str
    n_bytes: float


@dataclass(frozen=True)
class TrainingMemory:
    """The bill for training, line by line."""

    lines: tuple[TrainingLine, ...]

    def part(self, name: str) -> float:
        """Bytes of all lines of one part."""
        return sum(line.n_bytes for line in self.lines if line.part == name)

    @property
    def total(self) -> float:
        """Bytes of all lines."""
        return sum(line.n_bytes for line in self.lines)


def train_bytes(
    n_parameters: int, precision: str = "float32", optimizer: str = "adam", lora: Lora | None = None
) -> TrainingMemory:
    """The bill for training: weights, optimizer, gradients, activations and temporary memory.

    precision  a name in PRECISIONS; with `lora` it sets the activations alone
    optimizer  a name in OPTIMIZERS
    lora       adapters; None trains every weight
    float32 and Adam: 4 + 8 + 4 + 8 = 24 bytes per parameter; 16-bit: the half. Activations depend on batch and
    length rather than on parameters; 8 (or 4) bytes per parameter is a high estimate for small batches. Gradients
    must pass through frozen layers too, so adapters do not shrink it.
    Raises RecipeError for an unknown precision or optimizer; the message lists those there are.
    Source: huggingface.co/docs/transformers/model_memory_anatomy; LoRA arXiv 2106.09685; QLoRA arXiv 2305.14314;
    8-bit Adam arXiv 2110.02861; Adafactor arXiv 1804.04235.
    """
    if precision not in PRECISIONS:
        raise RecipeError(f"There is no training precision {precision!r}. Known: {', '.join(PRECISIONS)}.")
    if optimizer not in OPTIMIZERS:
        raise RecipeError(f"There is no optimizer {optimizer!r}. Known: {', '.join(OPTIMIZERS)}.")
    compute, states = PRECISIONS[precision], OPTIMIZERS[optimizer]
    activations = TrainingLine(
        "activations", "and temporary memory, a high estimate", n_parameters * compute.activations
    )
    if lora is None:
        held, trained = compute, n_parameters
        weights = [TrainingLine("weights", "that compute", n_parameters * held.copy)]
        if held.master:
            weights.append(TrainingLine("weights", "float32 master copy", n_parameters * held.master))
    else:
        held, trained = PRECISIONS["float32"], lora.trainable_parameters
        weights = [
            TrainingLine(
                "weights", f"frozen base, {lora.base_bits:g} bits", storage_bytes(n_parameters, lora.base_bits)
            ),
            TrainingLine("weights", "adapters", trained * held.copy),
        ]
    each = states.states * held.state if states.bytes_per_parameter is None else states.bytes_per_parameter
    return TrainingMemory(
        (
            *weights,
            TrainingLine("optimizer", states.why, trained * each),
            TrainingLine("gradients", "of what is trained", trained * held.gradient),
            activations,
        )
    )


def lora_parameters(matrices: Iterable[tuple[int, int]], rank: int) -> int:
    """Weights in adapters of this rank on every given [rows, cols] matrix: sum of rank * (rows + cols).

    Source: arXiv 2106.09685, section 4.1.
    """
    return sum(rank * (rows + cols) for rows, cols in matrices)


# ---- how far to trust it ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """A size that somebody else printed, and what we forecast for it.

    published_gb  as printed, with the unit printed ("GB")
    bits          bits per weight of the forecast
    """

    model: str
    n_parameters: int
    format: str
    bits: float
    published_gb: float

    @property
    def forecast_bytes(self) -> float:
        """n_parameters * bits / 8."""
        return storage_bytes(self.n_parameters, self.bits)

    def deviation_percent(self, unit: int) -> float:
        """Forecast against the printed figure, read in units of GB or GIB bytes."""
        return 100 * (self.forecast_bytes / unit / self.published_gb - 1)


# LLaMA 1: parameters counted from its published dimensions (7B is 6.738e9, 30B is 32.529e9).
_LLAMA_1 = {
    "7B": (6_738_415_616, 13, 3.9),
    "13B": (13_015_864_320, 24, 7.8),
    "30B": (32_528_943_616, 60, 19.5),
    "65B": (65_285_660_672, 120, 38.5),
}
# Q4_0 then stored a float32 scale with 32 codes: 160 bits per 32 weights. Today's has a float16 scale, 4.5 bits.
PUBLISHED: tuple[Published, ...] = tuple(
    Published(model, n, format, bits, figure)
    for model, (n, at_16, at_4) in _LLAMA_1.items()
    for format, bits, figure in (("16 bit", 16, at_16), ("4 bit", 4, at_4), ("q4_0 of 2023", 5, at_4))
)
