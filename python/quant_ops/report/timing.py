"""One way to time contenders against each other: in turns, so that other work and the clock's changes meet all of them alike."""

import functools
import gc
import math
import random
import time
from collections.abc import Callable, Mapping
from typing import Any


def in_turns(
    turns: Mapping[str, Callable[[], list[float]]],
    *,
    seconds: float = 0.0,
    rounds: int = 1,
    order: random.Random | None = None,
) -> dict[str, list[float]]:
    """The times that the turns of each contender return, by name.

    Args:
        turns: one turn of each contender, such as the replay of a CUDA graph.
        seconds, rounds: at least so many rounds, and as many as fit in ``seconds``; in a round each contender has one turn.
        order: shuffles the contenders in each round; without it they keep theirs.
    """
    times: dict[str, list[float]] = {name: [] for name in turns}
    names = list(turns)
    collects = gc.isenabled()
    gc.disable()
    try:
        end, done = time.perf_counter() + seconds, 0
        while done < rounds or time.perf_counter() < end:
            if order is not None:
                order.shuffle(names)
            for name in names:
                times[name] += turns[name]()
            done += 1
    finally:
        if collects:
            gc.enable()
    return times


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    turn: float = 0.002,
    warm: bool = True,
    settle: float = 0.0,
    synchronize: Callable[[], Any] | None = None,
    **rounds: Any,
) -> dict[str, list[float]]:
    """Seconds of every timed call of each contender, by name.

    Args:
        calls: the contenders.
        turn: seconds of a turn, which is at least one timed call.
        warm: a turn starts with an untimed call, which brings the contender's data back into the caches.
        settle: seconds to sleep before a turn, so that the threads of the contender before stop looking for work.
        synchronize: waits for the device, before and after each timed call, e.g. ``torch.cuda.synchronize``.
        rounds: seconds, rounds and order of :func:`in_turns`.
    """

    def turn_of(call: Callable[[], Any]) -> list[float]:
        if settle:
            time.sleep(settle)
        if warm:
            call()
        return _timed(call, turn, synchronize)

    return in_turns({name: functools.partial(turn_of, call) for name, call in calls.items()}, **rounds)


def _timed(call: Callable[[], Any], seconds: float, synchronize: Callable[[], Any] | None) -> list[float]:
    times = []
    until = time.perf_counter() + seconds
    while True:
        if synchronize is not None:
            synchronize()
        start = time.perf_counter()
        call()
        if synchronize is not None:
            synchronize()
        now = time.perf_counter()
        times.append(now - start)
        if now >= until:
            return times


def duration(seconds: float) -> str:
    """Three digits and the unit, for people."""
    for unit, factor in (("us", 1e6), ("ms", 1e3)):
        value = seconds * factor
        if value < 999.5:
            return f"{value:.{max(0, 2 - math.floor(math.log10(max(value, 1))))}f} {unit}"
    return f"{seconds:.2f} s"
