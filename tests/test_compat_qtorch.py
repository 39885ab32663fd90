"""quant_ops.compat.qtorch: its formats by formulas in float64, values computed by the original, and INT-FP-QSim's block with it."""

import copy
import math
import pickle

import pytest
import torch
from documents import CUSTOM_FORMAT, run

from quant_ops.compat import qtorch
from quant_ops.compat.qtorch import BlockFloatingPoint, FixedPoint, FloatingPoint, quant

# FloatingPointNumber, which qtorch has not, is imported; the rest of the block is in documents.py.
CUSTOM_IMPORTS = """
from quant_ops.compat.qtorch import FloatingPoint, FloatingPointNumber
from quant_ops.compat.qtorch.quant import quantizer
"""


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


def values():
    """Ties, subnormal numbers and values beyond every small format."""
    halves = torch.arange(-40, 40.5, 0.5) / 16
    return torch.cat([halves, torch.randn(2000) * torch.exp2(torch.randint(-20, 20, (2000,)).float()), torch.tensor([0.0, 1e30])])


def away(steps):
    return (steps.abs() + 0.5).floor().copysign(steps)


def floating(x, exp, man):
    """Half away from zero; all exponents for numbers; saturating."""
    least, top = 2 - 2 ** (exp - 1), 2 ** (exp - 1)
    exponent = (torch.frexp(x.double()).exponent - 1).clamp(least)
    step = torch.exp2((exponent - man).double())
    largest = (2 - 2.0**-man) * 2.0**top
    return (away(x.double() / step) * step).clamp(-largest, largest).float()


def test_document():
    seen = {}
    found = run(CUSTOM_IMPORTS + CUSTOM_FORMAT, replace_layers=lambda model, **quantizers: seen.update(quantizers), model=None)
    assert set(seen) == {"input_quantizer", "weight_quantizer", "output_quantizer"}
    assert str(found["quant_func"]) == (
        "with_gradient(FloatFormat(3, 4, rounding='nearest_away'), "
        "FloatFormat(5, 2, special='none', rounding='nearest_away'), everywhere=True)"
    )
    x, weight = values().requires_grad_(), torch.randn(len(values()))
    y = seen["input_quantizer"](x)
    (y * weight).sum().backward()
    assert torch.equal(y, floating(x.detach(), 3, 4))
    assert torch.equal(x.grad, floating(weight, 5, 2))


@pytest.mark.parametrize(("exp", "man"), [(4, 3), (5, 2), (3, 4), (2, 1), (1, 2), (5, 10), (7, 5)])
def test_floating_point(exp, man):
    x = values()
    assert torch.equal(quant.float_quantize(x, exp, man, "nearest"), floating(x, exp, man))


def test_floating_point_as_the_original_computes_it():
    x = torch.tensor([470.0, -1e9, 1.0625, -1.0625, 0.00097656, -0.0029296875, 2.25])
    assert quant.float_quantize(x, 4, 3, "nearest").tolist() == [480.0, -480.0, 1.125, -1.125, 0.0, -0.00390625, 2.25]
    assert quant.float_quantize(torch.tensor([1e6, 65520.0]), 5, 10, "nearest").tolist() == [131008.0, 65536.0]
    assert quant.float_quantize(torch.tensor([math.nan, math.inf]), 4, 3, "nearest").isnan().tolist() == [True, False]


def test_eight_exponent_bits_are_those_of_float32():
    x = torch.cat([values(), torch.tensor([3.4e38, -3.4e38, 1e-40, math.inf])])
    assert torch.equal(quant.float_quantize(x, 8, 23, "nearest"), x)
    bits = x.view(torch.int32)
    expected = ((bits + 0x8000) & -0x10000).view(torch.float32)  # half a step added to the magnitude, the rest cut off
    assert torch.equal(quant.float_quantize(x, 8, 7, "nearest"), expected)
    assert quant.float_quantize(x, 8, 7, "nearest")[-4] == math.inf


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("clamp", [False, True])
@pytest.mark.parametrize(("wl", "fl"), [(8, 4), (4, 8), (16, 8), (24, 10)])
def test_fixed_point(wl, fl, clamp, symmetric):
    x, step = values(), 2.0**-fl
    low, high = (symmetric - 2 ** (wl - 1), 2 ** (wl - 1) - 1) if clamp else (-math.inf, math.inf)
    expected = ((x.double() / step).round().clamp(low, high) * step).float()
    assert torch.equal(quant.fixed_point_quantize(x, wl, fl, clamp, symmetric, "nearest"), expected)


@pytest.mark.parametrize("dim", [-1, 0, 1, 2])
@pytest.mark.parametrize("wl", [2, 4, 8, 12])
def test_block_floating_point(wl, dim):
    """Each index of dim has an exponent; -1 is the whole tensor."""
    x = torch.randn(6, 5, 40) * torch.exp2(torch.randint(-3, 3, (6, 5, 40)).float())
    amax = x.abs().amax([d for d in range(3) if d != dim] if dim >= 0 else (0, 1, 2), True)
    step = torch.exp2(torch.floor(torch.log2(amax.double())) + 2 - wl)
    most = 2 ** (wl - 1) - 1
    expected = (away(x.double() / step).clamp(-most, most) * step).float()
    assert torch.equal(quant.block_quantize(x, wl, dim, "nearest"), expected)


