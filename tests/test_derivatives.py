"""Derivatives: the formula of the simulated quantization, every transform of torch, and the refusals of the int8 operators."""

import pytest
import torch
from operands import codes, floats, images, scales, vision_model
from torch import nn

import quant_ops as qo

ops = torch.ops.quant_ops

STEP = scales()


# ---- gradients ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", ["int8_linear", "int8_conv2d"])
@pytest.mark.parametrize("which", ["x", "bias", "x_scale", "out_scale"])
def test_int8_operators_refuse_backward(op, which):
    linear = op == "int8_linear"
    tensors = {
        "x": floats(3, 8) if linear else floats(2, 3, 5, 5),
        "weight": codes(4, 8) if linear else codes(4, 3, 2, 2),
        "weight_scale": scales(4),
        "bias": floats(4),
        "x_scale": scales(),
    }
    if which == "out_scale":
        tensors["out_scale"] = scales()
    expected = getattr(ops, op)(**tensors)
    tensors[which].requires_grad_()
    result = getattr(ops, op)(**tensors)
    assert torch.equal(result, expected)
    if which == "out_scale":  # integers cannot carry a gradient
        assert not result.requires_grad
        return
    assert result.requires_grad
    message = rf"^quant_ops\.{op}: expected no gradient to be asked for, got a backward pass .* Train with .*torch\.no_grad\(\)\.$"
    with pytest.raises(RuntimeError, match=message):
        result.sum().backward()
    with torch.no_grad():
        assert not getattr(ops, op)(**tensors).requires_grad
    with pytest.raises(RuntimeError, match=message):
        getattr(qo, op)(**tensors).sum().backward()


def test_modules_refuse_backward_but_run_without_no_grad():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), *vision_model())
    x = images(2).requires_grad_()
    y = model(x)
    with torch.no_grad():
        assert torch.equal(y, model(x))
    with pytest.raises(RuntimeError, match=r"^quant_ops\.int8_linear: expected no gradient to be asked for"):
        y.sum().backward()


def _lsq(grad, x, scale, zero_point, qmin, qmax):
    """Gradients of the simulated value by formula, in float64, before they are summed to a parameter's shape."""
    grad, x, scale = grad.double(), x.double(), scale.double()
    zero = torch.zeros((), dtype=torch.float64) if zero_point is None else zero_point.double().round().clamp(qmin, qmax)
    steps = x / scale
    v = steps.round() + zero
    inside = (v >= qmin) & (v <= qmax)
    q = v.clamp(qmin, qmax)
    dx = torch.where(inside, grad, 0.0)
    dscale = grad * torch.where(inside, (q - zero) - steps, q - zero)
    dzero = torch.where(inside, 0.0, -scale * grad)
    return dx, dscale, dzero


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4, 1, 1), (2, 1, 1, 6), (2, 4, 5, 6)], ids=str)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_gradient_is_the_formula(dtype, shape, asymmetric):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(2, 4, 5, 6, generator=generator).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    scale = (torch.rand(shape, generator=generator) * 0.2 + 0.05).to(dtype).requires_grad_()
    zero_point = (torch.rand(shape, generator=generator) * 6 - 3).to(dtype).requires_grad_() if asymmetric else None
    grad = torch.randn(2, 4, 5, 6, generator=generator).to(dtype)
    y = qo.quant_tensor_forward(x, scale, zero_point, -8, 7, asymmetric=asymmetric)
    y.backward(grad)

    dx, dscale, dzero = _lsq(grad, x.detach(), scale.detach(), None if zero_point is None else zero_point.detach(), -8, 7)
    assert 0 < (dx == 0).sum() < dx.numel()
    assert torch.equal(x.grad, dx.to(dtype))
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(scale.grad.double(), dscale.sum_to_size(scale.shape), rtol=tolerance, atol=tolerance)
    assert scale.grad.dtype == dtype
    if asymmetric:
        torch.testing.assert_close(zero_point.grad.double(), dzero.sum_to_size(shape), rtol=tolerance, atol=tolerance)


