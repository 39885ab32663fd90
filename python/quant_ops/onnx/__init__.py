"""ONNX files of quantized models: :func:`export`.

The parts, which need the packages onnx and onnxscript, are imported by the first call. Read next: program.py.
"""

import importlib.metadata
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

__all__ = ["export"]

_LEAST = {"onnx": (1, 18), "onnxscript": (0, 5, 4)}


def export(
    model: "torch.nn.Module | torch.export.ExportedProgram",
    args: "tuple[Any, ...] | list[Any] | torch.Tensor",
    path: "str | os.PathLike[str] | None" = None,
    *,
    kwargs: dict[str, Any] | None = None,
    dynamic_shapes: Any = None,
    opset: int = 21,
    form: str = "qdq",
    codes: str = "uint8",
    weight_only: str = "DequantizeLinear",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Any:
    """A quantized model as an ONNX program, by torch's exporter (``torch.onnx.export(dynamo=True)``), in standard operators.

    Dynamic layers become QuantizeLinear with scales computed as the layers do, and MatMulInteger or ConvInteger; static ones
    QuantizeLinear and DequantizeLinear around float operators, which runtimes fuse, or the integer ones; weight-only ones
    DequantizeLinear of int8 or int4 blocks; layers in training and simulated integers QuantizeLinear and DequantizeLinear.

    Args:
        model: in eval mode; the model is not changed. Or what ``torch.export.export`` has made of one.
        args, kwargs: example inputs, as for ``torch.export.export``.
        path: the file to write, if any; a model of more than 2 GB gets a second one for its weights.
        dynamic_shapes: dimensions that vary, by input, such as ``({0: "batch"},)``, as for ``torch.onnx.export``.
        opset: 21 to 23.
        form: of static layers. "qdq": Q/DQ nodes around Conv, Gemm and MatMul, which onnxruntime, TensorRT and others turn into
            integer products where they can. "integer": MatMulInteger and ConvInteger with the operators' own epilogue, whose sums
            are exact wherever it runs.
        codes: the type of activations and weights of products. "uint8", the int8 codes + 128: onnxruntime on x86 multiplies them
            exactly and fast. "int8": for runtimes that want zero points of 0, such as TensorRT; onnxruntime saturates sums of
            these on x86 processors without VNNI.
        weight_only: "DequantizeLinear" and MatMul, or onnxruntime's own operator "MatMulNBits", where it takes the groups.
        input_names, output_names: of the graph.

    Returns:
        torch's ONNXProgram: ``program.save(path)``, ``program.model_proto``, and ``program(*args)``, which runs it in onnxruntime.

    Raises:
        ImportError: onnx or onnxscript is missing or too old.
        TypeError: model is of another class.
        ValueError: an argument that is not one of those above; a model in training mode, with several sets of scales, or with a
            format that ONNX lacks.
    """
    _check_packages()
    from . import program

    settings = {"form": form, "codes": codes, "weight_only": weight_only}
    return program.export(model, args, path, kwargs, dynamic_shapes, opset, settings, input_names, output_names)


def _check_packages(least: Mapping[str, tuple[int, ...]] = _LEAST) -> None:
    for package, version in least.items():
        wanted = ".".join(map(str, version))
        try:
            found = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found = ""
        if not found or tuple(int(part) for part in found.split(".")[:3] if part.isdigit()) < version:
            got = f"version {found}" if found else "none"
            raise ImportError(
                f"quant_ops.onnx.export: expected the package {package}, version {wanted} or newer, got {got}. "
                "pip install 'quant_ops[onnx]' installs it."
            )
