"""quantize_rows: the same as choose_qparams over the last dimension and quant_tensor_forward."""

import numpy as np
import pytest
import reference
import torch

import quant_ops as qo


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_rows_are_choose_and_quantize(isa, dtype, asymmetric):
    for shape in [(1,), (5, 1), (4, 17), (2, 3, 64), (2, 3, 1000), (0, 5), (3, 0)]:
        base = (torch.randn(*shape[:-1], shape[-1] + 3) * 4 + 1).to(dtype)
        for x in (base[..., 3:], base[..., 3:].contiguous()):
            q, scale, zero = qo.quantize_rows(x, asymmetric)
            qmin = -128 if asymmetric else -127
            expected_scale, expected_zero = qo.choose_qparams(x, [-1], qmin, 127, asymmetric)
            assert torch.equal(scale, expected_scale)
            assert torch.equal(zero, expected_zero)
            assert torch.equal(q.long(), reference.quantize(x, scale, zero, qmin, 127, False))
            if not asymmetric and x.numel():
                assert q.min() >= -127


def in_lanes(values):
    """The sum of every row in the order that norm_quantize_rows fixes."""
    lanes = torch.zeros(len(values), 16)
    for k in range(values.shape[1]):
        lanes[:, k % 16] += values[:, k]
    while lanes.shape[1] > 1:
        lanes = lanes[:, : lanes.shape[1] // 2] + lanes[:, lanes.shape[1] // 2 :]
    return lanes


def fma(a, b, c):
    return torch.from_numpy(reference.fma32(*(x.expand_as(a).numpy() for x in (a, b, c))))


def squares_in_lanes(values):
    lanes = torch.zeros(len(values), 16)
    for k in range(values.shape[1]):
        lanes[:, k % 16] = fma(values[:, k], values[:, k], lanes[:, k % 16])
    return in_lanes(lanes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rms", [False, True])
def test_norms(isa, dtype, rms):
    for columns in (1, 15, 33, 384):
        x, residual = ((torch.randn(5, columns + 3) * 4 + 1).to(dtype)[:, 3:] for _ in "xr")
        weight, bias = torch.randn(columns), torch.randn(columns).to(dtype)
        for w, b, r, asymmetric in ((weight, bias, residual, True), (weight, None, None, False), (None, bias, residual, False)):
            t = x.float() if r is None else x.float() + r.float()
            d = t if rms else t - in_lanes(t) / columns
            variance = squares_in_lanes(d) / columns + torch.tensor(1e-5)
            factor = torch.from_numpy(1 / np.sqrt(variance.numpy()))  # torch's root is not the nearest everywhere
            ones, zeros = torch.ones(columns), torch.full((columns,), -0.0)
            y = fma(d * factor, ones if w is None else w, zeros if b is None else b.float())
            got = qo.norm_quantize_rows(x, w, b, 1e-5, rms, asymmetric, r)
            assert all(torch.equal(*pair) for pair in zip(got, qo.quantize_rows(y, asymmetric), strict=True))
            if rms:
                exact = torch.nn.functional.rms_norm(t.double(), (columns,), None if w is None else w.double(), 1e-5)
                exact = exact if b is None else exact + b
            else:
                exact = torch.nn.functional.layer_norm(
                    t.double(), (columns,), *(None if p is None else p.double() for p in (w, b)), 1e-5
                )
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)


def test_same_for_any_number_of_threads(threads):
    x = torch.randn(300, 4000)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append((*qo.quantize_rows(x), *qo.quantize_rows(x, asymmetric=True), *qo.norm_quantize_rows(x, None, None, 1e-5)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
