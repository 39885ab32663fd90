"""What the int8 operators can compute of a graph: every node of torch.fx as an :class:`Op`, or the reason why there is none.

A node is recognized by its function, method or exact class of module, and by the shapes that a run on an example has recorded in
``node.meta``. Read next: find.py.
"""

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from .._models import has_hooks, patched
from ..convert.fold import applied_after
from ..nn import Int8Layer, QuantConv2d, QuantizedLayer, QuantLinear
from ..nn.int8 import MOST_SHIFTED

EXAMPLE = "quant_ops_example"  # key of node.meta: an empty tensor with the shape and the dtype that the example's run has seen

# ---- operators -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Op:
    """What a node computes.

    Attributes:
        kind: "conv2d", "linear", "activation", "add", "mul", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "cat",
            "upsample_nearest2d", "flatten", "slice", "channel_shuffle", "batchnorm", or "same" for what changes no value.
        inputs: the nodes of its tensors.
        numbers: its other arguments, as the steps of a program have them; of an activation its name, of a BatchNorm that of the
            activation that is a part of it, if one is.
        layer: of "conv2d", "linear" and "batchnorm".
        in_place: the operator writes into its first input.
    """

    kind: str
    inputs: tuple[fx.Node, ...]
    numbers: tuple[Any, ...] = ()
    layer: Any = None
    in_place: bool = False


def example_of(node: fx.Node) -> Tensor | None:
    """Shape and dtype of a node's tensor; None if it is no tensor."""
    example: Tensor | None = node.meta.get(EXAMPLE)
    return example


def rank_of(node: fx.Node) -> int:
    """-1 for what is no tensor."""
    example = example_of(node)
    return -1 if example is None else example.dim()


class _Unknown(Exception):
    """Why a node has no operator; the text ends the sentence "the chain stops here: ..."."""


def recognize(node: fx.Node, modules: dict[str, nn.Module]) -> Op | str:
    """The operator of a node, or why there is none."""
    try:
        op = _of_module(node, modules[str(node.target)]) if node.op == "call_module" else _of_function(node)
        for source in op.inputs:
            _expect_plain(source)
        _expect_plain(node)
        return op
    except _Unknown as reason:
        return str(reason)


def _expect_plain(node: fx.Node) -> None:
    example = example_of(node)
    if example is None:
        raise _Unknown(f"{node.name} is no tensor")
    if example.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise _Unknown(f"{node.name} is {example.dtype}, and a chain takes and gives floating tensors of at most 32 bits")


# ---- modules -------------------------------------------------------------------------------------------------------------


def _of_module(node: fx.Node, module: Any) -> Op:
    if len(node.args) != 1 or node.kwargs or not isinstance(node.args[0], fx.Node):
        raise _Unknown(f"{type(module).__name__} with other arguments than one tensor has no int8 operator")
    kind, x = type(module), (node.args[0],)
    if has_hooks(module):
        raise _Unknown("it has hooks, which would see other values")
    if reason := patched(module):
        raise _Unknown(reason)
    if isinstance(module, QuantizedLayer):
        return _of_layer(node, module, x)
    if kind in _MODULES:
        return _MODULES[kind](x, module)
    if isinstance(module, nn.BatchNorm2d) and not any(has_hooks(child) for child in module.children()):
        return _batchnorm_and_activation(x, module)
    raise _Unknown(f"{kind.__name__} has no int8 operator")


def _of_layer(node: fx.Node, layer: QuantizedLayer, x: tuple[fx.Node]) -> Op:
    if type(layer) not in (QuantConv2d, QuantLinear):
        raise _Unknown(f"chains have no operator for {type(layer).__name__}")
    assert isinstance(layer, Int8Layer)
    if layer.input_scale is None:
        raise _Unknown("its input is quantized from the data of every call. Chains need fixed scales: quantize with Int8Static")
    if layer.num_steps > 1:
        raise _Unknown(f"it has scales for {layer.num_steps} steps")
    if layer._weight_shape[1:].numel() > MOST_SHIFTED:
        raise _Unknown("its sums are too long for codes with a zero point, which the values of a chain may have")
    if layer.output_scale is not None:
        raise _Unknown("it has an output_scale of its own. Chains choose the scales between layers themselves")
    if isinstance(layer, QuantLinear):
        if layer.input_multiplier is not None:
            raise _Unknown("its input is multiplied by input_multiplier before it is quantized")
        return Op("linear", x, layer=layer)
    if layer.padding_mode != "zeros":
        raise _Unknown(f"its padding_mode is {layer.padding_mode!r}")
    _expect_images(node, x[0])
    return Op("conv2d", x, layer=layer)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, list | tuple) else (value, value)
    if len(values) != 2 or not all(type(number) is int for number in values):
        raise _Unknown(f"{value!r} is not one size or two")
    return values


