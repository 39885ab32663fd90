"""``autoquant_``: records what the layers see, at once, in the model's first call, or in several, and then chooses and replaces."""

import contextlib
import dataclasses
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .._models import Forward, Result, Table, call, evaluating, has_hooks, held_bytes, patched, reasons, show_bytes
from ..convert.config import Int8Dynamic, Int8DynamicInt4Weight, Int8Static, Int8WeightOnly, Scheme, WeightOnly
from ..convert.prepared import is_sharded
from ..convert.select import FLOAT, Filter, Places, all_layers, replace_, select
from .cache import AUTOQUANT_CACHE, TimingCache
from .cache import FLOAT as FLOAT_NAME
from .choice import Budget, LayerChoice, choose, is_known, label
from .record import Seen, without_fused_paths

_CANDIDATES: tuple[Scheme, ...] = (Int8Dynamic(), Int8WeightOnly())
_KINDS: tuple[type[Scheme], ...] = (Int8Dynamic, Int8Static, WeightOnly)
_log = logging.getLogger("quant_ops")


@dataclasses.dataclass(repr=False)
class AutoquantResult(Result):
    """What :func:`autoquant_` did. It prints as a table with the times, also in a notebook. Until it has chosen it is empty.

    Attributes:
        layers: the choice for each layer that has been seen, with its times and errors.
        skipped: name and reason of every layer that was no candidate, or was never called.
        seconds_before, seconds_after: of all recorded calls of the layers, by the measured times.
        bytes_before, bytes_after: memory that the whole model's tensors hold.
        finished: whether it has chosen.
    """

    layers: list[LayerChoice] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    seconds_before: float = 0.0
    seconds_after: float = 0.0
    bytes_before: int = 0
    bytes_after: int = 0
    finished: bool = False
    _session: "_Session | None" = dataclasses.field(default=None, compare=False)

    @property
    def converted(self) -> list[str]:
        """The names of the layers that are quantized now."""
        return [layer.name for layer in self.layers if layer.config is not None]

    def finalize(self) -> "AutoquantResult":
        """Chooses by what the layers have seen so far, and replaces them. Returns the result.

        Raises:
            RuntimeError: it has chosen already, or was cancelled.
            ValueError: as :func:`autoquant_`. The model is then as it was, and goes on recording.
        """
        if self._session is None:
            state = "has chosen already" if self.finished else "was cancelled"
            raise RuntimeError(f"quant_ops.AutoquantResult.finalize: expected one that still records, got one that {state}")
        self._session.finish()
        return self

    def cancel(self) -> None:
        """Stops recording; the model is as it was. Nothing happens if it has chosen already."""
        if self._session is not None:
            self._session.remove_hooks()
            self._session = None

    def _table(self) -> Table:
        if not self.finished:
            return ("waiting for the model's first call" if self._session is not None else "cancelled"), ("",), []
        quantized = len(self.converted)
        summary = f"{quantized} of {len(self.layers) + len(self.skipped)} layers quantized"
        if quantized:
            gain = self.seconds_before / self.seconds_after
            summary += (
                f"; {1e3 * self.seconds_before:.3g} -> {1e3 * self.seconds_after:.3g} ms in the layers ({gain:.2f} x), "
                f"{show_bytes(self.bytes_before)} -> {show_bytes(self.bytes_after)}"
            )
        lines = [(type(layer.config).__name__ if layer.config else "float", layer.text()) for layer in self.layers]
        lines += [("float", text) for text in reasons(self.skipped)]
        return summary, tuple({label for label, _ in lines} | {"float"}), lines


