"""Divides the channels of a tensor by s and multiplies the weights that read it: the model's function stays the same.

    foldable     gain' = gain / s, bias' = bias / s in the producer        W' = W * s in every layer of the group
    otherwise    m = 1 / s in every layer, which computes W' (x * m)       W' = W / m

Read first: consumers.py, which finds groups and producers.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..convert.select import Places, replace_
from ..nn import ScaledLinear, as_linear
from .consumers import Group, weight_of
from .watch import Producer

_log = logging.getLogger("quant_ops")
_LEAST = 2.0**-0.5  # how much a rounded gain may miss the quotient; beyond, a low precision holds 1 + weight too coarsely


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: float64 for float64, else float32."""
    return torch.promote_types(dtype, torch.float32)


def scaled_weight(layer: nn.Module, scale: Tensor) -> Tensor:
    """W * s of a Linear layer, (outputs, inputs), in the weight's dtype."""
    weight = weight_of(layer)
    return (weight.to(precise(weight.dtype)) * scale.to(weight.device, precise(weight.dtype))).to(weight.dtype)


def column_magnitudes(layers: list[nn.Module]) -> Tensor:
    """(K,): the largest magnitude in each column of the weights of all layers."""
    first = weight_of(layers[0])
    return torch.stack([weight_of(layer).abs().amax(0).to(first.device, torch.float64) for layer in layers]).amax(0)


def assign_(module: nn.Module, name: str, value: Tensor) -> None:
    """Writes a parameter, which stays the same object; one of inference mode, which takes no writes, is replaced."""
    parameter = module._parameters[name]
    assert parameter is not None
    if parameter.is_inference():
        module._parameters[name] = nn.Parameter(value.to(parameter.dtype), parameter.requires_grad)
    else:
        parameter.data.copy_(value)


@dataclasses.dataclass
class Fold:
    """The new parameters of a producer, and the scale that their rounded values have: what the layers have to be multiplied by."""

    values: dict[str, Tensor]
    scale: Tensor


def _fold(producer: Producer, scale: Tensor) -> Fold | str:
    """Computed in float64. A gain is rounded once, and the scale follows from the rounded one; or why it cannot be folded."""
    module = producer.module
    old = {name: module.get_parameter(name).detach() for name in (producer.weight, producer.bias) if name is not None}
    weight = old[producer.weight]
    if weight.dim() == 2:  # a Linear, whose rows are the channels
        linear = as_linear(module)
        rows = (weight_of(module).double() / scale[:, None]).to(weight.dtype)
        values = {producer.weight: rows if linear is module else rows.t()}
    else:
        gain = producer.offset + weight.double()
        values = {producer.weight: (gain / scale - producer.offset).to(weight.dtype)}
        made = producer.offset + values[producer.weight].double()
        ratio = torch.where(gain == 0, scale, gain / made)
        near = (ratio / scale).nan_to_num(0.0, 0.0, 0.0)
        if not ((near > _LEAST) & (near < 1 / _LEAST)).all():
            return f"{weight.dtype} cannot hold the weight of {producer.name!r} divided by the scale"
        scale = ratio
    if producer.bias is not None:
        values[producer.bias] = (old[producer.bias].double() / scale).to(weight.dtype)
    if not all(value.isfinite().all() for value in values.values()):
        return f"{weight.dtype} cannot hold the weight of {producer.name!r} divided by the scale"
    return Fold(values, scale)


def fold_(group: Group, scale: Tensor) -> Tensor | str:
    """Folds s (K,) into the producer of a group and multiplies the group's weights, in place; all of it or nothing.

    Returns:
        The scale as rounded values have it, (K,) float64; or why there was nowhere to fold it, in which case nothing was changed.
    """
    if (producer := group.producer) is None:
        return group.reason
    device = producer.module.get_parameter(producer.weight).device
    fold = _fold(producer, scale.to(device, torch.float64))
    if isinstance(fold, str):
        return fold
    weights = [scaled_weight(layer, fold.scale) for layer in group.layers]
    if not all(weight.isfinite().all() for weight in weights):
        return f"{weights[0].dtype} cannot hold the weights times the scale"
    for layer, weight in zip(group.layers, weights, strict=True):
        assign_(layer, "weight", weight if as_linear(layer) is layer else weight.t())
    for name, value in fold.values.items():
        assign_(producer.module, name, value)
    return fold.scale


@dataclasses.dataclass
class Rescaled:
    """What :func:`rescale_` has done.

    Attributes:
        folded: name of a producer, and the layers that read its output.
        multiplied: names of layers that read one tensor and multiply it themselves, and why nothing else could.
        scales: of every layer, (K,) float32 on the CPU, as rounded values have it.
    """

    folded: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    multiplied: list[tuple[list[str], str]] = dataclasses.field(default_factory=list)
    scales: dict[str, Tensor] = dataclasses.field(default_factory=dict)


def rescale_(
    model: nn.Module,
    groups: Sequence[Group],
    scale_of: Callable[[Group], Tensor | None],
    places: Mapping[nn.Module, Places],
) -> Rescaled:
    """Divides what the layers of each group read by its scale (K,), in place; a group with the scale None stays as it is.

    The last group is the first, so that a Linear layer which a scale is folded into has its new rows when it gets a scale itself.
    Whenever this is interrupted the model computes what it did.
    """
    done, multiplied = Rescaled(), dict[nn.Module, Tensor]()
    try:
        for group in reversed(groups):
            if (scale := scale_of(group)) is None:
                continue
            found = fold_(group, scale)
            if isinstance(found, str):
                multiplied |= dict.fromkeys(group.layers, scale)
                done.multiplied.insert(0, (group.names, found))
            else:
                assert group.producer is not None
                scale = found
                done.folded.insert(0, (group.producer.name, group.names))
            done.scales |= dict.fromkeys(group.names, scale.float().cpu())
        replace_(model, {layer: places[layer] for layer in multiplied}, lambda layer, _: _multiplying(layer, multiplied[layer]))
    except BaseException:
        names = [name for name, _ in done.folded]
        _log.warning("quant_ops: interrupted; scales were folded into %s, which changes no output of the model", names)
        raise
    return done


def _multiplying(layer: nn.Module, scale: Tensor) -> nn.Module:
    """The ScaledLinear of a layer, whose weight is multiplied by what the rounded multiplier is the inverse of."""
    multiplier = scale.to(weight_of(layer).device, torch.float64).reciprocal().float()
    return ScaledLinear.from_linear(_with_weight(layer, scaled_weight(layer, multiplier.double().reciprocal())), multiplier)


def _with_weight(layer: nn.Module, weight: Tensor) -> nn.Module:
    """An nn.Linear with this weight, and the bias of a layer."""
    like = as_linear(layer)
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, any(parameter.requires_grad for parameter in layer.parameters()))
    made.bias = like.bias  # type: ignore[assignment]
    return made.train(layer.training)
