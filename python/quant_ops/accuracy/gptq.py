"""GPTQ for whole models: the codes of each weight are chosen so that the layer's output on calibration data changes little.

The model is worked through in stages: what comes before its blocks, block after block, and the rest. A stage is run on what it gets
from the quantized layers before it, its Hessians are summed by hooks, its layers are replaced. Read first: blocks.py, hessian.py,
layer.py.
"""

import dataclasses
from collections.abc import Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._models import Forward, Table, call, evaluating
from ..convert.calibrate import progress
from ..convert.config import Int4WeightOnly, Int8Dynamic, Int8DynamicInt4Weight, Int8Static, Int8WeightOnly, Scheme
from ..convert.prepared import PREPARED, Prepared, is_sharded
from ..convert.select import (
    Configs,
    ConversionResult,
    Filter,
    Places,
    Survey,
    family_of,
    leave_fused_paths,
    select,
)
from ..nn import QuantizedLayer, float_class, show_forms
from ..nn.loading import check_loads
from .blocks import Chain, NoChain, batches_of, capture, find_blocks
from .checkpoint import Checkpoint, digest_of_data, digest_of_model
from .hessian import Collector, version
from .layer import Factor, Settings, Solved, made_layer, solved

_KINDS: tuple[type[Scheme], ...] = (Int4WeightOnly, Int8WeightOnly, Int8DynamicInt4Weight, Int8Dynamic, Int8Static)
_ORDERS = ("blocks", "layers", "together")
_EVERYTHING: tuple[Filter, ...] = ("*",)
_AS_A_WHOLE = "Give blocks=[] to take the model as a whole."


@dataclasses.dataclass(repr=False)
class GPTQResult(ConversionResult):
    """What :func:`gptq_` did. It prints as a table, also in a notebook.

    Attributes:
        errors: for each layer that has seen data, what its weight loses: the sum of squares by which its output on the calibration
            data changes over that of the output, with GPTQ and with codes rounded to the nearest.
        blocks: names of the blocks, one after the other; empty if the model was taken as a whole.
        whole: why it was, where blocks were looked for.
        resumed: stages that the checkpoint held already.

    The others are those of :class:`ConversionResult`.
    """

    errors: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    blocks: list[str] = dataclasses.field(default_factory=list)
    whole: str = ""
    resumed: int = 0

    def _table(self) -> Table:
        summary, labels, lines = super()._table()
        how = f" in {len(self.blocks)} blocks" if self.blocks else f" as a whole: {self.whole}" if self.whole else ""
        if self.errors:
            gained = sorted(gptq / nearest for gptq, nearest in self.errors.values() if nearest > 0)
            median = f", median error {gained[len(gained) // 2]:.2f} of rounding's" if gained else ""
            summary += f"\nGPTQ{how}{median}"
        shown = []
        for label, text in lines:
            name = text.split(";")[0]
            if label != "float" and name in self.errors:
                gptq, nearest = self.errors[name]
                text = f"{name}  {gptq:.2e}, rounded {nearest:.2e}{text[len(name) :]}"
            shown.append((label, text))
        return summary, labels, shown


