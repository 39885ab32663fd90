"""Times one Linear in quant_ops and in every other package that is installed.

python -m benchmarks.packages.linear                                   all shapes, one thread: minutes, mostly torchao's compilation
python -m benchmarks.packages.linear --threads 8 --out linear-8.json
python -m benchmarks.packages.linear --shapes smoke --seconds 0
"""

import copy
import functools
import tempfile
from pathlib import Path

import torch
from torch import nn

from benchmarks.common import machine, shapes
from benchmarks.common.problems import LinearProblem, floating, ours_dynamic, ours_static
from benchmarks.packages import run

LEAST_SQNR = 30.0  # dB against float32


# Each contender makes from a problem a call that goes from float activations to float results. Weights are prepared before it. An
# exception is the reason why a contender is missing.


def ours_dynamic_bf16(p):
    return functools.partial(p.int8_layer, p.x.bfloat16())


def torch_ao(engine, p):
    run.use_engine(engine)
    linear = copy.deepcopy(p.float_layer)
    linear.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    return functools.partial(torch.ao.nn.quantized.dynamic.Linear.from_float(linear), p.x)


def int_mm(p):
    x, weight, weight_scale, bias = p.x, p.int8_layer.qweight.t(), p.int8_layer.weight_scale, p.float_layer.bias

    def call():
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (x / scale).round().to(torch.int8)
        return torch.addcmul(bias, torch._int_mm(codes, weight) * scale, weight_scale)

    return call


def torchao(p):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer = nn.Sequential(copy.deepcopy(p.float_layer))
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return functools.partial(layer, p.x)


def torchao_compiled(p):
    import torch._inductor.config as settings

    eager = torchao(p)
    settings.freezing = True  # lays the weight out once
    torch.compiler.reset()
    return torch.compile(eager, fullgraph=True, dynamic=False)


def onnx_runtime(p):
    """quantize_dynamic: DynamicQuantizeLinear and MatMulInteger, which ONNX Runtime fuses. Its input and output stay in place."""
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    M, N, K = p.shape
    tensor, value = onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", "w"], ["xw"]), onnx.helper.make_node("Add", ["xw", "b"], ["y"])],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, [M, K])],
        [value("y", onnx.TensorProto.FLOAT, [M, N])],
        [tensor(p.float_layer.weight.t().contiguous().numpy(), "w"), tensor(p.float_layer.bias.numpy(), "b")],
    )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(run.onnx_model(graph), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return run.onnx_call(target, torch.get_num_threads(), {"x": p.x.numpy()}, torch.empty(M, N).numpy())


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours static": ours_static,
    "ours dynamic bf16": ours_dynamic_bf16,
    "fp32": functools.partial(floating, torch.float32),
    "bf16": functools.partial(floating, torch.bfloat16),
    "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "torch._int_mm": int_mm,
    "torchao": torchao,
    "torchao compiled": torchao_compiled,
    "ONNX Runtime": onnx_runtime,
}


# ---- the run -----------------------------------------------------------------------------------------------------------


def main():
    parser = run.parser(__doc__, seconds=5.0, rounds=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", choices=["smoke", "default"], default="default")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = run.Run("linear", options)
    for name, group in shapes.PACKAGES_LINEAR.items():
        for shape in group if options.shapes == "default" or name in shapes.SMOKE else ():
            torch.manual_seed(0)
            problem = LinearProblem(shape)
            results.measure(
                CONTENDERS,
                problem,
                reference=problem.reference,
                least=LEAST_SQNR,
                case=str(shape),
                limit_us=machine.limit_us(shape.macs, shape.N * shape.K, results.machine),
                stem="linear",
                set=name,
                shape=str(shape),
            )
    results.finish()


if __name__ == "__main__":
    main()
