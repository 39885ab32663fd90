"""quant_tensor_backward: the formulas, the order of its sums, and autograd's use of it."""

import itertools
import math

import pytest
import reference
import sweep
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from views import FLOATS, SIZES, draw_view

import quant_ops as qo


def gradients(x, grad, scale, zero, qmin, qmax):
    """NUMERICS: straight-through and LSQ, in float64 from the float32 (float64) quotient."""
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = reference.integer_zero_point(zero, qmin, qmax).double()
    quotient = (x.to(compute) / scale.to(compute)).double()
    v = reference.steps_of(x, scale).double()
    inside = (v >= qmin - z) & (v <= qmax - z)
    dx = torch.where(inside, grad, torch.zeros_like(grad))
    factor = torch.where(inside, (v - quotient).to(compute).double(), torch.clamp(v, qmin - z, qmax - z))
    ds = (grad.double() * factor).expand(x.shape)
    dz = (grad.double() * torch.where(inside, 0.0, -scale.double())).expand(x.shape)
    return dx, ds.sum_to_size(scale.shape), dz.sum_to_size(zero.shape if zero is not None else scale.shape)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (1, 5, 1), (600,), (4, 1, 600), (4, 5, 600)])
def test_backward_matches_the_formulas(isa, dtype, shape):
    x = (torch.randn(4, 5, 600) * 3).to(dtype)
    grad = torch.randn(4, 5, 600).to(dtype)
    scale, zero = torch.rand(shape) * 0.02 + 0.01, torch.randint(-9, 9, shape).float() + 0.3
    for xv, gv in [(x, grad), (x.transpose(0, 1).contiguous().transpose(0, 1), grad[:, :1, :1].expand(4, 5, 600))]:
        dx, ds, dz = qo.quant_tensor_backward(gv, xv, scale, zero, -128, 127, True)
        expected = gradients(x, gv, scale, zero, -128, 127)
        assert torch.equal(dx, expected[0])
        assert dx.dtype == dtype
        for got, want in ((ds, expected[1]), (dz, expected[2])):
            assert got.dtype == torch.float32
            assert got.shape == torch.Size(shape)
            torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=1e-5)


def sums_of_the_contract(products: torch.Tensor, shape) -> torch.Tensor:
    """Sums over the dimensions along which `shape` is 1, in the order of ops.h, of float64 products."""
    dims = products.dim()
    full = (1,) * (dims - len(shape)) + tuple(shape)
    kept = [d for d in range(dims) if full[d] > 1]
    reduced = [d for d in range(dims) if full[d] == 1]
    sums = products.permute(kept + reduced).reshape(math.prod(full), -1)
    while True:
        chunks = []
        for chunk in sums.split(1024, 1):
            lanes = torch.zeros(len(sums), 32, dtype=torch.float64)
            for part in chunk.split(32, 1):
                lanes[:, : part.shape[1]] += part
            for step in (16, 8, 4, 2, 1):
                lanes = lanes[:, :step] + lanes[:, step : 2 * step]
            chunks.append(lanes)
        sums = torch.cat(chunks, 1)
        if sums.shape[1] == 1:
            return sums.reshape(shape)


