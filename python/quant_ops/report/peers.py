"""The contenders of ``python -m quant_ops bench``: one layer in float, in quant_ops, and in the other int8 packages installed.

Weights are prepared before: Linear layers take the scales of their input from the data of each call, convolutions have a fixed
one, as these are the forms that the packages have in common. On the CPU int8 goes from float32 to float32, on a GPU from bfloat16
to bfloat16, as its models do. Read next: machine_table.py.
"""

import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable
from importlib import util
from typing import Any

import torch
from torch import Tensor, nn

from .. import info
from ..nn import INT8_LAYERS

Call = Callable[[], Tensor]
FLOAT = ("float32", "bfloat16")
OURS = "quant_ops"


@dataclasses.dataclass
class Problem:
    """A layer and its input; what is derived from them is made when it is used."""

    layer: nn.Linear | nn.Conv2d
    x: Tensor

    @functools.cached_property
    def input_scale(self) -> Tensor:
        return self.x.abs().max() / 127

    @functools.cached_property
    def output_scale(self) -> Tensor:
        return self.layer(self.x).abs().max() / 127

    @functools.cached_property
    def int8(self) -> Any:
        """Ours: with the defaults of :func:`quantize_` for Linear, symmetric on a GPU, where a zero point costs time."""
        kind = INT8_LAYERS[type(self.layer)]
        if isinstance(self.layer, nn.Conv2d):
            return kind.from_float(self.layer, input_scale=self.input_scale)
        return kind.from_float(self.layer, asymmetric=self.x.device.type == "cpu")


def contenders(problem: Problem) -> dict[str, Callable[[], Call]]:
    """What makes the call of each contender that this machine and installation may have; making it may raise."""
    on_cpu, linear = problem.x.device.type == "cpu", isinstance(problem.layer, nn.Linear)
    x = problem.x if on_cpu or not has_bfloat16("cuda") else problem.x.bfloat16()
    makers: dict[str, Callable[[], Call]] = {
        "float32": lambda: functools.partial(problem.layer, problem.x),
        OURS: lambda: functools.partial(problem.int8, x),
    }
    if has_bfloat16(problem.x.device.type):
        makers["bfloat16"] = functools.partial(_bfloat16, problem)
    if not on_cpu:
        return makers | ({"torch._int_mm": functools.partial(_int_mm, problem, x)} if linear else {})
    for engine in _torch_ao_engines():
        makers[f"torch.ao {engine}"] = functools.partial(_torch_ao_linear if linear else _torch_ao_conv, engine, problem)
    if util.find_spec("onnxruntime") and util.find_spec("onnx"):
        makers["ONNX Runtime"] = functools.partial(_onnx_linear if linear else _onnx_conv, problem)
    return makers


def has_bfloat16(device: str) -> bool:
    """Whether the processor multiplies bfloat16; without such instructions it would only show an emulation's time."""
    if device == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    return bool(info.cpu_flags() & {"avx512_bf16", "amx_bf16", "bf16"})


def _bfloat16(p: Problem) -> Call:
    return functools.partial(copy.deepcopy(p.layer).bfloat16(), p.x.bfloat16())


def _int_mm(p: Problem, x: Tensor) -> Call:
    """Rows quantized by torch's elementwise operators, and its integer product."""
    weight, weight_scale, bias = p.int8.qweight.t(), p.int8.weight_scale, p.int8.bias

    def call() -> Tensor:
        scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
        codes = (x / scale).round().to(torch.int8)
        return torch.addcmul(bias, torch._int_mm(codes, weight) * scale, weight_scale).to(x.dtype)

    return call


# ---- torch.ao --------------------------------------------------------------------------------------------------------------


def _torch_ao_engines() -> list[str]:
    """Those that differ; none where torch has dropped its quantized operators."""
    try:
        supported = torch.backends.quantized.supported_engines
        return [engine for engine in ("fbgemm", "onednn") if engine in supported and hasattr(torch.ops.quantized, "conv2d")]
    except (AttributeError, RuntimeError):
        return []


class _Engine:
    """Chooses who packs the int8 weights of torch.ao, for a while."""

    def __init__(self, engine: str):
        self.engine = engine

    def __enter__(self) -> None:
        self.before = torch.backends.quantized.engine
        torch.backends.quantized.engine = self.engine

    def __exit__(self, *_: object) -> None:
        torch.backends.quantized.engine = self.before


