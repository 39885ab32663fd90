"""Weights in groups in ONNX: DequantizeLinear with blocks along K, of int8 or int4, in front of a product of floats or a lookup.

    w = (q - z) * s,   or q * s + z for floating zero points

With ``dynamic``, MatMulInteger group by group, whose sums are exact, and the sum over the groups in float32.
Read first: products.py.
"""

import dataclasses
from typing import Any

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .. import ops
from .builder import Builder, sizes
from .products import Operand, dynamic, weight_zero_point

_FLOAT, _INT32 = ir.DataType.FLOAT, ir.DataType.INT32


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight (N, K) in groups: codes, scales and zero points ``(N, groups)``."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    bits: int
    group: int  # size of a group, K without groups
    key: Any

    @property
    def is_floating(self) -> bool:
        """Whether zero points are values."""
        return self.zero_point is not None and self.zero_point.is_floating_point()


def _weight(
    b: Builder,
    weight: ir.Value,
    weight_scale: ir.Value,
    weight_zero_point: ir.Value | None,
    bits: int,
    group_size: int,
    packed_weight: ir.Value | None,
) -> Weight:
    packed, codes, scale = b.constant(packed_weight), b.constant(weight), b.constant(weight_scale)
    zero_point = b.constant(weight_zero_point)
    if scale is None or (packed is None and codes is None) or (weight_zero_point is not None and zero_point is None):
        raise ValueError(
            "quant_ops.onnx.export: expected constant weights of weight-only layers, got ones computed from the inputs"
        )
    if packed is not None:
        codes = ops.unpack_weight_only(packed, [int(size) for size in sizes(weight)], bits, group_size)
    assert codes is not None
    n, k = codes.shape
    if zero_point is not None:
        zero_point = zero_point.float() if zero_point.is_floating_point() else zero_point.to(torch.int8)
        zero_point = zero_point.reshape(n, -1)
    key = (packed_weight or weight, bits, group_size)
    return Weight(codes, scale.float().reshape(n, -1), zero_point, bits, k if group_size == -1 else min(group_size, k), key)


# ---- values --------------------------------------------------------------------------------------------------------------


def _values(b: Builder, w: Weight, turned: bool) -> ir.Value:
    """The weight's values, float32: (K, N) if turned, else (N, K)."""
    return b.once((w.key, turned, "values"), lambda: _dequantized(b, w, turned))


def _dequantized(b: Builder, w: Weight, turned: bool) -> ir.Value:
    def placed(tensor: Tensor) -> Tensor:
        return tensor.t().contiguous() if turned else tensor

    zero_point = None if w.is_floating else w.zero_point
    bits = w.bits
    if bits == 4 and zero_point is not None and not ((zero_point >= -8) & (zero_point <= 7)).all():
        bits = 8
    codes = b.tensor(placed(w.codes), "qweight", bits=bits)
    scale, zeros = w.scale, torch.zeros_like(w.scale, dtype=torch.int8) if zero_point is None else zero_point
    if scale.shape[1] == 1:
        attributes: dict[str, Any] = {"axis": 1 if turned else 0}
        scale, zeros = scale[:, 0], zeros[:, 0]
    else:
        attributes = {"axis": 0 if turned else 1, "block_size": w.group}
        scale, zeros = placed(scale), placed(zeros)
    y = b.op(
        "DequantizeLinear", codes, b.tensor(scale, "weight_scale"), b.tensor(zeros, "weight_zero_point", bits=bits), **attributes
    )
    if not w.is_floating:
        return y
    assert w.zero_point is not None
    group_of = torch.arange(w.codes.shape[1]) // w.group
    offsets = b.tensor(placed(w.zero_point), "weight_offset")
    return b.op("Add", y, b.op("Gather", offsets, b.tensor(group_of, "group_of"), axis=0 if turned else 1))


# ---- operators -----------------------------------------------------------------------------------------------------------


