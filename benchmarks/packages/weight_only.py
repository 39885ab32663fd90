"""Times one Linear with a weight of 4 or 8 bits in quant_ops and in every other package that is installed.

python -m benchmarks.packages.weight_only                              all shapes, one thread: minutes
python -m benchmarks.packages.weight_only --threads 2 --rows 1 512 --out weight-only-2.json
python -m benchmarks.packages.weight_only --shapes smoke --seconds 0

Weights of 4 bits have groups of 128 with zero points, those of 8 bits a scale a row. A8 quantizes the rows of x, A16 multiplies
floats.
"""

import copy
import functools
import time

import torch
from torch import nn
from torch.nn import functional as F

import quant_ops as qo
from benchmarks.common import machine, shapes
from benchmarks.common.problems import LinearProblem, floating
from benchmarks.packages import run

GROUP = 128
LEAST_SQNR = {4: 15.0, 8: 30.0}  # dB against float32


class Problem(LinearProblem):
    @functools.cached_property
    def nibbles(self):
        """(codes in [-8, 7], scales and integer zero points [N, groups] of `weight`)."""
        weight = self.float_layer.weight
        scale, zero = qo.choose_qparams_affine(weight, "ASYMMETRIC", (1, GROUP), torch.uint4, zero_point_dtype=torch.int32)
        codes = qo.quantize_affine(weight, (1, GROUP), scale, zero, torch.uint4)
        return codes.to(torch.int8) - 8, scale, (zero - 8).to(torch.int8)

    @functools.cached_property
    def bytes(self):
        """(codes, scales [N])"""
        return self.int8_layer.qweight, self.int8_layer.weight_scale.flatten()


# Each contender makes from a problem a call that goes from float activations to float results. Weights are prepared before it. An
# exception is the reason why a contender is missing.


def ours(bits, dynamic, dtype, p):
    codes, scale, zero = p.nibbles if bits == 4 else (*p.bytes, None)
    group = GROUP if bits == 4 else -1
    packed, x, bias = qo.pack_weight_only(codes, bits, group), p.x.to(dtype), p.float_layer.bias
    return lambda: qo.weight_only_linear(x, codes, scale, zero, bias, bits, group, packed_weight=packed, dynamic=dynamic)


def int4pack_mm(dtype, p):
    """q * scale + zero for codes in [-8, 7]."""
    codes, scale, zero = p.nibbles
    packed = torch._convert_weight_to_int4pack_for_cpu(codes.int() + 8, 2)
    scales_and_zeros = torch.stack([scale, -zero * scale], 2).transpose(0, 1).contiguous().to(dtype)
    x, bias = p.x.to(dtype), p.float_layer.bias.to(dtype)
    return lambda: torch._weight_int4pack_mm_for_cpu(x, packed, GROUP, scales_and_zeros) + bias


def int8pack_mm(dtype, p):
    codes, scale = p.bytes
    x, scale, bias = p.x.to(dtype), scale.to(dtype), p.float_layer.bias.to(dtype)
    return lambda: torch._weight_int8pack_mm(x, codes, scale) + bias


def torch_ao(engine, p):
    run.use_engine(engine)
    zeros = torch.zeros(p.shape.N, dtype=torch.long)
    weight = torch.quantize_per_channel(p.float_layer.weight, p.bytes[1].double(), zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, p.float_layer.bias)
    return lambda: torch.ops.quantized.linear_dynamic(p.x, packed)


def torchao(config, p):
    from torchao import quantization

    layer = nn.Sequential(copy.deepcopy(p.float_layer))
    quantization.quantize_(layer, config(quantization))
    return functools.partial(layer, p.x)


def torchao_w4a16(ao):
    return ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=ao.PerGroup(GROUP))


def torchao_w4a8(ao):
    return ao.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=ao.PerGroup(GROUP))


