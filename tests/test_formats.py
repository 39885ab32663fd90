"""Number formats: their values against ml_dtypes, torch and torchao, scales, gradients, refusals, names and JSON.

The operators below them have tests of their own; here it is which format is which, and what a call does around the operator.
"""

import copy
import itertools
import json
import math
import pickle

import ml_dtypes
import numpy as np
import pytest
import torch

import quant_ops as qo
from quant_ops.formats.format import NAMES

NAMED = {name: getattr(qo, name) for name in sorted(NAMES.values())}
SCALED_E4M3 = qo.FloatFormat(4, 3, scaled=True)
UNNAMED = [
    qo.IntFormat(5, narrow=False, rounding="toward_zero"),
    qo.IntFormat(3, signed=False, rounding="nearest_away"),
    qo.FloatFormat(3, 4),
    SCALED_E4M3,
    qo.FloatFormat(4, 3, bias=11, special="nan", subnormals=False, rounding="nearest_away"),
    qo.FixedPoint(8, 4),
    qo.FixedPoint(6, -2, symmetric=True, rounding="toward_zero"),
    qo.FixedPoint(6, 3, clamp=False),
    qo.BlockFloat(6),
    qo.BlockFloat(6, axis=-1),
    qo.BlockFloat(6, block_size=5, dim=0, rounding="nearest_away"),
    qo.MX(qo.E3M2, block_size=7, dim=0, scale_rule="round_up", rounding="toward_zero"),
    qo.NVFP4Format(two_level=True, dim=0),
    qo.ABFP(8),
    qo.ABFP(4, block_size=8, gain=2.5, dim=0),
]
FORMATS = [*NAMED.values(), *UNNAMED]
BLOCKS = (qo.MX, qo.NVFP4Format, qo.BlockFloat, qo.ABFP)
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


def patterns(dtype):
    """Every value of a 16-bit dtype."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


def same(a, b):
    """Equal bits but for NaN, of which there is one kind, and the sign of zero."""
    return a.dtype == b.dtype and a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def cast(x, dtype):
    """x through a dtype of ml_dtypes, as float32."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(x.float().numpy().astype(dtype).astype(np.float32))


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

SCALED = [qo.INT8, qo.IntFormat(4, narrow=False, rounding="nearest_away"), SCALED_E4M3, qo.E2M1.with_(scaled=True)]


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


# ---- stochastic rounding ------------------------------------------------------------------------------------------------------

STOCHASTIC = [
    qo.E4M3,
    SCALED_E4M3,
    qo.INT8,
    qo.IntFormat(8, narrow=False),
    qo.FixedPoint(8, 4),
    qo.FixedPoint(8, 4, clamp=False),
    qo.BlockFloat(8),
    qo.BlockFloat(8, axis=1),
    qo.MXFP4,
    qo.NVFP4_TWO_LEVEL,
    qo.ABFP(8),
]


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_stochastic_rounding_takes_a_seed(format):
    x = torch.randn(50, 64)
    down, random = format.with_(rounding="toward_zero")(x), format.with_(rounding="stochastic")
    first = random(x, seed=5)
    assert same(first, random(x, seed=torch.tensor([5])))
    assert not same(first, random(x, seed=6))
    assert same(first, random(x.T.contiguous().T, seed=5))
    assert (first.abs() >= down.abs()).all()
    torch.manual_seed(3)
    drawn = random(x)
    assert not same(drawn, random(x))
    torch.manual_seed(3)
    assert same(drawn, random(x))
    generator = torch.Generator().manual_seed(9)
    drawn = random(x, generator=generator)
    assert same(drawn, random(x, generator=generator.manual_seed(9)))
    assert random.is_stochastic
    assert not format.is_stochastic
    assert same(format(x, seed=5), format(x))  # others do not look at it


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_right_on_average(format):
    """The mean is within 5 standard errors; a rounding error has at most half a step of deviation."""
    x = torch.full((64, 64), 0.3371)
    x[:, ::8] = x[0] = 1.0  # the largest of every block, so that no other is clipped
    got = format.with_(rounding="stochastic")(x, seed=1)[1:].unflatten(1, (8, 8))[..., 1:]
    steps = got.unique()
    assert 1 <= len(steps) <= 2
    step = float(steps[-1] - steps[0])
    assert steps[0] <= 0.3371 <= steps[-1]
    assert abs(got.mean().item() - 0.3371) <= 5 * 0.5 * step / got.numel() ** 0.5 + 1e-6


