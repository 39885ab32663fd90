"""choose_qparams_affine, quantize_affine, dequantize_affine: against torchao bit for bit, and its formulas in plain torch."""

import enum
import itertools
import math
import random
import warnings

import numpy as np
import pytest
import sweep
import torch
from test_kernels import ISAS, Guarded, kernels
from torch import Tensor
from views import views_of

import quant_ops as qo

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
BOUNDS = {
    **{getattr(torch, f"uint{bits}"): (0, 2**bits - 1) for bits in range(1, 9)},
    **{dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max) for dtype in (torch.int8, torch.int16, torch.int32)},
}
STORED = {dtype: torch.uint8 if least == 0 else dtype for dtype, (least, _) in BOUNDS.items()}
SHAPES = [((4, 256), (1, 128)), ((6, 8), (3, 4)), ((130, 9), (-1, 1)), ((2, 3, 10, 10), (1, 3, 5, 10)), ((5, 33), (1, 33)),
          ((7,), (7,)), ((4, 6, 5), (2, 3, 1)), ((3, 40), (1, 5)), ((2, 2100), (1, 1050)), ((24, 12), (8, 12))]  # fmt: skip


# ---- torchao's formulas in plain torch -------------------------------------------------------------------------------


def grouped(x: Tensor, block_size: tuple[int, ...]) -> tuple[Tensor, list[int], list[int]]:
    """x with every dimension split into blocks and their elements, the split dimensions, and what a scale's shape is."""
    blocks = [n if b == -1 else b for n, b in zip(x.shape, block_size, strict=True)]
    split = [s for n, b in zip(x.shape, blocks, strict=True) for s in (n // b, b)]
    kept = [n // b for n, b in zip(x.shape, blocks, strict=True) if b == 1 or b != n]
    return x.reshape(split), list(range(1, len(split), 2)), kept


def reference_qparams(
    x: Tensor, mapping: str, block_size: tuple[int, ...], least: int, most: int, eps: float | None, zeros: torch.dtype, kind: str
) -> tuple[Tensor, Tensor]:
    split, dims, shape = grouped(x, block_size)
    lo, hi = split.amin(dims), split.amax(dims)
    if kind == "preserve":
        lo, hi = torch.minimum(lo, torch.zeros_like(lo)), torch.maximum(hi, torch.zeros_like(hi))
    eps = torch.finfo(x.dtype).smallest_normal if eps is None else eps
    if mapping == "SYMMETRIC":
        scale = torch.maximum(-lo, hi) / (float(most - least) / 2)
    elif mapping == "SYMMETRIC_NO_CLIPPING_ERR":
        below, above = lo / float(least), hi / float(most)
        scale = torch.where(below > above, below, above)
    else:
        scale = (hi - lo) / float(most - least)
    scale = scale.clamp(min=eps)
    if mapping != "ASYMMETRIC":
        zero = torch.full_like(scale, int((most + least + 1) / 2))
    elif kind == "tinygemm":
        zero = lo + scale * ((most + least + 1) / 2)
    else:
        zero = torch.clamp(least - torch.round(lo / scale), least, most)
    return scale.reshape(shape), zero.reshape(shape).to(zeros)


def reference_codes(
    x: Tensor,
    block_size: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    dtype: torch.dtype,
    least: int,
    most: int,
    domain: str,
) -> Tensor:
    split, dims, _ = grouped(x, block_size)
    shape = [1 if d in dims else n for d, n in enumerate(split.shape)]
    scale = scale.reshape(shape)
    if domain == "FLOAT":
        q = torch.round((split - (zero.reshape(shape) - scale * ((most + least + 1) / 2))) / scale)
    else:
        q = torch.round(split * (1.0 / scale))
        q = q if zero is None else q + zero.reshape(shape)
    return q.clamp(least, most).reshape(x.shape).to(dtype)


def reference_values(
    q: Tensor,
    block_size: tuple[int, ...],
    scale: Tensor,
    zero: Tensor | None,
    least: int,
    most: int,
    domain: str,
    dtype: torch.dtype,
) -> Tensor:
    split, dims, _ = grouped(q, block_size)
    shape = [1 if d in dims else n for d, n in enumerate(split.shape)]
    if domain == "FLOAT":
        y = (split - (most + least + 1) / 2).to(dtype)
        y *= scale.reshape(shape)
        y += zero.reshape(shape)
        return y.reshape(q.shape)
    y = split.to(dtype)
    y = y if zero is None else y - zero.reshape(shape).to(dtype)
    return (y * scale.reshape(shape)).reshape(q.shape).to(dtype)


def same(a: Tensor, b: Tensor) -> None:
    assert (a.shape, a.dtype) == (b.shape, b.dtype)
    assert torch.equal(torch.nan_to_num(a.double(), 12345.0), torch.nan_to_num(b.double(), 12345.0))
    assert torch.equal(a.isnan(), b.isnan())


def data(shape: tuple[int, ...], dtype: torch.dtype, kind: int = 0) -> Tensor:
    """Of many magnitudes; positive, negative, zero, or with NaN and infinities."""
    x = torch.randn(shape) * 10.0 ** random.Random(kind + sum(shape)).uniform(-4, 3)
    if kind == 1:
        x = x.abs() + x.abs().amax()
    elif kind == 2:
        x = -x.abs()
    elif kind == 3:
        x[0] = 0
    elif kind == 4:
        x.view(-1)[torch.randint(x.numel(), (3,))] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    return x.to(dtype)


KINDS = [("SYMMETRIC", "preserve"), ("SYMMETRIC_NO_CLIPPING_ERR", "preserve"), ("ASYMMETRIC", "preserve"),
         ("ASYMMETRIC", "tinygemm"), ("ASYMMETRIC", "plain")]  # fmt: skip


def options_of(kind: str) -> dict[str, object]:
    return {"preserve_zero": kind == "preserve", "zero_point_domain": "FLOAT" if kind == "tinygemm" else "INT"}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("mapping", "kind"), KINDS)
def test_against_the_formulas(isa, dtype, mapping, kind):
    cases = list(itertools.product(SHAPES, BOUNDS, range(5)))
    for (shape, block_size), target, values in sweep.part(cases, 60, seed=len(kind)):
        least, most = BOUNDS[target]
        if dtype == torch.float16 and target == torch.int32:
            least, most = -60000, 60000
        x = data(shape, dtype, values)
        domain = "FLOAT" if kind == "tinygemm" else "INT"
        zeros = dtype if domain == "FLOAT" else torch.int32
        expected = reference_qparams(x, mapping, block_size, least, most, None, zeros, kind)
        scale, zero = expected
        for view in views_of(x):
            got = qo.choose_qparams_affine(view, mapping, block_size, target, least, most, **options_of(kind))
            for a, b in zip(got, expected, strict=True):
                same(a, b)
            q = qo.quantize_affine(view, block_size, scale, zero, target, least, most, domain)
            same(q, reference_codes(x, block_size, scale, zero, STORED[target], least, most, domain))
            for result in FLOATS:
                y = qo.dequantize_affine(q, block_size, scale, zero, target, least, most, domain, output_dtype=result)
                same(y, reference_values(q, block_size, scale, zero, least, most, domain, result))


@pytest.mark.parametrize("domain", ["INT", "FLOAT", "NONE"])
def test_dtypes_of_scales_and_zero_points(domain):
    """torch promotes an operation's dtype from those of its operands."""
    floating = [*FLOATS, torch.float64]
    integers = [torch.int8, torch.int16, torch.int32, torch.int64]
    zeros = {"INT": floating + integers, "FLOAT": floating + integers, "NONE": [None]}[domain]
    for x_dtype, scale_dtype, zero_dtype in itertools.product(FLOATS, floating, zeros):
        x = torch.randn(6, 64).to(x_dtype)
        scale = (torch.rand(6, 2) * 0.1 + 0.01).to(scale_dtype)
        zero = None if zero_dtype is None else (torch.randn(6, 2) * 20).to(zero_dtype)
        for target, least, most in ((torch.int8, -128, 127), (torch.int16, -300, 501), (torch.int32, -3000, 60001)):
            q = qo.quantize_affine(x, (1, 32), scale, zero, target, least, most, domain)
            same(q, reference_codes(x, (1, 32), scale, zero, target, least, most, domain))
            for result in FLOATS:
                y = qo.dequantize_affine(q, (1, 32), scale, zero, target, least, most, domain, output_dtype=result)
                same(y, reference_values(q, (1, 32), scale, zero, least, most, domain, result))


@pytest.mark.parametrize("dtype", FLOATS)
def test_eps_dtypes_and_keepdim(dtype):
    x = data((6, 64), dtype)
    x[0] *= 1e-4
    for eps, scale_dtype, zero_dtype in itertools.product(
        (None, 1e-6, 0.3), (None, *FLOATS, torch.float64), (torch.int8, torch.uint8, torch.int16, torch.int64, torch.bfloat16)
    ):
        expected = reference_qparams(x, "ASYMMETRIC", (1, 32), 0, 255, eps, zero_dtype, "preserve")
        arguments = (x, "ASYMMETRIC", (1, 32), torch.uint8, None, None, eps, scale_dtype, zero_dtype)
        scale, zero = qo.choose_qparams_affine(*arguments)
        same(scale, expected[0].to(scale_dtype or dtype))
        same(zero, expected[1])
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (1, 64), torch.int8)[0].shape == (6,)
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (1, -1), torch.int8, keepdim=True)[0].shape == (6, 1)
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (3, 32), torch.int8, keepdim=True)[0].shape == (2, 2)
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (6, 64), torch.int8)[0].shape == ()
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (1, 1), torch.int8)[0].shape == ()  # as torchao: one block
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (1, 32), torch.int8, zero_point_dtype=None)[1].dtype == dtype
    assert qo.choose_qparams_affine(x, "ASYMMETRIC", (1, 32), torch.int8, zero_point_dtype=None)[1].dtype == torch.int32
    assert qo.choose_qparams_affine(x, "SYMMETRIC", (1, 32), torch.int8, zero_point_domain="NONE")[1] is None


