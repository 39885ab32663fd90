"""quant_tensor_backward against eager torch and torch's own. Results are checked before anything is timed."""

import pytest
import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.operators.cases import QMAX, QMIN, SCALES, axis, cases, scale_of, tensor


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
    return lambda: op(grad, x, scales, zeros, axis(kind), QMIN, QMAX)[:2]


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
