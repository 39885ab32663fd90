"""weight_only_linear on CUDA: packed bytes and results of codes are the CPU's, floating results keep their bound.

``WeightOnlyCases`` needs no GPU by itself: it runs on the emulated kernels (host_emulation.h), too.
"""

import ctypes
import itertools
import mmap
import re

import pytest
import torch
from compiled import ROOT
from reference import same_bits
from test_cuda_build import BUILD, needs_compiler, needs_library
from test_cuda_igemm import IgemmSubject, KernelCases, activations
from test_weight_only import EPS, ZEROS, dequantized, problem
from torch._subclasses.fake_tensor import FakeTensorMode

import quant_ops as qo
from quant_ops import _library

GEMV = "weight_only_gemv"
TILES = ["weight_only_32x128", "weight_only_64x128", "weight_only_128x128"]
HOPPER = (ROOT / "cuda" / "engine" / "sm90" / "weight_only.h").read_text()
WGMMA = re.findall(r'\{"(weight_only_\w+_wgmma)"', HOPPER)
GROUPS = [32, 64, 128, 256, -1]
HALVES = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, *HALVES]
# M, K, N: one element, tails on every side, several pieces of K, rounds of groups, rows of several blocks
SHAPES = [(1, 1, 1), (3, 97, 17), (9, 130, 70), (17, 320, 48), (1, 1400, 33)]


def linear(subject, x, codes, scale, zero, *args, **kwargs):
    return subject.ops.weight_only_linear(*(subject.move(t) for t in (x, codes, scale, zero)), *args, **kwargs).cpu()


