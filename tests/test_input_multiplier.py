"""x_multiplier of int8_linear and weight_only_linear: the bits of the call without it on the float32 product, in every mode."""

import itertools

import pytest
import reference
import torch

import quant_ops as qo

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
INT8_MODES = {
    "dynamic": {},
    "asymmetric": {"asymmetric": True},
    "static": {"x_scale": torch.tensor(0.021)},
    "static zero point": {"x_scale": torch.tensor(0.021), "x_zero_point": torch.tensor(-17)},
    "int8 out": {"out_scale": torch.tensor(0.05), "out_zero_point": torch.tensor(3)},
}
# K around vectors and the pieces of 1024 in which products are made; one column, no column; no row, one and several
SHAPES = [(1, 1), (3, 7), (1, 64), (5, 33), (2, 1023), (4, 1024), (3, 1025), (1, 4099), (0, 40), (3, 0)]
WEIGHT_ONLY_MODES = {
    "floats": {},
    "dynamic": {"dynamic": True},
    "asymmetric": {"dynamic": True, "asymmetric": True},
}


def codes(n, k, bits=8):
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, (n, k), dtype=torch.int8)


def views(x):
    """The same rows, contiguous and not; and one row many times, with a stride of 0."""
    yield x
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] + 5, dtype=x.dtype)
    wide[..., 3:-2] = x
    yield wide[..., 3:-2]
    if x.shape[-1]:
        yield x.T.contiguous().T
    if len(x):
        yield x[:1].expand(6, -1)


def multipliers(k):
    m = torch.rand(k) * 3 + 0.01
    m[::5] *= -1
    return m


def int8_linear_agrees(x, weight, multiplier, **kwargs):
    scale, bias = torch.rand(len(weight)) * 0.01, torch.randn(len(weight))
    product = x.float() * multiplier.float()
    if "out_scale" not in kwargs:
        kwargs = {"out_dtype": x.dtype} | kwargs
    got = qo.int8_linear(x, weight, scale, bias, x_multiplier=multiplier, **kwargs)
    assert reference.same_bits(got, qo.int8_linear(product, weight, scale, bias, **kwargs)), (x.shape, kwargs)
    return got


