"""int8_chain: the bits of its steps called one by one, on every instruction set, with any number of threads and samples."""

import pytest
import torch

import quant_ops as qo
from quant_ops.ops.program import STEPS, Program, Step, element, run_steps

INT8, UINT8, FLOAT32, FLOAT16, BFLOAT16 = range(5)
RELU = 1


class Builder:
    """Writes a program down, with constants of its own: random weights, and scales by which codes of one value fit the next."""

    def __init__(self, seed=0, inputs=1):
        self.generator = torch.Generator().manual_seed(seed)
        self.constants, self.steps, self.inputs = [], [], inputs

    def constant(self, tensor):
        self.constants.append(tensor)
        return len(self.constants) - 1

    def scale(self, value=0.05):
        return self.constant(torch.tensor(value))

    def zero_point(self, value):
        return self.constant(torch.tensor(value, dtype=torch.int32))

    def step(self, op, inputs, constants=(), numbers=()):
        self.steps.append(Step(op, inputs, constants, numbers))
        return self.inputs + len(self.steps) - 1

    def weight(self, *shape, groups=1, bias=True):
        """The constants packed_weight, weight_scale and bias."""
        weight = torch.randint(-127, 128, shape, dtype=torch.int8, generator=self.generator)
        spread = 60 * weight[0].numel() ** 0.5
        scale = (torch.rand(shape[0], generator=self.generator) + 0.5) / spread
        held = torch.randn(shape[0], generator=self.generator) if bias else None
        return self.constant(qo.pack_weight(weight, groups)), self.constant(scale), None if held is None else self.constant(held)

    def conv(
        self,
        x,
        shape,
        source,
        out,
        dtype=INT8,
        activation=RELU,
        stride=1,
        padding=(0, 0, 0, 0),
        dilation=1,
        groups=1,
        bias=True,
        residual=None,
    ):
        """``source`` and ``out`` are pairs of constants, scale and zero point; a residual is a value and such a pair."""
        added, of = ((), (None, None)) if residual is None else ((residual[0],), residual[1])
        constants = (*self.weight(*shape, groups=groups, bias=bias), *source, *out, *of, None)
        numbers = (*shape, stride, stride, *padding, dilation, dilation, groups, dtype, activation)
        return self.step("conv2d", (x, *added), constants, numbers)

    def linear(self, x, shape, source, out=(None, None), dtype=FLOAT32, activation=0, bias=True, residual=None):
        added, of = ((), (None, None)) if residual is None else ((residual[0],), residual[1])
        constants = (*self.weight(*shape, bias=bias), *source, *out, *of, None)
        return self.step("linear", (x, *added), constants, (*shape, dtype, activation))

    def program(self, *outputs):
        return Program(tuple(self.steps), self.inputs, outputs)


def network(dtype=INT8, channels=20, bias=True):
    """Images of 3 channels: a stem, a depthwise, two pointwise and a grouped convolution, and a classifier."""
    b = Builder()
    shift = 0 if dtype == INT8 else 128
    q = (b.scale(0.03), b.zero_point(3))
    of = [(b.scale(0.03 + 0.01 * i), b.zero_point(shift - 30 + 10 * i)) for i in range(6)]
    v = b.step("quantize", (0,), q, (-128, 127))
    v = b.conv(v, (channels, 3, 3, 3), q, of[0], dtype, stride=2, padding=(1, 1, 1, 1), bias=bias)
    v = b.conv(v, (channels, 1, 3, 3), of[0], of[1], dtype, padding=(0, 2, 1, 1), groups=channels)
    middle = b.conv(v, (3 * channels, channels, 1, 1), of[1], of[2], dtype, bias=bias)
    v = b.conv(middle, (70, 3 * channels, 1, 1), of[2], of[3], dtype, activation=0)
    v = b.conv(v, (28, 35, 3, 3), of[3], of[4], dtype, dilation=2, padding=(2, 2, 2, 2), groups=2)
    flat = b.step("flatten", (v,), (), (1,))
    v = b.linear(flat, (33, 28 * 36), of[4], of[5], dtype)
    logits = b.linear(v, (10, 33), of[5])
    floats = b.step("dequantize", (middle,), of[2], (FLOAT16,))
    return b.program(logits, floats, middle, flat), b.constants


