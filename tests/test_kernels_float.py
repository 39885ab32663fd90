"""Micro-kernels of floating formats, of every instruction set: against numpy in float64, bit for bit, with guarded outputs."""

import itertools

import numpy as np
import pytest
import sweep
import test_kernels
from test_kernels import DTYPES, ISAS, Guarded, kernels

NONE, NAN, IEEE = range(3)
EVEN, AWAY, ZERO, STOCHASTIC = range(4)
FLOATS, INTEGERS, ELEMENTS = range(3)  # RoundingMethod
FLOOR, EVEN_AMAX, CEIL, ROUND_UP, E4M3, BFLOAT16, FLOAT32 = range(7)

# exponent bits, mantissa bits, bias, special codes, and the method that is expected
FORMATS = {
    "E2M1": (2, 1, 1, NONE, FLOATS),
    "E4M3": (4, 3, 7, NAN, FLOATS),
    "E5M2": (5, 2, 15, IEEE, FLOATS),
    "E3M0": (3, 0, 3, NONE, FLOATS),
    "MXINT8": (1, 6, 1, NONE, FLOATS),
    "FP16": (5, 10, 15, IEEE, FLOATS),
    "E4M22": (4, 22, 0, NAN, FLOATS),
    "BF16": (8, 7, 127, IEEE, INTEGERS),
    "TF32": (8, 10, 127, IEEE, INTEGERS),
    "FP32": (8, 23, 127, IEEE, ELEMENTS),
    "E8M0": (8, 0, 127, IEEE, ELEMENTS),
    "E1M23": (1, 23, 0, NONE, ELEMENTS),
    "small": (3, 2, 20, NONE, FLOATS),
    "near the largest float": (4, 3, -112, NONE, ELEMENTS),
}
TORCH_NAMES = ["float32", "float16", "bfloat16"]


class Format:
    """A floating format by its definition."""

    def __init__(self, exponent_bits, mantissa_bits, bias, special, _=None, *, saturate=True, subnormals=True, rounding=EVEN):
        self.made = kernels.FloatFormat(exponent_bits, mantissa_bits, bias, special, saturate, subnormals, rounding)
        self.mantissa_bits, self.least, self.subnormals, self.rounding = mantissa_bits, 1 - bias, subnormals, rounding
        codes = 2 ** (exponent_bits + mantissa_bits)
        last = codes - 1 - (0, 1, 2**mantissa_bits)[special]
        field, mantissa = divmod(last, 2**mantissa_bits)
        significand = mantissa / 2**mantissa_bits + (field > 0)
        self.largest = significand * 2.0 ** (max(field, 1) - bias)
        self.overflow = self.largest if saturate else np.inf if special == IEEE else np.nan
        assert self.made.largest == self.largest

    def __call__(self, x, random):
        """float32 to float32; random words for stochastic rounding."""
        m = np.abs(x.astype(np.float64))
        finite = np.isfinite(m)
        exponent = np.maximum(np.frexp(np.where(finite, m, 1))[1] - 1, self.least)  # that of 0 is too small anyway
        quantum = np.ldexp(1.0, exponent - self.mantissa_bits)
        if not self.subnormals:
            quantum = np.where(m < np.ldexp(1.0, self.least), np.ldexp(1.0, self.least), quantum)
        with np.errstate(invalid="ignore"):
            steps = m / quantum  # exact
            down = np.floor(steps)
            rounded = {
                EVEN: np.rint(steps),
                AWAY: np.floor(steps + 0.5),
                ZERO: down,
                STOCHASTIC: down + ((random >> np.uint32(1)) < np.rint((steps - down) * 2.0**31)),
            }[self.rounding] * quantum
            beyond = np.where(finite & (self.rounding == ZERO), self.largest, self.overflow)
            rounded = np.where(rounded > self.largest, beyond, rounded)
        return np.copysign(np.where(np.isnan(m), np.nan, rounded), x).astype(np.float32)


def to_float32(x, dtype):
    return (x.astype(np.uint32) << 16).view(np.float32) if dtype == "bfloat16" else x.astype(np.float32)


