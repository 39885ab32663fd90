"""What every number format can do. A format rounds floating tensors to the values that it has, and returns the tensor's own dtype.

    y = round_to_grid(x / scale) * scale          scale 1 where a format takes no amax, else amax / largest

Formats of one element are in elementwise.py, those whose blocks of elements share a scale in blocks.py, their names in named.py.
The rounding itself is the operators', ``quant_tensor_forward``, ``quant_float_forward`` and ``quant_block_forward``.
"""

import dataclasses
import json
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .. import _description
from .scaling import scale_from

ROUNDINGS = ("nearest_even", "nearest_away", "toward_zero", "stochastic")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

Self = TypeVar("Self", bound="Format")

# The names of formats that have one; named.py fills it.
NAMES: "dict[Format, str]" = {}


class Format(_description.Description):
    """A number format: a function of tensors that can be compared, hashed, printed and written as JSON.

    Attributes:
        largest: the largest value at scale 1.
        bits: average bits of an element; scales that blocks share are counted.
        takes_amax: whether its scale follows from the largest magnitude of the data, ``amax``.
    """

    kind = "format"
    if TYPE_CHECKING:  # at run time a property here would be taken for the default of a field
        rounding: str

        @property
        def bits(self) -> float: ...

    @property
    def largest(self) -> float:
        raise NotImplementedError

    @property
    def takes_amax(self) -> bool:
        return False

    @property
    def is_stochastic(self) -> bool:
        """Whether it takes a seed."""
        return self.rounding == "stochastic"

    @property
    def _takes_scale(self) -> bool:
        return self.takes_amax

    def __call__(
        self,
        x: Tensor,
        *,
        amax: Tensor | float | None = None,
        axis: int | None = None,
        seed: Tensor | int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """x rounded to the format.

        Differentiable by x: straight through within the format's range, 0 outside.

        Args:
            x: float32, float16, bfloat16 or float64, any shape and strides; formats whose blocks share a scale take no float64.
            amax: largest magnitude that shall be represented, for formats that take it: a number, a floating tensor that
                broadcasts to x, or one of shape ``(C,)`` with ``axis`` given. By default that of x's data. 0 gives scale 1,
                NaN and infinity give NaN.
            axis: dimension of x whose indices have a scale each.
            seed: of stochastic rounding: an int or an int64 tensor of one element. The same seed gives the same result.
            generator: where the seed comes from if none is given; by default torch's own.

        Returns:
            A tensor of x's shape and dtype.

        Raises:
            TypeError: x is not floating.
            ValueError: an amax or axis for a format that takes none, shapes that do not broadcast, an axis out of range.
        """
        self._expect_floating(x)
        scale = None
        if self.takes_amax:
            scale = scale_from(self, x, amax, axis, self.largest)
        elif amax is not None or axis is not None:
            what = "amax" if amax is not None else "axis"
            raise ValueError(
                f"quant_ops.{self}: expected no {what}, got one for a format whose scale it cannot set. {self._remedy()}"
            )
        return self._apply(x, scale, seed, generator)

    def simulate(self, x: Tensor, scale: Tensor, seed: Tensor | int | None = None) -> Tensor:
        """x rounded to the format's values times ``scale``, which broadcasts to x.

        Raises:
            TypeError: x is not floating.
            ValueError: the format's scales are those of its blocks, or the shapes do not broadcast.
        """
        if not self._takes_scale:
            raise ValueError(
                f"quant_ops.{self}.simulate: expected a format that takes a scale, got {self}. Use IntFormat or FloatFormat."
            )
        self._expect_floating(x)
        return self._apply(x, scale, seed, None)

    def along(self: Self, dim: int) -> Self:
        """The same format with its blocks along another dimension. One whose elements share no scale of a block stays as it is."""
        return self

    def with_(self: Self, **changes: Any) -> Self:
        """The format with some fields changed."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        return NAMES.get(self) or self._expression()

    __repr__ = __str__

    def _expression(self) -> str:
        """The call that makes it."""
        arguments = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.default is dataclasses.MISSING:
                arguments.append(repr(value))
            elif value != self._default(field):
                arguments.append(f"{field.name}={value!r}")
        return f"{type(self).__name__}({', '.join(arguments)})"

    def _default(self, field: "dataclasses.Field[Any]") -> Any:
        """The value of a field that need not be written."""
        return field.default

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        raise NotImplementedError

    def _random(self, seed: Tensor | int | None, generator: torch.Generator | None) -> dict[str, Any]:
        """The arguments of an operator that say how it rounds; other roundings do not look at a seed."""
        if self.is_stochastic:
            return {"rounding": self.rounding, "seed": seed, "generator": generator}
        return {"rounding": self.rounding}

    def _remedy(self) -> str:
        return "Use IntFormat, or FloatFormat with scaled=True."

    def _expect_floating(self, x: Tensor) -> None:
        if not isinstance(x, Tensor) or x.dtype not in _DTYPES:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"quant_ops.{self}: expected x to be float32, float16, bfloat16 or float64, got {got}")

    def _expect_rounding(self) -> None:
        self._expect_choice("rounding", ROUNDINGS)


def from_json(text: str) -> Format:
    """The format that :meth:`Format.to_json` wrote. Raises ValueError for another name, field or value."""
    try:
        made: Format = _description.from_json(Format.kind, text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"quant_ops: expected the JSON of a format, got {error}") from None
    return made