class WeightOnlyCases(KernelCases):
    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    def test_multiplied_columns(self, subject, dtype):
        """With codes the CPU's bits; without them the bits of the same call on the product."""
        for (m, k, n), bits, zeros in itertools.product(SHAPES, [8, 4], ZEROS):
            codes, scale, zero = problem(n, k, bits, 64, zeros)
            x, multiplier = activations((m, k), dtype), torch.rand(k) * 3 - 1
            for asymmetric in (False, True):
                kwargs = {"dynamic": True, "asymmetric": asymmetric}
                expected = qo.weight_only_linear(x, codes, scale, zero, None, bits, 64, x_multiplier=multiplier, **kwargs)
                y = linear(subject, x, codes, scale, zero, None, bits, 64, x_multiplier=subject.move(multiplier), **kwargs)
                assert same_bits(y, expected), (m, k, n, bits, zeros)
            y = linear(subject, x, codes, scale, zero, None, bits, 64, x_multiplier=subject.move(multiplier))
            product = x.float() * multiplier
            assert same_bits(y, linear(subject, product, codes, scale, zero, None, bits, 64, out_dtype=dtype)), (
                m,
                k,
                n,
                bits,
                zeros,
            )

    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_packed_bytes(self, subject, bits, group):
        for n, k in itertools.product([0, 1, 15, 16, 17, 64, 65, 130], [0, 1, 7, 8, 33, 64, 300]):
            codes, _, _ = problem(n, k, bits, group, "none")
            packed = qo.pack_weight_only(codes, bits, group)
            for weight in (codes, codes.T.contiguous().T):
                assert torch.equal(subject.ops.pack_weight_only(subject.move(weight), bits, group).cpu(), packed)
            assert torch.equal(subject.ops.unpack_weight_only(subject.move(packed), (n, k), bits, group).cpu(), codes)

    def check_codes(self, subject, m, k, n, bits, group, zeros, asymmetric, dtype=torch.float32, out=None):
        codes, scale, zero = problem(n, k, bits, group, zeros)
        x = activations((m, k), dtype) if k > 0 else torch.randn(m, 0, dtype=dtype)
        bias = torch.randn(n) if (m + n) % 2 else None
        args, kwargs = (bias, bits, group), {"dynamic": True, "asymmetric": asymmetric, "out_dtype": out}
        expected = qo.weight_only_linear(x, codes, scale, zero, *args, **kwargs)
        bias = None if bias is None else subject.move(bias)
        y = linear(subject, x, codes, scale, zero, bias, *args[1:], **kwargs)
        assert y.dtype == expected.dtype
        assert torch.equal(y.isnan(), expected.isnan())
        y, expected = y.float().nan_to_num(), expected.float().nan_to_num()
        assert torch.equal(y, expected), (m, k, n, bits, group, zeros)
        assert torch.equal(y.signbit(), expected.signbit())

    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_codes_have_the_bits_of_the_cpu(self, subject, bits, group):
        for (m, k, n), zeros, asymmetric in itertools.product([*SHAPES, (4, 0, 3)], ZEROS, [False, True]):
            self.check_codes(subject, m, k, n, bits, group, zeros, asymmetric)

    @pytest.mark.sampled(8)
    @pytest.mark.parametrize("kernel", [GEMV, *TILES])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_codes_by_every_kernel(self, subject, bits, kernel):
        subject.set_kernel(kernel)
        cases = [(1, 1, 1, -1), (17, 97, 17, 32), (35, 320, 130, 64), (70, 700, 48, 128), (9, 1100, 33, 256), (130, 515, 20, -1)]
        for (m, k, n, group), asymmetric in itertools.product(cases, [False, True]):
            self.check_codes(subject, m, k, n, bits, group, ZEROS[(m + asymmetric) % 3], asymmetric)

    @pytest.mark.parametrize("dtype", FLOATS, ids=str)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_codes_of_every_dtype(self, subject, bits, dtype):
        for out, (m, kernel) in itertools.product([None, *FLOATS], [(5, GEMV), (21, TILES[0])]):
            subject.set_kernel(kernel)
            self.check_codes(subject, m, 200, 37, bits, 64, "integer", True, dtype, out)

    def check_floats(self, subject, x, bits, group, zeros, n, bias=None):
        codes, scale, zero = problem(n, x.shape[-1], bits, group, zeros)
        w = dequantized(codes, scale, zero, group)
        expected, size = x.double() @ w.T, x.double().abs() @ w.abs().T
        if bias is not None:
            expected, size, bias = expected + bias.double(), size + bias.double().abs(), subject.move(bias)
        y = linear(subject, x, codes, scale, zero, bias, bits, group, out_dtype=torch.float32)
        assert ((y.double() - expected).abs() <= 2 * EPS * size).all(), (x.shape, n, bits, group, zeros, x.dtype)
        out = HALVES[n % 2]
        rounded = linear(subject, x, codes, scale, zero, bias, bits, group, out_dtype=out)
        assert torch.equal(rounded, y.to(out))

    @pytest.mark.sampled(8)
    @pytest.mark.parametrize("group", GROUPS)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_floats_keep_their_bound(self, subject, bits, group):
        for (m, k, n), zeros, dtype in itertools.product([*SHAPES, (4, 0, 3)], ZEROS, FLOATS):
            self.check_floats(subject, (torch.randn(m, k) * 3).to(dtype), bits, group, zeros, n, torch.randn(n) if m % 2 else None)

    @pytest.mark.sampled(6)
    @pytest.mark.parametrize("kernel", [GEMV, *TILES])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_floats_by_every_kernel(self, subject, bits, kernel):
        subject.set_kernel(kernel)
        cases = [(1, 1, 1, -1), (17, 97, 17, 32), (35, 320, 130, 64), (70, 704, 48, 128), (9, 1100, 33, 256), (130, 515, 20, -1)]
        for (m, k, n, group), dtype in itertools.product(cases, HALVES):
            self.check_floats(subject, (torch.randn(m, k) * 3).to(dtype), bits, group, ZEROS[m % 2], n)

    def test_rounds_of_groups(self, subject):
        """More groups than the shared memory of a block holds."""
        for bits, zeros in ((4, "none"), (8, "integer")):
            self.check_codes(subject, 16, 1700, 130, bits, 32, zeros, bits == 8)
            dtype = torch.bfloat16 if bits == 4 else torch.float32
            self.check_floats(subject, torch.randn(1, 7100).to(dtype), bits, 32, zeros, 130)

    @pytest.mark.sampled(5)
    @pytest.mark.parametrize("splits", [2, 3, 7])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_floats_with_splits_of_k(self, subject, bits, splits):
        subject.set_kernel(f"{TILES[0]}:{splits}")
        for m, k, n, group in [(17, 515, 30, 128), (35, 1100, 132, 32), (2, 700, 5, -1), (3, 64, 8, 64)]:
            self.check_floats(subject, (torch.randn(m, k) * 3).to(HALVES[n // 2 % 2]), bits, group, ZEROS[m % 2], n, torch.randn(n))
        self.check_codes(subject, 17, 515, 30, bits, 128, "none", False)  # codes are not split

    @pytest.mark.sampled(3)
    @pytest.mark.parametrize("kernel", [None, *TILES[:1]])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_long_sums_of_one_sign_keep_the_bound(self, subject, bits, kernel):
        """Where nothing cancels the rounding errors are largest, relative to the bound's sum."""
        for group, dtype in itertools.product([128, -1], FLOATS):
            if kernel is not None and dtype == torch.float32:
                continue
            subject.set_kernel(kernel)
            codes, scale, _ = problem(20, 16384, bits, group, "none")
            codes, x = codes.abs().clamp(max=(1 << (bits - 1)) - 1), (torch.rand(2, 16384) + 0.5).to(dtype)
            w = dequantized(codes, scale, None, group)
            y = linear(subject, x, codes, scale, None, None, bits, group, out_dtype=torch.float32)
            assert ((y.double() - x.double() @ w.T).abs() <= 2 * EPS * (x.double() @ w.T)).all()

    @pytest.mark.parametrize("kernel", [GEMV, *TILES[:1]])
    def test_extreme_codes(self, subject, kernel):
        subject.set_kernel(kernel)
        for bits, low in ((8, -128), (4, -8)):
            for value, zero, group in itertools.product([low, -low - 1], [-128, 127], [32, 256]):
                codes, scale = torch.full((18, 512), value, dtype=torch.int8), torch.ones(18, 512 // group)
                z = torch.full(scale.shape, zero, dtype=torch.int8)
                x = torch.ones(3, 512)
                x[:, ::2] = -1
                x[1] = 5
                for asymmetric in (False, True):
                    kwargs = {"dynamic": True, "asymmetric": asymmetric}
                    expected = qo.weight_only_linear(x, codes, scale, z, None, bits, group, **kwargs)
                    assert torch.equal(linear(subject, x, codes, scale, z, None, bits, group, **kwargs), expected)
                for dtype in HALVES:  # every difference q - z is a number of the dtype
                    y = linear(subject, x.to(dtype), codes, scale, z, None, bits, group, out_dtype=torch.float32)
                    assert torch.equal(y, x.sum(1, keepdim=True).expand(3, 18) * (value - zero))

    @pytest.mark.parametrize("bits", [8, 4])
    def test_layouts(self, subject, bits):
        """Scales and zero points in any layout and dtype; views of x, whole vectors or not; one group as a vector."""
        for n, dtype in itertools.product((32, 30), FLOATS):
            codes, scale, zero = problem(n, 256, bits, 64, "integer")
            x = torch.randn(3, 256).to(dtype)
            by_groups = scale.T.contiguous().T, zero.T.contiguous().T
            wide = torch.stack([scale, scale], 2)[..., 0], torch.stack([zero, zero], 2)[..., 0].int()
            for dynamic in (False, True):
                y = linear(subject, x, codes, scale, zero, None, bits, 64, dynamic=dynamic)
                for s, z in (by_groups, wide):
                    assert torch.equal(linear(subject, x, codes, s, z, None, bits, 64, dynamic=dynamic), y)
                views = [x.T.contiguous().T, torch.cat([x, x], 1)[:, :256], torch.cat([x[:, :1], x], 1)[:, 1:], x[None]]
                for view in views:
                    assert torch.equal(linear(subject, view, codes, scale, zero, None, bits, 64, dynamic=dynamic).view(3, n), y)
            one = scale[:, 0]
            assert torch.equal(
                linear(subject, x, codes, one, None, None, bits), linear(subject, x, codes, one[:, None], None, None, bits)
            )

    def test_packed_weights_and_placeholders(self, subject):
        codes, scale, _ = problem(40, 256, 4, 32, "none")
        x = torch.randn(2, 256)
        packed = subject.move(qo.pack_weight_only(codes, 4, 32))
        placeholder = torch.zeros((), dtype=torch.int8).expand(40, 256)
        y = linear(subject, x, placeholder, scale, None, None, 4, 32, packed_weight=packed)
        assert torch.equal(y, linear(subject, x, codes, scale, None, None, 4, 32))
        for other in (packed[:-16], packed[1:]):
            with pytest.raises(
                RuntimeError, match=r"weight_only_linear: expected packed_weight made by pack_weight_only from this"
            ):
                linear(subject, x, placeholder, scale, None, None, 4, 32, packed_weight=other)

    @pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,)])
    def test_no_rows_no_columns(self, subject, shape):
        for n, bits, dynamic in itertools.product([0, 1, 5], [4, 8], [False, True]):
            codes, scale, _ = problem(n, 8, bits, -1, "none")
            bias = subject.move(torch.randn(n))
            assert linear(subject, torch.randn(shape), codes, scale, None, bias, bits, dynamic=dynamic).shape == (*shape[:-1], n)

    @pytest.mark.parametrize("kernel", [GEMV, *TILES[:1]])
    @pytest.mark.parametrize("dtype", HALVES, ids=str)
    def test_rows_do_not_see_each_other(self, subject, dtype, kernel):
        """NaN and Inf stay in their row; a row of zeros gives the bias exactly."""
        subject.set_kernel(kernel)
        codes, scale, zero = problem(40, 300, 4, 128, "integer")
        x, bias = torch.randn(20, 300).to(dtype), torch.randn(40).to(dtype).float()
        x[7] = 0
        x[9, 5], x[11, 0] = torch.nan, torch.inf
        y = linear(subject, x, codes, scale, zero, subject.move(bias), 4, 128)
        assert torch.equal(y[7].float(), bias)
        assert (~y.isfinite()).any(1).nonzero().flatten().tolist() == [9, 11]

    def test_refused_kernel(self, subject):
        subject.set_kernel(TILES[0])
        codes, scale, _ = problem(8, 64, 4, 32, "none")
        with pytest.raises(RuntimeError, match=r"got weight_only_32x128. Unset it, or name weight_only_float32."):
            linear(subject, torch.randn(2, 64), codes, scale, None, None, 4, 32)


@needs_compiler
class TestEmulatedWeightOnly(WeightOnlyCases):
    @pytest.fixture
    def subject(self, emulated):
        library = next(path for path in torch.ops.loaded_libraries if "libquant_ops_emulated" in str(path))
        return IgemmSubject(emulated, "cpu", library)

    def test_reads_nothing_behind_its_operands(self, subject):
        """Every operand ends where a page does that cannot be read."""
        for bits, (m, k, n, group) in itertools.product(
            [4, 8], [(1, 40, 5, 32), (5, 136, 20, 64), (19, 264, 37, -1), (3, 51, 17, 32)]
        ):
            codes, scale, zero = problem(n, k, bits, group, "integer")
            packed = qo.pack_weight_only(codes, bits, group)
            for kernel, dtype, dynamic in itertools.product([GEMV, TILES[0]], HALVES, [False, True]):
                subject.set_kernel(kernel)
                x, s, z, p = map(before_a_guard, (torch.randn(m, k).to(dtype), scale, zero, packed))
                subject.ops.weight_only_linear(x, codes, s, z, None, bits, group, packed_weight=p, dynamic=dynamic)
            subject.set_kernel(None)
            x = before_a_guard(torch.randn(m, k))
            subject.ops.weight_only_linear(x, codes, s, z.float(), None, bits, group, packed_weight=p)


def before_a_guard(t: torch.Tensor) -> torch.Tensor:
    """A copy that ends at the end of a page, behind which is one that cannot be read."""
    libc, size = ctypes.CDLL(None, use_errno=True), t.numel() * t.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)  # never unmapped: a tensor may outlive the call
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(address + pages), mmap.PAGESIZE, 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - size).view(t.shape).copy_(t)


