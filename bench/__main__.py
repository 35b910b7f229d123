"""`make bench`: every measurement, one after the other. Builds the peers on first use; takes about five hours.

Single ones: `python -m bench.NAME`, with the arguments below.
"""

from __future__ import annotations

import subprocess
import sys

from bench.peers import WORK

SMALL = str(WORK / "small-512")
LOW_BITS = ("iq3_s", "iq3_xxs", "iq2_s", "iq2_xs", "iq2_xxs")
RECIPES = ("q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_k_s", "iq4_xs", "q4_0", "q3_k_m", "q2_k")
COMMANDS = (
    ("conversion",),
    ("agreement",),
    ("quality",),
    ("importance", "--preset", "fast", "--runtime", "q4_k_m", "q4_0"),
    ("small_model", SMALL),
    ("importance", SMALL, "--preset", "fast", "--runtime", "q4_k_m", "q2_k", "--recipes", *RECIPES, *LOW_BITS),
    ("depth",),
    ("seven_billion",),
    ("survival",),
    ("plan",),
    ("ablation", "--recipe", "q4_0"),
    ("ablation", SMALL, "--recipe", "q2_k"),
    ("budget", "--runtime", "Q4_K_M", "IQ4_XS"),
    ("picture",),
    ("sizes",),
    ("budget", SMALL, "--runtime", "Q4_K_M", "IQ4_XS"),
    ("loading",),
    ("gpu",),
    ("training",),
    ("quantizers",),
    ("methods",),
    ("live",),
    ("kernels",),
    ("decode",),
)

for command in COMMANDS:
    print(f"\n## python -m bench.{' '.join(command)}\n", flush=True)
    subprocess.run([sys.executable, "-m", f"bench.{command[0]}", *command[1:]], check=True)
