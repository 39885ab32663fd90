"""What the int8 layers share: buffers, settings, checks. Plain buffers, so that deepcopy, pickle, DDP and .to() work by themselves.

``qweight`` (int8; on the CPU only its packed copy), ``weight_scale`` (float32), ``bias`` (float32), and for static quantization
``input_scale`` and ``input_zero_point``: one element, or one per step; ``timestep`` is then the current step. ``forward`` is one
operator call. Read next: weight.py, linear.py, conv.py.
"""

import dataclasses
import operator
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy
from torch.onnx import is_in_onnx_export

from .. import _library
from ..ops import choose_qparams, quant_tensor_forward
from .weight import DequantizedWeight, dequantized, packed, placeholder, unpacked

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


DTYPES = {
    "qweight": torch.int8,
    "weight_scale": torch.float32,
    "bias": torch.float32,
    "input_scale": torch.float32,
    "input_zero_point": torch.int32,
    "output_scale": torch.float32,
    "output_zero_point": torch.int32,
}  # of the buffers in the state_dict
_EXACT, _EXACT_SHIFTED = 131071, 65793  # products that the operators sum exactly, without and with a zero point of the input
_DERIVED = ("_placeholder", "_stand_in")  # attributes that are made again instead of being pickled
_NO_STAND_IN: Any = ((None,) * 4, None)


def _empty(kind: type["Int8Layer"]) -> "Int8Layer":
    return kind.__new__(kind)


def _shared(layer: "Int8Layer") -> tuple[Any, ...]:
    """How ``multiprocessing`` pickles a layer. A plain weight made for the pickle would be gone before the process has started."""
    return _empty, (type(layer),), layer._attributes()


def size_mismatch(key: str, shape: torch.Size, current: torch.Size) -> str:
    """What torch says of a tensor that does not fit."""
    return f"size mismatch for {key}: copying a param with shape {shape} from checkpoint, the shape in current model is {current}."


def _in_onnx_export() -> bool:
    return is_in_onnx_export()


