"""The commands of ``python -m quant_ops``. Their arguments: arguments.py."""

import argparse
import copy
import importlib
import itertools
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quant_ops as qo

from .. import info
from ..convert import config, files, select
from ..nn import QuantizedLayer
from ..report import bench, machine_table
from .arguments import BENCH_SIZES, parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    commands = {"info": _info, "bench": _bench, "quantize": _quantize, "report": _report}
    options = parser(commands).parse_args(arguments)
    try:
        status: int = options.run(options)
    except (Exception, SystemExit) as error:  # the user's code may raise anything, and may try to end the program
        if options.traceback:
            raise
        print(_sentence(error), file=sys.stderr)
        return 2
    return status


def _sentence(error: BaseException) -> str:
    """An error in one line: our own as it is, another one with its kind and place."""
    text = " ".join(str(error).split())
    if text.startswith("quant_ops"):
        return text
    if isinstance(error, SystemExit):
        text = f"ended the program with status {error.code}"
    frames = traceback.extract_tb(error.__traceback__)
    not_theirs = ("<", str(Path(__file__).parents[1]), os.path.dirname(torch.__file__), os.path.dirname(importlib.__file__))
    place = ([frame for frame in frames if not frame.filename.startswith(not_theirs)] or frames)[-1]
    where = f"{place.filename}:{place.lineno}"
    if isinstance(error, SyntaxError) and error.filename:
        where = f"{error.filename}:{error.lineno}"
    text = text if len(text) <= 300 else text[:300] + "..."
    hint = ""
    if isinstance(error, TypeError) and "positional argument" in text:
        hint = " A tuple or list of --data is taken as the model's arguments: leave out labels."
    return f"quant_ops: got {type(error).__name__} at {where}: {text}.{hint} (See --traceback.)"


def _expect(command: str, condition: bool, relation: str) -> None:
    if not condition:
        raise ValueError(f"quant_ops {command}: expected {relation}")


# ---- info and bench ------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    if options.env:
        report = info.environment()
        _print(options, report, info.environment_text(report))
    else:
        report = info.collect()
        _print(options, report, info.text(report))
    return 0 if report["status"] == "OK" else 1


def _bench(options: argparse.Namespace) -> int:
    _check_bench(options)
    o = options
    if o.threads:
        torch.set_num_threads(o.threads)
    try:
        if o.op is None:
            result = machine_table.measure(30.0 if o.seconds is None else o.seconds)
            shown = machine_table.text(result)
        else:
            sizes = {name: default if getattr(o, name) is None else getattr(o, name) for name, default, _ in BENCH_SIZES}
            seconds = 1.0 if o.seconds is None else o.seconds
            if o.op == "linear":
                result = bench.linear(sizes["bs"], sizes["cin"], sizes["cout"], seconds=seconds)
            else:
                result = bench.conv2d(**sizes, seconds=seconds)
            shown = bench.text(result)
    except bench.CheckFailed as error:
        print(error, file=sys.stderr)
        return 1
    if o.plot:
        machine_table.plot(result, o.plot)
    _print(options, result, shown)
    return 0


def _check_bench(options: argparse.Namespace) -> None:
    """Refuses what cannot be timed, before the work."""
    o, given = options, [name for name, *_ in BENCH_SIZES if getattr(options, name) is not None]
    for name in ("bs", "cin", "cout", "h", "w", "k", "threads"):
        value = getattr(o, name)
        _expect("bench", value is None or value >= 1, f"--{name} >= 1, got {value}")
    _expect("bench", o.p is None or o.p >= 0, f"--p >= 0, got {o.p}")
    _expect("bench", o.seconds is None or 0 < o.seconds < math.inf, f"--seconds > 0 and finite, got {o.seconds}")
    most = os.cpu_count() or 1
    _expect("bench", o.threads is None or o.threads <= most, f"--threads <= {most}, this machine's processors, got {o.threads}")
    if o.op is None:
        _expect("bench", not given, f"linear or conv2d before the sizes of a layer, got --{' --'.join(given)} alone")
        if o.plot:
            machine_table.check_plot(o.plot)
        return
    _expect("bench", o.plot is None, f"--plot with the table, which is bench without {o.op}, got {o.op} and --plot")
    if o.op == "linear":
        images = [name for name in given if name not in ("bs", "cin", "cout")]
        _expect("bench", not images, f"--bs, --cin and --cout for linear, got --{' --'.join(images)} too")
    else:
        default = {name: value for name, value, _ in BENCH_SIZES}
        h, w, k, p = (default[name] if getattr(o, name) is None else getattr(o, name) for name in ("h", "w", "k", "p"))
        least = min(h, w) + 2 * p
        _expect("bench", k <= least, f"a kernel that fits into the padded image, got --k {k} and an image of {least}")


