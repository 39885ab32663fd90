"""A small diffusion model of handwritten digits, sampled in float and int8, with one activation scale a layer or one a step.

    python examples/diffusion.py              about a minute; exit status 1 if scales per step are not better than one
    python examples/diffusion.py --quick      less training, for the test
    python examples/diffusion.py --unet diffusers    diffusers' UNet2DModel instead of the one below

Inputs of a diffusion model change their range from step to step, so that one scale for all steps is too coarse for most of them.
Writes samples.png (rows: float, one scale, a scale per step) and error.png (for every step from noise to image two bars: the error
of the predicted noise with one scale, orange, and with a scale per step, blue). The table of those errors is printed.
"""

import argparse
import copy
import struct
import sys
import time
import zlib
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

import quant_ops as qo

STEPS = 25


# ---- the model -------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Two convolutions with the time embedding between them, and a shortcut."""

    def __init__(self, inputs: int, outputs: int, time: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Linear(time, outputs)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x))) + self.time(t)[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(y)))


class UNet(nn.Module):
    """The noise in an 8 x 8 image at a step: down to 4 x 4 and up again."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.frequencies = width // 2
        self.embed = nn.Sequential(nn.Linear(width, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width), nn.SiLU())
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.outer = Block(width, width, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.inner = Block(2 * width, 2 * width, 2 * width)
        self.up = nn.Conv2d(2 * width, width, 3, padding=1)
        self.last = Block(2 * width, width, 2 * width)
        self.leave = nn.Sequential(nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        angles = t[:, None] * torch.exp(-torch.arange(self.frequencies, device=x.device) * (9.2 / self.frequencies))
        t = self.embed(torch.cat([angles.sin(), angles.cos()], 1))
        outer = self.outer(self.enter(x), t)
        inner = self.up(F.interpolate(self.inner(self.down(outer), t), scale_factor=2.0))
        return self.leave(self.last(torch.cat([inner, outer], 1), t))


class FromDiffusers(nn.Module):
    """diffusers' UNet2DModel, with the same arguments as :class:`UNet`."""

    def __init__(self) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(32, 64),
            norm_num_groups=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return self.unet(x, t).sample


# ---- diffusion -------------------------------------------------------------------------------------------------------------

# The share of the image that is left after each of the STEPS steps, by the cosine schedule; step 0 of sampling is pure noise.
_PHASES = torch.linspace(0, 1, STEPS + 1)[1:]
SIGNAL = (torch.cos((_PHASES + 0.008) / 1.008 * torch.pi / 2) ** 2).clamp(min=1e-4).flip(0)


def train(model: nn.Module, images: Tensor, iterations: int) -> float:
    """Predict the noise. Returns the mean loss of the last tenth."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    losses = []
    model.train()
    for _ in range(iterations):
        x = images[torch.randint(len(images), (64,))]
        step = torch.randint(STEPS, (len(x),))
        signal, noise = SIGNAL[step].reshape(-1, 1, 1, 1), torch.randn_like(x)
        loss = F.mse_loss(model(signal.sqrt() * x + (1 - signal).sqrt() * noise, step.float()), noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    model.eval()
    return sum(losses[-iterations // 10 :]) / len(losses[-iterations // 10 :])


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Deterministic sampling (DDIM): the images, and what the model was given at each step. One call of the model a step."""
    x, seen = noise, []
    for step in range(STEPS):
        seen.append(x)
        predicted = model(x, torch.full((len(x),), float(step)))
        image = ((x - (1 - SIGNAL[step]).sqrt() * predicted) / SIGNAL[step].sqrt()).clamp(-1, 1)
        predicted = (x - SIGNAL[step].sqrt() * image) / (1 - SIGNAL[step]).sqrt()
        after = SIGNAL[step + 1] if step + 1 < STEPS else torch.ones(())
        x = after.sqrt() * image + (1 - after).sqrt() * predicted
    return x, seen


def quantized(model: nn.Module, config: qo.Int8Static, noise: Tensor) -> nn.Module:
    """A copy, calibrated by sampling. With one set of scales the counted step changes nothing."""
    model = copy.deepcopy(model)
    qo.prepare_(model, config)
    if config.num_steps == 1:
        qo.calibrate(model, [noise], forward=sample)
    else:
        with qo.count_timesteps(model):
            qo.calibrate(model, [noise], forward=sample)
    qo.convert_(model)
    return model


