"""The CUDA operators against the CPU operators, bit for bit: dtypes, granularities, strides, special values, streams, graphs.

``KernelCases`` needs no GPU by itself: test_cuda_build.py runs the same cases on the emulated kernels.
"""

import itertools

import pytest
import torch

import quant_ops as qo
from quant_ops import _library

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
CODES = [torch.int8, torch.uint8, torch.int16, torch.int32]
RANGES = [(-128, 127), (0, 255), (-32768, 32767), (0, 65535), (-(2**31), 2**31 - 1)]
SPECIAL = [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 1e-40, -1e-45, 3.3e38, -3.3e38, 0.5, 1.5, -0.5, 2.5, 1e-30, -(2.0**60)]

# Shapes of tensor, scale and block_size: each kernel's ways to find a scale, with rows that are and are not whole vectors.
GRANULARITIES = [
    ((), (), None),
    ((1,), (1,), None),
    ((4099,), (), None),
    ((3, 5, 4, 6), (3, 5, 4, 6), None),
    ((3, 5, 4, 6), (1, 5, 1, 6), None),
    ((2, 16, 12, 12), (1, 16, 1, 1), None),
    ((3, 16, 7, 7), (16, 1, 1), None),  # runs of 49 elements
    ((3, 4, 3, 1), (1, 4, 1, 1), None),  # runs shorter than a vector
    ((40, 64), (40, 1), None),
    ((9, 1031), (9, 1), None),
    ((200, 64), (64,), None),
    ((200, 51), (51,), None),  # rows that are not whole vectors
    ((3, 520), (520,), None),
    ((4, 6, 32), (4, 1, 32), None),
    ((4, 6, 32), (1, 6, 32), None),
    ((16, 96), (16, 3), (1, 32)),
    ((16, 96), (4, 6), (4, 16)),
    ((6, 4, 10), (2, 1, 5), (3, 4, 2)),
    ((2100, 24), (1, 24), None),  # several chunks a slice, neighbouring slices
    ((3, 500, 20), (1, 1, 20), None),
    ((2, 3, 5000), (1, 3, 1), None),
]

# Shapes and the dimensions that choose_qparams reduces: whole vectors or not, one part or several, slices side by side or not.
REDUCTIONS = [
    ((), []),
    ((5,), [0]),
    ((4099,), []),
    ((40001,), []),
    ((3, 5, 4, 6), [0, 2]),
    ((2, 16, 12, 12), [0, 2, 3]),
    ((3, 16, 7, 7), [0, 2, 3]),
    ((40, 64), [1]),
    ((600, 32), [-1]),
    ((9, 1031), [1]),
    ((3, 20000), [1]),
    ((200, 64), [0]),
    ((700, 64), [0]),
    ((700, 51), [0]),
    ((700, 4), [0]),
    ((2, 300, 40), [0, 1]),
    ((3, 300, 40), [1]),
    ((2, 3, 5000), [0, 2]),
    ((6, 1, 7), [1]),
    ((5, 0, 3), [1]),
    ((3, 0), [0]),
]

# Of quantize_rows: a part of a warp, a warp, a block, more than its registers hold.
ROWS = [(1,), (3, 0), (5, 1), (7, 3), (600, 24), (40, 64), (2, 3, 70), (9, 1000), (9, 1031), (3, 4099), (5, 9000), (2, 33000)]

# Formats as (exponent_bits, mantissa_bits, named arguments), at least one for each of the kernels' ways to round.
FORMATS = {
    "E4M3": (4, 3, {"special": 1}),
    "E5M2": (5, 2, {"special": 2}),
    "E2M1": (2, 1, {}),
    "INT8": (1, 6, {"bias": 1}),
    "E4M3 to NaN": (4, 3, {"special": 1, "saturate": False}),
    "E5M2 to Inf": (5, 2, {"special": 2, "saturate": False}),
    "E3M2 without subnormals": (3, 2, {"subnormals": False}),
    "FP16": (5, 10, {"special": 2, "saturate": False}),
    "BF16": (8, 7, {"special": 2, "saturate": False}),
    "E8M1": (8, 1, {"special": 2}),  # rounded by integers
    "E4M3 of tiny numbers": (4, 3, {"bias": 110}),
    "E6M9 of huge numbers": (6, 9, {"bias": -60}),
    "E5M23": (5, 23, {}),  # rounded element by element
    "FP32": (8, 23, {"special": 2}),
}
STOCHASTIC = 3

