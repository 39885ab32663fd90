"""What each number format costs: error against bits, for Gaussian and Laplace data and the activations of two trained networks.

    python examples/formats.py            about half a minute; writes out/formats.png and prints the figures as a table
    python examples/formats.py --quick    fewer epochs and less data, for the test

One line a format, from its narrowest form to its widest. Scales come from the data: one a tensor, or one a block of 16, 32 or 64
elements along the dimension that a layer sums over; bits count the scales of blocks. The error is a signal-to-noise ratio in dB; of
activations it is the mean over the layers' inputs.
"""

import argparse
import itertools
import sys
from pathlib import Path

import torch
from digits import digits, network, train
from matplotlib.figure import Figure
from torch import Tensor, nn

import quant_ops as qo
from quant_ops.report.error import sqnr


def elements(exponent_bits: int) -> list[qo.FloatFormat]:
    """Floating formats of up to 8 bits."""
    formats = [qo.FloatFormat(exponent_bits, mantissa_bits) for mantissa_bits in range(1, 7 - exponent_bits)]
    return [*formats, qo.E4M3 if exponent_bits == 4 else qo.FloatFormat(exponent_bits, 7 - exponent_bits)]


LINES: dict[str, list[qo.Format]] = {
    "integers": [qo.IntFormat(bits) for bits in range(3, 10)],
    **{f"float, {e} exponent bits": [element.with_(scaled=True) for element in elements(e)] for e in (2, 3, 4)},
    "MX integers": [qo.BlockFloat(bits, block_size=32) for bits in range(3, 10)],
    **{f"MX, {e} exponent bits": [qo.MX(element) for element in elements(e)] for e in (2, 3, 4)},
    "ABFP": [qo.ABFP(bits) for bits in range(3, 10)],
    "NVFP4": [qo.NVFP4],
    "NVFP4, two levels": [qo.NVFP4_TWO_LEVEL],
}
Figures = dict[str, dict[qo.Format, list[float]]]


# ---- data ----------------------------------------------------------------------------------------------------------------


class RowsOfPixels(nn.Module):
    """A transformer block between linear layers. The rows of an image are its tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.place = nn.Linear(8, 64), nn.Parameter(0.1 * torch.randn(8, 64))
        self.block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.embed(x[:, 0]) + self.place).mean(1))


@torch.no_grad()
def inputs(model: nn.Module, kinds: tuple[type[nn.Module], ...], x: Tensor) -> list[Tensor]:
    """The inputs of the model's layers of these kinds, but for those that are the images themselves."""
    seen: list[Tensor] = []
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    handles = [layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for layer in layers]
    model.train()(x)  # in eval mode a transformer block is one call, in which no layer is seen
    for handle in handles:
        handle.remove()
    return seen[1:]


def datasets(quick: bool) -> dict[str, list[Tensor]]:
    train_x, train_y, test_x, _ = digits()
    cnn, transformer = network(), RowsOfPixels()
    for model in (cnn, transformer):
        train(model, train_x, train_y, epochs=2 if quick else 15)
    number = 2**14 if quick else 2**18
    return {
        "Gaussian": [torch.randn(number // 256, 256)],
        "Laplace": [torch.distributions.Laplace(0.0, 1.0).sample((number // 256, 256))],
        "CNN": inputs(cnn, (nn.Conv2d, nn.Linear), test_x),
        "transformer": inputs(transformer, (nn.Linear, nn.MultiheadAttention), test_x),
    }


# ---- measuring -----------------------------------------------------------------------------------------------------------


def rounded(format: qo.Format, x: Tensor) -> Tensor:
    """x in the format, with blocks along channels or features."""
    if hasattr(format, "along"):
        format = format.along(1 if x.dim() == 4 else -1)
    return format(x)


def measure(data: dict[str, list[Tensor]]) -> Figures:
    """SQNR in dB of every format, for each set of data."""

    def mean(format: qo.Format, tensors: list[Tensor]) -> float:
        return sum(sqnr(x, rounded(format, x)) for x in tensors) / len(tensors)

    return {
        line: {format: [mean(format, tensors) for tensors in data.values()] for format in formats}
        for line, formats in LINES.items()
    }


def table(figures: Figures, names: list[str]) -> str:
    width = max(len(str(format)) for formats in LINES.values() for format in formats)
    rows = [f"{'SQNR, dB':<{width}}{'bits':>8}" + "".join(f"{name:>14}" for name in names)]
    for line, of_formats in figures.items():
        rows.append(line)
        rows += [
            f"  {format!s:<{width - 2}}{format.bits:>8.3g}" + "".join(f"{value:>14.1f}" for value in values)
            for format, values in of_formats.items()
        ]
    return "\n".join(rows)


def plot(figures: Figures, names: list[str], path: Path) -> None:
    figure = Figure(figsize=(15, 11), layout="constrained")
    figure.suptitle("Error against bits: scales from the data; bits count the scales of blocks")
    for i, (axes, name) in enumerate(zip(figure.subplots(2, 2).flat, names, strict=True)):
        for number, (line, of_formats) in enumerate(figures.items()):
            line_style = "o--" if line == "integers" or line.startswith("float") else "o-"
            style = {"NVFP4": "*", "NVFP4, two levels": "x"}.get(line, line_style)
            bits, values = [format.bits for format in of_formats], [row[i] for row in of_formats.values()]
            axes.plot(bits, values, style, color=f"C{number}" if number < 10 else "black", label=line)
        axes.set(title=name, xlabel="bits an element", ylabel="SQNR (dB), more is better")
        axes.grid(alpha=0.4)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=100)


def rises(values: list[list[float]]) -> bool:
    """Whether every further bit is a gain, for each set of data."""
    return all(a < b for narrow, wide in itertools.pairwise(values) for a, b in zip(narrow, wide, strict=True))


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs and less data")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the networks are small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    data = datasets(options.quick)
    figures = measure(data)
    print(table(figures, list(data)))
    path = options.out / "formats.png"
    plot(figures, list(data), path)
    ok = all(rises(list(of_formats.values())) for of_formats in figures.values())
    print(f"\n{path}: {path.stat().st_size} bytes")
    print("OK: every line rises with its bits" if ok else "FAILED: a line falls")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
