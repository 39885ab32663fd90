"""Exhaustive sweeps: all of their cases under `make test-all`, and the same random part of them every time under `make test`."""

import os
import random
from collections.abc import Iterable
from typing import TypeVar

ALL = os.environ.get("QUANT_OPS_TEST_ALL") == "1"
Case = TypeVar("Case")


def part(cases: Iterable[Case], count: int, seed: int | str = 0) -> list[Case]:
    """`count` of the cases in their order, or all of them; which ones depends on `seed`."""
    cases = list(cases)
    if ALL or count >= len(cases):
        return cases
    return [cases[i] for i in sorted(random.Random(seed).sample(range(len(cases)), count))]


def examples(count: int) -> int:
    """Of hypothesis, which draws others every time."""
    return count if ALL else count // 4
