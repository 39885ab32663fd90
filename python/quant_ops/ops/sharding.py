"""DTensors: where the parts of an operator's arguments can be computed apart, they are; what cannot is gathered first.

So the results are those of one process, bit for bit. In the quantize family a slice that shares a scale has to lie in one process.
Results are sharded like the tensor; a scale or zero point is sharded with it where it has one element for every index, and
replicated elsewhere. With stochastic rounding an element's random bits depend on its index in the whole tensor, which is gathered;
the seed is that of the mesh's first process.

A product is computed where rows of x lie, with the whole weight; else, if the weight's rows (output channels) are sharded and it is
not packed, where those lie, and the result is sharded by channels; else, if both are sharded along K and the result is int32, its
sums are partial. A packed weight is opaque and stays whole. Other operators gather. torch.distributed.tensor takes a second to
import: the rules are registered when the first DTensor comes, which DTensor itself refuses (``_register.call``).
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.quant_ops
_STOCHASTIC = 3  # as ROUNDINGS of quantize_float.py numbers it

# Of an operator's arguments by name: where each tensor has to lie, and the shape of each result with where it lies. A shape of None
# is that of the result itself, which every process has whole.
_Plan = tuple[dict[str, list[Any]], list[tuple[Sequence[int] | None, list[Any]]]]


def register_rules() -> bool:
    """Registers the rules if DTensors are in use and there were none yet. Returns whether there are new ones."""
    if not _WAITING or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    while _WAITING:
        name, plan = _WAITING.popitem()
        torch.library.register_torch_dispatch(f"quant_ops::{name}", DTensor, _rule(name, plan))
    return True


def _rule(name: str, plan: Callable[[dict[str, Any]], _Plan]) -> Callable[..., Any]:
    schema = getattr(_ops, name).default._schema.arguments

    def run(cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        from torch.distributed.tensor import DTensor

        named = {argument.name: argument.default_value for argument in schema}
        named |= dict(zip(named, args, strict=False)) | (kwargs or {})
        values = [one for value in named.values() for one in (value if isinstance(value, list | tuple) else [value])]
        mesh = next(t for t in values if isinstance(t, DTensor)).device_mesh
        if isinstance(named.get("seed"), Tensor) and not isinstance(named["seed"], DTensor):
            named["seed"] = _seed_of_first_process(named["seed"], mesh)
        lists = {
            key: value for key, value in named.items() if isinstance(value, list | tuple) and isinstance((*value, 0)[0], Tensor)
        }
        named |= {f"{key}[{i}]": one for key, value in lists.items() for i, one in enumerate(value)}
        tensors: dict[str, Any] = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if plain := [key for key, value in tensors.items() if not isinstance(value, DTensor)]:
            raise TypeError(
                f"quant_ops.{name}: expected all tensors to be DTensors, got plain {plain}. Use distribute_tensor, with "
                "Replicate() for a scale that every process has."
            )
        where, results = plan(named)
        given = named | {key: value.redistribute(mesh, where[key]).to_local() for key, value in tensors.items()}
        given |= {key: [given[f"{key}[{i}]"] for i in range(len(value))] for key, value in lists.items()}
        found = func(
            *(given[argument.name] for argument in schema if not argument.kwarg_only),
            **{argument.name: given[argument.name] for argument in schema if argument.kwarg_only},
        )
        several = isinstance(found, tuple | list)
        wrapped = [_wrapped(one, mesh, *of) for one, of in zip(found if several else [found], results, strict=True)]
        return tuple(wrapped) if several else wrapped[0]

    return run


def _wrapped(result: Tensor, mesh: Any, shape: Sequence[int] | None, placements: list[Any]) -> Any:
    from torch.distributed.tensor import DTensor

    last = result.dim() == 4 and not result.is_contiguous() and result.is_contiguous(memory_format=torch.channels_last)
    memory_format = torch.channels_last if last else torch.contiguous_format
    whole = torch.empty(result.shape if shape is None else tuple(shape), device="meta", memory_format=memory_format)
    return DTensor.from_local(result, mesh, placements, run_check=False, shape=whole.shape, stride=whole.stride())


# ---- operators whose results follow one tensor -------------------------------------------------------------------------

_WHOLE = ("seed", "tensor_scale", "weight", "weight_scale", "weight_zero_point", "packed_weight")


def _follow(dims: Callable[..., Sequence[int]], results: Callable[..., Any]) -> Callable[[dict[str, Any]], _Plan]:
    """``dims`` are those along which the first argument that may be sharded may be; ``results`` the shape of each and whose
    placements it has. Arguments of one element whatever the tensor's shape, and a weight, are whole."""

    def plan(named: dict[str, Any]) -> _Plan:
        tensor, allowed = next(named[key] for key in named if key in ("tensor", "x", "a", "indices")), dims(**named)
        where = {
            key: _placements(value, tensor, () if key in _WHOLE else allowed)
            for key, value in named.items()
            if isinstance(value, Tensor)
        }
        return where, [(shape, where[like]) for shape, like in results(**named)]

    return plan


