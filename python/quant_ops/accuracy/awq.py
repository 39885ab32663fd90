"""AWQ (arXiv 2306.00978): scales the weight's columns that meet large activations up before they are rounded, then clips groups.

    s = mean|X|^r / sqrt(max * min), r in {0, 1/20, ..., 19/20}      eq. 5, each mean|X|^r at least 1e-4; max and min those of all
    r* = argmin || f(Q(W * s) / s) - f(W) ||^2                        eq. 4, f the block that the layers are in
    c* = argmin || Q(clamp(W, -c, c)) X - W X ||^2                    for each group of a row; c = amax * (1 - i / 20), i < 10

Read first: consumers.py, rescale.py, blocks.py.
"""

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._models import Forward, Result, Table, reasons
from ..convert.calibrate import progress
from ..convert.config import Int4WeightOnly, Int8DynamicInt4Weight, Int8WeightOnly, Scheme, WeightOnly
from ..convert.prepared import to_weight_only
from ..convert.select import Configs, ConversionResult, Filter, select
from ..convert.workflow import quantize_
from ..nn import as_linear
from .blocks import Chain, NoChain, batches_of, capture, find_blocks, first_tensor
from .consumers import Group, find_consumers, scalable, weight_of
from .rescale import assign_, rescale_

_log = logging.getLogger("quant_ops")

_DEFAULT = Int4WeightOnly()
_KINDS: tuple[type[Scheme], ...] = (Int8WeightOnly, Int4WeightOnly, Int8DynamicInt4Weight)
_LEAST = 1e-4  # of mean|X|^r
_SHARES = tuple(1 - step / 20 for step in range(10))
_ROWS = 512  # of every tensor that the clipping looks at; up to twice as many


@dataclasses.dataclass(repr=False)
class AWQResult(Result):
    """What :func:`awq_` did. It prints as a table, also in a notebook.

    Attributes:
        ratios: r of every layer that was searched; 0 is no scaling.
        scales: s of every scaled layer, (K,) float32 on the CPU.
        folded: name of a norm or Linear that a scale went into, and the layers that read its output.
        multiplied: names of layers that read one tensor and multiply it themselves, and why nothing else could.
        clipped: of every searched layer the fraction of its groups whose range was cut.
        skipped: name and reason of every Linear layer that was rounded as it is, or not at all.
        conversion: what the quantization did.
        batches: of the data.
    """

    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    scales: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    folded: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    multiplied: list[tuple[list[str], str]] = dataclasses.field(default_factory=list)
    clipped: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    conversion: ConversionResult = dataclasses.field(default_factory=ConversionResult)
    batches: int = 0

    def _table(self) -> Table:
        how = {name: f"folded into {producer}" for producer, names in self.folded for name in names}
        how |= {name: f"multiplies its input: {reason}" for names, reason in self.multiplied for name in names}
        lines = [
            ("searched", f"{name}; ratio {ratio:g}, {100 * self.clipped[name]:.0f} % clipped; {how.get(name, 'not scaled')}")
            for name, ratio in self.ratios.items()
        ]
        lines += [("skipped", text) for text in reasons(self.skipped)]
        summary = f"{len(self.ratios)} layers searched, {len(self.skipped)} skipped\n{str(self.conversion).splitlines()[0]}"
        return summary, ("searched", "skipped"), lines


# ---- the equations -------------------------------------------------------------------------------------------------------


def awq_scale(mean: Tensor, ratio: float) -> Tensor:
    """s of eq. 5 for mean magnitudes (K,), float64, normalised as the paper's code does it."""
    scale = mean.double().pow(ratio).clamp(min=_LEAST)
    return scale / (scale.max() * scale.min()).sqrt()


def rounded(weight: Tensor, config: WeightOnly) -> Tensor:
    """The values, (N, K) float32, that a weight-only layer of this config computes with."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return to_weight_only(linear, config)._values(torch.float32)()


def clip_shares(weight: Tensor, rows: Tensor, config: WeightOnly) -> Tensor:
    """How far to cut each group of a weight, so that its part of the layer's output changes least when it is rounded.

    The squared error of a group's part of output n over the rows X is d^T (X^T X) d, with d what rounding changes in the group.

    Args:
        weight: (N, K), scaled.
        rows: (rows, K), divided by the scale.

    Returns:
        (N, groups) float32: the share of the group's largest magnitude that is left, one of 1, 0.95, ..., 0.55.
    """
    rows, size = rows.float(), _size(weight, config)
    squares = _grouped(rows, size).transpose(1, 2) @ _grouped(rows, size)
    best = torch.ones(_grouped(weight, size).shape[:2], device=weight.device)
    least = torch.full_like(best, float("inf"))
    for share in _SHARES:
        made = rounded(clipped(weight, torch.full_like(best, share).t(), config), config)
        change = _grouped(made - weight.float(), size)
        error = ((change @ squares) * change).sum(2)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    return best.t()


def clipped(weight: Tensor, shares: Tensor, config: WeightOnly) -> Tensor:
    """The weight (N, K), each group of a row within its share (N, groups) of its largest magnitude, in the weight's dtype."""
    size = _size(weight, config)
    limits = (_grouped(weight, size).abs().amax(2).t().float() * shares).to(weight.dtype)
    wide = limits.repeat_interleave(size, 1)[:, : weight.shape[1]]
    return weight.clamp(-wide, wide)


