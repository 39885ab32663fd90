"""What an int8 layer holds: buffers, which scales are allowed, and its weight. Plain buffers, so that deepcopy, DDP and .to() work.

``qweight`` (int8; on the CPU only its packed copy), ``weight_scale`` (float32), ``bias`` (float32), and for static quantization
``input_scale`` and ``input_zero_point``: one element, or one per step; ``timestep`` is then the current step. Read next: weight.py,
saving.py.
"""

import operator
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .weight import DequantizedWeight, dequantized, packed, placeholder, unpacked

_Self = TypeVar("_Self", bound="LayerState")

_EXACT, _EXACT_SHIFTED = 131071, 65793  # products that the operators sum exactly, without and with a zero point of the input
NO_STAND_IN: Any = ((None,) * 4, None)


def is_scale(scale: Tensor) -> bool:
    return bool(((scale > 0) & torch.isfinite(scale)).all())


class LayerState(nn.Module):
    """The state of an int8 layer, and what keeps it consistent."""

    _OPTIONAL = ("bias", "input_scale", "input_zero_point", "output_scale", "output_zero_point")

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
        self._stand_in = NO_STAND_IN
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
            if scale is not None and not scale.is_meta and not is_scale(scale):
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
