"""One Linear in every package that is installed, and what the scripts share: timing in turns, the machine, its limits.

Read next: linear.py, conv2d.py, networks.py, bench_model.py, README.md.
"""

import argparse
import concurrent.futures
import copy
import ctypes
import datetime
import functools
import gc
import importlib.metadata
import os
import random
import tempfile
import time
import warnings
from pathlib import Path

import torch
from conftest import _peak_gops, sqnr
from torch import nn

import quant_ops as qo
from quant_ops import info

LEAST_SQNR = 30.0  # dB against float32, of every Linear that is timed
PACKAGES = ("torchao", "onnxruntime", "onnx", "transformers")


# ---- one Linear --------------------------------------------------------------------------------------------------------


class Problem:
    """One layer's data: float x, layer and result."""

    def __init__(self, shape, threads):
        generator = torch.Generator().manual_seed(0)
        self.shape, self.threads = shape, threads
        self.x = torch.randn(shape.M, shape.K, generator=generator)
        self.linear = nn.Linear(shape.K, shape.N).requires_grad_(False)
        self.linear.weight.copy_(torch.randn(shape.N, shape.K, generator=generator) / shape.K**0.5)
        self.linear.bias.copy_(torch.randn(shape.N, generator=generator))
        self.reference = self.linear(self.x)


# Each contender: from a problem to a call that goes from float activations to float results. Weights are prepared before it.
# An exception is the reason why a contender is missing.


def ours_dynamic(p):
    layer, x = qo.QuantLinear.from_float(p.linear), p.x
    return lambda: layer(x)


def ours_static(p):
    layer, x = qo.QuantLinear.from_float(p.linear, input_scale=p.x.abs().max() / 127), p.x
    return lambda: layer(x)


def ours_dynamic_bf16(p):
    layer, x = qo.QuantLinear.from_float(p.linear), p.x.bfloat16()
    return lambda: layer(x)


def fp32(p):
    layer, x = p.linear, p.x
    return lambda: layer(x)


def bf16(p):
    layer, x = copy.deepcopy(p.linear).bfloat16(), p.x.bfloat16()
    return lambda: layer(x)


def torch_ao(engine, p):
    use_engine(engine)
    linear = copy.deepcopy(p.linear)
    linear.qconfig = torch.ao.quantization.per_channel_dynamic_qconfig
    layer, x = torch.ao.nn.quantized.dynamic.Linear.from_float(linear), p.x
    return lambda: layer(x)


def use_engine(engine):
    """Chooses who packs the int8 weights of torch.ao from now on."""
    if engine not in torch.backends.quantized.supported_engines:
        raise RuntimeError(f"torch {torch.__version__} lacks the engine {engine} here")
    torch.backends.quantized.engine = engine


def int_mm(p):
    layer, x = qo.QuantLinear.from_float(p.linear), p.x
    weight, weight_scale, bias = layer.weight.t(), layer.weight_scale, p.linear.bias

    def call():
        scale = x.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (x / scale).round().to(torch.int8)
        return torch.addcmul(bias, torch._int_mm(codes, weight) * scale, weight_scale)

    return call


def torchao(p):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    layer, x = nn.Sequential(copy.deepcopy(p.linear)), p.x
    quantize_(layer, Int8DynamicActivationInt8WeightConfig())
    return lambda: layer(x)


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
        [tensor(p.linear.weight.t().contiguous().numpy(), "w"), tensor(p.linear.bias.numpy(), "b")],
    )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
        onnx.save(onnx_model(graph), source)
        quantize_dynamic(source, target, per_channel=True, weight_type=QuantType.QInt8)
        return onnx_call(target, p.threads, {"x": p.x.numpy()}, torch.empty(M, N).numpy())


def onnx_model(graph, domains=()):
    """A model of an operator set and format that ONNX Runtime has long read."""
    import onnx

    sets = [onnx.helper.make_opsetid(*item) for item in ({"": 17} | dict(domains)).items()]
    return onnx.helper.make_model(graph, opset_imports=sets, ir_version=8)


