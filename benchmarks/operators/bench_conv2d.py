"""int8_conv2d against torch's float and int8 convolutions. Results are checked before anything is timed.

int8 contenders quantize float activations, convolve, scale and add a bias within the timed call, as a model would.
"""

import copy
import functools

import pytest
import torch

import quant_ops as qo
from benchmarks.common import problems, shapes
from benchmarks.common.problems import ConvProblem
from benchmarks.operators.cases import cases, check


class Problem(ConvProblem):
    """In NCHW, from which contenders make channels_last."""

    def exact(self, scale):
        """The epilogue of ops.h on exact sums. float64 holds the sums and the product of a sum and a scale exactly."""
        codes = qo.quant_tensor_forward(self.x, scale, None, -127, 127, simulate=False)
        s = self.shape
        sums = torch.nn.functional.conv2d(codes.double(), self.int8_layer.qweight.double(), None, s.s, s.p, s.d, s.groups)
        scales = (scale * self.int8_layer.weight_scale.reshape(-1, 1, 1)).double()
        return (sums.float().double() * scales + self.int8_layer.bias.double().reshape(-1, 1, 1)).float()


@functools.lru_cache(maxsize=1)
def problem(shape):
    torch.manual_seed(0)
    return Problem(shape, memory_format=torch.contiguous_format)


def _channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


# Each contender makes from a problem the call, and its exact result or the least SQNR in dB against float32.


def ours_dynamic(p):
    scale, _ = qo.choose_qparams(p.x, [1, 2, 3], -127, 127)
    return problems.ours_dynamic(p), p.exact(scale)


def ours_dynamic_nhwc(p):
    return functools.partial(p.int8_layer, _channels_last(p.x)), ours_dynamic(p)[1]


def ours_static_nhwc(p):
    return functools.partial(p.static_layer, _channels_last(p.x)), p.exact(p.input_scale)


def fp32(p):
    return problems.floating(torch.float32, p), 100.0


def _nhwc(dtype, p):
    layer = copy.deepcopy(p.float_layer).to(dtype, memory_format=torch.channels_last)
    return functools.partial(layer, _channels_last(p.x.to(dtype)))


def fp32_nhwc(p):
    return _nhwc(torch.float32, p), 100.0


def bf16_nhwc(p):
    return _nhwc(torch.bfloat16, p), 35.0


def _torch_ao(engine, layout):
    def contender(p):
        if engine not in torch.backends.quantized.supported_engines or not hasattr(torch.ops.quantized, "conv2d_dynamic"):
            pytest.skip(f"torch {torch.__version__} has no torch.ops.quantized.conv2d_dynamic for the engine {engine}")
        torch.backends.quantized.engine = engine
        s, zeros = p.shape, torch.zeros(p.shape.O, dtype=torch.long)
        weight = torch.quantize_per_channel(p.float_layer.weight, p.int8_layer.weight_scale.double(), zeros, 0, torch.qint8)
        packed = torch.ops.quantized.conv2d_prepack(weight, p.float_layer.bias, [s.s, s.s], [s.p, s.p], [s.d, s.d], s.groups)
        x = layout(p.x)
        return lambda: torch.ops.quantized.conv2d_dynamic(x, packed), 20.0  # it rounds its result to 8 bits as well

    return contender


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours dynamic NHWC": ours_dynamic_nhwc,
    "ours static NHWC": ours_static_nhwc,
    "fp32": fp32,
    "fp32 NHWC": fp32_nhwc,
    "bf16 NHWC": bf16_nhwc,
    "torch.ao x86": _torch_ao("x86", torch.Tensor.contiguous),
    "torch.ao x86 NHWC": _torch_ao("x86", _channels_last),  # searches the range of such an input slowly
    "torch.ao onednn": _torch_ao("onednn", torch.Tensor.contiguous),
}


@pytest.mark.parametrize("contender", CONTENDERS)
@cases(shapes.CONV)
def bench_int8_conv2d(measure, case, contender):
    p = problem(case[1])
    call, expected = CONTENDERS[contender](p)
    check(call(), expected, p.reference)
    is_int8 = contender.startswith(("ours", "torch.ao"))
    measure(call, stem="int8_conv2d", case=case, contender=contender, macs=case[1].macs, share=is_int8)
