"""int8_gemm and int8_linear: exact sums, the epilogue bit for bit, every mode, any shape and stride."""

import itertools

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import python

import quant_ops as qo


def random_int8(*shape):
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@pytest.mark.parametrize("a_dtype", [torch.int8, torch.uint8])
def test_gemm_is_exact(isa, a_dtype):
    info = torch.iinfo(a_dtype)
    for m, k, n in itertools.product([0, 1, 2, 5, 6, 7, 13], [0, 1, 3, 4, 5, 63, 130], [0, 1, 15, 16, 17, 63, 64, 65, 130]):
        a = torch.randint(info.min, info.max + 1, (m, k)).to(a_dtype)
        b = random_int8(n, k)
        assert torch.equal(qo.int8_gemm(a, b), (a.long() @ b.long().T).int())


def test_gemm_reads_any_strides():
    a, b = random_int8(40, 60), random_int8(33, 60)
    expected = a.long() @ b.long().T
    wide = torch.zeros(40, 130, dtype=torch.int8)
    wide[:, 5:125:2] = a
    padded = torch.full((42, 70), 9, dtype=torch.int8)
    padded[1:41, 7:67] = a
    for view in (a, a.T.contiguous().T, wide[:, 5:125:2], padded[1:41, 7:67]):
        assert torch.equal(qo.int8_gemm(view, b).long(), expected)
        assert torch.equal(qo.int8_gemm(view, b.T.contiguous().T).long(), expected)
    assert torch.equal(qo.int8_gemm(a[:1].expand(4, 60), b).long(), expected[:1].expand(4, 33))


def test_gemm_agrees_with_torch_int_mm():
    a, b = random_int8(64, 512), random_int8(96, 512)
    assert torch.equal(qo.int8_gemm(a, b), torch._int_mm(a, b.T.contiguous()))


@pytest.mark.parametrize(("dtype", "k"), [(torch.int8, 131071), (torch.uint8, 65793)])
def test_gemm_is_exact_at_the_bound_of_k(isa, dtype, k):
    info = torch.iinfo(dtype)
    for value in (info.min, info.max):
        a, b = torch.full((2, k), value, dtype=dtype), torch.full((3, k), -128, dtype=torch.int8)
        assert (qo.int8_gemm(a, b) == k * value * -128).all()


def codes_and_params(x, mode):
    """(x given to the op, keyword arguments, codes, row scale, row zero point) for a way of quantizing activations."""
    if mode == "dynamic":
        q, scale, zero = qo.quantize_rows(x)
        return x, {}, q, scale, zero
    if mode == "dynamic asymmetric":
        q, scale, zero = qo.quantize_rows(x, True)
        return x, {"asymmetric": True}, q, scale, zero
    scale, zero = torch.tensor(0.021), torch.tensor(-7, dtype=torch.int32)
    if "per row" in mode:
        scale, zero = torch.rand(*x.shape[:-1], 1) * 0.02 + 0.01, torch.randint(-128, 128, (*x.shape[:-1], 1), dtype=torch.int32)
    kwargs = {"x_scale": scale} | ({} if "symmetric" in mode else {"x_zero_point": zero})
    zero = torch.tensor(0) if "symmetric" in mode else zero
    if "uint8" in mode:
        q = torch.randint(0, 256, x.shape).to(torch.uint8)
        kwargs |= {"x_zero_point": zero + 128}
        return q, kwargs, q, scale, zero + 128
    q = qo.quant_tensor_forward(x, scale, zero, -128, 127, True, False)
    return q if "int8" in mode else x, kwargs, q, scale, zero


