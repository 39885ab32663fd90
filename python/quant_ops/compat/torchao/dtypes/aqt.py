"""``to_aq``, ``to_laq``: quantized weights that stand in an nn.Linear as tensors, for which ``F.linear`` calls our operators.

An AffineQuantizedTensor holds codes, scales and zero points by torchao's formulas. As the weight of a linear layer it is read by
``weight_only_linear`` where that has its blocks (rows, or groups of 32, 64, 128 or 256, of 4 or 8 bits), otherwise dequantized.
A LinearActQuantizedTensor holds a weight and how inputs are quantized. ``unwrap_tensor_subclass`` makes layers of both: forms.py.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing

import quant_ops as qo

from ....ops import MappingType, ZeroPointDomain
from ....ops.affine import code_range

__all__ = ["AffineQuantizedTensor", "LinearActQuantizedTensor", "QuantizeRows", "to_aq", "to_laq"]

_aten = torch.ops.aten
_FLOATING = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How a tensor is quantized: what to_aq was called with, after its defaults."""

    mapping: MappingType
    block_size: tuple[int, ...]
    codes: torch.dtype  # target_dtype
    quant_min: int
    quant_max: int
    domain: ZeroPointDomain


class _Wrapper(Tensor):
    """What both subclasses share: the operators that pass through to the tensors inside, and the refusal of all others."""

    _inner: tuple[str, ...] = ()

    def _with(self, tensors: dict[str, Any], **changes: Any) -> "_Wrapper":
        """The same with other tensors inside."""
        raise NotImplementedError

    def _mapped(self, function: Callable[[Tensor], Tensor], **changes: Any) -> "_Wrapper":
        inner = {name: getattr(self, name) for name in self._inner}
        return self._with({name: None if t is None else function(t) for name, t in inner.items()}, **changes)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return [name for name in self._inner if getattr(self, name) is not None], self._context()

    def _context(self) -> Any:
        raise NotImplementedError

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Wrapper":
        if id(self) not in memo:
            copied: Any = self.detach().clone().requires_grad_(self.requires_grad)
            if isinstance(self, torch.nn.Parameter):
                copied = torch.nn.Parameter(copied, self.requires_grad)
            memo[id(self)] = copied
        made: _Wrapper = memo[id(self)]
        return made

    def _product(self, x: Any, bias: Any) -> Tensor:
        """``F.linear(x, self, bias)``."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return _linear(*args, **kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares an instance's method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in (_aten.detach.default, _aten.alias.default):
            return return_and_correct_aliasing(func, args, kwargs, args[0]._mapped(func))
        if func is _aten.clone.default:
            return args[0]._mapped(torch.clone)
        if func is _aten._to_copy.default:
            dtype = kwargs.get("dtype")
            if dtype is not None and dtype not in _FLOATING:
                _refuse(cls.__name__, f"to(dtype) with float32, float16 or bfloat16, got {dtype}")
            return args[0]._moved(**kwargs)
        transposed = func is _aten.t.default
        transposed |= func is _aten.transpose.int and {d % 2 for d in args[1:]} == {0, 1} and args[0].dim() == 2
        if transposed:
            return return_and_correct_aliasing(_aten.t.default, args[:1], {}, args[0]._transposed())
        if func is _aten.linear.default:
            return _linear(*args, **kwargs)
        if func is _aten.mm.default:
            return _matmul(args[0], args[1], None)
        if func is _aten.addmm.default and not kwargs:
            return _matmul(args[1], args[2], args[0])
        if func is _aten.copy_.default:
            return args[0]._copied_from(args[1])
        _refuse(cls.__name__, f"F.linear, mm, addmm, detach, clone, to, t, copy_ or dequantize(), got {func}")

    def _moved(self, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> "_Wrapper":
        raise NotImplementedError

    def _transposed(self) -> "_Wrapper":
        raise NotImplementedError

    def _copied_from(self, other: Any) -> "_Wrapper":
        if type(other) is not type(self) or other._context() != self._context():
            got = "one of another kind" if type(other) is type(self) else type(other).__name__
            _refuse(type(self).__name__, f"copy_ from a tensor of the same shape and scheme, got {got}")
        for name in self._inner:
            if (tensor := getattr(self, name)) is not None:
                tensor.copy_(getattr(other, name))
        return self


def _refuse(name: str, what: str) -> NoReturn:
    raise NotImplementedError(f"quant_ops.{name}: expected {what}. Dequantize it first: tensor.dequantize()")


def _linear(input: Any, weight: Any, bias: Any = None) -> Tensor:
    if isinstance(bias, _Wrapper):
        bias = bias.dequantize()
    if isinstance(weight, _Wrapper):
        return weight._product(input, bias)
    return F.linear(_plain(input), weight, bias)


def _matmul(x: Any, y: Any, bias: Any) -> Tensor:
    """``x @ y + bias``; y is a transposed weight where it is a linear layer's."""
    if isinstance(y, _Wrapper) and y.dim() == 2:
        product = y._transposed()._product(x, bias if bias is None or bias.dim() == 1 else None)
        return product if bias is None or bias.dim() == 1 else product + bias
    x, y, bias = _plain(x), _plain(y), _plain(bias)
    return torch.mm(x, y) if bias is None else torch.addmm(bias, x, y)


