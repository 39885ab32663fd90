"""The timing loop of every script: all contenders in one process, in turns, in a new order each round.

Other work on the machine and changes of its clock then meet all contenders alike. What a turn does differs by device and is passed
in: `cpu_turn` below, the replay of a CUDA graph in gpu/bench.py. The files of operators/ are timed by pytest-benchmark.
"""

import gc
import random
import time

import torch

TURN_SECONDS = 0.002
SETTLE_SECONDS = 0.01  # until the threads of the contender before have stopped looking for work


def in_turns(turns, *, rounds, seconds=0.0):
    """The times that the turns return, by name. There are at least `rounds` rounds, and as many as fit in `seconds`."""
    times = {name: [] for name in turns}
    order, shuffle = list(turns), random.Random(0).shuffle
    gc.collect()
    gc.disable()
    try:
        end, done = time.perf_counter() + seconds, 0
        while done < rounds or time.perf_counter() < end:
            shuffle(order)
            for name in order:
                times[name] += turns[name]()
            done += 1
    finally:
        gc.enable()
    return times


def cpu_turn(call):
    """Seconds of each of the calls that fit in TURN_SECONDS, at least one, after an untimed one that brings the caches back."""
    if torch.get_num_threads() > 1:
        time.sleep(SETTLE_SECONDS)
    call()
    times, until = [], time.perf_counter() + TURN_SECONDS
    while True:
        start = time.perf_counter()
        call()
        now = time.perf_counter()
        times.append(now - start)
        if now >= until:
            return times
