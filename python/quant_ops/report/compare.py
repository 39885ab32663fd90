"""Measures every int8 layer beside its float original, on the very input that the original sees in the float model.

A layer's figures therefore exclude the errors of the layers before it. The figures of the whole model are those of its output.
Read next: report.py, fallback.py.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .._models import Forward, call, evaluating, held_bytes
from ..nn import INT8_LAYERS, Int8Layer, as_linear, exact_class
from .error import Sums
from .report import LayerReport, Report
from .timing import interleave


def compare(float_model: nn.Module, model: nn.Module, batch: Any, *, forward: Forward | None = None, repeats: int = 3) -> Report:
    """Runs both models on a batch and measures every int8 layer against its float original.

    Neither model is changed: both run in eval mode without gradients and get their modes back. Both models and each layer run
    ``1 + repeats`` times.

    Args:
        float_model: as it was before quantization, with the same names.
        model: its quantized form.
        batch: a tensor, a tuple or list of positional arguments, or a dict of keyword arguments.
        forward: ``forward(model, batch)`` for models that are called in another way.
        repeats: timed runs of each layer and of both models; 0 leaves the times out.

    Returns:
        A report; it keeps the float model and the batch for :func:`fallback_`.

    Raises:
        ValueError: the models do not belong together, model has no int8 layer, or the float model meets NaN or Inf.
        TypeError: the output holds no floating tensor.
    """
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
        bytes=held_bytes(model),
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
    leaves = [leaf for leaf in tree_leaves(call(model, batch, forward)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    if not leaves:
        raise TypeError(
            "quant_ops.compare: expected floating tensors in the model's output, got none. Pass forward= to return some."
        )
    return leaves


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
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, and no fused encoder path, which would not call its layers. Every module gets its mode back."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with evaluating(model):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


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
    """One int8 layer, its float original, and the measurements so far."""

    def __init__(self, name: str, original: nn.Module, layer: Int8Layer) -> None:
        super().__init__()
        self.name, self.original, self.layer = name, original, layer
        self.calls = self.elements = self.clipped = 0
        self.float_seconds = self.seconds = 0.0


class Probes:
    """Measures, while it is entered, every int8 layer of ``model`` on what its original in ``float_model`` is given."""

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

    def _measure(self, of: _Layer, _: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor], expected: Tensor) -> None:
        (x,) = (*args, *kwargs.values())
        device = of.layer.weight.device
        if device != x.device:
            raise ValueError(
                f"quant_ops.compare: expected both models on one device, got {of.name!r} on {device} and its input on {x.device}"
            )
        if not (torch.isfinite(x).all() and torch.isfinite(expected).all()):
            raise ValueError(
                f"quant_ops.compare: expected finite activations, got NaN or Inf in the float model at layer {of.name!r}"
            )
        got = of.layer(x)
        if of.layer.output_scale is not None:
            zero = 0 if of.layer.output_zero_point is None else of.layer.output_zero_point
            got = (got.int() - zero) * of.layer.output_scale
        of.add(expected.relu() if of.layer.relu else expected, got)
        of.calls += 1
        of.elements += x.numel()
        if of.layer.input_scale is not None:
            scale, zero_point = (_now(of.layer, values) for values in (of.layer.input_scale, of.layer.input_zero_point))
            codes = torch.round(x.float() / scale) + (0 if zero_point is None else zero_point)
            of.clipped += int(((codes < -128) | (codes > 127)).sum())
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
                bytes=held_bytes(of.layer),
                float_seconds=of.float_seconds if self.repeats else None,
                seconds=of.seconds if self.repeats else None,
                chained=_chained(of.layer, inputs.get(of.name)),
            )
            for of in self.layers
            if of.calls
        ]
        return reached, [of.name for of in self.layers if not of.calls]


def pairs(op: str, float_model: nn.Module, model: nn.Module) -> dict[str, tuple[nn.Module, Int8Layer]]:
    """Name, float original and int8 layer, of all int8 layers of ``model``."""
    modules = dict(float_model.named_modules(remove_duplicate=False))
    found: dict[str, tuple[nn.Module, Int8Layer]] = {}
    for name, layer in model.named_modules():
        if not isinstance(layer, Int8Layer):
            continue
        original = modules.get(name)
        if original is None or not _is_original(original, layer):
            wanted = f"{layer.float_class.__name__} of weight {tuple(layer.weight.shape)}"
            shape = getattr(getattr(original, "weight", None), "shape", None)
            got = "nothing" if original is None else type(original).__name__ + (f" of weight {tuple(shape)}" if shape else "")
            raise ValueError(f"quant_ops.{op}: expected {name!r} of the float model to be a {wanted}, got {got}")
        found[name] = original, layer
    if not found:
        raise ValueError(
            f"quant_ops.{op}: expected a quantized model, got one without int8 layers. Call quantize_ or convert_ first."
        )
    return found


def _is_original(module: nn.Module, layer: Int8Layer) -> bool:
    """Whether the int8 layer may have been made of the module."""
    return INT8_LAYERS.get(exact_class(module)) is type(layer) and as_linear(module).weight.shape == layer.weight.shape


def _now(layer: Int8Layer, values: Tensor | None) -> Any:
    """The current step's value of scales that differ by step."""
    step = layer._buffers.get("timestep")
    return values if values is None or step is None else values[step]


def _chained(layer: Int8Layer, input_dtype: torch.dtype | None) -> str:
    if layer.output_scale is not None:
        return "it gives int8 to the next layer"
    if layer.relu:
        return "it has a fused ReLU"
    return "it takes int8 from the layer before" if input_dtype in (torch.int8, torch.uint8) else ""
