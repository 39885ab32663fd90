"""A small model in the manner of ImageBind with random weights: images are matched with texts in simulated formats.

    python examples/int_fp_qsim/imagebind.py        a few seconds

One transformer for each modality (arXiv 2305.05665): of patches for images, and of tokens, causal, for texts. Their embeddings have
length 1, and an image is of the class whose text is nearest. Attention is nn.MultiheadAttention, as in the original.
"""

import torch
import torch.nn.functional as F
from common import arguments, compare
from torch import Tensor, nn

CONTEXT, WORDS = 12, 50


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, heads, bias=True, batch_first=True)
        self.norm2, self.mlp = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm1(x)
        x = x + self.attention(y, y, y, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class Trunk(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.place = nn.Parameter(0.5 * torch.randn(1, length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 32, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None, taken: int) -> Tensor:
        x = x + self.place
        for block in self.blocks:
            x = block(x, mask)
        return F.normalize(self.head(self.norm(x[:, taken])), dim=-1)


class ImageBind(nn.Module):
    def __init__(self, width: int, heads: int, layers: int, size: int) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(3, width, 8, 8, bias=False), nn.Parameter(torch.randn(1, 1, width))
        self.words = nn.Embedding(WORDS, width)
        self.vision, self.text = (Trunk(width, heads, layers, length) for length in ((size // 8) ** 2 + 1, CONTEXT))

    def forward(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        patches = torch.cat([self.token.expand(len(images), -1, -1), self.patches(images).flatten(2).transpose(1, 2)], 1)
        causal = torch.full((CONTEXT, CONTEXT), float("-inf")).triu(1)
        return {"images": self.vision(patches, None, 0), "texts": self.text(self.words(texts), causal, -1)}


def main() -> None:
    args = arguments(__doc__, layers=3, width=64, heads=4, size=32, images=64, texts=10)
    model = ImageBind(args.width, args.heads, args.layers, args.size)
    images, texts = torch.randn(args.images, 3, args.size, args.size), torch.randint(WORDS, (args.texts, CONTEXT))

    def run(model: nn.Module) -> dict[str, Tensor]:
        return model(images, texts)

    compare(model, run, lambda outputs: (outputs["images"] @ outputs["texts"].T).argmax(-1))


if __name__ == "__main__":
    main()