def gptq_(
    model: nn.Module,
    data: Iterable[Any],
    config: Configs | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    order: str = "blocks",
    blocks: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    steps: int | None = None,
    include: Sequence[Filter] = _EVERYTHING,
    exclude: Sequence[Filter] = (),
    checkpoint: str | Path | None = None,
) -> GPTQResult:
    """Quantizes the weights of a model's linear layers and convolutions by GPTQ (arXiv 2210.17323), in place.

    The weight's columns are quantized one after the other, and those that follow make good what each one loses on the calibration
    data: equations 2 and 3 of the paper, in the form of its algorithm 1. The layers are those of :func:`quantize_` with the same
    config, and so are their groups; the parameters of a group come from the weight as it is when the group is reached. Embeddings
    multiply nothing and stay float; :func:`quantize_` takes them afterwards.

    The float weights are kept until the call is done: if it is interrupted or refused, the model is as it was.

    Args:
        model: any module, as for :func:`quantize_`. Biases stay as they are.
        data: batches, as for :func:`calibrate`. All are kept, and run more than once; so are the hidden states between blocks.
        config: default ``Int4WeightOnly()``; an ``Int8WeightOnly``, ``Int8DynamicInt4Weight``, ``Int8Dynamic`` or ``Int8Static``
            (one step), or a mapping as for :func:`quantize_`. Scales of an ``Int8Static`` layer's input are observed in the same
            runs.
        block_size: columns whose updates of the columns behind them are made as one product. Changes time, and rounding.
        damping: fraction of the mean of the Hessian's diagonal that is added to it; ten times as much if its factorization fails.
        act_order: columns of the largest inputs first. The parameters of groups are then those of the weight as it is given, so
            that groups stay those of neighbouring columns.
        order: "blocks": the layers of a block at once, and block after block, so that later blocks see quantized inputs. "layers":
            within a block too, those of one input at a time; one run of the block for each. "together": all layers of the model at
            once, from inputs of the float model.
        blocks: the name of the container of the repeated blocks, or names of the blocks; [] takes the model as one block. By
            default they are looked for, and a model without such blocks is taken as one.
        forward, steps: as for :func:`calibrate`.
        include, exclude: as for :func:`quantize_`.
        checkpoint: a folder, to which each finished stage is written. A later call with the same model, data and settings goes on
            from there, and gives the same bits as one that was never interrupted.

    Returns:
        What was converted, what was skipped and why, with the errors of the layers. Layers that no data has reached, such as some
        experts, are rounded to the nearest, and the notes say so; an ``Int8Static`` layer of this kind stays float.

    Raises:
        TypeError: config is of another kind, or data is no iterable of batches.
        ValueError: arguments out of range, no calibration data, no layer that data reaches, NaN or Inf at the input of a layer, a
            Hessian that stays indefinite, ``blocks`` that do not follow one another, or a checkpoint of another call.
    """
    _check("block_size >= 1", isinstance(block_size, int) and block_size >= 1, block_size)
    _check("damping >= 0 and below 10", isinstance(damping, int | float) and 0 <= damping < 10, damping)
    _check(f"order to be one of {_ORDERS}", order in _ORDERS, repr(order))
    model = getattr(model, "_orig_mod", model)  # hooks do not reach into what torch.compile has compiled
    config = Int4WeightOnly() if config is None else config
    family = family_of("gptq_", config)
    places, selected = select("gptq_", model, config, include, exclude, _KINDS)
    result = GPTQResult(**{field.name: getattr(selected, field.name) for field in dataclasses.fields(selected)})
    _leave_out(model, places, result)
    with torch.inference_mode(False):
        batches = batches_of("gptq_", model, data, forward, steps)
        survey = Survey("gptq_", model, family)
        settings = Settings(block_size, float(damping), act_order, order)
        run = _Run(model, batches, forward, settings, places, result)
        run.to_the_end(blocks, checkpoint)
    result.kind = show_forms(module.form for module in run.made if isinstance(module, QuantizedLayer))
    leave_fused_paths(model)
    check_loads(model)
    return survey.finish(result)  # type: ignore[return-value]


def _check(relation: str, holds: bool, got: Any) -> None:
    if not holds:
        raise ValueError(f"quant_ops.gptq_: expected {relation}, got {got}")


def _leave_out(model: nn.Module, places: dict[nn.Module, Places], result: GPTQResult) -> None:
    """Takes out the layers that have no columns to quantize, and refuses what cannot be done."""
    for module, place in list(places.items()):
        if isinstance(module, nn.Embedding):
            _skip(result, _names(model, module), "an embedding multiplies nothing. quantize_ rounds it to the nearest")
            del places[module]
        elif isinstance(place.config, Int8Static) and place.config.num_steps > 1:
            _check("num_steps=1", False, f"{place.config.num_steps} for layer {place.name!r}. Calibrate steps with prepare_")
        elif is_sharded(module.weight):  # type: ignore[arg-type]
            _check("whole weights", False, f"a sharded one (DTensor) in layer {place.name!r}. Quantize before the model is sharded")


def _names(model: nn.Module, layer: nn.Module) -> list[str]:
    """All names of a layer."""
    return [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]


def _skip(result: GPTQResult, names: list[str], reason: str) -> None:
    result.converted = [name for name in result.converted if name not in names]
    result.skipped += [(name, reason) for name in names]


# ---- the whole model -------------------------------------------------------------------------------------------------


class _Stop(Exception):
    """Raised where a run of the model has gone far enough."""


@dataclasses.dataclass
class _Stage:
    """Layers that are quantized together, and where they are: "stem", the name of a block, or "rest"."""

    where: str
    layers: list[nn.Module]


