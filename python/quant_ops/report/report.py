"""The report of :func:`quant_ops.compare`: what int8, int4 or other formats cost each layer, as a table, JSON and picture.

What the figures mean: error.py. How they are measured: compare.py.
"""

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

from torch import nn

from .._models import Forward, Printed
from .error import decibel


@dataclasses.dataclass
class LayerReport:
    """One quantized or simulated layer against its float original.

    Attributes:
        name, kind: its name in the model and its class.
        calls: how often the batch came through; sums below are over all calls.
        error: normalised error of its output; ``sqnr`` is the same in dB.
        cosine: of the angle between both outputs.
        clipped: fraction of its input that a static scale saturates, or that is beyond a calibrated amax; 0 where scales follow
            from the data of each call.
        float_bytes, bytes: memory that its tensors hold, a packed copy of the weight included. The weight of a simulated layer
            counts with its format's bits an element, and four bytes for each scale that is not among them; with a function in
            place of a format it counts as it is.
        float_seconds, seconds: the shortest of the timed runs, summed over calls; None if not timed.
        chained: why it cannot be float alone: it takes or gives int8, or has a fused ReLU. Empty if it can.
        simulated: whether it is a simulated layer.
    """

    name: str
    kind: str
    calls: int
    error: float
    cosine: float
    clipped: float
    float_bytes: int
    bytes: int
    float_seconds: float | None
    seconds: float | None
    chained: str = ""
    simulated: bool = False

    @property
    def sqnr(self) -> float:
        """In dB; infinite where nothing is lost."""
        return decibel(self.error)


@dataclasses.dataclass(repr=False)
class Report(Printed):
    """What :func:`compare` found. It prints as its table, also in a notebook.

    Attributes:
        layers: the quantized and simulated layers that the batch reached, in the model's order.
        unreached: names of those that it did not reach.
        error, cosine: of the whole model's output; ``sqnr`` in dB.
        float_bytes, bytes: memory that the tensors of the whole models hold, those that stayed float included; weights of
            simulated layers as in :class:`LayerReport`.
        float_seconds, seconds: the shortest of the timed runs of the whole models; None if not timed.
    """

    layers: list[LayerReport]
    unreached: list[str]
    error: float
    cosine: float
    float_bytes: int = 0
    bytes: int = 0
    float_seconds: float | None = None
    seconds: float | None = None
    _source: "tuple[nn.Module, Any, Forward | None] | None" = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def sqnr(self) -> float:
        """Of the whole model's output, in dB."""
        return decibel(self.error)

    @property
    def simulated(self) -> bool:
        """Whether a layer is a simulated one."""
        return any(layer.simulated for layer in self.layers)

    def worst(self, n: int = 5) -> list[LayerReport]:
        """The n layers that lose most, worst first.

        Raises:
            ValueError: n < 0.
        """
        if n < 0:
            raise ValueError(f"quant_ops.Report.worst: expected n >= 0, got {n}")
        return sorted(self.layers, key=lambda layer: -layer.error)[:n]

    def table(self) -> str:
        """The layers in the model's order, one a line, then the whole model."""
        timed = _timed(self) and all(map(_timed, self.layers))
        header = ["layer", "class", "calls", "SQNR dB", "cosine", "clipped", "KiB float", _form(self), "us float", _form(self)]
        rows = [
            [
                layer.name,
                layer.kind,
                str(layer.calls),
                f"{layer.sqnr:.1f}",
                f"{layer.cosine:.6f}",
                f"{100 * layer.clipped:.3f}%",
                *_pair(layer.float_bytes / 1024, layer.bytes / 1024),
                *(_pair(1e6 * (layer.float_seconds or 0), 1e6 * (layer.seconds or 0)) if timed else ()),
            ]
            for layer in self.layers
        ]
        totals = ["model", "", "", f"{self.sqnr:.1f}", f"{self.cosine:.6f}", ""]
        totals += _pair(self.float_bytes / 1024, self.bytes / 1024)
        if timed:
            totals += _pair(1e6 * (self.float_seconds or 0), 1e6 * (self.seconds or 0))
        lines = _columns([header[: len(totals)], *rows, totals])
        return "\n".join([*lines, *(f"never called: {name}" for name in self.unreached)])

    def __str__(self) -> str:
        return self.table()

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """As JSON, which is also written to ``path`` if one is given. Infinite figures become null."""
        text = json.dumps(
            {
                "sqnr_db": _finite(self.sqnr),
                "error": _finite(self.error),
                "cosine": _finite(self.cosine),
                "float_bytes": self.float_bytes,
                "bytes": self.bytes,
                "float_seconds": self.float_seconds,
                "seconds": self.seconds,
                "layers": [
                    {key: _finite(value) for key, value in dataclasses.asdict(layer).items()} | {"sqnr_db": _finite(layer.sqnr)}
                    for layer in self.layers
                ],
                "unreached": self.unreached,
            },
            indent=2,
        )
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    @classmethod
    def from_json(cls, text: str) -> "Report":
        """The report that :meth:`to_json` wrote. It knows neither models nor data."""
        try:
            data = json.loads(text)
            names = {field.name for field in dataclasses.fields(LayerReport)}
            layers = [LayerReport(**{k: v for k, v in layer.items() if k in names}) for layer in data["layers"]]
            for layer in layers:
                layer.error = math.inf if layer.error is None else float(layer.error)
            error = math.inf if data["error"] is None else float(data["error"])
            whole = {key: data.get(key) for key in ("float_seconds", "seconds")}
            for key in ("float_bytes", "bytes"):  # early reports lack them
                whole[key] = data.get(key, sum(getattr(layer, key) for layer in layers))
            return cls(layers, [str(name) for name in data["unreached"]], error, float(data["cosine"]), **whole)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as wrong:
            raise ValueError(f"quant_ops.Report.from_json: expected the JSON of Report.to_json, got {wrong!r}") from wrong

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Writes a picture (PNG, SVG, PDF by the ending): SQNR and time of every layer, the worst first.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError(
                "quant_ops.Report.plot: expected matplotlib, got none installed. Install it with: pip install 'quant_ops[report]'"
            ) from error
        worst = self.worst(len(self.layers))
        timed = bool(worst) and all(map(_timed, worst))
        height = 1.6 + 0.22 * max(4, len(worst))
        figure = Figure(figsize=(13 if timed else 8, height), layout="constrained")
        figure.suptitle(f"{_form(self)} against float, {len(worst)} layers, the worst first")
        axes = figure.subplots(1, 2 if timed else 1, squeeze=False)[0]
        _plot_sqnr(axes[0], worst, self.sqnr)
        if timed:
            _plot_times(axes[1], worst)
        figure.savefig(path, dpi=120)