def _codes(p: Problem) -> Tensor:
    zeros = torch.zeros(p.layer.weight.shape[0], dtype=torch.long)
    return torch.quantize_per_channel(p.layer.weight, p.int8.weight_scale.double(), zeros, 0, torch.qint8)


def _torch_ao_linear(engine: str, p: Problem) -> Call:
    with _Engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it announces its removal
        packed = torch.ops.quantized.linear_prepack(_codes(p), p.layer.bias)
    return functools.partial(torch.ops.quantized.linear_dynamic, p.x, packed, True)  # reduce_range, as its module has it


def _torch_ao_conv(engine: str, p: Problem) -> Call:
    conv, zero = p.layer, 128
    assert isinstance(conv, nn.Conv2d)
    with _Engine(engine), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = (list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups)
        packed = torch.ops.quantized.conv2d_prepack(_codes(p), conv.bias, *settings)
    input_scale, output_scale = p.input_scale.item(), p.output_scale.item()

    def call() -> Tensor:
        codes = torch.quantize_per_tensor(p.x, input_scale, zero, torch.quint8)
        return torch.ops.quantized.conv2d(codes, packed, output_scale, zero).dequantize()

    return call


# ---- ONNX Runtime ----------------------------------------------------------------------------------------------------------


def _onnx_linear(p: Problem) -> Call:
    """DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime runs as one operator."""
    from onnx import TensorProto, helper

    weights = {"w": p.int8.qweight.t().contiguous(), "w_scale": p.int8.weight_scale, "b": p.layer.bias}
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["codes", "scale", "zero"]),
        helper.make_node("MatMulInteger", ["codes", "w", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["products"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["scale", "w_scale"], ["scales"]),
        helper.make_node("Mul", ["products", "scales"], ["scaled"]),
        helper.make_node("Add", ["scaled", "b"], ["y"]),
    ]
    return _onnx_call(nodes, weights, p.x, torch.empty(p.x.shape[0], p.layer.weight.shape[0]))


def _onnx_conv(p: Problem) -> Call:
    """QuantizeLinear, QLinearConv with channels last, DequantizeLinear."""
    from onnx import helper

    conv = p.layer
    assert isinstance(conv, nn.Conv2d)
    assert conv.bias is not None
    assert isinstance(conv.padding, tuple)
    weights = {
        "x_scale": p.input_scale,
        "y_scale": p.output_scale,
        "zero": torch.tensor(128, dtype=torch.uint8),
        "w": p.int8.qweight.contiguous(),
        "w_scale": p.int8.weight_scale,
        "w_zero": torch.zeros(conv.out_channels, dtype=torch.int8),
        "b": (conv.bias / (p.int8.weight_scale * p.input_scale)).round().to(torch.int32),
    }
    operands = ["codes", "x_scale", "zero", "w", "w_scale", "w_zero", "y_scale", "zero", "b"]
    convolution = helper.make_node(
        "QLinearConv",
        operands,
        ["y_codes"],
        domain="com.microsoft",
        channels_last=1,
        strides=conv.stride,
        pads=conv.padding * 2,
        dilations=conv.dilation,
        group=conv.groups,
    )
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "zero"], ["codes"]),
        convolution,
        helper.make_node("DequantizeLinear", ["y_codes", "y_scale", "zero"], ["y"]),
    ]
    y = torch.empty_like(p.layer(p.x).permute(0, 2, 3, 1))
    call = _onnx_call(nodes, weights, p.x.permute(0, 2, 3, 1), y)
    return lambda: call().permute(0, 3, 1, 2)


def _onnx_call(nodes: list[Any], weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Call:
    """Runs the nodes from x to y, which stay in place."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, list(y.shape))],
        [numpy_helper.from_array(weight.numpy(), name) for name, weight in weights.items()],
    )
    sets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=sets, ir_version=8)  # which all versions read
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads would slow the next contender
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    source, target = x.numpy(), y.numpy()
    binding.bind_input("x", "cpu", 0, source.dtype, source.shape, source.ctypes.data)
    binding.bind_output("y", "cpu", 0, target.dtype, target.shape, target.ctypes.data)

    def call(keep: object = source) -> Tensor:  # the binding holds addresses only
        session.run_with_iobinding(binding)
        return y

    return call
