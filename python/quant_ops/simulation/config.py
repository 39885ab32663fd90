"""How to simulate number formats in a model: the config of simulated layers and products."""

import dataclasses
from typing import Any

from .. import _description
from .._description import Config
from ..formats import Format
from ..observers import Observer
from .operand import PER, Per, Rounding


@dataclasses.dataclass(frozen=True)
class Simulated(Config):
    """Layers that compute in floating point with operands rounded to number formats, for research and training.

    ``quantize_`` makes such layers with scales from the data of each call, ``prepare_``, ``calibrate`` and ``convert_`` with
    calibrated ones. They can be trained: gradients pass straight through, as each format says.

    Attributes:
        input, weight, output: a format, such as ``quant_ops.E4M3``, or any function of a tensor that returns one of the same shape;
            None leaves the operand as it is. The output is rounded with the bias added. A function with a parameter ``amax`` is
            given the calibrated one.
        backward: format of the gradient of the output, which is an operand of both products of the backward pass.
        input_per, weight_per, output_per: which elements share the scale of a format that takes an amax: those of the "tensor", of
            a "channel", of a "row" (a token of a linear layer, a sample of a convolution; not calibrated), or of a block of as
            many elements along the dimension that the product sums over, such as 32.
        observer: how ``calibrate`` chooses amax of inputs and outputs: "minmax", "ema", "percentile", "mse", "entropy" or
            "histogram".
        weight_observer: likewise of weights, which are looked at when the layer is converted.
        percentile: of the "percentile" observers: percent of the values that must not be clipped.
        momentum: of the "ema" observer: weight of the newest batch.

    Raises:
        ValueError: a field is not one of those above, or none of the four formats is given.
    """

    input: Rounding | None = None
    weight: Rounding | None = None
    output: Rounding | None = None
    backward: Rounding | None = None
    input_per: Per = "tensor"
    weight_per: Per = "channel"
    output_per: Per = "tensor"
    observer: str = "minmax"
    weight_observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.1

    def __post_init__(self) -> None:
        formats = {name: getattr(self, name) for name in ("input", "weight", "output", "backward")}
        for name, given in formats.items():
            what = f"quant_ops.Simulated: expected {name} to be a format, a function of a tensor or None"
            if given is not None and not callable(given):
                raise TypeError(f"{what}, got {given!r}")
            if isinstance(given, type):
                raise TypeError(f"{what}, got the class {given.__name__}")
        self._expect(
            any(given is not None for given in formats.values()), "a format for input, weight, output or backward, got none"
        )
        for name in ("input_per", "weight_per", "output_per"):
            per = getattr(self, name)
            block = isinstance(per, int) and not isinstance(per, bool) and per >= 1
            self._expect(block or per in PER, f"{name} to be one of {sorted(PER)} or the size of a block, got {per!r}")
        for name in ("observer", "weight_observer"):
            self._expect_choice(name, Observer.kinds)
            self._expect(getattr(self, name) != "lsq", f"{name} to be another than 'lsq', whose scales are those of int8 layers")
        self._expect(50 < self.percentile <= 100, f"50 < percentile <= 100, got {self.percentile}")
        self._expect(0 < self.momentum <= 1, f"0 < momentum <= 1, got {self.momentum}")

    def to_json(self) -> str:
        """The fields as JSON, with the class's name. Raises TypeError for a function in place of a format."""
        for name in ("input", "weight", "output", "backward"):
            given = getattr(self, name)
            if given is not None and not isinstance(given, Format):
                raise TypeError(f"quant_ops.Simulated.to_json: expected {name} to be a format, got the function {given!r}")
        return super().to_json()

    def __str__(self) -> str:
        """The call that makes it, without what is left at its default."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        parts = [f"{f.name}={_shown(given[f.name])}" for f in dataclasses.fields(self) if given[f.name] != f.default]
        return f"Simulated({', '.join(parts)})"


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str | int | float | Format) else getattr(value, "__name__", repr(value))


_description.register(Simulated)
