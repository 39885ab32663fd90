"""Configs: what they refuse, and their JSON."""

import json

import pytest

import quant_ops as qo
from quant_ops.observers import Observer

KINDS = sorted(Observer.kinds)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"observer": "mean"}, r"expected observer to be one of \['ema', .*\], got 'mean'"),
        ({"weight_observer": None}, r"expected weight_observer to be one of \[.*\], got None"),
        ({"num_steps": 0}, "expected 1 <= num_steps, got 0"),
        ({"num_steps": 2.0}, r"expected 1 <= num_steps, got 2\.0"),
        ({"weight_bits": 9}, "expected 2 <= weight_bits <= 8, got 9"),
        ({"percentile": 50}, "expected 50 < percentile <= 100, got 50"),
        ({"momentum": 0}, "expected 0 < momentum <= 1, got 0"),
    ],
)
def test_wrong_configs(settings, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.Int8Static: {message}$"):
        qo.Int8Static(**settings)


@pytest.mark.parametrize("settings", [{}, {"observer": "percentile", "percentile": 99.5, "num_steps": 4, "weight_bits": 4}])
def test_config_json_round_trip(settings):
    config = qo.Int8Static(**settings)
    assert qo.config_from_json(config.to_json()) == config
    assert hash(qo.config_from_json(config.to_json())) == hash(config)


@pytest.mark.parametrize("kind", [qo.Int8Dynamic, qo.Int8Static])
def test_activations_have_a_zero_point_by_default(kind):
    """A config written when they had none says so, and keeps its meaning."""
    assert kind().asymmetric
    before = json.dumps({"config": kind.__name__, "asymmetric": False, "weight_bits": 8, "weight_observer": "minmax"})
    assert qo.config_from_json(before) == kind(asymmetric=False)
