"""What bench.py times: data, contenders and floors of every row.

A case makes problems (one set of buffers each) and has contenders, which make from a problem a call that a CUDA graph can capture.
Every contender starts from the same data; weights are prepared before the call. The floor of a case counts each tensor once. A
rehearsal runs the same code on small tensors on the CPU. Read next: bench.py, common/shapes.py.
"""

import copy
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

import quant_ops as qo
from benchmarks.common import shapes
from benchmarks.common.problems import ConvProblem, LinearProblem, floating, ours_dynamic, ours_static
from quant_ops import _library

BF16 = torch.bfloat16
LEAST_SQNR = 25.0  # dB, of every contender against the reference of its case; torch rounds quotients to bfloat16 in some


@dataclass
class Case:
    stem: str
    set: str
    shape: str
    dtype: str
    make: Callable[[], Any]  # a problem
    contenders: dict[str, Callable[[Any], Callable[[], Any]]]
    bytes: int  # read or written at least once by the best possible kernel
    reference: str  # the contender that the others are compared with
    ops: int = 0  # integer multiplications and additions
    compiled: set[str] = field(default_factory=set)  # contenders that torch.compile, seconds each
    kernel: str = ""  # that ours chooses


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@functools.cache
def compiled(function):
    return torch.compile(function, dynamic=False)


# ---- Linear ------------------------------------------------------------------------------------------------------------

ROWS = (1, 16, 64, 256, 1024, 4096, 8192)
LINEAR = {
    "torch_quantizer": [shapes.Linear(512, 960, 960)],  # the row of its README
    "llama": [shapes.Linear(M, N, K) for N, K in ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192)) for M in ROWS]
    + [shapes.Linear(M, 28672, 8192) for M in (1, 64, 1024, 8192)],
    "llama edges": [shapes.Linear(M, 4096, 4096) for M in (2, 4, 8, 17, 32, 65, 128, 129, 512, 2048)],
    "vit": [shapes.Linear(197 * n, N, K) for n in (1, 32) for N, K in ((2304, 768), (3072, 768), (768, 3072))],
    "sdxl": [shapes.Linear(M, N, K) for M, N, K in ((4096, 640, 640), (4096, 5120, 640), (1024, 1280, 1280), (1024, 10240, 1280))],
}
SMALL_LINEAR = {"rehearsal": [shapes.Linear(1, 64, 64), shapes.Linear(24, 48, 64)]}
COMPILED_LINEAR = {(512, 960, 960), (64, 4096, 4096), (4096, 4096, 4096)}


def row_codes(p):
    return qo.quantize_rows(p.x)[0]


def int_mm_linear(x, weight, weight_scale, bias):
    scale = x.abs().amax(1, keepdim=True).float().clamp_min(1e-12) / 127
    codes = (x / scale).round().to(torch.int8)
    return (torch._int_mm(codes, weight) * scale * weight_scale + bias).to(x.dtype)


def int_mm(p, call=int_mm_linear):
    arguments = p.x, p.int8_layer.qweight.t(), p.int8_layer.weight_scale.view(1, -1), p.float_layer.bias
    return lambda: call(*arguments)


def int_mm_compiled(p):
    return int_mm(p, compiled(int_mm_linear))


def torchao(p):
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = nn.Sequential(copy.deepcopy(p.float_layer))
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return functools.partial(model, p.x)


def chosen(s: shapes.Linear, device: str) -> str:
    return _library.cuda_gemm_kernel(*s) if device == "cuda" else _library.gemm_kernel()


