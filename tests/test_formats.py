"""Number formats: their values against ml_dtypes, torch and torchao, scales, and tensors of every kind.

The operators below them have tests of their own; here it is which format is which, and what a call does around the operator.
"""

import itertools
import math

import ml_dtypes
import pytest
import torch
from number_formats import BLOCKS, FORMATS, HALF, NAMED, SCALED, cast, patterns, same

import quant_ops as qo


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


# ---- values against other implementations ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("name", "other", "largest"),
    [
        ("E4M3", ml_dtypes.float8_e4m3fn, 448.0),
        ("E5M2", ml_dtypes.float8_e5m2, 57344.0),
        ("E3M2", ml_dtypes.float6_e3m2fn, 28.0),
        ("E2M3", ml_dtypes.float6_e2m3fn, 7.5),
        ("E2M1", ml_dtypes.float4_e2m1fn, 6.0),
    ],
)
def test_saturating_formats_are_the_cast_of_the_clamped_value(name, other, largest, dtype):
    format, x = NAMED[name], patterns(dtype)
    expected = torch.where(x.isnan(), x.float(), cast(x.clamp(-largest, largest), other))
    assert format.largest == largest
    assert same(format(x.float()), expected)
    assert same(format(x), expected.to(dtype))
    assert torch.equal(format(x).signbit()[~x.isnan()], x.signbit()[~x.isnan()])  # -0 is kept


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("format", "to"),
    [
        (qo.FP16, torch.float16),
        (qo.BF16, torch.bfloat16),
        (qo.E5M2.with_(saturate=False), torch.float8_e5m2),
        (qo.E5M2.with_(saturate=False), ml_dtypes.float8_e5m2),
        (qo.E4M3.with_(saturate=False), ml_dtypes.float8_e4m3fn),
    ],
)
def test_formats_with_infinity_or_nan_are_the_cast(format, to, dtype):
    x = patterns(dtype)
    expected = x.float().to(to).float() if isinstance(to, torch.dtype) else cast(x, to)
    assert same(format(x.float()), expected)


@pytest.mark.parametrize("format", [qo.FP16, qo.BF16, qo.E4M3, qo.E5M2])
def test_random_float32_values(format):
    x = torch.randn(100_000) * torch.exp2(torch.randint(-30, 20, (100_000,)).float())
    to = {"E4M3": torch.float8_e4m3fn, "E5M2": torch.float8_e5m2, "FP16": torch.float16, "BF16": torch.bfloat16}[str(format)]
    clamped = x.clamp(-format.largest, format.largest) if format.saturate else x
    assert same(format(x), clamped.to(to).float())


def test_parameters_reach_the_formats_of_int_fp_qsim():
    """Its E4M3 has numbers for all codes, and rounds half away from zero."""
    format = qo.FloatFormat(4, 3, special="none", rounding="nearest_away")
    assert format.largest == 480
    x = torch.tensor([470.0, 1e9, 1.0625, -1.0625, 1.1875])
    assert format(x).tolist() == [480, 480, 1.125, -1.125, 1.25]
    assert qo.FloatFormat(4, 3, special="none")(x).tolist() == [480, 480, 1, -1, 1.25]
    assert qo.FloatFormat(5, 10, special="none").largest == 131008


def test_widths_of_a_standard_have_its_special_codes():
    assert qo.FloatFormat(4, 3) == qo.E4M3
    assert qo.FloatFormat(5, 2) == qo.E5M2
    assert qo.FloatFormat(8, 7).special == "ieee"
    assert qo.FloatFormat(4, 3, bias=8).largest == 240  # of no standard: all codes are numbers
    assert qo.E4M3.with_(bias=8).largest == 224  # an E4M3 stays one
    assert str(qo.FloatFormat(4, 3, special="none")) == "FloatFormat(4, 3, special='none')"


def test_bias_and_subnormals():
    assert qo.FloatFormat(2, 1, bias=3)(torch.tensor([9.0, 0.1, 0.02])).tolist() == [1.5, 0.125, 0.0]
    x = torch.tensor([0.3, 0.5, 0.51, 0.9])
    assert qo.E2M1(x).tolist() == [0.5, 0.5, 0.5, 1.0]
    assert qo.FloatFormat(2, 1, subnormals=False)(x).tolist() == [0.0, 0.0, 1.0, 1.0]


