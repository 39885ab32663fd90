"""Every sentence that the operators refuse an argument with, in one table.

The raw operator raises RuntimeError, the wrapper TypeError or ValueError with the same words, and the fake kernel RuntimeError with
the same words, unless values decide: an error in a compiled or exported model reads as it does in eager mode.
"""

import dataclasses
import os
import re
from typing import Any

import pytest
import torch
from processes import python
from torch import Tensor
from torch._subclasses import FakeTensorMode

import quant_ops as qo

ops = torch.ops.quant_ops


@dataclasses.dataclass
class Case:
    op: str
    sentence: str  # after "quant_ops.<op>: expected "
    change: dict[str, Any]  # arguments other than those of a call that works
    kind: type = ValueError  # what the wrapper raises
    fake: bool = True  # the fake kernel says so too: all that can be told without values

    def __str__(self):
        return f"{self.op}-{self.sentence[:48]}"


def f32(*shape):
    return torch.full(shape, 0.5)


def i8(*shape):
    return torch.ones(shape, dtype=torch.int8)


def good(op):
    """The arguments of a call that works."""
    quantize = {"tensor": f32(2, 4, 3, 6), "scale": f32(), "zero_point": None, "qmin": -128, "qmax": 127}
    return {
        "quant_tensor_forward": quantize,
        "quant_tensor_backward": {"grad": f32(2, 4, 3, 6), **quantize},
        "dequant_tensor": {"tensor": i8(2, 4, 3, 6), "scale": f32(), "zero_point": None},
        "choose_qparams": {"tensor": f32(2, 4), "dim": [1], "qmin": -127, "qmax": 127},
        "quantize_rows": {"x": f32(2, 4)},
        "norm_quantize_rows": {"x": f32(2, 4), "weight": f32(4), "bias": None, "eps": 1e-5},
        "int8_gemm": {"a": i8(2, 4), "b": i8(3, 4)},
        "int8_linear": {"x": f32(2, 4), "weight": i8(3, 4), "weight_scale": f32(3)},
        "int8_conv2d": {"x": f32(2, 4, 5, 5), "weight": i8(6, 4, 3, 3), "weight_scale": f32(6)},
        "requantize": {"x": i8(2, 4), "x_scale": f32()},
        "int8_add": {"a": i8(2, 4), "b": i8(2, 4), "a_scale": f32(), "b_scale": f32()},
        "int8_mul": {"a": i8(2, 4, 3, 3), "b": i8(2, 4, 1, 1), "a_scale": f32(), "b_scale": f32()},
        "int8_cat": {"tensors": [i8(2, 4), i8(2, 3)], "scales": [f32(), f32()], "zero_points": []},
        "int8_max_pool2d": {"x": i8(2, 4, 5, 5), "kernel_size": [2, 2]},
        "int8_avg_pool2d": {"x": i8(2, 4, 5, 5), "x_scale": f32(), "x_zero_point": None, "kernel_size": [2, 2]},
        "int8_adaptive_avg_pool2d": {"x": i8(2, 4, 5, 5), "x_scale": f32(), "x_zero_point": None, "output_size": [2, 2]},
        "int8_upsample_nearest2d": {"x": i8(2, 4, 5, 5), "scale_factor": [2, 2]},
        "int8_attention": {"q": f32(2, 4, 5, 6), "k": f32(2, 2, 3, 6), "v": f32(2, 2, 3, 7)},
        "pack_weight": {"weight": i8(6, 4, 3, 3)},
        "unpack_weight": {"packed_weight": qo.pack_weight(i8(6, 4, 3, 3)), "shape": [6, 4, 3, 3]},
        "weight_only_linear": {"x": f32(2, 40), "weight": i8(3, 40), "weight_scale": f32(3, 2), "bits": 4, "group_size": 32},
        "weight_only_embedding": {
            **{"indices": torch.tensor([2, 0]), "weight": i8(3, 40), "weight_scale": f32(3, 2), "bits": 4, "group_size": 32}
        },
        "pack_weight_only": {"weight": i8(3, 40), "bits": 4, "group_size": 32},
        "unpack_weight_only": {
            **{"packed_weight": qo.pack_weight_only(i8(3, 40), 4, 32), "shape": [3, 40], "bits": 4, "group_size": 32}
        },
    }[op]


FLOATING = r"(float32, float16, bfloat16, float64)"
FIRST = "Quantize it first, e.g. with quant_tensor_forward(simulate=False)."
Z_BIG = torch.tensor(200)
CASES = []


def add(op_names, sentence, kind=ValueError, fake=True, **change):
    CASES.extend(Case(op, sentence, change, kind, fake) for op in op_names.split())


# ---- the quantize family ----------------------------------------------------------------------------------------------------

_BOTH = "quant_tensor_forward quant_tensor_backward"
_ALL = f"{_BOTH} dequant_tensor"
_RANGED = f"{_BOTH} choose_qparams"

add(_BOTH, f"tensor.dtype in {FLOATING}, got int32", TypeError, tensor=torch.ones(2, 4, 3, 6, dtype=torch.int32))
add("choose_qparams", f"tensor.dtype in {FLOATING}, got int8", TypeError, tensor=i8(2, 4))
add(_BOTH, f"tensor.dtype in {FLOATING}, got complex64", TypeError, tensor=f32(2, 4, 3, 6).to(torch.complex64))
add(_BOTH, f"tensor.dtype in {FLOATING}, got float8_e4m3fn", TypeError, tensor=f32(2, 4, 3, 6).to(torch.float8_e4m3fn))
add(_ALL, f"scale.dtype in {FLOATING}, got int64", TypeError, scale=torch.tensor(1))
add(_RANGED, "qmin < qmax, got 7 and 7", qmin=7, qmax=7)
add(_RANGED, "qmin < qmax, got 7 and -8", qmin=7, qmax=-8)
add(_RANGED, "qmin and qmax to fit int32, got -2147483649 and 127", qmin=-(2**31) - 1)
add(_RANGED, "qmin and qmax to fit int32, got -100 and 2147483648", qmin=-100, qmax=2**31)
add(_BOTH, "a zero_point with asymmetric=True, got None", asymmetric=True)
for _dtype, _text in ((torch.bool, "bool"), (torch.complex64, "complex64")):
    _zero = torch.ones((), dtype=_dtype)
    _sentence = f"zero_point.dtype integer or floating, got {_text}"
    add(_BOTH, _sentence, TypeError, zero_point=_zero, asymmetric=True)
    add("dequant_tensor", _sentence, TypeError, zero_point=_zero)
add("quant_tensor_backward", "grad.shape == tensor.shape, got (4, 3, 6) and (2, 4, 3, 6)", grad=f32(4, 3, 6))
add("quant_tensor_backward", "grad.shape == tensor.shape, got (1,) and ()", grad=f32(1), tensor=f32())

