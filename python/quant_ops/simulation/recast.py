"""Float layers as other classes: they share the parameters, and a class may change their input, weight and output.

    y = output(compute(input(x), weight()))

Classes that observe (convert/prepared.py), train for int8 (convert/qat.py) and simulate formats (layers.py) override these steps.
The mixins here say how each kind of layer computes and what the dimensions of its operands are. They call ATen operators, which
:func:`simulated_products` leaves alone, so that no operand is rounded twice.
"""

from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..nn import ScaledLinear, TransposedLinear
from ..nn.scaled import multiplied
from .operand import Layout

linear = torch.ops.aten.linear.default
_addmm, _mm = torch.ops.aten.addmm.default, torch.ops.aten.mm.default

Self = TypeVar("Self", bound="Recast")


def recast(module: nn.Module, kind: type[nn.Module]) -> nn.Module:
    """The same layer, with the same parameters, as another class; the original is left as it is."""
    layer = kind.__new__(kind)
    layer.__dict__ = {key: value.copy() if isinstance(value, dict | set) else value for key, value in module.__dict__.items()}
    return layer


_joined_classes: dict[tuple[type["Recast"], type[nn.Module]], type["Recast"]] = {}


def _joined_class(kind: type["Recast"], made_from: type[nn.Module]) -> type["Recast"]:
    """The class for a subclass of a float layer, whose other methods stay available."""
    if (made := _joined_classes.get((kind, made_from))) is None:
        members = {"__module__": kind.__module__, "__doc__": kind.__doc__, "joined": (kind, made_from)}
        made = _joined_classes[kind, made_from] = type(kind.__name__, (kind, made_from), members)
    return made


def _remade(kind: type["Recast"], made_from: type[nn.Module]) -> "Recast":
    joined = _joined_class(kind, made_from)
    return joined.__new__(joined)