def linear_cases(device: str, small: bool):
    for name, group in (SMALL_LINEAR if small else LINEAR).items():
        for s in group:
            x, w, y = s.M * s.K, s.N * s.K, s.M * s.N
            make = functools.partial(LinearProblem, s, device, BF16)
            contenders = {
                "ours dynamic": ours_dynamic,
                "bf16": functools.partial(floating, BF16),
                "fp16": functools.partial(floating, torch.float16),
                "torch._int_mm": int_mm,
                "ours static": ours_static,
                "torchao": torchao,
            }
            slow, size, kernel = set(), 2 * x + w + 2 * y + 8 * s.N, chosen(s, device)
            if small or tuple(s) in COMPILED_LINEAR:
                contenders["torch._int_mm compiled"] = int_mm_compiled
                slow = {"torch._int_mm compiled"}
            yield Case("linear", name, str(s), "bfloat16", make, contenders, size, "bf16", 2 * s.macs, slow, kernel)
            if s.M >= 256 or small:
                contenders = {
                    "ours": lambda p: functools.partial(qo.int8_gemm, row_codes(p), p.int8_layer.qweight),
                    "torch._int_mm": lambda p: functools.partial(torch._int_mm, row_codes(p), p.int8_layer.qweight.t()),
                }
                yield Case("gemm", name, str(s), "int8", make, contenders, x + w + 4 * y, "torch._int_mm", 2 * s.macs)


# ---- every kernel of int8_linear, forced -------------------------------------------------------------------------------

# as choose.h and sm90/igemm.h in cuda/engine name them; one that a machine or a shape does not allow is reported as not timed.
PORTABLE = ("16x64x128", "32x64x128", "64x64x128", "64x128x64", "128x128x64", "128x256x64")
HOPPER = (
    *("64x16x128_swapped", "64x32x128_swapped", "64x48x128_swapped", "64x64x128_swapped"),
    *("64x96x128_swapped", "64x192x128_swapped"),
    *("64x64x128", "64x128x128", "64x160x128", "64x256x128", "128x128x128", "128x160x128", "128x256x128"),
)
FUSED = ("16x64", "32x128", "32x192")
KERNELS = (
    "gemv_s8s8_16x8_mma",
    *(f"fused_s8s8_{t}_mma" for t in FUSED),
    *(f"igemm_s8s8_{t}_mma" for t in PORTABLE),
    *(f"igemm_s8s8_{t}_wgmma" for t in HOPPER),
)
FORCED = [shapes.Linear(M, 4096, 4096) for M in (1, 8, 16, 64, 256, 1024, 4096)] + [shapes.Linear(8192, 8192, 8192)]


def forced(kernel: str, p):
    if not p.x.is_cuda:  # a rehearsal
        return ours_dynamic(p)

    def call():
        _library.set_cuda_kernel(kernel)
        try:
            return p.int8_layer(p.x)
        finally:
            _library.set_cuda_kernel(None)

    return call


def kernel_cases(device: str, small: bool):
    for s in SMALL_LINEAR["rehearsal"] if small else FORCED:
        contenders = {"ours chosen": ours_dynamic} | {kernel: functools.partial(forced, kernel) for kernel in KERNELS}
        size = 2 * s.M * s.K + s.N * s.K + 2 * s.M * s.N + 8 * s.N
        make = functools.partial(LinearProblem, s, device, BF16)
        yield Case(
            "linear kernels",
            "forced",
            str(s),
            "bfloat16",
            make,
            contenders,
            size,
            "ours chosen",
            2 * s.macs,
            kernel=chosen(s, device),
        )


# ---- Linear with a weight of 4 or 8 bits --------------------------------------------------------------------------------

WEIGHT_ONLY = [shapes.Linear(M, N, K) for N, K in ((4096, 4096), (4096, 14336), (2048, 2048)) for M in (1, 4, 16, 128, 512)]
WEIGHT_GROUPS = {4: 128, 8: -1}


