"""quant_float_forward and quant_float_backward: against ml_dtypes, torch and an exact float64 formula, bit for bit."""

import itertools

import ml_dtypes
import numpy as np
import pytest
import reference
import sweep
import torch
from views import FLOATS, views_of

import quant_ops as qo

# exponent bits, mantissa bits, special; what casts to the format; the standard's largest value
STANDARDS = {
    "E4M3": (4, 3, "nan", ml_dtypes.float8_e4m3fn, 448.0),
    "E5M2": (5, 2, "ieee", ml_dtypes.float8_e5m2, 57344.0),
    "E3M2": (3, 2, "none", ml_dtypes.float6_e3m2fn, 28.0),
    "E2M3": (2, 3, "none", ml_dtypes.float6_e2m3fn, 7.5),
    "E2M1": (2, 1, "none", ml_dtypes.float4_e2m1fn, 6.0),
    "FP16": (5, 10, "ieee", np.float16, 65504.0),
    "BF16": (8, 7, "ieee", ml_dtypes.bfloat16, 3.3895313892515355e38),
}
ROUNDINGS = ["nearest_even", "nearest_away", "toward_zero", "stochastic"]


def assert_same(y: torch.Tensor, expected: torch.Tensor | np.ndarray):
    """The same bits, in y's dtype; any NaN is NaN."""
    want = torch.as_tensor(expected).to(y.dtype)
    assert ((y == want) & (y.signbit() == want.signbit()) | (y.isnan() & want.isnan())).all()


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every number of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)


