"""Which operator, and which layer, computes with a quantized tensor: codes shifted to int8, one scale for each group of a row.

    INT     w = (code - z) * s              code - z = (code - shift) - (z - shift)
    FLOAT   w = (code - mid) * s + z        mid = shift is required

for codes in [0, 15] less 8 or [0, 255] less 128; others are int8 already. Packed weights are kept for as long as the codes live.
"""

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

import quant_ops as qo

from ..._models import has_hooks, patched
from ...nn import GROUP_SIZES
from ...nn.weight import placeholder
from ...ops import MappingType, ZeroPointDomain
from .dtypes.aqt import AffineQuantizedTensor, LinearActQuantizedTensor, QuantizeRows, dequantized

_forms: Any = WeakIdKeyDictionary()  # by codes: versions of codes and scales, and the form


@dataclasses.dataclass
class Form:
    """How ``weight_only_linear`` reads a weight; ``int8_linear`` too, if it has one scale for each row and no zero point.

    Attributes:
        shift: what the int8 codes are less than those of the tensor.
        zero_point: int8, or floating in float32; None where all are 0.
        packed: for the two operators, made when it is needed.
    """

    bits: int
    group_size: int
    shift: int
    scale: Tensor
    zero_point: Tensor | None
    packed: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def is_int8_per_channel(self) -> bool:
        return self.bits == 8 and self.group_size == -1 and self.zero_point is None and self.shift == 0

    @property
    def is_floating(self) -> bool:
        """In the domain FLOAT."""
        return self.zero_point is not None and self.zero_point.is_floating_point()

    def codes(self, weight: AffineQuantizedTensor) -> Tensor:
        """In int8."""
        codes = weight.int_data
        return codes if codes.dtype == torch.int8 and not self.shift else (codes.to(torch.int16) - self.shift).to(torch.int8)

    def of_floats(self, weight: AffineQuantizedTensor, x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        """The layer's output for a floating input."""
        packed = self.packed.get("weight_only")
        if packed is None:
            packed = self.packed["weight_only"] = qo.pack_weight_only(self.codes(weight), self.bits, self.group_size)
        stand_in = placeholder(weight.int_data.shape, x.device)
        return qo.weight_only_linear(
            x, stand_in, self.scale, self.zero_point, bias, self.bits, self.group_size, packed_weight=packed, **options
        )

    def of_codes(
        self, weight: AffineQuantizedTensor, x: Any, x_scale: Tensor | None, x_zero_point: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        """The layer's output for an input that is quantized by rows."""
        return self._int8(weight, x.int_data, bias, x_scale=x_scale, x_zero_point=x_zero_point, out_dtype=x.dtype)

    def of_rows(self, weight: AffineQuantizedTensor, x: Tensor, bias: Tensor | None, asymmetric: bool) -> Tensor:
        """The layer's output for a floating input whose rows the operator quantizes."""
        if self.is_int8_per_channel:
            return self._int8(weight, x, bias, asymmetric=asymmetric)
        return self.of_floats(weight, x, bias, dynamic=True, asymmetric=asymmetric)

    def _int8(self, weight: AffineQuantizedTensor, x: Tensor, bias: Tensor | None, **options: Any) -> Tensor:
        packed = self.packed.get("int8")
        if packed is None:
            packed = self.packed["int8"] = qo.pack_weight(weight.int_data)
        return qo.int8_linear(x, weight.int_data, self.scale.flatten(), bias, packed_weight=packed, **options)


def form_of(weight: AffineQuantizedTensor) -> Form | None:
    """The form of a weight (out_features, in_features); None if no operator has one."""
    held = (weight.int_data, weight.scale)
    versions = None if any(t.is_inference() for t in held) else tuple(t._version for t in held)
    known = _forms.get(weight.int_data)
    if known is None or known[0] != versions:
        known = _forms[weight.int_data] = versions, _form(weight)
    return known[1]


def _form(weight: AffineQuantizedTensor) -> Form | None:
    scheme, shape = weight.scheme, weight.int_data.shape
    if len(shape) != 2 or scheme.block_size[0] != 1 or not weight.scale.is_floating_point():
        return None
    group = -1 if scheme.block_size[1] in (-1, shape[1]) else scheme.block_size[1]
    least, most = scheme.quant_min, scheme.quant_max
    bits = 4 if most - least <= 15 else 8
    shift = 0 if least < 0 else 8 if bits == 4 else 128
    half = 1 << (bits - 1)
    if group not in GROUP_SIZES or least - shift < -half or most - shift >= half:
        return None
    groups = -1 if group == -1 else -(-shape[1] // group)
    scale = weight.scale.reshape(shape[0], groups).float()
    zero = weight.zero_point
    middle = most + least + 1  # twice the zero point of a symmetric mapping, and the code of z in the domain FLOAT
    if zero is None:
        return Form(bits, group, shift, scale, None) if shift == 0 else None
    if scheme.domain is ZeroPointDomain.FLOAT:
        return Form(bits, group, shift, scale, zero.reshape(scale.shape).float()) if middle == 2 * shift else None
    if scheme.mapping is not MappingType.ASYMMETRIC and int(middle / 2) == shift:
        return Form(bits, group, shift, scale, None)
    shifted = zero.reshape(scale.shape).to(torch.int64) - shift
    fits = bool(((shifted >= -128) & (shifted <= 127)).all())
    return Form(bits, group, shift, scale, shifted.to(torch.int8)) if fits else None


def quantized_rows(x: AffineQuantizedTensor) -> tuple[Tensor, Tensor | None] | None:
    """Scale and zero point of each row (..., 1) of an input in int8 that was quantized by rows; None for another one."""
    scheme, shape = x.scheme, x.int_data.shape
    by_rows = len(shape) > 0 and scheme.block_size == (*[1] * (len(shape) - 1), shape[-1]) and shape[-1] > 1
    if not by_rows or x.int_data.dtype != torch.int8 or scheme.domain is not ZeroPointDomain.INT or x.is_transposed:
        return None
    rows = (*shape[:-1], 1)
    symmetric = x.zero_point is None or (
        scheme.mapping is not MappingType.ASYMMETRIC and abs(scheme.quant_min + scheme.quant_max) < 2
    )
    return x.scale.reshape(rows), None if symmetric else x.zero_point.reshape(rows)  # type: ignore[union-attr]


def dynamic_form_of(weight: LinearActQuantizedTensor) -> Callable[[Tensor, Tensor | None], Tensor] | None:
    """What computes with a weight whose inputs an operator quantizes by rows; None if there is no such operator."""
    inner, function = weight.original_weight_tensor, weight.input_quant_func
    if not isinstance(function, QuantizeRows) or not isinstance(inner, AffineQuantizedTensor) or inner.is_transposed:
        return None
    form = form_of(inner)
    if form is None or form.is_floating:
        return None
    return lambda x, bias: form.of_rows(inner, x, bias, function.asymmetric)


# ---- layers --------------------------------------------------------------------------------------------------------------


class DequantizedLinear(nn.Module):
    """A linear layer with a quantized weight that no operator reads: dequantized in every call, and multiplied as torch does.

    Shapes: input (..., in_features), output (..., out_features).
    """

    def __init__(self, weight: AffineQuantizedTensor, bias: Tensor | None) -> None:
        super().__init__()
        self.scheme = weight.scheme
        self.out_features, self.in_features = weight.shape
        for name in ("int_data", "scale", "zero_point"):
            self.register_buffer(name, getattr(weight, name))
        self.register_buffer("bias", None if bias is None else bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        b = self._buffers
        weight = dequantized(b["int_data"], b["scale"], b["zero_point"], self.scheme, x.dtype)  # type: ignore[arg-type]
        return F.linear(x, weight, b["bias"])

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, weight={self.scheme}"


def layer_of(name: str, linear: nn.Linear) -> nn.Module:
    """The layer that computes what a linear layer with a quantized tensor as its weight does.

    Raises:
        TypeError: its input is quantized by a function of the user's.
    """
    weight, bias = linear.weight, linear.bias
    dynamic: QuantizeRows | None = None
    if isinstance(weight, LinearActQuantizedTensor):
        function, weight = weight.input_quant_func, weight.original_weight_tensor
        if not isinstance(function, QuantizeRows) or not isinstance(weight, AffineQuantizedTensor):
            raise TypeError(
                f"quant_ops.unwrap_tensor_subclass: expected the input of layer {name!r} to be quantized by QuantizeRows, and "
                f"the weight by to_aq, got {function!r} and {type(weight).__name__}. Use to_laq(weight, QuantizeRows(False))."
            )
        dynamic = function
    assert isinstance(weight, AffineQuantizedTensor)
    form = None if weight.is_transposed else form_of(weight)
    if form is None or (dynamic is not None and form.is_floating):
        if dynamic is not None:
            raise TypeError(
                f"quant_ops.unwrap_tensor_subclass: expected groups of {GROUP_SIZES[1:]} or whole rows of layer {name!r} with an "
                f"integer zero point, for inputs that are quantized, got {weight.scheme}"
            )
        return DequantizedLinear(weight, bias).train(linear.training)
    if dynamic is not None and form.is_int8_per_channel:
        return int8_layer(form.codes(weight), form.scale.flatten(), bias, dynamic.asymmetric, weight.dtype).train(linear.training)
    settings: dict[str, Any] = {} if dynamic is None else {"dynamic": True, "asymmetric_input": dynamic.asymmetric}
    layer = qo.WeightOnlyLinear(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        device="meta",
        bits=form.bits,
        group_size=form.group_size,
        asymmetric=form.zero_point is not None,
        zero_point="float" if form.is_floating else "int",
        **settings,
    )
    layer.weight_scale = form.scale.clone()
    if form.zero_point is not None:
        layer.weight_zero_point = form.zero_point.clone()
    layer.qweight = form.codes(weight)
    layer.compute_dtype = weight.dtype
    layer.bias = None if bias is None else bias.detach().float().clone()
    return layer.train(linear.training)


def int8_layer(
    codes: Tensor, scale: Tensor, bias: Tensor | None, asymmetric: bool, dtype: torch.dtype, multiplier: Tensor | None = None
) -> qo.QuantLinear:
    """The dynamic layer of a weight's codes, perhaps with a multiplier of its input."""
    layer = qo.QuantLinear(codes.shape[1], codes.shape[0], bias=False, device="meta", asymmetric=asymmetric)
    layer.weight_scale = scale.float().clone()
    layer.qweight = codes.clone()
    layer.compute_dtype = dtype
    layer.bias = None if bias is None else bias.detach().float().clone()
    if multiplier is not None:
        layer.input_multiplier = multiplier.float().clone()
    return layer


def unwrap(model: nn.Module, chosen: Callable[[nn.Module, str], bool]) -> nn.Module:
    """Replaces the linear layers with quantized tensors as weights, all or none of them; returns the model or its replacement."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or not isinstance(module._parameters.get("weight"), _SUBCLASSES):
            continue
        if not chosen(module, name):
            continue
        own = type(module).forward is not nn.Linear.forward
        reason = "it has a forward of its own" if own else "it has hooks" if has_hooks(module) else patched(module)
        if reason is not None:
            warnings.warn(
                f"quant_ops.unwrap_tensor_subclass: expected plain linear layers, got {name!r}, which keeps its tensor: {reason}",
                stacklevel=4,
            )
            continue
        made[module] = layer_of(name, module)
    return replaced(model, made)


_SUBCLASSES = (AffineQuantizedTensor, LinearActQuantizedTensor)


def replaced(model: nn.Module, made: dict[nn.Module, nn.Module]) -> nn.Module:
    """Puts layers in place of others, wherever those are; returns the model or its replacement."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in made:
                setattr(parent, name, made[child])
    return made.get(model, model)
