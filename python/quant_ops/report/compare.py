"""Measures every quantized or simulated layer beside its float original, on the very input that this sees in the float model.

A layer's figures therefore exclude the errors of the layers before it. The figures of the whole model are those of its output.
Read next: report.py, fallback.py.
"""

import contextlib
import functools
import itertools
import operator
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._models import Forward, bytes_of, call, held_bytes, quiet
from ..formats import Format
from ..nn import Int8Layer, QuantizedLayer, as_linear, is_original
from ..nn.fused import ACTIVATION_FUNCTIONS
from ..simulation.layers import SimulatedLayer
from ..simulation.operand import amax_of, blocks_of, takes_amax
from ..simulation.recast import Recast
from .error import Sums
from .report import LayerReport, Report
from .timing import interleave

Quantized = QuantizedLayer | SimulatedLayer


def compare(float_model: nn.Module, model: nn.Module, batch: Any, *, forward: Forward | None = None, repeats: int = 3) -> Report:
    """Runs both models on a batch and measures every quantized or simulated layer against its float original.

    Neither model is changed: both run in eval mode without gradients and get their modes back. Both models and each layer run
    ``1 + repeats`` times. A model with simulated layers is not timed, since a simulation's time says nothing about the formats.

    Args:
        float_model: as it was before quantization, with the same names.
        model: its quantized form.
        batch: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        forward: ``forward(model, batch)`` for models that are called in another way.
        repeats: timed runs of each quantized layer and of both models; 0 leaves the times out.

    Returns:
        A report; it keeps the float model and the batch for :func:`fallback_`.

    Raises:
        ValueError: the models do not belong together, model has no such layer, or the float model meets NaN or Inf.
        TypeError: the output holds no floating tensor.
    """
    if any(isinstance(module, SimulatedLayer) for module in model.modules()):
        repeats = 0
    with quiet(float_model), quiet(model):
        probes = Probes(float_model, model, repeats)
        with probes:
            expected = outputs(float_model, batch, forward)
        inputs: dict[str, torch.dtype] = {}
        with _watching(model, inputs):
            error, cosine = difference(expected, outputs(model, batch, forward))
        calls = {name: functools.partial(call, m, batch, forward) for name, m in (("float", float_model), ("int8", model))}
        times = _least_seconds(calls, repeats, expected[0].device)
    layers, unreached = probes.results(inputs)
    return Report(
        layers,
        unreached,
        error,
        cosine,
        float_bytes=held_bytes(float_model),
        bytes=format_bytes(model),
        float_seconds=times.get("float"),
        seconds=times.get("int8"),
        _source=(float_model, batch, forward),
    )


def _least_seconds(calls: dict[str, Any], repeats: int, device: torch.device) -> dict[str, float]:
    """The shortest of the timed runs of each; none without repeats."""
    if not repeats:
        return {}
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else None
    return {name: min(times) for name, times in interleave(calls, rounds=repeats, turn=0.0, warm=False, synchronize=wait).items()}


def outputs(model: nn.Module, batch: Any, forward: Forward | None) -> list[Tensor]:
    """The floating tensors in the model's output."""
    leaves = _floating(call(model, batch, forward))
    if not leaves:
        raise TypeError(
            "quant_ops.compare: expected floating tensors in the model's output, got none. Pass forward= to return some."
        )
    return leaves


