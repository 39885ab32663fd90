"""Observers with floating formats: the chosen scales against formulas and brute force, with ml_dtypes' casts as the grid."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch

import quant_ops as qo
from quant_ops.observers import Observer

KINDS = sorted(kind for kind, observer in Observer.kinds.items() if observer.takes_format)
FORMATS = {
    "E2M1": (qo.E2M1, ml_dtypes.float4_e2m1fn),
    "E3M2": (qo.E3M2, ml_dtypes.float6_e3m2fn),
    "E4M3": (qo.E4M3, ml_dtypes.float8_e4m3fn),
}
SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def drawn(kind, n=20000):
    g = np.random.default_rng(len(kind))
    values = {
        "heavy": lambda: g.standard_t(3, n),
        "laplace": lambda: g.laplace(size=n),
        "normal": lambda: g.normal(size=n),
        "relu": lambda: np.maximum(g.normal(size=n), 0),
        "outlier": lambda: np.append(g.normal(size=n), 60),
        "uniform": lambda: g.uniform(-1, 3, n),
    }[kind]()
    return torch.tensor(values, dtype=torch.float32)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


def observed(kind, batches, format, **settings):
    observer = Observer.kinds[kind](format=format, **settings)
    for batch in batches:
        observer(batch)
    return observer


def squared_error(x, scale, dtype):
    """In float64: what ml_dtypes' cast makes of x / scale, clipped to the finite values."""
    x = x.double().numpy()
    largest = float(ml_dtypes.finfo(dtype).max)
    values = np.clip(x / float(scale), -largest, largest).astype(dtype).astype(np.float64) * float(scale)
    return float(np.square(values - x).sum())


def decibels(ratio):
    return 10 * np.log10(ratio)


# ---- what each observer chooses ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_minmax_and_ema(name):
    format, _ = FORMATS[name]
    batches = list(drawn("heavy").split(4000))
    observer = observed("minmax", batches, format)
    amax = torch.cat(batches).abs().amax()
    assert torch.equal(observer.amax(), amax)
    scale, zero_point = observer.qparams()
    assert torch.equal(scale, amax / torch.tensor(format.largest))
    assert (scale.dtype, zero_point.dtype, int(zero_point)) == (torch.float32, torch.int32, 0)
    assert torch.equal(observed("ema", batches, format).amax(), observed("ema", batches, None).amax())


@pytest.mark.parametrize("percentile", [100.0, 99.9, 90.0])
@pytest.mark.parametrize("name", FORMATS)
def test_percentile(name, percentile):
    """The range is that of integers; the scale belongs to the format."""
    format, x = FORMATS[name][0], drawn("heavy")
    expected = observed("percentile", [x], None, percentile=percentile)
    observer = observed("percentile", [x], format, percentile=percentile)
    assert torch.equal(observer.amax(), expected.amax())
    assert torch.equal(observer.qparams()[0], expected.amax() / torch.tensor(format.largest))


@pytest.mark.sampled(10)
@pytest.mark.parametrize("data", ["heavy", "laplace", "normal", "relu", "outlier", "uniform"])
@pytest.mark.parametrize("name", FORMATS)
def test_mse_and_histogram_find_the_least_error(name, data):
    """Against 600 scales tried on the data themselves, wider than the data and narrower; the closed form assumes even data."""
    (format, dtype), x = FORMATS[name], drawn(data)
    amax = float(x.abs().max())
    best = min(squared_error(x, amax * r / format.largest, dtype) for r in np.geomspace(1 / 32 if name == "E2M1" else 0.5, 2, 600))
    for kind, allowed in (("mse", 1.02), ("histogram", 1.25)):
        observer = observed(kind, x.split(4000), format)
        assert squared_error(x, observer.qparams()[0], dtype) <= allowed * best, kind
        assert float(observer.amax()) == pytest.approx(float(observer.qparams()[0]) * format.largest, rel=1e-6)


@pytest.mark.parametrize("kind", ["entropy", "histogram", "mse"])
def test_a_format_that_does_not_saturate_clips_nothing(kind):
    x = torch.cat([torch.randn(5000), torch.tensor([1000.0])])
    observer = observed(kind, [x], qo.FP16)
    assert qo.FP16.simulate(x, observer.qparams()[0]).isfinite().all()