def test_largest_values():
    """Against the largest entry of a list of all values, by the definition."""
    for exponent, mantissa, special in itertools.product(range(1, 5), range(4), ("none", "nan", "ieee")):
        bias = 2 ** (exponent - 1) - 1
        values = [2.0 ** (max(e, 1) - bias) * (m / 2**mantissa + (e > 0)) for e in range(2**exponent) for m in range(2**mantissa)]
        values = values[: len(values) - {"none": 0, "nan": 1, "ieee": 2**mantissa}[special]]
        if len(values) > 1:
            assert qo.FloatFormat(exponent, mantissa, special=special).largest == values[-1]


def by_steps(x, step, low, high, rounding):
    """The formula of integer formats, in float64."""
    steps = (x / step).double()
    magnitude = {
        "nearest_even": steps.abs().round(),
        "nearest_away": (steps.abs() + 0.5).floor(),
        "toward_zero": steps.abs().floor(),
    }[rounding]
    return (magnitude.copysign(steps).clamp(low, high) * step.double()).to(x.dtype)


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("bits", [2, 3, 8, 16, 24])
@pytest.mark.parametrize(("narrow", "signed"), [(True, True), (False, True), (True, False)])
def test_integers(bits, narrow, signed, rounding):
    format = qo.IntFormat(bits, narrow, signed, rounding)
    high = 2 ** (bits - signed) - 1
    low = (-high if narrow else -high - 1) if signed else 0
    assert (format.qmin, format.qmax, format.largest, format.bits) == (low, high, high, bits)
    ties = torch.arange(-2.0 * high, 2.0 * high, max(0.5, high / 500))
    assert same(format.simulate(ties, torch.tensor(1.0)), by_steps(ties, torch.tensor(1.0), low, high, rounding))
    x = torch.randn(7, 50)
    assert same(format(x), by_steps(x, x.abs().max() / high, low, high, rounding))
    assert same(format(x, axis=0), by_steps(x, x.abs().amax(1, True) / high, low, high, rounding))