@pytest.mark.cuda
class TestCudaWeightOnly(WeightOnlyCases):
    @pytest.fixture
    def subject(self):
        if _library.cuda_library is None:
            pytest.skip(_library.cuda_reason)
        return IgemmSubject(torch.ops.quant_ops, "cuda", _library.cuda_library)

    @pytest.mark.parametrize("m", [1, 2, 8, 9, 16, 17, 64, 100, 300])
    @pytest.mark.parametrize("bits", [8, 4])
    def test_large_products(self, subject, bits, m):
        for n, k, group in [(4096, 4096, 128), (1000, 14336, 32), (48, 32768, -1)]:
            self.check_codes(subject, m, k, n, bits, group, "none", False, torch.bfloat16)
            self.check_codes(subject, m, k, n, bits, group, "integer", True, torch.bfloat16)
            self.check_floats(subject, torch.randn(m, k).bfloat16(), bits, group, "integer", n)

    @pytest.mark.parametrize("kernel", WGMMA)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_hopper_tiles(self, subject, bits, kernel):
        """Tails of M, N and K, groups within and across stages, fewer rows than a tile has, several tiles each way."""
        if torch.cuda.get_device_capability() != (9, 0):
            pytest.skip("the kernels are for compute capability 9.0")
        subject.set_kernel(kernel)
        cases = [(1, 1, 1, -1), (17, 97, 17, 32), (35, 320, 130, 64), (70, 704, 48, 128), (9, 1100, 33, 256), (130, 515, 20, -1)]
        for (m, k, n, group), asymmetric in itertools.product(
            [*cases, (300, 4096, 1001, 32), (257, 2080, 1030, 128)], [False, True]
        ):
            self.check_codes(subject, m, k, n, bits, group, "none", asymmetric)
            x = (torch.randn(m, k) * 3).to(HALVES[asymmetric])
            self.check_floats(subject, x, bits, group, ZEROS[(m + asymmetric) % 2], n, torch.randn(n) if m % 2 else None)

    def test_captured_graph_sees_new_rows(self, subject):
        codes, scale, zero = (t.cuda() for t in problem(512, 1024, 4, 128, "integer"))
        packed = qo.pack_weight_only(codes, 4, 128)
        for m, dynamic in itertools.product([1, 40], [False, True]):
            x = torch.randn(m, 1024, device="cuda").bfloat16()
            call = {"packed_weight": packed, "dynamic": dynamic}
            qo.weight_only_linear(x, codes, scale, zero, None, 4, 128, **call)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                y = qo.weight_only_linear(x, codes, scale, zero, None, 4, 128, **call)
            x.copy_(torch.randn(m, 1024))
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(y, qo.weight_only_linear(x, codes, scale, zero, None, 4, 128, **call))


