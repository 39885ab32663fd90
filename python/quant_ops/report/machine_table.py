"""A table of this machine, ``python -m quant_ops bench``: layers of well-known models in float, in other int8 packages and here.

Every result is checked against float32 before it is timed. The contenders of a layer run in turns, in an order drawn anew for each
round; a time is the median of the calls. Their makers: peers.py. The limits: limits.py. The folder benchmarks/ of the sources has
the thorough comparison.
"""

import contextlib
import dataclasses
import math
import os
import random
import statistics
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import _library, info
from .bench import CheckFailed
from .error import sqnr
from .limits import limit_seconds, peak_gops, read_gbs
from .peers import FLOAT, OURS, Call, Problem, contenders
from .timing import duration, in_turns, interleave

_LEAST_SQNR = {"Linear": 30.0, "Conv2d": 20.0}  # dB against float32; a peer whose sums saturate may lose some
_ROUNDS = 3  # of a layer, at least
_MOST_SECONDS = 4.0  # of a layer
_SETTLE_SECONDS = 0.01  # until the threads of the contender before have stopped looking for work
_LIMIT_SECONDS = 0.1  # for each measurement of a limit
_TURN_SECONDS = 0.002
_DISTURBED = 2.0  # a median that is so many times the least time is more of the machine's than of the layer's
_WIDTH = 120  # of the notes


