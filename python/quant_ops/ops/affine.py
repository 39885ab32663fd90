"""torchao's affine primitives, one section an operator: typed wrapper with the documentation, fake kernel.

``q = clamp(rne(x * (1 / scale)) + zero_point)`` for blocks of any shape. Results are those of torchao 0.18 on a CPU, bit for bit:
every operation is rounded to the dtype in which torch holds its result. The wrappers take torchao's names for dtypes and mappings,
the operators integers. Checks are in ``cpp/torch/affine.h``, the arithmetic in ``cpp/contract/affine.h``.
"""

from collections.abc import Sequence
from enum import Enum
from typing import Any, NoReturn

import torch
from torch import Tensor

from quant_ops.ops._register import call, constant, fake_kernel, inference_only

_ops = torch.ops.quant_ops


class MappingType(Enum):
    """How the range of floating values is mapped to the codes."""

    SYMMETRIC = 0  #: ``scale = amax / ((quant_max - quant_min) / 2)``
    SYMMETRIC_NO_CLIPPING_ERR = 1  #: ``scale = max(min / quant_min, max / quant_max)``
    ASYMMETRIC = 2  #: ``scale = (max - min) / (quant_max - quant_min)``


class ZeroPointDomain(Enum):
    """What a zero point is."""

    INT = 0  #: an integer code: ``q = x / scale + zero_point``
    FLOAT = 1  #: the value of the middle code (tinygemm): ``q = (x - zero_point) / scale + mid_point``
    NONE = 2  #: there is none


# Smallest and largest code of the dtypes that torchao names. Codes of uint1 to uint7 are kept as uint8.
_SMALL_UNSIGNED = {getattr(torch, f"uint{bits}"): (0, 2**bits - 1) for bits in range(1, 8)}
_SMALL_SIGNED = {getattr(torch, f"int{bits}"): (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in range(1, 8)}
_CODES = {
    **_SMALL_UNSIGNED,
    **_SMALL_SIGNED,
    **{dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32)},
}


def _refuse(kind: type[Exception], op: str, expected: str, got: object) -> NoReturn:
    raise kind(f"quant_ops.{op}: expected {expected}, got {got}")


def _member(op: str, argument: str, kind: type[Enum], value: Any) -> int:
    """The number of a member: of our enum, of another one with the same names (torchao's), or of a name."""
    name = value.name if isinstance(value, Enum) else value
    if not isinstance(name, str) or name.upper() not in kind.__members__:
        _refuse(ValueError, op, f"{argument} in ({', '.join(kind.__members__)})", repr(value))
    number: int = kind[name.upper()].value
    return number


def code_range(op: str, dtype: torch.dtype, quant_min: float | None, quant_max: float | None) -> tuple[int, int]:
    """The range of codes: that of the dtype, or the given one within it."""
    if dtype not in _CODES:
        _refuse(TypeError, op, "a dtype of codes in (uint1 to uint8, int1 to int8, int16, int32)", dtype)
    least, most = _CODES[dtype]
    bounds = []
    for name, value, default in (("quant_min", quant_min, least), ("quant_max", quant_max, most)):
        number = default if value is None else value
        if not isinstance(number, int | float) or number != number or number not in range(least, most + 1):
            _refuse(ValueError, op, f"{name} to be an integer in [{least}, {most}], the codes of {dtype}", number)
        bounds.append(int(number))
    return bounds[0], bounds[1]


# ---- choose_qparams_affine -------------------------------------------------------------------------------------------


def choose_qparams_affine(
    input: Tensor,
    mapping_type: MappingType | str,
    block_size: Sequence[int],
    target_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    eps: float | None = None,
    scale_dtype: torch.dtype | None = None,
    zero_point_dtype: torch.dtype | None = torch.int32,
    keepdim: bool = False,
    *,
    preserve_zero: bool = True,
    zero_point_domain: ZeroPointDomain | str = ZeroPointDomain.INT,
) -> tuple[Tensor, Tensor | None]:
    """The scale and the zero point of every block, as torchao's ``choose_qparams_affine``.

    The scale is computed in ``input.dtype``, bfloat16 and float16 too, and converted to ``scale_dtype`` afterwards. A block that
    holds NaN has the scale NaN, and an integer zero point that torch's cast makes of NaN on x86: the smallest integer, or 0 if it
    is narrower than 32 bits.

    Args:
        input: float32, float16 or bfloat16, any shape and strides.
        mapping_type: ``SYMMETRIC``, ``SYMMETRIC_NO_CLIPPING_ERR`` or ``ASYMMETRIC``, a member or its name.
        block_size: one entry per dimension: the size of a block along it, a divisor of the dimension's, or -1 for all of it. As in
            torchao, blocks of one element in every dimension stand for one block, the whole tensor.
        target_dtype: torch.uint1 to uint8, int1 to int8, int16 or int32; says the range of codes.
        quant_min, quant_max: another range within it.
        eps: smallest scale; the smallest normal number of ``input.dtype`` unless given.
        scale_dtype: dtype of the scale, ``input.dtype`` unless given.
        zero_point_dtype: integer or floating; None: int32 if asymmetric, else ``input.dtype``. In the domain FLOAT an integer
            dtype, as the default is, stands for ``input.dtype``.
        keepdim: keep a dimension of size 1 for each that is one block; otherwise it is dropped.
        preserve_zero: widen the range to contain 0. False, for asymmetric mappings only, is torchao's
            ``_choose_qparams_affine_dont_preserve_zero``.
        zero_point_domain: ``INT``; ``FLOAT`` with ``preserve_zero=False``, torchao's ``_choose_qparams_affine_tinygemm``; or
            ``NONE`` with a symmetric mapping, which makes the zero point None.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: blocks do not divide the input or have no elements, or arguments that do not go together.
    """
    op = "choose_qparams_affine"
    least, most = code_range(op, target_dtype, quant_min, quant_max)
    domain = _member(op, "zero_point_domain", ZeroPointDomain, zero_point_domain)
    if domain == ZeroPointDomain.FLOAT.value and zero_point_dtype is not None and not zero_point_dtype.is_floating_point:
        zero_point_dtype = None
    scale, zero_point = call(
        _ops.choose_qparams_affine.default,
        input,
        _member(op, "mapping_type", MappingType, mapping_type),
        block_size,
        least,
        most,
        eps,
        scale_dtype,
        zero_point_dtype,
        keepdim,
        preserve_zero=preserve_zero,
        zero_point_domain=domain,
    )
    return scale, None if domain == ZeroPointDomain.NONE.value else zero_point


