"""Base class of the int8 layers: made from a float layer and its settings; ``forward`` is one operator call.

Read first: state.py, what a layer holds; next: linear.py, conv.py.
"""

import dataclasses
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.onnx import is_in_onnx_export

from .. import _library
from ..ops import choose_qparams, quant_tensor_forward
from .saving import SavedState, is_channels_last
from .state import is_scale
from .transposed import as_linear
from .weight import dequantized

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
    elif not (scale.is_meta or is_scale(scale)):
        raise ValueError(f"quant_ops.quantize_weight: expected scale > 0 and finite, got {scale.flatten().tolist()}")
    scale = scale.detach().to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    codes = quant_tensor_forward(weight, scale, None, -qmax, qmax, simulate=False)
    return codes.contiguous(), scale.reshape(-1).float()


def _in_onnx_export() -> bool:
    return is_in_onnx_export()


# Dynamo takes torch's function for False; it calls one with this mark, which torch.compiler.assume_constant_result would set (that
# imports Dynamo, which takes a second).
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


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


class Int8Layer(SavedState):
    """Base class of the int8 layers. A subclass says which float layer it stands for and calls its operator in ``_run``."""

    float_class: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]  # arguments and attributes that the constructors of both layers share; bias is another
    _granularity: ClassVar[str]  # what one scale of dynamic quantization covers, for extra_repr

    config: Any = None  # what a converting call made the layer by

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
            module: an nn.Linear or transformers' Conv1D for QuantLinear, an nn.Conv2d for QuantConv2d, an nn.Conv1d for
                QuantConv1d.
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
        given, module = module, as_linear(module)
        if not isinstance(module, cls.float_class):
            raise TypeError(
                f"quant_ops.{cls.__name__}.from_float: expected an nn.{cls.float_class.__name__}, got {type(given).__name__}"
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
            kind = torch.float32 if isinstance(value, float) else None  # whatever the default dtype is
            tensor = torch.as_tensor(value, dtype=kind, device=device).detach()
            if tensor.numel() != 1 and not (steps and tensor.dim() == 1 and len(tensor) > 0):
                allowed = "one element, or one per step" if steps else "one element"
                raise ValueError(f"quant_ops.{name}: expected {setting} to have {allowed}, got shape {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not dtype.is_floating_point:
                tensor = tensor.round().clamp(-128, 127)  # a learned zero point
            return tensor.to(dtype, copy=True).reshape(() if tensor.numel() == 1 else -1)

        codes, self.weight_scale = quantize_weight(weight, settings.weight_bits, settings.weight_scale)
        self.compute_dtype, self.channels_last = weight.dtype, is_channels_last(weight)
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
        self._check(self._buffers)
        self._count_steps()
        self.qweight = codes
        self.train(module.training)

    def dequantize(self) -> nn.Module:
        """A float32 layer of ``float_class`` with the weights that this layer computes with."""
        arguments = {name: getattr(self, name) for name in self.geometry}
        layer: Any = self.float_class(**arguments, bias=self.bias is not None, device=self.device, dtype=torch.float32)
        if self.channels_last:
            layer.to(memory_format=torch.channels_last)
        with torch.no_grad():
            layer.weight.copy_(dequantized(self.qweight, self.weight_scale, torch.float32))
            if self.bias is not None:
                layer.bias.copy_(self.bias)
        layer.train(self.training)
        return layer

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; see the class for shapes and dtypes."""
        # The usual call first, since every check costs. The operator's autograd kernel is Python and takes 3 us only to refuse
        # gradients, so it is skipped where nothing requires one; tensors of inference mode never reach it.
        if type(x) is Tensor and not is_compiling() and not x.requires_grad:
            if x.is_inference():
                return self._run(x)
            if _in_transform() is None and forward_ad._current_level < 0:
                with _below_autograd():
                    return self._run(x)
        return self._forward_unusual(x)

    def _forward_unusual(self, x: Tensor) -> Tensor:
        """Compiled, traced by torch.fx, differentiated, or with a subclass of Tensor."""
        if isinstance(x, Proxy):  # the layer becomes one node of the graph, as torch's own layers do
            tracer: Any = x.tracer
            node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
            return node
        if _in_onnx_export():
            self._refuse_onnx()
        if type(x) is not Tensor and hasattr(x, "full_tensor"):
            raise TypeError(
                f"quant_ops.{type(self).__name__}: expected a plain tensor, got a DTensor. Pass its full_tensor(), or its "
                "to_local() where every process has rows of its own."
            )
        return self._run(x)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called instead of forward by torch.jit.trace."""
        if _in_onnx_export():
            self._refuse_onnx()
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _refuse_onnx(self) -> NoReturn:
        raise RuntimeError(
            f"quant_ops.{type(self).__name__}: expected no torch.onnx.export of int8 layers, whose operators ONNX lacks. Export "
            "the float model and quantize it with the tools of ONNX, or keep the int8 model in torch, with torch.export.export or "
            "torch.jit.trace."
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script."""
        raise RuntimeError(
            f"quant_ops.{type(self).__name__}: expected no torch.jit.script of int8 layers, which it cannot compile. Use "
            "torch.jit.trace or torch.export.export."
        )

    def _run(self, x: Tensor) -> Tensor:
        """The operator call."""
        raise NotImplementedError

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
        return options

    def _describe(self) -> str:
        """The part of ``extra_repr`` that is the same for every layer."""
        mode = "static" if self.input_scale is not None else f"dynamic {self._granularity}"
        mode += f" in {self.num_steps} steps" if self.num_steps > 1 else ""
        zero = "asymmetric" if self.asymmetric or self.input_zero_point is not None else "symmetric"
        kernel = _library.gemm_kernel() if self.device.type == "cpu" else self.device.type
        output = "" if self.output_scale is None else ", output=int8"
        relu = ", relu=True" if self.relu else ""
        return f"weight=int{self.weight_bits} per channel, input=int8 {zero} {mode}{output}{relu}, kernel={kernel}"