def test_codes_that_their_dtype_does_not_hold():
    """As torch's casts on x86: low bits, and of NaN those of the smallest integer."""
    x = torch.tensor([[3e9, -3e9, torch.nan, torch.inf, 7.0] * 5])
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.int32)
    q = qo.quantize_affine(x, (1, -1), one, zero, torch.int32)[0, :5]
    assert q.tolist() == [-(2**31), -(2**31), -(2**31), -(2**31), 7]
    q = qo.quantize_affine(x.bfloat16(), (1, -1), one.bfloat16(), zero, torch.int16)[0, :5]
    assert q.tolist() == [-(2**15), -(2**15), 0, -(2**15), 7]
    for dtype in (torch.int8, torch.uint8):
        assert qo.quantize_affine(x, (1, -1), one, zero, dtype)[0, 2] == 0
    scale, zeros = qo.choose_qparams_affine(x, "ASYMMETRIC", (1, 5), torch.int8, zero_point_dtype=torch.int64)
    assert scale.isnan().all()
    assert (zeros == -(2**63)).all()


def test_tensors_without_elements():
    assert qo.choose_qparams_affine(torch.empty(0, 8), "SYMMETRIC", (1, 8), torch.int8)[0].shape == (0,)
    assert qo.choose_qparams_affine(torch.empty(4, 0), "SYMMETRIC", (1, 8), torch.int8)[0].shape == (4, 0)
    assert qo.quantize_affine(torch.empty(4, 0), (1, 8), torch.empty(4, 0), None, torch.int8).shape == (4, 0)
    assert qo.dequantize_affine(torch.empty(4, 0, dtype=torch.int8), (1, -1), torch.ones(4), None, torch.int8).shape == (4, 0)
    with pytest.raises(ValueError, match="a block of at least one element"):
        qo.choose_qparams_affine(torch.empty(4, 0), "SYMMETRIC", (1, 0), torch.int8)