class Recast(nn.Module):
    """The steps of a forward, and the way from the float layer and back."""

    kind: ClassVar[str]  # for messages
    float_class: ClassVar[type[nn.Module]]
    own: ClassVar[tuple[str, ...]] = ("config",)  # attributes that the float layer does not have
    takes_indices: ClassVar[bool] = False  # instead of a floating input
    joined: ClassVar[tuple[type["Recast"], type[nn.Module]] | None] = None  # of a subclass of the float layer's class

    weight: Tensor

    @classmethod
    def from_float(cls: type[Self], module: nn.Module, config: Any) -> Self:
        """The layer of a float one, or of one that was made of it."""
        made_from = type(module)
        if isinstance(module, Recast):
            made_from = module.joined[1] if module.joined else module.float_class
        # transformers' Conv1D is a subclass of nn.Module alone, and computes as TransposedLinear does
        plain = made_from is cls.float_class or cls.float_class is TransposedLinear
        layer: Any = recast(module, cls if plain else _joined_class(cls, made_from))
        layer._prepare(config)
        return layer

    def _prepare(self, config: Any) -> None:
        self.config = config

    def to_float(self) -> nn.Module:
        """The float layer with this layer's parameters."""
        layer = recast(self, self.joined[1] if self.joined else self.float_class)
        for name in self.own:
            if hasattr(layer, name):
                delattr(layer, name)
        return layer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """For copies and pickles of a layer whose class has no name of its own."""
        if self.joined is None:
            return super().__reduce_ex__(protocol)
        return _remade, self.joined, getattr(self, "__getstate__", lambda: self.__dict__)()  # object has it from Python 3.11 on

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float layer's function, with the operands that the class makes of its own."""
        if not args:  # by its name, in transformers' Conv1D ``x``
            args = (kwargs.pop("input" if "input" in kwargs else "x"),)
        return self._output(self.compute(self._input(self._taken(args[0])), self._weight(), *args[1:], **kwargs))

    def _taken(self, x: Tensor) -> Tensor:
        """What takes the place of the input before all else."""
        return x

    def _input(self, x: Tensor) -> Tensor:
        return x

    def _weight(self) -> Tensor:
        return self.weight

    def _output(self, y: Tensor) -> Tensor:
        return y

    def compute(self, x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the float layer computes, with another weight."""
        raise NotImplementedError

    @property
    def input_layout(self) -> Layout:
        """The dimensions of the input."""
        raise NotImplementedError

    @property
    def weight_layout(self) -> Layout:
        """The dimensions of the weight."""
        raise NotImplementedError

    @property
    def output_layout(self) -> Layout:
        """The dimensions of the output; its gradient is summed over those of the input's channels."""
        return self.input_layout

    def extra_repr(self) -> str:
        """The float layer's, and the config."""
        return ", ".join(part for part in (super().extra_repr(), str(self.config)) if part)


class Linear(Recast):
    """Mixin: nn.Linear, and ScaledLinear, whose product with the multiplier is the input."""

    float_class = nn.Linear
    bias: Any
    input_layout = Layout(summed=-1, channel=-1, row=(-1,))
    weight_layout = Layout(summed=-1, channel=-2, row=(-1,))

    def _taken(self, x: Tensor) -> Tensor:
        return multiplied(x, self.input_multiplier) if isinstance(self, ScaledLinear) else x

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """As nn.Linear."""
        return linear(x, weight, self.bias)


class Transposed(Recast, TransposedLinear):
    """Mixin: transformers' Conv1D, a linear layer whose weight is (in_features, out_features)."""

    float_class = TransposedLinear
    own = (*Recast.own, "made_from")
    made_from: type[nn.Module]
    bias: Any
    input_layout = Linear.input_layout
    weight_layout = Layout(summed=-2, channel=-1, row=(-2,))

    @classmethod
    def from_float(cls: type[Self], module: nn.Module, config: Any) -> Self:
        """As :meth:`Recast.from_float`; keeps the class of the float layer."""
        layer: Any = super().from_float(module, config)
        layer.made_from = module.made_from if isinstance(module, Transposed) else type(module)
        return layer

    def to_float(self) -> nn.Module:
        """The float layer, of transformers' class again."""
        made_from = self.made_from
        return recast(super().to_float(), made_from)

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """As transformers computes it, to the bit."""
        rows = x.reshape(-1, x.shape[-1])
        y = _mm(rows, weight) if self.bias is None else _addmm(self.bias, rows, weight)
        return y.view(*x.shape[:-1], weight.shape[1])


class _Image(Recast):
    """What convolutions share: channels before the dimensions of an image."""

    bias: Any

    @property
    def input_layout(self) -> Layout:
        """(N, C, ...) or (C, ...)."""
        dims = self.weight.dim() - 1
        return Layout(summed=-dims, channel=-dims, row=tuple(range(-dims, 0)))


class Conv(_Image):
    """Mixin: nn.Conv1d, nn.Conv2d and nn.Conv3d."""

    @property
    def weight_layout(self) -> Layout:
        """(O, C / groups, ...)."""
        dims = self.weight.dim()
        return Layout(summed=1 - dims, channel=-dims, row=tuple(range(1 - dims, 0)))

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """As the float layer."""
        return self._conv_forward(x, weight, self.bias)  # type: ignore[operator]


class ConvTranspose(_Image):
    """Mixin: nn.ConvTranspose1d, nn.ConvTranspose2d and nn.ConvTranspose3d."""

    @property
    def weight_layout(self) -> Layout:
        """(C, O / groups, ...): the groups share what is "per channel"."""
        dims = self.weight.dim()
        return Layout(summed=-dims, channel=1 - dims, row=(-dims, *range(2 - dims, 0)))

    def compute(self, x: Tensor, weight: Tensor, output_size: list[int] | None = None) -> Tensor:
        """As the float layer, which takes zeros alone as padding."""
        layer: Any = self
        dims = weight.dim() - 2
        sizes = (layer.stride, layer.padding, layer.kernel_size)
        padding = layer._output_padding(x, output_size, *sizes, dims, layer.dilation)
        function = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
        return function(x, weight, self.bias, layer.stride, layer.padding, padding, layer.groups, layer.dilation)


class Embedding(Recast):
    """Mixin: nn.Embedding, whose input holds indices."""

    float_class = nn.Embedding
    takes_indices = True
    input_layout = Linear.input_layout
    weight_layout = Linear.weight_layout

    def compute(self, x: Tensor, weight: Tensor) -> Tensor:
        """As nn.Embedding."""
        layer: Any = self
        return F.embedding(x, weight, layer.padding_idx, scale_grad_by_freq=layer.scale_grad_by_freq)


class EmbeddingBag(Recast):
    """Mixin: nn.EmbeddingBag, whose input holds indices."""

    float_class = nn.EmbeddingBag
    takes_indices = True
    input_layout = Linear.input_layout
    weight_layout = Linear.weight_layout

    def compute(self, x: Tensor, weight: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """As nn.EmbeddingBag."""
        layer: Any = self
        return F.embedding_bag(
            x,
            weight,
            offsets,
            scale_grad_by_freq=layer.scale_grad_by_freq,
            mode=layer.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=layer.include_last_offset,
            padding_idx=layer.padding_idx,
        )
