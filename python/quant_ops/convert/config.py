"""How to quantize a model: one frozen dataclass per scheme, with a JSON round trip."""

import dataclasses

from .. import _description
from .._description import Config
from ..observers import Observer
from ..simulation.config import Simulated


@dataclasses.dataclass(frozen=True)
class Int8Dynamic(Config):
    """int8 weights, one scale per output channel; activations quantized to int8 in every call, from their data.

    Linear quantizes per row (token), Conv2d per sample. Needs no calibration data.

    Attributes:
        asymmetric: activations get a zero point, so that those which are one-sided (after ReLU, GELU) use all codes. Symmetric ones
            are a little faster, on GPUs most of all, and sum up to 131071 products exactly instead of 65793.
        weight_bits: 2 to 8; fewer than 8 bits coarsen the weights, which stay int8 in memory.
        weight_observer: how each channel's weight scale is chosen, by the name of an observer; "mse" helps below 8 bits.
    """

    asymmetric: bool = True
    weight_bits: int = 8
    weight_observer: str = "minmax"

    def __post_init__(self) -> None:
        self._expect_integer("weight_bits", 2, 8)
        self._expect_choice("weight_observer", Observer.kinds)


@dataclasses.dataclass(frozen=True)
class Int8Static(Config):
    """int8 weights, one scale per output channel; activations quantized to int8 with scales from :func:`calibrate`.

    Attributes:
        observer: how the scale of a layer's input is chosen: "minmax", "ema", "percentile", "mse", "entropy", "histogram" or "lsq".
        asymmetric: as in :class:`Int8Dynamic`; on the CPU it costs no time here.
        num_steps: sets of activation scales, for models that are called step after step; see :func:`timestep`.
        weight_bits: 2 to 8; fewer than 8 bits coarsen the weights, which stay int8 in memory.
        weight_observer: how each channel's weight scale is chosen; "mse" helps below 8 bits.
        percentile: of the "percentile" observer: percent of the values that must not be clipped (of either sign, if asymmetric).
        momentum: of the "ema" observer: weight of the newest batch.
    """

    observer: str = "minmax"
    asymmetric: bool = True
    num_steps: int = 1
    weight_bits: int = 8
    weight_observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.1

    def __post_init__(self) -> None:
        self._expect_choice("observer", Observer.kinds)
        self._expect_integer("num_steps", 1)
        self._expect_integer("weight_bits", 2, 8)
        self._expect_choice("weight_observer", Observer.kinds)
        self._expect(50 < self.percentile <= 100, f"50 < percentile <= 100, got {self.percentile}")
        self._expect(0 < self.momentum <= 1, f"0 < momentum <= 1, got {self.momentum}")


Int8Scheme = Int8Dynamic | Int8Static
Scheme = Int8Scheme | Simulated

_description.register(Int8Dynamic, Int8Static)


def from_json(text: str) -> Scheme:
    """The config that :meth:`Config.to_json` wrote. Raises ValueError for another name or field."""
    config: Scheme = _description.from_json(Config.kind, text)
    return config
