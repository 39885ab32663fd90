"""The parallel styles, and plans of them. Read first: layers.py."""

import warnings
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Placement, Replicate, Shard
from torch.distributed.tensor import parallel as torch_parallel
from torch.distributed.tensor.parallel import ParallelStyle

from ..nn import QuantizedLayer
from .cut import cut_of, part_of
from .layers import SHARDED, ShardedLayer, Sharding, replace

_Commit = Callable[[], None]


class _QuantizedStyle(torch_parallel.ParallelStyle):
    """What the two styles share: how a quantized layer is taken. torch's style of the same name comes after it in their bases."""

    src_data_rank: int | None
    use_local_output: bool
    _way: str
    _given: tuple[Placement | None, Placement | None]

    def __init__(
        self, *, input_layouts: Placement | None = None, output_layouts: Placement | None = None, use_local_output: bool = True
    ) -> None:
        super().__init__(  # type: ignore[call-arg]
            input_layouts=input_layouts, output_layouts=output_layouts, use_local_output=use_local_output
        )
        self._given = input_layouts, output_layouts

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if isinstance(module, QuantizedLayer):
            return self._apply_quantized(module, device_mesh)
        _refuse_other(self, module)
        return super()._apply(module, device_mesh)  # type: ignore[safe-super]

    def _prepare(self, layer: QuantizedLayer, mesh: DeviceMesh, name: str, shared: dict[Any, Any]) -> _Commit:
        """Makes this process's part of a layer, and returns what puts it in the layer's place."""
        cut = self._checked(layer, mesh, name)
        kind, (entering, leaving) = SHARDED[type(layer)], self._given
        channel = Shard(kind._channel)
        if self._way == "colwise":
            layouts = entering or Replicate(), leaving or channel
        else:
            layouts = entering or (Replicate() if kind._takes_indices else channel), leaving or Replicate()
        whole = {key: getattr(layer, key) for key in layer.geometry}
        sharding = Sharding(mesh, cut, *layouts, self.use_local_output, whole)
        part = part_of(layer, cut, mesh, self.src_data_rank, shared)
        return lambda: replace(layer, part, sharding)

    def _checked(self, layer: QuantizedLayer, mesh: DeviceMesh, name: str) -> Any:
        who = f"quant_ops.{type(self).__name__}"
        of = f" of layer {name!r}" if name else f" of a {type(layer).__name__}"
        if isinstance(layer, ShardedLayer):
            raise ValueError(f"{who}: expected a whole layer, got one{of} that is sharded already.")
        if type(layer) not in SHARDED:
            known = ", ".join(kind.__name__ for kind in SHARDED)
            raise TypeError(f"{who}: expected one of {known}, got a {type(layer).__name__}.")
        if mesh.ndim != 1:
            raise ValueError(f"{who}: expected a mesh of one dimension, got {mesh.ndim}. Take one of it, such as mesh['tp'].")
        if getattr(layer, "backward", False):
            raise ValueError(
                f"{who}: expected a layer for inference, got backward=True{of}, whose gradients would lack the other parts'. "
                "Quantize with backward=False."
            )
        for layout in self._given:
            if layout is not None and not isinstance(layout, Replicate | Shard):
                raise ValueError(f"{who}: expected layouts Replicate() or Shard(dim), got {layout}.")
        return cut_of(layer, self._way, mesh.size(), f"{who}{of}")

    def _apply_quantized(self, module: nn.Module, mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, QuantizedLayer)
        self._prepare(module, mesh, "", {})()
        return module


def _refuse_other(style: Any, module: nn.Module) -> None:
    if not isinstance(module, nn.Linear | nn.Embedding):
        raise TypeError(
            f"quant_ops.{type(style).__name__}: expected an nn.Linear, an nn.Embedding or a quantized layer, got a "
            f"{type(module).__name__}. Name the layers inside of it in the plan."
        )


class ColwiseParallel(_QuantizedStyle, torch_parallel.ColwiseParallel):
    """torch's ColwiseParallel, which takes quantized layers too: every process computes some of the output channels.

    Results have the bits of the whole layer, but for floating products of weight-only layers (``dynamic=False``) on a GPU, whose
    order may depend on the number of columns. Of a grouped convolution a process takes whole groups and their input channels; of an
    embedding some columns.

    Args:
        input_layouts: how the input lies; Replicate() by default. DTensors say it themselves.
        output_layouts: how the output is wanted: by default sharded by channels, the last dimension or that of a convolution.
        use_local_output: whether the output is a plain tensor, this process's part, or a DTensor.

    Raises:
        TypeError: (when applied) the module is no nn.Linear, nn.Embedding or quantized layer.
        ValueError: channels, groups, or groups of a weight do not divide among the processes; the layer is sharded already, or
            trains (``backward=True``); the mesh has several dimensions.
    """

    _way = "colwise"


