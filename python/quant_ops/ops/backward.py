"""Gradients through layers whose quantized weight is frozen, for adapters: straight through the rounding of the input.

    grad_x = multiplier * (grad_y @ w)      w the dequantized weight, a convolution likewise; 0 where a static scale clips x

Of ``int8_linear`` the product is one of integers, which the operator itself computes with the transposed weight: rows of
``grad_y * weight_scale`` are quantized as :func:`quantize_rows` does, summed exactly and scaled by the row's scale. The others
multiply floats by a weight that is dequantized in blocks. Neither weights nor scales nor biases get a gradient.

Each operator has a differentiable twin of the same schema, which the layers call where a gradient of x may be asked for. Operators
here are compositions of others, on every device. Read first: _register.py; next: nn/base.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.grad import conv2d_input

from quant_ops.ops._register import (
    call,
    expect_no_transform,
    expect_one_device,
    in_transform,
    inference_only,
    refuse_derivative,
    refuse_second_derivative,
    register_kernel,
    wants_derivative,
)
from quant_ops.ops.int8 import ACTIVATIONS, as_list

_ops: Any = torch.ops.quant_ops
_DEFINITIONS = torch.library.Library("quant_ops", "FRAGMENT")  # must stay alive
_below_autograd = torch._C._AutoDispatchBelowAutograd

_MOST_PRODUCTS = 131071  # of codes, in an exact sum
_BLOCK = 1 << 22  # elements of a weight that are floating at once
_RELU = ACTIVATIONS.index("relu") + 1


def _define(schema: str, implementation: Callable[..., Tensor], fake: Callable[..., Tensor]) -> str:
    """An operator that is a composition of others. Returns its name."""
    name = schema[: schema.index("(")]
    _DEFINITIONS.define(schema)
    names = [argument.name for argument in getattr(_ops, name).default._schema.arguments]

    def without_data(*args: Any, **kwargs: Any) -> Tensor:
        expect_one_device(name.removeprefix("_"), dict(zip(names, args, strict=False)) | kwargs)
        return fake(*args, **kwargs)

    _DEFINITIONS.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"quant_ops::{name}", without_data, lib=_DEFINITIONS)
    return name


def _expect_result(op: str, grad: Tensor, weight: Tensor, dims: int) -> None:
    """The gradient is that of a result of such a weight; the operators that it is handed to check everything else."""
    if grad.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise TypeError(f"quant_ops.{op}: expected grad.dtype in (float32, float16, bfloat16), got {grad.dtype}")
    if weight.dim() != 2 * dims:
        shape = "(N, K)" if dims == 1 else "(O, C/groups, R, S)"
        raise ValueError(f"quant_ops.{op}: expected weight.shape {shape}, got {tuple(weight.shape)}")
    channel = -1 if dims == 1 else -3
    if grad.dim() < -channel or grad.shape[channel] != weight.shape[0]:
        raise ValueError(
            f"quant_ops.{op}: expected grad.shape[{channel}] == weight.shape[0], got {tuple(grad.shape)} and {tuple(weight.shape)}"
        )


# ---- int8_linear -----------------------------------------------------------------------------------------------------


def int8_linear_backward(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    *,
    packed_weight: Tensor | None = None,
    x_multiplier: Tensor | None = None,
) -> Tensor:
    """The gradient of the input of a linear layer with a frozen int8 weight: ``x_multiplier * (grad @ (weight * weight_scale))``.

    The product is one of int8 codes: ``q, s, _ = quantize_rows(float32(grad) * weight_scale)``, and then
    ``s * x_multiplier * (q @ weight)`` with exact sums, as :func:`int8_linear` of the transposed weight computes it. The transposed
    packed weight lives during the call alone.

    Args:
        grad: ``(..., N)``, that of the result; float32, float16 or bfloat16.
        weight, weight_scale, packed_weight, x_multiplier: those of the :func:`int8_linear` call.

    Returns:
        ``(..., K)``, of grad's dtype. A row that holds NaN or Inf gives NaN, so that a scaler of losses sees it. With more than
        131071 output features, beyond which sums would not be exact, the product is a floating one.

    Raises:
        TypeError, ValueError: as :func:`int8_linear`.
        RuntimeError: a gradient of the gradient is asked for.
    """
    op = _ops.int8_linear_backward.default
    made: Tensor = call(op, grad, weight, weight_scale, packed_weight=packed_weight, x_multiplier=x_multiplier)
    return made


def _int8_linear_backward(
    grad: Tensor, weight: Tensor, weight_scale: Tensor, *, packed_weight: Tensor | None = None, x_multiplier: Tensor | None = None
) -> Tensor:
    _expect_result("int8_linear_backward", grad, weight, 1)
    n, k = weight.shape
    scale = weight_scale.reshape(-1)
    scale = scale.expand(n).contiguous() if scale.numel() == 1 else scale
    on_cpu = packed_weight is not None and packed_weight.device.type == "cpu"  # elsewhere the weight lies there as it is
    if n > _MOST_PRODUCTS:
        codes = _ops.unpack_weight(packed_weight, [n, k]) if on_cpu else weight

        def values(begin: int, end: int, dtype: torch.dtype) -> Tensor:
            made: Tensor = _ops.dequant_tensor(codes[begin:end], scale[begin:end, None])
            return made.to(dtype)

        return _floating_product(grad, n, k, values, x_multiplier)
    if on_cpu:
        transposed = weight.new_zeros(()).expand(k, n)  # of which the shape alone is read
        packed_weight = _ops.transpose_packed_weight(packed_weight, [n, k])
    else:
        transposed, packed_weight = weight.t().contiguous(), None
    of_columns = scale.new_ones(1) if x_multiplier is None else x_multiplier
    made: Tensor = _ops.int8_linear(grad, transposed, of_columns, packed_weight=packed_weight, x_multiplier=scale)
    return made


def _like_input(op: str) -> Callable[..., Tensor]:
    def fake(grad: Tensor, weight: Tensor, *_: Any, **__: Any) -> Tensor:
        _expect_result(op, grad, weight, 1)
        return grad.new_empty((*grad.shape[:-1], weight.shape[1]))

    return fake


def _floating_product(
    grad: Tensor, n: int, k: int, values: Callable[[int, int, torch.dtype], Tensor], multiplier: Tensor | None
) -> Tensor:
    """``grad @ values * multiplier`` with sums in float32; ``values`` makes rows of the weight in a dtype.

    On the CPU the factors are float32 as well: few processors multiply 16-bit floats faster.
    """
    dtype = torch.float32 if grad.device.type == "cpu" else grad.dtype
    rows = grad.reshape(-1, n).to(dtype)
    total = grad.new_zeros((rows.shape[0], k), dtype=torch.float32)
    step = max(1, _BLOCK // max(k, 1))
    for begin in range(0, n, step):
        end = min(n, begin + step)
        part = rows[:, begin:end]
        if dtype == torch.float32:
            total.addmm_(part, values(begin, end, dtype))
        else:
            total += part @ values(begin, end, dtype)
    if multiplier is not None:
        total *= multiplier
    return total.to(grad.dtype).reshape(*grad.shape[:-1], k)


_define(
    "int8_linear_backward(Tensor grad, Tensor weight, Tensor weight_scale, *, Tensor? packed_weight=None, "
    "Tensor? x_multiplier=None) -> Tensor",
    _int8_linear_backward,
    _like_input("int8_linear_backward"),
)

# ---- weight_only_linear ------------------------------------------------------------------------------------------------


def weight_only_linear_backward(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: Tensor | None = None,
    x_multiplier: Tensor | None = None,
) -> Tensor:
    """The gradient of the input of a linear layer with a weight in groups: ``x_multiplier * (grad @ w)``.

    ``w`` is the dequantized weight of :func:`weight_only_linear`, made in blocks of rows of 16 MiB. Products are floating, on the
    CPU those of float32, elsewhere of grad's dtype, and sums in float32.

    Args:
        grad: ``(..., N)``, that of the result; float32, float16 or bfloat16.
        weight, weight_scale, weight_zero_point, bits, group_size, packed_weight, x_multiplier: those of the
            :func:`weight_only_linear` call.

    Returns:
        ``(..., K)``, of grad's dtype.

    Raises:
        TypeError, ValueError: as :func:`weight_only_embedding`.
        RuntimeError: a gradient of the gradient is asked for.
    """
    op, packed = _ops.weight_only_linear_backward.default, {"packed_weight": packed_weight, "x_multiplier": x_multiplier}
    made: Tensor = call(op, grad, weight, weight_scale, weight_zero_point, bits, group_size, **packed)
    return made


def _weight_only_linear_backward(
    grad: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    weight_zero_point: Tensor | None = None,
    bits: int = 8,
    group_size: int = -1,
    *,
    packed_weight: Tensor | None = None,
    x_multiplier: Tensor | None = None,
) -> Tensor:
    _expect_result("weight_only_linear_backward", grad, weight, 1)

    def values(begin: int, end: int, dtype: torch.dtype) -> Tensor:
        indices = torch.arange(begin, end, device=grad.device)
        made: Tensor = _ops.weight_only_embedding(
            indices, weight, weight_scale, weight_zero_point, bits, group_size, packed_weight=packed_weight, out_dtype=dtype
        )
        return made

    n, k = weight.shape
    return _floating_product(grad, n, k, values, x_multiplier)


_define(
    "weight_only_linear_backward(Tensor grad, Tensor weight, Tensor weight_scale, Tensor? weight_zero_point=None, int bits=8, "
    "int group_size=-1, *, Tensor? packed_weight=None, Tensor? x_multiplier=None) -> Tensor",
    _weight_only_linear_backward,
    _like_input("weight_only_linear_backward"),
)

# ---- int8_conv2d -----------------------------------------------------------------------------------------------------


def int8_conv2d_backward(
    grad: Tensor,
    input_size: Sequence[int],
    weight: Tensor,
    weight_scale: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    packed_weight: Tensor | None = None,
) -> Tensor:
    """The gradient of the input of a convolution with a frozen int8 weight: the transposed convolution of the dequantized weight.

    It is computed in float32.

    Args:
        grad: ``(N, O, OH, OW)`` or ``(O, OH, OW)``, that of the result; floating.
        input_size: shape of the input.
        weight, weight_scale, stride, padding, dilation, groups, packed_weight: those of the :func:`int8_conv2d` call.

    Returns:
        A tensor of ``input_size``, of grad's dtype.

    Raises:
        TypeError, ValueError: the packed weight is of another shape.
        RuntimeError: shapes do not fit, or a gradient of the gradient is asked for.
    """
    geometry = as_list(stride), as_list(padding), as_list(dilation), groups
    op = _ops.int8_conv2d_backward.default
    made: Tensor = call(op, grad, list(input_size), weight, weight_scale, *geometry, packed_weight=packed_weight)
    return made


def _int8_conv2d_backward(
    grad: Tensor,
    input_size: Sequence[int],
    weight: Tensor,
    weight_scale: Tensor,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    *,
    packed_weight: Tensor | None = None,
) -> Tensor:
    _expect_result("int8_conv2d_backward", grad, weight, 2)
    if packed_weight is not None and packed_weight.device.type == "cpu":
        weight = _ops.unpack_weight(packed_weight, list(weight.shape), groups)
    values = _ops.dequant_tensor(weight, weight_scale.reshape(-1, 1, 1, 1))
    top, bottom, left, right = padding if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
    height, width = input_size[-2:]
    even = top == bottom and left == right
    size = [1] * (4 - len(input_size)) + list(input_size)
    if not even:  # of the padded image, of which a part is the input
        size[-2:] = [height + top + bottom, width + left + right]
    images = grad.float().reshape(-1, *grad.shape[-3:])
    made: Tensor = conv2d_input(size, values, images, list(stride), [top, left] if even else 0, list(dilation), groups)
    made = made if even else made[..., top : top + height, left : left + width]
    return made.to(grad.dtype).reshape(input_size).contiguous()


def _of_size(grad: Tensor, input_size: Sequence[int], weight: Tensor, *_: Any, **__: Any) -> Tensor:
    _expect_result("int8_conv2d_backward", grad, weight, 2)
    return grad.new_empty(tuple(input_size))


_define(
    "int8_conv2d_backward(Tensor grad, SymInt[] input_size, Tensor weight, Tensor weight_scale, int[2] stride=1, "
    "int[2] padding=0, int[2] dilation=1, int groups=1, *, Tensor? packed_weight=None) -> Tensor",
    _int8_conv2d_backward,
    _of_size,
)

for _name in ("int8_linear_backward", "weight_only_linear_backward", "int8_conv2d_backward"):
    inference_only(_name)

# ---- the differentiable twins ------------------------------------------------------------------------------------------

_KEPT = ("weight", "weight_scale", "weight_zero_point", "packed_weight", "x_multiplier")  # what every gradient takes, where it is
_GEOMETRY = ("stride", "padding", "dilation", "groups", "bits", "group_size")


def _in_range(x: Tensor, scale: Tensor, zero_point: Tensor | None, multiplier: Tensor | None) -> Tensor:
    """Where static quantization does not clip, as in quant_tensor_backward: ``-128 <= rne(x / scale) + zero_point <= 127``."""
    x = x.float() if multiplier is None else x.float() * multiplier
    steps = (x / scale.float()).round_()
    if zero_point is None:
        return (steps >= -128) & (steps <= 127)
    zero = zero_point.double().round().clamp(-128, 127).float() if zero_point.is_floating_point() else zero_point
    return (steps >= -128 - zero) & (steps <= 127 - zero)


class _Once(torch.autograd.Function):
    """A gradient inside of torch.func's transforms, which follow it whether or not its derivative is asked for."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, keys: tuple[str, ...], *values: Any) -> Any:
        return getattr(_ops, name).default(**dict(zip(keys, values, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        refuse_second_derivative(ctx.name)

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_second_derivative(ctx.name)


class _Through(torch.autograd.Function):
    """An operator, with the gradient of x."""

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, *values: Any) -> Any:
        return getattr(_ops, name).default(**dict(zip(_ARGUMENTS[name], values, strict=True)))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        name, *values = inputs
        named = dict(zip(_ARGUMENTS[name], values, strict=True))
        clips = named.get("x_scale") is not None
        keep = {key: named[key] for key in (*_KEPT, *(("x", "x_scale", "x_zero_point") if clips else ())) if key in named}
        if named.get("relu") or named.get("activation") == _RELU:
            keep["y"] = output
        ctx.name, ctx.keys = name, tuple(keep)
        ctx.input_size, ctx.dtype = named["x"].shape, named["x"].dtype
        ctx.geometry = {key: named[key] for key in _GEOMETRY if key in named}
        ctx.save_for_backward(*keep.values())
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        others = (None,) * (len(_ARGUMENTS[ctx.name]) - 1)
        if grad is None:
            return None, None, *others
        kept = dict(zip(ctx.keys, ctx.saved_tensors, strict=True))
        weight = {key: kept[key] for key in _KEPT if key in kept}
        if "y" in kept:
            grad = torch.where(kept["y"] > 0, grad, 0.0)
        sizes = {"input_size": list(ctx.input_size)} if ctx.name == "int8_conv2d" else {}
        arguments = {"grad": grad, **sizes, **weight, **ctx.geometry}
        if not torch.compiler.is_compiling() and in_transform() is not None:
            made = _Once.apply(f"{ctx.name}_backward", tuple(arguments), *arguments.values())  # type: ignore[no-untyped-call]
        else:
            made = getattr(_ops, f"{ctx.name}_backward").default(**arguments)
        if "x" in kept:
            made = torch.where(_in_range(kept["x"], kept["x_scale"], kept["x_zero_point"], kept.get("x_multiplier")), made, 0.0)
        return None, made.to(ctx.dtype), *others

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        refuse_derivative(
            ctx.name,
            "no derivative in forward mode",
            "one by torch.func.jvp, jacfwd or a dual tensor. A layer with backward=True has one in reverse mode: use backward()",
        )


class _ThroughEagerly(torch.autograd.Function):
    """The same outside of torch.func's transforms; torch inspects the signature of a Function with setup_context in every call."""

    @staticmethod
    def forward(ctx: Any, name: str, *values: Any) -> Any:
        with _below_autograd():
            result = _Through.forward(name, *values)
        _Through.setup_context(ctx, (name, *values), result)
        return result

    backward = _Through.backward
    jvp = _Through.jvp


_ARGUMENTS: dict[str, dict[str, Any]] = {}  # of each operator that has a twin, with their defaults; x is the first


def _named(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return _ARGUMENTS[name] | dict(zip(_ARGUMENTS[name], args, strict=False)) | kwargs


def _add_twin(name: str) -> None:
    base = getattr(_ops, name).default
    _ARGUMENTS[name] = {argument.name: argument.default_value for argument in base._schema.arguments}
    text = str(base._schema).removeprefix("quant_ops::")

    twin = _define(text.replace(name, f"_{name}_differentiable", 1), base, base)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        named = _named(name, args, kwargs)
        if wants_derivative(tuple(named.values())):
            expect_no_transform(name, f"a layer with backward=True, or quant_ops.{name}(..., backward=True),")
            return _derived(name, named)
        with _below_autograd():
            return base(*args, **kwargs)

    register_kernel(twin, kernel, "Autograd")


def _derived(name: str, named: dict[str, Any]) -> Tensor:
    """The operator's result, with the gradient of x."""
    if followed := [key for key, value in named.items() if key != "x" and wants_derivative((value,))]:
        refuse_derivative(
            name,
            "a gradient of x alone to be asked for",
            f"one of {followed[0]}. The weight of a layer with backward=True is frozen: detach() what belongs to it",
        )
    if named.get("out_scale") is not None:
        refuse_derivative(
            name,
            "a floating result where a gradient of x is asked for",
            "out_scale. Codes carry no gradient: leave output_scale out of a layer with backward=True",
        )
    if (activation := named.get("activation", 0)) > _RELU:
        got = ACTIVATIONS[activation - 1] if activation <= len(ACTIVATIONS) else activation
        refuse_derivative(
            name,
            "no activation but relu where a gradient of x is asked for",
            f"activation {got}. Apply it to the layer's result",
        )
    function = _ThroughEagerly if in_transform() is None else _Through
    result: Tensor = function.apply(name, *named.values())  # type: ignore[no-untyped-call]
    return result


for _name in ("int8_linear", "int8_conv2d", "weight_only_linear"):
    _add_twin(_name)


TWINS = {name: getattr(_ops, f"_{name}_differentiable").default for name in _ARGUMENTS}


def differentiable(name: str, *args: Any, **kwargs: Any) -> Tensor:
    """The operator of this name, with the gradient of x; also inside of torch.func's transforms."""
    if not torch.compiler.is_compiling() and in_transform() is not None:
        return _derived(name, _named(name, args, kwargs))
    made: Tensor = TWINS[name](*args, **kwargs)
    return made
