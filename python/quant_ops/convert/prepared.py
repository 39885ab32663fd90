"""Layers on the way to int8 or simulated ones: float layers that observe their input, and an output that has a calibrated format.

They are subclasses that share the float layer's parameters, under the same names, so that optimizers, tied weights and code that
reads ``layer.weight`` go on working, and the observers' statistics are part of the state_dict.
"""

import functools
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .._models import count_batches, is_recomputing
from ..formats import Format, WithGradient
from ..nn import (
    INT8_LAYERS,
    WEIGHT_ONLY_LAYERS,
    Int8Layer,
    ScaledLinear,
    WeightOnlyLayer,
    WeightOnlyLinear,
    as_linear,
    float_class,
)
from ..observers import Observer
from ..simulation.config import Simulated
from ..simulation.layers import SIMULATED, SimulatedLayer
from ..simulation.operand import Layout, Per, Rounding, amax_of, blocks_of, takes_amax
from ..simulation.recast import Conv, ConvTranspose, Embedding, EmbeddingBag, Linear, Recast, Transposed, recast
from .config import Int8Scheme, Int8Static, Scheme, WeightOnly


def whole(tensor: Tensor) -> Tensor:
    """The tensor, or all of it where FSDP2 has left a part in each process. Every process has to call it."""
    gathered: Tensor = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
    return gathered


