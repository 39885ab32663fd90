"""quantize_rows: the same as choose_qparams over the last dimension and quant_tensor_forward."""

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


def test_same_for_any_number_of_threads(threads):
    x = torch.randn(300, 4000)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append((*qo.quantize_rows(x), *qo.quantize_rows(x, asymmetric=True)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