def _gather(count: int = 1) -> Callable[[dict[str, Any]], _Plan]:
    """Every process computes all of ``count`` results."""

    def plan(named: dict[str, Any]) -> _Plan:
        from torch.distributed.tensor import Replicate

        tensors: dict[str, Any] = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        whole = [Replicate()] * next(iter(tensors.values())).device_mesh.ndim
        return dict.fromkeys(tensors, whole), [(None, whole)] * count

    return plan


def _seed_of_first_process(seed: Tensor, mesh: Any) -> Tensor:
    """Each process may have drawn another one."""
    from torch.distributed.tensor import DTensor, Replicate

    made: Tensor = DTensor.from_local(seed.to(mesh.device_type), mesh, [Replicate()] * mesh.ndim, run_check=True)
    return made


def _placements(of: Any, tensor: Any, allowed: Sequence[int]) -> list[Any]:
    """Where ``of``, which broadcasts to the tensor, lies: along with the tensor, in the dimensions where that may be sharded."""
    from torch.distributed.tensor import Replicate, Shard

    made: list[Any] = []
    for placed in tensor.placements:
        sharded = type(placed) is Shard and placed.dim in allowed
        own = placed.dim - tensor.dim() + of.dim() if sharded else -1
        made.append(Shard(own) if own >= 0 and (of.shape[own] > 1 or of.shape == tensor.shape) else Replicate())
    return made


def _reduced(tensor: Tensor, dim: Sequence[int]) -> set[int]:
    return {d % tensor.dim() for d in dim} or set(range(tensor.dim()))


def _outside(tensor: Tensor, dim: Sequence[int], **_: Any) -> list[int]:
    reduced = _reduced(tensor, dim)
    return [d for d in range(tensor.dim()) if d not in reduced]


def _all(tensor: Tensor, block_size: Sequence[int] | None = None, **_: Any) -> Sequence[int]:
    return range(tensor.dim()) if block_size is None else ()


def _format_dims(tensor: Tensor, block_size: Sequence[int] | None, rounding: int = 0, **_: Any) -> Sequence[int]:
    return () if rounding == _STOCHASTIC else _all(tensor, block_size)


def _outside_blocks(tensor: Tensor, dim: int, rounding: int = 0, **_: Any) -> Sequence[int]:
    return () if rounding == _STOCHASTIC else [d for d in range(tensor.dim()) if d not in (dim, dim + tensor.dim())]


def _whole_sums(tensor: Tensor, scale: Tensor, zero_point: Tensor | None, block_size: Sequence[int] | None, **_: Any) -> list[int]:
    """Where every element of the scale and the zero point belongs to one process, so that no sum is split."""
    parameters = [scale, *([] if zero_point is None else [zero_point])]
    return [
        d for d in _all(tensor, block_size) if all(p.dim() >= (back := tensor.dim() - d) and p.shape[-back] > 1 for p in parameters)
    ]


