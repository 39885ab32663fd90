"""Formats of one element: integers, floating point, fixed point. What calls have in common is in format.py."""

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from ..ops import quant_float_forward, quant_tensor_forward
from .format import Format
from .scaling import compute_dtype

SPECIAL = ("none", "nan", "ieee")
# by exponent and mantissa bits: OCP FP8, IEEE 754 binary16
_STANDARD_SPECIAL = {(4, 3): "nan", (5, 2): "ieee", (5, 10): "ieee"}


@dataclasses.dataclass(frozen=True, repr=False)
class IntFormat(Format):
    """Integers times a scale, symmetric around 0: ``scale = amax / qmax`` for codes in [qmin, qmax].

    The rounding of "Integer Quantization for Deep Learning Inference" (arXiv 2004.09602). Rounding to nearest even is
    :func:`quant_tensor_forward`, whose gradient by a scale or an amax that requires one is that of a learned step size (LSQ, arXiv
    1902.08153).

    Attributes:
        bits: 2 to 24.
        narrow: leave out the least code of signed integers, so that the range is symmetric.
        signed: codes from ``-2^(bits - 1)``; otherwise from 0 to ``2^bits - 1``, and what is negative becomes 0.
        rounding: "nearest_even", "nearest_away" (ties away from 0), "toward_zero" or "stochastic".

    Raises:
        ValueError: bits or rounding is not one of those above.
    """

    bits: int
    narrow: bool = True
    signed: bool = True
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        self._expect_integer("bits", 2, 24)
        self._expect_bool("narrow", "signed")
        self._expect_rounding()

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return self.narrow - 2 ** (self.bits - 1) if self.signed else 0

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - self.signed) - 1

    @property
    def largest(self) -> float:
        return float(self.qmax)

    @property
    def takes_amax(self) -> bool:
        return True

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        assert scale is not None
        return _to_steps(self, x, scale, self.qmin, self.qmax, seed, generator)


