"""The operators on codes between products, one section each: typed wrapper with the documentation and fake kernel.

They are for inference: no gradient. Schemas are in ``cpp/torch/operators.h``, checks in ``cpp/torch/{pointwise,pool}.h``, formulas
in ``cpp/contract/ops.h``.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops.ops._register import call, fake_kernel, inference_only
from quant_ops.ops.int8 import activation_number, as_list

_ops = torch.ops.quant_ops

# ---- requantize ------------------------------------------------------------------------------------------------------


def requantize(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> Tensor:
    """Codes of one scale as codes of another, or as floats.

    ``y = float(x - x_zero_point) * x_scale`` in float32, then the activation, then one rounding to the result's dtype, or
    ``clamp(rne(y / out_scale) + out_zero_point)`` for an integer result.

    Args:
        x: int8 or uint8, any shape.
        x_scale, x_zero_point: one element; the zero point is an integer, or floating (rounded).
        out_scale, out_zero_point: one element; the result is int8 (or ``out_dtype=torch.uint8``).
        out_dtype: float32 (the default without ``out_scale``), float16 or bfloat16.
        activation: None, "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid" or "hardsigmoid", as in
            :func:`int8_linear`.

    Returns:
        x's shape and strides.

    Raises:
        TypeError: a dtype is not one of those above.
        ValueError: a scale or zero point has several elements, or a zero point is outside the range of its codes.
        RuntimeError: a gradient is asked for.
    """
    return call(
        _ops.requantize.default,
        x,
        x_scale,
        x_zero_point,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        activation=activation_number("requantize", activation),
    )


@fake_kernel("requantize")
def _(checked: Tensor, x: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(x, dtype=checked.dtype)


inference_only("requantize")


# ---- int8_add --------------------------------------------------------------------------------------------------------


def int8_add(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> Tensor:
    """The sum of two tensors of codes, each with its own scale.

    ``y = fma(float(b - b_zero_point), b_scale, float(a - a_zero_point) * a_scale)`` in float32, then as :func:`requantize`.

    Args:
        a, b: int8 or uint8, of one shape; b is copied if it lies otherwise in memory than a.
        a_scale, b_scale, a_zero_point, b_zero_point: one element, as in :func:`requantize`, and so are the other arguments.

    Returns:
        a's shape and strides.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`requantize`; also shapes that differ.
    """
    return call(
        _ops.int8_add.default,
        a,
        b,
        a_scale,
        b_scale,
        a_zero_point,
        b_zero_point,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        activation=activation_number("int8_add", activation),
    )


@fake_kernel("int8_add")
def _(checked: Tensor, a: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(a, dtype=checked.dtype)


inference_only("int8_add")


# ---- int8_mul --------------------------------------------------------------------------------------------------------


def int8_mul(
    a: Tensor,
    b: Tensor,
    a_scale: Tensor,
    b_scale: Tensor,
    a_zero_point: Tensor | None = None,
    b_zero_point: Tensor | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    activation: str | None = None,
) -> Tensor:
    """The product of two tensors of codes, each with its own scale; b may have one element for each channel of an image.

    ``y = (float(a - a_zero_point) * float(b - b_zero_point)) * (a_scale * b_scale)`` in float32, where the first product is exact;
    then as :func:`requantize`. With one element a channel it is what a squeeze-and-excitation block (Hu et al. 2018, equation 4)
    does to an image.

    Args:
        a: int8 or uint8, any shape.
        b: int8 or uint8, of a's shape, or ``(N, C, 1, 1)`` if a is ``(N, C, H, W)``.
        a_scale, b_scale, a_zero_point, b_zero_point: one element, as in :func:`requantize`, and so are the other arguments.

    Returns:
        a's shape and strides.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`requantize`; also shapes that are not as above.
    """
    return call(
        _ops.int8_mul.default,
        a,
        b,
        a_scale,
        b_scale,
        a_zero_point,
        b_zero_point,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
        activation=activation_number("int8_mul", activation),
    )


@fake_kernel("int8_mul")
def _(checked: Tensor, a: Tensor, **_: Any) -> Tensor:
    return torch.empty_like(a, dtype=checked.dtype)


inference_only("int8_mul")


# ---- int8_cat --------------------------------------------------------------------------------------------------------


def int8_cat(
    tensors: Sequence[Tensor],
    scales: Sequence[Tensor],
    zero_points: Sequence[Tensor],
    dim: int = 1,
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Tensors of codes, each with its own scale, side by side along a dimension: each becomes what :func:`requantize` makes of it.

    Where a tensor's dtype, scale and zero point are those of the result, its bytes are copied.

    Args:
        tensors: int8 or uint8; their shapes differ in ``dim`` alone.
        scales: one element for each tensor.
        zero_points: none, or one element for each tensor.
        dim: counted from the end if it is negative.
        out_scale, out_zero_point, out_dtype: as in :func:`requantize`.

    Returns:
        In the memory format of the first tensor: channels_last if its channels step by 1 and it is not contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`requantize`; also other numbers of scales or zero points, or shapes that do
            not fit.
    """
    return call(
        _ops.int8_cat.default,
        list(tensors),
        list(scales),
        list(zero_points),
        dim,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
    )