def test_names_and_enums():
    class MappingType(enum.Enum):  # torchao's has other values
        SYMMETRIC = 7

    x = torch.randn(2, 8)
    expected = qo.choose_qparams_affine(x, qo.MappingType.SYMMETRIC, (1, 4), torch.uint4)[0]
    for mapping in ("SYMMETRIC", "symmetric", MappingType.SYMMETRIC):
        assert torch.equal(qo.choose_qparams_affine(x, mapping, (1, 4), torch.uint4)[0], expected)
    assert qo.quantize_affine(x, (1, 4), expected, None, torch.uint4).dtype == torch.uint8


@pytest.mark.parametrize("threads_used", [1, 2, 3])
def test_threads_and_sizes(threads, threads_used):
    threads(threads_used)
    for shape, block_size in [((64, 4096), (1, 128)), ((4096, 64), (128, 1)), ((1, 300000), (1, -1)), ((300000, 1), (1, 1)),
                              ((512, 512), (32, 32)), ((70000, 2), (1, 2))]:  # fmt: skip
        x = torch.randn(shape)
        if any(b != 1 for b in block_size):
            expected = reference_qparams(x, "ASYMMETRIC", block_size, 0, 15, None, torch.int32, "preserve")
            scale, zero = qo.choose_qparams_affine(x, "ASYMMETRIC", block_size, torch.uint4)
            same(scale, expected[0])
            same(zero, expected[1])
        else:
            scale, zero = torch.rand(shape) + 0.1, torch.randint(0, 15, shape)
        q = qo.quantize_affine(x, block_size, scale, zero, torch.uint4)
        same(q, reference_codes(x, block_size, scale, zero, torch.uint8, 0, 15, "INT"))
        y = qo.dequantize_affine(q, block_size, scale, zero, torch.uint4)
        same(y, reference_values(q, block_size, scale, zero, 0, 15, "INT", torch.float32))


