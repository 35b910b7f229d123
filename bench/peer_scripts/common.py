"""What the peer scripts share: the command line, the calibration windows, and the cost of a run.

These scripts run in a peer's own environment, so this needs nothing but torch and safetensors.
Importing it hides GPUs and model hubs from the tools; it has to be imported before they are.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Linear, Module

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that every quantizing script has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("model", type=Path, metavar="MODEL_FOLDER", help="a Hugging Face folder of a Llama")
    made.add_argument("tokens", type=Path, metavar="TOKENS_FILE", help="safetensors with int64 `tokens` [n, length]")
    made.add_argument("out", type=Path, metavar="OUT_FOLDER", help="where the tool saves its checkpoint")
    made.add_argument("--bits", type=int, required=True)
    made.add_argument("--group", type=int, required=True, help="inputs that share a scale")
    made.add_argument("--asym", action="store_true", help="with zero points")
    made.add_argument("--bfloat16", action="store_true", help="run the model in bfloat16 rather than float32")
    made.add_argument("--samples", type=int, default=None, help="use the first SAMPLES windows; all when not given")
    return made


def windows(path: Path, count: int | None) -> Tensor:
    """The first `count` windows of a tokens file, [count, length]."""
    tokens = load_file(path)["tokens"]
    if count is not None and count > len(tokens):
        raise SystemExit(f"{path} has {len(tokens)} windows, fewer than {count}")
    return tokens[:count]


def report_uneven(model: Module, group: int, consequence: str) -> list[str]:
    """Print and return the linear layers, but for the head, whose inputs the group size does not divide."""
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear) and name != "lm_head"}
    uneven = [name for name, layer in linear.items() if layer.in_features % group]
    if uneven:
        print(f"note: groups of {group} do not divide the inputs of {len(uneven)} layers: {consequence}", flush=True)
    return uneven


@dataclass
class Meter:
    """Wall-clock and processor time since it was made, of this process and its children."""

    _wall: float = field(default_factory=time.perf_counter)
    _cpu: float = field(default_factory=lambda: _cpu_seconds())

    def report(self, tool: str, package: str) -> None:
        """Print the JSON line that ends every quantizing script."""
        cost = {
            "tool": tool,
            "version": version(package),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 3),
            "wall_seconds": round(time.perf_counter() - self._wall, 3),
            "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        }
        print(json.dumps(cost), flush=True)


def _cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime
