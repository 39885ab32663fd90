"""SmoothQuant (arXiv 2211.10438): moves the outliers of activations into weights, where a scale for each row takes them.

    s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)        eq. 4, W the weights of all layers that read X, both maxima at least 1e-5
    X' = X / s,  W' = W * s                            eq. 3

Read first: consumers.py, rescale.py.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._models import Forward, Result, Table, reasons
from ..convert.calibrate import calibrate
from ..convert.config import (
    Int4WeightOnly,
    Int8Dynamic,
    Int8DynamicInt4Weight,
    Int8Static,
    Int8WeightOnly,
    Scheme,
    WeightOnly,
)
from ..convert.prepared import Prepared, _settings, to_int8, to_weight_only
from ..convert.select import Configs, ConversionResult, Filter, Places, _first, _matches, all_layers, replace_, select
from ..convert.workflow import convert_, prepare_, quantize_
from ..nn import TransposedLinear
from ..observers import Observer
from .consumers import Consumers, Group, find_consumers, scalable, weight_of
from .rescale import column_magnitudes, rescale_

_log = logging.getLogger("quant_ops")

Alpha = float | str | None
_LEAST = 1e-5  # of both maxima in eq. 4
_GRID = tuple(step / 20 for step in range(21))
_ROWS = 256  # of every tensor that the search looks at; up to twice as many
_DEFAULT = Int8Dynamic()
_KINDS: tuple[type[Scheme], ...] = (Int8Dynamic, Int8Static, Int8WeightOnly, Int4WeightOnly, Int8DynamicInt4Weight)


@dataclasses.dataclass(repr=False)
class SmoothQuantResult(Result):
    """What :func:`smoothquant_` did. It prints as a table, also in a notebook.

    Attributes:
        folded: name of a norm or Linear that the scale went into, and the layers that read its output.
        multiplied: names of layers that read one tensor and multiply it themselves, and why nothing else could.
        skipped: name and reason of every Linear layer that was not smoothed.
        alphas: of every smoothed layer.
        scales: s of every smoothed layer, (K,) float32 on the CPU.
        conversion: what the quantization did after it; None without a config.
        batches: of the data.
    """

    folded: list[tuple[str, list[str]]] = dataclasses.field(default_factory=list)
    multiplied: list[tuple[list[str], str]] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    alphas: dict[str, float] = dataclasses.field(default_factory=dict)
    scales: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    conversion: ConversionResult | None = None
    batches: int = 0

    def _table(self) -> Table:
        def show(names: list[str]) -> str:
            return f"{', '.join(names)}; alpha {self.alphas[names[0]]:g}"

        lines = [("folded", f"{producer} <- {show(names)}") for producer, names in self.folded]
        lines += [("multiplied", f"{show(names)}; {reason}") for names, reason in self.multiplied]
        lines += [("skipped", text) for text in reasons(self.skipped)]
        summary = (
            f"{sum(len(names) for _, names in self.folded)} layers folded, "
            f"{sum(len(names) for names, _ in self.multiplied)} with a multiplier, {len(self.skipped)} skipped"
        )
        if self.conversion is not None:
            summary += f"\n{str(self.conversion).splitlines()[0]}"
        return summary, ("folded", "multiplied", "skipped"), lines


# ---- the scale of a group ------------------------------------------------------------------------------------------------


def smoothing_scale(group: Group, alpha: float) -> Tensor:
    """s of eq. 4, (K,) float64."""
    activations = torch.maximum(-group.low, group.high).double().clamp(min=_LEAST)
    weights = column_magnitudes(group.layers).to(activations.device).clamp(min=_LEAST)
    return activations**alpha / weights ** (1 - alpha)


def _quantized_output(weight: Tensor, rows: Tensor, low: Tensor, high: Tensor, config: Scheme) -> Tensor:
    """What the quantized layer of this weight, without a bias, gives for rows whose exact extremes are known."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    made: nn.Module
    if isinstance(config, WeightOnly):
        made = to_weight_only(linear, config)
    elif isinstance(config, Int8Static):
        kind = Observer.kinds[config.observer]
        observer = kind(asymmetric=config.asymmetric, device=rows.device, **_settings(config.observer, config))
        observer(torch.stack([low, high]) if config.observer == "minmax" else rows)
        scale, zero_point = observer.qparams()
        made = to_int8(linear, config, input_scale=scale, **({"input_zero_point": zero_point} if config.asymmetric else {}))
    else:
        assert isinstance(config, Int8Dynamic)
        made = to_int8(linear, config)
    output: Tensor = made(rows)
    return output