def test_no_gradient_through_codes_or_integer_zero_points():
    x, scale = floats(3, 4).requires_grad_(), scales().requires_grad_()
    assert not qo.quant_tensor_forward(x, scale, None, -8, 7, simulate=False).requires_grad
    y = qo.quant_tensor_forward(x, scale, torch.tensor(2), -8, 7, asymmetric=True)
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert scale.grad.shape == ()


# ---- derivatives of higher order, forward mode, torch.func -----------------------------------------------------------------------


def _straight_through(x, scale, zero_point, qmin, qmax):
    """The same in torch operations, with rounding whose derivative is one (LSQ's own construction)."""
    zero = 0.0 if zero_point is None else zero_point + (zero_point.round().clamp(qmin, qmax) - zero_point).detach()
    v = x / scale
    steps = v + (v.round() - v).detach()
    return ((steps + zero).clamp(qmin, qmax) - zero) * scale


def _leaves(shape, dtype, asymmetric=False):
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(3, 4, 5, generator=generator).to(dtype)
    scale = (torch.rand(shape, generator=generator) * 0.2 + 0.05).to(dtype)
    return x, scale, (torch.rand(shape, generator=generator) * 6 - 3).to(dtype) if asymmetric else None


def _fake_quantized(x, scale, zero_point=None):
    return qo.quant_tensor_forward(x, scale, zero_point, -8, 7, zero_point is not None)


@pytest.mark.parametrize("shape", [(), (1,), (4, 1), (3, 1, 5)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", ["tensor", "scale"])
def test_second_derivatives_are_those_of_the_straight_through_estimator(dtype, shape, of):
    x, scale, _ = _leaves(shape, dtype)
    second = []
    for f in (_fake_quantized, lambda a, b: _straight_through(a, b, None, -8, 7)):
        leaves = [x.clone().requires_grad_(), scale.clone().requires_grad_()]
        y = f(*leaves)
        first = torch.autograd.grad((y.pow(3) * torch.arange(5)).sum(), leaves, create_graph=True)
        second.append(torch.autograd.grad(first[("tensor", "scale").index(of)].pow(2).sum(), leaves))
    for ours, expected in zip(*second, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-4, atol=1e-4)
        assert expected.abs().sum() > 0


def test_mixed_second_derivatives_of_a_learned_zero_point_are_refused():
    x, scale, zero_point = (t.requires_grad_() for t in _leaves((4, 1), torch.float32, asymmetric=True))
    first = torch.autograd.grad(_fake_quantized(x, scale, zero_point).pow(2).sum(), (x, scale, zero_point), create_graph=True)
    torch.autograd.grad(first[0].sum(), (x, scale, zero_point), retain_graph=True)
    with pytest.raises(
        RuntimeError, match=r"^quant_ops\.quant_tensor_backward: expected no second derivative by a scale and a learned"
    ):
        torch.autograd.grad(first[1].sum(), zero_point)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (4, 1), (1, 4, 5)], ids=str)
def test_forward_mode_and_torch_func_agree_with_backward(dtype, shape, asymmetric):
    leaves = tuple(t for t in _leaves(shape, dtype, asymmetric) if t is not None)
    tangents = tuple(torch.randn_like(t) for t in leaves)
    expected = torch.func.jvp(lambda *a: _straight_through(*a, *[None] * (3 - len(a)), -8, 7), leaves, tangents)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-10, "atol": 1e-10}
    for ours, right in zip(torch.func.jvp(_fake_quantized, leaves, tangents), expected, strict=True):
        torch.testing.assert_close(ours, right, **close)
    with torch.autograd.forward_ad.dual_level():
        duals = map(torch.autograd.forward_ad.make_dual, leaves, tangents)
        y = ops.quant_tensor_forward(*duals, *[None] * (3 - len(leaves)), -8, 7, asymmetric)
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(y).tangent, expected[1], **close)
    inputs = [t.clone().requires_grad_() for t in leaves]
    reverse = torch.autograd.grad(_fake_quantized(*inputs).sin().sum(), inputs)
    functional = torch.func.grad(lambda a: _fake_quantized(*a).sin().sum())(leaves)
    assert all(torch.equal(a, b) for a, b in zip(reverse, functional, strict=True))


