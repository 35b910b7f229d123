"""A model that can run: transformers' own implementation, filled from any tensor source.

The obvious way, `from_pretrained(folder)`, cannot read what Whit reads (GGUF files, tensors made on the fly) and
may import code from the folder. Here the configuration chooses one of transformers' own classes, and its loader is
handed promises instead of tensors: every value is read when its turn comes and becomes the parameter itself, so
that the peak is one copy of the weights plus one tensor (plus one fused tensor for mixtures of experts).

`split` cuts the model between its body and its head without knowing the architecture: the head is the causal
model itself with its decoder replaced by a pass-through, so that soft caps and logit scales stay where
transformers wrote them, and logits of long texts can be made in pieces.

Left out: running a model block by block.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import ModelOutput
from transformers.utils import logging as transformers_logging

from whit.checkpoints.source import TensorSource
from whit.errors import BadWeightsError, BrokenFileError, ModelError, UnknownArchitectureError
from whit.models.activations import input_schemes, quantize_inputs
from whit.models.model import Model
from whit.products import fast_linear

# Keys of a config.json that choose code or precision. Whit chooses both: plain attention and plain experts are the
# exact ones, and a name of a downloadable kernel in a configuration must not be followed.
CHOSEN_HERE = {
    "attn_implementation",
    "auto_map",
    "dtype",
    "experts_implementation",
    "fusion_config",
    "model_type",
    "torch_dtype",
    "transformers_version",
    "transformers_weights",
}
N_NAMED = 3  # tensors named in a message before "and N more"


@dataclass
class _Errors:
    """The first error met while reading; transformers' loader turns exceptions into its own."""

    first: Exception | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)  # the loader reads from several threads


class _Promise:
    """A tensor that is read when transformers' loader asks for it, as it asks a slice of a safetensors file."""

    def __init__(self, name: str, source: TensorSource, label: str, errors: _Errors) -> None:
        self._name, self._source, self._label, self._errors = name, source, label, errors

    def __getitem__(self, everything: Any) -> Tensor:
        with self._errors.lock:
            if self._errors.first is not None:
                raise self._errors.first
            try:
                W = self._source.read(self._name)
                check_finite(W, self._name, self._label)
                return W
            except Exception as error:
                self._errors.first = error
                raise


def load_module(model: Model, dtype: torch.dtype = torch.float32) -> nn.Module:
    """transformers' causal language model filled with the weights of `model`, in evaluation mode, on the CPU.

    dtype  type of all parameters
    Raises UnknownArchitectureError when transformers has no such model, BrokenFileError when weights are missing or
    left over (all are named), BadWeightsError for NaN, infinite or wrongly shaped weights, ModelError for a
    configuration that transformers rejects.
    """
    config, cls = config_and_class(model)
    errors = _Errors()
    promises = {name: _Promise(name, model.tensors, model.label, errors) for name in model.tensors.names()}
    try:
        with quiet():
            module, report = cls.from_pretrained(
                None,
                config=config,
                state_dict=promises,
                dtype=dtype,
                attn_implementation="eager",
                experts_implementation="eager",
                ignore_mismatched_sizes=True,  # they are refused below, by name
                output_loading_info=True,
            )
    except Exception as error:
        if errors.first is not None:  # the reason, not its consequence
            raise errors.first from None
        raise ModelError(f"{model.label}: transformers cannot build this model: {error}") from error
    if errors.first is not None:
        raise errors.first
    _check_report(report, model.label)
    quantize_inputs(module, input_schemes(model))
    return module.eval().requires_grad_(False)


@dataclass(frozen=True)
class Halves:
    """A model cut between its final hidden states and its logits.

    Both take and return tensors on the CPU, wherever the model is.

    body      token ids [batch, tokens] int64 -> final hidden states [batch, tokens, hidden]
    head      final hidden states [positions, hidden] -> logits [positions, vocab]
    n_vocab   tokens that the model knows
    longest   tokens it can read at once, None when its configuration does not say
    """

    body: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    n_vocab: int
    longest: int | None