@pytest.mark.parametrize("mode", INT8_MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_int8_linear_of_products(isa, dtype, mode):
    for (m, k), packs in itertools.product(SHAPES, [False, True]):
        weight, multiplier = codes(19, k), multipliers(k)
        kwargs = {"packed_weight": qo.pack_weight(weight) if packs else None, **INT8_MODES[mode]}
        for x in views((torch.randn(m, k) * 4).to(dtype)):
            got = int8_linear_agrees(x, weight, multiplier, **kwargs)
            assert got.dtype == (torch.int8 if mode == "int8 out" else dtype)
    rows = torch.rand(5, 1) * 0.02 + 0.01
    int8_linear_agrees(torch.randn(5, 70).to(dtype), codes(3, 70), multipliers(70), x_scale=rows)


@pytest.mark.parametrize("mode", WEIGHT_ONLY_MODES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_only_linear_of_products(isa, dtype, mode):
    """Also without codes of x the sums are the same, since the same kernels add up the same float32 numbers in the same order."""
    for (m, k), bits, zeros in itertools.product([*SHAPES, (9, 130)], [4, 8], [None, torch.int8, torch.float32]):
        weight, multiplier, groups = codes(17, k, bits), multipliers(k), max(1, -(-k // 64))
        scale, bias = torch.rand(17, groups) * 0.01, torch.randn(17)
        zero = None if zeros is None else codes(17, groups, 4).to(zeros)
        packed = qo.pack_weight_only(weight, bits, 64)
        for x in views((torch.randn(m, k) * 4).to(dtype)):
            args = (weight, scale, zero, bias, bits, 64)
            kwargs = {"packed_weight": packed, "out_dtype": dtype, **WEIGHT_ONLY_MODES[mode]}
            got = qo.weight_only_linear(x, *args, x_multiplier=multiplier, **kwargs)
            assert reference.same_bits(got, qo.weight_only_linear(x.float() * multiplier, *args, **kwargs)), (m, k, bits, zeros)


def test_same_bits_for_any_threads_and_instruction_set(threads):
    x, multiplier, weight = torch.randn(300, 1500), multipliers(1500), codes(260, 1500, 4)
    scale, groups = torch.rand(260), torch.rand(260, 12) * 0.01
    results = []
    for isa, n in itertools.product(qo._library.isas(), [1, 2, 3]):
        qo._library.set_isa(isa)
        threads(n)
        results.append(
            [
                qo.int8_linear(x, weight, scale, x_multiplier=multiplier),
                qo.int8_linear(x.half(), weight, scale, asymmetric=True, x_multiplier=multiplier),
                qo.weight_only_linear(x, weight, groups, None, None, 4, 128, dynamic=True, x_multiplier=multiplier),
            ]
        )
    qo._library.set_isa(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_rows_with_nan_and_infinity(isa):
    """They stay in their rows: in x, and where a product overflows, becomes subnormal or is 0 * Inf."""
    x = torch.randn(8, 40)
    x[1, 3], x[2, 0], x[3, 39] = torch.nan, torch.inf, -torch.inf
    x[4, 5], x[5] = 1e38, 1e-38
    x[7] = 0
    multiplier = torch.ones(40)
    multiplier[5], multiplier[0] = 100.0, 0.0
    multiplier[9] = 1e-6
    weight = codes(5, 40)
    for mode in INT8_MODES.values():
        int8_linear_agrees(x, weight, multiplier, **mode)
    y = qo.int8_linear(x, weight, torch.tensor(0.01), x_multiplier=multiplier)
    assert y.isnan().any(1).nonzero().flatten().tolist() == [1, 2, 3, 4]
    groups = torch.rand(5, 2)
    for kwargs in WEIGHT_ONLY_MODES.values():
        got = qo.weight_only_linear(x, weight, groups, None, None, 8, 32, x_multiplier=multiplier, **kwargs)
        expected = qo.weight_only_linear(x * multiplier, weight, groups, None, None, 8, 32, **kwargs)
        assert reference.same_bits(got, expected)
    nothing = qo.int8_linear(x, weight, torch.tensor(0.01), torch.ones(5), x_multiplier=torch.full((40,), torch.nan))
    assert nothing.isnan().all()


def test_forms_of_a_multiplier():
    """Any floating dtype and stride, vectors, more dimensions; float64 is rounded to float32 before it multiplies."""
    x, weight, m = torch.randn(2, 3, 40), codes(6, 40), multipliers(80)
    strided = m[::2]
    expected = qo.int8_linear(x * strided, weight, torch.rand(1) * 0 + 0.01)
    scale = torch.tensor(0.01)
    for form in (strided, strided.clone(), strided.double()):
        assert torch.equal(qo.int8_linear(x, weight, scale, x_multiplier=form), expected)
        assert torch.equal(qo.int8_linear(x[1, 2], weight, scale, x_multiplier=form), expected[1, 2])
    for dtype in (torch.float16, torch.bfloat16):
        form = strided.to(dtype)
        int8_linear_agrees(x[0], weight, form)
        got = qo.weight_only_linear(x, weight, torch.rand(6) * 0 + 0.01, x_multiplier=form)
        assert torch.equal(got, qo.weight_only_linear(x * form.float(), weight, torch.full((6,), 0.01)))
    one = qo.int8_linear(x, weight, scale, x_multiplier=torch.ones(40))
    assert torch.equal(one, qo.int8_linear(x, weight, scale))


def test_passes_meet_without_a_seam():
    """More rows than one pass of the scratch holds."""
    x, weight, multiplier = torch.randn(4500, 2048), codes(4, 2048), multipliers(2048)
    int8_linear_agrees(x, weight, multiplier)
    args = (weight, torch.rand(4), None, None, 8, -1)
    got = qo.weight_only_linear(x.half(), *args, out_dtype=torch.float32, x_multiplier=multiplier)
    assert torch.equal(got, qo.weight_only_linear(x.half().float() * multiplier, *args))


@pytest.mark.parametrize("op", ["int8_linear", "weight_only_linear"])
def test_a_gradient_is_refused(op):
    """Also one of the multiplier alone, which is a keyword."""
    call, operator = getattr(qo, op), getattr(torch.ops.quant_ops, op)
    args = (torch.randn(2, 8), codes(3, 8), torch.rand(3))
    for function in (call, operator):
        multiplier = torch.ones(8, requires_grad=True)
        y = function(*args, x_multiplier=multiplier)
        with pytest.raises(RuntimeError, match=rf"^quant_ops\.{op}: expected no gradient to be asked for"):
            y.sum().backward()
        with torch.no_grad():
            assert not function(*args, x_multiplier=multiplier).requires_grad
    with pytest.raises(RuntimeError, match=rf"^quant_ops\.{op}: expected no derivative to be asked for"):
        torch.func.grad(lambda m: call(*args, x_multiplier=m).sum())(torch.ones(8))