# ---- quantize ------------------------------------------------------------------------------------------------------------


def _quantize(options: argparse.Namespace) -> int:
    chosen = _config(options)
    wants_report = options.report or options.plot or options.target is not None
    _check_quantize(options, chosen, wants_report)
    model = _model(options.model)
    folded = [str(qo.fold_batchnorm_(model))] if options.fold else []
    original = copy.deepcopy(model) if wants_report else None
    result = _convert(options, chosen, model)
    texts, said, report = [], {"file": str(options.out), "config": json.loads(chosen.to_json())}, None
    if original is not None:
        batch = next(iter(_data(options.data)))
        report = qo.compare(original, model, batch)
        if options.target is not None:
            texts.append(str(_meet_target(options.target, model, report, result)))
            report = qo.compare(original, model, batch)
        texts.append(report.table())
        said["report"] = json.loads(report.to_json(options.report))
    qo.save(model, options.out)
    if options.plot and report is not None:
        report.plot(options.plot)
    said |= {
        "converted": result.converted,
        "skipped": dict(result.skipped),
        "notes": result.notes,
        "share": result.share,
        "bytes_before": result.bytes_before,
        "bytes_after": result.bytes_after,
        "target_met": True,
    }
    written = f"written: {options.out}, {Path(options.out).stat().st_size} bytes"
    _print(options, said, "\n\n".join([*folded, str(result), *texts, written]))
    return 0


def _check_quantize(options: argparse.Namespace, chosen: Any, wants_report: bool) -> None:
    """Refuses what cannot end well, before the work."""
    static = isinstance(chosen, qo.Int8Static | qo.Simulated)
    if (static or wants_report) and options.data is None:
        why = f"{type(chosen).__name__} has to be calibrated" if static else "a report or target compares on data"
        raise ValueError(f"quant_ops quantize: expected --data, got none, but {why}")
    _expect("quantize", options.batches is None or options.batches >= 1, f"--batches >= 1, got {options.batches}")
    _expect("quantize", options.batches is None or static, "--batches only where something is calibrated, got a dynamic config")
    target = options.target
    _expect("quantize", target is None or not math.isnan(target), f"a number of dB as --target, got {target}")
    for path in filter(None, (options.out, options.report, options.plot)):
        _expect("quantize", Path(path).resolve().parent.is_dir(), f"a path in an existing folder, got {path}")
        _expect("quantize", not Path(path).is_dir(), f"the path of a file, got the folder {path}")


def _convert(options: argparse.Namespace, chosen: Any, model: nn.Module) -> qo.ConversionResult:
    """Quantizes the model, with calibration if the config wants it."""
    filters: Any = {"include": options.include or ["*"], "exclude": options.exclude or []}
    static = isinstance(chosen, qo.Int8Static | qo.Simulated)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "quant_ops.*to convert, got none", UserWarning)  # an error here
        result = qo.prepare_(model, chosen, **filters) if static else qo.quantize_(model, chosen, **filters)
    if not result.converted:
        found = "; ".join(f"{name}: {reason}" for name, reason in result.skipped[:3]) or "it has no layers with weights"
        raise ValueError(f"quant_ops quantize: expected a layer to convert in {options.model}, got none ({found})")
    if static:
        qo.calibrate(model, _data(options.data), steps=options.batches)
        result = qo.convert_(model)
    return result


def _meet_target(target: float, model: nn.Module, report: qo.Report, result: qo.ConversionResult) -> qo.FallbackResult:
    """Returns layers to float until the output is good enough, and corrects the result of the conversion."""
    fallback = qo.fallback_(model, report, target=target)
    if not fallback.reached:
        raise ValueError(
            f"quant_ops quantize: expected a --target that can be met with an int8 layer left, got {target:g} dB, and "
            f"{fallback.values[-1]:.1f} dB is the most that was found. Nothing was written."
        )
    left = [name for name in result.converted if isinstance(model.get_submodule(name), QuantizedLayer)]
    result.skipped += [(name, "returned to float for the target") for name in result.converted if name not in left]
    result.converted = left
    select.measure(model, result)
    return fallback


