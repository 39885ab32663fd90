"""The quantize family in ONNX: codes by QuantizeLinear, which divides and rounds to nearest even as the operators do.

    clamp(rne(x / s) + z, qmin, qmax) = QuantizeLinear(clip(x, (qmin - z) * s, (qmax - z) * s), s, z)

holds for every s, since ``fl(q * s) / s`` is within 2^-22 of q and rounds to it. Read first: builder.py.
"""

import dataclasses
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .builder import IR_DTYPES, TINY, Builder, sizes

# ---- scales ----------------------------------------------------------------------------------------------------------------


def choose(b: Builder, x: ir.Value, dims: list[int], qmin: int, qmax: int, asymmetric: bool) -> tuple[ir.Value, ir.Value | None]:
    """Scale and, if asymmetric, ``zero_point - qmin`` as a float: reduced over the dimensions, which stay as size 1.

    A slice of zeros gets the smallest normal scale, with the same codes as any other.
    """
    axes = b.axes(*dims) if dims else None
    if not asymmetric:
        most = b.op("ReduceMax", b.op("Abs", x), axes, keepdims=1)
        return b.op("Max", b.op("Div", most, b.number(qmax)), b.number(TINY)), None
    zero = b.number(0)
    high = b.op("Max", b.op("ReduceMax", x, axes, keepdims=1), zero)
    low = b.op("Min", b.op("ReduceMin", x, axes, keepdims=1), zero)
    scale = b.op("Max", b.op("Div", b.op("Sub", high, low), b.number(qmax - qmin)), b.number(TINY))
    steps = b.op("Neg", b.op("Round", b.op("Div", low, scale)))
    return scale, b.op("Clip", steps, zero, b.number(qmax - qmin))


def choose_qparams(b: Builder, tensor: ir.Value, dim: list[int], qmin: int, qmax: int, asymmetric: bool = False) -> list[ir.Value]:
    """:func:`quant_ops.choose_qparams` of a float32 tensor."""
    x = b.float32(tensor)
    scale, steps = choose(b, x, list(dim), qmin, qmax, asymmetric)
    is_zero = b.op("Equal", b.op("ReduceMax", b.op("Abs", x), b.axes(*dim) if dim else None, keepdims=1), b.number(0))
    shown = b.op("Where", is_zero, b.number(1), scale)
    if steps is None:
        zeros = b.op("Cast", b.op("Mul", shown, b.number(0)), to=int(ir.DataType.INT32))
        return [shown, zeros]
    return [shown, b.op("Cast", b.op("Add", steps, b.number(qmin)), to=int(ir.DataType.INT32))]


def quantize_rows(b: Builder, x: ir.Value, asymmetric: bool = False) -> list[ir.Value]:
    """:func:`quant_ops.quantize_rows`."""
    scale, zero_point = choose_qparams(b, x, [-1], -128 if asymmetric else -127, 127, asymmetric)
    scale.shape = zero_point.shape = ir.Shape([*sizes(x)[:-1], 1])
    codes = Codes(-128, 127, torch.int8)
    return [quantized(b, b.float32(x), scale, zero_point if asymmetric else None, codes), scale, zero_point]


# ---- codes -----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Codes:
    """A range of codes, and the type that they are written in, after ``shift`` was added."""

    qmin: int
    qmax: int
    dtype: torch.dtype
    shift: int = 0

    @classmethod
    def of(cls, qmin: int, qmax: int, shift: int = 0) -> "Codes | None":
        """In the narrowest type that QuantizeLinear writes; None if there is none."""
        for dtype in (torch.int8, torch.uint8, torch.int16, torch.uint16):
            info = torch.iinfo(dtype)
            if info.min <= qmin and qmax <= info.max:
                shifted = shift and dtype == torch.int8
                return cls(qmin, qmax, torch.uint8 if shifted else dtype, shift if shifted else 0)
        return None

    @property
    def is_full(self) -> bool:
        """Whether QuantizeLinear alone clamps to the range."""
        info = torch.iinfo(self.dtype)
        return self.qmin + self.shift == info.min and self.qmax + self.shift == info.max


def written_zero_point(b: Builder, zero_point: ir.Value | None, codes: Codes) -> ir.Value | None:
    """The zero point in the type of the codes; None stands for 0."""
    if zero_point is None:
        return b.tensor(codes.shift, dtype=codes.dtype)
    known = b.constant(zero_point)
    if known is not None:
        return b.tensor((_whole(known, codes) + codes.shift).to(codes.dtype))
    if zero_point.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
        zero_point = b.op("Clip", b.op("Round", b.float32(zero_point)), b.number(codes.qmin), b.number(codes.qmax))
    shifted = b.op("Add", b.op("Cast", zero_point, to=int(ir.DataType.INT32)), b.tensor(codes.shift, dtype=torch.int32))
    return b.op("Cast", shifted, to=int(IR_DTYPES.get(codes.dtype, ir.DataType.UINT16)))