# ---- gradients ----------------------------------------------------------------------------------------------------------------


def gradient(format, x, weight, **kwargs):
    x = x.detach().requires_grad_()
    (format(x, **kwargs) * weight).sum().backward()
    return x.grad


@pytest.mark.parametrize(
    "format",
    [
        qo.E4M3,
        qo.E2M1,
        qo.E5M2.with_(saturate=False),
        qo.FixedPoint(4, 1),
        qo.FixedPoint(4, 1, rounding="nearest_away"),
        qo.FixedPoint(4, 1, clamp=False),
    ],
    ids=str,
)
def test_gradients_pass_within_the_range(format):
    x, weight = torch.randn(200) * 6, torch.randn(200)
    x[:4] = torch.tensor([math.nan, 1e9, -1e9, 0.0])
    low = -4.0 if isinstance(format, qo.FixedPoint) and format.clamp else -format.largest
    margin = 0.25 if isinstance(format, qo.FixedPoint) else 0  # integers: the rounded value is in range
    inside = (x >= low - margin) & (x <= format.largest + margin)
    got = gradient(format, x, weight)
    if isinstance(format, qo.FixedPoint) and not format.clamp:
        inside |= x.abs() >= 0
    assert torch.equal(got[1:], torch.where(inside, weight, 0.0)[1:])


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_gradients_with_a_static_scale(format):
    x, weight = torch.randn(300) * 2, torch.randn(300)
    got = gradient(format, x, weight, amax=1.5)
    clear = (x.abs() - 1.5).abs() > 2 * 1.5 / format.largest  # two steps around the ends of the range are left out
    assert torch.equal(got[clear], torch.where(x.abs() < 1.5, weight, 0.0)[clear])
    assert torch.equal(gradient(format, x, weight), weight)  # from the data: nothing is clipped


@pytest.mark.parametrize("format", [qo.MXFP8_E4M3, qo.MXFP4.with_(scale_rule="round_up"), qo.NVFP4_TWO_LEVEL, qo.ABFP(8, 16)])
def test_gradients_of_blocks(format):
    x, weight = torch.randn(8, 64), torch.randn(8, 64)
    got = gradient(format, x, weight)
    kept = got == weight
    assert (kept | (got == 0)).all()
    size = getattr(format, "block_size", 16)
    clipped = x.abs().unflatten(1, (-1, size))
    clipped = (clipped == clipped.amax(-1, True)).flatten(1)
    assert kept[~clipped].float().mean() > 0.97


def test_learned_amax_of_integers():
    """LSQ: the gradient of the scale, divided by the largest code, against float64."""
    x, weight, amax = torch.randn(4, 50), torch.randn(4, 50), torch.tensor([1.0, 1.5, 2.0, 4.0], requires_grad=True)
    (qo.INT4(x, amax=amax, axis=0) * weight).sum().backward()
    steps = x.double() / (amax.detach().double()[:, None] / 7)
    codes = steps.round()
    factor = torch.where(codes.abs() <= 7, codes - steps, codes.clamp(-7, 7))
    torch.testing.assert_close(amax.grad, ((weight * factor).sum(1) / 7).float())


# ---- gradients with a format of their own -------------------------------------------------------------------------------------

E3M4 = qo.FloatFormat(3, 4)