_CHANNEL = "For one {0} per channel of dimension 1 use the shape (1, C, 1, 1)."
_BROADCAST = "{0} to have one element or to broadcast to {1}, got {0}.shape {2} and tensor.shape (2, 4, 3, 6). " + _CHANNEL
add(_ALL, _BROADCAST.format("scale", "tensor.shape", "(4,)"), scale=f32(4))
add(_ALL, _BROADCAST.format("scale", "tensor.shape", "(1, 2, 4, 3, 6)"), scale=f32(1, 2, 4, 3, 6))
add(_ALL, _BROADCAST.format("scale", "tensor.shape", "(0,)"), scale=f32(0))
_sentence = _BROADCAST.format("zero_point", "tensor.shape", "(4, 1)")
add(_BOTH, _sentence, zero_point=i8(4, 1), asymmetric=True)
add("dequant_tensor", _sentence, zero_point=i8(4, 1))
add(_ALL, _BROADCAST.format("scale", "tensor.shape / block_size", "(4, 3, 6)"), scale=f32(4, 3, 6), block_size=[1, 1, 1, 3])
_sentence = "one block_size entry per dimension of tensor, got block_size {} and tensor.shape (2, 4, 3, 6)"
add(_ALL, _sentence.format("(4,)"), block_size=[4])
add(_ALL, _sentence.format("()"), block_size=[])
_sentence = "block_size to divide tensor.shape, got block_size {} and tensor.shape (2, 4, 3, 6)"
add(_ALL, _sentence.format("(1, 1, 1, 4)"), block_size=[1, 1, 1, 4])
add(_ALL, _sentence.format("(1, 0, 1, 1)"), block_size=[1, 0, 1, 1])
add(_ALL, _sentence.format("(1, 1, -3, 1)"), block_size=[1, 1, -3, 1])
_sentence = "scale to have one element or to broadcast to tensor.shape, got scale.shape (5,) and tensor.shape (0, 4). "
add("quant_tensor_forward", _sentence + _CHANNEL.format("scale"), tensor=f32(0, 4), scale=f32(5))
add("quant_tensor_backward", _sentence + _CHANNEL.format("scale"), grad=f32(0, 4), tensor=f32(0, 4), scale=f32(5))
add("dequant_tensor", _sentence + _CHANNEL.format("scale"), tensor=i8(0, 4), scale=f32(5))
_MERGE = "Merge dimensions with reshape first."
add("quant_tensor_forward", f"at most 32 dimensions, got 33. {_MERGE}", tensor=f32(*[1] * 33))
add("dequant_tensor", f"at most 16 dimensions, got 17. {_MERGE}", tensor=i8(*[1] * 17), block_size=[1] * 17)
add("choose_qparams", f"at most 32 dimensions, got 33. {_MERGE}", tensor=f32(*[1] * 33))

_sentence = "tensor.dtype in (int8, uint8, int16, int32), got "
add("dequant_tensor", _sentence + "float32", TypeError, tensor=f32(2, 4, 3, 6))
add("dequant_tensor", _sentence + "int64", TypeError, tensor=torch.ones(2, 4, 3, 6, dtype=torch.int64))
add("dequant_tensor", f"the result's dtype in {FLOATING}, got int8", TypeError, dtype=torch.int8)
add("choose_qparams", "qmax > 0 for a symmetric range, got 0. Use asymmetric=True.", qmin=-255, qmax=0)
add("choose_qparams", "dim in [-2, 1], got 2", dim=[0, 2])
add("choose_qparams", "dim in [-2, 1], got -3", dim=[-3])
_ATTENTION = "int8_attention"
add(_ATTENTION, "q.dtype in (float32, float16, bfloat16), got float64", TypeError, q=f32(2, 4, 5, 6).double())
add(_ATTENTION, "k.dtype == q.dtype, got float16 and float32", TypeError, k=f32(2, 2, 3, 6).half())
add(_ATTENTION, "v.dtype == q.dtype, got int8 and float32", TypeError, v=i8(2, 2, 3, 7))
add(_ATTENTION, "q.shape (batch, heads, rows, columns), got (4, 5, 6)", q=f32(4, 5, 6))
add(_ATTENTION, "k.shape (2, heads, S, 6), got (2, 2, 3, 7)", k=f32(2, 2, 3, 7))
add(_ATTENTION, "v.shape (2, 2, 3, columns), got (2, 2, 4, 7)", v=f32(2, 2, 4, 7))
add(_ATTENTION, "k's heads to divide q's, got 3 and 4", k=f32(2, 3, 3, 6), v=f32(2, 3, 3, 7))
add(_ATTENTION, "q.shape[-1] >= 1, got 0", q=f32(2, 4, 5, 0), k=f32(2, 2, 3, 0))
add(
    *(
        _ATTENTION,
        "k.shape[-2] <= 65793 so that the int32 sum is exact, got 65794. Use torch.nn.functional.scaled_dot_product_attention.",
    ),
    **{"k": f32(1, 1, 1, 1).expand(2, 2, 65794, 6), "v": f32(1, 1, 1, 1).expand(2, 2, 65794, 7)},
)
add(_ATTENTION, "mask.dtype in (bool, float32, float16, bfloat16), got int8", TypeError, mask=i8(5, 3))
add(_ATTENTION, "mask.shape to broadcast to (batch, heads, L, S) (2, 4, 5, 3), got (2, 5, 3)", mask=f32(2, 5, 3))
add(_ATTENTION, "mask or causal=True, got both. Put the causal part into the mask.", mask=f32(5, 3), causal=True)
_NORM = "norm_quantize_rows"
add(_NORM, "x.dtype in (float32, float16, bfloat16), got float64", TypeError, x=f32(2, 4).double())
add(_NORM, "x to have at least one dimension, got shape ()", x=f32())
add(_NORM, "weight.shape (4,), got (3,)", weight=f32(3))
add(_NORM, "bias.shape (4,), got (1, 4)", bias=f32(1, 4))
add(_NORM, f"bias.dtype in {FLOATING}, got int8", TypeError, bias=i8(4))
add(_NORM, "residual.shape == x.shape, got (4,) and (2, 4)", residual=f32(4))
add(_NORM, "residual.dtype == x.dtype, got float16 and float32", TypeError, residual=f32(2, 4).half())
add("quantize_rows", "x.dtype in (float32, float16, bfloat16), got float64", TypeError, x=f32(2, 4).double())
add("quantize_rows", "x.dtype in (float32, float16, bfloat16), got int8", TypeError, x=i8(2, 4))
add("quantize_rows", "x to have at least one dimension, got shape ()", x=f32())

