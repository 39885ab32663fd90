"""Whole models on a GPU, bfloat16 against int8: eager and by the replay of a CUDA graph; results are added to check.py's JSON.

python -m benchmarks.gpu.models --out out/gpu_check.json --seconds 100

Models are built from their configurations with random weights, by whichever of transformers, timm, torchvision and diffusers is
installed. int8 is dynamic (``Int8Dynamic()``), and for networks of convolutions static as well. Read next: record.py.
"""

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import quant_ops as qo
from benchmarks.common.contenders import in_one_line
from benchmarks.gpu.record import Record
from quant_ops.report.error import sqnr

DTYPE = torch.bfloat16
ROUNDS = 5
Inputs = tuple[tuple, dict]


def llama(device: str) -> tuple[nn.Module, dict[str, Inputs]]:
    import transformers

    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=4, vocab_size=32000)
    model = transformers.LlamaModel(config)
    tokens = {"prefill 1x2048": (1, 2048), "decode 1": (1, 1), "decode 64": (64, 1)}
    return model, {what: ((torch.randint(0, 32000, shape, device=device),), {"use_cache": False}) for what, shape in tokens.items()}


def images(device: str, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=device, dtype=DTYPE).contiguous(memory_format=torch.channels_last)


def vit(device: str) -> tuple[nn.Module, dict[str, Inputs]]:
    import timm

    return timm.create_model("vit_large_patch16_224"), {"batch 32": ((images(device, 32, 3, 224, 224),), {})}


def resnet(device: str) -> tuple[nn.Module, dict[str, Inputs]]:
    import torchvision

    model = torchvision.models.resnet50().eval()
    qo.fold_batchnorm_(model)
    return model, {f"batch {n}": ((images(device, n, 3, 224, 224),), {}) for n in (1, 32)}


def unet(device: str) -> tuple[nn.Module, dict[str, Inputs]]:
    import diffusers

    down, up = ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"], ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3
    channels = {"block_out_channels": (320, 640, 1280, 1280), "in_channels": 4, "out_channels": 4}
    blocks = {"down_block_types": down, "up_block_types": up, "layers_per_block": 2}
    model = diffusers.UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8, **channels, **blocks)
    text = torch.randn(2, 77, 768, device=device, dtype=DTYPE)
    return model, {"2x4x64x64": ((images(device, 2, 4, 64, 64), torch.tensor(500, device=device), text), {"return_dict": False})}


MODELS = {"Llama-8B, 4 layers": llama, "ViT-L/16": vit, "ResNet-50": resnet, "SD-1.5 U-Net": unet}
STATIC = {"ResNet-50", "SD-1.5 U-Net"}


def tensor_of(result: Any) -> torch.Tensor:
    if isinstance(result, torch.Tensor):
        return result
    return result[0] if isinstance(result, tuple) else next(iter(result.values()))


def milliseconds(run: Callable[[], Any]) -> float:
    """The least of some runs, by events; the first ones warm up."""
    run(), run()
    times = []
    for _ in range(ROUNDS):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return min(times)


def graph_milliseconds(run: Callable[[], Any]) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run(), run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    least = milliseconds(graph.replay)
    del kept
    return least


def contenders(name: str, model: nn.Module, inputs: dict[str, Inputs]) -> Iterator[tuple[str, nn.Module]]:
    yield "bf16", model
    dynamic = copy.deepcopy(model)
    qo.quantize_(dynamic, qo.Int8Dynamic())
    yield "int8 dynamic", dynamic
    del dynamic
    if name in STATIC:
        static = copy.deepcopy(model)
        qo.prepare_(static)
        for arguments, named in inputs.values():
            static(*arguments, **named)
        qo.convert_(static)
        yield "int8 static", static


def compare(name: str, make, record: Record, device: str) -> None:
    model, inputs = make(device)
    model = model.to(device, DTYPE).eval().to(memory_format=torch.channels_last)
    references: dict[str, torch.Tensor] = {}
    for contender, network in contenders(name, model, inputs):
        for what, (arguments, named) in inputs.items():

            def run(network=network, arguments=arguments, named=named):
                return tensor_of(network(*arguments, **named))

            result = run().float()
            reference = references.setdefault(what, result.clone())
            row = {"model": name, "input": what, "contender": contender, "eager_ms": round(milliseconds(run), 3)}
            row |= {"graph_ms": round(graph_milliseconds(run), 3), "sqnr": round(float(sqnr(reference, result)), 1)}
            record.data.setdefault("models", []).append(row)
            record.save()
            print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that check.py began")
    parser.add_argument("--seconds", type=float, default=100.0, help="models that would start later are left out")
    options = parser.parse_args()
    stop = time.monotonic() + options.seconds
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True
    record = Record(options.out, fresh=not options.out.is_file())
    with torch.inference_mode():
        for name, make in MODELS.items():
            if time.monotonic() > stop:
                record.data["cut"].append(f"models from {name} on: time was up")
                break
            try:
                compare(name, make, record, "cuda")
            except Exception as error:  # a package that is missing, or a model that does not run: the others still do
                record.data["missing"].setdefault("models", {})[name] = in_one_line(error)[:250]
                print(name, in_one_line(error)[:250], flush=True)
            torch.cuda.empty_cache()
    record.save()


if __name__ == "__main__":
    main()