def _expect_images(*nodes: fx.Node) -> None:
    for node in nodes:
        if rank_of(node) != 4:
            raise _Unknown(f"{node.name} has {rank_of(node)} dimensions; chains of images have (N, C, H, W)")


def _max_pool2d(
    x: tuple[fx.Node],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> Op:
    _expect_images(*x)
    if return_indices:
        raise _Unknown("its indices are asked for")
    sizes = (kernel_size, kernel_size if stride is None or stride == [] else stride, padding, dilation)
    return Op("max_pool2d", x, (*(number for size in sizes for number in _pair(size)), int(ceil_mode)))


def _avg_pool2d(
    x: tuple[fx.Node],
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Op:
    _expect_images(*x)
    sizes = (kernel_size, kernel_size if stride is None or stride == [] else stride, padding)
    divisor = -1 if divisor_override is None else divisor_override
    numbers = (*(number for size in sizes for number in _pair(size)), int(ceil_mode), int(count_include_pad), divisor)
    return Op("avg_pool2d", x, numbers)


def _adaptive_avg_pool2d(x: tuple[fx.Node], output_size: Any) -> Op:
    _expect_images(*x)
    sizes = tuple(output_size) if isinstance(output_size, list | tuple) else (output_size, output_size)
    sizes = tuple(x[0].meta[EXAMPLE].shape[2 + i] if size is None else size for i, size in enumerate(sizes))
    return Op("adaptive_avg_pool2d", x, _pair(sizes))


def _upsample(
    x: tuple[fx.Node],
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    recompute_scale_factor: Any = None,
    **_: Any,
) -> Op:
    _expect_images(*x)
    if mode != "nearest" or size is not None or scale_factor is None:
        raise _Unknown(f"of interpolations only mode 'nearest' by a scale_factor has an int8 operator, got mode {mode!r}")
    factors = tuple(scale_factor) if isinstance(scale_factor, list | tuple) else (scale_factor, scale_factor)
    if len(factors) != 2 or any(factor != int(factor) or factor < 1 for factor in factors):
        raise _Unknown(f"scale_factor {scale_factor} is no whole number")
    return Op("upsample_nearest2d", x, tuple(int(factor) for factor in factors))


def _flatten(x: tuple[fx.Node], start_dim: int = 0, end_dim: int = -1) -> Op:
    rank = rank_of(x[0])
    if start_dim % max(rank, 1) != 1 or end_dim % max(rank, 1) != rank - 1:
        raise _Unknown("of flattenings only those from dimension 1 to the last have an int8 operator")
    return Op("flatten", x, (1,))


def _channel_shuffle(x: tuple[fx.Node], groups: int) -> Op:
    _expect_images(*x)
    return Op("channel_shuffle", x, (groups,))


def _activation(name: str) -> Callable[[tuple[fx.Node], Any], Op]:
    return lambda x, module: Op("activation", x, (name,), in_place=getattr(module, "inplace", False))


def _hardtanh(x: tuple[fx.Node], least: float, most: float, in_place: bool) -> Op:
    if (least, most) != (0, 6):
        raise _Unknown(f"a clamp to [{least}, {most}] has no int8 operator, only ReLU and ReLU6 have")
    return Op("activation", x, ("relu6",), in_place=in_place)


def _gelu(x: tuple[fx.Node], approximate: str) -> Op:
    return Op("activation", x, ("gelu_tanh" if approximate == "tanh" else "gelu",))


def _batchnorm(x: tuple[fx.Node], module: nn.BatchNorm2d) -> Op:
    if module.running_mean is None:
        raise _Unknown("it has no running statistics: it normalizes with those of each batch")
    return Op("batchnorm", x, layer=module)


def _batchnorm_and_activation(x: tuple[fx.Node], module: nn.BatchNorm2d) -> Op:
    """A subclass that applies its children to the normalized image, as timm's BatchNormAct2d does: at most one activation."""
    op = _batchnorm(x, module)
    children = applied_after(module)
    ops = [_MODULES[type(child)](x, child) if type(child) in _MODULES else None for child in children or ()]
    activations = [found for found in ops if found is None or found.kind != "same"]
    if children is None or len(activations) > 1 or any(found is None or found.kind != "activation" for found in activations):
        raise _Unknown(f"{type(module).__name__} has no int8 operator")
    return dataclasses.replace(op, numbers=tuple(found.numbers[0] for found in activations if found is not None))


_MODULES: dict[type[nn.Module], Callable[[Any, Any], Op]] = {
    nn.ReLU: _activation("relu"),
    nn.ReLU6: _activation("relu6"),
    nn.Hardswish: _activation("hardswish"),
    nn.SiLU: _activation("silu"),
    nn.Sigmoid: _activation("sigmoid"),
    nn.Hardsigmoid: _activation("hardsigmoid"),
    nn.GELU: lambda x, m: _gelu(x, m.approximate),
    nn.Hardtanh: lambda x, m: _hardtanh(x, m.min_val, m.max_val, m.inplace),
    nn.MaxPool2d: lambda x, m: _max_pool2d(x, m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode, m.return_indices),
    nn.AvgPool2d: lambda x, m: _avg_pool2d(
        x, m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad, m.divisor_override
    ),
    nn.AdaptiveAvgPool2d: lambda x, m: _adaptive_avg_pool2d(x, m.output_size),
    nn.Upsample: lambda x, m: _upsample(x, m.size, m.scale_factor, m.mode),
    nn.UpsamplingNearest2d: lambda x, m: _upsample(x, m.size, m.scale_factor, m.mode),
    nn.ChannelShuffle: lambda x, m: _channel_shuffle(x, m.groups),
    nn.Flatten: lambda x, m: _flatten(x, m.start_dim, m.end_dim),
    nn.BatchNorm2d: _batchnorm,
    **dict.fromkeys((nn.Identity, nn.Dropout, nn.Dropout2d), lambda x, m: Op("same", x)),
}


# ---- functions and methods -----------------------------------------------------------------------------------------------


def _of_function(node: fx.Node) -> Op:
    name = node.target if isinstance(node.target, str) else _FUNCTIONS.get(node.target) or _of_torchvision(node.target)
    if name not in _BY_NAME:
        shown = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", node.target)
        raise _Unknown(f"{shown} has no int8 operator")
    parameters, make = _BY_NAME[name]
    if name in ("reshape", "view"):
        return make(node, *node.args, **node.kwargs)
    if len(node.args) > len(parameters):
        raise _Unknown(f"{name} with these arguments has no int8 operator")
    return make(node, **dict(zip(parameters, node.args, strict=False)), **node.kwargs)


def _of_torchvision(function: Any) -> str:
    """Its functions are known by their names, so that the package need not be there."""
    name = getattr(function, "__name__", "")
    return name if name == "stochastic_depth" and function.__module__.startswith("torchvision.") else ""


def _tensors(*values: Any) -> tuple[Any, ...]:
    for value in values:
        if not isinstance(value, fx.Node) or rank_of(value) < 0:
            raise _Unknown(f"it reads {value!r}, no tensor of the graph")
    return values


def _function_activation(name: str, in_place: bool = False) -> Callable[..., Op]:
    def make(node: fx.Node, input: Any, inplace: bool = False) -> Op:
        return Op("activation", _tensors(input), (name,), in_place=in_place or inplace)

    return make


def _add(in_place: bool) -> Callable[..., Op]:
    def make(node: fx.Node, input: Any, other: Any, alpha: float = 1) -> Op:
        a, b = _tensors(input, other)
        if alpha != 1:
            raise _Unknown(f"add with alpha={alpha} has no int8 operator")
        if a.meta[EXAMPLE].shape != b.meta[EXAMPLE].shape:
            raise _Unknown("an addition that broadcasts has no int8 operator")
        return Op("add", (a, b), in_place=in_place)

    return make


def _mul(in_place: bool) -> Callable[..., Op]:
    def make(node: fx.Node, input: Any, other: Any) -> Op:
        a, b = _tensors(input, other)
        shapes = tuple(tuple(factor.meta[EXAMPLE].shape) for factor in (a, b))
        if len(shapes[0]) == 4 and shapes[0] == (*shapes[1][:2], 1, 1):  # the image comes first
            if in_place and shapes[0] != shapes[1]:
                raise _Unknown("a product in place that broadcasts its first factor has no int8 operator")
            a, b = b, a
        elif shapes[0] != shapes[1] and shapes[1] != (*shapes[0][:2], 1, 1):
            raise _Unknown(
                f"of products only those of one shape, or of an image and its channels, have an int8 operator, got {shapes}"
            )
        return Op("mul", (a, b), in_place=in_place)

    return make


def _getitem(node: fx.Node, input: Any, index: Any) -> Op:
    """``x[:, a:b]``"""
    x = _tensors(input)
    _expect_images(*x)
    index = index if isinstance(index, tuple) else (index,)
    channels = index[1] if len(index) > 1 else None
    others = [part for i, part in enumerate(index) if i != 1]
    whole = all(part is Ellipsis or part == slice(None) for part in others)
    if not whole or not isinstance(channels, slice) or Ellipsis in index[:1]:
        raise _Unknown("of indices only x[:, a:b] has an int8 operator")
    if any(type(bound) is not int and bound is not None for bound in (channels.start, channels.stop, channels.step)):
        raise _Unknown("of indices only x[:, a:b] with numbers has an int8 operator")
    start, stop, step = channels.indices(x[0].meta[EXAMPLE].shape[1])
    if step != 1 or stop <= start:
        raise _Unknown("a slice with steps, or without a channel, has no int8 operator")
    return Op("slice", x, (1, start, stop - start))


def _cat(node: fx.Node, tensors: Any, dim: int = 0) -> Op:
    if not isinstance(tensors, list | tuple):
        raise _Unknown("cat of another thing than a list of tensors")
    nodes = _tensors(*tensors)
    _expect_images(*nodes)
    if dim % 4 != 1:
        raise _Unknown("cat along another dimension than the channels has no int8 operator")
    return Op("cat", nodes, (1,))


def _mean(node: fx.Node, input: Any, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Op:
    """Over an image it is a pool; without keepdim the shape (N, C) remains."""
    x = _tensors(input)
    dims = sorted(d % 4 for d in dim) if isinstance(dim, list | tuple) and rank_of(input) == 4 else None
    if dims != [2, 3] or dtype is not None:
        raise _Unknown("of means only those over height and width have an int8 operator")
    return Op("adaptive_avg_pool2d", x, (1, 1)) if keepdim else Op("mean", x)


def _clamp(node: fx.Node, input: Any, min: Any = None, max: Any = None) -> Op:
    x = _tensors(input)
    return Op("activation", x, ("relu",)) if (min, max) == (0, None) else _hardtanh(x, min, max, in_place=False)


def _reshape(node: fx.Node, input: Any, *sizes: Any) -> Op:
    """``x.reshape(x.shape[0], -1)``."""
    x = _tensors(input)
    if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
        sizes = tuple(sizes[0])
    if len(sizes) != 2 or sizes[1] != -1 or not _is_batch_size(sizes[0], input) or rank_of(input) < 2:
        raise _Unknown("of reshapes only x.reshape(x.shape[0], -1) has an int8 operator")
    return Op("flatten", x, (1,))


def _is_batch_size(value: Any, x: fx.Node) -> bool:
    """Whether a node is ``x.size(0)``, ``x.shape[0]`` or ``x.size()[0]``."""
    if not isinstance(value, fx.Node):
        return False
    if value.op == "call_method" and value.target == "size":
        return value.args == (x, 0)
    if value.target is not operator.getitem or value.args[1] != 0 or not isinstance(value.args[0], fx.Node):
        return False
    shape = value.args[0]
    return shape.args == (x, "shape") if shape.target is getattr else shape.target == "size" and shape.args == (x,)


def _dropout(node: fx.Node, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Op:
    if training:
        raise _Unknown("dropout with training=True has no int8 operator")
    return Op("same", _tensors(input))


def _stochastic_depth(node: fx.Node, input: Any, p: float, mode: str, training: bool = True) -> Op:
    return _dropout(node, input, p, training)


def _pool(make: Callable[..., Op]) -> Callable[..., Op]:
    return lambda _, input, **arguments: make(_tensors(input), **arguments)


_X = ("input",)
_FUNCTIONS_IN_PLACE = ("relu", "relu6", "hardswish", "silu", "hardsigmoid")  # that take an argument ``inplace``
_POOL = ("input", "kernel_size", "stride", "padding")
_BY_NAME: dict[str, tuple[Sequence[str], Callable[..., Op]]] = {
    **{name: ((*_X, "inplace"), _function_activation(name)) for name in _FUNCTIONS_IN_PLACE},
    "sigmoid": (_X, _function_activation("sigmoid")),
    "relu_": (_X, _function_activation("relu", in_place=True)),
    "gelu": ((*_X, "approximate"), lambda node, input, approximate="none": _gelu(_tensors(input), approximate)),
    "hardtanh": (
        (*_X, "min_val", "max_val", "inplace"),
        lambda node, input, min_val=-1.0, max_val=1.0, inplace=False: _hardtanh(_tensors(input), min_val, max_val, inplace),
    ),
    "clamp": ((*_X, "min", "max"), _clamp),
    "add": ((*_X, "other"), _add(in_place=False)),
    "add_": ((*_X, "other"), _add(in_place=True)),
    "mul": ((*_X, "other"), _mul(in_place=False)),
    "mul_": ((*_X, "other"), _mul(in_place=True)),
    "max_pool2d": ((*_POOL, "dilation", "ceil_mode", "return_indices"), _pool(_max_pool2d)),
    "avg_pool2d": ((*_POOL, "ceil_mode", "count_include_pad", "divisor_override"), _pool(_avg_pool2d)),
    "adaptive_avg_pool2d": ((*_X, "output_size"), _pool(_adaptive_avg_pool2d)),
    "interpolate": ((*_X, "size", "scale_factor", "mode"), _pool(_upsample)),
    "flatten": ((*_X, "start_dim", "end_dim"), _pool(_flatten)),
    "mean": ((*_X, "dim", "keepdim"), _mean),
    "cat": (("tensors", "dim"), _cat),
    "getitem": (("input", "index"), _getitem),
    "channel_shuffle": ((*_X, "groups"), lambda node, input, groups: _channel_shuffle(_tensors(input), groups)),
    **dict.fromkeys(("reshape", "view"), ((), _reshape)),
    "dropout": ((*_X, "p", "training", "inplace"), _dropout),
    "stochastic_depth": ((*_X, "p", "mode", "training"), _stochastic_depth),
    "contiguous": (_X, lambda node, input, memory_format=None: Op("same", _tensors(input))),
}
_FUNCTIONS: dict[Any, str] = {
    **dict.fromkeys((torch.relu, F.relu), "relu"),
    **dict.fromkeys((torch.relu_, F.relu_), "relu_"),
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.silu: "silu",
    **dict.fromkeys((torch.sigmoid, F.sigmoid), "sigmoid"),
    F.hardsigmoid: "hardsigmoid",
    F.gelu: "gelu",
    F.hardtanh: "hardtanh",
    torch.clamp: "clamp",
    **dict.fromkeys((operator.add, torch.add), "add"),
    operator.iadd: "add_",
    **dict.fromkeys((operator.mul, torch.mul, torch.multiply), "mul"),
    operator.imul: "mul_",
    **dict.fromkeys((torch.max_pool2d, F.max_pool2d), "max_pool2d"),
    F.avg_pool2d: "avg_pool2d",
    F.adaptive_avg_pool2d: "adaptive_avg_pool2d",
    F.interpolate: "interpolate",
    torch.flatten: "flatten",
    operator.getitem: "getitem",
    **dict.fromkeys((torch.channel_shuffle, F.channel_shuffle), "channel_shuffle"),
    torch.mean: "mean",
    **dict.fromkeys((torch.cat, torch.concat, torch.concatenate), "cat"),
    torch.reshape: "reshape",
    F.dropout: "dropout",
}
