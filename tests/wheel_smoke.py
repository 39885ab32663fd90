"""What a user does with an installed quant_ops, in an environment without its sources: import, quantize, save, load.

Prints the versions and a line "bits <digest>" of all results, which is the same for every torch, Python and instruction set.
"""

import hashlib
import tempfile
from pathlib import Path

import torch
from torch import nn

import quant_ops as qo


def numbers(*shape: int) -> torch.Tensor:
    """Multiples of 1/16 that need no generator of random numbers, which may differ from torch to torch."""
    n = torch.tensor(shape).prod()
    return ((torch.arange(n) * 7919 % 257 - 128) / 16).reshape(shape)


def with_numbers(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(numbers(*p.shape) / 8)
    return model.eval()


def vision() -> nn.Module:
    convolutions = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8)
    return with_numbers(nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(128, 10)))


def dense() -> nn.Module:
    return with_numbers(nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)))


def quantized(make, config, x: torch.Tensor) -> torch.Tensor:
    """The result of a quantized model, which is the same after it was saved and loaded."""
    net, again = make(), make()
    if isinstance(config, qo.Int8Static):
        qo.prepare_(net, config)
        qo.calibrate(net, [x])
        qo.convert_(net)
    else:
        qo.quantize_(net, config)
    with tempfile.TemporaryDirectory() as folder:
        qo.save(net, Path(folder) / "net.safetensors")
        qo.load_(again, Path(folder) / "net.safetensors")
    with torch.no_grad():
        y = net(x)
        assert torch.equal(again(x), y)
    return y


def results():
    """Of operators and layers that are exact on every machine: nothing float runs before or between them."""
    yield quantized(vision, qo.Int8Dynamic(), numbers(2, 3, 8, 8))
    yield quantized(vision, qo.Int8Dynamic(asymmetric=True), numbers(2, 3, 8, 8))
    yield quantized(dense, qo.Int8DynamicInt4Weight(group_size=32), numbers(3, 64))
    yield quantized(lambda: with_numbers(nn.Sequential(nn.Conv2d(3, 8, 3))), qo.Int8Static(), numbers(2, 3, 8, 8))
    yield from qo.quantize_rows(numbers(5, 33))
    yield qo.quant_tensor_forward(numbers(4, 4), torch.tensor(0.3), None, -8, 7)
    yield qo.int8_gemm(numbers(3, 64).to(torch.int8), numbers(5, 64).to(torch.int8))


if __name__ == "__main__":
    digest = hashlib.sha256()
    for result in results():
        digest.update(result.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    print("quant_ops", qo.__version__, "torch", torch.__version__, "isa", qo._library.isa())
    print("bits", digest.hexdigest())
