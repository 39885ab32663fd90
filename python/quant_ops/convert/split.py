"""split_attention_: nn.MultiheadAttention as layers. Read first: nn/attention.py."""

import dataclasses

from torch import nn

from .._models import Result, Table, has_hooks, patched, reasons
from ..nn.attention import ATTENTIONS, MultiheadAttention
from .select import leave_fused_paths


@dataclasses.dataclass(repr=False)
class SplitResult(Result):
    """What :func:`split_attention_` did. ``print(result)`` shows it as a table.

    Attributes:
        split: names of the modules that were replaced.
        skipped: name and reason of every other nn.MultiheadAttention.
    """

    split: list[str] = dataclasses.field(default_factory=list)
    skipped: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    def _table(self) -> Table:
        lines = [("split", name) for name in self.split] + [("skipped", text) for text in reasons(self.skipped)]
        return f"{len(self.split)} split, {len(self.skipped)} skipped", ("split", "skipped"), lines


def split_attention_(model: nn.Module, *, attention: str = "float") -> SplitResult:
    """Puts :class:`MultiheadAttention`, whose projections are nn.Linear, in the place of every nn.MultiheadAttention, in place.

    Afterwards :func:`quantize_`, :func:`prepare_`, :func:`gptq_` and all others see the projections. The result of the model stays
    the same, to float32's rounding. The fused paths of torch's encoders, which read weights and call no layer, are left.

    Args:
        model: before it is quantized. Load its float weights first: the names of the projections' parameters change.
        attention: "float", or "int8" for :func:`int8_attention`, which is faster on the CPU and has no gradients.

    Raises:
        ValueError: an unknown attention.
    """
    if attention not in ATTENTIONS:
        raise ValueError(f"quant_ops.split_attention_: expected attention in {ATTENTIONS}, got {attention!r}")
    result = SplitResult()
    made: dict[nn.Module, MultiheadAttention] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, nn.MultiheadAttention):
            continue
        if reason := _unfit(name, module):
            result.skipped.append((name, reason))
            continue
        if module not in made:
            made[module] = MultiheadAttention.from_float(module, attention=attention)
        model.set_submodule(name, made[module])
        result.split.append(name)
    leave_fused_paths(model)
    return result


def _unfit(name: str, module: nn.MultiheadAttention) -> str | None:
    if not name:
        return "it is the model itself. Use MultiheadAttention.from_float"
    if type(module) is not nn.MultiheadAttention:
        return f"{type(module).__name__} is a subclass whose forward may differ"
    if type(module.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
        return f"its out_proj is a {type(module.out_proj).__name__} already"
    if any("parametrizations" in part._modules for part in module.modules()):
        return "its weight is parametrized. Remove the parametrization first"
    if any(has_hooks(part) for part in module.modules()):
        return "it has hooks, which would see other values"
    return patched(module)
