"""How a layer is cut: which dimension of each of its buffers, what has to divide, and the layer that a process keeps.

    column-wise   the rows N of the weight, with their scales and biases; of a grouped convolution whole groups; of an embedding the
                  columns
    row-wise      the columns K of the weight; every process keeps the bias, which is added once; of an embedding the rows

Packed weights are opaque, so that codes are cut and every process packs its own. Groups of a weight-only layer and the two codes of
a byte lie along K and are never split. Read next: layers.py, what the parts compute; styles.py.
"""

import dataclasses
from typing import Any, NoReturn

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard, distribute_tensor

from ..nn import Int8Layer, QuantizedLayer, WeightOnlyEmbedding, WeightOnlyLayer
from ..nn.conv import _QuantConv


@dataclasses.dataclass(frozen=True)
class Cut:
    """Of one layer: the sizes of a part, and along which dimension each buffer is cut; buffers that are not named are whole."""

    way: str  # "colwise" or "rowwise"
    sizes: dict[str, int]  # arguments of the constructor that differ from the whole layer's
    dims: dict[str, int]

    def placement(self, buffer: str) -> Placement:
        return Shard(self.dims[buffer]) if buffer in self.dims else Replicate()


def cut_of(layer: QuantizedLayer, way: str, parts: int, who: str) -> Cut:
    """How the layer is cut; ``who`` begins the sentences.

    Raises:
        ValueError: the parts would not be equal, or split a group of weights or the two codes of a byte.
    """
    if isinstance(layer, WeightOnlyEmbedding):
        return _cut_embedding(layer, way, parts, who)
    if isinstance(layer, _QuantConv):
        return _cut_convolution(layer, way, parts, who)
    linear: Any = layer
    if way == "colwise":
        sizes = _sizes(who, parts, "a row-wise plan", out_features=linear.out_features)
        return Cut(way, sizes, dict.fromkeys(("qweight", "weight_scale", "weight_zero_point", "bias"), 0))
    sizes = _sizes(who, parts, "a column-wise plan", in_features=linear.in_features)
    dims = {"qweight": 1, "input_multiplier": 0}
    if isinstance(layer, WeightOnlyLayer):
        dims |= _cut_groups(layer, sizes["in_features"], who)
    return Cut(way, sizes, dims)


def _cut_embedding(layer: WeightOnlyEmbedding, way: str, parts: int, who: str) -> Cut:
    if way == "rowwise":
        sizes = _sizes(who, parts, "a column-wise plan", num_embeddings=layer.num_embeddings)
        return Cut(way, sizes, dict.fromkeys(("qweight", "weight_scale", "weight_zero_point"), 0))
    sizes = _sizes(who, parts, "a row-wise plan", embedding_dim=layer.embedding_dim)
    return Cut(way, sizes, {"qweight": 1, **_cut_groups(layer, sizes["embedding_dim"], who)})


def _cut_convolution(layer: _QuantConv, way: str, parts: int, who: str) -> Cut:
    if way == "rowwise":
        if layer.groups > 1:
            _refuse(who, "a row-wise convolution without groups", f"{layer.groups}. Use ColwiseParallel, which cuts between groups")
        return Cut(way, _sizes(who, parts, "a column-wise plan", in_channels=layer.in_channels), {"qweight": 1})
    dims = dict.fromkeys(("qweight", "weight_scale", "bias"), 0)
    if layer.groups == 1:
        return Cut(way, _sizes(who, parts, "a row-wise plan", out_channels=layer.out_channels), dims)
    sizes = _sizes(who, parts, "no style, which leaves the layer whole", groups=layer.groups)
    return Cut(way, {**sizes, **{name: getattr(layer, name) // parts for name in ("in_channels", "out_channels")}}, dims)


def _sizes(who: str, parts: int, other: str, **whole: int) -> dict[str, int]:
    for name, size in whole.items():
        if size % parts or size == 0:
            _refuse(who, f"{name} to be a multiple of the {parts} processes of the mesh", f"{size}. Use {other} for this layer")
    return {name: size // parts for name, size in whole.items()}


def _cut_groups(layer: WeightOnlyLayer, k: int, who: str) -> dict[str, int]:
    """Of a weight cut along K into parts of k columns: along which dimension its scales and zero points are cut."""
    several = layer.weight_scale.shape[1] > 1
    if several and k % layer.group_size:
        _refuse(
            who,
            f"parts of the weight to be multiples of group_size {layer.group_size}, so that no group is split",
            f"{k} columns a process. Quantize with a group_size that divides {k}, or cut the layer's other dimension",
        )
    if layer.bits == 4 and k % 2:
        _refuse(
            who,
            "parts of an int4 weight to have an even number of columns, two in a byte",
            f"{k} columns a process. Cut the layer's other dimension",
        )
    return {"weight_scale": 1, "weight_zero_point": 1} if several else {}


def _refuse(who: str, relation: str, got: str) -> NoReturn:
    raise ValueError(f"{who}: expected {relation}, got {got}.")


# ---- the part that a process keeps -------------------------------------------------------------------------------------


def part_of(layer: QuantizedLayer, cut: Cut, mesh: DeviceMesh, source: int | None, shared: dict[Any, Any]) -> Any:
    """A layer of the same class with this process's part of the buffers, on the mesh's device; the layer stays as it is.

    Args:
        source: the process of the mesh whose values all get, or None: every process takes its part of its own.
        shared: parts of weights that several layers share, which share them again.
    """
    arguments = {name: getattr(layer, name) for name in layer.geometry} | cut.sizes
    if "padding_idx" in arguments:
        arguments["padding_idx"] = None  # of the whole table; it is only kept
    part: Any = layer.empty(arguments, False, **{name: getattr(layer, name) for name in layer.settings})
    for name in ("compute_dtype", "channels_last", "training", "config"):
        setattr(part, name, getattr(layer, name))

    def mine(name: str, tensor: Tensor) -> Tensor:
        made: Any = distribute_tensor(tensor.contiguous(), mesh, [cut.placement(name)], src_data_rank=source)
        local: Tensor = made.to_local()
        return local.clone() if source is None or local.data_ptr() == tensor.data_ptr() else local

    weight = ("qweight", "packed_weight", "weight_scale", "weight_zero_point")
    for name, buffer in layer._buffers.items():
        if name not in weight:
            part._buffers[name] = None if buffer is None else mine(name, buffer)
    key = (id(layer._buffers["packed_weight"]), cut.dims["qweight"]) if isinstance(layer, WeightOnlyLayer) else None
    if key in shared:
        part.share_weight(shared[key])
        return part
    for name in ("weight_scale", "weight_zero_point"):
        if (buffer := layer._buffers.get(name)) is not None:
            part._buffers[name] = mine(name, buffer)
    if isinstance(layer, Int8Layer):
        part.weight_bits = layer.weight_bits
    part._hold(mine("qweight", layer.qweight))
    if key is not None:
        shared[key] = part
    return part


# attributes of a layer that describe its own size
SIZED = ("_weight_shape", "_placeholder", "_stand_in", "_conv_options", "_buffers")
