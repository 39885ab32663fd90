"""What follows the sums of int8_linear and int8_conv2d: residual, activation and conversion, bit by bit.

An activation's own bits come from a product of zeros whose bias is the argument; they are compared with float64. Everything else is
then compared with steps of one IEEE operation each.
"""

import random

import pytest
import reference
import torch
import torch.nn.functional as F

import quant_ops as qo
from quant_ops import _library

ACTIVATIONS = [None, "relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid"]
INTEGERS = [torch.int8, torch.uint8]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def activated(y: torch.Tensor, activation: str | None) -> torch.Tensor:
    """The operator's activation of any float32 values."""
    zeros = torch.zeros(y.numel(), 1, dtype=torch.int8)
    one = torch.tensor(1.0)  # the product is -0, which added changes no zero
    made = qo.int8_linear(torch.zeros(1, 1, dtype=torch.int8), zeros, -one, y.flatten(), one, activation=activation)
    return made.view(y.shape)


def finished(y, residual, residual_scale, residual_zero, activation, out_scale, out_zero, dtype):
    """y after the residual, the activation and the conversion."""
    if residual is not None and residual_scale is None:
        y = y + residual.float()
    elif residual is not None:
        steps = (residual.int() - residual_zero).float().numpy()
        y = torch.from_numpy(reference.fma32(steps, residual_scale.numpy(), y.numpy()))
    y = activated(y, activation)
    return y.to(dtype) if out_scale is None else reference.requantize(y, out_scale.item(), out_zero.item(), dtype)


# ---- the functions ------------------------------------------------------------------------------------------------------


def arguments() -> torch.Tensor:
    """Every 4099th float, all of a few places, and many where the functions bend."""
    bits = torch.cat([torch.arange(-(2**31), 2**31, 4099), torch.arange(2**12) + 0x40C00000, torch.arange(2**12) - 0x3D500000])
    special = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 3.0, -3.0, 6.0, -5.75, -88.37, 1e38, -1e38])
    return torch.cat([bits.to(torch.int32).view(torch.float32), torch.linspace(-6, 6, 200001), special])