def test_mse_of_a_few_values():
    """Widening by a third puts both values on the grid."""
    x = torch.tensor([1.0, 0.75] * 50)
    scale, _ = observed("mse", [x], qo.E2M1).qparams()
    assert squared_error(x, scale, ml_dtypes.float4_e2m1fn) <= 2e-6 * float(x.square().sum())
    assert float(observed("mse", [x], qo.E2M1).amax()) == pytest.approx(1.5, rel=1e-3)


def test_entropy():
    """For four bits it clips tails; it keeps the range of Gaussian data, or nearly."""
    for data, gain in (("heavy", 4), ("laplace", 0.5), ("outlier", 4), ("normal", -0.2), ("uniform", -0.1)):
        x = drawn(data)
        found, whole = (
            squared_error(x, observed(kind, [x], qo.E2M1).qparams()[0], ml_dtypes.float4_e2m1fn) for kind in ("entropy", "minmax")
        )
        assert decibels(whole / found) >= gain, data


@pytest.mark.parametrize("name", FORMATS)
def test_entropy_loses_less_than_it_may(name):
    """Never 6 dB against the whole range, and next to nothing for Gaussian data."""
    format, dtype = FORMATS[name]
    for data in ("heavy", "laplace", "normal", "relu", "outlier", "uniform"):
        x = drawn(data)
        found, whole = (squared_error(x, observed(kind, [x], format).qparams()[0], dtype) for kind in ("entropy", "minmax"))
        assert decibels(found / whole) <= (0.3 if data == "normal" else 6), data


@pytest.mark.parametrize("kind", ["minmax", "ema", "percentile", "mse"])
def test_an_integer_format_is_the_integer_observer(kind):
    """But for the finer steps of a format's search."""
    x = drawn("heavy")
    codes = Observer.kinds[kind](qmin=-7, qmax=7)
    codes(x)
    scale, expected = observed(kind, [x], qo.INT4).qparams()[0], codes.qparams()[0]
    torch.testing.assert_close(scale, expected, rtol=0.03 if kind == "mse" else 0, atol=0)


# ---- rows ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", [qo.E2M1, qo.E4M3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_each_channel_is_as_if_alone(kind, format):
    x = drawn("heavy", 4 * 600).reshape(3, 4, 200) * torch.arange(1, 5).reshape(1, 4, 1)
    observer = observed(kind, [x, 2 * x], format, axis=1)
    (scale, zero_point), amax = observer.qparams(), observer.amax()
    assert scale.shape == zero_point.shape == amax.shape == (1, 4, 1)
    for channel in range(4):
        alone = observed(kind, [x[:, channel], 2 * x[:, channel]], format)
        assert torch.equal(scale[0, channel, 0], alone.qparams()[0])
        assert torch.equal(amax[0, channel, 0], alone.amax())


@pytest.mark.parametrize("axis", [None, 0])
@pytest.mark.parametrize("kind", KINDS)
def test_each_block_is_as_if_alone(kind, axis):
    x = drawn("heavy", 2 * 600).reshape(2, 600) * torch.arange(1, 601)
    scale, _ = observed(kind, [x], qo.E2M1, axis=axis, group_size=200).qparams()
    rows = 1 if axis is None else 2
    assert scale.shape == (rows, 3)
    for row in range(rows):
        for block in range(3):
            part = (x if axis is None else x[row])[..., 200 * block : 200 * block + 200]
            assert torch.equal(scale[row, block], observed(kind, [part], qo.E2M1).qparams()[0])


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_every_step_is_as_if_alone(kind, axis):
    batches = [torch.randn(60, 4) * (i + 1) for i in range(4)]
    observer = Observer.kinds[kind](format=qo.E3M2, axis=axis, num_steps=3)
    for i, batch in enumerate(batches):
        observer(batch, torch.tensor(i % 2))
    scale, amax = observer.qparams()[0], observer.amax()
    for step in range(2):
        alone = observed(kind, batches[step::2], qo.E3M2, axis=axis)
        assert torch.equal(scale[step], alone.qparams()[0])
        assert torch.equal(amax[step], alone.amax())
    assert torch.equal(amax[2], torch.maximum(amax[0], amax[1]))  # never seen


# ---- merging and saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "ema"])
def test_merged_is_as_if_one_had_seen_all(kind, axis):
    batches = [torch.randn(60, 4) * 3.0**i for i in range(4)]
    merged = observed(kind, batches[:1], qo.E2M1, axis=axis).merge_(observed(kind, batches[1:], qo.E2M1, axis=axis))
    assert torch.equal(merged.qparams()[0], observed(kind, batches, qo.E2M1, axis=axis).qparams()[0])


