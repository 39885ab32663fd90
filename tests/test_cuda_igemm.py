"""The integer operators on CUDA against the CPU operators, bit for bit: every kernel, mode, dtype, layout and kind of convolution.

``IgemmCases`` needs no GPU by itself: test_cuda_igemm_build.py runs the same cases on the emulated kernels.
"""

import ctypes
import itertools
import random
import re

import pytest
import torch
from compiled import ROOT
from test_conv2d import random_case
from test_cuda import Subject, assert_same

import quant_ops as qo
from quant_ops import _library

TILES = ["16x64x128", "32x64x128", "64x64x128", "64x128x64", "128x128x64", "128x256x64"]
KERNELS = [f"igemm_s8s8_{tile}_mma" for tile in TILES]
GEMV = "gemv_s8s8_16x8_mma"
FUSED = [f"fused_s8s8_{tile}_mma" for tile in ("16x64", "32x128", "32x192")]
HOPPER = re.findall(r'\{"(igemm_s8s8_\w+_wgmma)"', (ROOT / "cuda" / "engine" / "sm90" / "igemm.h").read_text())
# M, N, K: one element, tails on every side, several tiles, K of whole and of broken chunks, no K at all
PRODUCTS = [(1, 1, 1), (3, 5, 16), (17, 70, 200), (130, 66, 530), (33, 257, 64), (5, 4, 0)]
OUTPUTS = [None, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8]


def codes(shape, dtype: torch.dtype) -> torch.Tensor:
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, dtype=torch.int64).to(dtype)


def activations(shape, dtype: torch.dtype) -> torch.Tensor:
    """Rows of different size, one of zeros, one that is not finite."""
    x = torch.randn(shape, dtype=torch.float32) * torch.exp(torch.randn(shape[0], *[1] * (len(shape) - 1)) * 3) + 0.3
    if shape[0] > 3:
        x[1] = 0.0
        x[2].view(-1)[0] = torch.inf
        x[3] *= 1e-38
    return x.to(dtype)


def output_arguments(out: torch.dtype | None, x: torch.Tensor) -> dict:
    if out in (torch.int8, torch.uint8):
        zero_point = torch.tensor(3 if out == torch.uint8 else -7)
        return {"out_dtype": out, "out_scale": torch.tensor(0.031), "out_zero_point": zero_point}
    return {} if out is None else {"out_dtype": out}


class KernelCases:
    """Every case takes a fixture ``subject``, and chooses its kernel by set_kernel."""

    @pytest.fixture(autouse=True)
    def _automatic(self, subject, monkeypatch):
        monkeypatch.delenv("QUANT_OPS_CUDA_KERNEL", raising=False)
        subject.set_kernel(None)
        yield
        subject.set_kernel(None)