@pytest.mark.parametrize("rounding", ["nearest_even", "nearest_away", "toward_zero"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("bits", "fraction"), [(8, 4), (4, 8), (5, -3), (24, 12)])
def test_fixed_point(bits, fraction, clamp, symmetric, rounding):
    format, step = qo.FixedPoint(bits, fraction, clamp, symmetric, rounding), torch.tensor(2.0**-fraction)
    low, high = (symmetric - 2 ** (bits - 1), 2 ** (bits - 1) - 1) if clamp else (-math.inf, math.inf)
    x = torch.cat([torch.randn(200) * 2 ** (bits - fraction), step * torch.arange(-5, 5.5, 0.5), torch.tensor([1e30, -1e30])])
    assert same(format(x), by_steps(x, step, low, high, rounding))
    assert same(format(x.bfloat16()), by_steps(x.bfloat16().float(), step, low, high, rounding).bfloat16())
    assert format.largest == high * step


# ---- blocks ------------------------------------------------------------------------------------------------------------------


def in_blocks(x, size):
    """Blocks along the last dimension, the last one filled with zeros, and what makes a tensor like x of them again."""
    blocks = torch.nn.functional.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    return blocks, lambda blocks: blocks.flatten(-2)[..., : x.shape[-1]]


@pytest.mark.parametrize("size", [1, 8, 32, 64])
@pytest.mark.parametrize("name", ["MXFP8_E4M3", "MXFP8_E5M2", "MXFP6_E3M2", "MXFP6_E2M3", "MXFP4", "MXINT8"])
def test_mx_is_the_element_format_of_scaled_blocks(name, size):
    format = NAMED[name].with_(block_size=size)
    x = torch.randn(5, 70) * torch.exp2(torch.randint(-20, 20, (5, 70)).float())
    x[0] = 0
    blocks, joined = in_blocks(x, size)
    amax = blocks.abs().amax(-1, True)
    emax = math.floor(math.log2(format.element.largest))
    scale = torch.exp2(torch.frexp(torch.where(amax == 0, 1.0, amax)).exponent - 1 - emax)
    assert same(format(x), joined(format.element(blocks / scale) * scale))
    assert same(format.along(0)(x.T), format(x).T)
    assert same(format.along(1)(x.T[None, :, :].transpose(1, 2)), format.along(1)(x[None].clone()))


@pytest.mark.parametrize("mode", ["FLOOR", "EVEN", "CEIL", "RCEIL"])
@pytest.mark.parametrize("name", ["MXFP8_E4M3", "MXFP8_E5M2", "MXFP6_E3M2", "MXFP6_E2M3", "MXFP4"])
def test_mx_against_torchao(name, mode):
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    constants = pytest.importorskip("torchao.prototype.mx_formats.constants")
    fp4 = getattr(torch, "float4_e2m1fn_x2", None)
    element = {
        "MXFP8_E4M3": torch.float8_e4m3fn,
        "MXFP8_E5M2": torch.float8_e5m2,
        "MXFP6_E3M2": constants.DTYPE_FP6_E3M2,
        "MXFP6_E2M3": constants.DTYPE_FP6_E2M3,
        "MXFP4": fp4,
    }[name]
    if element not in constants.SUPPORTED_ELEM_DTYPES:
        pytest.skip(f"torchao has no {name}")
    if element not in (torch.float8_e4m3fn, torch.float8_e5m2) and mode == "RCEIL":
        pytest.skip("torchao has this mode for 8 bits only")
    for dtype in (torch.float32, torch.bfloat16):
        # torchao's scales are at least 2^-126
        x = (torch.randn(16, 256) * torch.exp2(torch.randint(-30, 30, (16, 256)).float())).to(dtype)
        scaling = mx.ScaleCalculationMode[mode]
        expected = mx.MXTensor.to_mx(x, element, 32, scaling_mode=scaling).dequantize(torch.float32)
        rule = {"FLOOR": "floor", "EVEN": "even", "CEIL": "ceil", "RCEIL": "round_up"}[mode]
        assert same(NAMED[name].with_(scale_rule=rule)(x), expected.to(dtype))


@pytest.mark.parametrize("two_level", [False, True])
def test_nvfp4(two_level):
    format = qo.NVFP4_TWO_LEVEL if two_level else qo.NVFP4
    x = torch.randn(6, 50) * torch.exp2(torch.randint(-4, 4, (6, 50)).float())
    x[1] *= 1e-6
    tensor_scale = x.abs().max() / 2688 if two_level else torch.tensor(1.0)
    blocks, joined = in_blocks(x, 16)
    scale = blocks.abs().amax(-1, True) / 6 / tensor_scale
    scale = scale.clamp(2**-6, 448).to(torch.float8_e4m3fn).float() * tensor_scale
    assert same(format(x), joined(qo.E2M1(blocks / scale) * scale))
    assert same(format.along(0)(x.T.contiguous()), format(x).T)


@pytest.mark.parametrize("two_level", [False, True])
def test_nvfp4_against_torchao(two_level):
    """torchao multiplies by reciprocals, which moves values near ties."""
    nvfp4 = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    x = torch.randn(64, 256)
    scale = nvfp4.per_tensor_amax_to_scale(x.abs().max()) if two_level else None
    expected = nvfp4.NVFP4Tensor.to_nvfp4(x, per_tensor_scale=scale).dequantize(torch.float32)
    got = (qo.NVFP4_TWO_LEVEL if two_level else qo.NVFP4)(x)
    assert torch.isclose(got, expected, rtol=1e-6).float().mean() > 0.999


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_block_float(bits):
    x = torch.randn(3, 4, 10) * torch.exp2(torch.randint(-4, 4, (3, 4, 10)).float())

    def expected(blocks, dims):
        power = torch.exp2(torch.floor(torch.log2(blocks.double().abs().amax(dims, True)))).float()
        high = 2 ** (bits - 1) - 1
        return by_steps(blocks, power * 2.0 ** (2 - bits), -high, high, "nearest_even")

    assert same(qo.BlockFloat(bits)(x), expected(x, (0, 1, 2)))
    assert same(qo.BlockFloat(bits, axis=1)(x), expected(x, (0, 2)))
    assert same(qo.BlockFloat(bits, axis=-1)(x), expected(x, (0, 1)))
    blocks, joined = in_blocks(x, 4)
    assert same(qo.BlockFloat(bits, block_size=4)(x), joined(expected(blocks, -1)))
    assert same(qo.BlockFloat(bits, axis=0)(x[0, 0]), expected(x[0, 0][:, None], 1)[:, 0])


def test_block_float_of_blocks_is_mxint8():
    x = torch.randn(8, 100)
    assert same(qo.BlockFloat(8, block_size=32)(x), qo.MXINT8(x))
    assert qo.BlockFloat(8, block_size=32).bits == qo.MXINT8.bits


@pytest.mark.parametrize("gain", [1.0, 2.0, 3.0])
def test_abfp(gain):
    x = torch.randn(5, 150)
    blocks, joined = in_blocks(x, 64)
    step = blocks.abs().amax(-1, True).bfloat16().float() / gain / 127
    got = qo.ABFP(8, gain=gain)(x)
    torch.testing.assert_close(got, joined(by_steps(blocks, step, -127, 127, "nearest_even")), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("format", [qo.MXFP4, qo.NVFP4, qo.BlockFloat(8, block_size=16), qo.ABFP(8, block_size=16)])
def test_a_block_that_is_not_finite_is_nan(format):
    x = torch.randn(2, 64)
    x[0, 3], x[1, 40] = math.nan, -math.inf
    size = getattr(format, "block_size", 16)
    expected = torch.zeros(2, 64, dtype=torch.bool)
    expected[0, :size], expected[1, 40 // size * size : 40 // size * size + size] = True, True
    assert torch.equal(format(x).isnan(), expected)


# ---- scales ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", SCALED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_amax(format, dtype):
    x = torch.randn(4, 5, 6, dtype=torch.float64).to(dtype)
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    amax = x.abs().amax((0, 2)).to(compute)
    whole = x.abs().max().to(compute)
    assert same(format(x), format.simulate(x, whole / format.largest))
    assert same(format(x), format(x, amax=whole.item()))
    assert same(format(x), format(x, amax=whole))
    assert same(format(x, axis=1), format.simulate(x, (amax / format.largest)[:, None]))
    assert same(format(x, axis=-2), format(x, amax=amax, axis=1))
    assert same(format(x, axis=1), format(x, amax=amax[:, None]))
    assert same(format(x, axis=1), format(x, amax=amax[:, None], axis=1))
    clipped = format(x, amax=0.5)
    assert clipped.abs().max().item() == pytest.approx(0.5, rel=0.2 if format.bits < 8 else 0.01)
    assert not clipped.isnan().any()


@pytest.mark.parametrize("format", SCALED)
def test_amax_of_zero_and_of_what_is_not_finite(format):
    x = torch.randn(3, 8) * 3
    x[1] = 0
    x[2, 4] = math.nan
    assert same(format(x, amax=0.0), format.simulate(x, torch.tensor(1.0)))
    got = format(x, axis=0)
    assert same(got[0], format(x[0]))
    assert torch.equal(got[1], torch.zeros(8))
    assert got[2].isnan().all()
    assert format(x).isnan().all()
    assert format(x[0], amax=math.inf).isnan().all()
    assert format(x, amax=torch.tensor([1.0, math.inf, 1.0]), axis=0)[1].isnan().all()
    x[2, 4] = math.inf
    assert format(x, axis=0)[2].isnan().all()
    assert format(x, amax=1.0)[2, 4] == pytest.approx(1, rel=0.2)  # a static scale saturates


@pytest.mark.parametrize("format", SCALED)
def test_axis_of_a_vector(format):
    x = torch.tensor([1.0, 0.0, -3.0, math.inf])
    got = format(x, axis=0)
    torch.testing.assert_close(got[:3], x[:3])
    assert got[3].isnan()


def test_subnormal_amax():
    x = torch.tensor([1e-40, -2e-41])
    for format in SCALED:
        assert (format(x).abs() <= 1.2e-38).all()


# ---- tensors of every kind ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_dtypes_and_strides(format):
    x = torch.randn(6, 4, 10)
    expected = format(x)
    assert expected.dtype == x.dtype
    for dtype in HALF:
        half = x.to(dtype)
        assert same(format(half), format(half.float()).to(dtype))
    if isinstance(format, qo.BlockFloat | qo.FixedPoint | qo.FloatFormat | qo.IntFormat) and not (
        getattr(format, "block_size", None) or (isinstance(format, qo.FixedPoint) and not format.clamp)
    ):
        assert format(x.double()).dtype == torch.float64
        torch.testing.assert_close(format(x.double()).float(), expected, rtol=2**-10, atol=1e-3)
    strided = torch.empty(4, 11, 12).permute(2, 0, 1)[::2, :, 1:]
    strided.copy_(x)
    assert same(format(strided), expected)
    assert same(format(x.transpose(0, 1).contiguous().transpose(0, 1)), expected)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty_tensors(format, shape):
    x = torch.empty(shape)
    assert format(x).shape == shape


@pytest.mark.parametrize(
    "format", [format for format in FORMATS if not isinstance(format, BLOCKS) and not format.takes_amax], ids=str
)
def test_values_stay_when_rounded_again(format):
    rounded = format(torch.randn(7, 9))
    assert same(format(rounded), rounded)


@pytest.mark.parametrize("format", [format for format in FORMATS if not isinstance(format, BLOCKS)], ids=str)
def test_nan_stays_nan_and_infinity_saturates(format):
    x = torch.tensor([math.nan, math.inf, -math.inf, 1.0])
    static = {"amax": 8.0} if format.takes_amax else {}
    got = format(x, **static)
    assert got[0].isnan()
    assert got[1] == (math.inf if math.isinf(format.largest) or not getattr(format, "saturate", True) else got[1])
    if getattr(format, "saturate", True) and math.isfinite(format.largest):
        assert got[1] == format(torch.tensor([1e38]), **static)[0]
        assert got[1] == (8.0 if format.takes_amax else format.largest)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_other_dtypes_are_refused(dtype):
    for format in FORMATS:
        message = rf"expected x to be float32, float16, bfloat16 or float64, got {dtype}$"
        with pytest.raises(TypeError, match=message):
            format(torch.ones(4, dtype=dtype))
    with pytest.raises(TypeError, match=r"^quant_ops\.E4M3: expected x to be .*, got float$"):
        qo.E4M3(1.0)


@pytest.mark.parametrize(
    "format", [qo.MXFP4, qo.NVFP4, qo.ABFP(8), qo.BlockFloat(8, block_size=4), qo.FixedPoint(8, 4, clamp=False)]
)
def test_float64_is_refused_where_it_is_not_computed(format):
    with pytest.raises(TypeError, match="float64"):
        format(torch.ones(8, dtype=torch.float64))


def test_axes_that_are_not_there():
    x = torch.randn(3, 4)
    for axis in (2, -3):
        with pytest.raises(ValueError, match=rf"^quant_ops\.INT8: expected -x\.dim\(\) <= axis < x\.dim\(\), got {axis} and 2$"):
            qo.INT8(x, axis=axis)
        with pytest.raises(ValueError, match="expected -x"):
            qo.BlockFloat(8, axis=axis)(x)
        with pytest.raises(ValueError, match="expected"):
            qo.MXFP4.along(axis)(x)
    with pytest.raises(ValueError, match="expected"):
        qo.MXFP4(torch.tensor(1.0))


def test_refused_amax():
    x = torch.randn(3, 4)
    message = r"^quant_ops\.E4M3: expected no amax, got one for .*\. Use FloatFormat\(4, 3, scaled=True\)\.$"
    with pytest.raises(ValueError, match=message):
        qo.E4M3(x, amax=1.0)
    with pytest.raises(
        ValueError, match=r"^quant_ops\.MXFP4: expected no axis, got one for .*\. Use IntFormat, or FloatFormat with"
    ):
        qo.MXFP4(x, axis=0)
    for amax, error, message in (
        (-1.0, ValueError, "expected amax >= 0, got -1.0"),
        (torch.tensor(3), TypeError, "expected amax to be floating, got torch.int64"),
    ):
        with pytest.raises(error, match=rf"^quant_ops\.INT8: {message}$"):
            qo.INT8(x, amax=amax)
    with pytest.raises(ValueError, match=r"^quant_ops\.INT8: expected amax\.shape\[0\] == x\.shape\[axis\], got 4 and 3$"):
        qo.INT8(x, amax=torch.ones(4), axis=0)
    with pytest.raises(ValueError, match="expected"):
        qo.INT8(x, amax=torch.ones(3))
    with pytest.raises(ValueError, match="expected"):
        qo.INT8(x, amax=torch.ones(2, 3, 4))
    for format in (qo.MXFP4, qo.NVFP4_TWO_LEVEL, qo.BlockFloat(8), qo.ABFP(8), qo.FixedPoint(8, 4)):
        with pytest.raises(
            ValueError, match=r"\.simulate: expected a format that takes a scale, got .*\. Use IntFormat or FloatFormat\.$"
        ):
            format.simulate(x, torch.tensor(1.0))
