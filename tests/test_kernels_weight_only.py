"""Micro-kernels of weights in groups, of every instruction set: against numpy, in memory of which nothing beside it may be touched.

Every array lies at the end of a page, or at the start of one, whose neighbour may neither be read nor written: one element too many
ends the process.
"""

import ctypes
import itertools
import mmap

import numpy as np
import pytest
import reference
import torch
from test_kernels import DTYPES, all_16_bit, as_numpy, kernels

ISAS = [*kernels.isas(), *kernels.emulated_isas()]
PAGE = mmap.PAGESIZE
EPS = float(np.finfo(np.float32).eps)
PROT_NONE = 0


class Walled:
    """Makes copies of arrays with a wall behind them and, every other time, before them."""

    def __init__(self):
        self.count = 0

    def __call__(self, array):
        if array is None:
            return None
        size = max(array.nbytes, 1)
        pages = -(-size // PAGE)
        memory = mmap.mmap(-1, (pages + 2) * PAGE)
        start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for wall in (0, pages + 1):
            assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + wall * PAGE), PAGE, PROT_NONE) == 0
        self.count += 1
        offset = PAGE if self.count % 2 else (pages + 1) * PAGE - array.nbytes
        copy = np.frombuffer(memory, array.dtype, array.size, offset).reshape(array.shape)
        copy[...] = array
        return copy


walled = Walled()


def rng_of(*seed):
    return np.random.default_rng(seed)


def columns_of(rng, groups, columns, kind, bits=4):
    """scale, zero, float_zero; the zero points that `kind` names."""
    low = -(1 << (bits - 1))
    scale = (rng.random((groups, columns)) * 0.1 + 1e-3).astype(np.float32)
    zero = rng.integers(low, -low, (groups, columns)).astype(np.int8) if kind == "integer" else None
    float_zero = rng.standard_normal((groups, columns)).astype(np.float32) if kind == "float" else None
    return scale, zero, float_zero


def folded(sums, g, y, scale, zero, float_zero, code_sum, offset, row_scale, row_zero, row_sum):
    """The comment of GroupFold. sums: int64 [rows, columns]."""
    rows = np.zeros(len(sums), np.int64) if row_sum is None else row_sum[:, g].astype(np.int64)
    if row_sum is not None:
        sums = sums - ((0 if zero is None else zero[g].astype(np.int64)) + offset) * rows[:, None]
    if code_sum is not None:
        sums = sums - row_zero[:, None].astype(np.int64) * code_sum[g]
    y = reference.fma32(sums.astype(np.float32), row_scale[:, None] * scale[g], y)
    if float_zero is not None:
        y = reference.fma32(np.broadcast_to(rows[:, None], sums.shape).astype(np.float32), row_scale[:, None] * float_zero[g], y)
    return y


