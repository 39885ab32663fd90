"""torchao's affine primitives against torchao's eager form, for groups of 128. Results are checked before anything is timed."""

import functools

import pytest
import torch

import quant_ops as qo
from benchmarks.operators.cases import cases

SETS = {"tiny": [(3, 256)], "llama-7b": [(4096, 4096)]}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BLOCK = (1, 128)


def torchao():
    return pytest.importorskip("torchao.quantization.quant_primitives")


@functools.lru_cache(maxsize=1)
def operands(shape, name):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DTYPES[name])
    scale, zero_point = qo.choose_qparams_affine(x, "ASYMMETRIC", BLOCK, torch.uint4)
    return x, scale, zero_point, qo.quantize_affine(x, BLOCK, scale, zero_point, torch.uint4)


@pytest.mark.parametrize("contender", ["ours", "torchao"])
@pytest.mark.parametrize("dtype", DTYPES)
@cases(SETS)
def bench_choose_qparams_affine(measure, case, dtype, contender):
    x, scale, zero_point, _ = operands(case[1], dtype)
    if contender == "ours":
        call = lambda: qo.choose_qparams_affine(x, "ASYMMETRIC", BLOCK, torch.uint4)  # noqa: E731
    else:
        ao = torchao()
        call = lambda: ao.choose_qparams_affine(x, ao.MappingType.ASYMMETRIC, BLOCK, torch.uint4)  # noqa: E731
    for result, expected in zip(call(), (scale, zero_point), strict=True):
        assert torch.equal(result, expected)
    measure(call, stem="choose_qparams_affine", case=case, contender=contender, memory=x.nbytes, detail=f" {dtype}")


@pytest.mark.parametrize("contender", ["ours", "torchao"])
@pytest.mark.parametrize("dtype", DTYPES)
@cases(SETS)
def bench_quantize_affine(measure, case, dtype, contender):
    x, scale, zero_point, q = operands(case[1], dtype)
    quantize = qo.quantize_affine if contender == "ours" else torchao().quantize_affine
    call = lambda: quantize(x, BLOCK, scale, zero_point, torch.uint4)  # noqa: E731
    assert torch.equal(call(), q)
    measure(call, stem="quantize_affine", case=case, contender=contender, memory=x.nbytes + q.nbytes, detail=f" {dtype}")


@pytest.mark.parametrize("contender", ["ours", "torchao"])
@pytest.mark.parametrize("dtype", DTYPES)
@cases(SETS)
def bench_dequantize_affine(measure, case, dtype, contender):
    x, scale, zero_point, q = operands(case[1], dtype)
    dequantize = qo.dequantize_affine if contender == "ours" else torchao().dequantize_affine
    call = lambda: dequantize(q, BLOCK, scale, zero_point, torch.uint4, output_dtype=x.dtype)  # noqa: E731
    assert torch.equal(call(), qo.dequantize_affine(q, BLOCK, scale, zero_point, torch.uint4, output_dtype=x.dtype))
    measure(call, stem="dequantize_affine", case=case, contender=contender, memory=x.nbytes + q.nbytes, detail=f" {dtype}")