def test_gradient_format():
    x, weight = torch.randn(100) * 10, torch.randn(100)
    format = qo.with_gradient(E3M4, qo.E5M2)
    assert same(format(x), E3M4(x))
    expected = torch.where(x.abs() <= E3M4.largest, qo.E5M2(weight), 0.0)
    assert torch.equal(gradient(format, x, weight), expected)
    assert torch.equal(gradient(qo.with_gradient(E3M4, qo.E5M2, everywhere=True), x, weight), qo.E5M2(weight))
    assert torch.equal(gradient(qo.with_gradient(E3M4, None, everywhere=True), x, weight), weight)
    assert torch.equal(gradient(qo.with_gradient(E3M4, None), x, weight), gradient(E3M4, x, weight))
    assert torch.equal(gradient(qo.with_gradient(None, qo.E5M2), x, weight), qo.E5M2(weight))
    assert torch.equal(qo.with_gradient(None, qo.E5M2)(x), x)
    assert torch.equal(gradient(qo.with_gradient(None, qo.MXFP4), x, weight), qo.MXFP4(weight))


def test_gradient_format_with_scales():
    x, weight = torch.randn(6, 8), torch.randn(6, 8)
    format = qo.with_gradient(qo.INT8, qo.INT4)
    assert format.takes_amax
    assert same(format(x, axis=0), qo.INT8(x, axis=0))
    assert same(format.simulate(x, torch.tensor(0.01)), qo.INT8.simulate(x, torch.tensor(0.01)))
    assert torch.equal(gradient(format, x, weight), qo.INT4(weight))  # a scale for the whole gradient, from its data


def test_stochastic_gradient_format():
    x, weight = torch.zeros(1000), torch.full((1000,), 1.1)
    format = qo.with_gradient(E3M4, qo.E5M2.with_(rounding="stochastic"))
    assert format.is_stochastic
    first = gradient(format, x, weight, seed=4)
    assert set(first.tolist()) == {1.0, 1.25}
    assert torch.equal(first, gradient(format, x, weight, seed=4))
    assert torch.equal(first, gradient(format, x, weight, seed=torch.tensor([4])))
    assert not torch.equal(first, gradient(format, x, weight, seed=5))
    assert first.mean().item() == pytest.approx(1.1, abs=5 * 0.125 / 1000**0.5)
    generator = torch.Generator().manual_seed(1)
    drawn = gradient(format, x, weight, generator=generator)
    assert torch.equal(drawn, gradient(format, x, weight, generator=generator.manual_seed(1)))
    torch.manual_seed(8)
    y = format(leaf := x.clone().requires_grad_())
    y.backward(weight, retain_graph=True)
    once, leaf.grad = leaf.grad, None
    y.backward(weight)
    assert torch.equal(once, leaf.grad)  # a backward pass that is run twice
    both = qo.with_gradient(E3M4.with_(rounding="stochastic"), qo.E5M2.with_(rounding="stochastic"))
    assert same(both(weight, seed=4), both.forward(weight, seed=4))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "format",
    [
        *(qo.with_gradient(inner, qo.E5M2) for inner in (E3M4, qo.INT8, qo.MXFP4, None)),
        qo.with_gradient(E3M4, qo.E5M2, everywhere=True),
        qo.with_gradient(E3M4.with_(rounding="stochastic"), qo.E5M2.with_(rounding="stochastic")),
    ],
    ids=str,
)
def test_gradient_format_under_transforms(format):
    x, weight = torch.randn(4, 32), torch.randn(4, 32)

    def loss(x):
        return (format(x, seed=3) * weight).sum()

    expected = gradient(format, x, weight, seed=3)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    assert torch.equal(leaf.grad, expected)
    if not format.is_stochastic:
        rows = torch.vmap(torch.func.grad(lambda x, weight: (format(x) * weight).sum()))(x, weight)
        loop = [gradient(format, *row) for row in zip(x, weight, strict=True)]
        assert torch.equal(rows, torch.stack(loop))