def onnx_runtime(bits, accuracy_level, p):
    """MatMulNBits. accuracy_level 0 computes in float32, 4 quantizes the rows of x to int8."""
    import onnx

    M, N, K = p.shape
    tensor, value = onnx.numpy_helper.from_array, onnx.helper.make_tensor_value_info
    if bits == 4:
        codes, scale, zero = (t.contiguous() for t in p.nibbles)
        codes, zero = (codes + 8).to(torch.uint8), (zero + 8).to(torch.uint8)
        zero = F.pad(zero, (0, zero.shape[1] % 2))
        halves = [t[:, ::2] | t[:, 1::2] << 4 for t in (codes, zero)]
        weight, zeros, block = halves[0].reshape(N, K // GROUP, GROUP // 2), halves[1], GROUP
    else:
        weight = (p.bytes[0].int() + 128).to(torch.uint8).reshape(N, K // GROUP, GROUP)
        scale, zeros, block = p.bytes[1][:, None].expand(N, K // GROUP), torch.full((N, K // GROUP), 128, dtype=torch.uint8), GROUP
    node = onnx.helper.make_node(
        "MatMulNBits",
        ["x", "w", "scales", "zeros", "", "bias"],
        ["y"],
        domain="com.microsoft",
        K=K,
        N=N,
        bits=bits,
        block_size=block,
        accuracy_level=accuracy_level,
    )
    names = {"w": weight, "scales": scale.flatten(), "zeros": zeros.flatten(), "bias": p.float_layer.bias}
    graph = onnx.helper.make_graph(
        [node],
        "linear",
        [value("x", onnx.TensorProto.FLOAT, [M, K])],
        [value("y", onnx.TensorProto.FLOAT, [M, N])],
        [tensor(array.contiguous().numpy(), name) for name, array in names.items()],
    )
    model = run.onnx_model(graph, {"com.microsoft": 1}).SerializeToString()
    return run.onnx_call(model, torch.get_num_threads(), {"x": p.x.numpy()}, torch.empty(M, N).numpy())


FLOATING = {"fp32": functools.partial(floating, torch.float32), "bf16": functools.partial(floating, torch.bfloat16)}
CONTENDERS = {
    4: {
        "ours W4A8": functools.partial(ours, 4, True, torch.float32),
        "ours W4A16": functools.partial(ours, 4, False, torch.float32),
        "ours W4A16 bf16": functools.partial(ours, 4, False, torch.bfloat16),
        **FLOATING,
        "int4pack_mm": functools.partial(int4pack_mm, torch.float32),
        "int4pack_mm bf16": functools.partial(int4pack_mm, torch.bfloat16),
        "torchao W4A16": functools.partial(torchao, torchao_w4a16),
        "torchao W4A8": functools.partial(torchao, torchao_w4a8),
        "ONNX Runtime level 0": functools.partial(onnx_runtime, 4, 0),
        "ONNX Runtime level 4": functools.partial(onnx_runtime, 4, 4),
    },
    8: {
        "ours W8A8": functools.partial(ours, 8, True, torch.float32),
        "ours W8A16": functools.partial(ours, 8, False, torch.float32),
        "ours W8A16 bf16": functools.partial(ours, 8, False, torch.bfloat16),
        **FLOATING,
        "int8pack_mm": functools.partial(int8pack_mm, torch.float32),
        "int8pack_mm bf16": functools.partial(int8pack_mm, torch.bfloat16),
        "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
        "torch.ao onednn": functools.partial(torch_ao, "onednn"),
        "torchao W8A16": functools.partial(torchao, lambda ao: ao.Int8WeightOnlyConfig()),
        "ONNX Runtime level 0": functools.partial(onnx_runtime, 8, 0),
        "ONNX Runtime level 4": functools.partial(onnx_runtime, 8, 4),
    },
}

# ---- the run -----------------------------------------------------------------------------------------------------------


def float_gops():
    """Multiplications and additions per nanosecond of the faster of the float32 and bfloat16 products."""
    best = 0.0
    for dtype in (torch.float32, torch.bfloat16):
        x, w = torch.randn(256, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
        end = time.perf_counter() + 0.5
        while (start := time.perf_counter()) < end:
            F.linear(x, w)
            best = max(best, 2 * 256 * 1024 * 1024 / (time.perf_counter() - start) / 1e9)
    return best


def add_limits(rows, shape, bits, peaks):
    """To ours: the larger of all products at the peak of their kind, and one read of the weight at the bandwidth for its size."""
    size = shape.N * shape.K * bits // 8 + shape.N * (shape.K // GROUP * 5 if bits == 4 else 4)
    read_us = size / machine.read_gbs(size, torch.get_num_threads()) / 1e3
    for name, row in rows.items():
        peak = peaks["A8" if name.endswith("A8") else "A16"]
        if name.startswith("ours") and peak:
            limit = max(2 * shape.macs / peak / 1e3, read_us)
            row |= {"limit_us": limit, "percent_of_limit": round(100 * limit / row["min_us"], 1)}


def main():
    parser = run.parser(__doc__, seconds=3.0, rounds=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shapes", choices=["smoke", "default"], default="default")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4, 16, 128, 512])
    parser.add_argument("--bits", type=int, nargs="+", choices=[4, 8], default=[4, 8])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results = run.Run("weight_only", options)
    peaks = {"A8": results.machine["peak_gops"], "A16": float_gops()}
    results.machine["float_gops"] = peaks["A16"]
    for name, group in shapes.WEIGHT_ONLY.items():
        for n, k in group if options.shapes == "default" or name in shapes.SMOKE else ():
            for rows in options.rows if options.shapes == "default" else options.rows[:1]:
                shape = shapes.Linear(rows, n, k)
                torch.manual_seed(0)
                problem = Problem(shape)
                for bits in options.bits:
                    _, timed = results.measure(
                        CONTENDERS[bits],
                        problem,
                        reference=problem.reference,
                        least=LEAST_SQNR[bits],
                        case=str(shape),
                        label=f"{bits} bits: {{}}",
                        stem=f"{bits} bits",
                        set=name,
                        shape=str(shape),
                    )
                    add_limits(timed, shape, bits, peaks)
    results.finish()


if __name__ == "__main__":
    main()
