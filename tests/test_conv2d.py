"""int8_conv2d: exact sums for every kind of convolution, borders with any zero point, both memory formats."""

import itertools
import random

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import quant_ops as qo


def random_case(rng: random.Random):
    """Sizes of a convolution: small, odd, grouped, depthwise, wide, rectangular, strided, dilated, padded unevenly."""
    kind = rng.random()
    if kind < 0.25:
        groups, cg, og = rng.choice([2, 3, 5, 16, 17, 33]), 1, rng.choice([1, 1, 1, 2])
    else:
        groups, cg, og = (
            rng.choice([1, 1, 1, 2, 4]),
            rng.choice([1, 2, 3, 4, 5, 15, 16, 17, 64]),
            rng.choice([1, 2, 15, 16, 17, 64, 65]),
        )
    while True:
        h, w, r, s = rng.randint(1, 9), rng.randint(1, 9), rng.choice([1, 2, 3, 5, 7]), rng.choice([1, 1, 2, 3, 5])
        stride, dilation = (rng.randint(1, 3), rng.randint(1, 3)), (rng.randint(1, 2), rng.randint(1, 2))
        padding = [rng.randint(0, 4) for _ in range(4)]
        if h + padding[0] + padding[1] > dilation[0] * (r - 1) and w + padding[2] + padding[3] > dilation[1] * (s - 1):
            return rng.choice([1, 2]), groups, cg, og, h, w, r, s, stride, padding, dilation


