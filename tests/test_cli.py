"""python -m quant_ops: what each command prints, writes and returns, and that complaints are one line that helps."""

import json
import sys
from pathlib import Path

import pytest
import torch
from processes import python

import quant_ops as qo
from quant_ops.__main__ import main

ROOT = Path(__file__).parents[1]
MODULE = """
import torch
from torch import nn

def trained():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 12), nn.Linear(12, 5))
    model.train()(torch.randn(32, 3, 6, 6))
    with torch.no_grad():
        model[5].weight[:, 0] = 40  # an outlier: int8 costs this layer most
    return model

def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        yield torch.randn(4, 3, 6, 6, generator=generator)

several = [(torch.ones(1, 3, 6, 6),), (torch.zeros(1, 3, 6, 6),)]
none = lambda: []
raises = lambda: 1 / 0
sequence = lambda: nn.Sequential(
    nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.Conv1d(6, 6, 1, groups=2), nn.Flatten(), nn.Linear(36, 2)
)
labelled = [(torch.ones(1, 3, 6, 6), torch.zeros(1))]
without_layers = lambda: nn.Sequential(nn.LSTM(3, 3))
number = lambda: 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with a module of the user."""
    (tmp_path / "user_net.py").write_text(MODULE)
    (tmp_path / "deep.json").write_text("[" * 5000)
    (tmp_path / "broken_net.py").write_text("import no_such_dependency")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("user_net", None)