@pytest.mark.parametrize("everywhere", [False, True])
def test_results_may_be_changed_in_place(everywhere):
    """As by nn.ReLU(inplace=True) after a quantizer."""
    x, weight = torch.randn(50) * 10, torch.randn(50)
    format = qo.with_gradient(E3M4, qo.E5M2, everywhere=everywhere)

    def loss(x):
        return (format(x).relu_() * weight).sum()

    for run in (loss, torch.compile(loss, fullgraph=True, backend="eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        inside = (E3M4(x) > 0) & (everywhere | (x.abs() <= E3M4.largest))
        assert torch.equal(leaf.grad, torch.where(inside, qo.E5M2(weight), 0.0))
        assert torch.equal(leaf, x)
    with torch.no_grad():
        assert torch.equal(format(x).relu_(), E3M4(x).relu())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_formats_compile(format):
    x = torch.randn(3, 33)
    torch._dynamo.reset()
    compiled = torch.compile(format.__call__, fullgraph=True, backend="eager")
    assert same(compiled(x), format(x))


@pytest.mark.parametrize("format", [qo.E4M3, SCALED_E4M3, qo.INT8, qo.MXFP4, qo.BlockFloat(8)], ids=str)
def test_func_grad(format):
    x, weight = torch.randn(4, 32), torch.randn(4, 32)
    got = torch.func.grad(lambda x: (format(x) * weight).sum())(x)
    assert torch.equal(got, gradient(format, x, weight))


# ---- names, JSON, refusals ----------------------------------------------------------------------------------------------------


def test_names():
    assert [str(format) for format in NAMED.values()] == list(NAMED)
    assert repr([qo.E4M3, qo.MXFP4]) == "[E4M3, MXFP4]"
    assert [str(format) for format in UNNAMED] == [
        "IntFormat(5, narrow=False, rounding='toward_zero')",
        "IntFormat(3, signed=False, rounding='nearest_away')",
        "FloatFormat(3, 4)",
        "FloatFormat(4, 3, scaled=True)",
        "FloatFormat(4, 3, bias=11, special='nan', subnormals=False, rounding='nearest_away')",
        "FixedPoint(8, 4)",
        "FixedPoint(6, -2, symmetric=True, rounding='toward_zero')",
        "FixedPoint(6, 3, clamp=False)",
        "BlockFloat(6)",
        "BlockFloat(6, axis=-1)",
        "BlockFloat(6, block_size=5, dim=0, rounding='nearest_away')",
        "MX(E3M2, block_size=7, dim=0, scale_rule='round_up', rounding='toward_zero')",
        "NVFP4Format(two_level=True, dim=0)",
        "ABFP(8)",
        "ABFP(4, block_size=8, gain=2.5, dim=0)",
    ]
    assert str(qo.with_gradient(E3M4, qo.E5M2)) == "with_gradient(FloatFormat(3, 4), E5M2)"
    assert str(qo.with_gradient(None, qo.INT8, everywhere=True)) == "with_gradient(None, INT8, everywhere=True)"
    assert str(qo.FloatFormat(4, 3, bias=7, special="nan")) == "E4M3"  # the default, written out


@pytest.mark.parametrize("format", [*FORMATS, qo.with_gradient(qo.MXFP4, qo.E5M2)], ids=str)
def test_formats_can_be_kept(format):
    for other in (
        qo.format_from_json(format.to_json()),
        pickle.loads(pickle.dumps(format)),
        copy.deepcopy(format),
        format.with_(),
        eval(repr(format), vars(qo)),
    ):
        assert other == format
        assert hash(other) == hash(format)
    assert len({format, copy.copy(format)}) == 1


def test_json():
    assert json.loads(qo.INT8.to_json()) == {
        "format": "IntFormat",
        "bits": 8,
        "narrow": True,
        "signed": True,
        "rounding": "nearest_even",
    }
    fields = {"bias": None, "special": "none", "saturate": True, "subnormals": True, "rounding": "nearest_even", "scaled": False}
    assert json.loads(qo.MXFP4.to_json()) == {
        "format": "MX",
        "element": {"format": "FloatFormat", "exponent_bits": 2, "mantissa_bits": 1, **fields},
        "block_size": 32,
        "dim": -1,
        "scale_rule": "floor",
        "rounding": "nearest_even",
    }
    assert qo.format_from_json('{"format": "FloatFormat", "exponent_bits": 4, "mantissa_bits": 3}') == qo.FloatFormat(4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"quant_ops: expected the JSON of a format, got .*"),
        ("[" * 100_000, r"quant_ops: expected the JSON of a format, got .*"),
        ("[]", r"quant_ops: expected a JSON object with a format, got \[\]"),
        ('{"bits": 8}', r"quant_ops: expected a format named one of \['ABFP', .*\], got None"),
        ('{"format": "E4M3"}', r"quant_ops: expected a format named one of \['ABFP', .*\], got E4M3"),
        ('{"format": ["MX"]}', r"quant_ops: expected a format named one of \['ABFP', .*\], got \['MX'\]"),
        ('{"format": "Int8Dynamic"}', r"quant_ops: expected a format named one of \['ABFP', .*\], got Int8Dynamic"),
        (
            '{"format": "IntFormat", "bits": 8, "width": 3}',
            r"quant_ops\.IntFormat: expected fields among \['bits', .*\], got \['width'\]",
        ),
        ('{"format": "IntFormat"}', r"quant_ops\.IntFormat: expected the fields \['bits'\], got \[\]"),
        ('{"format": "IntFormat", "bits": "8"}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got 8"),
        ('{"format": "IntFormat", "bits": 8.0}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got 8\.0"),
        ('{"format": "IntFormat", "bits": {}}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got {}"),
        ('{"format": "IntFormat", "bits": 8, "narrow": 1}', r"quant_ops\.IntFormat: expected narrow to be True or False, got 1"),
        (
            '{"format": "IntFormat", "bits": 8, "rounding": ["up"]}',
            r"quant_ops\.IntFormat: expected rounding to be one of \['nearest_away', .*\], got \['up'\]",
        ),
        ('{"format": "MX", "element": 3}', r"quant_ops\.MX: expected element to be a FloatFormat, got 3\. MXINT8's is .*"),
        (
            '{"format": "MX", "element": {"format": "IntFormat", "bits": 8}}',
            r"quant_ops\.MX: expected element to be a FloatFormat, got INT8\. MXINT8's is .*",
        ),
        ('{"format": "MX", "element": {"config": "Int8Dynamic"}}', r"quant_ops\.MX: expected element to be a FloatFormat, .*"),
        ('{"format": "ABFP", "element_bits": 8, "gain": Infinity}', r"quant_ops\.ABFP: expected 0 < gain < inf, got inf"),
    ],
)
def test_refused_json(text, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        qo.format_from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qo.IntFormat(1), r"IntFormat: expected 2 <= bits <= 24, got 1"),
        (lambda: qo.IntFormat(25), r"IntFormat: expected 2 <= bits <= 24, got 25"),
        (lambda: qo.IntFormat(True), r"IntFormat: expected 2 <= bits <= 24, got True"),
        (lambda: qo.FloatFormat(0, 3), r"FloatFormat: expected 1 <= exponent_bits <= 8, got 0"),
        (lambda: qo.FloatFormat(9, 3), r"FloatFormat: expected 1 <= exponent_bits <= 8, got 9"),
        (lambda: qo.FloatFormat(4, -1), r"FloatFormat: expected 0 <= mantissa_bits <= 23, got -1"),
        (lambda: qo.FloatFormat(4, 24), r"FloatFormat: expected 0 <= mantissa_bits <= 23, got 24"),
        (lambda: qo.FloatFormat(4, 3, bias=7.5), r"FloatFormat: expected bias to be an integer or None, got 7\.5"),
        (lambda: qo.FloatFormat(4, 3, special="inf"), r"FloatFormat: expected special to be one of .*, got 'inf'"),
        (lambda: qo.FloatFormat(4, 3, rounding="up"), r"FloatFormat: expected rounding to be one of .*, got 'up'"),
        (
            lambda: qo.FloatFormat(4, 2, saturate=False),
            r"FloatFormat: expected saturate == True with special == 'none', got False\. .*",
        ),
        (
            lambda: qo.FloatFormat(8, 3, special="none"),
            r"FloatFormat: expected float32's own exponents with 8 bits, .*, got 127 and 'none'",
        ),
        (
            lambda: qo.FloatFormat(8, 3, special="ieee", bias=100),
            r"FloatFormat: expected float32's own exponents .*, got 100 and 'ieee'",
        ),
        (
            lambda: qo.FloatFormat(1, 0, special="ieee"),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 0 .*",
        ),
        (
            lambda: qo.FloatFormat(1, 0, special="nan"),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 0 .*",
        ),
        (
            lambda: qo.FloatFormat(1, 3, special="ieee", subnormals=False),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 3 mantissa bits .*",
        ),
        (
            lambda: qo.FloatFormat(4, 3, bias=200),
            r"FloatFormat: expected -112 <= bias <= 127, so that float32 .*, got 200",
        ),
        (lambda: qo.FloatFormat(4, 3, bias=-200), r"FloatFormat: expected -112 <= bias <= 127, so that float32 .*, got -200"),
        (lambda: qo.FixedPoint(1, 0), r"FixedPoint: expected 2 <= bits <= 24, got 1"),
        (lambda: qo.FixedPoint(8, 127), r"FixedPoint: expected -120 <= fraction_bits <= 126, got 127"),
        (lambda: qo.FixedPoint(8, 4, clamp=0), r"FixedPoint: expected clamp to be True or False, got 0"),
        (lambda: qo.BlockFloat(1), r"BlockFloat: expected 2 <= element_bits <= 25, got 1"),
        (lambda: qo.BlockFloat(8, axis=1, block_size=4), r"BlockFloat: expected axis or block_size, got both: 1 and 4"),
        (lambda: qo.BlockFloat(8, axis=1.0), r"BlockFloat: expected axis to be an integer or None, got 1\.0"),
        (lambda: qo.BlockFloat(8, block_size=0), r"BlockFloat: expected 1 <= block_size, got 0"),
        (lambda: qo.MX(qo.INT8), r"MX: expected element to be a FloatFormat, got INT8\. MXINT8's is FloatFormat\(1, 6, bias=1\)\."),
        (
            lambda: qo.MX(SCALED_E4M3),
            r"MX: expected an element like E4M3, got FloatFormat\(4, 3, scaled=True\)\. .*",
        ),
        (lambda: qo.MX(qo.FP16), r"MX: expected an element like FloatFormat\(5, 10\), got FP16\. .*"),
        (lambda: qo.MXFP4.with_(block_size=0), r"MX: expected 1 <= block_size, got 0"),
        (lambda: qo.MXFP4.with_(scale_rule="e4m3"), r"MX: expected scale_rule to be one of \['ceil', 'even', .*\], got 'e4m3'"),
        (lambda: qo.MXFP4.along("k"), r"MX: expected dim to be an integer, got 'k'"),
        (lambda: qo.NVFP4Format(two_level=2), r"NVFP4Format: expected two_level to be True or False, got 2"),
        (lambda: qo.ABFP(8, gain=0), r"ABFP: expected 0 < gain < inf, got 0"),
        (lambda: qo.with_gradient(qo.E4M3, 3), r"WithGradient: expected backward to be a format without .*, got 3"),
        (
            lambda: qo.with_gradient(qo.with_gradient(qo.E4M3, None), None),
            r"WithGradient: expected forward to be a format without a gradient of its own, or None, got with_gradient\(E4M3, .*",
        ),
    ],
)
def test_refused_formats(make, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.{message}$"):
        make()


def test_extreme_formats_work():
    """The widest and the narrowest."""
    x = torch.tensor([3.4e38, 1e-45, -1.5, 0.0])
    assert torch.equal(qo.FloatFormat(8, 23, special="ieee", saturate=False)(x), x)
    assert qo.FloatFormat(8, 0, special="ieee")(x).tolist()[2] == -2
    assert qo.FloatFormat(1, 0)(x).tolist() == [2.0, 0.0, -2.0, 0.0]
    assert qo.FloatFormat(7, 23, bias=0).largest > 1e38
    assert qo.FloatFormat(1, 3, special="ieee").largest == 1.75


def test_average_bits():
    expected = {"E4M3": 8, "FP16": 16, "INT4": 4, "MXFP4": 4.25, "MXFP6_E3M2": 6.25, "MXINT8": 8.25, "NVFP4": 4.5, "E1M2": 4}
    assert {name: NAMED[name].bits for name in expected} == expected
    assert qo.ABFP(8).bits == 8.25
    assert qo.BlockFloat(8).bits == 8
    assert qo.with_gradient(qo.E4M3, None).bits == 8
