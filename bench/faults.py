"""Faults planted into released files, and what `whit verify` says of each: `python -m bench.faults RELEASE [MODEL]`.

RELEASE is what `whit release MODEL -o RELEASE` wrote, or a part of it: the files ending in Q4_K_M.gguf and Q8_0.gguf,
and the folders with GPTQ, AWQ and W8A8 in their names. First every file as it is, which has to be good or better; then
eight copies with one fault each, which have to be caught, with the tensor or the label at fault named.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.peers import WORK
from whit.checkpoints.gguf import GGUFFile
from whit.layouts.ggml import GGML_TYPES
from whit.rounding.nearest import nearest

VERIFY = "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))"
DOWN, GATE = "blk.{}.ffn_down.weight", "blk.{}.ffn_gate.weight"
FOLDED = "model.layers.4.mlp.up_proj"


def main() -> None:
    """Two tables."""
    parser = argparse.ArgumentParser()
    parser.add_argument("release", type=Path)
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--windows", type=int, default=4)
    arguments = parser.parse_args()
    home = WORK / "faults"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)

    def said(path: Path) -> dict[str, object]:
        arguments_of = ["verify", path, "--against", arguments.model, "--windows", str(arguments.windows), "--json"]
        command = [sys.executable, "-c", VERIFY, *arguments_of]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
        if ran.returncode not in (0, 1):
            sys.exit(ran.stderr)
        return {"status": ran.returncode, **json.loads(ran.stdout)}

    every = sorted(path for path in arguments.release.iterdir() if not path.name.endswith("imatrix.gguf"))
    kept = [path for path in every if path.suffix == ".gguf" or (path / "config.json").exists()]
    print("| file as it is | verdict | KL | s |\n|---|---|---|---|", flush=True)
    sound = 0
    for path in kept:
        started = time.perf_counter()
        found = said(path)
        sound += found["verdict"] in ("excellent", "good")
        seconds = time.perf_counter() - started
        print(f"| {path.name} | {found['verdict']} | {found.get('kl_mean')} | {seconds:.0f} |", flush=True)
    print(f"\n{sound} of {len(kept)} good or better.")
    print("\n| fault | verdict | status | first thing said |\n|---|---|---|---|", flush=True)
    caught = 0
    for name, (kind, plant, words) in FAULTS.items():
        source = next(path for path in kept if kind in path.name)
        faulty = home / f"faulty{source.suffix}"
        plant(source, faulty)
        found = said(faulty)
        faults = [str(each) for each in (*found["faults"], found.get("why"))]  # type: ignore[misc]
        hit = found["status"] == 1 and any(words in each for each in faults)
        caught += hit
        print(f"| {name} ({kind}) | {found['verdict']} | {found['status']} | {faults[0][:120]} |", flush=True)
        shutil.rmtree(faulty) if faulty.is_dir() else faulty.unlink()
    print(f"\n{caught} of {len(FAULTS)} caught and named.")
    sys.exit(caught < len(FAULTS) or sound < len(kept))


def _bytes(change: Callable[[GGUFFile], dict[str, Tensor]]) -> Callable[[Path, Path], None]:
    """A file in which tensors have other bytes."""

    def plant(source: Path, out: Path) -> None:
        file = GGUFFile(source)
        with out.open("wb") as written:
            file.with_changes(written, change(file).items())

    return plant


def _nibbles(file: GGUFFile) -> dict[str, Tensor]:
    """Low and high halves of every byte of codes, the other way round."""
    name = next(each for i in range(99) if file.info(each := DOWN.format(i)).dtype == "Q4_K")
    blocks = file.raw(name).view(-1, 144).clone()  # two scales, twelve bytes of scales, 128 of codes
    blocks[:, 16:] = (blocks[:, 16:] << 4) | (blocks[:, 16:] >> 4)
    return {name: blocks.flatten()}


def _zero_scale(file: GGUFFile) -> dict[str, Tensor]:
    blocks = file.raw(GATE.format(9)).view(-1, 34).clone()  # Q8_0: a scale in half precision, 32 codes
    blocks[500, :2] = 0
    return {GATE.format(9): blocks.flatten()}


def _no_number(file: GGUFFile) -> dict[str, Tensor]:
    blocks = file.raw(GATE.format(3)).view(-1, 34).clone()
    blocks[7, :2] = 255
    return {GATE.format(3): blocks.flatten()}


def _other_model(file: GGUFFile) -> dict[str, Tensor]:
    """Every matrix of a block as another model might have it: numbers of the same spread."""
    drawn, changed = torch.Generator().manual_seed(0), {}
    for name in file.names():
        if name.startswith("blk.12.") and len(file.info(name).shape) == 2:
            W = file.read(name)
            kind = GGML_TYPES[file.info(name).dtype]
            changed[name] = kind.pack(nearest(torch.randn(W.shape, generator=drawn) * W.std(), kind.grid))
    return changed


def _cut(source: Path, out: Path) -> None:
    shutil.copy(source, out)
    os.truncate(out, out.stat().st_size * 9 // 10)


def _version(source: Path, out: Path) -> None:
    """A label that says that zero points are stored the other way."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text())
    config["quantization_config"]["checkpoint_format"] = "gptq_v2"
    (out / "config.json").write_text(json.dumps(config))


def _tensors(name: str, change: Callable[[Tensor], None]) -> Callable[[Path, Path], None]:
    """A folder in which one tensor has other values."""

    def plant(source: Path, out: Path) -> None:
        shutil.copytree(source, out)
        tensors = load_file(out / "model.safetensors")
        change(tensors[name])
        save_file(tensors, out / "model.safetensors", {"format": "pt"})

    return plant


def _awq_order(packed: Tensor) -> None:
    """AWQ's columns are 0 2 4 6 1 3 5 7 in a word; here they are in their own order."""
    nibbles = [(packed >> 4 * i) & 15 for i in range(8)]
    packed.zero_()
    for place, column in enumerate((0, 4, 1, 5, 2, 6, 3, 7)):
        packed |= nibbles[column] << 4 * place


def _zero_row(scale: Tensor) -> None:
    scale[5] = 0


# name -> which file, what happens to it, and what has to be said
FAULTS: dict[str, tuple[str, Callable[[Path, Path], None], str]] = {
    "swapped nibbles": ("Q4_K_M.gguf", _bytes(_nibbles), "nibble"),
    "one zeroed scale": ("Q8_0.gguf", _bytes(_zero_scale), GATE.format(9)),
    "a scale that is no number": ("Q8_0.gguf", _bytes(_no_number), GATE.format(3)),
    "a layer of another model": ("Q4_K_M.gguf", _bytes(_other_model), "block 12"),
    "a file cut off": ("Q4_K_M.gguf", _cut, "truncated"),
    "zero points of the wrong version": ("GPTQ", _version, "gptq_v2"),
    "nibbles in another order": ("AWQ", _tensors(f"{FOLDED}.qweight", _awq_order), "blk.4.ffn_up"),
    "a row's scale is zero": ("W8A8", _tensors(f"{FOLDED}.weight_scale", _zero_row), "blk.4.ffn_up"),
}


if __name__ == "__main__":
    main()
