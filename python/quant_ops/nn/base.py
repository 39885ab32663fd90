"""Drop-in int8 layers. Plain buffers, so that state_dict, deepcopy, pickle, DDP and .to() work by themselves.

``weight`` (int8), ``weight_scale`` (float32), ``bias`` (float32), and for static quantization ``input_scale`` and
``input_zero_point``: one element, or one per step, of which ``timestep`` is the current one. The packed copy of the weight is
derived: rebuilt when weights arrive or move, never saved, never made in forward. ``forward`` is one operator call.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .. import _library
from ..ops import choose_qparams, dequant_tensor, pack_weight, quant_tensor_forward, unpack_weight

_below_autograd = torch._C._AutoDispatchBelowAutograd


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
    elif not (scale.is_meta or bool(((scale > 0) & torch.isfinite(scale)).all())):
        raise ValueError(f"quant_ops.quantize_weight: expected scale > 0 and finite, got {scale.flatten().tolist()}")
    scale = scale.detach().to(weight.device).reshape(-1, *[1] * (weight.dim() - 1))
    codes = quant_tensor_forward(weight, scale, None, -qmax, qmax, simulate=False)
    return codes.contiguous(), scale.reshape(-1).float()


def _at_step(step: Tensor, scale: Any, zero_point: Any) -> tuple[Tensor, Tensor | None]:
    """The current step's scale and zero point, chosen on the device: a new step recompiles nothing."""
    return scale.index_select(0, step), None if zero_point is None else zero_point.index_select(0, step)


