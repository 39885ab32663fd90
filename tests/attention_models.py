"""Functions of tensors that look on, and small models with attention of kinds that packages do not have any more."""

import torch
from torch import nn


class Spy:
    """Leaves a tensor as it is, or rounds it by a format, and keeps what it got."""

    def __init__(self, format=None):
        self.format = format
        self.seen = []

    def __call__(self, x):
        self.seen.append(x.detach().clone())
        return x if self.format is None else self.format(x)

    @property
    def shapes(self):
        return [tuple(x.shape) for x in self.seen]

    def saw_masks(self):
        return any(x.isnan().any() or x.min() < -1e30 for x in self.seen)


class Graphormer(nn.Module):
    """Attention between the nodes of a graph, with a bias from their distance and degrees; padding is masked by -inf."""

    def __init__(self, features=16, heads=4, layers=2):
        super().__init__()
        self.heads = heads
        self.degree = nn.Embedding(8, features)
        self.distance = nn.Embedding(8, heads)
        self.layers = nn.ModuleList(
            nn.ModuleDict({name: nn.Linear(features, features) for name in ("q", "k", "v", "out", "up", "down")})
            for _ in range(layers)
        )

    def forward(self, x, degree, distance, padding):
        x = x + self.degree(degree)
        bias = self.distance(distance).permute(0, 3, 1, 2).masked_fill(padding[:, None, None], -torch.inf)
        for layer in self.layers:
            q, k, v = (layer[name](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for name in ("q", "k", "v"))
            scores = torch.baddbmm(bias.flatten(0, 1), q.flatten(0, 1), k.flatten(0, 1).mT, alpha=q.shape[-1] ** -0.5)
            y = torch.bmm(scores.softmax(-1), v.flatten(0, 1)).unflatten(0, (-1, self.heads))
            x = x + layer["out"](y.transpose(1, 2).flatten(2))
            x = x + layer["down"](layer["up"](x).relu())
        return x.mean(1)

    @staticmethod
    def example():
        return torch.randn(2, 5, 16), torch.randint(8, (2, 5)), torch.randint(8, (2, 5, 5)), torch.arange(5).expand(2, 5) > 3


class ImageBind(nn.Module):
    """A trunk of nn.MultiheadAttention with bias_k and bias_v, as ImageBind's, and its contrastive head over two kinds of data."""

    def __init__(self, features=16, heads=2, layers=2):
        super().__init__()
        self.patches = nn.Conv1d(3, features, 4, 4)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.LayerNorm(features),
                    "attention": nn.MultiheadAttention(features, heads, add_bias_kv=True, batch_first=True),
                    "mlp": nn.Sequential(nn.LayerNorm(features), nn.Linear(features, 32), nn.GELU(), nn.Linear(32, features)),
                }
            )
            for _ in range(layers)
        )
        self.scale = nn.Parameter(torch.tensor(3.0))

    def embed(self, x):
        x = self.patches(x).transpose(1, 2)
        for block in self.blocks:
            y = block["norm"](x)
            x = x + block["attention"](y, y, y, need_weights=False)[0]
            x = x + block["mlp"](x)
        return nn.functional.normalize(x.mean(1), dim=-1)

    def forward(self, image, audio):
        return self.scale.exp() * self.embed(image) @ self.embed(audio).T

    @staticmethod
    def example():
        return torch.randn(3, 3, 24), torch.randn(4, 3, 16)
