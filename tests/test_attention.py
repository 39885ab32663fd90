"""int8_attention: the bits of its definition in numpy, the bound of its error, and what models pass to it."""

import itertools
import math

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F

import quant_ops as qo

F32 = np.float32
LANES = 16
EXP2 = [
    F32(float.fromhex(c))
    for c in ("-0x1.62e43p-1", "0x1.ebfbdcp-3", "-0x1.c6aee6p-5", "0x1.3b2d5p-7", "-0x1.5f3f3p-10", "0x1.41fb2cp-13")
]
LOG2E, LOG2E_REST = F32(float.fromhex("0x1.715476p+0")), F32(float.fromhex("0x1.4ae0cp-26"))


def fma(a, b, c):
    a, b, c = np.broadcast_arrays(*(np.asarray(x, F32) for x in (a, b, c)))
    return reference.fma32(a, b, c)


def exp(x):
    """exp_of of contract/functions.h, for -87 <= x <= 0."""
    magic = F32(12582912)
    n = fma(x, LOG2E, magic) - magic
    f = fma(-x, LOG2E_REST, fma(-x, LOG2E, n))
    p = EXP2[5]
    for c in (*EXP2[4::-1], F32(1)):
        p = fma(p, f, c)
    return p * np.exp2(n)


def codes(x, axis):
    """Symmetric codes with a scale for each slice along the axis, and the scales."""
    absmax = np.abs(x).max(axis, keepdims=True, initial=0)
    scale = np.where(absmax == 0, F32(1), np.maximum(absmax / F32(127), F32(2.0**-126)))
    return np.rint(x / scale).astype(np.int64), scale


def centered(x):
    total = np.zeros(x.shape[1], F32)
    for row in x:
        total += row
    mean = total / F32(len(x))
    return x - mean, mean


def one_head(q, k, v, mask, scale):
    """float32 arrays; the mask is what is added to the scores."""
    (k, _), (v, mean) = centered(k), centered(v)
    (qc, a), (kc, b), (vc, c) = codes(q, 1), codes(k, 1), codes(v, 0)
    x = (qc @ kc.T).astype(F32) * ((a * F32(scale)) * b.T) + mask
    largest = x.max(1, keepdims=True)
    p = exp(np.maximum(x - np.where(largest == -np.inf, F32(0), largest), F32(-87)))
    lanes = np.zeros((len(q), LANES), F32)
    for s in range(len(k)):
        lanes[:, s % LANES] += p[:, s]
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    sums = (np.rint(p * F32(255)).astype(np.int64) @ vc).astype(F32)
    return np.where(largest == -np.inf, F32(0), fma(sums, (F32(1) / (F32(255) * lanes)) * c, mean))


def by_definition(q, k, v, mask=None, causal=False, scale=None):
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    shape = (*q.shape[:3], k.shape[2])
    if causal:
        mask = torch.ones(shape[2:], dtype=torch.bool).tril()
    added = torch.zeros(()) if mask is None else mask.float() if mask.is_floating_point() else torch.where(mask, 0.0, -math.inf)
    added = added.expand(shape)
    y = torch.empty(*q.shape[:3], v.shape[3])
    for b, h in itertools.product(range(shape[0]), range(shape[1])):
        of = h // (shape[1] // k.shape[1])
        y[b, h] = torch.from_numpy(
            one_head(*(x.float().numpy() for x in (q[b, h], k[b, of], v[b, of])), added[b, h].numpy(), scale)
        )
    return y.to(q.dtype)


def heads(batch, count, rows, columns, dtype=torch.float32):
    """As a projection gives them: the heads of a row are neighbours in memory."""
    x = torch.randn(batch, rows, count * columns) * 2 + torch.randn(count * columns)
    return x.to(dtype).view(batch, rows, count, columns).transpose(1, 2)