def weight_only_linear(
    b: Builder,
    x: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    weight_zero_point: ir.Value | None = None,
    bias: ir.Value | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: ir.Value | None = None,
    dynamic: bool = False,
    asymmetric: bool = False,
    out_dtype: Any = None,
    x_multiplier: ir.Value | None = None,
    result: ir.DataType,
) -> list[ir.Value]:
    """:func:`quant_ops.weight_only_linear`."""
    w = _weight(b, weight, weight_scale, weight_zero_point, bits, group_size, packed_weight)
    given, a = x, b.float32(x)
    if x_multiplier is not None:
        a = b.op("Mul", a, b.float32(x_multiplier))
        a.shape, a.dtype = given.shape, _FLOAT
    offset = b.constant(bias)
    if dynamic:
        y = _integer_product(b, a, w, asymmetric)
        y = y if offset is None else b.op("Add", y, b.tensor(offset.float(), "bias"))
        y = y if len(sizes(given)) == 2 else b.like_rows(y, given, w.codes.shape[0])
    elif b.settings.weight_only == "MatMulNBits" and _fits_nbits(w):
        y = _matmul_nbits(b, a, w, offset)
    else:
        y = b.op("MatMul", a, _values(b, w, turned=True))
        y = y if offset is None else b.op("Add", y, b.tensor(offset.float(), "bias"))
    return [b.cast(y, result, _FLOAT)]


def _fits_nbits(w: Weight) -> bool:
    """Blocks of onnxruntime's operator are powers of two from 16 on, and its zero points are codes."""
    zero_points_fit = (
        w.zero_point is None or w.is_floating or w.bits == 8 or bool(((w.zero_point >= -8) & (w.zero_point <= 7)).all())
    )
    return not w.is_floating and zero_points_fit and w.group >= 16 and w.group & (w.group - 1) == 0


