"""Formats in which blocks of elements share a scale, which follows from the largest magnitude of each block.

Blocks lie along one dimension: along K for both operands of a product, so ``dim=-1`` for the input and the weight of a Linear
layer, 1 for those of a convolution, and -1 and -2 for the operands of ``torch.bmm``. In the backward pass they lie along the
dimension that is summed there: ``along`` changes it. The last block of a dimension may be shorter. A block that holds NaN or
infinity becomes NaN. What calls have in common is in format.py.
"""

import dataclasses
import math

import torch
from torch import Tensor

from ..ops import quant_block_forward, quant_float_forward
from .elementwise import FloatFormat
from .format import Format, Self
from .scaling import scale_from, scale_of_data

# Rules for a scale that is a power of two, in the words of quant_block_forward.
SCALE_RULES = ("floor", "even", "ceil", "round_up")
_E4M3_LARGEST = 448.0


class BlockFormat(Format):
    """A format whose blocks lie along a dimension ``dim``."""

    dim: int

    def along(self: Self, dim: int) -> Self:
        return self.with_(dim=dim)

    def _expect_dim(self) -> None:
        integer = isinstance(self.dim, int) and not isinstance(self.dim, bool)
        self._expect(integer, f"dim to be an integer, got {self.dim!r}")


@dataclasses.dataclass(frozen=True, repr=False)
class MX(BlockFormat):
    """Microscaling: elements of a floating format, and for each block a scale that is a power of two (E8M0, 8 bits).

    As in the OCP Microscaling Formats (MX) specification v1.0, section 6.3, whose formats are MXFP8_E4M3, MXFP8_E5M2, MXFP6_E3M2,
    MXFP6_E2M3, MXFP4 and MXINT8. A block of zeros stays zeros; a scale has an exponent of at least -127.

    Attributes:
        element: format of the elements: saturating, with subnormals, rounding to nearest even and not scaled.
        block_size: elements that share a scale.
        dim: the dimension that blocks lie along.
        scale_rule: exponent of the scale, where emax is that of the element's largest value: "floor", ``floor(log2(amax)) - emax``,
            is OCP's and clips the largest elements of some blocks; "even" takes the amax that is rounded to the element's
            mantissa first; "ceil" is ``ceil(log2(amax)) - emax``; "round_up" is ``ceil(log2(amax / largest))`` and never clips.
        rounding: of the elements, as in :class:`IntFormat`.

    Raises:
        ValueError: a field is not one of those above.
    """

    element: FloatFormat
    block_size: int = 32
    dim: int = -1
    scale_rule: str = "floor"
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        element = self.element
        self._expect(
            isinstance(element, FloatFormat), f"element to be a FloatFormat, got {element}. MXINT8's is FloatFormat(1, 6, bias=1)."
        )
        plain = element.with_(saturate=True, subnormals=True, rounding="nearest_even", scaled=False)
        self._expect(element == plain, f"an element like {plain}, got {element}. The rounding is MX's own.")
        self._expect_integer("block_size", 1)
        self._expect_dim()
        self._expect_choice("scale_rule", SCALE_RULES)
        self._expect_rounding()

    @property
    def largest(self) -> float:
        return self.element.largest

    @property
    def bits(self) -> float:
        return self.element.bits + 8 / self.block_size

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        return quant_block_forward(
            x,
            self.dim,
            self.block_size,
            self.element.exponent_bits,
            self.element.mantissa_bits,
            bias=self.element.bias,
            special=self.element.special,
            scale_rule=self.scale_rule,
            **self._random(seed, generator),
        )


@dataclasses.dataclass(frozen=True, repr=False)
class NVFP4Format(BlockFormat):
    """NVIDIA's 4-bit format: E2M1 elements, and for each 16 of them a scale ``amax / 6``, rounded to E4M3 and at least 2^-6.

    Attributes:
        two_level: whether the tensor has a float32 scale as well, its ``amax / (448 * 6)``, of which the blocks' scales are
            multiples. Without it, blocks are clipped beyond 448 * 6, and coarse below 6 * 2^-6.
        dim: the dimension that blocks lie along.
        rounding: of the elements, as in :class:`IntFormat`.

    Raises:
        ValueError: a field is not one of those above.
    """

    two_level: bool = False
    dim: int = -1
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        self._expect_bool("two_level")
        self._expect_dim()
        self._expect_rounding()

    @property
    def largest(self) -> float:
        return 6.0

    @property
    def bits(self) -> float:
        return 4 + 8 / 16

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        tensor_scale = scale_from(self, x, None, None, self.largest * _E4M3_LARGEST) if self.two_level else None
        return quant_block_forward(x, self.dim, 16, 2, 1, tensor_scale, scale_rule="e4m3", **self._random(seed, generator))


