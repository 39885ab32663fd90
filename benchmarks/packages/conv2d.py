"""Times one Conv2d in quant_ops and in every other package that is installed.

python -m benchmarks.packages.conv2d                                   all layers of ResNet-50 and MobileNetV2, and others: minutes
python -m benchmarks.packages.conv2d --threads 8 --out conv2d-8.json
python -m benchmarks.packages.conv2d --sets others --seconds 1
python -m benchmarks.packages.conv2d --sets smoke --seconds 0

From float32 to float32, as nn.Conv2d, and from codes to codes, as in a network that is int8 from layer to layer. Static contenders
take the scale of their input from the data, and that of their result if they round it to 8 bits. Images are channels_last, also
in ONNX Runtime's static convolution, which has an attribute for it. Read next: run.py, networks.py.
"""

import functools
import logging
import tempfile
from pathlib import Path

import torch

import quant_ops as qo
from benchmarks.common import machine, networks, shapes
from benchmarks.common.problems import ConvProblem, floating, ours_dynamic, ours_static
from benchmarks.packages import run

LEAST_SQNR = 20.0  # dB against float32; torch.ao's x86 saturates intermediate sums of depthwise convolutions


class Problem(ConvProblem):
    """With the codes of x and the scale of a result that is rounded to 8 bits. As uint8, every zero point is 128."""

    @functools.cached_property
    def output_scale(self):
        return self.reference.abs().max() / 127

    @functools.cached_property
    def codes(self):
        return (self.x / self.input_scale).round().to(torch.int8)

    def sizes(self, width):
        """Bytes of the input, the int8 weight and the result, `width` an activation."""
        return width * (self.x.numel() + self.reference.numel()) + self.float_layer.weight.numel()

    def decoded(self, codes):
        """The float result of uint8 codes."""
        return (codes.float() - 128) * self.output_scale


# ---- from float32 to float32 -----------------------------------------------------------------------------------------------

# Each contender makes a call from a problem. An exception is the reason why it is missing.


def torch_ao_packed(engine, p):
    run.use_engine(engine)
    s, zeros = p.shape, torch.zeros(p.shape.O, dtype=torch.long)
    weight = torch.quantize_per_channel(p.float_layer.weight, p.int8_layer.weight_scale.double(), zeros, 0, torch.qint8)
    return torch.ops.quantized.conv2d_prepack(weight, p.float_layer.bias, [s.s, s.s], [s.p, s.p], [s.d, s.d], s.groups)


def torch_ao(engine, p):
    packed, x, input_scale, output_scale = torch_ao_packed(engine, p), p.x, p.input_scale.item(), p.output_scale.item()
    convolve = torch.ops.quantized.conv2d

    def call():
        codes = torch.quantize_per_tensor(x, input_scale, 128, torch.quint8)
        return convolve(codes, packed, output_scale, 128).dequantize()

    return call


def onnx_static(p, nodes, x, y):
    """The call of some nodes around QLinearConv, whose tensors here have their channels last."""
    import onnx

    types = {torch.float32: onnx.TensorProto.FLOAT, torch.uint8: onnx.TensorProto.UINT8}
    tensor, value = onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    s, scales = p.shape, {"x_scale": p.input_scale, "y_scale": p.output_scale}
    products = p.int8_layer.weight_scale * scales["x_scale"]
    weights = scales | {
        "zero": torch.tensor(128, dtype=torch.uint8),
        "w": p.int8_layer.qweight.contiguous(),
        "w_scale": p.int8_layer.weight_scale,
        "w_zero": torch.zeros(s.O, dtype=torch.int8),
        "bias": (p.float_layer.bias / products).round().to(torch.int32),
    }
    convolution = onnx.helper.make_node(
        "QLinearConv",
        ["x_codes", "x_scale", "zero", "w", "w_scale", "w_zero", "y_scale", "zero", "bias"],
        ["y_codes"],
        domain="com.microsoft",
        channels_last=1,
        strides=[s.s] * 2,
        pads=[s.p] * 4,
        dilations=[s.d] * 2,
        group=s.groups,
    )
    before, after = nodes
    graph = onnx.helper.make_graph(
        [*before, convolution, *after],
        "conv2d",
        [value("x" if before else "x_codes", types[x.dtype], x.shape)],
        [value("y" if after else "y_codes", types[y.dtype], y.shape)],
        [tensor(weight.numpy(), name) for name, weight in weights.items()],
    )
    model = run.onnx_model(graph, {"com.microsoft": 1}).SerializeToString()
    return run.onnx_call(model, torch.get_num_threads(), {graph.input[0].name: x.numpy()}, y.numpy(), graph.output[0].name)


