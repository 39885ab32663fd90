"""What quantization costs a small trained language model, and what GPTQ saves of it: perplexity on text that is held back.

The figures in the comments are those of one training; another Python has another manual, so the bounds leave room.
"""

import functools

import pytest
from language_model import calibration, original, perplexity, trained
from torch import nn

import quant_ops as qo

ROWS = qo.Int4WeightOnly(-1, asymmetric=False)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


@functools.cache
def of_float():
    return perplexity(original())  # 4.60


def rounded(config):
    model = trained()
    qo.quantize_(model, config, exclude=[nn.Embedding] if isinstance(config, qo.Int4WeightOnly) else [])
    return perplexity(model)


def by_gptq(config, **arguments):
    model = trained()
    result = qo.gptq_(model, calibration(2), config, **arguments)
    assert all(gptq < nearest for gptq, nearest in result.errors.values())
    assert len(result.errors) == 22
    return perplexity(model)


def test_int8_costs_nothing():
    assert perplexity(trained()) == of_float() < 6
    assert rounded(qo.Int8Dynamic()) < 1.005 * of_float()
    assert rounded(qo.Int8WeightOnly()) < 1.005 * of_float()


@pytest.mark.parametrize(
    ("config", "share"),
    [
        (ROWS, 0.5),  # 4.645, by GPTQ 4.608 with twice the calibration text: 85 %
        (qo.Int8DynamicInt4Weight(-1), 0.5),  # 4.645, 4.610: 82 %
        (qo.Int8Dynamic(weight_bits=3), 0.4),  # 4.813, 4.670: 68 %
    ],
    ids=["int4", "W4A8", "3 bits"],
)
def test_gptq_saves_most_of_what_rounding_costs(config, share):
    cost = rounded(config) - of_float()
    assert cost > 0.003 * of_float()
    assert by_gptq(config) - of_float() < (1 - share) * cost


@pytest.mark.parametrize("arguments", [{"order": "layers"}, {"order": "together"}, {"act_order": True}], ids=str)
def test_the_other_ways_save_as_well(arguments):
    assert by_gptq(ROWS, **arguments) - of_float() < 0.5 * (rounded(ROWS) - of_float())