@dataclasses.dataclass(frozen=True, repr=False)
class FloatFormat(Format):
    """Floating point with any number of exponent and mantissa bits, and a sign.

    Normal numbers are ``(1 + mantissa / 2^mantissa_bits) * 2^(exponent - bias)``. As in "FP8 Quantization: The Power of the
    Exponent" (arXiv 2208.09225), with a scale it stands for a format whose bias is a real number.

    Attributes:
        exponent_bits: 1 to 8.
        mantissa_bits: 0 to 23.
        bias: of the exponent; by default ``2^(exponent_bits - 1) - 1``, and None if it is that.
        special: what the codes with the largest exponent are: numbers ("none"), numbers but for the last, which is NaN ("nan", as
            E4M3 of OCP FP8 has it), or infinity and NaN ("ieee"). It sets the largest value, also of a saturating format. By
            default what the published standard with these widths has, or "none".
        saturate: values beyond the largest, and infinities, become the largest one. Otherwise they become infinity ("ieee") or NaN
            ("nan").
        subnormals: whether there are values between 0 and the smallest normal number.
        rounding: as in :class:`IntFormat`.
        scaled: whether there is a scale, ``amax / largest``.

    Raises:
        ValueError: a width, bias, or combination for which there is no format: with no value but 0, or with values that float32
            cannot hold.
    """

    exponent_bits: int
    mantissa_bits: int
    bias: int | None = None
    special: str | None = None
    saturate: bool = True
    subnormals: bool = True
    rounding: str = "nearest_even"
    scaled: bool = False

    def __post_init__(self) -> None:
        self._expect_integer("exponent_bits", 1, 8)
        self._expect_integer("mantissa_bits", 0, 23)
        integer = isinstance(self.bias, int) and not isinstance(self.bias, bool)
        self._expect(self.bias is None or integer, f"bias to be an integer or None, got {self.bias!r}")
        if self.bias == _default_bias(self.exponent_bits):
            object.__setattr__(self, "bias", None)  # so that equal formats compare equal
        if self.special is None:
            object.__setattr__(self, "special", self._standard_special())
        self._expect_choice("special", SPECIAL)
        self._expect_bool("saturate", "subnormals", "scaled")
        self._expect_rounding()
        self._expect(
            self.exponent_bits < 8 or (self.bias is None and self.special == "ieee"),
            f"float32's own exponents with 8 bits, bias=127 and special='ieee', got {self.exponent_bias} and {self.special!r}",
        )
        self._expect(
            self.saturate or self.special != "none",
            "saturate == True with special == 'none', got False. Formats without codes of infinity and NaN saturate.",
        )
        least = 1 if self.subnormals else 2**self.mantissa_bits
        self._expect(
            self._last_code >= least,
            f"a format with a value other than 0, got {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits with "
            f"special {self.special!r} and subnormals {self.subnormals}",
        )
        least, bias = max((self._last_code >> self.mantissa_bits) - 127, -126), self.exponent_bias
        self._expect(least <= bias <= 127, f"{least} <= bias <= 127, so that float32 has its normal numbers, got {bias}")

    def _standard_special(self) -> str:
        """That of the published standard with these widths, and its bias; float32 lacks the last exponent of 8 bits."""
        standard = _STANDARD_SPECIAL.get((self.exponent_bits, self.mantissa_bits), "none") if self.bias is None else "none"
        return "ieee" if self.exponent_bits == 8 else standard

    def _default(self, field: "dataclasses.Field[Any]") -> Any:
        return self._standard_special() if field.name == "special" else super()._default(field)

    @property
    def exponent_bias(self) -> int:
        """The bias, the default one too."""
        return _default_bias(self.exponent_bits) if self.bias is None else self.bias

    @property
    def _last_code(self) -> int:
        """That of the largest number: exponent and mantissa without the sign."""
        reserved = {"none": 0, "nan": 1, "ieee": 2**self.mantissa_bits}[str(self.special)]
        return 2 ** (self.exponent_bits + self.mantissa_bits) - 1 - reserved

    @property
    def largest(self) -> float:
        exponent, mantissa = divmod(self._last_code, 2**self.mantissa_bits)
        steps = mantissa + 2**self.mantissa_bits if exponent else mantissa
        return float(steps * 2.0 ** (max(exponent, 1) - self.exponent_bias - self.mantissa_bits))

    @property
    def bits(self) -> float:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def takes_amax(self) -> bool:
        return self.scaled

    @property
    def _takes_scale(self) -> bool:
        return True

    def _remedy(self) -> str:
        return f"Use {self.with_(scaled=True)}."

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        return quant_float_forward(
            x,
            self.exponent_bits,
            self.mantissa_bits,
            scale,
            bias=self.bias,
            special=self.special,
            saturate=self.saturate,
            subnormals=self.subnormals,
            **self._random(seed, generator),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class FixedPoint(Format):
    """Fixed point: multiples of ``2^-fraction_bits`` in ``[-2^(bits - fraction_bits - 1), 2^(bits - fraction_bits - 1))``.

    The format of "Deep Learning with Limited Numerical Precision" (arXiv 1502.02551).

    Attributes:
        bits: 2 to 24, sign and fraction included.
        fraction_bits: those behind the point; negative for multiples of larger powers of two.
        clamp: values beyond the range become its ends. Otherwise they are rounded to the same multiples (not for float64).
        symmetric: leave out the least value.
        rounding: as in :class:`IntFormat`.

    Raises:
        ValueError: a field is not one of those above, or there are values that float32 cannot hold.
    """

    bits: int
    fraction_bits: int
    clamp: bool = True
    symmetric: bool = False
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        self._expect_integer("bits", 2, 24)
        self._expect_integer("fraction_bits", self.bits - 128, 126)
        self._expect_bool("clamp", "symmetric")
        self._expect_rounding()

    @property
    def largest(self) -> float:
        """Infinite without ``clamp``."""
        return math.ldexp(2 ** (self.bits - 1) - 1, -self.fraction_bits) if self.clamp else math.inf

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        step = torch.full((), 2.0**-self.fraction_bits, dtype=compute_dtype(x), device=x.device)
        if self.clamp:
            least = self.symmetric - 2 ** (self.bits - 1)
            return _to_steps(self, x, step, least, 2 ** (self.bits - 1) - 1, seed, generator)
        if x.dtype == torch.float64:
            raise TypeError(f"quant_ops.{self}: expected x to be float32, float16 or bfloat16 without clamp, got {x.dtype}")
        # From 2^23 steps on, float32 has whole steps only.
        whole = x.detach().abs() >= 2.0 ** (23 - self.fraction_bits)
        return torch.where(whole, x, _to_steps(self, x, step, 1 - 2**24, 2**24 - 1, seed, generator))


def _default_bias(exponent_bits: int) -> int:
    return int(2 ** (exponent_bits - 1) - 1)


def _to_steps(
    format: Format, x: Tensor, step: Tensor, least: int, most: int, seed: Tensor | int | None, generator: torch.Generator | None
) -> Tensor:
    """x rounded to a whole number of steps within [least, most].

    Roundings other than to nearest even are those of a floating format with one exponent bit, whose values are equally spaced: with
    ``b`` bits they are 0 to 2^b - 1 steps of either sign.
    """
    if format.rounding == "nearest_even":
        return quant_tensor_forward(x, step, None, least, most)
    bits = max(most, -least).bit_length()
    rounded = quant_float_forward(x, 1, bits - 1, step, bias=2 - bits, **format._random(seed, generator))
    if least == -most == 1 - 2**bits:
        return rounded
    return torch.clamp(rounded, (least * step).to(x.dtype), (most * step).to(x.dtype))
