"""Small models for the tests of smoothing: what may be folded into what, and outliers in their activations."""

import torch
import torch.nn.functional as F
from torch import nn


def outliers_(norm, channels=(3, 17), by=40.0):
    """Makes some channels of a norm's output much larger than others, as large models have them."""
    with torch.no_grad():
        norm.weight[list(channels)] *= by
    return norm


def randomize_(model, seed=0):
    """Norms with weights and biases that are neither one nor zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


class GemmaNorm(nn.Module):
    """As transformers' GemmaRMSNorm: 1 + weight, in float32."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return (y * (1.0 + self.weight.float())).type_as(x)


class LlamaNorm(nn.Module):
    """As transformers' LlamaRMSNorm."""

    def __init__(self, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        y = x.float() * torch.rsqrt(x.float().square().mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Attention(nn.Module):
    def __init__(self, size, heads=4):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(size, size, bias=False) for _ in range(3))
        self.o = nn.Linear(size, size, bias=False)

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.gate, self.up = nn.Linear(size, 2 * size, bias=False), nn.Linear(size, 2 * size, bias=False)
        self.down = nn.Linear(2 * size, size, bias=False)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class LlamaBlock(nn.Module):
    """Two norms, each before all of its readers; the residual reads the norm's input."""

    def __init__(self, size=32, norm=LlamaNorm):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = norm(size), Attention(size), norm(size), MLP(size)

    def forward(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ParallelBlock(nn.Module):
    """Attention and MLP read one norm (GPT-J, Phi): five consumers."""

    def __init__(self, size=32):
        super().__init__()
        self.norm, self.attention, self.mlp = nn.LayerNorm(size), Attention(size), MLP(size)

    def forward(self, x):
        h = self.norm(x)
        return x + self.attention(h) + self.mlp(h)


class Conv1D(nn.Module):
    """As transformers has it, under the name by which it is recognised."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf = nf
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.1)
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


Conv1D.__module__ = "transformers.pytorch_utils"


class GPT2Block(nn.Module):
    def __init__(self, size=32):
        super().__init__()
        self.ln_1, self.c_attn, self.c_proj = nn.LayerNorm(size), Conv1D(3 * size, size), Conv1D(size, size)
        self.ln_2, self.c_fc, self.c_out = nn.LayerNorm(size), Conv1D(4 * size, size), Conv1D(size, 4 * size)

    def forward(self, x):
        q, k, v = self.c_attn(self.ln_1(x)).split(x.shape[-1], dim=2)
        x = x + self.c_proj(F.scaled_dot_product_attention(q, k, v))
        return x + self.c_out(F.gelu(self.c_fc(self.ln_2(x))))


class Experts(nn.Module):
    """A router, and experts that get some of the rows each, only ``used`` of them."""

    def __init__(self, size=32, count=3):
        super().__init__()
        self.norm, self.router = nn.LayerNorm(size), nn.Linear(size, count)
        self.experts = nn.ModuleList(nn.Linear(size, size) for _ in range(count))
        self.used = count

    def forward(self, x):
        h = self.norm(x).flatten(0, 1)
        share, y = self.router(h).softmax(1), torch.zeros_like(h)
        for i in range(self.used):
            rows = torch.arange(i, len(h), self.used)
            y = y.index_add(0, rows, share[rows, i, None] * self.experts[i](h[rows]))
        return x + y.view_as(x)


class Function(nn.Module):
    """A model whose forward is a function of it and of x."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)