# Shapes, dimensions and sizes of blocks: whole lanes of a warp, any length, tails, parts; along rows, down columns.
BLOCKS = [
    ((64,), 0, 32),
    ((4, 64), 1, 32),
    ((3, 5, 96), -1, 16),
    ((2, 8, 256), 2, 128),
    ((2, 512), 1, 256),
    ((40, 16), 1, 8),
    ((5, 100), 1, 32),
    ((7, 33), 1, 32),
    ((3, 40), 1, 48),
    ((3, 70), 1, 7),
    ((11, 3), 1, 1),
    ((2, 3000), 1, 3000),
    ((2, 9600), 1, 9600),
    ((3, 9001), 1, 4501),
    ((64, 24), 0, 32),
    ((70, 24), 0, 32),
    ((40, 51), 0, 16),
    ((24, 8), 0, 12),
    ((3, 48, 10, 4), 1, 16),
    ((2, 33, 7, 7), 1, 32),
    ((2, 32, 4, 4), 1, 32),
    ((300, 16), 0, 100),
    ((2, 1000, 8), 1, 1000),
    ((2000, 3), 0, 2000),
]


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Same dtype, shape, strides and bits; any NaN equals any other."""
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    actual = actual.cpu()
    if expected.is_floating_point():
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.signbit() & ~actual.isnan(), expected.signbit() & ~expected.isnan())
        actual, expected = actual.nan_to_num(nan=0.0, posinf=None), expected.nan_to_num(nan=0.0, posinf=None)
    assert torch.equal(actual, expected)


def strided_copy(t: torch.Tensor, device: str) -> torch.Tensor:
    """The same values on a device, with the same strides and offset."""
    storage = t.as_strided((t.untyped_storage().nbytes() // t.element_size(),), (1,), 0)
    return storage.to(device, copy=True).as_strided(t.shape, t.stride(), t.storage_offset())


class Subject:
    """The kernels under test: a set of operators and the device of their tensors."""

    def __init__(self, ops, device: str):
        self.ops, self.device = ops, device

    def move(self, value):
        return strided_copy(value, self.device) if isinstance(value, torch.Tensor) else value

    def check_moved(self, op: str, *args, **kwargs) -> None:
        """``check`` of an operator whose lists and keyword arguments hold tensors too."""
        expected = getattr(torch.ops.quant_ops, op)(*args, **kwargs)
        args = [[self.move(one) for one in a] if isinstance(a, list) else self.move(a) for a in args]
        assert_same(getattr(self.ops, op)(*args, **{key: self.move(a) for key, a in kwargs.items()}), expected)

    def check(self, op: str, *args, **kwargs) -> None:
        expected = getattr(torch.ops.quant_ops, op)(*args, **kwargs)
        arguments = [self.move(a) for a in args]
        torch.use_deterministic_algorithms(True)  # poisons new memory: what is not written shows
        try:
            actual = getattr(self.ops, op)(*arguments, **kwargs)
        finally:
            torch.use_deterministic_algorithms(False)
        pairs = [(actual, expected)] if isinstance(expected, torch.Tensor) else zip(actual, expected, strict=True)
        for a, e in pairs:
            assert_same(a, e)


def tensor_of(shape, dtype, spread=60.0) -> torch.Tensor:
    """Random values around the clamping points, ties, and every special value that fits."""
    x = torch.randn(shape, dtype=torch.float64) * spread
    flat = x.view(-1)
    flat[::7] = (flat[::7] * 2).round() / 2
    flat[1 : 1 + len(SPECIAL)] = torch.tensor(SPECIAL, dtype=torch.float64)[: max(flat.numel() - 1, 0)]
    return x.to(dtype)


def rows_of_every_kind(columns: int) -> torch.Tensor:
    """Rows of zeros, subnormal, huge, constant, one-sided and not finite values, among ordinary ones; float64."""
    x = torch.randn(20, columns, dtype=torch.float64)
    if columns > 0:
        x[1] = 0.0
        x[2] = -0.0
        x[3] *= 1e-42
        x[4] *= 1e-20  # the scale is too small for its reciprocal
        x[5] = torch.where(x[5] > 0, 3e38, -3e38)  # the range overflows
        x[6] = 7.25
        x[7] = -x[7].abs() - 1
        x[8] = x[8].abs() + 1
        x[9, columns // 2] = torch.nan
        x[10, -1] = torch.inf
        x[11, 0] = -torch.inf
        x[12] = torch.nan
        x[13] = torch.inf
        x[14, 0] = 1e30
        x[15] = (x[15] * 4).round() / 2  # ties
        x[15, 0] = 127
    return x


def layouts(x: torch.Tensor):
    """The same values under other strides and offsets."""
    yield x
    if x.dim() < 1 or x.numel() == 0:
        return
    offset = torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape)  # dense, but no vector is aligned
    yield offset.copy_(x)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2 + 3, dtype=x.dtype)[..., 3::2]
    yield wide.copy_(x)
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


def format_arguments(name: str, *, forward: bool = True, block: bool = False):
    """The widths, and the named arguments that the operator has."""
    exponent_bits, mantissa_bits, named = FORMATS[name]
    known = {"bias", "special"} | ({"subnormals"} if not block else set()) | ({"saturate"} if forward and not block else set())
    return exponent_bits, mantissa_bits, {key: value for key, value in named.items() if key in known}


def rule_arguments(name: str, rule: int):
    """The rule, with a divisor where the format's largest value is none."""
    return {"scale_rule": rule} | ({"scale_divisor": 448.0} if rule >= 4 and FORMATS[name][0] == 8 else {})


def largest_of(name: str) -> float:
    e, m, named = format_arguments(name)
    named["saturate"] = True
    return torch.ops.quant_ops.quant_float_forward(torch.tensor(torch.inf), e, m, **named).item()