def test_fakes_describe_cuda_tensors():
    with FakeTensorMode():
        x = torch.empty(2, 3, 64, device="cuda", dtype=torch.bfloat16)
        weight, scale = torch.empty(10, 64, device="cuda", dtype=torch.int8), torch.empty(10, 2, device="cuda")
        packed = qo.pack_weight_only(weight, 4, 32)
        y = qo.weight_only_linear(x, weight, scale, None, None, 4, 32, packed_weight=packed)
        assert (y.device.type, y.dtype, y.shape) == ("cuda", torch.bfloat16, (2, 3, 10))
        assert packed.device.type == "cuda"
        assert (
            packed.numel()
            == torch.ops.quant_ops.pack_weight_only(torch.zeros(10, 64, dtype=torch.int8, device="cpu"), 4, 32).numel()
        )


@needs_library
def test_few_rows_leave_registers_for_loads_in_flight():
    """Sixteen warps of the GEMV of up to eight rows fit a multiprocessor, each with two pieces of the weight in flight."""
    text = "".join(log.read_text() for log in BUILD.glob("ptxas-*weight_only_gemv*.log"))
    registers = re.findall(r"gemv_kernelI\w*Li[48]ELi1EE.*?Used (\d+) registers", text, re.DOTALL)
    assert len(registers) >= 6
    assert max(map(int, registers)) <= 128
