"""torch.vmap of the operators: the batch dimension becomes one of rows, samples or blocks, so that a batch is one call.

The results are those of a loop, bit for bit, since no operator's result for a row or sample depends on the others; only those of
``weight_only_linear`` in float32 may differ, within its bound. A rule returns None where it does not apply, as with a batch of
weights or stochastic rounding: then there is a loop.
``torch.library.register_vmap`` takes no operator with tensors that are keyword-only, hence the registration here.
``quant_tensor_backward`` has no rule: torch loops.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from quant_ops.ops import backward as backward  # defines operators that have rules here
from quant_ops.ops._register import register_kernel
from quant_ops.ops.program import Program
from quant_ops.ops.quantize_float import ROUNDINGS

_ops = torch.ops.quant_ops

Arguments = dict[str, Any]
Dims = dict[str, Any]  # the batch dimension of each argument; None for one that has none
Rule = Callable[[int, Dims, Arguments], tuple[Any, Any] | None]


def _register(name: str) -> Callable[[Rule], Rule]:
    """Registers a rule, which gets the size of the batch, and returns results and the batch dimension of each."""
    op = getattr(_ops, name).default
    schema = op._schema.arguments
    names = [argument.name for argument in schema]
    defaults = {argument.name: argument.default_value for argument in schema}

    def call(*values: Any) -> Any:
        return op(**dict(zip(names, values, strict=True)))

    def register(rule: Rule) -> Rule:
        def batched(info: Any, in_dims: tuple[Any, ...], *values: Any) -> Any:
            named, dims = dict(zip(names, values, strict=True)), dict(zip(names, in_dims, strict=True))
            made = rule(info.batch_size, dims, dict(named))
            return _loop(name, call, info.batch_size, dims, named) if made is None else made

        def kernel(keyset: Any, *args: Any, **kwargs: Any) -> Any:
            from torch._functorch.autograd_function import custom_function_call_vmap_helper
            from torch._functorch.pyfunctorch import retrieve_current_functorch_interpreter

            named = defaults | dict(zip(names, args, strict=False)) | kwargs
            interpreter: Any = retrieve_current_functorch_interpreter()
            return custom_function_call_vmap_helper(interpreter, batched, call, *named.values())

        register_kernel(name, kernel, "FuncTorchBatched", with_keyset=True)
        return rule

    return register


def _loop(name: str, call: Callable[..., Any], size: int, dims: Dims, named: Arguments) -> Any:
    if size == 0:
        raise ValueError(
            f"quant_ops.{name}: expected a batch of at least one set of weights, scales or random bits in torch.vmap, got none"
        )

    def at(index: int, dim: Any, value: Any) -> Any:
        if isinstance(value, list | tuple) and isinstance(dim, list | tuple):
            return [at(index, *pair) for pair in zip(dim, value, strict=True)]
        return value.select(dim, index) if isinstance(value, Tensor) and dim is not None else value

    results = [call(*(at(index, dims[name], value) for name, value in named.items())) for index in range(size)]
    if isinstance(results[0], Tensor):
        return torch.stack(results), 0
    return tuple(torch.stack(parts) for parts in zip(*results, strict=True)), (0,) * len(results[0])


def _batched_besides(dims: Dims, named: Arguments, *names: str) -> bool:
    """Whether another tensor than these has a batch dimension."""
    return any(isinstance(value, Tensor) and dims[name] is not None for name, value in named.items() if name not in names)


def _first(value: Tensor, dim: int | None, size: int) -> Tensor:
    """The batch dimension first; a tensor without one is the same for the whole batch."""
    return value.expand(size, *value.shape) if dim is None else value.movedim(dim, 0)


# ---- integer products ------------------------------------------------------------------------------------------------


@_register("int8_gemm")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    a, b = named["a"], named["b"]
    if dims["a"] is not None and dims["b"] is not None:
        return None
    of, other = (a, b) if dims["b"] is None else (b, a)
    of = of.movedim(dims["a"] if dims["b"] is None else dims["b"], 0)
    if of.dim() != 3:
        return None
    rows = of.reshape(-1, of.shape[2])
    if dims["b"] is None:
        return _ops.int8_gemm(rows, other).unflatten(0, (size, of.shape[1])), 0
    return _ops.int8_gemm(other, rows).unflatten(1, (size, of.shape[1])), 1


def _for_rows(value: Tensor | None, dim: int | None, x: Tensor, one: Sequence[int]) -> Tensor | None:
    """A scale or zero point of x, whose batch dimension is the first, for every row or sample; one has the shape ``one``."""
    if value is None or (dim is None and value.numel() == 1):
        return value
    size, wanted = len(x), (*x.shape[: x.dim() - len(one)], *one)
    value = _first(value, dim, size)
    if math.prod(value.shape[1:]) == 1:
        value = value.reshape(size, *[1] * (len(wanted) - 1)).expand(wanted)
    return value.contiguous()


@_register("int8_linear")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "x", "x_scale", "x_zero_point", "residual"):
        return None
    x = named["x"] = _first(named["x"], dims["x"], size)
    if x.dim() < 2:
        return None
    if named["residual"] is not None:
        named["residual"] = _first(named["residual"], dims["residual"], size)
    for name in ("x_scale", "x_zero_point"):
        named[name] = _for_rows(named[name], dims[name], x, [1])
    return _ops.int8_linear(**named), 0


@_register("weight_only_linear")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "x"):
        return None
    x = named["x"] = named["x"].movedim(dims["x"], 0)
    return None if x.dim() < 2 else (_ops.weight_only_linear(**named), 0)


@_register("weight_only_embedding")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "indices"):
        return None
    named["indices"] = named["indices"].movedim(dims["indices"], 0)
    return _ops.weight_only_embedding(**named), 0


def _of_rows(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        if _batched_besides(dims, named, "grad"):
            return None
        named["grad"] = named["grad"].movedim(dims["grad"], 0)
        return None if named["grad"].dim() < 2 else (op(**named), 0)

    return rule


for _name in ("int8_linear_backward", "weight_only_linear_backward"):
    _register(_name)(_of_rows(getattr(_ops, _name)))


@_register("int8_conv2d_backward")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "grad"):
        return None
    grad, sizes = named["grad"].movedim(dims["grad"], 0), list(named["input_size"])
    if grad.dim() == 5:
        named["grad"], named["input_size"] = grad.flatten(0, 1), [size * sizes[0], *sizes[1:]]
        return _ops.int8_conv2d_backward(**named).unflatten(0, (size, sizes[0])), 0
    named["grad"], named["input_size"] = grad, [size, *sizes]
    return _ops.int8_conv2d_backward(**named), 0


@_register("int8_conv2d")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "x", "x_scale", "x_zero_point", "residual"):
        return None
    x = _first(named["x"], dims["x"], size)
    if x.dim() not in (4, 5):
        return None
    if named["residual"] is not None:
        residual = _first(named["residual"], dims["residual"], size)
        named["residual"] = residual.flatten(0, 1) if x.dim() == 5 else residual
    for name in ("x_scale", "x_zero_point"):
        value = _for_rows(named[name], dims[name], x, [1, 1, 1])
        named[name] = value.flatten(0, 1) if value is not None and value.dim() == 5 else value
    named["x"] = x.flatten(0, 1) if x.dim() == 5 else x
    y = _ops.int8_conv2d(**named)
    return y.unflatten(0, x.shape[:2]) if x.dim() == 5 else y, 0


# ---- codes between products ------------------------------------------------------------------------------------------


@_register("requantize")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "x"):
        return None
    named["x"] = named["x"].movedim(dims["x"], 0)
    return _ops.requantize(**named), 0


@_register("int8_add")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "a", "b"):
        return None
    for name in ("a", "b"):
        named[name] = _first(named[name], dims[name], size)
    return _ops.int8_add(**named), 0


@_register("int8_mul")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "a", "b"):
        return None
    a, b = (_first(named[name], dims[name], size) for name in ("a", "b"))
    if a.dim() != 5 or b.dim() != 5:
        return _ops.int8_mul(**{**named, "a": a, "b": b}), 0
    y = _ops.int8_mul(**{**named, "a": a.flatten(0, 1), "b": b.flatten(0, 1)})
    return y.unflatten(0, a.shape[:2]), 0


@_register("int8_cat")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    tensors, dim = named["tensors"], named["dim"]
    scales = (*dims["scales"], *dims["zero_points"], dims["out_scale"], dims["out_zero_point"])
    if any(d is not None for d in scales):
        return None
    named["tensors"] = [_first(t, d, size) for t, d in zip(tensors, dims["tensors"], strict=True)]
    own = named["tensors"][0].dim() - 1
    if not -own <= dim < own:
        return None
    named["dim"] = dim % own + 1
    return _ops.int8_cat(**named), 0


def _of_images(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        if _batched_besides(dims, named, "x"):
            return None
        x = named["x"].movedim(dims["x"], 0)
        if x.dim() not in (4, 5):
            return None
        named["x"] = x.flatten(0, 1) if x.dim() == 5 else x
        y = op(**named)
        return y.unflatten(0, x.shape[:2]) if x.dim() == 5 else y, 0

    return rule


for _name in ("int8_max_pool2d", "int8_avg_pool2d", "int8_adaptive_avg_pool2d", "int8_upsample_nearest2d"):
    _register(_name)(_of_images(getattr(_ops, _name)))


@_register("int8_chain")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    steps = Program.decode(named["program"]).steps
    inputs = [x if d is None else x.movedim(d, 0) for x, d in zip(named["inputs"], dims["inputs"], strict=True)]
    # images, or rows of one dimension, of which each step computes every one alone
    if (
        any(d is not None for d in dims["constants"])
        or any(d is None or x.dim() not in (3, 5) for x, d in zip(inputs, dims["inputs"], strict=True))
        or any(step.op in ("flatten", "cat") and step.numbers[0] < 1 for step in steps)
        or len({x.shape[1] for x in inputs}) > 1
    ):
        return None
    results = _ops.int8_chain([x.flatten(0, 1) for x in inputs], named["constants"], named["program"])
    return tuple(result.unflatten(0, (size, inputs[0].shape[1])) for result in results), (0,) * len(results)


@_register("int8_attention")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if any(named[name].dim() - (dims[name] is not None) != 4 for name in "qkv"):
        return None
    samples = named["q"].shape[0 if dims["q"] != 0 else 1]
    for name in "qkv":
        named[name] = _first(named[name], dims[name], size).flatten(0, 1)
    mask, dim = named["mask"], dims["mask"]
    if mask is not None:
        if mask.dim() - (dim is not None) > 4:
            return None
        mask = _first(mask, dim, size)
        mask = mask.reshape(size, *[1] * (5 - mask.dim()), *mask.shape[1:])
        named["mask"] = mask.expand(size, samples, *mask.shape[2:]).flatten(0, 1)
    return _ops.int8_attention(**named).unflatten(0, (size, samples)), 0


# ---- the quantize family ---------------------------------------------------------------------------------------------


@_register("quantize_rows")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    x = named["x"].movedim(dims["x"], 0)
    return None if x.dim() < 2 else (_ops.quantize_rows(x, named["asymmetric"]), (0, 0, 0))


@_register("norm_quantize_rows")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    if _batched_besides(dims, named, "x", "residual"):
        return None
    x = named["x"] = _first(named["x"], dims["x"], size)
    if named["residual"] is not None:
        named["residual"] = _first(named["residual"], dims["residual"], size)
    return None if x.dim() < 2 else (_ops.norm_quantize_rows(**named), (0, 0, 0))


@_register("choose_qparams")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    x = named["tensor"] = named["tensor"].movedim(dims["tensor"], 0)
    own = x.dim() - 1
    if own == 0 or not all(-own <= d < own for d in named["dim"]):
        return None
    named["dim"] = [d % own + 1 for d in named["dim"]] or list(range(1, own + 1))
    return _ops.choose_qparams(**named), (0, 0)


def _broadcasts_within_samples(size: int, dims: Dims, named: Arguments, *parameters: str) -> bool:
    """Shapes scales, zero points and block_size for the tensor, whose batch dimension is the first. False where one would not
    broadcast to a sample, which the batch dimension would hide."""
    own = named["tensor"].dim() - 1
    for name in parameters:
        value, dim = named[name], dims[name]
        if value is None or (dim is None and value.numel() == 1):
            continue
        shape = [n for d, n in enumerate(value.shape) if d != dim]
        if math.prod(shape) == 1:
            shape = []
        if len(shape) > own:
            return False
        if dim is not None:
            named[name] = value.movedim(dim, 0).reshape(size, *[1] * (own - len(shape)), *shape)
    if named["block_size"] is not None:
        named["block_size"] = [1, *named["block_size"]]
    return True


def _elementwise(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        named["tensor"] = _first(named["tensor"], dims["tensor"], size)
        return (op(**named), 0) if _broadcasts_within_samples(size, dims, named, "scale", "zero_point") else None

    return rule


_register("quant_tensor_forward")(_elementwise(_ops.quant_tensor_forward))
_register("dequant_tensor")(_elementwise(_ops.dequant_tensor))

# ---- simulated floating formats --------------------------------------------------------------------------------------

_STOCHASTIC = ROUNDINGS.index("stochastic")


def _draws(named: Arguments) -> bool:
    """Whether an element's result depends on its index, which a batch dimension would change."""
    return named.get("rounding") == _STOCHASTIC


