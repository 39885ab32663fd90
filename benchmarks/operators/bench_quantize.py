"""quant_tensor_forward and dequant_tensor against eager torch and torch's own. Results are checked before anything is timed."""

import pytest
import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import QMAX, QMIN, SCALES, axis, cases, eager_codes, scale_of, tensor

# ---- quant_tensor_forward: simulated ---------------------------------------------------------------------------------


def simulate_ours(x, scale, kind):
    return lambda: qo.quant_tensor_forward(x, scale, None, QMIN, QMAX)


def simulate_eager(x, scale, kind):
    return lambda: eager_codes(x, scale) * scale


def simulate_torch(x, scale, kind):
    if kind == "(1,)":
        value = scale.item()
        return lambda: torch.fake_quantize_per_tensor_affine(x, value, 0, QMIN, QMAX)
    scales, zeros = scale.flatten(), torch.zeros(scale.numel(), dtype=torch.int32)
    return lambda: torch.fake_quantize_per_channel_affine(x, scales, zeros, axis(kind), QMIN, QMAX)


SIMULATE = {"ours": simulate_ours, "eager": simulate_eager, "torch.fake_quantize": simulate_torch}


@pytest.mark.parametrize("contender", SIMULATE)
@pytest.mark.parametrize("kind", SCALES)
@cases(shapes.TENSOR)
def bench_quant_tensor_forward(measure, case, kind, contender):
    x, scale = tensor(case[1]), scale_of(kind, case[1])
    call, expected = SIMULATE[contender](x, scale, kind), eager_codes(x, scale) * scale
    result = call()
    if contender == "torch.fake_quantize":  # multiplies by the reciprocal: a few codes differ by one step
        assert (result != expected).float().mean() < 1e-3
    else:
        assert torch.equal(result, expected)
    measure(
        call, stem="quant_tensor_forward", case=case, contender=contender, memory=x.numel() * 8, detail=f" simulate, scale {kind}"
    )


# ---- quant_tensor_forward: codes -------------------------------------------------------------------------------------


def codes_ours(x, scale, kind):
    return lambda: qo.quant_tensor_forward(x, scale, None, QMIN, QMAX, simulate=False)


def codes_eager(x, scale, kind):
    return lambda: eager_codes(x, scale).to(torch.int8)


def codes_torch(x, scale, kind):
    if not hasattr(torch, "quantize_per_tensor"):
        pytest.skip(f"torch {torch.__version__} has no torch.quantize_per_tensor")
    if kind == "(1,)":
        value = scale.item()
        return lambda: torch.quantize_per_tensor(x, value, 0, torch.qint8)
    scales, zeros = scale.flatten(), torch.zeros(scale.numel(), dtype=torch.long)
    return lambda: torch.quantize_per_channel(x, scales, zeros, axis(kind), torch.qint8)


CODES = {"ours": codes_ours, "eager": codes_eager, "torch.quantize": codes_torch}


@pytest.mark.parametrize("contender", CODES)
@pytest.mark.parametrize("kind", SCALES)
@cases(shapes.TENSOR)
def bench_quant_tensor_forward_codes(measure, case, kind, contender):
    x, scale = tensor(case[1]), scale_of(kind, case[1])
    call, expected = CODES[contender](x, scale, kind), eager_codes(x, scale).to(torch.int8)
    result = call()
    if contender == "torch.quantize":
        assert (result.int_repr() != expected).float().mean() < 1e-3
    else:
        assert torch.equal(result, expected)
    measure(call, stem="quant_tensor_forward", case=case, contender=contender, memory=x.numel() * 5, detail=f" codes, scale {kind}")


# ---- dequant_tensor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", ["ours", "eager"])
@cases(shapes.TENSOR)
def bench_dequant_tensor(measure, case, contender):
    scale = scale_of("(1,C,1,1)", case[1])
    codes = eager_codes(tensor(case[1]), scale).to(torch.int8)
    call = (lambda: qo.dequant_tensor(codes, scale)) if contender == "ours" else (lambda: codes.float() * scale)
    assert torch.equal(call(), codes.float() * scale)
    measure(call, stem="dequant_tensor", case=case, contender=contender, memory=codes.numel() * 5, detail=" scale (1,C,1,1)")
