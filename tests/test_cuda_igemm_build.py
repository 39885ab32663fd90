"""What can be checked of the integer products on CUDA without a GPU.

* All cases of test_cuda_igemm.py on the emulated kernels: ldmatrix, mma and asynchronous copies as the PTX manual has them.
* Swizzles, bank conflicts, fragment maps, convolution addresses, the choice of tiles and the plans by themselves
  (igemm_rules.cpp).
* Fake kernels describe CUDA tensors as the operators make them; the compiled kernels hold the instructions that they are made of.
"""

import ctypes
import itertools
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from compiled import compiled_for_host
from test_cuda_build import BUILT, needs_compiler, needs_library
from test_cuda_igemm import GEMV, KERNELS, IgemmCases, IgemmSubject, codes
from torch._subclasses.fake_tensor import FakeTensorMode

import quant_ops as qo
from quant_ops import _library


@needs_compiler
class TestEmulatedIgemm(IgemmCases):
    @pytest.fixture
    def subject(self, emulated):
        library = next(path for path in torch.ops.loaded_libraries if "libquant_ops_emulated" in str(path))
        return IgemmSubject(emulated, "cpu", library)

    def test_packed_weights_have_the_length_that_fakes_say(self, subject):
        for shape, groups in [
            ((7, 32), 1),
            ((7, 33), 1),
            ((8, 3, 3, 3), 1),
            ((24, 1, 5, 3), 24),
            ((32, 4, 3, 3), 8),
            ((66, 16, 1, 1), 2),
        ]:
            packed = subject.ops.pack_weight(codes(shape, torch.int8), groups)
            with FakeTensorMode():
                fake = qo.pack_weight(torch.empty(shape, dtype=torch.int8, device="cuda"), groups)
            assert (fake.shape, fake.dtype, fake.device.type) == (packed.shape, torch.int8, "cuda")

    def test_weight_packed_for_another_shape_is_refused(self, subject):
        packed = subject.ops.pack_weight(codes((8, 16), torch.int8))
        with pytest.raises(RuntimeError, match=r"int8_linear: expected packed_weight made by pack_weight from this weight"):
            subject.ops.int8_linear(torch.randn(2, 16), codes((24, 16), torch.int8), torch.tensor(1.0), packed_weight=packed)

    def test_kernel_has_a_name(self, subject, monkeypatch):
        function = subject.library.quant_ops_cuda_gemm_kernel
        function.restype, function.argtypes = ctypes.c_char_p, [ctypes.c_int64] * 3
        names = [function(m, 4096, 4096).decode().split(":")[0] for m in (1, 9, 64, 1000)]
        assert names[0] in (GEMV, *KERNELS)
        assert set(names[1:]) <= set(KERNELS)
        monkeypatch.setenv("QUANT_OPS_CUDA_KERNEL", KERNELS[2] + ":4")
        assert function(100, 4096, 4096).decode() != KERNELS[2] + ":4"  # the environment is read once
        subject.set_kernel(None)
        assert function(100, 4096, 4096).decode() == KERNELS[2] + ":4"
        subject.set_kernel(GEMV)
        assert function(9, 16, 16).decode().startswith("quant_ops.int8_gemm: expected QUANT_OPS_CUDA_KERNEL to name a kernel")


@pytest.mark.skipif(_library.cuda_library is not None, reason="the CUDA library is loaded")
def test_kernel_names_need_the_library():
    with pytest.raises(RuntimeError, match=r"expected the CUDA operators to be loaded, got none"):
        _library.cuda_gemm_kernel(1, 16, 16)


