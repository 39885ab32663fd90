"""What :func:`quant_ops.onnx.export` does: checks, torch's exporter with recorded calls, and their replacement.

Read next: record.py, lower.py.
"""

import os
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..convert.prepared import Prepared
from ..convert.qat import Qat
from ..nn import Int8Layer
from ..nn.base import QuantizedLayer
from .builder import Settings
from .lower import LOWERED, lower
from .quantize import Codes, is_float8
from .record import Recorder

_NAME = "quant_ops.onnx.export"
CHOICES = {"form": ("qdq", "integer"), "codes": ("uint8", "int8"), "weight_only": ("DequantizeLinear", "MatMulNBits")}
OPSETS = range(21, 24)


def export(
    model: Any,
    args: Any,
    path: Any,
    kwargs: dict[str, Any] | None,
    dynamic_shapes: Any,
    opset: int,
    settings: dict[str, str],
    input_names: Sequence[str] | None,
    output_names: Sequence[str] | None,
) -> Any:
    """See :func:`quant_ops.onnx.export`."""
    _check_settings(settings, opset)
    args = (args,) if isinstance(args, torch.Tensor) else tuple(args)
    if not isinstance(model, torch.export.ExportedProgram):
        _check_model(model)
        if isinstance(model, QuantizedLayer):
            model = _Whole(model)
        with torch.no_grad():
            shapes = _with_dims(dynamic_shapes)
            model = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    _check_graph(model)
    recorder = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)  # of torch, about itself
        program: Any = torch.onnx.export(
            model,
            input_names=input_names,
            output_names=output_names,
            opset_version=opset,
            dynamic_shapes=dynamic_shapes,
            custom_translation_table=recorder.table(),
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        lower(program.model, recorder, Settings(**settings))
        program.optimize()
    if path is not None:
        program.save(os.fspath(path))
    return program


class _Whole(nn.Module):
    """A model of one layer, which torch.export does not take as the model itself."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> Any:
        return self.layer(x)


# ---- checks --------------------------------------------------------------------------------------------------------------


def _check_settings(settings: dict[str, str], opset: int) -> None:
    for name, allowed in CHOICES.items():
        if settings[name] not in allowed:
            raise ValueError(f"{_NAME}: expected {name} to be one of {', '.join(map(repr, allowed))}, got {settings[name]!r}")
    if opset not in OPSETS:
        raise ValueError(
            f"{_NAME}: expected opset from {OPSETS[0]} to {OPSETS[-1]}, got {opset!r}. Weights of 4 bits and scales of blocks came "
            f"with opset {OPSETS[0]}."
        )


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        raise TypeError(f"{_NAME}: expected an nn.Module or ExportedProgram, got {type(model).__name__}")
    if model.training:
        raise ValueError(f"{_NAME}: expected a model in eval mode, got one in training mode. Call model.eval() first.")
    devices = sorted({tensor.device.type for tensor in (*model.parameters(), *model.buffers())} - {"cpu"})
    if devices:
        raise ValueError(f"{_NAME}: expected a model on the CPU, got tensors on {devices[0]}. Move it with model.cpu() first.")
    for name, layer in model.named_modules():
        kind = type(layer).__name__
        steps = layer.num_steps if isinstance(layer, Int8Layer | Prepared) else 1
        if steps > 1:
            raise ValueError(
                f"{_NAME}: expected layers with one set of activation scales, got {kind} {name!r} with {steps} steps, which ONNX "
                "cannot choose from. Convert with Int8Static(num_steps=1) or Int8Dynamic()."
            )
        if isinstance(layer, Prepared) and not isinstance(layer, Qat):
            raise ValueError(
                f"{_NAME}: expected converted layers, got {kind} {name!r}, which only observes. Call convert_(model) first."
            )
        if isinstance(layer, Qat) and layer.observer is not None and not _is_ready(layer):
            raise ValueError(
                f"{_NAME}: expected scales in {kind} {name!r}, got no data. Call calibrate(model, data) or train first."
            )


def _is_ready(layer: Any) -> bool:
    """Whether a layer in training computes with its scales, and does not wait for data to take them from."""
    return not layer.observing and not (layer.until_seen and layer._is_first()) and layer._is_started()


def _check_graph(program: torch.export.ExportedProgram) -> None:
    """Raises for operators without a translation, unless all they take is constant."""
    signature, constant = program.graph_signature, set()
    users = set(signature.user_inputs)
    for graph_module in program.graph_module.modules():
        if not isinstance(graph_module, torch.fx.GraphModule):
            continue
        for node in graph_module.graph.nodes:
            inner = graph_module is not program.graph_module
            if node.op == "placeholder" and node.name not in users and not inner:
                constant.add(node)
            elif node.op == "call_function":
                if all(given in constant for given in node.all_input_nodes) and node.all_input_nodes:
                    constant.add(node)
                if str(node.target).startswith("quant_ops.") and (node not in constant or inner):
                    _check_call(node, inner)


def _check_call(node: torch.fx.Node, inner: bool) -> None:
    schema = node.target._schema  # type: ignore[union-attr]
    name = schema.name.split("::")[1]
    if inner:
        raise ValueError(
            f"{_NAME}: expected quant_ops operators outside of branches and loops, got {name} inside of torch.cond or another one. "
            "Export the branches as models of their own."
        )
    options = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
    options |= dict(zip((argument.name for argument in schema.arguments), node.args, strict=False)) | node.kwargs
    problem = _problem(name, options)
    if problem is not None:
        raise ValueError(f"{_NAME}: expected {problem}")


def _problem(name: str, options: dict[str, Any]) -> str | None:
    """Why a call cannot be exported, as the end of a sentence; None if it can."""
    if name not in LOWERED:
        return f"operators that ONNX can express, got {name}. Quantize to integers or to the formats E4M3 and E5M2 instead."
    if name == "quant_float_forward" and not is_float8(options):
        got = f"{options['exponent_bits']} exponent and {options['mantissa_bits']} mantissa bits"
        return (
            "of the floating formats only E4M3 and E5M2, saturating and rounded to nearest even, which ONNX has, got one with "
            f"{got}. Export the float model, or quantize with one of those or an integer format."
        )
    if options.get("block_size") is not None:
        got = f"a call of {name} with {options['block_size']}"
        return f"tensors without block_size, got {got}. Use one scale per tensor, channel or row."
    if (
        name == "quant_tensor_forward"
        and not options["simulate"]
        and ((codes := Codes.of(options["qmin"], options["qmax"])) is None or codes.dtype == torch.uint16)
    ):
        got = f"a call of {name} with [{options['qmin']}, {options['qmax']}]"
        return f"codes that int8, uint8 or int16 holds, got {got}. Simulate them."
    return None


def _with_dims(shapes: Any) -> Any:
    """With torch's dimensions in place of names, which the exporter to ONNX takes as well."""
    if isinstance(shapes, str):
        return torch.export.Dim.DYNAMIC
    if isinstance(shapes, dict):
        return {key: _with_dims(value) for key, value in shapes.items()}
    return type(shapes)(map(_with_dims, shapes)) if isinstance(shapes, list | tuple) else shapes