@fake_kernel("choose_qparams_affine")
def _(checked: tuple[Tensor, ...], input: Tensor, block_size: Sequence[int], keepdim: bool, **_: Any) -> tuple[Tensor, ...]:
    shape = []
    one_block = all(block == 1 for block in block_size)
    for size, block in zip(input.shape, block_size, strict=True):
        whole = one_block or block == -1 or (block != 1 and block == size)
        if not whole:
            shape.append(size // block)
        elif keepdim:
            shape.append(1)
    return tuple(input.new_empty(shape, dtype=result.dtype) for result in checked)


constant("choose_qparams_affine")


# ---- quantize_affine -------------------------------------------------------------------------------------------------


def quantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    output_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | str = ZeroPointDomain.INT,
) -> Tensor:
    """Floating elements to codes, as torchao's ``quantize_affine``: ``clamp(rne(input * (1 / scale)) + zero_point)``.

    In the domain FLOAT, as ``_quantize_affine_tinygemm``: ``clamp(rne((input - (zero_point - scale * mid_point)) / scale))`` with
    ``mid_point = (quant_max + quant_min + 1) / 2``. Each operation is rounded to the dtype that torch promotes its operands to.
    Other operators of quant_ops divide by the scale instead. A code of NaN is what torch's cast makes of it on x86: 0, or the
    smallest int32.

    Args:
        input: float32, float16 or bfloat16, any shape and strides.
        block_size: as in :func:`choose_qparams_affine`.
        scale, zero_point: one number per block, in any shape; zero_point integer or floating, None for none.
        output_dtype: torch.uint1 to uint7, whose codes are kept as uint8, or uint8, int8, int16, int32.
        quant_min, quant_max: the range of codes, within that of the dtype, which is the default.
        zero_point_domain: ``INT``, ``FLOAT``, or ``NONE``, which takes no zero point.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: blocks do not divide the input, or there is not one scale and zero point for each.
    """
    op = "quantize_affine"
    least, most = code_range(op, output_dtype, quant_min, quant_max)
    stored = torch.uint8 if output_dtype in _SMALL_UNSIGNED else output_dtype
    if stored in _SMALL_SIGNED:
        _refuse(TypeError, op, "output_dtype in (uint1 to uint8, int8, int16, int32)", f"{output_dtype}, which torch cannot store")
    domain = _member(op, "zero_point_domain", ZeroPointDomain, zero_point_domain)
    return call(_ops.quantize_affine.default, input, block_size, scale, zero_point, stored, least, most, domain)


@fake_kernel("quantize_affine")
def _(checked: Tensor, input: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(input, dtype=checked.dtype)


constant("quantize_affine")


# ---- dequantize_affine -----------------------------------------------------------------------------------------------


def dequantize_affine(
    input: Tensor,
    block_size: Sequence[int],
    scale: Tensor,
    zero_point: Tensor | None,
    input_dtype: torch.dtype,
    quant_min: float | None = None,
    quant_max: float | None = None,
    zero_point_domain: ZeroPointDomain | str = ZeroPointDomain.INT,
    *,
    output_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Codes to floating elements, as torchao's ``dequantize_affine``: ``(input - zero_point) * scale``.

    In the domain FLOAT, as ``_dequantize_affine_tinygemm``: ``(input - mid_point) * scale + zero_point``. The difference, the
    product and the sum are each rounded to ``output_dtype``.

    Args:
        input: codes in uint8, int8, int16 or int32, any shape and strides.
        block_size, scale, zero_point, zero_point_domain: as in :func:`quantize_affine`.
        input_dtype: what the codes stand for: uint1 to uint7, kept in any of these dtypes, or the dtype of ``input``.
        quant_min, quant_max: the range of codes, which the domain FLOAT needs for its mid_point.
        output_dtype: float32, float16 or bfloat16.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: blocks do not divide the input, or there is not one scale and zero point for each.
    """
    op = "dequantize_affine"
    least, most = code_range(op, input_dtype, quant_min, quant_max)
    if input_dtype not in _SMALL_UNSIGNED and input.dtype != input_dtype:
        _refuse(TypeError, op, f"input.dtype to be input_dtype, {input_dtype}", input.dtype)
    domain = _member(op, "zero_point_domain", ZeroPointDomain, zero_point_domain)
    return call(
        _ops.dequantize_affine.default, input, block_size, scale, zero_point, least, most, domain, output_dtype=output_dtype
    )


@fake_kernel("dequantize_affine")
def _(checked: Tensor, input: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(input, dtype=checked.dtype)


inference_only("dequantize_affine")