NUMBERS = [FloatingPoint(4, 3), FixedPoint(6, 3), FixedPoint(6, 3, clamp=False), BlockFloatingPoint(5), BlockFloatingPoint(5, 0)]


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_stochastic_rounding_is_the_default(number):
    x = torch.rand(40, 50) * 3
    quantize = quant.quantizer(number)
    torch.manual_seed(1)
    got = quantize(x)
    torch.manual_seed(1)
    assert torch.equal(got, quantize(x))
    assert not torch.equal(got, quantize(x))
    nearest = quant.quantizer(number, forward_rounding="nearest")(x)
    assert not torch.equal(got, nearest)
    assert (got - x).mean().abs() < 5 * 0.5 * (got - x).abs().max() / 2000**0.5 + 1e-3


@pytest.mark.parametrize("number", NUMBERS, ids=str)
def test_gradients_pass_everywhere(number):
    """Also where a value is clamped: a learner of qtorch sees that."""
    x, weight = (torch.randn(30, 4) * 300).requires_grad_(), torch.randn(30, 4)
    (quant.quantizer(number, forward_rounding="nearest")(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)
    if isinstance(number, FloatingPoint):
        x.grad = None
        quant.float_quantize(x, 4, 3).backward(weight)
        assert torch.equal(x.grad, weight)


def test_clamping_grad_zero():
    x, weight = torch.tensor([-9.0, -8.2, -8.3, 0.3, 7.6, 7.8, 9.0], requires_grad=True), torch.full((7,), 1.3)
    quantize = quant.quantizer(FixedPoint(5, 1), FixedPoint(6, 2), "nearest", "nearest", clamping_grad_zero=True)
    y = quantize(x)
    assert y.tolist() == [-8.0, -8.0, -8.0, 0.5, 7.5, 7.5, 7.5]
    y.backward(weight)
    assert x.grad.tolist() == [0.0, 1.25, 0.0, 1.25, 1.25, 0.0, 0.0]  # what rounds into the range is not clamped
    assert quant.quantizer(None, None, clamping_grad_zero=True)(x) is x


def test_backward_hooks():
    x = torch.randn(20, requires_grad=True)
    calls = []
    hooks = [lambda grad: calls.append("double") or grad * 2, lambda grad: calls.append("add") or grad + 0.25]
    for number in (None, FixedPoint(6, 3)):
        quantize = quant.quantizer(number, FixedPoint(8, 2), "nearest", "nearest", backward_hooks=hooks)
        x.grad = None
        quantize(x).backward(torch.full((20,), 0.6))
        assert calls == ["double", "add"]
        assert x.grad.unique().tolist() == [1.5]  # 1.45 on steps of a quarter
        calls.clear()
    (x * 0.6).sum().backward()
    assert not calls  # the hooks are not x's
    with torch.no_grad():
        assert torch.equal(quantize(x), quant.fixed_point_quantize(x, 6, 3, rounding="nearest"))


def test_module():
    module = quant.Quantizer(FloatingPoint(4, 3), FloatingPoint(5, 2), "nearest", "nearest")
    x = values()
    assert torch.equal(module(x), floating(x, 4, 3))
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    assert torch.equal(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))


def test_numbers_print_and_compare_as_the_original_does():
    assert str(FloatingPoint(exp=5, man=2)) == repr(FloatingPoint(5, 2)) == "FloatingPoint (exponent=5, mantissa=2)"
    assert str(FixedPoint(wl=8, fl=4)) == "FixedPoint (wl=8, fl=4)"
    assert str(BlockFloatingPoint(wl=8)) == "BlockFloatingPoint (wl=8, dim=-1)"
    assert qtorch.FloatingPointNumber is FloatingPoint
    assert all(isinstance(number, qtorch.Number) for number in NUMBERS)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: FloatingPoint(9, 3), ValueError, r"FloatingPoint: expected 1 <= exp <= 8, got 9"),
        (lambda: FloatingPoint(4, 0), ValueError, r"FloatingPoint: expected 1 <= man <= 23, got 0"),
        (lambda: FixedPoint(8, 0), ValueError, r"FixedPoint: expected 1 <= fl <= 126, got 0"),
        (lambda: FixedPoint(0, 4), ValueError, r"FixedPoint: expected 2 <= wl <= 24, got 0"),
        (lambda: FixedPoint(8, 4, symmetric=1), ValueError, r"FixedPoint: expected symmetric to be True or False, got 1"),
        (lambda: BlockFloatingPoint(8, -2), ValueError, r"BlockFloatingPoint: expected -1 <= dim, got -2"),
        (lambda: quant.quantizer("E4M3"), ValueError, r"quantizer: expected forward_number to be a number of .*, got 'E4M3'"),
        (
            lambda: quant.quantizer(FixedPoint(8, 4), forward_num=FixedPoint(8, 4)),
            TypeError,
            r"quantizer: expected forward_number or forward_num, got both",
        ),
        (
            lambda: quant.quantizer(None, None, "nearest", "up"),
            ValueError,
            r"quantizer: expected rounding to be 'nearest' or 'stochastic', got 'up'",
        ),
        (
            lambda: quant.float_quantize(torch.ones(2), 4, 3, "even"),
            ValueError,
            r"float_quantize: expected rounding to be 'nearest' or 'stochastic', got 'even'",
        ),
        (
            lambda: quant.quantizer(FloatingPoint(4, 3), clamping_grad_zero=True),
            ValueError,
            r"quantizer: expected a clamped FixedPoint with clamping_grad_zero, got FloatingPoint \(exponent=4, mantissa=3\)",
        ),
        (
            lambda: quant.quantizer(FixedPoint(8, 4, clamp=False), clamping_grad_zero=True),
            ValueError,
            r"quantizer: expected a clamped FixedPoint with clamping_grad_zero, got FixedPoint \(wl=8, fl=4\)",
        ),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=rf"^quant_ops\.{message}$"):
        call()
