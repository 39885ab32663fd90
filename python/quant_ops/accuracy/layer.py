"""GPTQ of one layer, from the Hessian of its inputs to the quantized layer. Read first: solver.py; next: gptq_run.py."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.config import Int8Dynamic, Int8Static, Scheme, WeightOnly
from ..convert.prepared import choose_weight_scale, to_int8, to_weight_only
from ..nn import as_linear
from ..nn.groups import code_range, group_parameters
from ..ops import choose_qparams
from .hessian import Hessian, as_matrices, sum_dtype
from .solver import Grid, Solution, inverse_factor, nearest, permuted_hessian, relative_errors, solve


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of :func:`gptq_`, which documents them."""

    block_size: int
    damping: float
    act_order: bool
    order: str


def grid_of(layer: nn.Module, config: Scheme) -> Grid:
    """The values that the weight of the layer's quantized form may have."""
    columns = max(1, as_matrices(layer).shape[2])
    if isinstance(config, WeightOnly):
        given = config.settings()
        bits, asymmetric, zero_point = given["bits"], given["asymmetric"], given.get("zero_point", "int")
        low, high = code_range(bits, asymmetric)
        size = columns if config.group_size == -1 else config.group_size
        return Grid(size, low, high, lambda values: group_parameters(values, bits, asymmetric, zero_point))
    assert isinstance(config, Int8Dynamic | Int8Static)
    scheme, qmax = config, 2 ** (config.weight_bits - 1) - 1

    def parameters(values: Tensor) -> tuple[Tensor, None]:
        chosen = choose_weight_scale(values, scheme)
        return choose_qparams(values, [1], -qmax, qmax)[0] if chosen is None else chosen[:, None], None

    return Grid(columns, -qmax, qmax, parameters)


@dataclasses.dataclass
class Solved:
    """A layer's codes and parameters, and what there is to say of it.

    Attributes:
        tensors: ``codes``, ``weight_scale``, perhaps ``weight_zero_point``, ``input_scale`` and ``input_zero_point``, as
            ``from_float`` takes them; none if no data has reached the layer.
        errors: see :class:`GPTQResult`.
    """

    tensors: dict[str, Tensor]
    errors: tuple[float, float] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def solved(layer: nn.Module, config: Scheme, hessian: Hessian, factor: "Factor", settings: Settings) -> Solved:
    """GPTQ of one layer with the Hessian of its inputs."""
    grid, dtype = grid_of(layer, config), sum_dtype(hessian.matrix.device)
    weight = as_matrices(layer).to(dtype)
    live = weight.masked_fill(factor.dead[:, None], 0)
    solution = solve(live.clone(), factor.upper, grid, settings.block_size, factor.order)
    rounded = nearest(as_matrices(layer).float(), grid)
    errors = relative_errors(weight, [one.values(grid, dtype) for one in (solution, rounded)], hessian.matrix)
    notes = []
    if dead := int(factor.dead.sum()):
        notes.append(f"{dead} of its {factor.dead.numel()} inputs were always zero: weights 0")
    if hessian.rows < weight.shape[2]:
        notes.append(f"{hessian.rows} rows of data are few for its {weight.shape[2]} inputs")
    if factor.damping != settings.damping:
        notes.append(f"damping {factor.damping:g} was needed")
    return Solved(_as_given(layer, solution), (errors[0], errors[1]), notes)


def _as_given(layer: nn.Module, solution: Solution) -> dict[str, Tensor]:
    linear: Any = as_linear(layer)
    shape = linear.weight.shape
    per_group = (shape[0], -1) if len(shape) == 2 else (shape[0],)
    tensors = {"codes": solution.codes.reshape(shape), "weight_scale": solution.scale.reshape(per_group)}
    if solution.zero_point is not None:
        tensors["weight_zero_point"] = solution.zero_point.reshape(per_group)
    return tensors


class Factor:
    """What layers of one Hessian have in common."""

    def __init__(self, name: str, hessian: Hessian, settings: Settings) -> None:
        matrix = hessian.matrix
        diagonal = matrix.diagonal(dim1=1, dim2=2)
        if not torch.isfinite(diagonal).all():
            raise ValueError(
                f"quant_ops.gptq_: expected finite activations, got NaN or Inf at the input of layer {name!r}. Mend the data or "
                "the model, or exclude the layer."
            )
        self.dead = diagonal == 0
        self.order = torch.argsort(diagonal, dim=1, descending=True, stable=True) if settings.act_order else None
        found = inverse_factor(matrix if self.order is None else permuted_hessian(matrix, self.order), settings.damping)
        if found is None:
            raise ValueError(
                f"quant_ops.gptq_: expected the Hessian of layer {name!r} to be positive, got one that is not, even with damping "
                "below 10. Its inputs span too many orders of magnitude: exclude the layer."
            )
        self.upper, self.damping = found[0].to(matrix.dtype), found[1]


def made_layer(layer: nn.Module, config: Scheme, one: Solved) -> nn.Module:
    """The quantized layer of a float one, with the codes that were found, or else the nearest."""
    given: dict[str, Any] = dict(one.tensors)
    if isinstance(config, WeightOnly):
        return to_weight_only(layer, config, **given)
    assert isinstance(config, Int8Dynamic | Int8Static)
    if "weight_scale" in given:
        given["weight_scale"] = given["weight_scale"].flatten()
    return to_int8(layer, config, **given)


# ---- in a checkpoint -------------------------------------------------------------------------------------------------


def for_checkpoint(layers: Mapping[str, Solved]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Layers as tensors, and as what JSON can hold."""
    tensors = {f"{name}/{key}": tensor for name, one in layers.items() for key, tensor in one.tensors.items()}
    return tensors, {name: {"errors": one.errors, "notes": one.notes} for name, one in layers.items()}


def from_checkpoint(tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> dict[str, Solved]:
    """What :func:`for_checkpoint` was given."""
    layers = {name: Solved({}, said["errors"] and tuple(said["errors"]), list(said["notes"])) for name, said in notes.items()}
    for name, tensor in tensors.items():
        layer, _, key = name.rpartition("/")
        layers[layer].tensors[key] = tensor
    return layers
