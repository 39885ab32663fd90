"""Layers that compute in floating point with their operands rounded to formats: what ``quantize_`` makes by a ``Simulated`` config.

    y = output(compute(input(x), weight)),   each rounded by its format; amax from the data, or calibrated

They share the float layer's parameters, and train: gradients are those of the formats. Read first: recast.py, operand.py.
"""

import operator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import multi_head_attention
from .config import Simulated
from .operand import Layout, round_gradient, rounded, takes_amax
from .products import Products
from .recast import Conv, ConvTranspose, Embedding, EmbeddingBag, Linear, Recast, Transposed, linear

AMAX = ("amax_input", "amax_weight", "amax_output")


class SimulatedLayer(Recast):
    """What the simulated layers share.

    Buffers ``amax_input``, ``amax_weight`` and ``amax_output`` hold calibrated largest magnitudes, or are None where these follow
    from the data of each call.

    The rounded weight is kept as long as the parameter does not change, by its version counter, address, device and dtype: in eval
    mode, without gradients, outside of torch.compile, and in a single process, since sharded training changes weights without
    counting. A change through ``weight.data`` is not counted either. :func:`keep_weights_` keeps it whatever happens.
    """

    kind: ClassVar[str] = "simulated"
    own: ClassVar[tuple[str, ...]] = (*Recast.own, *AMAX, "_rounded", "kept_weights", "is_uncalibrated")
    weights: ClassVar[tuple[str, ...]] = ("weight",)  # names of the parameters that are rounded as weights

    config: Simulated
    amax_input: Tensor | None
    amax_weight: Tensor | None
    amax_output: Tensor | None

    def _prepare(self, config: Simulated) -> None:
        super()._prepare(config)
        for name in AMAX:
            if name not in self._buffers:
                self.register_buffer(name, None)
        self._rounded: dict[str, tuple[Any, Tensor]] = {}  # by a weight's name: what it was made of, and the rounded weight
        self.kept_weights = self.is_uncalibrated = False

    # ---- operands --------------------------------------------------------------------------------------------------------

    def _input(self, x: Tensor) -> Tensor:
        return rounded(x, self.config.input, self.input_layout, self.config.input_per, self.amax_input)

    def _weight(self, name: str = "weight") -> Tensor:
        if self.kept_weights and not self.training:
            return self._buffers[_rounded_name(name)]  # type: ignore[return-value]
        weight: Tensor = operator.attrgetter(name)(self)
        if torch.is_grad_enabled() or self.training or torch.compiler.is_compiling() or type(weight) is not nn.Parameter:
            return self._round_weight(weight)
        made_of = self._state_of(weight)
        before, value = self._rounded.get(name, (None, None))
        if value is None or made_of is None or made_of != before:
            value = self._round_weight(weight)
            self._rounded[name] = (made_of, value)
        return value

    def _state_of(self, weight: Tensor) -> Any:
        """What changes when the rounded weight does; None if that cannot be told."""
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        tensors = [weight] if self.amax_weight is None else [weight, self.amax_weight]
        if distributed or any(t.is_inference() for t in tensors):
            return None
        return id(self.config), [(t._version, t.data_ptr(), t.device, t.dtype, t.shape, t.stride()) for t in tensors]

    def _round_weight(self, weight: Tensor) -> Tensor:
        return rounded(weight, self.config.weight, self.weight_layout, self.config.weight_per, self.amax_weight)

    def _output(self, y: Tensor) -> Tensor:
        y = rounded(y, self.config.output, self.output_layout, self.config.output_per, self.amax_output)
        return round_gradient(y, self.config.backward, self.output_layout)

    # ---- kept weights ----------------------------------------------------------------------------------------------------

    def keep_weights(self, keep: bool = True) -> None:
        """See :func:`keep_weights_`."""
        self._rounded.clear()
        self.kept_weights = keep
        for name in self.weights:
            if (weight := operator.attrgetter(name)(self)) is None:
                continue
            if keep:
                with torch.inference_mode(False), torch.no_grad():  # its tensors could not be used under gradients
                    self.register_buffer(_rounded_name(name), self._round_weight(weight.detach()), persistent=False)
            elif _rounded_name(name) in self._buffers:
                delattr(self, _rounded_name(name))

    def to_float(self) -> nn.Module:
        """The float layer with this layer's parameters."""
        layer = super().to_float()
        for name in map(_rounded_name, self.weights):
            if name in layer._buffers:
                delattr(layer, name)
        return layer

    def _apply(self, fn: Any, recurse: bool = True) -> "SimulatedLayer":
        """Moves; but .half() and friends leave amax in the precision that they have, in which they may be large."""
        self._rounded.clear()
        before = {name: amax for name in AMAX if (amax := self._buffers[name]) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, amax in before.items():
            moved = self._buffers[name]
            assert moved is not None
            if moved.dtype != amax.dtype:
                self._buffers[name] = amax.to(moved.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_rounded": {}}

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self._rounded.clear()
        for name in AMAX:  # calibrated ones, for a layer that has none yet or ones of another shape
            stored, own = state_dict.get(prefix + name), self._buffers[name]
            if stored is not None and (own is None or own.shape != stored.shape):
                self._buffers[name] = torch.empty_like(stored, device=self._device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def _device(self) -> torch.device:
        return next(self.parameters(recurse=False)).device

    def notes(self) -> list[str]:
        """What was calibrated for nothing: amax of an operand whose format has no scale."""
        formats = {"amax_input": self.config.input, "amax_weight": self.config.weight, "amax_output": self.config.output}
        if self.is_uncalibrated and any(map(takes_amax, formats.values())):
            return [f"{self.float_class.__name__} is not calibrated: its scales follow from the data of each call"]
        return [
            f"{name} is not used: {format or 'no format'} takes no amax"
            for name, format in formats.items()
            if self._buffers[name] is not None and not takes_amax(format)
        ]

    def extra_repr(self) -> str:
        amax = ((name, self._buffers[name]) for name in AMAX)
        return ", ".join([super().extra_repr(), *(f"{name}={_show(value)}" for name, value in amax if value is not None)])


def _show(amax: Tensor) -> str:
    if amax.is_meta:
        return str(tuple(amax.shape))
    if amax.numel() == 1:
        return f"{float(amax):.4g}"
    return f"{tuple(amax.shape)} in [{float(amax.min()):.4g}, {float(amax.max()):.4g}]"


def _rounded_name(weight: str) -> str:
    """Of the buffer that keeps a weight."""
    return "rounded_" + weight.replace(".", "_")


def keep_weights_(model: nn.Module, keep: bool = True) -> int:
    """Rounds the weights of simulated layers once, for the time in eval mode: as buffers, whatever happens to the parameters.

    For evaluation where the layers cannot tell whether a weight has changed: under ``torch.compile``, with FSDP, under gradients.
    The buffers move with the model and are no part of its state_dict. Training mode does not use them; call this again after
    weights have changed.

    Args:
        keep: False removes the buffers.

    Returns:
        The number of simulated layers.
    """
    layers = [module for module in model.modules() if isinstance(module, SimulatedLayer)]
    for layer in layers:
        layer.keep_weights(keep)
    return len(layers)


# ---- kinds of layers -----------------------------------------------------------------------------------------------------


class SimulatedLinear(Linear, SimulatedLayer, nn.Linear):
    """nn.Linear with rounded operands."""


class SimulatedTransposedLinear(Transposed, SimulatedLayer):
    """transformers' Conv1D with rounded operands."""

    own = (*SimulatedLayer.own, "made_from")


class SimulatedConv1d(Conv, SimulatedLayer, nn.Conv1d):
    """nn.Conv1d with rounded operands."""

    float_class = nn.Conv1d


class SimulatedConv2d(Conv, SimulatedLayer, nn.Conv2d):
    """nn.Conv2d with rounded operands."""

    float_class = nn.Conv2d


class SimulatedConv3d(Conv, SimulatedLayer, nn.Conv3d):
    """nn.Conv3d with rounded operands."""

    float_class = nn.Conv3d


class SimulatedConvTranspose1d(ConvTranspose, SimulatedLayer, nn.ConvTranspose1d):
    """nn.ConvTranspose1d with rounded operands."""

    float_class = nn.ConvTranspose1d


class SimulatedConvTranspose2d(ConvTranspose, SimulatedLayer, nn.ConvTranspose2d):
    """nn.ConvTranspose2d with rounded operands."""

    float_class = nn.ConvTranspose2d


class SimulatedConvTranspose3d(ConvTranspose, SimulatedLayer, nn.ConvTranspose3d):
    """nn.ConvTranspose3d with rounded operands."""

    float_class = nn.ConvTranspose3d


class SimulatedEmbedding(Embedding, SimulatedLayer, nn.Embedding):
    """nn.Embedding with a rounded weight and output."""


class SimulatedEmbeddingBag(EmbeddingBag, SimulatedLayer, nn.EmbeddingBag):
    """nn.EmbeddingBag with a rounded weight and output."""


class _Cell(SimulatedLayer):
    """What recurrent cells share: two products of a step, of the input and of the state, which are rounded each for itself."""

    weights = ("weight_ih", "weight_hh")
    input_layout = Linear.input_layout
    weight_layout = Linear.weight_layout

    def _gates(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        layer: Any = self
        return (
            self._output(linear(self._input(x), self._weight("weight_ih"), layer.bias_ih)),
            self._output(linear(self._input(h), self._weight("weight_hh"), layer.bias_hh)),
        )

    def _state(self, x: Tensor, state: Tensor | None) -> Tensor:
        layer: Any = self
        return x.new_zeros(*x.shape[:-1], layer.hidden_size) if state is None else state


class SimulatedLSTMCell(_Cell, nn.LSTMCell):
    """nn.LSTMCell with rounded operands of its two products; the gates are computed in float."""

    float_class = nn.LSTMCell

    def forward(self, input: Tensor, hx: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """(h, c) from (N, input_size) or (input_size,), as nn.LSTMCell."""
        h, c = (None, None) if hx is None else hx
        h, c = self._state(input, h), self._state(input, c)
        from_input, from_state = self._gates(input, h)
        i, f, g, o = (from_input + from_state).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        return torch.sigmoid(o) * torch.tanh(c), c


class SimulatedGRUCell(_Cell, nn.GRUCell):
    """nn.GRUCell with rounded operands of its two products; the gates are computed in float."""

    float_class = nn.GRUCell

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """h from (N, input_size) or (input_size,), as nn.GRUCell."""
        h = self._state(input, hx)
        (r, z, n), (hr, hz, hn) = (gates.chunk(3, -1) for gates in self._gates(input, h))
        r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
        n = torch.tanh(n + r * hn)
        return n + z * (h - n)


class _OfLayer(Products):
    """The products of a MultiheadAttention, whose weights the layer rounds, once while they do not change."""

    def __init__(self, layer: "SimulatedMultiheadAttention") -> None:
        super().__init__(layer.config)
        self.layer = layer

    def operand(self, site: str, slot: str, x: Tensor, layout: Layout) -> Tensor:
        """As :meth:`Products.operand`."""
        return self.layer._weight(_WEIGHT_OF[site]) if slot == "weight" else super().operand(site, slot, x, layout)


# By the name that attention.py gives the operand.
_WEIGHT_OF = {
    "in_proj": "in_proj_weight",
    "in_proj.query": "q_proj_weight",
    "in_proj.key": "k_proj_weight",
    "in_proj.value": "v_proj_weight",
    "out_proj": "out_proj.weight",
}


class SimulatedMultiheadAttention(SimulatedLayer, nn.MultiheadAttention):
    """nn.MultiheadAttention with rounded operands of its projections and of attention; see attention.py for the order."""

    float_class = nn.MultiheadAttention
    weights = tuple(_WEIGHT_OF.values())
    input_layout = Linear.input_layout
    weight_layout = Linear.weight_layout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention: ``(N, L, E)`` if batch_first, else ``(L, N, E)``, or ``(L, E)``; and the probabilities."""
        turned = self.batch_first and query.dim() == 3
        if turned:
            q = query.transpose(0, 1)
            k = q if key is query else key.transpose(0, 1)
            query, key, value = q, k, k if value is key else q if value is query else value.transpose(0, 1)
        y, probabilities = multi_head_attention(
            _OfLayer(self),
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=not self._qkv_same_embed_dim,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (y.transpose(0, 1) if turned else y), probabilities


SIMULATED: dict[type[nn.Module], type[SimulatedLayer]] = {
    kind.float_class: kind
    for kind in (
        SimulatedLinear,
        SimulatedTransposedLinear,
        SimulatedConv1d,
        SimulatedConv2d,
        SimulatedConv3d,
        SimulatedConvTranspose1d,
        SimulatedConvTranspose2d,
        SimulatedConvTranspose3d,
        SimulatedEmbedding,
        SimulatedEmbeddingBag,
        SimulatedLSTMCell,
        SimulatedGRUCell,
        SimulatedMultiheadAttention,
    )
}
