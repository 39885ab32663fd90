"""A transformer encoder that tells Python code from prose, byte by byte: float -> dynamic int8 -> report -> file -> int8 again.

    python examples/text_encoder.py            about a minute; writes to out/; exit status 1 if int8 loses more than one point
    python examples/text_encoder.py --quick    less data, fewer epochs, for the test

The texts are the lines of Python's own standard library: comments and docstrings against statements. Plain torch layers; of its
nn.Linear layers those of the attention and of the feed-forward part become int8, each token with a scale of its own.
"""

import argparse
import ast
import copy
import functools
import os
import random
import statistics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import quant_ops as qo
from quant_ops.report.timing import interleave

LENGTH = 48  # bytes of a line
WIDTH, HEADS, LAYERS = 64, 4, 2


# ---- data ----------------------------------------------------------------------------------------------------------------


def lines(files: int) -> tuple[list[str], list[str]]:
    """Lines of code, and lines of prose, of the first files of the standard library."""
    code, prose = set(), set()
    for path in sorted(Path(os.__file__).parent.glob("*.py"))[:files]:
        source = path.read_text(encoding="utf-8", errors="ignore")
        texts = set()
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and (text := ast.get_docstring(node, clean=False)):
                texts.update(line.strip() for line in text.splitlines())
        for line in map(str.strip, source.splitlines()):
            if len(line) >= 16:
                is_prose = line in texts or line.startswith("#")
                (prose if is_prose else code).add(line.lstrip("# "))
    return sorted(code - prose), sorted(prose - code)


def batches(files: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Bytes (n, LENGTH), padded with 0, and labels: as many lines of each kind; a quarter is held out."""
    kinds = lines(files)
    rng = random.Random(0)
    each = min(map(len, kinds))
    labelled = [(line, label) for label, kind in enumerate(kinds) for line in rng.sample(kind, each)]
    rng.shuffle(labelled)
    tokens = torch.zeros(len(labelled), LENGTH, dtype=torch.int64)
    for row, (line, _) in zip(tokens, labelled, strict=True):
        text = line.encode()[:LENGTH]
        row[: len(text)] = torch.tensor(list(text))
    labels = torch.tensor([label for _, label in labelled])
    held = len(labels) // 4
    return (tokens[held:], labels[held:]), (tokens[:held], labels[:held])


# ---- model ---------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
        x = x + self.out(attended.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(256, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens > 0
        x = self.token(tokens) + self.place.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        mean = (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(self.norm(mean))


def train(model: nn.Module, tokens: Tensor, labels: Tensor, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    total = epochs * -(-len(tokens) // 64)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=total)
    model.train()
    for _ in range(epochs):
        for batch in torch.randperm(len(tokens)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(tokens[batch]), labels[batch]).backward()
            optimizer.step()
            schedule.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, tokens: Tensor, labels: Tensor) -> float:
    """Percent."""
    right = sum((model(t).argmax(1) == y).sum().item() for t, y in zip(tokens.split(256), labels.split(256), strict=True))
    return 100.0 * right / len(labels)


@torch.no_grad()
def milliseconds(models: dict[str, nn.Module], tokens: Tensor) -> dict[str, float]:
    """Median of a few forwards, the models in turns."""
    times = interleave({name: functools.partial(model, tokens) for name, model in models.items()}, rounds=7, turn=0.0)
    return {name: 1e3 * statistics.median(values) for name, values in times.items()}


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less data, fewer epochs")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the files that are written")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)  # the model is small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    (train_x, train_y), (test_x, test_y) = batches(files=12 if options.quick else 40)
    model = Encoder()
    train(model, train_x, train_y, epochs=1 if options.quick else 3)
    print(f"trained on {len(train_x)} lines; {len(test_x)} held out")

    int8 = copy.deepcopy(model)
    print(qo.quantize_(int8, qo.Int8Dynamic(), exclude=["head"]))
    report = qo.compare(model, int8, test_x[:64])
    print(f"\n{report}\n")

    models = {"float32": model, "int8": int8}
    percent = {name: accuracy(m, test_x, test_y) for name, m in models.items()}
    times = milliseconds(models, test_x[:64])
    for name in models:
        print(f"{name:<10}{percent[name]:>8.2f}%{times[name]:>10.1f} ms for 64 lines")

    path = options.out / "text_encoder.safetensors"
    qo.save(int8, path)
    with torch.device("meta"):  # no float weights are made
        loaded = Encoder().eval()
    qo.load_(loaded, path)
    with torch.no_grad():
        same = torch.equal(loaded(test_x[:64]), int8(test_x[:64]))
    print(
        f"\n{path}: {path.stat().st_size} bytes; a fresh model that loads it gives {'the same bits' if same else 'SOMETHING ELSE'}"
    )

    ok = same and percent["float32"] - percent["int8"] <= 1.0 and report.sqnr > 20
    print("OK: int8 is within one point of float32" if ok else "FAILED")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