def onnx_runtime(p):
    """QuantizeLinear, QLinearConv, DequantizeLinear."""
    import onnx

    node = onnx.helper.make_node
    nodes = (
        [node("QuantizeLinear", ["x", "x_scale", "zero"], ["x_codes"])],
        [node("DequantizeLinear", ["y_codes", "y_scale", "zero"], ["y"])],
    )
    y = torch.empty_like(p.reference.permute(0, 2, 3, 1))
    call = onnx_static(p, nodes, p.x.permute(0, 2, 3, 1), y)
    call.result = lambda: torch.as_tensor(call()).permute(0, 3, 1, 2)
    return call


def onnx_runtime_dynamic(p):
    """quantize_dynamic: DynamicQuantizeLinear and ConvInteger, on NCHW."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    s, tensor, value = p.shape, onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    settings = {"strides": [s.s] * 2, "pads": [s.p] * 4, "dilations": [s.d] * 2, "group": s.groups}
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Conv", ["x", "w", "b"], ["y"], "conv", **settings)],
        "conv2d",
        [value("x", onnx.TensorProto.FLOAT, p.x.shape)],
        [value("y", onnx.TensorProto.FLOAT, p.reference.shape)],
        [tensor(p.float_layer.weight.contiguous().numpy(), "w"), tensor(p.float_layer.bias.numpy(), "b")],
    )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(run.onnx_model(graph), source)
        quantize_dynamic(source, target, weight_type=QuantType.QInt8)
        y = torch.empty(p.reference.shape).numpy()
        return run.onnx_call(target, torch.get_num_threads(), {"x": p.x.contiguous().numpy()}, y)


# ---- from codes to codes ---------------------------------------------------------------------------------------------------

# A call that returns codes has a `result`, which gives what they stand for.


def ours_int8(p):
    layer, x = qo.QuantConv2d.from_float(p.float_layer, input_scale=p.input_scale, output_scale=p.output_scale), p.codes

    def call():
        return layer(x)

    call.result = lambda: call().float() * p.output_scale
    return call


def torch_ao_int8(engine, p):
    packed, output_scale, convolve = torch_ao_packed(engine, p), p.output_scale.item(), torch.ops.quantized.conv2d
    x = torch.quantize_per_tensor(p.x, p.input_scale.item(), 128, torch.quint8)

    def call():
        return convolve(x, packed, output_scale, 128)

    call.result = lambda: call().dequantize()
    return call


def onnx_runtime_int8(p):
    x = (p.codes.int() + 128).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    y = torch.empty(p.reference.permute(0, 2, 3, 1).shape, dtype=torch.uint8)
    call = onnx_static(p, ([], []), x, y)
    call.result = lambda: p.decoded(torch.as_tensor(call())).permute(0, 3, 1, 2)
    return call


FLOAT = {
    "ours dynamic": ours_dynamic,
    "ours static": ours_static,
    "fp32": functools.partial(floating, torch.float32),
    "bf16": functools.partial(floating, torch.bfloat16),
    "torch.ao x86": functools.partial(torch_ao, "x86"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "ONNX Runtime": onnx_runtime,
    "ONNX Runtime dynamic": onnx_runtime_dynamic,
}
INT8 = {
    "ours": ours_int8,
    "torch.ao x86": functools.partial(torch_ao_int8, "x86"),
    "torch.ao onednn": functools.partial(torch_ao_int8, "onednn"),
    "ONNX Runtime": onnx_runtime_int8,
}


# ---- the run ---------------------------------------------------------------------------------------------------------------


def measure(name, shape, results):
    torch.manual_seed(0)
    problem = Problem(shape)
    for stem, contenders, width in (("conv2d", FLOAT, 4), ("conv2d int8", INT8, 1)):
        results.measure(
            contenders,
            problem,
            reference=problem.reference,
            least=LEAST_SQNR,
            case=str(shape),
            label=f"{{}} ({stem})",
            limit_us=machine.limit_us(shape.macs, problem.sizes(width), results.machine),
            stem=stem,
            set=name,
            shape=str(shape),
        )


def main():
    parser = run.parser(__doc__, seconds=0.5)
    sets = {name: functools.partial(networks.conv_shapes, name) for name in ("resnet-50", "mobilenet-v2")} | shapes.PACKAGES_CONV
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--sets", nargs="+", choices=["smoke", "default", *sets], default=["default"])
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime recommends a step for which one layer has no use
    torch.set_num_threads(options.threads)
    results = run.Run("conv2d", options)
    chosen = {"smoke": shapes.SMOKE, "default": sets.keys() - shapes.SMOKE}
    for name in sorted({name for choice in options.sets for name in chosen.get(choice, [choice])}, key=list(sets).index):
        for shape in sets[name]() if callable(sets[name]) else sets[name]:
            measure(name, shape, results)
    results.finish()


if __name__ == "__main__":
    main()
