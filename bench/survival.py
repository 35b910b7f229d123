"""Killed at random, repeated, and still the same bytes: `python -m bench.survival [--kills 50]`.

A Llama of width 256 with 8 blocks and random weights is quantized once without a stop. Then, so many times: the same
command is begun, killed with SIGKILL at a moment drawn from the length of the first run, and repeated to its end.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.peers import WORK
from bench.small_model import tokenizer_of
from whit.calibration.text import documentation_text

VOCABULARY = 8192


def main() -> None:
    """How often a state was found, and how many files differ."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    source = _folder()
    home = WORK / "survival"
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir(parents=True)
    started = time.perf_counter()
    expected = _finished(source, home / "whole.gguf", arguments.windows)
    seconds = time.perf_counter() - started
    drawn = random.Random(arguments.seed)
    same = killed = resumed = 0
    for n in range(arguments.kills):
        out = home / f"{n}.gguf"
        process = subprocess.Popen(
            _command(source, out, arguments.windows), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            process.wait(drawn.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed += 1
        state = out.with_name(f".{out.name}.quantizing")
        resumed += state.is_dir() and any(each.name.startswith("block-") for each in state.iterdir())
        whole = out.exists()  # it was faster this time, or killed after its last write
        same += expected == (_digest(out) if whole else _finished(source, out, arguments.windows))
        left = [each.name for each in home.iterdir() if each.name.startswith(f".{n}.gguf")]
        print(f"{n + 1}: {same} the same, {killed} killed, {resumed} with blocks finished {left or ''}", flush=True)
        out.unlink()
    print("| kills | finished blocks were found | files with the bytes of the whole run |\n|---|---|---|")
    print(f"| {killed} | {resumed} | {same} of {arguments.kills} |")


def _command(source: Path, out: Path, windows: int) -> list[str]:
    whit = [sys.executable, "-c", "import sys; from whit.cli.app import run; sys.exit(run(sys.argv[1:]))"]
    more = ["--preset", "fast", "--calib", "docs", "--windows", str(windows), "--no-verify"]
    return [*whit, "quantize", str(source), "--recipe", "q4_k_m", "-o", str(out), *more]


def _finished(source: Path, out: Path, windows: int) -> str:
    done = subprocess.run(_command(source, out, windows), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{out.name}: {done.stdout[-1000:]}{done.stderr[-1000:]}")
    return _digest(out)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _folder() -> Path:
    folder = WORK / "narrow-8"
    if not (folder / "config.json").exists():
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=0,
        )
        torch.manual_seed(0)
        tokenizer_of([documentation_text("calibration").content]).save_pretrained(folder)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


if __name__ == "__main__":
    os.environ["OMP_NUM_THREADS"] = "1"
    main()