def autoquant_(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    candidates: Sequence[Scheme] = _CANDIDATES,
    seconds: float = 10.0,
    max_error: float | None = 0.01,
    cache: TimingCache | str | os.PathLike[str] | None = None,
    ignore_other: bool = False,
    error_on_unseen: bool = True,
    manual: bool = False,
    include: Sequence[Filter] = ("*",),
    exclude: Sequence[Filter] = (),
    forward: Forward | None = None,
) -> AutoquantResult:
    """Replaces each nn.Linear, nn.Conv1d and nn.Conv2d of a model, in place, by the candidate that is the fastest here, if any is.

    The inputs of the layers are recorded in a call of the model, in eval mode and without gradients: with ``example_inputs`` now;
    without them before the model's next call, which then already runs with the chosen layers; with ``manual`` in all of the user's
    calls until ``result.finalize()``. For every shape that is new the float layer and the candidates are timed in turns, each on
    the recorded values, and the median of the calls that nothing interrupted is kept. A layer becomes the candidate whose times,
    each multiplied by how often its shape was seen, have the smallest sum, unless float is as fast within 3 %.

    A model that ``torch.compile`` has wrapped is recorded eagerly, and compiled, or compiled again, with the chosen layers in its
    next call. Layers are timed alone: what the compiler would fuse with them is not seen. Given the times in ``cache``, the choice
    depends on the model and the data alone.

    Args:
        model: any module; its own layers are replaced, so it must not be such a layer itself.
        example_inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments; with ``forward`` anything.
        candidates: configs without data (``Int8Dynamic``, ``Int8WeightOnly``, ``Int4WeightOnly``, ``Int8DynamicInt4Weight``), and
            ``Int8Static``, calibrated with the recorded inputs.
        seconds: for timing, shared among the new shapes. When it is spent, a layer's shapes with the least work are left out; one
            of each layer is measured three times at least.
        max_error: a candidate is refused for a layer if ``sum (y - y_q)^2 / sum y^2`` of the layer's output is more, on at most
            2^18 elements of the recorded inputs of each shape. 0.01 is an SQNR of 20 dB; None allows any.
        cache: a :class:`TimingCache` or the path of one, which need not exist yet: what is measured is added and saved, even if
            the call fails later. Default: the one of this process, ``quant_ops.AUTOQUANT_CACHE``.
        ignore_other: a file of another machine or version is measured anew and replaced instead of refused.
        error_on_unseen: False leaves layers float that no input has reached.
        manual: record the user's calls; ``result.finalize()`` chooses, ``result.cancel()`` gives up.
        include, exclude: as for :func:`quantize_`.
        forward: called as ``forward(model, example_inputs)`` instead, e.g. to run the model several times.

    Returns:
        The choice and the times of each layer, and which layers were left out and why. Without ``example_inputs`` it is filled
        when the choice is made.

    Raises:
        TypeError: a candidate is no such config, a filter list is one string, or cache is neither of the two.
        ValueError: no candidates, a pattern that matches nothing, NaN or Inf in a weight, a layer that was never called, or a
            cache of another machine or version. Whatever is raised, the interruption of the user too, the model is as it was.
    """
    _check(candidates, seconds, max_error, example_inputs, manual)
    path = None if cache is None or isinstance(cache, TimingCache) else cache
    if path is not None and not isinstance(path, str | os.PathLike):
        raise TypeError(
            f"quant_ops.autoquant_: expected cache to be a TimingCache or the path of one, got {type(path).__name__}. Make "
            "one with qo.TimingCache(times)."
        )
    if path is not None:
        times = TimingCache.load(path, ignore_other=ignore_other) if os.path.exists(path) else TimingCache()
    else:
        times = AUTOQUANT_CACHE if cache is None else cache  # type: ignore[assignment]
    session = _Session(model, candidates, include, exclude)
    session.settings = {"seconds": seconds, "max_error": max_error, "error_on_unseen": error_on_unseen}
    session.times, session.path = times, path
    if example_inputs is None:
        session.result._session = session
        session.wait(manual)
        return session.result
    try:
        session.run(lambda real: call(real, example_inputs, forward))
        session.finish()
    finally:
        session.remove_hooks()
    return session.result