# ---- torchao ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ao():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip("torchao.quantization.quant_primitives")


@pytest.mark.parametrize("seed", range(4))
def test_against_torchao(ao, seed):
    rng = random.Random(seed)
    for _ in range(sweep.examples(800)):
        size = [(rng.choice([1, 2, 3, 4, 8, 17, 32]), rng.choice([1, 1, 2, 3, 5])) for _ in range(rng.choice([0, 1, 2, 2, 3, 4]))]
        shape, block_size = [b * g for b, g in size], [rng.choice([b, b, 1, b * g, -1]) for b, g in size]
        x = torch.randn(shape).mul(10 ** rng.uniform(-6, 4)).to(rng.choice(FLOATS))
        target = rng.choice(list(BOUNDS))
        least, most = BOUNDS[target]
        bounds = sorted(rng.sample(range(max(least, -70000), min(most, 60000) + 1), 2)) if rng.random() < 0.4 else [None, None]
        mapping, kind = rng.choice(KINDS)
        domain, choose = {
            "preserve": ("INT", ao.choose_qparams_affine),
            "tinygemm": ("FLOAT", ao._choose_qparams_affine_tinygemm),
            "plain": ("INT", ao._choose_qparams_affine_dont_preserve_zero),
        }[kind]
        integers = [torch.int32, torch.int64, torch.int8, torch.uint8] if domain == "INT" else []
        arguments = (block_size, target, *bounds, rng.choice([None, 1e-6, 0.1]), rng.choice([None, *FLOATS]))
        zeros = rng.choice([None, *integers, *FLOATS])
        try:
            expected = choose(x, ao.MappingType[mapping], *arguments, zeros)
        except RuntimeError as error:
            assert "without overflow" in str(error)  # noqa: PT017  float16 does not hold the bounds
            with pytest.raises(ValueError, match="which float16 holds"):
                qo.choose_qparams_affine(x, mapping, *arguments, zeros, **options_of(kind))
            continue
        got = qo.choose_qparams_affine(x, ao.MappingType[mapping], *arguments, zeros, **options_of(kind))
        for a, b in zip(got, expected, strict=True):
            same(a, b)
        scale, zero = expected
        if math.prod(grouped(x, block_size)[2]) != scale.numel():
            continue  # blocks of one element
        quantize, dequantize = (
            (ao._quantize_affine_tinygemm, ao._dequantize_affine_tinygemm)
            if domain == "FLOAT"
            else (ao.quantize_affine, ao.dequantize_affine)
        )
        try:
            q = quantize(x, block_size, scale, zero, target, *bounds)
        except RuntimeError as error:
            assert "without overflow" in str(error)  # noqa: PT017
            continue
        same(qo.quantize_affine(x, block_size, scale, zero, target, *bounds, domain), q)
        result = rng.choice(FLOATS)
        y = dequantize(q, block_size, scale, zero, target, *bounds, output_dtype=result)
        same(qo.dequantize_affine(q, block_size, scale, zero, target, *bounds, domain, output_dtype=result), y)
        q = ao._quantize_affine_no_zero_point(x.float(), block_size, scale, None, target, *bounds)
        same(qo.quantize_affine(x.float(), block_size, scale, None, target, *bounds, "NONE"), q)


