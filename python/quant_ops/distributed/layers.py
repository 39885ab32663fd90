"""Layers of which every process holds a part, in place of the whole ones: what each computes, and their state_dict.

A part is a layer of its own with fewer rows or columns, so that a column-wise one is the whole layer's kernels on less weight, with
the same bits. Row-wise int8 parts agree on the range of each row of x and add their exact int32 sums (sums.py): the same bits as
well. Row-wise weight-only parts add float32 results, each with its own rounding. In a state_dict buffers are DTensors of the whole
layer's shapes, which torch.distributed.checkpoint saves and cuts anew. Read first: cut.py; next: styles.py.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.fx import Proxy

from ..nn import QuantConv1d, QuantConv2d, QuantizedLayer, QuantLinear, WeightOnlyEmbedding, WeightOnlyLinear
from ..nn.conv import _conv2d, _QuantConv
from ..nn.linear import _linear
from ..nn.weight import as_image_kernel
from ..nn.weight_only import _linear as _weight_only_linear
from ..nn.weight_only import _looked_up
from .cut import SIZED, Cut
from .sums import finished, shared_qparams

_EPILOGUE = ("out_scale", "out_zero_point", "relu", "activation")


@dataclasses.dataclass(frozen=True, eq=False)
class Sharding:
    """How a layer is spread over a mesh, and how its input arrives and its output leaves; ``layer.sharding``."""

    mesh: DeviceMesh
    cut: Cut
    input_layout: Placement
    output_layout: Placement
    use_local_output: bool
    whole: dict[str, Any]  # geometry of the whole layer

    @property
    def parts(self) -> int:
        return self.mesh.size()

    @property
    def part(self) -> int:
        """Which one this process has."""
        return self.mesh.get_local_rank()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sharding":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise TypeError(
            "quant_ops.distributed: expected no pickle of a sharded layer, which belongs to the processes of its mesh. Save "
            "its state_dict, with torch.distributed.checkpoint."
        )

    # ---- what goes in and out ------------------------------------------------------------------------------------------

    def entering(self, x: Tensor, wanted: Placement) -> Tensor:
        """This process's part of x, which lies as ``input_layout`` says, or as it says itself."""
        if wanted == self.input_layout and not isinstance(x, DTensor):
            return x
        wanted = _at(wanted, x.dim())
        if not isinstance(x, DTensor):
            layout = _at(self.input_layout, x.dim())
            if layout == wanted:
                return x
            x = DTensor.from_local(x, self.mesh, [layout], run_check=False)
        if x.placements != (wanted,):
            x = x.redistribute(placements=[wanted])
        return x.to_local()

    def leaving(self, y: Tensor, made: Placement) -> Tensor:
        """The output, which lies as ``made`` says, as ``output_layout`` wants it."""
        if made == self.output_layout and self.use_local_output:
            return y
        made, wanted = _at(made, y.dim()), _at(self.output_layout, y.dim())
        if made == wanted and self.use_local_output:
            return y
        result = DTensor.from_local(y, self.mesh, [made], run_check=False)
        if made != wanted:
            result = result.redistribute(placements=[wanted])
        return result.to_local() if self.use_local_output else result

    def added(self, sums: Tensor) -> Tensor:
        """The processes' partial results, added; this process's part of them where the output is sharded."""
        wanted = _at(self.output_layout, sums.dim())
        if not isinstance(wanted, Replicate):
            return DTensor.from_local(sums, self.mesh, [Partial()], run_check=False).redistribute(placements=[wanted]).to_local()
        # an all-reduce wants memory in the order of its shape: of channels_last sums a view
        last = sums.dim() == 4 and not sums.is_contiguous()
        dense = sums.permute(0, 2, 3, 1) if last else sums
        if not dense.is_contiguous():
            return self.added(sums.contiguous())
        dist.all_reduce(dense, group=self.mesh.get_group())
        return sums

    def mine(self, operand: Tensor, shape: torch.Size) -> Tensor:
        """The part of an operand, which broadcasts to the sums of this shape, that belongs to this process's part of them."""
        wanted = _at(self.output_layout, len(shape))
        if not isinstance(wanted, Shard):
            return operand
        at = wanted.dim - len(shape)
        if operand.dim() < -at or operand.shape[at] == 1:
            return operand
        chunks = operand.chunk(self.parts, at)
        return chunks[self.part] if self.part < len(chunks) else operand.narrow(at, 0, 0)

    def wrapped(self, y: Tensor, shape: torch.Size) -> Tensor:
        """The added results of this shape, of which this process has the part y, as a plain tensor or a DTensor."""
        if self.use_local_output:
            return y
        stride = torch.empty(shape, device="meta").stride()
        layout = _at(self.output_layout, y.dim())
        return DTensor.from_local(y, self.mesh, [layout], run_check=False, shape=shape, stride=stride)


