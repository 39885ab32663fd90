"""How far a result is from the expected one: normalised error, its form in dB (SQNR), and the cosine, all from sums in float64.

SQNR = 10 log10(sum y^2 / sum (y - y_q)^2) dB        normalised error = sum (y - y_q)^2 / sum y^2
"""

import math

from torch import Tensor


class Sums:
    """Sums over the elements of pairs of tensors: the expected one and the one that was computed instead."""

    def __init__(self) -> None:
        self.signal = self.noise = self.power = self.product = 0.0

    def add(self, expected: Tensor, got: Tensor) -> None:
        expected, got = expected.detach().double(), got.detach().double()
        self.signal += float(expected.square().sum())
        self.noise += float((expected - got).square().sum())
        self.power += float(got.square().sum())
        self.product += float((expected * got).sum())

    @property
    def error(self) -> float:
        """The normalised error."""
        if self.signal:
            return self.noise / self.signal
        return math.inf if self.noise else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between both; 1 if both are zero."""
        length = math.sqrt(self.signal) * math.sqrt(self.power)
        return self.product / length if length else float(self.signal == self.power)


def decibel(error: float) -> float:
    """A normalised error as an SQNR in dB."""
    return math.inf if error == 0 else -10 * math.log10(error)


def sqnr(expected: Tensor, got: Tensor) -> float:
    """Signal to quantization noise in dB; infinite where nothing is lost."""
    sums = Sums()
    sums.add(expected, got)
    return decibel(sums.error)
