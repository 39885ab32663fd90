"""The first of two passes: every call of a ``quant_ops`` operator becomes one node of the domain ``quant_ops``, its arguments kept.

torch's exporter translates a graph before it has the values of weights and scales, and for an opset of its own. So its translation
table only records the calls here; lower.py replaces the nodes when the values are known. Read next: lower.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import onnx
import onnx_ir as ir
import torch
from onnxscript import values

DOMAIN = "quant_ops"
_CALL = "call"  # the attribute of a node that numbers its call


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of an operator: its arguments by name, tensors as the numbers of the node's inputs."""

    operator: Any  # torch's OpOverload
    inputs: dict[str, int]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """Of the operator, without its namespace."""
        name: str = self.operator._schema.name.split("::")[1]
        return name


class Recorder:
    """The calls of one export."""

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def table(self) -> dict[Callable[..., Any], Callable[..., Any]]:
        """The translation table of ``torch.onnx.export``: every operator of the package."""
        names = sorted({name.split("::")[1].split(".")[0] for name in _registered()})
        operators = [getattr(torch.ops.quant_ops, name).default for name in names]
        return {operator: self._recording(operator) for operator in operators}

    def call_of(self, node: ir.Node) -> Call:
        """What a node of the domain stands for."""
        return self.calls[node.attributes[_CALL].as_int()]

    def _recording(self, operator: Any) -> Callable[..., Any]:
        schema = operator._schema
        emit = _node(schema.name.split("::")[1], len(schema.returns))

        # Without annotations, which the exporter would read types of tensors from.
        def record(*args, **kwargs):  # type: ignore[no-untyped-def]
            bound = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | kwargs
            tensors = {name: value for name, value in bound.items() if isinstance(value, ir.Value)}
            options = {argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()}
            if "dtype" in options:  # torch's number of float32, the default of every operator that has one
                options["dtype"] = ir.DataType.FLOAT
            options |= {name: value for name, value in bound.items() if name not in tensors}
            inputs = {name: position for position, name in enumerate(tensors)}
            self.calls.append(Call(operator, inputs, {name: value for name, value in options.items() if name not in tensors}))
            return emit(*tensors.values(), **{_CALL: len(self.calls) - 1})

        return record


def _registered() -> list[str]:
    return [name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{DOMAIN}::")]


def _node(name: str, outputs: int) -> Callable[..., Any]:
    """Appends a node to the graph that is being built."""
    schema_class = onnx.defs.OpSchema
    parameter, any_number = schema_class.FormalParameter, schema_class.FormalParameterOption.Variadic
    schema = schema_class(
        name,
        DOMAIN,
        1,
        inputs=[parameter("inputs", "T", param_option=any_number, is_homogeneous=False)],
        outputs=[parameter(f"output_{i}", "T") for i in range(outputs)],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[schema_class.Attribute(_CALL, schema_class.AttrType.INT, "")],
    )
    return values.Op(values.Opset(DOMAIN, 1), name, schema)
