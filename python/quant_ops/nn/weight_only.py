"""Layers whose weight alone is quantized beforehand, to int8 or int4, a scale for each group of ``group_size`` weights of a row.

    symmetric    w = q * s          s = amax / 127 and q in [-127, 127], or s = amax / 7.5 and q in [-8, 7]
    asymmetric   w = (q - z) * s    s = (max - min) / 255 or / 15 with the range widened to contain 0, z = qmin - rne(min / s)
    q = clamp(rne(w / s) + z)

for 8 and 4 bits, the amax, min and max those of the group; the asymmetric q and z are in [-128, 127] or [-8, 7]. Codes and zero
points of 4 bits are those in [0, 15] less 8. On every device a layer holds its weight in one packed form alone, which both
operators read. Read first: base.py.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .. import _library
from ..ops import choose_qparams, pack_weight_only, quant_tensor_forward, unpack_weight_only
from ..ops._register import call
from .base import QuantizedLayer
from .weight import placeholder

_linear = torch.ops.quant_ops.weight_only_linear.default
_embedding = torch.ops.quant_ops.weight_only_embedding.default
_Self = TypeVar("_Self", bound="WeightOnlyLayer")

GROUP_SIZES = (-1, 32, 64, 128, 256)


def most_products(bits: int, asymmetric: bool, asymmetric_input: bool) -> int:
    """How many products of a group of int8 activations and codes an int32 sum holds exactly; the operator refuses more."""
    largest = (1 << (bits - 1)) + (127 if asymmetric else 0)
    return (2**31 - 1) // ((255 if asymmetric_input else 128) * largest)


def quantize_groups(weight: Tensor, bits: int, group_size: int, asymmetric: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes (N, K), and scales and zero points (N, groups) of a weight, by the formulas above.

    Raises:
        ValueError: the weight holds NaN or Inf.
    """
    weight = weight.detach()
    if weight.numel() and not weight.is_meta and not torch.isfinite(weight).all():
        raise ValueError("quant_ops.quantize_groups: expected finite weights, got NaN or Inf")
    n, k = weight.shape
    groups = _groups(k, group_size)
    size = max(k, 1) if groups == 1 else group_size
    missing = groups * size - k
    values = F.pad(weight, (0, missing)) if missing else weight  # a zero changes neither amax nor the widened range
    values = values.reshape(n, groups, size)
    low, high = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    if asymmetric:
        scale, zero_point = choose_qparams(values, [2], low, high, asymmetric=True)
    elif bits == 8:
        low = -high
        scale, zero_point = choose_qparams(values, [2], low, high)
    else:
        scale, zero_point = choose_qparams(values, [2], -15, 15)
        scale = 2 * scale  # amax / 7.5, to the bit
    codes = quant_tensor_forward(values, scale, zero_point, low, high, asymmetric=asymmetric, simulate=False)
    zeros = zero_point.reshape(n, groups).to(torch.int8) if asymmetric else None
    return codes.reshape(n, groups * size)[:, :k].contiguous(), scale.reshape(n, groups).float(), zeros