def _check(candidates: Sequence[Scheme], seconds: float, max_error: float | None, example_inputs: Any, manual: bool) -> None:
    op = "quant_ops.autoquant_"
    if not candidates:
        raise ValueError(f"{op}: expected at least one candidate, got none")
    for config in candidates:
        if not isinstance(config, _KINDS):
            known = ", ".join(kind.__name__ for kind in (Int8Dynamic, Int8Static, Int8WeightOnly, Int8DynamicInt4Weight))
            raise TypeError(f"{op}: expected candidates to be configs ({known}, Int4WeightOnly), got {config!r}")
        if isinstance(config, Int8Static) and config.num_steps > 1:
            raise ValueError(f"{op}: expected a static candidate with num_steps=1, got {config.num_steps}. Use prepare_.")
    if not seconds >= 0:
        raise ValueError(f"{op}: expected seconds >= 0, got {seconds}")
    if max_error is not None and not max_error > 0:
        raise ValueError(f"{op}: expected max_error > 0 or None, got {max_error}")
    if manual and example_inputs is not None:
        raise ValueError(f"{op}: expected no example_inputs with manual=True, got both. Call the model, then result.finalize().")


class _Session:
    """From the recording of a model's layers to their replacement."""

    def __init__(
        self, model: nn.Module, candidates: Sequence[Scheme], include: Sequence[Filter], exclude: Sequence[Filter]
    ) -> None:
        self.model, self.real = model, _original(model)
        self.result = AutoquantResult()
        self.settings: dict[str, Any] = {}
        self.times: TimingCache = AUTOQUANT_CACHE
        self.path: str | os.PathLike[str] | None = None
        self._places: dict[nn.Module, Places] = {}  # in these the config is that of the layer's first candidate
        self._configs: dict[nn.Module, dict[Scheme, Scheme]] = {}  # of each layer: candidates, with the configs that fit it
        skipped: dict[str, str] = {}
        for config in candidates:
            places, chosen = select("autoquant_", self.real, config, include, [*exclude, _is_embedding], _KINDS)
            skipped = dict(chosen.skipped) | skipped
            for module, place in places.items():
                self._places.setdefault(module, place)
                self._configs.setdefault(module, {})[config] = place.config
        for name, module, *_ in all_layers(self.real, FLOAT):
            if module not in self._places:
                self.result.skipped.append((name, skipped[name]))
            elif is_sharded(module.weight):  # type: ignore[arg-type]
                raise ValueError(
                    f"quant_ops.autoquant_: expected whole weights, got a sharded one (DTensor) in layer {name!r}. Call it before "
                    "the model is sharded."
                )
        self._seen = {module: Seen(module) for module in self._places}
        self._handles: list[Any] = []
        self._calling = False
        for module, seen in self._seen.items():
            for config, fit in self._configs[module].items():
                seen.prepare(config, fit)
        if not self._seen:
            warnings.warn(
                "quant_ops.autoquant_: expected at least one Linear, Conv1d or Conv2d, got none: the model stays as it was.",
                stacklevel=3,
            )
        for module, seen in self._seen.items():  # last, since nothing may fail after it
            self._handles.append(module.register_forward_pre_hook(seen.record, with_kwargs=True))

    def run(self, call_model: Callable[[nn.Module], Any]) -> None:
        """Records what one call of the model does, which runs eagerly."""
        eager = torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()
        with evaluating(self.real), without_fused_paths(), eager:
            call_model(self.real)

    def wait(self, manual: bool) -> None:
        """For the model's next call, or for the user's word."""
        if self.real._compiled_call_impl is not None:
            self.remove_hooks()
            raise ValueError(
                "quant_ops.autoquant_: expected example_inputs for a model that its own compile() has compiled, got none. Pass "
                "them, or pass torch.compile(model)."
            )
        if not manual:
            self._handles.append(self.model.register_forward_pre_hook(self._before_call, with_kwargs=True))
        elif self.model is not self.real:  # its calls are to be recorded, not compiled
            compiled = self.model.forward
            self.model.forward = self.real.__call__
            self._handles.append(_Undo(lambda: setattr(self.model, "forward", compiled)))

    def _before_call(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook on the model. The call that it makes itself passes through."""
        if self._calling:
            return
        self._calling = True
        try:
            self.run(lambda real: real(*args, **kwargs))
            self.finish()
        finally:
            self._calling = False

    def remove_hooks(self) -> None:
        """Leaves the model as it was."""
        while self._handles:
            self._handles.pop().remove()

    def finish(self) -> None:
        """Chooses and replaces."""
        unseen = [place.name for module, place in self._places.items() if not self._seen[module].calls]
        if unseen and self.settings["error_on_unseen"]:
            raise ValueError(
                f"quant_ops.autoquant_: expected inputs that reach every layer, got none at {unseen}. Give inputs that do, exclude "
                "these layers, or pass error_on_unseen=False, which leaves them float."
            )
        known = self.times
        new = {
            case for module, seen in self._seen.items() for case in seen.samples if not is_known(case, self._configs[module], known)
        }
        budget = Budget(self.settings["seconds"], len(new))
        choices: list[LayerChoice] = []
        layers: dict[nn.Module, nn.Module] = {}
        try:
            with torch.inference_mode(False):  # its tensors would be refused outside of inference mode
                self._choose(choices, layers, budget)
        finally:
            if self.path is not None:
                known.save(self.path)
        self._finish(choices, layers, unseen)

    def _choose(self, choices: list[LayerChoice], layers: dict[nn.Module, nn.Module], budget: Budget) -> None:
        """Adds the choice for each layer that was called, and the layer that takes its place."""
        for module, place in self._places.items():
            if not (seen := self._seen[module]).calls:
                continue
            choice, layer = choose(place.name, seen, self._configs[module], self.times, budget, self.settings["max_error"])
            choices.append(choice)
            if layer is not None:
                layers[module] = layer

    def _finish(self, choices: list[LayerChoice], layers: dict[nn.Module, nn.Module], unseen: list[str]) -> None:
        result = self.result
        result.bytes_before = held_bytes(self.real)
        self.remove_hooks()
        by_name = {choice.name: choice for choice in choices}
        for module, place in self._places.items():
            reason = patched(module) or ("it has hooks, which a replacement would lose" if has_hooks(module) else None)
            if module in layers and reason is not None:  # they came while it was recorded
                by_name[place.name].config, by_name[place.name].reason = None, reason
                del layers[module]
        _note_tied(self.real, {self._places[module].name: by_name[self._places[module].name] for module in layers})
        self._replace(layers)
        order = {name: i for i, (name, _) in enumerate(self.real.named_modules(remove_duplicate=False))}
        result.layers = sorted(choices, key=lambda choice: order[choice.name])
        result.skipped += [(name, "no input has reached it") for name in unseen]
        result.skipped.sort(key=lambda entry: order[entry[0]])
        for choice in choices:
            if choice.seconds:
                result.seconds_before += choice.seconds[FLOAT_NAME]
                result.seconds_after += choice.seconds[label(choice.config) if choice.config else FLOAT_NAME]
        result.bytes_after = held_bytes(self.real)
        result.finished, result._session = True, None
        _log.info("%s", result)

    def _replace(self, layers: dict[nn.Module, nn.Module]) -> None:
        """All of them, or none if it is interrupted."""
        places = {module: self._places[module] for module in layers}
        before = [(parent, attribute, module) for module, place in places.items() for parent, attribute in place.parents]
        try:
            replace_(self.real, places, lambda module, _: layers[module])
        except BaseException:
            for parent, attribute, module in before:
                setattr(parent, attribute, module)
            raise


class _Undo:
    """As a handle of a hook."""

    def __init__(self, remove: Callable[[], None]) -> None:
        self.remove = remove


def _original(model: nn.Module) -> nn.Module:
    """The model inside of what torch.compile returns; its class is not imported, which would take a second."""
    compiled = any(kind.__name__ == "OptimizedModule" for kind in type(model).__mro__)
    return model._orig_mod if compiled else model  # type: ignore[return-value]


def _is_embedding(_: str, module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _note_tied(model: nn.Module, choices: dict[str, LayerChoice]) -> None:
    """Other modules keep the float weight, or get a quantized copy of their own."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := module._parameters.get("weight")) is not None:
            owners.setdefault(id(weight), []).append(name)
    for name, choice in choices.items():
        for other in owners.get(id(model.get_submodule(name)._parameters["weight"]), ()):
            if other != name:
                what = "has a quantized copy of its own" if other in choices else "stays float"
                choice.reason += f"{'; ' if choice.reason else ''}its weight is tied to that of {other!r}, which {what}"