# ---- micro-kernels ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
def test_kernels_write_their_elements_only(isa):
    for n, dtype, codes, domain, narrow, each in itertools.product(
        (1, 3, 8, 17, 33, 70), ("float32", "float16", "bfloat16"), ("int8", "uint8", "int16", "int32"), (0, 1), (0, 1), (0, 1)
    ):
        if (n + domain + narrow) % 2 and not sweep.ALL:
            continue
        torch_dtype = getattr(torch, dtype)
        x = torch.randn(n).to(torch_dtype)
        factor = (torch.rand(n if each else 1) + 0.1).to(torch_dtype).float()
        offset = torch.randint(-3, 4, factor.shape).float()
        as_numpy = x.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else x.numpy()
        q = Guarded((1, n), codes)
        kernels.affine(isa, True, as_numpy, dtype, q.view[0], codes, factor.numpy(), offset.numpy(), domain, bool(narrow), 0, 15)
        q.check()
        computed = torch_dtype if narrow else torch.float32
        f, o = factor.to(computed), offset.to(computed)
        steps = ((x.to(computed) - o) / f).round() if domain else (x.to(computed) * f).round() + o
        assert np.array_equal(q.view[0], steps.clamp(0, 15).float().numpy().astype(codes))
        y = Guarded((1, n), "uint16" if dtype == "bfloat16" else dtype)
        kernels.affine(isa, False, q.view[0], codes, y.view[0], dtype, factor.numpy(), offset.numpy(), domain, False, 0, 0, 7.5)
        y.check()
        value = torch.from_numpy(q.view[0].astype(np.float32))
        if domain:
            expected = ((value - 7.5).to(torch_dtype) * factor).to(torch_dtype) + offset
        else:
            expected = (value.to(torch_dtype) - offset.to(torch_dtype)) * factor
        expected = expected.to(torch_dtype)
        bits = expected.view(torch.int16).numpy().view(np.uint16) if dtype == "bfloat16" else expected.numpy()
        assert np.array_equal(y.view[0], bits)


# ---- compile, vmap, derivatives --------------------------------------------------------------------------------------