def _config(options: argparse.Namespace) -> Any:
    """The config by flags, or from --config."""
    settings = {name: getattr(options, name) for name in ("asymmetric", "weight_bits") if getattr(options, name) is not None}
    if options.config is not None:
        given = {"static": options.static, "observer": options.observer, **dict.fromkeys(settings, True)}
        flags = [f"--{name.replace('_', '-')}" for name, value in given.items() if value]
        flags = ["--symmetric" if flag == "--asymmetric" and not options.asymmetric else flag for flag in flags]
        _expect("quantize", not flags, f"--config instead of other flags, got it beside {', '.join(flags)}")
        text = _read(options.config[1:]) if options.config.startswith("@") else options.config
        if text.isidentifier():
            text = json.dumps({"config": text})
        try:
            return config.from_json(text)
        except (json.JSONDecodeError, RecursionError) as error:
            shown = text if len(text) <= 100 else text[:100] + "..."
            raise ValueError(f"quant_ops quantize: expected --config to be JSON or @file, got {shown!r}: {error}") from error
    if options.static or options.observer:
        return qo.Int8Static(observer=options.observer or "minmax", **settings)
    return qo.Int8Dynamic(**settings)


# ---- report --------------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    if (options.model is None) != (options.data is None):
        raise ValueError("quant_ops report: expected --model and --data together, got one of them")
    _expect("report", options.worst is None or options.worst >= 1, f"--worst >= 1, got {options.worst}")
    if options.model is None and str(options.file).endswith(".json"):
        report = qo.Report.from_json(_read(options.file))
    elif options.model is None:
        header = files.read_header(options.file)
        lines = [f"{options.file}: format {header['format_version']}, written by quant_ops {header['quant_ops']}"]
        lines += [f"  {name}: {_describe(entry)}" for name, entry in header["layers"].items()]
        _print(options, header, "\n".join(lines))
        return 0
    else:
        original = _model(options.model)
        model = copy.deepcopy(original)
        qo.load_(model, options.file)
        report = qo.compare(original, model, next(iter(_data(options.data))))
    if options.plot:
        report.plot(options.plot)
    if options.worst is not None:
        report.layers = report.worst(options.worst)
    _print(options, json.loads(report.to_json()), report.table())
    return 0


def _describe(entry: dict[str, Any]) -> str:
    arguments = ", ".join(f"{key}={value}" for key, value in entry["arguments"].items())
    return f"{entry['class']}({arguments}), weight_bits={entry['weight_bits']}, config={entry['config']}"


# ---- arguments -----------------------------------------------------------------------------------------------------------


def _find(argument: str, path: str) -> Any:
    module, colon, name = path.partition(":")
    if not (module and colon and name):
        raise ValueError(f"quant_ops: expected {argument} as module:function, got {path!r}")
    if os.sep in module or module.endswith(".py") or not all(module.split(".")):
        likely = ".".join(part for part in module.removesuffix(".py").replace(os.sep, ".").split(".") if part)
        likely = likely or "module"
        raise ValueError(
            f"quant_ops: expected {argument} as module:function, got {path!r}, whose first part is no name of a module but a path "
            f"or relative. Write {likely}:{name} in the folder from which that module can be imported."
        )
    if os.getcwd() not in sys.path and "" not in sys.path:  # the console script does not look there by itself
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # a module that the user's module wants
        raise ValueError(
            f"quant_ops: expected {argument} as module:function, got {path!r}, but there is no module {error.name!r}"
        ) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"quant_ops: expected {argument} as module:function, got {path!r}, but {module!r} has no {name!r}")
        found = getattr(found, part)
    return found


def _read(path: str) -> str:
    if not Path(path).is_file():
        raise FileNotFoundError(f"quant_ops: expected the path of a file, got {path}")
    return Path(path).read_text()


def _model(path: str) -> nn.Module:
    model = _find("the model", path)
    model = model if isinstance(model, nn.Module) else model()
    if not isinstance(model, nn.Module):
        raise TypeError(f"quant_ops: expected {path} to return an nn.Module, got {type(model).__name__}")
    return model.eval()


def _data(path: str) -> Iterable[Any]:
    data = _find("--data", path)
    batches = iter(data() if callable(data) else data)
    first = next(batches, None)
    if first is None:
        raise ValueError(f"quant_ops: expected {path} to give batches, got none")
    return itertools.chain([first], batches)


def _print(options: argparse.Namespace, data: Any, text: str) -> None:
    print(json.dumps(data, indent=2) if options.json else text)
