"""What the int8 layers share: buffers, settings, checks. Plain buffers, so that deepcopy, pickle, DDP and .to() work by themselves.

``weight`` (int8), ``weight_scale`` (float32), ``bias`` (float32), and for static quantization ``input_scale`` and
``input_zero_point``: one element, or one per step; ``timestep`` is then the current step. ``forward`` is one operator call.
Read next: packed.py, linear.py, conv.py.
"""

import dataclasses
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from .. import _library
from ..ops import choose_qparams, dequant_tensor, quant_tensor_forward
from .packed import PackedWeight

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_transform = torch._C._functorch.maybe_current_level
_Self = TypeVar("_Self", bound="Int8Layer")


def quantize_weight(weight: Tensor, bits: int = 8, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Symmetric int8 codes in ±(2^(bits-1) - 1) and one float32 scale per output channel (dimension 0).

    The scale is the given one, one element per channel, or the largest magnitude / (2^(bits-1) - 1).

    Raises:
        ValueError: bits outside 2..8, a weight that holds NaN or Inf, or a scale of another shape or not positive and finite.
    """
    if not 2 <= bits <= 8:
        raise ValueError(f"quant_ops.quantize_weight: expected 2 <= bits <= 8, got {bits}")
    qmax = 2 ** (bits - 1) - 1
    weight = weight.detach()
    if weight.numel() and not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError("quant_ops.quantize_weight: expected finite weights, got NaN or Inf")
    if scale is None:
        scale, _ = choose_qparams(weight, list(range(1, weight.dim())), -qmax, qmax)
    elif scale.numel() != weight.shape[0]:
        raise ValueError(
            f"quant_ops.quantize_weight: expected one scale for each of {weight.shape[0]} channels, got {scale.numel()}"
        )
    elif not (scale.is_meta or _is_scale(scale)):
        raise ValueError(f"quant_ops.quantize_weight: expected scale > 0 and finite, got {scale.flatten().tolist()}")
    scale = scale.detach().to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    codes = quant_tensor_forward(weight, scale, None, -qmax, qmax, simulate=False)
    return codes.contiguous(), scale.reshape(-1).float()


def _is_scale(scale: Tensor) -> bool:
    return bool(((scale > 0) & torch.isfinite(scale)).all())


def _at_step(step: Tensor, scale: Tensor | None, zero_point: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The current step's scale and zero point, chosen on the device: a new step recompiles nothing."""
    scale = None if scale is None else scale.index_select(0, step)
    return scale, None if zero_point is None else zero_point.index_select(0, step)


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

    def check(self, layer: str) -> None:
        """Raises ValueError for settings that exclude each other; ``layer`` is the name of the class."""
        if self.input_zero_point is not None and self.input_scale is None:
            raise ValueError(f"quant_ops.{layer}: expected input_zero_point only together with input_scale")
        if self.output_zero_point is not None and self.output_scale is None:
            raise ValueError(f"quant_ops.{layer}: expected output_zero_point only together with output_scale")
        if self.asymmetric and self.input_scale is not None:
            raise ValueError(
                f"quant_ops.{layer}: expected asymmetric only for dynamic quantization. Pass input_zero_point instead."
            )


class Int8Layer(nn.Module):
    """Base class of the int8 layers. A subclass says which float layer it stands for and calls its operator in ``_run``."""

    _version = 1
    float_class: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]  # arguments and attributes that the constructors of both layers share; bias is another
    _granularity: ClassVar[str]  # what one scale of dynamic quantization covers, for extra_repr
    _OPTIONAL = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")

    config: Any = None  # what a converting call made the layer by
    groups: int = 1

    weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    output_scale: Tensor | None
    output_zero_point: Tensor | None
    packed_weight: Tensor | None
    timestep: Tensor | None  # the current step, 0-dim, of a layer with more than one; see convert/steps.py

    def __init__(
        self, weight_shape: tuple[int, ...], bias: bool, device: torch.device | str | None, asymmetric: bool, relu: bool
    ) -> None:
        super().__init__()
        self.asymmetric = asymmetric
        self.relu = relu
        self.weight_bits = 8
        self.register_buffer("weight", torch.zeros(weight_shape, dtype=torch.int8, device=device))
        self.register_buffer("weight_scale", torch.ones(weight_shape[0], dtype=torch.float32, device=device))
        for name in self._OPTIONAL:
            self.register_buffer(name, None)
        if bias:
            self.bias = torch.zeros(weight_shape[0], dtype=torch.float32, device=device)
        self.register_buffer("packed_weight", None, persistent=False)
        self.register_buffer("timestep", None, persistent=False)
        self._packed = PackedWeight(self._buffers, self.groups)

    # ---- from float and back ---------------------------------------------------------------------------------------------

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
    ) -> _Self:
        """The int8 layer of a float one, which is left as it is.

        Args:
            module: an nn.Linear for QuantLinear, an nn.Conv2d for QuantConv2d, an nn.Conv1d for QuantConv1d.
            weight_bits: 2 to 8.
            weight_scale: one per output channel; without it the largest magnitude becomes the largest code.
            input_scale, input_zero_point: static quantization of the input; without them every row (of a convolution: every sample)
                is quantized from its data. One element, or one per step (see :func:`timestep`).
            asymmetric: dynamic quantization with a zero point.
            output_scale, output_zero_point: int8 output for the next layer.
            relu: fuse a ReLU.

        Raises:
            TypeError: module is of another class.
            ValueError: NaN or Inf in the weights, a scale that is not positive and finite, or settings that exclude each other.
        """
        if not isinstance(module, cls.float_class):
            raise TypeError(
                f"quant_ops.{cls.__name__}.from_float: expected an nn.{cls.float_class.__name__}, got {type(module).__name__}"
            )
        make: Any = cls  # whose constructor takes the geometry
        layer: _Self = make(**{name: getattr(module, name) for name in cls.geometry}, bias=False, device="meta")
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
            tensor = torch.as_tensor(value, device=device).detach()
            if tensor.numel() != 1 and not (steps and tensor.dim() == 1 and len(tensor) > 0):
                allowed = "one element, or one per step" if steps else "one element"
                raise ValueError(f"quant_ops.{name}: expected {setting} to have {allowed}, got shape {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not dtype.is_floating_point:
                tensor = tensor.round().clamp(-128, 127)  # a learned zero point
            return tensor.to(dtype).reshape(() if tensor.numel() == 1 else -1)

        self.weight, self.weight_scale = quantize_weight(weight, settings.weight_bits, settings.weight_scale)
        self.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
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
        self._check_scales()
        self._count_steps()
        self._packed.pack()
        self.train(module.training)

    def dequantize(self) -> nn.Module:
        """A float32 layer of ``float_class`` with the weights that this layer computes with."""
        arguments = {name: getattr(self, name) for name in self.geometry}
        layer: Any = self.float_class(**arguments, bias=self.bias is not None, device=self.weight.device)
        scale = self.weight_scale.reshape(-1, *[1] * (self.weight.dim() - 1))
        with torch.no_grad():
            layer.weight.copy_(dequant_tensor(self.plain_weight(), scale))
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        layer.train(self.training)
        return layer

    # ---- scales and steps ------------------------------------------------------------------------------------------------

    def _check_scales(self) -> None:
        """Scales must be positive and finite. They are checked when they arrive, not in forward."""
        for name in ("weight_scale", "input_scale", "output_scale"):
            scale = self._buffers[name]
            if scale is not None and not scale.is_meta and not _is_scale(scale):
                raise ValueError(f"quant_ops.{type(self).__name__}: expected {name} > 0 and finite, got {scale.tolist()}")

    @property
    def num_steps(self) -> int:
        """Sets of activation scales."""
        return 1 if self.input_scale is None or self.input_scale.dim() == 0 else len(self.input_scale)

    def _count_steps(self) -> None:
        """Adds or removes the buffer of the current step: only layers with several steps have it."""
        if (self.timestep is not None) != (self.num_steps > 1):
            device = self.weight.device
            self.timestep = torch.zeros((), dtype=torch.int64, device=device) if self.timestep is None else None

    # ---- the weight, plain and packed ------------------------------------------------------------------------------------

    def keep_packed_only(self: _Self) -> _Self:
        """Frees the plain weight and keeps the packed copy: half the memory of a layer on the CPU.

        ``weight`` becomes a placeholder of the same shape; ``state_dict`` and ``plain_weight`` unpack. Returns the layer.

        Raises:
            RuntimeError: the layer is not on the CPU, where alone the packed copy is all that the kernels read.
        """
        if self.weight.device.type != "cpu":
            raise RuntimeError(
                f"quant_ops.{type(self).__name__}: expected a layer on the CPU, got one on {self.weight.device}, whose kernels "
                "read the weight itself. Move it with .to('cpu') first."
            )
        self._packed.drop_plain()
        return self

    @property
    def is_packed_only(self) -> bool:
        """Whether :meth:`keep_packed_only` has freed the plain weight."""
        return self._packed.plain_dropped

    def plain_weight(self) -> Tensor:
        """The int8 weight, unpacked if only the packed copy is kept."""
        return self._packed.plain()

    # ---- moving, saving, loading -----------------------------------------------------------------------------------------

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
        with self._packed.whole():
            before = dict(self._buffers)
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
            for name, buffer in self._buffers.items():
                old = before[name]
                if buffer is not None and old is not None and buffer.dtype != old.dtype:
                    self._buffers[name] = old.to(buffer.device)  # .half() and friends: scales and bias stay float32
            old = before["weight"]
            if old is None or old.device != self.weight.device:
                self._packed.pack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._OPTIONAL:  # a checkpoint says whether the layer is static and has a bias
            stored = state_dict.get(prefix + name)
            if stored is not None and self._buffers[name] is None and name != "bias":
                setattr(self, name, torch.empty_like(stored, device=self.weight.device))
        with self._packed.whole():
            super()._load_from_state_dict(state_dict, prefix, *args)
            self._packed.pack()
        if self.input_scale is not None:
            self.asymmetric = False  # of dynamic quantization; a static layer has its zero point beside the scale
        self._check_scales()
        self._count_steps()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        del state["_packed"]
        state["_buffers"] = {**state["_buffers"], "weight": self.plain_weight(), "packed_weight": None}
        state["_was_packed_only"] = self.is_packed_only
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed_only = state.pop("_was_packed_only", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._packed = PackedWeight(self._buffers, self.groups)
        if packed_only and self.weight.device.type == "cpu":
            self._packed.drop_plain()

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; see the class for shapes and dtypes."""
        # Skip the operator's autograd kernel where nothing requires a gradient: it is Python, takes 3 us, and only refuses
        # gradients. Tensors of inference mode never reach it. Under torch.func and in forward mode nothing requires a gradient.
        if is_compiling() or x.is_inference() or x.requires_grad or _in_transform() is not None or forward_ad._current_level >= 0:
            return self._run(x)
        with _below_autograd():
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        """The operator call."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of the operator call. Each one left at its default saves a tenth of a microsecond."""
        b = self._buffers  # a dict lookup each; attribute access would cost more than the call
        options: dict[str, Any] = {"packed_weight": b["packed_weight"]}
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
        return options

    def _describe(self) -> str:
        """The part of ``extra_repr`` that is the same for every layer."""
        mode = "static" if self.input_scale is not None else f"dynamic {self._granularity}"
        mode += f" in {self.num_steps} steps" if self.num_steps > 1 else ""
        zero = "asymmetric" if self.asymmetric or self.input_zero_point is not None else "symmetric"
        kernel = _library.gemm_kernel() if self.weight.device.type == "cpu" else self.weight.device.type
        output = "" if self.output_scale is None else ", output=int8"
        relu = ", relu=True" if self.relu else ""
        return f"weight=int{self.weight_bits} per channel, input=int8 {zero} {mode}{output}{relu}, kernel={kernel}"
