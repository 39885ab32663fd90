"""Observers against numpy and brute force: ranges, exact histograms, merging, steps, saving, and what they refuse."""

import io

import numpy as np
import pytest
import torch
from scipy import stats
from torch.utils._python_dispatch import TorchDispatchMode

import quant_ops as qo
from quant_ops.observers import Observer, histogram

KINDS = sorted(Observer.kinds)
DISTRIBUTIONS = ["entropy", "histogram", "mse", "percentile"]
H = histogram._HALF


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


def observed(kind, batches, **settings):
    observer = Observer.kinds[kind](**settings)
    for batch in batches:
        observer(batch)
    return observer


def heavy(n=20000, seed=0):
    """Student's t with three degrees of freedom: a few values far out."""
    return torch.tensor(np.random.default_rng(seed).standard_t(3, n), dtype=torch.float32)


def squared_error(x, scale, zero_point, qmin, qmax):
    """In float64, from the formula of the contract."""
    x = x.double()
    q = ((x / scale).round() + zero_point).clamp(qmin, qmax)
    return float(((q - zero_point) * scale - x).square().sum())


def test_all_are_there():
    assert set(KINDS) == {"minmax", "ema", "percentile", "mse", "entropy", "histogram", "lsq"}


# ---- minmax: what choose_qparams finds in all the data -------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 0, 1, -1])
def test_minmax_is_the_range_of_all_batches(axis, asymmetric):
    batches = [torch.randn(4, 6, 5) + 0.3 * i for i in range(3)]
    scale, zero_point = observed("minmax", batches, axis=axis, asymmetric=asymmetric).qparams()
    dims = [] if axis is None else [d for d in range(3) if d != axis % 3]
    stacked = torch.cat(batches, 0) if axis != 0 else torch.cat(batches, 1)
    expected_scale, expected_zero_point = qo.choose_qparams(stacked, dims, -128, 127, asymmetric)
    shape = () if axis is None else expected_scale.shape
    assert torch.equal(scale, expected_scale.reshape(shape))
    assert torch.equal(zero_point, expected_zero_point.reshape(shape))


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_groups(kind, axis):
    """Every group is as if it were observed alone, and the scales fit quant_tensor_forward's blocks."""
    x = torch.randn(4, 12) * torch.arange(1, 13)
    scale, zero_point = observed(kind, [x], axis=axis, group_size=3, asymmetric=True).qparams()
    rows = 4 if axis == 0 else 1
    assert scale.shape == zero_point.shape == (rows, 4)
    for row in range(rows):
        for group in range(4):
            part = x[row : row + 1] if axis == 0 else x
            one, zero = observed(kind, [part[:, 3 * group : 3 * group + 3]], asymmetric=True).qparams()
            torch.testing.assert_close(scale[row, group], one, rtol=1e-6, atol=0)
            assert zero_point[row, group] == zero
    block_size = (4 // rows, 3)
    simulated = qo.quant_tensor_forward(x, scale, zero_point, -128, 127, True, block_size=block_size)
    assert (simulated - x).abs().max() < x.abs().max() / 10


@pytest.mark.parametrize("kind", KINDS)
def test_per_channel_is_each_channel_alone(kind):
    x = torch.randn(2, 5, 7, 3) * torch.arange(1, 6).reshape(1, 5, 1, 1)
    scale, _ = observed(kind, [x, 2 * x], axis=1).qparams()
    assert scale.shape == (1, 5, 1, 1)
    for c in range(5):
        alone, _ = observed(kind, [x[:, c], 2 * x[:, c]]).qparams()
        torch.testing.assert_close(scale[0, c, 0, 0], alone, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts_and_dtypes(kind):
    x = torch.randn(2, 8, 6, 4).half().float()
    expected, _ = observed(kind, [x]).qparams()
    views = [x.to(memory_format=torch.channels_last), x.permute(3, 1, 0, 2), x.expand(2, 2, 8, 6, 4)[0], x.double(), x.half()]
    for view in views:
        scale, _ = observed(kind, [view, x[:0]]).qparams()  # an empty batch changes nothing
        torch.testing.assert_close(scale, expected, rtol=1e-3 if view.dtype == torch.half else 1e-6, atol=0)
    scale, _ = observed(kind, [x.bfloat16()]).qparams()
    expected, _ = observed(kind, [x.bfloat16().float()]).qparams()
    torch.testing.assert_close(scale, expected, rtol=1e-2, atol=0)


# ---- the others, one by one ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0])
def test_ema(momentum):
    batches = [torch.randn(50) * (i + 1) for i in range(6)]
    lo, hi = float(batches[0].min()), float(batches[0].max())
    for batch in batches[1:]:
        lo += momentum * (float(batch.min()) - lo)
        hi += momentum * (float(batch.max()) - hi)
    scale, zero_point = observed("ema", batches, asymmetric=True, momentum=momentum).qparams()
    assert float(scale) == pytest.approx((hi - lo) / 255, rel=1e-5)
    assert int(zero_point) == round(-128 - lo / float(scale))


@pytest.mark.parametrize("percentile", [99.9, 99.0, 75.0])
def test_percentile(percentile):
    batches = list(heavy().split(3000))
    x = torch.cat(batches).numpy()
    width = 2.0 ** np.ceil(np.log2(np.abs(x).max())) / H
    scale, _ = observed("percentile", batches, percentile=percentile).qparams()
    top = 127 * float(scale)
    assert (np.abs(x) < top - width).mean() <= percentile / 100 <= (np.abs(x) <= top + width).mean()
    scale, zero_point = observed("percentile", batches, percentile=percentile, asymmetric=True).qparams()
    lo, hi = ((code - int(zero_point)) * float(scale) for code in (-128, 127))
    reach = width + float(scale)  # the zero point is an integer
    assert (x < hi - reach).mean() <= percentile / 100 <= (x <= hi + reach).mean()
    assert (x > lo + reach).mean() <= percentile / 100 <= (x >= lo - reach).mean()


def test_percentile_100_is_minmax():
    x = heavy()
    for asymmetric in (False, True):
        expected = observed("minmax", [x], asymmetric=asymmetric).qparams()[0]
        found = observed("percentile", [x], asymmetric=asymmetric, percentile=100).qparams()[0]
        assert float(found) == pytest.approx(float(expected), rel=2 / H)


DATA = {
    "heavy": heavy(),
    "normal": torch.tensor(np.random.default_rng(1).normal(size=20000), dtype=torch.float32),
    "relu": torch.tensor(np.random.default_rng(2).normal(size=20000), dtype=torch.float32).relu(),
    "outlier": torch.cat([torch.tensor(np.random.default_rng(3).normal(size=20000), dtype=torch.float32), torch.tensor([60.0])]),
    "uniform": torch.tensor(np.random.default_rng(4).uniform(-1, 3, 20000), dtype=torch.float32),
}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["mse", "histogram"])
def test_the_search_finds_the_least_error(kind, data, bits):
    """Against a thousand scales tried on the data themselves."""
    x, qmax = DATA[data], 2 ** (bits - 1) - 1
    scale, _ = observed(kind, x.split(4000), qmin=-qmax - 1, qmax=qmax).qparams()
    top = float(x.abs().max()) / qmax
    best = min(squared_error(x, top * r, 0, -qmax - 1, qmax) for r in np.linspace(0.001, 1, 1000))
    found = squared_error(x, float(scale), 0, -qmax - 1, qmax)
    # the closed form takes every error inside for scale^2 / 12, also those of the zeros that a ReLU makes
    assert found <= best * (1.02 if kind == "mse" else 1.25 if data == "relu" else 1.08)
    if data == "outlier" and bits == 4:
        assert found < 0.2 * squared_error(x, top, 0, -qmax - 1, qmax)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("kind", ["mse", "histogram"])
def test_the_asymmetric_search(kind, data, bits):
    x, qmin, qmax = DATA[data][-4000:], -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    scale, zero_point = observed(kind, x.split(1000), qmin=qmin, qmax=qmax, asymmetric=True).qparams()
    best = np.inf
    lowest, highest = min(0.0, float(x.min())), max(0.0, float(x.max()))
    for low in np.geomspace(0.02, 1, 25) if lowest else [1]:
        for high in np.geomspace(0.02, 1, 25):
            trial = torch.tensor([lowest * low, highest * high])
            trial_scale, trial_zero = qo.choose_qparams(trial, [], qmin, qmax, True)
            best = min(best, squared_error(x, float(trial_scale), int(trial_zero), qmin, qmax))
    found = squared_error(x, float(scale), int(zero_point), qmin, qmax)
    assert found <= best * (1.25 if data == "relu" and kind == "histogram" else 1.12)


def test_entropy_is_the_least_divergence_of_its_candidates():
    """The symmetric search against scipy's entropy on numpy's histogram, among ranges that at most double the squared error."""
    x = DATA["outlier"].abs()
    exponent = np.ceil(np.log2(float(x.max())))
    counts, _ = np.histogram(x.numpy(), H, (0, 2.0**exponent))
    counts = counts.astype(float)
    counts[0] = counts[1]
    used = int(np.floor(float(x.max()) / 2.0**exponent * H)) + 1
    divergences, errors = {}, {}
    for i in range(1, 129):
        bins = 128 + (used - 128) * i // 128
        p = counts[:bins].copy()
        p[-1] += counts[bins:].sum()
        codes = np.arange(bins) * 128 // bins
        q = np.zeros(bins)
        for code in range(128):
            occupied = (codes == code) & (counts[:bins] > 0)
            if occupied.any():
                q[occupied] = counts[:bins][codes == code].sum() / occupied.sum()
        divergences[bins] = stats.entropy(p, np.maximum(q / q.sum(), 1e-12) * 1.0)
        scale = bins * 2.0**exponent / H / 127
        errors[bins] = squared_error(x, scale, 0, -128, 127)
    allowed = [bins for bins in divergences if errors[bins] <= 2 * errors[used]]
    best = min(allowed, key=divergences.get)
    scale, _ = observed("entropy", [DATA["outlier"]]).qparams()
    assert float(scale) * 127 == pytest.approx(best * 2.0**exponent / H, rel=0.02)  # the error on bins is not that on the data
    assert float(scale) * 127 < 40  # the outlier at 60 is clipped


@pytest.mark.parametrize("sign", [1, -1])
def test_entropy_clips_an_outlier_on_either_side(sign):
    scale, zero_point = observed("entropy", [sign * DATA["outlier"]], asymmetric=True).qparams()
    lo, hi = ((code - int(zero_point)) * float(scale) for code in (-128, 127))
    assert max(-lo, hi) < 57
    assert min(-lo, hi) > 1 / 4


def draws(n=20000, seed=0):
    """Unimodal data of many shapes: around 0, away from it, one-sided, heavy-tailed; and data with few distinct values."""
    g = np.random.default_rng(seed)
    normal = g.normal(size=n)
    unimodal = {
        "normal": normal,
        "away from 0": normal * 0.3 + 5,
        "far below 0": normal * 0.1 - 9,
        "laplace": g.laplace(size=n),
        "t3": g.standard_t(3, n),
        "t2": g.standard_t(2, n),
        "cauchy": g.standard_cauchy(n),
        "lognormal": g.lognormal(size=n),
        "wide lognormal": g.lognormal(0, 2, n),
        "exponential": g.exponential(size=n),
        "gamma(0.3)": g.gamma(0.3, size=n),
        "gamma(9)": g.gamma(9, size=n),
        "skewed left": 1 - g.gamma(2, size=n),
        "beta": g.beta(2, 5, n),
        "narrow beta": g.beta(0.9, 30, n),
        "uniform": g.uniform(4, 5, n),
        "triangular": g.triangular(-1, 0.2, 4, n),
        "pareto": g.pareto(1.5, n),
        "relu": np.maximum(normal, 0),
        "sparse": normal * (g.random(n) < 0.05),
        "sigmoid": 1 / (1 + np.exp(-normal / 2 - 2)),
        "softplus": np.log1p(np.exp(normal)) + 1,
        "gelu": normal / (1 + np.exp(-1.7 * normal)),
        "few": normal[:300],
        "very few": normal[:30] + 3,
    }
    discrete = {
        "17 levels": g.integers(0, 17, n) / 16,
        "bytes": g.integers(0, 256, n) / 255,
        "normalized bytes": (g.integers(0, 256, n) / 255 - 0.485) / 0.229,
        "two levels": g.integers(0, 2, n),
        "tenths": np.round(normal * 10) / 10,
        "64ths": np.round(normal * 64) / 64,
        "poisson": g.poisson(3, n),
        "binomial": g.binomial(100, 0.5, n),
        "geometric": g.geometric(0.1, n),
    }
    return unimodal, discrete


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_entropy_loses_little_against_the_whole_range(seed, asymmetric):
    """At most 0.5 dB for discrete data, and never 6 dB for unimodal data."""
    for shapes, allowed in zip(draws(seed=seed), (6, 0.5), strict=True):
        for name, values in shapes.items():
            x = torch.tensor(values, dtype=torch.float32)
            found, whole = (
                squared_error(x, float(scale), int(zero_point), -128, 127)
                for scale, zero_point in (observed(kind, [x], asymmetric=asymmetric).qparams() for kind in ("entropy", "minmax"))
            )
            assert found <= 10 ** (allowed / 10) * whole, name


@pytest.mark.parametrize("asymmetric", [False, True])
def test_entropy_keeps_the_range_of_even_data(asymmetric):
    scale, _ = observed("entropy", [DATA["uniform"]], asymmetric=asymmetric).qparams()
    expected, _ = observed("minmax", [DATA["uniform"]], asymmetric=asymmetric).qparams()
    assert 0.9 < float(scale / expected) <= 1.001


@pytest.mark.parametrize("qmax", [127, 7, 1])
def test_lsq(qmax):
    batches = list(heavy().split(3000))
    x = torch.cat(batches).double()
    expected = min(2 * float(x.abs().mean()) / qmax**0.5, float(x.abs().max()) / qmax)
    scale, _ = observed("lsq", batches, qmin=-qmax - 1, qmax=qmax).qparams()
    assert float(scale) == pytest.approx(expected, rel=1e-6)


# ---- the histogram is exact ----------------------------------------------------------------------------------------------


def test_counts_are_those_of_one_histogram():
    """Whatever the order of the batches, and however the range has grown."""
    batches = [heavy(777, seed) * 10.0 ** (seed - 3) for seed in range(7)]
    x = torch.cat(batches).double().numpy()
    exponent = int(np.floor(np.log2(np.abs(x).max()))) + 1
    expected, _ = np.histogram(x, 2 * H, (-(2.0**exponent), 2.0**exponent))
    for order in (batches, batches[::-1], [torch.cat(batches)]):
        observer = observed("mse", order)
        assert int(observer.exponent) == exponent
        assert observer.counts[0].tolist() == expected.tolist()


@pytest.mark.parametrize("axis", [None, 0])
def test_counts_of_a_large_tensor(axis):
    """It is counted in parts."""
    x = torch.randn(3, 2 * histogram._CACHED // 3 + 1001)
    observer = observed("histogram", [x], axis=axis)
    rows = x.double().numpy() if axis == 0 else x.double().numpy().reshape(1, -1)
    for row, counts, exponent in zip(rows, observer.counts.reshape(-1, 2 * H), observer.exponent.flatten().tolist(), strict=True):
        assert counts.tolist() == np.histogram(row, 2 * H, (-(2.0**exponent), 2.0**exponent))[0].tolist()


def test_values_at_the_ends():
    """Powers of two, zeros of both signs, subnormal and huge values are counted once each."""
    x = torch.tensor([1.0, -1.0, 0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, 2.0**-130])
    observer = observed("mse", x.split(1))
    assert int(observer.counts.sum()) == len(x)
    scale, _ = observer.qparams()
    assert float(scale) == pytest.approx(3e38 / 127, rel=0.01)


# ---- merging, saving, steps ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_is_as_if_one_had_seen_all(kind, axis, asymmetric):
    batches = [torch.randn(6, 4) * 3.0**i for i in range(4)]
    one = observed(kind, batches, axis=axis, asymmetric=asymmetric)
    first = observed(kind, batches[:1], axis=axis, asymmetric=asymmetric)
    second = observed(kind, batches[1:], axis=axis, asymmetric=asymmetric)
    nothing = observed(kind, [], axis=axis, asymmetric=asymmetric)
    merged = nothing.merge_(second).merge_(first).merge_(observed(kind, [], axis=axis, asymmetric=asymmetric))
    for (name, expected), got in zip(one.state_dict().items(), merged.state_dict().values(), strict=True):
        if name.startswith("average"):  # the order is gone; the weights are the numbers of batches
            expected = (first.state_dict()[name] + 3 * second.state_dict()[name]) / 4
            torch.testing.assert_close(got, expected)
        elif name == "magnitude":
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=0)
        else:
            assert torch.equal(got, expected), name
    if kind not in ("ema", "lsq"):
        assert all(torch.equal(a, b) for a, b in zip(one.qparams(), merged.qparams(), strict=True))


def test_merging_needs_the_same_settings():
    for other in (Observer.kinds["mse"](), Observer.kinds["minmax"](qmax=7), Observer.kinds["minmax"](num_steps=2)):
        with pytest.raises(ValueError, match=r"^quant_ops\.observers: expected an observer of the same settings to merge, got"):
            Observer.kinds["minmax"]().merge_(other)
    one, other = observed("minmax", [torch.ones(2, 3)], axis=1), observed("minmax", [torch.ones(2, 4)], axis=1)
    with pytest.raises(ValueError, match=r"expected scales of shape \(1, 3\) to merge, got \(1, 4\)"):
        one.merge_(other)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_continued(kind, axis):
    batches = [torch.randn(6, 4) * 3.0**i for i in range(4)]
    file = io.BytesIO()
    torch.save(observed(kind, batches[:2], axis=axis).state_dict(), file)
    file.seek(0)
    resumed = Observer.kinds[kind](axis=axis)
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for batch in batches[2:]:
        resumed(batch)
    for expected, got in zip(observed(kind, batches, axis=axis).qparams(), resumed.qparams(), strict=True):
        assert torch.equal(expected, got)


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_has_its_own_statistics(kind, axis):
    batches = [torch.randn(6, 4) * (i + 1) for i in range(6)]
    observer = Observer.kinds[kind](axis=axis, num_steps=3)
    for i, batch in enumerate(batches):
        observer(batch, torch.tensor(i % 3))
    scale, zero_point = observer.qparams()
    assert len(scale) == len(zero_point) == 3
    for step in range(3):
        alone, _ = observed(kind, batches[step::3], axis=axis).qparams()
        assert torch.equal(scale[step], alone)


def test_a_step_without_data_takes_the_widest_range():
    observer = Observer.kinds["minmax"](num_steps=4, asymmetric=True)
    observer(torch.tensor([-1.0, 5.0]), torch.tensor(1))
    observer(torch.tensor([-3.0, 2.0]), torch.tensor(2))
    scale, zero_point = observer.qparams()
    expected = qo.choose_qparams(torch.tensor([-3.0, 5.0]), [], -128, 127, True)
    assert observer.unseen_steps() == [0, 3]
    for step in (0, 3):
        assert scale[step] == expected[0]
        assert zero_point[step] == expected[1]


def test_reset():
    observer = observed("mse", [torch.randn(9) * 100])
    observer.reset()
    assert observer.empty
    x = torch.randn(9)
    assert observer(x) is x
    assert observer.qparams()[0] == observed("mse", [x]).qparams()[0]


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_keep_their_precision(kind):
    """model.half() may come after prepare_."""
    x = heavy(500) * 1e6  # beyond float16
    observer = observed(kind, [x]).half().bfloat16()
    for (name, expected), got in zip(observed(kind, [x]).state_dict().items(), observer.state_dict().values(), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected), name


# ---- the host does not wait ----------------------------------------------------------------------------------------------


class _NoWaiting(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_no_batch_is_waited_for(kind, num_steps):
    observer = Observer.kinds[kind](num_steps=num_steps)
    step = torch.tensor(1) if num_steps > 1 else None
    with _NoWaiting():
        for i in range(3):
            observer(torch.randn(10) * 10**i, step)
    assert int(observer.count.sum()) == 3


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    batches = [torch.randn(3, 50, 7) * 3.0**i for i in range(4)]
    observer = Observer.kinds[kind](device="cuda")
    on_gpu = [batch.cuda() for batch in batches]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in on_gpu:
            observer(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = observed(kind, batches)
    assert observer.min.is_cuda
    torch.testing.assert_close(observer.qparams()[0].cpu(), expected.qparams()[0], rtol=1e-5, atol=0)
    if kind in DISTRIBUTIONS:
        assert torch.equal(observer.counts.cpu(), expected.counts)


# ---- bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_no_data(kind):
    with pytest.raises(ValueError, match=rf"^quant_ops\.observers: expected data before qparams, got none in the {kind} observer$"):
        Observer.kinds[kind]().qparams()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), "beyond float32"])