def blocks(dtype=INT8, activations=range(9)):
    """Residual blocks, joins, pools and a decoder, with the steps of every kind."""
    b = Builder()
    shift = 0 if dtype == INT8 else 128
    q = (b.scale(0.03), b.zero_point(3))
    of = [(b.scale(0.03 + 0.01 * i), b.zero_point(shift - 30 + 10 * i)) for i in range(8)]
    v = b.conv(0, (16, 3, 3, 3), q, of[0], dtype, padding=(1, 1, 1, 1))
    v = pooled = b.step("max_pool2d", (v,), (), (3, 3, 2, 2, 1, 1, 1, 1, 0))
    for activation in activations:
        side = b.conv(v, (24, 16, 3, 3), of[0], of[1], dtype, activation, padding=(1, 1, 1, 1))
        v = b.conv(side, (16, 24, 1, 1), of[1], of[0], dtype, activation, residual=(v, of[0]))
    floats = b.step("dequantize", (v,), of[0], (FLOAT32,))
    w = b.conv(v, (16, 1, 3, 3), of[0], of[2], dtype, padding=(1, 1, 1, 1), groups=16, residual=(floats, (None, None)))
    w = b.step("add", (v, w), (of[0][0], of[2][0], of[0][1], of[2][1], *of[3]), (dtype, 3))
    w = b.step("requantize", (w,), (*of[3], *of[4]), (dtype, 2))
    small = b.step("avg_pool2d", (w,), (*of[4], *of[5]), (3, 2, 2, 2, 1, 0, 0, 0, -1, dtype))
    up = b.step("upsample_nearest2d", (small,), (), (2, 2))
    scales, zero_points = zip(of[5], of[0], of[5], strict=True)
    joined = b.step("cat", (up, v, up), (*scales, *zero_points, *of[5]), (1, dtype))
    low = b.step("cat", (v, pooled), (of[0][0], of[0][0], of[0][1], of[0][1], None, None), (-2, BFLOAT16))
    most = b.step("max_pool2d", (joined,), (), (2, 2, 1, 1, 0, 0, 2, 1, 0))
    mean = b.step("adaptive_avg_pool2d", (most,), (*of[5], *of[6]), (1, 1, dtype))
    wide = b.step("adaptive_avg_pool2d", (most,), (*of[5], None, None), (3, 2, FLOAT16))
    gate = b.conv(mean, (48, 48, 1, 1), of[6], of[7], dtype, 7)
    most = b.step("mul", (most, gate), (of[5][0], of[7][0], of[5][1], of[7][1], *of[4]), (dtype, RELU))
    most = b.step("mul", (most, most), (of[4][0], of[4][0], of[4][1], of[4][1], *of[3]), (dtype, 0))
    part = b.step("slice", (most,), (), (1, 5, 42))
    turned = [b.step("channel_shuffle", (part,), (), (groups,)) for groups in (2, 3, 42)]
    turned = b.step("slice", (b.step("slice", (turned[0],), (), (2, 1, 3)),), (), (3, 0, 3)), *turned[1:]
    flat = b.step("flatten", (mean,), (), (1,))
    v = b.linear(flat, (48, 48), of[6], of[6], dtype, 5, residual=(flat, of[6]))
    return b.program(b.linear(v, (10, 48), of[6]), low, most, wide, floats, *turned), b.constants


def check(program, inputs, constants):
    """The results, which are those of the steps one by one."""
    results, steps = qo.int8_chain(inputs, constants, program.encode()), run_steps(program, inputs, constants)
    for result, step in zip(results, steps, strict=True):
        assert result.dtype == step.dtype
        assert result.is_contiguous(memory_format=torch.channels_last if result.dim() == 4 else torch.contiguous_format)
        assert torch.equal(result, step)
    return results


@pytest.mark.parametrize("dtype", [INT8, UINT8])
@pytest.mark.parametrize("count", [1, 3])
def test_steps_one_by_one(isa, threads, dtype, count):
    threads(count)
    program, constants = network(dtype)
    for samples in (1, 2, 3, 7):
        x = torch.randn(samples, 3, 12, 12)
        check(program, [x], constants)
        check(program, [x.contiguous(memory_format=torch.channels_last)], constants)