def _groups(k: int, group_size: int) -> int:
    return 1 if group_size == -1 else max(1, -(-k // group_size))


def _values_of(held: tuple[Any, ...], shape: torch.Size, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """(q - z) * s in float32, rounded once to the dtype: every row looked up."""
    lent, packed, scale, zero_point = held
    codes = placeholder(shape, scale.device) if lent is None else _loaded_codes(lent, shape, bits)
    return _looked_up(
        torch.arange(shape[0], device=scale.device),
        codes,
        scale,
        zero_point,
        bits,
        group_size,
        packed if lent is None else None,
        dtype,
    )


def _looked_up(
    indices: Tensor,
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    group_size: int,
    packed: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    made = {} if dtype in (torch.float32, torch.float64) else {"out_dtype": dtype}
    rows: Tensor = call(_embedding, indices, codes, scale, zero_point, bits, group_size, packed_weight=packed, **made)
    return rows if rows.dtype == dtype else rows.to(dtype)


# ---- the codes in a state_dict -------------------------------------------------------------------------------------------


def _saved_codes(codes: Tensor, bits: int) -> Tensor:
    """Of 8 bits the codes; of 4 bits two codes + 8 in a byte, an even k in the low half. A last half without a code is 8."""
    if bits == 8:
        return codes
    halves = F.pad(codes, (0, codes.shape[1] % 2)).to(torch.uint8) + 8  # -8 is 248, which 8 makes 0
    return halves[:, ::2] | halves[:, 1::2] << 4


def _loaded_codes(saved: Tensor, shape: torch.Size, bits: int) -> Tensor:
    if bits == 8:
        return saved
    return torch.stack([saved & 15, saved >> 4], 2).flatten(1)[:, : shape[1]].to(torch.int8) - 8


# For each buffer what a state_dict got last in its place, so that layers which share one have one tensor there too; and the
# versions of both, since either may be written into.
_last_saved: Any = WeakIdKeyDictionary()


def _saved_once(buffer: Tensor, save: Callable[[], Tensor]) -> Tensor:
    if buffer.is_inference() or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
        return save()  # such tensors have no version
    reference, versions = _last_saved.get(buffer, (lambda: None, None))
    saved: Tensor | None = reference()
    if saved is None or versions != (buffer._version, saved._version):
        saved = save()
        _last_saved[buffer] = weakref.ref(saved), (buffer._version, saved._version)
    return saved


# ---- moving --------------------------------------------------------------------------------------------------------------

_moves: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def _moved_once(fn: Any) -> Callable[[Tensor], Tensor]:
    """What ``fn`` makes of a tensor, the same for layers that share it: a call of ``.to()`` has one ``fn`` for all layers."""
    try:
        results = _moves.setdefault(fn, WeakIdKeyDictionary())
    except TypeError:  # it can be in no such dictionary
        return fn

    def move(tensor: Tensor) -> Tensor:
        made: Tensor | None = results.get(tensor, lambda: None)()
        if made is None:
            made = fn(tensor)
            if made is not tensor:
                results[tensor] = weakref.ref(made)
        return made

    return move


# ---- the layers ----------------------------------------------------------------------------------------------------------


class WeightOnlyLayer(QuantizedLayer):
    """Base class: a weight (N, K) of which ``packed_weight`` is all that is held, ``weight_scale`` and perhaps a zero point.

    Layers may share these tensors, as an embedding and a head of one float weight do; they stay shared when a model is moved,
    copied, pickled, saved and loaded.
    """

    settings: ClassVar[tuple[str, ...]] = ("bits", "group_size", "asymmetric")
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "bias")
    _held = operator.itemgetter("qweight", "packed_weight", "weight_scale", "weight_zero_point")
    _shared: ClassVar = ("packed_weight", "weight_scale", "weight_zero_point")

    weight_zero_point: Tensor | None

    def __init__(
        self, weight_shape: tuple[int, int], bias: bool, device: Any, bits: int, group_size: int | None, asymmetric: bool
    ) -> None:
        name = f"quant_ops.{type(self).__name__}"
        self.bits, self.group_size = bits, -1 if group_size is None else group_size
        if bits not in (4, 8):
            raise ValueError(f"{name}: expected bits 4 or 8, got {bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"{name}: expected group_size 32, 64, 128, 256 or -1 (one group a row of the weight), got {group_size}"
            )
        scale_shape = weight_shape[0], _groups(weight_shape[1], self.group_size)
        super().__init__(weight_shape, scale_shape, bias, device)
        if asymmetric:
            self.weight_zero_point = torch.zeros(scale_shape, dtype=torch.int8, device=device)
        self._check(self._buffers)

    def _take(self: _Self, module: Any, shared_with: "WeightOnlyLayer | None") -> _Self:
        """Takes over the weight of a float module, or what another layer has made of the same one."""
        weight, bias = module.weight, getattr(module, "bias", None)
        if shared_with is None:
            codes, scale, zero_point = quantize_groups(weight, self.bits, self.group_size, self.asymmetric)
            self.weight_scale, self.weight_zero_point = scale, zero_point
            self._hold(codes)
        else:
            self.share_weight(shared_with)
        self.compute_dtype = weight.dtype
        self.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
        return self.train(module.training)

    def share_weight(self, other: "WeightOnlyLayer") -> None:
        """Takes the packed weight, scales and zero points of another layer in place of its own.

        Raises:
            ValueError: the other layer's weight is of another shape, or of other bits or groups.
        """
        mine, theirs = (
            f"a weight {tuple(layer._weight_shape)} of {layer.bits} bits with group_size {layer.group_size}"
            for layer in (self, other)
        )
        if mine != theirs:
            self._refuse(f"a layer with {mine} to share with", f"one with {theirs}")
        for name in self._shared:
            self._buffers[name] = other._buffers[name]
        self._buffers["qweight"] = None
        self._placeholder = other._placeholder

    def shares_weight(self, other: nn.Module) -> bool:
        """Whether both layers hold one packed weight."""
        return isinstance(other, WeightOnlyLayer) and self.packed_weight is other.packed_weight

    # ---- the weight ------------------------------------------------------------------------------------------------------

    @property
    def form(self) -> str:
        return f"int{self.bits}"

    @property
    def weight_bits(self) -> int:  # type: ignore[override]
        """The same as ``bits``."""
        return self.bits

    @property
    def asymmetric(self) -> bool:
        """Whether the weight has zero points."""
        return self._buffers["weight_zero_point"] is not None

    def dtypes(self) -> dict[str, torch.dtype]:
        of = {
            "qweight": torch.int8 if self.bits == 8 else torch.uint8,
            "weight_scale": torch.float32,
            "weight_zero_point": torch.int8,
            "bias": torch.float32,
            "input_multiplier": torch.float32,
        }
        return {name: of[name] for name in ("qweight", "weight_scale", *self.optional)}

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        """Scales are positive and finite, and there is a zero point for each or for none."""
        self._check_scales(("weight_scale",), tensors)
        scale, zero_point = self._buffers["weight_scale"], tensors.get("weight_zero_point")
        assert scale is not None
        if zero_point is not None and zero_point.shape != scale.shape:
            self._refuse(f"weight_zero_point of shape {tuple(scale.shape)}", tuple(zero_point.shape))
        self._check_multiplier(tensors)

    def _pack(self, codes: Tensor, in_place: bool) -> None:
        packed, held = pack_weight_only(codes, self.bits, self.group_size), self._buffers["packed_weight"]
        fits = held is not None and held.device == packed.device and (not held.is_inference() or torch.is_inference_mode_enabled())
        if in_place and held is not None and fits:
            held.copy_(packed)  # for the layers that share it
        else:
            self._buffers["packed_weight"] = packed
        self._buffers["qweight"] = None

    def _codes(self) -> Tensor:
        lent = self._buffers["qweight"]
        if lent is not None:
            return self._codes_of(lent)
        assert self.packed_weight is not None
        return unpack_weight_only(self.packed_weight, self._weight_shape, self.bits, self.group_size)

    def _values(self, dtype: torch.dtype) -> Callable[[], Tensor]:
        return functools.partial(_values_of, self._held(self._buffers), self._weight_shape, self.bits, self.group_size, dtype)

    # ---- moving and saving -----------------------------------------------------------------------------------------------

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
        return super()._apply(_moved_once(fn), recurse)

    def _moved(self, before: dict[str, Tensor | None], fn: Any) -> None:
        """The packed weight is there already, as one buffer among others; coming from the meta device it is not written yet."""
        old = before["packed_weight"]
        if old is not None and old.is_meta:
            self._hold(torch.zeros(self._weight_shape, dtype=torch.int8, device=self.device), in_place=True)

    @classmethod
    def stored_shape(cls, weight_shape: torch.Size, weight_bits: int) -> torch.Size:
        n, k = weight_shape
        return torch.Size((n, -(-k * weight_bits // 8)))

    @classmethod
    def are_settings(cls, arguments: dict[str, Any], weight_bits: Any) -> bool:
        sizes = [weight_bits, *(arguments[key] for key in ("bits", "group_size"))]
        flags = [arguments[key] for key in cls.settings if key not in ("bits", "group_size")]
        right = all(type(size) is int for size in sizes) and all(type(flag) is bool for flag in flags)
        return right and weight_bits in (4, 8) and arguments["bits"] == weight_bits and arguments["group_size"] in GROUP_SIZES

    def _saved_codes(self) -> Tensor:
        def save() -> Tensor:
            return _saved_codes(self.qweight, self.bits)

        packed = self.packed_weight
        return save() if packed is None or self._buffers["qweight"] is not None else _saved_once(packed, save)

    def _codes_of(self, saved: Tensor) -> Tensor:
        return _loaded_codes(saved, self._weight_shape, self.bits)

    def _with_codes(self) -> tuple[str, ...]:
        return ("weight_scale", "weight_zero_point") if self.asymmetric else ("weight_scale",)

    def _make_room(self, name: str, stored: Tensor) -> Tensor:
        if name == "weight_zero_point" and self._buffers[name] is None:  # a checkpoint says whether there are any
            self._buffers[name] = torch.empty_like(self.weight_scale, dtype=torch.int8)
        return super()._make_room(name, stored)

    def _describe(self) -> str:
        """The part of ``extra_repr`` that is the same for every layer."""
        zero = "asymmetric" if self.asymmetric else "symmetric"
        groups = "per channel" if self.group_size == -1 else f"per group of {self.group_size}"
        return f"weight=int{self.bits} {zero} {groups}"


class WeightOnlyLinear(WeightOnlyLayer):
    """nn.Linear with an int8 or int4 weight, for inference: float in, float out, one operator call.

    Make one with :meth:`from_float`, or empty with the constructor and ``load_state_dict``. The state_dict has ``qweight``, int8
    (N, K) or, of 4 bits, uint8 (N, ceil(K / 2)) with two codes + 8 a byte; ``weight_scale`` and perhaps ``weight_zero_point``, one
    per group, (N, groups); ``bias``. The layer has buffers and no parameters.

    Shapes: input ``(..., in_features)``, output ``(..., out_features)``; float32, float16 or bfloat16 in, the same dtype out. The
    products are floating; with ``dynamic`` the rows of the input are quantized to int8 in every call, with a zero point if
    ``asymmetric_input``, and the products of integers are exact: see :func:`weight_only_linear`. ``input_multiplier``, None or a
    float32 buffer ``(in_features,)`` of the state_dict, multiplies the input first, in float32.
    """

    float_class = nn.Linear
    geometry = ("in_features", "out_features")
    settings = (*WeightOnlyLayer.settings, "dynamic", "asymmetric_input")
    optional = (*WeightOnlyLayer.optional, "input_multiplier")

    input_multiplier: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        *,
        bits: int = 8,
        group_size: int | None = -1,
        asymmetric: bool = False,
        dynamic: bool = False,
        asymmetric_input: bool = False,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.dynamic = dynamic
        self.asymmetric_input = asymmetric_input
        if asymmetric_input and not dynamic:
            raise ValueError(
                "quant_ops.WeightOnlyLinear: expected asymmetric_input=True only with dynamic=True, got it alone. Floating inputs "
                "are not quantized."
            )
        self._options = {name: True for name, wanted in (("dynamic", dynamic), ("asymmetric", asymmetric_input)) if wanted}
        super().__init__((out_features, in_features), bias, device, bits, group_size, asymmetric)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        bits: int = 8,
        group_size: int | None = -1,
        asymmetric: bool = False,
        dynamic: bool = False,
        asymmetric_input: bool = False,
        shared_with: WeightOnlyLayer | None = None,
        input_multiplier: Tensor | None = None,
    ) -> "WeightOnlyLinear":
        """The weight-only layer of a float one, which is left as it is.

        Args:
            module: an nn.Linear, :class:`ScaledLinear` or transformers' Conv1D.
            bits: 8 or 4.
            group_size: 32, 64, 128, 256: so many consecutive weights of a row share a scale, the last ones of a row perhaps fewer.
                -1 or None: one scale per output channel.
            asymmetric: zero points for the groups: for 8 bits seldom worth it, for 4 bits usually.
            dynamic: rows of the input are quantized to int8, from their data.
            asymmetric_input: with a zero point.
            shared_with: a layer that was made from the same float weight with the same bits and group_size: its packed weight,
                scales and zero points become those of this one too.
            input_multiplier: ``(in_features,)``: the input is multiplied by it, in float32 (AWQ, SmoothQuant). The weight is taken
                as it is: whoever wants the same function has divided its columns by the multiplier. That of a ScaledLinear is taken
                over.

        Raises:
            TypeError: module is of another class, or the multiplier no floating tensor.
            ValueError: NaN or Inf in the weights or the multiplier, settings that exclude each other, or ``shared_with`` has
                another kind of weight.
        """
        settings = {"asymmetric": asymmetric, "dynamic": dynamic, "asymmetric_input": asymmetric_input}
        layer, module = cls._like(module, bits=bits, group_size=group_size, **settings)
        layer._take(module, shared_with)._take_multiplier(module, input_multiplier)
        return layer

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        super()._check(tensors)
        if self.dynamic:
            size = self.in_features if self.group_size == -1 else min(self.group_size, self.in_features)
            limit = most_products(self.bits, tensors.get("weight_zero_point") is not None, self.asymmetric_input)
            if size > limit:
                self._refuse(f"groups of at most {limit} weights, so that an int32 sum is exact", f"{size}. Choose a group_size")

    def _run(self, x: Tensor) -> Tensor:
        b = self._buffers
        scale, zero_point, bias = b["weight_scale"], b["weight_zero_point"], b["bias"]
        options: dict[str, Any] = self._options
        multiplier = b["input_multiplier"]
        if multiplier is not None:
            options = {**options, "x_multiplier": multiplier}
        if b["qweight"] is not None:  # which functional_call lends
            return _linear(x, self.qweight, scale, zero_point, bias, self.bits, self.group_size, **options)
        packed = b["packed_weight"]
        return _linear(x, self._placeholder, scale, zero_point, bias, self.bits, self.group_size, packed_weight=packed, **options)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        zero = "asymmetric" if self.asymmetric_input else "symmetric"
        x = f"int8 {zero} dynamic per row" if self.dynamic else "float"
        x += " of multiplied columns" if self.input_multiplier is not None else ""
        return f"{shape}, {self._describe()}, input={x}, kernel={self._kernel()}"

    def _kernel(self) -> str:
        """The micro-kernel on the CPU, elsewhere the device."""
        if self.device.type != "cpu":
            return self.device.type
        return _library.kernels()[("nibbles" if self.bits == 4 else "gemm") if self.dynamic else "float_tile"]


class WeightOnlyEmbedding(WeightOnlyLayer):
    """nn.Embedding with an int8 or int4 weight, for inference: rows are looked up and dequantized, one operator call.

    Make one with :meth:`from_float`, or empty with the constructor and ``load_state_dict``; the state_dict is that of
    :class:`WeightOnlyLinear` without a bias. A head with the same float weight can share the packed one. ``padding_idx`` matters to
    training alone and is only kept.

    Shapes: indices of any shape, int32 or int64; output ``(*indices.shape, embedding_dim)`` in ``compute_dtype``, the dtype of the
    float layer as ``.half()`` and ``.to()`` have changed it.
    """

    float_class = nn.Embedding
    geometry = ("num_embeddings", "embedding_dim", "padding_idx")
    has_bias = False

    max_norm = None
    norm_type = 2.0
    scale_grad_by_freq = False
    sparse = False

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        *,
        bits: int = 8,
        group_size: int | None = -1,
        asymmetric: bool = False,
    ) -> None:
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta").padding_idx
        super().__init__((num_embeddings, embedding_dim), False, device, bits, group_size, asymmetric)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        bits: int = 8,
        group_size: int | None = -1,
        asymmetric: bool = False,
        shared_with: WeightOnlyLayer | None = None,
    ) -> "WeightOnlyEmbedding":
        """The weight-only layer of an nn.Embedding, which is left as it is.

        Args:
            bits, group_size, asymmetric, shared_with: as in :meth:`WeightOnlyLinear.from_float`; -1: one scale per row.

        Raises:
            TypeError: module is of another class.
            ValueError: NaN or Inf in the weights, a ``max_norm``, or ``shared_with`` has another kind of weight.
        """
        layer, module = cls._like(module, bits=bits, group_size=group_size, asymmetric=asymmetric)
        if module.max_norm is not None:
            raise ValueError(
                f"quant_ops.WeightOnlyEmbedding.from_float: expected max_norm=None, got {module.max_norm}, which changes the "
                "weight in every call. Scale the rows once and set it to None."
            )
        return layer._take(module, shared_with)

    def _run(self, x: Tensor) -> Tensor:
        b = self._buffers
        lent = b["qweight"] is not None  # by functional_call
        codes, packed = (self.qweight, None) if lent else (self._placeholder, b["packed_weight"])
        scale, zero_point = b["weight_scale"], b["weight_zero_point"]
        assert scale is not None
        return _looked_up(x, codes, scale, zero_point, self.bits, self.group_size, packed, self.compute_dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