def _size(weight: Tensor, config: WeightOnly) -> int:
    return max(1, weight.shape[1] if config.group_size == -1 else config.group_size)


def _grouped(values: Tensor, size: int) -> Tensor:
    """(groups, rows, size) of (rows, K), the last group filled up with zeros."""
    return F.pad(values, (0, -values.shape[1] % size)).unflatten(1, (-1, size)).transpose(0, 1)


# ---- the search ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _weights(values: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Layers with other weights (outputs, inputs) for a while."""
    before = {layer: layer._parameters["weight"] for layer in values}
    try:
        for layer, value in values.items():
            weight = value.to(weight_of(layer).dtype)
            weight = weight if as_linear(layer) is layer else weight.t()
            layer._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        yield
    finally:
        for layer, parameter in before.items():
            layer._parameters["weight"] = parameter


class _Block:
    """Measures errors at the output of the block that a chain has come to."""

    def __init__(self, chain: Chain) -> None:
        self.chain = chain
        self.outputs = [first_tensor(output) for output in chain.outputs()]

    def error(self, values: Mapping[nn.Module, Tensor]) -> float:
        """Squared error with other weights."""
        with _weights(values):
            pairs = zip(self.chain.outputs(), self.outputs, strict=True)
            return sum(float((first_tensor(got) - expected).double().square().sum()) for got, expected in pairs)


class _Alone:
    """Measures errors at the outputs of layers, for those that are in no block."""

    def __init__(self, group: Group) -> None:
        self.rows = group.rows

    def error(self, values: Mapping[nn.Module, Tensor]) -> float:
        """Squared error with other weights."""
        changes = [F.linear(self.rows.to(value), value - weight_of(layer).float()) for layer, value in values.items()]
        return sum(float(change.double().square().sum()) for change in changes)


@dataclasses.dataclass
class _Plan:
    """What the search has decided for a group, to be carried out when all of them are searched."""

    ratio: float
    scale: Tensor | None
    clipped: set[str]  # names of the layers that it helps


def _search(group: Group, configs: Mapping[nn.Module, WeightOnly], at: _Block | _Alone, ratios: int, clip: bool) -> _Plan:
    ratio, least = 0.0, float("inf")
    for step in range(ratios):
        scale = awq_scale(group.mean, step / ratios)
        error = at.error({layer: _effective(layer, scale, configs[layer]) for layer in group.layers})
        if error < least:
            ratio, least = step / ratios, error
    scale = awq_scale(group.mean, ratio)
    plan = _Plan(ratio, scale if ratio else None, set())
    for name, layer in zip(group.names, group.layers, strict=True) if clip else ():
        config, s = configs[layer], scale.float()
        weight = weight_of(layer).float()
        shares = clip_shares(weight * s.to(weight.device), (group.rows.float() / s).to(weight.device), config)
        # A layer's output is not all that counts: queries and keys meet in products, where the tails of both matter.
        plain, cut = (at.error({layer: _effective(layer, scale, config, given)}) for given in (None, shares))
        if cut < plain:
            plan.clipped.add(name)
    return plan


def _effective(layer: nn.Module, scale: Tensor, config: WeightOnly, shares: Tensor | None = None) -> Tensor:
    """Q(W * s) / s, the weight in the layer's place that computes what the scaled and rounded one does."""
    weight = weight_of(layer).float()
    s = scale.to(weight.device, torch.float32)
    weight = weight * s
    return rounded(weight if shares is None else clipped(weight, shares, config), config) / s


def _plans(
    model: nn.Module,
    groups: Sequence[Group],
    configs: Mapping[nn.Module, WeightOnly],
    chain: Chain | None,
    ratios: int,
    clip: bool,
) -> dict[str, _Plan]:
    """Of each group, by the name of its first layer. Every block gets what it gets in the float model, as in the paper's code."""
    plans: dict[str, _Plan] = {}
    if chain is not None:
        for _ in progress(range(len(chain.names)), len(chain.names), "awq"):
            within, block = set(chain.block.modules()), _Block(chain)
            for group in groups:
                if within.issuperset(group.layers) and group.names[0] not in plans:
                    plans[group.names[0]] = _search(group, configs, block, ratios, clip)
            chain.advance(block.outputs)
    for group in groups:
        if group.names[0] not in plans:
            plans[group.names[0]] = _search(group, configs, _Alone(group), ratios, clip)
    return plans


