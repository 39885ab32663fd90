"""Puts the activation after a quantized layer into the layer, which computes it before its result leaves the registers.

A run on an example answers which modules read a layer's output and nothing else's. Whether a module is one of the functions that a
layer knows is tried out, so no class is named.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from .._models import Result, Table, call, has_hooks, patched, quiet, reasons
from ..accuracy.watch import Source, Watch
from ..convert.calibrate import device_of, to_device
from ..nn import FusedActivation, QuantConv1d, QuantConv2d, QuantLinear
from ..nn.fused import ACTIVATION_FUNCTIONS

_TOLERANCE = 4e-6  # of float32 on the arguments below: tanh's gelu and the exact one differ by 5e-4
_LAYERS = (QuantLinear, QuantConv1d, QuantConv2d)


@dataclasses.dataclass(repr=False)
class ActivationResult(Result):
    """What :func:`fuse_activations_` did. ``print(result)`` shows it as a table.

    Attributes:
        fused: names of each layer, of the activation that it has taken in, and of the function.
        skipped: name and reason of every other activation.
    """

    fused: list[tuple[str, str, str]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def _table(self) -> Table:
        lines = [("fused", f"{activation} ({function}) into {layer}") for layer, activation, function in self.fused]
        lines += [("skipped", text) for text in reasons(self.skipped)]
        return f"{len(self.fused)} fused, {len(self.skipped)} skipped", ("fused", "skipped"), lines


class _Readers(Watch):
    """Who reads what. Nothing is measured: an activation may read images of several sizes."""

    def _reduce(self, x: Tensor) -> tuple[()]:
        return ()


def fuse_activations_(model: nn.Module, example_inputs: Any) -> ActivationResult:
    """Puts activations (ReLU, ReLU6, Hardswish, SiLU, GELU, its tanh form) into the int8 layers before them, in place.

    A layer computes its activation in float32, before its result is rounded and stored: one pass over memory less, and a GELU that
    costs a few instructions an element. An activation that is a function and not a module (``F.gelu``) stays where it is.

    Args:
        model: with int8 layers, after :func:`convert_` or :func:`quantize_`.
        example_inputs: a batch, as :func:`calibrate` takes it. An activation is fused if in this run it reads the output of int8
            layers alone, and nothing else reads that. Where a model takes other paths with other data, give it a batch that takes
            them.

    Returns:
        What was fused, and why the other activations were not. Fused ones are :class:`torch.nn.Identity` now. :func:`save` and
        :func:`load_` keep that.
    """
    activations = {
        module: (name, function) for name, module in model.named_modules() if (function := _function_of(module)) is not None
    }
    watch = _Readers(model, {module: name for module, (name, _) in activations.items()}, 0)
    with quiet(model), watch.watching():
        watch.finish([call(model, to_device(device_of(model), example_inputs))])
    result = ActivationResult()
    order = {module: i for i, module in enumerate(model.modules())}
    for module, (name, function) in activations.items():
        sources = watch.read_by.get(module, set())
        if reason := _unfit(module, sources, watch):
            result.skipped.append((name, reason))
            continue
        layers: list[Any] = [source.module for source in sources if source is not None]
        for layer in sorted(layers, key=order.__getitem__):
            layer.activation = function
            result.fused.append((watch.names[layer], name, function))
        replace_by_identity(model, module)
    return result


def replace_by_identity(model: nn.Module, activation: nn.Module) -> None:
    """Under all of its names."""
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module is activation:
            model.set_submodule(name, FusedActivation())


def _function_of(module: nn.Module) -> str | None:
    """Which of the functions a module is; None for any other module."""
    if any(module.children()) or any(True for _ in (*module.parameters(), *module.buffers())) or isinstance(module, nn.Identity):
        return None
    if has_hooks(module) or patched(module) or type(module).forward is nn.Module.forward:
        return None
    x = torch.linspace(-12, 12, 4096).view(2, 2048)
    training = module.training
    module.training = False
    try:
        with torch.no_grad():
            y = module(x.clone())
    except Exception:  # a forward of any class may raise anything
        return None
    finally:
        module.training = training
    if not isinstance(y, Tensor) or y.shape != x.shape or y.dtype != x.dtype:
        return None
    return next((name for name, of in ACTIVATION_FUNCTIONS.items() if torch.allclose(of(x), y, rtol=0, atol=_TOLERANCE)), None)


def _unfit(activation: nn.Module, sources: set[Source | None], watch: Watch) -> str | None:
    if activation in watch.unfit:
        return watch.unfit[activation]
    if not sources:
        return "the example has not reached it"
    for source in sources:
        if source is None:
            return "its input is computed, by no module"
        layer, described = source.module, watch.describe(source.module)
        if not isinstance(layer, _LAYERS):
            return f"its input comes from {described}, no int8 layer"
        if layer.relu or layer.activation is not None:
            return f"{described} has an activation already"
        if layer.backward:
            return f"{described} hands gradients on (backward=True)"
        if layer in watch.hooked:
            return f"{described} has hooks, which would see other values"
        if reason := patched(layer):
            return f"{described}: {reason}"
        if source.elsewhere:
            return f"the output of {described} is read elsewhere as well: {source.elsewhere}"
        if others := [watch.describe(reader) for reader in source.readers if reader is not activation]:
            return f"the output of {described} is read by {others[0]} as well"
    return None
