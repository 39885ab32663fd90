"""Times networks of convolutions, whole: float, bfloat16, quant_ops, and torch's, ONNX Runtime's and OpenVINO's int8.

python -m benchmarks.packages.networks --out networks.json             batch 1 and 8, one thread and all: half an hour
python -m benchmarks.packages.networks --networks mobilenet-v2 --batch 1
python -m benchmarks.packages.networks --networks u-net --profile      and where the time of the chained network goes, step by step
python -m benchmarks.packages.networks --smoke                         small ones, to see that it runs

The networks are those of common/networks.py, their BatchNorms folded by fold_batchnorm_. Every contender starts from these folded
networks and is calibrated, where it needs to be, with the same images. MobileNetV2 has ReLU throughout, as torchvision's
quantizable one, because torch fuses no ReLU6. Read next: run.py, conv2d.py.
"""

import copy
import dataclasses
import functools
import logging
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import quant_ops as qo
from benchmarks.common.networks import NETWORKS, SMALL, network_and_images
from benchmarks.packages import run

LEAST_SQNR = 8.0  # dB against float32: random weights, and the errors of fifty layers add up


@dataclasses.dataclass(eq=False)
class Problem:
    """A folded float network, what to calibrate it with, and what to time it on; images are channels_last."""

    network: nn.Module
    images: list
    x: torch.Tensor
    threads: int

    @functools.cached_property
    def onnx(self):
        """quantize_static: int8 with one scale per output channel, uint8 activations, in the QDQ format that optimizers fuse."""
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

        left = [{"x": batch.contiguous().numpy()} for batch in self.images]

        class Images(CalibrationDataReader):
            def get_next(self):
                return left.pop() if left else None

        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source, target = Path(folder, "float.onnx"), Path(folder, "int8.onnx")
            names = {"input_names": ["x"], "output_names": ["y"], "dynamic_shapes": [{0: torch.export.Dim("batch")}]}
            torch.onnx.export(self.network, (self.images[0],), source, dynamo=True, external_data=False, verbose=False, **names)
            types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
            quantize_static(source, target, Images(), quant_format=QuantFormat.QDQ, per_channel=True, **types)
            return target.read_bytes()


# ---- contenders ----------------------------------------------------------------------------------------------------------

# Each contender makes a call from a problem. All but ONNX Runtime and OpenVINO, which have a layout of their own, get channels_last
# images.


def fp32(p):
    return lambda: p.network(p.x)


def bf16(p):
    network, x = copy.deepcopy(p.network).bfloat16(), p.x.bfloat16()
    return lambda: network(x)


def ours_dynamic(p):
    network, x = copy.deepcopy(p.network), p.x
    qo.quantize_(network, qo.Int8Dynamic(asymmetric=False))
    return lambda: network(x)


def static(p):
    network = copy.deepcopy(p.network)
    qo.prepare_(network, qo.Int8Static())
    qo.calibrate(network, p.images)
    qo.convert_(network)
    return network


def ours_static(p):
    """Fixed input scales; floats between the layers."""
    network, x = static(p), p.x
    return lambda: network(x)


def ours_chained(residual_dtype, p):
    """int8 from layer to layer, by chain_; sums of branches go on in the given dtype."""
    result = qo.chain_(static(p), (p.images[0],), calibration=p.images, residual_dtype=residual_dtype)
    network, x = result.model, p.x

    def call():
        return network(x)

    call.chains = result.chains
    return call


def torch_ao(engine, p):
    """Static quantization of the torch.fx graph with the engine's own configuration: int8 from the first layer to the last."""
    from torch.ao.quantization import get_default_qconfig_mapping, quantize_fx

    run.use_engine(engine)
    network = quantize_fx.prepare_fx(copy.deepcopy(p.network), get_default_qconfig_mapping(engine), (p.x,))
    for batch in p.images:
        network(batch)
    network, x = quantize_fx.convert_fx(network), p.x
    return lambda: network(x)


def onnx_runtime(p):
    y = torch.empty_like(p.network(p.x), memory_format=torch.contiguous_format).numpy()
    return run.onnx_call(p.onnx, p.threads, {"x": p.x.contiguous().numpy()}, y)


def openvino(p):
    import openvino

    settings = {"INFERENCE_NUM_THREADS": p.threads, "PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1}
    request = openvino.compile_model(openvino.Core().read_model(p.onnx), "CPU", settings).create_infer_request()
    x = p.x.contiguous().numpy()
    request.set_input_tensor(openvino.Tensor(x, shared_memory=True))

    def call():
        request.infer()
        return request.get_output_tensor().data

    call.keep = x
    return call


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours static": ours_static,
    "ours static chained": functools.partial(ours_chained, torch.float32),
    "ours static chained, int8 sums": functools.partial(ours_chained, torch.int8),
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao x86": functools.partial(torch_ao, "x86"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "ONNX Runtime": onnx_runtime,
    "OpenVINO": openvino,
}


# ---- the run -------------------------------------------------------------------------------------------------------------


def folded(make, size):
    network, images = network_and_images(make, size)
    expected = network(images[0])
    result = qo.fold_batchnorm_(network)
    assert not result.skipped, result
    assert (network(images[0]) - expected).norm() < 1e-4 * expected.norm()
    return network, images


def profile(calls, x):
    """Prints the steps of chained networks that are one chain; those of several have floats between them."""
    chained = {name: list(call.chains.values()) for name, call in calls.items() if hasattr(call, "chains")}
    for name, chains in chained.items():
        print(name, chains[0].times(x) if len(chains) == 1 else f"{len(chains)} chains", sep="\n")


def main():
    parser = run.model_parser(__doc__, seconds=20.0)
    parser.add_argument("--profile", action="store_true", help="print the time of every step of the chained networks")
    parser.add_argument("--networks", nargs="+", choices=list(NETWORKS), default=list(NETWORKS))
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # ONNX Runtime recommends a step that fold_batchnorm_ has done
    results = run.Run("networks", options, options.threads)
    size = 32 if options.smoke else 224
    for name in options.networks:
        network, images = folded((SMALL if options.smoke else NETWORKS)[name], size)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                x = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
                shape = f"{batch}x3x{size}x{size}"
                calls, _ = results.measure(
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
                if options.profile:
                    profile(calls, x)
    results.finish()


if __name__ == "__main__":
    main()
