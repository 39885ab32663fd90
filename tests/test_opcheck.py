"""torch.library.opcheck of the operators: schema, fake kernel and its strides, autograd registration, symbolic shapes."""

import inspect

import pytest
import sweep
import test_int8_chain
import torch
from operands import codes, floats, scales
from torch import Tensor

import quant_ops as qo
from quant_ops.ops.quantize_float import ROUNDINGS, SCALE_RULES, SPECIALS

ops = torch.ops.quant_ops

_IMAGE = floats(2, 6, 5, 7)
_LAST = _IMAGE.to(memory_format=torch.channels_last)
_S = scales()
_Z = torch.tensor(3, dtype=torch.int32)


def call(*args, **kwargs):
    return args, kwargs


def _learning(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


_FORWARD = {
    "per_tensor": call(_IMAGE, _S, None, -128, 127),
    "one_element_scale": call(_IMAGE, scales(1), None, -128, 127),
    "per_channel": call(_IMAGE, scales(6, 1, 1), None, -128, 127),
    "batch_and_column": call(_IMAGE, scales(2, 1, 1, 7), None, -8, 7),
    "asymmetric_uint8": call(_IMAGE, scales(1, 6, 1, 1), codes(1, 6, 1, 1, dtype=torch.uint8), 0, 255, True),
    "asymmetric_int64": call(_IMAGE, _S, torch.tensor(-5), -128, 127, True),
    "codes_int8": call(_IMAGE, _S, None, -128, 127, False, False),
    "codes_uint8": call(_IMAGE, _S, _Z, 0, 255, True, False),
    "codes_int16": call(_IMAGE, _S, None, -129, 127, False, False),
    "codes_int32": call(_IMAGE, _S, None, 0, 70000, False, False),
    "float16": call(_IMAGE.half(), _S, None, -128, 127),
    "bfloat16": call(_IMAGE.bfloat16(), scales(6, 1, 1, dtype=torch.bfloat16), None, -128, 127),
    "float64": call(_IMAGE.double(), _S.double(), None, -128, 127),
    "channels_last": call(_LAST, scales(6, 1, 1), None, -128, 127, False, False),
    "transposed": call(floats(5, 9).T, scales(9, 1), None, -128, 127),
    "sliced": call(floats(6, 12)[1:, ::3], scales(6, 4)[1:], None, -128, 127, False, False),
    "expanded": call(floats(1, 4).expand(3, 4), _S, None, -128, 127),
    "scalar": call(floats(), _S, None, -128, 127),
    "empty": call(floats(0, 6, 5), scales(6, 1), None, -128, 127),
    "blocks": call(floats(6, 8), scales(3, 2), codes(3, 2), -128, 127, True, block_size=[2, 4]),
    "learned": call(*_learning(_IMAGE, scales(6, 1, 1), floats(6, 1, 1)), -8, 7, True),
    "learned_symmetric": call(*_learning(_LAST, _S), None, -8, 7),
}
_BACKWARD = {
    "per_tensor": call(floats(3, 5), floats(3, 5), _S, None, -8, 7),
    "per_channel": call(floats(2, 6, 5, 7), _LAST, scales(6, 1, 1), None, -8, 7),
    "zero_point": call(floats(3, 5), floats(3, 5), scales(5), codes(5), -128, 127, True),
    "learned_zero_point": call(floats(3, 5), floats(3, 5), scales(3, 1), floats(1, 5), -8, 7, True),
    "float16": call(floats(3, 5, dtype=torch.float16), floats(3, 5, dtype=torch.float16), _S, None, -8, 7),
    "bfloat16": call(floats(3, 5).bfloat16(), floats(3, 5).bfloat16(), scales(1, 5).bfloat16(), None, -8, 7),
    "float64": call(floats(3, 5).double(), floats(3, 5).double(), _S.double(), floats().double(), -8, 7, True),
    "expanded_grad": call(torch.ones(()).expand(3, 5), floats(3, 5), _S, None, -8, 7),
    "blocks": call(floats(4, 6), floats(6, 4).T, scales(2, 3), None, -8, 7, block_size=[2, 2]),
    "empty": call(floats(0, 5), floats(0, 5), scales(5), None, -8, 7),
}
_DEQUANT = {
    "int8": call(codes(3, 5), _S),
    "uint8": call(codes(2, 6, 5, 7, dtype=torch.uint8), scales(6, 1, 1), codes(6, 1, 1, dtype=torch.uint8)),
    "int16_float16": call(codes(3, 5, dtype=torch.int16), scales(5), None, torch.float16),
    "int32_float64": call(codes(3, 5, dtype=torch.int32), _S, _Z, torch.float64),
    "bfloat16": call(codes(3, 5), scales(3, 1), floats(3, 1), torch.bfloat16),
    "channels_last": call(codes(2, 6, 5, 7).to(memory_format=torch.channels_last), scales(6, 1, 1)),
    "transposed": call(codes(5, 3).T, scales(3, 1)),
    "blocks": call(codes(6, 8), scales(3, 2), codes(3, 2), block_size=[2, 4]),
    "scalar": call(codes(), _S),
    "empty": call(codes(0, 4), _S),
}
_QPARAMS = {
    "all": call(_IMAGE, [], -127, 127),
    "rows": call(floats(4, 9), [-1], -127, 127),
    "channels": call(_LAST, [0, 2, 3], -128, 127, True),
    "float16": call(_IMAGE.half(), [1], 0, 255, True),
    "bfloat16": call(_IMAGE.bfloat16(), [0, -1], -7, 7),
    "float64": call(_IMAGE.double(), [1, 2, 3], -128, 127, True),
    "transposed": call(floats(5, 9).T, [0], -127, 127),
    "scalar": call(floats(), [], -127, 127),
    "empty": call(floats(0, 4), [1], -127, 127),
}
_ROWS = {
    "matrix": call(floats(5, 9)),
    "asymmetric": call(floats(5, 9), True),
    "float16": call(floats(2, 3, 9, dtype=torch.float16)),
    "bfloat16": call(floats(2, 3, 9, dtype=torch.bfloat16), True),
    "vector": call(floats(9)),
    "transposed": call(floats(9, 5).T),
    "sliced": call(floats(4, 3, 12)[:, 1:, :7]),
    "no_rows": call(floats(0, 9)),
    "no_columns": call(floats(4, 0), True),
}
_AFFINE_X = floats(4, 12)
_CHOOSE_AFFINE = {
    "groups": call(_AFFINE_X, 2, [1, 4], 0, 15),
    "symmetric_bfloat16": call(_AFFINE_X.bfloat16(), 0, [2, -1], -8, 7, 1e-6, torch.float32, torch.int64),
    "no_clipping_kept": call(_AFFINE_X.half(), 1, [2, 6], -128, 127, keepdim=True),
    "tinygemm": call(_AFFINE_X, 2, [1, 4], 0, 15, preserve_zero=False, zero_point_domain=1),
    "columns": call(_AFFINE_X, 2, [4, 1], 0, 255, None, None, torch.bfloat16, preserve_zero=False),
    "whole": call(_IMAGE, 0, [-1, -1, -1, -1], -127, 127),
    "ones": call(floats(3), 0, [1], -127, 127),
    "transposed": call(_AFFINE_X.T, 2, [3, 2], 0, 15),
    "scalar": call(floats(), 2, [], 0, 15),
    "empty": call(floats(0, 8), 2, [1, 4], 0, 15),
}
_QUANTIZE_AFFINE = {
    "groups": call(_AFFINE_X, [1, 4], scales(4, 3), codes(4, 3), torch.uint8, 0, 15),
    "no_zero_point": call(_AFFINE_X.bfloat16(), [2, 6], scales(2, 2), None, torch.int8, -8, 7, 2),
    "tinygemm": call(_AFFINE_X.half(), [1, 4], scales(12), floats(4, 3), torch.uint8, 0, 15, 1),
    "int32": call(_AFFINE_X.T, [3, 4], scales(4).double(), torch.zeros(4, dtype=torch.int64), torch.int32, -(2**31), 2**31 - 1),
    "channels_last": call(_LAST, [1, 6, -1, 7], scales(2), None, torch.int16, -99, 99),
    "empty": call(floats(0, 8), [1, 4], scales(0, 2), None, torch.int8, -8, 7),
}
_DEQUANTIZE_AFFINE = {
    "groups": call(codes(4, 12), [1, 4], scales(4, 3), codes(4, 3), -128, 127),
    "tinygemm": call(codes(4, 12, dtype=torch.uint8), [1, 4], scales(4, 3), floats(4, 3), 0, 15, 1, output_dtype=torch.bfloat16),
    "no_zero_point": call(codes(12, 4).T, [4, 1], scales(12), None, -8, 7, 2, output_dtype=torch.float16),
    "int32": call(codes(4, 12, dtype=torch.int32), [-1, -1], scales(1), codes(1), -(2**31), 2**31 - 1),
    "empty": call(codes(0, 8), [1, 4], scales(0, 2), None, -8, 7),
}
_GEMM = {
    "int8": call(codes(5, 37), codes(19, 37)),
    "uint8": call(codes(5, 37, dtype=torch.uint8), codes(19, 37)),
    "views": call(codes(37, 5).T, codes(37, 19).T),
    "offset": call(codes(6, 40)[1:, 3:], codes(20, 38)[1:, :37]),
    "one": call(codes(1, 1), codes(1, 1)),
    "no_rows": call(codes(0, 8), codes(3, 8)),
    "no_columns": call(codes(4, 8), codes(0, 8)),
    "no_depth": call(codes(4, 0), codes(3, 0)),
}
_W = codes(19, 37)
_WS = scales(19)
_BIAS = floats(19)
_LINEAR = {
    "dynamic": call(floats(5, 37), _W, _WS),
    "dynamic_asymmetric": call(floats(5, 37), _W, _WS, _BIAS, asymmetric=True),
    "packed": call(floats(5, 37), _W, _WS, _BIAS, packed_weight=ops.pack_weight(_W), relu=True),
    "static": call(floats(5, 37), _W, _WS, _BIAS, _S),
    "static_zero_point": call(floats(5, 37), _W, _WS, _BIAS, _S, _Z),
    "static_per_row": call(floats(2, 5, 37), _W, _WS, None, scales(2, 5, 1), codes(2, 5, 1)),
    "quantized_int8": call(codes(5, 37), _W, _WS, _BIAS, _S),
    "quantized_uint8": call(codes(5, 37, dtype=torch.uint8), _W, _S, None, scales(1), torch.tensor([128.2])),
    "quantized_to_bfloat16": call(codes(5, 37), _W, _WS, None, _S, out_dtype=torch.bfloat16),
    "float16": call(floats(5, 37, dtype=torch.float16), _W, _WS.half(), _BIAS.half()),
    "bfloat16": call(floats(5, 37, dtype=torch.bfloat16), _W, _WS, _BIAS),
    "float16_to_float32": call(floats(5, 37, dtype=torch.float16), _W, _WS, out_dtype=torch.float32),
    "out_int8": call(floats(5, 37), _W, _WS, _BIAS, out_scale=_S, out_zero_point=_Z),
    "out_uint8": call(floats(5, 37), _W, _WS, out_scale=_S, out_zero_point=_Z, out_dtype=torch.uint8, relu=True),
    "out_int32": call(floats(5, 37), _W, _WS, None, _S, _Z, out_dtype=torch.int32),
    "residual": call(floats(5, 37), _W, _WS, _BIAS, residual=floats(19, 5).T, activation=5),
    "residual_of_codes": call(codes(5, 37), _W, _WS, None, _S, residual=codes(5, 19), residual_scale=_S, residual_zero_point=_Z),
    "vector": call(floats(37), _W, _WS),
    "rank_4": call(floats(2, 1, 3, 37), _W, _WS),
    "transposed": call(floats(37, 5).T, codes(37, 19).T, _WS),
    "sliced": call(floats(4, 3, 40)[:, ::2, 1:38], _W, scales(38)[::2]),
    "empty_batch": call(floats(0, 37), _W, _WS),
    "one": call(floats(1, 1), codes(1, 1), scales(1)),
    "multiplier": call(floats(5, 37, dtype=torch.float16), _W, _WS, _BIAS, x_multiplier=floats(37)),
    "multiplier_static": call(floats(2, 5, 37), _W, _WS, None, _S, _Z, x_multiplier=floats(74)[::2]),
}
_K = codes(8, 6, 3, 3)
_KS = scales(8)
_KB = floats(8)
_GROUPED = codes(9, 2, 1, 1)
_DEPTHWISE = codes(6, 1, 3, 3)
_CONV = {
    "dynamic": call(_IMAGE, _K, _KS),
    "padded": call(_IMAGE, _K, _KS, _KB, [1, 2], [1, 2]),
    "asymmetric": call(_IMAGE, _K, _KS, _KB, [1], [1], asymmetric=True, relu=True),
    "four_paddings": call(_IMAGE, _K, _KS, None, [1], [0, 1, 2, 3]),
    "dilated": call(_IMAGE, _K, _KS, None, [2], [2], [2, 1]),
    "groups": call(_IMAGE, codes(8, 3, 3, 3), _KS, _KB, [1], [1], [1], 2),
    "depthwise": call(_IMAGE, _DEPTHWISE, scales(6, 1, 1, 1), None, [1], [1], [1], 6),
    "packed": call(_IMAGE, _K, _KS, _KB, packed_weight=ops.pack_weight(_K)),
    "packed_groups": call(_IMAGE, _GROUPED, scales(9), groups=3, packed_weight=ops.pack_weight(_GROUPED, 3)),
    "packed_depthwise": call(_LAST, _DEPTHWISE, scales(6), groups=6, packed_weight=ops.pack_weight(_DEPTHWISE, 6)),
    "static": call(_IMAGE, _K, _KS, _KB, [1], [1], [1], 1, _S, _Z),
    "static_per_sample": call(_IMAGE, _K, _KS, None, x_scale=scales(2, 1, 1, 1)),
    "quantized": call(codes(2, 6, 5, 7), _K, _KS, _KB, [1], [1], [1], 1, _S, _Z),
    "quantized_uint8": call(codes(2, 6, 5, 7, dtype=torch.uint8), _K, _S, None, [1], [1], x_scale=_S, x_zero_point=_Z),
    "channels_last": call(_LAST, _K, _KS, _KB, [1], [1]),
    "residual": call(_LAST, _K, _KS, _KB, [1], [1], out_scale=_S, residual=floats(2, 8, 5, 7), activation=3),
    "channels_last_odd": call(floats(2, 3, 5, 7).to(memory_format=torch.channels_last), codes(5, 3, 2, 2), scales(5)),
    "weight_channels_last": call(_IMAGE, _K.to(memory_format=torch.channels_last), _KS),
    "sliced_channels": call(floats(2, 12, 5, 7)[:, ::2], _K, _KS),
    "sliced_pixels": call(floats(2, 6, 9, 14)[:, :, ::2, ::2], _K, _KS),
    "sliced_to_one_pixel": call(floats(2, 6, 1, 2)[..., ::2], _K, _KS, None, [1], [2]),
    "transposed_pixels": call(floats(2, 6, 7, 5).transpose(2, 3), _K, _KS),
    "image": call(_IMAGE[0], _K, _KS, _KB),
    "image_permuted": call(floats(5, 7, 6).permute(2, 0, 1), _K, _KS, _KB),
    "image_static": call(_IMAGE[0], _K, _KS, x_scale=scales(1, 1, 1)),
    "float16": call(_IMAGE.half(), _K, _KS, _KB.half()),
    "bfloat16_last": call(_LAST.bfloat16(), _K, _KS, _KB),
    "out_int8": call(_LAST, _K, _KS, _KB, out_scale=_S, out_zero_point=_Z, relu=True),
    "out_float16": call(codes(2, 6, 5, 7), _K, _KS, x_scale=_S, out_dtype=torch.float16),
    "out_int32": call(_LAST, _DEPTHWISE, scales(6), None, [1], [1], [1], 6, asymmetric=True, out_dtype=torch.int32),
    "one_channel": call(floats(1, 1, 4, 4), codes(1, 1, 2, 2), scales(1)),
    "empty_batch": call(floats(0, 6, 5, 7), _K, _KS, _KB),
}
_CODES = codes(2, 6, 5, 7)
_CODES_LAST = _CODES.to(memory_format=torch.channels_last)
_U8 = codes(2, 6, 5, 7, dtype=torch.uint8)
_OUT = {"out_scale": _S, "out_zero_point": _Z}
_REQUANTIZE = {
    "int8": call(_CODES, _S, **_OUT),
    "uint8_out": call(_U8, _S, _Z, **_OUT, out_dtype=torch.uint8, activation=1),
    "float32": call(_CODES_LAST, scales(1), activation=5),
    "bfloat16": call(codes(3, 5).T, _S, torch.tensor(2.3), out_dtype=torch.bfloat16),
    "sliced": call(codes(6, 12)[1:, ::3], _S, **_OUT),
    "expanded": call(codes(1, 4).expand(3, 4), _S, **_OUT),
    "permuted": call(codes(2, 3, 4, 5, 6).permute(4, 0, 2, 1, 3), _S, **_OUT),
    "one_channel": call(codes(2, 1, 3, 4).to(memory_format=torch.channels_last), _S, **_OUT),
    "scalar": call(codes(), _S, **_OUT),
    "empty": call(codes(0, 4), _S),
}
_ADD = {
    "int8": call(_CODES, _CODES, _S, _S, **_OUT),
    "uint8": call(_U8, _CODES, _S, scales(1), _Z, torch.tensor(-2), **_OUT, activation=2),
    "channels_last": call(_CODES_LAST, _CODES, _S, _S),
    "float16": call(_CODES, _CODES_LAST, _S, _S, out_dtype=torch.float16, activation=3),
    "transposed": call(codes(5, 9).T, codes(9, 5), _S, _S, **_OUT),
    "empty": call(codes(0, 4), codes(0, 4), _S, _S),
}
_MUL = {
    **_ADD,
    "channels": call(_CODES, _CODES[:, :, :1, :1], _S, _S, **_OUT),
    "channels, last": call(_CODES_LAST, _U8[:, :, :1, :1], _S, _S, None, _Z, activation=1),
}
_CAT = {
    "channels": call([_CODES, _CODES[:, :2]], [_S, _S], [], **_OUT),
    "channels_last": call([_CODES_LAST, _CODES], [_S, scales(1)], [_Z, _Z], 1, **_OUT),
    "mixed": call([_U8, _CODES], [_S, _S], [_Z, _Z], -1, out_dtype=torch.bfloat16),
    "rows": call([codes(3, 4), codes(4, 5).T[:2]], [_S, _S], [], 0),
    "one": call([codes(5)], [_S], [], 0, **_OUT),
    "empty": call([codes(2, 0), codes(2, 3)], [_S, _S], []),
}
_MAX_POOL = {
    "image": call(_CODES[0], [2, 2]),
    "batch": call(_U8, [3, 3], [2, 2], [1, 1]),
    "channels_last": call(_CODES_LAST, [3], [2], [1], [1], True),
    "dilated": call(_CODES, [2, 3], [1, 1], [1, 1], [2, 1]),
    "sliced": call(codes(2, 6, 9, 14)[:, :, ::2, ::2], [2]),
    "empty_batch": call(codes(0, 6, 5, 7), [2]),
}
_AVG_POOL = {
    "image": call(_CODES[0], _S, None, [2, 2]),
    "batch": call(_U8, _S, _Z, [3, 3], [2, 2], [1, 1], **_OUT),
    "channels_last": call(_CODES_LAST, _S, _Z, [3], [2], [1], True, False, None, **_OUT, out_dtype=torch.uint8),
    "divisor": call(_CODES, _S, None, [2, 3], [], [1], False, True, 3, out_dtype=torch.float16),
    "empty_batch": call(codes(0, 6, 5, 7), _S, None, [2]),
}
_ADAPTIVE = {
    "image": call(_CODES[0], _S, None, [1]),
    "batch": call(_U8, _S, _Z, [3, 4], **_OUT),
    "channels_last": call(_CODES_LAST, _S, None, [1, 1], out_dtype=torch.bfloat16),
    "empty_batch": call(codes(0, 6, 5, 7), _S, None, [2]),
}
_UPSAMPLE = {
    "image": call(_CODES[0], [2]),
    "batch": call(_U8, [2, 3]),
    "channels_last": call(_CODES_LAST, [2, 2]),
    "empty_batch": call(codes(0, 6, 5, 7), [2]),
}
_PACK = {
    "linear": call(_W),
    "linear_view": call(codes(37, 19).T),
    "one": call(codes(1, 1)),
    "conv": call(_K),
    "conv_channels_last": call(_K.to(memory_format=torch.channels_last)),
    "groups": call(codes(8, 3, 3, 3), 2),
    "depthwise": call(codes(17, 1, 3, 3), 17),
    "multiplier": call(codes(10, 1, 3, 3), 5),
    "no_columns": call(codes(0, 5)),
}
_W4 = codes(19, 37).bitwise_and(7)
_GROUP_SCALES = scales(19, 2)
_WEIGHT_ONLY = {
    "int8": call(floats(5, 37), _W, _WS),
    "int8_groups": call(floats(5, 37), _W, _GROUP_SCALES, None, _BIAS, 8, 32),
    "int8_dynamic": call(floats(2, 5, 37), _W, _GROUP_SCALES, codes(19, 2), _BIAS, 8, 32, dynamic=True),
    "int4": call(floats(5, 37).bfloat16(), _W4, scales(19, 1), None, None, 4, 256),
    "int4_groups": call(floats(5, 37), _W4, _GROUP_SCALES, floats(19, 2), None, 4, 32),
    "int4_dynamic": call(floats(5, 37), _W4, _GROUP_SCALES, codes(19, 2), _BIAS, 4, 32, dynamic=True, asymmetric=True),
    "packed": call(floats(5, 37), _W4, _GROUP_SCALES, None, _BIAS, 4, 32, packed_weight=ops.pack_weight_only(_W4, 4, 32)),
    "float16_to_float32": call(floats(37, dtype=torch.float16), _W, _WS, out_dtype=torch.float32),
    "transposed": call(floats(37, 5).T, codes(37, 19).T, scales(2, 19).T, None, _BIAS, 8, 32, dynamic=True),
    "empty_batch": call(floats(0, 37), _W4, _WS, None, None, 4),
    "multiplier": call(floats(5, 37).bfloat16(), _W4, _GROUP_SCALES, None, _BIAS, 4, 32, x_multiplier=floats(37)),
    "multiplier_dynamic": call(floats(5, 37), _W, _WS, dynamic=True, x_multiplier=floats(37).double()),
}
_INDICES = torch.tensor([[3, 0, 18], [3, 7, 3]])
_EMBEDDING = {
    "int8": call(_INDICES, _W, _WS),
    "int8_groups": call(_INDICES.int(), _W, _GROUP_SCALES, codes(19, 2), 8, 32),
    "int4": call(_INDICES, _W4, scales(19, 1).half(), None, 4, out_dtype=torch.bfloat16),
    "int4_groups": call(_INDICES, _W4, _GROUP_SCALES, floats(19, 2), 4, 32),
    "packed": call(_INDICES, _W4, _GROUP_SCALES, None, 4, 32, packed_weight=ops.pack_weight_only(_W4, 4, 32)),
    "packed_int8": call(_INDICES, _W, _WS, None, packed_weight=ops.pack_weight_only(_W), out_dtype=torch.float16),
    "transposed": call(_INDICES.T, codes(37, 19).T, scales(2, 19).T, None, 8, 32),
    "scalar": call(torch.tensor(5), _W, _WS),
    "empty": call(torch.zeros(2, 0, dtype=torch.int64), _W4, _WS, None, 4),
    "no_columns": call(_INDICES, codes(19, 0), _WS),
}
_PACK_WEIGHT_ONLY = {
    "int8": call(_W),
    "int8_groups": call(_W, 8, 32),
    "int4": call(_W4, 4),
    "int4_view": call(codes(37, 19).bitwise_and(7).T, 4, 64),
    "no_columns": call(codes(0, 5), 4, 32),
}
_SEED = torch.tensor(-3)
_FLOAT = {
    "no_scale": call(_IMAGE, 4, 3),
    "one_element_scale": call(_IMAGE, 4, 3, scales(1), special=1),
    "per_channel": call(_IMAGE, 5, 2, scales(6, 1, 1), special=2),
    "batch_and_column": call(_IMAGE, 2, 1, scales(2, 1, 1, 7), bias=3),
    "infinity": call(_IMAGE, 5, 10, special=2, saturate=False),
    "no_subnormals": call(_IMAGE, 3, 2, subnormals=False, rounding=1),
    "stochastic": call(_IMAGE, 2, 1, None, _SEED, rounding=3),
    "stochastic_channels_last": call(_LAST, 8, 7, scales(6, 1, 1), torch.tensor([9]), special=2, rounding=3),
    "float16": call(_IMAGE.half(), 4, 3, _S),
    "bfloat16": call(_IMAGE.bfloat16(), 4, 3, scales(6, 1, 1, dtype=torch.bfloat16), rounding=2),
    "float64": call(_IMAGE.double(), 4, 3, _S.double()),
    "channels_last": call(_LAST, 4, 3, scales(6, 1, 1)),
    "transposed": call(floats(5, 9).T, 4, 3, scales(9, 1)),
    "sliced": call(floats(6, 12)[1:, ::3], 4, 3, scales(6, 4)[1:]),
    "expanded": call(floats(1, 4).expand(3, 4), 4, 3, _S),
    "scalar": call(floats(), 4, 3, _S),
    "empty": call(floats(0, 6, 5), 4, 3, scales(6, 1)),
    "blocks": call(floats(6, 8), 4, 3, scales(3, 2), block_size=[2, 4]),
    "learned": call(*_learning(_LAST), 4, 3, _S, None, bias=8, special=1),
    "learned_stochastic": call(*_learning(_IMAGE), 4, 3, None, _SEED, rounding=3),
}
_FLOAT_BACKWARD = {
    "no_scale": call(floats(3, 5), floats(3, 5), 2, 1),
    "per_channel": call(floats(2, 6, 5, 7), _LAST, 4, 3, scales(6, 1, 1), bias=12, special=1),
    "float16": call(floats(3, 5), floats(3, 5, dtype=torch.float16), 2, 1, _S, subnormals=False),
    "float64": call(floats(3, 5), floats(3, 5).double(), 2, 1, _S.double()),
    "expanded_grad": call(torch.ones(()).expand(3, 5), floats(3, 5), 2, 1),
    "blocks": call(floats(4, 6), floats(6, 4).T, 2, 1, scales(2, 3), block_size=[2, 2]),
    "empty": call(floats(0, 5), floats(0, 5), 2, 1, scales(5)),
    "learned": call(*_learning(floats(3, 5), floats(3, 5)), 2, 1, _S),
}
_BLOCKS = {
    "last": call(_IMAGE, -1, 4, 2, 1),
    "channels": call(_IMAGE, 1, 4, 4, 3, special=1, scale_rule=1),
    "channels_last": call(_LAST, 1, 4, 4, 3, special=1, scale_rule=2),
    "across_channels_last": call(_LAST, -1, 3, 5, 2, special=2, scale_rule=3),
    "two_levels": call(floats(3, 40), 1, 16, 2, 1, _S, scale_rule=4),
    "divisor": call(floats(3, 40), 1, 64, 1, 6, bias=1, scale_rule=5, scale_divisor=1.0),
    "stochastic": call(_IMAGE, 0, 2, 3, 2, None, _SEED, rounding=3, scale_rule=6),
    "float16": call(_IMAGE.half(), -1, 4, 2, 1, rounding=1),
    "bfloat16": call(_IMAGE.bfloat16(), -2, 4, 2, 1, rounding=2),
    "transposed": call(floats(5, 9).T, 1, 4, 2, 1),
    "sliced": call(floats(6, 12)[1:, ::3], 1, 4, 2, 1),
    "expanded": call(floats(1, 4).expand(3, 4), 0, 2, 2, 1),
    "one_block": call(floats(7), 0, 32, 2, 1),
    "empty": call(floats(0, 6, 5), 0, 4, 2, 1),
    "empty_blocks": call(floats(4, 0), 1, 4, 2, 1),
    "learned": call(*_learning(_LAST), 1, 4, 2, 1),
    "learned_two_levels": call(*_learning(_IMAGE), -1, 16, 2, 1, _S, _SEED, rounding=3, scale_rule=4),
}
_BLOCKS_BACKWARD = {
    "last": call(floats(3, 40), floats(3, 40), 1, 16, 2, 1),
    "channels_last": call(floats(2, 6, 5, 7), _LAST, 1, 4, 4, 3, special=1, scale_rule=2),
    "two_levels": call(floats(3, 40), floats(3, 40), 0, 2, 2, 1, _S, scale_rule=4),
    "divisor": call(floats(3, 40), floats(3, 40), 1, 64, 1, 6, bias=1, scale_rule=5, scale_divisor=0.5),
    "float16": call(floats(3, 5), floats(3, 5, dtype=torch.float16), 1, 4, 2, 1),
    "expanded_grad": call(torch.ones(()).expand(3, 5), floats(5, 3).T, 1, 4, 2, 1),
    "sliced": call(floats(5, 4), floats(6, 12)[1:, ::3], 1, 4, 2, 1),
    "empty": call(floats(0, 5), floats(0, 5), 1, 4, 2, 1),
    "learned": call(*_learning(floats(3, 5), floats(3, 5)), 1, 4, 2, 1),
}
_LINEAR_BACKWARD = {
    "int8": call(floats(5, 19), _W, _WS),
    "packed": call(floats(2, 5, 19).bfloat16(), _W, _WS, packed_weight=ops.pack_weight(_W), x_multiplier=floats(37)),
    "one_scale": call(floats(19), _W, _S),
    "sliced": call(floats(6, 40)[1:, ::2][:, :19], _W, _WS, packed_weight=ops.pack_weight(_W)),
    "no_rows": call(floats(0, 19).half(), _W, _WS),
}
_CONV_BACKWARD = {
    "int8": call(floats(2, 4, 5, 7), [2, 6, 5, 7], codes(4, 6, 1, 1), scales(4)),
    "packed": call(
        *(floats(4, 3, 4).half(), [6, 5, 7], codes(4, 3, 3, 3), scales(4), [2, 2], [1, 1], [1, 1], 2),
        packed_weight=ops.pack_weight(codes(4, 3, 3, 3), 2),
    ),
    "uneven": call(floats(2, 4, 6, 8), [2, 6, 5, 7], codes(4, 6, 3, 3), scales(4), 1, [1, 2, 2, 1], 1, 1),
}
_WEIGHT_ONLY_BACKWARD = {
    "int8": call(floats(5, 19), _W, _WS),
    "int4_groups": call(floats(2, 5, 19).bfloat16(), _W4, _GROUP_SCALES, codes(19, 2), 4, 32, x_multiplier=floats(37)),
    "packed": call(floats(5, 19), _W4, _GROUP_SCALES, floats(19, 2), 4, 32, packed_weight=ops.pack_weight_only(_W4, 4, 32)),
    "no_rows": call(floats(0, 19), _W, _WS),
}


def chain(program, constants, *inputs):
    return call(list(inputs), constants, program.encode())


_CHAIN = {
    "network": chain(*test_int8_chain.network(), floats(2, 3, 12, 12)),
    "channels_last": chain(*test_int8_chain.network(), floats(3, 3, 12, 12).to(memory_format=torch.channels_last)),
    "blocks": chain(*test_int8_chain.blocks(1), floats(2, 3, 12, 12)),
    "empty": chain(*test_int8_chain.network(), floats(0, 3, 12, 12)),
}
_ATTENTION = {
    "heads": call(*(floats(2, 5, 3, 8).transpose(1, 2) for _ in range(3))),
    "grouped": call(floats(1, 4, 5, 8).half(), floats(1, 2, 7, 8).half(), floats(1, 2, 7, 3).half(), None, True),
    "mask": call(floats(2, 1, 5, 8), floats(2, 1, 6, 8), floats(2, 1, 6, 4), floats(5, 6) > 0, scale=0.5),
    "bias": call(floats(1, 2, 5, 8), floats(1, 2, 5, 8), floats(1, 2, 5, 8), floats(2, 1, 5)),
    "sliced": call(*(floats(2, 3, 5, 16)[..., ::2] for _ in range(3))),
    "no_keys": call(floats(2, 1, 5, 8), floats(2, 1, 0, 8), floats(2, 1, 0, 8)),
}
_NORM_ROWS = {
    "layer": call(floats(5, 20), floats(20), floats(20), 1e-5),
    "rms": call(floats(2, 3, 7).half(), floats(7).half(), None, 1e-6, True, True, floats(2, 3, 7).half()),
    "sliced": call(floats(6, 40)[1:, ::2], None, floats(20), 0.0),
    "no_rows": call(floats(0, 5), None, None, 1e-5),
}
SAMPLES = {
    "quant_float_forward": _FLOAT,
    "quant_float_backward": _FLOAT_BACKWARD,
    "quant_block_forward": _BLOCKS,
    "quant_block_backward": _BLOCKS_BACKWARD,
    "quant_tensor_forward": _FORWARD,
    "quant_tensor_backward": _BACKWARD,
    "dequant_tensor": _DEQUANT,
    "choose_qparams": _QPARAMS,
    "quantize_rows": _ROWS,
    "norm_quantize_rows": _NORM_ROWS,
    "choose_qparams_affine": _CHOOSE_AFFINE,
    "quantize_affine": _QUANTIZE_AFFINE,
    "dequantize_affine": _DEQUANTIZE_AFFINE,
    "int8_linear_backward": _LINEAR_BACKWARD,
    "int8_conv2d_backward": _CONV_BACKWARD,
    "weight_only_linear_backward": _WEIGHT_ONLY_BACKWARD,
    "int8_gemm": _GEMM,
    "int8_linear": _LINEAR,
    "int8_conv2d": _CONV,
    "requantize": _REQUANTIZE,
    "int8_add": _ADD,
    "int8_mul": _MUL,
    "int8_cat": _CAT,
    "int8_max_pool2d": _MAX_POOL,
    "int8_avg_pool2d": _AVG_POOL,
    "int8_adaptive_avg_pool2d": _ADAPTIVE,
    "int8_upsample_nearest2d": _UPSAMPLE,
    "int8_chain": _CHAIN,
    "int8_attention": _ATTENTION,
    "weight_only_linear": _WEIGHT_ONLY,
    "weight_only_embedding": _EMBEDDING,
    "pack_weight_only": _PACK_WEIGHT_ONLY,
    "unpack_weight_only": {
        name: call(ops.pack_weight_only(*args), list(args[0].shape), *args[1:]) for name, (args, _) in _PACK_WEIGHT_ONLY.items()
    },
    "pack_weight": _PACK,
    "transpose_packed_weight": {
        name: call(ops.pack_weight(*args), list(args[0].shape)) for name, (args, _) in _PACK.items() if args[0].dim() == 2
    },
    "unpack_weight": {
        name: call(ops.pack_weight(*args), list(args[0].shape), *args[1:]) for name, (args, _) in _PACK.items() if args[0].numel()
    },
}


# Traced with symbolic shapes, which takes most of the time: of each operator a few samples, and all that gradients are asked of.
TRACED = {(op, sample) for op in SAMPLES for sample in sweep.part(SAMPLES[op], 4)} | {
    (op, sample)
    for op in SAMPLES
    for sample, (args, _) in SAMPLES[op].items()
    if any(isinstance(x, Tensor) and x.requires_grad for x in args)
}


@pytest.mark.parametrize(("op", "sample"), [(op, sample) for op in SAMPLES for sample in SAMPLES[op]])
def test_opcheck(op, sample):
    args, kwargs = SAMPLES[op][sample]
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if (op, sample) in TRACED:
        checks.append("test_aot_dispatch_dynamic")
    torch.library.opcheck(getattr(ops, op).default, args, kwargs, test_utils=checks)


@pytest.mark.parametrize(("op", "sample"), [(op, sample) for op in SAMPLES for sample in SAMPLES[op]])
def test_fake_strides(op, sample):
    """The fake result has the real one's strides wherever more than one element makes them matter, not only its shape and dtype."""
    args, kwargs = SAMPLES[op][sample]
    real = getattr(ops, op)(*args, **kwargs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:

        def to_fake(t):
            if isinstance(t, list):
                return [to_fake(one) for one in t]
            return mode.from_tensor(t) if isinstance(t, Tensor) else t

        fake = getattr(ops, op)(*map(to_fake, args), **{k: to_fake(v) for k, v in kwargs.items()})
    for r, f in zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)
        assert [s for s, n in zip(r.stride(), r.shape, strict=True) if n > 1] == [
            s for s, n in zip(f.stride(), f.shape, strict=True) if n > 1
        ]


@pytest.mark.parametrize("op", SAMPLES)
def test_a_tensor_without_data_among_others_is_refused(op):
    """Otherwise the fake kernel would answer with memory that nobody has written."""
    schema = [argument.name for argument in getattr(ops, op).default._schema.arguments]
    for args, kwargs in SAMPLES[op].values():
        named = dict(zip(schema, args, strict=False)) | kwargs
        tensors = [name for name, value in named.items() if isinstance(value, Tensor) and name != "seed"]
        for name in tensors if len(tensors) > 1 else ():
            with pytest.raises(RuntimeError, match=rf"quant_ops\.{op}: expected all tensors on one device, got .*'{name}': 'meta'"):
                getattr(ops, op)(**named | {name: named[name].detach().to("meta")})


def test_every_operator_is_checked():
    names = {name.removeprefix("quant_ops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("quant_ops::")}
    assert {name for name in names if not name.startswith("_")} == set(SAMPLES)


_NAMES = {"special": SPECIALS, "rounding": ROUNDINGS, "scale_rule": SCALE_RULES}


@pytest.mark.parametrize("op", [op for op in SAMPLES if not op.endswith("_affine")])  # these have torchao's signatures
def test_the_signature_of_the_wrapper_is_the_schema(op):
    """Names, order, what is keyword-only, and defaults: the schema in C++ is the source, the typed wrapper its documentation.

    Wrappers of floating formats have names for numbers, and last a seed and a generator to draw one from.
    """

    def default(parameter):
        if parameter.name in _NAMES and parameter.default is not None:
            return _NAMES[parameter.name].index(parameter.default)
        if parameter.default is None and parameter.name in ("activation", "stride"):
            return {"activation": 0, "stride": []}[parameter.name]
        if isinstance(parameter.default, int) and parameter.name in ("stride", "padding", "dilation"):
            return [parameter.default] * 2
        return {torch.float32: 6}.get(parameter.default, parameter.default)  # as schemas number it

    empty = inspect.Parameter.empty
    wrapper = [
        (p.name, p.kind is p.KEYWORD_ONLY, empty if p.default is empty else default(p))
        for p in inspect.signature(getattr(qo, op)).parameters.values()
    ]
    schema = [
        (a.name, a.kwarg_only, a.default_value if a.has_default_value() else empty)
        for a in getattr(ops, op).default._schema.arguments
    ]
    if ("generator", True, None) in wrapper:
        assert wrapper[-2:] == [("seed", True, None), ("generator", True, None)]
        wrapper, schema = wrapper[:-2], [a for a in schema if a != ("seed", False, None)]
        wrapper.sort(key=lambda a: (a[1], a[0] if a[1] else ""))  # what is keyword-only has no order
        schema.sort(key=lambda a: (a[1], a[0] if a[1] else ""))
    assert wrapper == schema


@pytest.mark.parametrize("sample", SAMPLES["unpack_weight"])
def test_unpacking_gives_the_packed_weight(sample):
    args, _ = _PACK[sample]
    packed, shape, *groups = SAMPLES["unpack_weight"][sample][0]
    assert torch.equal(ops.unpack_weight(packed, shape, *groups), args[0])