# ---- products ----------------------------------------------------------------------------------------------------------

_COLUMNS = ("weight_scale", "weight_zero_point", "bias")  # a first element, or row, for every output channel
_ROWS = ("x_scale", "x_zero_point")


def _product(
    x: str, weight: str, rows: Callable[[Any], Sequence[int]], channel: int, adds: Callable[..., bool], shape: Callable[..., Any]
) -> Callable[[dict[str, Any]], _Plan]:
    """Of the operator whose arguments of these names are multiplied.

    Args:
        rows: the dimensions of x whose indices are computed apart, dimensions of the result too.
        channel: dimension of the channels, from the end, in x (K) and in the result (N).
        adds: whether results of parts of K add up to the whole one.
        shape: of the result.
    """

    def plan(named: dict[str, Any]) -> _Plan:
        from torch.distributed.tensor import Partial, Replicate, Shard

        tensors: dict[str, Any] = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        made, n = shape(**named), named[weight].shape[0]
        where: dict[str, list[Any]] = {key: [] for key in tensors}
        result: list[Any] = []
        for px, pw in zip(tensors[x].placements, tensors[weight].placements, strict=True):
            wanted: dict[str, Any] = {}
            at: Any = Replicate()
            by_row = type(px) is Shard and px.dim in rows(tensors[x])
            whole_weight = named.get("packed_weight") is not None or named.get("groups", 1) != 1
            split = type(px) is Shard and px.dim == tensors[x].dim() + channel and type(pw) is Shard and pw.dim == 1
            if by_row:
                wanted, at = _row_parts(px, x, tensors) | {"residual": px}, px
            elif type(pw) is Shard and pw.dim == 0 and not whole_weight:
                at = Shard(len(made) + channel)
                wanted = _column_parts(weight, tensors, n) | {"residual": at}
            elif split and not whole_weight and adds(**named):
                wanted, at = {x: px, weight: pw, "x_multiplier": Shard(0)}, Partial()
            for key, placements in where.items():
                placements.append(wanted.get(key, Replicate()))
            result.append(at)
        return where, [(made, result)]

    return plan


def _row_parts(px: Any, x: str, tensors: dict[str, Any]) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    wanted = {x: px}
    for key in _ROWS:
        if (
            key in tensors and tensors[key].numel() > 1
        ):  # one value a row; of shape (..., 1) or (N, 1, 1, 1), as many dimensions as x
            wanted[key] = Shard(px.dim)
    return wanted


def _column_parts(weight: str, tensors: dict[str, Any], n: int) -> dict[str, Any]:
    from torch.distributed.tensor import Shard

    cut = [key for key in _COLUMNS if key in tensors and tensors[key].dim() > 0 and tensors[key].shape[0] == n > 1]
    return dict.fromkeys((weight, *cut), Shard(0))


def _linear_shape(x: Tensor, weight: Tensor, **_: Any) -> Sequence[int]:
    return *x.shape[:-1], weight.shape[0]