@settings(max_examples=sweep.examples(100), deadline=None)
@given(data=st.data())
def test_backward_sums_in_the_order_of_the_contract(data):
    """Along slices, down columns, gathered; scale and zero point alike or not; every instruction set: the same bits."""
    dims = data.draw(st.integers(1, 4))
    shape = [data.draw(st.sampled_from([*SIZES, 1030] if d == 0 else SIZES if d == 1 else SIZES[:6])) for d in range(dims)]
    shape = data.draw(st.permutations(shape))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    dtype = data.draw(st.sampled_from(FLOATS))
    x, grad = ((torch.randn(shape) * k).to(dtype) for k in (3, 1))
    x.view(-1)[0] = torch.nan
    keep = [n if data.draw(st.booleans()) else 1 for n in shape]
    zero_keep = keep if data.draw(st.booleans()) else [n if data.draw(st.booleans()) else 1 for n in shape]
    scale, zero = torch.rand(keep) * 0.02 + 0.01, torch.randint(-9, 9, zero_keep).float()
    views = draw_view(data, x), draw_view(data, grad)
    if data.draw(st.booleans()):
        views = views[0], grad.as_strided(views[0].shape, views[0].stride()) if views[0].is_contiguous() else views[1]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    quotient = x.to(compute) / scale.to(compute)
    steps = torch.round(quotient)
    inside = (steps >= -128 - zero) & (steps <= 127 - zero)
    clamped = torch.minimum(torch.maximum(steps.double(), -128.0 - zero), 127.0 - zero)
    known = ~steps.isnan()
    ds = torch.where(known, torch.where(inside, (steps - quotient).double(), clamped), 0.0) * grad.double()
    dz = torch.where(known & ~inside, -scale.double().expand_as(x), 0.0) * grad.double()
    for isa in qo._library.isas():
        qo._library.set_isa(isa)
        try:
            result = qo.quant_tensor_backward(views[1], views[0], scale, zero, -128, 127, True)
        finally:
            qo._library.set_isa(None)
        assert torch.equal(result[0], torch.where(inside, grad, torch.zeros_like(grad)))
        assert torch.equal(result[1], sums_of_the_contract(ds, keep).float())
        assert torch.equal(result[2], sums_of_the_contract(dz, zero_keep).float())


def test_backward_sums_chunks_of_chunks_of_chunks():
    x, grad = torch.randn(2**20 + 1030) * 3, torch.randn(2**20 + 1030)
    _, ds, _ = qo.quant_tensor_backward(grad, x, torch.tensor(0.02), None, -128, 127)
    quotient = x / torch.tensor(0.02)
    steps = reference.steps_of(x, torch.tensor(0.02))
    factor = torch.where((steps >= -128) & (steps <= 127), (steps - quotient).double(), steps.clamp(-128, 127).double())
    assert torch.equal(ds, sums_of_the_contract(grad.double() * factor, ()).float())


def test_autograd_uses_it_and_learns_scale_and_zero_point():
    x, scale = torch.randn(5, 7, requires_grad=True), torch.tensor(0.05, requires_grad=True)
    zero = torch.tensor(1.7, requires_grad=True)
    grad = torch.randn(5, 7)
    qo.quant_tensor_forward(x, scale, zero, -16, 15, True).backward(grad)
    expected = qo.quant_tensor_backward(grad, x.detach(), scale.detach(), zero.detach(), -16, 15, True)
    assert all(torch.equal(a, b) for a, b in zip((x.grad, scale.grad, zero.grad), expected, strict=True))
    integer_zero = torch.tensor(2)
    qo.quant_tensor_forward(x, scale, integer_zero, -16, 15, True).sum().backward()  # no gradient for an integer, no error
    assert not qo.quant_tensor_forward(x, scale, None, -16, 15, simulate=False).requires_grad


def test_nan_contributes_no_gradient():
    x = torch.tensor([torch.nan, 1.0, 500.0])
    dx, ds, dz = qo.quant_tensor_backward(torch.ones(3), x, torch.tensor(1.0), torch.tensor(0.0), -128, 127, True)
    assert dx.tolist() == [0, 1, 0]
    assert ds.item() == 127
    assert dz.item() == -1


def test_sums_do_not_depend_on_threads_or_instruction_set(threads):
    x, grad = torch.randn(64, 9, 333), torch.randn(64, 9, 333)
    results = []
    for isa, n in itertools.product(qo._library.isas(), [1, 2, 3, 5]):
        qo._library.set_isa(isa)
        threads(n)
        results.append(qo.quant_tensor_backward(grad, x, torch.full((9, 1), 0.03), torch.full((9, 1), 0.4), -8, 7, True))
    qo._library.set_isa(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
