"""A quantized weight in its three forms: plain codes, the packed copy that the kernels read, and a stand-in with float values.

Where the kernels read the packed copy alone a layer holds nothing else; whoever asks for the codes gets them unpacked.
``layer.weight`` is the stand-in: a tensor of the weight's shape, device and floating dtype without memory of its own, which becomes
the values when something is computed with it. Read next: state.py.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .. import _library
from ..ops import dequant_tensor, pack_weight, unpack_weight


def as_image_kernel(weight: Tensor) -> Tensor:
    """The operators' shape of a weight: the kernel of a Conv1d has height 1."""
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


def packed(codes: Tensor, groups: int) -> Tensor | None:
    """The packed copy of codes, on devices whose kernels read one."""
    device = codes.device.type
    packs = device == "cpu" or (device == "cuda" and _library.cuda_library is not None)
    return pack_weight(as_image_kernel(codes), groups) if packs else None


def unpacked(packed_weight: Tensor, shape: Sequence[int], groups: int) -> Tensor:
    """The codes that a packed copy was made from."""
    image = (*shape[:2], 1, *shape[2:]) if len(shape) == 3 else tuple(shape)
    return unpack_weight(packed_weight, image, groups).reshape(shape)


def placeholder(shape: Sequence[int], device: torch.device) -> Tensor:
    """What the operators get as the weight where the packed copy alone is kept: one byte, expanded to the shape."""
    return as_image_kernel(torch.zeros((), dtype=torch.int8, device=device).expand(tuple(shape)))


def dequantized(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """code * scale in float32, rounded once to the dtype."""
    values = dequant_tensor(codes, scale.reshape(-1, *[1] * (codes.dim() - 1)))
    return values.to(dtype)


# Properties and methods that describe a tensor; they look at no element.
_PROPERTIES = [
    *("shape", "dtype", "device", "layout", "ndim", "nbytes", "itemsize", "names", "output_nr", "_version", "_base"),
    *("requires_grad", "grad", "grad_fn", "is_leaf", "retains_grad", "_backward_hooks"),
    *("is_cpu", "is_cuda", "is_meta", "is_mps", "is_xpu", "is_sparse", "is_quantized", "is_nested", "is_mkldnn"),
]
_METHODS = [
    *("size", "dim", "ndimension", "numel", "nelement", "stride", "element_size", "__len__", "storage_offset", "dim_order"),
    *("is_floating_point", "is_complex", "is_signed", "is_contiguous", "is_inference", "is_pinned", "is_shared", "has_names"),
    "get_device",
]
_DESCRIBE = {getattr(Tensor, name).__get__ for name in _PROPERTIES if hasattr(Tensor, name)}
_DESCRIBE |= {getattr(Tensor, name) for name in _METHODS if hasattr(Tensor, name)}
_DESCRIBE |= {torch.numel, torch.is_floating_point, torch.is_complex, torch.is_tensor}
_SELF = {Tensor.data.__get__, Tensor.detach, torch.detach}  # type: ignore[attr-defined]
# Functions that want the weight and the bias in one dtype; the layer's bias is float32.
_WITH_BIAS = {F.linear, F.conv1d, F.conv2d, F.multi_head_attention_forward}


class DequantizedWeight(Tensor):
    """The stand-in. It is read-only, holds the layer's tensors, and is in no state_dict, ``parameters()`` or ``buffers()``."""

    held: Tensor  # the codes or their packed copy
    _compute: Callable[[], Tensor]
    _described: tuple[torch.Size, torch.dtype, torch.device]

    @staticmethod
    def __new__(
        cls: type["DequantizedWeight"],
        values: Callable[[], Tensor],
        held: Tensor,
        shape: torch.Size,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "DequantizedWeight":
        made: DequantizedWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made._compute, made.held = values, held
        made._described = (shape, dtype, device)
        return made

    # Asked in every forward of some models. Tensor's own properties would go through __torch_function__, which takes 2 us.
    shape = property(lambda self: self._described[0])
    dtype = property(lambda self: self._described[1])
    device = property(lambda self: self._described[2])

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def dequantize(self) -> Tensor:
        """The values, as a tensor of their own."""
        return self._compute()

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _DESCRIBE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _SELF:
            return args[0]
        if func is Tensor.data_ptr:  # tells tied weights apart from others, as it does elsewhere
            return args[0].held.data_ptr()
        if func is DequantizedWeight.dequantize or func is Tensor.dequantize:
            return args[0].dequantize()
        name = getattr(func, "__name__", "")
        if isinstance(args[0] if args else None, cls) and _writes(func, name, args):
            _refuse_writing(name)
        if kwargs.get("out") is not None and isinstance(kwargs["out"], cls):
            _refuse_writing("out=")
        args, kwargs = _with_values((args, kwargs))
        if func in _WITH_BIAS:
            args, kwargs = _biases_like(args, kwargs)
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Calls that came past :meth:`__torch_function__`, from C++ for example."""
        kwargs = kwargs or {}
        if func is torch.ops.aten.detach.default:
            return args[0]
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if isinstance(value, cls) and argument.alias_info is not None and argument.alias_info.is_write:
                _refuse_writing(str(func))
        args, kwargs = _with_values((args, kwargs))
        return func(*args, **kwargs)

    def __repr__(self, *_: Any, **__: Any) -> str:  # type: ignore[override]
        return repr(self.dequantize())

    def __hash__(self) -> int:
        return id(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.dequantize()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.dequantize().__reduce_ex__(protocol)


def _with_values(arguments: Any) -> Any:
    return tree_map_only(DequantizedWeight, DequantizedWeight.dequantize, arguments)


def _writes(func: Callable[..., Any], name: str, args: tuple[Any, ...]) -> bool:
    if name in ("__set__", "__delete__", "requires_grad_"):  # `weight.requires_grad = False` asks for what is so already
        return len(args) < 2 or not (args[1] is False or args[1] is None)
    in_place = name.endswith("_") and not name.endswith("__")
    operator = name.startswith("__i") and name not in ("__index__", "__int__", "__invert__")
    return in_place or operator or name in ("__setitem__", "set_data")


def _refuse_writing(name: str) -> NoReturn:
    raise RuntimeError(
        f"quant_ops: expected the weight of a quantized layer to be read only, got {name}. It stands for the values of the "
        "buffers qweight and weight_scale: load those with load_state_dict, assign layer.qweight, or change the float model and "
        "quantize it."
    )


def _biases_like(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The arguments, with vectors in float32 (the biases of quantized layers) rounded to the dtype of the first, the input."""
    x = args[0] if args else next(iter(kwargs.values()))
    if x.dtype == torch.float32:
        return args, kwargs

    def cast(value: Any) -> Any:
        return value.to(x.dtype) if value.dim() == 1 and value.dtype == torch.float32 else value

    cast_all: tuple[Any, Any] = tree_map_only(Tensor, cast, (args, kwargs))
    return cast_all