def test_forward_mode_of_blocks():
    x, scale = floats(4, 6), scales(2, 3)
    tangents = torch.ones_like(x), torch.randn(2, 3)
    f = lambda a, b: qo.quant_tensor_forward(a, b, None, -8, 7, block_size=[2, 2])  # noqa: E731
    whole = scale.repeat_interleave(2, 0).repeat_interleave(2, 1)
    whole_tangent = tangents[1].repeat_interleave(2, 0).repeat_interleave(2, 1)
    expected = torch.func.jvp(lambda a, b: qo.quant_tensor_forward(a, b, None, -8, 7), (x, whole), (tangents[0], whole_tangent))
    assert all(torch.equal(a, b) for a, b in zip(torch.func.jvp(f, (x, scale), tangents), expected, strict=True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_gives_the_results_of_a_loop():
    x, layer = floats(3, 2, 8), qo.QuantLinear.from_float(nn.Linear(8, 4))
    assert torch.equal(torch.vmap(layer)(x), layer(x))
    assert torch.equal(torch.vmap(lambda a: _fake_quantized(a, STEP))(x), _fake_quantized(x, STEP))
    per_sample = torch.vmap(torch.func.grad(lambda a: _fake_quantized(a, STEP).pow(2).sum()))(x)
    assert torch.equal(per_sample, torch.func.grad(lambda a: _fake_quantized(a, STEP).pow(2).sum())(x))
    assert torch.equal(torch.vmap(lambda a: qo.quantize_rows(a)[0])(x), qo.quantize_rows(x)[0])


def _dual(f, x):
    with torch.autograd.forward_ad.dual_level():
        f(torch.autograd.forward_ad.make_dual(x, x))


_DERIVATIVES = {
    "dual": _dual,
    "grad": lambda f, x: torch.func.grad(lambda a: f(a).sum())(x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda a: f(a).sum())(x),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("kind", _DERIVATIVES)
@pytest.mark.parametrize("what", ["layer", "operator", "wrapper"])
def test_int8_operators_refuse_every_derivative(kind, what):
    layer = qo.QuantLinear.from_float(nn.Linear(8, 4))
    arguments = layer.plain_weight(), layer.weight_scale
    f = {"layer": layer, "operator": lambda a: ops.int8_linear(a, *arguments), "wrapper": lambda a: qo.int8_linear(a, *arguments)}[
        what
    ]
    with pytest.raises(RuntimeError, match=r"^quant_ops\.int8_linear: expected no derivative to be asked for, got a call inside"):
        _DERIVATIVES[kind](f, floats(2, 8))
    frozen = torch.func.grad(lambda w: (f(floats(2, 8)) @ w).sum())(floats(4))  # what is constant may be int8
    assert frozen.abs().sum() > 0


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
def test_raw_operators_inside_torch_func_say_what_to_call(transform):
    with pytest.raises(
        RuntimeError, match=r"^quant_ops\.quant_tensor_forward: expected a call of quant_ops\.quant_tensor_forward inside"
    ):
        transform(lambda a: ops.quant_tensor_forward(a, STEP, None, -8, 7).sum())(floats(2, 8))


def test_dequantizing_refuses_a_gradient_of_its_scale():
    scale = scales().requires_grad_()
    with pytest.raises(RuntimeError, match=r"^quant_ops\.dequant_tensor: expected no gradient to be asked for"):
        qo.dequant_tensor(codes(3, 4), scale).sum().backward()


def test_chosen_parameters_are_constants():
    x = floats(3, 4).requires_grad_()
    assert not any(t.requires_grad for t in (*qo.choose_qparams(x, [], -127, 127), *qo.quantize_rows(x)))
    with torch.autograd.forward_ad.dual_level():
        scale, _ = qo.choose_qparams(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3, 4)), [], -127, 127)
        assert torch.autograd.forward_ad.unpack_dual(scale).tangent is None


# ---- floating formats ------------------------------------------------------------------------------------------------------------

_SCALED = torch.tensor([[0.5], [0.25], [2.0], [1.0]])
_TWO_LEVELS = torch.tensor(2.0**-10)
FORMATS = {
    "format": lambda x: qo.quant_float_forward(x, 2, 1),
    "scales": lambda x: qo.quant_float_forward(x, 4, 3, _SCALED.to(x.dtype) * 2**-7, special="nan"),
    "away, infinity": lambda x: qo.quant_float_forward(x, 2, 2, special="ieee", saturate=False, rounding="nearest_away"),
    "stochastic": lambda x: qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=4),
    "blocks of scales": lambda x: qo.quant_float_forward(x, 2, 1, _SCALED.to(x.dtype), block_size=[1, 1, 5]),
    "mxfp4": lambda x: qo.quant_block_forward(x, -1, 3, 2, 1),
    "nvfp4": lambda x: qo.quant_block_forward(x, 1, 3, 2, 1, _TWO_LEVELS, scale_rule="e4m3"),
    "bfloat16 scales": lambda x: qo.quant_block_forward(x, 0, 2, 1, 3, scale_rule="bfloat16", rounding="stochastic", seed=5),
}
of_formats = pytest.mark.parametrize("name", FORMATS)
_OF_BLOCKS = ("mxfp4", "nvfp4", "bfloat16 scales")  # these take no float64