MODES = [
    "dynamic",
    "dynamic asymmetric",
    "static",
    "static symmetric",
    "static per row",
    "int8",
    "int8 symmetric",
    "int8 per row",
    "uint8",
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_linear_is_the_integer_product_and_the_epilogue(isa, mode, x_dtype):
    for (batch, k, n), bias, relu, packed, out in itertools.product(
        [((1,), 8, 5), ((7,), 33, 65), ((2, 3), 130, 70)],
        [False, True],
        [False, True],
        [False, True],
        [None, torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.uint8],
    ):
        x, kwargs, q, scale, zero = codes_and_params((torch.randn(*batch, k) * 2).to(x_dtype), mode)
        weight, weight_scale = random_int8(n, k), torch.rand(n) * 0.01
        b = torch.randn(n) if bias else None
        y32 = reference.epilogue(reference.linear_acc(q, weight, zero), scale, weight_scale, b, relu)
        if out in (torch.int8, torch.uint8):
            out_scale, out_zero = torch.tensor(0.05), torch.tensor(11)
            kwargs |= {"out_scale": out_scale, "out_zero_point": out_zero}
            expected = reference.requantize(y32, 0.05, 11, out)
        else:
            expected = y32.to(out or (x_dtype if x.is_floating_point() else torch.float32))
        if packed:
            kwargs["packed_weight"] = qo.pack_weight(weight)
        y = qo.int8_linear(x, weight, weight_scale, b, relu=relu, out_dtype=out, **kwargs)
        assert reference.same_bits(y, expected)


@pytest.mark.parametrize("asymmetric", [False, True])
def test_sums_of_a_part_of_the_columns_add_up(isa, asymmetric):
    """int32 results are the sums; with the row's scale those of parts of K give the whole result."""
    x, weight, scale = torch.randn(9, 300), random_int8(70, 300), torch.rand(70)
    codes, x_scale, zero = qo.quantize_rows(x, asymmetric)
    zero = zero if asymmetric else None
    whole = qo.int8_linear(x, weight, scale, None, x_scale, zero, out_dtype=torch.int32)
    assert torch.equal(whole, (codes.int() - (0 if zero is None else zero)) @ weight.int().T)
    parts = 0
    for part in (slice(0, 100), slice(100, 101), slice(101, 300)):
        w = weight[:, part].contiguous()
        parts = parts + qo.int8_linear(
            x[:, part], w, scale, None, x_scale, zero, packed_weight=qo.pack_weight(w), out_dtype=torch.int32
        )
    assert torch.equal(parts, whole)
    assert torch.equal(whole * (x_scale * scale), qo.int8_linear(x, weight, scale, asymmetric=asymmetric))


def test_linear_scale_and_bias_forms():
    x, weight = torch.randn(5, 20), random_int8(30, 20)
    per_channel, one = torch.rand(30), torch.tensor(0.01)
    y = qo.int8_linear(x, weight, per_channel)
    assert torch.equal(qo.int8_linear(x, weight, per_channel[:, None]), y)
    assert torch.equal(qo.int8_linear(x, weight, torch.stack([per_channel, per_channel], 1)[:, 0]), y)
    assert torch.equal(qo.int8_linear(x, weight, one), qo.int8_linear(x, weight, one.expand(30)))
    bias = torch.randn(30).bfloat16()
    assert torch.equal(qo.int8_linear(x, weight, per_channel, bias), qo.int8_linear(x, weight, per_channel, bias.float()))


def test_rows_do_not_see_each_other(isa):
    """Row i of a batch equals row i alone; NaN and Inf stay in their row; a row of zeros gives the bias exactly."""
    x = torch.randn(50, 300)
    x[7] = 0
    x[9, 5], x[11, 0] = torch.nan, torch.inf
    weight, scale, bias = random_int8(70, 300), torch.rand(70), torch.randn(70)
    y = qo.int8_linear(x, weight, scale, bias)
    for i in range(50):
        assert reference.same_bits(y[i : i + 1], qo.int8_linear(x[i : i + 1], weight, scale, bias))
    assert torch.equal(y[7], bias)
    assert torch.equal(y.isnan().all(1), y.isnan().any(1))
    assert y.isnan().any(1).nonzero().flatten().tolist() == [9, 11]


def test_same_bits_for_any_threads_and_instruction_set(threads):
    cases = [
        (torch.randn(m, k), random_int8(n, k), torch.rand(n), torch.randn(n))
        for m, k, n in [(1, 700, 900), (37, 513, 300), (300, 512, 640), (2000, 64, 70)]
    ]
    results = []
    for isa, n in itertools.product(qo._library.isas(), [1, 2, 3, 8]):
        qo._library.set_isa(isa)
        threads(n)
        results.append([qo.int8_linear(*case) for case in cases])
    qo._library.set_isa(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_forked_child_computes_the_same():
    """The threads of the parent do not exist in the child; waiting for them would hang."""
    script = """
import os, signal, torch, quant_ops as qo
torch.set_num_threads(2)
x, w = torch.randn(256, 512), torch.randint(-128, 128, (512, 512), dtype=torch.int8)
run = lambda: qo.int8_linear(x, w, torch.ones(())).numpy().tobytes()  # torch.equal would use threads itself
expected = run()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if run() == expected else 1)
print(os.waitpid(child, 0)[1])
"""
    run = python("-c", script)
    assert run.stdout.strip() == "0", run.stdout + run.stderr


def test_scratch_is_bounded_in_passes():
    """More rows than one pass of the scratch holds: the passes meet without a seam."""
    x, weight = torch.randn(4500, 2048), random_int8(8, 2048)
    q, scale, _ = qo.quantize_rows(x)
    expected = reference.epilogue(reference.linear_acc(q, weight), scale, torch.tensor([0.01]))
    assert torch.equal(qo.int8_linear(x, weight, torch.tensor(0.01)), expected)


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (2, 8), (8,)])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_degenerate_shapes(shape, n):
    x, bias = torch.randn(shape), torch.randn(n)
    assert qo.int8_linear(x, random_int8(n, 8), torch.rand(n), bias).shape == (*shape[:-1], n)
    empty_k = qo.int8_linear(torch.empty(4, 0), torch.empty(n, 0, dtype=torch.int8), torch.ones(n), bias)
    assert torch.equal(empty_k, bias.expand(4, n))


@settings(max_examples=100, deadline=None)
@given(m=st.integers(0, 40), k=st.integers(0, 200), n=st.integers(1, 150), offset=st.integers(0, 5), seed=st.integers(0, 999))
def test_linear_of_random_shapes_and_offsets(m, k, n, offset, seed):
    torch.manual_seed(seed)
    whole = torch.randn(m + 1, k + 2 * offset + 1)
    x = whole[1:, offset : offset + k]
    weight = random_int8(n + 1, k)[1:]
    q, scale, zero = qo.quantize_rows(x, True)
    y = qo.int8_linear(x, weight, torch.rand(1), asymmetric=True, packed_weight=qo.pack_weight(weight) if seed % 2 else None)
    torch.manual_seed(seed)
    assert y.shape == (m, n)
    if m:
        acc = reference.linear_acc(q, weight, zero)
        ones = qo.int8_linear(x, weight, torch.tensor(1.0), asymmetric=True)
        assert torch.equal(ones, reference.epilogue(acc, scale, 1.0))
