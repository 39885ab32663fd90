"""Number formats: stochastic rounding, straight-through gradients, and gradients with a format of their own."""

import math

import pytest
import torch
from number_formats import E3M4, FORMATS, SCALED, SCALED_E4M3, same

import quant_ops as qo


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


# ---- stochastic rounding ------------------------------------------------------------------------------------------------------

STOCHASTIC = [
    qo.E4M3,
    SCALED_E4M3,
    qo.INT8,
    qo.IntFormat(8, narrow=False),
    qo.FixedPoint(8, 4),
    qo.FixedPoint(8, 4, clamp=False),
    qo.BlockFloat(8),
    qo.BlockFloat(8, axis=1),
    qo.MXFP4,
    qo.NVFP4_TWO_LEVEL,
    qo.ABFP(8),
]


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_stochastic_rounding_takes_a_seed(format):
    x = torch.randn(50, 64)
    down, random = format.with_(rounding="toward_zero")(x), format.with_(rounding="stochastic")
    first = random(x, seed=5)
    assert same(first, random(x, seed=torch.tensor([5])))
    assert not same(first, random(x, seed=6))
    assert same(first, random(x.T.contiguous().T, seed=5))
    assert (first.abs() >= down.abs()).all()
    torch.manual_seed(3)
    drawn = random(x)
    assert not same(drawn, random(x))
    torch.manual_seed(3)
    assert same(drawn, random(x))
    generator = torch.Generator().manual_seed(9)
    drawn = random(x, generator=generator)
    assert same(drawn, random(x, generator=generator.manual_seed(9)))
    assert random.is_stochastic
    assert not format.is_stochastic
    assert same(format(x, seed=5), format(x))  # others do not look at it


@pytest.mark.parametrize("format", STOCHASTIC, ids=str)
def test_stochastic_rounding_is_right_on_average(format):
    """The mean is within 5 standard errors; a rounding error has at most half a step of deviation."""
    x = torch.full((64, 64), 0.3371)
    x[:, ::8] = x[0] = 1.0  # the largest of every block, so that no other is clipped
    got = format.with_(rounding="stochastic")(x, seed=1)[1:].unflatten(1, (8, 8))[..., 1:]
    steps = got.unique()
    assert 1 <= len(steps) <= 2
    step = float(steps[-1] - steps[0])
    assert steps[0] <= 0.3371 <= steps[-1]
    assert abs(got.mean().item() - 0.3371) <= 5 * 0.5 * step / got.numel() ** 0.5 + 1e-6


# ---- gradients ----------------------------------------------------------------------------------------------------------------


def gradient(format, x, weight, **kwargs):
    x = x.detach().requires_grad_()
    (format(x, **kwargs) * weight).sum().backward()
    return x.grad


@pytest.mark.parametrize(
    "format",
    [
        qo.E4M3,
        qo.E2M1,
        qo.E5M2.with_(saturate=False),
        qo.FixedPoint(4, 1),
        qo.FixedPoint(4, 1, rounding="nearest_away"),
        qo.FixedPoint(4, 1, clamp=False),
    ],
    ids=str,
)
def test_gradients_pass_within_the_range(format):
    x, weight = torch.randn(200) * 6, torch.randn(200)
    x[:4] = torch.tensor([math.nan, 1e9, -1e9, 0.0])
    low = -4.0 if isinstance(format, qo.FixedPoint) and format.clamp else -format.largest
    margin = 0.25 if isinstance(format, qo.FixedPoint) else 0  # integers: the rounded value is in range
    inside = (x >= low - margin) & (x <= format.largest + margin)
    got = gradient(format, x, weight)
    if isinstance(format, qo.FixedPoint) and not format.clamp:
        inside |= x.abs() >= 0
    assert torch.equal(got[1:], torch.where(inside, weight, 0.0)[1:])


@pytest.mark.parametrize("format", SCALED, ids=str)
def test_gradients_with_a_static_scale(format):
    x, weight = torch.randn(300) * 2, torch.randn(300)
    got = gradient(format, x, weight, amax=1.5)
    clear = (x.abs() - 1.5).abs() > 2 * 1.5 / format.largest  # two steps around the ends of the range are left out
    assert torch.equal(got[clear], torch.where(x.abs() < 1.5, weight, 0.0)[clear])
    assert torch.equal(gradient(format, x, weight), weight)  # from the data: nothing is clipped


@pytest.mark.parametrize("format", [qo.MXFP8_E4M3, qo.MXFP4.with_(scale_rule="round_up"), qo.NVFP4_TWO_LEVEL, qo.ABFP(8, 16)])
def test_gradients_of_blocks(format):
    x, weight = torch.randn(8, 64), torch.randn(8, 64)
    got = gradient(format, x, weight)
    kept = got == weight
    assert (kept | (got == 0)).all()
    size = getattr(format, "block_size", 16)
    clipped = x.abs().unflatten(1, (-1, size))
    clipped = (clipped == clipped.amax(-1, True)).flatten(1)
    assert kept[~clipped].float().mean() > 0.97


def test_learned_amax_of_integers():
    """LSQ: the gradient of the scale, divided by the largest code, against float64."""
    x, weight, amax = torch.randn(4, 50), torch.randn(4, 50), torch.tensor([1.0, 1.5, 2.0, 4.0], requires_grad=True)
    (qo.INT4(x, amax=amax, axis=0) * weight).sum().backward()
    steps = x.double() / (amax.detach().double()[:, None] / 7)
    codes = steps.round()
    factor = torch.where(codes.abs() <= 7, codes - steps, codes.clamp(-7, 7))
    torch.testing.assert_close(amax.grad, ((weight * factor).sum(1) / 7).float())