def from_float32(y, dtype):
    """Rounded to nearest even."""
    if dtype != "bfloat16":
        with np.errstate(over="ignore"):
            return y.astype(dtype)
    bits = np.ascontiguousarray(y).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(y), 0x7FC0, rounded).astype(np.uint16)


def same(got, expected, dtype):
    """Bits, with all NaNs alike."""
    nan = np.isnan(to_float32(expected, dtype))
    bits = np.uint32 if dtype == "float32" else np.uint16
    return np.array_equal(np.isnan(to_float32(got, dtype)), nan) and np.array_equal(
        np.ascontiguousarray(got)[~nan].view(bits), np.ascontiguousarray(expected)[~nan].view(bits)
    )


def elements(n, dtype, seed=0, largest=1.0):
    """Of every size around the format's, ties of it, and what is special."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore"):
        spread = np.ldexp(rng.standard_normal(n), rng.integers(-30, 4, n)) * largest
        ties = np.ldexp(rng.integers(0, 64, n) / 32.0, rng.integers(-12, 3, n)) * rng.choice([-1.0, 1.0], n) * largest
        x = np.where(rng.random(n) < 0.4, ties, spread).astype(np.float32)
    odd = np.array([0, -0.0, np.inf, -np.inf, np.nan, 3.4e38, -3.4e38, 1e-45, -1.1754942e-38, 65504, -largest], np.float32)
    x = np.where(rng.random(n) < 0.15, rng.choice(odd, n), x)
    return from_float32(x, dtype)


def words(n, seed=1):
    random = np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)
    return np.where(np.arange(n) % 11 == 0, np.array([0, 2**32 - 1], np.uint32)[np.arange(n) // 11 % 2], random)


def options():
    """Roundings, without subnormals or saturation where the format has them."""
    return [
        dict(zip(("rounding", "subnormals", "saturate"), values, strict=True))
        for values in itertools.product([EVEN, AWAY, ZERO, STOCHASTIC], [True, False], [True, False])
    ]


def takes(format, rounding=EVEN, subnormals=True, saturate=True):
    del rounding
    exponent_bits, _, _, special, _ = format
    return (saturate or special != NONE) and (subnormals or exponent_bits > 1)


def test_the_method_of_each_format():
    for name, (e, m, bias, special, method) in FORMATS.items():
        assert kernels.FloatFormat(e, m, bias, special).method == method, name


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TORCH_NAMES)
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_float_of_all_lengths(isa, dtype, name):
    """0 to 70 elements, without a scale, with one and with one for each element."""
    arguments = FORMATS[name]
    for chosen in sweep.part(filter(lambda o: takes(arguments, **o), options()), 6, seed=len(name)):
        format = Format(*arguments, **chosen)
        x, random = elements(150, dtype, 2, format.largest), words(150)
        scales = (2 ** np.random.default_rng(3).uniform(-3, 3, 150)).astype(np.float32)
        for scale in (None, scales[:1], scales):
            each = scale is scales
            with np.errstate(all="ignore"):
                divisor = np.float32(1) if scale is None else scale
                y = format(to_float32(x, dtype) / divisor, random) * divisor
            expected = from_float32(y, dtype)
            for n in range(71) if chosen["rounding"] == EVEN else (0, 1, 9, 35, 70):
                part = slice(n % 5, n % 5 + n)
                got = Guarded((1, n), DTYPES[dtype])
                of_part = scale[part] if each else scale
                of_words = random[part] if chosen["rounding"] == STOCHASTIC else None
                kernels.quantize_float(isa, x[part], got.view[0], dtype, format.made, of_part, of_words)
                assert same(got.view[0], expected[part], dtype), (chosen, scale is None, n)
                got.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("name", FORMATS)
def test_quantize_float_of_all_16_bit_values(isa, dtype, name):
    x = test_kernels.as_numpy(test_kernels.all_16_bit(dtype))
    random = words(len(x))
    for rounding in (EVEN, AWAY, ZERO, STOCHASTIC):
        format = Format(*FORMATS[name], rounding=rounding)
        for scale in (None, np.array([0.37], np.float32)):
            y = np.empty_like(x)
            kernels.quantize_float(isa, x, y, dtype, format.made, scale, random)
            divisor = np.float32(1) if scale is None else scale
            with np.errstate(all="ignore"):
                expected = from_float32(format(to_float32(x, dtype) / divisor, random) * divisor, dtype)
            assert same(y, expected, dtype), (rounding, scale)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TORCH_NAMES)
def test_the_gradient_passes_within_the_range(isa, dtype):
    for name in ("E2M1", "E4M3", "BF16", "FP32"):
        format = Format(*FORMATS[name])
        x, grad = elements(150, dtype, 4, format.largest), elements(150, dtype, 5)
        scales = (2 ** np.random.default_rng(3).uniform(-3, 3, 150)).astype(np.float32)
        for scale, n in itertools.product((None, scales[:1], scales), range(71)):
            with np.errstate(all="ignore"):
                inside = np.abs(to_float32(x, dtype) / (np.float32(1) if scale is None else scale)) <= np.float32(format.largest)
            got = Guarded((1, n), DTYPES[dtype])
            of_part = scale[:n] if scale is scales else scale
            kernels.quantize_float(isa, x[:n], got.view[0], dtype, format.made, of_part, grad=grad[:n])
            assert same(got.view[0], np.where(inside, grad, 0)[:n].astype(DTYPES[dtype]), dtype), (name, n)
            got.check()


# ---- blocks -----------------------------------------------------------------------------------------------------------------


def floor_log2(x):
    return np.frexp(x)[1] - 1


def block_scale(amax, format, rule, divisor, tensor_scale=1.0):
    """float32 of float32, by the documented rules."""
    if not np.isfinite(amax):
        return np.float32(np.nan)
    if rule <= ROUND_UP:
        if amax == 0:
            return np.float32(1)
        significand, top = float(amax), floor_log2(format.largest)
        if rule == EVEN_AMAX:
            step = 2.0 ** (floor_log2(significand) - format.mantissa_bits)
            significand = np.rint(significand / step) * step
        exponent = floor_log2(significand) - top
        if rule == CEIL and significand > 2.0 ** floor_log2(significand):
            exponent += 1
        if rule == ROUND_UP:
            ratio = float(amax / np.float32(format.largest))
            exponent = -200 if ratio == 0 else 200 if ratio == np.inf else floor_log2(ratio) + (ratio > 2.0 ** floor_log2(ratio))
        return np.float32(np.nan if exponent > 127 else 2.0 ** max(exponent, -127))
    if rule == E4M3:
        scale = Format(*FORMATS["E4M3"])(np.array([amax / np.float32(divisor) / np.float32(tensor_scale)]), np.uint32(0))[0]
        return max(scale, np.float32(2**-6)) * np.float32(tensor_scale)
    if amax == 0:
        return np.float32(1)
    if rule == BFLOAT16:
        amax = to_float32(from_float32(np.array([amax], np.float32), "bfloat16"), "bfloat16")[0]
    return max(amax / np.float32(divisor), np.float32(2.0**-126))


def one_block(x, format, rule, divisor, tensor_scale, random, grad, dtype):
    values = to_float32(x, dtype)
    with np.errstate(all="ignore"):
        scale = block_scale(np.abs(values).max(), format, rule, divisor, tensor_scale)
        quotient = values / scale
        if grad is not None:
            return np.where(np.abs(quotient) <= np.float32(format.largest), grad, 0).astype(x.dtype)
        return from_float32(format(quotient, random) * scale, dtype)


RULES = [*itertools.product([FLOOR, EVEN_AMAX, CEIL, ROUND_UP], [None], [1.0]), (E4M3, None, 1.0), (E4M3, 3.0, 2.0**-9)]
RULES += [(BFLOAT16, None, 1.0), (BFLOAT16, 1.0, 1.0), (FLOAT32, None, 1.0), (FLOAT32, 100.0, 1.0)]
BLOCK_FORMATS = ["E2M1", "E4M3", "E5M2", "MXINT8", "E3M0", "small", "TF32", "E1M23"]


def block_cases(name):
    """Rounding, rule, divisor, scale of the tensor, and whether it is the gradient."""
    for (rule, divisor, tensor_scale), rounding in itertools.product(RULES, [EVEN, AWAY, ZERO, STOCHASTIC, "gradient"]):
        format = Format(*FORMATS[name], rounding=EVEN if rounding == "gradient" else rounding)
        yield format, rule, np.float32(format.largest if divisor is None else divisor), tensor_scale, rounding


def block_elements(n, dtype, seed):
    """Blocks of very different sizes, few of which hold what is special."""
    rng = np.random.default_rng(seed)
    size = np.repeat(rng.choice([2.0**-126, 2.0**-20, 1.0, 1.0, 30.0, 2.0**15, 2.0**126], n // 7 + 1), 7)[:n]
    with np.errstate(over="ignore"):
        x = (rng.standard_normal(n) * size).astype(np.float32)
    x = np.where(rng.random(n) < 0.01, rng.choice(np.array([np.nan, np.inf, -np.inf, 3.4e38], np.float32), n), x)
    x = np.where(rng.random(n) < 0.1, np.float32(-0.0), x)
    x[n // 3 : n // 2] = 0
    return from_float32(x, dtype)


@pytest.mark.sampled(20)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TORCH_NAMES)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_contiguous_blocks(isa, dtype, name):
    """Rows of 1 to 70 elements in blocks of every size, starting anywhere in a row, more blocks than a batch."""
    rng = np.random.default_rng(6)
    for format, rule, divisor, tensor_scale, rounding in sweep.part(block_cases(name), 8, seed=len(dtype)):
        for _ in range(4):
            length = int(rng.integers(1, 71))
            block = int(rng.integers(1, length + 1))
            of_row = -(-length // block)
            first, blocks = int(rng.integers(0, of_row)), int(rng.choice([1, 3, 20, 64, 65, 130]))
            sizes = [min(block, length - (first + i) % of_row * block) for i in range(blocks)]
            n = sum(sizes)
            x, grad, random = block_elements(n, dtype, n), elements(n, dtype, 8), words(n)
            got = Guarded((1, n), DTYPES[dtype])
            gradient = grad if rounding == "gradient" else None
            kernels.quantize_block(
                isa, x, got.view[0], dtype, format.made, rule, divisor, tensor_scale, length, block, first, blocks,
                random if rounding == STOCHASTIC else None, gradient,
            )  # fmt: skip
            at = 0
            for size in sizes:
                part = slice(at, at + size)
                of_part = None if gradient is None else gradient[part]
                expected = one_block(x[part], format, rule, divisor, tensor_scale, random[part], of_part, dtype)
                assert same(got.view[0, part], expected, dtype), (rule, rounding, length, block, first, at, x[part])
                at += size
            got.check()


@pytest.mark.sampled(8)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_scales_at_their_thresholds(isa, name):
    """Blocks of one element, at and around the powers of two and what the rules round to them, the smallest and largest too."""
    format = Format(*FORMATS[name])
    significands = np.array([1, 1 + 2**-23, 1.2, *(2 - 2.0**-drop for drop in range(1, 25))])
    exponents = np.array([*range(-149, -119, 2), *range(-130, -122), -7, 0, 5, 8, *range(121, 128)])
    x = np.ldexp(significands, exponents[:, None]).ravel()
    x = x[x < 3.4e38].astype(np.float32)
    for rule, divisor, tensor_scale in RULES:
        divisor = np.float32(format.largest if divisor is None else divisor)
        y = np.empty_like(x)
        kernels.quantize_block(isa, x, y, "float32", format.made, rule, divisor, tensor_scale, 1, 1, 0, len(x))
        arguments = (format, rule, divisor, tensor_scale, np.zeros(1, np.uint32), None, "float32")
        expected = np.concatenate([one_block(x[i : i + 1], *arguments) for i in range(len(x))])
        assert same(y, expected, "float32"), (rule, x[y != expected][:3])


@pytest.mark.sampled(20)
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TORCH_NAMES)
@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_blocks_down_the_columns(isa, dtype, name):
    """0 to 70 columns of blocks of 1 to 40 elements."""
    rng = np.random.default_rng(7)
    for format, rule, divisor, tensor_scale, rounding in sweep.part(block_cases(name), 8, seed=len(dtype) + 1):
        for columns in range(int(rng.integers(0, 9)), 71, 9):
            rows = int(rng.integers(1, 41))
            x = block_elements(rows * (columns + 7), dtype, columns).reshape(columns + 7, rows).T.copy()  # sizes differ by column
            grad, random = elements(x.size, dtype, 8).reshape(x.shape)[:, :columns], words(rows * columns).reshape(rows, columns)
            x, got = x[:, :columns], Guarded((rows, columns), DTYPES[dtype])
            gradient = grad if rounding == "gradient" else None
            kernels.quantize_block(
                isa, x, got.view, dtype, format.made, rule, divisor, tensor_scale,
                random=random if rounding == STOCHASTIC else None, grad=gradient,
            )  # fmt: skip
            for c in range(columns):
                of_column = None if gradient is None else gradient[:, c]
                expected = one_block(x[:, c], format, rule, divisor, tensor_scale, random[:, c], of_column, dtype)
                assert same(got.view[:, c], expected, dtype), (rule, rounding, rows, columns, c)
            got.check()


# ---- random words -----------------------------------------------------------------------------------------------------------


def philox4x32(counter, key):
    """Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011): counter [4, n], key [2]."""
    c, k = [np.asarray(word, np.uint64) for word in counter], [np.uint64(word) for word in key]
    low = np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [b >> np.uint64(32) ^ c[1] ^ k[0], b & low, a >> np.uint64(32) ^ c[3] ^ k[1], a & low]
        k = [(k[0] + np.uint64(0x9E3779B9)) & low, (k[1] + np.uint64(0xBB67AE85)) & low]
    return np.stack(c, axis=-1).astype(np.uint32)


def test_philox_gives_the_known_answers():
    """Those of the authors' library Random123 (kat_vectors)."""
    ones = 0xFFFFFFFF
    zeros = philox4x32([[0]] * 4, (0, 0))
    assert [f"{word:08x}" for word in zeros[0]] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]
    assert [f"{word:08x}" for word in philox4x32([[ones]] * 4, (ones, ones))[0]] == ["408f276d", "41c83b0e", "a20bc7c6", "6d5451fd"]
    pi = philox4x32([[0x243F6A88], [0x85A308D3], [0x13198A2E], [0x03707344]], (0xA4093822, 0x299F31D0))
    assert [f"{word:08x}" for word in pi[0]] == ["d16cfe09", "94fdcceb", "5001e420", "24126ea1"]
    for isa in ISAS:
        got = np.empty(4, np.uint32)
        kernels.random_words(isa, 0, 0, got)
        assert np.array_equal(got, zeros[0])


@pytest.mark.parametrize("isa", ISAS)
def test_random_words(isa):
    """Element i has word i % 4 of counter i / 4, a seed and a counter of 64 bits; 0 to 300 of them from anywhere."""
    rng = np.random.default_rng(9)
    starts = [0, 1, 2, 3, 4, 77, *(4 * 2**32 - back for back in (1, 4, 30, 64, 65, 200)), 2**62 + 5, 2**63 - 40]
    for seed, first in itertools.product([0, 1, 2**32, 2**64 - 1, 0x0123456789ABCDEF], starts):
        counters = np.arange(first // 4, (first + 300) // 4 + 1, dtype=np.uint64)
        zeros = np.zeros_like(counters)
        counter = [counters & np.uint64(0xFFFFFFFF), counters >> np.uint64(32), zeros, zeros]
        expected = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32)).reshape(-1)[first % 4 :]
        for n in (*range(9), *rng.integers(9, 300, 8), 300):
            got = Guarded((1, int(n)), np.uint32)
            kernels.random_words(isa, seed, first, got.view[0])
            assert np.array_equal(got.view[0], expected[:n]), (seed, first, n)
            got.check()
