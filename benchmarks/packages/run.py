"""What every script of this folder does: checks and times its contenders in turns, writes JSON, prints tables.

Also here: how the contenders of several scripts reach torch.ao and ONNX Runtime. Read next: linear.py, the smallest of the scripts.
"""

import argparse
import random
from pathlib import Path

import torch

from benchmarks import table
from benchmarks.common import machine, results
from benchmarks.common.contenders import prepare
from quant_ops import keep_memory
from quant_ops.report.timing import interleave

SETTLE_SECONDS = 0.01  # until the threads of the contender before have stopped looking for work
MOST_SQNR = 300.0  # dB, in place of infinity where the results are the same


class Run:
    """The results of one script."""

    def __init__(self, kind, options, threads=None):
        if getattr(options, "keep_memory", False):
            keep_memory()
        self.options, self.machine = options, machine.describe(options.cpu)
        if threads is not None:
            self.machine["threads"] = threads
        self.data = {"kind": kind, "machine": self.machine, "missing": {}, "results": []}

    def miss(self, contender, case, reason):
        self.data["missing"].setdefault(contender, {})[case] = reason

    @torch.inference_mode()
    def measure(self, contenders, *arguments, reference, least, case, label="{}", limit_us=None, **columns):
        """Adds a row per contender; returns the calls and their rows. `case` and `label` name what is missing."""
        calls, distances, missing = prepare(contenders, *arguments, reference=reference, least=least)
        for contender, reason in missing.items():
            self.miss(label.format(contender), case, reason)
        times = interleave(
            calls,
            rounds=self.options.rounds,
            seconds=self.options.seconds,
            settle=SETTLE_SECONDS if torch.get_num_threads() > 1 else 0.0,
            order=random.Random(0),
        )
        rows = {name: columns | {"contender": name} | figures(times[name]) for name in calls}
        for name, row in rows.items():
            row["sqnr_db"] = round(min(distances[name], MOST_SQNR), 1)
            if limit_us:
                row |= {"limit_us": results.rounded(limit_us), "percent_of_limit": round(100 * limit_us / row["min_us"], 1)}
        self.data["results"] += rows.values()
        return calls, rows

    def finish(self):
        if self.options.out:
            self.options.out.write_text(results.as_text(self.data))
        print(table.show(self.data))


def figures(times):
    """Minimum and median in microseconds."""
    ordered = sorted(times)
    least, median = ordered[0] * 1e6, ordered[len(ordered) // 2] * 1e6
    return {"min_us": results.rounded(least), "median_us": results.rounded(median), "calls": len(ordered)}


def parser(document, *, seconds, rounds=5):
    """The options of every script; `seconds` and `rounds` are the defaults for one case."""
    arguments = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--seconds", type=float, default=seconds, help="per case (default %(default)s)")
    arguments.add_argument("--rounds", type=int, default=rounds, help="per case, at least (default %(default)s)")
    arguments.add_argument("--out", type=Path, help="JSON")
    arguments.add_argument("--cpu", help="a better name for the processor")
    return arguments


def model_parser(document, *, seconds):
    """The options of a script that times whole models."""
    arguments = parser(document, seconds=seconds)
    threads = sorted({1, torch.get_num_threads()})
    arguments.add_argument("--threads", type=int, nargs="+", default=threads, help="default: 1 and all")
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--keep-memory", action="store_true", help="call quant_ops.keep_memory() first, for all contenders")
    arguments.add_argument("--smoke", action="store_true", help="small models, to see that it runs")
    return arguments


# ---- other packages ----------------------------------------------------------------------------------------------------


def use_engine(engine):
    """Chooses who packs the int8 weights of torch.ao from now on."""
    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"torch {torch.__version__} lacks the engine {engine} here")
    torch.backends.quantized.engine = engine


def onnx_model(graph, domains=()):
    """A model of an operator set and a format that ONNX Runtime has long read."""
    import onnx

    sets = [onnx.helper.make_opsetid(*item) for item in ({"": 17} | dict(domains)).items()]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=8)


def onnx_call(model, threads, inputs, y, output="y"):
    """A call of an ONNX file or its bytes, whose inputs and output stay in place."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads would slow the next contender
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output(output, "cpu", 0, y.dtype, y.shape, y.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return y

    call.keep = inputs  # the binding holds addresses only
    return call
