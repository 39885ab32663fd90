"""No call kills the process or hangs it: random hostile calls (hostile_calls.py), in a process of their own."""

import sys
from pathlib import Path

import pytest
import torch
from hostile_calls import function_of, good
from processes import python

SCRIPT = Path(__file__).parent / "hostile_calls.py"


def run(seed: int, count: int) -> None:
    done = python(SCRIPT, seed, count, timeout=240 + count / 5)
    last = "\n".join(done.stdout.splitlines()[-2:])
    assert done.returncode == 0, f"status {done.returncode}\n{last}\n{done.stderr[-2000:]}"
    assert "refused" in last


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("seed", range(2))
def test_hostile_calls(seed):
    run(seed, 300)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
@pytest.mark.parametrize("seed", range(100, 112))
def test_many_hostile_calls(seed):
    run(seed, 1000)


@pytest.mark.parametrize("name", ["quant_float_forward", "quant_float_backward", "quant_block_forward", "quant_block_backward"])
def test_integers_of_formats_do_not_wrap(name):
    """An integer that is right in its low 8, 16 or 32 bits, or far out, is refused: that argument, with its value."""
    function = function_of(name)
    for argument, value in good(name).items():
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        far = [sign * (2**bits) + value for bits in (8, 16, 31, 32, 33, 62) for sign in (1, -1)]
        for wrong in (*far, 2**63 - 1, 2**63 - 1 - value, -(2**63), -(2**63) + value):
            arguments = {**good(name), argument: wrong}
            if argument == "block_size" and wrong > 0:  # one block
                expected = function(**{**good(name), argument: 4})
                assert torch.equal(function(**arguments), expected)
                continue
            words = "a bias" if argument == "bias" else argument
            with pytest.raises(ValueError, match=rf"^quant_ops\.{name}: expected .*{words}.*, got {wrong}\b"):
                function(**arguments)
