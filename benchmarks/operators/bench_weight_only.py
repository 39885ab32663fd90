"""weight_only_linear and weight_only_embedding against torch's floating operators. Results are checked before anything is timed.

The peers of weight_only_linear in torch and other packages: benchmarks/packages/weight_only.py.
"""

import functools

import pytest
import torch
from torch.nn import functional as F

import quant_ops as qo
from benchmarks.common.shapes import Linear
from benchmarks.operators.cases import cases, check

SETS = {"tiny": [Linear(3, 40, 256)], "llama-7b": [Linear(M, 4096, 4096) for M in (1, 4, 16, 128, 512)]}
LOOKUPS = {"tiny": [(5, 40, 256)], "llama-7b": [(1, 32000, 4096), (512, 32000, 4096)]}  # indices, N, K
GROUP = 128


@functools.lru_cache(maxsize=1)
def operands(n, k, bits):
    """(codes, scale, packed, the dequantized weight)"""
    generator = torch.Generator().manual_seed(0)
    group, low = (GROUP, -8) if bits == 4 else (-1, -128)
    codes = torch.randint(low, -low, (n, k), generator=generator, dtype=torch.int8)
    scale = torch.rand(n, k // GROUP if bits == 4 else 1, generator=generator) * 0.01 + 0.01
    packed = qo.pack_weight_only(codes, bits, group)
    return codes, scale, packed, qo.weight_only_embedding(torch.arange(n), codes, scale, None, bits, group, packed_weight=packed)


@pytest.mark.parametrize("contender", ["ours A8", "ours A16", "ours A16 bf16", "fp32", "bf16"])
@pytest.mark.parametrize("bits", [4, 8])
@cases(SETS)
def bench_weight_only_linear(measure, case, bits, contender):
    shape, group = case[1], GROUP if bits == 4 else -1
    codes, scale, packed, weight = operands(shape.N, shape.K, bits)
    x = torch.randn(shape.M, shape.K, generator=torch.Generator().manual_seed(1))
    reference = F.linear(x, weight)
    typed = x.bfloat16() if contender.endswith("bf16") else x
    if contender.startswith("ours"):
        arguments = (typed, codes, scale, None, None, bits, group)
        dynamic = contender == "ours A8"
        call = lambda: qo.weight_only_linear(*arguments, packed_weight=packed, dynamic=dynamic)  # noqa: E731
    else:
        call = functools.partial(F.linear, typed, weight.to(typed.dtype))
    check(call(), 30.0, reference)
    measure(
        call,
        stem="weight_only_linear",
        case=case,
        contender=contender,
        macs=shape.macs,
        share=contender == "ours A8",
        detail=f" {bits} bits",
    )


@pytest.mark.parametrize("contender", ["ours", "ours plain", "fp32"])
@pytest.mark.parametrize("bits", [4, 8])
@cases(LOOKUPS)
def bench_weight_only_embedding(measure, case, bits, contender):
    count, n, k = case[1]
    codes, scale, packed, weight = operands(n, k, bits)
    indices = torch.randint(n, (count,), generator=torch.Generator().manual_seed(1))
    expected = F.embedding(indices, weight)
    arguments = (indices, codes, scale, None, bits, GROUP if bits == 4 else -1)
    calls = {
        "ours": lambda: qo.weight_only_embedding(*arguments, packed_weight=packed),
        "ours plain": lambda: qo.weight_only_embedding(*arguments),
        "fp32": lambda: F.embedding(indices, weight),
    }
    assert torch.equal(calls[contender](), expected)
    measure(
        calls[contender],
        stem="weight_only_embedding",
        case=case,
        contender=contender,
        memory=expected.nbytes,
        detail=f" {bits} bits",
    )
