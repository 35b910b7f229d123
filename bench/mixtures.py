"""llama.cpp's own choice of types, for tests/recipes/mixtures.json.

`python -m bench.mixtures` makes small random models whose rows are whole superblocks, lets llama.cpp's quantizer make
every mixture of them, with and without an importance matrix, and keeps the type of every quantized tensor.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from bench.measure import run
from bench.peers import llama_cpp
from whit.checkpoints.gguf import GGUFFile
from whit.models.open import open_model
from whit.pipeline.quantize import write_gguf
from whit.recipes.mixtures import BASE
from whit.recipes.named import recipe_named

FIXTURE = Path(__file__).parent.parent / "tests" / "recipes" / "mixtures.json"
MODELS = {  # tiny model, blocks, attention heads, key/value heads, experts, tied
    "dense": ("llama", 16, 4, 4, 0, False),
    "grouped": ("llama", 10, 8, 2, 0, True),
    "experts": ("mixtral", 8, 4, 2, 8, False),
}

NEED_IMPORTANCE = ("q2_k_s", "iq2_xxs", "iq2_xs", "iq2_s", "iq2_m", "iq3_xxs", "iq3_xs")


def main() -> None:
    """Write the fixture."""
    sys.path.insert(0, str(FIXTURE.parent.parent))
    from tiny import save_tiny
    from toy_tokenizers import TOY_VOCAB, save_toy_tokenizer

    cases = []
    for label, (kind, blocks, heads, kv, experts, tied) in MODELS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            changes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 256 // heads, "vocab_size": TOY_VOCAB}
            changes |= {"num_hidden_layers": blocks, "num_attention_heads": heads, "num_key_value_heads": kv}
            changes |= {"tie_word_embeddings": tied, **({"num_local_experts": experts} if experts else {})}
            save_tiny(kind, folder, **changes)
            save_toy_tokenizer("llama", folder)
            source = folder / "f32.gguf"
            write_gguf(open_model(folder), recipe_named("f32"), source)
            _matrix(GGUFFile(source), folder / "imatrix.gguf")
            for recipe in BASE:
                for importance in (False, True):
                    if recipe in NEED_IMPORTANCE and not importance:
                        continue  # llama.cpp refuses
                    out = folder / "out.gguf"
                    matrix = ("--imatrix", folder / "imatrix.gguf") if importance else ()
                    run(llama_cpp("llama-quantize"), *matrix, source, out, recipe.upper(), "1")
                    infos = [GGUFFile(out).info(name) for name in GGUFFile(out).names()]
                    tensors = [[i.name, list(i.shape), i.dtype.lower()] for i in infos if i.dtype != "F32"]
                    facts = {"model": label, "recipe": recipe, "importance": importance, "blocks": blocks}
                    facts |= {"experts": experts, "heads_per_kv": heads // kv, "tied": tied}
                    cases.append({**facts, "tensors": tensors})
    FIXTURE.write_text("[\n" + ",\n".join(json.dumps(case, separators=(",", ":")) for case in cases) + "\n]\n")


def _matrix(file: GGUFFile, path: Path) -> None:
    """An importance matrix in which all inputs count the same."""
    writer = gguf.GGUFWriter(str(path), "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["none"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in file.names():
        shape = file.info(name).shape
        if len(shape) > 1:
            experts = shape[0] if len(shape) == 3 else 1
            writer.add_tensor(f"{name}.in_sum2", np.ones((experts, shape[-1]), np.float32))
            writer.add_tensor(f"{name}.counts", np.ones((experts, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
