"""Layers whose weight alone is quantized beforehand, to int8 or int4, a scale for each group of ``group_size`` weights of a row.

On every device a layer holds its weight in one packed form alone, which both operators read. Read first: groups.py, the formulas;
base.py.
"""

import dataclasses
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
from ..ops import pack_weight_only, unpack_weight_only
from ..ops._register import call
from ..ops.backward import differentiable
from .base import QuantizedLayer
from .groups import GROUP_SIZES, ZERO_POINTS, code_range, group_count, most_products, quantize_groups
from .kept import repeater
from .weight import placeholder

_linear = torch.ops.quant_ops.weight_only_linear.default
_embedding = torch.ops.quant_ops.weight_only_embedding.default
_Self = TypeVar("_Self", bound="WeightOnlyLayer")


def _values_of(held: tuple[Any, ...], shape: torch.Size, bits: int, group_size: int, dtype: torch.dtype) -> Tensor:
    """The weight's values in float32, rounded once to the dtype: every row looked up."""
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


@dataclasses.dataclass(frozen=True)
class Given:
    """Parameters and codes of a weight in place of those that rounding to the nearest would give; see ``from_float``."""

    scale: Tensor | None
    zero_point: Tensor | None
    codes: Tensor | None

    @staticmethod
    def of(scale: Tensor | None, zero_point: Tensor | None, codes: Tensor | None, shared_with: Any) -> "Given | None":
        """None if nothing is given."""
        if scale is None and zero_point is None and codes is None:
            return None
        if shared_with is not None:
            raise ValueError(
                "quant_ops.WeightOnlyLinear: expected shared_with, or weight_scale, weight_zero_point and codes, got both. Give "
                "them to the layer that is shared."
            )
        return Given(scale, zero_point, codes)