# ---- int8_gemm and pack_weight --------------------------------------------------------------------------------------------------

_SPLIT = "Split the sum into parts."
_UNSIGNED = "Symmetric int8 activations reach 131071; else split the sum."
_EXACT = "so that the int32 sum is exact, got"
_REMEDY = "b is [N, K], as nn.Linear keeps its weight."

add("int8_gemm", "a.dtype in (int8, uint8), got float32", TypeError, a=f32(2, 4))
add("int8_gemm", "a.dtype in (int8, uint8), got int32", TypeError, a=torch.ones(2, 4, dtype=torch.int32))
add("int8_gemm", "b.dtype int8, got uint8", TypeError, b=torch.ones(3, 4, dtype=torch.uint8))
add("int8_gemm", f"b.dtype int8, got float32. {FIRST}", TypeError, b=f32(3, 4))
add("int8_gemm", "b.dtype int8, got float8_e5m2", TypeError, b=f32(3, 4).to(torch.float8_e5m2))
add("int8_gemm", "a.shape (M, K) and b.shape (N, K), got (4,) and (3, 4)", a=i8(4))
add("int8_gemm", "a.shape (M, K) and b.shape (N, K), got (2, 4) and (1, 3, 4)", b=i8(1, 3, 4))
add("int8_gemm", f"a.shape[1] == b.shape[1], got 4 and 3. {_REMEDY}", b=i8(4, 3))
add("int8_gemm", f"K <= 131071 {_EXACT} 131072. {_SPLIT}", a=i8(1, 131072), b=i8(1, 131072))
add("int8_gemm", f"K <= 65793 {_EXACT} 65794. {_UNSIGNED}", a=i8(1, 65794).to(torch.uint8), b=i8(1, 65794))

add("pack_weight", f"weight.dtype int8, got float32. {FIRST}", TypeError, weight=f32(6, 4))
add("pack_weight", "weight.dtype int8, got int32", TypeError, weight=torch.ones(6, 4, dtype=torch.int32))
add("pack_weight", "weight.shape (N, K) or (O, C/groups, R, S), got (6, 4, 3)", weight=i8(6, 4, 3))
_sentence = "groups to divide the output channels of a convolution, got groups {} and weight.shape {}"
add("pack_weight", _sentence.format(4, "(6, 4, 3, 3)"), groups=4)
add("pack_weight", _sentence.format(0, "(6, 4, 3, 3)"), groups=0)
add("pack_weight", _sentence.format(2, "(6, 4)"), weight=i8(6, 4), groups=2)

# ---- unpack_weight -------------------------------------------------------------------------------------------------------

add("unpack_weight", f"packed_weight.dtype int8, got float32. {FIRST}", TypeError, packed_weight=f32(9))
add("unpack_weight", "shape (N, K) or (O, C/groups, R, S), got (6,)", shape=[6])
_sentence = "groups to divide the output channels of a convolution, got groups {} and shape {}"
add("unpack_weight", _sentence.format(4, "(6, 4, 3, 3)"), groups=4)
add("unpack_weight", _sentence.format(2, "(6, 36)"), shape=[6, 36], groups=2)
_sentence = "packed_weight made by pack_weight from a weight of this shape, got another one"
add("unpack_weight", _sentence, groups=2)
add("unpack_weight", _sentence, packed_weight=i8(5))

# ---- int8_linear and int8_conv2d: what they share ----------------------------------------------------------------------------

_INT8 = "int8_linear int8_conv2d"
_ONLY = "x.dtype in (float32, float16, bfloat16, int8, uint8), got"

add(_INT8, f"weight.dtype int8, got float32. {FIRST}", TypeError, weight=f32(3, 4))
add(_INT8, "weight.dtype int8, got uint8", TypeError, weight=torch.ones(3, 4, dtype=torch.uint8))
for _dtype, _text in ((torch.float64, "float64"), (torch.int32, "int32"), (torch.float8_e4m3fn, "float8_e4m3fn")):
    add("int8_linear", f"{_ONLY} {_text}", TypeError, x=f32(2, 4).to(_dtype))
    add("int8_conv2d", f"{_ONLY} {_text}", TypeError, x=f32(2, 4, 5, 5).to(_dtype))
_sentence = "x_scale with a quantized x, got x.dtype {} and no x_scale. Pass the scale that x was quantized with."
add("int8_linear", _sentence.format("int8"), x=i8(2, 4))
add("int8_conv2d", _sentence.format("uint8"), x=i8(2, 4, 5, 5).to(torch.uint8))
add(_INT8, "x_zero_point only together with x_scale, got x_zero_point alone", x_zero_point=torch.tensor(3))
_sentence = "asymmetric=True only for dynamic quantization, got it with x_scale. Pass x_zero_point instead."
add(_INT8, _sentence, asymmetric=True, x_scale=f32())
add(_INT8, f"x_scale.dtype in {FLOATING}, got int32", TypeError, x_scale=torch.ones((), dtype=torch.int32))
_sentence = "x_zero_point.dtype integer or floating, got bool"
add(_INT8, _sentence, TypeError, x_scale=f32(), x_zero_point=torch.tensor(True))
add(_INT8, "x_zero_point in [-128, 127], got 200", fake=False, x_scale=f32(), x_zero_point=Z_BIG)
add(_INT8, "x_zero_point in [-128, 127], got -129", fake=False, x_scale=f32(), x_zero_point=torch.tensor(-129))
_unsigned = {"x_scale": f32(), "x_zero_point": torch.tensor(-1)}
add("int8_linear", "x_zero_point in [0, 255], got -1", fake=False, x=i8(2, 4).to(torch.uint8), **_unsigned)
add("int8_conv2d", "x_zero_point in [0, 255], got -1", fake=False, x=i8(2, 4, 5, 5).to(torch.uint8), **_unsigned)

_sentence = "x_multiplier only with a floating x, got x.dtype int8. "
_sentence += "Multiply before x is quantized, or fold the multiplier into the weight."
add("int8_linear", _sentence, TypeError, x=i8(2, 4), x_scale=f32(), x_multiplier=f32(4))
_sentence = "x_multiplier.shape == (4,), one element for each column of x, got {}"
for _shape in ((), (1,), (3,), (1, 4)):
    add("int8_linear", _sentence.format(_shape), x_multiplier=f32(*_shape))
add("int8_linear", f"x_multiplier.dtype in {FLOATING}, got int32", TypeError, x_multiplier=torch.ones(4, dtype=torch.int32))

