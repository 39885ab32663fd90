"""Returns the layers that lose most by int8 to float, until the model is good enough."""

import copy
import dataclasses
import math
from collections.abc import Callable

from torch import nn

from .._models import Result, Table, reasons
from ..nn import Int8Layer
from .compare import difference, outputs, pairs, quiet
from .error import decibel
from .report import Report


@dataclasses.dataclass
class FallbackResult(Result):
    """What :func:`fallback_` did. ``print(result)`` shows it as a table.

    Attributes:
        returned: names of the layers that are float again, in the order of their return.
        values: of the metric before the first return and after each one; empty without a target.
        reached: whether the target is met; None without a target.
        skipped: name and reason of each layer that had to stay int8.
    """

    returned: list[str] = dataclasses.field(default_factory=list)
    values: list[float] = dataclasses.field(default_factory=list)
    reached: bool | None = None
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def _table(self) -> Table:
        verdict = {None: "", True: ", target met", False: ", target NOT met"}[self.reached]
        after = [f"  {value:.4g}" for value in self.values] or [""] * (len(self.returned) + 1)
        lines = [("before", after[0])] if self.values else []
        lines += [("float", f"{value}  {name}") for name, value in zip(self.returned, after[1:], strict=True)]
        lines += [("int8", text) for text in reasons(self.skipped)]
        return f"{len(self.returned)} returned to float{verdict}", ("before", "float", "int8"), lines


def fallback_(
    model: nn.Module,
    report: Report,
    num: int | None = None,
    *,
    target: float | None = None,
    metric: Callable[[nn.Module], float] | None = None,
    float_model: nn.Module | None = None,
) -> FallbackResult:
    """Returns the most sensitive int8 layers to float, in place, those of the largest normalised error first.

    A layer's error does not depend on the other layers (see compare.py), so their order stays. With ``target`` the metric is
    measured anew after every return, and the first model that meets the target is kept.

    Args:
        model: the quantized model that the report is about.
        report: of :func:`compare`.
        num: how many layers; with a target, at most so many.
        target: stop as soon as ``metric(model) >= target``.
        metric: larger is better, e.g. an accuracy; by default the SQNR (dB) of the model's output on the report's batch.
        float_model: where the float layers are copied from; by default the one that the report was made with.

    Returns:
        Which layers are float now, the metric after each, and whether the target is met. If it is not, as many layers as num allows
        are float, without num all that may be, and the result says so.

    Raises:
        ValueError: neither num nor target is given, the report is of another model, or the metric is NaN.
    """
    if (num is None and target is None) or (num is not None and num < 0):
        raise ValueError(f"quant_ops.fallback_: expected num >= 0, or a target, got num={num} and target={target}")
    if metric is not None and target is None:
        raise ValueError("quant_ops.fallback_: expected a target together with a metric, got a metric alone")
    if float_model is None:
        if report._source is None:
            raise ValueError(
                "quant_ops.fallback_: expected float_model=, because this report was read from JSON and holds no layers"
            )
        float_model = report._source[0]
    if target is not None and metric is None:
        metric = _output_sqnr(report)

    originals = pairs("fallback_", float_model, model)
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if strangers := [layer.name for layer in report.layers if layer.name not in names]:
        raise ValueError(f"quant_ops.fallback_: expected a report of this model, got one with the layer {strangers[0]!r}")
    result = FallbackResult(skipped=[(name, "the batch of the report did not reach it") for name in report.unreached])
    candidates = []
    for layer in report.worst(len(report.layers)):
        if layer.chained:
            result.skipped.append((layer.name, layer.chained))
        elif layer.name in originals:  # the others are float already
            candidates.append(layer.name)

    def measured() -> bool:
        """Whether the target is met now."""
        if target is None or metric is None:
            return False
        value = float(metric(model))
        if math.isnan(value):
            raise ValueError("quant_ops.fallback_: expected a number from the metric, got NaN")
        result.values.append(value)
        result.reached = value >= target
        return result.reached

    if measured():
        return result
    for name in candidates[:num]:
        _return(model, *originals[name])
        result.returned.append(name)
        if measured():
            break
    return result


def _return(model: nn.Module, original: nn.Module, layer: Int8Layer) -> None:
    """A copy of the float layer, at every place of the int8 one."""
    replacement = copy.deepcopy(original).to(layer.weight.device).train(layer.training)
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child is layer:
                setattr(parent, attribute, replacement)


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
