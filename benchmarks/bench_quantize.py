"""The elementwise operators and quantize_rows against eager torch and torch's own. Results are checked before anything is timed."""

import functools

import pytest
import shapes
import torch
from conftest import cases

import quant_ops as qo

QMIN, QMAX = -128, 127


@functools.lru_cache(maxsize=1)
def tensor(shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def scale_of(kind, shape):
    """Positive scales of one of the shapes (1,), (N,1,1,1), (1,C,1,1); some elements are clipped."""
    n, c = shape[:2]
    size = {"(1,)": (1,), "(N,1,1,1)": (n, 1, 1, 1), "(1,C,1,1)": (1, c, 1, 1)}[kind]
    return 0.01 + 0.02 * torch.rand(size, generator=torch.Generator().manual_seed(1))


SCALES = ("(1,)", "(N,1,1,1)", "(1,C,1,1)")


def eager_codes(x, scale):
    return torch.clamp(torch.round(x / scale), QMIN, QMAX)


def _axis(kind):
    return SCALES.index(kind) - 1  # of torch's per-channel operators; -1: per tensor


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
    return lambda: torch.fake_quantize_per_channel_affine(x, scales, zeros, _axis(kind), QMIN, QMAX)


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
    return lambda: torch.quantize_per_channel(x, scales, zeros, _axis(kind), torch.qint8)


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


# ---- quant_tensor_backward -------------------------------------------------------------------------------------------


def backward_ours(grad, x, scale, kind):
    return lambda: qo.quant_tensor_backward(grad, x, scale, None, QMIN, QMAX)[:2]


def backward_eager(grad, x, scale, kind):
    """The formula of quant_tensor_backward's documentation, for a symmetric range."""
    dims = [d for d in range(x.dim()) if scale.dim() == 1 or scale.shape[d] == 1]

    def call():
        ratio = x / scale
        v = torch.round(ratio)
        q = v.clamp(QMIN, QMAX)
        inside = v == q
        factor = torch.where(inside, q - ratio, q)
        return grad * inside, (grad * factor).sum(dims, keepdim=True).reshape(scale.shape)

    return call


def backward_torch(grad, x, scale, kind):
    scales, zeros = scale.flatten(), torch.zeros(scale.numel())
    if kind == "(1,)":
        op = torch.ops.aten._fake_quantize_learnable_per_tensor_affine_backward
        return lambda: op(grad, x, scales, zeros, QMIN, QMAX)[:2]
    op = torch.ops.aten._fake_quantize_learnable_per_channel_affine_backward
    return lambda: op(grad, x, scales, zeros, _axis(kind), QMIN, QMAX)[:2]


BACKWARD = {"ours": backward_ours, "eager": backward_eager, "torch learnable": backward_torch}


@pytest.mark.parametrize("contender", BACKWARD)
@pytest.mark.parametrize("kind", SCALES)
@cases(shapes.TENSOR)
def bench_quant_tensor_backward(measure, case, kind, contender):
    x, scale = tensor(case[1]), scale_of(kind, case[1])
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    call = BACKWARD[contender](grad, x, scale, kind)
    expected = backward_eager(grad.double(), x.double(), scale.double(), kind)()
    result = call()
    assert (result[0].double() != expected[0]).double().mean() < 1e-3
    spread = grad.abs().sum() * 128 * 1e-5  # summation order, and elements at a rounding boundary
    assert (result[1].flatten().double() - expected[1].flatten()).abs().max() < spread
    measure(call, stem="quant_tensor_backward", case=case, contender=contender, memory=x.numel() * 12, detail=f" scale {kind}")


# ---- dequant_tensor --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("contender", ["ours", "eager"])
@cases(shapes.TENSOR)
def bench_dequant_tensor(measure, case, contender):
    scale = scale_of("(1,C,1,1)", case[1])
    codes = eager_codes(tensor(case[1]), scale).to(torch.int8)
    call = (lambda: qo.dequant_tensor(codes, scale)) if contender == "ours" else (lambda: codes.float() * scale)
    assert torch.equal(call(), codes.float() * scale)
    measure(call, stem="dequant_tensor", case=case, contender=contender, memory=codes.numel() * 5, detail=" scale (1,C,1,1)")


# ---- choose_qparams and quantize_rows --------------------------------------------------------------------------------


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
