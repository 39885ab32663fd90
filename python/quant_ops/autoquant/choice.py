"""The choice for one layer: errors of its candidates on what it has seen, times by cases, and which is the fastest that may be.

error = sum (y - y_q)^2 / sum y^2 of the layer's output over the sample; time = sum over cases of times seen * median seconds.
"""

import contextlib
import dataclasses
import functools
import math
import random
import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..convert.config import Scheme, WeightOnly
from ..convert.prepared import to_int8, to_weight_only
from ..report.error import Sums, decibel
from ..report.timing import duration, interleave
from .cache import FLOAT, Key, TimingCache
from .record import Seen, input_of

_LEAST_ROUNDS = 3
_SETTLE_SECONDS = 0.01  # until the threads of the layer before have stopped looking for work
_MOST_SECONDS = 0.5  # for a case
_GAIN = 0.97  # a candidate has to be faster by more than what is left of the noise


@dataclasses.dataclass
class LayerChoice:
    """What one layer became, and why.

    Attributes:
        name: in the model.
        config: the candidate that was chosen; None: it stays float.
        reason: why it stays float, or what else there is to say.
        calls: how often it was called while shapes were recorded.
        inputs: how often each shape and dtype was seen; shapes of linear layers are rows and columns.
        seconds: of all of these calls whose shapes were timed, by "float" and the candidates' names.
        errors: normalised errors of the output on a sample of the recorded inputs, by the candidates' names.
    """

    name: str
    config: Scheme | None = None
    reason: str = ""
    calls: int = 0
    inputs: dict[tuple[tuple[int, ...], str], int] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def text(self) -> str:
        """For the result's table."""
        shapes = ", ".join(f"{count} x {shape} {dtype}" for (shape, dtype), count in self.inputs.items())
        times = [
            f"{name} {duration(seconds)}{f' at {decibel(self.errors[name]):.1f} dB' if name in self.errors else ''}"
            for name, seconds in self.seconds.items()
        ]
        parts = [part for part in (shapes, ", ".join(times), self.reason) if part]
        return f"{self.name or 'the model itself'}: " + "; ".join(parts)


def label(config: Scheme) -> str:
    """The config's name with what differs from its defaults."""
    fields = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(config, field.name) != field.default
    ]
    return type(config).__name__ + (f"({', '.join(fields)})" if fields else "")


class Budget:
    """Shares the seconds for timing among the cases that are left."""

    def __init__(self, seconds: float, cases: int) -> None:
        self._end, self._left = time.perf_counter() + seconds, cases

    @property
    def is_spent(self) -> bool:
        return time.perf_counter() >= self._end

    def share(self) -> float:
        """For the next case."""
        seconds = (self._end - time.perf_counter()) / max(self._left, 1)
        self._left -= 1
        return min(max(seconds, 0.0), _MOST_SECONDS)


def keys_of(case: Key, configs: Mapping[Scheme, Scheme]) -> dict[Scheme | None, Key]:
    """Of the layer itself (None) and its candidates."""
    return {None: case} | {config: case._replace(candidate=fit.to_json()) for config, fit in configs.items()}


def is_known(case: Key, configs: Mapping[Scheme, Scheme], cache: TimingCache) -> bool:
    """Whether the cache has all times of a case. A candidate that cannot run there has the time infinity in none."""
    return all(key in cache for key in keys_of(case, configs).values())


