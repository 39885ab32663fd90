"""Times every kernel of the integer engines on many shapes: the data from which the choice of a kernel is fitted and tested.

python -m benchmarks.gpu.sweep --out out/sweep.json --seconds 40

Codes in, bfloat16 out, so that a time is the product's alone; K in one part and in several. ``fit_choice.py`` fits the constants of
the model (cuda/engine/sm90/choose.cpp) to the file, and tests/test_cuda_sm90.py checks the choice against the committed one.
Read next: bench.py for how a time is taken.
"""

import argparse
import json
import time
from pathlib import Path

import torch

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.gpu.bench import Timer
from benchmarks.gpu.cases import HOPPER
from quant_ops import _library

COLUMNS = [(4096, 4096), (1024, 1024), (3072, 768), (768, 3072), (14336, 4096), (4096, 14336), (640, 640), (1280, 1280), (960, 960)]
ROWS = (1, 4, 8, 16, 17, 32, 48, 64, 65, 96, 128, 129, 197, 256, 384, 512, 1024, 2048, 4096)
LINEAR = [shapes.Linear(M, N, K) for M in ROWS for N, K in [*COLUMNS, (10240, 1280)]]
# batch, channels, size, output channels, kernel, stride, dilation
RESNET = [(64, 56, 64, 3, 1, 1), (128, 28, 128, 3, 1, 1), (256, 14, 256, 3, 1, 1), (512, 7, 512, 3, 1, 1)]
UNET = [(320, 64, 320, 3, 1, 1), (640, 32, 640, 3, 1, 1), (1280, 16, 1280, 3, 1, 1), (1280, 8, 1280, 3, 1, 1)]
UNET_MORE = [
    (320, 64, 320, 3, 2, 1),
    (640, 32, 1280, 3, 1, 1),
    (960, 64, 320, 3, 1, 1),
    (2560, 8, 1280, 3, 1, 1),
    (1920, 32, 640, 3, 1, 1),
]
OTHERS = [(1, 512, 64, 512, 3, 1, 1), (1, 512, 128, 512, 3, 1, 1), (8, 256, 56, 512, 1, 2, 1), (8, 256, 28, 256, 3, 1, 2)]
OTHERS += [(1, 96, 112, 192, 3, 2, 1), (4, 48, 96, 96, 3, 1, 1), (8, 128, 56, 128, 3, 2, 1)]
CONV = [
    shapes.Conv(n, c, size, o, k, k // 2 * d, s, d=d)
    for n, c, size, o, k, s, d in [
        *((n, *rest) for n in (1, 8, 32) for rest in RESNET),
        *((n, *rest) for n in (2, 8) for rest in UNET),
        *((2, *rest) for rest in UNET_MORE),
        *OTHERS,
    ]
]
HOPPER_NAMES = [f"igemm_s8s8_{tile}_wgmma" for tile in HOPPER]
SPLITS = (2, 3, 4, 6, 8)


def names_of(names: list[str], steps: int, tiles_of) -> list[str]:
    """The kernels, with K in one part and in as many as fill the GPU."""
    parts = [f"{name}:{n}" for name in names for n in SPLITS if steps // n >= 4 and tiles_of(name) * n <= 400]
    return [*names, *parts]


def tiles_of(rows: int, columns: int):
    def count(name: str) -> int:
        first, second = (int(n) for n in name.split("_")[2].split("x")[:2])
        m, n = (second, first) if "swapped" in name else (first, second)
        return -(-rows // m) * -(-columns // n)

    return count


class Sweep:
    def __init__(self, out: Path, stop: float):
        self.out, self.stop, self.timer, self.rows = out, stop, Timer("cuda"), []

    def time(self, calls, rounds: int = 5) -> float:
        replay, keep = self.timer.prepare(calls)
        best = min(self.timer.turn(replay, 1) for _ in range(rounds)) / len(calls)
        del keep
        return round(best, 2)

    def run(self, entry: dict, names: list[str], call, sets: int) -> None:
        times = {}
        for name in names:
            _library.set_cuda_kernel(name)
            try:
                times[name] = self.time([lambda i=i: call(i) for i in range(sets)])
            except RuntimeError:  # the kernel does not take the shape
                continue
            finally:
                _library.set_cuda_kernel(None)
        self.rows.append({**entry, "us": times})

    def linear(self, s: shapes.Linear) -> None:
        if time.monotonic() > self.stop:
            return
        sets = max(2, min(12, (120 << 20) // (s.M * s.K + s.N * s.K + 2 * s.M * s.N)))
        x = [torch.randint(-127, 128, (s.M, s.K), dtype=torch.int8, device="cuda") for _ in range(sets)]
        w = [torch.randint(-127, 128, (s.N, s.K), dtype=torch.int8, device="cuda") for _ in range(sets)]
        ones, scale = torch.ones(s.N, device="cuda"), torch.tensor(0.01, device="cuda")
        names = names_of(HOPPER_NAMES, s.K // 128, tiles_of(s.M, s.N)) + (["gemv_s8s8_16x8_mma"] if s.M <= 8 else [])
        self.run(
            {"op": "linear", "shape": list(s)},
            names,
            lambda i: qo.int8_linear(x[i], w[i], ones, x_scale=scale, out_dtype=torch.bfloat16),
            sets,
        )

    def conv2d(self, s: shapes.Conv) -> None:
        if time.monotonic() > self.stop:
            return
        sets = max(2, min(12, (120 << 20) // (s.N * s.C * s.H**2 + s.O * s.C * s.k**2 + 2 * s.N * s.O * s.out**2)))
        shape = (s.N, s.C, s.H, s.H)
        x = [
            torch.randint(-127, 128, shape, dtype=torch.int8, device="cuda").to(memory_format=torch.channels_last)
            for _ in range(sets)
        ]
        w = [torch.randint(-127, 128, (s.O, s.C, s.k, s.k), dtype=torch.int8, device="cuda") for _ in range(sets)]
        packed = [qo.pack_weight(t) for t in w]
        ones, scale = torch.ones(s.O, device="cuda"), torch.tensor(0.01, device="cuda")

        def call(i):
            more = {"x_scale": scale, "out_dtype": torch.bfloat16, "packed_weight": packed[i]}
            return qo.int8_conv2d(x[i], w[i], ones, stride=s.s, padding=s.p, dilation=s.d, **more)

        names = [name for name in HOPPER_NAMES if "swapped" not in name]
        names = names_of(names, s.C * s.k**2 // 128, tiles_of(s.N * s.out**2, s.O))
        self.run({"op": "conv2d", "shape": list(s)}, names, call, sets)

    def save(self) -> None:
        self.out.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        self.out.write_text(f'{{"gpu": "{torch.cuda.get_device_name()}", "rows": [\n{lines}\n]}}\n')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=40.0, help="rows that would start later are left out")
    options = parser.parse_args()
    sweep = Sweep(options.out, time.monotonic() + options.seconds)
    with torch.inference_mode():
        for shape in CONV:
            sweep.conv2d(shape)
        for shape in LINEAR:
            sweep.linear(shape)
    sweep.save()


if __name__ == "__main__":
    main()