_sentence = "{} to have one element or the shape {}, got {}"
add("int8_linear", _sentence.format("x_scale", "(2, 1)", "(2,)"), x_scale=f32(2))
add("int8_linear", _sentence.format("x_scale", "(2, 1)", "(4,)"), x_scale=f32(4))
_sentence_zero = _sentence.format("x_zero_point", "(2, 1)", "(1, 2)")
add("int8_linear", _sentence_zero, x_scale=f32(2, 1), x_zero_point=i8(1, 2))
add("int8_conv2d", _sentence.format("x_scale", "(2, 1, 1, 1)", "(2,)"), x_scale=f32(2))
add("int8_conv2d", _sentence.format("x_scale", "(1, 1, 1)", "(4, 1, 1)"), x=f32(4, 5, 5), x_scale=f32(4, 1, 1))

_sentence = "weight_scale to have one element or one per output channel ({}), got shape {}"
add("int8_linear", _sentence.format(3, "(4,)"), weight_scale=f32(4))
add("int8_linear", _sentence.format(3, "(1, 3)"), weight_scale=f32(1, 3))
add("int8_linear", _sentence.format(3, "(0,)"), weight_scale=f32(0))
add("int8_conv2d", _sentence.format(6, "(1, 6, 1, 1)"), weight_scale=f32(1, 6, 1, 1))
add(_INT8, f"weight_scale.dtype in {FLOATING}, got int8", TypeError, weight_scale=i8())
add("int8_linear", "bias.shape == (3,), got (4,)", bias=f32(4))
add("int8_linear", "bias.shape == (3,), got ()", bias=f32())
add("int8_conv2d", "bias.shape == (6,), got (6, 1, 1)", bias=f32(6, 1, 1))
add("int8_linear", f"bias.dtype in {FLOATING}, got int32", TypeError, bias=torch.ones(3, dtype=torch.int32))
add("int8_conv2d", f"bias.dtype in {FLOATING}, got int8", TypeError, bias=i8(6))

_sentence = "out_dtype in (float32, float16, bfloat16, int32), got "
add(_INT8, _sentence + "int8. Integer output needs out_scale.", TypeError, out_dtype=torch.int8)
add(_INT8, _sentence + "uint8. Integer output needs out_scale.", TypeError, out_dtype=torch.uint8)
add(_INT8, _sentence + "float64", TypeError, out_dtype=torch.float64)
_sentence = "neither bias nor relu with out_dtype int32, which has the sums before them, got "
add(_INT8, _sentence + "relu. Add them to the scaled sums.", out_dtype=torch.int32, relu=True)
add("int8_linear", _sentence + "bias. Add them to the scaled sums.", out_dtype=torch.int32, bias=f32(3))
add(_INT8, "out_dtype int8 or uint8 with out_scale, got int32", TypeError, out_scale=f32(), out_dtype=torch.int32)
add(_INT8, "out_dtype int8 or uint8 with out_scale, got float32", TypeError, out_scale=f32(), out_dtype=torch.float32)
add(_INT8, f"out_scale.dtype in {FLOATING}, got int8", TypeError, out_scale=i8())
add(_INT8, "out_scale to have one element, got shape (3,)", out_scale=f32(3))
add(_INT8, "out_zero_point only together with out_scale, got out_zero_point alone", out_zero_point=i8())
add(_INT8, "out_zero_point to have one element, got shape (2,)", out_scale=f32(), out_zero_point=i8(2))

_sentence = "neither residual nor activation with out_dtype int32, which has the sums before them, got "
add(_INT8, _sentence + "residual. Add them to the scaled sums.", out_dtype=torch.int32, residual=f32(2, 3))
_sentence = "residual.dtype in (int8, uint8, float32, float16, bfloat16), got "
add(_INT8, _sentence + "float64", TypeError, residual=f32(2, 3).double())
add("int8_linear", "residual to have the shape of the result, (2, 3), got (3,)", residual=f32(3))
add("int8_conv2d", "residual to have the shape of the result, (2, 6, 3, 3), got (2, 6, 1, 1)", residual=f32(2, 6, 1, 1))
_sentence = "residual_scale and residual_zero_point only with "
add(_INT8, _sentence + "residual, got residual_scale alone", residual_scale=f32())
add(_INT8, _sentence + "residual, got residual_zero_point alone", residual_zero_point=i8())
add(
    "int8_linear",
    _sentence + "a residual of int8 or uint8, got residual.dtype float16",
    residual=f32(2, 3).half(),
    residual_scale=f32(),
)
_codes = {"residual": i8(2, 3)}
_sentence = "residual_scale with a residual of int8, got none. Pass the scale that residual was quantized with."
add("int8_linear", _sentence, **_codes)
add("int8_linear", "residual_scale to have one element, got shape (3,)", **_codes, residual_scale=f32(3))
add("int8_linear", f"residual_scale.dtype in {FLOATING}, got int8", TypeError, **_codes, residual_scale=i8())
_codes["residual_scale"] = f32()
add("int8_linear", "residual_zero_point to have one element, got shape (2,)", **_codes, residual_zero_point=i8(2))
add("int8_linear", "residual_zero_point in [-128, 127], got 200", fake=False, **_codes, residual_zero_point=Z_BIG)
_sentence = "out_zero_point.dtype integer or floating, got bool"
add(_INT8, _sentence, TypeError, out_scale=f32(), out_zero_point=torch.tensor(True))
add(_INT8, "out_zero_point in [-128, 127], got 200", fake=False, out_scale=f32(), out_zero_point=Z_BIG)
_unsigned = {"out_scale": f32(), "out_dtype": torch.uint8}
add(_INT8, "out_zero_point in [0, 255], got -1", fake=False, out_zero_point=torch.tensor(-1), **_unsigned)

add(_INT8, f"packed_weight.dtype int8, got float32. {FIRST}", TypeError, packed_weight=f32(64))
_sentence = "packed_weight made by pack_weight from this weight, got another one. Call pack_weight(weight, groups) again."
for _other in (i8(0), i8(5), qo.pack_weight(i8(3, 4))[:-1], qo.pack_weight(i8(6, 4, 3, 3), 2)):
    add(_INT8, _sentence, packed_weight=_other)
add("int8_conv2d", _sentence, packed_weight=qo.pack_weight(i8(7, 4)))
add("int8_linear", _sentence, fake=False, packed_weight=qo.pack_weight(i8(7, 4)))  # of the right length
_strided = torch.zeros(2 * qo.pack_weight(i8(3, 4)).numel(), dtype=torch.int8)[::2]
add("int8_linear", _sentence, packed_weight=_strided.copy_(qo.pack_weight(i8(3, 4))))
add("int8_conv2d", _sentence, fake=False, packed_weight=qo.pack_weight(i8(6, 4, 1, 9)))

# ---- weight_only_linear, weight_only_embedding and their packing --------------------------------------------------------------

