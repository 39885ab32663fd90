"""Returns quantized and simulated layers to float where that helps the model's output most, and only there.

Each candidate is measured by what its return gains in the whole model. A layer's own error ranks it too, but says little about
the output; the better of both searches is kept. Read next: compare.py.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from .._models import Result, Table, quiet, reasons
from ..convert.select import tell_library
from ..nn import QuantizedLayer, show_forms
from ..simulation.layers import SimulatedLayer
from .compare import Quantized, difference, outputs, pairs
from .error import decibel
from .report import Report

_SWEEP = 64  # so many candidates, those of the largest errors, are measured one by one at the start
_AGAIN = 4  # so many of the best ones are measured anew before each further return


@dataclasses.dataclass(repr=False)
class FallbackResult(Result):
    """What :func:`fallback_` did. It prints as a table, also in a notebook.

    Attributes:
        returned: names of the layers that are float again, in the order of their return.
        values: of the metric before the first return and after each one; empty if nothing was measured.
        reached: whether the target is met; None without a target.
        skipped: name and reason of each layer that had to stay as it was.
        target: what was to be reached; None without a target.
        kind: what the layers were: "int8", "int4", "int8 and int4", or "simulated" if any of them was.
    """

    returned: list[str] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    reached: bool | None = None
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    target: float | None = None
    kind: str = "int8"

    def _table(self) -> Table:
        verdict = {None: "", True: ", target met", False: ", target NOT met"}[self.reached]
        if self.reached is False and self.values:
            verdict += f": {self.values[-1]:.4g} is the most that was found, not {self.target:.4g}"
        after = [f"  {value:.4g}" for value in self.values] or [""] * (len(self.returned) + 1)
        lines = [("before", after[0])] if self.values else []
        lines += [("float", f"{value}  {name}") for name, value in zip(self.returned, after[1:], strict=True)]
        lines += [(self.kind, text) for text in reasons(self.skipped)]
        return f"{len(self.returned)} returned to float{verdict}", ("before", "float", self.kind), lines


def fallback_(
    model: nn.Module,
    report: Report,
    num: int | None = None,
    *,
    target: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    float_model: nn.Module | None = None,
) -> FallbackResult:
    """Returns to float, in place, the quantized and simulated layers whose return helps the model's output most, and no others.

    Candidates are returned one after another, each time the one that gains most by measurement, and in the order of their own
    errors; the better outcome is kept, and what turns out to be needless in it is taken back. This takes about one run of the
    metric for each of these layers (at most 64 at the start) and a few more for each one that is returned.

    Args:
        model: the quantized model that the report is about.
        report: of :func:`compare`.
        num: return at most so many layers.
        target: return as few layers as are found to be enough for ``metric(model) >= target``. At least one layer that the report
            has measured stays as it is: a target that only the float model meets is not met.
        metric: larger is better, e.g. an accuracy; by default the SQNR (dB) of the model's output on the report's batch.
        float_model: where the float layers of quantized ones are copied from; by default the one that the report was made with. A
            simulated layer becomes its ``to_float()``, with the parameters that it has now.

    Returns:
        Which layers are float now, the metric after each, and whether the target is met. If it is not, the layers whose return
        helped are float. With a report from JSON, which holds no batch, ``num`` layers return by their own errors, unmeasured.

    Raises:
        ValueError: neither num nor target is given, the report is of another model, or the metric is NaN. The model is then as it
            was.
    """
    if (num is None and target is None) or (num is not None and num < 0):
        raise ValueError(f"quant_ops.fallback_: expected num >= 0, or a target, got num={num} and target={target}")
    if metric is not None and target is None:
        raise ValueError("quant_ops.fallback_: expected a target together with a metric, got a metric alone")
    if target is not None and math.isnan(target):
        raise ValueError("quant_ops.fallback_: expected a number as the target, got NaN")
    if float_model is None:
        if report._source is None:
            raise ValueError(
                "quant_ops.fallback_: expected float_model=, because this report was read from JSON and holds no layers"
            )
        float_model = report._source[0]
    if metric is None and (target is not None or report._source is not None):
        metric = _output_sqnr(report)

    originals = pairs("fallback_", float_model, model)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if strangers := [layer.name for layer in report.layers if layer.name not in names]:
        raise ValueError(f"quant_ops.fallback_: expected a report of this model, got one with the layer {strangers[0]!r}")
    result = FallbackResult(
        skipped=[(name, "the batch of the report did not reach it") for name in report.unreached],
        target=target,
        kind="simulated"
        if report.simulated
        else show_forms(layer.form for _, layer in originals.values() if isinstance(layer, QuantizedLayer)),
    )
    candidates: dict[str, tuple[nn.Module, Quantized]] = {}
    chained = 0
    for layer in report.worst(len(report.layers)):
        if layer.chained:
            result.skipped.append((layer.name, layer.chained))
            chained += 1
        elif layer.name in originals:  # the others are float already
            candidates[layer.name] = originals[layer.name]

    most = len(candidates) if target is None or chained else len(candidates) - 1
    most = max(0, most if num is None else min(num, most))
    if metric is None:
        _Switches(model, candidates).keep(list(candidates)[:most])
        result.returned = list(candidates)[:most]
        return result
    if not most and target is None:
        return result
    search = _Search(_Switches(model, candidates), metric, math.inf if target is None else target, most)
    try:
        returned = search.best()
        result.values = [search.value(returned[:count]) for count in range(len(returned) + 1)]
    except BaseException:
        search.switches.keep(())
        raise
    search.switches.keep(returned)
    result.returned = returned
    result.reached = None if target is None else result.values[-1] >= target
    return result


class _Switches:
    """The places of the candidates in a model, where each stands as its quantized or as its float layer."""

    def __init__(self, model: nn.Module, candidates: dict[str, tuple[nn.Module, Quantized]]) -> None:
        self.model = model
        self.order = list(candidates)  # by their own errors, worst first
        self._layers = candidates
        self._places: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in candidates}
        name_of: dict[nn.Module, str] = {layer: name for name, (_, layer) in candidates.items()}
        for parent in model.modules():
            for attribute, child in parent._modules.items():
                if child in name_of:
                    self._places[name_of[child]].append((parent, attribute))
        self._now: dict[str, nn.Module] = {}  # what stands in place of quantized layers
        self._modes = [(original, original.training) for original, _ in candidates.values()]

    def set(self, names: Iterable[str]) -> None:
        """Makes these candidates float, and all others quantized, for a trial: the originals themselves are lent to the model."""
        self._put({name: self._now.get(name) or self._float(name) for name in names})

    def keep(self, names: Iterable[str]) -> None:
        """Makes these candidates float for good: simulated ones with their own parameters, others as copies of the originals.

        Originals that have one weight in common are copied with one weight in common.
        """
        copies: dict[int, Any] = {}
        self._put({name: self._float(name, copies) for name in names})
        for name, layer in self._now.items():
            layer.train(self._layers[name][1].training)
        for original, mode in self._modes:
            original.train(mode)
        tell_library(self.model)

    def _float(self, name: str, copies: dict[int, Any] | None = None) -> nn.Module:
        original, layer = self._layers[name]
        if isinstance(layer, SimulatedLayer):
            return layer.to_float()
        device = layer.device
        return original if original.weight.device == device and copies is None else copy.deepcopy(original, copies).to(device)

    def _put(self, layers: dict[str, nn.Module]) -> None:
        for name in {**self._now, **layers}:
            for parent, attribute in self._places[name]:
                setattr(parent, attribute, layers.get(name, self._layers[name][1]))
        self._now = layers


class _Search:
    """Looks for few layers whose return makes the metric reach the target, or else for those that make it the largest."""

    def __init__(self, switches: _Switches, metric: Callable[[nn.Module], float], target: float, most: int) -> None:
        self.switches, self._metric, self._target, self._most = switches, metric, target, most
        self._values: dict[frozenset[str], float] = {}

    def value(self, names: Iterable[str]) -> float:
        """The metric with these layers in float. Each set is measured once."""
        key = frozenset(names)
        if key not in self._values:
            self.switches.set(key)
            value = float(self._metric(self.switches.model))
            if math.isnan(value):
                raise ValueError("quant_ops.fallback_: expected a number from the metric, got NaN")
            self._values[key] = value
        return self._values[key]

    def best(self) -> list[str]:
        """The better outcome of both orders, without the layers that it does not need."""
        if self._met([]) or not self._most:
            return []
        by_gain = self._needed(self._by_gain())
        by_error = self._needed(self._by_error(len(by_gain) if self._met(by_gain) else self._most))
        return max((by_gain, by_error), key=lambda names: (self._met(names), -len(names) * self._met(names), self.value(names)))

    def _met(self, names: list[str]) -> bool:
        return self.value(names) >= self._target

    def _by_gain(self) -> list[str]:
        """Returns one layer after another, each time the one that gains most of those that gained most when last measured."""
        chosen: list[str] = []
        rest, gains = list(self.switches.order), dict[str, float]()

        def best_of(names: list[str]) -> str | None:
            before = self.value(chosen)
            for name in names:
                after = self.value([*chosen, name])
                gains[name] = 0.0 if after == before else after - before
            found = max(names, key=lambda name: gains[name], default=None)
            return found if found is not None and gains[found] > 0 else None

        best_of(rest[:_SWEEP])
        budget = 8 * len(rest) + _SWEEP  # sets that are measured, for models in which hardly any return helps
        while len(chosen) < self._most and not self._met(chosen) and len(self._values) < budget:
            rest.sort(key=lambda name: -gains.get(name, -math.inf))
            name = best_of(rest[:_AGAIN]) or best_of(rest[_AGAIN : _AGAIN + _SWEEP])
            if name is None:
                break
            chosen.append(name)
            rest.remove(name)
        return chosen

    def _by_error(self, most: int) -> list[str]:
        """Returns the layers in the order of their own errors. Better than one by one where only several together gain."""
        starts = [self.switches.order[:count] for count in range(most + 1)]
        met = next((start for start in starts if self._met(start)), None)
        return max(starts, key=self.value) if met is None else met

    def _needed(self, names: list[str]) -> list[str]:
        """Those without which the outcome would be worse."""
        for name in reversed(names):
            without = [other for other in names if other != name]
            if self._met(without) or (not self._met(names) and self.value(without) >= self.value(names)):
                names = without
        return names


def _output_sqnr(report: Report) -> Callable[[nn.Module], float]:
    if report._source is None:
        raise ValueError("quant_ops.fallback_: expected metric=, because this report was read from JSON and holds no batch")
    float_model, batch, forward = report._source
    with quiet(float_model):
        expected = [leaf.clone() for leaf in outputs(float_model, batch, forward)]

    def metric(model: nn.Module) -> float:
        with quiet(model):
            return decibel(difference(expected, outputs(model, batch, forward))[0])

    return metric
