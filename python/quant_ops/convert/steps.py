"""Temporal quantization: layers that keep a set of activation scales for every step, and what the current step is.

Each such layer has a buffer ``timestep``, a 0-dim integer on its device; the layers of a model share one tensor per device. A step
is set by writing into it: no layer counts its own calls, and a compiled model is not compiled again.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def connect_(model: nn.Module) -> dict[nn.Module, int]:
    """Gives the layers that have steps one tensor per device to read the current one from. Returns them and how many each has.

    Moving a model separates the tensors, so this is done again whenever a step is about to be set.
    """
    layers: dict[nn.Module, int] = {}
    shared: dict[torch.device, Tensor] = {}
    for module in model.modules():
        step = module._buffers.get("timestep")
        if step is not None:
            first = shared.setdefault(step.device, step)
            if first is not step:
                module._buffers["timestep"] = first
            layers[module] = int(module.num_steps)  # type: ignore[arg-type]
    return layers


def _steps(op: str, model: nn.Module) -> tuple[list[Tensor], int]:
    """The tensors to write the step into, and how many steps there are for every layer."""
    layers = connect_(model)
    if not layers:
        raise ValueError(
            f"quant_ops.{op}: expected a model whose layers have scales per step, got none. Prepare it with "
            "Int8Static(num_steps=...)."
        )
    tensors = {id(step): step for layer in layers if (step := layer._buffers["timestep"]) is not None}
    return list(tensors.values()), min(layers.values())


@contextlib.contextmanager
def _restored(steps: list[Tensor]) -> Iterator[None]:
    before = [step.clone() for step in steps]
    try:
        yield
    finally:
        for step, value in zip(steps, before, strict=True):
            step.copy_(value)


@contextlib.contextmanager
def timestep(model: nn.Module, step: int | Tensor) -> Iterator[None]:
    """Every forward of the model inside uses (or, while calibrating, fills) the scales of this step.

    ``with qo.timestep(model, i): noise = model(x, t)``. The step before is restored at the end. A compiled model may be given too.

    Args:
        model: with layers of ``Int8Static(num_steps=...)``, prepared or converted.
        step: 0 <= step < num_steps; a 0-dim tensor on another device than the CPU is taken as it is, without waiting for its value.

    Raises:
        ValueError: the step is out of range, or no layer has steps.
    """
    steps, num_steps = _steps("timestep", model)
    if not isinstance(step, Tensor) or step.device.type == "cpu":
        number = int(step)
        if number != step or not 0 <= number < num_steps:
            raise ValueError(f"quant_ops.timestep: expected an integer 0 <= step < {num_steps}, got {step}")
        step = number
    with _restored(steps):
        for tensor in steps:
            tensor.copy_(step) if isinstance(step, Tensor) else tensor.fill_(step)
        yield


@contextlib.contextmanager
def count_timesteps(model: nn.Module, calls_per_step: int = 1, *, wrap: bool = False) -> Iterator[None]:
    """Inside, the step is counted by forwards of the model: 0 at first, then one more after each ``calls_per_step`` of them.

    ``with qo.count_timesteps(model): image = pipeline(prompt)``, where the pipeline calls the model. What counts is a call of the
    model, however often its layers are used in it; two calls a step, as in some forms of classifier-free guidance, are
    ``calls_per_step=2``. Every block starts at 0, so a scheduler that makes one call too many shifts no later run. That call uses
    the last step, with a warning at the end.

    Args:
        model: as in :func:`timestep`; the module that is called.
        wrap: the last step is followed by 0, for blocks that hold several runs of exactly ``num_steps * calls_per_step`` calls.

    Raises:
        ValueError: no layer has steps, or calls_per_step < 1.
    """
    if calls_per_step < 1:
        raise ValueError(f"quant_ops.count_timesteps: expected calls_per_step >= 1, got {calls_per_step}")
    steps, num_steps = _steps("count_timesteps", model)
    calls = [torch.zeros_like(step) for step in steps]  # tensors, so that a compiled model can count

    def enter(module: nn.Module, args: Any) -> None:
        for step, called in zip(steps, calls, strict=True):
            number = called // calls_per_step
            step.copy_(number % num_steps if wrap else number.clamp(max=num_steps - 1))
            called.add_(1)

    with _restored(steps):
        handle = model.register_forward_pre_hook(enter)
        try:
            yield
        finally:
            handle.remove()
    called = int(calls[0])
    if called == 0:
        warnings.warn(
            "quant_ops.count_timesteps: expected calls of the model, got none. Count those of the module that is called, e.g. the "
            "compiled one.",
            stacklevel=3,
        )
    if not wrap and called > num_steps * calls_per_step:
        warnings.warn(
            f"quant_ops.count_timesteps: expected at most {num_steps} * {calls_per_step} calls of the model, got {called}. Those "
            "beyond used the scales of the last step.",
            stacklevel=3,
        )