def choose(
    name: str, seen: Seen, configs: Mapping[Scheme, Scheme], cache: TimingCache, budget: Budget, max_error: float | None
) -> tuple[LayerChoice, nn.Module | None]:
    """The choice, and the layer that takes the float one's place, if another does.

    Args:
        configs: the candidates, each with the config that its layer is made by.
    """
    choice = LayerChoice(name, reason=seen.left_out, calls=seen.calls)
    for case, count in seen.counts.items():
        of = (case.activation, case.dtype)
        choice.inputs[of] = choice.inputs.get(of, 0) + count
    if seen.left_out or not seen.samples:
        choice.reason = choice.reason or "its inputs were empty"
        return choice, None
    made: dict[Scheme, Any] = {}
    for config, fit in configs.items():
        if config in seen.prepared and (unreached := seen.prepared[config].unreached()):
            choice.reason = f"{label(config)}: {unreached}"
            continue
        made[config] = _make(seen, config, fit)
    errors = _errors(seen, made)
    choice.errors = {label(config): error for config, error in errors.items()}
    timed = _timed(seen, made, configs, cache, budget)
    seconds = {config: sum(seen.counts[case] * cache[keys_of(case, configs)[config]] for case in timed) for config in (None, *made)}
    choice.seconds = {FLOAT if config is None else label(config): total for config, total in seconds.items()}
    faster = sorted((config for config in made if seconds[config] < _GAIN * seconds[None]), key=lambda config: seconds[config])
    for config in faster:
        if max_error is None or errors[config] <= max_error:
            choice.config = config
            return choice, made[config]
        choice.reason = f"{label(config)} is faster, but its error {errors[config]:.2g} is more than {max_error:.2g}"
    choice.reason = choice.reason or "no candidate is faster"
    return choice, None


def _timed(
    seen: Seen, made: Mapping[Scheme, Any], configs: Mapping[Scheme, Scheme], cache: TimingCache, budget: Budget
) -> list[Key]:
    """The cases whose times the cache has now: all, or those with the most work, one at least, if the budget is spent."""
    timed: list[Key] = []
    for case in sorted(seen.samples, key=lambda case: -seen.counts[case] * math.prod(case.activation)):
        if not is_known(case, {config: configs[config] for config in made}, cache):
            if timed and budget.is_spent:
                continue
            _time(case, seen, made, configs, cache, budget.share())
        timed.append(case)
    return timed


def _make(seen: Seen, config: Scheme, fit: Scheme) -> nn.Module:
    if config in seen.prepared:
        return seen.prepared[config].to_int8()
    if isinstance(fit, WeightOnly):
        return to_weight_only(seen.layer, fit)
    return to_int8(seen.layer, fit)  # type: ignore[arg-type]


@contextlib.contextmanager
def _as_recorded(case: Key) -> Iterator[None]:
    """The autocast of the recorded call."""
    kind = "cpu" if case.device == "cpu" else "cuda"
    dtype = getattr(torch, case.autocast) if case.autocast else None
    with torch.autocast(kind, dtype=dtype, enabled=bool(case.autocast), cache_enabled=False), torch.no_grad():
        yield


def _errors(seen: Seen, made: Mapping[Scheme, nn.Module]) -> dict[Scheme, float]:
    sums = {config: Sums() for config in made}
    for case, kept in seen.samples.items():
        with _as_recorded(case):
            for x in kept:
                expected = seen.layer.forward(x)
                for config, layer in made.items():
                    sums[config].add(expected, layer(x))
    return {config: total.error for config, total in sums.items()}


def _time(
    case: Key, seen: Seen, made: Mapping[Scheme, Any], configs: Mapping[Scheme, Scheme], cache: TimingCache, seconds: float
) -> None:
    """Puts the medians of the case into the cache, all of them measured in turns."""
    layers: dict[Any, Any] = {None: seen.layer, **made}
    x = input_of(case, seen.samples[case])
    calls = {str(i): functools.partial(layer.forward, x) for i, layer in enumerate(layers.values())}
    with _as_recorded(case):
        for call in calls.values():  # what the first call alone does
            call()
        times = interleave(
            calls,
            seconds=seconds,
            rounds=_LEAST_ROUNDS,
            order=random.Random(0),
            settle=0.0 if x.is_cuda or case.threads == 1 else _SETTLE_SECONDS,
            synchronize=torch.cuda.synchronize if x.is_cuda else None,
        )
    keys = keys_of(case, configs)
    for config, values in zip(layers, times.values(), strict=True):
        cache[keys[config]] = undisturbed_median(values)


def undisturbed_median(values: list[float]) -> float:
    """The median of the calls that no other process interrupted for as long again as the shortest call takes."""
    least = min(values)
    return statistics.median(value for value in values if value <= 2 * least)