class WeightOnlyLayer(QuantizedLayer):
    """Base class: a weight (N, K) of which ``packed_weight`` is all that is held, ``weight_scale`` and perhaps a zero point.

    Layers may share these tensors, as an embedding and a head of one float weight do; they stay shared when a model is moved,
    copied, pickled, saved and loaded.
    """

    settings: ClassVar[tuple[str, ...]] = ("bits", "group_size", "asymmetric", "zero_point")
    newer: ClassVar[dict[str, Any]] = {"zero_point": "int"}
    optional: ClassVar[tuple[str, ...]] = ("weight_zero_point", "bias")
    _held = operator.itemgetter("qweight", "packed_weight", "weight_scale", "weight_zero_point")
    _shared: ClassVar = ("packed_weight", "weight_scale", "weight_zero_point")

    weight_zero_point: Tensor | None

    def __init__(
        self,
        weight_shape: tuple[int, int],
        bias: bool,
        device: Any,
        bits: int,
        group_size: int | None,
        asymmetric: bool,
        zero_point: str,
    ) -> None:
        name = f"quant_ops.{type(self).__name__}"
        self.bits, self.group_size = bits, -1 if group_size is None else group_size
        if bits not in (4, 8):
            raise ValueError(f"{name}: expected bits 4 or 8, got {bits}")
        if self.group_size not in GROUP_SIZES:
            raise ValueError(
                f"{name}: expected group_size 32, 64, 128, 256 or -1 (one group a row of the weight), got {group_size}"
            )
        if zero_point not in ZERO_POINTS:
            raise ValueError(f"{name}: expected zero_point 'int' or 'float', got {zero_point!r}")
        if zero_point == "float" and not asymmetric:
            raise ValueError(
                f"{name}: expected zero_point='float' only with asymmetric=True, got it for a weight without zero points"
            )
        scale_shape = weight_shape[0], group_count(weight_shape[1], self.group_size)
        super().__init__(weight_shape, scale_shape, bias, device)
        if asymmetric:
            dtype = torch.float32 if zero_point == "float" else torch.int8
            self.weight_zero_point = torch.zeros(scale_shape, dtype=dtype, device=device)
        self._check(self._buffers)

    def _take(self: _Self, module: Any, shared_with: "WeightOnlyLayer | None", given: "Given | None" = None) -> _Self:
        """Takes over the weight of a float module, or what another layer has made of the same one."""
        weight, bias = module.weight, getattr(module, "bias", None)
        if shared_with is None:
            parameters = None if given is None else self._given_parameters(given, weight.device)
            if given is None or given.codes is None:
                codes, scale, zero_point = quantize_groups(
                    weight, self.bits, self.group_size, self.asymmetric, self.zero_point, parameters
                )
            else:
                assert parameters is not None
                codes, (scale, zero_point) = self._given_codes(given.codes, weight.device), parameters
            self.weight_scale, self.weight_zero_point = scale, zero_point
            self._hold(codes)
        else:
            self.share_weight(shared_with)
        self.compute_dtype = weight.dtype
        self.bias = bias.detach().float().clone() if isinstance(bias, Tensor) else None
        return self.train(module.training)

    def _given_parameters(self, given: "Given", device: torch.device) -> tuple[Tensor, Tensor | None]:
        """float32 scales, and int8 or float32 zero points, one for each group, checked."""
        scale, zero_point = given.scale, given.zero_point
        if scale is None:
            self._refuse("weight_scale together with weight_zero_point and codes", "none")
        shape = self.weight_scale.shape
        if self.asymmetric and zero_point is None:
            self._refuse("weight_zero_point together with weight_scale in an asymmetric layer", "none")
        tensors = {"weight_scale": scale.detach(), **({} if zero_point is None else {"weight_zero_point": zero_point.detach()})}
        for name, tensor in tensors.items():
            if tensor.shape != shape and not (shape[1] == 1 and tensor.shape == shape[:1]):
                self._refuse(f"{name} of shape {tuple(shape)}, one for each group of a row", tuple(tensor.shape))
            tensors[name] = tensor.reshape(shape).to(device, copy=True)
        tensors["weight_scale"] = tensors["weight_scale"].float()
        if zero_point is not None:
            zeros = tensors["weight_zero_point"]
            if not zeros.is_floating_point() and not zeros.is_meta and not ((zeros >= -128) & (zeros <= 127)).all():
                self._refuse("integer weight_zero_point in [-128, 127]", f"{zeros.min().item()} to {zeros.max().item()}")
            tensors["weight_zero_point"] = zeros.float() if zeros.is_floating_point() else zeros.to(torch.int8)
        self._check(tensors)
        return tensors["weight_scale"], tensors.get("weight_zero_point")

    def _given_codes(self, codes: Tensor, device: torch.device) -> Tensor:
        """The codes as the layer holds them, checked."""
        if codes.dtype != torch.int8 or codes.shape != self._weight_shape:
            self._refuse(f"codes torch.int8 of shape {tuple(self._weight_shape)}", f"{codes.dtype} {tuple(codes.shape)}")
        low, high = code_range(self.bits, True)
        if not codes.is_meta and codes.numel() and not ((codes >= low) & (codes <= high)).all():
            self._refuse(f"codes in [{low}, {high}]", f"{codes.min().item()} to {codes.max().item()}")
        return codes.detach().to(device).contiguous()

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

    @property
    def zero_point(self) -> str:
        """ "float" if the zero points are values of the weight, else "int"."""
        held = self._buffers["weight_zero_point"]
        return "float" if held is not None and held.is_floating_point() else "int"

    def dtypes(self) -> dict[str, torch.dtype]:
        of = {
            "qweight": torch.int8 if self.bits == 8 else torch.uint8,
            "weight_scale": torch.float32,
            "weight_zero_point": torch.float32 if self.zero_point == "float" else torch.int8,
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
        if zero_point is not None and zero_point.is_floating_point() and not zero_point.is_meta and not zero_point.isfinite().all():
            self._refuse("finite weight_zero_point", "NaN or Inf")
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
        flags = [arguments[key] for key in cls.settings if key not in ("bits", "group_size", "zero_point")]
        right = all(type(size) is int for size in sizes) and all(type(flag) is bool for flag in flags)
        right = right and arguments["zero_point"] in (ZERO_POINTS if arguments["asymmetric"] else ("int",))
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
            self._buffers[name] = torch.empty_like(self.weight_scale, dtype=stored.dtype)
        return super()._make_room(name, stored)

    def _describe(self) -> str:
        """The part of ``extra_repr`` that is the same for every layer."""
        zero = "asymmetric" if self.asymmetric else "symmetric"
        zero += " with floating zero points" if self.zero_point == "float" else ""
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
    settings = (*WeightOnlyLayer.settings, "dynamic", "asymmetric_input", "backward")
    newer: ClassVar[dict[str, Any]] = {**WeightOnlyLayer.newer, "backward": False}
    optional = (*WeightOnlyLayer.optional, "input_multiplier")
    _repeats = repeater("weight_only_linear")

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
        zero_point: str = "int",
        backward: bool = False,
    ) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.backward = backward
        self.dynamic = dynamic
        self.asymmetric_input = asymmetric_input
        if asymmetric_input and not dynamic:
            raise ValueError(
                "quant_ops.WeightOnlyLinear: expected asymmetric_input=True only with dynamic=True, got it alone. Floating inputs "
                "are not quantized."
            )
        self._options = {name: True for name, wanted in (("dynamic", dynamic), ("asymmetric", asymmetric_input)) if wanted}
        super().__init__((out_features, in_features), bias, device, bits, group_size, asymmetric, zero_point)

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
        zero_point: str = "int",
        shared_with: WeightOnlyLayer | None = None,
        input_multiplier: Tensor | None = None,
        weight_scale: Tensor | None = None,
        weight_zero_point: Tensor | None = None,
        codes: Tensor | None = None,
        backward: bool = False,
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
            zero_point: "int": zero points are codes and ``w = (q - z) * s``; "float": they are values and ``w = q * s + z``, as
                torchao's int4_weight_only has them.
            shared_with: a layer that was made from the same float weight with the same bits and group_size: its packed weight,
                scales and zero points become those of this one too.
            input_multiplier: ``(in_features,)``: the input is multiplied by it, in float32 (AWQ, SmoothQuant). The weight is taken
                as it is: whoever wants the same function has divided its columns by the multiplier. That of a ScaledLinear is taken
                over.
            weight_scale, weight_zero_point: ``(out_features, groups)``, to round with in place of those that the weight would get.
                Zero points make the layer asymmetric; floating ones are those of ``zero_point="float"``.
            codes: int8 ``(out_features, in_features)``, in [-8, 7] for 4 bits, with ``weight_scale``: the weight is not rounded.
            backward: gradients of the output become gradients of the input, by the dequantized weight and, with ``dynamic``,
                straight through the rounding of the input. Weight, scales and bias stay constants. See
                :func:`weight_only_linear_backward`.

        Raises:
            TypeError: module is of another class, or the multiplier no floating tensor.
            ValueError: NaN or Inf in the weights or the multiplier, settings that exclude each other, ``shared_with`` has another
                kind of weight, or given parameters or codes of another shape or outside their range.
        """
        given = Given.of(weight_scale, weight_zero_point, codes, shared_with)
        if weight_zero_point is not None:
            asymmetric, zero_point = True, "float" if weight_zero_point.is_floating_point() else "int"
        settings = {"asymmetric": asymmetric, "dynamic": dynamic, "asymmetric_input": asymmetric_input, "zero_point": zero_point}
        layer, module = cls._like(module, bits=bits, group_size=group_size, backward=backward, **settings)
        layer._take(module, shared_with, given)._take_multiplier(module, input_multiplier)
        return layer

    def _check(self, tensors: Mapping[str, Tensor | None]) -> None:
        super()._check(tensors)
        if self.dynamic:
            size = self.in_features if self.group_size == -1 else min(self.group_size, self.in_features)
            limit = most_products(self.bits, tensors.get("weight_zero_point") is not None, self.asymmetric_input)
            if size > limit:
                self._refuse(f"groups of at most {limit} weights, so that an int32 sum is exact", f"{size}. Choose a group_size")

    def _is_one_call(self) -> bool:
        return self._buffers["qweight"] is None and super()._is_one_call()  # else functional_call lends it

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        b = self._buffers
        scale, zero_point, bias = b["weight_scale"], b["weight_zero_point"], b["bias"]
        options: dict[str, Any] = self._options
        multiplier = b["input_multiplier"]
        if multiplier is not None:
            options = {**options, "x_multiplier": multiplier}
        if through:
            lent = b["qweight"] is not None
            codes, packed = (self.qweight, None) if lent else (self._placeholder, b["packed_weight"])
            arguments = (x, codes, scale, zero_point, bias, self.bits, self.group_size)
            return differentiable("weight_only_linear", *arguments, packed_weight=packed, **options)
        if b["qweight"] is not None:  # which functional_call lends
            return _linear(x, self.qweight, scale, zero_point, bias, self.bits, self.group_size, **options)
        packed = b["packed_weight"]
        return _linear(x, self._placeholder, scale, zero_point, bias, self.bits, self.group_size, packed_weight=packed, **options)

    def extra_repr(self) -> str:
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        zero = "asymmetric" if self.asymmetric_input else "symmetric"
        x = f"int8 {zero} dynamic per row" if self.dynamic else "float"
        x += " of multiplied columns" if self.input_multiplier is not None else ""
        backward = ", backward=True" if self.backward else ""
        return f"{shape}, {self._describe()}, input={x}{backward}, kernel={self._kernel()}"

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
        zero_point: str = "int",
    ) -> None:
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device="meta").padding_idx
        super().__init__((num_embeddings, embedding_dim), False, device, bits, group_size, asymmetric, zero_point)

    @classmethod
    def from_float(
        cls,
        module: nn.Module,
        *,
        bits: int = 8,
        group_size: int | None = -1,
        asymmetric: bool = False,
        zero_point: str = "int",
        shared_with: WeightOnlyLayer | None = None,
    ) -> "WeightOnlyEmbedding":
        """The weight-only layer of an nn.Embedding, which is left as it is.

        Args:
            bits, group_size, asymmetric, zero_point, shared_with: as in :meth:`WeightOnlyLinear.from_float`; -1: one scale per row.

        Raises:
            TypeError: module is of another class.
            ValueError: NaN or Inf in the weights, a ``max_norm``, or ``shared_with`` has another kind of weight.
        """
        layer, module = cls._like(module, bits=bits, group_size=group_size, asymmetric=asymmetric, zero_point=zero_point)
        if module.max_norm is not None:
            raise ValueError(
                f"quant_ops.WeightOnlyEmbedding.from_float: expected max_norm=None, got {module.max_norm}, which changes the "
                "weight in every call. Scale the rows once and set it to None."
            )
        return layer._take(module, shared_with)

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        b = self._buffers
        lent = b["qweight"] is not None  # by functional_call
        codes, packed = (self.qweight, None) if lent else (self._placeholder, b["packed_weight"])
        scale, zero_point = b["weight_scale"], b["weight_zero_point"]
        assert scale is not None
        return _looked_up(x, codes, scale, zero_point, self.bits, self.group_size, packed, self.compute_dtype)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, {self._describe()}"