def _whole(zero_point: Tensor, codes: Codes) -> Tensor:
    """Integer zero points; floating ones are rounded and clamped."""
    if zero_point.is_floating_point():
        zero_point = zero_point.double().round().clamp(codes.qmin, codes.qmax)
    return zero_point.to(torch.int32)


@dataclasses.dataclass(frozen=True)
class Grid:
    """Scale and zero point as QuantizeLinear and DequantizeLinear take them, for x as it is or with its rows as one dimension."""

    scale: ir.Value
    zero_point: ir.Value | None
    axis: int | None = None
    rows: bool = False

    @property
    def attributes(self) -> dict[str, Any]:
        """Of both nodes."""
        return {} if self.axis is None else {"axis": self.axis}


def grid_of(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, codes: Codes) -> Grid | None:
    """None where the standard has no such granularity: a scale that varies along several dimensions, not all but the last."""
    shape, rank = sizes(scale), len(sizes(x))
    written = written_zero_point(b, zero_point, codes)
    alike = zero_point is None or sizes(zero_point) == shape or (zero_point.shape is not None and elements(zero_point) == 1)
    if not alike:
        return None
    single = zero_point is None or elements(zero_point) == 1
    if elements(scale) == 1:
        return Grid(_scalar(b, scale), _scalar(b, written)) if single else None
    shape = [1] * (rank - len(shape)) + shape
    varying = [dim for dim, size in enumerate(shape) if size != 1]
    if len(varying) == 1 and rank:
        scale = b.reshape(scale, -1)
        return Grid(scale, _spread(b, written, scale, single), varying[0])
    if rank > 1 and shape[-1] == 1 and all(shape[dim] == sizes(x)[dim] for dim in range(rank - 1)):
        scale = b.reshape(scale, -1)
        return Grid(scale, _spread(b, written, scale, single), 0, rows=True)
    return None


def elements(value: ir.Value) -> int:
    """0 for a number that is not known."""
    count = 1
    for size in sizes(value):
        count *= size if isinstance(size, int) else 0
    return count


def _scalar(b: Builder, value: ir.Value | None) -> Any:
    if value is None:
        return None
    known = b.constant(value)
    return b.tensor(known.reshape(())) if known is not None else b.op("Reshape", value, b.tensor([], dtype=torch.int64))


def _spread(b: Builder, zero_point: ir.Value | None, scale: ir.Value, single: bool) -> ir.Value | None:
    """One zero point for each scale."""
    if zero_point is None or not single:
        return None if zero_point is None else b.reshape(zero_point, -1)
    known = b.constant(scale)
    if known is not None and (value := b.constant(zero_point)) is not None:
        return b.tensor(value.reshape(-1).expand(known.numel()).clone())
    return b.op("Expand", b.reshape(zero_point, -1), b.op("Shape", scale))


def quantized(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, codes: Codes) -> ir.Value:
    """The codes of a float32 x, in its shape."""
    grid = grid_of(b, x, scale, zero_point, codes)
    if grid is None:
        steps = _steps(b, x, scale, zero_point, codes.qmin, codes.qmax)
        if codes.shift:
            steps = b.op("Add", steps, b.number(codes.shift))
        return b.op("Cast", steps, to=int(IR_DTYPES.get(codes.dtype, ir.DataType.UINT16)))
    x = _clipped(b, x, scale, zero_point, codes)
    if not grid.rows:
        return b.op("QuantizeLinear", x, grid.scale, grid.zero_point, **grid.attributes)
    width = _width(x)
    rows = b.op("QuantizeLinear", b.reshape(x, -1, width), grid.scale, grid.zero_point, axis=0)
    return b.like_rows(rows, x, width)


def _width(x: ir.Value) -> int:
    size = sizes(x)[-1]
    assert isinstance(size, int)
    return size


def _clipped(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, codes: Codes) -> ir.Value:
    """x with what lies beyond the range of codes brought to its ends, where QuantizeLinear clamps to a wider range."""
    if codes.is_full:
        return x
    ends = []
    for end in (codes.qmin, codes.qmax):
        steps = b.number(end)
        if zero_point is not None:
            steps = b.op("Sub", steps, b.op("Cast", zero_point, to=int(ir.DataType.FLOAT)))
        ends.append(b.op("Mul", steps, b.float32(scale)))
    y = b.op("Min", b.op("Max", x, ends[0]), ends[1])
    y.shape, y.dtype = x.shape, x.dtype
    return y