def onnx_call(model, threads, inputs, y, output="y"):
    """A call of an ONNX file or its bytes, whose inputs and output stay in place."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # or its threads would slow the next contender
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    binding.bind_output(output, "cpu", 0, y.dtype, y.shape, y.ctypes.data)

    def call():
        session.run_with_iobinding(binding)
        return y

    call.keep = inputs  # the binding holds addresses only
    return call


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours static": ours_static,
    "ours dynamic bf16": ours_dynamic_bf16,
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "torch._int_mm": int_mm,
    "torchao": torchao,
    "torchao compiled": torchao_compiled,
    "ONNX Runtime": onnx_runtime,
}


def prepare(contenders, *arguments, reference, least=LEAST_SQNR):
    """(the calls, their distances from the reference in dB, and why contenders are missing). A missing one of ours is an error."""
    calls, distances, missing = {}, {}, {}
    for name, contender in contenders.items():
        try:
            with warnings.catch_warnings(), torch.inference_mode(mode=False), torch.no_grad():
                warnings.simplefilter("ignore")  # torch.ao announces its removal
                call = contender(*arguments)
            with torch.inference_mode():
                distance = sqnr(reference, torch.as_tensor(getattr(call, "result", call)()))
            if not distance > least:
                raise ArithmeticError(f"{distance:.1f} dB from float32, expected more than {least:.0f}")
            calls[name], distances[name] = call, distance
        except Exception as error:
            if name.startswith("ours"):
                raise
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"
    return calls, distances, missing


# ---- timing ------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def interleave(calls, seconds, rounds):
    """Seconds of every call, all contenders in turn and in a new order each round: other work and the clock meet all alike.

    A turn is one untimed call, which brings the caches back, and then about 2 ms of timed ones, at least one. There are at least
    `rounds` rounds, and as many as fit in `seconds`.
    """
    times = {name: [] for name in calls}
    order, shuffle, settle = list(calls), random.Random(0).shuffle, torch.get_num_threads() > 1
    gc.collect()
    gc.disable()
    end, done = time.perf_counter() + seconds, 0
    while done < rounds or time.perf_counter() < end:
        shuffle(order)
        for name in order:
            call, own = calls[name], times[name]
            if settle:
                time.sleep(0.01)  # until the threads of the one before have stopped looking for work
            call()
            until = time.perf_counter() + 0.002
            while True:
                start = time.perf_counter()
                call()
                now = time.perf_counter()
                own.append(now - start)
                if now >= until:
                    break
        done += 1
    gc.enable()
    return times


def timed(calls, distances, options, **columns):
    """A row per call, after `options.rounds` rounds and `options.seconds` seconds."""
    times = interleave(calls, options.seconds, options.rounds)
    rows = (row(times[name], contender=name, **columns) for name in calls)
    return [r | {"sqnr_db": round(min(distances[r["contender"]], 300), 1)} for r in rows]  # 300: the same result


def row(times, digits=4, **others):
    """One result: the rounded minimum and median in microseconds."""
    ordered = sorted(times)
    figures = {"min_us": ordered[0] * 1e6, "median_us": ordered[len(ordered) // 2] * 1e6}
    return others | {key: float(f"{value:.{digits}g}") for key, value in figures.items()} | {"calls": len(ordered)}


# ---- the machine and its limits ----------------------------------------------------------------------------------------


def machine(cpu=None):
    """The processor, versions, threads, load, and the int8 peak of those threads (None without the module of micro-kernels)."""
    report = info.collect()
    assert report["status"] == "OK", report["status"]
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu or report["cpu"],
        **{key: report[key] for key in ("isa", "threads", "torch", "quant_ops", "python")},
        "packages": versions,
        "kernel": report["kernels"]["int8_linear"],
        "date": datetime.date.today().isoformat(),
        "load_before": round(os.getloadavg()[0], 2),
        "peak_gops": _peak_gops(report["isa"], report["threads"]),
    }


@functools.lru_cache
def read_gbs(size, threads):
    """GB/s of `threads` threads that read a buffer of `size` bytes again and again with C's memchr, each its own part."""
    memchr = ctypes.CDLL(None).memchr
    memchr.argtypes, memchr.restype = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t], ctypes.c_void_p
    part = max(size // threads, 1 << 18)  # in less, the call itself would be measured
    buffer = torch.ones(part * threads, dtype=torch.uint8)
    repeats, best = max(2, (1 << 26) // part), 0.0

    def read(thread):
        for _ in range(repeats):
            assert memchr(buffer.data_ptr() + thread * part, 0, part) is None

    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        end = time.perf_counter() + 0.3
        while (start := time.perf_counter()) < end:
            list(pool.map(read, range(threads)))
            best = max(best, part * threads * repeats / (time.perf_counter() - start) / 1e9)
    return best


def limit_us(macs, size, threads, peak_gops):
    """The time below which no int8 layer can be: all products at the peak, or one pass over `size` bytes."""
    if peak_gops is None:
        return None
    return max(2 * macs / peak_gops, size / read_gbs(size, threads)) / 1e3


# ---- command lines -----------------------------------------------------------------------------------------------------


def parser(document, **defaults):
    """The options of a script that times whole models."""
    arguments = argparse.ArgumentParser(description=document, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}), help="default: 1 and all"
    )
    arguments.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    arguments.add_argument("--seconds", type=float, help="per batch and number of threads (default %(default)s)")
    arguments.add_argument("--rounds", type=int, default=5, help="at least (default %(default)s)")
    arguments.add_argument("--smoke", action="store_true", help="small models, to see that it runs")
    arguments.add_argument("--out", type=Path, help="JSON")
    arguments.add_argument("--cpu", help="a better name for the processor")
    arguments.set_defaults(**defaults)
    return arguments