@pytest.mark.parametrize("dtype", [INT8, UINT8])
def test_every_kind_of_step(isa, threads, dtype):
    program, constants = blocks(dtype)
    for count, samples, side in ((1, 1, 12), (2, 4, 12), (1, 3, 28), (2, 1, 28)):
        threads(count)
        check(program, [torch.randn(samples, 3, side, side).contiguous(memory_format=torch.channels_last)], constants)


def test_memory_formats():
    """Steps without a convolution before them, of inputs in either order or in both."""
    b = Builder(inputs=2)
    of = (b.scale(), b.zero_point(-7))
    a, c = (b.step("quantize", (i,), of, (-128, 127)) for i in (0, 1))
    total = b.step("add", (a, c), (of[0], of[0], of[1], None, None, None), (FLOAT32, 6))
    both = b.step("mul", (a, c), (of[0], of[0], None, of[1], None, None), (FLOAT16, 4))
    joined = b.step("cat", (a, c), (of[0], of[0], of[1], of[1], of[0], b.zero_point(9)), (-1, UINT8))
    pooled = b.step("max_pool2d", (a,), (), (2, 3, 2, 3, 0, 0, 1, 1, 1))
    mean = b.step("avg_pool2d", (c,), (*of, None, None), (2, 2, 2, 2, 0, 0, 0, 1, 3, FLOAT32))
    up = b.step("upsample_nearest2d", (pooled,), (), (1, 3))
    part = b.step("slice", (joined,), (), (0, 1, 2))
    program = b.program(total, both, joined, mean, up, part, b.step("flatten", (up,), (), (2,)))
    x, y = torch.randn(2, 3, 5, 8, 6).unbind()
    check(program, [x, y], b.constants)
    check(program, [x[0], y[0]], b.constants)
    x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
    check(program, [x, y], b.constants)
    check(program, [x, y.contiguous()], b.constants)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cut_batches(threads, count):
    """Values of a sample that are larger than a weight and than a cache, so that samples are taken one after the other."""
    b = Builder()
    of = (b.scale(), b.zero_point(-100))
    v = b.conv(0, (48, 3, 3, 3), of, of, padding=(1, 1, 1, 1))
    early = b.conv(v, (48, 1, 3, 3), of, of, stride=2, padding=(1, 1, 1, 1), groups=48)
    v = b.conv(early, (8, 48, 1, 1), of, of)
    v = b.conv(v, (16, 8, 16, 16), of, of, stride=16)
    v = b.step("flatten", (v,), (), (1,))
    v = b.linear(v, (400, 16 * 16), of, of, INT8)
    last = b.linear(v, (300, 400), of)
    program = b.program(last, early)
    x = torch.randn(5, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    threads(count)
    results = check(program, [x], b.constants)
    alone = [qo.int8_chain([x[i : i + 1]], b.constants, program.encode()) for i in range(5)]
    for result, parts in zip(results, zip(*alone, strict=True), strict=True):
        assert torch.equal(result, torch.cat(parts))


def test_forms_of_inputs():
    program, constants = network()
    wide = torch.randn(2, 4, 12, 24)
    for x in (wide[:, 1:, :, ::2], wide[:, :3, :, :12].bfloat16(), wide.half()[:1, :3, :, 12:].transpose(2, 3)):
        check(program, [x], constants)
    results = qo.int8_chain([torch.empty(0, 3, 12, 12)], constants, program.encode())
    assert [tuple(r.shape) for r in results] == [(0, 10), (0, 60, 6, 6), (0, 60, 6, 6), (0, 28 * 36)]


def test_empty_inputs_whose_values_nothing_reads():
    b = Builder(inputs=3)
    of = (b.scale(), b.zero_point(-7))
    v, planes, image = (b.step("quantize", (i,), of, (-128, 127)) for i in range(3))
    b.step("slice", (planes,), (), (0, 1, 2))
    b.step("channel_shuffle", (image,), (), (2,))
    program = b.program(b.step("dequantize", (v,), of, (FLOAT32,)))
    x = torch.randn(2, 3, 4, 4)
    results = qo.int8_chain([x, torch.randn(3, 0, 4), torch.randn(2, 0, 4, 4)], b.constants, program.encode())
    alone = Builder()
    of = (alone.scale(), alone.zero_point(-7))
    v = alone.step("quantize", (0,), of, (-128, 127))
    alone = alone.program(alone.step("dequantize", (v,), of, (FLOAT32,))), alone.constants
    assert torch.equal(results[0], check(alone[0], [x], alone[1])[0])


def test_one_image_and_rows():
    """Values without samples: (C, H, W), and rows of several dimensions."""
    b = Builder(inputs=2)
    of = (b.scale(), b.zero_point(-7))
    image = b.conv(0, (6, 6, 3, 3), of, of, padding=(1, 1, 1, 1))  # as many channels in as out
    image = b.step("dequantize", (image,), of, (BFLOAT16,))
    rows = b.linear(1, (12, 10), (None, None), of, INT8)  # dynamic: a scale for each row
    rows = b.linear(rows, (5, 12), of, dtype=FLOAT16, bias=False)
    program = b.program(image, rows)
    check(program, [torch.randn(6, 9, 8), torch.randn(6, 4, 10)], b.constants)
    check(program, [torch.randn(6, 1, 8), torch.randn(10)], b.constants)
    b = Builder()
    v = b.step("quantize", (0,), (b.scale(), None), (-127, 127))
    program = b.program(b.step("flatten", (v,), (), (0,)), v)
    check(program, [torch.randn(3, 4, 2, 5).contiguous(memory_format=torch.channels_last)], b.constants)


def test_codes_as_inputs_and_dynamic_scales():
    b = Builder(inputs=2)
    signed, unsigned = (b.scale(), b.zero_point(-7)), (b.scale(), b.zero_point(200))
    v = b.conv(0, (16, 4, 1, 1), signed, unsigned, UINT8)
    w = b.conv(1, (16, 4, 1, 1), unsigned, signed)
    floats = b.conv(v, (4, 16, 3, 3), unsigned, (None, None), FLOAT32)
    v = b.conv(floats, (8, 4, 3, 3), (None, None), signed)  # a scale for each sample
    program = b.program(v, w, floats)
    x = torch.randint(-128, 128, (3, 4, 9, 9), dtype=torch.int8)
    check(program, [x, (x + 3).view(torch.uint8).contiguous(memory_format=torch.channels_last)], b.constants)


def test_constants():
    """Constants are read in each call: other values, other dtypes, elements of a larger one, one scale for all channels."""
    program, constants = network()
    x = torch.randn(2, 3, 12, 12)
    before = check(program, [x], constants)
    constants[0].mul_(1.5)
    constants[1].add_(4)
    after = check(program, [x], constants)
    assert not torch.equal(before[0], after[0])
    check(program, [x], [c.double() if c.is_floating_point() else c.long() if c.dtype == torch.int32 else c for c in constants])
    check(program, [x], [c.expand(2)[:1] if c.dim() == 0 else c for c in constants])

    scalars = [i for i, c in enumerate(constants) if c.dim() == 0]
    kinds = {dtype: [i for i in scalars if constants[i].dtype == dtype] for dtype in (torch.float32, torch.int32)}
    together = [*constants, *(torch.stack([constants[i] for i in of]) for of in kinds.values())]
    named = {i: element(len(constants) + k, p) for k, of in enumerate(kinds.values()) for p, i in enumerate(of)}
    steps = [Step(s.op, s.inputs, tuple(named.get(c, c) for c in s.constants), s.numbers) for s in program.steps]
    gathered = check(Program(tuple(steps), program.inputs, program.outputs), [x], together)
    assert all(torch.equal(a, b) for a, b in zip(after, gathered, strict=True))

    b = Builder()
    packed, _, bias = b.weight(12, 10)
    of = (b.scale(), b.zero_point(1))
    numbers = (12, 10, FLOAT32, 0)
    b.step("linear", (0,), (packed, b.constant(torch.tensor([0.002])), bias, *of, *[None] * 5), numbers)
    plain = b.constant(torch.randint(-9, 9, (12, 10), dtype=torch.int8))
    b.step("linear", (0,), (None, b.constant(torch.rand(12, 1)[:, 0]), bias, *of, *[None] * 4, plain), numbers)
    check(b.program(1, 2), [torch.randn(4, 10)], b.constants)


# ---- programs --------------------------------------------------------------------------------------------------------


def test_encoding():
    program, _ = network()
    assert Program.decode(program.encode()) == program
    numbers = (2**40, -(2**40), 0, 127, -128, 128, 16384, -1, 1)
    other = Program(
        (Step("max_pool2d", (0,), (), numbers), Step("cat", (1, 0, 1), (None, element(7, 9), *[None] * 6), (-1, 0))), 1, (2,)
    )
    assert Program.decode(other.encode()) == other
    assert len({signature.code for signature in STEPS.values()}) == len(STEPS)


def test_last_uses():
    program, _ = network()
    assert program.last_uses() == [[0], [1], [2], [3], [], [5], [6], [], [8], []]


def test_refused_programs():
    step = Step("flatten", (0,), (), (1,))
    for made, text in (
        (lambda: Step("pool", (0,)), "expected op in .*, got 'pool'"),
        (lambda: Step("flatten", (0, 0), (), (1,)), "expected 1 to 1 inputs of flatten, got 2"),
        (lambda: Step("quantize", (0,), (0,), (0, 1)), "expected 2 constants of quantize, got 1"),
        (lambda: Step("quantize", (0,), (None, 1), (0, 1)), "expected scale of quantize, got None"),
        (lambda: Step("flatten", (0,), (), ()), "expected the numbers .* of flatten, got \\(\\)"),
        (lambda: Program((step,), 0, (1,)), "expected at least one input, got 0"),
        (lambda: Program((step, Step("flatten", (2,), (), (1,))), 1, (1,)), r"expected step 1 \(flatten\) to read values below 2"),
        (lambda: Program((step,), 1, (0,)), "expected outputs that are values of steps"),
        (lambda: Program((step,), 1, (1, 1)), "expected outputs that differ"),
        (lambda: Program.decode([1, 2, 3]), "expected a program as Program.encode gives it, got 3 integers that are none"),
        (lambda: Program.decode([]), "expected a program as Program.encode gives it, got 0 integers that are none"),
        (lambda: Program.decode([1, 2]), "expected a program of version 1, got one of version 1|integers that are none"),
    ):
        with pytest.raises(ValueError, match=rf"^quant_ops\.int8_chain: {text}"):
            made()


def test_refused_calls():
    program, constants = network()
    code, x = program.encode(), torch.randn(2, 3, 12, 12)
    replaced = {name: [*constants] for name in ("packed", "bias", "zero_point", "scale", "scales")}
    packed, weight_scale, bias = program.steps[1].constants[:3]
    replaced["packed"][packed] = qo.pack_weight(torch.zeros(20, 3, 3, 4, dtype=torch.int8))
    replaced["bias"][bias] = torch.zeros(21)
    replaced["zero_point"][program.steps[1].constants[6]] = torch.tensor(200)
    replaced["scale"][program.steps[1].constants[5]] = torch.rand(2)
    replaced["scales"][weight_scale] = torch.ones(20, dtype=torch.int32)
    one = r"int8_chain, step 1 \(conv2d\): expected"
    for text, error, inputs, given, made in (
        ("int8_chain: expected 1 inputs, got 2", ValueError, [x, x], constants, code),
        ("int8_chain: expected at least one input, got none", ValueError, [], constants, code),
        ("int8_chain: expected inputs of dtype .*, got float64", TypeError, [x.double()], constants, code),
        ("int8_chain: expected a program as Program.encode gives it", ValueError, [x], constants, code[:-1]),
        ("int8_chain: expected a program as Program.encode gives it", ValueError, [x], constants, [code[0] - 1, *code[1:]]),
        ("int8_chain: expected a program as Program.encode gives it", ValueError, [x], constants, []),
        (r"int8_chain, step 1 \(conv2d\): expected constants -1 to 4, got \d+", ValueError, [x], constants[:5], code),
        (
            f"{one} x.shape\\[-3\\] == weight.shape\\[1\\] \\* groups, got 4 and 3 \\* 1",
            ValueError,
            [x[:, [0, 0, 1, 2]]],
            constants,
            code,
        ),
        (f"{one} a value \\(N, C, H, W\\) or \\(C, H, W\\), got \\(3, 12\\)", ValueError, [x[0, 0, :3]], constants, code),
        (f"{one} packed_weight made by pack_weight from a weight of the sizes", ValueError, [x], replaced["packed"], code),
        (f"{one} bias to have 20 elements, got shape \\(21,\\)", ValueError, [x], replaced["bias"], code),
        (f"{one} out_zero_point in \\[-128, 127\\], got 200", ValueError, [x], replaced["zero_point"], code),
        (f"{one} out_scale to have one element", ValueError, [x], replaced["scale"], code),
        (f"{one} weight_scale.dtype in .*, got int32", TypeError, [x], replaced["scales"], code),
    ):
        with pytest.raises(error, match=rf"^quant_ops\.{text}"):
            qo.int8_chain(inputs, given, made)
    with pytest.raises(RuntimeError, match="expected no derivative"):
        qo.int8_chain([x.requires_grad_()], constants, code)


def test_refused_steps():
    def steps(*made):
        return Program(tuple(made), 1, (len(made),)).encode()

    scale, zero = torch.tensor(0.1), torch.tensor(3, dtype=torch.int32)
    quantize = Step("quantize", (0,), (0, 1), (-128, 127))
    for text, made in (
        (r"step 0 \(dequantize\): expected int8 or uint8 codes, got float32", [Step("dequantize", (0,), (0, 1), (2,))]),
        (r"step 0 \(quantize\): expected qmin and qmax of int8 or uint8 codes", [Step("quantize", (0,), (0, 1), (-129, 127))]),
        (
            r"step 1 \(requantize\): expected out_scale with int8 .*, got int8 without",
            [quantize, Step("requantize", (1,), (0, 1, None, None), (0, 0))],
        ),
        (r"step 1 \(requantize\): expected activation in \[0, 8\]", [quantize, Step("requantize", (1,), (0, 1, 0, 1), (0, 9))]),
        (
            r"step 1 \(requantize\): expected a dtype numbered 0 to 4, got 5",
            [quantize, Step("requantize", (1,), (0, 1, 0, 1), (5, 0))],
        ),
        (r"step 1 \(flatten\): expected start_dim in \[0, 3\], got 4", [quantize, Step("flatten", (1,), (), (4,))]),
        (r"step 1 \(cat\): expected dim in \[-4, 3\], got 4", [quantize, Step("cat", (1, 1), (0, 0, 1, 1, 0, 1), (4, 0))]),
        (r"step 1 \(slice\): expected dim in \[0, 3\], got 4", [quantize, Step("slice", (1,), (), (4, 0, 1))]),
        (r"step 1 \(slice\): expected start and length in .* of 3, got 2 and 2", [quantize, Step("slice", (1,), (), (1, 2, 2))]),
        (r"step 0 \(slice\): expected int8 or uint8 codes, got float32", [Step("slice", (0,), (), (1, 0, 1))]),
        (
            r"step 1 \(channel_shuffle\): expected groups that divide 3 .*, got 2",
            [quantize, Step("channel_shuffle", (1,), (), (2,))],
        ),
        (
            r"step 2 \(mul\): expected values of one shape or a second of \(N, C, 1, 1\), got \(1, 3, 4, 4\) and \(1, 1, 4, 4\)",
            [quantize, Step("slice", (1,), (), (1, 0, 1)), Step("mul", (1, 2), (0, 0, 1, 1, 0, 1), (0, 0))],
        ),
        (
            r"step 1 \(max_pool2d\): expected padding of at most half",
            [quantize, Step("max_pool2d", (1,), (), (2, 2, 2, 2, 2, 0, 1, 1, 0))],
        ),
    ):
        with pytest.raises((ValueError, TypeError), match=rf"^quant_ops\.int8_chain, {text}"):
            qo.int8_chain([torch.randn(1, 3, 4, 4)], [scale, zero], steps(*made))
