"""What computes: `cpu`, a GPU, or whatever there is. A device is chosen here once and passed down.

Models run on it: calibration, measurements. Everything between them stays in the memory of the host (hidden states,
sums, codes), so that nothing else knows of devices; what goes over is small beside what is computed.
"""

from __future__ import annotations

import torch

from whit.errors import RecipeError

AUTO, CPU = "auto", torch.device("cpu")


def device_named(names: str, rank: int = 0) -> torch.device:
    """The device of a rank.

    names  `cpu`, `cuda`, `cuda:1`, several with commas (ranks take them in turn), or `auto`: GPUs if there are any.
           Ranks take GPUs in turn, too, when `cuda` has no number.
    Raises RecipeError for names of nothing, and for a GPU that is not there.
    """
    each = [name.strip() for name in names.split(",")]
    name = each[rank % len(each)]
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == AUTO:
        name = "cuda" if n_gpus else "cpu"
    kind, _, number = name.partition(":")
    if name not in ("cpu", "cuda") and not (kind == "cuda" and number.isdecimal()):
        raise RecipeError(f"--device {name!r} is not one of cpu, cuda, cuda:N and auto.")
    if kind == "cpu":
        return CPU
    if not n_gpus:
        why = "sees no GPU here" if torch.version.cuda else f"({torch.__version__}) was built without CUDA"
        raise RecipeError(f"--device {name}: torch {why}. Use --device cpu, or auto for whatever there is.")
    index = int(number) if number else rank % n_gpus
    if index >= n_gpus:
        raise RecipeError(f"--device {name}: there are {n_gpus} GPUs, cuda:0 to cuda:{n_gpus - 1}.")
    return torch.device("cuda", index)
