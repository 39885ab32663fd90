"""A small decoder of Llama's kind that writes like Python's manual, byte by byte: trained, then quantized in four ways.

    python examples/generation.py            about a minute; writes to out/; exit status 1 if a loss is larger than it may be
    python examples/generation.py --quick    fewer steps, for the test

The text is that of help("topics"), which Python carries. Plain torch layers: RMSNorm, rotary embeddings, grouped keys and values,
SwiGLU, a head that shares the embedding's weight, and a cache of keys and values. nn.Linear and nn.Embedding are quantized.
"""

import argparse
import copy
import pydoc_data.topics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quant_ops as qo

LENGTH = 128  # bytes that the model sees
WIDTH, HIDDEN, LAYERS, HEADS, GROUPS = 128, 384, 3, 4, 2  # GROUPS: heads of keys and values

SCHEMES = {
    "float32": None,
    "int8 dynamic": qo.Int8Dynamic(),
    "int8 weight-only": qo.Int8WeightOnly(),
    "int4 weight-only": qo.Int4WeightOnly(group_size=32),
    "int4, int8 inputs": qo.Int8DynamicInt4Weight(group_size=32),
}
MOST_LOSS = {"int8 dynamic": 1.01, "int8 weight-only": 1.01, "int4 weight-only": 1.1, "int4, int8 inputs": 1.1}  # of perplexity


# ---- model ---------------------------------------------------------------------------------------------------------------


def rotated(x: Tensor, first: int) -> Tensor:
    """Rotary embedding of (n, heads, length, size), whose first position is `first`."""
    half = x.shape[-1] // 2
    angles = torch.arange(first, first + x.shape[-2])[:, None] * 1e4 ** (-torch.arange(half) / half)
    a, b = x.split(half, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        size = WIDTH // HEADS
        self.q, self.kv = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, 2 * GROUPS * size, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.gate, self.up = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: list[Tensor]) -> Tensor:
        """`cache`: keys and values so far; those of x are added."""
        n, length, _ = x.shape
        y = self.norm1(x)
        first = cache[0].shape[2] if cache else 0
        q = rotated(self.q(y).view(n, length, HEADS, -1).transpose(1, 2), first)
        k, v = self.kv(y).view(n, length, 2, GROUPS, -1).permute(2, 0, 3, 1, 4)
        k = rotated(k, first)
        cache[:] = [torch.cat([*cache[i : i + 1], new], dim=2) for i, new in enumerate((k, v))]
        attended = F.scaled_dot_product_attention(q, *cache, is_causal=length > 1, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, WIDTH))
        y = self.norm2(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Embedding(256, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.token.weight, std=0.05)
        self.head.weight = self.token.weight

    def forward(self, tokens: Tensor, caches: list[list[Tensor]] | None = None) -> Tensor:
        x = self.token(tokens)
        for block, cache in zip(self.blocks, caches or [[] for _ in self.blocks], strict=True):
            x = block(x, cache)
        return self.head(self.norm(x))


# ---- training, judging, writing ------------------------------------------------------------------------------------------


def losses(model: nn.Module, rows: Tensor) -> Tensor:
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


def train(model: nn.Module, text: Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    rows = text.unfold(0, LENGTH + 1, LENGTH // 2)
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, rows[torch.randint(len(rows), (12,))]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def perplexity(model: nn.Module, text: Tensor) -> float:
    """Of a byte."""
    rows = text.unfold(0, LENGTH + 1, LENGTH)
    return torch.stack([losses(model, part) for part in rows.split(32)]).mean().exp().item()


@torch.no_grad()
def written(model: nn.Module, start: str, count: int) -> tuple[str, float]:
    """The start with `count` bytes more, sampled, and how many bytes a second."""
    random = torch.Generator().manual_seed(0)
    text, begun = list(start.encode()), time.perf_counter()
    caches: list[list[Tensor]] = [[] for _ in range(LAYERS)]
    unread = text[:]
    for _ in range(count):
        logits = model(torch.tensor([unread]), caches)[0, -1]
        unread = [int(torch.multinomial((logits / 0.5).softmax(0), 1, generator=random))]
        text += unread
    return bytes(text).decode(errors="replace"), count / (time.perf_counter() - begun)


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, less text")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files that are written")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    held, text = text[:4096] if options.quick else text[:32768], text[32768:]
    model = Decoder()
    train(model, text, steps=20 if options.quick else 300)
    model.eval()

    print(f"{'':<20}{'perplexity':>12}{'bytes of file':>16}{'bytes written a second':>26}")
    ok, samples, judged = True, {}, {}
    for name, scheme in SCHEMES.items():
        made = copy.deepcopy(model)
        path = options.out / f"generation_{name.replace(' ', '_').replace(',', '')}.safetensors"
        if scheme is not None:
            qo.quantize_(made, scheme)
            qo.save(made, path)
            with torch.device("meta"):  # no float weights are made
                loaded = Decoder().eval()
            qo.load_(loaded, path)
            with torch.no_grad():
                ok &= torch.equal(loaded(held[None, :LENGTH]), made(held[None, :LENGTH]))
        size = path.stat().st_size if scheme else sum(weight.nbytes for weight in model.parameters())
        judged[name] = perplexity(made, held)
        samples[name], speed = written(made, "The statement", 16 if options.quick else 160)
        print(f"{name:<20}{judged[name]:>12.3f}{size:>16}{speed:>26.0f}")
    for name, sample in samples.items():
        print(f"\n{name}: {sample}")
    ok &= all(judged[name] < most * judged["float32"] for name, most in MOST_LOSS.items())
    print("\nOK: files give the same bits, and perplexities are near that of float32" if ok else "\nFAILED")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
