"""weight_only_embedding: the bits of F.embedding of the dequantized weight, for every group, zero point, layout and index."""

import itertools

import pytest
import reference
import torch
from test_weight_only import EPS, GROUPS, ZEROS, dequantized, problem
from torch.nn import functional as F

import quant_ops as qo


def dequantized_float32(codes, scale, zero, group):
    """As torch's own operations in float32 dequantize."""
    step = group if group > 0 else max(1, codes.shape[1])
    wide = [None if t is None else t.repeat_interleave(step, 1)[:, : codes.shape[1]] for t in (scale, zero)]
    scale, zero = wide[0].float(), wide[1]
    if zero is None:
        return codes.float() * scale
    return codes.float() * scale + zero.float() if zero.is_floating_point() else (codes.float() - zero.float()) * scale


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("bits", [8, 4])
def test_equals_embedding_of_the_dequantized_weight(isa, bits, group):
    for (n, k), zeros in itertools.product([(1, 8), (17, 5), (70, 256), (130, 97), (33, 1031), (64, 64)], ZEROS):
        codes, scale, zero = problem(n, k, bits, group, zeros)
        w = dequantized_float32(codes, scale, zero, group)
        exact = dequantized(codes, scale, zero, group)
        indices = torch.cat([torch.arange(n), torch.randint(n, (40,))])
        packed = qo.pack_weight_only(codes, bits, group)
        for dtype, packed_weight in itertools.product([torch.float32, torch.float16, torch.bfloat16], [packed, None]):
            y = qo.weight_only_embedding(indices, codes, scale, zero, bits, group, packed_weight=packed_weight, out_dtype=dtype)
            assert reference.same_bits(y, F.embedding(indices, w).to(dtype)), (n, k, zeros, dtype, packed_weight is None)
            if dtype == torch.float32:
                size = codes.double().abs() * 0.03 + 0.1 if zeros == "float" else exact.abs()
                assert ((y.double() - exact[indices]).abs() <= EPS * size[indices]).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_indices_of_any_shape_and_layout(bits):
    codes, scale, zero = problem(50, 77, bits, 32, "integer")
    w = dequantized_float32(codes, scale, zero, 32)
    call = {"bits": bits, "group_size": 32, "packed_weight": qo.pack_weight_only(codes, bits, 32)}
    numbers = torch.randint(50, (4, 6, 2))
    views = [
        numbers,
        numbers.transpose(0, 2),
        numbers[:, ::2, 1],
        numbers[1:, 3:],
        numbers[0, 0, 0],
        numbers[:0],
        torch.zeros(3, 0, 2, dtype=torch.int64),
        torch.tensor(49).expand(5, 3),
    ]
    for indices, dtype in itertools.product(views, [torch.int64, torch.int32]):
        y = qo.weight_only_embedding(indices.to(dtype), codes, scale, zero, **call)
        assert y.is_contiguous()
        assert y.shape == (*indices.shape, 77)
        assert torch.equal(y, F.embedding(indices, w))