def call(capsys, *arguments, status=0):
    """Runs a command; what it printed."""
    assert main([str(argument) for argument in arguments]) == status
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def refused(capsys, *arguments):
    """Runs a command that must fail with status 2; its one line."""
    assert main([str(argument) for argument in arguments]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


def user_net():
    return __import__("user_net")


# ---- quantize ------------------------------------------------------------------------------------------------------------


def test_quantize_dynamic(folder, capsys):
    printed = call(capsys, "quantize", "user_net:trained", "out.safetensors", "--exclude", "5", "--weight-bits", 6)
    assert "2 converted, 1 skipped" in printed
    assert printed.splitlines()[-1] == f"written: out.safetensors, {(folder / 'out.safetensors').stat().st_size} bytes"
    model, expected = user_net().trained().eval(), user_net().trained().eval()
    qo.load_(model, "out.safetensors")
    qo.quantize_(expected, qo.Int8Dynamic(weight_bits=6), exclude=["5"])
    (x, *_) = user_net().batches()
    assert torch.equal(model(x), expected(x))


def test_quantize_with_report_json_and_target(folder, capsys):
    command = ["quantize", "user_net:trained", "m", "--data", "user_net:batches", "--weight-bits", "4", "--json"]
    plain = json.loads(call(capsys, *command, "--report", "r.json"))
    assert plain["converted"] == ["0", "4", "5"]
    assert plain["skipped"] == {}
    assert plain["config"]["weight_bits"] == 4
    assert plain["report"] == json.loads((folder / "r.json").read_text())
    assert plain["report"]["sqnr_db"] < 24
    found = json.loads(call(capsys, *command, "--target", 24))
    assert found["target_met"] is True
    assert found["report"]["sqnr_db"] >= 24
    assert len(found["skipped"]) >= 1
    assert json.loads(call(capsys, "report", "m", "--json"))["layers"].keys() == set(found["converted"])
    assert [layer["name"] for layer in found["report"]["layers"]] == found["converted"]
    returned = {name for name, reason in found["skipped"].items() if reason == "returned to float for the target"}
    assert returned == set(plain["converted"]) - set(found["converted"])
    assert plain["share"] == 1.0 > found["share"]
    assert found["bytes_after"] == found["report"]["bytes"]


@pytest.mark.parametrize("target", ["1e9", "inf"])
def test_a_target_that_no_int8_model_meets(folder, capsys, target):
    arguments = ["--data", "user_net:batches", "--target", target, "--report", "r.json"]
    line = refused(capsys, "quantize", "user_net:trained", "m", *arguments)
    assert line.startswith("quant_ops quantize: expected a --target that can be met with an int8 layer left, got ")
    assert line.endswith(" dB is the most that was found. Nothing was written.")
    assert not (folder / "m").exists()
    assert not (folder / "r.json").exists()


def test_quantize_conv1d(folder, capsys):
    assert "3 converted, 0 skipped\nint8: 100.0 % of the weights" in call(capsys, "quantize", "user_net:sequence", "m", "--fold")
    model = user_net().sequence().eval()
    qo.fold_batchnorm_(model)
    qo.load_(model, "m")
    assert [type(layer).__name__ for layer in model] == ["QuantConv1d", "Identity", "QuantConv1d", "Flatten", "QuantLinear"]
    assert model(torch.randn(2, 3, 8)).isfinite().all()


def test_quantize_folds(folder, capsys):
    assert "1 folded" in call(capsys, "quantize", "user_net:trained", "m", "--fold")
    assert not any("running_mean" in name for name in __import__("safetensors.torch").torch.load_file("m"))


def test_quantize_by_config(folder, capsys):
    text = qo.Int8Dynamic(asymmetric=True, weight_bits=3).to_json()
    (folder / "config.json").write_text(text)
    for argument in (text, "@config.json"):
        call(capsys, "quantize", "user_net:trained", "m", "--config", argument)
        layers = json.loads(call(capsys, "report", "m", "--json"))["layers"]
        assert all(entry["weight_bits"] == 3 and entry["arguments"]["asymmetric"] for entry in layers.values())


def test_quantize_static(folder, capsys):
    command = ["quantize", "user_net:trained", "m", "--static", "--observer", "mse", "--asymmetric", "--data", "user_net:batches"]
    printed = json.loads(call(capsys, *command, "--batches", 2, "--report", "r.json", "--json"))
    assert printed["config"] | {"config": "Int8Static", "observer": "mse", "asymmetric": True} == printed["config"]
    assert printed["report"]["sqnr_db"] > 25
    model, expected = user_net().trained().eval(), user_net().trained().eval()
    qo.load_(model, "m")
    qo.prepare_(expected, qo.Int8Static(observer="mse", asymmetric=True))
    qo.calibrate(expected, user_net().batches(), steps=2)
    qo.convert_(expected)
    (x, *_) = user_net().batches()
    assert torch.equal(model(x), expected(x))
    assert "mode" not in refused(capsys, "quantize", "user_net:trained", "m", "--static")


# ---- report --------------------------------------------------------------------------------------------------------------


def test_report(folder, capsys):
    call(capsys, "quantize", "user_net:trained", "m", "--data", "user_net:batches", "--report", "r.json")
    described = call(capsys, "report", "m")
    assert described.splitlines()[0] == f"m: format 1, written by quant_ops {qo.__version__}"
    assert "  4: QuantLinear(in_features=128, out_features=12, asymmetric=" in described
    assert "relu=False), weight_bits=8, config={'config': 'Int8Dynamic'" in described

    compared = json.loads(call(capsys, "report", "m", "--model", "user_net:trained", "--data", "user_net:batches", "--json"))
    written = json.loads((folder / "r.json").read_text())
    assert compared["sqnr_db"] == written["sqnr_db"]
    shown = call(capsys, "report", "r.json", "--worst", 1).splitlines()
    assert len(shown) == 3
    assert shown[1].split()[:2] == [max(written["layers"], key=lambda layer: layer["error"])["name"], "QuantLinear"]


def test_pictures(folder, capsys):
    pytest.importorskip("matplotlib")
    command = ["quantize", "user_net:trained", "m", "--data", "user_net:several"]
    call(capsys, *command, "--report", "r.json", "--plot", "a.png")
    call(capsys, "report", "r.json", "--plot", "b.png")
    for name in ("a.png", "b.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


# ---- bench and info ------------------------------------------------------------------------------------------------------


def test_bench_json(capsys):
    before = torch.get_num_threads()
    try:
        result = json.loads(
            call(
                capsys, "bench", "conv2d", "--cin", 8, "--cout", 8, "--h", 6, "--w", 5, "--seconds", 0.01, "--threads", 1, "--json"
            )
        )
    finally:
        torch.set_num_threads(before)
    assert result["title"] == "conv2d bs=1 cin=8 cout=8 h=6 w=5 k=3 p=0"
    assert result["threads"] == 1
    assert all(value > 30 for value in result["sqnr_db"].values())
    times = result["seconds"]
    assert times.keys() == result["tera_operations_per_second"].keys()
    rate = result["tera_operations_per_second"]["FP32"]
    assert rate * times["FP32"] * 1e12 == pytest.approx(2 * 8 * 8 * 9 * 4 * 3)


def test_info_reports_a_failed_check(capsys, monkeypatch):
    from quant_ops import info

    assert call(capsys, "info").splitlines()[-1] == "OK"
    monkeypatch.setattr(info, "_self_check", lambda: "int8_gemm disagrees with int64 arithmetic")
    assert call(capsys, "info", status=1).splitlines()[-1] == "int8_gemm disagrees with int64 arithmetic"


# ---- complaints ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["quantize", "user_net", "m"], "expected the model as module:function, got 'user_net'"),
        (["quantize", "no_net:f", "m"], "got 'no_net:f', but there is no module 'no_net'"),
        (["quantize", "user_net:f", "m"], "got 'user_net:f', but 'user_net' has no 'f'"),
        (["quantize", "user_net:number", "m"], "expected user_net:number to return an nn.Module, got int"),
        (["quantize", "user_net:trained", "no/folder/m"], "quant_ops quantize: expected a path in an existing folder"),
        (
            ["quantize", "user_net:trained", "m", "--data", "user_net:batches", "--plot", "no/a.png"],
            "existing folder, got no/a.png",
        ),
        (["quantize", "user_net:trained", "m", "--config", "@nothing"], "expected the path of a file, got nothing"),
        (["report", "nothing.json"], "expected the path of a file, got nothing.json"),
        (["quantize", "user_net:trained", "m", "--exclude", "nothing"], "expected the pattern 'nothing' to match"),
        (["quantize", "user_net:trained", "m", "--weight-bits", "9"], "expected 2 <= weight_bits <= 8, got 9"),
        (["quantize", "./user_net.py:trained", "m"], "got './user_net.py:trained', whose first part is no name of a module"),
        (["quantize", "user_net.py:trained", "m"], "Write user_net:trained in the folder from which"),
        (["quantize", ".user_net:trained", "m"], "Write user_net:trained in the folder from which"),
        (["quantize", "a..b:trained", "m"], "Write a.b:trained in the folder from which"),
        (["quantize", "user_net:trained", "."], "expected the path of a file, got the folder ."),
        (
            ["quantize", "user_net:trained", "m", "--exclude", "*"],
            "expected a layer to convert in user_net:trained, got none (0: excl",
        ),
        (["quantize", "user_net:without_layers", "m"], "got none (0: LSTM has no int8 form: weight_ih_l0, weight_hh_l0)"),
        (["quantize", "user_net:trained", "m", "--weight-bits", "0"], "expected 2 <= weight_bits <= 8, got 0"),
        (
            ["quantize", "user_net:trained", "m", "--static", "--data", "user_net:batches", "--batches", "0"],
            "--batches >= 1, got 0",
        ),
        (["quantize", "user_net:trained", "m", "--batches", "1"], "expected --batches only where something is calibrated"),
        (
            ["quantize", "user_net:trained", "m", "--data", "user_net:batches", "--target", "nan"],
            "a number of dB as --target, got nan",
        ),
        (["quantize", "user_net:trained", "m", "--config", "{}", "--weight-bits", "8"], "got it beside --weight-bits"),
        (["quantize", "user_net:trained", "m", "--config", "{}", "--static", "--symmetric"], "got it beside --static, --symmetric"),
        (["quantize", "user_net:trained", "m", "--config", "{}", "--observer", "mse"], "got it beside --observer"),
        (["quantize", "user_net:trained", "m", "--config", "[" * 5000], "expected --config to be JSON or @file, got '[[[["),
        (["report", "deep.json"], "quant_ops.Report.from_json: expected the JSON of Report.to_json, got RecursionError"),
        (["report", "deep.json", "--worst", "-1"], "expected --worst >= 1, got -1"),
        *((["bench", "linear", f"--{name}", "0"], f"--{name} >= 1, got 0") for name in ("bs", "cin", "cout", "threads")),
        *((["bench", "conv2d", f"--{name}", "-3"], f"--{name} >= 1, got -3") for name in ("h", "w", "k", "bs")),
        *((["bench", "linear", "--seconds", text], "--seconds > 0 and finite, got ") for text in ("0", "-1", "nan", "inf")),
        (["bench", "--bs", "2"], "expected linear or conv2d before the sizes of a layer, got --bs alone"),
        (["bench", "--seconds", "-1"], "--seconds > 0 and finite, got -1.0"),
        (["bench", "--threads", "100000"], "this machine's processors, got 100000"),
        (["bench", "--plot", "no/a.png"], "expected --plot as a file in an existing folder, got no/a.png"),
        (["bench", "--plot", "a.txt"], "expected --plot with an ending of a picture such as .png or .svg, got a.txt"),
        (["bench", "linear", "--plot", "a.png"], "got linear and --plot"),
        (["bench", "linear", "--k", "3"], "expected --bs, --cin and --cout for linear, got --k too"),
        (["bench", "conv2d", "--p", "-1"], "expected --p >= 0, got -1"),
        (["bench", "conv2d", "--h", "2", "--k", "5", "--p", "1"], "got --k 5 and an image of 4"),
        (["bench", "linear", "--bs", "1000000000", "--cin", "1000000000"], "quant_ops: got RuntimeError at "),
        (["quantize", "user_net:trained", "m", "--config", "{"], "expected --config to be JSON or @file, got '{'"),
        (["quantize", "user_net:trained", "m", "--config", '{"config": "X"}'], "quant_ops: expected a config named"),
        (
            ["quantize", "user_net:trained", "m", "--report", "r"],
            "expected --data, got none, but a report or target compares on data",
        ),
        (
            ["quantize", "user_net:trained", "m", "--report", "r", "--data", "user_net:none"],
            "expected user_net:none to give batches",
        ),
        (["report", "nothing"], "expected the path of a file, got nothing"),
        (["report", "user_net.py"], "expected a whole safetensors file, got user_net.py"),
        (["report", "user_net.py", "--model", "user_net:trained"], "expected --model and --data together, got one of them"),
    ],
)
def test_complaints_are_one_line(folder, capsys, arguments, words):
    line = refused(capsys, *arguments)
    assert line.startswith("quant_ops")
    assert words in line
    assert not (folder / "m").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["broken_net:f", "m"], "got ModuleNotFoundError at {folder}/broken_net.py:1: No module named 'no_such_dependency'."),
        (["typo_net:f", "m"], "got SyntaxError at {folder}/typo_net.py:1: "),
        (["exits_net:f", "m"], "got SystemExit at {folder}/exits_net.py:1: ended the program with status 0."),
        (["user_net:raises", "m"], "ZeroDivisionError at {folder}/user_net.py:"),
        (["user_net:trained", "m", "--static", "--data", "user_net:raises"], "ZeroDivisionError at {folder}/user_net.py:"),
        (["user_net:trained", "m", "--static", "--data", "user_net:labelled"], "leave out labels."),
    ],
)
def test_errors_of_the_users_code_are_one_line(folder, capsys, arguments, words):
    (folder / "typo_net.py").write_text("def f(:")
    (folder / "exits_net.py").write_text("raise SystemExit(0)")
    line = refused(capsys, "quantize", *arguments)
    assert line.startswith("quant_ops: got ")
    assert words.format(folder=folder) in line
    assert not (folder / "m").exists()