def _at(placement: Placement, ndim: int) -> Placement:
    """With the dimension counted from the front."""
    if isinstance(placement, Shard) and placement.dim < 0:
        return Shard(placement.dim + ndim)
    return placement


class _Refused(torch.autograd.Function):
    """A row-wise result: a gradient that is asked for gets an error in place of a silent zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> NoReturn:
        raise RuntimeError(
            "quant_ops.distributed: expected no gradient to be asked for, got a backward pass through a row-wise part of a "
            "quantized layer, which is for inference. Call it under torch.no_grad()."
        )


class ShardedLayer(QuantizedLayer):
    """Mixed into the class of a quantized layer whose parts are spread over a mesh. ``sharding`` says how.

    ``in_features`` and other sizes, ``weight``, ``qweight`` and the buffers are those of this process's part.
    """

    sharding: Sharding
    _channel = -1  # dimension of the channels, in inputs and outputs
    _takes_indices = False

    def forward(self, x: Tensor) -> Tensor:
        """As the whole layer's, with input and output laid out as the plan says."""
        if isinstance(x, Proxy):
            return super()._forward_unusual(x)
        sharding = self.sharding
        if sharding.cut.way == "colwise":
            return sharding.leaving(self._colwise(x), Shard(self._channel))
        with torch.no_grad():
            y = self._rowwise(sharding.entering(x, Shard(self._channel)))
        if torch.is_grad_enabled() and x.requires_grad and y.is_floating_point():
            y = _Refused.apply(x, y)  # type: ignore[no-untyped-call]
        return y

    def _colwise(self, x: Tensor) -> Tensor:
        return super().forward(self.sharding.entering(x, Replicate()))

    def _rowwise(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def _finished(self, sums: Tensor, row_scale: Tensor, dtype: torch.dtype, epilogue: dict[str, Any]) -> Tensor:
        """The output of a row-wise int8 part: its sums and the others', scaled."""
        sharding, shape, bias = self.sharding, sums.shape, self._buffers["bias"]
        columns = (-1, *[1] * (-self._channel - 1))
        scale = sharding.mine(self.weight_scale.view(columns), shape)
        if bias is not None:
            bias = sharding.mine(bias.view(columns), shape)
        y = finished(sharding.added(sums), sharding.mine(row_scale, shape), scale, bias, dtype, **epilogue)
        return sharding.wrapped(y, shape)

    def dequantize(self) -> NoReturn:
        """Refused: a float layer of one part would take no part in the exchange with the others."""
        raise RuntimeError(
            f"quant_ops.{type(self).__name__}: expected a whole layer to dequantize, got one of {self.sharding.parts} parts. "
            "Dequantize before the model is sharded."
        )

    def extra_repr(self) -> str:
        sharding = self.sharding
        return f"{super().extra_repr()}, {sharding.cut.way} part {sharding.part} of {sharding.parts}"

    # ---- the state_dict ------------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        mesh = self.sharding.mesh
        for name in self.dtypes():
            if (local := destination.get(prefix + name)) is not None:
                destination[prefix + name] = DTensor.from_local(local, mesh, [self.sharding.cut.placement(name)], run_check=False)

    def _local_state(self, state_dict: Mapping[str, Any], prefix: str) -> dict[str, Any]:
        """This process's part of what a state_dict has for the layer, whether of DTensors, of whole tensors or of parts."""
        found = {}
        for name in (*self.dtypes(), "weight"):
            given = state_dict.get(prefix + name)
            if not isinstance(given, Tensor):
                continue
            buffer = "qweight" if name == "weight" and given.dtype == torch.int8 else name
            placement = self.sharding.cut.placement(buffer)
            if isinstance(given, DTensor):
                if given.placements != (placement,):
                    given = given.redistribute(placements=[placement])
                given = given.to_local()
            elif isinstance(placement, Shard) and given.dim() > placement.dim:
                size = self._size_of(buffer, placement.dim)
                if given.shape[placement.dim] == size * self.sharding.parts:
                    given = given.chunk(self.sharding.parts, placement.dim)[self.sharding.part]
            found[prefix + name] = given
        return found

    def _size_of(self, buffer: str, dim: int) -> int:
        """Of a buffer in the state_dict of this process's part, whether the layer has the buffer or not."""
        if buffer in ("qweight", "weight"):
            return self.saved_shape()[dim] if buffer == "qweight" else self._weight_shape[dim]
        if buffer in ("bias", "input_multiplier"):
            return self._weight_shape[0 if buffer == "bias" else 1]
        return self.weight_scale.shape[dim]

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """As of the whole layer."""
        return super().refusal({**state_dict, **self._local_state(state_dict, prefix)}, prefix)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        state_dict.update(self._local_state(state_dict, prefix))
        super()._load_from_state_dict(state_dict, prefix, *args)


class ShardedQuantLinear(ShardedLayer, QuantLinear):
    """A part of a :class:`QuantLinear`."""

    def _rowwise(self, x: Tensor) -> Tensor:
        b, sharding, options = self._buffers, self.sharding, self._options()
        epilogue = {name: options.pop(name) for name in _EPILOGUE if name in options}
        multiplier, asymmetric = b["input_multiplier"], options.pop("asymmetric", False)
        dtype = x.dtype if x.is_floating_point() else torch.float32
        if "x_scale" not in options:
            x = x if multiplier is None else x.float() * multiplier
            group = sharding.mesh.get_group()
            options["x_scale"], options["x_zero_point"] = shared_qparams(x, (-1,), asymmetric, group)
        elif multiplier is not None:
            options["x_multiplier"] = multiplier
        weight = self._placeholder if b["qweight"] is None else b["qweight"]
        sums = _linear(x, weight, self.weight_scale, None, **options, out_dtype=torch.int32)
        return self._finished(sums, options["x_scale"], dtype, epilogue)


class _ShardedConv(ShardedLayer, _QuantConv):
    """A part of a convolution: of its output channels and groups, or of its input channels."""

    def _colwise(self, x: Tensor) -> Tensor:
        sharding = self.sharding
        if sharding.whole["groups"] == 1:
            return super()._colwise(x)
        if self.input_scale is not None:
            return super(ShardedLayer, self).forward(sharding.entering(x, Shard(self._channel)))
        # channels of a sample share a scale, which this process may have to ask the others for
        whole = not isinstance(x, DTensor) and isinstance(sharding.input_layout, Replicate)
        part = sharding.entering(x, Shard(self._channel))
        scale, zero_point = self._sample_qparams(x if whole else part, None if whole else sharding.mesh.get_group())
        options = {name: value for name, value in self._options().items() if name != "asymmetric"}
        return self._convolved(part, self._buffers["bias"], {**options, "x_scale": scale, "x_zero_point": zero_point})

    def _rowwise(self, x: Tensor) -> Tensor:
        sharding, options = self.sharding, self._options()
        epilogue = {name: options.pop(name) for name in _EPILOGUE if name in options}
        options.pop("asymmetric", None)
        dtype = x.dtype if x.is_floating_point() else torch.float32
        if "x_scale" not in options:
            options["x_scale"], options["x_zero_point"] = self._sample_qparams(x, sharding.mesh.get_group())
        sums = self._convolved(x, None, {**options, "out_dtype": torch.int32})
        row = options["x_scale"]
        row = row.reshape((-1, *[1] * (sums.dim() - 1)) if row.numel() > 1 else ())
        return self._finished(sums, row, dtype, epilogue)

    def _sample_qparams(self, x: Tensor, group: Any) -> tuple[Tensor, Tensor | None]:
        """Of each sample, for the operator's image: (N, 1, 1, 1), or (1, 1, 1) of a single one."""
        scale, zero_point = shared_qparams(x.detach(), tuple(range(self._channel, 0)), self.asymmetric, group)
        shape = (*x.shape[: self._channel], 1, 1, 1)
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)

    def _convolved(self, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
        """The layer's operator with other options than its own."""
        raise NotImplementedError


class ShardedQuantConv2d(_ShardedConv, QuantConv2d):
    """A part of a :class:`QuantConv2d`."""

    _channel = -3

    def _convolved(self, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
        b = self._buffers
        options = self._conv_options | options
        if self.channels_last and x.dim() == 4:
            options["channels_last"] = True
        if self._pad_input is not None:
            x = torch.nn.functional.pad(x, self._pad_input, self.padding_mode)
        weight = self._placeholder if b["qweight"] is None else b["qweight"]
        made: Tensor = _conv2d(x, weight, b["weight_scale"], bias, **options)
        return made


class ShardedQuantConv1d(_ShardedConv, QuantConv1d):
    """A part of a :class:`QuantConv1d`."""

    _channel = -2

    def _convolved(self, x: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
        b = self._buffers
        if x.dim() not in (2, 3):
            raise ValueError(f"quant_ops.QuantConv1d: expected x.shape (N, C, L) or (C, L), got {tuple(x.shape)}")
        x = x.unsqueeze(-2)
        if self._pad_input is not None:
            x = torch.nn.functional.pad(x, self._pad_input, self.padding_mode)
        weight = self._placeholder if b["qweight"] is None else as_image_kernel(b["qweight"])
        made: Tensor = _conv2d(x, weight, b["weight_scale"], bias, **self._conv_options | options).squeeze(-2)
        return made


class ShardedWeightOnlyLinear(ShardedLayer, WeightOnlyLinear):
    """A part of a :class:`WeightOnlyLinear`."""

    def _rowwise(self, x: Tensor) -> Tensor:
        b, sharding = self._buffers, self.sharding
        options: dict[str, Any] = {**self._options, "out_dtype": torch.float32}
        if b["input_multiplier"] is not None:
            options["x_multiplier"] = b["input_multiplier"]
        lent = b["qweight"] is not None  # by functional_call
        weight, packed = (self.qweight, None) if lent else (self._placeholder, b["packed_weight"])
        arguments = (self.weight_scale, b["weight_zero_point"], None, self.bits, self.group_size)
        sums = _weight_only_linear(x, weight, *arguments, packed_weight=packed, **options)
        shape, bias, y = sums.shape, b["bias"], sharding.added(sums)
        return sharding.wrapped((y if bias is None else y + sharding.mine(bias, shape)).to(x.dtype), shape)


class ShardedWeightOnlyEmbedding(ShardedLayer, WeightOnlyEmbedding):
    """A part of a :class:`WeightOnlyEmbedding`: columns of all rows, or rows of which the others are zeros here."""

    _takes_indices = True

    def forward(self, x: Tensor) -> Tensor:
        """As the whole layer's."""
        if isinstance(x, Proxy) or self.sharding.cut.way == "colwise":
            return super().forward(x)
        with torch.no_grad():
            return self._rowwise(self.sharding.entering(x, Replicate()))

    def _rowwise(self, x: Tensor) -> Tensor:
        b, sharding, count = self._buffers, self.sharding, self.num_embeddings
        first, whole = count * sharding.part, sharding.whole["num_embeddings"]
        here = (x >= first) & (x < first + count)
        elsewhere = (x >= 0) & (x < whole)
        # an index of no process stays as it is, for the operator to refuse
        index = torch.where(here, x - first, torch.where(elsewhere, 0, x))
        lent = b["qweight"] is not None
        weight, packed = (self.qweight, None) if lent else (self._placeholder, b["packed_weight"])
        arguments = (self.weight_scale, b["weight_zero_point"], self.bits, self.group_size, packed, self.compute_dtype)
        rows = _looked_up(index, weight, *arguments).masked_fill_(~here.unsqueeze(-1), 0)
        return sharding.wrapped(sharding.added(rows), rows.shape)


SHARDED: dict[type[QuantizedLayer], type[ShardedLayer]] = {
    QuantLinear: ShardedQuantLinear,
    QuantConv1d: ShardedQuantConv1d,
    QuantConv2d: ShardedQuantConv2d,
    WeightOnlyLinear: ShardedWeightOnlyLinear,
    WeightOnlyEmbedding: ShardedWeightOnlyEmbedding,
}


def replace(layer: QuantizedLayer, part: Any, sharding: Sharding) -> None:
    """Makes the layer, in place, the part of it that was made."""
    for name in (*layer.geometry, *SIZED):
        if name != "padding_idx" and name in part.__dict__:
            layer.__dict__[name] = part.__dict__[name]
    layer.__dict__["sharding"] = sharding
    layer.__class__ = SHARDED[type(layer)]