class WeightOnlyProblem:
    """A weight that is exactly `bits` bits, in groups, and rows of bfloat16."""

    def __init__(self, shape, bits: int, device: str):
        M, N, K = shape
        self.bits, self.group = bits, WEIGHT_GROUPS[bits]
        if self.group > K:
            self.group = -1
        low = -(1 << (bits - 1))
        self.codes = torch.randint(low, -low, (N, K), device=device, dtype=torch.int8)
        groups = 1 if self.group == -1 else -(-K // self.group)
        self.scale = (torch.rand(N, groups, device=device) * 0.01 + 0.01).to(BF16).float()
        self.packed = qo.pack_weight_only(self.codes, bits, self.group)
        self.x = torch.randn(M, K, device=device, dtype=BF16)
        scales = self.scale.repeat_interleave(K if self.group == -1 else self.group, 1)[:, :K]
        self.weight = (self.codes.float() * scales).to(BF16)

    def ours(self, dynamic: bool):
        placeholder = self.codes[:1, :1].expand(self.codes.shape)
        call = {"packed_weight": self.packed, "dynamic": dynamic}
        return functools.partial(qo.weight_only_linear, self.x, placeholder, self.scale, None, None, self.bits, self.group, **call)

    def bf16(self):
        return functools.partial(nn.functional.linear, self.x, self.weight)

    def int8_linear(self):
        codes, scale, _ = qo.quantize_rows(self.weight)
        return functools.partial(qo.int8_linear, self.x, codes, scale.flatten(), packed_weight=qo.pack_weight(codes))

    def torch_int4(self):
        nibbles = (self.codes + 8).to(torch.uint8)
        packed = torch._convert_weight_to_int4pack(nibbles[:, ::2] << 4 | nibbles[:, 1::2], 8)
        scale_and_zero = torch.stack([self.scale, torch.zeros_like(self.scale)], 2).to(BF16).transpose(0, 1).contiguous()
        return functools.partial(torch._weight_int4pack_mm, self.x, packed, self.group, scale_and_zero)

    def torch_int8(self):
        return functools.partial(torch._weight_int8pack_mm, self.x, self.codes, self.scale.flatten().to(BF16))


def weight_only_cases(device: str, small: bool):
    problem = WeightOnlyProblem
    for bits, s in itertools.product(WEIGHT_GROUPS, SMALL_LINEAR["rehearsal"] if small else WEIGHT_ONLY):
        contenders = {
            f"ours W{bits}A16": lambda p: p.ours(dynamic=False),
            f"ours W{bits}A8": lambda p: p.ours(dynamic=True),
            "bf16": problem.bf16,
            "int8_linear": problem.int8_linear,
            f"torch int{bits}pack": problem.torch_int4 if bits == 4 else problem.torch_int8,
        }
        groups = 1 if WEIGHT_GROUPS[bits] == -1 else -(-s.K // WEIGHT_GROUPS[bits])
        size = s.N * s.K * bits // 8 + 4 * s.N * groups + 2 * s.M * (s.K + s.N)
        make = functools.partial(problem, s, bits, device)
        yield Case("weight_only", f"int{bits}", str(s), "bfloat16", make, contenders, size, "bf16", 2 * s.macs)


# ---- Conv2d ------------------------------------------------------------------------------------------------------------

Conv = shapes.Conv
CONV = {
    "torch_quantizer": [Conv(1, 512, 64, 512, 3)],  # the row of its README
    "resnet-50": [
        Conv(n, *rest)
        for n in (1, 32)
        for rest in (
            (64, 56, 64, 3, 1),
            (256, 56, 64, 1),
            (128, 28, 128, 3, 1),
            (256, 14, 256, 3, 1),
            (512, 7, 512, 3, 1),
            (256, 56, 512, 1, 0, 2),
        )
    ]
    + [Conv(32, 3, 224, 64, 7, 3, 2)],
    "sd-unet": [
        Conv(2, 320, 64, 320, 3, 1),
        Conv(2, 640, 32, 640, 3, 1),
        Conv(2, 1280, 16, 1280, 3, 1),
        Conv(2, 1280, 8, 1280, 3, 1),
        Conv(2, 320, 64, 320, 3, 1, 2),
    ],
    "others": [Conv(32, 128, 56, 128, 3, 1, groups=32), Conv(32, 96, 56, 96, 3, 1, groups=96), Conv(8, 256, 28, 256, 3, 2, d=2)],
}
SMALL_CONV = {"rehearsal": [Conv(1, 16, 6, 16, 3, 1), Conv(2, 8, 6, 8, 3, 1, groups=8), Conv(1, 16, 6, 16, 1)]}


def conv_cases(device: str, small: bool):
    for name, group in (SMALL_CONV if small else CONV).items():
        for s in group:
            tensors = 2 * s.N * (s.C * s.H**2 + s.O * s.out**2) + s.O * s.C // s.groups * s.k**2 + 8 * s.O
            contenders = {
                "ours dynamic": ours_dynamic,
                "bf16": functools.partial(floating, BF16),
                "fp16": functools.partial(floating, torch.float16),
                "ours static": ours_static,
            }
            yield Case(
                "conv2d",
                name,
                str(s),
                "bfloat16",
                functools.partial(ConvProblem, s, device, BF16),
                contenders,
                tensors,
                "bf16",
                2 * s.macs,
            )


# ---- rows and ranges ---------------------------------------------------------------------------------------------------

TOKENS = [(1, 4096), (64, 4096), (1024, 4096), (4096, 4096), (4096, 14336), (16384, 8192), (2048, 1280), (6304, 768)]
SMALL_TOKENS = [(3, 72)]
COMPILED_TOKENS = {(4096, 4096), (3, 72)}


def eager_rows(x):
    scale = x.abs().amax(1, keepdim=True).float() / 127
    return (x / scale).round().to(torch.int8), scale


def eager_range(x, dim, kept):
    scale = (x.abs().amax(dim, keepdim=True) if kept else x.abs().amax()).float() / 127
    return scale, torch.zeros_like(scale, dtype=torch.int32)


def row_cases(device: str, small: bool):
    for shape in SMALL_TOKENS if small else TOKENS:
        n, text = shape[0] * shape[1], "x".join(map(str, shape))

        def make(shape=shape):
            return torch.randn(shape, device=device, dtype=BF16)

        contenders = {
            "ours": lambda x: functools.partial(qo.quantize_rows, x),
            "eager": lambda x: functools.partial(eager_rows, x),
        }
        slow = set()
        if shape in COMPILED_TOKENS:
            contenders["torch.compile"] = lambda x: functools.partial(compiled(eager_rows), x)
            slow = {"torch.compile"}
        yield Case("quantize_rows", "tokens", text, "bfloat16", make, contenders, 3 * n + 8 * shape[0], "eager", 0, slow)
        for label, dim in (("tensor", []), ("rows", [1]), ("columns", [0])):
            if n < 1 << 22 and not small:
                continue
            contenders = {
                "ours": lambda x, dim=dim: functools.partial(qo.choose_qparams, x, dim, -127, 127),
                "eager": lambda x, dim=dim: functools.partial(eager_range, x, dim, bool(dim)),
            }
            yield Case("choose_qparams", label, text, "bfloat16", make, contenders, 2 * n, "eager")


# ---- elementwise -------------------------------------------------------------------------------------------------------

TENSORS = [*shapes.TENSOR["torch_quant_ext"], (16, 256, 128, 128)]
SMALL_TENSORS = [(2, 8, 6, 6)]
COMPILED_TENSORS = {TENSORS[-1], SMALL_TENSORS[0]}


class ElementwiseProblem:
    def __init__(self, shape, dtype, scale_shape, axis, device):
        self.x = torch.randn(shape, device=device).to(dtype)
        self.scale = torch.rand(scale_shape, device=device) * 0.02 + 0.02
        self.zeros = torch.zeros(self.scale.numel(), dtype=torch.int32, device=device)
        self.axis = axis

    @functools.cached_property
    def grad(self):
        return torch.randn(self.x.shape, device=self.x.device).to(self.x.dtype)

    @functools.cached_property
    def codes(self):
        return torch.randint(-128, 128, self.x.shape, device=self.x.device, dtype=torch.int8)


def fake_quantize(p):
    if p.scale.dim() == 0:
        return lambda: torch.fake_quantize_per_tensor_affine(p.x, p.scale, p.zeros, -128, 127)
    return lambda: torch.fake_quantize_per_channel_affine(p.x, p.scale.view(-1), p.zeros, p.axis, -128, 127)


def eager_simulated(x, scale):
    return (torch.round(x / scale).clamp(-128, 127) * scale).to(x.dtype)


def eager_backward(grad, x, scale):
    v = x / scale
    steps = torch.round(v)
    inside = (steps >= -128) & (steps <= 127)
    factor = torch.where(inside, steps - v, steps.clamp(-128, 127))
    return torch.where(inside, grad, 0), (grad * factor).sum_to_size(scale.shape)


def elementwise_cases(device: str, small: bool):
    for shape in SMALL_TENSORS if small else TENSORS:
        for dtype in (BF16, torch.float32):
            parameters = {"tensor": ((), 0), "dim 0": ((shape[0], 1, 1, 1), 0), "dim 1": ((1, shape[1], 1, 1), 1)}
            for label, (scale_shape, axis) in parameters.items():
                make = functools.partial(ElementwiseProblem, shape, dtype, scale_shape, axis, device)
                n, size, text = torch.Size(shape).numel(), dtype.itemsize, "x".join(map(str, shape))
                simulated = {
                    "ours": lambda p: lambda: qo.quant_tensor_forward(p.x, p.scale, None, -128, 127),
                    "torch.fake_quantize": fake_quantize,
                    "eager": lambda p: lambda: eager_simulated(p.x, p.scale),
                }
                slow = set()
                if shape in COMPILED_TENSORS and label != "dim 0":
                    simulated["torch.compile"] = lambda p: functools.partial(compiled(eager_simulated), p.x, p.scale)
                    slow = {"torch.compile"}
                to_int8 = {
                    "ours": lambda p: lambda: qo.quant_tensor_forward(p.x, p.scale, None, -128, 127, simulate=False),
                    "eager": lambda p: lambda: torch.round(p.x / p.scale).clamp(-128, 127).to(torch.int8),
                }
                dequantize = {
                    "ours": lambda p: lambda: qo.dequant_tensor(p.codes, p.scale, None, p.x.dtype),
                    "eager": lambda p: lambda: (p.codes * p.scale).to(p.x.dtype),
                }
                backward = {
                    "ours": lambda p: lambda: qo.quant_tensor_backward(p.grad, p.x, p.scale, None, -128, 127),
                    "eager": lambda p: lambda: eager_backward(p.grad, p.x, p.scale),
                }
                name = name_of(dtype)
                yield Case("quantize, simulated", label, text, name, make, simulated, 2 * n * size, "eager", 0, slow)
                yield Case("quantize to int8", label, text, name, make, to_int8, n * (size + 1), "eager")
                yield Case("dequantize", label, text, name, make, dequantize, n * (size + 1), "eager")
                yield Case("backward", label, text, name, make, backward, 3 * n * size, "eager")


# ---- floating formats --------------------------------------------------------------------------------------------------

FLOATS = [(32, 128, 56, 56), (4096, 4096)]
SMALL_FLOATS = [(2, 32, 4, 4)]
FLOAT8 = {"E4M3": (4, 3, "nan", torch.float8_e4m3fn), "E5M2": (5, 2, "ieee", torch.float8_e5m2)}
COMPILED_FLOATS = {FLOATS[0], SMALL_FLOATS[0]}


def eager_float8(x, scale, dtype):
    return (x / scale).clamp(-448, 448).to(dtype).to(x.dtype) * scale


def eager_e2m1(x, scale):
    m = (x.float().abs() / scale).clamp(max=6.0)
    quantum = torch.exp2(torch.floor(torch.log2(m)).clamp(min=0.0) - 1)
    return ((m / quantum).round() * quantum * scale).copysign(x).to(x.dtype)


def in_blocks(x, dim: int, block: int):
    return x.unflatten(dim, (-1, block)), dim if dim < 0 else dim + 1


def eager_mxfp8(x, dim: int):
    blocks, dim = in_blocks(x.float(), dim, 32)
    scale = torch.exp2(torch.floor(torch.log2(blocks.abs().amax(dim, keepdim=True))) - 8)
    return ((blocks / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).view_as(x).to(x.dtype)


def eager_nvfp4(x, dim: int):
    blocks, dim = in_blocks(x.float(), dim, 16)
    scale = (blocks.abs().amax(dim, keepdim=True) / 6).to(torch.float8_e4m3fn).float().clamp(min=2.0**-6)
    return eager_e2m1(blocks, scale).view_as(x).to(x.dtype)


def float_contenders(shape, dtype):
    """(name, tensors read or written, reference, contenders) of operators on a problem's x, scale and grad."""
    for name, (e, m, special, float8) in FLOAT8.items():
        ours = functools.partial(qo.quant_float_forward, exponent_bits=e, mantissa_bits=m, special=special)
        cast = {
            "ours": lambda p, ours=ours: functools.partial(ours, p.x),
            ".to(float8)": lambda p, float8=float8: lambda: p.x.to(float8).to(p.x.dtype),
        }
        yield name, 2, ".to(float8)", cast
    e4m3 = functools.partial(qo.quant_float_forward, exponent_bits=4, mantissa_bits=3, special="nan")
    scaled = {
        "ours": lambda p: functools.partial(e4m3, p.x, scale=p.scale),
        "eager": lambda p: functools.partial(eager_float8, p.x, p.scale, torch.float8_e4m3fn),
        "torch.compile": lambda p: functools.partial(compiled(eager_float8), p.x, p.scale, torch.float8_e4m3fn),
    }
    yield "E4M3 scaled", 2, "eager", scaled
    e2m1 = {
        "ours": lambda p: functools.partial(qo.quant_float_forward, p.x, 2, 1),
        "eager": lambda p: functools.partial(eager_e2m1, p.x, 1.0),
    }
    yield "E2M1", 2, "eager", e2m1
    seed = torch.tensor(0)
    yield "E4M3 stochastic", 2, "ours", {"ours": lambda p: functools.partial(e4m3, p.x, rounding="stochastic", seed=seed)}
    backward = {
        "ours": lambda p: functools.partial(qo.quant_float_backward, p.grad, p.x, 4, 3, special="nan"),
        "eager": lambda p: lambda: torch.where(p.x.abs() <= 448, p.grad, 0),
    }
    yield "E4M3 gradient", 3, "eager", backward
    for dim in (1, -1):
        if shape[dim] % 32:
            continue
        mx = functools.partial(qo.quant_block_forward, dim=dim, block_size=32, exponent_bits=4, mantissa_bits=3, special="nan")
        nv = functools.partial(qo.quant_block_forward, dim=dim, block_size=16, exponent_bits=2, mantissa_bits=1, scale_rule="e4m3")
        for name, block, formula in (("MXFP8", mx, eager_mxfp8), ("NVFP4", nv, eager_nvfp4)):
            blocks = {
                "ours": lambda p, block=block: functools.partial(block, p.x),
                "eager": lambda p, formula=formula, dim=dim: functools.partial(formula, p.x, dim),
                "torch.compile": lambda p, formula=formula, dim=dim: functools.partial(compiled(formula), p.x, dim),
            }
            yield f"{name} along {dim}", 2, "eager", blocks


def float_cases(device: str, small: bool):
    for shape in SMALL_FLOATS if small else FLOATS:
        for dtype in (BF16, torch.float32):
            make = functools.partial(ElementwiseProblem, shape, dtype, (), 0, device)
            n, text = torch.Size(shape).numel(), "x".join(map(str, shape))
            for name, tensors, reference, contenders in float_contenders(shape, dtype):
                slow = {"torch.compile"} & set(contenders)
                if shape not in COMPILED_FLOATS and slow:
                    del contenders["torch.compile"]
                size = tensors * n * dtype.itemsize
                yield Case("floats", name, text, name_of(dtype), make, contenders, size, reference, 0, slow)


SECTIONS = {
    "linear": linear_cases,
    "conv2d": conv_cases,
    "rows": row_cases,
    "elementwise": elementwise_cases,
    "floats": float_cases,
    "kernels": kernel_cases,
    "weight_only": weight_only_cases,
}