def _conv2d_shape(
    x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], **_: Any
) -> Sequence[int]:
    sides = padding if len(padding) == 4 else (padding[0], padding[0], padding[-1], padding[-1])
    reach = (
        x.shape[d - 2] + sides[2 * d] + sides[2 * d + 1] - dilation[-1 if d else 0] * (weight.shape[2 + d] - 1) - 1 for d in (0, 1)
    )
    return *x.shape[:-3], weight.shape[0], *(size // stride[-1 if d else 0] + 1 for d, size in enumerate(reach))


def _pool_shape(
    x: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    dilation: Sequence[int] = (1,),
    **_: Any,
) -> list[Any]:
    from quant_ops.ops.codes import pooled_shape  # which needs this module to be there

    return [(pooled_shape(x, kernel_size, stride, padding, dilation, ceil_mode), "x")]


def _planes(x: Tensor, **_: Any) -> Sequence[int]:
    return range(x.dim() - 2)


def _sums_of_given_codes(x_scale: Tensor | None, out_dtype: Any, **_: Any) -> bool:
    return out_dtype == torch.int32 and x_scale is not None


def _chain(named: dict[str, Any]) -> _Plan:
    """Every process computes all results of an int8_chain."""
    from quant_ops.ops.program import Program

    return _gather(len(Program.decode(named["program"]).outputs))(named)


# operators whose rules are not registered yet
_WAITING: dict[str, Callable[[dict[str, Any]], _Plan]] = {
    "choose_qparams": _follow(
        _outside,
        lambda tensor, dim, **_: [
            ([1 if d in _reduced(tensor, dim) else n for d, n in enumerate(tensor.shape)], "tensor") for _ in range(2)
        ],
    ),
    "quantize_rows": _follow(
        lambda x, **_: range(x.dim() - 1),
        lambda x, **_: [(x.shape, "x"), ((*x.shape[:-1], 1), "x"), ((*x.shape[:-1], 1), "x")],
    ),
    "norm_quantize_rows": _follow(
        lambda x, **_: range(x.dim() - 1),
        lambda x, **_: [(x.shape, "x"), ((*x.shape[:-1], 1), "x"), ((*x.shape[:-1], 1), "x")],
    ),
    "weight_only_embedding": _follow(
        lambda indices, **_: range(indices.dim()),
        lambda indices, weight, **_: [((*indices.shape, weight.shape[1]), "indices")],
    ),
    "quant_tensor_forward": _follow(_all, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "dequant_tensor": _follow(_all, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_float_forward": _follow(_format_dims, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_float_backward": _follow(_format_dims, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_block_forward": _follow(_outside_blocks, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_block_backward": _follow(_outside_blocks, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_tensor_backward": _follow(
        _whole_sums,
        lambda tensor, scale, zero_point, **_: [
            (tensor.shape, "tensor"),
            (scale.shape, "scale"),
            (scale.shape, "scale") if zero_point is None else (zero_point.shape, "zero_point"),
        ],
    ),
    "int8_gemm": _product("a", "b", lambda a: [0], -1, lambda **_: True, lambda a, b: (a.shape[0], b.shape[0])),
    "int8_linear": _product("x", "weight", lambda x: range(x.dim() - 1), -1, _sums_of_given_codes, _linear_shape),
    "int8_conv2d": _product("x", "weight", lambda x: range(x.dim() - 3), -3, _sums_of_given_codes, _conv2d_shape),
    "weight_only_linear": _product("x", "weight", lambda x: range(x.dim() - 1), -1, lambda **_: False, _linear_shape),
    "requantize": _follow(lambda x, **_: range(x.dim()), lambda x, **_: [(x.shape, "x")]),
    "int8_add": _follow(lambda a, **_: range(a.dim()), lambda a, **_: [(a.shape, "a")]),
    "int8_mul": _follow(lambda a, **_: range(a.dim()), lambda a, **_: [(a.shape, "a")]),
    "int8_cat": _gather(),
    "int8_max_pool2d": _follow(_planes, _pool_shape),
    "int8_avg_pool2d": _follow(_planes, _pool_shape),
    "int8_adaptive_avg_pool2d": _follow(
        _planes, lambda x, output_size, **_: [((*x.shape[:-2], output_size[0], output_size[-1]), "x")]
    ),
    "int8_upsample_nearest2d": _follow(
        _planes,
        lambda x, scale_factor, **_: [((*x.shape[:-2], x.shape[-2] * scale_factor[0], x.shape[-1] * scale_factor[-1]), "x")],
    ),
    "int8_chain": _chain,
    "int8_attention": _gather(),
    "pack_weight": _gather(),
    "unpack_weight": _gather(),
    "pack_weight_only": _gather(),
    "unpack_weight_only": _gather(),
    "choose_qparams_affine": _gather(2),
    "quantize_affine": _gather(),
    "dequantize_affine": _gather(),
}
