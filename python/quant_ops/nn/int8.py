"""Base class of the int8 layers: made from a float layer and its settings, with scales of the input and the output.

``input_scale`` and ``input_zero_point``, for static quantization, have one element or one per step; ``timestep`` is then the
current step. Read first: base.py; next: linear.py, conv.py.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .. import _library
from ..ops import choose_qparams, quant_tensor_forward
from ..ops.int8 import ACTIVATIONS, activation_number
from .base import QuantizedLayer
from .saving import is_channels_last
from .state import is_scale
from .weight import dequantized, packed, unpacked

_Self = TypeVar("_Self", bound="Int8Layer")

_EXACT, MOST_SHIFTED = 131071, 65793  # products that the operators sum exactly, without and with a zero point of the input
_NUMBERS = {name: number for number, name in enumerate(ACTIVATIONS, 1)}
_DTYPES = {
    "qweight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "input_scale": torch.float32,
    "input_zero_point": torch.int32,
    "output_scale": torch.float32,
    "output_zero_point": torch.int32,
    "input_multiplier": torch.float32,  # of QuantLinear
}


def quantize_weight(
    weight: Tensor, bits: int = 8, scale: Tensor | None = None, codes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes in ±(2^(bits-1) - 1) and one float32 scale per output channel (dimension 0).

    The scale is the given one, one element per channel, or the largest magnitude / (2^(bits-1) - 1). Codes may be given with it.

    Raises:
        ValueError: bits outside 2..8, a weight that holds NaN or Inf, a scale of another shape or not positive and finite, or codes
            of another dtype or shape, out of range or without a scale.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"quant_ops.quantize_weight: expected 2 <= bits <= 8, got {bits}")
    qmax = 2 ** (bits - 1) - 1
    weight = weight.detach()
    if weight.numel() and not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError("quant_ops.quantize_weight: expected finite weights, got NaN or Inf")
    if codes is not None:
        codes = _check_codes(codes, weight, qmax)
        if scale is None:
            raise ValueError("quant_ops.quantize_weight: expected weight_scale together with codes, got codes alone")
    if scale is None:
        scale, _ = choose_qparams(weight, list(range(1, weight.dim())), -qmax, qmax)
    elif scale.numel() != weight.shape[0]:
        raise ValueError(
            f"quant_ops.quantize_weight: expected one scale for each of {weight.shape[0]} channels, got {scale.numel()}"
        )
    elif not (scale.is_meta or is_scale(scale)):
        raise ValueError(f"quant_ops.quantize_weight: expected scale > 0 and finite, got {scale.flatten().tolist()}")
    scale = scale.detach().to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    if codes is None:
        codes = quant_tensor_forward(weight, scale, None, -qmax, qmax, simulate=False)
    return codes.contiguous(), scale.reshape(-1).float()


def _check_codes(codes: Tensor, weight: Tensor, qmax: int) -> Tensor:
    """Given codes, on the weight's device."""
    if codes.dtype != torch.int8 or codes.shape != weight.shape:
        wanted = f"codes torch.int8 of shape {tuple(weight.shape)}"
        raise ValueError(f"quant_ops.quantize_weight: expected {wanted}, got {codes.dtype} {tuple(codes.shape)}")
    if not codes.is_meta and codes.numel() and not ((codes >= -qmax) & (codes <= qmax)).all():
        got = f"{codes.min().item()} to {codes.max().item()}"
        raise ValueError(f"quant_ops.quantize_weight: expected codes in [{-qmax}, {qmax}], got {got}")
    return codes.detach().to(weight.device)