# Dynamo takes torch's function for False; it calls one with this mark, which torch.compiler.assume_constant_result would set (that
# imports Dynamo, which takes a second).
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a weight or an image lies in channels_last and in no other order."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


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

    _version = 2  # 1: the codes were called weight
    float_class: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]  # arguments and attributes that the constructors of both layers share; bias is another
    _granularity: ClassVar[str]  # what one scale of dynamic quantization covers, for extra_repr
    _OPTIONAL = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")

    config: Any = None  # what a converting call made the layer by
    groups: int = 1

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
        self.compute_dtype = torch.get_default_dtype()
        self.channels_last = False
        self._weight_shape = torch.Size(weight_shape)
        self._placeholder = placeholder(weight_shape)
        self._stand_in = _NO_STAND_IN
        codes = torch.zeros(weight_shape, dtype=torch.int8, device=device)
        self._buffers["qweight"] = codes  # register_buffer would take the property of this name for another attribute
        self.register_buffer("weight_scale", torch.ones(weight_shape[0], dtype=torch.float32, device=device))
        for name in self._OPTIONAL:
            self.register_buffer(name, None)
        if bias:
            self.bias = torch.zeros(weight_shape[0], dtype=torch.float32, device=device)
        self.register_buffer("packed_weight", None, persistent=False)
        self.register_buffer("timestep", None, persistent=False)
        self._pack()

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

    # ---- scales and steps ------------------------------------------------------------------------------------------------

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Raises ValueError for scales and zero points that forward could not use. It is called when they arrive, not in forward.

        Scales are positive and finite; zero points are codes, one for each scale; only ``input_*`` may have one for each step. With
        an input scale the layer is static, and the zero point, not ``asymmetric``, tells whether sums are shifted.
        """

        def refuse(relation: str, got: Any) -> NoReturn:
            raise ValueError(f"quant_ops.{type(self).__name__}: expected {relation}, got {got}")

        for name in ("weight_scale", "input_scale", "output_scale"):
            scale = tensors.get(name)
            if scale is not None and not scale.is_meta and not _is_scale(scale):
                refuse(f"{name} > 0 and finite", scale.tolist())
        for side in ("input", "output"):
            scale, zero_point = tensors.get(f"{side}_scale"), tensors.get(f"{side}_zero_point")
            for name, tensor in ((f"{side}_scale", scale), (f"{side}_zero_point", zero_point)):
                steps = side == "input" and tensor is not None and tensor.dim() == 1 and len(tensor) > 0
                if tensor is not None and tensor.numel() != 1 and not steps:
                    allowed = "one element, or one per step" if side == "input" else "one element"
                    refuse(f"{name} to have {allowed}", f"shape {tuple(tensor.shape)}")
            if zero_point is None:
                continue
            if scale is None:
                refuse(f"{side}_zero_point only together with {side}_scale", "it alone")
            if zero_point.numel() != scale.numel():
                refuse(f"one {side}_zero_point for each of {scale.numel()} steps", zero_point.numel())
            if not zero_point.is_meta and not ((zero_point >= -128) & (zero_point <= 127)).all():
                refuse(f"-128 <= {side}_zero_point <= 127", zero_point.tolist())
        dynamic = tensors.get("input_scale") is None
        shifted = self.asymmetric if dynamic else tensors.get("input_zero_point") is not None
        products = self._weight_shape[1:].numel()
        if products > (limit := _EXACT_SHIFTED if shifted else _EXACT):
            refuse(f"at most {limit} products in a sum, so that it is exact in int32", products)

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

    @property
    def device(self) -> torch.device:
        """Where the layer is."""
        return self.weight_scale.device

    @property
    def qweight(self) -> Tensor:
        """The int8 codes of the weight, unpacked where only the packed copy is kept: writing into them changes no layer.

        Assigning codes of the same shape replaces the layer's.
        """
        codes, packed_weight = self._buffers["qweight"], self._buffers["packed_weight"]
        if codes is not None:
            return codes
        assert packed_weight is not None
        return unpacked(packed_weight, self._weight_shape, self.groups)

    @qweight.setter
    def qweight(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or codes.shape != self._weight_shape:
            wanted = f"torch.int8 of shape {tuple(self._weight_shape)}"
            got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"quant_ops.{type(self).__name__}: expected qweight to be {wanted}, got {got}")
        self._buffers["qweight"] = codes
        self._pack()

    @property
    def weight(self) -> Tensor:
        """Stands for the values code * scale in ``compute_dtype``, the float layer's dtype as ``.half()`` and ``.to()`` changed it.

        Shape, dtype and device cost nothing; any other use computes the values. Read only: the weight is ``qweight`` and
        ``weight_scale``.
        """
        b = self._buffers
        if is_compiling() or torch._C._get_tracing_state():
            return dequantized(self.qweight, self.weight_scale, self.compute_dtype)
        held = (b["qweight"], b["packed_weight"], b["weight_scale"], self.compute_dtype)
        before, made = self._stand_in
        if not all(map(operator.is_, before, held)):
            made = DequantizedWeight(held[0], held[1], self.weight_scale, self._weight_shape, self.groups, self.compute_dtype)
            self._stand_in = (held, made)
        return made

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            raise AttributeError(
                f"quant_ops.{type(self).__name__}: expected weight to be left alone, got an assignment. It stands for the values "
                "of the buffers qweight and weight_scale: load those with load_state_dict, assign qweight, or change the float "
                "model and quantize it."
            )
        if name == "qweight":
            object.__setattr__(self, name, value)  # the property's setter
        else:
            super().__setattr__(name, value)

    def _pack(self) -> None:
        """Packs the codes that have arrived. On the CPU, whose kernels read nothing else, the packed copy replaces them."""
        codes = self._buffers["qweight"]
        assert codes is not None
        self._buffers["packed_weight"] = packed(codes, self.groups)
        if codes.device.type == "cpu" and codes.numel():
            self._buffers["qweight"] = None

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

    @property
    def is_packed_only(self) -> bool:
        """Whether the layer holds its weight in the packed form alone."""
        return self._buffers["qweight"] is None

    def plain_weight(self) -> Tensor:
        """The same as ``qweight``."""
        return self.qweight

    # ---- moving, saving, loading -----------------------------------------------------------------------------------------

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
        before = dict(self._buffers)
        # what fn does to a floating weight: another dtype, another memory format
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        small = [2] * len(self._weight_shape)
        probe = fn(torch.empty(small, dtype=self.compute_dtype, device=self.device, memory_format=memory_format))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)  # .half() and friends: scales and bias stay float32
        self.compute_dtype = probe.dtype
        self.channels_last = is_channels_last(probe)
        old_scale, old_packed = before["weight_scale"], before["packed_weight"]
        if old_scale is not None and old_scale.device != self.device:
            if self._buffers["qweight"] is None:
                assert old_packed is not None
                self._buffers["qweight"] = fn(unpacked(old_packed, self._weight_shape, self.groups))
            self._pack()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "qweight"] = self.qweight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why this part of a state_dict cannot be loaded, whatever ``strict`` is; None if it can.

        Raises:
            ValueError: scales or zero points that no layer could use.
        """
        layer = f"quant_ops.{type(self).__name__}"
        own = {name: state_dict[prefix + name] for name in (*DTYPES, "weight") if prefix + name in state_dict}
        if "weight" in own and "qweight" not in own and own["weight"].dtype == torch.int8:
            own["qweight"] = own.pop("weight")  # written before version 2
        if "weight" in own:
            return (
                f"{layer}: expected int8 codes {prefix + 'qweight'!r}, got the float weight {prefix + 'weight'!r}. Load the float "
                "checkpoint into the float model, and quantize that."
            )
        for name, tensor in own.items():
            if not isinstance(tensor, Tensor):
                return f"{layer}: expected {prefix + name!r} to be a Tensor, got {type(tensor).__name__}"
            wanted = DTYPES[name]
            if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
                return f"{layer}: expected {prefix + name!r} of dtype {wanted}, got {tensor.dtype}"
            held = self._buffers[name]
            shape = self._weight_shape if name == "qweight" else held.shape if held is not None else None
            if shape is not None and tensor.shape != shape and not (tensor.numel() == 1 and shape in ((), (1,))):
                return size_mismatch(prefix + name, tensor.shape, shape)
        if "qweight" in own and "weight_scale" not in own:
            return f"{layer}: expected {prefix + 'weight_scale'!r} with {prefix + 'qweight'!r}, got the codes alone"
        self._check({**self._buffers, **own})
        return None

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        missing_keys, _, error_msgs = lists
        if problem := self.refusal(state_dict, prefix):
            error_msgs.append(problem)
            missing_keys += [prefix + name for name in ("qweight", "weight_scale") if prefix + name not in state_dict]
            return
        old_name, name = prefix + "weight", prefix + "qweight"
        if old_name in state_dict:
            state_dict[name] = state_dict.pop(old_name)
        for buffer, dtype in DTYPES.items():
            stored, held = state_dict.get(prefix + buffer), self._buffers[buffer]
            if stored is not None and stored.dtype != dtype:
                state_dict[prefix + buffer] = stored = stored.to(dtype)
            if stored is not None and buffer.startswith(("input_", "output_")):
                if stored.numel() == 1:
                    state_dict[prefix + buffer] = stored = stored.reshape(())
                if held is None or held.shape != stored.shape:  # a checkpoint says whether the layer is static
                    self._buffers[buffer] = torch.empty_like(stored, device=self.device)
                if buffer == "input_scale":
                    self.asymmetric = False  # which is of layers that find the range of every input
            if held is not None and held is self._buffers[buffer] and held.is_inference() and not torch.is_inference_mode_enabled():
                self._buffers[buffer] = held.clone()  # it could not be written into
        arrives, kept = name in state_dict, (self._buffers["qweight"], self._buffers["packed_weight"])
        if kept[0] is None:
            self._buffers["qweight"] = torch.empty(self._weight_shape, dtype=torch.int8, device=self.device if arrives else "meta")
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        if not arrives:
            self._buffers["qweight"], self._buffers["packed_weight"] = kept
        elif self._buffers["qweight"] is not None:
            self._pack()
        self._count_steps()

    def __getstate__(self) -> dict[str, Any]:
        state = self._attributes()
        state["_buffers"] = {**state["_buffers"], "qweight": self.qweight, "packed_weight": None}
        return state

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        b = self._buffers
        if "qweight" not in b:  # pickled before version 2
            self._buffers = b = {"qweight": b.pop("weight"), **b}
            self.__dict__.pop("_was_packed_only", None)
            assert b["qweight"] is not None
            self._weight_shape, self.compute_dtype, self.channels_last = b["qweight"].shape, torch.float32, False
        self._placeholder, self._stand_in = placeholder(self._weight_shape), _NO_STAND_IN
        if b["packed_weight"] is None:
            self._pack()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """To another process of this machine a layer goes as it is, its packed weight in shared memory."""
        super().__init_subclass__(**kwargs)
        ForkingPickler.register(cls, _shared)

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
