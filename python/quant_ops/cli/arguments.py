"""int8 for PyTorch models from the command line: look at the installation, time it, quantize a model, see what that cost.

exit status: 0 all is well; 1 a check failed (of info or bench); 2 the arguments, the data or the user's code cannot be used
"""

import argparse
from collections.abc import Callable, Mapping

from .. import _library

_EXAMPLES = """examples:
  python -m quant_ops info
  python -m quant_ops info --env
  python -m quant_ops bench
  python -m quant_ops bench linear --bs 512 --cin 960 --cout 960
  python -m quant_ops quantize torchvision.models:resnet18 resnet18.safetensors
  python -m quant_ops quantize my_net:trained net.safetensors --static --data my_net:batches --report net.json --target 30
  python -m quant_ops quantize my_llama:model llama.safetensors --config Int4WeightOnly
  python -m quant_ops report net.safetensors --model my_net:trained --data my_net:batches --plot net.png

Modules are looked for in the current folder too.
"""

BENCH_SIZES = (
    ("bs", 1, "batch size"),
    ("cin", 960, "input channels"),
    ("cout", 960, "output channels"),
    ("h", 64, "image height"),
    ("w", 64, "image width"),
    ("k", 3, "kernel size"),
    ("p", 0, "padding"),
)

_HELP = {
    "info": "what is installed, which kernel each operator uses on this machine, and a self-check",
    "bench": "a table of this machine, or one layer: times in float and in int8, after checking the int8 results",
    "quantize": "make a model's Linear, Conv1d and Conv2d layers int8, or Linear and Embedding layers int4, and write a file",
    "report": "what a quantized file holds, or what int8 costs each of its layers",
}


def parser(commands: Mapping[str, Callable[[argparse.Namespace], int]]) -> argparse.ArgumentParser:
    """Parses into options whose ``run`` is the function of the command."""
    assert __doc__ is not None
    title, _, statuses = __doc__.partition("\n\n")
    layout = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        prog="python -m quant_ops", description=title, epilog=f"{_EXAMPLES}\n{statuses}", formatter_class=layout
    )
    made.add_argument("--version", action="version", version=f"quant_ops {_library.VERSION}")
    subparsers = made.add_subparsers(dest="command", required=True, metavar="command")
    for name, help in _HELP.items():
        description = f"{help[0].upper()}{help[1:]}."
        sub = subparsers.add_parser(name, help=help, description=description, epilog=statuses, formatter_class=layout)
        sub.add_argument("--json", action="store_true", help="print JSON, for machines and bug reports")
        sub.add_argument("--traceback", action="store_true", help="let errors end with Python's traceback, not with one sentence")
        sub.set_defaults(run=commands[name])
        if name in _ARGUMENTS:
            _ARGUMENTS[name](sub)
    return made


def _info(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--env", action="store_true", help="all that a bug report needs: versions, libraries, variables, machine")


def _bench(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "op",
        nargs="?",
        choices=["linear", "conv2d"],
        help="one layer: nn.Linear(cin, cout) on bs rows, or nn.Conv2d(cin, cout, k) on bs images. Without it: a table of layers "
        "of well-known models, in float, in the other int8 packages that are installed, and in quant_ops",
    )
    for name, default, help in BENCH_SIZES:
        scope = "" if name in ("bs", "cin", "cout") else "conv2d: "
        sub.add_argument(f"--{name}", type=int, help=f"{scope}{help} (default {default})")
    sub.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    sub.add_argument("--seconds", type=float, help="how long to measure, altogether (default: 30 for the table, 1 for a layer)")
    sub.add_argument("--plot", metavar="FILE", help="write the table as a picture (.png, .svg) to this file; needs matplotlib")


def _quantize(sub: argparse.ArgumentParser) -> None:
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
    either = group.add_mutually_exclusive_group()
    either.add_argument("--asymmetric", action="store_true", default=None, help="activations with a zero point: better after ReLU")
    either.add_argument("--symmetric", action="store_false", dest="asymmetric", help="activations without a zero point")
    group.add_argument("--weight-bits", type=int, help="2 to 8 (default 8)")
    group.add_argument(
        "--config", help="instead of the flags above: a config as JSON, its name alone, e.g. Int4WeightOnly, or @file"
    )
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
        help="return to float what helps the output most, until it has this SQNR; status 2 if no int8 layer could stay then",
    )


def _report(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("file", help="a file of `quantize` or quant_ops.save; or a .json report, to be shown as a table")
    sub.add_argument("--model", help="module:function that returns the float model: compares with it, on --data")
    sub.add_argument("--data", help="module:function that returns batches; the first one is used")
    sub.add_argument("--worst", type=int, metavar="N", help="only the N layers that lose most, worst first")
    sub.add_argument("--plot", help="write a picture (.png, .svg) to this file; needs matplotlib")


_ARGUMENTS = {"info": _info, "bench": _bench, "quantize": _quantize, "report": _report}
