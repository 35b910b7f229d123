"""The kernels for ARM, compiled by a cross compiler and run by an emulator, where both are there."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
NATIVE = Path(__file__).parents[2] / "src" / "whit" / "kernels" / "native"


@pytest.mark.skipif(
    not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
    reason="needs a cross compiler and an emulator: apt-get install g++-aarch64-linux-gnu qemu-user-static",
)
def test_kernels_for_arm_multiply_as_the_generic_ones_do(tmp_path: Path) -> None:
    sources = [Path(__file__).parent / "other_processor.cpp", *sorted(NATIVE.glob("*.cpp"))]
    options = ["-std=c++17", "-O2", "-fopenmp", "-ffp-contract=off", "-static", "-I", NATIVE]
    program = tmp_path / "program"
    subprocess.run([COMPILER, *options, *sources, "-o", program], check=True)
    ran = subprocess.run([EMULATOR, "-cpu", "max", program, "neon"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "products, largest difference" in ran.stdout
