"""The program of a region: which values are int8 and by which scale, the steps, and the constants that they read.

A value takes the scale that the layer which reads it was calibrated with, so that its codes are those that the layer would have
made of it. If several layers read it the widest range wins, and all of them take the codes as they are. Values that only pools and
concatenations read get a scale from what a run has observed. What the rest of the model or an addition reads too is computed in
float and quantized once more, since the errors of a sum that is rounded in every block add up. Read first: find.py; next: layer.py.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn

from ..convert.config import Int8Static
from ..convert.fold import gain_and_offset
from ..nn import Int8Layer, QuantConv2d
from ..observers import Observer
from ..ops.program import ACTIVATIONS, DTYPES, Program, Step, element
from .find import Unit
from .layer import Chain, Source
from .operators import example_of

_KEEP_SCALE = ("max_pool2d", "upsample_nearest2d", "flatten", "slice", "channel_shuffle")  # steps that move codes and compute none
_SAME_RANGE = 1.25  # a value that is concatenated takes the scale of the result up to this many times its own

# ---- scales --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Scale:
    """A scale, None until it has been observed, and a zero point, None for symmetric codes."""

    scale: float | None
    zero_point: int | None

    def is_as(self, other: "Scale") -> bool:
        if self is other:
            return True
        return self.scale is not None and (self.scale, self.zero_point or 0) == (other.scale, other.zero_point or 0)


def _scale_of(layer: Int8Layer) -> Scale | None:
    """None of a layer that :func:`chain_` has made, which was never calibrated."""
    scale, zero_point = layer.input_scale, layer.input_zero_point
    return None if scale is None else Scale(scale.item(), None if zero_point is None else int(zero_point.item()))


class Scales:
    """The scale of every value of a region, and which values are floating.

    Attributes:
        residual_dtype: of values that are added.
        observed: the nodes whose ranges a run has to tell, each with the scale that is made of it.
        results: what the rest of the graph reads.
    """

    def __init__(self, units: Sequence[Unit], residual_dtype: torch.dtype) -> None:
        self.units, self.residual_dtype = units, residual_dtype
        self.unit_of = {unit.result: unit for unit in units}
        own = {node for unit in units for node in unit.nodes}
        self.results = [unit.result for unit in units if any(user not in own for user in unit.result.users)]
        self.readers: dict[fx.Node, list[Unit]] = {}
        for unit in units:
            for source in dict.fromkeys(unit.inputs):
                self.readers.setdefault(source, []).append(unit)
        self.observed: dict[fx.Node, Scale] = {}
        self._wanted: dict[fx.Node, Scale | None] = {}

    def is_float(self, node: fx.Node) -> bool:
        """Whether a value is there in float: it comes from outside, or is needed so and its step can give it."""
        unit = self.unit_of.get(node)
        if unit is None:
            return True
        if node in self.results:
            return unit.kind not in (*_KEEP_SCALE, "cat")
        wide = self.residual_dtype != torch.int8 and unit.kind in ("conv2d", "linear", "add")
        return wide and any(reader.residual is node for reader in self.readers[node])

    def dtype_of(self, node: fx.Node) -> int:
        """The number of the dtype of such a value; of a result it is that of the example."""
        example = example_of(node)
        assert example is not None
        return DTYPES.index(example.dtype if node in self.results else self.residual_dtype)

    def wanted(self, node: fx.Node) -> Scale | None:
        """The scale that those who read a value expect; None if none of them does."""
        if node not in self._wanted:
            self._wanted[node] = self._choose(node)
        return self._wanted[node]

    def _choose(self, node: fx.Node) -> Scale | None:
        expected: list[Scale] = []
        joined: list[Scale] = []
        for unit in self.readers.get(node, ()):
            if unit.layer is not None and unit.inputs[0] is node:
                if (scale := _scale_of(unit.layer)) is not None:
                    expected.append(scale)
            elif unit.kind in _KEEP_SCALE and (scale := self.wanted(unit.result)) is not None:
                expected.append(scale)
            elif unit.kind == "cat":
                joined.append(self.of_codes(unit.result))
        chosen = max(expected, key=_width, default=None)
        if chosen is None:
            return joined[0] if joined else None
        for scale in joined:
            if _width(chosen) <= _width(scale) <= _SAME_RANGE * _width(chosen):
                return scale
        return chosen

    def of_codes(self, node: fx.Node) -> Scale:
        """The scale of a value's codes, if it has one form only."""
        unit = self.unit_of.get(node)
        if unit is not None and unit.kind in _KEEP_SCALE and not self.is_float(unit.inputs[0]):
            return self.of_codes(unit.inputs[0])
        return self.wanted(node) or self._observe(node)

    def _observe(self, node: fx.Node) -> Scale:
        return self.observed.setdefault(node, Scale(None, 0))