def _inside(name, x):
    """Where the gradient passes, by the documented formula."""
    x = x.double()
    if name in ("format", "stochastic"):
        return x.abs() <= 6
    if name == "scales":
        return (x / _SCALED * 2**7).abs() <= 448
    if name == "away, infinity":
        return x.abs() <= 3.5
    if name == "blocks of scales":
        return (x / _SCALED).abs() <= 6
    dim, size, largest = {"mxfp4": (2, 3, 6), "nvfp4": (1, 3, 6), "bfloat16 scales": (0, 2, 3.75)}[name]
    parts = []
    for part in x.float().split(size, dim):
        amax = part.abs().amax(dim, keepdim=True)
        if name == "mxfp4":
            scale = 2.0 ** (torch.floor(torch.log2(amax)) - 2)
        elif name == "nvfp4":
            scale = (amax / 6 / _TWO_LEVELS).clamp(2.0**-6, 448).to(torch.float8_e4m3fn).float() * _TWO_LEVELS
        else:
            scale = amax.bfloat16().float() / 3.75
        parts.append((part / scale).abs() <= largest)
    return torch.cat(parts, dim)


def _x_of(name, dtype=torch.float32):
    x = (torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(7)) * 4).to(dtype)
    assert 0 < (~_inside(name, x)).sum() < x.numel() or name == "scales"
    return x


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in FORMATS for d in (torch.float32, torch.bfloat16, torch.float64) if d != torch.float64 or n not in _OF_BLOCKS],
)
def test_gradient_of_a_format_passes_within_its_range(name, dtype):
    x = _x_of(name, dtype).requires_grad_()
    grad = torch.randn(3, 4, 5).to(dtype)
    FORMATS[name](x).backward(grad)
    assert torch.equal(x.grad, torch.where(_inside(name, x.detach()), grad, 0))


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(n, d) for n in FORMATS for d in (torch.float32, torch.float64) if d != torch.float64 or n not in _OF_BLOCKS],
)
def test_every_mode_agrees_on_formats(name, dtype):
    """Backward, second derivatives, forward mode and torch.func, of a function that is not linear in the result."""
    f, x = FORMATS[name], _x_of(name, dtype)
    inside, y, v = _inside(name, x), f(x), torch.randn(3, 4, 5).to(dtype)
    first, second = torch.where(inside, 3 * y.square(), 0), torch.where(inside, 6 * y, 0)
    loss = lambda a: f(a).pow(3).sum()  # noqa: E731

    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
    torch.testing.assert_close(grad, first)
    torch.testing.assert_close(torch.autograd.grad(grad, leaf, v)[0], second * v)

    torch.testing.assert_close(torch.func.grad(loss)(x), first)
    value, pull = torch.func.vjp(f, x)
    assert torch.equal(value, y)
    assert torch.equal(pull(v)[0], torch.where(inside, v, 0))
    value, tangent = torch.func.jvp(f, (x,), (v,))
    assert torch.equal(value, y)
    assert torch.equal(tangent, torch.where(inside, v, 0))
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss), (x,), (v,))[1], second * v)
    torch.testing.assert_close(torch.func.grad(lambda a: (torch.func.grad(loss)(a) * v).sum())(x), second * v)
    with torch.autograd.forward_ad.dual_level():
        dual = f(torch.autograd.forward_ad.make_dual(x, v))
        assert torch.equal(torch.autograd.forward_ad.unpack_dual(dual).tangent, torch.where(inside, v, 0))


