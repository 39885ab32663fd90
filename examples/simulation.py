"""Three models in thirteen number formats: what each format costs a classifier, a language model and a transformer block.

    python examples/simulation.py            about half a minute; writes out/simulation.png and prints the figures as a table
    python examples/simulation.py --quick    less training, for the test

Trains a CNN on handwritten digits and a small character language model on the part of Python's manual that comes with Python. Then
the inputs and weights of all layers and of attention are rounded to each format. Scales come from the data: integers and floating
formats have one for the inputs and one for each channel of the weights; MX and NVFP4 have one for each block, which bits count.
"""

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from digits import accuracy, digits, network, train
from matplotlib.figure import Figure
from torch import Tensor, nn

import quant_ops as qo

LINES: dict[str, dict[str, qo.Format]] = {
    "integers": {f"INT{bits}": qo.IntFormat(bits) for bits in (8, 6, 4, 3, 2)},
    "E5M2, scaled": {"E5M2": qo.E5M2.with_(scaled=True)},
    "E4M3, E3M2, E2M1, scaled": {str(format): format.with_(scaled=True) for format in (qo.E4M3, qo.E3M2, qo.E2M1)},
    "MX, blocks of 32": {"MXFP8 (E4M3)": qo.MXFP8_E4M3, "MXFP6 (E2M3)": qo.MXFP6_E2M3, "MXFP4 (E2M1)": qo.MXFP4},
    "NVFP4, blocks of 16": {"NVFP4": qo.NVFP4},
}
FORMATS = {name: format for line in LINES.values() for name, format in line.items()}
MEASURES = ("accuracy of the CNN, percent", "perplexity of the language model", "SQNR of the block, dB")
Measure = Callable[[nn.Module], float]


def in_format(model: nn.Module, format: qo.Format) -> nn.Module:
    """A copy whose layers, and whose products in attention, round their inputs and weights."""
    simulated, config = copy.deepcopy(model), qo.Simulated(input=format, weight=format)
    qo.quantize_(simulated, config)
    qo.simulate_products_(simulated, config)
    return simulated


# ---- the language model --------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Causal attention and a perceptron, each after a LayerNorm and beside a residual connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_perceptron = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.perceptron = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.project(attended.transpose(1, 2).flatten(2))
        return x + self.perceptron(self.before_perceptron(x))


class LanguageModel(nn.Module):
    """Predicts each next character."""

    def __init__(self, characters: int, context: int = 64, width: int = 64, blocks: int = 2) -> None:
        super().__init__()
        self.embed, self.place = nn.Embedding(characters, width), nn.Parameter(0.1 * torch.randn(context, width))
        self.blocks = nn.Sequential(*(Block(width, heads=4) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.embed(x) + self.place)))


def texts(held_out: int, context: int = 64) -> tuple[int, Tensor, Tensor]:
    """The number of characters, and texts of ``context + 1`` of them: to train with, and held out."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "replace")[:400_000]
    characters = sorted(set(text))
    codes = torch.tensor([characters.index(character) for character in text])
    rows = codes[: len(codes) // (context + 1) * (context + 1)].view(-1, context + 1)
    rows = rows[torch.randperm(len(rows))]
    return len(characters), rows[held_out:], rows[:held_out]


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train_language_model(model: nn.Module, rows: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model, rows[torch.randint(len(rows), (16,))]).backward()
        optimizer.step()
        schedule.step()
    model.eval()


# ---- measuring -----------------------------------------------------------------------------------------------------------


def measures(quick: bool) -> list[tuple[nn.Module, Measure]]:
    """The trained models, each with a function that measures it or a simulated copy."""
    train_x, train_y, test_x, test_y = digits()
    cnn = network()
    train(cnn, train_x, train_y, epochs=3 if quick else 15)

    characters, train_rows, test_rows = texts(64 if quick else 256)
    language_model = LanguageModel(characters)
    train_language_model(language_model, train_rows, steps=100 if quick else 1200)

    block, tokens = nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True).eval(), torch.randn(8, 64, 256)
    return [
        (cnn, lambda model: accuracy(model, test_x, test_y)),
        (language_model, lambda model: math.exp(loss(model, test_rows).item())),
        (block, lambda model: math.inf if model is block else qo.compare(block, model, tokens).sqnr),
    ]


@torch.no_grad()
def measure(models: list[tuple[nn.Module, Measure]]) -> dict[str, list[float]]:
    """The figures of MEASURES, for float32 and each format."""
    figures = {"float32": [of(model) for model, of in models]}
    for name, format in FORMATS.items():
        figures[name] = [of(in_format(model, format)) for model, of in models]
    return figures


def table(figures: dict[str, list[float]]) -> str:
    rows = [f"{'format':<14}{'bits':>6}{'accuracy':>10}{'perplexity':>12}{'SQNR':>9}"]
    for name, (percent, perplexity, decibel) in figures.items():
        bits = FORMATS[name].bits if name in FORMATS else 32
        rows.append(f"{name:<14}{bits:>6.4g}{percent:>9.1f}%{perplexity:>12.2f}{decibel:>6.1f} dB")
    return "\n".join(rows)


def plot(figures: dict[str, list[float]], path: Path) -> None:
    figure = Figure(figsize=(16, 5.5), layout="constrained")
    figure.suptitle("Inputs and weights of all layers, and of attention, in a number format")
    panels = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    for i, (axes, title) in enumerate(zip(panels, MEASURES, strict=True)):
        for number, (line, formats) in enumerate(LINES.items()):
            bits, values = [format.bits for format in formats.values()], [figures[name][i] for name in formats]
            axes.plot(bits, values, "o-" if len(formats) > 1 else "D", color=f"C{number}", label=line)
        if math.isfinite(figures["float32"][i]):
            axes.axhline(figures["float32"][i], color="black", linestyle="--", label="float32")
        axes.set(title=title, xlabel="bits an element", xlim=(1.6, 8.6))
        axes.grid(alpha=0.4)
    panels[1].set_yscale("log")
    panels[1].yaxis.set_major_formatter("{x:.0f}")
    for name, format in FORMATS.items():
        left = name in ("INT8", "INT6", "INT4", "E4M3", "E2M1")
        offset = (-6, 3) if left else (13, -2) if name.startswith("MXFP6") else (6, -9)
        place, side = (format.bits, figures[name][2]), "right" if left else "left"
        panels[2].annotate(name.split()[0], place, offset, textcoords="offset points", ha=side, fontsize=9)
    panels[2].set_xlim(1.6, 9.1)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(path, dpi=100)


def keeps(of_format: list[float], of_float: list[float]) -> bool:
    """Whether at most a point of accuracy and a twentieth of the perplexity are lost."""
    return of_format[0] >= of_float[0] - 1 and of_format[1] <= 1.05 * of_float[1]


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less training")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the picture")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the models are small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    start = time.perf_counter()
    figures = measure(measures(options.quick))
    print(table(figures))
    path = options.out / "simulation.png"
    plot(figures, path)
    print(f"\n{path}: {path.stat().st_size} bytes, {time.perf_counter() - start:.0f} s")
    ok = all(keeps(figures[name], figures["float32"]) for name in ("INT8", "E4M3", "MXFP8 (E4M3)"))
    print("OK: 8 bits keep what the models have learned" if ok else "FAILED: 8 bits lose too much")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