def _steps(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, qmin: int, qmax: int) -> ir.Value:
    """The codes as floating numbers, of x's type, by elementary operations."""
    dtype = x.dtype
    assert dtype is not None
    steps = b.op("Round", b.op("Div", x, b.cast(scale, dtype)))
    low, high = (
        b.tensor(float(end), dtype=torch.float64 if dtype == ir.DataType.DOUBLE else torch.float32) for end in (qmin, qmax)
    )
    if zero_point is not None:
        steps = b.op("Add", steps, b.op("Cast", zero_point, to=int(dtype)))
    return b.op("Clip", steps, low, high)


# ---- operators -------------------------------------------------------------------------------------------------------------


def quant_tensor_forward(
    b: Builder,
    tensor: ir.Value,
    scale: ir.Value,
    zero_point: ir.Value | None,
    qmin: int,
    qmax: int,
    asymmetric: bool = False,
    simulate: bool = True,
    block_size: Any = None,
) -> list[ir.Value]:
    """:func:`quant_ops.quant_tensor_forward`: QuantizeLinear, and DequantizeLinear when simulating."""
    zero_point = zero_point if asymmetric else None
    shown = tensor.dtype
    assert shown is not None
    assert block_size is None
    codes = Codes.of(qmin, qmax, b.settings.shift if simulate else 0)
    double = shown == ir.DataType.DOUBLE
    x = tensor if double else b.float32(tensor)
    grid = None if codes is None or double else grid_of(b, x, scale, zero_point, codes)
    if not simulate:
        assert codes is not None
        return [_codes_only(b, x, scale, zero_point, codes, double)]
    if grid is None or codes is None:
        steps = _steps(b, x, scale, zero_point, qmin, qmax)
        if zero_point is not None:
            steps = b.op("Sub", steps, b.op("Cast", zero_point, to=int(x.dtype or ir.DataType.FLOAT)))
        return [b.cast(b.op("Mul", steps, b.cast(scale, x.dtype or ir.DataType.FLOAT)), shown, x.dtype)]
    flat = _clipped(b, x, scale, zero_point, codes)
    flat = b.reshape(flat, -1, _width(x)) if grid.rows else flat
    q = b.op("QuantizeLinear", flat, grid.scale, grid.zero_point, **grid.attributes)
    y = b.op("DequantizeLinear", q, grid.scale, grid.zero_point, **grid.attributes)
    return [b.cast(b.like_rows(y, x, _width(x)) if grid.rows else y, shown, ir.DataType.FLOAT)]


def _codes_only(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None, codes: Codes, double: bool) -> ir.Value:
    if double:
        return b.op("Cast", _steps(b, x, scale, zero_point, codes.qmin, codes.qmax), to=int(IR_DTYPES[codes.dtype]))
    return quantized(b, x, scale, zero_point, codes)


def dequant_tensor(
    b: Builder, tensor: ir.Value, scale: ir.Value, zero_point: ir.Value | None = None, *, dtype: ir.DataType, block_size: Any = None
) -> list[ir.Value]:
    """:func:`quant_ops.dequant_tensor`, by elementary operations, which allow every granularity."""
    assert block_size is None
    kind = ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT
    steps = b.op("Cast", tensor, to=int(ir.DataType.INT32))
    if zero_point is not None:
        steps = b.op("Sub", steps, b.op("Cast", zero_point, to=int(ir.DataType.INT32)))
    return [b.cast(b.op("Mul", b.op("Cast", steps, to=int(kind)), b.cast(scale, kind)), dtype, kind)]


FLOAT8 = {(4, 3): ir.DataType.FLOAT8E4M3FN, (5, 2): ir.DataType.FLOAT8E5M2}


def is_float8(options: dict[str, Any]) -> bool:
    """Whether quant_float_forward with these options is a cast of the standard: E4M3 or E5M2 of OCP FP8 that saturates."""
    widths = options["exponent_bits"], options["mantissa_bits"]
    special = {(4, 3): 1, (5, 2): 2}.get(widths)
    standard = special is not None and options["bias"] in (None, 2 ** (widths[0] - 1) - 1) and options["special"] in (None, special)
    return standard and options["saturate"] and options["subnormals"] and not options["rounding"] and options["block_size"] is None


def quant_float_forward(
    b: Builder, tensor: ir.Value, exponent_bits: int, mantissa_bits: int, scale: ir.Value | None = None, **_: Any
) -> list[ir.Value]:
    """:func:`quant_ops.quant_float_forward` for E4M3 and E5M2: a cast and back, of x / scale."""
    x = b.float32(tensor)
    shown = tensor.dtype
    assert shown is not None
    if scale is not None:
        x = b.op("Div", x, b.float32(scale))
    codes = b.op("Cast", x, to=int(FLOAT8[exponent_bits, mantissa_bits]), saturate=1)
    y = b.op("Cast", codes, to=int(ir.DataType.FLOAT))
    y = b.op("Mul", y, b.float32(scale)) if scale is not None else y
    return [b.cast(y, shown, ir.DataType.FLOAT)]
