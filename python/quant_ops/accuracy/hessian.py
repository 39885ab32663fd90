"""Hessians of layers from what they are called with: H = 2/n sum x x^T over the n columns x that a weight has been multiplied by.

The mean is kept while it is summed, so that nothing grows with the data. On the CPU sums are in float64, elsewhere in float32.
Layers that get the same tensor, such as the projections to queries, keys and values, share one Hessian. Read next: layer.py.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ScaledLinear, as_linear

_CHUNK = 1 << 24  # elements of the columns of a convolution that are written out at once


def sum_dtype(device: torch.device) -> torch.dtype:
    """In which Hessians are summed and weights are updated."""
    return torch.float64 if device.type == "cpu" else torch.float32


def as_matrices(layer: nn.Module) -> Tensor:
    """The weight of a layer as (G, R, K): a matrix for each group of a convolution; it shares the layer's memory."""
    weight = as_linear(layer).weight
    assert isinstance(weight, Tensor)
    groups = getattr(layer, "groups", 1)
    return weight.detach().reshape(groups, weight.shape[0] // groups, -1)


def rows_of(layer: Any, x: Tensor) -> Iterator[Tensor]:
    """The columns that the layer's matrices are multiplied by, as rows (G, n, K), in chunks."""
    if isinstance(layer, ScaledLinear):
        x = x.to(torch.promote_types(x.dtype, torch.float32)) * layer.input_multiplier  # not rounded, as the quantized layer has it
    if x.dim() == 0 or not isinstance(layer, nn.Conv1d | nn.Conv2d):
        yield x.reshape(1, -1, x.shape[-1])
        return
    one = isinstance(layer, nn.Conv1d)
    if x.dim() == (2 if one else 3):
        x = x.unsqueeze(0)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode)
    kernel, dilation, stride = ((1, *size) if one else size for size in (layer.kernel_size, layer.dilation, layer.stride))
    x = x.unsqueeze(2) if one else x
    pixels = math.prod(
        (size - d * (k - 1) - 1) // s + 1 for size, k, d, s in zip(x.shape[2:], kernel, dilation, stride, strict=True)
    )
    step = max(1, _CHUNK // max(1, x.shape[1] * math.prod(kernel) * pixels))
    for part in x.split(step):
        taps = F.unfold(part, kernel, dilation=dilation, stride=stride)  # (n, C * taps, pixels), a channel's taps side by side
        taps = taps.unflatten(1, (layer.groups, -1))
        yield taps.permute(1, 0, 3, 2).flatten(1, 2)


class Hessian:
    """The Hessian of one layer, or of several that are called with the same tensors."""

    def __init__(self, layer: nn.Module) -> None:
        self.layers = [layer]
        weight = as_matrices(layer)
        self.calls, self.rows = 0, 0
        self.matrix = torch.zeros(
            (weight.shape[0], weight.shape[2], weight.shape[2]), dtype=sum_dtype(weight.device), device=weight.device
        )
        self.last: tuple[Tensor, int] | None = None  # the last input, which is in the sum already
        self._before: tuple[int, Tensor] | None = None  # rows and sum without it, as long as another layer may turn out to differ

    def add(self, x: Tensor, keep: bool) -> None:
        """Adds an input of the layer; ``keep`` the sum without it."""
        self._before = (self.rows, self.matrix.clone()) if keep else None
        self.calls += 1
        self.last = (x, version(x))
        with torch.autocast(x.device.type, enabled=False):
            for rows in rows_of(self.layers[0], x.detach()):
                total = self.rows + rows.shape[1]
                if total == 0:
                    continue
                rows = rows.to(self.matrix.dtype)
                self.matrix.baddbmm_(rows.transpose(1, 2), rows, beta=self.rows / total, alpha=2 / total)
                self.rows = total

    def is_last(self, x: Tensor) -> bool:
        """Whether this is the tensor that was added last, unchanged."""
        return self.last is not None and self.last[0] is x and self.last[1] == version(x)

    def without_last(self, layer: nn.Module) -> "Hessian":
        """For a layer that has seen all inputs but the last."""
        assert self._before is not None
        other = Hessian(layer)
        other.calls, (other.rows, other.matrix) = self.calls - 1, (self._before[0], self._before[1].clone())
        return other

    def copied(self, layer: nn.Module) -> "Hessian":
        """For a layer that has seen all inputs."""
        other = Hessian(layer)
        other.calls, other.rows, other.matrix = self.calls, self.rows, self.matrix.clone()
        return other


def version(x: Tensor) -> int:
    """Changes when something is written into the tensor; those of inference mode do not say."""
    return 0 if x.is_inference() else x._version


def _alike(layer: Any, other: Any) -> bool:
    """Whether both turn a tensor into the same rows."""
    if isinstance(layer, ScaledLinear) or isinstance(other, ScaledLinear):
        both = isinstance(layer, ScaledLinear) and isinstance(other, ScaledLinear)
        return both and torch.equal(layer.input_multiplier, other.input_multiplier)
    are_convs = [isinstance(one, nn.Conv1d | nn.Conv2d) for one in (layer, other)]
    if not all(are_convs):
        return not any(are_convs)
    names = ("in_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return all(getattr(layer, name) == getattr(other, name) for name in names)


class Collector:
    """Sums the Hessians of layers while a model runs, by hooks.

    A layer shares the Hessian of another one that was called once, and with the same tensor, when it is called for the first time.
    It gets a copy as soon as the two see different inputs.
    """

    def __init__(self, layers: Sequence[nn.Module], observers: Mapping[nn.Module, Any]) -> None:
        """``observers``: of layers with static activations, a prepared layer that observes what the layer sees."""
        self._layers = layers
        self._observers = observers
        self._hessians: dict[nn.Module, Hessian] = {}
        self._calls: dict[nn.Module, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> "Collector":
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._called, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def finished(self) -> list[Hessian]:
        """All of them, in the order of the first calls; layers that were never called are in none."""
        for hessian in list(dict.fromkeys(self._hessians.values())):
            self._leave_behind(hessian)
            hessian.last = hessian._before = None
        return list(dict.fromkeys(self._hessians.values()))

    def _called(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        if (observer := self._observers.get(layer)) is not None:
            observer._observe(observer._taken(x))
        count = self._calls.get(layer, 0)
        self._calls[layer] = count + 1
        hessian = self._hessians.get(layer) or self._shared(layer, x)
        if hessian is None:
            hessian = self._hessians[layer] = Hessian(layer)
        elif hessian.layers[0] is not layer:  # a follower
            if hessian.calls == count + 1 and hessian.is_last(x):
                return
            hessian = self._split(hessian, layer, count)
        else:
            self._leave_behind(hessian)
        hessian.add(x, keep=hessian.calls == 0 or len(hessian.layers) > 1)

    def _shared(self, layer: nn.Module, x: Tensor) -> Hessian | None:
        for hessian in dict.fromkeys(self._hessians.values()):
            if hessian.calls == 1 and hessian.is_last(x) and _alike(hessian.layers[0], layer):
                hessian.layers.append(layer)
                self._hessians[layer] = hessian
                return hessian
        return None

    def _leave_behind(self, hessian: Hessian) -> None:
        """Parts with the layers that were not called with the last input."""
        for layer in hessian.layers[1:]:
            if self._calls[layer] < hessian.calls:
                self._split(hessian, layer, self._calls[layer])

    def _split(self, hessian: Hessian, layer: nn.Module, count: int) -> Hessian:
        """A Hessian of its own for a layer that has been called so many times."""
        hessian.layers.remove(layer)
        own = hessian.copied(layer) if count == hessian.calls else hessian.without_last(layer)
        self._hessians[layer] = own
        return own