def packed_nibbles(codes):
    """[columns, k] in [-8, 7] as [k / 8][columns][4], k padded to 16 with zero bytes."""
    columns, k = codes.shape
    padded = np.zeros((columns, -(-k // 16) * 16), np.uint8)
    padded[:, :k] = codes + 8
    octets = padded.reshape(columns, -1, 2, 4).transpose(1, 2, 0, 3)  # octet, half, column, k
    return np.ascontiguousarray(octets[:, 0] | octets[:, 1] << 4).view(np.int8)


def packed_bytes(codes):
    """[columns, k] as [k / 4][columns][4], k padded to 4."""
    columns, k = codes.shape
    padded = np.zeros((columns, -(-k // 4) * 4), np.int8)
    padded[:, :k] = codes
    return np.ascontiguousarray(padded.reshape(columns, -1, 4).transpose(1, 0, 2))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("fill", ["random", "extreme"])
def test_nibbles(isa, fill):
    """All heights of a tile, k around the steps and the groups, every form of a zero point: exact sums, then the fold."""
    rng = rng_of(1)
    most = kernels.nibble_rows(isa)
    cases = itertools.product([1, 15, 16, 17, 31, 64, 97, 300], [32, 64, None], ["none", "integer", "float"], [False, True])
    for i, (k, group, kind, asymmetric) in enumerate(cases):
        rows = 1 + i % most
        group = group or -(-k // 16) * 16
        groups = -(-k // group)
        codes = rng.integers(-8, 8, (16, k)) if fill == "random" else np.where(rng.random((16, k)) < 0.5, -8, 7)
        padded_k = -(-k // 16) * 16
        a = np.zeros((rows, padded_k), np.int8)
        a[:, :k] = rng.integers(-128, 128, (rows, k)) if fill == "random" else np.where(rng.random((rows, k)) < 0.5, -128, 127)
        row_zero = rng.integers(-128, 128, rows).astype(np.int32) * asymmetric
        scale, zero, float_zero = columns_of(rng, groups, 16, kind)
        starts = range(0, k, group)
        sums = np.stack([a[:, g : min(g + group, k)].astype(np.int64).sum(1) for g in starts], 1)
        lengths = np.array([min(group, k - g) for g in starts])
        row_sum = (sums - row_zero[:, None] * lengths).astype(np.int32)
        code_sum = np.stack([(codes[:, g : g + group] + 8).sum(1) for g in starts]).astype(np.int32) if asymmetric else None
        row_scale = (rng.random(rows) + 0.1).astype(np.float32)
        y = rng.standard_normal((rows, 16)).astype(np.float32)
        parameters = (scale, zero, float_zero, code_sum, 8, row_scale, row_zero, row_sum)
        expected = y
        for g, start in enumerate(starts):
            stop = min(start + group, k)
            product = a[:, start:stop].astype(np.int64) @ (codes[:, start:stop] + 8).T.astype(np.int64)
            expected = folded(product, g, expected, *parameters)
        got = walled(y)
        fold = kernels.GroupFold(*(walled(p) if isinstance(p, np.ndarray) else p for p in parameters))
        kernels.nibbles(isa, walled(a), padded_k, group, walled(packed_nibbles(codes)), fold, got)
        assert np.array_equal(got, expected), (k, rows, group, kind, asymmetric)


@pytest.mark.parametrize("isa", ISAS)
def test_fold(isa):
    rng = rng_of(2)
    for rows, columns, kind, asymmetric in itertools.product([1, 2, 7, 32], [16, 32, 48, 64], ["none", "integer", "float"], [0, 1]):
        groups, g = 3, 1
        sums = rng.integers(-(2**28), 2**28, (rows, columns)).astype(np.int32)
        scale, zero, float_zero = columns_of(rng, groups, columns, kind, 8)
        code_sum = rng.integers(-(2**15), 2**15, (groups, columns)).astype(np.int32) if asymmetric else None
        row_sum = rng.integers(-(2**15), 2**15, (rows, groups)).astype(np.int32) if kind != "none" else None
        row_scale = (rng.random(rows) + 0.1).astype(np.float32)
        row_zero = rng.integers(0, 256, rows).astype(np.int32)
        y = rng.standard_normal((rows, columns)).astype(np.float32)
        parameters = (scale, zero, float_zero, code_sum, 0, row_scale, row_zero, row_sum)
        got = walled(y)
        fold = kernels.GroupFold(*(walled(p) if isinstance(p, np.ndarray) else p for p in parameters))
        kernels.fold(isa, walled(sums), g, fold, got)
        assert np.array_equal(got, folded(sums.astype(np.int64), g, y, *parameters)), (rows, columns, kind, asymmetric)


@pytest.mark.parametrize("isa", ISAS)
def test_sums_of_codes(isa):
    rng = rng_of(3)
    for n, flip in itertools.product([*range(130), 255, 256, 300, 5000], [False, True]):
        codes = rng.integers(0, 256, n).astype(np.uint8) if n % 3 else np.full(n, 255, np.uint8)
        got = walled(codes)
        assert kernels.sum_codes(isa, got, flip) == codes.astype(np.int64).sum()
        assert np.array_equal(got, codes ^ np.uint8(128 * flip))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_widening_every_number(isa, dtype):
    x = all_16_bit(dtype)
    for first, n in [(0, 65536), *((977 * n, n) for n in [*range(1, 36), 63, 64, 65])]:
        part = x[first : first + n]
        to = walled(np.zeros(len(part), np.float32))
        kernels.widen(isa, walled(as_numpy(part)), dtype, to)
        assert reference.same_bits(torch.from_numpy(to.copy()), part.float())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_products_are_those_of_float32(isa, dtype):
    x = torch.randn(300) * 1e4 if dtype == "float32" else all_16_bit(dtype)[::211]
    multiplier = torch.randn(len(x)) * 10.0 ** torch.randint(-38, 38, (len(x),))
    multiplier[::17], multiplier[1::17] = 0.0, torch.inf
    for n in [0, *range(1, 36), 63, 64, 65, len(x)]:
        to = walled(np.zeros(n, np.float32))
        kernels.multiply(isa, walled(as_numpy(x[:n])), dtype, walled(multiplier[:n].numpy()), to)
        assert reference.same_bits(torch.from_numpy(to.copy()), x[:n].float() * multiplier[:n])


def chunks(rng, bits):
    """WeightChunks at the ends of their weight: (chunk, codes [columns, k] of its k, scale, zero, float_zero, first)."""
    low = -(1 << (bits - 1))
    for (first, k), columns, kind in itertools.product(
        [(0, 1), (0, 8), (0, 13), (32, 64), (64, 128), (0, 128), (256, 101)], [16, 32, 48, 64], ["none", "integer", "float"]
    ):
        codes = rng.integers(low, -low, (columns, first + k))
        if bits == 4:
            b = np.stack([packed_nibbles(codes[n : n + 16]) for n in range(0, columns, 16)])
            steps = b[0].nbytes, 0
        else:
            b = packed_bytes(codes)
            steps = 64, columns * 4
        scale, zero, float_zero = (None if p is None else p[0] for p in columns_of(rng, 1, columns, kind, bits))
        arrays = [walled(p) for p in (scale, zero, float_zero)]
        chunk = kernels.WeightChunk(bits, walled(b), *steps, first, first + k, *arrays)
        yield chunk, codes[:, first:], scale, zero, float_zero, first


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_expand(isa, bits):
    """Steps are exact; with floating zero points one fused multiply-add. It may write to the end of eight k, nothing after it."""
    for chunk, codes, scale, zero, float_zero, _ in chunks(rng_of(4), bits):
        k = codes.shape[1]
        steps = codes[:16].T.astype(np.float32) - (0 if zero is None else zero[:16].astype(np.float32))
        expected = (
            steps if float_zero is None else reference.fma32(steps, np.broadcast_to(scale[:16], steps.shape), float_zero[:16])
        )
        w = walled(np.full((-(-k // 8) * 8, 16), 7, np.float32))
        kernels.expand(isa, chunk, w)
        assert np.array_equal(w[:k], expected)


def within_bound(got, a, w, y):
    """Of k sums in float32, one after the other, each off by half an EPS of its size at most, and three operations more.

    [rows, columns], from a [rows, k] and w [columns, k].
    """
    a, w = a.astype(np.float64), w.astype(np.float64)
    return (np.abs(got - (y + a @ w.T)) <= (a.shape[1] + 3) * EPS / 2 * (np.abs(y) + np.abs(a) @ np.abs(w).T)).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bits", [4, 8])
def test_few_rows(isa, bits):
    rng = rng_of(5)
    for i, (chunk, codes, scale, zero, float_zero, first) in enumerate(chunks(rng, bits)):
        rows, (columns, k) = 1 + i % kernels.few_rows_most, codes.shape
        a = np.zeros((rows, -(-(first + k) // 8) * 8), np.float32)
        a[:, first : first + k] = rng.standard_normal((rows, k))
        w = codes.astype(np.float64) - (0 if zero is None else zero[:, None])
        w = w * scale[:, None] + (0 if float_zero is None else float_zero[:, None].astype(np.float64))
        y = rng.standard_normal((rows, columns)).astype(np.float32)
        got = walled(y)
        kernels.few_rows(isa, chunk, walled(a), got)
        assert within_bound(got, a[:, first : first + k], w, y), (bits, rows, columns, k)


@pytest.mark.parametrize("isa", ISAS)
def test_float_tile(isa):
    """Every instruction set adds in the same order."""
    rng = rng_of(6)
    for rows, k in itertools.product(range(1, kernels.float_rows_most + 1), [0, 1, 2, 7, 8, 100, 128]):
        a, w = rng.standard_normal((rows, k)).astype(np.float32), rng.integers(-15, 16, (k, 16)).astype(np.float32)
        scale, y = rng.random(16).astype(np.float32), rng.standard_normal((rows, 16)).astype(np.float32)
        got, scalar = walled(y), y.copy()
        kernels.float_tile(isa, walled(a), walled(w), walled(scale), got)
        kernels.float_tile("scalar", a, w, scale, scalar)
        assert np.array_equal(got, scalar)
        assert within_bound(got, a, w.T * scale[:, None].astype(np.float64), y)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_store(isa, dtype):
    """Rounded once; nothing beyond the columns of a row."""
    rng = rng_of(7)
    for rows, columns in itertools.product([1, 3], range(1, 67)):
        x = (rng.standard_normal((rows, -(-columns // 16) * 16)) * 10.0 ** rng.integers(-9, 6)).astype(np.float32)
        x[0, 0] = [np.nan, np.inf, -0.0, 1e-41][columns % 4]
        y = walled(np.full((rows, columns), 77, DTYPES[dtype]))
        kernels.store(isa, walled(x), y, dtype)
        expected = torch.from_numpy(x[:, :columns].copy()).to(getattr(torch, dtype))
        assert reference.same_bits(torch.from_numpy(y.copy()).view(expected.dtype), expected)
