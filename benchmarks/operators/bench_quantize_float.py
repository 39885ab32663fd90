"""quant_float_forward and quant_block_forward against eager torch, torch's conversions and copy_, the time that memory takes.

Results are checked before anything is timed.
"""

import pytest
import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import cases, tensor

# Exponent bits, mantissa bits, special codes, least exponent, largest value, torch's dtype.
FORMATS = {
    "E4M3": (4, 3, "nan", -6, 448.0, torch.float8_e4m3fn),
    "E5M2": (5, 2, "ieee", -14, 57344.0, torch.float8_e5m2),
    "E2M1": (2, 1, "none", 0, 6.0, None),
}
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])


def eager_format(x, name, noise=None):
    """Exact in float32; with noise in [0, 1) it rounds stochastically."""
    _, mantissa_bits, _, least, largest, _ = FORMATS[name]
    magnitude = x.abs().clamp(max=largest)
    quantum = torch.ldexp(torch.ones(()), (torch.frexp(magnitude).exponent - 1).clamp(min=least) - mantissa_bits)
    steps = magnitude / quantum
    return (torch.round(steps) if noise is None else torch.floor(steps + noise)).mul(quantum).copysign(x)


def ours(x, name):
    exponent_bits, mantissa_bits, special, *_ = FORMATS[name]
    return lambda: qo.quant_float_forward(x, exponent_bits, mantissa_bits, special=special)


def copy(x, name):
    return lambda: torch.empty_like(x).copy_(x)  # into new memory, as the others: its first touch is most of a large tensor's time


FORMAT = {
    "ours": ours,
    "eager": lambda x, name: lambda: eager_format(x.float(), name).to(x.dtype),
    "torch .to": lambda x, name: lambda: x.to(FORMATS[name][5]).to(x.dtype),  # data within the range
    "copy_": copy,
}


@pytest.mark.parametrize("contender", FORMAT)
@pytest.mark.parametrize("name", FORMATS)
@DTYPES
@cases(shapes.TENSOR)
def bench_quant_float_forward(measure, case, dtype, name, contender):
    if contender == "torch .to" and FORMATS[name][5] is None:
        pytest.skip("torch has no such dtype that it converts")
    x = tensor(case[1]).to(dtype)
    call = FORMAT[contender](x, name)
    assert torch.equal(call(), x if contender == "copy_" else eager_format(x.float(), name).to(dtype))
    detail, memory = f" {name} {str(dtype)[6:]}", x.numel() * x.itemsize * 2
    measure(call, stem="quant_float_forward", case=case, contender=contender, memory=memory, detail=detail)


def stochastic_ours(x):
    return lambda: qo.quant_float_forward(x, 4, 3, special="nan", rounding="stochastic")


def stochastic_eager(x):
    return lambda: eager_format(x.float(), "E4M3", torch.rand(x.shape)).to(x.dtype)


@pytest.mark.parametrize("contender", ["ours", "eager"])
@DTYPES
@cases(shapes.TENSOR)
def bench_stochastic_rounding(measure, case, dtype, contender):
    x = tensor(case[1]).to(dtype)
    call = {"ours": stochastic_ours, "eager": stochastic_eager}[contender](x)
    error = call().float() - x.float()
    step = (eager_format(x.float(), "E4M3", torch.ones(())) - eager_format(x.float(), "E4M3", torch.zeros(()))).abs()
    assert (error.abs() < step).all()
    assert error.mean().abs() < 5 * step.mean() / x.numel() ** 0.5  # without a bias
    detail, memory = f" E4M3 {str(dtype)[6:]} stochastic", x.numel() * x.itemsize * 2
    measure(call, stem="quant_float_forward", case=case, contender=contender, memory=memory, detail=detail)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def mx_scale(amax):
    """A power of two: the exponent of amax less that of 6."""
    return torch.ldexp(torch.ones(()), (torch.frexp(amax).exponent - 1 - 2).clamp(min=-127))


def nv_scale(amax):
    return (amax / 6).clamp(min=2**-6).to(torch.float8_e4m3fn).float()


BLOCKS = {"MXFP4": (32, "floor", mx_scale), "NVFP4": (16, "e4m3", nv_scale)}


def eager_blocks(x, name, dim):
    size, _, scale_of = BLOCKS[name]
    v = x.float().unflatten(dim, (-1, size))
    scale = scale_of(v.abs().amax(dim if dim < 0 else dim + 1, keepdim=True))
    return (eager_format(v / scale, "E2M1") * scale).flatten(*((-2, -1) if dim < 0 else (dim, dim + 1))).to(x.dtype)


def blocks_ours(x, name, dim):
    size, rule, _ = BLOCKS[name]
    return lambda: qo.quant_block_forward(x, dim, size, 2, 1, scale_rule=rule)


CONTENDERS = {
    "ours": blocks_ours,
    "eager": lambda x, name, dim: lambda: eager_blocks(x, name, dim),
    "copy_": lambda x, name, dim: copy(x, name),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("dim", [0, -1])
@DTYPES
@cases(shapes.ROWS)
def bench_quant_block_forward(measure, case, dtype, name, dim, contender):
    """Along the rows, which are contiguous, and across them."""
    rows, columns = (max(32, n // 32 * 32) for n in case[1])  # eager torch needs whole blocks
    x = tensor((rows, columns)).to(dtype)
    call = CONTENDERS[contender](x, name, dim)
    assert torch.equal(call(), x if contender == "copy_" else eager_blocks(x, name, dim))
    detail, memory = f" {name} {str(dtype)[6:]}, dim {dim}", x.numel() * x.itemsize * 2
    measure(call, stem="quant_block_forward", case=case, contender=contender, memory=memory, detail=detail)