def ulps(y: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """The distance in units of the last place of the float32 numbers near the exact value."""
    exponent = torch.frexp(exact.abs().clamp_min(2.0**-126)).exponent
    return (y.double() - exact).abs() * torch.pow(2.0, (24 - exponent).double())


EXACT = {
    "relu": (lambda x: x.clamp_min(0), 0, float("-inf")),
    "relu6": (lambda x: x.clamp(0, 6), 0, float("-inf")),
    "hardswish": (lambda x: x * (x + 3).clamp(0, 6) / 6, 2, -1),
    "silu": (lambda x: x / (1 + (-x).exp()), 2.1, -88.37),
    "gelu": (lambda x: x * 0.5 * torch.erfc(-x * 0.5**0.5), 3, -1),
    "gelu_tanh": (lambda x: x / (1 + (-2 * (2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)).exp()), 3, -1),
    "sigmoid": (lambda x: 1 / (1 + (-x).exp()), 2.1, -88.37),
    "hardsigmoid": (lambda x: (x + 3).clamp(0, 6) / 6, 2, -1),
}


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_functions_are_as_exact_as_documented_and_the_same_everywhere(activation):
    x = arguments()
    y = activated(x, activation)
    function, most, least = EXACT[activation]
    finite = x.isfinite() & (x.abs() < 5e37)
    exact = function(x[finite].double())
    near = x[finite] >= least
    assert ulps(y[finite], exact)[near].max() <= most
    far = 2**-24.4 if activation == "gelu" else 2**-24.5
    assert (y[finite].double() - exact)[~near].abs().max() <= far if (~near).any() else True
    same = {"hardswish": F.hardswish, "hardsigmoid": F.hardsigmoid, "relu6": F.relu6}.get(activation)
    if same is not None:
        assert reference.same(y, same(x))
    assert y[x.isnan()].isnan().all()
    assert (y[x == float("inf")] == {"relu6": 6.0, "sigmoid": 1.0, "hardsigmoid": 1.0}.get(activation, float("inf"))).all()
    if activation == "gelu":
        assert ((y[x < -10] > -(2.0**-115)) & (y[x < -10] < 0)).all()
    if activation in ("sigmoid", "hardsigmoid"):
        assert (y[x == 0] == 0.5).all()
        assert (y[x == float("-inf")] == 0).all()
    else:
        assert torch.signbit(y[(x == 0) & torch.signbit(x)]).all()
    try:
        for isa in _library.isas():
            _library.set_isa(isa)
            assert reference.same_bits(activated(x, activation), y), isa
    finally:
        _library.set_isa(None)


# ---- products -----------------------------------------------------------------------------------------------------------


def random_residual(rng: random.Random, shape, channels_last=False):
    """A residual and its scale and zero point."""
    kind = rng.choice([*INTEGERS, *FLOATS])
    if kind in FLOATS:
        residual, scale, zero = torch.randn(shape) * 3, None, None
        if rng.random() < 0.5:  # as no calibration foresees
            odd = torch.tensor([float("inf"), float("-inf"), float("nan"), 3e38, -3e38, 1e6, -1e6])
            residual = torch.where(torch.rand(shape) < 0.05, odd[torch.randint(len(odd), shape)], residual)
        residual = residual.to(kind)
    else:
        info = torch.iinfo(kind)
        residual = torch.randint(info.min, info.max + 1, shape).to(kind)
        scale, zero = torch.tensor(rng.uniform(0.01, 0.1)), torch.tensor(rng.randint(info.min, info.max))
    if residual.dim() == 4 and channels_last:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return residual, scale, zero


def random_end(rng: random.Random, shape):
    """Keyword arguments of the operator: residual, activation and result."""
    residual, scale, zero = random_residual(rng, shape, rng.random() < 0.5) if rng.random() < 0.8 else (None, None, None)
    dtype = rng.choice([*INTEGERS, *INTEGERS, *FLOATS])
    codes = dtype in INTEGERS
    info = torch.iinfo(dtype) if codes else None
    return {
        "residual": residual,
        "residual_scale": scale,
        "residual_zero_point": zero,
        "activation": rng.choice(ACTIVATIONS),
        "out_scale": torch.tensor(rng.uniform(0.02, 0.2)) if codes else None,
        "out_zero_point": torch.tensor(rng.randint(info.min, info.max)) if codes else None,
        "out_dtype": dtype,
    }


def expected(y, end):
    return finished(
        y,
        end["residual"],
        end["residual_scale"],
        end["residual_zero_point"],
        end["activation"],
        end["out_scale"],
        end["out_zero_point"],
        end["out_dtype"],
    )


@pytest.mark.parametrize("seed", range(3))
def test_linear(isa, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        m, k, n = rng.choice([1, 2, 5, 13, 40]), rng.choice([1, 7, 64]), rng.choice([1, 3, 15, 16, 17, 33, 64, 81, 130])
        x = torch.randn(m, k)
        weight, weight_scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 0.02
        settings = rng.choice([{}, {"asymmetric": True}, {"x_scale": torch.tensor(0.02), "x_zero_point": torch.tensor(5)}])
        if rng.random() < 0.5:
            settings = settings | {"packed_weight": qo.pack_weight(weight)}
        bias = torch.randn(n) if rng.random() < 0.5 else None
        end = random_end(rng, (m, n))
        y = qo.int8_linear(x, weight, weight_scale, bias, **settings, **end)
        plain = qo.int8_linear(x, weight, weight_scale, bias, **settings)
        assert reference.same(y, expected(plain, end)), (m, k, n, end)


@pytest.mark.parametrize("seed", range(3))
def test_conv2d(isa, seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        groups, c, o = rng.choice([(1, 16, 24), (1, 3, 64), (2, 8, 36), (1, 64, 130), (17, 17, 17), (40, 40, 40), (64, 64, 64)])
        h, w, r, stride = rng.randint(3, 9), rng.randint(3, 9), rng.choice([1, 3]), rng.choice([1, 2])
        x = torch.randint(-128, 128, (rng.choice([1, 2]), c, h, w), dtype=torch.int8)
        if rng.random() < 0.6:
            x = x.contiguous(memory_format=torch.channels_last)
        weight, weight_scale = torch.randint(-127, 128, (o, c // groups, r, r), dtype=torch.int8), torch.rand(o) * 0.02
        geometry = (stride, r // 2, 1, groups)
        scale = {"x_scale": torch.tensor(0.03), "x_zero_point": torch.tensor(rng.choice([0, -3]))}
        bias = torch.randn(o) if rng.random() < 0.5 else None
        plain = qo.int8_conv2d(x, weight, weight_scale, bias, *geometry, **scale)
        end = random_end(rng, plain.shape)
        y = qo.int8_conv2d(x, weight, weight_scale, bias, *geometry, **scale, **end)
        assert y.stride() == plain.stride()
        assert reference.same(y, expected(plain, end)), (x.shape, o, groups, r, stride, end)


@pytest.mark.parametrize("out_scale", [2.0**-140, 1e-30, 0.1, 1e30, float("nan"), -0.25])
@pytest.mark.parametrize("activation", ["relu", "relu6", "silu"])
def test_unusual_scales(isa, activation, out_scale):
    """Results that overflow, are NaN or lie on ties become the codes of the quotient; so do those of a negative scale."""
    torch.manual_seed(1)
    n = 100
    weight = torch.zeros(n, 1, dtype=torch.int8)
    bias = torch.cat([torch.randn(n - 8), torch.tensor([float("inf"), float("-inf"), float("nan"), 6.0, 5.95, 0.05, -0.05, 1e38])])
    residual = torch.randint(-128, 128, (2, n), dtype=torch.int8)
    x, one, r_scale = torch.zeros(2, 1, dtype=torch.int8), torch.tensor(1.0), torch.tensor(0.1)
    for dtype, zero in ((torch.int8, -7), (torch.uint8, 200)):
        scale, zero = torch.tensor(out_scale), torch.tensor(zero)
        end = {"out_scale": scale, "out_zero_point": zero, "out_dtype": dtype, "activation": activation}
        y = qo.int8_linear(x, weight, one, bias, one, residual=residual, residual_scale=r_scale, **end)
        plain = bias.expand(2, n).contiguous()
        assert torch.equal(y, finished(plain, residual, r_scale, 0, activation, scale, zero, dtype))
        y = qo.int8_linear(x, weight, one, bias, one, **end)
        assert torch.equal(y, finished(plain, None, None, 0, activation, scale, zero, dtype))


def test_relu_has_two_names():
    x, weight, scale = torch.randn(3, 8), torch.randint(-9, 9, (5, 8), dtype=torch.int8), torch.tensor(0.1)
    assert torch.equal(qo.int8_linear(x, weight, scale, relu=True), qo.int8_linear(x, weight, scale, activation="relu"))


def test_refusals_of_activations():
    """The operators take numbers, the wrappers and layers names."""
    x, weight, scale = torch.randn(3, 8), torch.randint(-9, 9, (5, 8), dtype=torch.int8), torch.tensor(0.1)
    wrapped = {
        "neither residual nor activation with out_dtype int32": {"activation": "silu", "out_dtype": torch.int32},
        "relu=True or an activation, got both. Leave relu out.": {"activation": "gelu", "relu": True},
        r"activation to be None or one of \('relu', .*'hardsigmoid'\), got 'swish'\.": {"activation": "swish"},
    }
    for sentence, options in wrapped.items():
        with pytest.raises(ValueError, match=f"quant_ops.int8_linear: expected {sentence}"):
            qo.int8_linear(x, weight, scale, **options)
    for number in (-1, 9):
        with pytest.raises(RuntimeError, match=rf"expected activation in \[0, 8\]: 0 none, .*, got {number}"):
            torch.ops.quant_ops.int8_linear(x, weight, scale, activation=number)
    linear = torch.nn.Linear(4, 4)
    for options in ({"activation": "swish"}, {"activation": "relu", "relu": True}, {"activation": "gelu", "backward": True}):
        with pytest.raises(ValueError, match=r"quant_ops\.QuantLinear: expected"):
            qo.QuantLinear.from_float(linear, **options)
        with pytest.raises(ValueError, match=r"quant_ops\.QuantLinear: expected"):
            qo.QuantLinear(4, 4, **options)


# ---- layers, gradients, vmap --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS[1:])
def test_layers(activation, tmp_path):
    torch.manual_seed(0)
    linear, conv = torch.nn.Linear(12, 9), torch.nn.Conv2d(4, 9, 3)
    for module, layer_class, x in ((linear, qo.QuantLinear, torch.randn(5, 12)), (conv, qo.QuantConv2d, torch.randn(2, 4, 6, 6))):
        layer = layer_class.from_float(module, activation=activation)
        plain = layer_class.from_float(module)
        assert torch.equal(layer(x), activated(plain(x), activation))
        assert f"activation={activation}" in repr(layer)
        model = torch.nn.Sequential(layer)
        qo.save(model, tmp_path / "model")
        other = torch.nn.Sequential(module)
        qo.load_(other, tmp_path / "model")
        assert other[0].activation == activation
        assert torch.equal(other(x), model(x))


def test_gradient_of_a_fused_relu():
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(12, 9), torch.randn(5, 12)
    for options in ({"relu": True}, {"activation": "relu"}):
        layer = qo.QuantLinear.from_float(linear, backward=True, **options)
        given = x.clone().requires_grad_()
        layer(given).sum().backward()
        if options == {"relu": True}:
            wanted = given.grad
    assert torch.equal(given.grad, wanted)
    codes = {"weight": torch.ones(3, 12, dtype=torch.int8), "weight_scale": torch.tensor(0.1)}
    twin = torch.ops.quant_ops._int8_linear_differentiable
    given = x.clone().requires_grad_()
    residual = torch.randn(5, 3)
    twin(given, **codes, residual=residual).sum().backward()
    added, given = given.grad, x.clone().requires_grad_()
    twin(given, **codes).sum().backward()
    assert torch.equal(added, given.grad)
    with pytest.raises(
        RuntimeError, match="expected no activation but relu where a gradient of x is asked for, got activation gelu"
    ):
        twin(given, **codes, activation=5)
    with pytest.raises(RuntimeError, match="expected a gradient of x alone to be asked for, got one of residual"):
        twin(given, **codes, residual=residual.requires_grad_())


def test_vmap_of_a_residual():
    torch.manual_seed(0)
    x, weight, scale = torch.randn(3, 4, 8), torch.randint(-9, 9, (5, 8), dtype=torch.int8), torch.tensor(0.1)
    residual = torch.randn(4, 3, 5)
    many = torch.vmap(lambda x, r: qo.int8_linear(x, weight, scale, residual=r, activation="silu"), (0, 1))(x, residual)
    one = [qo.int8_linear(x[i], weight, scale, residual=residual[:, i], activation="silu") for i in range(3)]
    assert torch.equal(many, torch.stack(one))
    image, kernel = torch.randn(3, 2, 4, 6, 6), torch.randint(-9, 9, (5, 4, 3, 3), dtype=torch.int8)
    residual = torch.randn(2, 5, 4, 4)
    many = torch.vmap(lambda x: qo.int8_conv2d(x, kernel, scale, residual=residual))(image)
    assert torch.equal(many, torch.stack([qo.int8_conv2d(x, kernel, scale, residual=residual) for x in image]))
