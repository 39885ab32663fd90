"""Number formats: names, JSON, copies, and the descriptions that are refused."""

import copy
import json
import pickle

import pytest
import torch
from number_formats import E3M4, FORMATS, NAMED, SCALED_E4M3, UNNAMED

import quant_ops as qo


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the tensors are small: threads would mostly wait for each other


# ---- names, JSON, refusals ----------------------------------------------------------------------------------------------------


def test_names():
    assert [str(format) for format in NAMED.values()] == list(NAMED)
    assert repr([qo.E4M3, qo.MXFP4]) == "[E4M3, MXFP4]"
    assert [str(format) for format in UNNAMED] == [
        "IntFormat(5, narrow=False, rounding='toward_zero')",
        "IntFormat(3, signed=False, rounding='nearest_away')",
        "FloatFormat(3, 4)",
        "FloatFormat(4, 3, scaled=True)",
        "FloatFormat(4, 3, bias=11, special='nan', subnormals=False, rounding='nearest_away')",
        "FixedPoint(8, 4)",
        "FixedPoint(6, -2, symmetric=True, rounding='toward_zero')",
        "FixedPoint(6, 3, clamp=False)",
        "BlockFloat(6)",
        "BlockFloat(6, axis=-1)",
        "BlockFloat(6, block_size=5, dim=0, rounding='nearest_away')",
        "MX(E3M2, block_size=7, dim=0, scale_rule='round_up', rounding='toward_zero')",
        "NVFP4Format(two_level=True, dim=0)",
        "ABFP(8)",
        "ABFP(4, block_size=8, gain=2.5, dim=0)",
    ]
    assert str(qo.with_gradient(E3M4, qo.E5M2)) == "with_gradient(FloatFormat(3, 4), E5M2)"
    assert str(qo.with_gradient(None, qo.INT8, everywhere=True)) == "with_gradient(None, INT8, everywhere=True)"
    assert str(qo.FloatFormat(4, 3, bias=7, special="nan")) == "E4M3"  # the default, written out


@pytest.mark.parametrize("format", [*FORMATS, qo.with_gradient(qo.MXFP4, qo.E5M2)], ids=str)
def test_formats_can_be_kept(format):
    for other in (
        qo.format_from_json(format.to_json()),
        pickle.loads(pickle.dumps(format)),
        copy.deepcopy(format),
        format.with_(),
        eval(repr(format), vars(qo)),
    ):
        assert other == format
        assert hash(other) == hash(format)
    assert len({format, copy.copy(format)}) == 1


