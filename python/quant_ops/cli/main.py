"""The commands of ``python -m quant_ops``. Their arguments: arguments.py."""

import argparse
import copy
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quant_ops as qo

from .. import info
from ..convert import config, files
from ..nn import Int8Layer
from ..report import bench
from .arguments import parser


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    commands = {"info": _info, "bench": _bench, "quantize": _quantize, "report": _report}
    options = parser(commands).parse_args(arguments)
    try:
        status: int = options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        if not str(error).startswith("quant_ops"):
            raise  # not a complaint of ours: the traceback tells more
        print(error, file=sys.stderr)
        return 2
    return status


# ---- info and bench ------------------------------------------------------------------------------------------------------


def _info(options: argparse.Namespace) -> int:
    report = info.collect()
    _print(options, report, info.text(report))
    return 0 if report["status"] == "OK" else 1


def _bench(options: argparse.Namespace) -> int:
    if options.threads:
        torch.set_num_threads(options.threads)
    o = options
    if o.op == "linear":
        result = bench.linear(o.bs, o.cin, o.cout, seconds=o.seconds)
    else:
        result = bench.conv2d(o.bs, o.cin, o.cout, o.h, o.w, o.k, o.p, seconds=o.seconds)
    _print(options, result, bench.text(result))
    return 0


# ---- quantize ------------------------------------------------------------------------------------------------------------


def _quantize(options: argparse.Namespace) -> int:
    chosen = _config(options)
    wants_report = options.report or options.plot or options.target is not None
    static = not isinstance(chosen, qo.Int8Dynamic)
    if (static or wants_report) and options.data is None:
        why = f"{type(chosen).__name__} has to be calibrated" if static else "a report or target compares on data"
        raise ValueError(f"quant_ops quantize: expected --data, got none, but {why}")
    for path in filter(None, (options.out, options.report, options.plot)):  # before the work, not after
        if not Path(path).resolve().parent.is_dir():
            raise ValueError(f"quant_ops quantize: expected a path in an existing folder, got {path}")
    model = _model(options.model)
    if options.fold:
        folded: Any = qo.fold_batchnorm_(model)
    original = copy.deepcopy(model) if wants_report else None
    filters: Any = {"include": options.include or ["*"], "exclude": options.exclude or []}
    if static:
        qo.prepare_(model, chosen, **filters)
        qo.calibrate(model, _data(options.data), steps=options.batches)
        result = qo.convert_(model)
    else:
        result = qo.quantize_(model, chosen, **filters)

    said: dict[str, Any] = {"file": str(options.out), "config": json.loads(chosen.to_json())}
    texts = [str(folded)] if options.fold else []
    texts.append(str(result))
    met = True
    if original is not None:
        batch = next(iter(_data(options.data)))
        report = qo.compare(original, model, batch)
        if options.target is not None:
            fallback = qo.fallback_(model, report, target=options.target)
            texts.append(str(fallback))
            left = [name for name in result.converted if isinstance(model.get_submodule(name), Int8Layer)]
            result.skipped += [(name, "returned to float for the target") for name in result.converted if name not in left]
            result.converted = left
            met = bool(fallback.reached and left)
            exact = dataclasses.replace(report, layers=[], unreached=[], error=0.0, cosine=1.0)
            report = qo.compare(original, model, batch) if left else exact
        texts.append(report.table())
        said["report"] = json.loads(report.to_json(options.report))
    qo.save(model, options.out)
    if options.plot:
        report.plot(options.plot)
    said |= {"converted": result.converted, "skipped": dict(result.skipped), "target_met": met}
    _print(options, said, "\n\n".join([*texts, f"written: {options.out}, {Path(options.out).stat().st_size} bytes"]))
    return 0 if met else 1


def _config(options: argparse.Namespace) -> Any:
    """The config by flags, or from --config."""
    if options.config is not None:
        text = _read(options.config[1:]) if options.config.startswith("@") else options.config
        try:
            return config.from_json(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"quant_ops quantize: expected --config to be JSON or @file, got {text!r}: {error}") from error
    settings = {"asymmetric": options.asymmetric, "weight_bits": options.weight_bits}
    if options.static or options.observer:
        return qo.Int8Static(observer=options.observer or "minmax", **settings)
    return qo.Int8Dynamic(**settings)


# ---- report --------------------------------------------------------------------------------------------------------------


def _report(options: argparse.Namespace) -> int:
    if (options.model is None) != (options.data is None):
        raise ValueError("quant_ops report: expected --model and --data together, got one of them")
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
