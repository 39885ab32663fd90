"""Quantization-aware training on handwritten digits: 4-bit weights, which lose accuracy when a trained model is merely converted.

    python examples/qat_digits.py            about 30 seconds; exit status 1 if training does not recover the loss
    python examples/qat_digits.py --quick    fewer epochs, for the test

Trains a float CNN, folds its BatchNorms, and converts it three ways: after calibration only (PTQ), after fine-tuning with
straight-through gradients, and after fine-tuning with learned scales (LSQ). The accuracies are those of the int8 models.
"""

import argparse
import copy
import sys
import time

import torch
from digits import accuracy, digits, train
from torch import Tensor, nn

import quant_ops as qo


def network() -> nn.Sequential:
    """Few channels, and a depthwise convolution: little redundancy to hide 4-bit weights in."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def fine_tuned(model: nn.Module, config: qo.Int8Static, x: Tensor, y: Tensor, epochs: int) -> nn.Module:
    """A copy that was calibrated, trained with quantized weights and inputs, and converted."""
    model = copy.deepcopy(model)
    qo.prepare_qat_(model, config)
    qo.calibrate(model, x.split(256))
    train(model, x, y, epochs)
    qo.convert_(model)
    return model


def converted(model: nn.Module, config: qo.Int8Static, x: Tensor) -> nn.Module:
    """A copy that was calibrated and converted."""
    model = copy.deepcopy(model)
    qo.prepare_(model, config)
    qo.calibrate(model, x.split(256))
    qo.convert_(model)
    return model


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--bits", type=int, default=4, help="of the weights, 2 to 8")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()

    model, start = network(), time.perf_counter()
    train(model, train_x, train_y, epochs=20 if options.quick else 40)
    folded = copy.deepcopy(model)
    print(f"trained in {time.perf_counter() - start:.1f} s; {qo.fold_batchnorm_(folded)}\n")

    epochs = 5 if options.quick else 15
    searched = qo.Int8Static(observer="mse", weight_bits=options.bits, weight_observer="mse")
    with torch.no_grad():
        found = {"float32": accuracy(model, test_x, test_y)}
    for name, make in {
        "PTQ": lambda: converted(folded, qo.Int8Static(weight_bits=options.bits), train_x),
        "PTQ, scales by mse": lambda: converted(folded, searched, train_x),
        "QAT, straight-through": lambda: fine_tuned(
            folded, qo.Int8Static("ema", weight_bits=options.bits), train_x, train_y, epochs
        ),
        "QAT, learned scales": lambda: fine_tuned(
            folded, qo.Int8Static("lsq", weight_bits=options.bits, weight_observer="mse"), train_x, train_y, epochs
        ),
    }.items():
        start = time.perf_counter()
        quantized = make()
        with torch.no_grad():
            found[name] = accuracy(quantized, test_x, test_y)
        print(f"{name}: {time.perf_counter() - start:.1f} s")

    print(f"\nint{options.bits} weights, int8 activations: accuracy on {len(test_x)} held-out images")
    for name, percent in found.items():
        print(f"  {name:<24}{percent:>7.2f}%")
    lost = found["float32"] - found["PTQ"]
    left = found["float32"] - max(found["QAT, straight-through"], found["QAT, learned scales"])
    ok = left <= max(1.0, lost / 2)
    print(f"\n{'OK' if ok else 'FAILED'}: conversion loses {lost:.2f} points, training brings that to {left:.2f}")
    return {"accuracy": found, "ok": ok, "lost": lost, "left": left}


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