@pytest.mark.parametrize("seed", range(6))
def test_sums_are_exact_for_any_convolution(isa, seed):
    rng = random.Random(seed)
    for _ in range(250):
        n, groups, cg, og, h, w, r, s, stride, padding, dilation = random_case(rng)
        dtype = rng.choice([torch.int8, torch.uint8])
        info = torch.iinfo(dtype)
        zero = rng.choice([info.min, info.max, 0, 1, rng.randint(info.min, info.max)])
        x = torch.randint(info.min, info.max + 1, (n, groups * cg, h, w)).to(dtype)
        weight = torch.randint(-128, 128, (groups * og, cg, r, s), dtype=torch.int8)
        expected = reference.conv_acc(x, weight, stride, padding, dilation, groups, zero).float()
        packed = qo.pack_weight(weight, groups) if rng.random() < 0.5 else None
        one = torch.tensor(1.0)
        for view in (x, x.contiguous(memory_format=torch.channels_last), x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)):
            last = rng.choice([None, True, False])
            given = {"packed_weight": packed, "channels_last": last, "out_dtype": rng.choice([None, torch.int32])}
            y = qo.int8_conv2d(view, weight, one, None, stride, padding, dilation, groups, one, torch.tensor(zero), **given)
            if last is not None:
                memory_format = torch.channels_last if last else torch.contiguous_format
                assert y.is_contiguous(memory_format=memory_format)
            assert torch.equal(y.float(), expected), (n, groups, cg, og, h, w, r, s, stride, padding, dilation, dtype, zero)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_codes_are_read_where_they_lie(isa, dtype):
    """8-bit NHWC images without padding, also with other pixels and channels around them; outputs of every width of panel."""
    rng, info = random.Random(5), torch.iinfo(dtype)
    for case in range(60):
        groups = rng.choice([1, 1, 2])
        c, o = groups * rng.choice([4, 16, 20, 64, 68]), groups * rng.choice([1, 8, 16, 24, 33, 48, 64, 150])
        r, s, stride, dilation = *rng.choice([(1, 1), (1, 1), (3, 3), (2, 5)]), rng.randint(1, 2), rng.randint(1, 2)
        n, h, w = rng.choice([1, 3]), rng.randint(1, 15) + dilation * (r - 1), rng.randint(1, 15) + dilation * (s - 1)
        whole = torch.randint(info.min, info.max + 1, (n, h + 2, w + 3, c + 8)).to(dtype).permute(0, 3, 1, 2)
        x = whole[:, :c].contiguous(memory_format=torch.channels_last) if case % 2 else whole[:, 4 : c + 4, 1:-1, 2:-1]
        weight, zero = torch.randint(-128, 128, (o, c // groups, r, s), dtype=torch.int8), rng.randint(info.min, info.max)
        packed = qo.pack_weight(weight, groups) if rng.random() < 0.7 else None
        y = qo.int8_conv2d(
            x, weight, torch.tensor(1.0), None, stride, 0, dilation, groups, torch.tensor(1.0), torch.tensor(zero),
            packed_weight=packed, out_dtype=torch.float32,
        )  # fmt: skip
        acc = reference.conv_acc(x, weight, (stride, stride), (0,) * 4, (dilation, dilation), groups, zero)
        assert torch.equal(y, acc.float()), (case, groups, c, o, r, s, stride, dilation, n, h, w)
        if c % 4 == 0 and groups == 1:
            rows = x.permute(0, 2, 3, 1).flatten(1, 2)[:, :, :c]
            product = qo.int8_linear(rows, weight[:, :, 0, 0].contiguous(), torch.tensor(1.0), None, torch.tensor(1.0))
            assert torch.equal(product, (rows.long() @ weight[:, :, 0, 0].long().T).float())


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("mode", ["dynamic", "dynamic asymmetric", "static", "per sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_epilogue_and_activation_modes(isa, mode, dtype, channels_last):
    for (c, o, groups), relu, bias, out in itertools.product(
        [(3, 5, 1), (16, 70, 1), (6, 9, 3), (20, 20, 20)], [False, True], [False, True], [None, torch.float32, torch.int8]
    ):
        x = (torch.randn(2, c, 7, 6) + 0.5).to(dtype)
        if channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        weight, weight_scale = torch.randint(-128, 128, (o, c // groups, 3, 3), dtype=torch.int8), torch.rand(o) * 0.01
        b = torch.randn(o) if bias else None
        kwargs = {}
        if mode.startswith("dynamic"):
            asymmetric = mode == "dynamic asymmetric"
            qmin = -128 if asymmetric else -127
            scale, zero = qo.choose_qparams(x, [1, 2, 3], qmin, 127, asymmetric)
            kwargs = {"asymmetric": asymmetric}
        else:
            qmin = -128
            shape = (2, 1, 1, 1) if mode == "per sample" else ()
            scale, zero = torch.rand(shape) * 0.02 + 0.005, torch.randint(-128, 128, shape)
            kwargs = {"x_scale": scale, "x_zero_point": zero}
        q = qo.quant_tensor_forward(x, scale, zero, qmin, 127, True, False)
        acc = reference.conv_acc(q, weight, (2, 1), (1, 1, 2, 2), (1, 1), groups, zero)
        y32 = reference.epilogue(acc, scale, weight_scale[:, None, None], None if b is None else b[:, None, None], relu)
        expected = reference.requantize(y32, 0.04, -3, out) if out == torch.int8 else y32.to(out or dtype)
        if out == torch.int8:
            kwargs |= {"out_scale": torch.tensor(0.04), "out_zero_point": torch.tensor(-3)}
        y = qo.int8_conv2d(x, weight, weight_scale, b, (2, 1), (1, 2), 1, groups, relu=relu, out_dtype=out, **kwargs)
        assert reference.same_bits(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def test_memory_formats_and_views():
    weight, one = torch.randint(-128, 128, (8, 6, 3, 3), dtype=torch.int8), torch.tensor(1.0)
    x = torch.randn(2, 6, 9, 10)
    y = qo.int8_conv2d(x, weight, one, padding=1)
    last = x.contiguous(memory_format=torch.channels_last)
    whole = torch.randn(2, 12, 13, 14).contiguous(memory_format=torch.channels_last)
    whole[:, 3:9, 2:11, 1:11] = x
    plane = torch.randn(2, 12, 13, 14)
    plane[:, 3:9, 2:11, 1:11] = x
    for view in (
        last,
        whole[:, 3:9, 2:11, 1:11],
        plane[:, 3:9, 2:11, 1:11],
        x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    ):
        got = qo.int8_conv2d(view, weight, one, padding=1)
        assert torch.equal(got, y)
    assert qo.int8_conv2d(last, weight, one).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(qo.int8_conv2d(x[0], weight, one, padding=1), y[0])
    assert qo.int8_conv2d(x[:0], weight, one, padding=1).shape == (0, 8, 9, 10)


def test_samples_do_not_see_each_other(isa):
    x = torch.randn(5, 4, 6, 6)
    x[1] = 0
    x[2, 0, 0, 0], x[3, 1, 2, 3] = torch.nan, torch.inf
    weight, bias = torch.randint(-128, 128, (7, 4, 3, 3), dtype=torch.int8), torch.randn(7)
    y = qo.int8_conv2d(x, weight, torch.tensor(0.01), bias, padding=1)
    for i in range(5):
        assert reference.same_bits(y[i : i + 1], qo.int8_conv2d(x[i : i + 1], weight, torch.tensor(0.01), bias, padding=1))
    assert torch.equal(y[1], bias[:, None, None].expand(7, 6, 6))
    assert y[2:4].isnan().all()
    assert torch.isfinite(y[[0, 1, 4]]).all()


def test_same_bits_for_any_threads_and_instruction_set(threads):
    cases = []
    for c, o, groups, hw in [(3, 70, 1, 33), (32, 64, 1, 20), (48, 48, 48, 25), (24, 36, 4, 17)]:
        x = torch.randn(3, c, hw, hw)
        weight = torch.randint(-128, 128, (o, c // groups, 3, 3), dtype=torch.int8)
        cases += [
            (x, weight, torch.rand(o), torch.randn(o), 1, 1, 1, groups),
            (x.contiguous(memory_format=torch.channels_last), weight, torch.rand(o), None, 2, 1, 1, groups),
        ]
    results = []
    for isa, n in itertools.product(qo._library.isas(), [1, 2, 3, 8]):
        qo._library.set_isa(isa)
        threads(n)
        results.append([qo.int8_conv2d(*case) for case in cases])
    qo._library.set_isa(None)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_a_1x1_convolution_is_a_linear_layer():
    x = torch.randn(2, 19, 5, 6)
    weight = torch.randint(-128, 128, (33, 19), dtype=torch.int8)
    scale, bias, x_scale = torch.rand(33), torch.randn(33), torch.tensor(0.03)
    linear = qo.int8_linear(x.permute(0, 2, 3, 1), weight, scale, bias, x_scale)
    assert torch.equal(qo.int8_conv2d(x, weight[:, :, None, None], scale, bias, x_scale=x_scale), linear.permute(0, 3, 1, 2))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_output_size_is_that_of_torch(seed):
    n, groups, cg, og, h, w, r, s, stride, padding, dilation = random_case(random.Random(seed))
    x, weight = torch.randn(n, groups * cg, h, w), torch.randint(-128, 128, (groups * og, cg, r, s), dtype=torch.int8)
    both = [padding[0], padding[2]]
    if h + 2 * both[0] > dilation[0] * (r - 1) and w + 2 * both[1] > dilation[1] * (s - 1):
        expected = torch.nn.functional.conv2d(x, weight.float(), None, stride, both, dilation, groups)
        assert qo.int8_conv2d(x, weight, torch.tensor(1.0), None, stride, both, dilation, groups).shape == expected.shape