def _floating(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def difference(expected: list[Tensor], got: list[Tensor]) -> tuple[float, float]:
    """Normalised error and cosine over all tensors."""
    if [leaf.shape for leaf in expected] != [leaf.shape for leaf in got]:
        shapes = [[tuple(leaf.shape) for leaf in leaves] for leaves in (expected, got)]
        raise ValueError(
            f"quant_ops.compare: expected outputs of the same shapes from both models, got {shapes[0]} and {shapes[1]}"
        )
    sums = Sums()
    for a, b in zip(expected, got, strict=True):
        sums.add(a, b)
    return sums.error, sums.cosine


@contextlib.contextmanager
def _watching(model: nn.Module, inputs: dict[str, torch.dtype]) -> Iterator[None]:
    """Records the dtype of each int8 layer's input."""

    def note(name: str, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        inputs[name] = (*args, *kwargs.values())[0].dtype

    handles = [
        module.register_forward_pre_hook(functools.partial(note, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, Int8Layer)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Layer(Sums):
    """One quantized or simulated layer, its float original, and the measurements so far."""

    def __init__(self, name: str, original: nn.Module, layer: Quantized) -> None:
        super().__init__()
        self.name, self.original, self.layer = name, original, layer
        self.calls = self.elements = self.clipped = 0
        self.float_seconds = self.seconds = 0.0


class Probes:
    """Measures, while it is entered, every quantized layer of ``model`` on what its original in ``float_model`` is given."""

    def __init__(self, float_model: nn.Module, model: nn.Module, repeats: int = 0) -> None:
        self.repeats = repeats
        self.layers = [_Layer(name, *pair) for name, pair in pairs("compare", float_model, model).items()]
        self._handles: list[Any] = []

    def __enter__(self) -> "Probes":
        for layer in self.layers:
            hook = functools.partial(self._measure, layer)
            self._handles.append(layer.original.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        while self._handles:
            self._handles.pop().remove()

    def _measure(self, of: _Layer, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], expected: Any) -> None:
        x = (*args, *kwargs.values())[0]
        device = _device(of.layer)
        if device != x.device:
            raise ValueError(
                f"quant_ops.compare: expected both models on one device, got {of.name!r} on {device} and its input on {x.device}"
            )
        if not all(torch.isfinite(tensor).all() for tensor in (x, *_floating(expected))):
            raise ValueError(
                f"quant_ops.compare: expected finite activations, got NaN or Inf in the float model at layer {of.name!r}"
            )
        got = of.layer(*args, **kwargs) if isinstance(of.layer, SimulatedLayer) else of.layer(x)
        of.calls += 1
        of.elements += x.numel()
        if isinstance(of.layer, SimulatedLayer):
            for a, b in zip(_floating(expected), _floating(got), strict=True):
                of.add(a, b)
            of.clipped += _beyond_amax(of.layer, x)
            return
        if isinstance(of.layer, Int8Layer):
            if of.layer.output_scale is not None:
                zero = 0 if of.layer.output_zero_point is None else of.layer.output_zero_point
                got = (got.int() - zero) * of.layer.output_scale
            expected = _activated(expected, "relu" if of.layer.relu else of.layer.activation)
            of.clipped += _saturated(of.layer, x)
        of.add(expected, got)
        if self.repeats:
            calls = {"float": functools.partial(of.original.forward, x), "int8": functools.partial(of.layer, x)}
            times = _least_seconds(calls, self.repeats, x.device)
            of.float_seconds += times["float"]
            of.seconds += times["int8"]

    def results(self, inputs: Mapping[str, torch.dtype]) -> tuple[list[LayerReport], list[str]]:
        """The reached layers and the names of the others; ``inputs`` says which dtype each has in its own model."""
        reached = [
            LayerReport(
                name=of.name,
                kind=type(of.layer).__name__,
                calls=of.calls,
                error=of.error,
                cosine=of.cosine,
                clipped=of.clipped / of.elements if of.elements else 0.0,
                float_bytes=held_bytes(of.original),
                bytes=format_bytes(of.layer),
                float_seconds=of.float_seconds if self.repeats else None,
                seconds=of.seconds if self.repeats else None,
                chained=_chained(of.layer, inputs.get(of.name)),
                simulated=isinstance(of.layer, SimulatedLayer),
            )
            for of in self.layers
            if of.calls
        ]
        return reached, [of.name for of in self.layers if not of.calls]


def pairs(op: str, float_model: nn.Module, model: nn.Module) -> dict[str, tuple[nn.Module, Quantized]]:
    """Name, float original and quantized layer, of all quantized and simulated layers of ``model``."""
    modules = dict(float_model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[nn.Module, Quantized]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Quantized):
            continue
        original = modules.get(name)
        if original is None or not _is_original(original, layer):
            kind = layer.float_class.__name__
            wanted = f"{'an' if kind[0] == 'E' else 'a'} {kind} of weight {_shape_of(layer)}"
            shape = _shape_of(original)
            got = "nothing" if original is None else type(original).__name__ + (f" of weight {shape}" if shape else "")
            raise ValueError(f"quant_ops.{op}: expected {name!r} of the float model to be {wanted}, got {got}")
        found[name] = original, layer
    if not found:
        raise ValueError(
            f"quant_ops.{op}: expected a quantized model, got one without int8 or simulated layers. Call quantize_ or convert_ "
            "first."
        )
    return found


def _is_original(module: nn.Module, layer: Quantized) -> bool:
    """Whether the quantized layer may have been made of the module."""
    if isinstance(layer, SimulatedLayer):
        return isinstance(module, layer.float_class) and not isinstance(module, Recast) and _shapes(module) == _shapes(layer)
    return is_original(module, type(layer)) and as_linear(module).weight.shape == layer.weight.shape


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in module.named_parameters()}


def _shape_of(module: nn.Module | None) -> tuple[int, ...] | None:
    """Of the weight, for messages; of a recurrent cell that of its first one."""
    for name in ("weight", "weight_ih", "in_proj_weight"):
        if (weight := getattr(module, name, None)) is not None:
            return tuple(weight.shape)
    return None


def _device(layer: Quantized) -> torch.device:
    return next(layer.parameters()).device if isinstance(layer, SimulatedLayer) else layer.device


def _saturated(layer: Int8Layer, x: Tensor) -> int:
    """How many elements of an int8 layer's input its static scale saturates."""
    if layer.input_scale is None:
        return 0
    scale, zero_point = (_now(layer, values) for values in (layer.input_scale, layer.input_zero_point))
    x, multiplier = x.float(), layer._buffers.get("input_multiplier")
    codes = torch.round((x if multiplier is None else x * multiplier) / scale) + (0 if zero_point is None else zero_point)
    return int(((codes < -128) | (codes > 127)).sum())


def _beyond_amax(layer: SimulatedLayer, x: Tensor) -> int:
    """How many elements of a simulated layer's input are larger than its calibrated amax."""
    amax, per, layout = layer.amax_input, layer.config.input_per, layer.input_layout
    if amax is None or not takes_amax(layer.config.input) or not x.is_floating_point():
        return 0
    x = layer._taken(x).abs()
    if isinstance(per, int):
        x = blocks_of(x, layout.summed, per)
    elif per == "channel" and amax.dim() == 1:
        x = x.movedim(layout.channel, -1)
    return int((x > amax).sum())


def format_bytes(model: nn.Module) -> int:
    """Memory that the model's tensors would hold with the weights of simulated layers in their formats.

    A weight has the format's average bits an element, and four bytes for each scale that is not counted among them. Where there
    is a function in place of a format, or none, and for what is no weight, it is the memory that is held.
    """
    weights: dict[Any, float] = {}  # a weight that several layers share counts once for each of its formats
    others: list[Tensor] = []
    parts: set[nn.Module] = set()  # of simulated layers, such as the last projection of attention
    for module in model.modules():
        if module in parts:
            continue
        left_out: set[int] = set()
        if isinstance(module, SimulatedLayer):
            parts.update(module.modules())
            rounded = [name for name in module._buffers if name.startswith("rounded_") or name == "amax_weight"]
            left_out = {id(module._buffers[name]) for name in rounded}
            for weight in (operator.attrgetter(name)(module) for name in module.weights):
                if isinstance(module.config.weight, Format) and weight is not None:
                    weights[id(weight), module.config.weight, module.config.weight_per] = _weight_bytes(module, weight)
                    left_out.add(id(weight))
        whole = module in parts
        own = itertools.chain(module.parameters(recurse=whole), module.buffers(recurse=whole))
        others += [tensor for tensor in own if id(tensor) not in left_out]
    return bytes_of(others) + round(sum(weights.values()))


def _weight_bytes(layer: SimulatedLayer, weight: Tensor) -> float:
    format, per = layer.config.weight, layer.config.weight_per
    assert isinstance(format, Format)
    scales = amax_of(weight, layer.weight_layout, per).numel() if format.takes_amax else 0
    return weight.numel() * format.bits / 8 + 4 * scales


def _activated(y: Tensor, activation: str | None) -> Tensor:
    return y if activation is None else ACTIVATION_FUNCTIONS[activation](y)


def _now(layer: Int8Layer, values: Tensor | None) -> Any:
    """The current step's value of scales that differ by step."""
    step = layer._buffers.get("timestep")
    return values if values is None or step is None else values[step]


def _chained(layer: Quantized, input_dtype: torch.dtype | None) -> str:
    if not isinstance(layer, Int8Layer):
        return ""
    if layer.output_scale is not None:
        return "it gives int8 to the next layer"
    if layer.relu:
        return "it has a fused ReLU"
    if layer.activation is not None:
        return f"it has a fused {layer.activation}"
    return "it takes int8 from the layer before" if input_dtype in (torch.int8, torch.uint8) else ""
