"""Static calibration: ``calibrate_inputs`` and ``calibrate_weights`` leave ``amax_input`` and ``amax_weight`` with float layers.

They are buffers, the largest magnitudes that shall be represented, so that one calibration serves formats of any number of bits.
``replace_layers`` keeps them.
"""

import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import quant_ops as qo

from ..._models import call, evaluating
from ...nn import ScaledLinear, TransposedLinear
from ...nn.scaled import multiplied
from ...observers import Observer
from ...simulation.layers import SimulatedLayer

__all__ = ["calibrate_inputs", "calibrate_weights"]

_log = logging.getLogger("quant_ops")
_METHODS = {"max": "minmax", "percentile": "percentile", "mse": "mse", "entropy": "entropy"}
_CHANNEL_SECOND = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, TransposedLinear)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_CHANNEL_SECOND)
_CHANNELS_AT_ONCE = 1024  # histograms of more would take gigabytes for the vocabulary of a language model


def calibrate_inputs(
    model: nn.Module,
    num_bits: int,
    dataloader: Iterable[Any],
    unsigned: bool = False,
    num_samples: int = 5,
    batch_process_func: Callable[[nn.Module, Any], Any] | None = None,
    method: str = "max",
    percentile: float = 99.99,
) -> None:
    """Runs the model on data, in eval mode and without gradients, and gives each layer an ``amax_input``.

    Layers are Linear, Conv1d to Conv3d, ConvTranspose1d to ConvTranspose3d and transformers' Conv1D, float ones or those that
    ``replace_layers`` has made. The model's modes and hooks are afterwards what they were, also after an exception, which leaves
    no amax. A batch that holds NaN or Inf at the input of a layer is not observed there. Warnings name the layers of which this is
    true, those that no data has reached, which stay as they are, and those whose input was always 0.

    Args:
        num_bits: of the integers for which "mse" and "entropy" look for the best amax, 2 to 24.
        dataloader: batches. A tensor is the model's argument, a tuple or list are its arguments, and a mapping its keyword
            arguments. Tensors go to the model's device if its parameters are all on one.
        unsigned: whether those integers are unsigned.
        num_samples: at most so many batches.
        batch_process_func: called as ``batch_process_func(model, batch)`` instead of the model; batches stay where they are.
        method: "max", "percentile", "mse" or "entropy".
        percentile: percent of the magnitudes that are not clipped, for "percentile".

    Raises:
        TypeError: dataloader is one tensor or mapping.
        ValueError: another method, no batch, no layers, no data at any layer, or another number of bits or samples.
    """
    settings = _settings("calibrate_inputs", num_bits, unsigned, method, percentile)
    if num_samples < 1:
        raise ValueError(f"quant_ops.calibrate_inputs: expected num_samples >= 1, got {num_samples}")
    if isinstance(dataloader, Tensor | Mapping):
        raise TypeError(
            f"quant_ops.calibrate_inputs: expected an iterable of batches, got one {type(dataloader).__name__}. Write [batch]."
        )
    layers = _layers("calibrate_inputs", model)
    observers: dict[str, Observer] = {}

    def watch(name: str) -> Callable[..., None]:
        def observe(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for x in (*args, *kwargs.values())[:1]:
                if name not in observers:
                    observers[name] = _observer(settings, x.device)
                observers[name](multiplied(x, layer.input_multiplier) if isinstance(layer, ScaledLinear) else x)

        return observe

    handles = [layer.register_forward_pre_hook(watch(name), prepend=True, with_kwargs=True) for name, layer in layers.items()]
    batches = 0
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # torch's encoders would call no layer
    try:
        with torch.inference_mode(False), evaluating(model):
            for batch in dataloader:
                call(model, batch if batch_process_func is not None else _on_device_of(model, batch), batch_process_func)
                batches += 1
                if batches == num_samples:
                    break
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for handle in handles:
            handle.remove()
    if batches == 0:
        raise ValueError(
            "quant_ops.calibrate_inputs: expected calibration data, got no batch. An iterator is empty after its first use."
        )
    found = {name: observer for name, observer in observers.items() if not observer.empty}
    if not found:
        got = "NaN or Inf in every batch" if observers else f"none in {batches} batches"
        raise ValueError(f"quant_ops.calibrate_inputs: expected data at the layers' inputs, got {got}")
    for name, observer in found.items():
        _attach(layers[name], "amax_input", observer.amax())
    _warn(layers, observers)
    _log.info("calibrated the inputs of %d layers with %d batches by %s", len(found), batches, method)


def _warn(layers: dict[str, nn.Module], observers: dict[str, Observer]) -> None:
    """Names the layers for which the calibration means less than it seems to."""
    left_out = {name: observer.batches_left_out for name, observer in observers.items()}
    for expected, got, named in (
        ("data at the input of every layer", "none, so that no amax is attached, at", [n for n in layers if n not in observers]),
        (
            "finite inputs",
            "batches with NaN or Inf, which were left out, at",
            [f"{name} ({count})" for name, count in left_out.items() if count],
        ),
        (
            "inputs other than 0",
            "nothing else, and an amax of 0, at",
            [name for name, observer in observers.items() if not observer.empty and observer.only_zeros],
        ),
    ):
        if named:
            shown = ", ".join(name or "the model itself" for name in named)
            warnings.warn(f"quant_ops.calibrate_inputs: expected {expected}, got {got} {shown}", stacklevel=3)


def calibrate_weights(
    model: nn.Module,
    num_bits: int,
    unsigned: bool,
    method: str = "max",
    perchannel: bool = False,
    percentile: float = 99.99,
    num_bins: int = 2048,
) -> None:
    """Gives each layer an ``amax_weight``.

    Args:
        num_bits, unsigned, method, percentile: as in :func:`calibrate_inputs`, which also says what layers are.
        perchannel: an amax for each output channel, in the shape that broadcasts to the weight.
        num_bins: accepted and ignored: histograms have 2048 to 4096 bins.

    Raises:
        ValueError: another method, no layers, another number of bits, or a weight with NaN or Inf or without data; no amax is
            attached then.
    """
    settings = _settings("calibrate_weights", num_bits, unsigned, method, percentile)
    layers = _layers("calibrate_weights", model)
    found: dict[str, Tensor] = {}
    with torch.inference_mode(False), torch.no_grad():
        for name, layer in layers.items():
            weight: Any = layer.weight
            shown = repr(name) if name else "the model itself"
            if nn.parameter.is_lazy(weight) or weight.is_meta:
                raise ValueError(f"quant_ops.calibrate_weights: expected weights with data, got one without, in layer {shown}")
            if not torch.isfinite(weight).all():
                raise ValueError(f"quant_ops.calibrate_weights: expected finite weights, got NaN or Inf, in layer {shown}")
            axis = int(isinstance(layer, _CHANNEL_SECOND)) if perchannel else None
            parts = (weight,) if axis is None else weight.split(_CHANNELS_AT_ONCE, axis)
            of_parts = [_amax_of(settings, part, axis) for part in parts]
            found[name] = of_parts[0] if axis is None else torch.cat(of_parts, axis)
    for name, amax in found.items():
        _attach(layers[name], "amax_weight", amax)
    _log.info("calibrated the weights of %d layers by %s", len(found), method)


def _amax_of(settings: dict[str, Any], weight: Tensor, axis: int | None) -> Tensor:
    observer = _observer(settings, weight.device, axis)
    observer(weight)
    return observer.amax()


def _settings(function: str, num_bits: int, unsigned: bool, method: str, percentile: float) -> dict[str, Any]:
    """What the observers are made with: their name and the arguments."""
    name = _METHODS.get(method.lower()) if isinstance(method, str) else None
    if name is None:
        raise ValueError(f"quant_ops.{function}: expected method to be one of {sorted(_METHODS)}, got {method!r}")
    if not 50 < percentile <= 100:
        raise ValueError(f"quant_ops.{function}: expected 50 < percentile <= 100, got {percentile}")
    settings = {"name": name, "format": qo.IntFormat(num_bits, signed=not unsigned)}
    return {**settings, "percentile": percentile} if name == "percentile" else settings


def _observer(settings: dict[str, Any], device: torch.device, axis: int | None = None) -> Observer:
    arguments = {key: value for key, value in settings.items() if key != "name"}
    return Observer.kinds[settings["name"]](axis=axis, device=device, **arguments)


def _layers(function: str, model: nn.Module) -> dict[str, nn.Module]:
    """The layers with a float weight; those of nn.MultiheadAttention are never called, and have no amax."""
    modules = dict(model.named_modules())
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in modules.items()
        if isinstance(module, _LAYERS)
        and module.weight.is_floating_point()
        and not (name and isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention))
    }
    if not layers:
        kinds = ", ".join(kind.__name__ for kind in _LAYERS[:4])
        raise ValueError(f"quant_ops.{function}: expected a model with layers ({kinds}, ...), got none in {type(model).__name__}")
    return layers


def _on_device_of(model: nn.Module, batch: Any) -> Any:
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) != 1:
        return batch
    (device,) = devices
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def _attach(layer: nn.Module, name: str, amax: Tensor) -> None:
    weight: Any = layer.weight
    with torch.inference_mode(False):
        amax = amax.detach().to(weight.device, copy=True)
    vars(layer).pop(name, None)
    layer.register_buffer(name, amax)
    if isinstance(layer, SimulatedLayer):
        layer.keep_weights(layer.kept_weights)  # a weight that is rounded already has another amax