def search_error(group: Group, scale: Tensor | None, configs: Sequence[Scheme]) -> float:
    """Squared error of the outputs of a group's quantized layers, over the sampled rows; None: without smoothing."""
    total = 0.0
    for layer, config in zip(group.layers, configs, strict=True):
        weight = weight_of(layer).float()
        rows, low, high = (values.to(weight.device, torch.float32) for values in (group.rows, group.low, group.high))
        expected = F.linear(rows, weight)
        if scale is not None:
            s = scale.to(weight.device, torch.float32)
            weight, rows, low, high = weight * s, rows / s, low / s, high / s
        total += float((_quantized_output(weight, rows, low, high, config) - expected).double().square().sum())
    return total


def _search(group: Group, configs: Sequence[Scheme]) -> float | None:
    """The alpha of the grid with the least error; None where no alpha is better than no smoothing."""
    best, least = None, search_error(group, None, configs)
    for alpha in _GRID:
        if (error := search_error(group, smoothing_scale(group, alpha), configs)) < least:
            best, least = alpha, error
    return best


# ---- arguments -----------------------------------------------------------------------------------------------------------


def _alphas(alpha: Alpha | Mapping[Filter, Alpha]) -> Mapping[Filter, Alpha]:
    given: Mapping[Filter, Alpha] = alpha if isinstance(alpha, Mapping) else {"*": alpha}
    for value in given.values():
        number = isinstance(value, float | int) and not isinstance(value, bool) and 0 <= value <= 1
        if not (number or value == "search" or (value is None and isinstance(alpha, Mapping))):
            raise ValueError(
                f"quant_ops.smoothquant_: expected alpha in [0, 1], 'search', or a mapping from filters to these or None, got "
                f"{value!r}"
            )
    return given


def _check_filters(alphas: Mapping[Filter, Alpha], names: Mapping[nn.Module, str]) -> None:
    known = set(names.values())
    for filter in alphas:
        exact = isinstance(filter, str | type) and filter != "*"
        if exact and not any(_matches(name, layer, filter, known) for layer, name in names.items()):
            raise ValueError(
                f"quant_ops.smoothquant_: expected the filter {filter!r} of alpha to match a Linear layer, got none of "
                f"{sorted(known)}"
            )


def _alpha_of(group: Group, alphas: Mapping[Filter, Alpha], names: set[str]) -> Alpha:
    """That of all layers of a group."""
    found = {}
    for name, layer in zip(group.names, group.layers, strict=True):
        filter = _first(tuple(alphas), name, layer, names)
        found[name] = None if filter is None else alphas[filter]
    if len(set(found.values())) > 1:
        raise ValueError(f"quant_ops.smoothquant_: expected one alpha for layers that read one tensor, got {found}")
    return found[group.names[0]]


def _static(places: Mapping[nn.Module, Places]) -> list[nn.Module]:
    return [layer for layer, place in places.items() if isinstance(place.config, Int8Static)]


def _needs_second_pass(places: Mapping[nn.Module, Places]) -> bool:
    """Whether some static scale does not follow from the extremes of channels."""
    configs = [(layer, places[layer].config) for layer in _static(places)]
    return any(
        not isinstance(layer, nn.Linear | TransposedLinear) or config.observer != "minmax" or config.num_steps > 1
        for layer, config in configs
        if isinstance(config, Int8Static)
    )


# ---- quantizing the smoothed model ---------------------------------------------------------------------------------------


def _quantize(
    model: nn.Module,
    config: Configs,
    include: Sequence[Filter],
    exclude: Sequence[Filter],
    extremes: dict[str, tuple[Tensor, int]] | None,
    rerun: Callable[[], Any],
) -> ConversionResult:
    """``extremes``: of the smoothed input of every static layer, and how often it held NaN or Inf; None: run the data again."""
    if not any(isinstance(one, Int8Static) for one in (config.values() if isinstance(config, Mapping) else [config])):
        return quantize_(model, config, include=include, exclude=exclude)
    prepare_(model, config, include=include, exclude=exclude)
    try:
        if extremes is None:
            rerun()
        else:
            for name, layer in model.named_modules():
                if isinstance(layer, Prepared) and layer.observer is not None and name in extremes:
                    both, left_out = extremes[name]
                    layer.observer(both)
                    layer.observer.left_out += left_out
        return convert_(model)
    except BaseException:
        left: dict[nn.Module, Places] = {}
        for name, layer, parent, attribute in all_layers(model, (Prepared,)):
            assert isinstance(layer, Prepared)
            left.setdefault(layer, Places(name, layer.config, [])).parents.append((parent, attribute))
        replace_(model, left, lambda layer, _: layer.to_float())  # type: ignore[operator]
        raise


def _once_more(data: Iterable[Any]) -> None:
    if isinstance(data, Iterator):
        raise ValueError(
            "quant_ops.smoothquant_: expected data that can be read twice, such as a list, got an iterator: only the scales of "
            "Linear layers with observer 'minmax' and one step follow from one pass."
        )


