"""int8 for PyTorch models from the command line: look at the installation, time it, quantize a model, see what that cost.

exit status: 0 all is well; 1 a check failed (info is not OK, no int8 layer meets the target); 2 arguments or data cannot be used
"""

import argparse
import copy
import dataclasses
import importlib
import itertools
import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quant_ops as qo

from .. import info
from ..convert import config, files
from ..nn import Int8Layer
from ..report import bench

_EXAMPLES = """examples:
  python -m quant_ops info
  python -m quant_ops bench linear --bs 512 --cin 960 --cout 960
  python -m quant_ops quantize torchvision.models:resnet18 resnet18.safetensors
  python -m quant_ops quantize my_net:trained net.safetensors --static --data my_net:batches --report net.json --target 30
  python -m quant_ops report net.safetensors --model my_net:trained --data my_net:batches --plot net.png

Modules are looked for in the current folder too.
"""


def main(arguments: list[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    options = _parser().parse_args(arguments)
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


def _parser() -> argparse.ArgumentParser:
    assert __doc__ is not None
    title, _, statuses = __doc__.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m quant_ops", description=title, epilog=f"{_EXAMPLES}\n{statuses}", formatter_class=layout
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str, **kwargs: Any) -> argparse.ArgumentParser:
        description = f"{help[0].upper()}{help[1:]}."
        sub = commands.add_parser(name, help=help, description=description, epilog=statuses, formatter_class=layout, **kwargs)
        sub.add_argument("--json", action="store_true", help="print JSON, for machines and bug reports")
        sub.set_defaults(run=run)
        return sub

    command("info", _info, "what is installed, which kernel each operator uses on this machine, and a self-check")

    sub = command("bench", _bench, "time one layer in float and in int8, after checking the int8 result")
    sub.add_argument(
        "op", choices=["linear", "conv2d"], help="nn.Linear(cin, cout) on bs rows; nn.Conv2d(cin, cout, k) on bs images"
    )
    for name, default, help in (
        ("bs", 1, "batch size"),
        ("cin", 960, "input channels"),
        ("cout", 960, "output channels"),
        ("h", 64, "image height"),
        ("w", 64, "image width"),
        ("k", 3, "kernel size"),
        ("p", 0, "padding"),
    ):
        scope = "" if name in ("bs", "cin", "cout") else "conv2d: "
        sub.add_argument(f"--{name}", type=int, default=default, help=f"{scope}{help} (default {default})")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    sub.add_argument("--seconds", type=float, default=1.0, help="how long to measure (default 1)")

    sub = command("quantize", _quantize, "make a model's Linear, Conv1d and Conv2d layers int8 and write it to a safetensors file")
    sub.add_argument("model", help="module:function that returns the trained float model (a class or an nn.Module will do)")
    sub.add_argument("out", help="file to write, e.g. model.safetensors; quant_ops.load_ fits it into the float model again")
    sub.add_argument(
        "--data",
        help="module:function that returns batches of inputs, without labels: a tensor is the model's argument, a tuple its "
        "arguments, a dict its keyword arguments. Calibrates static scales; the first batch is the one of the report",
    )
    group = sub.add_argument_group("how to quantize", "Default: dynamic. Activation scales come from the data of every call.")
    group.add_argument("--static", action="store_true", help="activation scales from calibration on --data: faster")
    group.add_argument("--observer", help="how static scales are chosen: minmax (default), percentile, mse, ...")
    group.add_argument("--asymmetric", action="store_true", help="activations with a zero point: better after ReLU")
    group.add_argument("--weight-bits", type=int, default=8, help="2 to 8 (default 8)")
    group.add_argument("--config", help="instead of these flags: a config as JSON, or @file")
    group.add_argument(
        "--include", action="append", metavar="PATTERN", help="only layers whose name fits, e.g. 'blocks.*'; repeatable"
    )
    group.add_argument("--exclude", action="append", metavar="PATTERN", help="layers to leave float, e.g. '*.head'; repeatable")
    group.add_argument("--fold", action="store_true", help="fold BatchNorms into the layers before them first")
    group.add_argument("--batches", type=int, help="calibrate on at most so many batches (default: all)")
    group = sub.add_argument_group("what it costs", "Compares every layer with its float original on the first batch of --data.")
    group.add_argument("--report", help="write the comparison as JSON to this file")
    group.add_argument("--plot", help="write the comparison as a picture (.png, .svg) to this file; needs matplotlib")
    group.add_argument(
        "--target",
        type=float,
        metavar="DB",
        help="return the worst layers to float until the output has this SQNR; status 1 if no layer is left then",
    )

    sub = command("report", _report, "what a quantized file holds, or what int8 costs each of its layers")
    sub.add_argument("file", help="a file of `quantize` or quant_ops.save; or a .json report, to be shown as a table")
    sub.add_argument("--model", help="module:function that returns the float model: compares with it, on --data")
    sub.add_argument("--data", help="module:function that returns batches; the first one is used")
    sub.add_argument("--worst", type=int, metavar="N", help="only the N layers that lose most, worst first")
    sub.add_argument("--plot", help="write a picture (.png, .svg) to this file; needs matplotlib")
    return parser
