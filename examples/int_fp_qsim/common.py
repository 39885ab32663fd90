"""What the scripts share: formats, their arguments, and the table."""

import argparse
import copy
import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from quant_ops.compat.int_fp_qsim.formats import E2M1, E4M3, E5M2, FP16, INT4, INT8
from quant_ops.compat.int_fp_qsim.replace import replace_layers
from quant_ops.report.error import sqnr

# formats of inputs, weights and outputs
FORMATS = {
    "E4M3, E4M3, FP16": (E4M3, E4M3, FP16),
    "E5M2, E5M2, FP16": (E5M2, E5M2, FP16),
    "INT8, INT8, FP16": (INT8, INT8, FP16),
    "INT8, INT4, FP16": (INT8, INT4, FP16),
    "INT4, INT4, FP16": (INT4, INT4, FP16),
    "E2M1, E2M1, FP16": (E2M1, E2M1, FP16),
}


def package(name: str) -> ModuleType:
    """The package, or a message and exit status 1."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        sys.exit(f"this example needs {name} ({error}): pip install {name}")


def arguments(doc: str, **defaults: int) -> argparse.Namespace:
    """The command line: an option for each of the numbers, a seed, and threads, of which a small model needs one."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for name, value in {**defaults, "seed": 0, "threads": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=" ")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    return args


def simulated(model: nn.Module, name: str) -> nn.Module:
    """A copy of the model with layers and attention in one of FORMATS."""
    return replace_layers(copy.deepcopy(model), *FORMATS[name])


def table(headings: list[str], rows: dict[str, list[Any]]) -> None:
    """Prints figures, a line for each of the formats."""
    print(f"{'input, weight, output':<32}" + "".join(f"{heading:>18}" for heading in headings))
    for name, figures in rows.items():
        print(f"{name:<32}" + "".join(f"{figure:>18.2f}" for figure in figures))


def agreement(expected: Tensor, got: Tensor) -> float:
    """Percent of the elements that are the same, such as classes."""
    return 100 * float((expected == got).float().mean())


def compare(
    model: nn.Module,
    run: Callable[[nn.Module], dict[str, Tensor]],
    classes: Callable[[dict[str, Tensor]], Tensor],
    what: str = "class",
) -> None:
    """Prints, for each of FORMATS, the SQNR of each of the outputs, and how many of the classes stay as in float."""
    model.eval()
    with torch.no_grad():
        expected = run(model)
        rows = {}
        for name in FORMATS:
            got = run(simulated(model, name))
            figures = [sqnr(expected[output], got[output]) for output in expected]
            rows[name] = [*figures, agreement(classes(expected), classes(got))]
    table([*(f"{output}, dB" for output in expected), f"same {what}, %"], rows)


# ---- language models -----------------------------------------------------------------------------------------------------


def characters() -> Tensor:
    """Python source of the standard library, as codes below 128."""
    return torch.tensor([min(ord(c), 127) for c in inspect.getsource(argparse)])


def batches(data: Tensor, count: int, length: int = 64, rows: int = 16) -> list[Tensor]:
    starts = torch.randint(len(data) - length, (count, rows))
    return [torch.stack([data[start : start + length] for start in batch]) for batch in starts]


def train(model: nn.Module, data: Tensor, steps: int) -> None:
    """A few steps, so that perplexity means something."""
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    model.train()
    for batch in batches(data, steps):
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
    model.eval()


@torch.no_grad()
def perplexity(model: nn.Module, data: list[Tensor]) -> float:
    losses = [model(input_ids=batch, labels=batch).loss for batch in data]
    return float(torch.stack(losses).mean().exp())
