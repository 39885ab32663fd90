"""Every CUDA operator once on small, odd tensors: what compute-sanitizer watches.

python -m benchmarks.gpu.smoke [--rehearse] [--few]        --few: one dtype and shape an operator, for racecheck, which is slow

Results are checked elsewhere (tests/test_cuda*.py); here every access counts. Operators without a CUDA kernel are named and left
out.
"""

import argparse
import itertools

import torch

import quant_ops as qo


def has_kernel(op: str, device: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"quant_ops::{op}", device.upper())


def elementwise(device: str, few: bool) -> None:
    cases = [((7, 16, 7, 7), (16, 1, 1)), ((1000,), ()), ((130, 24), (24,)), ((33, 50), (33, 1)), ((2100, 24), (1, 24))]
    dtypes = (torch.bfloat16, torch.float32, torch.float64)
    for (shape, parameter), dtype in itertools.islice(itertools.product(cases, dtypes), 1 if few else None):
        x, scale = torch.randn(shape, device=device).to(dtype), torch.rand(parameter, device=device) + 0.1
        zero = torch.randn(parameter, device=device)
        for view in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            q = qo.quant_tensor_forward(view, scale, zero, -128, 127, True, False)
            qo.quant_tensor_forward(view, scale, None, -128, 127)
            qo.dequant_tensor(q, scale, zero.round().int(), dtype)
            qo.quant_tensor_backward(view, view, scale, zero, -128, 127, True)


def floats(device: str, few: bool) -> None:
    cases = [((7, 16, 8, 8), (16, 1, 1)), ((1000,), ()), ((130, 24), (24,)), ((33, 50), (33, 1)), ((2, 9001), (2, 1))]
    dtypes = (torch.bfloat16, torch.float32)
    for (shape, parameter), dtype in itertools.islice(itertools.product(cases, dtypes), 1 if few else None):
        x, scale = torch.randn(shape, device=device).to(dtype), torch.rand(parameter, device=device) + 0.1
        seed = torch.tensor(5, device=device)
        for view in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            qo.quant_float_backward(view, view, 4, 3, scale)
            for rounding in ("nearest_even", "toward_zero", "stochastic"):
                qo.quant_float_forward(view, 4, 3, scale, rounding=rounding, seed=seed)
                for dim, block in itertools.product(range(x.dim()), (8, 32, 10**6)):
                    qo.quant_block_forward(view, dim, block, 2, 1, rounding=rounding, seed=seed)
            for dim, block in itertools.product(range(x.dim()), (8, 32, 10**6)):
                qo.quant_block_backward(view, view, dim, block, 2, 1, scale_rule="e4m3")


def ranges(device: str, few: bool) -> None:
    shapes = [(5, 1031), (300, 40), (3, 20000), (2, 40000), (7, 5)]
    for shape, dtype in itertools.islice(itertools.product(shapes, (torch.bfloat16, torch.float32)), 2 if few else None):
        x = torch.randn(shape, device=device).to(dtype)
        for view in (x, x[:, 1:], x.t()):
            for dim in ([], [0], [1]):
                qo.choose_qparams(view, dim, -128, 127, True)
            qo.quantize_rows(view, True)


def affine(device: str, few: bool) -> None:
    blocks = [((6, 48), (1, 16)), ((6, 48), (-1, 1)), ((3, 5000), (1, -1)), ((4, 9, 6), (2, 3, 6))]
    for (shape, block_size), dtype in itertools.islice(
        itertools.product(blocks, (torch.bfloat16, torch.float32)), 1 if few else None
    ):
        x = torch.randn(shape, device=device).to(dtype)
        for view in (x, x.transpose(0, -1).contiguous().transpose(0, -1)):
            scale, zero = qo.choose_qparams_affine(view, "ASYMMETRIC", block_size, torch.uint4)
            q = qo.quantize_affine(view, block_size, scale, zero, torch.uint4)
            qo.dequantize_affine(q, block_size, scale, zero, torch.uint4, output_dtype=dtype)


def products(device: str, few: bool) -> None:
    shapes = [(3, 40, 64), (130, 72, 200), (1, 64, 4096), (20, 33, 51), (300, 256, 128)]
    for M, N, K in shapes[: 2 if few else None]:
        weight = torch.randint(-128, 128, (N, K), device=device, dtype=torch.int8)
        scale, bias = torch.rand(N, device=device) + 0.1, torch.randn(N, device=device)
        packed = qo.pack_weight(weight)
        qo.int8_gemm(torch.randint(-128, 128, (M, K), device=device, dtype=torch.int8), weight)
        for dtype, asymmetric in itertools.product((torch.bfloat16, torch.float32), (False, True)):
            x = torch.randn(M, K, device=device).to(dtype)
            qo.int8_linear(x, weight, scale, bias, asymmetric=asymmetric, relu=True)
            qo.int8_linear(x, weight, scale, packed_weight=packed, asymmetric=asymmetric)
            qo.int8_linear(x, weight, scale, x_scale=torch.tensor(0.05, device=device))