def test_traceback_on_request(folder):
    with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
        main(["quantize", "broken_net:f", "m", "--traceback"])


def test_a_wrong_result_is_a_failed_check(capsys, monkeypatch):
    from quant_ops.report import bench

    monkeypatch.setattr(bench, "sqnr", lambda *_: 3.0)
    assert main(["bench", "linear", "--bs", "2", "--cin", "8", "--cout", "8", "--seconds", "0.01"]) == 1
    assert "expected an SQNR of 30.0 dB" in capsys.readouterr().err


def test_version_and_console_script(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert capsys.readouterr().out == f"quant_ops {qo.__version__}\n"
    assert '[project.scripts]\nquant_ops = "quant_ops.cli:main"' in (ROOT / "pyproject.toml").read_text()


def test_statuses_of_the_process(folder):
    def run(*arguments):
        return python("-m", "quant_ops", *arguments)

    missing = run("report", "nothing")
    assert (missing.returncode, missing.stdout) == (2, "")
    done = run("quantize", "user_net:trained", "m")  # the current folder's module is found
    assert (done.returncode, done.stderr) == (0, "")


def test_a_missing_argument(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["quantize", "user_net:trained"])
    assert "the following arguments are required: out" in capsys.readouterr().err


def test_help(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    text = capsys.readouterr().out
    for words in ("info", "bench", "quantize", "report", "examples:", "exit status: 0 all is well; 1 a check failed"):
        assert words in text


@pytest.mark.parametrize("command", ["info", "bench", "quantize", "report"])
def test_every_command_explains_itself(capsys, command):
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "--json" in text
    assert "exit status" in text
    assert all(len(line) < 200 for line in text.splitlines())
