"""The int8 weight of a layer in two forms: plain, as in the state_dict, and packed, as the kernels read it.

The packed copy is derived: made when weights arrive or move, never saved, never made in forward. A layer may drop the plain form.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from .. import _library
from ..ops import pack_weight, unpack_weight


def as_image_kernel(weight: Tensor) -> Tensor:
    """The operators' shape of a weight: the kernel of a Conv1d has height 1."""
    return weight.unsqueeze(2) if weight.dim() == 3 else weight


class PackedWeight:
    """The buffers ``weight`` and ``packed_weight`` of a layer, and whether the first is only a placeholder.

    Args:
        buffers: those of the layer, which stay its own: forward reads them without going through this object.
        groups: of the convolution.
    """

    def __init__(self, buffers: dict[str, Tensor | None], groups: int) -> None:
        self._buffers, self._groups = buffers, groups
        self.plain_dropped = False
        self.pack()

    @property
    def _weight(self) -> Tensor:
        weight = self._buffers["weight"]
        assert weight is not None
        return weight

    def pack(self) -> None:
        """Packs the plain weight, on devices whose kernels read the packed form."""
        device = self._weight.device.type
        packs = device == "cpu" or (device == "cuda" and _library.cuda_library is not None)
        self._buffers["packed_weight"] = pack_weight(as_image_kernel(self._weight), self._groups) if packs else None

    def plain(self) -> Tensor:
        """The plain weight, unpacked if it was dropped."""
        packed = self._buffers["packed_weight"]
        if not self.plain_dropped or packed is None:
            return self._weight
        return unpack_weight(packed, as_image_kernel(self._weight).shape, self._groups).reshape(self._weight.shape)

    def drop_plain(self) -> None:
        """Frees the plain weight; ``weight`` becomes a placeholder of the same shape, all of whose elements are one byte."""
        if not self.plain_dropped:
            self._buffers["weight"] = torch.zeros((), dtype=torch.int8).expand(self._weight.shape)
            self.plain_dropped = True

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """Inside, ``weight`` is the plain weight. Afterwards it is dropped again if it was and the layer is still on the CPU."""
        dropped = self.plain_dropped
        self._buffers["weight"] = self.plain()
        self.plain_dropped = False
        yield
        if dropped and self._weight.device.type == "cpu":
            self.drop_plain()
