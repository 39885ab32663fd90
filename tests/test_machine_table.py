"""``python -m quant_ops bench``: the table of a machine, with layers so small that it takes a second."""

import json
import math

import pytest
import torch

from quant_ops.cli import main
from quant_ops.report import limits, machine_table, peers
from quant_ops.report.machine_table import Layer

LAYERS = (
    Layer("large", "Linear", (64, 256, 256)),
    Layer("tiny", "Linear", (1, 64, 96)),
    Layer("tiny", "Conv2d", (8, 9, 16, 3, 2, 1)),
    Layer("tiny", "Conv2d", (8, 8, 8, 3, 1, 8)),
)
PEERS = {"torch.ao fbgemm", "torch.ao onednn", "ONNX Runtime"}


@pytest.fixture(autouse=True, scope="module")
def _quick():
    """However busy the machine is, there is time for every layer."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(machine_table, "_MOST_SECONDS", 0.1)
        yield


@pytest.fixture(scope="module")
def result():
    return machine_table.measure(60.0, LAYERS)


def test_rows(result):
    rows = result["rows"]
    assert [row["layer"] for row in rows] == [
        "Linear 256 -> 256, 64 rows",
        "Linear 64 -> 96, 1 row",
        "Conv2d 8 -> 16, 3 x 3 / 2, 9 x 9",
        "Conv2d 8 -> 8, depthwise 3 x 3, 8 x 8",
    ]
    assert result["left_out"] == []
    expected = {"float32", "quant_ops", *PEERS} | ({"bfloat16"} if peers.has_bfloat16("cpu") else set())
    for row in rows:
        seconds = row["seconds"]
        assert seconds.keys() == expected - {name for name, where in result["missing"].items() if f"tiny: {row['layer']}" in where}
        assert all(count >= 3 for count in row["calls"].values())
        assert row["sqnr_db"]["quant_ops"] > 30
        assert row["sqnr_db"]["float32"] == 300
        assert row["best_other"] == min(seconds.keys() - {"quant_ops"}, key=seconds.get)
        assert set(row["disturbed"]) <= seconds.keys()
        assert row["ratio"] * seconds["quant_ops"] == pytest.approx(seconds[row["best_other"]])
        assert row["percent_of_limit"] is None or 0 < row["percent_of_limit"] < 300
    assert json.loads(json.dumps(result)) == result


def test_sizes():
    """The number of products is that of the layer itself."""
    for layer in (*LAYERS, *machine_table.LAYERS[6:]):
        problem = layer.problem("cpu")
        products = problem.layer(problem.x).numel() * problem.layer.weight[0].numel()
        assert products == layer.macs
    assert len({(layer.model, str(layer)) for layer in machine_table.LAYERS}) == len(machine_table.LAYERS) == 12


def test_text_and_picture(result, tmp_path):
    lines = machine_table.text(result).splitlines()
    assert lines[0].startswith("quant_ops ")
    head = next(i for i, line in enumerate(lines) if line.startswith("model"))
    assert len({line.index("  Linear") for line in lines[head + 1 : head + 3]}) == 1
    assert all(" us " in line or " ms " in line for line in lines[head + 1 : head + 5])
    assert max(map(len, lines[head + 5 :])) <= 120
    machine_table.plot(result, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_a_peer_that_is_wrong_or_fails_is_named(monkeypatch):
    def fails(engine, problem):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(peers, "_onnx_linear", lambda problem: lambda: torch.full((1, 96), torch.nan))
    monkeypatch.setattr(peers, "_torch_ao_linear", fails)
    result = machine_table.measure(60.0, LAYERS[1:2])
    assert result["missing"]["ONNX Runtime"] == {"tiny: Linear 64 -> 96, 1 row": "its result is nan dB from float32, expected 30"}
    assert set(result["missing"]["torch.ao fbgemm"].values()) == {"RuntimeError: no such kernel"}
    assert result["rows"][0]["best_peer"] is None
    text = machine_table.text(result)
    assert "ONNX Runtime is missing in 1 row: its result is nan dB" in text
    assert "none" in text.splitlines()[3]


def test_disturbed_rows_are_marked(monkeypatch):
    """They are shown, but not in the mean."""
    monkeypatch.setattr(machine_table, "_DISTURBED", 0.5)
    text = machine_table.text(machine_table.measure(60.0, LAYERS[1:2]))
    assert " x *" in text.splitlines()[3]
    assert "other work on the machine decided" in text.replace("\n", " ")
    assert "Geometric mean" not in text


def test_layers_for_which_there_is_no_time():
    result = machine_table.measure(1e-6, LAYERS)
    assert result["rows"] == []
    assert len(result["left_out"]) == 4
    assert "Left out, as --seconds was too short: large: Linear 256 -> 256, 64 rows;" in machine_table.text(result)


def test_command(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(machine_table.measure, "__defaults__", (30.0, LAYERS))
    before = torch.get_num_threads()
    engine = torch.backends.quantized.engine
    try:
        status = main(["bench", "--seconds", "60", "--threads", "1", "--json", "--plot", str(tmp_path / "a.svg")])
    finally:
        torch.set_num_threads(before)
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    assert json.loads(printed.out)["machine"]["threads"] == 1
    assert (tmp_path / "a.svg").read_text().count("MobileNet") == 0
    assert torch.backends.quantized.engine == engine
    monkeypatch.setattr(machine_table, "sqnr", lambda *_: 3.0)
    assert main(["bench", "--seconds", "60"]) == 1
    assert "expected an SQNR of 20.0 dB of Conv2d 8 -> 8" in capsys.readouterr().err


@pytest.mark.cuda
def test_on_a_gpu():
    """Peers that take other shapes only are named; everything else is there."""
    result = machine_table.measure(60.0, LAYERS)
    assert result["machine"]["kind"] == "cuda"
    assert [row["best_peer"] for row in result["rows"]] == ["torch._int_mm", None, None, None]
    assert all({"float32", "bfloat16", "quant_ops"} <= row["seconds"].keys() for row in result["rows"])
    assert "int8 from bfloat16 to bfloat16" in machine_table.text(result)


def test_limits():
    peak = limits.peak_gops(1, 0.01)
    assert peak is None or peak > 1
    assert limits.read_gbs(1 << 20, 1, 0.01) > 0.1
    assert limits.limit_seconds(10**9, 1, 100.0, 10.0) == pytest.approx(0.02)
    assert limits.limit_seconds(1, 10**9, 100.0, 10.0) == pytest.approx(0.1)
    assert math.isfinite(limits.limit_seconds(0, 0, 1.0, 1.0))
