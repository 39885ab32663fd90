"""choose_qparams against eager torch. Results are checked before anything is timed."""

import pytest
import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import cases, tensor

DIMS = {"per tensor": [0, 1, 2, 3], "per channel": [0, 2, 3], "per column": [0, 1, 2]}


@pytest.mark.parametrize("contender", ["ours", "eager"])
@pytest.mark.parametrize("kind", DIMS)
@cases(shapes.TENSOR)
def bench_choose_qparams(measure, case, kind, contender):
    x, dims = tensor(case[1]), DIMS[kind]

    def eager():
        return x.abs().amax(dims, keepdim=True) / 127

    call = (lambda: qo.choose_qparams(x, dims, -127, 127)[0]) if contender == "ours" else eager
    assert torch.equal(call(), eager())
    measure(call, stem="choose_qparams", case=case, contender=contender, memory=x.numel() * 4, detail=f" {kind}")