@pytest.mark.filterwarnings("error:There is a performance drop")
@of_formats
def test_vmap_of_derivatives_of_formats(name):
    f, x = FORMATS[name], torch.stack([_x_of(name), _x_of(name) * 0.7])
    v = torch.randn(2, 3, 4, 5)
    grad = torch.func.grad(lambda a: f(a).pow(3).sum())
    tangent = lambda a, b: torch.func.jvp(f, (a,), (b,))[1]  # noqa: E731
    assert torch.equal(torch.vmap(grad)(x), torch.stack([grad(a) for a in x]))
    assert torch.equal(torch.vmap(tangent)(x, v), torch.stack([tangent(a, b) for a, b in zip(x, v, strict=True)]))
    small = x[:, 0, 0, :] if name in ("format", "stochastic", "mxfp4") else x[:0]
    for one in small:
        diagonal = torch.diag(torch.func.jacrev(f)(one))
        assert torch.equal(torch.func.jacrev(f)(one), torch.diag(diagonal))
        assert torch.equal(torch.func.jacfwd(f)(one), torch.diag(diagonal))
        assert torch.func.hessian(lambda a: f(a).pow(3).sum())(one).abs().sum() > 0


def test_the_gradient_of_a_format_is_differentiable_in_the_incoming_one():
    x, grad = floats(3, 4) * 5, floats(3, 4).double()
    for f in (
        lambda g: qo.quant_float_backward(g, x, 2, 1),
        lambda g: qo.quant_block_backward(g, x, 1, 4, 2, 1, scale_rule="float32", scale_divisor=3.0),
    ):
        leaf = grad.clone().requires_grad_()
        y = f(leaf)
        assert y.dtype == x.dtype
        y.sum().backward()
        assert torch.equal(leaf.grad != 0, y.detach() != 0)
        assert leaf.grad.dtype == leaf.dtype
        tangent = torch.func.jvp(f, (grad,), (grad * 2,))[1]
        assert torch.equal(tangent, 2 * f(grad))


def _with_scale(name):
    x = floats(4, 6)
    return {
        "format": lambda s: qo.quant_float_forward(x, 4, 3, s, special="nan"),
        "blocks": lambda s: qo.quant_block_forward(x, 1, 3, 2, 1, s.sum(), scale_rule="e4m3"),
    }[name]


@pytest.mark.parametrize("name", ["format", "blocks"])
@pytest.mark.parametrize("kind", ["backward", *_DERIVATIVES])
def test_a_derivative_by_the_scale_of_a_format_is_refused(name, kind):
    f = _with_scale(name)
    match = rf"^quant_ops\.quant_{'float' if name == 'format' else 'block'}_forward: expected no derivative by a scale, got one"
    derive = _DERIVATIVES.get(kind, lambda f, x: f(x.requires_grad_()).sum().backward())
    with pytest.raises(RuntimeError, match=match):
        derive(f, torch.ones(1))


def test_a_scale_that_requires_a_gradient_may_be_used_where_none_is_asked_for():
    x, scale = floats(4, 6), scales(4, 1).requires_grad_()
    expected = qo.quant_float_forward(x, 4, 3, scale.detach())
    with torch.no_grad():
        assert torch.equal(qo.quant_float_forward(x, 4, 3, scale), expected)
    assert torch.equal(qo.quant_float_forward(x, 4, 3, scale).detach(), expected)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacfwd])
@pytest.mark.parametrize("name", ["quant_float_forward", "quant_float_backward", "quant_block_forward", "quant_block_backward"])
def test_raw_operators_of_formats_inside_torch_func_say_what_to_call(name, transform):
    op, x = getattr(ops, name), floats(2, 8)
    before = (x,) if "backward" in name else ()
    after = (2, 1) if "float" in name else (1, 4, 2, 1)
    with pytest.raises(RuntimeError, match=rf"^quant_ops\.{name}: expected a call of quant_ops\.{name} inside"):
        transform(lambda a: op(*before, a, *after).sum())(x)
