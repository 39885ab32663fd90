"""Times ResNet-50 and MobileNetV2, whole: float, bfloat16, quant_ops, torch's int8 and ONNX Runtime's.

python -m benchmarks.packages.networks --out networks.json             batch 1 and 8, one thread and all: about ten minutes
python -m benchmarks.packages.networks --networks mobilenet-v2 --batch 1
python -m benchmarks.packages.networks --smoke                         small ones, to see that it runs

Random weights, settled running statistics, BatchNorms folded by fold_batchnorm_. Every contender starts from these folded networks
and is calibrated, where it needs to be, with the same images. Activations are ReLU throughout, also in MobileNetV2, as in
torchvision's quantizable one, because torch fuses no ReLU6. Read next: run.py, conv2d.py.
"""

import copy
import functools
import logging
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.packages import run

LEAST_SQNR = 15.0  # dB against float32: the errors of fifty layers add up


# ---- the networks --------------------------------------------------------------------------------------------------------


def block(inputs, outputs, kernel=1, stride=1, groups=1, relu=True):
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if relu else []))


def is_block(module):
    return type(module) is nn.Sequential and isinstance(module[0], nn.Conv2d)


class Join(nn.Module):
    """The end of a residual block."""

    def __init__(self, relu):
        super().__init__()
        self.relu = relu

    def forward(self, x, y):
        return torch.relu_(x + y) if self.relu else x + y


class Residual(nn.Module):
    """A chain of blocks beside a shortcut."""

    def __init__(self, body, shortcut, relu):
        super().__init__()
        self.body, self.shortcut, self.join = body, shortcut, Join(relu)

    def forward(self, x):
        return self.join(self.body(x), self.shortcut(x))


def resnet(depths, width, classes):
    layers, channels = [block(3, width, 7, 2), nn.MaxPool2d(3, 2, 1)], width
    for stage, depth in enumerate(depths):
        hidden = width << stage
        for i in range(depth):
            stride = 2 if stage and not i else 1
            body = nn.Sequential(block(channels, hidden), block(hidden, hidden, 3, stride), block(hidden, 4 * hidden, relu=False))
            shortcut = nn.Identity() if i else block(channels, 4 * hidden, 1, stride, relu=False)
            layers.append(Residual(body, shortcut, relu=True))
            channels = 4 * hidden
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def mobilenet_v2(stages, stem, last, classes):
    layers, channels = [block(3, stem, 3, 2)], stem
    for expansion, outputs, depth, first_stride in stages:
        for i in range(depth):
            hidden, stride = expansion * channels, 1 if i else first_stride
            body = nn.Sequential(
                *([block(channels, hidden)] if expansion > 1 else []),
                block(hidden, hidden, 3, stride, hidden),
                block(hidden, outputs, relu=False),
            )
            layers.append(Residual(body, nn.Identity(), relu=False) if stride == 1 and channels == outputs else body)
            channels = outputs
    return nn.Sequential(*layers, block(channels, last), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(last, classes))


# expansion, outputs, depth, stride
STAGES = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]

NETWORKS = {
    "resnet-50": functools.partial(resnet, (3, 4, 6, 3), 64, 1000),
    "mobilenet-v2": functools.partial(mobilenet_v2, STAGES, 32, 1280, 1000),
}
SMALL = {
    "resnet-50": functools.partial(resnet, (2, 1), 8, 10),
    "mobilenet-v2": functools.partial(mobilenet_v2, [(1, 8, 1, 1), (6, 8, 2, 2)], 8, 32, 10),
}


def conv_shapes(name, batch=1, size=224):
    """The distinct convolutions of a network, in their order."""
    seen = {}

    def note(conv, args, output):
        seen[
            shapes.Conv(*args[0].shape[:3], conv.out_channels, conv.kernel_size[0], conv.padding[0], conv.stride[0], conv.groups)
        ] = 1

    with torch.device("meta"):
        network = NETWORKS[name]().eval()
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(note)
        network(torch.empty(batch, 3, size, size))
    return list(seen)


class Problem(NamedTuple):
    """A folded float network, what to calibrate it with, and what to time it on; images are channels_last."""

    network: nn.Module
    images: list
    x: torch.Tensor
    threads: int


