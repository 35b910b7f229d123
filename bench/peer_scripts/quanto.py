"""What optimum-quanto (and torchao) make of a model: coverage, bytes, divergence from the original.

`quanto.py MODEL_FOLDER TOKENS_FILE --weights qint8 [--activations qint8] [--calibration TOKENS_FILE]` prints JSON.
MODEL_FOLDER may be `gpt2`: transformers' default configuration with random weights. The head is excluded where --head
is not given. Runs in an environment of its own.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import resource
import time

os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}

import torch
from optimum.quanto import Calibration, freeze, qint2, qint4, qint8, quantize
from optimum.quanto.nn import QModuleMixin
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config
from transformers.pytorch_utils import Conv1D

TYPES = {"qint8": qint8, "qint4": qint4, "qint2": qint2, "": None}


def main() -> None:
    """Quantize as the command line says, compare, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("tokens", help="safetensors with int64 `tokens` [n, length]")
    parser.add_argument("--weights", default="qint8")
    parser.add_argument("--activations", default="")
    parser.add_argument("--calibration", help="as tokens")
    parser.add_argument("--head", action="store_true", help="quantize the head, too")
    parser.add_argument("--windows", type=int, default=24)
    arguments = parser.parse_args()
    tokens = load_file(arguments.tokens)["tokens"][: arguments.windows]
    torch.manual_seed(0)
    if arguments.model == "gpt2":
        model = AutoModelForCausalLM.from_config(GPT2Config()).eval()
    else:
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    original, before = copy.deepcopy(model), _bytes(model)
    n_layers = sum(p.numel() for p in _layers(model))
    started = time.process_time()
    quantize(
        model,
        weights=TYPES[arguments.weights],
        activations=TYPES[arguments.activations],
        exclude=None if arguments.head else "lm_head",
    )
    if arguments.calibration:
        with Calibration(), torch.no_grad():
            for window in load_file(arguments.calibration)["tokens"]:
                model(window[None])
    freeze(model)
    seconds = time.process_time() - started
    inside = sum(m.weight.numel() for m in model.modules() if isinstance(m, QModuleMixin) and _matrix(m))
    length = tokens.shape[1]
    divergence, same = [], []
    with torch.no_grad():
        for window in tokens:
            scored = slice(length // 2, length - 1)
            p = original(window[None]).logits[0, scored].float().log_softmax(-1)
            q = model(window[None]).logits[0, scored].float().log_softmax(-1)
            divergence.append((p.exp() * (p - q)).sum(-1).mean().item())
            same.append((p.argmax(-1) == q.argmax(-1)).float().mean().item())
    found = {
        "kl": sum(divergence) / len(divergence),
        "same_top": sum(same) / len(same),
        "share": inside / n_layers,
        "bytes_before": before,
        "bytes_after": _bytes(model),
        "seconds": seconds,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    print(json.dumps(found))


def _matrix(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)


def _layers(model: nn.Module) -> list[nn.Parameter]:
    """The matrices of linear and embedding layers, tied ones once."""
    found = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding | Conv1D)}
    return list(found.values())


def _bytes(model: nn.Module) -> int:
    """Of everything that the state dict holds, shared storage once."""
    tensors = {}
    for value in model.state_dict().values():
        if isinstance(value, torch.Tensor):
            tensors[value.data_ptr()] = value.numel() * value.element_size()
    return sum(tensors.values())


if __name__ == "__main__":
    main()