@dataclasses.dataclass(frozen=True)
class Layer:
    """One row: where it comes from, what it is, and its size."""

    model: str
    kind: str
    sizes: tuple[int, ...]  # Linear: rows, inputs, outputs; Conv2d: C, H, O, kernel, stride, groups, with padding kernel // 2

    def __str__(self) -> str:
        if self.kind == "Linear":
            rows, k, n = self.sizes
            return f"Linear {k} -> {n}, {rows} row{'s' if rows > 1 else ''}"
        c, h, o, kernel, stride, groups = self.sizes
        form = "depthwise " if groups == c else ""
        return f"Conv2d {c} -> {o}, {form}{kernel} x {kernel}{f' / {stride}' if stride > 1 else ''}, {h} x {h}"

    def problem(self, device: str) -> Problem:
        """Weights are scaled so that results have about the variance of the input."""
        layer: Any
        if self.kind == "Linear":
            rows, k, n = self.sizes
            layer = nn.utils.skip_init(nn.Linear, k, n, device=device)
            x = torch.randn(rows, k, device=device)
        else:
            c, h, o, kernel, stride, groups = self.sizes
            layer = nn.utils.skip_init(nn.Conv2d, c, o, kernel, stride, kernel // 2, groups=groups, device=device)
            layer = layer.to(memory_format=torch.channels_last)
            x = torch.randn(1, c, h, h, device=device).contiguous(memory_format=torch.channels_last)
        layer.requires_grad_(False).weight.normal_(0, layer.weight[0].numel() ** -0.5)
        layer.bias.normal_()
        return Problem(layer.eval(), x)

    @property
    def macs(self) -> int:
        if self.kind == "Linear":
            return math.prod(self.sizes)
        c, h, o, kernel, stride, groups = self.sizes
        return o * ((h - 1) // stride + 1) ** 2 * (c // groups) * kernel**2


LAYERS = (
    *(Layer("BERT-base", "Linear", (rows, 768, 3072)) for rows in (1, 32, 512)),
    *(Layer("LLM of 7 billion", "Linear", (rows, 4096, 4096)) for rows in (1, 32, 512)),
    Layer("ResNet-50", "Conv2d", (3, 224, 64, 7, 2, 1)),
    Layer("ResNet-50", "Conv2d", (64, 56, 64, 3, 1, 1)),
    Layer("ResNet-50", "Conv2d", (256, 56, 64, 1, 1, 1)),
    Layer("ResNet-50", "Conv2d", (256, 14, 256, 3, 1, 1)),
    Layer("MobileNetV2", "Conv2d", (144, 56, 144, 3, 1, 144)),
    Layer("MobileNetV2", "Conv2d", (96, 14, 576, 1, 1, 1)),
)


def measure(seconds: float = 30.0, layers: tuple[Layer, ...] = LAYERS) -> dict[str, Any]:
    """Times every layer on this machine, on CUDA where the operators are there, in ``seconds`` altogether.

    Returns:
        What ``--json`` prints: "machine", "rows" with the seconds of each contender, "missing" contenders and why, by layer, and
        "left_out", the layers for which the time was too short.

    Raises:
        CheckFailed: a result of ours is wrong.
    """
    end = time.perf_counter() + 0.95 * seconds
    device = "cuda" if _library.cuda_library is not None and torch.cuda.is_available() else "cpu"
    threads = torch.get_num_threads()
    peak = peak_gops(threads, min(5 * _LIMIT_SECONDS, seconds / 20)) if device == "cpu" else None
    rows: dict[Layer, dict[str, Any] | None] = dict.fromkeys(layers)
    missing: dict[str, dict[str, str]] = {}
    with _quiet(), torch.random.fork_rng(devices=[0] if device == "cuda" else []), torch.inference_mode():
        torch.manual_seed(0)
        for i, layer in enumerate(sorted(layers, key=lambda layer: layer.macs)):  # if time runs short, most rows are there
            share = min((end - time.perf_counter()) / (len(layers) - i), _MOST_SECONDS)
            rows[layer] = _row(layer, device, peak, share, end, missing)
    return {
        "machine": _machine(device, peak),
        "rows": [row for row in rows.values() if row is not None],
        "missing": missing,
        "left_out": [f"{layer.model}: {layer}" for layer, row in rows.items() if row is None],
    }


def _machine(device: str, peak: float | None) -> dict[str, Any]:
    gpu = device == "cuda"
    return {
        "quant_ops": _library.VERSION,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if gpu else info.cpu_model(),
        "kind": device,
        "isa": None if gpu else _library.isa(),
        "threads": torch.get_num_threads(),
        "load": None if gpu else round(os.getloadavg()[0], 2),
        "peak_gops": peak,
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao announces its removal
        yield


def _row(
    layer: Layer, device: str, peak: float | None, share: float, end: float, missing: dict[str, dict[str, str]]
) -> dict[str, Any] | None:
    """A row, which takes about ``share`` seconds; None if even the shortest would end too late. Adds to ``missing``."""
    start = time.perf_counter()
    if start >= end:
        return None
    problem = layer.problem(device)
    reference = problem.layer(problem.x)
    if 8 * (time.perf_counter() - start) > end - start:  # the contenders are made, and each is called twice
        return None
    calls, quality, reasons, spent = _checked(layer, problem, reference)
    for name, reason in reasons.items():
        missing.setdefault(name, {})[f"{layer.model}: {layer}"] = reason
    if 2 * _ROUNDS * spent > end - time.perf_counter():  # each turn has a call that warms
        return None
    limit = _limit_seconds(layer, problem, reference, peak) if peak is not None else None
    times = _times(calls, device, share - (time.perf_counter() - start))
    seconds = {name: statistics.median(samples) for name, samples in times.items()}
    peers = {name: t for name, t in seconds.items() if name not in (*FLOAT, OURS)}
    others = {name: t for name, t in seconds.items() if name != OURS}
    best = min(others, key=others.__getitem__)
    return {
        "model": layer.model,
        "layer": str(layer),
        "kind": layer.kind,
        "seconds": seconds,
        "disturbed": [name for name, samples in times.items() if seconds[name] > _DISTURBED * min(samples)],
        "calls": {name: len(samples) for name, samples in times.items()},
        "sqnr_db": quality,
        "best_peer": min(peers, key=peers.__getitem__, default=None),
        "best_other": best,
        "ratio": seconds[best] / seconds[OURS],
        "percent_of_limit": 100 * limit / seconds[OURS] if limit is not None else None,
    }


def _limit_seconds(layer: Layer, problem: Problem, reference: Tensor, peak: float) -> float:
    """What has to be read or written: an int8 weight, and of a convolution the float activations, which are the larger part."""
    activations = problem.x.numel() + reference.numel() if isinstance(problem.layer, nn.Conv2d) else 0
    size = problem.layer.weight.numel() + 4 * activations
    return limit_seconds(layer.macs, size, peak, read_gbs(size, torch.get_num_threads(), _LIMIT_SECONDS))


def _checked(layer: Layer, problem: Problem, reference: Tensor) -> tuple[dict[str, Call], dict[str, float], dict[str, str], float]:
    """The calls whose results are right, their distances from float32 in dB, why others are missing, seconds of one call each."""
    calls: dict[str, Call] = {}
    quality, missing, spent = {}, {}, 0.0
    for name, maker in contenders(problem).items():
        try:
            with torch.inference_mode(mode=False), torch.no_grad():
                call = maker()
            call()
            start = time.perf_counter()
            found = call()
            if found.is_cuda:
                torch.cuda.synchronize()
            spent += time.perf_counter() - start
            distance = sqnr(reference, found)
        except Exception as error:
            if name == OURS:
                raise
            missing[name] = f"{type(error).__name__}: {next(iter(str(error).strip().splitlines()), '')}"
            continue
        if distance > _LEAST_SQNR[layer.kind]:
            calls[name], quality[name] = call, min(distance, 300.0)
        elif name == OURS:
            raise CheckFailed(
                f"quant_ops.bench: expected an SQNR of {_LEAST_SQNR[layer.kind]} dB of {layer}, {layer.model}, got {distance:.1f}"
            )
        else:
            missing[name] = f"its result is {distance:.1f} dB from float32, expected {_LEAST_SQNR[layer.kind]:.0f}"
    return calls, quality, missing, spent


def _times(calls: dict[str, Call], device: str, seconds: float) -> dict[str, list[float]]:
    order = random.Random(0)
    if device == "cuda":
        turns = {name: _cuda_turn(call) for name, call in calls.items()}
        return in_turns(turns, seconds=seconds, rounds=_ROUNDS, order=order)
    settle = _SETTLE_SECONDS if torch.get_num_threads() > 1 else 0.0
    return interleave(calls, seconds=seconds, rounds=_ROUNDS, turn=_TURN_SECONDS, settle=settle, order=order)


def _cuda_turn(call: Call) -> Callable[[], list[float]]:
    """The time of a call among others that are queued behind each other, between two events: what a model in eager mode sees."""

    def turn() -> list[float]:
        call()
        torch.cuda.synchronize()
        begin, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began, calls = time.perf_counter(), 0
        begin.record()
        while calls == 0 or time.perf_counter() - began < _TURN_SECONDS:
            call()
            calls += 1
        stop.record()
        stop.synchronize()
        return [begin.elapsed_time(stop) / 1e3 / calls]

    return turn


# ---- for people ------------------------------------------------------------------------------------------------------------


def text(result: dict[str, Any]) -> str:
    """The table, and what a reader has to know."""
    machine, rows = result["machine"], result["rows"]
    has_bfloat16 = any("bfloat16" in row["seconds"] for row in rows)
    has_limit = any(row["percent_of_limit"] is not None for row in rows)
    heads = ["model", "layer", "float32", *(["bfloat16"] if has_bfloat16 else []), "best other int8", "quant_ops", "speed"]
    table = [[*heads, *(["of limit"] if has_limit else [])]]
    for row in rows:
        table.append(_cells(row, has_bfloat16, has_limit))
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [_title(machine), ""]
    for cells in table:
        padded = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join([*lines, "", *_notes(result, has_bfloat16, has_limit)])


def _cells(row: dict[str, Any], has_bfloat16: bool, has_limit: bool) -> list[str]:
    seconds, peer = row["seconds"], row["best_peer"]
    cells = [row["model"], row["layer"], _show(seconds.get("float32"))]
    if has_bfloat16:
        cells.append(_show(seconds.get("bfloat16")))
    cells += [
        f"{peer} {_show(seconds[peer]):>7}" if peer else "none",
        _show(seconds[OURS]),
        f"{row['ratio']:.2f} x{' *' if row['disturbed'] else ''}",
    ]
    if has_limit:
        cells.append("" if row["percent_of_limit"] is None else f"{row['percent_of_limit']:.0f} %")
    return cells


def _title(machine: dict[str, Any]) -> str:
    where = f"{machine['device']}, {machine['isa']}, " if machine["isa"] else f"{machine['device']}, "
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"quant_ops {machine['quant_ops']}, torch {machine['torch']} on {where}{threads if machine['isa'] else 'eager mode'}"


def _notes(result: dict[str, Any], has_bfloat16: bool, has_limit: bool) -> list[str]:
    machine = result["machine"]
    dtype = "bfloat16" if machine["kind"] == "cuda" else "float32"
    notes = [
        f"Times are medians of calls on the same data again and again, quantization included: int8 from {dtype} to {dtype}, Linear "
        "with scales from the data of each call, convolutions with a fixed scale and channels_last.",
        "speed: the time of the best of the others divided by that of quant_ops; below 1, another one is faster.",
    ]
    if has_limit:
        notes.append(
            f"of limit: the time of all products at {machine['peak_gops'] / 1e3:.2f} trillion int8 operations a second, or of one "
            "pass over the data, whichever is longer, both measured in this process, divided by the time of quant_ops."
        )
    if machine["isa"] in ("avx2", "avx512") and any("ONNX Runtime" in row["seconds"] for row in result["rows"]):
        notes.append(
            "Without VNNI instructions ONNX Runtime adds products in 16 bits, which saturate for large codes; the sums of "
            "quant_ops are exact."
        )
    if result["rows"] and not has_bfloat16:
        notes.append("No column of bfloat16: this processor has no instructions for it.")
    for kind in ("Linear", "Conv2d"):
        ratios = [row["ratio"] for row in result["rows"] if row["kind"] == kind and not row["disturbed"]]
        if ratios:
            notes.append(f"Geometric mean of the speeds of {kind}, {len(ratios)} rows: {statistics.geometric_mean(ratios):.2f}.")
    for name, layers in result["missing"].items():
        notes.append(f"{name} is missing in {len(layers)} row{'s' if len(layers) > 1 else ''}: {next(iter(layers.values()))}.")
    if result["left_out"]:
        notes.append(f"Left out, as --seconds was too short: {'; '.join(result['left_out'])}.")
    if any(row["disturbed"] for row in result["rows"]):
        notes.append(
            f"*: a median is more than {_DISTURBED:g} times the least time of the same calls, so other work on the machine decided "
            "this row. Repeat it on a quiet machine, or with fewer --threads."
        )
    if machine["load"] is not None and machine["load"] > 0.5 * (os.cpu_count() or 1):
        notes.append(f"Other processes were running (load {machine['load']}): take the times with caution.")
    return [line for note in notes for line in textwrap.wrap(note, _WIDTH)]


def _show(seconds: float | None) -> str:
    return "none" if seconds is None else duration(seconds)


def plot(result: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes a picture (PNG, SVG, PDF by the ending): how many times faster than float32 each contender is, layer by layer."""
    figure_class = check_plot(path)
    rows = result["rows"]
    columns = [("bfloat16", "tab:gray"), ("best other int8", "tab:orange"), (OURS, "tab:blue")]
    speeds: dict[str, list[float]] = {name: [] for name, _ in columns}
    for row in rows:
        seconds = row["seconds"]
        named = {"bfloat16": seconds.get("bfloat16"), "best other int8": seconds.get(row["best_peer"]), OURS: seconds[OURS]}
        for name, value in named.items():
            speeds[name].append(seconds["float32"] / value if value else math.nan)
    columns = [(name, color) for name, color in columns if not all(map(math.isnan, speeds[name]))]
    figure = figure_class(figsize=(10, 1.6 + 0.5 * max(len(rows), 1)), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / max(len(columns), 1)
    for i, (name, color) in enumerate(columns):
        places = [place + (i - (len(columns) - 1) / 2) * height for place in range(len(rows))]
        bars = axes.barh(places, [0.0 if math.isnan(v) else v for v in speeds[name]], height, color=color, label=name)
        axes.bar_label(bars, ["" if math.isnan(v) else f"{v:.1f}" for v in speeds[name]], padding=2, fontsize=7)
    axes.axvline(1, color="black", linestyle="--", linewidth=1, label="float32")
    axes.set(yticks=range(len(rows)), yticklabels=[f"{row['model']}: {row['layer']}" for row in rows])
    axes.set(xlabel="times faster than float32", title=_title(result["machine"]))
    axes.set_ylim(max(len(rows), 1) - 0.4, -0.6)
    axes.margins(x=0.08)
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=120)


def check_plot(path: str | os.PathLike[str]) -> Any:
    """matplotlib's Figure, if a picture can be written to ``path``.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no folder to write to, or an ending that is no format of pictures.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "quant_ops bench: expected matplotlib for --plot, got none installed. Install it with: pip install 'quant_ops[report]'"
        ) from error
    target = Path(path)
    if not target.resolve().parent.is_dir() or target.is_dir():
        raise ValueError(f"quant_ops bench: expected --plot as a file in an existing folder, got {path}")
    known = Figure().canvas.get_supported_filetypes()
    if target.suffix.removeprefix(".") not in known:
        raise ValueError(f"quant_ops bench: expected --plot with an ending of a picture such as .png or .svg, got {path}")
    return Figure
