"""The timing loop and the measures of error that reports, examples and benchmarks share."""

import gc
import math
import random

import pytest
import torch

from quant_ops.report.error import Sums, decibel, sqnr
from quant_ops.report.timing import interleave


def recorded(names, **options):
    """The order of all calls, timed or not, and the number of timed ones."""
    seen = []
    times = interleave({name: lambda name=name: seen.append(name) for name in names}, **options)
    return "".join(seen), {name: len(values) for name, values in times.items()}


def test_turns():
    assert recorded("ab", rounds=3, turn=0.0) == ("aabb" * 3, {"a": 3, "b": 3})
    assert recorded("ab", rounds=2, turn=0.0, warm=False) == ("abab", {"a": 2, "b": 2})
    _, counts = recorded("ab", rounds=1, turn=0.002)
    assert min(counts.values()) > 5
    _, counts = recorded("ab", seconds=0.01, turn=0.0)
    assert counts["a"] == counts["b"] > 5


def test_order_settling_and_waiting():
    orders = {recorded("abc", rounds=1, turn=0.0, warm=False, order=random.Random(seed))[0] for seed in range(20)}
    assert len(orders) > 3
    waits = []
    times = interleave({"a": lambda: None}, rounds=4, turn=0.0, settle=0.001, synchronize=lambda: waits.append(gc.isenabled()))
    assert waits == [False] * 8
    assert len(times["a"]) == 4
    assert gc.isenabled()


def test_an_error_gives_the_garbage_collector_back():
    with pytest.raises(ZeroDivisionError):
        interleave({"a": lambda: 1 / 0})
    assert gc.isenabled()


def test_sqnr():
    expected, got = torch.tensor([3.0, 4.0]), torch.tensor([3.0, 4.5])
    assert sqnr(expected, got) == pytest.approx(10 * math.log10(25 / 0.25), rel=1e-12)
    assert sqnr(expected, expected) == decibel(0.0) == math.inf
    assert sqnr(torch.zeros(2), got) == -math.inf
    sums = Sums()
    for part in range(2):
        sums.add(expected[part], got[part])
    assert sums.error == pytest.approx(0.01, rel=1e-12)
    assert sums.cosine == pytest.approx(27 / 5 / math.sqrt(9 + 4.5**2), rel=1e-12)
