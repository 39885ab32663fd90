"""Times calibration against the float forward, and then the choice of scales and the conversion.

python -m benchmarks.packages.calibration             three networks, every observer, one thread: about a minute
python -m benchmarks.packages.calibration --smoke     two rounds of the smallest, to see that it runs

A forward that observes should take at most 1.5 times as long as the float forward with "minmax", 3 times with "mse" or "histogram".
The networks are a transformer encoder, dense convolutions, and inverted residuals, whose depthwise convolutions do little work for
each value that is observed. Figures are the best of the rounds.
"""

import argparse
import copy
import functools
import random
import time

import torch
from torch import Tensor, nn

import quant_ops as qo
from quant_ops.observers import Observer
from quant_ops.report.timing import in_turns


class Residual(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module | None = None) -> None:
        super().__init__()
        self.body, self.shortcut = body, shortcut or nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.body(x)


def dense() -> nn.Module:
    """ResNet-18 without normalization."""
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 7, 2, 3), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    for inputs, outputs, stride in (
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
        (128, 256, 2),
        (256, 256, 1),
        (256, 512, 2),
    ):
        body = nn.Sequential(nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, 1, 1))
        layers += [Residual(body, nn.Conv2d(inputs, outputs, 1, stride)), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(256, 4, 1024, batch_first=True), 2, enable_nested_tensor=False)


def inverted(channels: int = 32) -> nn.Module:
    """The blocks of MobileNetV2."""
    wide = 6 * channels
    expand = [nn.Conv2d(channels, wide, 1), nn.ReLU6(), nn.Conv2d(wide, wide, 3, padding=1, groups=wide), nn.ReLU6()]
    block = Residual(nn.Sequential(*expand, nn.Conv2d(wide, channels, 1)))
    return nn.Sequential(nn.Conv2d(3, channels, 3, 2, 1), *(copy.deepcopy(block) for _ in range(4)))


NETWORKS = {
    "encoder, 8 x 128 tokens": (encoder, (8, 128, 256)),
    "ResNet-18, batch 2": (dense, (2, 3, 224, 224)),
    "inverted residuals, batch 4": (inverted, (4, 3, 112, 112)),
}


@torch.no_grad()
def measure(make, shape: tuple[int, ...], rounds: int) -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds of the float forward; per observer the time of its forward as a multiple of that, and the seconds to convert."""
    torch.manual_seed(0)
    model, x = make().eval(), torch.randn(shape)
    models = {"float": model}
    for observer in sorted(Observer.kinds):
        models[observer] = copy.deepcopy(model)
        qo.prepare_(models[observer], qo.Int8Static(observer))
    turns = {name: functools.partial(forward, each, x) for name, each in models.items()}
    best = {name: min(times) for name, times in in_turns(turns, rounds=rounds, order=random.Random(0)).items()}
    found = {}
    for observer in sorted(Observer.kinds):
        found[observer] = best[observer] / best["float"], seconds_of(functools.partial(qo.convert_, models[observer]))
    return best["float"], found


def forward(model, x) -> list[float]:
    return [seconds_of(functools.partial(model, x))]


def seconds_of(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main(arguments: list[str] | None = None) -> dict[str, dict[str, tuple[float, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true")
    smoke = parser.parse_args(arguments).smoke
    torch.set_num_threads(1)
    report = {}
    for name, (make, shape) in list(NETWORKS.items())[: 1 if smoke else None]:
        seconds, report[name] = measure(make, shape, 2 if smoke else 20)
        print(f"{name}: float forward {seconds * 1e3:.1f} ms")
        for observer, (ratio, convert) in report[name].items():
            print(f"  {observer:<12}{ratio:>6.2f} times as long   {convert:>6.2f} s to convert")
    return report


if __name__ == "__main__":
    main()