def test_compiles_and_exports():
    def f(x):
        scale, zero = qo.choose_qparams_affine(x, qo.MappingType.ASYMMETRIC, (1, 4), torch.uint4)
        q = qo.quantize_affine(x, (1, 4), scale, zero, torch.uint4)
        return qo.dequantize_affine(q, (1, 4), scale, zero, torch.uint4)

    compiled = torch.compile(f, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (2, 5, 8):
        x = torch.randn(rows, 8)
        assert torch.equal(compiled(x), f(x))

    class Module(torch.nn.Module):
        def forward(self, x):
            return f(x)

    x = torch.randn(3, 8)
    assert torch.equal(torch.export.export(Module(), (x,)).module()(x), f(x))


@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_vmap(in_dim):
    x = torch.randn(3, 4, 8).movedim(0, in_dim)
    for block_size in ((1, 4), (2, -1), (1, 1)):

        def choose(x, block_size=block_size):
            return qo.choose_qparams_affine(x, "ASYMMETRIC", block_size, torch.uint4)

        got = torch.vmap(choose, in_dim)(x)
        loop = [choose(part) for part in x.unbind(in_dim)]
        for a, b in zip(got, zip(*loop, strict=True), strict=True):
            assert torch.equal(a, torch.stack(b))
    scale, zero = torch.rand(3, 4, 2) + 0.1, torch.randint(0, 15, (4, 2))
    got = torch.vmap(lambda x, s: qo.quantize_affine(x, (1, 4), s, zero, torch.uint4), (in_dim, 0))(x, scale)
    loop = [qo.quantize_affine(part, (1, 4), s, zero, torch.uint4) for part, s in zip(x.unbind(in_dim), scale, strict=True)]
    assert torch.equal(got, torch.stack(loop))
    values = torch.vmap(lambda q, s: qo.dequantize_affine(q, (1, 4), s, zero, torch.uint4))(got, scale)
    loop = [qo.dequantize_affine(q, (1, 4), s, zero, torch.uint4) for q, s in zip(got, scale, strict=True)]
    assert torch.equal(values, torch.stack(loop))


def test_derivatives():
    """Choosing and quantizing count as constants, as under torchao's no_grad; dequantizing refuses a gradient."""
    x = torch.randn(2, 8, requires_grad=True)
    scale, zero = qo.choose_qparams_affine(x, "SYMMETRIC", (1, 4), torch.int8)
    assert not scale.requires_grad
    q = qo.quantize_affine(x, (1, 4), scale, zero, torch.int8)
    y = qo.dequantize_affine(q, (1, 4), scale.requires_grad_(), zero, torch.int8)
    with pytest.raises(RuntimeError, match=r"quant_ops\.dequantize_affine: expected no gradient"):
        y.sum().backward()


# ---- refusals --------------------------------------------------------------------------------------------------------

X = torch.zeros(4, 8)
S = torch.ones(4, 2)
Q = torch.zeros(4, 8, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 3), torch.int8), ValueError, "block_size to divide input.shape"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 0), torch.int8), ValueError, "block_size to divide input.shape"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (8,), torch.int8), ValueError, "one block_size entry per dimension"),
        (lambda: qo.choose_qparams_affine(X, "UP", (1, 4), torch.int8), ValueError, "mapping_type in"),
        (lambda: qo.choose_qparams_affine(X.double(), "SYMMETRIC", (1, 4), torch.int8), TypeError, "input.dtype in"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int64), TypeError, "a dtype of codes in"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, -200), ValueError, "quant_min to be an integer in"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, 0.5), ValueError, "quant_min to be an integer in"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, 5, 5), ValueError, "quant_min < quant_max"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, eps=math.nan), ValueError, "eps to be a number"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, eps=1e39), ValueError, "eps to be a number"),
        (lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, scale_dtype=torch.int8), TypeError, "scale_dtype in"),
        (
            lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 4), torch.int8, preserve_zero=False),
            ValueError,
            "mapping_type ASYMMETRIC with preserve_zero=False",
        ),
        (
            lambda: qo.choose_qparams_affine(X, "ASYMMETRIC", (1, 4), torch.int8, zero_point_domain="FLOAT"),
            ValueError,
            "preserve_zero=False with zero_point_domain FLOAT",
        ),
        (
            lambda: qo.choose_qparams_affine(X, "SYMMETRIC", (1, 1), torch.int8, keepdim=True),
            ValueError,
            "a block of more than one element",
        ),
        (
            lambda: qo.choose_qparams_affine(X.half(), "ASYMMETRIC", (1, 4), torch.int32),
            ValueError,
            r"in \[-65504, 65504\]",
        ),
        (lambda: qo.quantize_affine(X, (1, 4), S[0], None, torch.int8), ValueError, "scale of one number per block, 8 in all"),
        (lambda: qo.quantize_affine(X, (1, 4), S, S[0], torch.int8), ValueError, "zero_point of one number per block, 8 in all"),
        (lambda: qo.quantize_affine(X, (1, 4), S.int(), None, torch.int8), TypeError, "scale.dtype in"),
        (lambda: qo.quantize_affine(X, (1, 4), S, None, torch.int4), TypeError, "output_dtype in"),
        (lambda: qo.quantize_affine(Q, (1, 4), S, None, torch.int8), TypeError, "input.dtype in"),
        (lambda: qo.quantize_affine(X, (1, 4), S, None, torch.int8, None, None, "FLOAT"), ValueError, "a zero_point with"),
        (lambda: qo.quantize_affine(X, (1, 4), S, S, torch.int8, None, None, "NONE"), ValueError, "no zero_point with"),
        (lambda: qo.quantize_affine(X, (1, 4), S, None, torch.int8, None, None, "HALF"), ValueError, "zero_point_domain in"),
        (lambda: qo.dequantize_affine(Q, (1, 4), S, None, torch.int8), TypeError, "input.dtype to be input_dtype"),
        (lambda: qo.dequantize_affine(X, (1, 4), S, None, torch.uint4), TypeError, "input.dtype in"),
        (
            lambda: qo.dequantize_affine(Q, (1, 4), S, None, torch.uint4, output_dtype=torch.float64),
            TypeError,
            "output_dtype in",
        ),
    ],
)
def test_refusals(call, kind, words):
    with pytest.raises(kind, match=rf"^quant_ops\.\w+_affine: expected .*{words}.*, got "):
        call()
