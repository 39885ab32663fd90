"""quant_ops.compat.torch_quant_ext: the block of its document, and the shapes of its benchmark."""

import pytest
import torch
from documents import run

from quant_ops.compat import torch_quant_ext

TORCH_QUANT_EXT = """
import torch
from quant_ops.compat import torch_quant_ext
tensor=torch.randn(1,128, 56,56).cuda()
scale=torch.ones(1).cuda()*0.1
zero_point=torch.zeros(1).cuda()
qmin=-128
qmax=127
asymmetric = False
simulate = True
qtensor=torch_quant_ext.quant_tensor_forward(tensor, scale, zero_point, qmin, qmax, asymmetric, simulate)
"""


@pytest.fixture
def cuda_or_cpu(monkeypatch):
    """Without a GPU, .cuda() leaves a tensor where it is."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def test_torch_quant_ext_document(cuda_or_cpu):
    found = run(TORCH_QUANT_EXT)
    expected = (found["tensor"] / found["scale"]).round().clamp(-128, 127) * found["scale"]
    assert torch.equal(found["qtensor"], expected)


@pytest.mark.parametrize("shape", [(1,), (32, 1, 1, 1), (1, 128, 1, 1)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("simulate", [False, True])
def test_torch_quant_ext_benchmarked_shapes(shape, asymmetric, simulate):
    """The scales of its own benchmark, whose formula rounds half up: no half step occurs in random data."""
    x, scale = torch.randn(32, 128, 7, 7), torch.rand(shape) + 0.05
    zero_point = torch.randint(-5, 6, shape).float()
    codes = torch.floor(x / scale + 0.5) + (zero_point if asymmetric else 0)
    codes = codes.clamp(-128, 127)
    expected = (codes - (zero_point if asymmetric else 0)) * scale if simulate else codes
    got = torch_quant_ext.quant_tensor_forward(x, scale, zero_point, -128, 127, asymmetric, simulate)
    assert torch.equal(got.float(), expected)
    assert got.dtype == (torch.float32 if simulate else torch.int8)
