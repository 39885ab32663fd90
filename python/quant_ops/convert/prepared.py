"""Layers between float and int8: float layers that observe their input, in place of nn.Linear, nn.Conv1d and nn.Conv2d.

They are subclasses that share the float layer's parameters, under the same names, so that optimizers, tied weights and code that
reads ``layer.weight`` go on working, and the observers' statistics are part of the state_dict.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._models import count_batches, is_recomputing
from ..nn import INT8_LAYERS, Int8Layer, TransposedLinear, as_linear, float_class
from ..observers import Observer
from .config import Int8Static, Scheme


def recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The same layer, with the same parameters, as another class; the original is left as it is."""
    layer = kind.__new__(kind)
    layer.__dict__ = {key: value.copy() if isinstance(value, dict | set) else value for key, value in module.__dict__.items()}
    return layer


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or all of it where FSDP2 has left a part in each process. Every process has to call it."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; its class is not imported, which would take a second."""
    return hasattr(tensor, "full_tensor")


def choose_weight_scale(weight: Tensor, config: Scheme) -> Tensor | None:
    """One scale per output channel by the config's observer; None for the largest magnitude, which the layer finds itself."""
    if config.weight_observer == "minmax" or weight.is_meta:
        return None
    qmax = 2 ** (config.weight_bits - 1) - 1
    observer = Observer.kinds[config.weight_observer](qmin=-qmax, qmax=qmax, axis=0, device=weight.device)
    observer(whole(weight))
    return observer.qparams()[0].flatten()


def to_int8(layer: Any, config: Scheme, weight_scale: Tensor | None = None, **settings: Any) -> Int8Layer:
    """The int8 layer of a float one by its config; settings are those of ``from_float``."""
    if whole(layer.weight) is not layer.weight:
        layer = recast(layer, float_class(layer))
        for name in ("weight", "bias"):
            if layer._parameters[name] is not None:
                layer._parameters[name] = nn.Parameter(whole(layer._parameters[name].detach()))
    layer = as_linear(layer)
    if weight_scale is None:
        weight_scale = choose_weight_scale(layer.weight, config)
    kind = INT8_LAYERS[float_class(layer)]
    if not isinstance(config, Int8Static):
        settings["asymmetric"] = config.asymmetric
    made = kind.from_float(layer, weight_bits=config.weight_bits, weight_scale=weight_scale, **settings)
    made.config = config
    return made


class Prepared(nn.Module):
    """What prepared layers share. Every forward is observed, whoever calls it; ``calibrate`` is one way to do so."""

    kind: ClassVar[str] = "prepared"
    float_class: ClassVar[type[nn.Module]]
    own: ClassVar[tuple[str, ...]] = ("config", "observer", "timestep")  # attributes that the float layer does not have

    weight: Tensor
    config: Scheme
    observer: Observer | None
    timestep: Tensor | None

    @classmethod
    def from_float(cls, module: nn.Module, config: Scheme) -> "Prepared":
        """The prepared layer of a float or prepared one."""
        layer = recast(module, cls)
        assert isinstance(layer, Prepared)
        layer._prepare(config)
        return layer

    def _prepare(self, config: Scheme) -> None:
        self.config = config
        weight = self.weight
        self.observer = None  # of a dynamic layer
        self.register_buffer("timestep", None, persistent=False)
        if isinstance(config, Int8Static):
            kind = Observer.kinds[config.observer]
            settings = {name: getattr(config, name) for name in kind.settings}
            self.observer = kind(asymmetric=config.asymmetric, num_steps=config.num_steps, device=weight.device, **settings)
            if config.num_steps > 1:
                self.timestep = torch.zeros((), dtype=torch.int64, device=weight.device)

    def weight_by_channel(self) -> Tensor:
        """The weight with the output channels as its first dimension."""
        return self.weight

    @property
    def num_steps(self) -> int:
        """Sets of activation scales."""
        return 1 if self.observer is None else self.observer.num_steps

    def forward(self, x: Tensor) -> Tensor:
        """The float layer's output."""
        self._observe(x)
        return super().forward(x)

    def _observe(self, x: Tensor) -> None:
        """Once for each batch, also with gradient checkpointing, which repeats the forward."""
        if self.observer is not None and not is_recomputing():
            self.observer(x, self.timestep)

    def begin_calibration(self) -> None:
        """Called by :func:`calibrate` at its start. There is nothing to do: forward always computes in float and observes."""

    def end_calibration(self) -> None:
        """Called by :func:`calibrate` at its end. There is nothing to do: the observer holds the statistics."""

    def to_float(self) -> nn.Module:
        """The float layer with this layer's parameters."""
        layer = recast(self, self.float_class)
        for name in self.own:
            if hasattr(layer, name):
                delattr(layer, name)
        return layer

    def input_qparams(self) -> dict[str, Tensor]:
        """The arguments of ``from_float`` for the input; empty for dynamic quantization."""
        if self.observer is None:
            return {}
        scale, zero_point = self.observer.qparams()
        return {"input_scale": scale, "input_zero_point": zero_point} if self.observer.asymmetric else {"input_scale": scale}

    def problem(self) -> str | None:
        """Why no int8 layer can be made, as the beginning of an error message that ends with the layer's name; None if one can."""
        if not whole(self.weight).isfinite().all():
            return "expected finite weights, got NaN or Inf, in layer"
        return None

    def unreached(self) -> str | None:
        """Why the layer has no data to take its scales from; None if it has, or needs none."""
        if self.observer is None or not self.observer.empty:
            return None
        if left_out := self.observer.batches_left_out:
            return f"its input held NaN or Inf in every batch ({count_batches(left_out)})"
        return "no calibration data has reached it"

    def to_int8(self) -> Int8Layer:
        """The int8 layer, with scales from the observed data."""
        return to_int8(self, self.config, **self.input_qparams())

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.config}"


class Transposed(Prepared, TransposedLinear):
    """What the layers in place of transformers' Conv1D share."""

    float_class = TransposedLinear
    made_from: type[nn.Module]

    @classmethod
    def from_float(cls, module: nn.Module, config: Scheme) -> "Prepared":
        """As :meth:`Prepared.from_float`; keeps the class of the float layer."""
        layer = super().from_float(module, config)
        assert isinstance(layer, Transposed)
        layer.made_from = module.made_from if isinstance(module, Transposed) else type(module)
        return layer

    def to_float(self) -> nn.Module:
        """The float layer, of transformers' class again."""
        layer = recast(super().to_float(), self.made_from)
        del layer.made_from
        return layer

    def weight_by_channel(self) -> Tensor:
        """The weight with the output channels as its first dimension."""
        return self.weight.t()


class PreparedLinear(Prepared, nn.Linear):
    """nn.Linear that observes its input."""

    float_class = nn.Linear


class PreparedTransposedLinear(Transposed):
    """transformers' Conv1D that observes its input."""


class PreparedConv1d(Prepared, nn.Conv1d):
    """nn.Conv1d that observes its input."""

    float_class = nn.Conv1d


class PreparedConv2d(Prepared, nn.Conv2d):
    """nn.Conv2d that observes its input."""

    float_class = nn.Conv2d


PREPARED: dict[type[nn.Module], type[Prepared]] = {
    kind.float_class: kind for kind in (PreparedLinear, PreparedTransposedLinear, PreparedConv1d, PreparedConv2d)
}
