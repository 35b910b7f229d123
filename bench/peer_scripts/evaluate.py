"""Measure a checkpoint that a peer wrote, read by the peer's own loader, computed in float32 on the CPU.

GPTQ and AWQ files are loaded by GPTQModel with its plain torch kernels, everything else by transformers (which needs
compressed-tensors or auto-round beside it for their files). Prints one JSON line with `nll`: the mean negative
log-likelihood of tokens 257 to 511 of each window of 512, each predicted from all the tokens before it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import common
import torch
from safetensors.torch import save_file
from torch import Tensor

FIRST = 256


def main() -> None:
    """Load, measure, print; save logits when asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a checkpoint, quantized or not")
    parser.add_argument("tokens", type=Path, metavar="TOKENS_FILE", help="safetensors with int64 `tokens` [n, 512]")
    parser.add_argument("--windows", type=int, default=None, help="use the first WINDOWS windows; all when not given")
    parser.add_argument("--logits", type=Path, help="save the first window's logits here as safetensors")
    args = parser.parse_args()
    tokens = common.windows(args.tokens, args.windows)
    loader, model = load(args.folder)
    model.eval()
    losses, first = [], None
    for window in tokens:
        logits = logits_of(model, window)
        losses.append(torch.nn.functional.cross_entropy(logits[FIRST:-1], window[FIRST + 1 :]).item())
        first = logits if first is None else first
    if args.logits is not None and first is not None:
        save_file({"logits": first}, args.logits)
    dtypes = sorted({str(tensor.dtype) for tensor in model.parameters()})
    result = {"nll": sum(losses) / len(losses), "windows": len(losses), "loader": loader, "parameters": dtypes}
    print(json.dumps(result), flush=True)


@torch.inference_mode()
def logits_of(model: Any, window: Tensor) -> Tensor:
    """[length, vocabulary] of one window, alone and without anything before it."""
    row = window[None]
    return model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0].float().clone()


def load(folder: Path) -> tuple[str, Any]:
    """The name of the loader and the model, in float32."""
    config = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    if config.get("quant_method") in ("gptq", "awq"):
        return "gptqmodel", _gptqmodel(folder, config["quant_method"])
    from transformers import AutoModelForCausalLM

    return "transformers", AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")


def _gptqmodel(folder: Path, method: str) -> Any:
    """By GPTQModel, past two of its refusals and a rounding.

    Its torch kernels declare 16-bit floats alone, but the one for GPTQ computes in the dtype of scales and inputs, and
    the one for AWQ can be replaced by its own dequantizing. It refuses GPTQ files with zero points that it did not
    write itself, for fear of zero points that were packed with a borrow.
    """
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import BaseQuantizeConfig

    for kernel in (TorchLinear, AwqTorchLinear):
        kernel.SUPPORTS_DTYPES = [torch.float32, *kernel.SUPPORTS_DTYPES]
    BaseQuantizeConfig.is_quantized_by_gptaq = lambda config: True
    backend = BACKEND.GPTQ_TORCH if method == "gptq" else BACKEND.AWQ_TORCH
    model = GPTQModel.load(str(folder), device="cpu", backend=backend, dtype=torch.float32).model
    for name, layer in list(model.named_modules()):
        if isinstance(layer, AwqTorchLinear):
            model.set_submodule(name, _in_float32(layer))
    return model


def _in_float32(layer: Any) -> torch.nn.Linear:
    """GPTQModel's AWQ layer, dequantized by its own function without rounding to float16."""
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), layer.bits, layer.group_size)
    linear = torch.nn.Linear(*weight.shape, bias=layer.bias is not None, dtype=torch.float32)
    linear.weight.data = weight.T.contiguous()
    if layer.bias is not None:
        linear.bias.data = layer.bias.float()
    return linear


if __name__ == "__main__":
    main()
