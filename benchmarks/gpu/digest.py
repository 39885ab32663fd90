"""Hashes of the results of fixed layers on the CPU and by every kernel on the GPU, which are to be equal; in check.py's JSON.

python -m benchmarks.gpu.digest --out out/gpu_check.json

Inputs come from integer formulas, so that a hash is the same on every machine. Read next: record.py.
"""

import argparse
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import quant_ops as qo
from benchmarks.gpu.cases import KERNELS
from benchmarks.gpu.record import Record
from quant_ops import _library

Call = Callable[[str], torch.Tensor]


def numbers(*shape: int, modulus: int = 251) -> torch.Tensor:
    """Integers that look random, from a formula."""
    return (torch.arange(torch.Size(shape).numel()) * 2654435761 % 4294967296 // 65536 % modulus).reshape(shape)


def codes(*shape: int) -> torch.Tensor:
    return (numbers(*shape) - 125).to(torch.int8)


def values(*shape: int) -> torch.Tensor:
    return ((numbers(*shape, modulus=1021) - 400) / 256.0).to(torch.bfloat16)


def scales(n: int) -> torch.Tensor:
    return (numbers(n, modulus=61) + 1) / 4096.0


def layers() -> Iterator[tuple[str, Call]]:
    for m, n, k in ((8, 256, 512), (100, 320, 1280), (512, 960, 960)):
        x, w, s, b = values(m, k), codes(n, k), scales(n), scales(n) * 100
        yield f"int8_gemm {m}x{n}x{k}", lambda d, m=m, w=w, k=k: qo.int8_gemm(codes(m, k).to(d), w.to(d))
        for asymmetric in (False, True):
            yield (
                f"int8_linear {m}x{n}x{k} {'asymmetric' if asymmetric else 'symmetric'}",
                lambda d, x=x, w=w, s=s, b=b, a=asymmetric: qo.int8_linear(x.to(d), w.to(d), s.to(d), b.to(d), asymmetric=a),
            )
    for n, c, size, o, kernel, stride in ((2, 64, 14, 96, 3, 1), (1, 320, 16, 320, 3, 2), (2, 128, 9, 64, 1, 1)):
        x, w, s = values(n, c, size, size), codes(o, c, kernel, kernel), scales(o)
        for asymmetric in (False, True):
            yield (
                f"int8_conv2d {n}x{c}x{size}x{size} {o} k{kernel} s{stride} {'asymmetric' if asymmetric else 'symmetric'}",
                lambda d, x=x, w=w, s=s, t=stride, p=kernel // 2, a=asymmetric: qo.int8_conv2d(
                    x.to(d).contiguous(memory_format=torch.channels_last), w.to(d), s.to(d), None, t, p, asymmetric=a
                ),
            )


def sha(result: torch.Tensor) -> str:
    plain = result.cpu().contiguous()
    return hashlib.sha256(plain.view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def kernels_of(call: Call, device: str) -> Iterator[tuple[str, str]]:
    yield "cpu", sha(call("cpu"))
    yield "chosen", sha(call(device))
    for kernel in KERNELS if device == "cuda" else ():
        _library.set_cuda_kernel(kernel)
        try:
            yield kernel, sha(call(device))
        except (RuntimeError, ValueError):  # it does not take the shape, or the operator
            continue
        finally:
            _library.set_cuda_kernel(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="JSON that check.py began")
    parser.add_argument("--rehearse", action="store_true", help="on the CPU alone")
    options = parser.parse_args()
    record = Record(options.out, fresh=not options.out.is_file())
    digests, different = record.data.setdefault("digests", {}), []
    with torch.inference_mode():
        for name, call in layers():
            found = dict(kernels_of(call, "cpu" if options.rehearse else "cuda"))
            digests[name] = found["cpu"]
            different += [
                f"{name}: {kernel} {value}, cpu {found['cpu']}" for kernel, value in found.items() if value != found["cpu"]
            ]
            print(f"{found['cpu']} {name}: {len(found)} results", flush=True)
    record.save()
    print("\n".join(different) or "all the same", flush=True)
    return int(bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
