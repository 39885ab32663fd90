"""Trains a small CNN on handwritten digits, quantizes it to int8 in two ways, and reports what that cost and brought.

    python examples/digits.py            about 15 seconds; exit status 1 if int8 loses more than one point of accuracy
    python examples/digits.py --quick    fewer epochs and timing rounds, for the test

The two ways: dynamic (`qo.quantize_`: one call, no data) and static (`from_float(input_scale=...)`: scales from calibration).
"""

import argparse
import copy
import functools
import statistics
import sys
import time

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import quant_ops as qo
from quant_ops import info
from quant_ops.report.error import sqnr
from quant_ops.report.timing import interleave


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (n, 1, 8, 8) in [0, 1] and labels: a training part and a held-out quarter, always the same."""
    data = load_digits()
    train_x, test_x, train_y, test_y = train_test_split(
        data.images[:, None] / 16.0, data.target, test_size=0.25, random_state=0, stratify=data.target
    )
    as_images = [torch.tensor(x, dtype=torch.float32) for x in (train_x, test_x)]
    return as_images[0], torch.tensor(train_y), as_images[1], torch.tensor(test_y)


def network() -> nn.Sequential:
    """A convolution of each kind (dense, grouped, depthwise, pointwise), then linear layers."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, groups=4),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, x: Tensor, y: Tensor, epochs: int) -> None:
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Percent."""
    return 100.0 * (model(x).argmax(1) == y).float().mean().item()


def layers(model: nn.Module) -> dict[str, nn.Module]:
    kinds = (nn.Linear, nn.Conv2d, qo.QuantLinear, qo.QuantConv2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def record(model: nn.Module, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """Input and output of every layer when the model sees x."""
    seen = {}
    handles = [
        module.register_forward_hook(lambda _, args, output, name=name: seen.update({name: (args[0], output)}))
        for name, module in layers(model).items()
    ]
    model(x)
    for handle in handles:
        handle.remove()
    return seen


def quantize_static(model: nn.Module, calibration: Tensor) -> nn.Module:
    """A copy whose layers quantize their input with one fixed scale: the largest magnitude in the calibration data / 127."""
    quantized = copy.deepcopy(model)
    for name, (layer_input, _) in record(model, calibration).items():
        layer = quantized.get_submodule(name)
        kind = qo.QuantLinear if isinstance(layer, nn.Linear) else qo.QuantConv2d
        scale, _ = qo.choose_qparams(layer_input, [], -127, 127)
        quantized.set_submodule(name, kind.from_float(layer, input_scale=scale))
    return quantized


def describe(layer: nn.Module) -> str:
    if isinstance(layer, nn.Linear):
        return f"Linear({layer.in_features}, {layer.out_features})"
    assert isinstance(layer, nn.Conv2d)
    groups = f", groups={layer.groups}" if layer.groups > 1 else ""
    return f"Conv2d({layer.in_channels}, {layer.out_channels}, {layer.kernel_size[0]}{groups})"


def state_bytes(model: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in model.state_dict().values())


def microseconds(models: dict[str, nn.Module], x: Tensor, rounds: int) -> dict[str, float]:
    """Median per call. The models take turns, so that a busy moment of the machine hits all of them alike."""
    times = interleave({name: functools.partial(model, x) for name, model in models.items()}, rounds=rounds, turn=0.001)
    return {name: 1e6 * statistics.median(values) for name, values in times.items()}


def print_times(title: str, rows: dict[str, dict[str, float]]) -> None:
    print(f"\n{title:<32}{'float32':>10}{'dynamic':>10}{'static':>10}   (microseconds per call, median)")
    for label, t in rows.items():
        best = min(t["dynamic"], t["static"])
        ratio = t["float32"] / best
        verdict = f"int8 is {ratio:.1f} times as fast" if ratio >= 1.05 else f"int8 is not faster ({ratio:.2f} times float's speed)"
        print(f"  {label:<30}{t['float32']:>10.0f}{t['dynamic']:>10.0f}{t['static']:>10.0f}   {verdict}")


@torch.inference_mode()
def compare(model: nn.Module, calibration: Tensor, x: Tensor, y: Tensor, rounds: int) -> dict:
    """Quantizes, measures, prints the report; returns its figures."""
    dynamic = copy.deepcopy(model)
    conversion = qo.quantize_(dynamic, qo.Int8Dynamic())
    static = quantize_static(model, calibration)
    models = {"float32": model, "dynamic": dynamic, "static": static}
    print(f"quantize_: {conversion}\n")

    report = {
        "accuracy": {name: accuracy(m, x, y) for name, m in models.items()},
        "bytes": {name: state_bytes(m) for name, m in models.items()},
    }
    print(f"{'':<12}{'accuracy':>10}{'loss':>14}{'state_dict':>16}")
    for name, percent in report["accuracy"].items():
        loss, size = report["accuracy"]["float32"] - percent, report["bytes"][name]
        print(f"{name:<12}{percent:>9.2f}%{loss:>8.2f} points{size:>10} bytes ({size / report['bytes']['float32']:.0%})")

    outputs = {name: record(m, x) for name, m in models.items()}
    report["sqnr"] = {
        layer: {name: sqnr(reference, outputs[name][layer][1]) for name in ("dynamic", "static")}
        for layer, (_, reference) in outputs["float32"].items()
    }
    print(f"\n{'SQNR of the output, dB':<36}{'dynamic':>10}{'static':>10}   (errors of earlier layers included)")
    for layer, decibel in report["sqnr"].items():
        print(f"  {layer:<4}{describe(model.get_submodule(layer)):<30}{decibel['dynamic']:>10.1f}{decibel['static']:>10.1f}")

    report["network_us"] = {f"batch {n}": microseconds(models, x[:n], rounds) for n in (1, 32, len(x))}
    print_times("This network", report["network_us"])
    return report


@torch.inference_mode()
def time_larger_layers(rounds: int) -> dict[str, dict[str, float]]:
    """The same comparison on layers of the size that transformers and ResNets have."""
    conv, image = nn.Conv2d(128, 128, 3, padding=1), torch.randn(1, 128, 28, 28)
    cases = {
        "Linear(768, 3072), 128 rows": (nn.Linear(768, 3072), torch.randn(128, 768)),
        "Conv2d(128, 128, 3), 28 x 28": (conv, image),
        "  the same, channels_last": (conv, image.to(memory_format=torch.channels_last)),
    }
    times = {}
    for label, (layer, x) in cases.items():
        kind = qo.QuantLinear if isinstance(layer, nn.Linear) else qo.QuantConv2d
        scale, _ = qo.choose_qparams(x, [], -127, 127)
        models = {"float32": layer, "dynamic": kind.from_float(layer), "static": kind.from_float(layer, input_scale=scale)}
        times[label] = microseconds(models, x, rounds)
    print_times("Larger layers", times)
    return times


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs and timing rounds")
    quick = parser.parse_args(arguments).quick
    torch.set_num_threads(1)  # the network is small; on a busy machine threads would mostly wait for each other

    machine = info.collect()
    print(f"quant_ops {machine['quant_ops']}, torch {machine['torch']}, {machine['cpu']}, {machine['threads']} thread")
    print(f"instruction set {machine['isa']}, kernel {machine['kernels']['int8_linear']}, self-check {machine['status']}")

    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()
    model = network()
    start = time.perf_counter()
    train(model, train_x, train_y, epochs=6 if quick else 25)
    print(f"trained on {len(train_x)} images in {time.perf_counter() - start:.1f} s; {len(test_x)} held out\n")

    rounds = 3 if quick else 30
    report = compare(model, train_x, test_x, test_y, rounds)
    report["layer_us"] = time_larger_layers(rounds)
    report["isa"], report["kernel"] = machine["isa"], machine["kernels"]["int8_linear"]

    losses = {name: report["accuracy"]["float32"] - report["accuracy"][name] for name in ("dynamic", "static")}
    report["ok"] = machine["status"] == "OK" and all(loss <= 1.0 for loss in losses.values())
    print("\nOK: int8 is within one point of float32" if report["ok"] else f"\nFAILED: points of accuracy lost: {losses}")
    return report


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