class _Run:
    """One call of :func:`gptq_` on its way through the model."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Any],
        forward: Forward | None,
        settings: Settings,
        places: dict[nn.Module, Places],
        result: GPTQResult,
    ) -> None:
        self.model, self.batches, self.forward, self.settings = model, batches, forward, settings
        self.places, self.result = places, result
        self.names: list[str] = []  # of the blocks
        self.made: list[nn.Module] = []
        self._chain: Chain | None = None
        self._replaced: list[tuple[nn.Module, str, nn.Module]] = []
        kinds = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
        self._encoders = [(module, dict(vars(module))) for module in model.modules() if isinstance(module, kinds)]

    def to_the_end(self, blocks: str | Sequence[str] | None, checkpoint: str | Path | None) -> None:
        """All stages; whatever ends them early puts the float layers back."""
        if not self.places:
            return
        try:
            plan = self._plan(blocks)
            saved = None if checkpoint is None else Checkpoint("gptq_", checkpoint, self._identity(plan))
            reached = False
            for number, stage in enumerate(progress(plan, len(plan), "gptq_")):
                found = None if saved is None else self._read(saved, number)
                self.result.resumed += found is not None
                self._enter(stage)
                todo = found or self._solve(stage)
                reached |= any(one.tensors for one in todo.values())
                if found is None and saved is not None:
                    self._write(saved, number, todo)
                for name, one in todo.items():
                    self._conclude(name, one)
                self._leave(stage, plan[number + 1 :])
            if not reached:
                raise ValueError(
                    "quant_ops.gptq_: expected calibration data to reach a layer, got none that did. Give what the model is called "
                    "with, or forward=."
                )
        except BaseException:
            for parent, attribute, module in reversed(self._replaced):
                setattr(parent, attribute, module)
            for module, attributes in self._encoders:
                vars(module).update(attributes)
            raise

    # ---- stages ------------------------------------------------------------------------------------------------------

    def _plan(self, blocks: str | Sequence[str] | None) -> list[_Stage]:
        """The stages of the model; one batch is run to see what comes before the blocks, and whether they are a chain."""
        layers = list(self.places)
        names = [] if self.settings.order == "together" else find_blocks("gptq_", self.model, blocks)
        inside = {name: set(self.model.get_submodule(name).modules()) for name in names}
        outside = [layer for layer in layers if not any(layer in modules for modules in inside.values())]
        before: list[nn.Module] = []
        if names:
            try:
                before = self._called_before(names, outside)
            except NoChain as error:
                if blocks is not None:
                    raise ValueError(
                        f"quant_ops.gptq_: expected blocks that follow one another, got {names} of which {error}. {_AS_A_WHOLE}"
                    ) from error
                self.result.whole, names = str(error), []
        if not names:
            return [_Stage("rest", layers)]
        self.names = self.result.blocks = names
        stages, seen = [_Stage("stem", before)], set(before)
        for name in names:
            stages.append(_Stage(name, [layer for layer in layers if layer in inside[name] and layer not in seen]))
            seen |= inside[name]
        stages.append(_Stage("rest", [layer for layer in layers if layer not in seen]))
        return [stage for stage in stages if stage.layers or stage.where in names]

    def _called_before(self, names: list[str], layers: list[nn.Module]) -> list[nn.Module]:
        """Which of the layers are called before the first block and not again."""
        called: list[nn.Module] = []
        marks: list[int] = []
        first = self.model.get_submodule(names[0])
        handles = [layer.register_forward_pre_hook(lambda module, *_: called.append(module)) for layer in layers]
        handles.append(first.register_forward_pre_hook(lambda *_: marks.append(len(called))))
        try:
            capture(self.model, names, self.batches[:1], self.forward)
        finally:
            for handle in handles:
                handle.remove()
        return [layer for layer in layers if layer in called[: marks[0]] and layer not in called[marks[0] :]]

    def _enter(self, stage: _Stage) -> None:
        if stage.where not in self.names[:1]:
            return
        try:
            self._chain = capture(self.model, self.names, self.batches, self.forward)
        except NoChain as error:
            raise ValueError(
                f"quant_ops.gptq_: expected blocks that follow one another in every batch, got one where {error}. {_AS_A_WHOLE}"
            ) from error

    def _leave(self, stage: _Stage, rest: list[_Stage]) -> None:
        if self._chain is None or stage.where not in self.names:
            return
        if any(later.where in self.names for later in rest):
            self._chain.advance()
        else:
            self._chain = None  # the rest is run from its beginning; the hidden states are needed no more

    def _runs(self, stage: _Stage) -> Generator[None, None, None]:
        """Runs the part of the model that the stage is about, call by call."""
        if stage.where in self.names:
            assert self._chain is not None
            for _ in self._chain.outputs():
                yield
            return
        handle = None
        if stage.where == "stem":

            def stop(*_: Any) -> None:
                raise _Stop

            handle = self.model.get_submodule(self.names[0]).register_forward_pre_hook(stop)
        try:
            for batch in self.batches:
                try:
                    with evaluating(self.model):
                        call(self.model, batch, self.forward)
                except _Stop:
                    pass
                yield
        finally:
            if handle is not None:
                handle.remove()

    # ---- one stage ---------------------------------------------------------------------------------------------------

    def _solve(self, stage: _Stage) -> dict[str, Solved]:
        """All layers of a stage; in the order "layers" those of one input after those of another."""
        parts = self._by_input(stage) if self.settings.order == "layers" else [stage.layers]
        done: dict[str, Solved] = {}
        for part in parts:
            found = self._solve_together(stage, part)
            done |= found
            if len(parts) > 1:
                for name, one in found.items():
                    self._replace(name, one)
        return done

    def _by_input(self, stage: _Stage) -> list[list[nn.Module]]:
        """The layers by the tensor that they get in the first call, in its order; at the end those that it does not reach."""
        sets: list[tuple[Tensor, int, list[nn.Module]]] = []

        def called(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            if any(layer in layers for *_, layers in sets):
                return
            for known, at, layers in sets:
                if known is x and at == version(x):
                    layers.append(layer)
                    return
            sets.append((x, version(x), [layer]))

        handles = [layer.register_forward_pre_hook(called, with_kwargs=True) for layer in stage.layers]
        runs = self._runs(stage)
        try:
            next(runs, None)
        finally:
            runs.close()
            for handle in handles:
                handle.remove()
        found = [layers for *_, layers in sets]
        rest = [layer for layer in stage.layers if not any(layer in layers for layers in found)]
        return [*found, rest] if rest else found

    def _solve_together(self, stage: _Stage, layers: list[nn.Module]) -> dict[str, Solved]:
        """Layers from one run of the stage."""
        names = {layer: self.places[layer].name for layer in layers}
        if not layers:
            return {}
        observers: dict[nn.Module, Prepared] = {
            layer: PREPARED[float_class(layer)].from_float(layer, self.places[layer].config)
            for layer in layers
            if isinstance(self.places[layer].config, Int8Static)
        }
        with Collector({name: layer for layer, name in names.items()}, observers) as collector:
            for _ in self._runs(stage):
                pass
        done: dict[str, Solved] = {}
        hessians = collector.finished()
        while hessians:
            hessian = hessians.pop(0)
            if hessian.rows == 0 or hessian.matrix.numel() == 0:
                continue
            with torch.no_grad():
                factor = Factor(names[hessian.layers[0]], hessian, self.settings)
                for layer in hessian.layers:
                    one = solved(layer, self.places[layer].config, hessian, factor, self.settings)
                    if (observer := observers.get(layer)) is not None:
                        one.tensors |= observer.input_qparams()
                    done[names[layer]] = one
        missing = "no calibration data has reached it: rounded to the nearest"
        return {name: done.get(name) or Solved({}, None, [missing]) for name in names.values()}

    def _conclude(self, name: str, one: Solved) -> None:
        """Puts the quantized layer in its places, and notes what there is to say."""
        result = self.result
        layer, config = self._layer(name)
        if not one.tensors and isinstance(config, Int8Static):
            _skip(result, _names(self.model, layer), "no calibration data has reached it")
            return
        if not any(module is layer for *_, module in self._replaced):  # in the order "layers" it is there already
            self._replace(name, one)
        result.notes += [(name, note) for note in one.notes]
        if one.errors is not None:
            result.errors[name] = one.errors

    def _layer(self, name: str) -> tuple[nn.Module, Scheme]:
        return next((layer, place.config) for layer, place in self.places.items() if place.name == name)

    def _replace(self, name: str, one: Solved) -> None:
        layer, config = self._layer(name)
        if not one.tensors and isinstance(config, Int8Static):
            return
        made = made_layer(layer, config, one)
        self.made.append(made)
        for parent, attribute in self.places[layer].parents:
            self._replaced.append((parent, attribute, layer))
            setattr(parent, attribute, made)
        leave_fused_paths(self.model)

    # ---- checkpoints -------------------------------------------------------------------------------------------------

    def _identity(self, plan: list[_Stage]) -> dict[str, Any]:
        made_by: Any = self.forward
        forward = None if made_by is None else getattr(made_by, "__qualname__", type(made_by).__name__)
        layers = {place.name: place.config.to_json() for place in self.places.values()}
        return {
            "model": digest_of_model(self.model),
            "data": digest_of_data(self.batches),
            "config": layers,
            "settings": {**dataclasses.asdict(self.settings), "forward": forward, "stages": [stage.where for stage in plan]},
        }

    def _write(self, saved: Checkpoint, number: int, todo: Mapping[str, Solved]) -> None:
        tensors = {f"{name}/{key}": tensor for name, one in todo.items() for key, tensor in one.tensors.items()}
        saved.save(number, tensors, {name: {"errors": one.errors, "notes": one.notes} for name, one in todo.items()})

    def _read(self, saved: Checkpoint, number: int) -> dict[str, Solved] | None:
        found = saved.load("gptq_", number)
        if found is None:
            return None
        tensors, notes = found
        todo = {}
        for name, said in notes.items():
            own = {key.rpartition("/")[2]: tensor for key, tensor in tensors.items() if key.rpartition("/")[0] == name}
            errors = None if said["errors"] is None else (float(said["errors"][0]), float(said["errors"][1]))
            todo[name] = Solved(own, errors, list(said["notes"]))
        return todo
