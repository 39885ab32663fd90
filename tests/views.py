"""Dtypes, sizes and strides that the tests of the quantize family go through."""

import torch
from hypothesis import strategies as st

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
SIZES = [1, 2, 3, 7, 8, 9, 15, 16, 17, 33, 49, 64, 65, 130]  # around the vectors' and the lanes' lengths


def views_of(x: torch.Tensor):
    """The same values under other strides and offsets."""
    yield x
    yield x.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.zeros(*x.shape[:-1], x.shape[-1] * 2 + 3, dtype=x.dtype)
    wide[..., 3::2] = x
    yield wide[..., 3::2]
    if x.dim() == 4:
        yield x.contiguous(memory_format=torch.channels_last)


def draw_view(data, x: torch.Tensor) -> torch.Tensor:
    """The same values, permuted in memory, with gaps, or from an offset on."""
    order = data.draw(st.permutations(range(x.dim())))
    inverse = [order.index(d) for d in range(x.dim())]
    gap = data.draw(st.sampled_from([1, 1, 2]))
    moved = x.permute(order)
    wide = torch.zeros(*moved.shape[:-1], moved.shape[-1] * gap + 5, dtype=x.dtype)
    part = wide[..., 5::gap][..., : moved.shape[-1]]
    part.copy_(moved)
    return part.permute(inverse)