# ---- gradients with a format of their own -------------------------------------------------------------------------------------


def test_gradient_format():
    x, weight = torch.randn(100) * 10, torch.randn(100)
    format = qo.with_gradient(E3M4, qo.E5M2)
    assert same(format(x), E3M4(x))
    expected = torch.where(x.abs() <= E3M4.largest, qo.E5M2(weight), 0.0)
    assert torch.equal(gradient(format, x, weight), expected)
    assert torch.equal(gradient(qo.with_gradient(E3M4, qo.E5M2, everywhere=True), x, weight), qo.E5M2(weight))
    assert torch.equal(gradient(qo.with_gradient(E3M4, None, everywhere=True), x, weight), weight)
    assert torch.equal(gradient(qo.with_gradient(E3M4, None), x, weight), gradient(E3M4, x, weight))
    assert torch.equal(gradient(qo.with_gradient(None, qo.E5M2), x, weight), qo.E5M2(weight))
    assert torch.equal(qo.with_gradient(None, qo.E5M2)(x), x)
    assert torch.equal(gradient(qo.with_gradient(None, qo.MXFP4), x, weight), qo.MXFP4(weight))


def test_gradient_format_with_scales():
    x, weight = torch.randn(6, 8), torch.randn(6, 8)
    format = qo.with_gradient(qo.INT8, qo.INT4)
    assert format.takes_amax
    assert same(format(x, axis=0), qo.INT8(x, axis=0))
    assert same(format.simulate(x, torch.tensor(0.01)), qo.INT8.simulate(x, torch.tensor(0.01)))
    assert torch.equal(gradient(format, x, weight), qo.INT4(weight))  # a scale for the whole gradient, from its data


def test_stochastic_gradient_format():
    x, weight = torch.zeros(1000), torch.full((1000,), 1.1)
    format = qo.with_gradient(E3M4, qo.E5M2.with_(rounding="stochastic"))
    assert format.is_stochastic
    first = gradient(format, x, weight, seed=4)
    assert set(first.tolist()) == {1.0, 1.25}
    assert torch.equal(first, gradient(format, x, weight, seed=4))
    assert torch.equal(first, gradient(format, x, weight, seed=torch.tensor([4])))
    assert not torch.equal(first, gradient(format, x, weight, seed=5))
    assert first.mean().item() == pytest.approx(1.1, abs=5 * 0.125 / 1000**0.5)
    generator = torch.Generator().manual_seed(1)
    drawn = gradient(format, x, weight, generator=generator)
    assert torch.equal(drawn, gradient(format, x, weight, generator=generator.manual_seed(1)))
    torch.manual_seed(8)
    y = format(leaf := x.clone().requires_grad_())
    y.backward(weight, retain_graph=True)
    once, leaf.grad = leaf.grad, None
    y.backward(weight)
    assert torch.equal(once, leaf.grad)  # a backward pass that is run twice
    both = qo.with_gradient(E3M4.with_(rounding="stochastic"), qo.E5M2.with_(rounding="stochastic"))
    assert same(both(weight, seed=4), both.forward(weight, seed=4))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    "format",
    [
        *(qo.with_gradient(inner, qo.E5M2) for inner in (E3M4, qo.INT8, qo.MXFP4, None)),
        qo.with_gradient(E3M4, qo.E5M2, everywhere=True),
        qo.with_gradient(E3M4.with_(rounding="stochastic"), qo.E5M2.with_(rounding="stochastic")),
    ],
    ids=str,
)
def test_gradient_format_under_transforms(format):
    x, weight = torch.randn(4, 32), torch.randn(4, 32)

    def loss(x):
        return (format(x, seed=3) * weight).sum()

    expected = gradient(format, x, weight, seed=3)
    assert torch.equal(torch.func.grad(loss)(x), expected)
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    leaf = x.clone().requires_grad_()
    compiled(leaf).backward()
    assert torch.equal(leaf.grad, expected)
    if not format.is_stochastic:
        rows = torch.vmap(torch.func.grad(lambda x, weight: (format(x) * weight).sum()))(x, weight)
        loop = [gradient(format, *row) for row in zip(x, weight, strict=True)]
        assert torch.equal(rows, torch.stack(loop))


@pytest.mark.parametrize("everywhere", [False, True])
def test_results_may_be_changed_in_place(everywhere):
    """As by nn.ReLU(inplace=True) after a quantizer."""
    x, weight = torch.randn(50) * 10, torch.randn(50)
    format = qo.with_gradient(E3M4, qo.E5M2, everywhere=everywhere)

    def loss(x):
        return (format(x).relu_() * weight).sum()

    for run in (loss, torch.compile(loss, fullgraph=True, backend="eager")):
        leaf = x.clone().requires_grad_()
        run(leaf).backward()
        inside = (E3M4(x) > 0) & (everywhere | (x.abs() <= E3M4.largest))
        assert torch.equal(leaf.grad, torch.where(inside, qo.E5M2(weight), 0.0))
        assert torch.equal(leaf, x)
    with torch.no_grad():
        assert torch.equal(format(x).relu_(), E3M4(x).relu())


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_formats_compile(format):
    x = torch.randn(3, 33)
    torch._dynamo.reset()
    compiled = torch.compile(format.__call__, fullgraph=True, backend="eager")
    assert same(compiled(x), format(x))


@pytest.mark.parametrize("format", [qo.E4M3, SCALED_E4M3, qo.INT8, qo.MXFP4, qo.BlockFloat(8)], ids=str)
def test_func_grad(format):
    x, weight = torch.randn(4, 32), torch.randn(4, 32)
    got = torch.func.grad(lambda x: (format(x) * weight).sum())(x)
    assert torch.equal(got, gradient(format, x, weight))
