"""The int8 products in ONNX: by MatMulInteger and ConvInteger with the epilogue of the operators, or between Q/DQ nodes.

    y = float(sum) * (x_scale * weight_scale) + bias

The sums are exact. The operators round y once (a fused multiply-add) and ONNX twice, so results are equal without a bias, and
within the rounding of y with one. Codes are uint8, the int8 ones + 128, unless the user wants int8: ``sum (u - zu) * (v - 128)`` is
the same sum, and onnxruntime on x86 multiplies uint8 by uint8 exactly and fast, uint8 by int8 saturating without VNNI, int8 slowly.
Read first: quantize.py; next: weight_only.py.
"""

import dataclasses
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from .. import ops
from ..ops.int8 import ACTIVATIONS
from .builder import Builder, sizes
from .quantize import Codes, choose, elements, quantized, written_zero_point

_FLOAT, _INT32 = ir.DataType.FLOAT, ir.DataType.INT32
_MOVES = {"Flatten", "Identity", "MaxPool", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}  # of codes, whatever their zero point
_FLOAT_LIMIT = 2**24 // (255 * 128)  # products of codes whose sums float32 holds exactly
_BIAS_LIMIT = 2**30  # of a bias in units of the product, so that its sum with the product stays within int32


def input_codes(b: Builder) -> Codes:
    """int8 codes as products take them."""
    return Codes(-128, 127, b.settings.code_dtype, b.settings.shift)


# ---- operands ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Operand:
    """The input of a product.

    Attributes:
        codes: of the type of input_codes.
        scale: one element, or one a row or sample, with the dimensions of the product.
        zero_point: one element, in the codes' type; None stands for 0.
        row_zero_point: float32, one a row or sample, with the dimensions of the product: what ``zero_point`` does not take away.
        is_outer: whether the scale is ``(..., rows, 1)``, of a linear layer.
    """

    codes: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    row_zero_point: ir.Value | None = None
    is_outer: bool = False


def weight_codes(b: Builder, weight: ir.Value, packed_weight: ir.Value | None, groups: int = 1) -> Tensor:
    """The int8 codes of a constant weight."""
    packed, codes = b.constant(packed_weight), b.constant(weight)
    if packed is not None:
        shape = [int(size) for size in sizes(weight)]
        return ops.unpack_weight(packed, shape, groups)
    if codes is None:
        raise ValueError(
            "quant_ops.onnx.export: expected constant weights of int8 layers, got one that is computed from the inputs"
        )
    return codes


def written_weight(b: Builder, codes: Tensor, key: Any, turned: bool) -> ir.Value:
    """The weight as an initializer; turned: (K, N), as products of ONNX take it."""

    def make() -> ir.Value:
        shifted = (codes.to(torch.int16) + b.settings.shift).to(b.settings.code_dtype)
        return b.tensor(shifted.t().contiguous() if turned else shifted, "qweight")

    return b.once((key, turned, b.settings.codes), make)


def weight_zero_point(b: Builder) -> ir.Value:
    return b.tensor(b.settings.shift, dtype=b.settings.code_dtype)


def dynamic(b: Builder, x: ir.Value, dims: list[int], rows: int | str | None, rank: int, asymmetric: bool) -> Operand:
    """x quantized from its data, a scale for each index of dimension 0; ``dims`` are the other ones."""
    if asymmetric and rows == 1 and b.settings.codes == "uint8":
        codes, scale, zero_point = b.ops("DynamicQuantizeLinear", 3, x)
        return Operand(codes, scale, zero_point)
    scale, steps = choose(b, x, dims, -128 if asymmetric else -127, 127, asymmetric)
    flat = b.reshape(scale, -1)
    kind = ir.DataType.UINT8 if b.settings.codes == "uint8" else ir.DataType.INT8
    if steps is None:
        middle = b.tensor([b.settings.shift], dtype=b.settings.code_dtype)
        zeros = b.op("Expand", middle, b.op("Shape", flat))
        return Operand(b.op("QuantizeLinear", x, flat, zeros, axis=0), scale, weight_zero_point(b), is_outer=rank == 2)
    if not b.settings.shift:
        steps = b.op("Add", steps, b.number(-128))
    zeros = b.op("Cast", b.reshape(steps, -1), to=int(kind))
    return Operand(b.op("QuantizeLinear", x, flat, zeros, axis=0), scale, None, steps, is_outer=rank == 2)


