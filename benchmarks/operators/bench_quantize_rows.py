"""quantize_rows against eager torch. Results are checked before anything is timed."""

import pytest
import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import cases, tensor


@pytest.mark.parametrize("contender", ["ours", "eager"])
@cases(shapes.ROWS)
def bench_quantize_rows(measure, case, contender):
    x = tensor(case[1])

    def eager():
        scale = x.abs().amax(-1, keepdim=True) / 127
        return torch.clamp(torch.round(x / scale), -127, 127).to(torch.int8), scale

    call = (lambda: qo.quantize_rows(x)[:2]) if contender == "ours" else eager
    assert all(torch.equal(a, b) for a, b in zip(call(), eager(), strict=True))
    measure(call, stem="quantize_rows", case=case, contender=contender, memory=x.numel() * 5)
