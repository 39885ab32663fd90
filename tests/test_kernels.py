"""Every micro-kernel of every instruction set, against int64 or the scalar formulas, bit for bit, with guarded outputs."""

import itertools

import numpy as np
import pytest
import reference
import sweep
import torch

kernels = pytest.importorskip("quant_ops._kernels", reason="built for development only: pip install --no-build-isolation -e .")

ISAS = kernels.isas()
DTYPES = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int8": np.int8,
    "uint8": np.uint8,
    "int32": np.int32,
}
NEAR_K = [*range(1, 21), 31, 32, 33, 63, 64, 65]


def codes(fill: str, shape, low: int, high: int, rng) -> np.ndarray:
    """Integers in [low, high], as adverse as `fill` says."""
    if fill == "random":
        return rng.integers(low, high + 1, shape)
    if fill == "max":
        return np.full(shape, high)
    if fill == "min":
        return np.full(shape, low)
    if fill == "alternating":
        return np.where(np.indices(shape).sum(0) % 2, low, high)
    return (rng.random(shape) < 0.05).astype(np.int64)  # sparse


class Guarded:
    """An output array inside a larger one that is full of a pattern."""

    def __init__(self, shape, dtype):
        self.whole = np.frombuffer(np.random.default_rng(1).bytes(4096 + np.prod(shape) * 16 * 4), np.uint8).view(dtype).copy()
        rows, columns = shape
        self.stride = columns + 7
        self.whole = self.whole[: (rows + 2) * self.stride + 8].copy()
        self.before = self.whole.copy()
        start = self.stride + 3
        self.view = self.whole[start : start + rows * self.stride].reshape(rows, self.stride)[:, :columns]

    def check(self):
        outside = np.ones(self.whole.shape, bool)
        rows, columns = self.view.shape
        start = self.stride + 3
        outside[start : start + rows * self.stride].reshape(rows, self.stride)[:, :columns] = False
        assert np.array_equal(self.whole[outside].view(np.uint8), self.before[outside].view(np.uint8)), "wrote outside"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fill", ["random", "max", "min", "alternating", "sparse"])