def test_json():
    assert json.loads(qo.INT8.to_json()) == {
        "format": "IntFormat",
        "bits": 8,
        "narrow": True,
        "signed": True,
        "rounding": "nearest_even",
    }
    fields = {"bias": None, "special": "none", "saturate": True, "subnormals": True, "rounding": "nearest_even", "scaled": False}
    assert json.loads(qo.MXFP4.to_json()) == {
        "format": "MX",
        "element": {"format": "FloatFormat", "exponent_bits": 2, "mantissa_bits": 1, **fields},
        "block_size": 32,
        "dim": -1,
        "scale_rule": "floor",
        "rounding": "nearest_even",
    }
    assert qo.format_from_json('{"format": "FloatFormat", "exponent_bits": 4, "mantissa_bits": 3}') == qo.FloatFormat(4, 3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"quant_ops: expected the JSON of a format, got .*"),
        ("[" * 100_000, r"quant_ops: expected the JSON of a format, got .*"),
        ("[]", r"quant_ops: expected a JSON object with a format, got \[\]"),
        ('{"bits": 8}', r"quant_ops: expected a format named one of \['ABFP', .*\], got None"),
        ('{"format": "E4M3"}', r"quant_ops: expected a format named one of \['ABFP', .*\], got E4M3"),
        ('{"format": ["MX"]}', r"quant_ops: expected a format named one of \['ABFP', .*\], got \['MX'\]"),
        ('{"format": "Int8Dynamic"}', r"quant_ops: expected a format named one of \['ABFP', .*\], got Int8Dynamic"),
        (
            '{"format": "IntFormat", "bits": 8, "width": 3}',
            r"quant_ops\.IntFormat: expected fields among \['bits', .*\], got \['width'\]",
        ),
        ('{"format": "IntFormat"}', r"quant_ops\.IntFormat: expected the fields \['bits'\], got \[\]"),
        ('{"format": "IntFormat", "bits": "8"}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got 8"),
        ('{"format": "IntFormat", "bits": 8.0}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got 8\.0"),
        ('{"format": "IntFormat", "bits": {}}', r"quant_ops\.IntFormat: expected 2 <= bits <= 24, got {}"),
        ('{"format": "IntFormat", "bits": 8, "narrow": 1}', r"quant_ops\.IntFormat: expected narrow to be True or False, got 1"),
        (
            '{"format": "IntFormat", "bits": 8, "rounding": ["up"]}',
            r"quant_ops\.IntFormat: expected rounding to be one of \['nearest_away', .*\], got \['up'\]",
        ),
        ('{"format": "MX", "element": 3}', r"quant_ops\.MX: expected element to be a FloatFormat, got 3\. MXINT8's is .*"),
        (
            '{"format": "MX", "element": {"format": "IntFormat", "bits": 8}}',
            r"quant_ops\.MX: expected element to be a FloatFormat, got INT8\. MXINT8's is .*",
        ),
        ('{"format": "MX", "element": {"config": "Int8Dynamic"}}', r"quant_ops\.MX: expected element to be a FloatFormat, .*"),
        ('{"format": "ABFP", "element_bits": 8, "gain": Infinity}', r"quant_ops\.ABFP: expected 0 < gain < inf, got inf"),
    ],
)
def test_refused_json(text, message):
    with pytest.raises(ValueError, match=rf"^{message}$"):
        qo.format_from_json(text)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: qo.IntFormat(1), r"IntFormat: expected 2 <= bits <= 24, got 1"),
        (lambda: qo.IntFormat(25), r"IntFormat: expected 2 <= bits <= 24, got 25"),
        (lambda: qo.IntFormat(True), r"IntFormat: expected 2 <= bits <= 24, got True"),
        (lambda: qo.FloatFormat(0, 3), r"FloatFormat: expected 1 <= exponent_bits <= 8, got 0"),
        (lambda: qo.FloatFormat(9, 3), r"FloatFormat: expected 1 <= exponent_bits <= 8, got 9"),
        (lambda: qo.FloatFormat(4, -1), r"FloatFormat: expected 0 <= mantissa_bits <= 23, got -1"),
        (lambda: qo.FloatFormat(4, 24), r"FloatFormat: expected 0 <= mantissa_bits <= 23, got 24"),
        (lambda: qo.FloatFormat(4, 3, bias=7.5), r"FloatFormat: expected bias to be an integer or None, got 7\.5"),
        (lambda: qo.FloatFormat(4, 3, special="inf"), r"FloatFormat: expected special to be one of .*, got 'inf'"),
        (lambda: qo.FloatFormat(4, 3, rounding="up"), r"FloatFormat: expected rounding to be one of .*, got 'up'"),
        (
            lambda: qo.FloatFormat(4, 2, saturate=False),
            r"FloatFormat: expected saturate == True with special == 'none', got False\. .*",
        ),
        (
            lambda: qo.FloatFormat(8, 3, special="none"),
            r"FloatFormat: expected float32's own exponents with 8 bits, .*, got 127 and 'none'",
        ),
        (
            lambda: qo.FloatFormat(8, 3, special="ieee", bias=100),
            r"FloatFormat: expected float32's own exponents .*, got 100 and 'ieee'",
        ),
        (
            lambda: qo.FloatFormat(1, 0, special="ieee"),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 0 .*",
        ),
        (
            lambda: qo.FloatFormat(1, 0, special="nan"),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 0 .*",
        ),
        (
            lambda: qo.FloatFormat(1, 3, special="ieee", subnormals=False),
            r"FloatFormat: expected a format with a value other than 0, got 1 exponent and 3 mantissa bits .*",
        ),
        (
            lambda: qo.FloatFormat(4, 3, bias=200),
            r"FloatFormat: expected -112 <= bias <= 127, so that float32 .*, got 200",
        ),
        (lambda: qo.FloatFormat(4, 3, bias=-200), r"FloatFormat: expected -112 <= bias <= 127, so that float32 .*, got -200"),
        (lambda: qo.FixedPoint(1, 0), r"FixedPoint: expected 2 <= bits <= 24, got 1"),
        (lambda: qo.FixedPoint(8, 127), r"FixedPoint: expected -120 <= fraction_bits <= 126, got 127"),
        (lambda: qo.FixedPoint(8, 4, clamp=0), r"FixedPoint: expected clamp to be True or False, got 0"),
        (lambda: qo.BlockFloat(1), r"BlockFloat: expected 2 <= element_bits <= 25, got 1"),
        (lambda: qo.BlockFloat(8, axis=1, block_size=4), r"BlockFloat: expected axis or block_size, got both: 1 and 4"),
        (lambda: qo.BlockFloat(8, axis=1.0), r"BlockFloat: expected axis to be an integer or None, got 1\.0"),
        (lambda: qo.BlockFloat(8, block_size=0), r"BlockFloat: expected 1 <= block_size, got 0"),
        (lambda: qo.MX(qo.INT8), r"MX: expected element to be a FloatFormat, got INT8\. MXINT8's is FloatFormat\(1, 6, bias=1\)\."),
        (
            lambda: qo.MX(SCALED_E4M3),
            r"MX: expected an element like E4M3, got FloatFormat\(4, 3, scaled=True\)\. .*",
        ),
        (lambda: qo.MX(qo.FP16), r"MX: expected an element like FloatFormat\(5, 10\), got FP16\. .*"),
        (lambda: qo.MXFP4.with_(block_size=0), r"MX: expected 1 <= block_size, got 0"),
        (lambda: qo.MXFP4.with_(scale_rule="e4m3"), r"MX: expected scale_rule to be one of \['ceil', 'even', .*\], got 'e4m3'"),
        (lambda: qo.MXFP4.along("k"), r"MX: expected dim to be an integer, got 'k'"),
        (lambda: qo.NVFP4Format(two_level=2), r"NVFP4Format: expected two_level to be True or False, got 2"),
        (lambda: qo.ABFP(8, gain=0), r"ABFP: expected 0 < gain < inf, got 0"),
        (lambda: qo.with_gradient(qo.E4M3, 3), r"WithGradient: expected backward to be a format without .*, got 3"),
        (
            lambda: qo.with_gradient(qo.with_gradient(qo.E4M3, None), None),
            r"WithGradient: expected forward to be a format without a gradient of its own, or None, got with_gradient\(E4M3, .*",
        ),
    ],
)
def test_refused_formats(make, message):
    with pytest.raises(ValueError, match=rf"^quant_ops\.{message}$"):
        make()


def test_extreme_formats_work():
    """The widest and the narrowest."""
    x = torch.tensor([3.4e38, 1e-45, -1.5, 0.0])
    assert torch.equal(qo.FloatFormat(8, 23, special="ieee", saturate=False)(x), x)
    assert qo.FloatFormat(8, 0, special="ieee")(x).tolist()[2] == -2
    assert qo.FloatFormat(1, 0)(x).tolist() == [2.0, 0.0, -2.0, 0.0]
    assert qo.FloatFormat(7, 23, bias=0).largest > 1e38
    assert qo.FloatFormat(1, 3, special="ieee").largest == 1.75


def test_average_bits():
    expected = {"E4M3": 8, "FP16": 16, "INT4": 4, "MXFP4": 4.25, "MXFP6_E3M2": 6.25, "MXINT8": 8.25, "NVFP4": 4.5, "E1M2": 4}
    assert {name: NAMED[name].bits for name in expected} == expected
    assert qo.ABFP(8).bits == 8.25
    assert qo.BlockFloat(8).bits == 8
    assert qo.with_gradient(qo.E4M3, None).bits == 8