def _plot_sqnr(axes: Any, layers: list[LayerReport], model: float) -> None:
    """A line from the axis to each layer's SQNR. The axis covers the values, which seldom begin near 0 dB."""
    finite = [value for value in (*(layer.sqnr for layer in layers), model) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=1.0)
    margin = max(1.0, 0.08 * (high - low))
    left, right = low - margin, high + margin
    values = [min(max(layer.sqnr, left), right) for layer in layers]
    places = range(len(layers))
    axes.hlines(places, left, values, color="tab:blue", alpha=0.5)
    axes.plot(values, places, "o", color="tab:blue", label="layer")
    if math.isfinite(model):
        axes.axvline(model, color="black", linestyle="--", label=f"whole model: {model:.1f} dB")
    axes.set(xlim=(left, right), yticks=places, yticklabels=[layer.name for layer in layers], xlabel="SQNR (dB), more is better")
    _rows(axes, len(layers))


def _plot_times(axes: Any, layers: list[LayerReport]) -> None:
    places = range(len(layers))
    axes.barh([p - 0.2 for p in places], [1e6 * (x.float_seconds or 0) for x in layers], 0.4, label="float", color="tab:gray")
    axes.barh([p + 0.2 for p in places], [1e6 * (x.seconds or 0) for x in layers], 0.4, label="quantized", color="tab:blue")
    axes.set(yticks=places, yticklabels=[], xlabel="time (microseconds)")
    _rows(axes, len(layers))


def _rows(axes: Any, count: int) -> None:
    """The first layer on top, and the legend above the axes, where it hides nothing."""
    axes.set_ylim(max(count, 1) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.4)
    axes.set_axisbelow(True)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _form(report: Report) -> str:
    """What stands beside float, for headings."""
    if report.simulated:
        return "formats"
    return "packed" if any(layer.kind.startswith("WeightOnly") for layer in report.layers) else "int8"


def _timed(layer: LayerReport | Report) -> bool:
    return layer.seconds is not None and layer.float_seconds is not None


def _pair(*values: float) -> list[str]:
    return [f"{value:.1f}" for value in values]


def _columns(rows: list[list[str]]) -> list[str]:
    """Names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))).rstrip()
        for row in rows
    ]