def _width(scale: Scale) -> float:
    return -1.0 if scale.scale is None else scale.scale


def observer_for(units: Sequence[Unit]) -> Observer:
    """An observer as the layers of a region have had; of the whole range where they do not tell."""
    device = next(unit.layer.device for unit in units if unit.layer is not None)
    for unit in units:
        config = getattr(unit.layer, "config", None)
        if isinstance(config, Int8Static):
            kind = Observer.kinds[config.observer]
            return kind(asymmetric=True, device=device, **{name: getattr(config, name) for name in kind.settings})
    return Observer.kinds["minmax"](asymmetric=True, device=device)


# ---- programs ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Region:
    """Steps that become one chain.

    Attributes:
        inputs, results: nodes of the graph; the chain's arguments and what it returns.
    """

    units: list[Unit]
    scales: Scales
    inputs: list[fx.Node]

    @property
    def results(self) -> list[fx.Node]:
        return self.scales.results


class _Builder:
    """Writes the steps of a region down."""

    def __init__(self, units: Sequence[Unit], scales: Scales) -> None:
        self.units, self.scales = units, scales
        self.steps: list[Step] = []
        self.sources: list[Source] = [("", "scales"), ("", "zero_points")]
        self.known: list[Scale] = []  # the elements of these two
        self.paths: list[str] = []  # of each step's layer, empty if it has none
        self.inputs = [node for node in dict.fromkeys(node for unit in units for node in unit.inputs) if node not in scales.unit_of]
        self.floats = {node: i for i, node in enumerate(self.inputs)}  # the number of each value that is there in float
        self.codes: dict[fx.Node, list[tuple[int, Scale]]] = {}  # the number of each value's codes, by each of its scales

    def constants_of(self, scale: Scale | None) -> tuple[int | None, int | None]:
        """Scale and zero point."""
        if scale is None:
            return None, None
        position = next((i for i, known in enumerate(self.known) if known.is_as(scale)), len(self.known))
        self.known[position:] = self.known[position:] or [scale]
        return element(0, position), None if scale.zero_point is None else element(1, position)

    def held_by(self, unit: Unit) -> list[int | None]:
        """Packed weight, weight scale and bias of a unit's layer."""
        names = ["packed_weight", "weight_scale"]
        if unit.layer.bias is not None or unit.batchnorm is not None:
            names.append("bias")
        if (unit.path, names[0]) not in self.sources:
            self.sources += [(unit.path, name) for name in names]
        held = [self.sources.index((unit.path, name)) for name in names]
        return [*held, *[None] * (3 - len(held))]

    def add(
        self, op: str, inputs: Sequence[int], constants: Sequence[int | None] = (), numbers: Sequence[int] = (), path: str = ""
    ) -> int:
        """Appends a step; the number of its value."""
        self.steps.append(Step(op, tuple(inputs), tuple(constants), tuple(numbers)))
        self.paths.append(path)
        return len(self.inputs) + len(self.steps) - 1

    def read(self, node: fx.Node, scale: Scale | None = None) -> tuple[int, Scale]:
        """The codes of a value: by this scale if it is there in float, else by the one scale that it has."""
        made = self.codes.setdefault(node, [])
        if node not in self.floats:
            return made[0]
        scale = scale or self.scales.of_codes(node)
        for number, has in made:
            if has.is_as(scale):
                return number, has
        number = self.add("quantize", (self.floats[node],), self.constants_of(scale), (-128, 127))
        made.append((number, scale))
        return number, scale

    def write(self, unit: Unit) -> None:
        """Appends what computes the result of a unit."""
        node, write = unit.result, getattr(self, f"_{unit.kind}", None)
        if self.scales.is_float(node):
            assert write is not None
            self.floats[node] = write(unit, None, self.scales.dtype_of(node))
            return
        if unit.kind in _KEEP_SCALE:
            number, scale = self.read(unit.inputs[0], self.scales.of_codes(node))
            self.codes[node] = [(self.add(unit.kind, (number,), (), unit.numbers), scale)]
        else:
            assert write is not None
            scale = self.scales.of_codes(node)
            self.codes[node] = [(write(unit, scale, 0), scale)]
        if node in self.scales.results:
            number, scale = self.codes[node][0]
            self.floats[node] = self.add("dequantize", (number,), self.constants_of(scale), (self.scales.dtype_of(node),))

    # ---- one function for each kind: the number of the value by the scale, or in float without one ----------------------

    def _product(self, unit: Unit, out: Scale | None, shape: Sequence[int], dtype: int) -> int:
        x, x_scale = self.read(unit.inputs[0], _scale_of(unit.layer))
        inputs, residual = [x], None
        if unit.residual is not None:
            if unit.residual in self.floats:
                inputs.append(self.floats[unit.residual])
            else:
                number, residual = self.read(unit.residual)
                inputs.append(number)
        constants = (
            *self.held_by(unit),
            *self.constants_of(x_scale),
            *self.constants_of(out),
            *self.constants_of(residual),
            None,  # the weight itself, which the chain adds where CUDA reads it
        )
        return self.add(unit.kind, inputs, constants, (*shape, dtype, ACTIVATIONS.index(unit.activation)), unit.path)

    def _conv2d(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        assert isinstance(unit.layer, QuantConv2d)
        options: dict[str, Any] = {"stride": (1, 1), "padding": [0] * 4, "dilation": (1, 1), **unit.layer._conv_options}
        geometry = (*options["stride"], *options["padding"], *options["dilation"], unit.layer.groups)
        return self._product(unit, out, (*unit.layer._weight_shape, *geometry), dtype)

    def _linear(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        return self._product(unit, out, unit.layer._weight_shape, dtype)

    def _two(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        (a, a_scale), (b, b_scale) = (self.read(node) for node in (unit.inputs[0], unit.inputs[-1]))
        (a_s, a_z), (b_s, b_z) = self.constants_of(a_scale), self.constants_of(b_scale)
        constants = (a_s, b_s, a_z, b_z, *self.constants_of(out))
        return self.add(unit.kind, (a, b), constants, (dtype, ACTIVATIONS.index(unit.activation)))

    _add = _mul = _two

    def _rescaled(self, op: str, unit: Unit, out: Scale | None, numbers: Sequence[int]) -> int:
        x, scale = self.read(unit.inputs[0])
        return self.add(op, (x,), (*self.constants_of(scale), *self.constants_of(out)), numbers)

    def _requantize(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        return self._rescaled("requantize", unit, out, (dtype, ACTIVATIONS.index(unit.activation)))

    def _avg_pool2d(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        return self._rescaled("avg_pool2d", unit, out, (*unit.numbers, dtype))

    def _adaptive_avg_pool2d(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        return self._rescaled("adaptive_avg_pool2d", unit, out, (*unit.numbers, dtype))

    def _mean(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        return self.add("flatten", (self._rescaled("adaptive_avg_pool2d", unit, out, (1, 1, dtype)),), (), (1,))

    def _cat(self, unit: Unit, out: Scale | None, dtype: int) -> int:
        read = [self.read(node, out) for node in unit.inputs]
        pairs = [self.constants_of(scale) for _, scale in read]
        constants = [*(scale for scale, _ in pairs), *(zero_point for _, zero_point in pairs), *self.constants_of(out)]
        return self.add("cat", [number for number, _ in read], constants, (*unit.numbers, dtype))


def region_of(units: list[Unit], residual_dtype: torch.dtype) -> Region:
    """A region with the scales that are known and a list of those that are to be observed."""
    scales = Scales(units, residual_dtype)
    builder = _Builder(units, scales)
    for unit in units:
        builder.write(unit)  # asks for every scale that there is to be
    return Region(units, scales, builder.inputs)


def chain_of(region: Region, observers: Mapping[fx.Node, Observer]) -> Chain:
    """The chain of a region, whose layers it takes over.

    Raises:
        ValueError: nothing finite has been observed of a value.
    """
    for node, scale in region.scales.observed.items():
        found, zero_point = observers[node].qparams()
        scale.scale, scale.zero_point = found.item(), int(zero_point.item())
    for unit in region.units:
        if unit.batchnorm is not None:
            _fold(unit.layer, unit.batchnorm)
    builder = _Builder(region.units, region.scales)
    for unit in region.units:
        builder.write(unit)
    program = Program(tuple(builder.steps), len(builder.inputs), tuple(builder.floats[node] for node in region.results))
    layers = {unit.path: unit.layer for unit in region.units if unit.layer is not None}
    device = next(iter(layers.values())).device
    scales = torch.tensor([scale.scale for scale in builder.known], dtype=torch.float32, device=device)
    zero_points = torch.tensor([scale.zero_point or 0 for scale in builder.known], dtype=torch.int32, device=device)
    return Chain(program, builder.sources, builder.paths, layers, scales, zero_points)


def _fold(layer: Int8Layer, batchnorm: nn.BatchNorm2d) -> None:
    """Folds a BatchNorm into the scales and the bias of the layer before it. Codes change their sign where the gain is negative."""
    gain, offset = (tensor.to(layer.weight_scale.device) for tensor in gain_and_offset(batchnorm))
    bias = offset if layer.bias is None else layer.bias.double() * gain + offset
    codes = layer.qweight * gain.sign().to(torch.int8).reshape(-1, 1, 1, 1)
    layer.weight_scale = torch.where(gain == 0, 1.0, layer.weight_scale.double() * gain.abs()).float()
    layer.bias = bias.float()
    layer.qweight = codes
