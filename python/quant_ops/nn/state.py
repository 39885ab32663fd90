"""What a quantized layer holds: its weight, scales, bias. Plain buffers, so that deepcopy, DDP and .to() work.

``qweight`` (codes; where the kernels read nothing but their packed copy, only that is held), ``weight_scale`` (float32), ``bias``
(float32), and what a subclass adds. Read next: weight.py, saving.py; int8.py and weight_only.py, the two kinds of layers.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, NoReturn

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from .scaled import multiplier_problem
from .weight import DequantizedWeight, placeholder

NO_STAND_IN: Any = ((None,) * 5, None)


def is_scale(scale: Tensor) -> bool:
    return bool(((scale > 0) & torch.isfinite(scale)).all())


class LayerState(nn.Module):
    """The state of a quantized layer, and what keeps it consistent."""

    optional: ClassVar[tuple[str, ...]]  # buffers of the state_dict that may be None; the others are qweight and weight_scale
    _held: ClassVar[Callable[..., Any]] = operator.itemgetter("qweight", "packed_weight", "weight_scale")  # of the stand-in

    weight_bits: int
    weight_scale: Tensor
    bias: Tensor | None
    packed_weight: Tensor | None

    def __init__(self, weight_shape: tuple[int, ...], scale_shape: tuple[int, ...], bias: bool, device: Any) -> None:
        super().__init__()
        self.compute_dtype = torch.get_default_dtype()
        self.channels_last = False
        self._weight_shape = torch.Size(weight_shape)
        self._stand_in = NO_STAND_IN
        self._buffers["qweight"] = None  # register_buffer would take the property of this name for another attribute
        self.register_buffer("weight_scale", torch.ones(scale_shape, dtype=torch.float32, device=device))
        for name in self.optional:
            self.register_buffer(name, None)
        if bias:
            self.bias = torch.zeros(weight_shape[0], dtype=torch.float32, device=device)
        self.register_buffer("packed_weight", None, persistent=False)
        self._hold(torch.zeros(weight_shape, dtype=torch.int8, device=device))

    # ---- what a kind of layers says of its weight ------------------------------------------------------------------------

    @property
    def form(self) -> str:
        """What the weight is, for messages: "int8" or "int4"."""
        raise NotImplementedError

    def dtypes(self) -> dict[str, torch.dtype]:
        """Of the buffers in the state_dict."""
        raise NotImplementedError

    def _pack(self, codes: Tensor, in_place: bool) -> None:
        """Keeps these codes in the form that the kernels read; in place: a copy, where possible in the tensor that is there."""
        raise NotImplementedError

    def _codes(self) -> Tensor:
        """The codes, int8 of the weight's shape."""
        raise NotImplementedError

    def _values(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        """Computes the values of the weight. It holds the tensors that it needs, not the layer, which would be a cycle."""
        raise NotImplementedError

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Raises ValueError for scales and zero points that forward could not use. Called when they arrive, not in forward."""
        raise NotImplementedError

    def _check_scales(self, names: Iterable[str], tensors: Mapping[str, Tensor | None]) -> None:
        for name in names:
            scale = tensors.get(name)
            if scale is not None and not scale.is_meta and not is_scale(scale):
                self._refuse(f"{name} > 0 and finite", scale[~((scale > 0) & torch.isfinite(scale))][0].item())

    def _check_multiplier(self, tensors: Mapping[str, Tensor | None]) -> None:
        multiplier = tensors.get("input_multiplier")
        if multiplier is not None and (problem := multiplier_problem(multiplier, self._weight_shape[1])):
            raise ValueError(f"quant_ops.{type(self).__name__}: expected {problem}")

    def _refuse(self, relation: str, got: Any) -> NoReturn:
        raise ValueError(f"quant_ops.{type(self).__name__}: expected {relation}, got {got}")

    def _forget_call(self) -> None:
        """Gives up the call that was kept (kept.py), whose tensors or settings may not be the layer's any more."""
        self.__dict__.pop("_kept", None)

    def _hold(self, codes: Tensor, in_place: bool = False) -> None:
        """Makes these codes, int8 of the weight's shape, the layer's."""
        self._forget_call()
        self._placeholder = placeholder(self._weight_shape, codes.device)
        self._pack(codes, in_place)

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
        return self._codes()

    @qweight.setter
    def qweight(self, codes: Tensor) -> None:
        if not isinstance(codes, Tensor) or codes.dtype != torch.int8 or codes.shape != self._weight_shape:
            wanted = f"torch.int8 of shape {tuple(self._weight_shape)}"
            got = f"{codes.dtype} {tuple(codes.shape)}" if isinstance(codes, Tensor) else type(codes).__name__
            raise ValueError(f"quant_ops.{type(self).__name__}: expected qweight to be {wanted}, got {got}")
        self._hold(codes)

    @property
    def weight(self) -> Tensor:
        """Stands for the weight's values in ``compute_dtype``, the float layer's dtype as ``.half()`` and ``.to()`` changed it.

        Shape, dtype and device cost nothing; any other use computes the values. Read only: the weight is ``qweight`` with its
        scales and zero points.
        """
        if is_compiling() or torch._C._get_tracing_state():
            return self._values(self.compute_dtype)()
        held = (*self._held(self._buffers), self.compute_dtype)
        before, made = self._stand_in
        if not all(map(operator.is_, before, held)):
            data = held[1] if held[0] is None else held[0]
            made = DequantizedWeight(self._values(self.compute_dtype), data, self._weight_shape, self.compute_dtype, self.device)
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
            self._forget_call()
            super().__setattr__(name, value)

    @property
    def is_packed_only(self) -> bool:
        """Whether the layer holds its weight in the packed form alone."""
        return self._buffers["qweight"] is None
