"""The second pass: recorded calls become nodes of ONNX, now that the values of weights and scales are known.

What is the same in every call, such as the rounded weight of a layer in training, is computed here by the operator itself.
Read first: record.py; next: products.py, weight_only.py, quantize.py, one function for each operator.
"""

from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from . import products, quantize, weight_only
from .builder import TORCH_DTYPES, Builder, Settings
from .record import DOMAIN, Call, Recorder

_PRODUCTS: dict[str, Callable[..., list[ir.Value]]] = {
    "int8_conv2d": products.int8_conv2d,
    "int8_linear": products.int8_linear,
    "weight_only_embedding": weight_only.weight_only_embedding,
    "weight_only_linear": weight_only.weight_only_linear,
}
_OTHERS: dict[str, Callable[..., list[ir.Value]]] = {
    "choose_qparams": quantize.choose_qparams,
    "dequant_tensor": quantize.dequant_tensor,
    "int8_gemm": products.int8_gemm,
    "quant_float_forward": quantize.quant_float_forward,
    "quant_tensor_forward": quantize.quant_tensor_forward,
    "quantize_rows": quantize.quantize_rows,
}
LOWERED = {*_PRODUCTS, *_OTHERS}


def lower(model: ir.Model, recorder: Recorder, settings: Settings) -> None:
    """Replaces the nodes of the domain in place."""
    b = Builder(model, settings)
    for node in list(model.graph):
        if node.domain == DOMAIN:
            _replace(b, node, recorder.call_of(node))
    model.opset_imports.pop(DOMAIN, None)
    for domain in b.domains:
        model.opset_imports[domain] = 1


def _replace(b: Builder, node: ir.Node, call: Call) -> None:
    b.begin(_prefix(node, call))
    arguments = call.options | {name: node.inputs[position] for name, position in call.inputs.items()}
    known = {name: b.constant(node.inputs[position]) for name, position in call.inputs.items()}
    if all(value is not None for value in known.values()):
        results = _evaluated(b, call, {name: value for name, value in known.items() if value is not None})
    elif call.name in _PRODUCTS:
        results = _PRODUCTS[call.name](b, **arguments, result=node.outputs[0].dtype)
    else:
        results = _OTHERS[call.name](b, **arguments)
    for old, new in zip(node.outputs, results, strict=True):
        new.shape, new.type = old.shape, old.type
    results = [
        b.op("Identity", new) if new.producer() is None and old.is_graph_output() else new
        for old, new in zip(node.outputs, results, strict=True)
    ]
    ir.convenience.replace_nodes_and_values(b.graph, node, [node], b.nodes, node.outputs, results)


def _prefix(node: ir.Node, call: Call) -> str:
    """The name of the layer, as far as its buffers tell."""
    for argument in ("weight_scale", "tensor", "scale"):
        position = call.inputs.get(argument)
        value = None if position is None else node.inputs[position]
        while value is not None and (producer := value.producer()) is not None:
            value = producer.inputs[0] if producer.inputs else None
        if value is not None and value.is_initializer() and "." in str(value.name):
            return str(value.name).rsplit(".", 1)[0]
    return str(node.outputs[0].name)


def _evaluated(b: Builder, call: Call, tensors: dict[str, Tensor]) -> list[ir.Value]:
    """The results of a call whose operands are constant; a simulated tensor as its codes, where they are of a type of ONNX."""
    options = {name: TORCH_DTYPES[value] if isinstance(value, ir.DataType) else value for name, value in call.options.items()}
    if call.name == "quant_tensor_forward" and options["simulate"] and (codes := _rounded(b, tensors, options)) is not None:
        return [codes]
    made: Any = call.operator(**options, **tensors)
    return [b.tensor(result, "value") for result in (made if isinstance(made, tuple) else (made,))]


def _rounded(b: Builder, tensors: dict[str, Tensor], options: dict[str, Any]) -> ir.Value | None:
    """A constant tensor as int8 codes and DequantizeLinear, with a scale for each index of one dimension at most; else None."""
    tensor, scale = tensors["tensor"], tensors["scale"]
    symmetric = not options["asymmetric"]
    if tensor.dtype != torch.float32 or not (symmetric and options["qmin"] >= -128 and options["qmax"] <= 127):
        return None
    if options["block_size"] is not None or not tensor.isfinite().all():
        return None
    codes = torch.ops.quant_ops.quant_tensor_forward.default(**options | tensors | {"simulate": False})
    shape = [1] * (tensor.dim() - scale.dim()) + list(scale.shape)
    varying = [dim for dim, size in enumerate(shape) if size != 1]
    if len(varying) > 1 or not tensor.dim() or codes.dtype != torch.int8:
        return None
    shift, dtype = b.settings.shift, b.settings.code_dtype
    written = b.tensor((codes.to(torch.int16) + shift).to(dtype), "qweight")
    flat = scale.float().reshape(-1) if varying else scale.float().reshape(())
    zeros = b.tensor(torch.full(flat.shape, shift, dtype=dtype), "weight_zero_point")
    axis: dict[str, Any] = {"axis": varying[0]} if varying else {}
    return b.op("DequantizeLinear", written, b.tensor(flat, "weight_scale"), zeros, **axis)