def test_merging_needs_the_same_format():
    one = observed("minmax", [torch.ones(3)], qo.E2M1)
    assert one.merge_(copy.deepcopy(one)).count == 2
    for other in (qo.E4M3, None):
        with pytest.raises(ValueError, match=r"expected an observer of the same settings to merge, got MinMax\(format=E2M1\)"):
            one.merge_(observed("minmax", [torch.ones(3)], other))


@pytest.mark.parametrize("axis", [None, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_continued(kind, axis):
    """The statistics are those of integer observers: one calibration serves any format."""
    batches = [torch.randn(60, 4) * 3.0**i for i in range(4)]
    for before in (qo.E2M1, None):
        resumed = Observer.kinds[kind](format=qo.E2M1, axis=axis)
        resumed.load_state_dict(observed(kind, batches[:2], before, axis=axis).state_dict())
        for batch in batches[2:]:
            resumed(batch)
        assert torch.equal(resumed.qparams()[0], observed(kind, batches, qo.E2M1, axis=axis).qparams()[0])


def test_its_text_names_the_format():
    assert str(Observer.kinds["mse"](format=qo.E2M1, axis=0)) == "MSE(format=E2M1, axis=0)"


@pytest.mark.cuda
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_gpu(kind):
    batches = [torch.randn(3, 50, 7) * 3.0**i for i in range(4)]
    observer = observed(kind, [batch.cuda() for batch in batches], qo.E4M3, device="cuda")
    torch.testing.assert_close(observer.amax().cpu(), observed(kind, batches, qo.E4M3).amax(), rtol=1e-5, atol=0)


# ---- edge cases and bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_zeros_and_the_ends_of_float32(kind):
    assert float(observed(kind, [torch.zeros(10)], qo.E4M3).qparams()[0]) == 1
    assert float(observed(kind, [torch.zeros(10)], qo.E4M3).amax()) == 0
    assert float(observed(kind, [torch.full((10,), 1e-41)], qo.E4M3).qparams()[0]) == SMALLEST_NORMAL
    top = torch.finfo(torch.float32).max
    for data in ([-top, top, 1.0], [-top, 0.0, 1.0], [0.7 * top, -0.7 * top, 3.0]):
        observer = observed(kind, [torch.tensor(data)], qo.E4M3)
        assert 0 < float(observer.qparams()[0]) < float("inf")
        assert qo.E4M3.simulate(torch.tensor(data), observer.qparams()[0]).isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", KINDS)
def test_batches_that_are_not_finite_are_left_out(kind, bad):
    x = torch.randn(100)
    observer = observed(kind, [torch.tensor([1e3, bad]), x], qo.E2M1)
    assert observer.batches_left_out == 1
    assert torch.equal(observer.qparams()[0], observed(kind, [x], qo.E2M1).qparams()[0])
    alone = observed(kind, [torch.tensor([1e3, bad])], qo.E2M1)
    if kind == "minmax":
        assert alone.live_qparams()[0].isnan()
    with pytest.raises(ValueError, match=rf"expected data before amax, got batches with NaN or Inf alone in the {kind} observer"):
        alone.amax()


class Unscaled:
    """A format of blocks: it has scales of its own."""

    largest = 6.0

    def simulate(self, x, scale, seed=None):
        raise ValueError("no")

    def __str__(self):
        return "MXFP4"


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("mse", {"qmax": 7}, "expected codes from qmin to qmax or a format, which is symmetric, got qmin or qmax with E2M1"),
        ("mse", {"qmin": -8, "qmax": 7}, "expected codes from qmin to qmax or a format"),
        ("minmax", {"asymmetric": True}, "expected codes from .* or a format, which is symmetric, got asymmetric=True with E2M1"),
        ("lsq", {}, "expected an observer with a rule for formats, such as mse, got lsq with E2M1"),
        ("mse", {"format": Unscaled()}, "expected a format with one scale for all values, got MXFP4"),
        ("mse", {"format": "E2M1"}, "expected a format with one scale for all values, got E2M1"),
    ],
)
def test_refused(kind, settings, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.observers: {message}"):
        Observer.kinds[kind](**{"format": qo.E2M1, **settings})


def test_an_asymmetric_range_has_no_amax():
    with pytest.raises(
        ValueError, match=r"^quant_ops\.observers: expected a symmetric range, which has an amax, got asymmetric=True"
    ):
        observed("minmax", [torch.ones(3)], None, asymmetric=True).amax()
