"""Whole models: replace float layers by int8 ones, at once or by way of layers that calibrate or train, and say what was done."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._models import count_batches, patched
from ..nn import QuantizedLayer, WeightOnlyLayer, float_class, show_forms
from ..simulation.config import Simulated
from ..simulation.layers import SIMULATED, SimulatedLayer
from ..simulation.operand import takes_amax
from .config import Int4WeightOnly, Int8Dynamic, Int8DynamicInt4Weight, Int8Static, Int8WeightOnly, Scheme, WeightOnly
from .prepared import PREPARED, Prepared, to_int8, to_weight_only
from .qat import QAT
from .select import (
    FLOAT,
    Configs,
    ConversionResult,
    Filter,
    Places,
    Survey,
    all_layers,
    check_model,
    classes_for,
    family_of,
    fitting,
    remembered,
    replace_,
    select,
    simulable_class,
)
from .steps import connect_

_EVERYTHING: tuple[Filter, ...] = ("*",)
_WITHOUT_DATA: tuple[type[Scheme], ...] = (Int8Dynamic, Int8WeightOnly, Int4WeightOnly, Int8DynamicInt4Weight, Simulated)


def quantize_(
    model: nn.Module,
    config: Configs | None = None,
    *,
    include: Sequence[Filter] = _EVERYTHING,
    exclude: Sequence[Filter] = (),
) -> ConversionResult:
    """Replaces the nn.Linear, nn.Conv1d and nn.Conv2d layers of a model by int8 ones, in place, without data.

    The Conv1D of transformers (GPT-2), a linear layer, becomes a :class:`QuantLinear` of the transposed weight.

    With :class:`Int8WeightOnly` and :class:`Int4WeightOnly` the nn.Linear and nn.Embedding layers are replaced, with
    :class:`Int8DynamicInt4Weight` the nn.Linear ones. An embedding and a head that have one weight share one packed weight then.
    ``exclude=[nn.Embedding]`` keeps the embeddings.

    A layer that the model uses in several places stays shared. Each float weight is freed as soon as its layer is replaced.

    Args:
        model: any module; its own layers are replaced, so it must not be such a layer itself.
        config: default ``Int8Dynamic()``. A mapping from filters to configs gives every layer the config of the first filter that
            matches; None leaves it float. Kinds may be mixed: ``{"*.mlp.*": Int4WeightOnly(), "*": Int8Dynamic()}``.
        include, exclude: filters: patterns of ``fnmatch`` over the names of ``model.named_modules()`` (``["*.head"]``), classes
            (``[nn.Conv2d]``), or functions of name and module that return a bool. Exclusion wins.

    Returns:
        What was converted, and what was skipped and why: every module whose weights stay float is named. If nothing was converted,
        there is a UserWarning too.

    Raises:
        TypeError: config is of another kind, or a filter list is one string.
        ValueError: model is such a layer itself, a pattern or class matches no layer, a weight holds NaN or Inf, or a layer
            with two names gets two configs.
    """
    plan = Plan("quantize_", model, Int8Dynamic() if config is None else config, include, exclude)
    tied = tied_layers(plan.places)
    return _replaced("quantize_", model, plan.family, plan.places, plan.result, lambda module, one: layer_of(module, one, tied))


class Plan:
    """What a conversion without data is about to do. The model may be on the meta device.

    Attributes:
        family: see :func:`family_of`.
        places: the layers that will be replaced.
        result: those, and why the others will not be.
    """

    def __init__(self, op: str, model: nn.Module, config: Configs, include: Sequence[Filter], exclude: Sequence[Filter]) -> None:
        self.family = family_of(op, config)
        kind = "simulated" if self.family == "simulated" else "int8"
        self.places, self.result = select(op, model, config, include, exclude, _WITHOUT_DATA, result_kind=kind)
        if self.family == "weight-only":
            self.result.kind = show_forms(form_of(place.config) for place in self.places.values())


Tied = dict[nn.Module, dict[Any, WeightOnlyLayer]]


def layer_of(module: nn.Module, config: Any, tied: Tied) -> nn.Module:
    """What a config without data makes of a float layer; ``tied`` has what was made of its weight already, and gets this one."""
    if isinstance(config, Simulated):
        return simulated_layer(module, config)
    if not isinstance(config, WeightOnly):
        return to_int8(module, config)
    made, settings = tied.get(module, {}), tuple(config.settings().items())
    layer = to_weight_only(module, config, made.get(settings))
    made.setdefault(settings, layer)
    return layer


def form_of(config: Scheme) -> str:
    """What a config makes of weights."""
    return f"int{config.settings()['bits']}" if isinstance(config, WeightOnly) else "int8"


def tied_layers(places: dict[nn.Module, Places]) -> Tied:
    """A dictionary for each layer whose weight is that of others too; it is the same for all of them."""
    by_weight: dict[int, list[nn.Module]] = {}
    for module in places:
        by_weight.setdefault(id(module._parameters.get("weight")), []).append(module)
    tied: Tied = {}
    for modules in by_weight.values():
        made: dict[Any, WeightOnlyLayer] = {}
        if len(modules) > 1:
            tied |= dict.fromkeys(modules, made)
    return tied


def simulated_layer(module: nn.Module, config: Simulated) -> SimulatedLayer:
    """The simulated layer of a float one."""
    return SIMULATED[simulable_class(module)].from_float(module, config)


def _replaced(
    op: str,
    model: nn.Module,
    family: str,
    places: dict[nn.Module, Places],
    result: ConversionResult,
    make: Callable[[nn.Module, Any], nn.Module],
) -> ConversionResult:
    """Replaces the selected layers by what ``make`` makes of each and its config."""
    survey = Survey(op, model, family)

    def replacement(module: nn.Module, place: Places) -> nn.Module:
        layer = make(module, place.config)
        if isinstance(layer, SimulatedLayer):
            result.notes.extend((place.name, note) for note in layer.notes())
        return layer

    replace_(model, places, replacement)
    connect_(model)
    return survey.finish(result)


def prepare_(
    model: nn.Module,
    config: Configs | None = None,
    *,
    include: Sequence[Filter] = _EVERYTHING,
    exclude: Sequence[Filter] = (),
) -> ConversionResult:
    """Replaces the nn.Linear, nn.Conv1d and nn.Conv2d layers of a model by float ones that observe their inputs, in place.

    Then :func:`calibrate`, or call the model on data in any other way, and :func:`convert_`. The new layers have the same
    parameters, under the same names; the model may have control flow, shared layers, and layers that it calls many times.

    Args:
        config: default ``Int8Static()``; an ``Int8Dynamic`` for layers that need no data. Mappings, include, exclude, result and
            errors as in :func:`quantize_`.
    """
    config = Int8Static() if config is None else config
    places, result = select(
        "prepare_", model, config, include, exclude, (Int8Static, Int8Dynamic, Simulated), result_kind="prepared"
    )
    for place in places.values():
        _expect_calibrated(place)

    def make(module: nn.Module, config: Any) -> nn.Module:
        if not isinstance(config, Simulated):
            return PREPARED[float_class(module)].from_float(module, config)
        if (kind := PREPARED.get(simulable_class(module))) is not None:
            return kind.from_float(module, config)
        layer = simulated_layer(module, config)
        layer.is_uncalibrated = True
        return layer

    return _replaced("prepare_", model, family_of("prepare_", config), places, result, make)


def _expect_calibrated(place: Places) -> None:
    """Scales of rows follow from the data of each call."""
    config = place.config
    if isinstance(config, Simulated):
        for name in ("input", "output"):
            if getattr(config, f"{name}_per") == "row" and takes_amax(getattr(config, name)):
                raise ValueError(
                    f"quant_ops.prepare_: expected {name}_per to be 'tensor', 'channel' or the size of a block, got 'row' for "
                    f"layer {place.name!r}: rows have no scales that could be calibrated. Use quantize_ without calibration."
                )


def prepare_qat_(
    model: nn.Module,
    config: Configs | None = None,
    *,
    include: Sequence[Filter] = _EVERYTHING,
    exclude: Sequence[Filter] = (),
) -> ConversionResult:
    """Replaces the layers of a model by ones that train with quantized values, in place. Then :func:`convert_`.

    The parameters stay the same objects. Observers "minmax" and "ema" follow the inputs while training; "lsq" learns the scales of
    inputs and weights; the scales of the others stay as calibrated. Layers of :func:`prepare_` are taken with what they have
    observed, as a start. Fold BatchNorms first, with :func:`fold_batchnorm_`. Make the optimizer afterwards: learned scales are new
    parameters. In several processes, and with ``torch.compile``, calibrate before learning scales. Shard (``fully_shard``)
    afterwards: a model that is sharded already is refused.

    Args:
        config: default: that of a prepared layer, else ``Int8Static()``; an ``Int8Dynamic`` trains for dynamic quantization.
            Mappings, include, exclude, result and errors as in :func:`quantize_`.
    """
    accepted = (*FLOAT, *PREPARED.values())
    kinds: tuple[type[Scheme], ...] = (Int8Static, Int8Dynamic, Simulated)
    if config is None:
        found = [module.config for module in model.modules() if isinstance(module, Prepared)]
        chosen: Configs = found[0] if found else Int8Static()
    else:
        chosen = config
    family = family_of("prepare_qat_", chosen)
    kind = "simulated" if family == "simulated" else "qat"
    places, result = select("prepare_qat_", model, chosen, include, exclude, kinds, accepted, result_kind=kind)

    def make(module: nn.Module, given: Any) -> nn.Module:
        wanted = module.config if config is None and isinstance(module, Prepared) else given
        if not isinstance(wanted, Simulated):
            return QAT[float_class(module)].from_float(module, wanted)
        if not isinstance(module, Prepared):
            return simulated_layer(module, wanted)
        layer = module.to_float() if module.unreached() else module.to_simulated()
        return SIMULATED[module.float_class].from_float(layer, wanted)

    return _replaced("prepare_qat_", model, family, places, result, make)


def convert_(model: nn.Module) -> ConversionResult:
    """Replaces the layers of :func:`prepare_` or :func:`prepare_qat_` by int8 ones with the scales that they have found, in place.

    A layer that no data has reached becomes float again, and the result says so. A step without data (``num_steps``) takes the
    widest range of the other steps, and an input that was always zero the scale 1; the result's notes name both, and how many
    batches were left out because they held NaN or Inf.

    Returns:
        What was converted, and what was skipped and why: for a layer that prepare_ has skipped, the reason that it gave.

    Raises:
        ValueError: the model is not prepared, no layer has seen data, or a weight holds NaN or Inf. The model is then as it was.
    """
    simulated = any(isinstance(module, Prepared) and isinstance(module.config, Simulated) for module in model.modules())
    family = "simulated" if simulated else "int8"
    check_model("convert_", model, family)
    result = ConversionResult(kind=family)
    places: dict[nn.Module, Places] = {}
    layers = all_layers(model, classes_for(family))
    for name, module, parent, attribute in layers:
        if isinstance(module, Prepared):
            places.setdefault(module, Places(name, module.config, [])).parents.append((parent, attribute))
    if not places:
        raise ValueError("quant_ops.convert_: expected a prepared model, got one without prepared layers. Call prepare_ first.")
    unreached = {module: why for module in places if isinstance(module, Prepared) and (why := module.unreached())}
    if len(unreached) == len(places):
        left_out = any("NaN or Inf" in why for why in unreached.values())
        got = "batches with NaN or Inf alone. Mend the data or the model" if left_out else "none in any layer. Call calibrate first"
        raise ValueError(f"quant_ops.convert_: expected calibration data, got {got}.")
    unfit: dict[nn.Module, str] = {}
    for name, module, *_ in layers:
        if not isinstance(module, Prepared):
            continue
        if reason := patched(module):
            result.skipped.append((name, reason))
            places.pop(module, None)
            continue
        if module in unreached:
            result.skipped.append((name, unreached[module]))
            continue
        if isinstance(fit := fitting(module, module.config), str) or fit != module.config:
            unfit[module] = fit if isinstance(fit, str) else "its sums with a zero point are not exact. Prepare it as symmetric"
            result.skipped.append((name, unfit[module]))
            continue
        if problem := module.problem():
            raise ValueError(f"quant_ops.convert_: {problem} {name!r}")
        result.notes += [(name, note) for note in _assumptions(module)]
        result.converted.append(name)

    def make(module: nn.Module) -> nn.Module:
        assert isinstance(module, Prepared)
        return module.to_float() if module in unreached or module in unfit else module.finished()

    with torch.inference_mode(False):
        made = {module: make(module) for module in places}  # all of them before the first is replaced: one may fail
    for name, module, *_ in layers:
        if isinstance(module, QuantizedLayer):
            result.skipped.append((name, f"{module.form} already"))
        elif isinstance(module, SimulatedLayer):
            result.skipped.append((name, "simulated already, with scales from the data of each call"))
        elif not isinstance(module, Prepared):
            result.skipped.append((name, remembered(module)))
    return _replaced("convert_", model, family, places, result, lambda module, _: made.pop(module))


def _assumptions(layer: Prepared) -> list[str]:
    """The assumptions that replace missing data."""
    notes = []
    for operand, observer in layer.observers.items():
        if unseen := observer.unseen_steps():
            verb = "started from" if getattr(layer, "learned", False) else "take"
            notes.append(f"steps {unseen} had no calibration data and {verb} the widest range of the others")
        if left_out := observer.batches_left_out:
            notes.append(f"NaN or Inf at its {operand}: {count_batches(left_out)} left out")
        if observer.only_zeros:
            notes.append(f"its {operand} was always zero: scale 1")
    return notes
