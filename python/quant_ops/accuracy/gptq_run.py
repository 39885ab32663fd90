"""One call of :func:`gptq_` on its way through the model, stage after stage, and its result.

A stage is run on what it gets from the quantized layers before it, its Hessians are summed by hooks, and its layers are replaced.
Read first: blocks.py, hessian.py, layer.py.
"""

import dataclasses
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._models import Forward, Table, call, evaluating
from ..convert.calibrate import progress
from ..convert.config import Int8Static, Scheme
from ..convert.prepared import PREPARED, Prepared
from ..convert.select import ConversionResult, Places, leave_fused_paths
from ..nn import float_class
from .blocks import Chain, NoChain, capture, find_blocks
from .checkpoint import Checkpoint, digest_of_data, digest_of_model
from .hessian import Collector, version
from .layer import Factor, Settings, Solved, for_checkpoint, from_checkpoint, made_layer, solved

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

    def skip(self, model: nn.Module, layer: nn.Module, reason: str) -> None:
        """Takes a layer out of the converted ones, under all of its names."""
        names = [name for name, module in model.named_modules(remove_duplicate=False) if module is layer]
        self.converted = [name for name in self.converted if name not in names]
        self.skipped += [(name, reason) for name in names]

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


class _Stop(Exception):
    """Raised where a run of the model has gone far enough."""


@dataclasses.dataclass
class _Stage:
    """Layers that are quantized together, and where they are: "stem", the name of a block, or "rest"."""

    where: str
    layers: list[nn.Module]


class Run:
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
                self._enter(stage)
                for name, one in self._solved(stage, number, saved).items():
                    reached |= bool(one.tensors)
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

    def _solved(self, stage: _Stage, number: int, saved: Checkpoint | None) -> dict[str, Solved]:
        """All layers of a stage, from the checkpoint if it is there, or else to be there from now on."""
        if not stage.layers:
            return {}
        found = None if saved is None else saved.load("gptq_", number)
        if found is not None:
            self.result.resumed += 1
            return from_checkpoint(*found)
        done = self._solve(stage)
        if saved is not None:
            saved.save(number, *for_checkpoint(done))
        return done

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
        observers: dict[nn.Module, Prepared] = {
            layer: PREPARED[float_class(layer)].from_float(layer, self.places[layer].config)
            for layer in layers
            if isinstance(self.places[layer].config, Int8Static)
        }
        with Collector(layers, observers) as collector:
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
            result.skip(self.model, layer, "no calibration data has reached it")
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

    def _identity(self, plan: list[_Stage]) -> dict[str, Any]:
        """What a checkpoint has to have in common with this call."""
        made_by: Any = self.forward
        forward = None if made_by is None else getattr(made_by, "__qualname__", type(made_by).__name__)
        layers = {place.name: place.config.to_json() for place in self.places.values()}
        return {
            "model": digest_of_model(self.model),
            "data": digest_of_data("gptq_", self.batches),
            "config": layers,
            "settings": {**dataclasses.asdict(self.settings), "forward": forward, "stages": [stage.where for stage in plan]},
        }