@fake_kernel("int8_cat")
def _(checked: Tensor, tensors: Sequence[Tensor], dim: int, **_: Any) -> Tensor:
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return _image(tensors[0], shape, checked.dtype)


inference_only("int8_cat")


def _image(like: Tensor, shape: Sequence[Any], dtype: torch.dtype) -> Tensor:
    """An empty result in the memory format of ``like``."""
    channels_last = like.dim() == 4 and not like.is_contiguous() and like.stride(1) == 1
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=like.device, memory_format=memory_format)


# ---- int8_max_pool2d -------------------------------------------------------------------------------------------------


def int8_max_pool2d(
    x: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    ceil_mode: bool = False,
) -> Tensor:
    """The largest code of every window: the codes of torch's ``max_pool2d`` of the dequantized tensor, for a positive scale.

    Args:
        x: int8 or uint8, ``(N, C, H, W)`` or ``(C, H, W)``.
        kernel_size, stride, padding, dilation, ceil_mode: as torch's; the default stride is the kernel's size.

    Returns:
        x's dtype, in the memory format that :func:`int8_conv2d` gives. Scale and zero point are x's.

    Raises:
        TypeError: x is neither int8 nor uint8.
        ValueError: padding of more than half of a window, or a result smaller than 1 x 1.
    """
    return call(
        _ops.int8_max_pool2d.default,
        x,
        as_list(kernel_size),
        [] if stride is None else as_list(stride),
        as_list(padding),
        as_list(dilation),
        ceil_mode,
    )


