"""A small language model of Llama's kind that reads Python's manual by characters, trained once and kept in build/test-cache.

Names are those of Llama: ``layers.0.self_attn.q_proj``, ``layers.0.mlp.gate_proj``. ``held()`` is text that it was not trained on,
``calibration()`` some that it was. Use ``from language_model import trained`` for a copy of the model.
"""

import copy
import fcntl
import functools
import os
import pydoc_data.topics
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from compiled import CACHE, digest
from torch import nn

LENGTH = 64  # characters that the model sees
WIDTH, HIDDEN, LAYERS, HEADS = 128, 256, 3, 4
STEPS, ROWS = 400, 12


def rotated(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            self.add_module(name, nn.Linear(WIDTH, WIDTH, bias=False))

    def forward(self, x, rotary):
        q, k, v = (p(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(rotated(q, *rotary), rotated(k, *rotary), v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down_proj = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.input_layernorm, self.self_attn = nn.RMSNorm(WIDTH, eps=1e-6), Attention()
        self.post_attention_layernorm, self.mlp = nn.RMSNorm(WIDTH, eps=1e-6), MLP()

    def forward(self, x, rotary=None):
        x = x + self.self_attn(self.input_layernorm(x), rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, characters):
        super().__init__()
        self.embed_tokens = nn.Embedding(characters, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm, self.lm_head = nn.RMSNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, characters, bias=False)

    def forward(self, tokens):
        half = WIDTH // HEADS // 2
        angles = torch.arange(tokens.shape[-1])[:, None] * 1e4 ** (-torch.arange(half) / half)
        x, rotary = self.embed_tokens(tokens), (angles.cos(), angles.sin())
        for layer in self.layers:
            x = layer(x, rotary=rotary)
        return self.lm_head(self.norm(x))


@functools.cache
def text():
    """All of the text as numbers of characters, and how many there are; the first 24000 are held back."""
    written = "".join(pydoc_data.topics.topics.values())
    characters = {character: number for number, character in enumerate(sorted(set(written)))}
    return torch.tensor([characters[character] for character in written]), len(characters)


def held(rows=192):
    """(rows, LENGTH + 1) of text that the model was not trained on."""
    return text()[0][:24000].unfold(0, LENGTH + 1, LENGTH)[:rows]


def calibration(batches=4, rows=32):
    """Batches (rows, LENGTH) of text that it was trained on."""
    seen = text()[0][24000:].unfold(0, LENGTH, LENGTH)
    chosen = torch.randperm(len(seen), generator=torch.Generator().manual_seed(1))[: batches * rows]
    return list(seen[chosen].split(rows))


def loss(model, rows):
    return F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())


@torch.no_grad()
def perplexity(model, rows=192):
    """Of a character of the text that is held back."""
    return torch.stack([loss(model, part) for part in held(rows).split(32)]).mean().exp().item()


def train(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    rows = text()[0][24000:].unfold(0, LENGTH + 1, LENGTH // 2)
    random = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss(model, rows[torch.randint(len(rows), (ROWS,), generator=random)]).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@functools.cache
def original():
    """The trained model in eval mode. Change no bit of it: it is that of all tests; see :func:`trained`."""
    CACHE.mkdir(parents=True, exist_ok=True)
    made_by = f"{sys.version_info[:2]} {torch.__version__}".encode() + Path(__file__).read_bytes()
    path = CACHE / f"language-model-{digest(made_by)[:16]}.pt"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Decoder(text()[1])
    with open(f"{path}.lock", "w") as lock:  # workers of pytest wait for the one that trains
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.exists():
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # on a busy machine more would mostly wait for each other
            train(model)
            torch.set_num_threads(threads)
            torch.save(model.state_dict(), f"{path}.partial")
            os.replace(f"{path}.partial", path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval().requires_grad_(False)


def trained():
    """A copy of the trained model."""
    return copy.deepcopy(original())
