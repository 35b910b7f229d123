"""What lies in the memory of a GPU: while `whit quantize --device cuda` runs, and while the result does.

Only blocks run on the device. Hidden states of the text, sums over it and rounding stay with the processor, so that of
the job one block counts, whatever the depth: its weights in float32, the products of a share of the text, the inputs of
a few windows that wait to be multiplied, and what one window leaves behind on its way through.

Left out: what CUDA and its libraries take for themselves, some hundred MB, and what torch keeps of what was freed.
Counted from the code, and compared with the tensors that live on a processor (tests); not measured on a GPU so far.
"""

from __future__ import annotations

import math

from whit.memory import RunMemory
from whit.models.model import Model
from whit.pipeline.counts import split
from whit.pipeline.forecast import inputs_of, needs_text
from whit.pipeline.inputs import TOGETHER
from whit.pipeline.plan import Plan, Step
from whit.shape import Shape, shape_from_config, text_config

FLOAT = 4  # bytes
GATED, ARRIVED, SCORES = (
    2,
    6,
    3,
)  # alive at once: halves of the feed-forward layer; hidden states and scores in attention
EMBEDDING, HEAD = "token_embd.weight", "output.weight"


def job_bytes(model: Model, plan: Plan, length: int) -> float:
    """Bytes of tensors on the GPU at most, 0 for a job that runs no model. length: tokens of a window."""
    if not needs_text(plan):
        return 0.0
    blocks, outer = split(plan.steps)
    shape = shape_from_config(model.config)
    visits = int(text_config(model.config).get("num_experts_per_tok") or 1)
    embeddings = FLOAT * sum(step.tensor.n_weights for step in outer if step.tensor.name != HEAD)
    return max(float(embeddings), *(_block_bytes(steps, shape, visits, length) for steps in blocks.values()))


def _block_bytes(steps: list[Step], shape: Shape, visits: int, length: int) -> float:
    shapes = [(step.tensor.name, step.tensor.shape) for step in steps]
    weights = sum(math.prod(each) for _, each in shapes)
    plain, experts = inputs_of(shapes)
    entries = sum(cols**2 for cols in plain) + sum(each.entries for each in experts)
    cols = [*plain, *(min(visits, each.n) * each.cols for each in experts)]  # of what arrives for a token
    waiting = TOGETHER * length * sum(cols)
    feed_forward = length * (sum(cols) + shape.hidden + GATED * shape.intermediate)  # with all that arrived before
    attention = length * ARRIVED * shape.hidden + SCORES * shape.heads * length**2
    product = TOGETHER * length * max(cols, default=0)  # a copy of what has waited for it
    return FLOAT * float(weights + entries + waiting + max(feed_forward, attention, product))


def result_bytes(plan: Plan, run: RunMemory) -> float:
    """Bytes of the running result on a GPU that holds all of it.

    run  what it takes anywhere
    llama.cpp leaves the embedding with the processor, unless it is the head as well; vLLM puts all weights there.
    """
    named = {step.tensor.name: step for step in plan.steps}
    apart = plan.recipe.layout == "gguf" and HEAD in named and EMBEDDING in named
    return run.total - (named[EMBEDDING].n_bytes if apart else 0)
