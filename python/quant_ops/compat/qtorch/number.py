"""qtorch's number formats, and the formats of this package that they stand for."""

import dataclasses

import quant_ops as qo


class Number:
    """A number format of qtorch."""

    def format(self, rounding: str) -> qo.Format:
        """This package's format, which rounds to "nearest" or is "stochastic"."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class FloatingPoint(Number):
    """Floating point with ``exp`` exponent bits, 1 to 8, and ``man`` mantissa bits, 1 to 23. All codes are numbers; it saturates.

    Eight exponent bits are float32's own, and their largest exponent is infinity and NaN.
    """

    exp: int
    man: int

    def __post_init__(self) -> None:
        _expect_integer(self, "exp", 1, 8)
        _expect_integer(self, "man", 1, 23)

    def format(self, rounding: str) -> qo.FloatFormat:
        name = "nearest_away" if rounding == "nearest" else rounding
        if self.exp == 8:
            return qo.FloatFormat(8, self.man, saturate=False, rounding=name)
        return qo.FloatFormat(self.exp, self.man, special="none", rounding=name)

    def __repr__(self) -> str:
        return f"FloatingPoint (exponent={self.exp}, mantissa={self.man})"


FloatingPointNumber = FloatingPoint


@dataclasses.dataclass(frozen=True)
class FixedPoint(Number):
    """Fixed point of ``wl`` bits, ``fl`` of them behind the point: multiples of ``2^-fl`` from ``-2^(wl - fl - 1)`` on.

    ``clamp`` keeps values within the range, ``symmetric`` leaves out the least one.
    """

    wl: int
    fl: int
    clamp: bool = True
    symmetric: bool = False

    def __post_init__(self) -> None:
        _expect_integer(self, "wl", 2, 24)
        _expect_integer(self, "fl", 1, 126)
        for name in ("clamp", "symmetric"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"quant_ops.FixedPoint: expected {name} to be True or False, got {getattr(self, name)!r}")

    def format(self, rounding: str) -> qo.FixedPoint:
        name = "nearest_even" if rounding == "nearest" else rounding
        return qo.FixedPoint(self.wl, self.fl, self.clamp, self.symmetric, name)

    def __repr__(self) -> str:
        return f"FixedPoint (wl={self.wl}, fl={self.fl})"


@dataclasses.dataclass(frozen=True)
class BlockFloatingPoint(Number):
    """Block floating point of ``wl`` bits. Each index of dimension ``dim`` has an exponent; with -1 the whole tensor has one."""

    wl: int
    dim: int = -1

    def __post_init__(self) -> None:
        _expect_integer(self, "wl", 2, 25)
        _expect_integer(self, "dim", -1)

    def format(self, rounding: str) -> qo.BlockFloat:
        name = "nearest_away" if rounding == "nearest" else rounding
        return qo.BlockFloat(self.wl, axis=None if self.dim == -1 else self.dim, rounding=name)

    def __repr__(self) -> str:
        return f"BlockFloatingPoint (wl={self.wl}, dim={self.dim})"


def _expect_integer(number: Number, name: str, low: int, high: int | None = None) -> None:
    value = getattr(number, name)
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        bound = "" if high is None else f" <= {high}"
        raise ValueError(f"quant_ops.{type(number).__name__}: expected {low} <= {name}{bound}, got {value}")