class IgemmCases(KernelCases):
    @pytest.mark.sampled(12)
    @pytest.mark.parametrize("parts", ["", ":2", ":3", ":7"])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_products_of_every_kernel(self, subject, kernel, parts):
        subject.set_kernel(kernel + parts)
        for (m, n, k), dtype in itertools.product(PRODUCTS, (torch.int8, torch.uint8)):
            subject.check("int8_gemm", codes((m, k), dtype), codes((n, k), torch.int8))

    @pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static", "codes", "unsigned"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_up_to_eight_rows(self, subject, dtype, mode):
        """Rows of one round of loads and of several, whole and broken chunks, aligned or not."""
        subject.set_kernel(GEMV)
        for m, n, k in [(1, 1, 1), (1, 33, 64), (5, 16, 100), (8, 20, 2500), (2, 5, 0)]:
            codes_of = {"codes": torch.int8, "unsigned": torch.uint8}.get(mode)
            wide = activations((m, k + 11), dtype) if codes_of is None else codes((m, k + 11), codes_of)
            zero = torch.tensor(9 if codes_of == torch.uint8 else -9)
            kwargs = {} if mode == "dynamic" else {"asymmetric": True} if mode == "asymmetric" else {"x_scale": torch.tensor(0.03)}
            kwargs |= {"x_zero_point": zero} if mode in ("static", "unsigned") else {}
            for x, out in zip(
                (wide[:, :k], wide[:, 3 : k + 3], wide[:, :k].contiguous()), (None, torch.float32, torch.int8), strict=True
            ):
                weight, scale = codes((n, k), torch.int8), torch.rand(n) * 0.1
                subject.check("int8_linear", x, weight, scale, torch.randn(n), **kwargs, **output_arguments(out, x))
            if codes_of is not None:
                subject.check("int8_gemm", wide[:, :k], codes((n, k), torch.int8))

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("asymmetric", [False, True])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kernel", FUSED)
    def test_rows_that_the_product_quantizes(self, subject, kernel, dtype, asymmetric):
        """Rows of each count of vectors that a lane holds, and longer ones; blocks of one and of several tiles; every result."""
        shapes = [(1, 1, 1), (5, 33, 64), (70, 200, 520), (37, 70, 960), (33, 200, 1304), (9, 40, 2104)]
        for (m, n, k), out, columns in zip(shapes, OUTPUTS, ("", ":2", ":3", "", ":2", ""), strict=True):
            subject.set_kernel(kernel + columns)
            wide = activations((m, k + 11), dtype)
            if k == 960:
                wide[0, :k] = (torch.randint(-255, 256, (k,)) * 0.5).to(dtype)  # every second quotient is a tie or close to one
                wide[0, 5] = 127.0
            weight, scale = codes((n, k), torch.int8), torch.rand(n) * 0.1
            kwargs = {"asymmetric": asymmetric, "relu": m % 2 == 0} | output_arguments(out, wide)
            for x in (wide[:, :k].contiguous(), wide[:, 3 : k + 3]):
                subject.check("int8_linear", x, weight, scale, torch.randn(n), **kwargs)

    @pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_multiplied_columns(self, subject, dtype, mode):
        """Few rows and many, whole vectors and broken ones, any stride; NaN and infinities of x stay in their rows."""
        kwargs = {"dynamic": {}, "asymmetric": {"asymmetric": True}, "static": {"x_scale": torch.tensor(0.03)}}[mode]
        for m, n, k in [(1, 1, 1), (1, 33, 64), (5, 16, 101), (40, 20, 520), (3, 5, 0), (0, 5, 8)]:
            wide, weight, scale = activations((m, k + 11), dtype), codes((n, k), torch.int8), torch.rand(n) * 0.1
            multiplier = torch.randn(k + 1) * 3
            for x, columns in ((wide[:, :k], multiplier[1:]), (wide[:, 3 : k + 3].contiguous(), multiplier[:k].contiguous())):
                subject.check("int8_linear", x, weight, scale, torch.randn(n), x_multiplier=columns, **kwargs)

    def test_products_of_any_strides(self, subject):
        for dtype in (torch.int8, torch.uint8):
            wide, tall = codes((40, 200), dtype), codes((70, 300), torch.int8)
            for a, b in [
                (wide[:, 16:112], tall[:, 32:128]),  # aligned rows, read where they are
                (wide[:, 3:100], tall[:, 5:102]),  # rows of any alignment
                (wide[::2, :96], tall[::3, :96]),
                (wide.t()[:40, :30], tall[:30, :30].t()),
                (wide[0:1].expand(9, 200), tall[:, :200]),
            ]:
                subject.check("int8_gemm", a, b)

    def test_largest_sums(self, subject):
        for dtype, value, k in [(torch.int8, -128, 131071), (torch.uint8, 255, 65793)]:
            a, b = torch.full((2, k), value, dtype=torch.int64).to(dtype), torch.full((3, k), -128, dtype=torch.int8)
            subject.check("int8_gemm", a, b)

    @pytest.mark.sampled(10)
    @pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static", "static zero", "per row", "codes", "unsigned", "mixed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_linear(self, subject, dtype, mode):
        quantized = {"codes": torch.int8, "unsigned": torch.uint8, "mixed": torch.int8}.get(mode)
        for (shape, n), out, rest in itertools.product([((9, 37), 21), ((5, 64), 8), ((2, 3, 80), 70)], OUTPUTS, range(3)):
            x = activations(shape, dtype) if quantized is None else codes(shape, quantized)
            relu, with_bias, per_channel = rest == 1, rest < 2, rest != 1
            weight, scale = codes((n, shape[-1]), torch.int8), torch.rand(n if per_channel else 1) * 0.01
            rows = (*shape[:-1], 1)
            kwargs = {
                "dynamic": {},
                "asymmetric": {"asymmetric": True},
                "static": {"x_scale": torch.tensor(0.02)},
                "static zero": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(-11)},
                "per row": {"x_scale": torch.rand(rows) * 0.05, "x_zero_point": torch.randint(-128, 128, rows)},
                "codes": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(5.4)},
                "unsigned": {"x_scale": torch.tensor([0.02]), "x_zero_point": torch.tensor(200, dtype=torch.uint8)},
                "mixed": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.randint(-128, 128, rows)},
            }[mode]
            kwargs |= output_arguments(out, x) | {"relu": relu, "bias": torch.randn(n).half() if with_bias else None}
            subject.check("int8_linear", x, weight, scale, **kwargs)
            packed = subject.ops.pack_weight(subject.move(weight))
            subject.check_packed("int8_linear", packed, x, weight, scale, **kwargs)

    @pytest.mark.parametrize("activation", range(7))
    def test_residuals_and_activations(self, subject, activation):
        """Residuals of every dtype and results of every dtype, which follow the product in a pass of their own."""
        weight, kernel, scale = codes((21, 37), torch.int8), codes((12, 8, 3, 3), torch.int8), torch.rand(21) * 0.05
        x, image = codes((9, 37), torch.int8), codes((2, 8, 7, 6), torch.int8)
        given = {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(4), "activation": activation}
        residuals = [None, torch.int8, torch.uint8, torch.float32, torch.float16, torch.bfloat16]
        for i, (dtype, out) in enumerate(itertools.product(residuals, OUTPUTS[1:])):
            last = torch.channels_last if i % 2 else torch.contiguous_format
            for op, x_, w, shape in (("int8_linear", x, weight, (9, 21)), ("int8_conv2d", image, kernel, (2, 12, 5, 4))):
                options = given | output_arguments(out, x)
                if dtype in (torch.int8, torch.uint8):
                    options |= {"residual": codes(shape, dtype), "residual_scale": torch.tensor(0.04)}
                    options |= {"residual_zero_point": torch.tensor(7)} if i % 3 else {}
                elif dtype is not None:
                    options["residual"] = (torch.randn(shape) * 4).to(dtype)
                if op == "int8_conv2d":
                    x_ = x_.contiguous(memory_format=last)
                subject.check(op, x_, w, scale[: w.shape[0]], torch.randn(w.shape[0]), **options)

    def test_linear_rows_of_any_strides(self, subject):
        weight, scale = codes((20, 48), torch.int8), torch.rand(20)
        x = activations((6, 5, 100), torch.float32)
        for view in (
            x[..., :48],
            x[..., 3:51],
            x[:, ::2, 16:64],
            x.transpose(0, 1)[..., :48],
            x[:, :, ::2][..., :48],
            x[0, 0, :48],
        ):
            subject.check("int8_linear", view, weight, scale)
            subject.check("int8_linear", view, weight, scale, x_scale=torch.tensor(0.1))
        odd = torch.zeros(20 * 48 + 1, dtype=torch.int8)[1:].view(20, 48).copy_(weight)  # a weight that is not aligned
        subject.check("int8_linear", x[..., :48], odd, scale, asymmetric=True)

    @pytest.mark.parametrize("shape", [(0, 32), (4, 0, 32), (3, 0)])
    def test_empty_linear(self, subject, shape):
        weight = codes((7, shape[-1]), torch.int8)
        for asymmetric in (False, True):
            subject.check("int8_linear", torch.zeros(shape), weight, torch.rand(7), torch.randn(7), asymmetric=asymmetric)
        subject.check("int8_linear", torch.zeros(shape), weight[:0], torch.tensor(1.0))
        subject.check("int8_gemm", codes((shape[0], shape[-1]), torch.int8), weight)

    @pytest.mark.parametrize("seed", range(6))
    def test_any_convolution(self, subject, seed):
        rng = random.Random(seed)
        for _ in range(25):
            n, groups, cg, og, h, w, r, s, stride, padding, dilation = random_case(rng)
            dtype = rng.choice([torch.int8, torch.uint8])
            info = torch.iinfo(dtype)
            zero = rng.choice([info.min, info.max, 0, 1, rng.randint(info.min, info.max)])
            x, weight = codes((n, groups * cg, h, w), dtype), codes((groups * og, cg, r, s), torch.int8)
            one = torch.tensor(1.0)
            args = (weight, one, None, stride, padding, dilation, groups, one, torch.tensor(zero))
            for view in (
                x,
                x.contiguous(memory_format=torch.channels_last),
                x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1),
            ):
                subject.check("int8_conv2d", view, *args, channels_last=rng.choice([None, True, False]))
            packed = subject.ops.pack_weight(subject.move(weight), groups)
            subject.check_packed("int8_conv2d", packed, x, *args)

    @pytest.mark.parametrize("parts", ["", ":3"])
    @pytest.mark.parametrize("kernel", KERNELS)
    def test_convolutions_of_every_kernel(self, subject, kernel, parts):
        """16-byte and 4-byte loads, one and several groups, both layouts of the result."""
        subject.set_kernel(kernel + parts)
        for (c, o, groups), last in itertools.product([(3, 70, 1), (32, 40, 1), (64, 132, 2), (12, 24, 3)], (False, True)):
            x = codes((2, c, 7, 6), torch.int8)
            x = x.contiguous(memory_format=torch.channels_last) if last else x
            args = (
                codes((o, c // groups, 3, 2), torch.int8),
                torch.rand(o) * 0.1,
                torch.randn(o),
                (2, 1),
                (1, 2, 0, 1),
                (1, 2),
                groups,
            )
            subject.check("int8_conv2d", x, *args, torch.tensor(0.1), torch.tensor(-9))

    @pytest.mark.sampled(20)
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static", "static zero", "per sample", "unsigned", "mixed"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_convolution_modes(self, subject, dtype, mode, channels_last):
        quantized = {"unsigned": torch.uint8, "mixed": torch.int8}.get(mode)
        for i, ((c, o, groups), kernel) in enumerate(
            itertools.product([(3, 5, 1), (16, 70, 1), (6, 9, 3), (20, 20, 20), (8, 16, 8), (32, 32, 32)], [1, 3])
        ):
            out, relu, with_bias = OUTPUTS[i % 6], i % 2 == 1, i % 3 != 0
            x = activations((4, c, 5, 6), dtype) if quantized is None else codes((4, c, 5, 6), quantized)
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            kwargs = {
                "dynamic": {},
                "asymmetric": {"asymmetric": True},
                "static": {"x_scale": torch.tensor(0.02)},
                "static zero": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(-11)},
                "per sample": {"x_scale": torch.rand(4, 1, 1, 1) * 0.05, "x_zero_point": torch.tensor(7)},
                "unsigned": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(3)},
                "mixed": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.randint(-128, 128, (4, 1, 1, 1))},
            }[mode]
            kwargs |= output_arguments(out, x) | {"relu": relu, "bias": torch.randn(o) if with_bias else None}
            weight = codes((o, c // groups, kernel, kernel), torch.int8)
            subject.check(
                "int8_conv2d", x, weight, torch.rand(o) * 0.01, stride=[1], padding=[kernel // 2], groups=groups, **kwargs
            )

    @pytest.mark.sampled(12)
    @pytest.mark.parametrize("channels_last", [False, True])
    @pytest.mark.parametrize("mode", ["dynamic", "asymmetric", "static zero", "per sample", "unsigned", "codes"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
    def test_kernels_that_quantize_by_themselves(self, subject, dtype, mode, channels_last):
        """Depthwise, grouped, of an image's channels, and patches: several tiles, tails everywhere, kernels of any width."""
        cases = [  # channels, results, groups, image, kernel, stride, padding, dilation
            (40, 40, 40, (19, 23), (3, 3), (1, 1), (1, 1), (1, 1)),
            (33, 33, 33, (9, 70), (5, 5), (2, 2), (2, 2), (1, 1)),
            (8, 8, 8, (17, 11), (7, 7), (1, 2), (3, 3), (1, 1)),
            (12, 12, 12, (9, 12), (3, 8), (2, 1), (5, 4), (2, 1)),
            (100, 100, 100, (5, 9), (1, 4), (1, 1), (0, 2), (1, 1)),
            (20, 20, 20, (14, 14), (3, 3), (1, 1), (2, 2), (2, 2)),
            (3, 64, 1, (30, 37), (7, 7), (2, 2), (3, 3), (1, 1)),
            (3, 24, 1, (13, 9), (3, 3), (2, 2), (1, 1), (2, 1)),
            (13, 70, 1, (9, 8), (3, 3), (1, 1), (1, 1), (1, 1)),
            (64, 64, 16, (9, 12), (3, 3), (1, 1), (1, 1), (1, 1)),
            (64, 128, 4, (9, 7), (3, 3), (2, 2), (1, 1), (1, 1)),
            (192, 96, 2, (5, 4), (1, 3), (1, 1), (1, 1), (1, 2)),
            (10, 20, 10, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
            (16, 32, 16, (9, 7), (3, 3), (1, 1), (1, 1), (1, 1)),
            (3, 20, 1, (17, 23), (4, 4), (4, 4), (0, 0), (1, 1)),
            (5, 20, 1, (12, 9), (2, 3), (2, 3), (0, 0), (1, 1)),
        ]
        quantized = {"unsigned": torch.uint8, "codes": torch.int8}.get(mode)
        samples = torch.rand(3, 1, 1, 1) * 0.05
        kwargs = {
            "dynamic": {},
            "asymmetric": {"asymmetric": True},
            "static zero": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(-11)},
            "per sample": {"x_scale": samples, "x_zero_point": torch.tensor([3, -128, 127]).view(3, 1, 1, 1)},
            "unsigned": {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(200, dtype=torch.uint8)},
            "codes": {"x_scale": samples},
        }[mode]
        for i, (c, o, groups, image, kernel, stride, padding, dilation) in enumerate(cases):
            shape = (3, c, *image)
            x = torch.randn(shape).to(dtype) if quantized is None else codes(shape, quantized)
            if mode == "dynamic":
                x.view(-1)[::7] = 0.5 * x.abs().max()  # ties between two codes
            if channels_last:
                x = x.contiguous(memory_format=torch.channels_last)
            weight = codes((o, c // groups, *kernel), torch.int8)
            bias = torch.randn(o) if i % 3 else None
            arguments = (x, weight, torch.rand(o) * 0.01, bias, stride, padding, dilation, groups)
            results = kwargs | output_arguments(OUTPUTS[i % 6], x) | {"relu": i % 2 == 1}
            subject.check("int8_conv2d", *arguments, **results)
            packed = subject.ops.pack_weight(subject.move(weight), groups)
            subject.check_packed("int8_conv2d", packed, *arguments, **results)

    def test_convolution_of_views(self, subject):
        """Windows, steps, expanded samples, one image without a batch; codes read in place with pixels and rows apart."""
        big = codes((3, 48, 12, 14), torch.int8).contiguous(memory_format=torch.channels_last)
        for groups, kernel in [(1, 3), (32, 3), (1, 1), (2, 2)]:
            weight, scale = codes((32, 32 // groups, kernel, kernel), torch.int8), torch.rand(32)
            for view in (
                big[:, :32],
                big[:, 16:, 1:, 2:-1],
                big[:, 1:33],
                big[:, :32, ::2, ::3],
                big[:1, :32].expand(4, -1, -1, -1),
            ):
                for zero in (None, torch.tensor(13)):
                    arguments = (view, weight, scale, None, [1], [1], [1], groups, torch.tensor(0.5), zero)
                    subject.check("int8_conv2d", *arguments)
                floats = view.float() * 0.37
                subject.check("int8_conv2d", floats, weight, scale, None, [2], [0, 1], [1], groups)
                subject.check("int8_conv2d", floats[0], weight, scale, None, [2], [0, 1], [1], groups)

    def test_empty_convolution(self, subject):
        weight, scale = codes((5, 4, 3, 3), torch.int8), torch.rand(5)
        for asymmetric in (False, True):
            subject.check("int8_conv2d", torch.zeros(0, 4, 6, 6), weight, scale, asymmetric=asymmetric)
            empty = torch.zeros(2, 4, 0, 3)  # all of it padding
            subject.check("int8_conv2d", empty, weight, scale, torch.randn(5), padding=[2], asymmetric=asymmetric)

    def test_unknown_kernel_is_refused(self, subject):
        subject.set_kernel("igemm_s8s8_1x1x1_mma")
        with pytest.raises(
            RuntimeError, match=r"quant_ops\.int8_gemm: expected QUANT_OPS_CUDA_KERNEL to name a kernel .* got igemm_s8s8_1x1x1"
        ):
            subject.ops.int8_gemm(subject.move(codes((4, 4), torch.int8)), subject.move(codes((4, 4), torch.int8)))


class IgemmSubject(Subject):
    """The operators, and the library that has them."""

    def __init__(self, ops, device: str, library):
        super().__init__(ops, device)
        self.library = ctypes.CDLL(str(library))
        self.library.quant_ops_cuda_set_kernel.argtypes = [ctypes.c_char_p]

    def set_kernel(self, name: str | None) -> None:
        """Wants this kernel from now on; None: as QUANT_OPS_CUDA_KERNEL says."""
        self.library.quant_ops_cuda_set_kernel((name or "").encode())

    def check_packed(self, op: str, packed: torch.Tensor, *args, **kwargs) -> None:
        """The operator with a packed weight against the CPU's with a plain one."""
        expected = getattr(torch.ops.quant_ops, op)(*args, **kwargs)
        moved = {name: self.move(value) for name, value in kwargs.items()}
        assert_same(getattr(self.ops, op)(*(self.move(a) for a in args), packed_weight=packed, **moved), expected)

    def check(self, op: str, *args, **kwargs) -> None:
        expected = getattr(torch.ops.quant_ops, op)(*args, **kwargs)
        moved = {name: self.move(value) for name, value in kwargs.items()}
        assert_same(getattr(self.ops, op)(*(self.move(a) for a in args), **moved), expected)


@pytest.mark.cuda
class TestCudaIgemm(IgemmCases):
    @pytest.fixture
    def subject(self):
        if _library.cuda_library is None:
            pytest.skip(_library.cuda_reason)
        return IgemmSubject(torch.ops.quant_ops, "cuda", _library.cuda_library)

    @pytest.mark.parametrize("m", [1, 2, 7, 8, 9, 16, 17, 64, 100, 129, 1000])
    def test_sums_of_large_products(self, subject, m):
        for n, k in [(4096, 4096), (1000, 11008), (24, 65792)]:
            subject.check("int8_gemm", codes((m, k), torch.int8), codes((n, k), torch.int8))

    @pytest.mark.parametrize("parts", ["", ":2", ":9"])
    @pytest.mark.parametrize("kernel", HOPPER)
    def test_any_number_of_columns_by_every_hopper_kernel(self, subject, kernel, parts):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no Hopper GPU")
        subject.set_kernel(kernel + parts)
        try:
            subject.check("int8_gemm", codes((5, 2304), torch.int8), codes((16, 2304), torch.int8))
        except RuntimeError as error:
            pytest.skip(f"built without the Hopper engine: {error}")
        for m, n in [(1, 1), (70, 7), (130, 10), (3, 17), (33, 33), (200, 100), (260, 1000), (2, 1001), (150, 272), (9, 50257)]:
            k = 2304 if n < 2000 else 528
            subject.check("int8_gemm", codes((m, k), torch.int8), codes((n, k), torch.int8))
            x, weight = activations((m, k), torch.bfloat16), codes((n, k), torch.int8)
            scale, bias = torch.rand(n) * 0.01, torch.randn(n)
            for out in OUTPUTS:
                arguments = {"asymmetric": True, **output_arguments(out, x)}
                subject.check("int8_linear", x, weight, scale, bias, **arguments)

    @pytest.mark.parametrize("kernel", [name for name in HOPPER if "swapped" not in name])
    def test_any_number_of_channels_by_every_hopper_kernel(self, subject, kernel):
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("no Hopper GPU")
        subject.set_kernel(kernel)
        for o, groups in [(1, 1), (10, 1), (85, 1), (170, 2), (255, 1)]:
            image, weight = torch.randn(2, 64 * groups, 9, 11), codes((o, 64, 3, 3), torch.int8)
            for layout in (torch.contiguous_format, torch.channels_last):
                x = image.contiguous(memory_format=layout)
                for asymmetric in (False, True):
                    arguments = {"padding": [1], "groups": groups, "asymmetric": asymmetric}
                    subject.check("int8_conv2d", x, weight, torch.rand(o) * 0.01, torch.randn(o), **arguments)

    @pytest.mark.parametrize("split", [False, True])
    def test_captured_graph_sees_new_inputs(self, subject, split):
        if split:
            subject.set_kernel(KERNELS[0] + ":4")
        x, weight = activations((37, 512), torch.bfloat16).cuda(), codes((96, 512), torch.int8).cuda()
        scale, out_scale = torch.rand(96).cuda() * 0.01, torch.tensor(0.1).cuda()
        image, kernel = torch.randn(2, 8, 9, 9).cuda(), codes((24, 8, 3, 3), torch.int8).cuda()

        def step():
            return (
                torch.ops.quant_ops.int8_linear(x, weight, scale, asymmetric=True),
                torch.ops.quant_ops.int8_linear(x, weight, scale, out_scale=out_scale),
                torch.ops.quant_ops.int8_conv2d(image, kernel, out_scale, padding=[1], asymmetric=True),
            )

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = step()
        for _ in range(3):
            x.copy_(torch.randn_like(x) * 5)
            image.copy_(torch.randn_like(image))
            weight.random_(-128, 128)
            scale.uniform_(0.001, 0.1)
            out_scale.uniform_(0.05, 0.2)
            graph.replay()
            for r, e in zip(results, step(), strict=True):
                assert_same(r, e.cpu())

    def test_runs_on_the_current_stream(self, subject):
        x, weight, scale = torch.randn(64, 256).cuda(), codes((32, 256), torch.int8).cuda(), torch.rand(32).cuda()
        expected = torch.ops.quant_ops.int8_linear(x, weight, scale)
        late = torch.zeros_like(x)
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # a kernel on any other stream would read the zeros
            late.copy_(x)
            y = torch.ops.quant_ops.int8_linear(late, weight, scale)
        stream.synchronize()
        assert_same(y, expected.cpu())

    def test_layers_move_to_the_gpu(self, subject):
        x, image = activations((5, 50), torch.float32), torch.randn(2, 6, 9, 9)
        for layer, data in [
            (qo.QuantLinear.from_float(torch.nn.Linear(50, 30), asymmetric=True), x),
            (qo.QuantConv2d.from_float(torch.nn.Conv2d(6, 12, 3, padding=1, groups=2)), image),
        ]:
            expected = layer(data)
            assert_same(layer.cuda()(data.cuda()), expected)
            assert_same(layer.cpu()(data), expected)

    def test_fakes_and_schemas(self, subject):
        utilities = ("test_schema", "test_faketensor")
        x, weight, scale = torch.randn(5, 50).cuda(), codes((30, 50), torch.int8).cuda(), torch.tensor(0.1).cuda()
        ops = torch.ops.quant_ops
        torch.library.opcheck(ops.int8_linear.default, (x, weight, scale), test_utils=utilities)
        torch.library.opcheck(ops.int8_gemm.default, (weight, weight), test_utils=utilities)
        torch.library.opcheck(ops.pack_weight.default, (weight,), test_utils=utilities)
        kernel = codes((12, 3, 3, 3), torch.int8).cuda()
        for image in (torch.randn(2, 6, 9, 9).cuda(), torch.randn(2, 6, 9, 9).cuda().contiguous(memory_format=torch.channels_last)):
            torch.library.opcheck(ops.int8_conv2d.default, (image, kernel, scale, None, [1], [1], [1], 2), test_utils=utilities)

    @pytest.mark.slow
    def test_more_than_two_to_the_31_elements(self, subject):
        m, k = 2**20 + 3, 2**11
        x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda").normal_()
        weight, scale = codes((2**11 + 8, k), torch.int8), torch.rand(2**11 + 8)
        y = torch.ops.quant_ops.int8_linear(x, weight.cuda(), scale.cuda())
        for rows in (slice(0, 3), slice(m // 2, m // 2 + 3), slice(m - 3, m)):
            assert_same(y[rows], torch.ops.quant_ops.int8_linear(x[rows].cpu(), weight, scale))