@fake_kernel("int8_max_pool2d")
def _(
    checked: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Tensor:
    return _image(x, pooled_shape(x, kernel_size, stride, padding, dilation, ceil_mode), checked.dtype)


inference_only("int8_max_pool2d")


def pooled_shape(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> tuple[Any, ...]:
    """The shape of the result; an argument has one number or two."""
    sizes: list[Any] = []
    for size, d in ((x.shape[-2], 0), (x.shape[-1], -1)):
        step = (stride or kernel_size)[d]
        room = size + 2 * padding[d] - dilation[d] * (kernel_size[d] - 1) - 1
        torch._check(room + (step - 1 if ceil_mode else 0) >= 0)  # for what is derived from the size of the result
        out = (room + (step - 1 if ceil_mode else 0)) // step + 1
        if ceil_mode and (out - 1) * step >= size + padding[d]:
            out -= 1
        sizes.append(out)
    return *x.shape[:-2], *sizes


# ---- int8_avg_pool2d -------------------------------------------------------------------------------------------------


def int8_avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] | None = None,
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The average of every window of the dequantized tensor.

    ``y = float(sum) * (x_scale / float(count))`` in float32, where ``sum`` is the exact int32 sum of ``x - x_zero_point``; then one
    rounding to the result's dtype, or ``clamp(rne(y / out_scale) + out_zero_point)`` for an integer result.

    Args:
        x: int8 or uint8, ``(N, C, H, W)`` or ``(C, H, W)``.
        x_scale, x_zero_point: one element.
        kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override: as torch's ``avg_pool2d``.
        out_scale, out_zero_point, out_dtype: as in :func:`requantize`.

    Returns:
        In the memory format that :func:`int8_conv2d` gives.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`requantize` and :func:`int8_max_pool2d`; also windows of more than 8421504
            pixels, whose sum might not be exact.
    """
    return call(
        _ops.int8_avg_pool2d.default,
        x,
        x_scale,
        x_zero_point,
        as_list(kernel_size),
        [] if stride is None else as_list(stride),
        as_list(padding),
        ceil_mode,
        count_include_pad,
        divisor_override,
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
    )


@fake_kernel("int8_avg_pool2d")
def _(
    checked: Tensor,
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    **_: Any,
) -> Tensor:
    return _image(x, pooled_shape(x, kernel_size, stride, padding, [1], ceil_mode), checked.dtype)


inference_only("int8_avg_pool2d")


# ---- int8_adaptive_avg_pool2d ----------------------------------------------------------------------------------------


def int8_adaptive_avg_pool2d(
    x: Tensor,
    x_scale: Tensor,
    x_zero_point: Tensor | None,
    output_size: int | Sequence[int],
    *,
    out_scale: Tensor | None = None,
    out_zero_point: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """:func:`int8_avg_pool2d` over windows that share the image evenly, as torch's ``adaptive_avg_pool2d``.

    Window ``o`` of ``n`` along a side of ``size`` pixels is ``[floor(o * size / n), ceil((o + 1) * size / n))``.

    Args:
        x, x_scale, x_zero_point, out_scale, out_zero_point, out_dtype: as in :func:`int8_avg_pool2d`.
        output_size: one number, or height and width of the result.

    Returns:
        In the memory format that :func:`int8_conv2d` gives.

    Raises:
        TypeError, ValueError, RuntimeError: as :func:`int8_avg_pool2d`.
    """
    return call(
        _ops.int8_adaptive_avg_pool2d.default,
        x,
        x_scale,
        x_zero_point,
        as_list(output_size),
        out_scale=out_scale,
        out_zero_point=out_zero_point,
        out_dtype=out_dtype,
    )


@fake_kernel("int8_adaptive_avg_pool2d")
def _(checked: Tensor, x: Tensor, output_size: Sequence[int], **_: Any) -> Tensor:
    return _image(x, (*x.shape[:-2], output_size[0], output_size[-1]), checked.dtype)


inference_only("int8_adaptive_avg_pool2d")


# ---- int8_upsample_nearest2d -----------------------------------------------------------------------------------------


def int8_upsample_nearest2d(x: Tensor, scale_factor: int | Sequence[int]) -> Tensor:
    """Every code repeated ``scale_factor`` times: ``y[..., h, w] = x[..., h // factor_h, w // factor_w]``.

    The same as torch's ``interpolate(mode="nearest")`` by whole factors. Scale and zero point stay x's.

    Args:
        x: int8 or uint8, ``(N, C, H, W)`` or ``(C, H, W)``.
        scale_factor: one whole number, or two: vertical and horizontal.

    Returns:
        x's dtype, in the memory format that :func:`int8_conv2d` gives.

    Raises:
        TypeError: x is neither int8 nor uint8.
        ValueError: a factor below 1.
    """
    return call(_ops.int8_upsample_nearest2d.default, x, as_list(scale_factor))


@fake_kernel("int8_upsample_nearest2d")
def _(checked: Tensor, x: Tensor, scale_factor: Sequence[int]) -> Tensor:
    height, width = x.shape[-2] * scale_factor[0], x.shape[-1] * scale_factor[-1]
    return _image(x, (*x.shape[:-2], height, width), checked.dtype)


inference_only("int8_upsample_nearest2d")
