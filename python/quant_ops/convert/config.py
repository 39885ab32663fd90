"""How to quantize a model: one frozen dataclass per scheme, with a JSON round trip."""

import dataclasses
from typing import Any

from .. import _description
from .._description import Config
from ..nn import GROUP_SIZES, ZERO_POINTS
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
        backward: gradients flow through the layers to their inputs, so that adapters (LoRA) train around or before them; the
            weights stay as they are.
    """

    asymmetric: bool = True
    weight_bits: int = 8
    weight_observer: str = "minmax"
    backward: bool = False

    def __post_init__(self) -> None:
        self._expect_integer("weight_bits", 2, 8)
        self._expect_bool("backward")
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
        backward: as in :class:`Int8Dynamic`; where the scale clips an input, its gradient is 0.
    """

    observer: str = "minmax"
    asymmetric: bool = True
    num_steps: int = 1
    weight_bits: int = 8
    weight_observer: str = "minmax"
    percentile: float = 99.99
    momentum: float = 0.1
    backward: bool = False

    def __post_init__(self) -> None:
        self._expect_choice("observer", Observer.kinds)
        self._expect_integer("num_steps", 1)
        self._expect_integer("weight_bits", 2, 8)
        self._expect_choice("weight_observer", Observer.kinds)
        self._expect(50 < self.percentile <= 100, f"50 < percentile <= 100, got {self.percentile}")
        self._expect(0 < self.momentum <= 1, f"0 < momentum <= 1, got {self.momentum}")
        self._expect_bool("backward")


@dataclasses.dataclass(frozen=True)
class WeightOnly(Config):
    """Base class: int8 or int4 weights with a scale for each group of a row, read by operators of their own."""

    group_size: int
    backward: bool = dataclasses.field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.group_size is None:
            object.__setattr__(self, "group_size", -1)
        known = isinstance(self.group_size, int) and not isinstance(self.group_size, bool) and self.group_size in GROUP_SIZES
        self._expect(known, f"group_size 32, 64, 128, 256 or -1 (one group a row of the weight), got {self.group_size!r}")
        self._expect_bool("asymmetric", "backward")

    def settings(self) -> dict[str, Any]:
        """The arguments of ``from_float`` that say what the weight is."""
        raise NotImplementedError

    def linear_settings(self) -> dict[str, Any]:
        """Those that say what becomes of the input of a linear layer, and whether its gradient is wanted."""
        return {"backward": True} if self.backward else {}


@dataclasses.dataclass(frozen=True)
class Int8WeightOnly(WeightOnly):
    """int8 weights; activations stay floating, and so do the products (torchao's int8_weight_only).

    For Linear layers and embeddings whose time is that of reading the weight: few rows in a call.

    Attributes:
        group_size: 32, 64, 128 or 256 consecutive weights of a row share a scale; -1 or None: one scale per output channel.
        asymmetric: the groups have zero points.
        backward: as in :class:`Int8Dynamic`, through linear layers; by keyword alone.
    """

    group_size: int = -1
    asymmetric: bool = False

    def settings(self) -> dict[str, Any]:
        return {"bits": 8, "group_size": self.group_size, "asymmetric": self.asymmetric}


@dataclasses.dataclass(frozen=True)
class Int4WeightOnly(WeightOnly):
    """int4 weights, an eighth of float32; activations stay floating, and so do the products (torchao's int4_weight_only).

    Attributes:
        group_size: 32, 64, 128 or 256 consecutive weights of a row share a scale; -1 or None: one scale per output channel. Smaller
            groups lose less.
        asymmetric: the groups have zero points, which uses all 16 codes of each.
        zero_point: "int": zero points are codes, so that 0 is exact. "float": they are values of the weight, and the range need not
            contain 0 (the FLOAT domain of torchao's int4_weight_only).
        backward: as in :class:`Int8WeightOnly`.
    """

    group_size: int = 128
    asymmetric: bool = True
    zero_point: str = "int"

    def __post_init__(self) -> None:
        super().__post_init__()
        self._expect_choice("zero_point", ZERO_POINTS)
        self._expect(self.asymmetric or self.zero_point == "int", "zero_point='float' only with asymmetric=True, got False")

    def settings(self) -> dict[str, Any]:
        floating = {"zero_point": "float"} if self.zero_point == "float" else {}
        return {"bits": 4, "group_size": self.group_size, "asymmetric": self.asymmetric, **floating}


@dataclasses.dataclass(frozen=True)
class Int8DynamicInt4Weight(WeightOnly):
    """Symmetric int4 weights; activations quantized to int8 per row in every call, with exact products of integers.

    torchao's int8_dynamic_activation_int4_weight (8da4w). For Linear layers alone. The faster one where a call has many rows.

    Attributes:
        group_size: as in :class:`Int4WeightOnly`.
        asymmetric: the activations get a zero point, as in :class:`Int8Dynamic`.
        backward: as in :class:`Int8WeightOnly`.
    """

    group_size: int = 32
    asymmetric: bool = True

    def settings(self) -> dict[str, Any]:
        return {"bits": 4, "group_size": self.group_size, "asymmetric": False}

    def linear_settings(self) -> dict[str, Any]:
        return {"dynamic": True, "asymmetric_input": self.asymmetric, **super().linear_settings()}


Int8Scheme = Int8Dynamic | Int8Static
Scheme = Int8Scheme | WeightOnly | Simulated

_description.register(Int8Dynamic, Int8Static, Int8WeightOnly, Int4WeightOnly, Int8DynamicInt4Weight)


def from_json(text: str) -> Scheme:
    """The config that :meth:`Config.to_json` wrote. Raises ValueError for another name or field."""
    config: Scheme = _description.from_json(Config.kind, text)
    return config