_GROUPED = "weight_only_linear weight_only_embedding"
_WEIGHT_ONLY = f"{_GROUPED} pack_weight_only"
_ANY_WEIGHT_ONLY = f"{_WEIGHT_ONLY} unpack_weight_only"
add(_WEIGHT_ONLY, f"weight.dtype int8, got float32. {FIRST}", TypeError, weight=f32(3, 40))
add(_WEIGHT_ONLY, "weight.dtype int8, got uint8", TypeError, weight=i8(3, 40).to(torch.uint8))
add(_WEIGHT_ONLY, "weight.shape (N, K), got (3, 40, 1)", weight=i8(3, 40, 1))
add("unpack_weight_only", "weight.shape (N, K), got (3,)", shape=[3])
add("unpack_weight_only", "sizes >= 0, got shape (3, -40)", shape=[3, -40])
for _bits in (0, 2, 16, -4, 2**40):
    add(_ANY_WEIGHT_ONLY, f"bits 4 or 8, got {_bits}", bits=_bits)
for _group in (0, 1, 16, 33, 512, -2, 2**62):
    _sentence = "group_size 32, 64, 128, 256 or -1 (one group a row of the weight), got "
    add(_ANY_WEIGHT_ONLY, f"{_sentence}{_group}", group_size=_group)
for _code in (8, -9, 127, -128):
    add(
        _WEIGHT_ONLY, f"codes of four bits in [-8, 7], got {_code}", fake=False, weight=torch.full((3, 40), _code, dtype=torch.int8)
    )
add("weight_only_linear", "x.dtype in (float32, float16, bfloat16), got int8", TypeError, x=i8(2, 40))
add("weight_only_linear", "x.dtype in (float32, float16, bfloat16), got float64", TypeError, x=f32(2, 40).double())
add("weight_only_linear", "x to have at least one dimension, got shape ()", x=f32())
add("weight_only_linear", "x.shape[-1] == weight.shape[1], got 41 and 40", x=f32(2, 41))
add("weight_only_linear", "asymmetric=True only with dynamic=True, got it alone", asymmetric=True)
add(_GROUPED, f"weight_scale.dtype in {FLOATING}, got int8", TypeError, weight_scale=i8(3, 2))
for _shape in ((3,), (2, 3), (3, 1), (3, 2, 1), (1, 2), ()):
    add(_GROUPED, f"weight_scale.shape (N, groups) = (3, 2), got {_shape}", weight_scale=f32(*_shape))
    add(_GROUPED, f"weight_zero_point.shape (N, groups) = (3, 2), got {_shape}", weight_zero_point=i8(*_shape))
_sentence = "weight_zero_point.dtype integer or floating, got bool"
add(_GROUPED, _sentence, TypeError, weight_zero_point=torch.ones(3, 2, dtype=torch.bool))
for _zero in (128, -129, 2**31 - 1):
    _zeros = torch.full((3, 2), _zero, dtype=torch.int32)
    add(_GROUPED, f"weight_zero_point in [-128, 127], got {_zero}", fake=False, weight_zero_point=_zeros)
add("weight_only_linear", f"bias.dtype in {FLOATING}, got int8", TypeError, bias=i8(3))
add("weight_only_linear", "bias.shape == (3,), got (2,)", bias=f32(2))
_sentence = "x_multiplier.shape == (40,), one element for each column of x, got (3,)"
add("weight_only_linear", _sentence, x_multiplier=f32(3))
add("weight_only_linear", f"x_multiplier.dtype in {FLOATING}, got int8", TypeError, x_multiplier=i8(40))
add(_GROUPED, "out_dtype in (float32, float16, bfloat16), got int8", TypeError, out_dtype=torch.int8)
add(_GROUPED, f"packed_weight.dtype int8, got float32. {FIRST}", TypeError, packed_weight=f32(64))
_sentence = "packed_weight made by pack_weight_only from this weight, with these bits and this group_size, got another one. "
_sentence += "Call pack_weight_only(weight, bits, group_size) again."
_right = qo.pack_weight_only(i8(3, 40), 4, 32)
for _other in (i8(5), _right[:-1], qo.pack_weight_only(i8(3, 40), 8, 32), qo.pack_weight_only(i8(3, 40), 4, -1)):
    add(_GROUPED, _sentence, packed_weight=_other)
add(_GROUPED, _sentence, fake=False, packed_weight=qo.pack_weight_only(i8(4, 40), 4, 32))  # of the right length
_strided = torch.zeros(2 * _right.numel(), dtype=torch.int8)[::2].copy_(_right)
add(_GROUPED, _sentence, packed_weight=_strided)
_sentence = (
    "packed_weight made by pack_weight_only from a weight of this shape, with these bits and this group_size, got another one"
)
add("unpack_weight_only", _sentence, packed_weight=i8(5))
add("unpack_weight_only", _sentence, group_size=-1)
add("unpack_weight_only", _sentence, bits=8)
for _dtype in ("int8", "int16", "uint8", "bool", "float32"):
    _wrong = torch.ones(2, dtype=getattr(torch, _dtype))
    add("weight_only_embedding", f"indices.dtype in (int32, int64), got {_dtype}", TypeError, indices=_wrong)
for _index in (3, -1, 2**31 - 1, 2**40, -(2**63)):
    _sentence = f"indices >= 0 and below the 3 rows of the weight, got {_index}"
    add("weight_only_embedding", _sentence, IndexError, fake=False, indices=torch.tensor([[0], [_index]]))
_sentence = "indices >= 0 and below the 3 rows of the weight, got -3"
add("weight_only_embedding", _sentence, IndexError, fake=False, indices=torch.tensor([-3], dtype=torch.int32))
_none = {"weight": i8(0, 40), "weight_scale": f32(0, 2)}
add("weight_only_embedding", "no indices of a weight without rows, got 2", IndexError, **_none)
_GROUPS = "groups of at most {} k so that the int32 sum is exact, got {}. Choose a group_size."
for _bound, _change in (
    (131071, {}),
    (65793, {"asymmetric": True}),
    (65793, {"weight_zero_point": i8(1)}),
    (33025, {"asymmetric": True, "weight_zero_point": i8(1)}),
):
    _wide = {"weight": i8(1, _bound + 1), "weight_scale": f32(1), "group_size": -1, "bits": 8, "dynamic": True}
    add("weight_only_linear", _GROUPS.format(_bound, _bound + 1), x=f32(1, _bound + 1), **_wide, **_change)

# ---- shapes of int8_linear -----------------------------------------------------------------------------------------------------

