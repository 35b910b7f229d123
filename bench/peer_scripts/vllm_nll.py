"""What vLLM makes of a folder: the mean negative log-likelihood of a window's tokens.

`vllm_nll.py FOLDER TOKENS_FILE [--length 256]` prints one JSON line. In an environment with a build of vLLM for CPUs;
torchvision and torchaudio are not needed and must not be there when their version does not fit torch's.
"""

from __future__ import annotations

import argparse
import json
import os

os.environ |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

from safetensors.torch import load_file
from vllm import LLM, SamplingParams


def main() -> None:
    """Load, read one window, print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("tokens", help="safetensors with int64 `tokens` [n, length]")
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    ids = load_file(arguments.tokens)["tokens"][0][: arguments.length].tolist()
    llm = LLM(model=arguments.folder, enforce_eager=True, max_model_len=512, max_num_seqs=1)
    (found,) = llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0))
    lost = [-next(iter(each.values())).logprob for each in found.prompt_logprobs[1:]]
    print(json.dumps({"nll": sum(lost) / len(lost)}))


if __name__ == "__main__":
    main()
