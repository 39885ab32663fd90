"""DTensors: in the quantize family a slice that shares a scale has to lie in one process; what is split is gathered first.

So the results are those of one process, bit for bit. They are sharded like the tensor; a scale or zero point is sharded with it
where it has one element for every index, and replicated elsewhere. With stochastic rounding an element's random bits depend on its
index in the whole tensor, which is gathered; the seed is that of the mesh's first process. The weight-only operators compute rows
of x, or indices, where they lie, with a weight that every process has whole. torch.distributed.tensor takes a second to import: the
rules are registered when the first DTensor comes, which DTensor itself refuses (``_register.call``).
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_ops = torch.ops.quant_ops
_STOCHASTIC = 3  # as ROUNDINGS of quantize_float.py numbers it


def register_rules() -> bool:
    """Registers the rules if DTensors are in use and there were none yet. Returns whether there are new ones."""
    if not _WAITING or "torch.distributed.tensor" not in sys.modules:
        return False
    from torch.distributed.tensor import DTensor

    while _WAITING:
        name, (dims, results) = _WAITING.popitem()
        torch.library.register_torch_dispatch(f"quant_ops::{name}", DTensor, _rule(name, dims, results))
    return True


def _rule(name: str, dims: Callable[..., Sequence[int]], results: Callable[..., Any]) -> Callable[..., Any]:
    """``dims`` are those along which the first argument that may be sharded may be; ``results`` the shape of each and whose
    placements it has."""
    schema = getattr(_ops, name).default._schema.arguments
    first = next(argument.name for argument in schema if argument.name in ("tensor", "x", "indices"))

    def run(cls: Any, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        from torch.distributed.tensor import DTensor

        named = {argument.name: argument.default_value for argument in schema}
        named |= dict(zip(named, args, strict=False)) | (kwargs or {})
        mesh = next(t for t in named.values() if isinstance(t, DTensor)).device_mesh
        if isinstance(named.get("seed"), Tensor) and not isinstance(named["seed"], DTensor):
            named["seed"] = _seed_of_first_process(named["seed"], mesh)
        tensors: dict[str, Any] = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        if plain := [key for key, value in tensors.items() if not isinstance(value, DTensor)]:
            raise TypeError(
                f"quant_ops.{name}: expected all tensors to be DTensors, got plain {plain}. Use distribute_tensor, with "
                "Replicate() for a scale that every process has."
            )
        tensor = tensors[first]
        mesh, allowed = tensor.device_mesh, dims(**named)

        where = {key: _placements(value, tensor, () if key in _WHOLE else allowed) for key, value in tensors.items()}
        local = {key: value.redistribute(mesh, where[key]).to_local() for key, value in tensors.items()}
        given = named | local
        found = func(
            *(given[argument.name] for argument in schema if not argument.kwarg_only),
            **{argument.name: given[argument.name] for argument in schema if argument.kwarg_only},
        )
        wrapped = [
            DTensor.from_local(
                result,
                mesh,
                where[like],
                run_check=False,
                shape=torch.Size(shape),
                stride=torch.empty(shape, device="meta").stride(),
            )
            for result, (shape, like) in zip(found if isinstance(found, tuple | list) else [found], results(**named), strict=True)
        ]
        return tuple(wrapped) if isinstance(found, tuple | list) else wrapped[0]

    return run


# arguments of one element whatever the tensor's shape, those of a weight, and of columns that are summed over
_WHOLE = ("seed", "tensor_scale", "weight", "weight_scale", "weight_zero_point", "bias", "packed_weight", "x_multiplier")


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


# operators whose rules are not registered yet
_WAITING: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "choose_qparams": (
        _outside,
        lambda tensor, dim, **_: [
            ([1 if d in _reduced(tensor, dim) else n for d, n in enumerate(tensor.shape)], "tensor") for _ in range(2)
        ],
    ),
    "quantize_rows": (
        lambda x, **_: range(x.dim() - 1),
        lambda x, **_: [(x.shape, "x"), ((*x.shape[:-1], 1), "x"), ((*x.shape[:-1], 1), "x")],
    ),
    "weight_only_linear": (
        lambda x, **_: range(x.dim() - 1),
        lambda x, weight, **_: [((*x.shape[:-1], weight.shape[0]), "x")],
    ),
    "weight_only_embedding": (
        lambda indices, **_: range(indices.dim()),
        lambda indices, weight, **_: [((*indices.shape, weight.shape[1]), "indices")],
    ),
    "quant_tensor_forward": (_all, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "dequant_tensor": (_all, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_float_forward": (_format_dims, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_float_backward": (_format_dims, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_block_forward": (_outside_blocks, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_block_backward": (_outside_blocks, lambda tensor, **_: [(tensor.shape, "tensor")]),
    "quant_tensor_backward": (
        _whole_sums,
        lambda tensor, scale, zero_point, **_: [
            (tensor.shape, "tensor"),
            (scale.shape, "scale"),
            (scale.shape, "scale") if zero_point is None else (zero_point.shape, "zero_point"),
        ],
    ),
}