add("int8_linear", "weight.shape (N, K), got (3, 4, 1, 1)", weight=i8(3, 4, 1, 1))
add("int8_linear", "x to have at least one dimension, got shape ()", x=f32())
add("int8_linear", "x.shape[-1] == weight.shape[1], got 5 and 4", x=f32(2, 5))
_wide = {"weight": i8(1, 131072), "weight_scale": f32()}
add("int8_linear", f"in_features <= 131071 {_EXACT} 131072. {_SPLIT}", x=f32(1, 131072), **_wide)
_wide = {"weight": i8(1, 65794), "weight_scale": f32()}
_sentence = f"in_features <= 65793 {_EXACT} 65794. {_UNSIGNED}"
add("int8_linear", _sentence, x=f32(1, 65794), asymmetric=True, **_wide)
add("int8_linear", _sentence, x=f32(1, 65794), x_scale=f32(), x_zero_point=i8(), **_wide)
add("int8_linear", _sentence, x=i8(1, 65794).to(torch.uint8), x_scale=f32(), **_wide)

# ---- shapes of int8_conv2d -----------------------------------------------------------------------------------------------------

add("int8_conv2d", "weight.shape (O, C/groups, R, S), got (6, 4)", weight=i8(6, 4))
add("int8_conv2d", "x.shape (N, C, H, W) or (C, H, W), got (4, 5)", x=f32(4, 5))
add("int8_conv2d", "x.shape (N, C, H, W) or (C, H, W), got (1, 2, 4, 5, 5)", x=f32(1, 2, 4, 5, 5))
_sentence = "groups to divide the input and output channels, got groups {}, 4 input and 6 output channels"
for _groups in (0, -1, 3, 4):
    add("int8_conv2d", _sentence.format(_groups), groups=_groups)
add("int8_conv2d", "x.shape[-3] == weight.shape[1] * groups, got 4 and 4 * 2", groups=2)
add("int8_conv2d", "x.shape[-3] == weight.shape[1] * groups, got 5 and 4 * 1", x=f32(2, 5, 5, 5))
add("int8_conv2d", "a kernel of at least 1 x 1, got 0 x 3", weight=i8(6, 4, 0, 3))
for _name, _least in (("stride", 1), ("dilation", 1), ("padding", 0)):
    add("int8_conv2d", f"{_name} to be one or two numbers, got (1, 1, 1)", **{_name: [1, 1, 1]})
    add("int8_conv2d", f"{_name} to be one or two numbers, got ()", **{_name: []})
    add("int8_conv2d", f"{_name} >= {_least}, got ({_least}, {_least - 1})", **{_name: [_least, _least - 1]})
add("int8_conv2d", "padding >= 0, got (0, 0, -1, 0)", padding=[0, 0, -1, 0])
_sentence = "an output of at least 1 x 1, got an input of {}, padding {}, dilation {} and a kernel of 3 x 3"
add("int8_conv2d", _sentence.format("2 x 5", "(0, 1)", "(1, 1)"), x=f32(2, 4, 2, 5), padding=[0, 1], dilation=[1, 1])
add("int8_conv2d", _sentence.format("5 x 5", "(0, 0, 0, 1)", "(1, 3)"), padding=[0, 0, 0, 1], dilation=[1, 3])
add("int8_conv2d", _sentence.format("0 x 5", "(0, 0)", "(1, 1)"), x=f32(2, 4, 0, 5), padding=[0, 0], dilation=[1, 1])
_wide = {"weight": i8(1, 14564, 3, 3), "weight_scale": f32()}
add("int8_conv2d", f"C/groups * R * S <= 131071 {_EXACT} 131076. {_SPLIT}", x=f32(1, 14564, 3, 3), **_wide)
_wide = {"weight": i8(1, 7311, 3, 3), "weight_scale": f32()}
_sentence = f"C/groups * R * S <= 65793 {_EXACT} 65799. {_UNSIGNED}"
add("int8_conv2d", _sentence, x=f32(1, 7311, 3, 3), asymmetric=True, **_wide)
add("int8_conv2d", _sentence, x=f32(1, 7311, 3, 3), x_scale=f32(), x_zero_point=i8(), **_wide)
add("int8_conv2d", _sentence, x=i8(1, 7311, 3, 3).to(torch.uint8), x_scale=f32(), **_wide)


# ---- sizes that no index holds -----------------------------------------------------------------------------------------------

_SMALL = (
    "the batch, each side of the image with its padding, stride and dilation below 2^30, got x.shape {}, padding {}, stride {} and "
    "dilation {}. Split the batch or the image."
)
_X = "(2, 4, 5, 5)"
for _n in (2**30, 2**31, 2**57, 2**61, 2**62, 2**63 - 1):
    add("int8_conv2d", _SMALL.format(_X, "(0, 0)", f"(1, {_n})", "(1, 1)"), stride=[1, _n], padding=[0, 0], dilation=[1, 1])
    add("int8_conv2d", _SMALL.format(_X, "(0, 0)", "(1, 1)", f"({_n}, 1)"), stride=[1, 1], padding=[0, 0], dilation=[_n, 1])
    _padding = (0, 0, _n, 0)
    add("int8_conv2d", _SMALL.format(_X, _padding, "(1, 1)", "(1, 1)"), stride=[1, 1], padding=[*_padding], dilation=[1, 1])