def static(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> Operand:
    """x quantized with a given scale, or codes already."""
    codes = input_codes(b)
    if elements(scale) != 1 or (zero_point is not None and elements(zero_point) != 1):
        return _static_rows(b, x, scale, zero_point)
    if x.dtype not in (ir.DataType.INT8, ir.DataType.UINT8):
        q = quantized(b, b.float32(x), scale, zero_point, codes)
        return Operand(q, scale, written_zero_point(b, zero_point, codes))
    if x.dtype == ir.DataType.UINT8:
        return Operand(x, scale, written_zero_point(b, zero_point, Codes(0, 255, torch.uint8)))
    if b.settings.form == "qdq" and _shifted(b, x) is None:
        return Operand(x, scale, written_zero_point(b, zero_point, Codes(-128, 127, torch.int8)))
    return Operand(as_product_codes(b, x), scale, written_zero_point(b, zero_point, codes))


def _static_rows(b: Builder, x: ir.Value, scale: ir.Value, zero_point: ir.Value | None) -> Operand:
    """The same with a scale for each row of a linear layer's input."""
    codes = input_codes(b)
    if x.dtype == ir.DataType.UINT8:
        codes = Codes(0, 255, torch.uint8)
        q = x
    else:
        q = as_product_codes(b, x) if x.dtype == ir.DataType.INT8 else quantized(b, b.float32(x), scale, zero_point, codes)
    if zero_point is None:
        return Operand(q, b.float32(scale), b.tensor(codes.shift, dtype=codes.dtype), is_outer=True)
    steps = b.op("Cast", written_zero_point(b, zero_point, codes), to=int(_FLOAT))
    return Operand(q, b.float32(scale), None, steps, is_outer=True)


def as_product_codes(b: Builder, q: ir.Value) -> ir.Value:
    """int8 codes in the type that products take."""
    if not b.settings.shift:
        return q
    found = _shifted(b, q)
    if found is None:
        wide = b.op("Add", b.op("Cast", q, to=int(_INT32)), b.tensor(b.settings.shift, dtype=torch.int32))
        found = b.shifted[q] = b.op("Cast", wide, to=int(ir.DataType.UINT8))
    return found


def _shifted(b: Builder, q: ir.Value) -> ir.Value | None:
    """The codes + 128 that were written beside q, or beside the codes that it has been moved from; None without any.

    onnxruntime on x86 fuses only uint8 activations, so this keeps chains of layers in integers.
    """
    if not b.settings.shift:
        return q
    node = q.producer()
    if q in b.shifted or node is None or node.op_type not in _MOVES or node.domain != "":
        return b.shifted.get(q)
    source = None if node.inputs[0] is None else _shifted(b, node.inputs[0])
    if source is None:
        return None
    b.shifted[q] = b.op(node.op_type, source, *node.inputs[1:], **{name: value.value for name, value in node.attributes.items()})
    return b.shifted[q]


# ---- epilogue ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Epilogue:
    """What follows the sums, with the channel's dimension counted from the end: -1 of a linear layer, -3 of a convolution."""

    weight_scale: Tensor
    bias: Tensor | None
    residual: ir.Value | None  # of floats
    activation: str | None
    out_scale: ir.Value | None
    out_zero_point: ir.Value | None
    out_dtype: ir.DataType
    channel: int

    def by_channel(self, values: Tensor) -> Tensor:
        return values.reshape(-1, *[1] * (-1 - self.channel))


def scaled(b: Builder, sums: ir.Value, x: Operand, weight_sums: Tensor, end: Epilogue) -> ir.Value:
    """float(sums) * (x_scale * weight_scale), less what zero points of rows add to the sums: int32, or floats that are whole."""
    if x.row_zero_point is not None:
        zeros = b.op("Cast", x.row_zero_point, to=int(_INT32))
        sums = b.op("Sub", sums, b.op("Mul", zeros, b.tensor(end.by_channel(weight_sums.to(torch.int32)), "weight_sums")))
    weight_scale, x_scale = end.by_channel(end.weight_scale), b.constant(x.scale)
    if x_scale is not None and x_scale.numel() == 1:
        scale = b.tensor(x_scale.float().reshape(()) * weight_scale, "scale")
    elif x.is_outer:
        # The same product of one rounding as Mul, after which onnxruntime would take the scale for one of the whole tensor.
        scale = b.op("MatMul", x.scale, b.tensor(weight_scale.reshape(1, -1), "weight_scale"))
    else:
        scale = b.op("Mul", b.float32(x.scale), b.tensor(weight_scale, "weight_scale"))
    y = b.op("Mul", b.cast(sums, _FLOAT, sums.dtype or _INT32), scale)
    return y if end.bias is None else b.op("Add", y, b.tensor(end.by_channel(end.bias), "bias"))


def finished(b: Builder, y: ir.Value, end: Epilogue) -> ir.Value:
    """The residual, the activation, and the codes or the type of the result."""
    if end.residual is not None:
        y = b.op("Add", y, end.residual)
    y = _activated(b, y, end.activation)
    if end.out_scale is None:
        return b.cast(y, end.out_dtype, _FLOAT)
    kind = torch.uint8 if end.out_dtype == ir.DataType.UINT8 else torch.int8
    codes = Codes(*((0, 255) if kind == torch.uint8 else (-128, 127)), kind)
    q = b.op("QuantizeLinear", y, end.out_scale, written_zero_point(b, end.out_zero_point, codes))
    if kind == torch.int8 and b.settings.shift:
        b.shifted[q] = b.op("QuantizeLinear", y, end.out_scale, written_zero_point(b, end.out_zero_point, input_codes(b)))
    return q


def _activated(b: Builder, y: ir.Value, activation: str | None) -> ir.Value:
    if activation == "relu6":
        return b.op("Clip", y, b.number(0.0), b.number(6.0))
    if activation == "silu":
        return b.op("Mul", y, b.op("Sigmoid", y))
    if activation in ("gelu", "gelu_tanh"):
        return b.op("Gelu", y, approximate="none" if activation == "gelu" else "tanh")
    if activation == "hardsigmoid":
        return b.op("HardSigmoid", y, alpha=1 / 6, beta=0.5)
    return y if activation is None else b.op({"relu": "Relu", "hardswish": "HardSwish", "sigmoid": "Sigmoid"}[activation], y)


def _residual(b: Builder, options: dict[str, Any]) -> ir.Value | None:
    """What is added to y, in float32. Codes by arithmetic: onnxruntime would move a DequantizeLinear behind a Reshape, wrongly."""
    residual: ir.Value | None = options["residual"]
    if residual is None or options["residual_scale"] is None:
        return None if residual is None else b.float32(residual)
    steps, zero_point = b.op("Cast", residual, to=int(_FLOAT)), options["residual_zero_point"]
    if zero_point is not None:
        steps = b.op("Sub", steps, b.op("Round", b.op("Cast", zero_point, to=int(_FLOAT))))
    return b.op("Mul", steps, b.float32(options["residual_scale"]))


def _epilogue(
    b: Builder, weight_scale: ir.Value, bias: ir.Value | None, channels: int, channel: int, options: dict[str, Any]
) -> Epilogue:
    scale, offset = b.constant(weight_scale), b.constant(bias)
    if scale is None or (bias is not None and offset is None):
        raise ValueError("quant_ops.onnx.export: expected constant weight_scale and bias of int8 layers, got computed ones")
    return Epilogue(
        weight_scale=scale.float().reshape(-1).expand(channels).contiguous(),
        bias=None if offset is None else offset.float(),
        residual=_residual(b, options),
        activation="relu" if options["relu"] else None if not options["activation"] else ACTIVATIONS[options["activation"] - 1],
        out_scale=options["out_scale"],
        out_zero_point=options["out_zero_point"],
        out_dtype=options["result"],
        channel=channel,
    )


def _written_bias(b: Builder, bias: Tensor, x_scale: Tensor | None, weight_scale: Tensor) -> ir.Value:
    """The bias in units of the product, as int32 of a DequantizeLinear, which QLinearConv wants; floats where that does not fit."""
    if x_scale is not None:
        unit = x_scale.float().reshape(()) * weight_scale
        steps = (bias.double() / unit.double()).round()
        if steps.isfinite().all() and (steps.abs() < _BIAS_LIMIT).all() and (unit > 0).all():
            zero = b.tensor(torch.zeros(len(bias), dtype=torch.int32), "bias_zero_point")
            return b.op("DequantizeLinear", b.tensor(steps.to(torch.int32), "qbias"), b.tensor(unit, "bias_scale"), zero, axis=0)
    return b.tensor(bias, "bias")


def _simulated_weight(b: Builder, weight: ir.Value, scale: Tensor, axis: int) -> ir.Value:
    zeros = torch.full(scale.shape, b.settings.shift, dtype=b.settings.code_dtype)
    return b.op("DequantizeLinear", weight, b.tensor(scale, "weight_scale"), b.tensor(zeros, "weight_zero_point"), axis=axis)


def _simulated_input(b: Builder, x: Operand) -> ir.Value:
    return b.op("DequantizeLinear", x.codes, b.float32(x.scale), x.zero_point)


def _is_simulated(b: Builder, x: Operand) -> bool:
    """Whether to write Q/DQ nodes: only static scales make those that runtimes recognize."""
    return b.settings.form == "qdq" and not x.is_outer and b.constant(x.scale) is not None


# ---- operators -----------------------------------------------------------------------------------------------------------


def int8_gemm(builder: Builder, /, a: ir.Value, b: ir.Value) -> list[ir.Value]:
    """:func:`quant_ops.int8_gemm`."""
    x = static(builder, a, builder.number(1), None)
    known = builder.constant(b)
    if known is not None:
        weight = written_weight(builder, known, b, turned=True)
    else:
        weight = builder.op("Transpose", as_product_codes(builder, b), perm=[1, 0])
    return [builder.op("MatMulInteger", x.codes, weight, x.zero_point, weight_zero_point(builder))]


def int8_linear(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None = None,
    x_scale: ir.Value | None = None,
    x_zero_point: ir.Value | None = None,
    *,
    packed_weight: ir.Value | None = None,
    asymmetric: bool = False,
    x_multiplier: ir.Value | None = None,
    **options: Any,
) -> list[ir.Value]:
    """:func:`quant_ops.int8_linear`."""
    codes = weight_codes(b, weight, packed_weight)
    n, k = codes.shape
    end = _epilogue(b, weight_scale, bias, n, -1, options)
    given, rank = x, len(sizes(x))
    flat = x_scale is None or (b.settings.form == "qdq" and elements(x_scale) == 1 and b.constant(x_scale) is not None)
    if x_multiplier is not None:
        x = b.op("Mul", b.float32(x), b.float32(x_multiplier))
        x.shape, x.dtype = given.shape, _FLOAT
    if flat and rank != 2:
        rows = b.reshape(x, -1, k)
        rows.shape, rows.dtype = ir.Shape([None, k]), x.dtype
        x = rows
        if end.residual is not None:
            end = dataclasses.replace(end, residual=b.reshape(end.residual, -1, n))
    if x_scale is None:
        operand = dynamic(b, b.float32(x), [1], _rows(given), 2, asymmetric)
    else:
        operand = static(b, x, x_scale, x_zero_point)
    written = written_weight(b, codes, packed_weight or weight, turned=True)
    if _is_simulated(b, operand):
        y = _gemm(b, operand, written, end)
    else:
        sums = b.op("MatMulInteger", operand.codes, written, operand.zero_point, weight_zero_point(b))
        y = scaled(b, sums, operand, codes.sum(1, dtype=torch.int64), end)
    y = finished(b, y, end)
    if flat and rank != 2:
        q = y
        y = b.like_rows(y, given, n)
        if q in b.shifted:
            b.shifted[y] = b.like_rows(b.shifted[q], given, n)
    return [y]


def _rows(x: ir.Value) -> int:
    """Of the input of a linear layer; 0 for a number that is not known."""
    rows = 1
    for size in sizes(x)[:-1]:
        rows *= size if isinstance(size, int) else 0
    return rows


def _gemm(b: Builder, x: Operand, weight: ir.Value, end: Epilogue) -> ir.Value:
    """Of matrices, which onnxruntime computes in integers with the bias; MatMul and Add it may make a float Gemm of."""
    bias = [] if end.bias is None else [_written_bias(b, end.bias, b.constant(x.scale), end.weight_scale)]
    return b.op("Gemm", _simulated_input(b, x), _simulated_weight(b, weight, end.weight_scale, 1), *bias)


def int8_conv2d(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    bias: ir.Value | None = None,
    stride: Any = (1, 1),
    padding: Any = (0, 0),
    dilation: Any = (1, 1),
    groups: int = 1,
    x_scale: ir.Value | None = None,
    x_zero_point: ir.Value | None = None,
    *,
    packed_weight: ir.Value | None = None,
    asymmetric: bool = False,
    channels_last: Any = None,
    **options: Any,
) -> list[ir.Value]:
    """:func:`quant_ops.int8_conv2d`."""
    codes = weight_codes(b, weight, packed_weight, groups)
    end = _epilogue(b, weight_scale, bias, codes.shape[0], -3, options)
    given = x
    if single := len(sizes(x)) == 3:
        x = b.op("Unsqueeze", x, b.axes(0))
        x.shape, x.dtype = ir.Shape([1, *sizes(given)]), given.dtype
        if end.residual is not None:
            end = dataclasses.replace(end, residual=b.op("Unsqueeze", end.residual, b.axes(0)))
    top, bottom, left, right = padding if len(padding) == 4 else [padding[0], padding[0], padding[-1], padding[-1]]
    pads = [top, left, bottom, right]
    in_floats = groups > 1 and codes[0].numel() <= _FLOAT_LIMIT
    if x_scale is None:
        x, operand, pads = _dynamic_images(b, x, pads, asymmetric, in_floats)
    else:
        operand = static(b, x, x_scale, x_zero_point)
    if operand.is_outer:
        raise ValueError(
            "quant_ops.onnx.export: expected one x_scale and x_zero_point in int8_conv2d, got one for each sample. Use one scale."
        )
    written = written_weight(b, codes, packed_weight or weight, turned=False)
    shape: dict[str, Any] = {
        "strides": [stride[0], stride[-1]],
        "pads": pads,
        "dilations": [dilation[0], dilation[-1]],
        "group": groups,
    }
    if _is_simulated(b, operand):
        offset = [] if end.bias is None else [_written_bias(b, end.bias, b.constant(operand.scale), end.weight_scale)]
        y = b.op("Conv", _simulated_input(b, operand), _simulated_weight(b, written, end.weight_scale, 0), *offset, **shape)
    else:
        if in_floats:
            operand, sums = _conv_of_codes(b, operand, written, shape)
        else:
            sums = b.op("ConvInteger", operand.codes, written, operand.zero_point, weight_zero_point(b), **shape)
        y = scaled(b, sums, operand, codes.sum((1, 2, 3), dtype=torch.int64), end)
    y = finished(b, y, end)
    if not single:
        return [y]
    q, y = y, b.op("Squeeze", y, b.axes(0))
    if q in b.shifted:
        b.shifted[y] = b.op("Squeeze", b.shifted[q], b.axes(0))
    return [y]


def _conv_of_codes(b: Builder, x: Operand, weight: ir.Value, shape: dict[str, Any]) -> tuple[Operand, ir.Value]:
    """The exact sums of few products by a convolution of floats: for groups, at which runtimes' ConvInteger is slow.

    Returns x without its zero points, and the sums.
    """
    zero = x.row_zero_point if x.row_zero_point is not None else b.op("Cast", x.zero_point, to=int(_FLOAT))
    steps = b.op("Sub", b.op("Cast", x.codes, to=int(_FLOAT)), zero)
    of_weight = b.op("Sub", b.op("Cast", weight, to=int(_FLOAT)), b.number(b.settings.shift))
    sums = b.op("Round", b.op("Conv", steps, of_weight, **shape))  # whole already; without it runtimes scale the weight instead
    sums.dtype = _FLOAT
    return dataclasses.replace(x, zero_point=None, row_zero_point=None), sums


def _dynamic_images(
    b: Builder, x: ir.Value, pads: list[int], asymmetric: bool, in_floats: bool
) -> tuple[ir.Value, Operand, list[int]]:
    """Images with a scale for each. Those that each have a zero point are padded before, with zeros, which every range contains."""
    samples = sizes(x)[0]
    x = b.float32(x)
    one = samples == 1 and b.settings.codes == "uint8"
    if asymmetric and not one and any(pads) and not in_floats:
        top, left, bottom, right = pads
        x = b.op("Pad", x, b.axes(0, 0, top, left, 0, 0, bottom, right), b.number(0))
        pads = [0] * 4
    return x, dynamic(b, x, [1, 2, 3], samples if isinstance(samples, int) else None, 4, asymmetric), pads
