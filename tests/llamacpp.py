"""Logits from llama.cpp itself, the independent truth for what a GGUF file means.

The runtime is the one inside xllamacpp, whose shared library exports llama.cpp's C functions; its Python interface
has no logits. Structures are declared here as llama.h of that version has them, and checked against the defaults
that the library fills in. llama.cpp ends the process on some broken files, so every call has a process of its own.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

FLASH_ATTENTION_OFF = 0  # it would compute in half precision
F32 = 0  # ggml_type of the key-value cache


class LlamaCppError(RuntimeError):
    """llama.cpp did not accept the file; the message is its log."""


def llama_cpp_logits(path: Path, tokens: Sequence[int], n_ctx: int | None = None) -> np.ndarray:
    """Logits of all positions as llama.cpp computes them on the CPU: float32 [len(tokens), vocab].

    n_ctx  context length to ask for, by default as many as there are tokens (llama.cpp rounds it up to 256s)
    Raises LlamaCppError when the file cannot be loaded or evaluated.
    """
    with TemporaryDirectory() as folder:
        out = Path(folder) / "logits.npy"
        _in_a_process("logits", str(path), ",".join(map(str, tokens)), str(n_ctx or len(tokens)), str(out))
        return np.load(out)


def llama_cpp_tokens(path: Path, texts: Sequence[str]) -> list[list[int]]:
    """Token ids that llama.cpp gives for texts; special tokens written in a text are recognised, none are added.

    Raises LlamaCppError when the file cannot be loaded.
    """
    return json.loads(_in_a_process("tokens", str(path), stdin=json.dumps(list(texts))))


def _in_a_process(*arguments: str, stdin: str = "") -> str:
    command = [sys.executable, __file__, *arguments]
    process = subprocess.run(command, input=stdin, capture_output=True, text=True, errors="replace", check=False)
    if process.returncode != 0:
        raise LlamaCppError(process.stderr)
    return process.stdout


class _ModelParams(ctypes.Structure):
    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int32),
        ("load_mode", c_int32),
        ("lazy_mode", c_int32),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        ("vocab_only", c_bool),
        ("check_tensors", c_bool),
        ("use_extra_bufts", c_bool),
        ("no_host", c_bool),
        ("no_alloc", c_bool),
        ("load_mtp", c_bool),
    )


class _ContextParams(ctypes.Structure):
    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type")),
        *((name, c_int32) for name in ("pooling_type", "attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int32),
        ("type_v", c_int32),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class _Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


def _library() -> ctypes.CDLL:
    spec = importlib.util.find_spec("xllamacpp")
    assert spec is not None
    assert spec.submodule_search_locations
    lib = ctypes.CDLL(str(next(Path(spec.submodule_search_locations[0]).glob("xllamacpp*.so"))))
    lib.llama_model_default_params.restype = _ModelParams
    lib.llama_context_default_params.restype = _ContextParams
    lib.llama_model_load_from_file.restype = c_void_p
    lib.llama_model_load_from_file.argtypes = [c_char_p, _ModelParams]
    lib.llama_init_from_model.restype = c_void_p
    lib.llama_init_from_model.argtypes = [c_void_p, _ContextParams]
    lib.llama_model_get_vocab.restype = c_void_p
    lib.llama_model_get_vocab.argtypes = [c_void_p]
    lib.llama_vocab_n_tokens.argtypes = [c_void_p]
    lib.llama_batch_init.restype = _Batch
    lib.llama_decode.argtypes = [c_void_p, _Batch]
    lib.llama_get_logits.restype = POINTER(c_float)
    lib.llama_get_logits.argtypes = [c_void_p]
    return lib


def _evaluate(path: str, tokens: list[int], n_ctx: int) -> np.ndarray:
    lib = _library()
    lib.llama_backend_init()
    model_params = lib.llama_model_default_params()
    params = lib.llama_context_default_params()
    seen = (params.n_ctx, params.n_batch, params.type_k, params.type_v, params.yarn_ext_factor)
    if seen != (512, 2048, 1, 1, -1.0) or (model_params.vocab_only, model_params.use_extra_bufts) != (False, True):
        raise SystemExit(f"llama.h of this xllamacpp has other structures than tests/llamacpp.py says: {seen}")
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False  # no repacking: weights are used as they are in the file
    model = lib.llama_model_load_from_file(path.encode(), model_params)
    if not model:
        raise SystemExit("the model could not be loaded")
    params.n_ctx = n_ctx
    params.n_batch = params.n_ubatch = max(n_ctx, 32)
    params.n_threads = params.n_threads_batch = 1
    params.flash_attn_type = FLASH_ATTENTION_OFF
    params.type_k = params.type_v = F32
    context = lib.llama_init_from_model(model, params)
    if not context:
        raise SystemExit("no context could be made")
    n_vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    batch = lib.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = token
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    if lib.llama_decode(context, batch) != 0:
        raise SystemExit("decoding failed")
    return np.ctypeslib.as_array(lib.llama_get_logits(context), (len(tokens), n_vocab)).copy()


def _tokenize(path: str, texts: list[str]) -> list[list[int]]:
    lib = _library()
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.vocab_only = True
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise SystemExit("the vocabulary could not be loaded")
    vocab = lib.llama_model_get_vocab(model)
    lib.llama_tokenize.argtypes = [c_void_p, c_char_p, c_int32, POINTER(c_int32), c_int32, c_bool, c_bool]
    found = []
    for text in texts:
        raw = text.encode()
        ids = (c_int32 * (len(raw) + 8))()
        n = lib.llama_tokenize(vocab, raw, len(raw), ids, len(ids), False, True)
        found.append(list(ids[:n]))
    return found


if __name__ == "__main__":
    if sys.argv[1] == "tokens":
        print(json.dumps(_tokenize(sys.argv[2], json.load(sys.stdin))))
    else:
        file, listed, context_length, target = sys.argv[2:]
        np.save(target, _evaluate(file, [int(token) for token in listed.split(",")], int(context_length)))