def is_sharded(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor; its class is not imported, which would take a second."""
    return hasattr(tensor, "full_tensor")


def choose_weight_scale(weight: Tensor, config: Int8Scheme) -> Tensor | None:
    """One scale per output channel by the config's observer; None for the largest magnitude, which the layer finds itself."""
    if config.weight_observer == "minmax" or weight.is_meta:
        return None
    qmax = 2 ** (config.weight_bits - 1) - 1
    observer = Observer.kinds[config.weight_observer](qmin=-qmax, qmax=qmax, axis=0, device=weight.device)
    observer(whole(weight))
    return observer.qparams()[0].flatten()


def to_int8(layer: Any, config: Int8Scheme, weight_scale: Tensor | None = None, **settings: Any) -> Int8Layer:
    """The int8 layer of a float one by its config; settings are those of ``from_float``."""
    layer = as_linear(_whole_layer(layer))
    if weight_scale is None:
        weight_scale = choose_weight_scale(layer.weight, config)
    kind = INT8_LAYERS[float_class(layer)]
    if not isinstance(config, Int8Static):
        settings["asymmetric"] = config.asymmetric
    if config.backward:
        settings["backward"] = True
    made = kind.from_float(layer, weight_bits=config.weight_bits, weight_scale=weight_scale, **settings)
    made.config = config
    return made


def _whole_layer(layer: Any) -> Any:
    """The layer, or one with all of its parameters where FSDP2 has left a part in each process."""
    if whole(layer.weight) is layer.weight:
        return layer
    layer = recast(layer, ScaledLinear if isinstance(layer, ScaledLinear) else float_class(layer))
    for name in ("weight", "bias"):
        if (parameter := layer._parameters.get(name)) is not None:
            layer._parameters[name] = nn.Parameter(whole(parameter.detach()))
    return layer


def to_weight_only(
    layer: Any, config: WeightOnly, shared_with: WeightOnlyLayer | None = None, **given: Tensor | None
) -> WeightOnlyLayer:
    """The weight-only layer of a float one by its config; the other arguments are those of ``from_float``."""
    kind: Any = WEIGHT_ONLY_LAYERS[float_class(layer)]
    settings = config.settings() | (config.linear_settings() if kind is WeightOnlyLinear else {})
    made: WeightOnlyLayer = kind.from_float(_whole_layer(layer), **settings, shared_with=shared_with, **given)
    made.config = config
    return made


class Prepared(Recast):
    """What prepared layers share. Every forward is observed, whoever calls it; ``calibrate`` is one way to do so."""

    kind: ClassVar[str] = "prepared"
    own: ClassVar[tuple[str, ...]] = (*Recast.own, "observer", "output_observer", "timestep")

    config: Scheme
    observer: Observer | None  # of the input
    output_observer: Observer | None
    timestep: Tensor | None

    def _prepare(self, config: Scheme) -> None:
        super()._prepare(config)
        device = next(self.parameters(recurse=False)).device
        self.observer = self.output_observer = None  # of operands whose scales follow from the data of each call
        self.register_buffer("timestep", None, persistent=False)
        if isinstance(config, Int8Static):
            settings = _settings(config.observer, config)
            kind = Observer.kinds[config.observer]
            self.observer = kind(asymmetric=config.asymmetric, num_steps=config.num_steps, device=device, **settings)
            if config.num_steps > 1:
                self.timestep = torch.zeros((), dtype=torch.int64, device=device)
        elif isinstance(config, Simulated):
            observer_of = functools.partial(amax_observer, name=config.observer, config=config, device=device)
            if not self.takes_indices:
                self.observer = observer_of(config.input, self.input_layout, config.input_per)
            self.output_observer = observer_of(config.output, self.output_layout, config.output_per)

    @property
    def observers(self) -> dict[str, Observer]:
        """Of the operands that are calibrated, by "input" and "output"."""
        found = {"input": self.observer, "output": self.output_observer}
        return {name: observer for name, observer in found.items() if observer is not None}

    def weight_by_channel(self) -> Tensor:
        """The weight with the output channels as its first dimension."""
        return self.weight.movedim(self.weight_layout.channel, 0)

    @property
    def num_steps(self) -> int:
        """Sets of activation scales."""
        return 1 if self.observer is None else self.observer.num_steps

    def _input(self, x: Tensor) -> Tensor:
        self._observe(x)
        return x

    def _output(self, y: Tensor) -> Tensor:
        if self.output_observer is not None and not is_recomputing():
            self._see(self.output_observer, y, self.output_layout, self.config.output_per)  # type: ignore[union-attr]
        return y

    def observe(self, x: Tensor) -> None:
        """Observes an input as a call of the layer would, which is not computed."""
        self._observe(self._taken(x))

    def _observe(self, x: Tensor) -> None:
        """Once for each batch, also with gradient checkpointing, which repeats the forward."""
        if self.observer is None or is_recomputing():
            return
        if isinstance(self.config, Simulated):
            self._see(self.observer, x, self.input_layout, self.config.input_per)
        else:
            self.observer(x, self.timestep)

    @staticmethod
    def _see(observer: Observer, x: Tensor, layout: Layout, per: Per) -> None:
        if isinstance(per, int):
            x = blocks_of(x, layout.summed, per)
        observer(x)

    def begin_calibration(self) -> None:
        """Called by :func:`calibrate` at its start. There is nothing to do: forward always computes in float and observes."""

    def end_calibration(self) -> None:
        """Called by :func:`calibrate` at its end. There is nothing to do: the observer holds the statistics."""

    def input_qparams(self) -> dict[str, Tensor]:
        """The arguments of ``from_float`` for the input; empty for dynamic quantization."""
        if self.observer is None:
            return {}
        scale, zero_point = self.observer.qparams()
        return {"input_scale": scale, "input_zero_point": zero_point} if self.observer.asymmetric else {"input_scale": scale}

    def problem(self) -> str | None:
        """Why no int8 layer can be made, as the beginning of an error message that ends with the layer's name; None if one can."""
        if any(not whole(parameter).isfinite().all() for parameter in self.parameters(recurse=False) if parameter.dim() > 1):
            return "expected finite weights, got NaN or Inf, in layer"
        return None

    def unreached(self) -> str | None:
        """Why the layer has no data to take its scales from; None if it has, or needs none."""
        for name, observer in self.observers.items():
            if not observer.empty:
                continue
            if left_out := observer.batches_left_out:
                return f"its {name} held NaN or Inf in every batch ({count_batches(left_out)})"
            return "no calibration data has reached it"
        return None

    def finished(self) -> nn.Module:
        """The layer that computes with scales from the observed data: int8, or simulated."""
        return self.to_simulated() if isinstance(self.config, Simulated) else self.to_int8()

    def to_int8(self) -> Int8Layer:
        """The int8 layer, with scales from the observed data."""
        assert not isinstance(self.config, Simulated | WeightOnly)
        return to_int8(self, self.config, **self.input_qparams())

    def to_simulated(self) -> SimulatedLayer:
        """The simulated layer, with amax from the observed data and of the weight."""
        config = self.config
        assert isinstance(config, Simulated)
        layer = SIMULATED[self.float_class].from_float(self.to_float(), config)
        layer.amax_weight = amax_of_weight(self.weight, config, self.weight_layout)
        for name, observer in self.observers.items():
            per = config.input_per if name == "input" else config.output_per
            amax = observer.amax().detach().clone()
            layout = self.input_layout if name == "input" else self.output_layout
            blocks = (-1, *[1] * -layout.summed)  # broadcasts to what blocks_of gives
            setattr(layer, f"amax_{name}", amax.reshape(blocks) if isinstance(per, int) else amax.flatten() if amax.dim() else amax)
        return layer


def _settings(name: str, config: Int8Static | Simulated) -> dict[str, Any]:
    return {setting: getattr(config, setting) for setting in Observer.kinds[name].settings}


def amax_observer(
    rounding: Rounding | None, layout: Layout, per: Per, *, name: str, config: Simulated, device: torch.device | None
) -> Observer | None:
    """An observer of the largest magnitudes of an operand; None for an operand that takes none.

    A function in place of a format says nothing of its values; an observer that looks for the best range takes those of INT8.
    """
    if not takes_amax(rounding):
        return None
    if isinstance(rounding, WithGradient):
        rounding = rounding.forward
    grid: dict[str, Any] = {"format": rounding} if isinstance(rounding, Format) else {"qmin": -127, "qmax": 127}
    axis = layout.channel if per == "channel" else layout.summed - 1 if isinstance(per, int) else None
    return Observer.kinds[name](axis=axis, device=device, **grid, **_settings(name, config))


def amax_of_weight(weight: Tensor, config: Simulated, layout: Layout) -> Tensor | None:
    """The largest magnitudes of a weight by the config's observer, as :func:`rounded` takes them; None if its format takes none."""
    per, weight = config.weight_per, whole(weight.detach())
    if not takes_amax(config.weight) or per == "row":
        return None
    if config.weight_observer == "minmax":
        return amax_of(weight, layout, per)
    shape, summed = (), 0
    if isinstance(per, int):
        blocks = blocks_of(weight, layout.summed, per).movedim(layout.summed, -1)
        shape, weight = (*blocks.shape[:-1], 1), blocks.flatten(0, -2)
        summed, layout, per = layout.summed, Layout(summed=-1, channel=-2, row=(-1,)), "channel"
    observer = amax_observer(config.weight, layout, per, name=config.weight_observer, config=config, device=weight.device)
    assert observer is not None
    observer(weight)
    amax = observer.amax()
    return amax.reshape(shape).movedim(-1, summed) if shape else amax.flatten() if per == "channel" else amax


class PreparedLinear(Linear, Prepared, nn.Linear):
    """nn.Linear that observes its input."""


class PreparedTransposedLinear(Transposed, Prepared):
    """transformers' Conv1D that observes its input."""

    own = (*Prepared.own, "made_from")


class PreparedConv1d(Conv, Prepared, nn.Conv1d):
    """nn.Conv1d that observes its input."""

    float_class = nn.Conv1d


class PreparedConv2d(Conv, Prepared, nn.Conv2d):
    """nn.Conv2d that observes its input."""

    float_class = nn.Conv2d


class PreparedConv3d(Conv, Prepared, nn.Conv3d):
    """nn.Conv3d that observes its input and output."""

    float_class = nn.Conv3d


class PreparedConvTranspose1d(ConvTranspose, Prepared, nn.ConvTranspose1d):
    """nn.ConvTranspose1d that observes its input and output."""

    float_class = nn.ConvTranspose1d


class PreparedConvTranspose2d(ConvTranspose, Prepared, nn.ConvTranspose2d):
    """nn.ConvTranspose2d that observes its input and output."""

    float_class = nn.ConvTranspose2d


class PreparedConvTranspose3d(ConvTranspose, Prepared, nn.ConvTranspose3d):
    """nn.ConvTranspose3d that observes its input and output."""

    float_class = nn.ConvTranspose3d


class PreparedEmbedding(Embedding, Prepared, nn.Embedding):
    """nn.Embedding that observes its output."""


class PreparedEmbeddingBag(EmbeddingBag, Prepared, nn.EmbeddingBag):
    """nn.EmbeddingBag that observes its output."""


PREPARED: dict[type[nn.Module], type[Prepared]] = {
    kind.float_class: kind
    for kind in (
        PreparedLinear,
        PreparedTransposedLinear,
        PreparedConv1d,
        PreparedConv2d,
        PreparedConv3d,
        PreparedConvTranspose1d,
        PreparedConvTranspose2d,
        PreparedConvTranspose3d,
        PreparedEmbedding,
        PreparedEmbeddingBag,
    )
}
