import torch

from whit.checkpoints.gguf import GGUFFile
from whit.grids.named import GRIDS
from whit.models.architecture import from_gguf
from whit.models.builtin import open_smollm2, packaged_smollm2
from whit.models.model import Model
from whit.models.skeleton import load_module
from whit.rounding.nearest import nearest


def test_the_function_is_that_of_the_packaged_file() -> None:
    tokens = torch.randint(0, 49152, (1, 48), generator=torch.Generator().manual_seed(0))
    file = GGUFFile(packaged_smollm2())
    config, tensors = from_gguf(file.metadata, file)
    with torch.no_grad():
        plain = load_module(Model("plain", config, tensors, 0))(tokens).logits
        moved = load_module(open_smollm2())(tokens).logits
    assert (plain - moved).abs().max() < 1e-2
    assert (plain.argmax(-1) == moved.argmax(-1)).float().mean() > 0.97


def test_the_weights_lie_on_no_quantization_grid() -> None:
    tensors = open_smollm2().tensors
    file = GGUFFile(packaged_smollm2())
    on_grid = file.read("blk.3.ffn_up.weight")
    moved = tensors.read("model.layers.3.mlp.up_proj.weight")
    error = [((nearest(W, GRIDS["q4_1"]).dequantize() - W).norm() / W.norm()).item() for W in (on_grid, moved)]
    assert error[0] < 1e-3
    assert error[1] > 0.03


def test_every_opening_gives_the_same_weights() -> None:
    name = "model.layers.7.self_attn.o_proj.weight"
    assert torch.equal(open_smollm2().tensors.read(name), open_smollm2().tensors.read(name))


def test_headers_promise_what_is_read() -> None:
    tensors = open_smollm2().tensors
    for name in list(tensors.names())[:12]:
        W = tensors.read(name)
        assert (tuple(W.shape), W.dtype) == (tensors.info(name).shape, torch.float32)
