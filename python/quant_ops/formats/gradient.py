"""A format for the gradient: the backward pass rounds it to one of its own, and then masks it as the forward format does."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from ..ops._register import in_transform, wants_derivative
from ..ops.quantize_float import seed_tensor
from .format import Format

# Makes the seed of the gradient's rounding another one than that of the values'.
_OTHER_SEED = 0x5851F42D4C957F2D


@dataclasses.dataclass(frozen=True, repr=False)
class WithGradient(Format):
    """What :func:`with_gradient` returns: a format like others, whose gradients are rounded."""

    forward: Format | None
    backward: Format | None
    everywhere: bool = False

    def __post_init__(self) -> None:
        for name in ("forward", "backward"):
            inner = getattr(self, name)
            plain = isinstance(inner, Format) and not isinstance(inner, WithGradient)
            self._expect(inner is None or plain, f"{name} to be a format without a gradient of its own, or None, got {inner!r}")
        self._expect_bool("everywhere")

    @property
    def largest(self) -> float:
        return float("inf") if self.forward is None else self.forward.largest

    @property
    def bits(self) -> float:
        return 32.0 if self.forward is None else self.forward.bits

    @property
    def takes_amax(self) -> bool:
        return self.forward is not None and self.forward.takes_amax

    @property
    def is_stochastic(self) -> bool:
        return any(inner is not None and inner.is_stochastic for inner in (self.forward, self.backward))

    def along(self, dim: int) -> "WithGradient":
        """Both formats with their blocks along another dimension."""
        turned = {name: inner and inner.along(dim) for name, inner in (("forward", self.forward), ("backward", self.backward))}
        return self.with_(**turned)

    @property
    def _takes_scale(self) -> bool:
        return self.forward is not None and self.forward._takes_scale

    def _expression(self) -> str:
        everywhere = ", everywhere=True" if self.everywhere else ""
        return f"with_gradient({self.forward}, {self.backward}{everywhere})"

    def _remedy(self) -> str:
        return super()._remedy() if self.forward is None else self.forward._remedy()

    def _apply(self, x: Tensor, scale: Tensor | None, seed: Tensor | int | None, generator: torch.Generator | None) -> Tensor:
        source = x.detach() if self.everywhere else x
        value = source if self.forward is None else self.forward._apply(source, scale, seed, generator)
        in_graph = torch.compiler.is_compiling()
        followed = in_graph or in_transform() is not None or wants_derivative((x, value))
        if not followed or (self.backward is None and not self.everywhere):
            return value
        backward_seed = None
        if self.backward is not None and self.backward.is_stochastic:
            # drawn here, so that a backward pass that is run twice rounds alike
            backward_seed = seed_tensor("with_gradient", "stochastic", None if seed is None else seed ^ _OTHER_SEED, generator)
        # The result is the value itself, not a view of it, so that it may be changed in place. Transforms of torch.func take
        # views only, and do not mind.
        itself = self.forward is not None and (in_graph or in_transform() is None)
        arguments = (x, value) if self.everywhere else (value, None)
        return _Rounded.apply(*arguments, backward_seed, self.backward, itself)  # type: ignore[no-untyped-call]


class _Rounded(torch.autograd.Function):
    """``value``, or else x, with a gradient for x that is rounded to a format."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, value: Tensor | None, seed: Tensor | None, format: Format | None, itself: bool) -> Tensor:
        result = x if value is None else value
        return result if itself else result.view_as(result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, value, seed, ctx.format, itself = inputs
        if itself:
            ctx.mark_dirty(x if value is None else value)
        ctx.save_for_backward(seed)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (seed,) = ctx.saved_tensors
        return grad if ctx.format is None else ctx.format(grad, seed=seed), None, None, None, None


def with_gradient(forward: Format | None, backward: Format | None, *, everywhere: bool = False) -> WithGradient:
    """A format whose gradient is rounded to a format of its own, such as E3M4 values with E5M2 gradients.

    The gradient of the result is first rounded to ``backward``. It then passes where ``forward`` does not clip.

    Args:
        forward: format of the values; None leaves them as they are.
        backward: format of the gradients; None leaves them as they are. A block format's blocks lie along the same dimension as
            those of the values, unless another is chosen: ``MXFP8_E5M2.along(0)``.
        everywhere: let the gradient pass where ``forward`` clips, too. An ``amax`` gets none then.

    Raises:
        ValueError: one of the formats has a gradient of its own already.
    """
    return WithGradient(forward, backward, everywhere)
