"""The demo runs, and int8 keeps the accuracy, the size and the signal that it reports."""

import importlib.util
from pathlib import Path

import torch


def test_digits_quick(capsys):
    spec = importlib.util.spec_from_file_location("digits", Path(__file__).parent.parent / "examples" / "digits.py")
    digits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(digits)
    threads = torch.get_num_threads()
    try:
        report = digits.main(["--quick"])
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr().out

    assert report["ok"]
    assert printed.endswith("OK: int8 is within one point of float32\n")
    assert report["accuracy"]["float32"] > 85  # it has learned something that int8 could lose
    assert len(report["sqnr"]) == 6
    for layer in report["sqnr"].values():
        assert layer["dynamic"] > 30
        assert layer["static"] > 30
    assert report["bytes"]["dynamic"] < 0.3 * report["bytes"]["float32"]
    assert all(us > 0 for times in (*report["network_us"].values(), *report["layer_us"].values()) for us in times.values())
    assert report["kernel"].endswith(report["isa"])
    assert report["kernel"] in printed