@torch.no_grad()
def network_and_images(make, size):
    """The network as if trained: gains and offsets that differ, running statistics of a few batches. Then folded."""
    torch.manual_seed(0)
    images = [torch.randn(4, 3, size, size).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    network = make().to(memory_format=torch.channels_last)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.2)
            module.momentum = None  # the mean over all batches
    for module in network.modules():
        if isinstance(module, Residual):
            module.body[-1][1].weight.mul_(0.25)  # trained branches are small beside their shortcuts
    for batch in images:
        network(batch)
    network.eval().requires_grad_(False)
    expected = network(images[0])
    result = qo.fold_batchnorm_(network)
    assert not result.skipped, result
    assert (network(images[0]) - expected).norm() < 1e-4 * expected.norm()
    return network, images


# ---- contenders ----------------------------------------------------------------------------------------------------------

# Each contender makes a call from a problem. All but ONNX Runtime, which has a layout of its own, get channels_last images.


def fp32(p):
    return lambda: p.network(p.x)


def bf16(p):
    network, x = copy.deepcopy(p.network).bfloat16(), p.x.bfloat16()
    return lambda: network(x)


def ours_dynamic(p):
    network, x = copy.deepcopy(p.network), p.x
    qo.quantize_(network, qo.Int8Dynamic(asymmetric=False))
    return lambda: network(x)


def input_parameters(network, images):
    """Scale and zero point of every layer's input, from its least and greatest value; without negative values for all 256 codes."""
    ranges, handles = {}, []

    def note(layer, args):
        low, high = ranges.get(layer, (0.0, 0.0))
        ranges[layer] = min(low, args[0].min().item()), max(high, args[0].max().item())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            handles.append(layer.register_forward_pre_hook(note))
    for batch in images:
        network(batch)
    for handle in handles:
        handle.remove()
    return {
        layer: {"scale": high / 255, "zero_point": -128} if low == 0 else {"scale": max(-low, high) / 127, "zero_point": None}
        for layer, (low, high) in ranges.items()
    }


def ours_static(chained, p):
    """Fixed input scales, fused ReLU; chained: int8 from one convolution to the next inside of a residual block."""
    network, x = copy.deepcopy(p.network), p.x
    parameters = input_parameters(network, p.images)

    def convert(parent, following=None):
        """`following`: the layer that alone takes the output of `parent`."""
        children = list(parent.named_children())
        for i, (name, child) in enumerate(children):
            if isinstance(child, nn.Conv2d | nn.Linear):
                kind = qo.QuantConv2d if isinstance(child, nn.Conv2d) else qo.QuantLinear
                settings = {f"input_{key}": value for key, value in parameters[child].items()}
                if following is not None:
                    settings |= {f"output_{key}": value for key, value in parameters[following].items()}
                relu = isinstance(children[-1][1], nn.ReLU)
                setattr(parent, name, kind.from_float(child, relu=relu, **settings))
                if relu:
                    setattr(parent, children[-1][0], nn.Identity())
            else:
                after = children[i + 1][1] if chained and type(parent) is nn.Sequential and i + 1 < len(children) else None
                convert(child, after[0] if is_block(child) and is_block(after) else None)

    convert(network)
    return lambda: network(x)


class QuantizedJoin(nn.Module):
    """torch.ao observes the sum in a FloatFunctional."""

    def __init__(self, relu):
        super().__init__()
        self.sum = torch.ao.nn.quantized.FloatFunctional()
        self.relu = relu

    def forward(self, x, y):
        return self.sum.add_relu(x, y) if self.relu else self.sum.add(x, y)


def torch_ao(engine, p):
    """Eager static quantization with the engine's own configuration: int8 from the first layer to the last."""
    run.use_engine(engine)
    network = copy.deepcopy(p.network)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Join):
                setattr(parent, name, QuantizedJoin(child.relu))
        if is_block(parent) and isinstance(parent[-1], nn.ReLU):
            parent[0], parent[-1] = torch.ao.nn.intrinsic.ConvReLU2d(parent[0], parent[-1]), nn.Identity()
    network = torch.ao.quantization.QuantWrapper(network).eval()
    network.qconfig = torch.ao.quantization.get_default_qconfig(engine)
    torch.ao.quantization.prepare(network, inplace=True)
    for batch in p.images:
        network(batch)
    torch.ao.quantization.convert(network, inplace=True)
    x = p.x
    return lambda: network(x)