def _at_step(step: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The current step's scale and zero point, chosen on the device: a new step recompiles nothing."""
    scale = None if scale is None else scale.index_select(0, step)
    return scale, None if zero_point is None else zero_point.index_select(0, step)


def _values_of(
    codes: Tensor | None, packed_weight: Tensor | None, scale: Tensor, shape: torch.Size, groups: int, dtype: torch.dtype
) -> Tensor:
    """code * scale."""
    if codes is None:
        assert packed_weight is not None
        codes = unpacked(packed_weight, shape, groups)
    return dequantized(codes, scale, dtype)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The arguments of :meth:`Int8Layer.from_float`, which documents them."""

    weight_bits: int
    weight_scale: Tensor | None
    input_scale: Tensor | float | None
    input_zero_point: Tensor | int | None
    asymmetric: bool
    output_scale: Tensor | float | None
    output_zero_point: Tensor | int | None
    relu: bool
    activation: str | None
    input_multiplier: Tensor | None
    codes: Tensor | None
    backward: bool

    def check(self, layer: str) -> None:
        """Raises ValueError for settings that exclude each other; ``layer`` is the name of the class."""
        if self.input_zero_point is not None and self.input_scale is None:
            raise ValueError(f"quant_ops.{layer}: expected input_zero_point only together with input_scale")
        if self.output_zero_point is not None and self.output_scale is None:
            raise ValueError(f"quant_ops.{layer}: expected output_zero_point only together with output_scale")
        if self.backward and self.output_scale is not None:
            raise ValueError(
                f"quant_ops.{layer}: expected backward=True only with a floating output, got output_scale. Codes carry no gradient."
            )
        check_activation(layer, self.relu, self.activation, self.backward)
        if self.asymmetric and self.input_scale is not None:
            raise ValueError(
                f"quant_ops.{layer}: expected asymmetric only for dynamic quantization. Pass input_zero_point instead."
            )


def check_activation(layer: str, relu: bool, activation: str | None, backward: bool) -> None:
    """Raises ValueError for one that is unknown, or that another setting excludes."""
    number = activation_number(layer, activation)
    if relu and number:
        raise ValueError(f"quant_ops.{layer}: expected relu=True or an activation, got both. Leave relu out.")
    if backward and number > 1:
        raise ValueError(
            f"quant_ops.{layer}: expected no activation but relu with backward=True, got {activation!r}. Apply it after the layer."
        )


class Int8Layer(QuantizedLayer):
    """Base class of the int8 layers. On the CPU, whose kernels read nothing else, the packed copy replaces the codes."""

    settings = ("asymmetric", "relu", "activation", "backward")
    newer: ClassVar[dict[str, Any]] = {"activation": None, "backward": False}
    optional: ClassVar[tuple[str, ...]] = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")
    form = "int8"
    groups: int = 1
    activation: str | None = None  # of a layer that was pickled before there were any
    _granularity: ClassVar[str]  # what one scale of dynamic quantization covers, for extra_repr

    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    timestep: Tensor | None  # the current step, 0-dim, of a layer with more than one; see convert/steps.py

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        bias: bool,
        device: torch.device | str | None,
        asymmetric: bool,
        relu: bool,
        activation: str | None,
        backward: bool,
    ) -> None:
        check_activation(type(self).__name__, relu, activation, backward)
        super().__init__(weight_shape, (weight_shape[0],), bias, device)
        self.asymmetric = asymmetric
        self.relu = relu
        self.activation = activation
        self.backward = backward
        self.weight_bits = 8
        self.register_buffer("timestep", None, persistent=False)

    @classmethod
    def are_settings(cls, arguments: dict[str, Any], weight_bits: Any) -> bool:
        flags = [arguments[key] for key in cls.settings if key != "activation"]
        known = arguments["activation"] is None or arguments["activation"] in ACTIVATIONS
        return type(weight_bits) is int and weight_bits in range(2, 9) and all(type(flag) is bool for flag in flags) and known

    # ---- from float ------------------------------------------------------------------------------------------------------

    @classmethod
    def from_float(
        cls: type[_Self],
        module: nn.Module,
        *,
        weight_bits: int = 8,
        weight_scale: Tensor | None = None,
        input_scale: Tensor | float | None = None,
        input_zero_point: Tensor | int | None = None,
        asymmetric: bool = False,
        output_scale: Tensor | float | None = None,
        output_zero_point: Tensor | int | None = None,
        relu: bool = False,
        activation: str | None = None,
        input_multiplier: Tensor | None = None,
        codes: Tensor | None = None,
        backward: bool = False,
    ) -> _Self:
        """The int8 layer of a float one, which is left as it is.

        Args:
            module: an nn.Linear, :class:`ScaledLinear` or transformers' Conv1D for QuantLinear, an nn.Conv2d for QuantConv2d, an
                nn.Conv1d for QuantConv1d.
            weight_bits: 2 to 8.
            weight_scale: one per output channel; without it the largest magnitude becomes the largest code.
            input_scale, input_zero_point: static quantization of the input; without them every row (of a convolution: every sample)
                is quantized from its data. One element, or one per step (see :func:`timestep`).
            asymmetric: dynamic quantization with a zero point.
            output_scale, output_zero_point: int8 output for the next layer.
            relu: the same as ``activation="relu"``.
            activation: fuse "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid" or "hardsigmoid".
            input_multiplier: of a linear layer, ``(in_features,)``: the input is multiplied by it, in float32, before it is
                quantized (SmoothQuant). The weight is taken as it is: whoever wants the same function has divided its columns by
                the multiplier. That of a ScaledLinear is taken over.
            codes: int8 of the weight's shape, in ±(2^(weight_bits-1) - 1), with ``weight_scale``: the weight is not rounded.
            backward: gradients of the output become gradients of a floating input, by the dequantized weight and straight through
                the rounding of the input; 0 where ``input_scale`` clips it. Weight, scales and bias stay constants. See
                :func:`int8_linear_backward` and :func:`int8_conv2d_backward`.

        Raises:
            TypeError: module is of another class, or the multiplier no floating tensor.
            ValueError: NaN or Inf in the weights or the multiplier, a scale that is not positive and finite, codes of another shape
                or out of range, or settings that exclude each other.
        """
        layer, module = cls._like(module)
        layer._take(
            module,
            Settings(
                weight_bits=weight_bits,
                weight_scale=weight_scale,
                input_scale=input_scale,
                input_zero_point=input_zero_point,
                asymmetric=asymmetric,
                output_scale=output_scale,
                output_zero_point=output_zero_point,
                relu=relu,
                activation=activation,
                input_multiplier=input_multiplier,
                codes=codes,
                backward=backward,
            ),
        )
        return layer

    def _take(self, module: nn.Module, settings: Settings) -> None:
        """Takes over the weights of a float module and the quantization settings."""
        name = type(self).__name__
        settings.check(name)
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        device = weight.device

        def scalar(setting: str, dtype: torch.dtype, steps: bool = False) -> Tensor | None:
            value = getattr(settings, setting)
            if value is None:
                return None
            kind = torch.float32 if isinstance(value, float) else None  # whatever the default dtype is
            tensor = torch.as_tensor(value, dtype=kind, device=device).detach()
            if tensor.numel() != 1 and not (steps and tensor.dim() == 1 and len(tensor) > 0):
                allowed = "one element, or one per step" if steps else "one element"
                raise ValueError(f"quant_ops.{name}: expected {setting} to have {allowed}, got shape {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not dtype.is_floating_point:
                tensor = tensor.round().clamp(-128, 127)  # a learned zero point
            return tensor.to(dtype, copy=True).reshape(() if tensor.numel() == 1 else -1)

        codes, self.weight_scale = quantize_weight(weight, settings.weight_bits, settings.weight_scale, settings.codes)
        self.compute_dtype, self.channels_last = weight.dtype, is_channels_last(weight)
        self.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
        self._take_multiplier(module, settings.input_multiplier)
        self.input_scale = scalar("input_scale", torch.float32, steps=True)
        self.input_zero_point = scalar("input_zero_point", torch.int32, steps=True)
        if self.input_zero_point is not None and self.input_zero_point.numel() not in (1, self.num_steps):
            raise ValueError(
                f"quant_ops.{name}: expected one input_zero_point for each of {self.num_steps} steps, got "
                f"{self.input_zero_point.numel()}"
            )
        if self.input_zero_point is not None and self.num_steps > 1:
            self.input_zero_point = self.input_zero_point.expand(self.num_steps).clone()
        self.output_scale = scalar("output_scale", torch.float32)
        self.output_zero_point = scalar("output_zero_point", torch.int32)
        self.asymmetric, self.relu, self.weight_bits = settings.asymmetric, settings.relu, settings.weight_bits
        self.activation, self.backward = settings.activation, settings.backward
        self._check(self._buffers)
        self._count_steps()
        self._hold(codes)
        self.train(module.training)

    # ---- scales and steps ------------------------------------------------------------------------------------------------

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Scales are positive and finite; zero points are codes, one for each scale; only ``input_*`` may have one for each step.

        With an input scale the layer is static, and the zero point, not ``asymmetric``, tells whether sums are shifted.
        """
        self._check_scales(("weight_scale", "input_scale", "output_scale"), tensors)
        self._check_multiplier(tensors)
        for side in ("input", "output"):
            scale, zero_point = tensors.get(f"{side}_scale"), tensors.get(f"{side}_zero_point")
            for name, tensor in ((f"{side}_scale", scale), (f"{side}_zero_point", zero_point)):
                steps = side == "input" and tensor is not None and tensor.dim() == 1 and len(tensor) > 0
                if tensor is not None and tensor.numel() != 1 and not steps:
                    allowed = "one element, or one per step" if side == "input" else "one element"
                    self._refuse(f"{name} to have {allowed}", f"shape {tuple(tensor.shape)}")
            if zero_point is None:
                continue
            if scale is None:
                self._refuse(f"{side}_zero_point only together with {side}_scale", "it alone")
            if zero_point.numel() != scale.numel():
                self._refuse(f"one {side}_zero_point for each of {scale.numel()} steps", zero_point.numel())
            if not zero_point.is_meta and not ((zero_point >= -128) & (zero_point <= 127)).all():
                self._refuse(f"-128 <= {side}_zero_point <= 127", zero_point.tolist())
        dynamic = tensors.get("input_scale") is None
        shifted = self.asymmetric if dynamic else tensors.get("input_zero_point") is not None
        products = self._weight_shape[1:].numel()
        if products > (limit := MOST_SHIFTED if shifted else _EXACT):
            self._refuse(f"at most {limit} products in a sum, so that it is exact in int32", products)

    @property
    def num_steps(self) -> int:
        """Sets of activation scales."""
        return 1 if self.input_scale is None or self.input_scale.dim() == 0 else len(self.input_scale)

    def _count_steps(self) -> None:
        """Adds or removes the buffer of the current step: only layers with several steps have it."""
        if (self.timestep is not None) != (self.num_steps > 1):
            device = self.device
            self.timestep = torch.zeros((), dtype=torch.int64, device=device) if self.timestep is None else None

    # ---- the weight ------------------------------------------------------------------------------------------------------

    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: _DTYPES[name] for name in ("qweight", "weight_scale", *self.optional)}

    def _pack(self, codes: Tensor, in_place: bool) -> None:
        self._buffers["packed_weight"] = packed(codes, self.groups)
        alone = codes.device.type == "cpu" and codes.numel()
        self._buffers["qweight"] = None if alone else codes.clone() if in_place else codes

    def _codes(self) -> Tensor:
        codes, packed_weight = self._buffers["qweight"], self._buffers["packed_weight"]
        if codes is not None:
            return codes
        assert packed_weight is not None
        return unpacked(packed_weight, self._weight_shape, self.groups)

    def _values(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        b = self._buffers
        return functools.partial(
            _values_of, b["qweight"], b["packed_weight"], self.weight_scale, self._weight_shape, self.groups, dtype
        )

    def keep_packed_only(self: _Self) -> _Self:
        """Checks that the layer holds its weight once, packed, as every layer on the CPU does. Returns the layer.

        Raises:
            RuntimeError: the layer is not on the CPU, where alone the packed copy is all that the kernels read.
        """
        if self.device.type != "cpu":
            raise RuntimeError(
                f"quant_ops.{type(self).__name__}: expected a layer on the CPU, got one on {self.device}, whose kernels "
                "read the weight itself. Move it with .to('cpu') first."
            )
        return self

    def plain_weight(self) -> Tensor:
        """The same as ``qweight``."""
        return self.qweight

    # ---- moving, loading, pickling ---------------------------------------------------------------------------------------

    def _moved(self, before: dict[str, Tensor | None], fn: Any) -> None:
        """Packs again: each device has a layout of its own."""
        codes, old_packed = self._buffers["qweight"], before["packed_weight"]
        if codes is None:
            assert old_packed is not None
            codes = fn(unpacked(old_packed, self._weight_shape, self.groups))
        self._hold(codes)

    def _make_room(self, name: str, stored: Tensor) -> Tensor:
        if name != "input_multiplier" and name.startswith(("input_", "output_")):
            if stored.numel() == 1:
                stored = stored.reshape(())
            held = self._buffers[name]
            if held is None or held.shape != stored.shape:  # a checkpoint says whether the layer is static
                self._buffers[name] = torch.empty_like(stored, device=self.device)
            if name == "input_scale":
                self.asymmetric = False  # which is of layers that find the range of every input
        return super()._make_room(name, stored)

    def _loaded(self) -> None:
        self._count_steps()

    def __getstate__(self) -> dict[str, Any]:
        """With the plain codes: the packed ones are for this instruction set."""
        state = self._attributes()
        state["_buffers"] = {**state["_buffers"], "qweight": self.qweight, "packed_weight": None}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "qweight" not in state["_buffers"]:  # pickled before version 2
            buffers = dict(state["_buffers"])
            codes = buffers.pop("weight")
            state = {name: value for name, value in state.items() if name != "_was_packed_only"}
            state |= {"_weight_shape": codes.shape, "compute_dtype": torch.float32, "channels_last": False}
            state["_buffers"] = {"qweight": codes, **buffers}
        super().__setstate__(state)
        codes = self._buffers["qweight"]
        if self._buffers["packed_weight"] is None and codes is not None:
            self._hold(codes)

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def _is_one_call(self) -> bool:
        return self._buffers["timestep"] is None and super()._is_one_call()

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of the operator call. Each one left at its default saves a tenth of a microsecond."""
        b = self._buffers  # a dict lookup each; attribute access would cost more than the call
        options: dict[str, Any] = {}
        if b["qweight"] is None or not b["qweight"].is_cpu:  # on the CPU there are codes only while functional_call lends them
            options["packed_weight"] = b["packed_weight"]
        scale, zero_point = b["input_scale"], b["input_zero_point"]
        if b["timestep"] is not None:
            scale, zero_point = _at_step(b["timestep"], scale, zero_point)
        if scale is not None:
            options["x_scale"] = scale
            if zero_point is not None:
                options["x_zero_point"] = zero_point
        if b["output_scale"] is not None:
            options["out_scale"] = b["output_scale"]
            if b["output_zero_point"] is not None:
                options["out_zero_point"] = b["output_zero_point"]
        if self.asymmetric:
            options["asymmetric"] = True
        if self.relu:
            options["relu"] = True
        if self.activation is not None:
            options["activation"] = _NUMBERS[self.activation]
        return options

    def _describe(self) -> str:
        """The part of ``extra_repr`` that is the same for every layer."""
        mode = "static" if self.input_scale is not None else f"dynamic {self._granularity}"
        mode += f" in {self.num_steps} steps" if self.num_steps > 1 else ""
        zero = "asymmetric" if self.asymmetric or self.input_zero_point is not None else "symmetric"
        kernel = _library.gemm_kernel() if self.device.type == "cpu" else self.device.type
        output = "" if self.output_scale is None else ", output=int8"
        flags = "".join(f", {name}=True" for name in ("relu", "backward") if getattr(self, name))
        flags += "" if self.activation is None else f", activation={self.activation}"
        mode += " of multiplied columns" if self._buffers.get("input_multiplier") is not None else ""
        return f"weight=int{self.weight_bits} per channel, input=int8 {zero} {mode}{output}{flags}, kernel={kernel}"
