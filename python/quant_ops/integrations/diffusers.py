"""diffusers: ``from_pretrained(..., quantization_config=QuantOpsConfig(...))`` of models and pipelines, and ``save_pretrained``.

Importing this module registers quantizer and config under the name "quant_ops", with transformers too, whose models are the text
encoders of pipelines. What the calls of the package do to a ``ModelMixin`` they leave with the model through :func:`attach`. Read
first: checkpoint.py.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.select import ConversionResult, tell_library
from .checkpoint import Checkpoint, CheckpointConfig, LibraryQuantizer, Method, OnTheFly, dequantized_, described, repeated

try:
    from diffusers.configuration_utils import FrozenDict
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin
except ImportError as error:
    raise ImportError(
        f"quant_ops.integrations.diffusers: expected diffusers >= 0.36, got: {error} Install it with pip install 'diffusers>=0.36'."
    ) from error

with contextlib.suppress(ImportError):  # pipelines without text encoders do without it
    from . import transformers  # noqa: F401


class QuantOpsConfig(CheckpointConfig, QuantizationConfigMixin):
    """What ``from_pretrained`` of diffusers is to quantize: ``quantization_config=QuantOpsConfig(Int8Dynamic())``.

    For a pipeline: ``PipelineQuantizationConfig(quant_mapping={"unet": QuantOpsConfig(Int8Dynamic())})``, also for text encoders.
    See :class:`~quant_ops.integrations.checkpoint.CheckpointConfig` for the arguments and errors.
    """


class QuantOpsQuantizer(LibraryQuantizer, DiffusersQuantizer):
    """diffusers' side of the package; it is the attribute ``hf_quantizer`` of a quantized model.

    Attributes:
        result: what ``from_pretrained`` with a QuantOpsConfig has converted, and what it left float and why.
    """

    use_keep_in_fp32_modules = True
    result: ConversionResult | None = None
    repeated: tuple[str, ...] = ()  # names in the state_dict of tensors that it has under another name
    _reader: Checkpoint | OnTheFly | None = None
    _dtype: torch.dtype | None = None

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for a device_map whose parts accelerate would have to move in every call."""
        self._check_device_map(device_map, "one device")

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Takes the wanted dtype as it is."""
        self._dtype = torch_dtype
        return torch_dtype

    def adjust_target_dtype(self, torch_dtype: torch.dtype) -> torch.dtype:
        """For device_map="auto": what most weights will be."""
        return torch.int8

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> None:
        config, where = self.quantization_config, getattr(model.config, "_name_or_path", None) or type(model).__name__
        self._check_is_float(where)
        self.pre_quantized = config.is_saved
        if config.is_saved:
            self._reader = Checkpoint(model, config.saved, where, self._dtype or model.dtype)
        else:
            self._reader = OnTheFly("from_pretrained", model, config)

    def check_if_quantized_param(self, model: Any, param_value: Tensor, param_name: str, state_dict: Any, **kwargs: Any) -> bool:
        """Whether the tensor is that of a layer which is, or is to be, quantized."""
        return self._reader is not None and self._reader.takes(param_name)

    def create_quantized_param(
        self, model: Any, param_value: Tensor, param_name: str, target_device: Any, state_dict: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """What diffusers calls with such a tensor. Those of quantized layers keep the dtype that they have in the file."""
        assert self._reader is not None
        value = state_dict[param_name] if isinstance(self._reader, Checkpoint) else param_value
        self._reader.take(param_name, value.to(target_device))

    @property
    def supports_parallel_loading(self) -> bool:
        """Layers are made one after the other."""
        return False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        reader, self._reader = self._reader, None
        vars(model).pop("is_quantized", None)  # because of which diffusers refuses .half() and .to(dtype)
        if isinstance(reader, Checkpoint):
            reader.finish()
        elif reader is not None:
            self.result = reader.finish()
        made = vars(model).get("hf_quantizer")  # of attach
        if isinstance(made, QuantOpsQuantizer):
            self.quantization_config, self.repeated = made.quantization_config, made.repeated
        return model

    def get_state_dict_and_metadata(self, state_dict: dict[str, Any], safe_serialization: bool = False) -> Any:
        """Of save_pretrained, when config.json has been written."""
        repeated = set(self.repeated)
        state = {name: tensor for name, tensor in state_dict.items() if name not in repeated}
        known = {f"{name}.qweight" for entry in self.quantization_config.saved["layers"] for name in entry["names"]}
        known -= repeated
        if found := known ^ {name for name in state if name.rpartition(".")[2] == "qweight"}:
            raise ValueError(
                f"quant_ops.save_pretrained: expected the layers that quant_ops has quantized, got others: {min(found)!r}. Call "
                "quant_ops.integrations.diffusers.attach(model) after layers were replaced by hand."
            )
        return state, {}

    def _dequantize(self, model: Any) -> Any:
        """The float model of the values that this one computes with."""
        dequantized_(model)
        tell_library(model)
        model.hf_quantizer = self  # which diffusers deletes afterwards
        return model

    @property
    def is_serializable(self) -> bool:
        """save_pretrained writes the quantized weights."""
        return True


AUTO_QUANTIZATION_CONFIG_MAPPING[Method.QUANT_OPS.value] = QuantOpsConfig
AUTO_QUANTIZER_MAPPING[Method.QUANT_OPS.value] = QuantOpsQuantizer


def attach(model: nn.Module) -> None:
    """Brings what diffusers knows of its models in a module up to date.

    The calls of the package do this. Call it after replacing layers by hand.
    """
    for module in model.modules():
        if not isinstance(module, ModelMixin):
            continue
        quantizer = vars(module).get("hf_quantizer")
        if quantizer is not None and not isinstance(quantizer, QuantOpsQuantizer):
            continue  # of another package
        saved = described(module)
        if saved is None:
            _forget(module)
            continue
        if quantizer is None:
            module.hf_quantizer = quantizer = QuantOpsQuantizer(QuantOpsConfig(**saved), pre_quantized=True)
            module.quantization_method = Method.QUANT_OPS
        quantizer.quantization_config = QuantOpsConfig(**saved)
        quantizer.repeated = tuple(repeated(module, saved))
        module.register_to_config(quantization_config=quantizer.quantization_config)


def _forget(model: Any) -> None:
    """Leaves a model as one that was never quantized."""
    if "hf_quantizer" not in vars(model):
        return
    del model.hf_quantizer
    vars(model).pop("quantization_method", None)
    model._internal_dict = FrozenDict({name: value for name, value in model.config.items() if name != "quantization_config"})
