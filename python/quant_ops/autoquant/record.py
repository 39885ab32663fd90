"""What layers see: shapes and dtypes of their inputs, how often each, and a sample of the values.

A hook before the forward of every layer records; the layers stay as they are. A layer's case is what its time depends on.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.config import Int8Static, Scheme
from ..convert.prepared import PREPARED, Prepared
from ..nn import TransposedLinear, as_linear, float_class
from .cache import FLOAT, Key, short

_SAMPLE = 2**18  # elements of the input of a case that are kept, but at least a row (an image)
_GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode")


@dataclasses.dataclass
class Seen:
    """What one layer has seen, by cases: keys of the layer itself.

    Attributes:
        calls: how often it was called.
        counts: how often each case.
        samples: rows (images) of inputs of each case.
        prepared: for each static candidate the layer that observes.
        left_out: why the layer stays float, whatever the times; empty if there is no reason.
    """

    layer: nn.Module
    calls: int = 0
    counts: dict[Key, int] = dataclasses.field(default_factory=dict)
    samples: dict[Key, list[Tensor]] = dataclasses.field(default_factory=dict)
    prepared: dict[Scheme, Prepared] = dataclasses.field(default_factory=dict)
    left_out: str = ""

    def prepare(self, config: Scheme, fit: Scheme) -> None:
        """Lets a static candidate observe, with the config that fits the layer."""
        if isinstance(fit, Int8Static):
            self.prepared[config] = PREPARED[float_class(self.layer)].from_float(self.layer, fit)

    @torch.no_grad()
    def record(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The hook."""
        if torch.compiler.is_compiling():
            raise RuntimeError(
                "quant_ops.autoquant_: expected eager calls while shapes are recorded, got a compiled one. Pass the compiled model "
                "to autoquant_, or finish it before torch.compile."
            )
        self.calls += 1
        x = (*args, *kwargs.values())[0]
        if kwargs:
            self.left_out = "it is called with keyword arguments"
        elif not isinstance(x, Tensor) or x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            got = short(x.dtype) if isinstance(x, Tensor) else type(x).__name__
            self.left_out = f"its input is {got}, not float32, float16 or bfloat16"
        if self.left_out or x.numel() == 0:
            return
        x = _rows(self.layer, x.detach())
        case = _case(self.layer, x)
        self.counts[case] = self.counts.get(case, 0) + 1
        self._keep(case, x)
        for prepared in self.prepared.values():
            prepared.observe(x)

    def _keep(self, case: Key, x: Tensor) -> None:
        kept = self.samples.setdefault(case, [])
        wanted = max(_SAMPLE // x[0].numel() - sum(map(len, kept)), 0 if kept else 1)
        if wanted < 1:
            return
        chosen = x[:: -(-len(x) // wanted)].clone(memory_format=torch.preserve_format)
        if not torch.isfinite(chosen).all():
            self.left_out = "its input held NaN or Inf"
        kept.append(chosen)


def input_of(case: Key, sample: list[Tensor]) -> Tensor:
    """An input of the case, its rows those of the sample in turn."""
    x = torch.cat(sample)
    repeated = x[torch.arange(case.activation[0], device=x.device) % len(x)]
    return repeated.contiguous(memory_format=torch.channels_last) if "channels_last" in case.layer else repeated


def _rows(layer: Any, x: Tensor) -> Tensor:
    """Of a linear layer two dimensions; of a convolution those with a batch."""
    if isinstance(layer, nn.Linear | TransposedLinear):
        return x.reshape(-1, x.shape[-1])
    return x if x.dim() == layer.weight.dim() else x.unsqueeze(0)


def _case(layer: Any, x: Tensor) -> Key:
    device = layer.weight.device
    plain: Any = as_linear(layer)
    weight, bias = plain.weight, plain.bias
    kind = type(layer).__name__
    if hasattr(layer, "stride"):
        kind += "".join(f" {name}={getattr(layer, name)}" for name in _GEOMETRY)
        if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
            kind += " channels_last"
    autocast = torch.is_autocast_enabled(device.type)
    return Key(
        candidate=FLOAT,
        activation=tuple(x.shape),
        weight=tuple(weight.shape),
        bias=None if bias is None else tuple(bias.shape),
        dtype=short(x.dtype),
        layer=kind,
        weight_dtype=short(layer.weight.dtype),
        autocast=short(torch.get_autocast_dtype(device.type)) if autocast else "",
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
    )


@contextlib.contextmanager
def without_fused_paths() -> Iterator[None]:
    """The fused inference paths of torch's encoders call no layer."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
