"""weight_only_linear: exact with dynamic rows, within its bound without; every group size, layout and form of a zero point."""

import itertools

import numpy as np
import pytest
import reference
import torch

import quant_ops as qo

GROUPS = [32, 64, 128, 256, -1]
ZEROS = ["none", "integer", "float"]
EPS = torch.finfo(torch.float32).eps


def problem(n, k, bits, group, zeros, seed=0):
    """(codes, scale, zero point) with the extreme codes among them."""
    g = torch.Generator().manual_seed(seed)
    low = -(1 << (bits - 1))
    codes = torch.randint(low, -low, (n, k), generator=g, dtype=torch.int8)
    groups = max(1, -(-k // group)) if group > 0 else 1
    scale = torch.rand(n, groups, generator=g) * 0.02 + 0.001
    zero = None
    if zeros == "integer":
        zero = torch.randint(low, -low, (n, groups), generator=g, dtype=torch.int8)
    elif zeros == "float":
        zero = torch.randn(n, groups, generator=g) * 0.05
    return codes, scale, zero


def groups_of(k, group):
    step = group if group > 0 else max(k, 1)
    return [(i, min(i + step, k)) for i in range(0, max(k, 1), step)]


def exact(x, codes, scale, zero, bias, group, asymmetric=False):
    """The formula of ops.h: sums in int64, then a fused multiply-add a group, in float32."""
    q, x_scale, x_zero = qo.quantize_rows(x.flatten(0, -2), asymmetric)
    a = q.long() - x_zero.long().reshape(-1, 1)
    x_scale = x_scale.reshape(-1, 1).numpy()
    shape = (a.shape[0], codes.shape[0])
    y = np.broadcast_to(np.float32(-0.0) if bias is None else bias.float().numpy(), shape).astype(np.float32)
    for g, (first, last) in enumerate(groups_of(codes.shape[1], group)):
        z = zero[:, g : g + 1].long() if zero is not None and not zero.is_floating_point() else 0
        acc = (a[:, first:last] @ (codes[:, first:last].long() - z).T).numpy()
        y = reference.fma32(acc.astype(np.float32), x_scale * scale[:, g].float().numpy()[None], y)
        if zero is not None and zero.is_floating_point():
            total = np.broadcast_to(a[:, first:last].sum(1, keepdim=True).numpy(), shape)
            y = reference.fma32(total.astype(np.float32), x_scale * zero[:, g].float().numpy()[None], y)
    return torch.from_numpy(y.copy()).reshape(*x.shape[:-1], codes.shape[0])


def dequantized(codes, scale, zero, group):
    """w in float64."""
    w = torch.empty(codes.shape, dtype=torch.float64)
    for g, (first, last) in enumerate(groups_of(codes.shape[1], group)):
        q, s = codes[:, first:last].double(), scale[:, g : g + 1].double()
        z = 0.0 if zero is None else zero[:, g : g + 1].double()
        w[:, first:last] = q * s + z if zero is not None and zero.is_floating_point() else (q - z) * s
    return w


SHAPES = [(1, 8, 5), (1, 256, 64), (3, 97, 17), (9, 130, 70), (17, 320, 48), (2, 1000, 33), (35, 33, 130), (4, 0, 3)]


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_dynamic_rows_are_exact(isa, bits, group):
    for (m, k, n), zeros, asymmetric in itertools.product(SHAPES, ZEROS, [False, True]):
        codes, scale, zero = problem(n, k, bits, group, zeros)
        x = torch.randn(m, k) * 3
        bias = torch.randn(n) if m % 2 else None
        packed = qo.pack_weight_only(codes, bits, group) if n % 2 else None
        y = qo.weight_only_linear(
            x, codes, scale, zero, bias, bits, group, packed_weight=packed, dynamic=True, asymmetric=asymmetric
        )
        assert reference.same_bits(y, exact(x, codes, scale, zero, bias, group, asymmetric)), (m, k, n, zeros, asymmetric)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_dtypes_of_x_and_of_the_result(isa, bits, dtype):
    codes, scale, zero = problem(37, 200, bits, 64, "integer")
    x = torch.randn(2, 5, 200).to(dtype)
    y32 = exact(x, codes, scale, zero, None, 64)
    for out in (None, torch.float32, torch.float16, torch.bfloat16):
        y = qo.weight_only_linear(x, codes, scale, zero, None, bits, 64, dynamic=True, out_dtype=out)
        assert reference.same_bits(y, y32.to(out or dtype))


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_floating_products_keep_their_bound(isa, bits, group):
    for (m, k, n), zeros, dtype in itertools.product(SHAPES, ZEROS, [torch.float32, torch.float16, torch.bfloat16]):
        codes, scale, zero = problem(n, k, bits, group, zeros)
        x = (torch.randn(m, k) * 3).to(dtype)
        bias = torch.randn(n) if m % 2 else None
        w = dequantized(codes, scale, zero, group)
        y = qo.weight_only_linear(x, codes, scale, zero, bias, bits, group, out_dtype=torch.float32)
        expected = x.double() @ w.T + (0 if bias is None else bias.double())
        size = x.double().abs() @ w.abs().T + (0 if bias is None else bias.double().abs())
        assert ((y.double() - expected).abs() <= 2 * EPS * size).all(), (m, k, n, zeros, dtype)
        rounded = qo.weight_only_linear(x, codes, scale, zero, bias, bits, group)
        assert reference.same_bits(rounded, y.to(dtype))


@pytest.mark.parametrize("bits", [8, 4])
def test_tiny_rows_keep_the_bound(isa, bits):
    """Subnormal elements of x and those next to them, alone and beside large ones that meet weights of zero."""
    for (m, n, k), zeros, dtype, beside in itertools.product(
        [(1, 20, 70), (4, 33, 200), (9, 16, 300)], ZEROS, [torch.float32, torch.bfloat16], [False, True]
    ):
        codes, scale, zero = problem(n, k, bits, 64, zeros)
        scale = scale * 2.0**40  # so that results are no subnormal numbers
        zero = zero * 2.0**40 if zeros == "float" else zero
        exponent = torch.randint(-149, -110, (m, 1)).double()
        x = (torch.randn(m, k).double() * 2.0**exponent).to(dtype)
        if beside and zeros == "none":
            x[:, ::5], codes[:, ::5] = 1e30, 0
        w = dequantized(codes, scale, zero, 64)
        y = qo.weight_only_linear(x, codes, scale, zero, None, bits, 64, out_dtype=torch.float32)
        assert ((y.double() - x.double() @ w.T).abs() <= 2 * EPS * (x.double().abs() @ w.abs().T)).all(), (m, zeros, dtype, beside)


def test_long_sums_of_one_sign_keep_the_bound(isa):
    """Where nothing cancels the rounding errors are largest, relative to the bound's sum."""
    for bits, group in itertools.product([4, 8], [-1, 128]):
        codes, scale, _ = problem(20, 16384, bits, group, "none")
        codes, x = codes.abs().clamp(max=7), torch.rand(2, 16384) + 0.5
        w = dequantized(codes, scale, None, group)
        y = qo.weight_only_linear(x, codes, scale, None, None, bits, group)
        assert ((y.double() - x.double() @ w.T).abs() <= 2 * EPS * (x.double() @ w.T)).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_extreme_codes_do_not_overflow(isa, bits):
    low = -128 if bits == 8 else -8
    for value, zero, group in itertools.product([low, -low - 1], [low, -low - 1], [32, 256]):
        codes, scale = torch.full((18, 512), value, dtype=torch.int8), torch.ones(18, -(-512 // group))
        z = torch.full(scale.shape, zero, dtype=torch.int8)
        x = torch.ones(9, 512)
        x[:, ::2] = -1
        x[1] = 5
        for asymmetric in (False, True):
            y = qo.weight_only_linear(x, codes, scale, z, None, bits, group, dynamic=True, asymmetric=asymmetric)
            assert reference.same_bits(y, exact(x, codes, scale, z, None, group, asymmetric))


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_do_not_see_each_other(isa, bits):
    """Row i of a batch equals row i alone; NaN and Inf stay in their row; a row of zeros gives the bias exactly."""
    codes, scale, zero = problem(70, 300, bits, 128, "integer")
    x, bias = torch.randn(50, 300), torch.randn(70)
    x[7] = 0
    x[9, 5], x[11, 0] = torch.nan, torch.inf
    for asymmetric in (False, True):
        run = {"dynamic": True, "asymmetric": asymmetric}
        y = qo.weight_only_linear(x, codes, scale, zero, bias, bits, 128, **run)
        for i in range(50):
            assert reference.same_bits(
                y[i : i + 1], qo.weight_only_linear(x[i : i + 1], codes, scale, zero, bias, bits, 128, **run)
            )
        assert torch.equal(y[7], bias)
        assert torch.equal(y.isnan().all(1), y.isnan().any(1))
        assert y.isnan().any(1).nonzero().flatten().tolist() == [9, 11]
    y = qo.weight_only_linear(x, codes, scale, zero, bias, bits, 128)
    assert torch.equal(y[7], bias)
    assert sorted({*y.isnan().any(1).nonzero().flatten().tolist(), *y.isinf().any(1).nonzero().flatten().tolist()}) == [9, 11]


def test_same_bits_for_any_threads_and_instruction_set(threads):
    cases = []
    for (m, k, n), bits, zeros in itertools.product([(1, 700, 900), (37, 513, 300), (300, 512, 640)], [4, 8], ZEROS):
        codes, scale, zero = problem(n, k, bits, 64, zeros)
        cases.append((torch.randn(m, k), codes, scale, zero, torch.randn(n), bits, 64))
    results = []
    for name, count in itertools.product(qo._library.isas(), [1, 2, 3, 8]):
        qo._library.set_isa(name)
        threads(count)
        results.append([qo.weight_only_linear(*case, dynamic=True, asymmetric=True) for case in cases])
    qo._library.set_isa(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_layouts_of_the_parameters(bits):
    """Scales and zero points in any layout and dtype; views of x."""
    for n in (32, 30):
        codes, scale, zero = problem(n, 256, bits, 64, "integer")
        x = torch.randn(3, 256)
        y = qo.weight_only_linear(x, codes, scale, zero, None, bits, 64, dynamic=True)
        by_groups = scale.T.contiguous().T, zero.T.contiguous().T
        assert torch.equal(qo.weight_only_linear(x, codes, *by_groups, None, bits, 64, dynamic=True), y)
        wide = torch.stack([scale, scale], 2)[..., 0], torch.stack([zero, zero], 2)[..., 0]
        assert torch.equal(qo.weight_only_linear(x, codes, *wide, None, bits, 64, dynamic=True), y)
        for dtype in (torch.int16, torch.int32, torch.int64):
            assert torch.equal(qo.weight_only_linear(x, codes, scale, zero.to(dtype), None, bits, 64, dynamic=True), y)
        half = scale.bfloat16()
        expected = qo.weight_only_linear(x, codes, half.float(), zero, None, bits, 64, dynamic=True)
        assert torch.equal(qo.weight_only_linear(x, codes, half, zero, None, bits, 64, dynamic=True), expected)
        for view in (x.T.contiguous().T, torch.cat([x, x], 1)[:, :256], torch.stack([x, x], 2)[..., 0]):
            for dynamic in (False, True):
                expected = qo.weight_only_linear(x, codes, scale, zero, None, bits, 64, dynamic=dynamic)
                assert torch.equal(qo.weight_only_linear(view, codes, scale, zero, None, bits, 64, dynamic=dynamic), expected)
        assert torch.equal(qo.weight_only_linear(x, codes.T.contiguous().T, scale, zero, None, bits, 64, dynamic=True), y)
        one = scale[:, 0]
        expected = qo.weight_only_linear(x, codes, one[:, None], None, None, bits)
        assert torch.equal(qo.weight_only_linear(x, codes, one, None, None, bits), expected)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_packing_round_trip(bits, group):
    for n, k in itertools.product([0, 1, 15, 16, 17, 64, 65, 130], [0, 1, 7, 8, 33, 64, 300]):
        codes, _, _ = problem(n, k, bits, group, "none")
        packed = qo.pack_weight_only(codes, bits, group)
        assert torch.equal(qo.unpack_weight_only(packed, (n, k), bits, group), codes)
        assert torch.equal(qo.pack_weight_only(codes.T.contiguous().T, bits, group), packed)
    codes, _, _ = problem(4096, 4096, 4, 128, "none")
    assert qo.pack_weight_only(codes, 4, 128).numel() < 4096 * 4096 * (0.5 + 4 / 128) + 100


def test_a_placeholder_stands_for_a_packed_weight():
    codes, scale, _ = problem(40, 256, 4, 32, "none")
    placeholder = torch.zeros((), dtype=torch.int8).expand(40, 256)
    x = torch.randn(2, 256)
    y = qo.weight_only_linear(x, placeholder, scale, None, None, 4, 32, packed_weight=qo.pack_weight_only(codes, 4, 32))
    assert torch.equal(y, qo.weight_only_linear(x, codes, scale, None, None, 4, 32))


def test_per_channel_int8_is_int8_linear(isa):
    """One group a row without zero points: the sums and the epilogue of int8_linear."""
    codes, scale, _ = problem(70, 515, 8, -1, "none")
    x, bias = torch.randn(9, 515), torch.randn(70)
    for asymmetric in (False, True):
        y = qo.weight_only_linear(x, codes, scale, None, bias, dynamic=True, asymmetric=asymmetric)
        assert torch.equal(y, qo.int8_linear(x, codes, scale, bias, asymmetric=asymmetric))


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,)])
@pytest.mark.parametrize("dynamic", [False, True])
def test_degenerate_shapes(shape, dynamic):
    for n, bits in itertools.product([0, 1, 5], [4, 8]):
        codes, scale, _ = problem(n, 8, bits, -1, "none")
        y = qo.weight_only_linear(torch.randn(shape), codes, scale, None, torch.randn(n), bits, dynamic=dynamic)
        assert y.shape == (*shape[:-1], n)


def test_scratch_is_bounded_in_passes():
    """More rows than one pass of the scratch holds: the passes meet without a seam."""
    for bits in (4, 8):
        codes, scale, _ = problem(16, 2048, bits, 256, "none")
        x = torch.randn(4500, 2048)
        y = qo.weight_only_linear(x, codes, scale, None, None, bits, 256, dynamic=True)
        assert torch.equal(y, exact(x, codes, scale, None, None, 256))
        x = x.bfloat16()
        y = qo.weight_only_linear(x, codes, scale, None, None, bits, 256, out_dtype=torch.float32)
        rows = [qo.weight_only_linear(part, codes, scale, None, None, bits, 256, out_dtype=torch.float32) for part in x.split(900)]
        assert torch.allclose(y, torch.cat(rows), rtol=1e-4, atol=1e-4)