def _plain(x: Any) -> Any:
    return x.dequantize() if isinstance(x, _Wrapper) else x


class AffineQuantizedTensor(_Wrapper):
    """A tensor of codes that stands for ``(code - zero_point) * scale``, or in the domain FLOAT what its middle code adds to.

    Made by :func:`to_aq`. It is a weight, or an input that is quantized already; ``dequantize`` gives the values.

    Attributes:
        int_data: the codes: int8 or uint8 where the range allows, else the target dtype.
        scale, zero_point: as ``choose_qparams_affine`` gives them; zero_point may be None.
    """

    _inner = ("int_data", "scale", "zero_point")
    int_data: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme

    @staticmethod
    def __new__(
        cls: type,
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> "AffineQuantizedTensor":
        shape = int_data.t().shape if transposed else int_data.shape
        made: AffineQuantizedTensor = torch.Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=int_data.device, requires_grad=False
        )
        return made

    def __init__(
        self,
        int_data: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        scheme: Scheme,
        dtype: torch.dtype,
        transposed: bool = False,
    ) -> None:
        self.int_data, self.scale, self.zero_point = int_data, scale, zero_point
        self.scheme, self.is_transposed = scheme, transposed

    @classmethod
    def from_float(
        cls,
        input_float: Tensor,
        mapping_type: MappingType | str,
        block_size: Sequence[int],
        target_dtype: torch.dtype,
        quant_min: int | None = None,
        quant_max: int | None = None,
        eps: float | None = None,
        scale_dtype: torch.dtype | None = None,
        zero_point_dtype: torch.dtype | None = None,
        preserve_zero: bool = True,
        zero_point_domain: ZeroPointDomain | str = ZeroPointDomain.INT,
        extended_layout: str = "plain",
        inner_k_tiles: int | None = None,
    ) -> "AffineQuantizedTensor":
        """Quantizes a tensor by torchao's formulas, to the bit.

        Args:
            input_float: float32, float16 or bfloat16.
            mapping_type, block_size, target_dtype, quant_min, quant_max, eps, scale_dtype, zero_point_dtype, preserve_zero,
                zero_point_domain: as for ``quant_ops.choose_qparams_affine``.
            extended_layout: "plain", or "tensor_core_tiled": the last block of a row may be shorter. Both are stored alike.
            inner_k_tiles: accepted and ignored.

        Raises:
            TypeError, ValueError: as for ``quant_ops.choose_qparams_affine``; another layout.
        """
        if extended_layout not in ("plain", "tensor_core_tiled"):
            raise ValueError(f"quant_ops.to_aq: expected extended_layout 'plain' or 'tensor_core_tiled', got {extended_layout!r}")
        x, columns = input_float.detach(), input_float.shape[-1] if input_float.dim() else 0
        if extended_layout == "tensor_core_tiled" and len(block_size) == x.dim() and block_size[-1] > 0:
            x = F.pad(x, (0, -columns % block_size[-1]))  # zeros, as torchao pads
        scale, zero_point = qo.choose_qparams_affine(
            x,
            mapping_type,
            block_size,
            target_dtype,
            quant_min,
            quant_max,
            eps,
            scale_dtype,
            zero_point_dtype,
            preserve_zero=preserve_zero,
            zero_point_domain=zero_point_domain,
        )
        least, most = code_range("to_aq", target_dtype, quant_min, quant_max)
        stored = torch.int8 if least >= -128 and most <= 127 else torch.uint8 if least >= 0 and most <= 255 else target_dtype
        codes = qo.quantize_affine(x, block_size, scale, zero_point, stored, least, most, zero_point_domain)
        scheme = Scheme(
            mapping=_member(MappingType, mapping_type),
            block_size=tuple(block_size),
            codes=target_dtype,
            quant_min=least,
            quant_max=most,
            domain=_member(ZeroPointDomain, zero_point_domain),
        )
        return cls(codes[..., :columns].contiguous() if x is not input_float else codes, scale, zero_point, scheme, x.dtype)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The values, in the tensor's dtype or another one."""
        values = dequantized(self.int_data, self.scale, self.zero_point, self.scheme, output_dtype or self.dtype)
        return values.t() if self.is_transposed else values

    @property
    def block_size(self) -> tuple[int, ...]:
        """Of the tensor as it is seen: of a transposed one in the other order."""
        return self.scheme.block_size[::-1] if self.is_transposed else self.scheme.block_size

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.dequantize()}, scheme={self.scheme})"

    def _with(self, tensors: dict[str, Any], **changes: Any) -> "AffineQuantizedTensor":
        settings: dict[str, Any] = {"dtype": self.dtype, "transposed": self.is_transposed} | changes
        return type(self)(**tensors, scheme=self.scheme, **settings)

    def _context(self) -> Any:
        return self.scheme, self.dtype, self.is_transposed

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "AffineQuantizedTensor":
        return cls(tensors["int_data"], tensors["scale"], tensors.get("zero_point"), *context)

    def _moved(self, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> _Wrapper:
        return self._mapped(lambda t: torch.clone(t if device is None else t.to(device)), dtype=dtype or self.dtype)

    def _transposed(self) -> _Wrapper:
        if self.int_data.dim() != 2:
            _refuse(type(self).__name__, f"t() of two dimensions, got {tuple(self.shape)}")
        return self._mapped(lambda t: t, transposed=not self.is_transposed)

    def _product(self, x: Any, bias: Any) -> Tensor:
        from ..forms import form_of, quantized_rows

        form = None if self.is_transposed else form_of(self)
        if isinstance(x, AffineQuantizedTensor):
            rows = None if form is None else quantized_rows(x)
            if form is not None and rows is not None and form.is_int8_per_channel:
                return form.of_codes(self, x, *rows, bias)
            x = x.dequantize()
        if form is None or x.dtype not in _FLOATING:
            return F.linear(x, self.dequantize(), bias)
        return form.of_floats(self, x, bias)


def dequantized(codes: Tensor, scale: Tensor, zero_point: Tensor | None, scheme: Scheme, dtype: torch.dtype) -> Tensor:
    """The values of codes; the last block of a row may be shorter."""
    width = codes.shape[-1] if codes.dim() else 0
    missing = -width % scheme.block_size[-1] if codes.dim() and scheme.block_size[-1] > 0 else 0
    values = qo.dequantize_affine(
        F.pad(codes, (0, missing)) if missing else codes,
        scheme.block_size,
        scale,
        zero_point,
        codes.dtype,
        scheme.quant_min,
        scheme.quant_max,
        scheme.domain,
        output_dtype=dtype,
    )
    return values[..., :width] if missing else values


def _member(kind: Any, value: Any) -> Any:
    return kind[value.upper() if isinstance(value, str) else value.name]


@dataclasses.dataclass(frozen=True)
class QuantizeRows:
    """Quantizes rows (tokens) of an input to int8: a function for ``to_laq`` that the operators do themselves.

    Attributes:
        asymmetric: with a zero point and codes in [-128, 127]; else codes in [-127, 127].
    """

    asymmetric: bool

    def __call__(self, x: Tensor) -> AffineQuantizedTensor:
        blocks = (*[1] * (x.dim() - 1), x.shape[-1])
        if self.asymmetric:
            return to_aq(x, MappingType.ASYMMETRIC, blocks, torch.int8)
        scale_dtype = torch.float32 if x.dtype == torch.float16 else None
        return to_aq(x, MappingType.SYMMETRIC, blocks, torch.int8, -127, 127, 1e-5, scale_dtype)


class LinearActQuantizedTensor(_Wrapper):
    """A weight of a linear layer whose input is quantized by a function in every call. Made by :func:`to_laq`."""

    _inner = ("original_weight_tensor",)
    original_weight_tensor: Any
    input_quant_func: Callable[[Tensor], Any]

    @staticmethod
    def __new__(cls: type, original_weight_tensor: Tensor, input_quant_func: Callable[[Tensor], Any]) -> Any:
        weight = original_weight_tensor
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device, requires_grad=False)

    def __init__(self, original_weight_tensor: Tensor, input_quant_func: Callable[[Tensor], Any]) -> None:
        self.original_weight_tensor, self.input_quant_func = original_weight_tensor, input_quant_func

    @classmethod
    def from_float(cls, input_float: Tensor, input_quant_func: Callable[[Tensor], Any]) -> "LinearActQuantizedTensor":
        """The weight ``input_float``, quantized already as a rule, with the function that quantizes inputs.

        Raises:
            TypeError: input_quant_func cannot be called.
        """
        if not callable(input_quant_func):
            raise TypeError(
                f"quant_ops.to_laq: expected input_quant_func to be a function of the input, got {type(input_quant_func).__name__}"
            )
        return cls(input_float.detach(), input_quant_func)

    def dequantize(self, output_dtype: torch.dtype | None = None) -> Tensor:
        """The values of the weight."""
        weight = _plain(self.original_weight_tensor)
        return weight if output_dtype is None else weight.to(output_dtype)

    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({self.original_weight_tensor!r}, {self.input_quant_func})"

    def _with(self, tensors: dict[str, Any], **changes: Any) -> "LinearActQuantizedTensor":
        return type(self)(**tensors, input_quant_func=self.input_quant_func)

    def _context(self) -> Any:
        return (self.input_quant_func,)

    @classmethod
    def __tensor_unflatten__(cls, tensors: dict[str, Any], context: Any, size: Any, stride: Any) -> "LinearActQuantizedTensor":
        return cls(tensors["original_weight_tensor"], *context)

    def _moved(self, dtype: torch.dtype | None = None, device: Any = None, **_: Any) -> _Wrapper:
        return self._mapped(lambda t: _aten._to_copy(t, device=device or t.device, dtype=dtype or t.dtype))

    def _transposed(self) -> _Wrapper:
        return self._mapped(torch.t)

    def _product(self, x: Any, bias: Any) -> Tensor:
        from ..forms import dynamic_form_of

        form = dynamic_form_of(self) if x.dtype in _FLOATING else None
        if form is not None:
            return form(x, bias)
        return _linear(self.input_quant_func(x), self.original_weight_tensor, bias)


to_aq = AffineQuantizedTensor.from_float
to_laq = LinearActQuantizedTensor.from_float

torch.serialization.add_safe_globals(
    [AffineQuantizedTensor, LinearActQuantizedTensor, QuantizeRows, Scheme, MappingType, ZeroPointDomain]
)
