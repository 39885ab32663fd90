"""Calibration: runs a prepared model on data, so that its observers see what its layers see."""

import contextlib
import copy
import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from .._models import Forward, call, evaluating
from ..observers import Observer
from .prepared import Prepared

_log = logging.getLogger("quant_ops")


def _observed(op: str, model: nn.Module) -> dict[str, Prepared]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, Prepared)}
    if not layers:
        raise ValueError(f"quant_ops.{op}: expected a prepared model, got one without prepared layers. Call prepare_ first.")
    return {name: layer for name, layer in layers.items() if layer.observers}


def _left_out(layers: Mapping[str, Prepared]) -> dict[str, int]:
    """How many batches held NaN or Inf at the input of each layer, and at outputs that are observed."""
    return {
        name if operand == "input" else f"{name} ({operand})": observer.batches_left_out
        for name, layer in layers.items()
        for operand, observer in layer.observers.items()
    }


@contextlib.contextmanager
def _calibrating(model: nn.Module, layers: Iterable[Prepared]) -> Iterator[None]:
    """Eval mode, no gradients, and observers on; afterwards every module has the mode that it had."""
    with evaluating(model):
        for layer in layers:
            layer.begin_calibration()
        try:
            yield
        finally:
            for layer in layers:
                layer.end_calibration()


def progress(data: Iterable[Any], total: int | None, what: str = "calibrate") -> Iterable[Any]:
    """With a bar on a terminal, if tqdm is installed."""
    try:
        from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        return data
    return tqdm(data, desc=what, total=total, disable=None, leave=False)


def to_device(device: torch.device | None, batch: Any) -> Any:
    """The batch with its tensors on the device, if there is one for all."""
    if device is None:
        return batch
    batch = dict(batch) if isinstance(batch, Mapping) else batch
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, batch)


def expect_batches(op: str, data: Any, steps: int | None) -> None:
    """Refuses a single batch in place of data, and no steps."""
    if steps is not None and steps < 1:
        raise ValueError(f"quant_ops.{op}: expected steps >= 1, got {steps}")
    if isinstance(data, Tensor | Mapping):
        raise TypeError(f"quant_ops.{op}: expected an iterable of batches, got one {type(data).__name__}. Write [batch].")


def device_of(model: nn.Module) -> torch.device | None:
    """Where all parameters of a model are, if they are in one place."""
    devices = {parameter.device for parameter in model.parameters()}
    return devices.pop() if len(devices) == 1 else None


def count_steps(data: Iterable[Any], steps: int | None) -> int | None:
    """How many batches will be taken, if that is known."""
    length = len(data) if isinstance(data, Sized) else None
    return steps if length is None else length if steps is None else min(length, steps)


def calibrate(
    model: nn.Module,
    data: Iterable[Any],
    forward: Forward | None = None,
    steps: int | None = None,
) -> int:
    """Runs a prepared model on data, in eval mode and without gradients; the layers observe their inputs.

    Can be called again with more data, and the state_dict of the prepared model saves what has been seen. Ctrl-C ends it early and
    keeps what it has. The modes of the model's modules are restored. A batch that holds NaN or Inf at the input of a layer is not
    observed there; a warning and the notes of :func:`convert_` say how many there were.

    Args:
        model: from :func:`prepare_` or :func:`prepare_qat_`.
        data: batches. A tensor is the model's argument; a tuple or list are its arguments; a mapping its keyword arguments. Tensors
            go to the model's device if its parameters are all on one.
        forward: called as ``forward(model, batch)`` instead, e.g. to drop labels or to run a whole pipeline; its batches stay where
            they are.
        steps: at most so many batches.

    Returns:
        The number of batches.

    Raises:
        ValueError: the model is not prepared, or data is empty.
    """
    layers = _observed("calibrate", model)
    expect_batches("calibrate", data, steps)
    device, total = device_of(model), count_steps(data, steps)
    batches, left_out_before = 0, _left_out(layers)
    with _calibrating(model, layers.values()):
        try:
            for batch in progress(data, total):
                call(model, batch if forward is not None else to_device(device, batch), forward)
                batches += 1
                if batches == steps:
                    break
        except KeyboardInterrupt:
            _log.warning("quant_ops.calibrate: interrupted after %d batches, which count", batches)
            if batches == 0:
                raise
    if batches == 0:
        raise ValueError("quant_ops.calibrate: expected calibration data, got no batch. An iterator is empty after its first use.")
    left_out = {name: count - left_out_before[name] for name, count in _left_out(layers).items()}
    if any(left_out.values()):
        shown = ", ".join(f"{name} ({count})" for name, count in left_out.items() if count)
        warnings.warn(
            f"quant_ops.calibrate: expected finite activations, got batches with NaN or Inf, which were left out, at the inputs "
            f"of {shown}",
            stacklevel=2,
        )
    return batches


def synchronize_(model: nn.Module, group: Any = None) -> None:
    """Merges the observers of all processes of a ``torch.distributed`` group: each gets what one would have seen with all the data.

    Every process of the group has to call it, after :func:`calibrate` on its share of the data, and once only: a second call would
    count everything again.

    Raises:
        ValueError: the model is not prepared, or the processes' models differ.
    """
    layers = _observed("synchronize_", model)
    observers = {f"{name}.{operand}": seen for name, layer in layers.items() for operand, seen in layer.observers.items()}
    mine = {name: {key: value.cpu() for key, value in observer.state_dict().items()} for name, observer in observers.items()}
    everyones: list[Any] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(everyones, mine, group)
    for theirs in everyones:
        if theirs.keys() != mine.keys():
            names = sorted(theirs.keys() ^ mine.keys())
            raise ValueError(
                f"quant_ops.synchronize_: expected the same prepared layers in every process, got a difference in {names}"
            )
    for name, observer in observers.items():
        observer.load_state_dict(everyones[0][name])  # in the order of ranks, so that all get the same bits
        for state in everyones[1:]:
            observer.merge_(_restore(observer, state[name]))
    for layer in layers.values():
        layer.end_calibration()


def _restore(like: Observer, state: Mapping[str, Tensor]) -> Observer:
    other = copy.deepcopy(like)
    other.reset()
    other.load_state_dict(state)
    return other
