"""Folders that are too large to be served from here, and what serves them: vLLM.

A live model answers one request after the other on processor cores. That is good for a small model at a desk; with
weights of some gigabytes every request behind the first waits for minutes, and who has such a folder has a GPU for it.
"""

from __future__ import annotations

import shlex

from whit.errors import RecipeError
from whit.memory import GB
from whit.models.model import Model
from whit.models.open import LIVE

LARGE = 4 * GB  # bytes of weights on disk: 8 billion in 4 bits, 2 billion in 16


def refuse_large(model: Model, host: str, port: int, context: int) -> None:
    """Raises RecipeError for weights of more than LARGE bytes, with the command that serves them.

    model  a folder's; hub ids are downloaded by vLLM itself
    """
    live = model.tokenizer_dir is not None and (model.tokenizer_dir / LIVE).is_file()  # nothing else reads those
    if live or model.n_bytes <= LARGE:
        return
    name = shlex.quote(model.label)
    command = f"vllm serve {name} --host {host} --port {port} --max-model-len {context}"
    if model.quantization.get("quant_method") == "whit":
        command = f"whit convert {name} --format gguf -o model.gguf && whit serve model.gguf"
    raise RecipeError(
        f"{model.label} has {model.n_bytes / GB:.1f} GB of weights. Folders of more than {LARGE / GB:.0f} GB would be "
        f"served one request at a time and too slowly to be of use. Instead: {command}"
    )