def smoothquant_(
    model: nn.Module,
    data: Iterable[Any],
    config: Configs | None = _DEFAULT,
    *,
    alpha: Alpha | Mapping[Filter, Alpha] = 0.5,
    forward: Forward | None = None,
    steps: int | None = None,
    include: Sequence[Filter] = ("*",),
    exclude: Sequence[Filter] = (),
) -> SmoothQuantResult:
    """Smooths the inputs of a model's Linear layers (SmoothQuant, arXiv 2211.10438) and quantizes the model, in place.

    Layers that read one tensor, such as the projections of attention to queries, keys and values, get one scale s (K,), of eq. 4.
    It is folded into the norm, or the Linear layer, whose output they read, if nothing else ever reads that; a norm is any module
    whose output is proportional to its weight, or to 1 + its weight. Otherwise the layers become :class:`ScaledLinear`, and their
    quantized forms multiply inside of the operator. Before it is quantized, the model computes what it did, up to rounding.

    The data is read once, also for static scales with observer "minmax": the extremes of a smoothed channel are those of the
    channel over s. With other observers, several steps, or static convolutions it is read twice.

    Left as they were, with a reason: layers that data has not reached, such as some experts (an output that they might read is not
    folded into either), layers whose weight is tied to another one or read by other code, and all that is no Linear layer.

    Args:
        model: its own layers are replaced, so it must not be such a layer itself.
        data, forward, steps: as in :func:`calibrate`.
        config: as in :func:`quantize_`, and :class:`Int8Static`; None leaves the model float, smoothed.
        alpha: how far the outliers move, from 0 (s = 1 / max|W|) to 1 (s = max|X|). "search" tries 21 values for every group of
            layers and takes the one with the least squared error of the outputs of the quantized layers, if that is less than
            without smoothing. A mapping gives every group that of the first filter that matches its layers, None for no smoothing.
        include, exclude: filters, as in :func:`quantize_`.

    Returns:
        What was smoothed, how, and what was left out and why.

    Raises:
        TypeError: config or data is of another kind.
        ValueError: data is empty; alpha is outside of [0, 1], or differs among layers that read one tensor; data is an iterator
            where it has to be read twice; and as in :func:`quantize_`. The model is as it was then. When a call is interrupted
            after the run on the data, the layers smoothed until then stay smoothed, which changes no output.
    """
    alphas = _alphas(alpha)
    with torch.inference_mode(False), torch.no_grad():
        places, selected = select("smoothquant_", model, Int8Dynamic() if config is None else config, include, exclude, _KINDS)
        again = config is not None and _needs_second_pass(places)
        if again:
            _once_more(data)
        names = scalable(places)
        _check_filters(alphas, names)
        rows = _ROWS if "search" in alphas.values() else 0
        found = find_consumers("smoothquant_", model, names, data, forward, steps, rows)
        result = SmoothQuantResult(skipped=found.left_out(places, selected.skipped), batches=found.batches)
        _smooth(model, found, places, alphas, result)
        if config is not None:
            extremes = None if again else _extremes(found, names, result.scales)
            result.conversion = _quantize(model, config, include, exclude, extremes, lambda: calibrate(model, data, forward, steps))
    _log.info("%s", result)
    return result


def _smooth(
    model: nn.Module,
    found: Consumers,
    places: Mapping[nn.Module, Places],
    alphas: Mapping[Filter, Alpha],
    result: SmoothQuantResult,
) -> None:
    names = {place.name for place in places.values()}
    chosen = {group.names[0]: _alpha_of(group, alphas, names) for group in found.groups}

    def scale_of(group: Group) -> Tensor | None:
        alpha, reason = chosen[group.names[0]], "its alpha is None"
        if alpha == "search":
            alpha = _search(group, [places[layer].config for layer in group.layers])
            reason = "no alpha is better than no smoothing"
        if alpha is None:
            result.skipped += [(name, reason) for name in group.names]
            return None
        result.alphas |= dict.fromkeys(group.names, float(alpha))
        return smoothing_scale(group, float(alpha))

    done = rescale_(model, found.groups, scale_of, places)
    result.folded, result.multiplied, result.scales = done.folded, done.multiplied, done.scales


def _extremes(found: Consumers, names: Mapping[nn.Module, str], scales: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, int]]:
    """(2, K), least and greatest value of the smoothed input of each layer; and the calls that held NaN or Inf."""
    extremes = {}
    for layer, statistics in found.statistics.items():
        both = torch.stack([statistics.low, statistics.high])  # empty without any rows
        if statistics.count and (scale := scales.get(names[layer])) is not None:
            both = both * scale.reciprocal().to(both.device)
        extremes[names[layer]] = both, statistics.left_out
    return extremes