def onnx_graph(network, x):
    """The network in ONNX's operators, from its torch.fx graph. It knows the layers of this file."""
    import onnx

    tensor, value = onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    nodes, weights, names = [], [], {}
    for node in torch.fx.symbolic_trace(network).graph.nodes:
        inputs, attributes = [names[n] for n in node.all_input_nodes], {}
        layer = network.get_submodule(node.target) if node.op == "call_module" else None
        if isinstance(layer, nn.Conv2d | nn.Linear):
            for name, weight in ((f"{node.name}.weight", layer.weight), (f"{node.name}.bias", layer.bias)):
                weights.append(tensor(weight.contiguous().numpy(), name))
                inputs.append(name)
        if isinstance(layer, nn.Conv2d):
            kind, attributes = "Conv", {
                "strides": layer.stride, "pads": layer.padding * 2, "dilations": layer.dilation, "group": layer.groups
            }  # fmt: skip
        elif isinstance(layer, nn.Linear):
            kind, attributes = "Gemm", {"transB": 1}
        elif isinstance(layer, nn.ReLU) or node.target is torch.relu_:
            kind = "Relu"
        elif isinstance(layer, nn.MaxPool2d):
            kind = "MaxPool"
            attributes = {"kernel_shape": [layer.kernel_size] * 2, "strides": [layer.stride] * 2, "pads": [layer.padding] * 4}
        elif isinstance(layer, nn.AdaptiveAvgPool2d):
            kind = "GlobalAveragePool"
        elif isinstance(layer, nn.Flatten):
            kind = "Flatten"
        elif node.op == "call_function" and node.target.__name__ == "add":
            kind = "Add"
        elif node.op == "placeholder":
            names[node] = "x"
            continue
        elif isinstance(layer, nn.Identity) or node.op == "output":
            names[node] = inputs[0]
            continue
        else:
            raise NotImplementedError(f"an ONNX operator for {node.format_node()}")
        names[node] = node.name
        nodes.append(onnx.helper.make_node(kind, inputs, [node.name], node.name, **attributes))
    nodes[-1].output[0] = "y"
    floats, result = onnx.TensorProto.FLOAT, network(x[:1])
    return onnx.helper.make_graph(
        nodes,
        "network",
        [value("x", floats, ["batch", *x.shape[1:]])],
        [value("y", floats, ["batch", *result.shape[1:]])],
        weights,
    )


def onnx_runtime(p):
    """quantize_static: int8 with one scale per output channel, uint8 activations, in the QDQ format that its optimizer fuses."""
    import onnx
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

    class Images(CalibrationDataReader):
        def __init__(self):
            self.left = [{"x": batch.contiguous().numpy()} for batch in p.images]

        def get_next(self):
            return self.left.pop() if self.left else None

    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(run.onnx_model(onnx_graph(p.network, p.x)), source)
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(source, target, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
        y = torch.empty_like(p.network(p.x)).numpy()
        return run.onnx_call(target, p.threads, {"x": p.x.contiguous().numpy()}, y)


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours static": functools.partial(ours_static, False),
    "ours static chained": functools.partial(ours_static, True),
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao x86": functools.partial(torch_ao, "x86"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "ONNX Runtime": onnx_runtime,
}


# ---- the run -------------------------------------------------------------------------------------------------------------


def main():
    parser = run.model_parser(__doc__, seconds=20.0)
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime recommends a step that fold_batchnorm_ has done
    results = run.Run("networks", options, options.threads)
    size = 32 if options.smoke else 224
    for name in options.networks:
        network, images = network_and_images((SMALL if options.smoke else NETWORKS)[name], size)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
                shape = f"{batch}x3x{size}x{size}"
                results.measure(
                    CONTENDERS,
                    Problem(network, images, x, threads),
                    reference=network(x),
                    least=LEAST_SQNR,
                    case=f"{name} {shape}, {threads} thread(s)",
                    stem=name,
                    shape=shape,
                    batch=batch,
                    threads=threads,
                )
    results.finish()


if __name__ == "__main__":
    main()
