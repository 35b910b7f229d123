"""The architectures Whit knows. To add one, write its table beside its relatives and list it here."""

from __future__ import annotations

from whit.models.known_classic import GPT2, GPT_NEOX, OPT
from whit.models.known_gated import GEMMA2, GEMMA3, LLAMA, MISTRAL, MIXTRAL, PHI3, QWEN2, QWEN3, QWEN3_MOE
from whit.models.known_oss import GPT_OSS
from whit.models.known_table import Architecture

# The order decides between architectures that share a graph: the most particular first.
ARCHITECTURES: dict[str, Architecture] = {
    table.model_type: table
    for table in (MIXTRAL, MISTRAL, LLAMA, QWEN2, QWEN3, QWEN3_MOE, GEMMA2, GEMMA3, PHI3, GPT2, GPT_NEOX, OPT, GPT_OSS)
}

# Configurations that look like a known one but hold more than a language model.
REFUSED: dict[str, str] = {
    "gemma3": "This is the multimodal Gemma 3. Whit reads its language model alone: export it as gemma3_text first.",
}
