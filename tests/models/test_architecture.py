"""Reading and writing are inverse, and what does not fit is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tiny import TINY, MemorySource, random_tokens, save_tiny, tiny_model, write_with_gguf
from whit.checkpoints.folder import open_folder, read_config
from whit.checkpoints.gguf import GGUFFile
from whit.checkpoints.source import TensorInfo
from whit.errors import BadWeightsError, BrokenFileError, ModelError, UnknownArchitectureError
from whit.models.architecture import GGUFView, from_gguf, gguf_view, passthrough_view
from whit.models.builtin import packaged_smollm2
from whit.models.known import ARCHITECTURES
from whit.models.model import Model


def memory_model(model: PreTrainedModel, **changes: Any) -> Model:
    return Model("tiny", {**model.config.to_dict(), **changes}, MemorySource(model.state_dict()), 0)


def without(model: Model, *names: str, **more: torch.Tensor) -> Model:
    source = model.tensors
    kept = {name: source.read(name) for name in source.names() if name not in names}
    return Model(model.label, model.config, MemorySource({**kept, **more}), 0)


def in_gguf(view: GGUFView) -> MemorySource:
    return MemorySource({t.name: torch.cat([part.read() for part in t.parts]) for t in view.tensors})


def saved_view(name: str, folder: Path) -> tuple[PreTrainedModel, Model, GGUFView]:
    model = save_tiny(name, folder)
    tensors, n_bytes = open_folder(folder)
    opened = Model(name, read_config(folder), tensors, n_bytes)
    return model, opened, gguf_view(opened)


@pytest.mark.parametrize("name", TINY)
def test_tensors_come_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    _, opened, view = saved_view(name, tmp_path)
    _, back = from_gguf(view.metadata, in_gguf(view))
    assert sorted(back.names()) == sorted(opened.tensors.names())
    for tensor in back.names():
        found, expected = back.read(tensor), opened.tensors.read(tensor)
        if tensor.endswith("embed_positions.weight"):  # OPT never uses the first two
            found, expected = found[2:], expected[2:]
        assert torch.equal(found, expected), tensor
        assert tuple(back.info(tensor).shape) == tuple(opened.tensors.info(tensor).shape)


@pytest.mark.parametrize("name", TINY)
def test_the_model_that_comes_back_computes_the_same(name: str, tmp_path: Path) -> None:
    model, _, view = saved_view(name, tmp_path / "model")
    write_with_gguf(view, tmp_path / "x.gguf", half=False)
    file = GGUFFile(tmp_path / "x.gguf")
    config, tensors = from_gguf(file.metadata, file)
    rest = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(config["model_type"], **rest)
    weights = {name: tensors.read(name) for name in tensors.names()}
    loaded = MODEL_FOR_CAUSAL_LM_MAPPING[type(made)].from_pretrained(
        None, config=made, state_dict=weights, dtype=torch.float32, attn_implementation="eager"
    )
    tokens = torch.tensor([random_tokens(40)])
    with torch.no_grad():
        found, expected = loaded.eval()(tokens).logits, model(tokens).logits
    # Llama 3's rule with other constants than the published ones comes back as a list of factors.
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 if name == "llama-llama3-rope" else 2e-6)


@pytest.mark.parametrize("name", TINY)
def test_writing_again_what_was_read_gives_the_same_file(name: str, tmp_path: Path) -> None:
    _, _, view = saved_view(name, tmp_path)
    config, tensors = from_gguf(view.metadata, in_gguf(view))
    again = gguf_view(Model(name, config, tensors, 0))
    assert list(again.metadata) == list(view.metadata)
    for key, value in view.metadata.items():
        assert again.metadata[key] == (pytest.approx(value, rel=1e-7) if isinstance(value, float) else value)
    assert [(t.name, t.shape) for t in again.tensors] == [(t.name, t.shape) for t in view.tensors]


@pytest.mark.parametrize("name", TINY)
def test_names_are_those_of_the_gguf_package(name: str, tmp_path: Path) -> None:
    _, _, view = saved_view(name, tmp_path)
    graph = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == view.architecture)
    known = {gguf.TENSOR_NAMES[kind] for kind in gguf.MODEL_TENSORS[graph]}
    for tensor in view.tensors:
        stem = tensor.name.rsplit(".", 1)[0]
        pattern = ".".join("{bid}" if piece.isdigit() else piece for piece in stem.split("."))
        assert any(pattern == name or pattern.startswith(f"{name}.") for name in known), tensor.name


def test_a_view_reads_no_weights() -> None:
    class Headers(MemorySource):
        def read(self, name: str) -> torch.Tensor:
            raise AssertionError(name)

    for name in TINY:
        model = tiny_model(name)
        gguf_view(Model(name, model.config.to_dict(), Headers(model.state_dict()), 0))


def test_tensors_are_in_llama_cpps_order(tmp_path: Path) -> None:
    _, _, view = saved_view("llama", tmp_path)
    names = [t.name for t in view.tensors]
    assert names[0] == "token_embd.weight"
    assert names[-2:] == ["output_norm.weight", "output.weight"]
    blocks = [int(name.split(".")[1]) for name in names[1:-2]]
    assert blocks == sorted(blocks)


def test_a_tied_head_is_not_duplicated() -> None:
    tied = memory_model(tiny_model("qwen2-tied"))
    assert "output.weight" not in [t.name for t in gguf_view(tied).tensors]
    untied_without_head = without(memory_model(tiny_model("qwen2")), "lm_head.weight")
    assert "output.weight" not in [t.name for t in gguf_view(untied_without_head).tensors]


def test_a_tied_head_is_written_where_llama_cpp_needs_one() -> None:
    model = without(memory_model(tiny_model("gpt_neox"), tie_word_embeddings=True), "embed_out.weight")
    tensors = {t.name: t for t in gguf_view(model).tensors}
    head, embedding = tensors["output.weight"].parts[0].read(), tensors["token_embd.weight"].parts[0].read()
    assert torch.equal(head, embedding)


def test_norms_vectors_positions_and_routers_stay_in_float() -> None:
    kept: dict[str, str] = {}
    for name in ("qwen3_moe", "gpt2", "gemma3_text", "opt", "phi3-longrope"):
        kept |= {t.name: t.reason for t in gguf_view(memory_model(tiny_model(name))).tensors if t.keep_float}
    for tensor in (
        "position_embd.weight",
        "output_norm.weight",
        "blk.0.attn_q_norm.weight",
        "blk.1.ffn_gate_inp.weight",
        "blk.0.attn_qkv.bias",
        "blk.0.ffn.act.scales",
        "rope_factors_long.weight",
    ):
        assert "stay in float" in kept[tensor]
    assert not {"token_embd.weight", "output.weight", "blk.0.attn_q.weight", "blk.0.ffn_up_exps.weight"} & set(kept)


def test_experts_are_one_part_each(tmp_path: Path) -> None:
    _, opened, view = saved_view("mixtral", tmp_path)
    up = next(t for t in view.tensors if t.name == "blk.1.ffn_up_exps.weight")
    assert up.shape == (4, 96, 64)
    assert [part.shape for part in up.parts] == [(1, 96, 64)] * 4
    expected = opened.tensors.read("model.layers.1.block_sparse_moe.experts.2.w3.weight")
    assert torch.equal(up.parts[2].read()[0], expected)


def test_parts_keep_the_stored_float_type() -> None:
    model = tiny_model("llama").bfloat16()
    view = gguf_view(memory_model(model))
    assert {part.read().dtype for t in view.tensors for part in t.parts} == {torch.bfloat16}


def test_original_gpt2_names_and_masks_are_accepted() -> None:
    model = memory_model(tiny_model("gpt2"))
    source = model.tensors
    bare = {name.removeprefix("transformer."): source.read(name) for name in source.names()}
    bare.pop("lm_head.weight", None)
    bare["h.0.attn.bias"] = torch.ones(1, 1, 128, 128)
    views = [gguf_view(each) for each in (model, Model("gpt2", model.config, MemorySource(bare), 0))]
    for one, other in zip(*(view.tensors for view in views), strict=True):
        assert torch.equal(one.parts[0].read(), other.parts[0].read())


def test_old_rotary_buffers_are_ignored() -> None:
    model = memory_model(tiny_model("llama"))
    gguf_view(without(model, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}))


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    with pytest.raises(UnknownArchitectureError) as error:
        gguf_view(Model("m", {"model_type": "mamba"}, MemorySource({}), 0))
    with pytest.raises(UnknownArchitectureError) as other:
        from_gguf({"general.architecture": "mpt"}, MemorySource({}))
    for name in ARCHITECTURES:
        assert name in str(error.value)
        assert name in str(other.value)


def test_multimodal_gemma_is_told_what_to_do() -> None:
    with pytest.raises(UnknownArchitectureError, match="gemma3_text"):
        gguf_view(Model("m", {"model_type": "gemma3"}, MemorySource({}), 0))


def test_missing_tensors_are_named() -> None:
    with pytest.raises(BrokenFileError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is missing"):
        gguf_view(without(memory_model(tiny_model("llama")), "model.layers.1.mlp.up_proj.weight"))


def test_a_missing_expert_is_named() -> None:
    view = gguf_view(memory_model(tiny_model("mixtral")))
    config, tensors = from_gguf(view.metadata, in_gguf(view))
    name = "model.layers.0.block_sparse_moe.experts.3.w2.weight"
    with pytest.raises(BrokenFileError, match=name.replace(".", r"\.")):
        gguf_view(without(Model("m", config, tensors, 0), name))


def test_tensors_that_nobody_knows_are_named() -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.mlp\.up_proj\.qweight"):
        gguf_view(without(memory_model(tiny_model("llama")), **{"model.layers.0.mlp.up_proj.qweight": torch.ones(2)}))


def test_shapes_that_contradict_the_configuration_are_named() -> None:
    with pytest.raises(BadWeightsError, match=r"\[96, 64\].*\[80, 64\]"):
        gguf_view(memory_model(tiny_model("llama"), intermediate_size=80))


def test_an_absurd_number_of_blocks_ends_at_once() -> None:
    with pytest.raises(BrokenFileError, match="4000000000"):
        gguf_view(memory_model(tiny_model("gemma2"), num_hidden_layers=4_000_000_000, layer_types=None))


def test_missing_keys_are_named() -> None:
    view = gguf_view(memory_model(tiny_model("llama")))
    metadata = {key: value for key, value in view.metadata.items() if key != "llama.block_count"}
    with pytest.raises(BrokenFileError, match=r"llama\.block_count"):
        from_gguf(metadata, in_gguf(view))


def test_keys_that_llama_cpp_can_do_without_may_be_missing() -> None:
    view = gguf_view(memory_model(tiny_model("llama")))
    metadata = {key: value for key, value in view.metadata.items() if "rope" not in key and "vocab_size" not in key}
    config, _ = from_gguf(metadata, in_gguf(view))
    assert config["vocab_size"] == 256
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}


def test_values_that_differ_by_block_are_refused() -> None:
    view = gguf_view(memory_model(tiny_model("llama")))
    with pytest.raises(ModelError, match="head_count_kv"):
        from_gguf({**view.metadata, "llama.attention.head_count_kv": [2, 1]}, in_gguf(view))


def test_missing_and_unknown_gguf_tensors_are_named() -> None:
    view = gguf_view(memory_model(tiny_model("llama")))
    tensors = {t.name: t.parts[0].read() for t in view.tensors}
    with pytest.raises(ModelError, match=r"blk\.0\.mystery\.weight"):
        from_gguf(view.metadata, MemorySource({**tensors, "blk.0.mystery.weight": torch.ones(2)}))
    del tensors["blk.1.ffn_up.weight"]
    with pytest.raises(BrokenFileError, match=r"blk\.1\.ffn_up\.weight is missing"):
        from_gguf(view.metadata, MemorySource(tensors))


def test_published_llama3_factors_come_back_as_the_rule() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    view = gguf_view(memory_model(tiny_model("llama"), rope_parameters=rope, max_position_embeddings=131072))
    config, _ = from_gguf(view.metadata, in_gguf(view))
    assert config["rope_parameters"] == rope


def test_numbers_come_back_as_they_were_meant() -> None:
    view = gguf_view(memory_model(tiny_model("llama"), rms_norm_eps=1e-5))
    stored = {key: np.float32(value) if isinstance(value, float) else value for key, value in view.metadata.items()}
    config, _ = from_gguf(stored, in_gguf(view))
    assert config["rms_norm_eps"] == 1e-5


def test_special_tokens_come_from_the_file_and_never_from_a_class() -> None:
    view = gguf_view(memory_model(tiny_model("phi3")))
    config, _ = from_gguf({**view.metadata, "tokenizer.ggml.eos_token_id": 7}, in_gguf(view))
    assert (config["eos_token_id"], config["pad_token_id"]) == (7, None)


def test_a_tensor_read_from_gguf_owns_its_memory() -> None:
    view = gguf_view(memory_model(tiny_model("mixtral")))
    _, tensors = from_gguf(view.metadata, in_gguf(view))
    name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    first = tensors.read(name)
    kept = first.clone()
    first.zero_()
    assert torch.equal(tensors.read(name), kept)
    assert kept.untyped_storage().nbytes() == first.untyped_storage().nbytes() == 4 * first.numel()


def test_a_stack_of_experts_is_decoded_once() -> None:
    reads: list[str] = []

    class Counting(MemorySource):
        def read(self, name: str) -> torch.Tensor:
            reads.append(name)
            return super().read(name)

    view = gguf_view(memory_model(tiny_model("mixtral")))
    held = in_gguf(view)
    _, tensors = from_gguf(view.metadata, Counting({name: held.read(name) for name in held.names()}))
    for expert in range(4):
        tensors.read(f"model.layers.0.block_sparse_moe.experts.{expert}.w1.weight")
    assert reads == ["blk.0.ffn_gate_exps.weight"]


def test_a_file_from_other_tools_is_read() -> None:
    file = GGUFFile(packaged_smollm2())
    config, tensors = from_gguf(file.metadata, file)
    made = AutoConfig.for_model("llama", **{key: value for key, value in config.items() if key != "model_type"})
    with torch.device("meta"):
        expected = AutoModelForCausalLM.from_config(made).state_dict()
    shapes = {name: tuple(W.shape) for name, W in expected.items() if name != "lm_head.weight"}
    assert {name: tuple(tensors.info(name).shape) for name in tensors.names()} == shapes
    assert config["tie_word_embeddings"]


def test_a_file_from_other_tools_would_be_written_as_it_is() -> None:
    file = GGUFFile(packaged_smollm2())
    config, tensors = from_gguf(file.metadata, file)
    view = gguf_view(Model("smollm2", config, tensors, 0))
    assert {t.name: t.shape for t in view.tensors} == {name: file.info(name).shape for name in file.names()}
    common = {key: value for key, value in file.metadata.items() if key in view.metadata}
    assert {key for key in file.metadata if key.startswith("llama.")} <= set(common)
    for key, value in common.items():
        assert view.metadata[key] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value)
    up = next(t for t in view.tensors if t.name == "blk.3.attn_q.weight")
    assert torch.equal(up.parts[0].read(), file.read("blk.3.attn_q.weight"))


def test_passing_through_keeps_names_and_leaves_the_tokenizer_out() -> None:
    metadata = {"general.architecture": "anything", "general.name": "n", "anything.x": 1, "tokenizer.ggml.model": "t"}
    source = MemorySource({"blk.0.w.weight": torch.ones(2, 4), "blk.0.attn_norm.weight": torch.ones(4)})
    view = passthrough_view(metadata, source)
    assert view.architecture == "anything"
    assert set(view.metadata) == {"general.architecture", "general.name", "anything.x"}
    assert [(t.name, t.keep_float, t.n_weights) for t in view.tensors] == [
        ("blk.0.w.weight", False, 8),
        ("blk.0.attn_norm.weight", True, 4),
    ]
    assert torch.equal(view.tensors[0].parts[0].read(), torch.ones(2, 4))


def test_a_file_that_does_not_say_its_architecture_is_broken() -> None:
    with pytest.raises(BrokenFileError, match=r"general\.architecture"):
        from_gguf({}, MemorySource({}))


def test_info_states_the_type_of_the_gguf_tensor() -> None:
    view = gguf_view(memory_model(tiny_model("llama").half()))
    _, tensors = from_gguf(view.metadata, in_gguf(view))
    name = "model.layers.0.mlp.up_proj.weight"
    assert tensors.info(name) == TensorInfo(name, (96, 64), "F16", 2 * 96 * 64)
