"""One layer's data, from which all contenders start: a float input and layer, and what is derived from them when it is used."""

import copy
import functools

import torch
from torch import nn

import quant_ops as qo


class Problem:
    """A layer with its input. Weights are scaled so that results have about the variance of the input."""

    def __init__(self, x, float_layer):
        self.x, self.float_layer = x, float_layer.requires_grad_(False)
        weight = float_layer.weight
        weight.normal_(0, weight[0].numel() ** -0.5)

    @functools.cached_property
    def reference(self):
        return self.float_layer(self.x)

    @functools.cached_property
    def int8_layer(self):
        return self.int8_class.from_float(self.float_layer)

    @functools.cached_property
    def input_scale(self):
        """Of static quantization, for all of the input."""
        return self.x.abs().max().float() / 127

    @functools.cached_property
    def static_layer(self):
        return self.int8_class.from_float(self.float_layer, input_scale=self.input_scale)


class LinearProblem(Problem):
    int8_class = qo.QuantLinear

    def __init__(self, shape, device="cpu", dtype=torch.float32):
        options = {"device": device, "dtype": dtype}
        super().__init__(torch.randn(shape.M, shape.K, **options), nn.Linear(shape.K, shape.N, **options))
        self.shape = shape


class ConvProblem(Problem):
    int8_class = qo.QuantConv2d

    def __init__(self, shape, device="cpu", dtype=torch.float32, memory_format=torch.channels_last):
        options = {"device": device, "dtype": dtype}
        x = torch.randn(shape.N, shape.C, shape.H, shape.H, **options).contiguous(memory_format=memory_format)
        conv = nn.Conv2d(shape.C, shape.O, shape.k, shape.s, shape.p, shape.d, shape.groups, **options)
        super().__init__(x, conv.to(memory_format=memory_format))
        self.shape = shape


# Contenders that need nothing but the problem: each makes a call from it.


def ours_dynamic(p):
    return functools.partial(p.int8_layer, p.x)


def ours_static(p):
    return functools.partial(p.static_layer, p.x)


def floating(dtype, p):
    return functools.partial(copy.deepcopy(p.float_layer).to(dtype), p.x.to(dtype))
