"""transformers: ``from_pretrained(..., quantization_config=QuantOpsConfig(...))``, and ``save_pretrained`` of quantized models.

Importing this module registers quantizer and config under the name "quant_ops". What the calls of the package do to a
``PreTrainedModel`` (``quantize_``, ``convert_``, ``load_`` and the others) they leave with the model through :func:`attach`. Read
first: checkpoint.py.
"""

import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.select import ConversionResult, tell_library
from ..convert.workflow import form_of
from ..nn import QuantizedLayer
from ..ops import int8_attention
from .checkpoint import (
    Checkpoint,
    CheckpointConfig,
    LibraryQuantizer,
    Method,
    OnTheFly,
    check_finished,
    dequantized_,
    described,
    state_of,
)

try:
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
    from transformers.core_model_loading import ConversionOps
    from transformers.masking_utils import sdpa_mask
    from transformers.quantizers import HfQuantizer
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"quant_ops.integrations.transformers: expected transformers >= 5, got: {error} Install it with pip install "
        "'transformers>=5'."
    ) from error


@register_quantization_config(Method.QUANT_OPS.value)
class QuantOpsConfig(CheckpointConfig, QuantizationConfigMixin):
    """What ``from_pretrained`` of transformers is to quantize: ``quantization_config=QuantOpsConfig(Int8Dynamic())``.

    See :class:`~quant_ops.integrations.checkpoint.CheckpointConfig` for the arguments and errors. A dictionary
    ``{"quant_method": "quant_ops", "config": {"config": "Int8Dynamic"}}`` does the same, and a mapping is a list of pairs there.
    """


@register_quantizer(Method.QUANT_OPS.value)
class QuantOpsQuantizer(LibraryQuantizer, HfQuantizer):
    """transformers' side of the package; it is the attribute ``hf_quantizer`` of a quantized model.

    Attributes:
        result: what ``from_pretrained`` with a QuantOpsConfig has converted, and what it left float and why.
    """

    result: ConversionResult | None = None
    _reader: Checkpoint | OnTheFly | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device_map whose parts accelerate would have to move in every call."""
        self._check_device_map(device_map, "device_map='cpu'")

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, where = self.quantization_config, model.config.name_or_path
        self._check_is_float(where)
        self.pre_quantized = config.is_saved  # a config.json may also say what is to be quantized
        tied = model.all_tied_weights_keys
        if not self.pre_quantized:
            for target, source in tied.items():  # transformers does it after loading, but the result is to tell of it
                owner, _, attribute = target.rpartition(".")
                model.get_submodule(owner)._parameters[attribute] = model.get_parameter(source)
            self._reader = OnTheFly("from_pretrained", model, config, tied={*tied, *tied.values()})
            return
        self._reader = Checkpoint(model, config.saved, where, model.dtype, model.base_model_prefix)
        for name in [name for pair in tied.items() for name in pair]:
            if name.rpartition(".")[0] in self._reader.awaited:
                model.all_tied_weights_keys = {a: b for a, b in model.all_tied_weights_keys.items() if name not in (a, b)}

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this parameter is that of a float layer which is quantized as soon as it is read."""
        return isinstance(self._reader, OnTheFly) and self._reader.takes(param_name)

    def get_quantize_ops(self) -> Any:
        """What transformers calls with such a parameter."""
        return _Quantize(self)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes that an element will take, for device_map="auto"."""
        size = param.element_size()
        if isinstance(self._reader, OnTheFly) and param.dim() > 1:
            for module, place in self._reader.places.items():
                if module._parameters.get("weight") is param:
                    return {"int4": 0.5}.get(form_of(place.config), 1)
        return size

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        reader, self._reader = self._reader, None
        vars(model).pop("is_quantized", None)  # because of which transformers refuses .half() and .float()
        if isinstance(reader, Checkpoint):
            reader.finish()
        elif reader is not None:
            self.result = reader.finish()

    def get_state_dict_and_metadata(self, model: Any) -> Any:
        """Of save_pretrained, before config.json is written: what is quantized at this time is written there."""
        saved = described(model)
        if saved is None:
            attach(model)
            return None, {}
        check_finished(model)
        model.config.quantization_config = QuantOpsConfig(**saved)
        return state_of(model, saved), {}

    def _dequantize(self, model: Any, dtype: torch.dtype | str | None = None) -> Any:
        """The float model of the values that this one computes with."""
        dequantized_(model, getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        tell_library(model)
        model.tie_weights()
        return model

    def is_serializable(self) -> bool:
        """save_pretrained writes the quantized weights."""
        return True


class _Quantize(ConversionOps):
    """The operation of the loader that quantizes a layer."""

    def __init__(self, quantizer: QuantOpsQuantizer) -> None:
        self._quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], *args: Any, missing_keys: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        rest, reader = {}, self._quantizer._reader
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            if not isinstance(reader, OnTheFly) or not reader.takes(name):
                rest[name] = value
                continue
            reader.take(name, value)
            if missing_keys is not None:
                missing_keys.discard(name)
        return rest


# ---- attention -----------------------------------------------------------------------------------------------------------


def int8_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What ``model.set_attn_implementation("quant_ops")`` has every layer call: :func:`~quant_ops.int8_attention`.

    For encoders on the CPU. Where a few tokens meet many, as in generation, k and v are quantized again in every call.

    Raises:
        ValueError: dropout, or the soft limit of scores of some models, which the operator does not have.
    """
    if dropout or kwargs.get("softcap") is not None:
        got = f"dropout {dropout}" if dropout else "a softcap"
        raise ValueError(
            f"quant_ops.int8_attention: expected attention without dropout and softcap, got {got}. Call model.eval() or "
            "model.set_attn_implementation('eager')."
        )
    rows = query.shape[2]
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = rows > 1 and attention_mask is None and is_causal
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal), False
    result = int8_attention(query, key, value, attention_mask, causal, scaling)
    return result.transpose(1, 2), None


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    if causal:
        mask = torch.ones(bias.shape[-2:], dtype=torch.bool, device=bias.device).tril()
    if mask is None:
        return bias
    return bias.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else bias + mask