def _batched_tensors(size: int, dims: Dims, named: Arguments) -> None:
    """The tensor and its gradient with the batch dimension first; without a seed, which only stochastic rounding reads."""
    for name in ("tensor", "grad"):
        if name in named:
            named[name] = _first(named[name], dims[name], size)
    if "seed" in named:
        named["seed"] = None


def _float_format(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        if _draws(named):
            return None
        _batched_tensors(size, dims, named)
        return (op(**named), 0) if _broadcasts_within_samples(size, dims, named, "scale") else None

    return rule


def _blocks(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        if _draws(named) or dims["tensor_scale"] is not None:
            return None
        _batched_tensors(size, dims, named)
        own = named["tensor"].dim() - 1
        if not -own <= named["dim"] < own:
            return None
        named["dim"] = named["dim"] % own + 1
        return op(**named), 0

    return rule


for _name in ("quant_float_forward", "quant_float_backward"):
    _register(_name)(_float_format(getattr(_ops, _name)))
for _name in ("quant_block_forward", "quant_block_backward"):
    _register(_name)(_blocks(getattr(_ops, _name)))

# ---- torchao's affine primitives --------------------------------------------------------------------------------------


@_register("choose_qparams_affine")
def _(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
    block_size = named["block_size"]
    if all(block == 1 for block in block_size):  # which stands for the whole sample
        return None
    named["input"] = _first(named["input"], dims["input"], size)
    named["block_size"] = [1, *block_size]
    return _ops.choose_qparams_affine(**named), (0, 0)


def _affine(op: Any) -> Rule:
    def rule(size: int, dims: Dims, named: Arguments) -> tuple[Any, Any] | None:
        for name in ("input", "scale", "zero_point"):
            if named[name] is not None:
                named[name] = _first(named[name], dims[name], size)
        if named["zero_point"] is not None and named["zero_point"].numel() != named["scale"].numel():
            return None
        named["block_size"] = [1, *named["block_size"]]
        return op(**named), 0

    return rule


_register("quantize_affine")(_affine(_ops.quantize_affine))
_register("dequantize_affine")(_affine(_ops.dequantize_affine))
