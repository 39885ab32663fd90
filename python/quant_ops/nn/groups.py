"""The codes and parameters of a weight (N, K) in groups of ``group_size`` consecutive weights of a row.

    symmetric    w = q * s          s = amax / 127 and q in [-127, 127], or s = amax / 7.5 and q in [-8, 7]
    asymmetric   w = (q - z) * s    s = (max - min) / 255 or / 15 with the range widened to contain 0, z = qmin - rne(min / s)
                 q = clamp(rne(w / s) + z)
    floating     w = q * s + z      s = (max - min) / 255 or / 15, z = min - qmin * s
                 q = clamp(rne((w - (z + qmin * s)) / s) + qmin)

for 8 and 4 bits, the amax, min and max those of the group; the last two q, and the z of the second, are in [qmin, qmax], which is
[-128, 127] or [-8, 7]. The third is torchao's FLOAT domain, whose codes [0, 15] less 8 are those here. Read next: weight_only.py.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import choose_qparams, quant_tensor_forward

GROUP_SIZES = (-1, 32, 64, 128, 256)
ZERO_POINTS = ("int", "float")


def most_products(bits: int, asymmetric: bool, asymmetric_input: bool) -> int:
    """How many products of a group of int8 activations and codes an int32 sum holds exactly; the operator refuses more."""
    largest = (1 << (bits - 1)) + (127 if asymmetric else 0)
    return (2**31 - 1) // ((255 if asymmetric_input else 128) * largest)


def group_count(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else max(1, -(-k // group_size))


def code_range(bits: int, asymmetric: bool) -> tuple[int, int]:
    """The smallest and the largest code that rounding gives."""
    return -(1 << (bits - 1)) + (bits == 8 and not asymmetric), (1 << (bits - 1)) - 1


def group_parameters(values: Tensor, bits: int, asymmetric: bool, zero_point: str = "int") -> tuple[Tensor, Tensor | None]:
    """Scales, and int8 or float32 zero points if ``asymmetric``, of the last dimension of ``values``, which stays with size 1.

    A group of equal values with floating zero points has the scale 1 and that value as its zero point.
    """
    low, high = code_range(bits, asymmetric)
    last = [values.dim() - 1]
    if asymmetric and zero_point == "float":
        least, most = (values.float() if values.dtype != torch.float64 else values).aminmax(dim=-1, keepdim=True)
        scale = ((most - least) / (high - low)).float().clamp(min=torch.finfo(torch.float32).smallest_normal)
        zero, flat = least.float() - low * scale, least == most
        return torch.where(flat, 1.0, scale), torch.where(flat, least.float(), zero)
    if asymmetric:
        scale, zero = choose_qparams(values, last, low, high, asymmetric=True)
        return scale, zero.to(torch.int8)
    if bits == 8:
        return choose_qparams(values, last, low, high)[0], None
    return 2 * choose_qparams(values, last, -15, 15)[0], None  # amax / 7.5, to the bit


def group_codes(values: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> Tensor:
    """int8 codes of values whose groups are their last dimension."""
    low, high = code_range(bits, zero_point is not None)
    if zero_point is not None and zero_point.is_floating_point():
        # An equal group has code 0 in the middle of its range, so that its value is the zero point.
        least = zero_point + low * scale
        codes: Tensor = ((values.to(least.dtype) - least) / scale).round().clamp(0, high - low) + low
        return codes.to(torch.int8)
    zero = None if zero_point is None else zero_point.to(torch.int32)
    return quant_tensor_forward(values, scale, zero, low, high, asymmetric=zero is not None, simulate=False)


def quantize_groups(
    weight: Tensor,
    bits: int,
    group_size: int,
    asymmetric: bool,
    zero_point: str = "int",
    given: tuple[Tensor, Tensor | None] | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K), and scales and zero points (N, groups) of a weight, by the formulas above.

    Args:
        given: scales and zero points to round with, in place of those that the weight would get.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    weight = weight.detach()
    if weight.numel() and not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError("quant_ops.quantize_groups: expected finite weights, got NaN or Inf")
    n, k = weight.shape
    groups = group_count(k, group_size)
    size = max(k, 1) if groups == 1 else group_size
    missing = groups * size - k
    values = F.pad(weight, (0, missing)) if missing else weight  # a zero changes neither amax nor the widened range
    if missing and asymmetric and zero_point == "float" and k:
        values[:, k:] = weight[:, -1:]
    values = values.reshape(n, groups, size)
    if given is None:
        scale, zero = group_parameters(values, bits, asymmetric, zero_point)
    else:
        scale, zero = (None if tensor is None else tensor.unsqueeze(2) for tensor in given)  # type: ignore[assignment]
    codes = group_codes(values, scale, zero, bits)
    zero = None if zero is None else zero.reshape(n, groups)
    return codes.reshape(n, groups * size)[:, :k].contiguous(), scale.reshape(n, groups).float(), zero