def weights_alone(device: str, few: bool) -> None:
    cases = [(3, 40, 64, 32), (20, 33, 51, -1), (1, 64, 4096, 128), (70, 150, 200, 64), (130, 17, 515, 256)]  # M, N, K, group
    for (M, N, K, group), bits in itertools.islice(itertools.product(cases, (4, 8)), 2 if few else None):
        codes = torch.randint(-8, 8, (N, K), device=device, dtype=torch.int8)
        packed = qo.pack_weight_only(codes, bits, group)
        qo.unpack_weight_only(packed, (N, K), bits, group)
        scale = torch.rand(N, 1 if group == -1 else -(-K // group), device=device)
        zeros = None, torch.randint(-8, 8, scale.shape, device=device, dtype=torch.int8), torch.randn_like(scale)
        for dtype, zero, asymmetric in itertools.product((torch.bfloat16, torch.float32), zeros, (None, False, True)):
            x, rows = (
                torch.randn(M, K, device=device).to(dtype),
                {"dynamic": asymmetric is not None, "asymmetric": bool(asymmetric)},
            )
            qo.weight_only_linear(x, codes, scale, zero, None, bits, group, packed_weight=packed, **rows)


def convolutions(device: str, few: bool) -> None:
    cases = [(16, 32, 3, 1), (6, 6, 3, 6), (3, 16, 7, 1), (32, 32, 3, 4), (16, 24, 1, 1)]  # C, O, kernel, groups
    for C, O, k, groups in cases[: 2 if few else None]:
        weight = torch.randint(-128, 128, (O, C // groups, k, k), device=device, dtype=torch.int8)
        scale = torch.rand(O, device=device) + 0.1
        for layout, asymmetric in itertools.product((torch.contiguous_format, torch.channels_last), (False, True)):
            x = torch.randn(2, C, 9, 11, device=device).to(torch.bfloat16).contiguous(memory_format=layout)
            qo.int8_conv2d(x, weight, scale, stride=2, padding=k // 2, groups=groups, asymmetric=asymmetric)


def between(device: str, few: bool) -> None:
    shapes = [(2, 6, 9, 11), (1, 40, 7, 7), (3, 1, 5, 4)]
    formats = (torch.contiguous_format, torch.channels_last)
    s, z = torch.tensor(0.05, device=device), torch.tensor(3, device=device)
    for shape, memory_format in itertools.islice(itertools.product(shapes, formats), 1 if few else None):
        q = torch.randint(-128, 128, shape, device=device, dtype=torch.int8).contiguous(memory_format=memory_format)
        for view in (q, q[:, :, 1:, :3]):
            for activation in (None, "relu6", "gelu"):
                qo.requantize(view, s, z, out_scale=s * 2, activation=activation)
                qo.int8_add(view, view, s, s, z, out_dtype=torch.bfloat16, activation=activation)
                qo.int8_mul(view, view[:, :, :1, :1], s, s, z, out_scale=s, activation=activation)
            for dim in range(4):
                qo.int8_cat([view, view], [s, s * 2], [z, z], dim, out_scale=s)
            qo.int8_max_pool2d(view, 3, 2, 1, ceil_mode=True)
            qo.int8_avg_pool2d(view, s, z, 2, 1, 1, out_scale=s)
            qo.int8_adaptive_avg_pool2d(view, s, z, (2, 3))
            qo.int8_upsample_nearest2d(view, (2, 3))


def embeddings(device: str, few: bool) -> None:
    for (N, K), bits in itertools.product([(40, 96), (33, 7)][: 1 if few else None], (4, 8)):
        weight = torch.randint(-8, 8, (N, K), dtype=torch.int8)
        packed = qo.pack_weight_only(weight, bits).to(device)
        indices, scale = torch.randint(N, (3, 5), device=device), torch.rand(N, device=device)
        for packed_weight in (packed, None):
            qo.weight_only_embedding(indices, weight.to(device), scale, None, bits, packed_weight=packed_weight)


GROUPS = {
    elementwise: ("quant_tensor_forward", "quant_tensor_backward", "dequant_tensor"),
    floats: ("quant_float_forward", "quant_float_backward", "quant_block_forward", "quant_block_backward"),
    ranges: ("choose_qparams", "quantize_rows"),
    affine: ("choose_qparams_affine", "quantize_affine", "dequantize_affine"),
    products: ("int8_gemm", "int8_linear", "pack_weight"),
    weights_alone: ("weight_only_linear", "pack_weight_only", "unpack_weight_only"),
    convolutions: ("int8_conv2d",),
    embeddings: ("weight_only_embedding",),
    between: (
        *("requantize", "int8_add", "int8_mul", "int8_cat", "int8_max_pool2d", "int8_avg_pool2d"),
        *("int8_adaptive_avg_pool2d", "int8_upsample_nearest2d"),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rehearse", action="store_true", help="on the CPU")
    parser.add_argument("--few", action="store_true")
    options = parser.parse_args()
    device = "cpu" if options.rehearse else "cuda"
    for group, ops in GROUPS.items():
        missing = [op for op in ops if not has_kernel(op, device)]
        if missing:
            print(f"left out: {', '.join(missing)} has no kernel for {device}")
        else:
            group(device, options.few)
    if device == "cuda":
        torch.cuda.synchronize()
    print("smoke finished")


if __name__ == "__main__":
    main()
