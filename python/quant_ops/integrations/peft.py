"""peft: LoRA around quantized linear layers. Importing this module registers them; then peft's own calls work.

    import quant_ops.integrations.peft
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj", "v_proj"]))

peft chooses the class of an adapter by that of the target, and knows the float classes and those of some packages. Its hook for
others (``LoraConfig._register_custom_module``) belongs to one config and is lost when an adapter is saved, so the choice itself is
extended here. Files of adapters are peft's own and hold nothing of the quantized weights. Read first: nn/base.py.
"""

from typing import Any, NoReturn

from torch import nn

from ..nn import QuantizedLayer, QuantLinear, WeightOnlyLinear

try:
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel
    from peft.tuners.lora import model as _model
    from peft.tuners.lora.layer import Linear, LoraVariant
    from peft.tuners.tuners_utils import BaseTunerLayer

    _create, _device_map = LoraModel._create_new_module, _model.get_device_map
except (ImportError, AttributeError) as error:
    raise ImportError(
        f"quant_ops.integrations.peft: expected peft >= 0.21, got: {error}. Install it with pip install 'peft>=0.21'."
    ) from error

_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")  # those that leave the base weight alone


class QuantizedLora(Linear):
    """An adapter around a :class:`QuantLinear` or :class:`WeightOnlyLinear`: ``base(x) + lora_B(lora_A(x)) * scaling``.

    It is peft's adapter of an nn.Linear in everything but merging, which is refused: codes of 8 or 4 bits would round most of the
    adapter away. Without the adapter (``unload``, ``disable_adapter``) the layer computes the bits that it did before.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: LoraConfig, **kwargs: Any) -> None:
        """Arguments are peft's.

        Raises:
            ValueError: the layer is without ``backward=True`` and the adapter is to be trained, has a fused ReLU, or the config
                asks for a variant or an initialization that reads or changes the base weight.
        """
        layer: Any = base_layer.get_base_layer() if isinstance(base_layer, BaseTunerLayer) else base_layer
        _check(layer, config)
        super().__init__(base_layer, adapter_name, config, **kwargs)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        """Adds an adapter, or replaces one; see peft. Errors as in the constructor."""
        _check(self.get_base_layer(), config)
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        """Plain LoRA alone."""
        return {(): None}

    def resolve_lora_variant(self, *, config: LoraConfig, **kwargs: Any) -> None:
        """Raises ValueError for a config of another variant than plain LoRA."""
        try:
            super().resolve_lora_variant(config=config, **kwargs)
        except ValueError as error:
            _refuse(f"plain LoRA of a quantized layer, got: {error}. Leave out use_dora and other variants.")

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> NoReturn:
        """Raises ValueError."""
        _refuse(
            "no merge into a quantized layer, whose codes would round most of the adapter away. Keep the adapter beside it, or "
            "merge into the float model and quantize that."
        )

    def __repr__(self) -> str:
        return f"quant_ops.{nn.Module.__repr__(self)}"


def _check(layer: QuantizedLayer, config: LoraConfig) -> None:
    if not layer.backward and not config.inference_mode:
        _refuse(
            f"layers with backward=True, got a {type(layer).__name__} without, through which no gradient reaches the adapters "
            "before it. Quantize with backward=True in the config, or set layer.backward = True in every quantized layer."
        )
    if getattr(layer, "relu", False):
        _refuse(f"a layer without a fused ReLU, got a {type(layer).__name__} with relu=True, before which no adapter can add.")
    if (activation := getattr(layer, "activation", None)) is not None:
        _refuse(
            f"a layer without a fused activation, got a {type(layer).__name__} with activation={activation!r}, before which no "
            "adapter can add."
        )
    if config.init_lora_weights not in _INITIALIZATIONS:
        _refuse(
            f"init_lora_weights in {_INITIALIZATIONS}, got {config.init_lora_weights!r}, which changes the base weight. Leave it "
            "out."
        )


def _refuse(sentence: str) -> NoReturn:
    raise ValueError(f"quant_ops.integrations.peft: expected {sentence}")


def _create_new_module(lora_config: LoraConfig, adapter_name: str, target: nn.Module, **kwargs: Any) -> Any:
    """peft's choice of an adapter's class, extended by the quantized layers."""
    layer: Any = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if not isinstance(layer, QuantizedLayer):
        return _create(lora_config, adapter_name, target, **kwargs)
    if not isinstance(layer, QuantLinear | WeightOnlyLinear) or kwargs.get("parameter_name") is not None:
        _refuse(f"linear layers as targets, got a {type(layer).__name__}. Leave it out of target_modules.")
    return QuantizedLora(target, adapter_name, config=lora_config, **kwargs)


def _get_device_map(model: nn.Module) -> Any:
    """peft's, which looks at the first parameter; a model of quantized layers alone has none."""
    layer = next((module for module in model.modules() if isinstance(module, QuantizedLayer)), None)
    if layer is None or next(model.parameters(), None) is not None:
        return _device_map(model)
    return {"": layer.device}


LoraModel._create_new_module = staticmethod(_create_new_module)
_model.get_device_map = _get_device_map