@torch.no_grad()
def errors(model: nn.Module, reference: nn.Module, seen: list[Tensor], per_step: bool) -> list[float]:
    """Of every step the relative error of the predicted noise, on the inputs that the float model had."""
    found = []
    for step, x in enumerate(seen):
        t = torch.full((len(x),), float(step))
        expected = reference(x, t)
        if per_step:
            with qo.timestep(model, step):
                predicted = model(x, t)
        else:
            predicted = model(x, t)
        found.append(float((predicted - expected).norm() / expected.norm()))
    return found


# ---- pictures --------------------------------------------------------------------------------------------------------------


def write_png(path: Path, pixels: Tensor) -> None:
    """uint8 (height, width, 3), with nothing but the standard library."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = pixels.shape
    rows = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), pixels.reshape(height, -1)], 1)  # each with filter 0
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(rows.flatten().tolist()))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


def grid(rows: list[Tensor], zoom: int = 6) -> Tensor:
    """One row of images for each tensor (n, 1, 8, 8) in [-1, 1], dark on light."""
    lines = []
    for images in rows:
        gray = (255 - (images.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
        tiles = F.pad(gray.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), [2] * 4, value=128)
        lines.append(torch.cat(list(tiles[:, 0]), 1))
    return torch.cat(lines).unsqueeze(2).expand(-1, -1, 3).contiguous()


def bars(series: list[tuple[tuple[int, int, int], list[float]]], height: int = 200) -> Tensor:
    """Bars side by side for each index; the highest fills the picture."""
    top = max(max(values) for _, values in series)
    width, gap = 8, 6
    count = len(series[0][1])
    pixels = torch.full((height + 10, count * (len(series) * width + gap) + gap, 3), 255, dtype=torch.uint8)
    for i, (colour, values) in enumerate(series):
        for j, value in enumerate(values):
            left = gap + j * (len(series) * width + gap) + i * width
            pixels[height + 5 - round(value / top * height) : height + 5, left : left + width - 1] = torch.tensor(
                colour, dtype=torch.uint8
            )
    return pixels


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less training")
    parser.add_argument("--unet", choices=["small", "diffusers"], default="small")
    parser.add_argument("--observer", default="minmax", help="how scales are chosen: minmax, mse, ...")
    parser.add_argument("--out", type=Path, default=Path(), help="folder for the pictures")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the network is small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    images = torch.tensor(load_digits().images[:, None] / 8.0 - 1.0, dtype=torch.float32)

    model = UNet() if options.unet == "small" else FromDiffusers()
    start = time.perf_counter()
    loss = train(model, images, 100 if options.quick else 3000)
    print(f"trained in {time.perf_counter() - start:.1f} s, loss {loss:.3f}")

    torch.manual_seed(1)
    calibration, noise = torch.randn(64, 1, 8, 8), torch.randn(16, 1, 8, 8)
    one = quantized(model, qo.Int8Static(options.observer), calibration)
    each = quantized(model, qo.Int8Static(options.observer, num_steps=STEPS), calibration)
    pictures, seen = sample(model, noise)
    with_one, _ = sample(one, noise)
    with qo.count_timesteps(each):  # the sampler knows nothing of steps: they are counted
        with_each, _ = sample(each, noise)

    found = {"one scale": errors(one, model, seen, False), "per step": errors(each, model, seen, True)}
    print("\nstep   error of the noise, one scale   a scale per step")
    for step, (a, b) in enumerate(zip(*found.values(), strict=True)):
        print(f"{step:>4}   {a:>29.3%}   {b:>16.3%}")
    mean = {name: sum(values) / STEPS for name, values in found.items()}
    print(f"mean   {mean['one scale']:>29.3%}   {mean['per step']:>16.3%}")
    distance = {
        name: float((x - pictures).square().mean().sqrt()) for name, x in (("one scale", with_one), ("per step", with_each))
    }
    print(f"pictures against float, root mean square of pixels in [-1, 1]: {distance}")

    options.out.mkdir(parents=True, exist_ok=True)
    write_png(options.out / "samples.png", grid([pictures, with_one, with_each]))
    write_png(options.out / "error.png", bars([((230, 140, 30), found["one scale"]), ((40, 90, 200), found["per step"])]))
    ok = mean["per step"] < mean["one scale"]
    print("\nOK: scales per step are better than one" if ok else "\nFAILED: scales per step are no better than one")
    return {"ok": ok, "mean": mean, "errors": found, "distance": distance, "loss": loss}


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