def awq_(
    model: nn.Module,
    data: Iterable[Any],
    config: Configs = _DEFAULT,
    *,
    ratios: int = 20,
    clip: bool = True,
    blocks: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    steps: int | None = None,
    include: Sequence[Filter] = ("*",),
    exclude: Sequence[Filter] = (),
) -> AWQResult:
    """Scales and clips the weights of a model's Linear layers (AWQ, arXiv 2306.00978) and makes them int4 or int8, in place.

    For layers that read one tensor the scale s = mean|X|^r (eq. 5) is taken whose r gives the least squared error at the output of
    the block that they are in, with all of them rounded and everything else float; layers outside of the blocks are measured at
    their own outputs. It is folded into the norm or Linear layer before them where that is possible, and otherwise the layers
    multiply their input, as with :func:`smoothquant_`. Then each group of each row is cut to the share of its largest magnitude,
    from 1 down to 0.55, that gives the least squared error of the layer's output on about 512 rows, if that lowers the error of
    the block as well.

    The data is kept, and run twice. Left as they were, and rounded without a search, are layers that data has not reached, or whose
    weight is tied to another one or read by other code.

    Args:
        model: its own layers are replaced, so it must not be such a layer itself.
        data, forward, steps: as in :func:`calibrate`.
        config: a weight-only config, or a mapping from filters to these or None, as in :func:`quantize_`.
        ratios: how many r are tried, evenly spaced from 0 on, below 1.
        clip: whether groups are cut.
        blocks: name of the container of the model's blocks, or the names of all blocks, in their order; by default the longest
            sequence of modules of one class.
        include, exclude: filters, as in :func:`quantize_`.

    Returns:
        What was searched and found, and what was left out and why.

    Raises:
        TypeError: config or data is of another kind.
        ValueError: data is empty; ratios < 1; blocks are not modules of the model, or do not follow one another; and as in
            :func:`quantize_`. The model is as it was then, and also if the search is interrupted.
    """
    if type(ratios) is not int or ratios < 1:
        raise ValueError(f"quant_ops.awq_: expected ratios >= 1, got {ratios!r}")
    with torch.inference_mode(False), torch.no_grad():
        places, selected = select("awq_", model, config, include, exclude, _KINDS)
        names = find_blocks("awq_", model, blocks)
        batches = batches_of("awq_", model, data, forward, steps)
        found = find_consumers("awq_", model, scalable(places), batches, forward, rows=_ROWS)
        configs = {layer: place.config for layer, place in places.items() if isinstance(place.config, WeightOnly)}
        plans = _plans(model, found.groups, configs, _chain(model, names, batches, forward, blocks), ratios, clip)
        done = rescale_(model, found.groups, lambda group: plans[group.names[0]].scale, places)
        result = AWQResult(scales=done.scales, folded=done.folded, multiplied=done.multiplied)
        result.skipped, result.batches = found.left_out(places, selected.skipped), found.batches
        for group in found.groups:
            plan = plans[group.names[0]]
            result.ratios |= dict.fromkeys(group.names, plan.ratio)
            for name, layer in zip(group.names, group.layers, strict=True):
                result.clipped[name] = 0.0
                if name in plan.clipped:
                    result.clipped[name] = _clip_(model.get_submodule(name), group.rows, done.scales.get(name), configs[layer])
        result.conversion = quantize_(model, config, include=include, exclude=exclude)
    _log.info("%s", result)
    return result


def _clip_(layer: nn.Module, rows: Tensor, scale: Tensor | None, config: WeightOnly) -> float:
    """Cuts the groups of a layer that has its scale. Returns which fraction of them.

    The shares are found again, on the very weight that will be rounded: a group that is cut at both ends has its zero point at a
    tie, which the last bit decides.
    """
    weight = weight_of(layer)
    rows = rows.to(weight.device, torch.float32)
    shares = clip_shares(weight, rows if scale is None else rows / scale.to(rows.device), config)
    made = clipped(weight, shares, config)
    assign_(layer, "weight", made if as_linear(layer) is layer else made.t())
    return float((shares < 1).double().mean())


def _chain(model: nn.Module, names: Sequence[str], batches: Sequence[Any], forward: Forward | None, blocks: Any) -> Chain | None:
    """The model's blocks; None without, or where blocks that nobody has asked for do not follow one another."""
    if not names:
        return None
    try:
        return capture(model, names, batches, forward)
    except NoChain as reason:
        if blocks is not None:
            raise ValueError(f"quant_ops.awq_: expected blocks that follow one another, got {reason}") from reason
        _log.warning("quant_ops.awq_: errors are measured at the outputs of layers, because among the blocks %s", reason)
        return None