@pytest.mark.parametrize("bits", [8, 4])
def test_layouts_of_the_parameters(bits):
    """Scales, zero points and plain weights in any layout and dtype; a placeholder for a packed weight."""
    codes, scale, zero = problem(30, 200, bits, 64, "integer")
    indices = torch.randint(30, (9,))
    y = qo.weight_only_embedding(indices, codes, scale, zero, bits, 64)
    by_groups = scale.T.contiguous().T, zero.T.contiguous().T
    wide = torch.stack([scale, scale], 2)[..., 0], torch.stack([zero, zero], 2)[..., 0]
    for parameters in (by_groups, wide, *((scale, zero.to(d)) for d in (torch.int16, torch.int32, torch.int64))):
        assert torch.equal(qo.weight_only_embedding(indices, codes, *parameters, bits, 64), y)
    for view in (codes.T.contiguous().T, torch.cat([codes, codes], 1)[:, :200], torch.stack([codes, codes], 2)[..., 0]):
        assert torch.equal(qo.weight_only_embedding(indices, view, scale, zero, bits, 64), y)
    half = scale.bfloat16()
    expected = qo.weight_only_embedding(indices, codes, half.float(), zero, bits, 64)
    assert torch.equal(qo.weight_only_embedding(indices, codes, half, zero, bits, 64), expected)
    placeholder = torch.zeros((), dtype=torch.int8).expand(30, 200)
    packed = qo.pack_weight_only(codes, bits, 64)
    assert torch.equal(qo.weight_only_embedding(indices, placeholder, scale, zero, bits, 64, packed_weight=packed), y)
    one = scale[:, 0]
    expected = qo.weight_only_embedding(indices, codes, one[:, None], None, bits)
    assert torch.equal(qo.weight_only_embedding(indices, codes, one, None, bits), expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_weights_without_rows_or_columns(bits):
    codes = torch.zeros(0, 40, dtype=torch.int8)
    for packed in (None, qo.pack_weight_only(codes, bits, 32)):
        y = qo.weight_only_embedding(
            torch.zeros(3, 0, dtype=torch.int64), codes, torch.ones(0, 2), None, bits, 32, packed_weight=packed
        )
        assert y.shape == (3, 0, 40)
    codes = torch.zeros(5, 0, dtype=torch.int8)
    for packed in (None, qo.pack_weight_only(codes, bits)):
        y = qo.weight_only_embedding(torch.tensor([[4], [0]]), codes, torch.ones(5), None, bits, packed_weight=packed)
        assert y.shape == (2, 1, 0)
    with pytest.raises(IndexError, match="got 5"):
        qo.weight_only_embedding(torch.tensor([5]), codes, torch.ones(5), None, bits)


@pytest.mark.parametrize("bits", [8, 4])
def test_special_scales(bits):
    """Scales and zero points that are NaN, infinite, huge or subnormal give what torch's operations give."""
    codes, _, zero = problem(8, 96, bits, 32, "integer")
    special = torch.tensor([torch.nan, torch.inf, 3e38, 1e-45, -0.5, 0.0, 65504.0, 1e-7])
    scale = special[torch.arange(24) % 8].reshape(8, 3)
    for z, dtype in itertools.product([None, zero, scale.flip(0)], [torch.float32, torch.float16, torch.bfloat16]):
        y = qo.weight_only_embedding(torch.arange(8), codes, scale, z, bits, 32, out_dtype=dtype)
        assert reference.same_bits(y, dequantized_float32(codes, scale, z, 32).to(dtype))


def test_any_number_of_threads(threads):
    codes, scale, zero = problem(300, 1000, 4, 128, "float")
    packed, indices = qo.pack_weight_only(codes, 4, 128), torch.randint(300, (500,))
    results = []
    for count in (1, 2, 5):
        threads(count)
        results.append(qo.weight_only_embedding(indices, codes, scale, zero, 4, 128, packed_weight=packed))
    assert all(torch.equal(r, results[0]) for r in results)


def test_one_packed_weight_for_embedding_and_head():
    """The head's product with unit rows picks out what the embedding looks up."""
    codes, scale, zero = problem(40, 64, 4, 32, "integer")
    packed = qo.pack_weight_only(codes, 4, 32)
    w = qo.weight_only_embedding(torch.arange(40), codes, scale, zero, 4, 32, packed_weight=packed)
    y = qo.weight_only_linear(torch.eye(64), codes, scale, zero, None, 4, 32, packed_weight=packed)
    assert torch.equal(y, w.T)


def test_compiled_with_dynamic_shapes():
    codes, scale, _ = problem(40, 70, 4, 32, "none")
    packed = qo.pack_weight_only(codes, 4, 32)
    compiled = torch.compile(
        lambda i: qo.weight_only_embedding(i, codes, scale, None, 4, 32, packed_weight=packed) * 2, dynamic=True, fullgraph=True
    )
    for shape in ((3,), (7,), (11,)):
        indices = torch.randint(40, shape)
        assert torch.equal(compiled(indices), qo.weight_only_embedding(indices, codes, scale, None, 4, 32) * 2)