@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_not_finite_are_left_out(kind, axis, bad):
    """And counted, also when they come first, through merging and saving."""
    batches = [torch.randn(3, 5) * (i + 1) for i in range(3)]
    poisoned = batches[0].double() if bad == "beyond float32" else batches[0].clone()
    poisoned[1, 2] = 1e300 if bad == "beyond float32" else bad
    expected = observed(kind, batches, axis=axis)
    observer = observed(kind, [poisoned, batches[0], batches[1], poisoned, batches[2]], axis=axis)
    assert observer.batches_left_out == 2
    for (name, want), got in zip(expected.state_dict().items(), observer.state_dict().values(), strict=True):
        assert name == "left_out" or torch.equal(got, want), name
    other = Observer.kinds[kind](axis=axis)
    other.load_state_dict(observer.state_dict())
    assert other.merge_(observer).batches_left_out == 4
    alone = observed(kind, [poisoned], axis=axis)
    assert alone.empty
    message = rf"^quant_ops\.observers: expected data before qparams, got batches with NaN or Inf alone in the {kind} observer$"
    with pytest.raises(ValueError, match=message):
        alone.qparams()
    alone.reset()
    assert alone.batches_left_out == 0


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_from_before_batches_were_left_out(kind):
    observer = observed(kind, [torch.randn(5)])
    state = observer.state_dict()
    del state["left_out"]
    loaded = Observer.kinds[kind]()
    loaded.load_state_dict(state)
    assert torch.equal(loaded.qparams()[0], observer.qparams()[0])


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_floats(kind, asymmetric):
    """Finite data give a finite scale, and simulated values that are finite."""
    top = torch.finfo(torch.float32).max
    for data in ([-top, top, 1.0], [-top, 0.0, 1.0], [top, top, top], [0.7 * top, -0.7 * top, 3.0]):
        x = torch.tensor(data)
        observer = observed(kind, [x, torch.ones(3), -x], asymmetric=asymmetric)
        assert observer.batches_left_out == 0
        scale, zero_point = observer.qparams()
        assert 0 < float(scale) < float("inf"), data
        assert qo.quant_tensor_forward(x, scale, zero_point, -128, 127, asymmetric).isfinite().all(), data


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_zeros(kind, asymmetric):
    """Scale 1, by the rules of choose_qparams: the codes are the zero point, the values are zeros."""
    scale, zero_point = observed(kind, [torch.zeros(10)], asymmetric=asymmetric).qparams()
    expected = qo.choose_qparams(torch.zeros(10), [], -128, 127, asymmetric)
    assert (float(scale), int(zero_point)) == (float(expected[0]), int(expected[1])) == (1.0, int(zero_point))


@pytest.mark.parametrize(
    ("settings", "batches", "message"),
    [
        ({"axis": 2}, [torch.ones(2, 3)], r"expected axis in \[-2, 1\], got 2"),
        ({"group_size": 4}, [torch.ones(2, 6)], "expected group_size to divide the last dimension, and axis to be another, got"),
        (
            {"group_size": 2, "axis": 1},
            [torch.ones(2, 6)],
            "expected group_size to divide the last dimension, and axis to be another",
        ),
        ({"axis": 1}, [torch.ones(2, 3), torch.ones(2, 4)], r"expected scales of shape \(1, 3\) as before, got \(1, 4\)"),
        ({"num_steps": 2}, [torch.ones(2)], "expected a step with num_steps=2, got None"),
    ],
)
def test_errors(settings, batches, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.observers: {message}"):
        observed("minmax", batches, **settings)
