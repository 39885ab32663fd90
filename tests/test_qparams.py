"""choose_qparams: scales, zero points, degenerate slices."""

import pytest
import torch

import quant_ops as qo

TINY = torch.finfo(torch.float32).tiny


def expected_qparams(x, dim, qmin, qmax, asymmetric):
    """NUMERICS section 2 in torch operations, for finite data without degenerate slices."""
    dims = dim or list(range(x.dim()))
    low, high = x.float().amin(dims, keepdim=True).clamp(max=0), x.float().amax(dims, keepdim=True).clamp(min=0)
    if not asymmetric:
        return torch.maximum(-low, high) / qmax, torch.zeros_like(low, dtype=torch.int32)
    scale = (high - low) / (qmax - qmin)
    return scale, (qmin - torch.round(low / scale)).clamp(qmin, qmax).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dim", [[], [0], [1], [-1], [0, 2], [1, 2, 3], [0, 1, 2, 3]])
def test_reduces_over_any_dimensions(isa, dtype, asymmetric, dim):
    x = (torch.randn(3, 5, 7, 40) * 5).to(dtype)
    for shift in (0.0, 100.0, -100.0):  # one-sided data: the range is widened to contain 0
        for view in (x + shift, (x + shift).permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0), (x + shift)[:, :, ::2, 1::3]):
            scale, zero = qo.choose_qparams(view, dim, -128, 127, asymmetric)
            expected = expected_qparams(view, dim, -128, 127, asymmetric)
            assert torch.equal(scale, expected[0])
            assert torch.equal(zero, expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_and_columns_of_every_length(isa, dtype):
    """Down columns (more than one block of them), along rows, few columns, and columns that are gathered."""
    for shape in [(5, 1), (9, 7), (4, 8), (5, 17), (33, 100), (3, 2050), (300, 16), (2, 40, 49), (3, 9, 7, 7)]:
        x = torch.randn(shape, dtype=torch.float32).to(dtype)
        for view in (x, x.transpose(0, -1).contiguous().transpose(0, -1), x[..., ::2]):
            for dim in ([0], [-1], [0, -1], [d for d in range(x.dim()) if d != 1]):
                absmax = view.abs().amax(dim, keepdim=True)
                scale, _ = qo.choose_qparams(view, dim, -127, 127)
                expected = absmax.to(scale.dtype) / 127
                assert torch.equal(scale, torch.where(expected == 0, 1.0, expected))
                bad = view.clone()
                bad[(0,) * x.dim()] = torch.nan
                marked = qo.choose_qparams(bad, dim, -127, 127)[0]
                assert marked.isnan().sum() == 1
                assert marked.view(-1)[0].isnan()


WIDE = [
    (-(2**31), 2**31 - 1),
    (0, 2**31 - 1),
    (-(2**31), 0),
    (-(2**31), -5),
    (2**31 - 2, 2**31 - 1),
    (-(2**24) - 3, 2**25 + 1),
    (7, 2**30),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("qmin", "qmax"), WIDE)
def test_zero_points_of_wide_ranges_are_exact(isa, dtype, qmin, qmax):
    """The quotient in the compute dtype, everything after its rounding in integers."""
    rows = torch.randn(20, 9, dtype=torch.float64) * 3
    rows = torch.cat([rows, rows.abs(), -rows.abs(), torch.tensor([[-1.0, -2.0, *[-0.5] * 7]]), rows[:2] * 1e-30]).to(dtype)
    for view, dim in ((rows, [1]), (rows.t().contiguous(), [0])):
        scale, zero = qo.choose_qparams(view, dim, qmin, qmax, True)
        low = view.to(scale.dtype).amin(dim, keepdim=True).clamp(max=0)
        high = view.to(scale.dtype).amax(dim, keepdim=True).clamp(min=0)
        steps = torch.tensor(qmax - qmin).to(scale.dtype)
        expected = torch.where(high - low > 0, (high - low) / steps, 1.0).clamp(min=torch.finfo(scale.dtype).tiny)
        assert torch.equal(scale, expected)
        exact = [min(max(qmin - int(q), qmin), qmax) for q in torch.round(low / scale).flatten().tolist()]
        assert zero.flatten().tolist() == exact
        assert qo.quant_tensor_forward(view, scale, zero, qmin, qmax, True, False).dtype == torch.int32


def test_expanded_dimensions_are_looked_at_once():
    x = torch.tensor([[1.0], [-4.0]])
    scale, zero = qo.choose_qparams(x.expand(2, 2**40), [1], -128, 127, True)
    assert torch.equal(scale, qo.choose_qparams(x, [1], -128, 127, True)[0])
    assert zero.tolist() == [[-128], [127]]


def test_float64_stays_float64():
    x = torch.randn(4, 100, dtype=torch.float64)
    scale, _ = qo.choose_qparams(x, [1], -127, 127)
    assert torch.equal(scale, x.abs().amax(1, keepdim=True) / 127)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_degenerate_slices(asymmetric):
    rows = torch.zeros(6, 33)
    rows[1, 3] = 1e-44  # its scale would be subnormal
    rows[2, 32] = torch.nan
    rows[3, 0] = torch.inf
    rows[4] = 7.0
    rows[5, 1:3] = torch.tensor([3e38, -3e38])  # max - min overflows
    scale, zero = qo.choose_qparams(rows, [1], -128, 127, asymmetric)
    assert scale[0] == 1
    assert scale[1] == TINY
    assert torch.isfinite(1 / scale[1])
    assert scale[2].isnan()
    assert scale[3].isnan()
    assert torch.isfinite(scale[4:]).all()
    assert (scale[4:] > 0).all()
    q, row_scale, row_zero = qo.quantize_rows(rows, asymmetric)
    assert torch.equal(
        row_scale.nan_to_num(9.0), (scale if asymmetric else qo.choose_qparams(rows, [1], -127, 127)[0]).nan_to_num(9.0)
    )
    assert (q[0] == row_zero[0]).all()  # all zeros: its codes are the zero point
    assert (q[2] == row_zero[2]).all()
    if asymmetric:
        assert torch.equal(row_zero, zero)
        assert zero[0] == -128


def test_empty_reductions_have_scale_one():
    assert qo.choose_qparams(torch.empty(3, 0), [1], -128, 127)[0].tolist() == [[1], [1], [1]]
    scale, zero = qo.choose_qparams(torch.empty(0, 4), [1], -128, 127)
    assert scale.shape == zero.shape == (0, 1)


def test_same_for_any_number_of_threads(threads):
    x = torch.randn(3, 400_000)
    results = []
    for n in (1, 2, 5):
        threads(n)
        results.append((*qo.choose_qparams(x, [], -128, 127, True), *qo.choose_qparams(x, [0], -128, 127, True)))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))
