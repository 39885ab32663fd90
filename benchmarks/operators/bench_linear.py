"""int8_gemm and int8_linear against torch's float and int8 products. Results are checked before anything is timed.

int8 contenders quantize float activations, multiply, scale and add a bias within the timed call, as a model would.
"""

import functools

import pytest
import torch

import quant_ops as qo
from benchmarks.common import problems, shapes
from benchmarks.common.problems import LinearProblem
from benchmarks.operators.cases import cases, check


class Problem(LinearProblem):
    @functools.cached_property
    def codes(self):
        return qo.quant_tensor_forward(self.x, self.input_scale, None, -127, 127, simulate=False)

    def exact_sums(self, codes):
        # float64 holds these integer sums exactly: they stay below 2^53
        return codes.double() @ self.int8_layer.qweight.double().T

    def exact(self, codes, scale):
        """The epilogue of ops.h: one product of scales, one fused multiply-add (float64 holds the product exactly)."""
        scales = (scale * self.int8_layer.weight_scale).double()
        return (self.exact_sums(codes).float().double() * scales + self.int8_layer.bias.double()).float()


@functools.lru_cache(maxsize=1)
def problem(shape):
    torch.manual_seed(0)
    return Problem(shape)


# Each contender makes from a problem the call, and its exact result or the least SQNR in dB against float32.


def ours_dynamic(p):
    q, scale, _ = qo.quantize_rows(p.x)
    return problems.ours_dynamic(p), p.exact(q, scale)


def ours_dynamic_bf16(p):
    return functools.partial(p.int8_layer, p.x.bfloat16()), 30.0


def ours_static(p):
    return problems.ours_static(p), p.exact(p.codes, p.input_scale)


def fp32(p):
    return problems.floating(torch.float32, p), 100.0


def bf16(p):
    return problems.floating(torch.bfloat16, p), 35.0


def _torch_ao(engine):
    def contender(p):
        if engine not in torch.backends.quantized.supported_engines or not hasattr(torch.ops.quantized, "linear_dynamic"):
            pytest.skip(f"torch {torch.__version__} has no torch.ops.quantized.linear_dynamic for the engine {engine}")
        torch.backends.quantized.engine = engine
        zeros = torch.zeros(p.float_layer.out_features, dtype=torch.long)
        weight = torch.quantize_per_channel(p.float_layer.weight, p.int8_layer.weight_scale.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.linear_prepack(weight, p.float_layer.bias)
        # where the processor lacks VNNI, torch.ao adds products in pairs and saturates the pair at 16 bits
        return lambda: torch.ops.quantized.linear_dynamic(p.x, packed), 20.0

    return contender


LINEAR_CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours static": ours_static,
    "ours dynamic bf16": ours_dynamic_bf16,
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao x86": _torch_ao("x86"),
    "torch.ao onednn": _torch_ao("onednn"),
}


@pytest.mark.parametrize("contender", LINEAR_CONTENDERS)
@cases(shapes.LINEAR)
def bench_int8_linear(measure, case, contender):
    p = problem(case[1])
    call, expected = LINEAR_CONTENDERS[contender](p)
    check(call(), expected, p.reference)
    is_int8 = contender.startswith(("ours", "torch.ao"))
    measure(call, stem="int8_linear", case=case, contender=contender, macs=case[1].macs, share=is_int8)


def gemm_ours(p):
    weight = p.int8_layer.qweight
    return lambda: qo.int8_gemm(p.codes, weight)


def gemm_torch(p):
    if not hasattr(torch, "_int_mm"):
        pytest.skip(f"torch {torch.__version__} has no torch._int_mm")
    weight = p.int8_layer.qweight.T
    return lambda: torch._int_mm(p.codes, weight)


GEMM_CONTENDERS = {"ours": gemm_ours, "torch._int_mm": gemm_torch}


@pytest.mark.parametrize("contender", GEMM_CONTENDERS)
@cases(shapes.LINEAR)
def bench_int8_gemm(measure, case, contender):
    """int8 in, int32 out; both read the weight as [N, K] and arrange it within the call."""
    p = problem(case[1])
    call = GEMM_CONTENDERS[contender](p)
    assert torch.equal(call().double(), p.exact_sums(p.codes))
    measure(call, stem="int8_gemm", case=case, contender=contender, macs=case[1].macs, share=True)