SHAPES = {  # batch, heads, heads of k and v, L, S, D, DV
    "encoder": (2, 3, 3, 33, 33, 32, 32),
    "grouped": (1, 4, 2, 7, 20, 16, 24),
    "panels": (1, 2, 1, 9, 150, 70, 130),
    "odd": (2, 2, 2, 5, 3, 7, 9),
    "one": (1, 1, 1, 1, 1, 1, 1),
    "long": (1, 1, 1, 3, 5000, 4, 2),
}
MASKS = {
    "none": lambda *shape: None,
    "keys": lambda b, h, length, s: torch.rand(b, 1, 1, s) > 0.3,
    "rows": lambda b, h, length, s: torch.randn(h, length, s),
    "half": lambda b, h, length, s: torch.randn(length, 1).half(),
    "bfloat16": lambda b, h, length, s: torch.randn(s, length).T.bfloat16(),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("mask", [*MASKS, "causal"])
def test_bits(isa, shape, mask):
    b, h, kv, length, s, d, dv = SHAPES[shape]
    dtype = {"keys": torch.float16, "rows": torch.bfloat16}.get(mask, torch.float32)
    q, k, v = heads(b, h, length, d, dtype), heads(b, kv, s, d, dtype), heads(b, kv, s, dv, dtype)
    m = None if mask == "causal" else MASKS[mask](b, h, length, s)
    y = qo.int8_attention(q, k, v, m, causal=mask == "causal", scale=-0.3 if mask == "half" else None)
    assert torch.equal(y, by_definition(q, k, v, m, mask == "causal", -0.3 if mask == "half" else None))
    assert y.transpose(1, 2).is_contiguous()


def test_any_threads_and_strides(threads):
    q, k, v = (heads(3, 4, 50, 32) for _ in "qkv")
    mask = torch.rand(3, 1, 50, 50) > 0.2
    expected = by_definition(q, k, v, mask)
    for n in (1, 2, 5):
        threads(n)
        assert torch.equal(qo.int8_attention(q, k, v, mask), expected)
        for way in (torch.Tensor.contiguous, lambda x: x.transpose(2, 3).contiguous().transpose(2, 3)):
            assert torch.equal(qo.int8_attention(way(q), way(k), way(v), way(mask)), expected)


def exact(q, k, v, mask=None):
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(repeat, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q.double(), k, v, mask)


def bound(q, k, v):
    """As int8_attention documents it."""
    q, k, v = (x.double() for x in (q, k, v))
    scale, k, r = 1 / math.sqrt(q.shape[-1]), k - k.mean(-2, keepdim=True), (v - v.mean(-2, keepdim=True)).abs().amax(-2, True)
    a, b = (x.abs().amax(-1, keepdim=True) / 127 for x in (q, k))
    norms = a * k.abs().sum(-1).unsqueeze(-2) + b.mT * q.abs().sum(-1, keepdim=True) + a * b.mT * q.shape[-1] / 2
    e = scale / 2 * norms.amax(-1, keepdim=True)
    largest = torch.softmax(q @ k.mT * scale, -1).amax(-1, keepdim=True)
    return (torch.exp(2 * e) * (1 + k.shape[-2] / 510 * largest) - 1) * r + r / 254


@pytest.mark.parametrize("kind", ["random", "sharp", "biased", "sink"])
def test_error(kind):
    q, k, v = (torch.randn(2, 4, 128, 32) for _ in "qkv")
    if kind == "sharp":
        q = q * 5
    if kind == "biased":  # what all keys have in common is most of them
        k, v = k + 8 * torch.randn(4, 1, 32), v + 8
    if kind == "sink":  # nine tenths of every row go to one token of small v: small probabilities make the result
        k[:, :, 0], v[:, :, 0] = 3, 0.01 * v[:, :, 0]
        q = q + 0.41
    y, expected = qo.int8_attention(q, k, v), exact(q, k, v)
    assert ((y - expected).abs() <= bound(q, k, v) + 1e-5).all()
    noise = (y - expected).square().sum() / (expected - expected.mean(-2, keepdim=True)).square().sum()
    assert -10 * noise.log10() > {"random": 35, "sharp": 30, "biased": 30, "sink": 15}[kind]


def test_the_means_take_away_what_tokens_share():
    """A shift of all keys changes no result but by its rounding, and one of all values shifts the result."""
    q, k, v = (torch.randint(-8, 9, (1, 2, 64, 16)).float() for _ in "qkv")
    assert torch.equal(qo.int8_attention(q, k + 64, v - 32), qo.int8_attention(q, k, v) - 32) or torch.allclose(
        qo.int8_attention(q, k + 64, v - 32), qo.int8_attention(q, k, v) - 32, rtol=0, atol=1e-5
    )
    same = torch.full((1, 2, 64, 16), 0.1)
    assert torch.equal(qo.int8_attention(q, k, same), same[:, :, :1].expand_as(same)) or torch.allclose(
        qo.int8_attention(q, k, same), same, rtol=1e-6
    )


def test_rows_without_keys():
    q, k, v = (torch.randn(1, 2, 20, 16) for _ in "qkv")
    mask = torch.ones(20, 20, dtype=torch.bool)
    mask[3] = False
    y = qo.int8_attention(q, k, v, mask)
    assert torch.equal(y[:, :, 3], torch.zeros(1, 2, 16))
    assert torch.equal(y, by_definition(q, k, v, mask))
    assert not qo.int8_attention(q, k[:, :, :0], v[:, :, :0]).any()
    assert qo.int8_attention(q[:, :, :0], k, v).shape == (1, 2, 0, 16)
    assert qo.int8_attention(q, k, v[..., :0]).shape == (1, 2, 20, 0)
    assert qo.int8_attention(q[:0], k[:0], v[:0]).shape == (0, 2, 20, 16)


def test_values_that_are_not_finite(isa):
    """A row of q spoils its own results, a column of v its own, a row of k all of its head."""
    q, k, v = (torch.randn(1, 2, 40, 24) for _ in "qkv")
    expected = qo.int8_attention(q, k, v)
    for value in (math.nan, math.inf):
        for of in range(3):
            x = [q.clone(), k.clone(), v.clone()]
            x[of][0, 1, 3, 2] = value
            y = qo.int8_attention(*x)
            spoiled = torch.zeros(1, 2, 40, 24, dtype=torch.bool)
            spoiled[0, 1][(3, slice(None), (slice(None), 2))[of]] = True
            assert torch.equal(y.isnan(), spoiled)
            assert torch.equal(y[~spoiled], expected[~spoiled])
