"""Nodes of ONNX for one recorded call, and the values of what is constant. Read first: record.py; next: lower.py."""

import dataclasses
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnx_ir.tape
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor

TINY = float(torch.finfo(torch.float32).tiny)

TORCH_DTYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.BOOL: torch.bool,
}
IR_DTYPES = {of_torch: dtype for dtype, of_torch in TORCH_DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the user of :func:`quant_ops.onnx.export` has chosen."""

    form: str
    codes: str
    weight_only: str

    @property
    def shift(self) -> int:
        """What is added to an int8 code, and to its zero point, before it is written."""
        return 128 if self.codes == "uint8" else 0

    @property
    def code_dtype(self) -> torch.dtype:
        """Of the codes that products take."""
        return torch.uint8 if self.codes == "uint8" else torch.int8


class Builder:
    """Appends nodes in front of a recorded one, and knows which values are constant."""

    def __init__(self, model: ir.Model, settings: Settings) -> None:
        self.graph = model.graph
        self.settings = settings
        self.opset = model.opset_imports[""]
        self.domains: set[str] = set()
        self.shifted: dict[ir.Value, ir.Value] = {}  # int8 codes, and the same ones + 128 as uint8
        self._tape = onnx_ir.tape.Tape()
        self._constants: dict[ir.Value, Tensor | None] = {}
        self._written: dict[Any, ir.Value] = {}
        self._buffers = set(self.graph.initializers)
        self.prefix = ""

    # ---- nodes -----------------------------------------------------------------------------------------------------------

    def begin(self, prefix: str) -> None:
        """Starts the nodes of a call; the names of its constants begin with the prefix."""
        self._tape = onnx_ir.tape.Tape()
        self.prefix = prefix

    @property
    def nodes(self) -> list[ir.Node]:
        """Those since ``begin``."""
        return list(self._tape.nodes)

    def op(self, name: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """A node with one output."""
        if domain:
            self.domains.add(domain)
        return self._tape.op(name, inputs, attributes or None, domain=domain)

    def ops(self, name: str, outputs: int, *inputs: ir.Value | None, **attributes: Any) -> list[ir.Value]:
        """A node with several outputs."""
        return list(self._tape.op_multi_out(name, inputs, attributes or None, num_outputs=outputs))

    # ---- constants -------------------------------------------------------------------------------------------------------

    def tensor(self, value: Any, name: str = "constant", dtype: torch.dtype | None = None, bits: int = 8) -> ir.Value:
        """An initializer, from a tensor or a number; codes of 4 bits have an ONNX type of their own."""
        tensor = torch.as_tensor(value, dtype=dtype).detach().cpu()
        small = tensor.numel() <= 16
        key = (tensor.dtype, tuple(tensor.shape), bits, tuple(tensor.flatten().tolist())) if small and name == "constant" else None
        if key is not None and key in self._written:
            return self._written[key]
        if bits == 4:
            kind = ml_dtypes.int4 if tensor.dtype == torch.int8 else ml_dtypes.uint4
            data: Any = ir.Tensor(tensor.numpy().astype(kind))
        elif tensor.dtype == torch.bfloat16:
            data = ir.Tensor(tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16))
        else:
            data = ir.Tensor(tensor.contiguous().numpy())
        data.name = self._free_name(f"{self.prefix}.{name}" if key is None else f"quant_ops.{name}")
        made = ir.Value(name=data.name, shape=ir.Shape(data.shape), type=ir.TensorType(data.dtype), const_value=data)
        self.graph.register_initializer(made)
        self._constants[made] = None if bits == 4 else tensor  # numpy has no type of 4 bits
        if key is not None:
            self._written[key] = made
        return made

    def once(self, key: Any, make: Any) -> ir.Value:
        """What was made for this key before, or is made now: for weights that layers share."""
        if key not in self._written:
            self._written[key] = make()
        return self._written[key]

    def _free_name(self, name: str) -> str:
        """The name, which a buffer of the model gives up, or one with a number behind it."""
        taken, number = self.graph.initializers, 1
        if name in self._buffers:
            buffer = taken.pop(name)
            self._buffers.remove(name)
            buffer.name = self._free_name(f"{name}_of_torch")  # seldom in use: the nodes that are replaced took it
            taken[buffer.name] = buffer
        free = name
        while free in taken:
            number += 1
            free = f"{name}_{number}"
        return free

    def constant(self, value: ir.Value | None) -> Tensor | None:
        """The value, if it is the same in every call."""
        if value is None:
            return None
        if value not in self._constants:
            self._constants[value] = self._find(value)
        return self._constants[value]

    def _find(self, value: ir.Value) -> Tensor | None:
        if value.const_value is not None:
            return _torch(value.const_value)
        node = value.producer()
        if (
            node is None
            or node.domain != ""
            or any(attribute.type == ir.AttributeType.GRAPH for attribute in node.attributes.values())
        ):
            return None
        inputs = {given.name: self.constant(given) for given in node.inputs if given is not None}
        if any(known is None for known in inputs.values()) or node.op_type.startswith("Random"):
            return None
        return self._evaluate(node, value, {str(name): known.numpy() for name, known in inputs.items() if known is not None})

    def _evaluate(self, node: ir.Node, value: ir.Value, feeds: dict[str, Any]) -> Tensor | None:
        proto = ir.serde.serialize_node(node)
        inputs = [
            onnx.helper.make_tensor_value_info(name, onnx.helper.np_dtype_to_tensor_dtype(x.dtype), x.shape)
            for name, x in feeds.items()
        ]
        outputs = [onnx.ValueInfoProto(name=value.name)]
        graph = onnx.helper.make_graph([proto], "constant", inputs, outputs)
        opsets = [onnx.helper.make_opsetid("", self.opset)]
        found = ReferenceEvaluator(onnx.helper.make_model(graph, opset_imports=opsets)).run(None, feeds)[0]
        return torch.from_numpy(np.array(found))

    # ---- small expressions -----------------------------------------------------------------------------------------------

    def number(self, value: float) -> ir.Value:
        """A float32 scalar."""
        return self.tensor(value, dtype=torch.float32)

    def axes(self, *axes: int) -> ir.Value:
        """A vector of int64."""
        return self.tensor(list(axes), dtype=torch.int64)

    def cast(self, x: ir.Value, to: ir.DataType, given: ir.DataType | None = None) -> ir.Value:
        """x in another type, if it is another one."""
        if (given or x.dtype) == to:
            return x
        y = self.op("Cast", x, to=int(to))
        y.dtype = to
        return y

    def float32(self, x: ir.Value) -> ir.Value:
        """x in the type that every operator computes in."""
        return self.cast(x, ir.DataType.FLOAT)

    def reshape(self, x: ir.Value, *shape: int) -> ir.Value:
        """x in another shape; -1 is one dimension that follows."""
        return self.op("Reshape", x, self.axes(*shape))

    def like_rows(self, y: ir.Value, x: ir.Value, width: int) -> ir.Value:
        """y ``(M, width)`` with the leading dimensions of x."""
        leading = sizes(x)[:-1]
        unknown = [size for size in leading if not isinstance(size, int)]
        if len(unknown) <= 1:
            return self.reshape(y, *(size if isinstance(size, int) else -1 for size in leading), width)
        shape = self.op("Concat", self.op("Shape", x, start=0, end=-1), self.axes(width), axis=0)
        return self.op("Reshape", y, shape)


def sizes(value: ir.Value) -> list[Any]:
    """Its shape: numbers, and symbols for dimensions that vary."""
    return [] if value.shape is None else list(value.shape)


def _torch(data: Any) -> Tensor:
    raw = getattr(data, "raw", None)
    if isinstance(raw, Tensor):
        return raw.detach().cpu()
    array = data.numpy()
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16).copy()).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