class RowwiseParallel(_QuantizedStyle, torch_parallel.RowwiseParallel):
    """torch's RowwiseParallel, which takes quantized layers too: every process multiplies some of the input channels.

    int8 layers have the bits of the whole layer: the processes agree on each row's range first, of dynamic layers (an all-reduce of
    two floats a row), and add exact int32 sums; scales and bias follow. Weight-only layers add float32 results; with ``dynamic``
    each part of a row has its own scale, no larger than the whole row's. Embeddings are cut by rows and exact.

    Args:
        input_layouts: how the input lies; by default sharded by channels, as a ColwiseParallel layer leaves it.
        output_layouts: how the output is wanted; Replicate() by default, Shard(dim) for parts of it.
        use_local_output: whether the output is a plain tensor or a DTensor.

    Raises:
        TypeError, ValueError: as :class:`ColwiseParallel`; also a convolution with groups.
    """

    _way = "rowwise"


# ---- plans -------------------------------------------------------------------------------------------------------------

# the words of transformers' tp_plan for linear layers and embeddings
_WORDS: dict[str, Callable[[], ParallelStyle]] = {
    "colwise": ColwiseParallel,
    "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
    "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),
    "rowwise": RowwiseParallel,
    "rowwise_split_input": lambda: RowwiseParallel(input_layouts=Replicate()),
    "rowwise_rep": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    "embedding_colwise": lambda: ColwiseParallel(output_layouts=Replicate()),
}


def parallelize_module(
    module: nn.Module,
    device_mesh: DeviceMesh | None = None,
    parallelize_plan: "ParallelStyle | str | Mapping[str, ParallelStyle | str] | None" = None,
    *,
    src_data_rank: int | None = 0,
) -> nn.Module:
    """torch's parallelize_module for models with quantized layers.

    Args:
        module: changed in place. A refused plan changes none of its quantized layers.
        device_mesh: of one dimension; by default that of the context.
        parallelize_plan: a style, or one for each name or pattern of names. torch's ColwiseParallel and RowwiseParallel stand for
            those of this package, and words of transformers' ``model.tp_plan``, such as "colwise", for the styles that they mean.
        src_data_rank: the process of the mesh whose values all get; None: each has the same ones already.

    Returns:
        The module.

    Raises:
        TypeError: a plan of something else, or a style for a module that it cannot take.
        ValueError: a word that is unknown, or what the styles raise.
    """
    mesh = device_mesh
    if mesh is None:
        from torch.distributed.device_mesh import _mesh_resources

        mesh = _mesh_resources.get_current_mesh()
    if parallelize_plan is None:
        raise ValueError("quant_ops.parallelize_module: expected a plan, got None. Name the layers and their styles.")
    plan = {"": parallelize_plan} if isinstance(parallelize_plan, ParallelStyle | str) else parallelize_plan
    if not isinstance(plan, Mapping):
        raise TypeError(f"quant_ops.parallelize_module: expected a style or a dict of them, got {type(plan).__name__}")
    chosen: list[tuple[str, nn.Module, ParallelStyle]] = []
    for pattern, given in plan.items():
        style = _style(pattern, given)
        style.src_data_rank = src_data_rank
        found = _matching(module, pattern)
        if not found:
            warnings.warn(f"quant_ops.parallelize_module: no module is named {pattern!r} of the plan", stacklevel=2)
        chosen += [(name, one, style) for name, one in found]
    shared: dict[Any, Any] = {}
    quantized = [item for item in chosen if isinstance(item[1], QuantizedLayer) and isinstance(item[2], _QuantizedStyle)]
    for name, layer, style in quantized:
        style._checked(layer, mesh, name)  # type: ignore[attr-defined]
    commits = [style._prepare(layer, mesh, name, shared) for name, layer, style in quantized]  # type: ignore[attr-defined]
    for item in chosen:
        if item not in quantized:
            torch_parallel.parallelize_module(item[1], mesh, item[2], src_data_rank=src_data_rank)
    for commit in commits:
        commit()
    return module


def _style(pattern: str, given: Any) -> ParallelStyle:
    if isinstance(given, str):
        if given not in _WORDS:
            known = ", ".join(_WORDS)
            raise ValueError(f"quant_ops.parallelize_module: expected one of {known} for {pattern!r}, got {given!r}")
        return _WORDS[given]()
    if type(given) is torch_parallel.ColwiseParallel:
        leaving = given.output_layouts[0]  # its default cannot be told from what was given
        layouts = {"output_layouts": None if leaving == Shard(-1) else leaving}
        return ColwiseParallel(input_layouts=given.input_layouts[0], use_local_output=given.use_local_output, **layouts)
    if type(given) is torch_parallel.RowwiseParallel:
        entering = given.input_layouts[0]
        layouts = {"input_layouts": None if entering == Shard(-1) else entering}
        return RowwiseParallel(output_layouts=given.output_layouts[0], use_local_output=given.use_local_output, **layouts)
    if not isinstance(given, ParallelStyle):
        raise TypeError(f"quant_ops.parallelize_module: expected a style for {pattern!r}, got {type(given).__name__}")
    return given


def _matching(module: nn.Module, pattern: str) -> list[tuple[str, nn.Module]]:
    """Submodules whose names match, part by part."""
    if pattern == "":
        return [("", module)]
    parts = pattern.split(".")
    found: list[tuple[str, nn.Module]] = []
    for name, one in module.named_modules(remove_duplicate=False):
        own = name.split(".")
        if len(own) == len(parts) and all(map(fnmatch, own, parts)) and all(one is not other for _, other in found):
            found.append((name, one))
    return found
