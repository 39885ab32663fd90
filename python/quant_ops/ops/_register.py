"""What every operator's section uses: calling it with the exceptions of Python, its fake kernel, and refusing its derivatives.

Checks are written once, in C++ (``cpp/torch``). A fake kernel runs them through ``torch.ops.quant_ops_meta``, the same operators
for tensors without data, and adds the one thing that C++ cannot: shapes in which a size may be symbolic.
"""

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.autograd import forward_ad

from quant_ops import _library
from quant_ops.ops.sharding import register_rules

_ops = torch.ops.quant_ops
_IMPLEMENTATION = torch.library.Library("quant_ops", "IMPL")  # kernels for autograd and vmap; must stay alive


class DerivativeError(RuntimeError):
    """A derivative that is refused."""


def call(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls an operator; its refusal of a dtype becomes a TypeError, of a value a ValueError; without memory a RuntimeError."""
    if torch.compiler.is_compiling():
        return function(*args, **kwargs)
    try:
        return function(*args, **kwargs)
    except DerivativeError:
        raise
    except RuntimeError as error:
        if isinstance(error, NotImplementedError) and register_rules():  # the first DTensor
            return call(function, *args, **kwargs)
        text = str(error).split("\n")[0]
        if text.startswith("quant_ops::"):  # the dispatcher: an argument that is no Tensor, int, ...
            raise TypeError(text) from None
        if not text.startswith("quant_ops."):
            raise
        raise _library.refusal_kind(text)(text) from None


def call_fast(function: Callable[..., Any], tensors: tuple[Any, ...], *args: Any, **kwargs: Any) -> Any:
    """As ``call`` with ``(*tensors, *args)``, past the autograd kernel, which is Python, where none of the tensors needs it.

    In inference mode torch itself goes past it.
    """
    if (
        torch.compiler.is_compiling()
        or torch.is_inference_mode_enabled()
        or in_transform() is not None
        or wants_derivative(tensors)
        or (kwargs.get("x_multiplier") is not None and wants_derivative((kwargs["x_multiplier"],)))
    ):
        return call(function, *tensors, *args, **kwargs)
    with _below_autograd():
        return call(function, *tensors, *args, **kwargs)


# ---- fake kernels ----------------------------------------------------------------------------------------------------

# For a size that only the data will tell: one that checks of a single size accept. Checks of two such sizes against each other hold
# where they are the same, and the real operator checks again.
_UNKNOWN_SIZE = 4096


def _example(size: int | torch.SymInt) -> int:
    """The size itself, or of a symbolic one the size that the graph is traced with; no guard is added."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return _UNKNOWN_SIZE if hint is None else int(hint)


def _without_data(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_without_data(one) for one in value]
    if not isinstance(value, Tensor):
        return value
    sizes, strides = ([_example(n) for n in numbers] for numbers in (value.shape, value.stride()))
    return torch.empty_strided(sizes, strides, dtype=value.dtype, device="meta")


def expect_one_device(name: str, named: dict[str, Any]) -> None:
    """A tensor of device meta among others brings their call here: the result would be memory that nobody wrote."""
    devices = {key: value.device.type for key, value in named.items() if isinstance(value, Tensor) and key != "seed"}
    devices |= {
        f"{key}[{i}]": one.device.type
        for key, value in named.items()
        if isinstance(value, list | tuple)
        for i, one in enumerate(value)
        if isinstance(one, Tensor)
    }
    if "meta" in devices.values() and len(set(devices.values())) > 1:
        raise RuntimeError(
            f"quant_ops.{name}: expected all tensors on one device, got {devices}. Move the tensors or the module to one device."
        )


def fake_kernel(name: str) -> Callable[[Callable[..., Any]], None]:
    """Registers the fake kernel of an operator; decorates the function that makes its results.

    The function gets the operator's arguments by name, with the schema's defaults, and ``checked``: the results for concrete
    sizes, after all of the operator's checks. It takes dtypes from them and computes shapes from the arguments, so that these may
    be symbolic.
    """
    check = getattr(torch.ops.quant_ops_meta, name).default
    schema = getattr(_ops, name).default._schema.arguments
    names = [argument.name for argument in schema]
    defaults = {argument.name: argument.default_value for argument in schema}

    def register(results: Callable[..., Any]) -> None:
        def kernel(*args: Any, **kwargs: Any) -> Any:
            named = dict(zip(names, args, strict=False)) | kwargs
            expect_one_device(name, named)
            with torch._C._DisableTorchDispatch():
                checked = check(**{k: _without_data(v) for k, v in named.items()})
            return results(checked=checked, **defaults | named)

        torch.library.register_fake(f"quant_ops::{name}", kernel)

    return register


# ---- derivatives -----------------------------------------------------------------------------------------------------

_below_autograd = torch._C._AutoDispatchBelowAutograd
in_transform = torch._C._functorch.maybe_current_level  # the level of torch.func's innermost transform; None outside of them


def wants_derivative(tensors: Sequence[Any]) -> bool:
    """Whether autograd follows any of the arguments, backward or (forward mode) by its tangent."""
    if torch.is_grad_enabled():
        for t in tensors:
            if isinstance(t, Tensor) and t.requires_grad:
                return True
    if forward_ad._current_level < 0:
        return False
    floating = [t for t in tensors if isinstance(t, Tensor) and t.is_floating_point()]
    return any(forward_ad.unpack_dual(t).tangent is not None for t in floating)


def refuse_derivative(name: str, expected: str, got: str) -> NoReturn:
    raise DerivativeError(f"quant_ops.{name}: expected {expected}, got {got}.")


def expect_no_transform(name: str, instead: str | None = None) -> None:
    """torch.func meets a Function before the dispatcher or not at all."""
    if in_transform() is not None:
        refuse_derivative(
            name,
            f"a call of {instead or f'quant_ops.{name}'} inside torch.func.grad, vjp or jvp",
            f"one of torch.ops.quant_ops.{name}, which torch.func cannot differentiate",
        )


def register_kernel(name: str, kernel: Callable[..., Any], key: str, **settings: Any) -> None:
    """Registers what runs for an operator before its device's kernel."""
    _IMPLEMENTATION.impl(name, kernel, key, **settings)


class _Inference(torch.autograd.Function):
    """Computes without a graph; a gradient that is asked for gets a clear error instead of a silent zero."""

    @staticmethod
    def forward(ctx: Any, op: Any, keywords: Sequence[str], *values: Any) -> Tensor:
        """The last values are those of the keywords; a tensor has to be a value of its own for its gradient to be asked for."""
        ctx.name = op._schema.name.replace("::", ".")
        ctx.like = [(a.shape, a.dtype) if isinstance(a, Tensor) else None for a in values]
        positional = len(values) - len(keywords)
        result: Tensor = op(*values[:positional], **dict(zip(keywords, values[positional:], strict=True)))
        if not result.is_floating_point():
            ctx.mark_non_differentiable(result)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        needed = zip(ctx.needs_input_grad[2:], ctx.like, strict=True)
        return None, None, *(_no_gradient(grad, *like, ctx.name) if needs and like else None for needs, like in needed)


_WITH_TWIN = ("int8_linear", "int8_conv2d", "weight_only_linear")  # see backward.py


def refuse_second_derivative(name: str) -> NoReturn:
    refuse_derivative(
        name,
        "the gradient of a layer with backward=True to be differentiated no further",
        "a second derivative. Differentiate once, without create_graph=True and without a transform around the transform",
    )


# An operator, so that tracing (torch.compile with gradients enabled) meets the fake kernel and only a real backward pass raises.
@torch.library.custom_op("quant_ops::_no_gradient", mutates_args=())
def _no_gradient(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, op: str) -> Tensor:
    if op.endswith("_backward"):
        refuse_second_derivative(op.split(".")[-1])
    through = "a layer made with backward=True, which hands gradients on, or " if op.split(".")[-1] in _WITH_TWIN else ""
    raise RuntimeError(
        f"{op}: expected no gradient to be asked for, got a backward pass through an operator that is for inference. "
        f"Train with {through}the simulated quant_tensor_forward, or call it under torch.no_grad()."
    )


@_no_gradient.register_fake
def _(grad: Tensor, shape: Sequence[int], dtype: torch.dtype, op: str) -> Tensor:
    return grad.new_empty(shape, dtype=dtype)


def inference_only(name: str) -> None:
    """Registers the autograd kernel of an operator that has no derivative: it refuses one that is asked for."""
    op = getattr(_ops, name).default
    has_lists = any(str(argument.type) == "List[Tensor]" for argument in op._schema.arguments)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if has_lists and wants_derivative([t for value in args if isinstance(value, list | tuple) for t in value]):
            refuse_derivative(name, "no derivative to be asked for", "a tensor of a list that autograd follows, such as a scale")
        if wants_derivative((*args, *kwargs.values())):
            if in_transform() is not None or forward_ad._current_level >= 0:  # there a result would count as a constant
                if name.endswith("_backward"):
                    refuse_second_derivative(name)
                through = "a layer with backward=True, in reverse mode, or " if name in _WITH_TWIN else ""
                raise DerivativeError(
                    f"quant_ops.{name}: expected no derivative to be asked for, got a call inside torch.func.grad, vjp, jvp or "
                    f"forward mode of an operator that is for inference. Differentiate {through}the simulated "
                    "quant_tensor_forward instead."
                )
            return _Inference.apply(op, tuple(kwargs), *args, *kwargs.values())  # type: ignore[no-untyped-call]
        with _below_autograd():
            return op(*args, **kwargs)

    register_kernel(name, kernel, "Autograd")


def constant(name: str) -> None:
    """Lets autograd pass an operator by, whose results count as constants."""
    register_kernel(name, torch.library.fallthrough_kernel, "Autograd")