def _matmul_nbits(b: Builder, x: ir.Value, w: Weight, bias: Tensor | None) -> ir.Value:
    """onnxruntime's MatMulNBits: codes from 0, ``(N, groups, bytes of a group)``, the low half of a byte first."""
    n, k = w.codes.shape
    middle = 2 ** (w.bits - 1)

    def make() -> list[ir.Value]:
        codes = F.pad((w.codes.to(torch.int16) + middle).to(torch.uint8), (0, -k % w.group), value=middle)
        tensors = [
            b.tensor(_bytes(codes, w.bits).reshape(n, -1, w.group * w.bits // 8), "qweight"),
            b.tensor(w.scale, "weight_scale"),
        ]
        if w.zero_point is not None:
            zeros = (w.zero_point.to(torch.int16) + middle).to(torch.uint8)
            tensors.append(
                b.tensor(_bytes(F.pad(zeros, (0, zeros.shape[1] % 2 if w.bits == 4 else 0)), w.bits), "weight_zero_point")
            )
        return tensors

    tensors: Any = b.once((w.key, "nbits"), make)
    zeros = tensors[2] if len(tensors) > 2 else None
    offset = [] if bias is None else [None, b.tensor(bias.float(), "bias")]
    attributes = {"K": k, "N": n, "bits": w.bits, "block_size": w.group, "accuracy_level": 1}  # sums in float32
    return b.op("MatMulNBits", x, tensors[0], tensors[1], zeros, *offset, domain="com.microsoft", **attributes)


def _bytes(codes: Tensor, bits: int) -> Tensor:
    return codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4


def _integer_product(b: Builder, x: ir.Value, w: Weight, asymmetric: bool) -> ir.Value:
    """(rows, N): y = sum over groups of float(sum) * (x_scale * weight_scale)."""
    n, k = w.codes.shape
    count = -(-k // w.group)
    rows = b.reshape(x, -1, k)
    operand = dynamic(b, rows, [1], None, 2, asymmetric)
    codes = F.pad(w.codes, (0, count * w.group - k)).reshape(n, count, w.group)
    middle = b.settings.shift
    shifted = (codes.to(torch.int16) + middle).to(b.settings.code_dtype).permute(1, 2, 0).contiguous()
    written = b.tensor(shifted, "qweight")  # (groups, size of a group, N)
    q = operand.codes
    if k % w.group:
        filling = middle if operand.row_zero_point is None else 0  # what adds nothing to the sums of the rows' codes
        q = b.op("Pad", q, b.axes(0, 0, 0, count * w.group - k), b.tensor(filling, dtype=b.settings.code_dtype))
    q = b.op("Transpose", b.reshape(q, -1, count, w.group), perm=[1, 0, 2])  # (groups, rows, size of a group)
    sums = b.op("MatMulInteger", q, written, operand.zero_point, weight_zero_point(b))
    sums = _without_zero_points(b, sums, q, operand, w, codes)
    scale = b.op("MatMul", operand.scale, b.tensor(w.scale.t().reshape(count, 1, n).contiguous(), "weight_scale"))
    y = b.op("Mul", b.op("Cast", sums, to=int(_FLOAT)), scale)
    return b.op("ReduceSum", y, b.axes(0), keepdims=0)


def _without_zero_points(b: Builder, sums: ir.Value, q: ir.Value, x: Operand, w: Weight, codes: Tensor) -> ir.Value:
    """The sums less what the zero points of the rows of x and those of the weight add to them, all in int32."""
    n, count, _ = codes.shape
    steps = codes.to(torch.int32)
    if w.zero_point is not None:
        steps = steps - w.zero_point.to(torch.int32)[:, :, None]
        steps.view(n, -1)[:, w.codes.shape[1] :] = 0  # where a row has no weights
    zeros = None if x.row_zero_point is None else b.op("Cast", x.row_zero_point, to=int(_INT32))
    if w.zero_point is not None:
        own = b.op("Cast", q, to=int(_INT32))
        if zeros is None:
            own = b.op("Sub", own, b.tensor(b.settings.shift, dtype=torch.int32))
        own = b.op("ReduceSum", own, b.axes(2), keepdims=1)
        of_weight = w.zero_point.to(torch.int32).t().reshape(count, 1, n).contiguous()
        sums = b.op("Sub", sums, b.op("Mul", own, b.tensor(of_weight, "weight_zero_point")))
    if zeros is not None:
        totals = steps.sum(2, dtype=torch.int32).t().reshape(count, 1, n).contiguous()
        sums = b.op("Sub", sums, b.op("Mul", zeros, b.tensor(totals, "weight_sums")))
    return sums


def weight_only_embedding(
    b: Builder,
    indices: ir.Value,
    weight: ir.Value,
    weight_scale: ir.Value,
    weight_zero_point: ir.Value | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: ir.Value | None = None,
    out_dtype: Any = None,
    result: ir.DataType,
) -> list[ir.Value]:
    """:func:`quant_ops.weight_only_embedding`: the rows of the codes are looked up, then dequantized."""
    w = _weight(b, weight, weight_scale, weight_zero_point, bits, group_size, packed_weight)
    k, count = w.codes.shape[1], w.scale.shape[1]
    flat = b.reshape(indices, -1)
    codes = b.once((w.key, "rows"), lambda: b.tensor(w.codes, "qweight", bits=w.bits))
    if w.bits == 4:
        codes = b.op("Cast", codes, to=int(ir.DataType.INT8))
    steps = b.op("Cast", b.op("Gather", codes, flat, axis=0), to=int(_FLOAT))
    group_of = None if count == 1 else b.tensor(torch.arange(k) // w.group, "group_of")

    def of_groups(tensor: Tensor, name: str) -> ir.Value:
        found = b.op("Gather", b.tensor(tensor, name), flat, axis=0)
        return found if group_of is None else b.op("Gather", found, group_of, axis=1)

    if w.zero_point is not None and not w.is_floating:
        steps = b.op("Sub", steps, of_groups(w.zero_point.float(), "weight_zero_point"))
    y = b.op("Mul", steps, of_groups(w.scale, "weight_scale"))
    if w.is_floating:
        assert w.zero_point is not None
        y = b.op("Add", y, of_groups(w.zero_point, "weight_zero_point"))
    shape = sizes(indices)
    y = b.like_rows(y, _with_width(b, indices, shape), k) if len(shape) != 1 else y
    return [b.cast(y, result, _FLOAT)]


def _with_width(b: Builder, indices: ir.Value, shape: list[Any]) -> ir.Value:
    """Stands for a tensor with one more dimension than the indices have."""
    wide = b.op("Unsqueeze", indices, b.axes(-1))
    wide.shape = ir.Shape([*shape, 1])
    return wide
