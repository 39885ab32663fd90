"""One way to time contenders against each other: in turns, so that other work and the clock's changes meet all of them alike."""

import gc
import random
import time
from collections.abc import Callable, Mapping
from typing import Any


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    *,
    seconds: float = 0.0,
    rounds: int = 1,
    turn: float = 0.002,
    warm: bool = True,
    settle: float = 0.0,
    order: random.Random | None = None,
    synchronize: Callable[[], Any] | None = None,
) -> dict[str, list[float]]:
    """Seconds of every timed call of each contender, by name.

    Args:
        calls: the contenders.
        seconds, rounds: at least so many rounds, and as many as fit in ``seconds``; in a round each contender has one turn.
        turn: seconds of a turn, which is at least one timed call.
        warm: a turn starts with an untimed call, which brings the contender's data back into the caches.
        settle: seconds to sleep before a turn, so that the threads of the contender before stop looking for work.
        order: shuffles the contenders in each round; without it they keep theirs.
        synchronize: waits for the device, before and after each timed call, e.g. ``torch.cuda.synchronize``.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collects = gc.isenabled()
    gc.disable()
    try:
        end, done = time.perf_counter() + seconds, 0
        while done < rounds or time.perf_counter() < end:
            if order is not None:
                order.shuffle(names)
            for name in names:
                if settle:
                    time.sleep(settle)
                if warm:
                    calls[name]()
                times[name] += _turn(calls[name], turn, synchronize)
            done += 1
    finally:
        if collects:
            gc.enable()
    return times


def _turn(call: Callable[[], Any], seconds: float, synchronize: Callable[[], Any] | None) -> list[float]:
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