_padding = (2**29, 2**29, 0, 0)
add("int8_conv2d", _SMALL.format(_X, _padding, "(1, 1)", "(1, 1)"), stride=[1, 1], padding=[*_padding], dilation=[1, 1])
_ELEMENTS = "{} of at most 2^45 elements (an empty dimension counts as one), got shape {}. Split the call."
add("int8_conv2d", _ELEMENTS.format("an image with its padding", f"(4, {2**29 + 5}, {2**29 + 5})"), padding=[2**28])
_tall = f32(1, 1, 1, 1).expand(1, 4, 2**29, 2**20)
add("int8_conv2d", _ELEMENTS.format("x", tuple(_tall.shape)), x=_tall)
_deep = torch.empty(0, 4, 2**30, 2**30, dtype=torch.int8)
add("int8_conv2d pack_weight", _ELEMENTS.format("weight", tuple(_deep.shape)), weight=_deep)
add("unpack_weight", _ELEMENTS.format("weight", tuple(_deep.shape)), shape=list(_deep.shape))
_long = torch.empty(0, 2**46, dtype=torch.int8)
add(_WEIGHT_ONLY, _ELEMENTS.format("weight", tuple(_long.shape)), weight=_long)
add("unpack_weight_only", _ELEMENTS.format("weight", tuple(_long.shape)), shape=list(_long.shape))
add("pack_weight", f"groups <= 2^45, got {2**46}", weight=torch.empty(0, 1, 1, 1, dtype=torch.int8), groups=2**46)
add("unpack_weight", f"groups <= 2^45, got {2**46}", shape=[0, 1, 1, 1], groups=2**46)
add("unpack_weight", "sizes >= 0, got shape (6, -4, 3, 3)", shape=[6, -4, 3, 3])
_long = torch.zeros(1, dtype=torch.int64).expand(2**40)
add("weight_only_embedding", _ELEMENTS.format("a result", f"({2**40}, 40)"), indices=_long)
add("weight_only_embedding", _ELEMENTS.format("indices", f"({2**46},)"), indices=_long[:1].expand(2**46))
_long = f32(1, 4).expand(2**40, 4)
add("int8_linear", _ELEMENTS.format("a result", f"({2**40}, 64)"), x=_long, weight=i8(64, 4), weight_scale=f32())
add("int8_linear", _ELEMENTS.format("x", f"({2**44}, 4)"), x=f32(1, 4).expand(2**44, 4))
add("int8_gemm", _ELEMENTS.format("a result", f"({2**40}, {2**30})"), a=i8(1, 4).expand(2**40, 4), b=i8(1, 4).expand(2**30, 4))
_expanded = f32(1, 1).expand(2**30, 2**16)
add("quant_tensor_forward choose_qparams", _ELEMENTS.format("tensor", tuple(_expanded.shape)), tensor=_expanded)
add("quant_tensor_backward", _ELEMENTS.format("tensor", tuple(_expanded.shape)), tensor=_expanded, grad=_expanded)
add("dequant_tensor", _ELEMENTS.format("tensor", tuple(_expanded.shape)), tensor=i8(1, 1).expand(_expanded.shape))
add("quantize_rows", _ELEMENTS.format("x", tuple(_expanded.shape)), x=_expanded)


# ---- codes between products --------------------------------------------------------------------------------------------------

_AVERAGES = "int8_avg_pool2d int8_adaptive_avg_pool2d"
_POOLS = f"int8_max_pool2d {_AVERAGES}"
_IMAGES = f"{_POOLS} int8_upsample_nearest2d"
_SCALED = f"requantize {_AVERAGES}"
_TWO = "int8_add int8_mul"
_FINISHED = f"{_SCALED} {_TWO} int8_cat"
add(f"requantize {_IMAGES}", f"x.dtype in (int8, uint8), got float32. {FIRST}", TypeError, x=f32(2, 4, 5, 5))
add(_TWO, "a.dtype in (int8, uint8), got int32", TypeError, a=torch.ones(2, 4, dtype=torch.int32))
add(_TWO, f"b.dtype in (int8, uint8), got float32. {FIRST}", TypeError, b=f32(2, 4))
add("int8_add", "a.shape == b.shape, got (2, 4) and (4,). Expand the smaller one.", b=i8(4))
add(
    "int8_mul",
    "b.shape == a.shape, or (N, C, 1, 1) with a of (N, C, H, W), got a of (2, 4, 3, 3) and b of (2, 1, 3, 3). "
    "Expand the smaller one.",
    b=i8(2, 1, 3, 3),
)
add(_SCALED, f"x_scale.dtype in {FLOATING}, got int64", TypeError, x_scale=torch.tensor(1))
add(_SCALED, "x_scale to have one element, got shape (4,)", x_scale=f32(4))
add(_TWO, "b_scale to have one element, got shape (0,)", b_scale=f32(0))
add(_SCALED, "x_zero_point to have one element, got shape (4,)", x_zero_point=i8(4))
add(_SCALED, "x_zero_point in [-128, 127], got 200", fake=False, x_zero_point=Z_BIG)
add(_TWO, "a_zero_point in [-128, 127], got 200", fake=False, a_zero_point=Z_BIG)
add(_TWO, "b_zero_point.dtype integer or floating, got bool", TypeError, b_zero_point=torch.tensor(True))
add(_FINISHED, "out_zero_point only together with out_scale, got out_zero_point alone", out_zero_point=torch.tensor(1))
add(_FINISHED, "out_scale to have one element, got shape (2,)", out_scale=f32(2))
add(_FINISHED, "out_dtype int8 or uint8 with out_scale, got float32", TypeError, out_scale=f32(), out_dtype=torch.float32)
_sentence = "out_dtype in (float32, float16, bfloat16), got "
add(_FINISHED, _sentence + "int8. Integer output needs out_scale.", TypeError, out_dtype=torch.int8)
add(_FINISHED, _sentence + "int32", TypeError, out_dtype=torch.int32)
add("int8_cat", "at least one tensor, got none", tensors=[])
add("int8_cat", "a scale for each of the 2 tensors, got 1", scales=[f32()])
add("int8_cat", "no zero points or one for each of the 2 tensors, got 1", zero_points=[i8()])
add("int8_cat", "dim in [-2, 1], got 2", dim=2)
add("int8_cat", f"tensors.dtype in (int8, uint8), got float32. {FIRST}", TypeError, tensors=[i8(2, 4), f32(2, 3)])
_sentence = "tensors that differ in dimension {} alone, got shapes (2, 4) and {}"
add("int8_cat", _sentence.format(1, "(3, 3)"), tensors=[i8(2, 4), i8(3, 3)])
add("int8_cat", _sentence.format(0, "(2,)"), tensors=[i8(2, 4), i8(2)], dim=0)
add(_IMAGES, "x.shape (N, C, H, W) or (C, H, W), got (2, 4)", x=i8(2, 4))
add(_IMAGES, "images of at least 1 x 1, got x.shape (2, 4, 0, 5)", x=i8(2, 4, 0, 5))
_WINDOWED = "int8_max_pool2d int8_avg_pool2d"
add(_WINDOWED, "kernel_size >= 1, got (2, 0)", kernel_size=[2, 0])
add(_WINDOWED, "stride >= 1, got (0, 1)", stride=[0, 1])
add(_WINDOWED, "padding >= 0, got (-1, 0)", padding=[-1, 0])
_sentence = "a result of at least 1 x 1, got an image of 5 x 5, kernel_size (6, 1), padding (0, 0) and dilation (1, 1)"
add(_WINDOWED, _sentence, kernel_size=[6, 1])
_sentence = "padding of at most half of the window, got padding (2, 0), kernel_size (2, 2) and dilation (1, 1)"
add(_WINDOWED, _sentence, padding=[2, 0])
add("int8_avg_pool2d", "divisor_override other than 0, got 0", divisor_override=0)
add("int8_adaptive_avg_pool2d", "output_size >= 1, got (0, 2)", output_size=[0, 2])
add("int8_upsample_nearest2d", "scale_factor >= 1, got (2, 0)", scale_factor=[2, 0])
_sentence = "windows of at most 8421504 pixels so that the int32 sum is exact, got 9000000. Average twice."
_long = i8(1, 1, 1, 1).expand(1, 1, 3000, 3000)
add("int8_avg_pool2d", _sentence, x=_long, kernel_size=[3000, 3000])
add("int8_adaptive_avg_pool2d", _sentence, x=_long, output_size=[1, 1])