def test_gemm_is_exact_for_all_small_shapes(isa, fill):
    """All rows of a tile, 1 to 80 columns, K around every multiple of four: int32 sums equal int64's, nothing else is written."""
    rng = np.random.default_rng(0)
    full, narrow = kernels.gemm_rows(isa), kernels.slim_rows(isa)
    n_max, k_max, m_max = 80, max(NEAR_K), 2 * max(full, narrow) + 1
    a = codes(fill, (m_max, k_max), 0, 255, rng)
    b = codes("min" if fill == "max" else fill, (n_max, k_max), -128, 127, rng)
    ones, zeros = np.ones(96, np.float32), np.zeros(96, np.float32)
    for k in NEAR_K:
        padded = np.full((1, m_max, (k + 3) // 4 * 4), 77, np.uint8)  # padding meets zero weights
        padded[0, :, :k] = a[:, :k]
        product = a[:, :k] @ b[:, :k].T
        zero = rng.integers(0, 256, m_max).astype(np.int32)
        expected = product - zero[:, None] * b[:, :k].sum(1)
        tiles = [*((r, r) for r in range(1, full + 1)), (m_max, full), (5, 2), (m_max, narrow)]
        for n, (m, rows) in sweep.part(itertools.product(range(1, n_max + 1), tiles), 80, seed=k):
            if rows == narrow and narrow != full and n > 32:
                continue
            y = Guarded((m, n), np.int32)
            flip = 0x80808080 if kernels.flips(isa) and m % 2 else 0  # codes may be stored as signed ones
            stored = padded[:, :m] ^ np.uint8(flip & 0xFF)
            kernels.gemm(
                isa, stored, b[:n, :k, None].astype(np.int8), y.view, "int32", zero[:m], ones[:m], ones, zeros, rows=rows, flip=flip
            )
            assert np.array_equal(y.view, expected[:m, :n]), (m, n, k, rows)
            y.check()


@pytest.mark.parametrize("isa", ISAS)
def test_gemm_sums_wrap_and_come_back_at_the_largest_k(isa):
    """Unsigned codes of signed activations may pass 2^31 on the way; the corrected sum is exact up to K = 131071."""
    for k, a, zero, b in [
        (131071, 0, 128, -128),
        (131071, 255, 128, -128),
        (65793, 255, 0, -128),
        (65793, 0, 255, -128),
        (65793, 255, 0, 127),
    ]:
        padded = np.full((1, 1, (k + 3) // 4 * 4), a, np.uint8)
        y = np.zeros((1, 1), np.int32)
        one = np.ones(16, np.float32)
        kernels.gemm(isa, padded, np.full((1, k, 1), b, np.int8), y, "int32", np.array([zero], np.int32), one[:1], one, one)
        assert y[0, 0] == k * (a - zero) * b


@pytest.mark.parametrize("isa", ISAS)
def test_gemm_taps_are_summed_over_the_indirection(isa):
    rng = np.random.default_rng(2)
    for taps, m, n, k in [(2, 1, 1, 1), (9, 7, 33, 5), (25, 6, 70, 16), (49, 4, 64, 3)]:
        a, b = (
            rng.integers(0, 256, (taps, m, (k + 3) // 4 * 4)).astype(np.uint8),
            rng.integers(-128, 128, (n, k, taps)).astype(np.int8),
        )
        y = Guarded((m, n), np.int32)
        zero = np.zeros(m, np.int32)
        kernels.gemm(isa, a, b, y.view, "int32", zero, np.ones(m, np.float32), np.ones(96, np.float32), np.zeros(96, np.float32))
        assert np.array_equal(y.view, np.einsum("tmk,nkt->mn", a[:, :, :k].astype(np.int64), b.astype(np.int64)))
        y.check()


def stored(y: torch.Tensor, dtype: str) -> np.ndarray:
    """A float32 result in an output dtype, converted by torch, as the bits that the kernels write."""
    if dtype == "bfloat16":
        return y.to(torch.bfloat16).view(torch.uint16).numpy()
    return y.to(getattr(torch, dtype)).numpy()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8"])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_epilogue_rounds_as_specified(isa, dtype, relu, with_bias):
    """One product of scales, one fused multiply-add, one rounding: equal to numpy and torch for huge, tiny and odd values."""
    rng = np.random.default_rng(3)
    m, k = 6, 64
    for n, magnitude in itertools.product([1, 15, 16, 17, 40, 63, 64, 80], [1e-30, 1e-6, 1.0, 1e20]):
        a, b = rng.integers(0, 256, (1, m, k)).astype(np.uint8), rng.integers(-128, 128, (n, k, 1)).astype(np.int8)
        zero = rng.integers(0, 256, m).astype(np.int32)
        row_scale = (rng.random(m) * magnitude).astype(np.float32)
        row_scale[2] = np.nan
        column_scale = rng.random(96).astype(np.float32)
        bias = (rng.standard_normal(96) * magnitude).astype(np.float32) if with_bias else np.full(96, -0.0, np.float32)
        acc = a[0].astype(np.int64) @ b[:, :, 0].astype(np.int64).T - zero[:, None] * b[:, :, 0].astype(np.int64).sum(1)
        y = Guarded((m, n), DTYPES[dtype])
        out_scale, out_zero = magnitude * 30, 5
        kernels.gemm(
            isa,
            a,
            b,
            y.view,
            dtype,
            zero,
            row_scale,
            column_scale,
            bias,
            relu=relu,
            rows=m,
            out_scale=out_scale,
            out_zero_point=out_zero,
        )
        with np.errstate(over="ignore"):
            real = reference.epilogue(acc, row_scale[:, None], column_scale[:n], bias[:n] if with_bias else None, relu)
        if dtype in ("int8", "uint8"):
            expected = reference.requantize(real, out_scale, out_zero, getattr(torch, dtype)).numpy()
        else:
            expected = stored(real, dtype)
        nan = np.isnan(real.numpy())
        assert np.array_equal(y.view[~nan], expected[~nan])
        if dtype in ("int8", "uint8"):
            assert (y.view[nan] == out_zero).all()
        else:
            got = y.view.astype(np.float32) if dtype != "bfloat16" else (y.view.astype(np.uint32) << 16).view(np.float32)
            assert np.isnan(got[nan]).all()
        y.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fill", ["random", "max", "min", "alternating", "sparse"])
def test_depthwise_is_exact(isa, fill):
    """Channels around a block, rows around a group of four, one or two output rows, runs around a group of pixels, and columns
    outside on both sides."""
    rng = np.random.default_rng(4)
    for channels, (r, s) in itertools.product(
        [2, 3, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 130], [(1, 1), (1, 3), (3, 1), (3, 3), (4, 2), (5, 5), (7, 7), (9, 2)]
    ):
        padded, width, pixels = (channels + 15) // 16 * 16, int(rng.integers(1, 12)), int(rng.integers(1, 10))
        first, stride, dilation = int(rng.integers(-4, width + 1)), int(rng.integers(1, 4)), int(rng.integers(1, 4))
        padding, flip, zero = int(rng.integers(0, 256)), int(rng.choice([0, 128])), int(rng.integers(0, 256))
        out_rows = int(rng.integers(1, 3)) if r < 4 else 1
        a = codes(fill, (r + out_rows - 1, width, padded), 0, 255, rng).astype(np.uint8)
        b = codes(fill, (channels, 1, r, s), -128, 127, rng).astype(np.int8)
        y = Guarded((out_rows * pixels, channels), np.int32)
        ones = np.ones(padded, np.float32)
        kernels.depthwise(isa, a, b, y.view, "int32", zero, 1.0, ones, 0 * ones, first, stride, dilation, padding, flip, out_rows)
        row = np.full((len(a), width + 200, channels), padding, np.int64)
        row[:, 100 : 100 + width] = (a ^ np.uint8(flip))[:, :, :channels]
        columns = 100 + first + stride * np.arange(pixels)[:, None] + dilation * np.arange(s)
        row = row[:, columns] - zero
        expected = [np.einsum("rpsc,crs->pc", row[i : i + r], b[:, 0].astype(np.int64)) for i in range(out_rows)]
        assert np.array_equal(y.view, np.concatenate(expected)), (channels, r, s, width, pixels, first, stride, dilation, out_rows)
        y.check()


@pytest.mark.parametrize("isa", [*ISAS, *kernels.emulated_isas()])
def test_convolutions_of_every_table_are_exact(isa):
    """Drivers cut an image by what a table takes: calls of many rows, and taps that are gathered."""
    rng = np.random.default_rng(7)
    for samples, channels, size, outputs, k, stride, pad, dilation, groups in [
        (1, 64, 15, 72, 3, 1, 1, 1, 1),
        (2, 36, 9, 40, 3, 2, 1, 1, 1),
        (1, 128, 14, 16, 1, 2, 0, 1, 1),
        (1, 40, 12, 100, 1, 1, 0, 1, 1),
        (1, 72, 11, 34, 3, 1, 2, 2, 2),
        (1, 3, 17, 20, 5, 2, 2, 1, 1),
        (3, 33, 7, 130, 3, 1, 0, 1, 1),
    ]:
        x = rng.integers(0, 256, (samples, size, size, channels)).astype(np.uint8)
        w = rng.integers(-128, 128, (outputs, channels // groups, k, k)).astype(np.int8)
        zero = int(rng.integers(0, 256))
        exact = torch.nn.functional.conv2d(
            torch.from_numpy(x).permute(0, 3, 1, 2).double() - zero,
            torch.from_numpy(w).double(),
            None,
            stride,
            pad,
            dilation,
            groups,
        )
        y = np.empty(exact.permute(0, 2, 3, 1).shape, np.int32)
        kernels.conv2d(isa, x, w, y, zero, stride, pad, dilation, groups)
        assert np.array_equal(y, exact.permute(0, 2, 3, 1).numpy()), (channels, size, outputs, k, stride, pad, dilation, groups)


@pytest.mark.parametrize("isa", ISAS)
def test_rows_are_cut_into_tiles(isa):
    """Full tiles first; where an instruction takes one row, the last two tiles are halves."""
    full, slim = kernels.gemm_rows(isa), kernels.slim_rows(isa)
    for rows in range(1, 4 * max(full, slim)):
        for tiles, most in ((kernels.tiles(isa, rows), full), (kernels.tiles(isa, rows, slim=True), max(full, slim))):
            assert sum(tiles) == rows
            assert max(tiles) <= most
            assert len(tiles) <= rows // most + 1 + (full < most) * 3
    if "amx" in isa:
        assert kernels.tiles(isa, 33) == [32, 1]
        assert kernels.tiles(isa, 70) == [32, 32, 6]
    elif full == 6:
        assert kernels.tiles(isa, 13) == [6, 4, 3]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8"])
def test_depthwise_epilogue_is_that_of_the_gemm(isa, dtype):
    rng = np.random.default_rng(5)
    for channels, pixels in itertools.product([5, 16, 40, 64, 71], [1, 3, 4, 9]):
        padded = (channels + 15) // 16 * 16
        a = rng.integers(0, 256, (1, pixels, padded)).astype(np.uint8)
        b = rng.integers(-128, 128, (channels, 1, 1, 1)).astype(np.int8)
        scale, bias = (rng.random(padded) * 0.01).astype(np.float32), rng.standard_normal(padded).astype(np.float32)
        y = Guarded((pixels, channels), DTYPES[dtype])
        kernels.depthwise(isa, a, b, y.view, dtype, 9, 0.7, scale, bias)
        acc = (a[0, :, :channels].astype(np.int64) - 9) * b[:, 0, 0, 0]
        expected = reference.epilogue(acc, 0.7, scale[:channels], bias[:channels])
        if dtype in ("int8", "uint8"):
            expected = reference.requantize(expected, 1.0, 0, getattr(torch, dtype))
        else:
            expected = expected.to(getattr(torch, dtype))
        assert np.array_equal(y.view, as_numpy(expected)), (channels, pixels)
        y.check()


# ---- elementwise ------------------------------------------------------------------------------------------------------------


def all_16_bit(dtype: str) -> torch.Tensor:
    bits = torch.arange(65536, dtype=torch.int32).to(torch.int16)
    return bits.view(torch.bfloat16 if dtype == "bfloat16" else torch.float16)


def as_numpy(t: torch.Tensor) -> np.ndarray:
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


SCALES = [2.0**-149, 2.0**-126, 1e-30, 1e-7, 0.0117, 0.1, 1 / 3, 1.0, 7.3, 65504.0, 1e20, 3.4e38]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_quantize_of_all_16_bit_values(isa, dtype):
    x = all_16_bit(dtype)
    for scale, zero, (qmin, qmax, y_dtype) in itertools.product(
        SCALES, [0, 7, -128], [(-128, 127, "int8"), (0, 255, "uint8"), (-8, 7, "int8"), (-32768, 32767, "int16")]
    ):
        s, z = torch.tensor(scale), torch.tensor(zero)
        y = np.empty(65536, y_dtype)
        arguments = (np.array([scale], np.float32), np.array([zero], np.int32), qmin, qmax)
        kernels.quantize(isa, as_numpy(x), dtype, y, y_dtype, *arguments, False)
        assert np.array_equal(y, reference.quantize(x, s, z, qmin, qmax, False).numpy()), (scale, zero)
        simulated = np.empty_like(as_numpy(x))
        kernels.quantize(isa, as_numpy(x), dtype, simulated, dtype, *arguments, True)
        got = torch.from_numpy(simulated).view(x.dtype)
        assert reference.same_bits(got, reference.quantize(x, s, z, qmin, qmax, True)), (scale, zero)


def adverse_floats() -> torch.Tensor:
    """Random bit patterns, ties n + 1/2 and their neighbours, extremes."""
    random = torch.randint(-(2**31), 2**31, (200_000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.arange(-300, 301, dtype=torch.float32) + 0.5
    near = torch.cat([ties, torch.nextafter(ties, torch.tensor(1e9)), torch.nextafter(ties, torch.tensor(-1e9))])
    special = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, -3.4e38, 1e-45, -1e-45, 8388607.5, 8388609.0, 4194304.5]
    )
    return torch.cat([random, near, special, torch.randn(100_000) * 100])


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_of_adverse_float32(isa):
    x = adverse_floats()
    for scale in SCALES:
        s = torch.tensor(scale)
        for n in (len(x), 1, 7, 17, 33):
            y = np.empty(n, np.int8)
            kernels.quantize(
                isa, x[-n:].numpy(), "float32", y, "int8", np.array([scale], np.float32), np.array([3], np.int32), -128, 127, False
            )
            assert np.array_equal(y, reference.quantize(x[-n:], s, torch.tensor(3), -128, 127, False).numpy())
    simulated = np.empty(len(x), np.float32)
    kernels.quantize(
        isa, x.numpy(), "float32", simulated, "float32", np.array([0.1], np.float32), np.array([3], np.int32), -128, 127, True
    )
    expected = reference.quantize(x, torch.tensor(0.1), torch.tensor(3), -128, 127, True)
    assert reference.same_bits(torch.from_numpy(simulated), expected)


@pytest.mark.parametrize("isa", ISAS)
def test_products_with_the_reciprocal_are_mended(isa):
    """Next to ties, for scales of long significands and for scales that have no useful reciprocal: always the quotient's code."""
    torch.manual_seed(7)
    scales = [*(torch.rand(40) * 0.1 + 0.001).tolist(), 2.0**-126, 2.0**126, 2.0**-127, 2.0**127]
    for scale in [*scales, 0.0, -0.3, torch.nan, torch.inf, 1e-45]:
        s = torch.tensor(scale)
        tie = ((torch.arange(-1100, 1100) + 0.5) * s).float()
        x = torch.cat([tie, torch.nextafter(tie, tie * 2), torch.nextafter(tie, tie * 0), adverse_floats()[-20_000:]])
        for zero, qmin, qmax, dtype in [
            (0, -128, 127, "int8"),
            (250, 0, 255, "uint8"),
            (-9, -500, 500, "int16"),
            (2000, 0, 15, "uint8"),
        ]:
            arguments = (np.array([scale], np.float32), np.array([zero], np.int32), qmin, qmax)
            y, simulated = np.empty(len(x), dtype), np.empty(len(x), np.float32)
            kernels.quantize(isa, x.numpy(), "float32", y, dtype, *arguments, False)
            assert np.array_equal(y, reference.quantize(x, s, torch.tensor(zero), qmin, qmax, False).numpy()), (scale, zero)
            kernels.quantize(isa, x.numpy(), "float32", simulated, "float32", *arguments, True)
            expected = reference.quantize(x, s, torch.tensor(zero), qmin, qmax, True)
            assert reference.same_bits(torch.from_numpy(simulated), expected), (scale, zero)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_quantize_and_dequantize_rows(isa, dtype):
    """Rows of every length around the vectors', with a scale and a zero point each, for each column, for each element."""
    rng = np.random.default_rng(8)
    torch_dtype = getattr(torch, dtype)
    for n, rows in sweep.part(itertools.product([*range(1, 20), 31, 33, 49, 64, 65, 130], [1, 3, 40]), 25):
        x = torch.from_numpy(rng.standard_normal((rows, n)).astype(np.float32) * 2).to(torch_dtype)
        x[0, 0] = torch.nan
        for by_scale, by_zero in itertools.product([(1, 1), (rows, 1), (1, n), (rows, n)], repeat=2):
            scale = (rng.random(by_scale) + 0.01).astype(np.float32)
            zero = rng.integers(-30, 30, by_zero).astype(np.int32)
            s, z = torch.from_numpy(scale), torch.from_numpy(zero)
            expected = reference.quantize(x, s, z, -100, 90, False)
            for divide in (False, True):
                y, simulated = Guarded((1, rows * n), np.int8), Guarded((1, rows * n), DTYPES[dtype])
                codes = (as_numpy(x).ravel(), dtype)
                kernels.quantize(isa, *codes, y.view[0], "int8", scale, zero, -100, 90, False, rows, divide)
                kernels.quantize(isa, *codes, simulated.view[0], dtype, scale, zero, -100, 90, True, rows, divide)
                assert np.array_equal(y.view[0], expected.numpy().ravel())
                got = torch.from_numpy(simulated.view[0].copy()).view(torch_dtype).view(rows, n)
                assert reference.same_bits(got, reference.quantize(x, s, z, -100, 90, True))
                y.check()
                simulated.check()
            back = Guarded((1, rows * n), DTYPES[dtype])
            kernels.dequantize(isa, y.view[0], "int8", back.view[0], dtype, scale, zero, rows)
            assert np.array_equal(back.view[0], stored((expected - z).float() * s, dtype).ravel())
            back.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_activation_codes_are_those_of_the_quotient(isa, dtype):
    """A product with the reciprocal is only a first guess: near ties the codes must still be the quotient's."""
    x = adverse_floats() if dtype == "float32" else all_16_bit(dtype)
    for scale, zero in sweep.part(itertools.product([*SCALES, 0.0, -0.5, torch.nan, torch.inf], [0, 128, 255]), 16):
        multiples = (torch.arange(-700, 701) * 0.5 * scale).to(x.dtype)  # ties, as near as the dtype allows
        values = torch.cat([x, multiples, torch.nextafter(multiples, multiples * 2), torch.nextafter(multiples, multiples * 0)])
        expected = reference.quantize(values, torch.tensor(scale), torch.tensor(zero), 0, 255, False).numpy()
        for n in (len(values), 1, 63, 65, 200):
            y = Guarded((1, n), np.uint8)
            kernels.codes(isa, as_numpy(values[-n:]), dtype, scale, zero, y.view[0])
            assert np.array_equal(y.view[0], expected[-n:]), (scale, zero, n)
            y.check()


@pytest.mark.parametrize("isa", ISAS)
def test_quantize_takes_a_scale_and_zero_point_per_element(isa):
    rng = np.random.default_rng(5)
    for n in [1, 5, 16, 31, 100]:
        x, scale = rng.standard_normal(n).astype(np.float32), rng.random(n).astype(np.float32) + 0.01
        zero = rng.integers(-300, 300, n).astype(np.int32)  # also outside the codes' range
        y = np.empty(n, np.int8)
        kernels.quantize(isa, x, "float32", y, "int8", scale, zero, -100, 90, False)
        expected = reference.quantize(torch.from_numpy(x), torch.from_numpy(scale), torch.from_numpy(zero), -100, 90, False)
        assert np.array_equal(y, expected.numpy())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("q_dtype", ["int8", "uint8"])
def test_dequantize_of_all_codes(isa, dtype, q_dtype):
    q = np.arange(256).astype(np.uint8).view(q_dtype)
    for scale, zero in itertools.product(SCALES, [0, 1, -128, 127, 255, 1000]):
        y = np.empty(256, DTYPES[dtype])
        kernels.dequantize(isa, q, q_dtype, y, dtype, np.array([scale], np.float32), np.array([zero], np.int32))
        expected = stored((torch.from_numpy(q.astype(np.int64)) - zero).float() * torch.tensor(scale), dtype)
        assert np.array_equal(y, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_straight_through_passes_exactly_the_codes_in_range(isa):
    x = adverse_floats()
    grad = torch.randn(len(x))
    for scale, zero, qmin, qmax in [(0.1, 3, -128, 127), (7.3, 0, 0, 15), (1.0, -8, -8, 7)]:
        dx = np.empty(len(x), np.float32)
        kernels.straight_through(
            isa, x.numpy(), grad.numpy(), dx, "float32", np.array([scale], np.float32), np.array([zero], np.int32), qmin, qmax
        )
        v = reference.steps_of(x, torch.tensor(scale)) + zero
        assert np.array_equal(dx, torch.where((v >= qmin) & (v <= qmax), grad, 0.0).numpy())


def straight_through_products(x, grad, scale, zero, qmin, qmax):
    """What dscale and dzero_point sum, in float64: the products are exact."""
    quotient, z = x.float() / scale, zero.double()
    steps = torch.round(quotient)
    inside = (steps >= qmin - z) & (steps <= qmax - z)
    clamped = torch.minimum(torch.maximum(steps.double(), qmin - z), qmax - z)
    ds = torch.where(inside, (steps - quotient).double(), clamped)
    dz = torch.where(inside, 0.0, -scale.double().expand_as(quotient))
    known = ~steps.isnan()
    return inside, grad.double() * torch.where(known, ds, 0.0), grad.double() * torch.where(known, dz, 0.0)


def butterfly(lanes: np.ndarray) -> np.ndarray:
    for step in (16, 8, 4, 2, 1):
        lanes = lanes[:step] + lanes[step : 2 * step]
    return lanes[0]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_straight_through_sums_in_the_fixed_order(isa, dtype):
    """One chunk along a slice, and down the columns of a matrix: the same lanes, bit for bit."""
    torch_dtype = getattr(torch, dtype)
    for rows, columns in [(1, 1), (5, 7), (31, 16), (32, 17), (33, 64), (500, 33), (1024, 8)]:
        x, grad = (torch.randn(rows, columns) * 3).to(torch_dtype), torch.randn(rows, columns).to(torch_dtype)
        x[rows // 2, 0] = torch.nan
        x[0, -1] = torch.inf
        for varies in (False, True):
            scale = torch.rand(columns if varies else 1) * 0.02 + 0.01
            zero = torch.randint(-9, 9, (columns if varies else 1,), dtype=torch.int32)
            inside, *products = straight_through_products(x, grad, scale, zero, -128, 127)
            lane = 5
            lanes = np.zeros((2, 32, 64))
            expected = np.zeros((2, 32, 64))
            for row in range(rows):
                for i in range(2):
                    expected[i, (lane + row) % 32, :columns] += products[i][row].numpy()
            dx = Guarded((rows, columns), DTYPES[dtype])
            parameters = (scale.numpy(), zero.numpy(), -128, 127)
            kernels.straight_through_columns(isa, as_numpy(x), as_numpy(grad), dx.view, dtype, *parameters, lane, lanes)
            assert np.array_equal(lanes[:, :, :columns], expected[:, :, :columns])
            dx.check()
            passed = torch.where(inside, grad, torch.zeros_like(grad))
            assert np.array_equal(dx.view, as_numpy(passed))
            for c in (0, columns - 1):  # one column as a slice
                column = (as_numpy(x[:, c].contiguous()), as_numpy(grad[:, c].contiguous()))
                dx = Guarded((1, rows), DTYPES[dtype])
                one = (scale[c : c + 1], zero[c : c + 1]) if varies else (scale, zero)
                sums = kernels.straight_through(isa, *column, dx.view[0], dtype, *(p.numpy() for p in one), -128, 127)
                for i in range(2):
                    turned = np.roll(expected[i, :, c], -lane)
                    assert sums[i] == butterfly(turned)
                assert np.array_equal(dx.view[0], as_numpy(passed[:, c].contiguous()))
                dx.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_range_of_columns(isa, dtype):
    torch_dtype = getattr(torch, dtype)
    for rows, columns in itertools.product([1, 3, 4, 5, 9], [1, 7, 8, 15, 16, 17, 40, 100]):
        x = torch.randn(rows, columns + 3).to(torch_dtype)[:, :columns]
        low, high = Guarded((1, columns), np.float32), Guarded((1, columns), np.float32)
        bits = Guarded((1, columns), np.uint32)
        low.view[:], high.view[:], bits.view[:] = np.inf, -np.inf, 0
        kernels.range_columns(isa, as_numpy(x), dtype, low.view[0], high.view[0], bits.view[0])
        assert np.array_equal(low.view[0], x.float().amin(0).numpy())
        assert np.array_equal(high.view[0], x.float().amax(0).numpy())
        assert np.array_equal(bits.view[0], x.float().abs().amax(0).view(torch.int32).numpy().astype(np.uint32))
        x[rows // 2, columns // 2] = torch.nan
        kernels.range_columns(isa, as_numpy(x), dtype, low.view[0], high.view[0], bits.view[0])
        assert (np.nonzero(bits.view[0] >= 0x7F800000)[0] == [columns // 2]).all()
        assert not np.isnan(low.view).any()
        for guarded in (low, high, bits):
            guarded.check()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_range_ignores_nan_but_reports_it(isa, dtype):
    torch_dtype = getattr(torch, dtype)
    for n in [1, 2, 15, 16, 17, 63, 64, 65, 130, 1000]:
        x = torch.randn(n).to(torch_dtype)
        low, high, bits = kernels.range(isa, as_numpy(x), dtype)
        assert (low, high) == (x.min().item(), x.max().item())
        assert bits == x.abs().max().float().view(torch.int32).item()
        for special in (torch.nan, torch.inf, -torch.inf):
            bad = x.clone()
            bad[n // 2] = special
            assert kernels.range(isa, as_numpy(bad), dtype)[2] >= 0x7F800000


@pytest.mark.parametrize("isa", ISAS)
def test_packed_weight_layout(isa):
    """The packed bytes are the weight, rearranged, and its column sums; the same for every instruction set."""
    del isa  # packing has no instruction set: this is the point
    w = np.random.default_rng(6).integers(-128, 128, (70, 13)).astype(np.int8)
    packed = kernels.pack_weight(w)
    assert packed[:8].tobytes() == b"qopack2\0"
    sums = packed[64 : 64 + 80 * 4].view(np.int32)
    assert np.array_equal(sums[:70], w.astype(np.int64).sum(1))
    assert not sums[70:].any()
    panels = packed[(64 + 80 * 4 + 63) // 64 * 64 :]
    first, second = panels[: 64 * 16].reshape(4, 64, 4), panels[64 * 16 :].reshape(4, 16, 4)
    unpacked = np.concatenate([first, second], 1).transpose(1, 0, 2).reshape(80, 16)
    assert np.array_equal(unpacked[:70, :13], w)
    assert not unpacked[70:].any()
    assert not unpacked[:, 13:].any()