AttentionInterface.register("quant_ops", int8_attention_forward)
AttentionMaskInterface.register("quant_ops", sdpa_mask)


# ---- models that were quantized in memory --------------------------------------------------------------------------------


def attach(model: nn.Module) -> None:
    """Brings what transformers knows of its models in a module up to date: what is quantized now, and which weights are tied.

    The calls of the package do this. Call it after replacing layers by hand.
    """
    models = {name: module for name, module in model.named_modules() if isinstance(module, PreTrainedModel)}
    for name, module in models.items():
        quantizer = module.__dict__.get("hf_quantizer")
        if quantizer is not None and not isinstance(quantizer, QuantOpsQuantizer):
            continue  # of another package
        inner = any(name.startswith(f"{other}.") or other == "" for other in models if other != name)
        saved = described(module)
        if saved is None:
            _forget(module)
            continue
        if quantizer is None:
            module.hf_quantizer = quantizer = QuantOpsQuantizer(QuantOpsConfig(**saved), pre_quantized=True)
            module.quantization_method = Method.QUANT_OPS
        quantizer.quantization_config = QuantOpsConfig(**saved)
        if not inner:  # a model and its base often have one config
            module.config.quantization_config = quantizer.quantization_config
        _leave_tied(module)
        if any(isinstance(layer, QuantizedLayer) for layer in _vocabulary(module)):
            module.resize_token_embeddings = _Resize(module)
        else:
            vars(module).pop("resize_token_embeddings", None)


def _forget(model: Any) -> None:
    """Leaves a model as one that was never quantized."""
    if "hf_quantizer" not in vars(model):
        return
    del model.hf_quantizer
    for name in ("quantization_method", "resize_token_embeddings", "_tied_weights_keys"):
        vars(model).pop(name, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    if isinstance(getattr(model.config, "quantization_config", None), QuantOpsConfig):
        del model.config.quantization_config


def _leave_tied(model: Any) -> None:
    """Takes the weights of quantized layers out of those that ``tie_weights`` makes one parameter."""

    def is_float(name: str) -> bool:
        owner = name.rpartition(".")[0]
        try:
            return not isinstance(model.get_submodule(owner), QuantizedLayer)
        except AttributeError:  # a pattern
            return True

    def kept(pairs: Any) -> Any:
        return pairs and {a: b for a, b in pairs.items() if is_float(a) and is_float(b)}

    vars(model).pop("_tied_weights_keys", None)
    if kept(model._tied_weights_keys) != model._tied_weights_keys:
        model._tied_weights_keys = kept(model._tied_weights_keys)
    model.all_tied_weights_keys = kept(getattr(model, "all_tied_weights_keys", {}))


def _vocabulary(model: Any) -> list[Any]:
    """The layers whose sizes are that of the vocabulary."""
    found = []
    for get in (model.get_input_embeddings, model.get_output_embeddings):
        try:
            found.append(get())
        except (NotImplementedError, AttributeError):  # of a model without one
            continue
    return found


class _Resize:
    """In place of ``resize_token_embeddings`` of a model whose embeddings or head are quantized."""

    def __init__(self, model: Any) -> None:
        self._model: Callable[[], Any] = weakref.ref(model)

    def __call__(self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *args: Any, **kwargs: Any) -> Any:
        model = self._model()
        size = len(model.get_input_embeddings().weight)
        if new_num_tokens not in (None, size) or pad_to_multiple_of not in (None, 1):
            raise ValueError(
                f"quant_ops.resize_token_embeddings: expected embeddings and head that are not quantized, or {size} tokens as now, "
                f"got {new_num_tokens}. Resize the float model and quantize that, or exclude its embeddings and its head."
            )
        return model.get_input_embeddings()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Resize":
        return _Resize(memo.get(id(self._model()), self._model()))

    def __reduce__(self) -> Any:
        return functools.partial, (_refuse_resize_of,)


def _refuse_resize_of(*args: Any, **kwargs: Any) -> None:
    """Of a model that was pickled: as above, for any size."""
    raise ValueError(
        "quant_ops.resize_token_embeddings: expected embeddings and head that are not quantized. Resize the float model and "
        "quantize that, or exclude its embeddings and its head."
    )