# ---- the tests ---------------------------------------------------------------------------------------------------------------


def pattern(case):
    return "^" + re.escape(f"quant_ops.{case.op}: expected {case.sentence}") + "$"


every_case = pytest.mark.parametrize("case", CASES, ids=str)


@every_case
def test_operator(case):
    arguments = good(case.op) | case.change
    with pytest.raises(RuntimeError) as caught:
        getattr(ops, case.op)(**arguments)
    assert type(caught.value) is RuntimeError
    assert re.match(pattern(case), str(caught.value).split("\n")[0]), str(caught.value)


@every_case
def test_wrapper(case):
    with pytest.raises((TypeError, ValueError, IndexError), match=pattern(case)) as caught:
        getattr(qo, case.op)(**good(case.op) | case.change)
    assert caught.type is case.kind
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("case", [case for case in CASES if case.fake], ids=str)
def test_fake_kernel(case):
    mode = FakeTensorMode()

    def fake(value):
        if isinstance(value, list):
            return [fake(one) for one in value]
        return mode.from_tensor(value) if isinstance(value, Tensor) else value

    arguments = {k: fake(v) for k, v in (good(case.op) | case.change).items()}
    with mode, pytest.raises(RuntimeError) as caught:
        getattr(ops, case.op)(**arguments)
    assert re.match(pattern(case), str(caught.value).split("\n")[0]), str(caught.value)


@pytest.mark.parametrize("op", sorted({case.op for case in CASES}))
def test_the_unchanged_arguments_work(op):
    """So that every case above fails for its own reason only."""
    getattr(ops, op)(**good(op))
    getattr(qo, op)(**good(op))


@every_case
def test_the_style_of_the_sentence(case):
    """What was expected, then what was got; a remedy is a sentence with a full stop."""
    assert re.fullmatch(r"\w.*, got [^.]*(\.\w[^.]*)*(\. \w.*\.)?", case.sentence)


@pytest.mark.parametrize(
    ("op", "change"),
    [
        ("quant_tensor_forward", {"scale": 0.5}),
        ("quant_tensor_forward", {"qmin": None}),
        ("int8_linear", {"weight_scale": 0.5}),
        ("int8_conv2d", {"x": [1.0]}),
        ("int8_conv2d", {"stride": 1.5}),
        ("choose_qparams", {"dim": "rows"}),
    ],
    ids=str,
)
def test_wrappers_raise_typeerror_for_another_python_type(op, change):
    with pytest.raises(TypeError, match=next(iter(change))):
        getattr(qo, op)(**good(op) | change)


def test_the_bounds_are_reached():
    """The largest K that is allowed works and is exact where every product has the largest magnitude."""
    for k, a, b in ((131071, -128, -128), (65793, 255, -128), (65793, 255, 127)):
        dtype = torch.uint8 if a > 127 else torch.int8
        result = qo.int8_gemm(torch.full((2, k), a, dtype=dtype), torch.full((3, k), b, dtype=torch.int8))
        assert torch.equal(result, torch.full((2, 3), k * a * b, dtype=torch.int32))


# ---- memory ------------------------------------------------------------------------------------------------------------------

_WITHOUT_MEMORY = {
    "quant_tensor_forward": {"tensor": f32(1).expand(2**44)},
    "dequant_tensor": {"tensor": i8(1).expand(2**44)},
    "quantize_rows": {"x": f32(1, 1).expand(2**40, 16)},
    "int8_gemm": {"a": i8(1, 4).expand(2**40, 4)},
    "int8_linear": {"x": f32(1, 4).expand(2**40, 4)},
    "int8_conv2d": {"x": f32(1, 4, 1, 1).expand(1, 4, 2**21, 2**21)},
    "int8_attention": {"q": f32(1, 1, 1, 1).expand(2, 4, 2**38, 6)},
    "pack_weight": {"weight": i8(1, 4).expand(2**40, 4)},
    "weight_only_linear": {"x": f32(1, 40).expand(2**38, 40)},
    "weight_only_embedding": {"indices": torch.zeros(1, dtype=torch.int32).expand(2**39)},
    "pack_weight_only": {"weight": i8(1, 40).expand(2**38, 40)},
}


@pytest.mark.parametrize("op", _WITHOUT_MEMORY)
def test_memory_that_cannot_be_had_names_the_operator_and_the_bytes(op):
    change = _WITHOUT_MEMORY[op]
    for call in (getattr(ops, op), getattr(qo, op)):
        with pytest.raises(
            RuntimeError, match=rf"^quant_ops\.{op}: expected \d{{13,}} bytes of memory, got none\. Free memory or split the"
        ):
            call(**good(op) | change)


def test_scratch_that_cannot_be_had():
    """A result of one pixel from an image of 2^39 codes a row."""
    change = {"x": f32(1, 1024, 3, 3), "weight": i8(1, 1024, 3, 3), "weight_scale": f32()}
    change |= {"padding": [0, 2**28], "stride": [1, 2**30 - 1]}
    with pytest.raises(RuntimeError, match=r"^quant_ops\.int8_conv2d: expected \d{13,} bytes of memory, got none\."):
        qo.int8_conv2d(**good("int8_conv2d") | change)


def test_an_exception_inside_a_parallel_region_is_ours():
    script = "import torch, quant_ops as qo; torch.set_num_threads(2); qo.choose_qparams(torch.ones(1 << 20), [], -127, 127)"
    done = python("-c", script, environment={**os.environ, "QUANT_OPS_ISA": "bogus"})
    assert done.returncode == 1
    assert "quant_ops: expected QUANT_OPS_ISA to be one of" in done.stderr.splitlines()[-1] + done.stderr.splitlines()[-2]
    assert "torch_parallel_for" not in done.stderr.split("RuntimeError")[-1]


@pytest.mark.parametrize("groups", [1, 2**40])
def test_weights_without_output_channels(groups):
    weight = torch.empty(0, 3, 2, 2, dtype=torch.int8)
    packed = qo.pack_weight(weight, groups)
    assert qo.unpack_weight(packed, [0, 3, 2, 2], groups).shape == weight.shape
    assert qo.pack_weight(weight.to("meta"), groups).shape == packed.shape
    assert qo._library.packed_bytes(0, 3, 2, 2, groups, "cuda") >= 0
    if groups == 1:
        assert qo.int8_conv2d(f32(2, 3, 4, 4), weight, f32()).shape == (2, 0, 3, 3)