@dataclasses.dataclass(frozen=True, repr=False)
class BlockFloat(BlockFormat):
    """Block floating point: signed integers that share an exponent, the largest magnitude's.

    With e that exponent the values are multiples of ``2^(e + 2 - element_bits)`` up to ``2^(element_bits - 1) - 1`` of them, of
    either sign. BlockFloat(8, block_size=32) is MXINT8.

    Attributes:
        element_bits: 2 to 25, the sign included.
        axis: dimension of whose indices each has an exponent; by default the whole tensor has one.
        block_size: elements along ``dim`` that share an exponent, instead.
        dim: the dimension that blocks lie along.
        rounding: as in :class:`IntFormat`.

    Raises:
        ValueError: a field is not one of those above, or both an axis and a block_size are given.
    """

    element_bits: int
    axis: int | None = None
    block_size: int | None = None
    dim: int = -1
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        self._expect_integer("element_bits", 2, 25)
        integer = isinstance(self.axis, int) and not isinstance(self.axis, bool)
        self._expect(self.axis is None or integer, f"axis to be an integer or None, got {self.axis!r}")
        if self.block_size is not None:
            self._expect_integer("block_size", 1)
            self._expect(self.axis is None, f"axis or block_size, got both: {self.axis} and {self.block_size}")
        self._expect_dim()
        self._expect_rounding()

    @property
    def largest(self) -> float:
        return 2 - 2.0 ** (2 - self.element_bits)

    @property
    def bits(self) -> float:
        return self.element_bits + (0 if self.block_size is None else 8 / self.block_size)

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        mantissa_bits, rounding = self.element_bits - 2, self._random(seed, generator)
        if self.block_size is not None:
            return quant_block_forward(x, self.dim, self.block_size, 1, mantissa_bits, bias=1, **rounding)
        amax = scale_of_data(self, x, self.axis, 1.0)
        power = amax / (2 * torch.frexp(amax).mantissa)  # 2^floor(log2(amax)), exactly
        return quant_float_forward(x, 1, mantissa_bits, power, bias=1, **rounding)


@dataclasses.dataclass(frozen=True, repr=False)
class ABFP(BlockFormat):
    """Adaptive block floating point (arXiv 2205.06287): signed integers, and for each block a bfloat16 scale, its amax.

    ``scale = bfloat16(amax) / gain``, and the values are multiples of ``scale / (2^(element_bits - 1) - 1)`` up to it.

    Attributes:
        element_bits: 2 to 25, the sign included.
        block_size: elements that share a scale; the paper's vectors have 8, 32 and 128.
        gain: makes the steps smaller, and clips beyond ``amax / gain``.
        dim: the dimension that blocks lie along.
        rounding: as in :class:`IntFormat`.

    Raises:
        ValueError: a field is not one of those above.
    """

    element_bits: int
    block_size: int = 64
    gain: float = 1.0
    dim: int = -1
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        self._expect_integer("element_bits", 2, 25)
        self._expect_integer("block_size", 1)
        number = isinstance(self.gain, int | float) and not isinstance(self.gain, bool)
        self._expect(number and 0 < self.gain < math.inf, f"0 < gain < inf, got {self.gain!r}")
        self._expect_dim()
        self._expect_rounding()

    @property
    def largest(self) -> float:
        return 2 - 2.0 ** (2 - self.element_bits)

    @property
    def bits(self) -> float:
        return self.element_bits + 16 / self.block_size

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        return quant_block_forward(
            x,
            self.dim,
            self.block_size,
            1,
            self.element_bits - 2,
            bias=1,
            scale_rule="bfloat16",
            scale_divisor=self.largest * self.gain,
            **self._random(seed, generator),
        )