def random_bits(count: int) -> torch.Tensor:
    """float32 numbers of every exponent alike, half of them; the others near 1."""
    bits = torch.randint(-(2**31), 2**31, (count // 2,)).to(torch.int32).view(torch.float32)
    return torch.cat([bits, torch.randn(count // 2) * torch.exp2(torch.randint(-20, 20, (count // 2,)).float())])


def cast(x: torch.Tensor, to: type) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return x.float().numpy().astype(to).astype(np.float32)


def saturated(x: torch.Tensor, to: type, largest: float) -> np.ndarray:
    return np.where(x.isnan().numpy(), np.float32(np.nan), cast(x.float().clamp(-largest, largest), to))


@pytest.mark.parametrize("name", STANDARDS)
def test_standard_formats_on_every_16_bit_number(isa, name):
    e, m, special, to, largest = STANDARDS[name]
    for x in (patterns(torch.bfloat16), patterns(torch.float16)):
        assert_same(qo.quant_float_forward(x, e, m, special=special), saturated(x, to, largest))
        if special != "none":
            assert_same(qo.quant_float_forward(x, e, m, special=special, saturate=False), cast(x, to))


@pytest.mark.parametrize("name", STANDARDS)
def test_standard_formats_on_random_float32(isa, name):
    e, m, special, to, largest = STANDARDS[name]
    for _ in range(100 if sweep.ALL else 1):
        x = random_bits(1_000_000)
        y = qo.quant_float_forward(x, e, m, special=special)
        assert_same(y, saturated(x, to, largest))
        assert_same(qo.quant_float_forward(x.double(), e, m, special=special), y)
        if special != "none":
            assert_same(qo.quant_float_forward(x, e, m, special=special, saturate=False), cast(x, to))


@pytest.mark.parametrize(
    ("to", "e", "m", "saturate"), [(torch.float8_e5m2, 5, 2, False), (torch.float16, 5, 10, False), (torch.bfloat16, 8, 7, False)]
)
def test_casts_of_torch(to, e, m, saturate):
    x = random_bits(200_000)
    y = qo.quant_float_forward(x, e, m, special="ieee", saturate=saturate)
    assert_same(y, x.to(to))


def formats():
    """Widths, biases and options that reach every method of rounding."""
    usual = [(e, m, None, special) for e in range(1, 8) for m in (0, 1, 2, 3, 5, 10, 22, 23) for special in ("none", "nan", "ieee")]
    widest = [(8, m, None, "ieee") for m in (0, 1, 3, 7, 10, 22, 23)]
    biased = [(4, 3, b, "none") for b in (-100, -1, 0, 8, 127)] + [(1, 6, 1, "none"), (7, 3, 10, "none"), (7, 2, 120, "ieee")]
    for e, m, bias, special in [*usual, *widest, *biased]:
        for saturate, subnormals in itertools.product((True, False), (True, False)):
            if saturate is False and special == "none":
                continue
            last = 2 ** (e + m) - 1 - {"none": 0, "nan": 1, "ieee": 2**m}[special]
            if last > 0 and (subnormals or last >> m > 0):
                yield e, m, bias, special, saturate, subnormals


def near_the_grid(e: int, m: int, bias: int | None, special: str) -> torch.Tensor:
    """Numbers, ties and their neighbours around 0, the smallest normal number, 1 and the largest value, and special ones."""
    bias = reference.format_bias(e) if bias is None else bias
    largest = reference.largest_of(e, m, bias, special)
    found = [0.0, np.inf, np.nan, 1e-45, 1e-39, 3.4e38]
    for exponent in {1 - bias, 2 - bias, 0, int(np.frexp(largest)[1]) - 1, int(np.frexp(largest)[1])}:
        quantum = 2.0 ** (max(exponent, 1 - bias) - m)
        for steps in {0, 1, 2, 3, 2**m - 1, 2**m, 2**m + 1, 2 ** (m + 1) - 1, 2 ** (m + 1)}:
            found += [(steps + part) * quantum for part in (0, 0.25, 0.5, 0.75)]
    with np.errstate(over="ignore"):
        x = np.array(found).astype(np.float32)
        x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))])
    return torch.from_numpy(np.concatenate([x, -x]))


def test_every_kind_of_format_and_rounding(isa):
    for e, m, bias, special, saturate, subnormals in sweep.part(formats(), 60):
        x = torch.cat([near_the_grid(e, m, bias, special), random_bits(300)])
        words = reference.philox(np.arange(len(x)), 7)
        for rounding in ROUNDINGS:
            options = {"special": special, "saturate": saturate, "subnormals": subnormals, "rounding": rounding}
            expected = reference.round_to_format(x.numpy(), e, m, bias, words=words, **options)
            for dtype in (torch.float32, torch.float64):
                y = qo.quant_float_forward(x.to(dtype), e, m, bias=bias, seed=7, **options)
                assert_same(y, expected)


@pytest.mark.parametrize("dtype", FLOATS)
def test_scales_shapes_and_strides(isa, dtype):
    x = (torch.randn(3, 5, 4, 6) * 50).to(dtype)
    x.view(-1)[:8] = torch.tensor([0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-7, 3e4, -3e4]).to(dtype)
    words = reference.philox(np.arange(x.numel()), 5).reshape(x.shape)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for shape in [None, (), (1,), (3, 1, 1, 1), (1, 5, 1, 1), (5, 1, 1), (6,), (1, 5, 1, 6), (3, 1, 4, 1), (3, 5, 4, 6)]:
        scale = None if shape is None else torch.rand(shape) + 0.01
        for rounding in ("nearest_even", "stochastic"):
            quotient = x.to(compute) if scale is None else x.to(compute) / scale.to(compute)
            rounded = torch.from_numpy(
                reference.round_to_format(quotient.numpy(), 4, 3, None, "nan", rounding=rounding, words=words)
            )
            expected = rounded.to(compute) * (1 if scale is None else scale.to(compute))
            for view in views_of(x):
                y = qo.quant_float_forward(view, 4, 3, scale, special="nan", rounding=rounding, seed=5)
                assert_same(y, expected)
                assert y.stride() == torch.empty_like(view).stride()


def test_lengths_and_offsets(isa):
    """No element outside of a view is written, none inside is left out."""
    whole = torch.full((40, 150), 42.0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n in range(70):
            part = whole.to(dtype)[3:5, n : n + n]
            part.copy_(torch.randn(part.shape))
            y = qo.quant_float_forward(part, 2, 1)
            assert_same(y, reference.round_to_format(part.double().numpy(), 2, 1))


@pytest.mark.parametrize("shape", [(0,), (3, 0), ()])
def test_empty_and_scalar_tensors(shape):
    x = torch.randn(shape)
    assert qo.quant_float_forward(x, 4, 3).shape == shape
    assert qo.quant_float_backward(x, x, 4, 3).shape == shape


def test_blocks_of_scales():
    x, scale = torch.randn(8, 32), torch.rand(4, 4) + 0.1
    wide = scale.repeat_interleave(2, 0).repeat_interleave(8, 1)
    for rounding in ("nearest_even", "stochastic"):
        y = qo.quant_float_forward(x, 2, 1, scale, block_size=[2, 8], rounding=rounding, seed=1)
        assert torch.equal(y, qo.quant_float_forward(x, 2, 1, wide, rounding=rounding, seed=1))


# ---- stochastic rounding ---------------------------------------------------------------------------------------------


def test_stochastic_rounding_goes_up_with_the_probability_of_the_distance():
    """Within four standard deviations, for distances from the smallest to the largest."""
    count = 1 << 18
    for share in (2**-12, 0.1, 0.25, 0.5, 0.75, 0.999):
        for magnitude, quantum in ((1.0, 0.125), (2**-8, 2**-9), (256.0, 32.0), (0.0, 2**-9)):
            for seed, sign in ((3, 1), (4, -1)):
                x = torch.full((count,), magnitude + share * quantum).mul_(sign)
                share = (abs(x[0].item()) - magnitude) / quantum
                y = qo.quant_float_forward(x, 4, 3, special="nan", rounding="stochastic", seed=seed).abs()
                up = y == magnitude + quantum
                assert (up | (y == magnitude)).all()
                assert abs(up.double().mean().item() - share) <= 4 * (share * (1 - share) / count) ** 0.5


def test_stochastic_bits_belong_to_seed_and_index_alone(threads):
    """Not to threads, instruction sets (test_every_kind_of_format_and_rounding), layouts, or what else is computed."""
    x = torch.randn(5, 7, 33, 41)
    round_it = lambda t, seed=9: qo.quant_float_forward(t, 2, 1, rounding="stochastic", seed=seed)  # noqa: E731
    threads(1)
    expected = round_it(x)
    for count in (2, 3):
        threads(count)
        assert torch.equal(round_it(x), expected)
    for view in views_of(x):
        assert torch.equal(round_it(view), expected)
    assert torch.equal(round_it(x[:2].contiguous()), expected[:2])
    assert torch.equal(round_it(x, torch.tensor([9])), expected)
    assert not torch.equal(round_it(x, 10), expected)
    words = reference.philox(np.arange(x.numel()), 9).reshape(x.shape)
    assert_same(expected, reference.round_to_format(x.numpy(), 2, 1, rounding="stochastic", words=words))


def test_seeds_come_from_a_generator():
    x = torch.randn(1000)
    round_it = lambda generator=None: qo.quant_float_forward(x, 2, 1, rounding="stochastic", generator=generator)  # noqa: E731
    first, second = (round_it(torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, second)
    generator = torch.Generator().manual_seed(1)
    assert not torch.equal(round_it(generator), round_it(generator))
    torch.manual_seed(2)
    default = round_it()
    torch.manual_seed(2)
    assert torch.equal(round_it(), default)


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_passes_inside_of_the_range(isa, dtype):
    x = (torch.randn(3, 5, 4, 6) * 300).to(dtype)
    x.view(-1)[:6] = torch.tensor([448.0, -448.0, 450.0, torch.nan, torch.inf, 0.0]).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    for scale in (None, torch.rand(1, 5, 1, 1) + 0.5, torch.rand(3, 5, 4, 6) + 0.5):
        quotient = x.to(compute) if scale is None else x.to(compute) / scale.to(compute)
        for view, grad in itertools.product(views_of(x), views_of(torch.randn(x.shape))):
            expected = torch.where(quotient.abs() <= 448, grad.to(dtype), 0)
            assert torch.equal(qo.quant_float_backward(grad, view, 4, 3, scale, special="nan"), expected)
            leaf = view.detach().requires_grad_()
            y = qo.quant_float_forward(leaf, 4, 3, scale, special="nan")
            assert torch.equal(torch.autograd.grad(y, leaf, grad.to(dtype))[0], expected)


def test_a_learned_scale_is_refused():
    x, scale = torch.randn(4), torch.tensor(0.5, requires_grad=True)
    y = qo.quant_float_forward(x, 4, 3, scale)
    with pytest.raises(RuntimeError, match=r"quant_float_forward: expected no derivative by a scale.*scale\.detach\(\)"):
        y.sum().backward()


# ---- refusals --------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3)
REFUSED = [
    (lambda: qo.quant_float_forward(X, 0, 3), r"exponent_bits in \[1, 8\], got 0"),
    (lambda: qo.quant_float_forward(X, 9, 3), r"exponent_bits in \[1, 8\], got 9"),
    (lambda: qo.quant_float_forward(X, 4, -1), r"mantissa_bits in \[0, 23\], got -1"),
    (lambda: qo.quant_float_forward(X, 4, 24), r"mantissa_bits in \[0, 23\], got 24"),
    (lambda: qo.quant_float_forward(X, 4, 3, special="inf"), r"special to be one of .*got 'inf'"),
    (lambda: qo.quant_float_forward(X, 4, 3, rounding="up"), r"rounding to be one of .*got 'up'"),
    (
        lambda: qo.quant_float_forward(X, 4, 2, saturate=False),
        r"a format with codes for infinity or NaN .* for saturate=False.*saturate=True",
    ),
    (lambda: qo.quant_float_forward(X, 1, 0, special="ieee"), r"a format with a finite value other than 0"),
    (lambda: qo.quant_float_forward(X, 1, 0, special="nan"), r"a format with a finite value other than 0"),
    (lambda: qo.quant_float_forward(X, 1, 3, special="ieee", subnormals=False), r"a format with a finite value other than 0"),
    (lambda: qo.quant_float_forward(X, 8, 7, special="none"), r"special 2 \(ieee\) with 8 exponent bits.*got 0"),
    (lambda: qo.quant_float_forward(X, 8, 7, special="ieee", bias=126), r"a bias in \[127, 127\].*got 126"),
    (lambda: qo.quant_float_forward(X, 4, 3, bias=128), r"a bias in \[-112, 127\], so that float32 has the numbers, got 128"),
    (lambda: qo.quant_float_forward(X, 4, 3, bias=-113), r"a bias in \[-112, 127\], so that float32 has the numbers, got -113"),
    (lambda: qo.quant_float_forward(X, 4, 3, torch.ones(2)), r"scale to have one element or to broadcast"),
    (lambda: qo.quant_float_forward(X, 4, 3, rounding="stochastic", seed=2**63), r"an int64 as seed, got 9223372036854775808"),
    (
        lambda: qo.quant_float_forward(X, 4, 3, rounding="stochastic", seed=torch.zeros(2, dtype=torch.int64)),
        r"a seed of one element",
    ),
    (lambda: qo.quant_float_backward(X[0], X, 4, 3), r"grad\.shape == tensor\.shape"),
]
REFUSED_DTYPES = [
    (lambda: qo.quant_float_forward(X.int(), 4, 3), r"tensor\.dtype in \(float32.*got int32"),
    (lambda: qo.quant_float_forward(X, 4, 3, torch.ones((), dtype=torch.int32)), r"scale\.dtype in \(float32.*got int32"),
    (lambda: qo.quant_float_forward(X, 4, 3, rounding="stochastic", seed=torch.zeros(())), r"seed\.dtype int64, got float32"),
]


@pytest.mark.parametrize(("call", "sentence"), REFUSED)
def test_bad_values_are_refused(call, sentence):
    with pytest.raises(ValueError, match=r"quant_ops\.quant_float_.*: expected " + sentence):
        call()


@pytest.mark.parametrize(("call", "sentence"), REFUSED_DTYPES)
def test_bad_dtypes_are_refused(call, sentence):
    with pytest.raises(TypeError, match=r"quant_ops\.quant_float_.*: expected " + sentence):
        call()


def test_stochastic_rounding_without_a_seed_is_refused():
    with pytest.raises(RuntimeError, match="expected a seed with stochastic rounding, got None"):
        torch.ops.quant_ops.quant_float_forward(X, 4, 3, rounding=3)


def test_widths_of_a_standard_have_its_special_codes():
    x = random_bits(10_000)
    for e, m, special, _, _ in STANDARDS.values():
        assert_same(qo.quant_float_forward(x, e, m), qo.quant_float_forward(x, e, m, special=special))
        assert_same(torch.ops.quant_ops.quant_float_forward(x, e, m), qo.quant_float_forward(x, e, m, special=special))
    assert qo.quant_float_forward(x, 4, 3, special="none").nan_to_num(0.0).max() == 480
    assert qo.quant_float_forward(x, 4, 3, bias=8).nan_to_num(0.0).max() == 240  # of no standard