@needs_compiler
def test_addresses_fragments_tile_choice_and_plans():
    sources = [
        f"cuda/{name}"
        for name in (
            "engine/choose.cpp",
            "linear.cpp",
            "conv2d.cu",
            "conv2d_depthwise.cu",
            "conv2d_direct.cu",
            "conv2d_patches.cu",
            "pack.cu",
            "qparams.cu",
        )
    ]
    drop_kernels = ["-Wl,--gc-sections"]  # only plans are called
    program = compiled_for_host("igemm_rules", ["tests/igemm_rules.cpp", *sources], "-ffunction-sections", link_flags=drop_kernels)
    done = subprocess.run([program], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("out", [None, torch.int8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fakes_describe_cuda_results(layout, out):
    x, weight = torch.randn(2, 6, 5, 7).contiguous(memory_format=layout), codes((8, 3, 3, 3), torch.int8)
    linear_weight, scale = codes((9, 7), torch.int8), torch.tensor(0.1)
    kwargs = {} if out is None else {"out_scale": scale}
    expected = [
        qo.int8_conv2d(x, weight, scale, groups=2, padding=1, **kwargs),
        qo.int8_linear(x, linear_weight, scale, **kwargs),
        qo.int8_gemm(linear_weight, linear_weight),
    ]
    with FakeTensorMode():
        x = torch.empty(2, 6, 5, 7, device="cuda", memory_format=layout)
        weight, linear_weight = (torch.empty(shape, dtype=torch.int8, device="cuda") for shape in ((8, 3, 3, 3), (9, 7)))
        scale = torch.empty((), device="cuda")
        kwargs = {} if out is None else {"out_scale": scale}
        packed = qo.pack_weight(weight, 2)
        fakes = [
            qo.int8_conv2d(x, weight, scale, groups=2, padding=1, packed_weight=packed, **kwargs),
            qo.int8_linear(x, linear_weight, scale, **kwargs),
            qo.int8_gemm(linear_weight, linear_weight),
        ]
    for fake, real in zip(fakes, expected, strict=True):
        assert (fake.device.type, fake.dtype, fake.shape, fake.stride()) == ("cuda", real.dtype, real.shape, real.stride())


@needs_library
def test_kernels_hold_their_instructions():
    """Tensor-core multiplications, asynchronous 16-byte copies, matrix loads; no local memory."""
    tools = [os.environ.get("CUOBJDUMP"), shutil.which("cuobjdump"), "/usr/local/cuda/bin/cuobjdump"]
    tool = next((t for t in tools if t and Path(t).is_file() and shutil.which("nvdisasm", path=str(Path(t).parent))), None)
    if tool is None:
        pytest.skip("no cuobjdump and nvdisasm (CUOBJDUMP names one)")
    path = f"{Path(tool).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([tool, "-sass", str(BUILT)], capture_output=True, text=True, check=True, env={**os.environ, "PATH": path})
    kernels = re.split(r"\n\s*Function : ", done.stdout)[1:]
    engine = [k for k in kernels if "igemm_kernel" in k.split("\n", 1)[0]]
    gemv = [k for k in kernels if "gemv_kernel" in k.split("\n", 1)[0]]
    direct = [k for k in kernels if "direct_kernel" in k.split("\n", 1)[0]]
    depthwise = [k for k in kernels if "tile_kernel" in k.split("\n", 1)[0]]
    fused = [k for k in kernels if "fused_kernel" in k.split("\n", 1)[0]]
    assert engine
    assert gemv
    assert direct
    assert depthwise
    assert fused
    for kernel, needed in itertools.chain(
        ((k, [r"IMMA\.16832\.S8\.S8", r"LDGSTS\.E\.BYPASS\.LTC128B\.128", r"LDSM\.16\.M88\.4"]) for k in engine + fused),
        ((k, [r"IMMA\.16832\.S8\.S8", r"LDG\.E\.128"]) for k in gemv),
        ((k, [r"IMMA\.16832\.S8\.S8"]) for k in direct),
        ((k, [r"IDP\.4A\.S8\.S8"]) for k in depthwise),
    ):
        name = kernel.split("\n", 1)[0]
        for instruction in needed:
            assert re.search(instruction, kernel), (name, instruction)
        assert not re.search(r"\b(LDL|STL)\b", kernel), name