def split(module: nn.Module) -> Halves:
    """Cut a model from `load_module` in two; `module` itself becomes the head and must not be used otherwise.

    When the last reference to the body goes, so do its weights (a tied embedding stays with the head).
    Raises ModelError when the two halves do not reproduce the model's own logits on a short input.
    """
    if not isinstance(module, PreTrainedModel):
        raise TypeError(f"expected a module made by load_module, got {type(module).__name__}")
    decoder = module.get_decoder()
    path = next((name for name, part in module.named_modules() if part is decoder and part is not module), None)
    if path is None:
        raise ModelError(f"{type(module).__name__}: its decoder cannot be told from its head; it cannot be measured.")
    config = module.config.get_text_config()
    device = module.device
    probe = torch.arange(min(4, config.vocab_size))[None]  # [1, tokens]
    with torch.inference_mode(), fast_linear():  # as below: sums of another library differ by more than another order's
        expected = module(input_ids=probe.to(device), use_cache=False).logits[0].cpu()  # [tokens, vocab]
        output = type(decoder(input_ids=probe.to(device), use_cache=False))
    module.set_submodule(path, PassThrough(output))

    def body(ids: Tensor) -> Tensor:
        with torch.inference_mode(), fast_linear():
            found: Tensor = decoder(input_ids=ids.to(device), use_cache=False).last_hidden_state
            return found.cpu()

    def head(hidden: Tensor) -> Tensor:
        with torch.inference_mode(), fast_linear():
            logits: Tensor = module(inputs_embeds=hidden[None].to(device), use_cache=False).logits[0]
            return logits.cpu()

    # The order of a sum may depend on how many rows are multiplied at once, hence a tolerance at all.
    if not torch.allclose(head(body(probe)[0]), expected, rtol=1e-4, atol=1e-5):
        raise ModelError(f"{type(module).__name__}: body and head do not add up to the model; it cannot be measured.")
    return Halves(body, head, expected.shape[1], getattr(config, "max_position_embeddings", None))


class PassThrough(nn.Module):
    """Stands where the decoder stood and returns the hidden states that it is given as embeddings."""

    def __init__(self, output: type[ModelOutput]) -> None:
        super().__init__()
        self._output = output  # the decoder's own, because some models look at fields that others lack

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> ModelOutput:
        """What it is given, as the decoder would return it."""
        return self._output(last_hidden_state=inputs_embeds)


def config_and_class(model: Model) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' configuration and causal model class for `model`.

    Raises UnknownArchitectureError when there is none, ModelError for a configuration that transformers rejects.
    """
    config = _config(model)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UnknownArchitectureError(
            f"{model.label}: {config.model_type!r} is not a causal language model; only those can be measured."
        )
    return config, MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def config_and_named_class(model: Model) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """transformers' configuration, and its class of the name in config.json; the causal one where there is none.

    Raises UnknownArchitectureError when transformers itself has no such class for this configuration (code that lies
    beside the weights is never run), ModelError for a configuration that transformers rejects.
    """
    names = model.config.get("architectures")
    if not names:
        return config_and_class(model)
    config, name = _config(model), names[0] if isinstance(names, list) else names
    try:
        cls = getattr(transformers, str(name), None)
    except (ImportError, RuntimeError):  # a class that needs a package which is not there
        cls = None
    if not (
        isinstance(cls, type)
        and issubclass(cls, PreTrainedModel)
        and getattr(cls, "config_class", None) is type(config)
    ):
        raise UnknownArchitectureError(
            f"{model.label}: config.json names the class {name!r}, which transformers does not have for "
            f"{config.model_type!r}. Give a model of that class to fill: model=."
        )
    return config, cls


def _config(model: Model) -> PreTrainedConfig:
    settings = dict(model.config)
    model_type = settings.get("model_type")
    settings = {key: value for key, value in settings.items() if key not in CHOSEN_HERE and not key.startswith("_")}
    if model_type not in CONFIG_MAPPING:
        raise UnknownArchitectureError(
            f"{model.label}: the installed transformers knows no architecture {model_type!r}. "
            "A newer transformers may: pip install -U transformers."
        )
    try:
        return AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # each configuration class has its own ways to refuse a value
        raise ModelError(f"{model.label}: transformers rejects the configuration: {error}") from error


def check_finite(W: Tensor, name: str, label: str) -> None:
    """Raise BadWeightsError when W holds NaN or infinities."""
    if torch.isfinite(W.sum()):
        return
    finite = torch.isfinite(W)
    if not finite.all():
        first = (~finite).flatten().nonzero()[0].item()
        raise BadWeightsError(
            f"{label}: {name} holds {int((~finite).sum())} NaN or infinite values of {W.numel()} (the first at index "
            f"{first}). Get the file again or from elsewhere; nothing can be measured with it."
        )


def _check_report(report: Mapping[str, Any], label: str) -> None:
    """Refuse whatever the loader could not place; known non-weights are already taken out of its report."""
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise BadWeightsError(
            f"{label}: {name} has shape {list(found)}, config.json asks for {list(expected)} "
            f"({len(report['mismatched_keys'])} such tensors). Weights and configuration do not belong together."
        )
    if report["missing_keys"]:
        raise BrokenFileError(
            f"{label}: weights are missing: {_named(report['missing_keys'])}. Get the complete model."
        )
    if report["unexpected_keys"]:
        raise BrokenFileError(
            f"{label}: weights that the architecture does not have: {_named(report['unexpected_keys'])}. "
            "The configuration does not describe this file."
        )


def _named(names: set[str]) -> str:
    ordered = sorted(names)
    more = len(ordered) - N_NAMED
    return ", ".join(ordered[:N_NAMED]) + (f" and {more} more" if more > 0 else "")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' bars and reports off the terminal, then put its switches back."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