class _QuantModule(nn.Module):
    """What the int8 layers share: buffers, checks, packing."""

    _version = 1
    _float_class: ClassVar[type[nn.Module]]
    _OPTIONAL = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")

    config: Any = None  # what a converting call made the layer by

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
        self._pack()

    @property
    def _groups(self) -> int:
        return 1

    def _pack(self) -> None:
        """Derives the packed copy where there are kernels that read it."""
        device = self.weight.device.type
        packs = device == "cpu" or (device == "cuda" and _library.cuda_library is not None)
        self.packed_weight = pack_weight(self.weight, self._groups) if packs else None

    def keep_packed_only(self) -> "_QuantModule":
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
        self.weight = torch.zeros((), dtype=torch.int8).expand(self.weight.shape)
        return self

    @property
    def is_packed_only(self) -> bool:
        """Whether :meth:`keep_packed_only` has freed the plain weight."""
        packed = self.packed_weight is not None and self.weight.device.type == "cpu"
        return packed and self.weight.numel() > 1 and not any(self.weight.stride())

    def plain_weight(self) -> Tensor:
        """The int8 weight, unpacked if only the packed copy is kept."""
        if self.is_packed_only:
            assert self.packed_weight is not None
            return unpack_weight(self.packed_weight, self.weight.shape, self._groups)
        return self.weight

    def _check_scales(self) -> None:
        """Scales must be positive and finite; looked at once, when they arrive, not in forward."""
        for name in ("weight_scale", "input_scale", "output_scale"):
            scale = self._buffers[name]
            if scale is None or scale.is_meta:
                continue
            if not bool(((scale > 0) & torch.isfinite(scale)).all()):
                raise ValueError(f"quant_ops.{type(self).__name__}: expected {name} > 0 and finite, got {scale.tolist()}")

    @property
    def num_steps(self) -> int:
        """Sets of activation scales."""
        return 1 if self.input_scale is None or self.input_scale.dim() == 0 else len(self.input_scale)

    def _count_steps(self) -> None:
        """Keeps a current step if there is more than one."""
        if (self.timestep is not None) != (self.num_steps > 1):
            device = self.weight.device
            self.timestep = torch.zeros((), dtype=torch.int64, device=device) if self.timestep is None else None

    def _take(
        self,
        module: nn.Module,
        weight_bits: int,
        weight_scale: Tensor | None,
        input_scale: Tensor | float | None,
        input_zero_point: Tensor | int | None,
        asymmetric: bool,
        output_scale: Tensor | float | None,
        output_zero_point: Tensor | int | None,
        relu: bool,
    ) -> None:
        """Takes over the weights of a float module and the quantization settings."""
        name = type(self).__name__
        if input_zero_point is not None and input_scale is None:
            raise ValueError(f"quant_ops.{name}: expected input_zero_point only together with input_scale")
        if output_zero_point is not None and output_scale is None:
            raise ValueError(f"quant_ops.{name}: expected output_zero_point only together with output_scale")
        if asymmetric and input_scale is not None:
            raise ValueError(f"quant_ops.{name}: expected asymmetric only for dynamic quantization. Pass input_zero_point instead.")
        weight, bias = module.weight, module.bias
        assert isinstance(weight, Tensor)
        device = weight.device

        def scalar(setting: str, value: Tensor | float | None, dtype: torch.dtype, steps: bool = False) -> Tensor | None:
            if value is None:
                return None
            tensor = torch.as_tensor(value, device=device).detach()
            if tensor.numel() != 1 and not (steps and tensor.dim() == 1 and len(tensor) > 0):
                allowed = "one element, or one per step" if steps else "one element"
                raise ValueError(f"quant_ops.{name}: expected {setting} to have {allowed}, got shape {tuple(tensor.shape)}")
            if tensor.is_floating_point() and not dtype.is_floating_point:
                tensor = tensor.round().clamp(-128, 127)  # a learned zero point
            return tensor.to(dtype).reshape(() if tensor.numel() == 1 else -1)

        self.weight, self.weight_scale = quantize_weight(weight, weight_bits, weight_scale)
        self.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
        self.input_scale = scalar("input_scale", input_scale, torch.float32, steps=True)
        self.input_zero_point = scalar("input_zero_point", input_zero_point, torch.int32, steps=True)
        if self.input_zero_point is not None and self.input_zero_point.numel() not in (1, self.num_steps):
            raise ValueError(
                f"quant_ops.{name}: expected one input_zero_point for each of {self.num_steps} steps, got "
                f"{self.input_zero_point.numel()}"
            )
        if self.input_zero_point is not None and self.num_steps > 1:
            self.input_zero_point = self.input_zero_point.expand(self.num_steps).clone()
        self.output_scale = scalar("output_scale", output_scale, torch.float32)
        self.output_zero_point = scalar("output_zero_point", output_zero_point, torch.int32)
        self.asymmetric, self.relu, self.weight_bits = asymmetric, relu, weight_bits
        self._check_scales()
        self._count_steps()
        self._pack()
        self.train(module.training)

    def _apply(self, fn: Any, recurse: bool = True) -> "_QuantModule":
        packed_only = self.is_packed_only
        if packed_only:  # a move needs the weight itself
            self.weight = self.plain_weight()
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)  # .half() and friends: scales and bias stay float32
        if before["weight"] is not self.weight and before["weight"].device != self.weight.device:  # type: ignore[union-attr]
            self._pack()
        if packed_only and self.weight.device.type == "cpu":
            self.keep_packed_only()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in self._OPTIONAL:  # a checkpoint says whether the layer is static and has a bias
            stored = state_dict.get(prefix + name)
            if stored is not None and self._buffers[name] is None and name != "bias":
                setattr(self, name, torch.empty_like(stored, device=self.weight.device))
        packed_only = self.is_packed_only
        self.weight = self.plain_weight()
        super()._load_from_state_dict(state_dict, prefix, *args)
        self._check_scales()
        self._count_steps()
        self._pack()
        if packed_only and self.weight.device.type == "cpu":
            self.keep_packed_only()

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        state["_buffers"] = {**state["_buffers"], "weight": self.plain_weight(), "packed_weight": None}
        state["_was_packed_only"] = self.is_packed_only
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        packed_only = state.pop("_was_packed_only", False)
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._pack()
        if packed_only and self.weight.device.type == "cpu":
            self.keep_packed_only()

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; see the class for shapes and dtypes."""
        # Without a gradient to refuse, the operator's autograd kernel, which is Python, would only cost its three microseconds.
        # Tensors of inference mode never reach it.
        if is_compiling() or x.is_inference() or x.requires_grad:
            return self._run(x)
        with _below_autograd():
            return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        """The operator call."""
        raise NotImplementedError

    def _options(self) -> dict[str, Any]:
        """Keyword arguments of the operator call: every one that is left at its default saves a tenth of a microsecond."""
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

    def _float_weight(self) -> Tensor:
        shape = (-1,) + (1,) * (self.weight.dim() - 1)
        return dequant_tensor(self.plain_weight(), self.weight_scale.reshape(shape))

    def _describe(self) -> str:
        mode = "static" if self.input_scale is not None else f"dynamic {self._granularity}"
        mode += f" in {self.num_steps} steps" if self.num_steps > 1 else ""
        zero = "asymmetric" if self.asymmetric or self.input_zero_point is not None else "symmetric"
        kernel = _library.gemm_kernel() if self.weight.device.type == "cpu" else self.weight.device.type
        output = "" if self.output_scale is None else ", output=int8"
        relu = ", relu=True" if self.relu else ""
        return f"weight=int{self.weight_bits} per channel, input=int8 {zero} {mode}{output}{relu}, kernel={kernel}"

    _granularity = ""
