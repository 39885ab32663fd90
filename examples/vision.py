"""A small residual network on handwritten digits: float -> static int8 -> report -> fallback -> file -> int8 again.

    python examples/vision.py             about half a minute; writes to out/; exit status 1 if int8 loses more than one point
    python examples/vision.py --quick     fewer epochs, for the test

Read next: text_encoder.py for dynamic quantization, qat_digits.py for training with quantized weights.
"""

import argparse
import copy
import sys
from pathlib import Path

import torch
from digits import accuracy, digits, state_bytes, train
from torch import Tensor, nn

import quant_ops as qo


class Block(nn.Module):
    """relu(x + bn(conv(relu(bn(conv(x)))))), with a strided shortcut where the shape changes."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False), nn.BatchNorm2d(out)
        self.conv2, self.norm2 = nn.Conv2d(out, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        self.short = nn.Conv2d(channels, out, 1, stride) if stride > 1 or channels != out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (self.short(x) + self.norm2(self.conv2(h))).relu()


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.head = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        return self.head(self.blocks(x).mean((2, 3)))


def static(model: nn.Module, calibration: Tensor, config: qo.Int8Static) -> nn.Module:
    """A copy in int8, with one scale and zero point for the input of every layer."""
    quantized = copy.deepcopy(model)
    qo.prepare_(quantized, config)
    qo.calibrate(quantized, calibration.split(128))
    qo.convert_(quantized)
    return quantized


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files that are written")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the network is small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()
    model = ResNet()
    train(model, train_x, train_y, epochs=4 if options.quick else 20)
    print(f"before quantization: {qo.fold_batchnorm_(model, train_x[:8])}")

    # One scale for the weights of each output channel, one scale and zero point for each layer's input.
    int8 = static(model, train_x, qo.Int8Static(observer="mse"))
    # Fewer bits, to see something being lost. The accuracy that decides is not that of the test images.
    coarse = static(model, train_x, qo.Int8Static(observer="mse", weight_bits=3))
    report = qo.compare(model, coarse, test_x)
    print(f"\nwith weights of 3 bits:\n{report}\n")
    mixed = copy.deepcopy(coarse)
    wanted = accuracy(model, train_x, train_y) - 0.5
    result = qo.fallback_(mixed, report, target=wanted, metric=lambda m: accuracy(m, train_x, train_y))
    print(f"until the accuracy on the training images is {wanted:.2f}%: {result}\n")

    models = {"float32": model, "int8": int8, "weights of 3 bits": coarse, "the same, mixed": mixed}
    percent = {name: accuracy(m, test_x, test_y) for name, m in models.items()}
    for name, m in models.items():
        print(f"{name:<20}{percent[name]:>8.2f}%{state_bytes(m):>10} bytes")

    path = options.out / "vision.safetensors"
    qo.save(mixed, path)
    report.to_json(options.out / "vision.json")
    loaded = ResNet().eval()
    qo.fold_batchnorm_(loaded, train_x[:8])  # as the saved one was
    qo.load_(loaded, path)
    same = torch.equal(loaded(test_x), mixed(test_x))
    print(
        f"\n{path}: {path.stat().st_size} bytes; a fresh model that loads it gives {'the same bits' if same else 'SOMETHING ELSE'}"
    )

    ok = same and percent["float32"] - percent["int8"] <= 1.0 and percent["the same, mixed"] >= percent["weights of 3 bits"] - 1.0
    print("OK: int8 is within one point of float32" if ok else "FAILED")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