class KernelCases:
    """Every case takes a fixture ``subject``."""

    @pytest.mark.sampled(40)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", range(len(GRANULARITIES)))
    def test_float_forward_and_backward(self, subject, dtype, case):
        shape, parameter, block = GRANULARITIES[case]
        x = tensor_of(shape, dtype)
        grad = torch.randn(shape).to(dtype)
        scale = torch.rand(parameter) * 2 + 0.05
        names = itertools.cycle(FORMATS)
        for view, factor in itertools.product(layouts(x), (None, scale)):
            e, m, named = format_arguments(next(names), forward=False)
            subject.check("quant_float_backward", grad, view, e, m, factor, **named, block_size=block)
            for rounding in range(4):
                e, m, named = format_arguments(next(names))
                seeds = [torch.tensor([case - 9])] if rounding == STOCHASTIC else [None]
                for seed in seeds:
                    subject.check("quant_float_forward", view, e, m, factor, seed, **named, rounding=rounding, block_size=block)
        e, m, named = format_arguments("E4M3", forward=False)
        for view in layouts(grad):
            subject.check("quant_float_backward", view, x, e, m, scale, **named, block_size=block)

    @pytest.mark.parametrize("name", FORMATS)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_float_formats(self, subject, name, dtype):
        """All that is near the format's numbers, by scales of every kind of quotient."""
        e, m, named = format_arguments(name)
        largest = largest_of(name)
        x = torch.randn(48, 64, dtype=torch.float64) * largest * torch.rand(48, 64, dtype=torch.float64) ** 8
        x[0] = torch.tensor(SPECIAL * 5, dtype=torch.float64)[:64]
        x[1] = torch.linspace(0.9, 1.2, 64, dtype=torch.float64) * largest
        x[2] *= 2.0**-20
        scales = torch.tensor([1.0, 0.25, 1 / 3, 0.011, 7.7])
        for scale in [None, *scales, scales.repeat(10)[:48].view(48, 1), scales.repeat(13)[:64]]:
            values = (x * (1 if scale is None else scale.double())).to(dtype)
            grad = torch.randn(48, 64).to(dtype)
            subject.check("quant_float_backward", grad, values, e, m, scale, **format_arguments(name, forward=False)[2])
            for rounding in range(4):
                subject.check("quant_float_forward", values, e, m, scale, torch.tensor([-5]), **named, rounding=rounding)

    @pytest.mark.parametrize("dtype", FLOATS[1:3], ids=str)
    def test_float_formats_of_every_short_element(self, subject, dtype):
        x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        for name, rounding, scale in itertools.product(["E4M3", "E5M2", "E2M1", "BF16"], (0, STOCHASTIC), (None, 0.37)):
            e, m, named = format_arguments(name)
            scale = None if scale is None else torch.tensor(scale)
            subject.check("quant_float_forward", x, e, m, scale, torch.tensor([3]), **named, rounding=rounding)
            subject.check("quant_float_backward", torch.ones_like(x), x, e, m, scale, special=named.get("special", 0))

    def test_float_scales_of_every_size(self, subject):
        scales = [0.0, torch.nan, torch.inf, -0.5, 1e-45, 1e-38, 2.0**-58, 2.0**-57, 1e-10, 1 / 3, 3e10, 2.0**60, 2.0**61, 3e38]
        scale = torch.tensor([*scales, -0.0, -torch.inf]).view(-1, 1)
        x = (tensor_of((16, 64), torch.float32, 200.0) * scale.nan_to_num(1.0, 1.0, 1.0).clamp(-1e36, 1e36)).float()
        for name, rounding in itertools.product(FORMATS, (0, 1, 2, STOCHASTIC)):
            e, m, named = format_arguments(name)
            named_backward = format_arguments(name, forward=False)[2]
            for values, factor in ((x, scale), (x.t().contiguous(), scale.view(-1)), *((x, one) for one in scale)):
                subject.check("quant_float_forward", values, e, m, factor, torch.tensor([3]), **named, rounding=rounding)
                if rounding == 0:
                    subject.check("quant_float_backward", torch.ones_like(values), values, e, m, factor, **named_backward)

    @pytest.mark.parametrize("name", ["E4M3", "E2M1", "E4M3 to NaN", "FP16"])
    def test_float_quotients_next_to_ties_and_limits(self, subject, name):
        e, m, named = format_arguments(name)
        largest = largest_of(name)
        scale = torch.rand(64, 1) * 10 ** torch.linspace(-6, 6, 64).view(-1, 1)
        steps = torch.randint(2**m, 2 ** (m + 1), (64, 512)) + torch.randint(0, 2, (64, 512)) * 0.5  # a number or a tie
        steps *= largest / 2 ** (m + 1) * 2.0 ** torch.randint(-9, 2, (64, 512))
        steps[:, ::5] = largest
        x = (steps.double() * scale.double()).float()
        x = (x.view(torch.int32) + torch.randint(-2, 3, x.shape, dtype=torch.int32)).view(torch.float32)
        for values, factor in ((x, scale), (x.t().contiguous(), scale.view(1, -1))):
            backward = format_arguments(name, forward=False)[2]
            subject.check("quant_float_backward", torch.ones_like(values), values, e, m, factor, **backward)
            for rounding in range(4):
                subject.check("quant_float_forward", values, e, m, factor, torch.tensor([8]), **named, rounding=rounding)

    @pytest.mark.parametrize("shape", [(4096,), (2, 8, 8, 8), (2, 24, 5, 7), (3, 5, 12)], ids=str)
    def test_random_words_of_seeds_anywhere(self, subject, shape):
        x = torch.randn(shape)
        for view in layouts(x):
            for seed in (torch.tensor(2**63 - 1), torch.tensor([-(2**63)])):
                subject.check("quant_float_forward", view, 4, 3, None, seed, rounding=STOCHASTIC)
                subject.check("quant_float_forward", view, 4, 3, seed=seed, rounding=STOCHASTIC)  # the seed stays on the CPU
                subject.check("quant_block_forward", view, -1, 4, 4, 3, None, seed, rounding=STOCHASTIC)
                subject.check("quant_block_forward", view, 0, 4, 4, 3, seed=seed, rounding=STOCHASTIC)

    @pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
    @pytest.mark.parametrize("case", range(len(BLOCKS)))
    def test_blocks(self, subject, dtype, case):
        shape, dim, block = BLOCKS[case]
        x = tensor_of(shape, dtype, 9.0)
        x.view(-1)[len(SPECIAL) + 30 : len(SPECIAL) + 60] = 0.0
        grad = torch.randn(shape).to(dtype)
        names, rules = itertools.cycle(FORMATS), itertools.cycle(range(7))
        for view in layouts(x):
            for rounding in range(4):
                name = next(names)
                e, m, named = format_arguments(name, block=True)
                named |= rule_arguments(name, next(rules))
                seed = torch.tensor([case]) if rounding == STOCHASTIC else None
                subject.check("quant_block_forward", view, dim, block, e, m, None, seed, **named, rounding=rounding)
                if rounding == 0:
                    subject.check("quant_block_backward", grad, view, dim, block, e, m, **named)
            for rule in (0, 4):
                subject.check("quant_block_forward", view, dim, block, 4, 3, special=1, scale_rule=rule)
                subject.check("quant_block_backward", grad, view, dim, block, 4, 3, special=1, scale_rule=rule)
        for view in layouts(grad):
            subject.check("quant_block_backward", view, x, dim, block, 2, 1, scale_rule=4)

    @pytest.mark.sampled(40)
    @pytest.mark.parametrize("rule", range(7))
    @pytest.mark.parametrize("name", FORMATS)
    def test_scales_of_blocks(self, subject, name, rule):
        """Blocks of every magnitude, of zeros, of NaN and Inf."""
        e, m, named = format_arguments(name, block=True)
        x = torch.randn(320, 32) * 2.0 ** torch.arange(-160, 160).double().view(-1, 1)
        x[::3] = x[::3].sign() * 2.0 ** x[::3].abs().log2().nan_to_num(0, 0, 0).floor()  # powers of two
        x = x.float()
        x[5, 3], x[6, 31], x[7, 0], x[8], x[9] = torch.nan, torch.inf, -torch.inf, 0.0, -0.0
        divisors = [rule_arguments(name, rule).get("scale_divisor"), *([3.7] if rule >= 4 else [])]
        factors = [None, *torch.tensor([0.02, 1e-30, 0.0, -2.0, torch.nan])] if rule == 4 else [None]
        for dim, view in ((1, x), (0, x.t().contiguous()), (1, torch.cat([x, x[:, :1]], 1))):
            for divisor, factor, rounding in itertools.product(divisors, factors, (0, 2, STOCHASTIC)):
                options = {**named, "scale_rule": rule, "scale_divisor": divisor}
                seed = torch.tensor([1])
                subject.check("quant_block_forward", view, dim, 32, e, m, factor, seed, **options, rounding=rounding)
                if rounding == 0:
                    subject.check("quant_block_backward", torch.ones_like(view), view, dim, 32, e, m, factor, **options)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", range(len(GRANULARITIES)))
    def test_forward(self, subject, dtype, case):
        shape, parameter, block = GRANULARITIES[case]
        x = tensor_of(shape, dtype)
        scale = torch.rand(parameter) * 2 + 0.05
        zero = torch.randint(-200, 200, parameter, dtype=torch.int32)
        for view, simulate, (qmin, qmax) in itertools.product(layouts(x), (True, False), RANGES):
            asymmetric = qmin % 2 == 0
            subject.check("quant_tensor_forward", view, scale, zero, qmin, qmax, asymmetric, simulate, block_size=block)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", range(len(GRANULARITIES)))
    def test_backward(self, subject, dtype, case):
        shape, parameter, block = GRANULARITIES[case]
        x = tensor_of(shape, dtype).nan_to_num(nan=0.25, posinf=9.0, neginf=-9.0)
        scale = torch.rand(parameter) * 2 + 0.05
        zero = torch.randint(-20, 20, parameter, dtype=torch.int32)
        grad = torch.randn(shape).to(dtype)
        for view in layouts(x):
            subject.check("quant_tensor_backward", grad, view, scale, zero, -128, 127, True, block_size=block)
        for qmin, qmax in [(0, 15), (-(2**31), 2**31 - 1)]:
            subject.check(
                "quant_tensor_backward",
                grad[:1].expand(shape) if shape else grad,
                x,
                scale,
                zero,
                qmin,
                qmax,
                qmin < 0,
                block_size=block,
            )

    def test_backward_with_scale_and_zero_point_of_different_shapes(self, subject):
        x, grad = tensor_of((4, 3, 40), torch.float32), torch.randn(4, 3, 40)
        shapes = [(), (4, 1, 1), (3, 1), (40,), (1, 3, 40), (4, 3, 40)]
        for s, z in itertools.product(shapes, shapes):
            scale, zero = torch.rand(s) + 0.1, torch.randn(z) * 9
            subject.check("quant_tensor_backward", grad, x, scale, zero, -20, 20, True)

    def test_backward_keeps_special_values_apart(self, subject):
        x = tensor_of((64, 40), torch.float32)
        grad = torch.randn(64, 40)
        grad.view(-1)[[0, 3, 100]] = torch.tensor([torch.inf, torch.nan, -0.0])
        for shape in [(), (64, 1), (40,)]:
            subject.check("quant_tensor_backward", grad, x, torch.full(shape, 0.5), None, -128, 127)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("codes", CODES, ids=str)
    def test_dequant(self, subject, dtype, codes):
        info = torch.iinfo(codes)
        for (shape, parameter, block), zeros in itertools.product(GRANULARITIES, ["none", "small", "any"]):
            q = torch.randint(info.min, info.max, shape, dtype=torch.int64).to(codes)
            scale = torch.rand(parameter) + 0.01
            bound = 200 if zeros == "small" else 2**31 - 1
            zero = None if zeros == "none" else torch.randint(-bound, bound, parameter, dtype=torch.int32)
            for view in layouts(q):
                subject.check("dequant_tensor", view, scale, zero, dtype, block_size=block)

    @pytest.mark.parametrize(
        "zero_dtype",
        [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, *FLOATS],
        ids=str,
    )
    def test_zero_points_of_every_dtype(self, subject, zero_dtype):
        x = tensor_of((8, 64), torch.float32)
        values = torch.tensor([0.0, 1.5, 2.5, 100.0, 7.0, 3.0, 300.0, 127.0], dtype=torch.float64)
        if zero_dtype.is_floating_point:
            values[:6] = torch.tensor([-0.5, torch.nan, torch.inf, -torch.inf, 1e30, -2.5])
        if zero_dtype in (torch.int32, torch.int64):
            values[:3] = torch.tensor([2.0**31 - 1, -(2.0**31), 2.0**24 + 1])
        zero = values.to(zero_dtype).view(8, 1)
        if zero_dtype == torch.int64:
            zero[3], zero[4] = 2**40, -(2**40)
        strided = torch.zeros(8, 3, dtype=zero_dtype)[:, 1:2].copy_(zero)
        for z, (qmin, qmax), simulate in itertools.product((zero, strided), RANGES, (True, False)):
            subject.check("quant_tensor_forward", x, torch.full((8, 1), 0.3), z, qmin, qmax, True, simulate)

    def test_scales_of_every_size(self, subject):
        """Zero, NaN, infinite, negative and extreme scales give what the formula gives."""
        scales = [0.0, torch.nan, torch.inf, -0.5, 1e-45, 1e-38, 2.0**-61, 2.0**-60, 1e-10, 1 / 3, 3e10, 2.0**60, 2.0**61, 3e38]
        scale = torch.tensor(scales).view(-1, 1)
        x = (tensor_of((len(scales), 64), torch.float32) * scale.nan_to_num(1.0, 1.0).clamp(-1e36, 1e36)).float()
        for simulate, (qmin, qmax) in itertools.product((True, False), RANGES):
            subject.check("quant_tensor_forward", x, scale, None, qmin, qmax, False, simulate)
            columns = x.t().contiguous()[:, :8].contiguous()
            subject.check("quant_tensor_forward", columns, scale.view(-1)[:8], None, qmin, qmax, False, simulate)

    def test_quotients_next_to_ties(self, subject):
        """x within a few units in the last place of (k + 1/2) * scale: where a product with 1 / scale goes wrong."""
        scale = torch.rand(64, 1) * 10 ** torch.linspace(-6, 6, 64).view(-1, 1)
        ties = (torch.randint(-130, 130, (64, 512)) + 0.5).double() * scale.double()
        x = ties.float()
        x = (x.view(torch.int32) + torch.randint(-2, 3, x.shape, dtype=torch.int32)).view(torch.float32)
        for simulate in (True, False):
            subject.check("quant_tensor_forward", x, scale, None, -128, 127, False, simulate)
            subject.check("quant_tensor_forward", x.t().contiguous(), scale.view(1, -1), None, -128, 127, False, simulate)

    @pytest.mark.sampled(40)
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("case", range(len(REDUCTIONS)))
    def test_choose_qparams(self, subject, dtype, case):
        shape, dim = REDUCTIONS[case]
        x = torch.randn(shape, dtype=torch.float64) * 3 + 1
        special = x.clone()
        special.view(-1)[:: max(1, x.numel() // 2)] = torch.tensor(torch.nan if case % 2 else torch.inf)
        for values in (x, special):
            for view in layouts(values.to(dtype)):
                for asymmetric in (False, True):
                    subject.check("choose_qparams", view, dim, -128, 127, asymmetric)
        for (qmin, qmax), asymmetric in itertools.product([(0, 255), (-7, 7), (-(2**31), 2**31 - 1), (3, 9)], (False, True)):
            subject.check("choose_qparams", x.to(dtype), dim, qmin, qmax, asymmetric)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_choose_qparams_of_every_kind_of_slice(self, subject, dtype):
        for columns in (1, 8, 37, 300):
            rows = rows_of_every_kind(columns).to(dtype)
            for asymmetric in (False, True):
                subject.check("choose_qparams", rows, [1], -128, 127, asymmetric)
                subject.check("choose_qparams", rows.t().contiguous(), [0], -128, 127, asymmetric)
                subject.check("choose_qparams", rows[:1].expand(9, columns), [0], -128, 127, asymmetric)
                subject.check("choose_qparams", rows[:, :1].expand(20, 9), [1], -128, 127, asymmetric)

    @pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
    @pytest.mark.parametrize("shape", ROWS, ids=str)
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_quantize_rows(self, subject, dtype, shape, asymmetric):
        for view in layouts((torch.randn(shape, dtype=torch.float64) * 3 + 1).to(dtype)):
            subject.check("quantize_rows", view, asymmetric)

    @pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
    @pytest.mark.parametrize("asymmetric", [False, True])
    def test_quantize_rows_of_every_kind(self, subject, dtype, asymmetric):
        for columns in (1, 8, 37, 300, 1030):
            rows = rows_of_every_kind(columns).to(dtype)
            subject.check("quantize_rows", rows, asymmetric)
            for row in rows:
                subject.check("quantize_rows", row, asymmetric)

    @pytest.mark.parametrize("dtype", FLOATS[:3], ids=str)
    @pytest.mark.parametrize("block_size", [(1, 16), (3, -1), (-1, 1), (-1, -1), (1, 2100)], ids=str)
    def test_affine(self, subject, dtype, block_size):
        x = (torch.randn(6, 2100 if block_size[1] == 2100 else 48) * 3).to(dtype)
        x[0, 5], x[1, 3] = torch.nan, torch.inf
        for view in layouts(x):
            for mapping, preserve, domain in ((0, True, 0), (1, True, 0), (2, True, 0), (2, False, 0), (2, False, 1)):
                options = {"preserve_zero": preserve, "zero_point_domain": domain}
                subject.check("choose_qparams_affine", view, mapping, block_size, -8, 7, None, None, None, False, **options)
                scale, zero = torch.ops.quant_ops.choose_qparams_affine(x, mapping, block_size, -8, 7, **options)
                subject.check("quantize_affine", view, block_size, scale, zero, torch.int8, -8, 7, domain)
                codes = torch.randint(-8, 8, x.shape, dtype=torch.int8)
                for result in FLOATS[:3]:
                    subject.check("dequantize_affine", codes, block_size, scale, zero, -8, 7, domain, output_dtype=result)

    @pytest.mark.parametrize("bits", [4, 8])
    def test_weight_only_embedding(self, subject, bits):
        for (n, k), group, zeros in itertools.product(
            [(19, 37), (70, 256), (33, 1), (5, 0)], [32, -1], ["none", "integer", "float"]
        ):
            groups = 1 if group == -1 else max(1, -(-k // group))
            low = -(1 << (bits - 1))
            weight = torch.randint(low, -low, (n, k), dtype=torch.int8)
            zero = {"none": None, "integer": torch.randint(low, -low, (n, groups), dtype=torch.int8)}.get(
                zeros, torch.randn(n, groups)
            )
            packed = torch.ops.quant_ops.pack_weight_only(weight, bits, group)
            scale = torch.rand(groups, n).T
            for indices, result in itertools.product(
                [torch.randint(n, (3, 5)), torch.arange(n, dtype=torch.int32).flip(0), torch.zeros(2, 0, dtype=torch.int64)],
                FLOATS[:3],
            ):
                arguments = (indices, weight, scale, zero, bits, group)
                subject.check("weight_only_embedding", *arguments, out_dtype=result)
                moved = subject.move(packed)
                got = subject.ops.weight_only_embedding(*map(subject.move, arguments), packed_weight=moved, out_dtype=result)
                assert_same(got, torch.ops.quant_ops.weight_only_embedding(*arguments, out_dtype=result))

    def test_codes_between_products(self, subject):
        """Every dtype and function of requantize, int8_add and int8_mul; sizes that are and are not whole vectors."""
        for n, x_dtype, activation in itertools.product([1, 4, 37, 1024, 5003], CODES[:2], range(9)):
            info = torch.iinfo(x_dtype)
            a, b = (torch.randint(info.min, info.max + 1, (n + 1,), dtype=x_dtype) for _ in range(2))
            scale, out = torch.rand(()) * 0.05 + 0.01, torch.rand(()) * 0.1 + 0.01
            zero = torch.tensor(5)
            for dtype in (*CODES[:2], *FLOATS[:3]):
                codes = {"out_scale": out, "out_zero_point": zero} if dtype in CODES else {}
                for start in (0, 1):  # aligned or not
                    given = {**codes, "out_dtype": dtype, "activation": activation}
                    subject.check_moved("requantize", a[start:][:n], scale, zero, **given)
                    for name in ("int8_add", "int8_mul"):
                        subject.check_moved(name, a[start:][:n], b[start:][:n], scale, out, zero, **given)

    def test_products_with_a_factor_of_each_channel(self, subject):
        for shape, memory_format, dtype in itertools.product(
            [(2, 8, 5, 7), (1, 40, 4, 4), (3, 3, 9, 2), (2, 1, 3, 3), (1, 6, 1, 1)],
            (torch.contiguous_format, torch.channels_last),
            (*CODES[:2], torch.float16),
        ):
            a = torch.randint(-128, 128, shape, dtype=torch.int8).contiguous(memory_format=memory_format)
            b = torch.randint(0, 256, (*shape[:2], 1, 1), dtype=torch.uint8)
            zero, out = torch.tensor(5), {"out_scale": torch.tensor(0.03)} if dtype in CODES else {}
            subject.check_moved("int8_mul", a, b, torch.tensor(0.02), torch.tensor(0.004), zero, zero, out_dtype=dtype, **out)

    def test_cat_of_codes(self, subject):
        for memory_format, dim in itertools.product((torch.contiguous_format, torch.channels_last), (0, 1, -1)):
            parts = [
                torch.randint(-128, 128, (2, 8, 4, 4), dtype=torch.int8).contiguous(memory_format=memory_format) for _ in range(3)
            ]
            scales = [torch.rand(()) + 0.1 for _ in parts]
            subject.check_moved("int8_cat", parts, scales, [], dim, out_scale=scales[0])
            subject.check_moved("int8_cat", parts, scales, [torch.tensor(3)] * 3, dim, out_dtype=torch.float16)

    def test_pools(self, subject):
        for dtype, channels_last in itertools.product(CODES[:2], (False, True)):
            info = torch.iinfo(dtype)
            x = torch.randint(info.min, info.max + 1, (2, 6, 9, 11), dtype=dtype)
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            scale, zero, out = (
                torch.tensor(0.03),
                torch.tensor(7),
                {"out_scale": torch.tensor(0.02), "out_zero_point": torch.tensor(-3)},
            )
            for view in (x, x[:, 1:, :, :9], x[0], x[:0]):
                for kernel, stride, pad, ceil in ((2, [], 0, False), (3, 2, 1, True), ((2, 5), (1, 3), (1, 2), True)):
                    window = [list(v) if isinstance(v, tuple | list) else [v] for v in (kernel, stride, pad)]
                    subject.check_moved("int8_max_pool2d", view, *window, [1, 2], ceil)
                    for include, divisor in ((False, None), (True, None), (True, -3)):
                        subject.check_moved("int8_avg_pool2d", view, scale, zero, *window, ceil, include, divisor, **out)
                for size in ([1], [3, 4], [11, 13]):
                    subject.check_moved("int8_adaptive_avg_pool2d", view, scale, None, size, out_dtype=torch.bfloat16)
                subject.check_moved("int8_upsample_nearest2d", view, [2, 3])

    def test_backward_over_chunks_of_chunks(self, subject):
        x, grad = torch.randn(2**20 + 1030), torch.randn(2**20 + 1030)
        subject.check("quant_tensor_backward", grad, x, torch.tensor(0.02), torch.tensor(3.0), -128, 127, True)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_backward_over_few_and_many_chunks(self, subject, dtype):
        """Slices that a kernel, or a block of it, finishes on its own, and slices just too long for that."""
        for length in (1024, 1025, 16 * 1024, 16 * 1024 + 1, 33 * 1024 + 5):
            for shape, scale, zero in [
                ((length,), (), ()),
                ((2, length), (2, 1), (2, 1)),
                ((2, length), (2, 1), ()),
                ((2, 3, length // 2), (3, 1), (3, 1)),
            ]:
                x, grad = tensor_of(shape, dtype).nan_to_num(0.25, 9.0, -9.0), torch.randn(shape).to(dtype)
                for asymmetric in (False, True):
                    args = torch.rand(scale) + 0.1, torch.randn(zero) * 9, -100, 90, asymmetric
                    subject.check("quant_tensor_backward", grad, x, *args)

    @pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
    def test_empty(self, subject, shape):
        x, scale, zero = torch.zeros(shape), torch.ones(()), torch.ones((), dtype=torch.int64)
        subject.check("quant_tensor_forward", x, scale, zero, -128, 127, True, False)
        subject.check("quant_tensor_backward", x, x, scale, zero, -128, 127, True)
        subject.check("dequant_tensor", x.to(torch.int8), scale, zero, torch.bfloat16)
        subject.check("quant_float_forward", x, 4, 3, scale)
        subject.check("quant_float_backward", x, x, 4, 3, scale)
        subject.check("quant_block_forward", x, 0, 32, 4, 3)
        subject.check("quant_block_backward", x, x, 0, 32, 4, 3)


@pytest.mark.cuda
class TestCuda(KernelCases):
    @pytest.fixture
    def subject(self):
        if _library.cuda_library is None:
            pytest.skip(_library.cuda_reason)
        return Subject(torch.ops.quant_ops, "cuda")

    @pytest.fixture
    def example(self, subject):
        x = tensor_of((8, 16, 28, 28), torch.float32).cuda()
        return x, torch.rand(1, 16, 1, 1).cuda() + 0.1, torch.randint(-9, 9, (1, 16, 1, 1)).cuda()

    def test_runs_on_the_current_stream(self, example):
        x, scale, zero = example

        def results(x):
            return (
                qo.quant_tensor_forward(x, scale, zero, -128, 127, True),
                *qo.choose_qparams(x, [], 0, 255, True),
                *qo.quantize_rows(x),
            )

        expected = results(x)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
            late.copy_(x)
            actual = results(late)
        stream.synchronize()
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e.cpu())

    def test_captured_graph_sees_new_inputs(self, example):
        x, scale, zero = example
        grad = torch.randn_like(x)

        def step():
            q = qo.quant_tensor_forward(x, scale, zero, -128, 127, True, False)
            ours = qo.quant_tensor_backward(grad, x, scale, zero, -128, 127, True)
            return q, qo.dequant_tensor(q, scale, zero), *ours, *qo.choose_qparams(x, [], -128, 127), *qo.quantize_rows(x, True)

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for _ in range(3):
            x.copy_(torch.randn_like(x) * 20)
            scale.uniform_(0.1, 2.0)
            zero.random_(-9, 9)
            graph.replay()
            for r, e in zip(results, step(), strict=True):
                assert_same(r, e.cpu())

    def test_captured_graph_reads_seed_and_scales_anew(self, example):
        x, scale, _ = example
        seed, tensor_scale = torch.tensor(1, device="cuda"), torch.tensor(0.01, device="cuda")
        long = torch.randn(2, 100_000, device="cuda")  # blocks of parts

        def step():
            return (
                qo.quant_float_forward(x, 4, 3, scale, rounding="stochastic", seed=seed),
                qo.quant_block_forward(x, 1, 16, 2, 1, tensor_scale, scale_rule="e4m3", rounding="stochastic", seed=seed),
                qo.quant_block_forward(long, 1, 100_000, 4, 3),
                qo.quant_float_backward(x, x, 4, 3, scale),
            )

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for _ in range(3):
            x.normal_()
            long.normal_()
            scale.uniform_(0.1, 2.0)
            seed.random_()
            tensor_scale.uniform_(0.01, 0.1)
            graph.replay()
            for r, e in zip(results, step(), strict=True):
                assert_same(r, e.cpu())

    def test_same_bits_every_time(self, example):
        x, scale, zero = example
        grad = torch.randn_like(x)
        first = qo.quant_tensor_backward(grad, x, scale, zero, -128, 127, True)
        for _ in range(5):
            for a, e in zip(qo.quant_tensor_backward(grad, x, scale, zero, -128, 127, True), first, strict=True):
                assert_same(a, e.cpu())

    def test_writes_only_its_own_memory(self, subject):
        """Results lie between sentinels of the caching allocator's neighbours."""
        before = [torch.full((513,), 77, dtype=torch.int8, device="cuda") for _ in range(64)]
        freed = before.pop(31)
        del freed
        y = qo.quant_tensor_forward(torch.randn(513, device="cuda"), torch.ones((), device="cuda"), None, -128, 127, False, False)
        assert y.shape == (513,)
        assert all(bool((b == 77).all()) for b in before)

    def test_tensors_on_two_devices_are_refused(self, subject):
        with pytest.raises(ValueError, match=r"scale\.device"):
            qo.quant_tensor_forward(torch.randn(4, device="cuda"), torch.ones(4), None, -128, 127)

    @pytest.mark.slow
    @pytest.mark.parametrize("parameter", ["tensor", "rows", "columns"])
    def test_more_than_two_to_the_31_elements(self, subject, parameter):
        rows, columns = 2**16 + 8, 2**15 + 16
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(0, 40)
        shape = {"tensor": (), "rows": (rows, 1), "columns": (columns,)}[parameter]
        scale = torch.rand(shape, device="cuda") + 0.1
        q = qo.quant_tensor_forward(x, scale, None, -128, 127, False, False)
        y = qo.quant_tensor_forward(x, scale, None, -128, 127)
        dx, _, _ = qo.quant_tensor_backward(torch.ones_like(x), x, scale, None, -128, 127)
        for part in (slice(0, 3), slice(rows // 2 - 2, rows // 2 + 2), slice(rows - 3, rows)):
            s = scale[part] if parameter == "rows" else scale
            assert_same(q[part], qo.quant_tensor_forward(x[part].cpu(), s.cpu(), None, -128, 127, False, False))
            assert_same(y[part], qo.quant_tensor_forward(x[part].cpu(), s.cpu(), None, -128, 127))
            ones = torch.ones_like(x[part]).cpu()
            assert_same(dx[part], qo.quant_tensor_backward(ones, x[part].cpu(), s.cpu(), None, -128, 127)[0])

    @pytest.mark.slow
    def test_floats_and_blocks_of_more_than_two_to_the_31_elements(self, subject):
        rows, columns = 2**16 + 8, 2**15 + 32
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(0, 40)
        results = [
            (qo.quant_float_forward(x, 4, 3, special="nan"), lambda x: qo.quant_float_forward(x, 4, 3, special="nan")),
            (qo.quant_block_forward(x, 1, 32, 2, 1), lambda x: qo.quant_block_forward(x, 1, 32, 2, 1)),
            (qo.quant_block_forward(x, 0, 8, 2, 1), lambda x: qo.quant_block_forward(x, 0, 8, 2, 1)),
        ]
        for part in (slice(0, 8), slice(rows // 2 - 4, rows // 2 + 4), slice(rows - 8, rows)):
            for actual, on_cpu in results:
                assert_same(actual[part], on_cpu(x[part].cpu()))
        random = qo.quant_float_forward(x, 4, 3, special="nan", rounding="stochastic", seed=3)
        flat = qo.quant_float_forward(x.view(-1), 4, 3, special="nan", rounding="stochastic", seed=3)
        assert torch.equal(random.view(-1), flat)
        assert not torch.equal(random[-8:].cpu(), qo.quant_float_forward(x[-8:].cpu(), 4, 3, special="nan"))

    @pytest.mark.slow
    def test_ranges_and_rows_of_more_than_two_to_the_31_elements(self, subject):
        rows, columns = 2**16 + 8, 2**15 + 16
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="cuda").normal_(0, 40)
        x[-1, -1] = 4096.0
        scale, _ = qo.choose_qparams(x, [], -128, 127)
        assert scale.item() == torch.tensor(4096.0).div(127).item()
        q, row_scale, _ = qo.quantize_rows(x)
        by_row, _ = qo.choose_qparams(x, [1], -127, 127)
        by_column, _ = qo.choose_qparams(x, [0], -127, 127)
        assert_same(by_column, x.abs().amax(0, keepdim=True).float().cpu() / 127)  # on CUDA torch multiplies by 1 / 127
        for part in (slice(0, 3), slice(rows // 2 - 2, rows // 2 + 2), slice(rows - 3, rows)):
            expected = qo.quantize_rows(x[part].cpu())
            assert_same(q[part], expected[0])
            assert_same(row_scale[part], expected[1])
            assert_same(by_row[part], expected[1])
