"""A small Graphormer with random weights, classifying random graphs in simulated formats.

    python examples/int_fp_qsim/graphormer.py       a few seconds

A transformer over the nodes of a graph (arXiv 2106.05234): what a node is and its degree are its embedding, and the length of the
shortest path between two nodes is a bias of their attention score. A node of its own stands for the whole graph.
"""

import torch
from common import arguments, compare
from torch import Tensor, nn

LONGEST = 8  # paths that are longer, or that do not exist, count as this long


class Attention(nn.Module):
    """As in the original: scores by torch.bmm, with a bias for each pair of nodes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, bias: Tensor, padded: Tensor) -> Tensor:
        n, nodes, width = x.shape

        def split(y: Tensor) -> Tensor:
            return y.view(n, nodes, self.heads, -1).transpose(1, 2).reshape(n * self.heads, nodes, -1)

        q = split(self.q_proj(x)) * (width // self.heads) ** -0.5
        scores = torch.bmm(q, split(self.k_proj(x)).transpose(1, 2)).view(n, self.heads, nodes, nodes) + bias
        weights = scores.masked_fill(padded[:, None, None], float("-inf")).softmax(-1)
        y = torch.bmm(weights.flatten(0, 1), split(self.v_proj(x)))
        return self.out_proj(y.view(n, self.heads, nodes, -1).transpose(1, 2).reshape(n, nodes, width))


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, bias: Tensor, padded: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), bias, padded)
        return x + self.mlp(self.norm2(x))


class Graphormer(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, kinds: int = 16, classes: int = 4) -> None:
        super().__init__()
        self.kind, self.degree = nn.Embedding(kinds, width), nn.Embedding(64, width)
        self.graph, self.distance = nn.Parameter(torch.randn(1, 1, width)), nn.Embedding(LONGEST + 2, heads)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, kinds: Tensor, distances: Tensor, padded: Tensor) -> Tensor:
        """kinds (n, nodes), distances (n, nodes, nodes), padded (n, nodes), True where there is no node."""
        degrees = (distances == 1).sum(-1)
        x = torch.cat([self.graph.expand(len(kinds), -1, -1), self.kind(kinds) + self.degree(degrees)], 1)
        to_graph = nn.functional.pad(distances, (1, 0, 1, 0), value=LONGEST + 1)
        bias = self.distance(to_graph).permute(0, 3, 1, 2)
        for layer in self.layers:
            x = layer(x, bias, nn.functional.pad(padded, (1, 0)))
        return self.head(self.norm(x[:, 0]))


def graphs(count: int, nodes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random graphs of 3 to ``nodes`` nodes, with the lengths of their shortest paths by Floyd and Warshall."""
    padded = torch.arange(nodes) >= torch.randint(3, nodes + 1, (count, 1))
    edges = torch.rand(count, nodes, nodes) < 2.5 / nodes
    edges = (edges | edges.transpose(1, 2)) & ~padded[:, None] & ~padded[:, :, None]
    distances = torch.where(edges, 1, LONGEST).masked_fill(torch.eye(nodes, dtype=torch.bool), 0)
    for k in range(nodes):
        distances = torch.minimum(distances, distances[:, :, k, None] + distances[:, None, k])
    return torch.randint(16, (count, nodes)), distances, padded


def main() -> None:
    args = arguments(__doc__, layers=4, width=64, heads=4, graphs=128, nodes=24)
    model, data = Graphormer(args.width, args.heads, args.layers), graphs(args.graphs, args.nodes)

    def run(model: nn.Module) -> dict[str, Tensor]:
        return {"logits": model(*data)}

    compare(model, run, lambda outputs: outputs["logits"].argmax(-1))


if __name__ == "__main__":
    main()
