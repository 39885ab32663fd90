"""torch.vmap of the operators and layers equals a loop, bit for bit; where there is a rule, it is one call."""

import pytest
import test_int8_chain
import torch
from operands import codes, floats, scales
from torch import nn

import quant_ops as qo

pytestmark = pytest.mark.filterwarnings("error:There is a performance drop")


def zeros(*shape):
    return torch.randint(-9, 10, shape, dtype=torch.int32)


@pytest.fixture(autouse=True)
def _without_fallback():
    torch._C._functorch._set_vmap_fallback_enabled(False)
    yield
    torch._C._functorch._set_vmap_fallback_enabled(True)


def same_as_a_loop(f, in_dims, *args):
    got = torch.vmap(f, tuple(in_dims))(*args)
    size = next(a.shape[d] for a, d in zip(args, in_dims, strict=True) if d is not None)
    loop = [f(*(a if d is None else a.select(d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(size)]
    got, loop = [[got], [[one] for one in loop]] if isinstance(got, torch.Tensor) else [got, loop]
    for result, parts in zip(got, zip(*loop, strict=True), strict=True):
        assert result.dtype == parts[0].dtype
        assert torch.equal(result, torch.stack(parts))


W, WS, B, S = codes(6, 8), scales(6), floats(6), scales(3)
X = floats(3, 4, 8)
LINEAR = {
    "dynamic": (lambda x: qo.int8_linear(x, W, WS, B), [0], X),
    "asymmetric": (lambda x: qo.int8_linear(x, W, WS, asymmetric=True, relu=True), [0], X),
    "packed": (lambda x: qo.int8_linear(x, W, WS, packed_weight=qo.pack_weight(W)), [1], X),
    "last": (lambda x: qo.int8_linear(x, W, WS), [-1], floats(4, 8, 3)),
    "vectors": (lambda x: qo.int8_linear(x, W, WS), [0], floats(3, 8)),
    "bfloat16": (lambda x: qo.int8_linear(x, W, WS, B), [0], X.bfloat16()),
    "static": (lambda x: qo.int8_linear(x, W, WS, B, torch.tensor(0.02), torch.tensor(3)), [0], X),
    "scale of each row": (lambda x, s: qo.int8_linear(x, W, WS, B, s), [0, None], X, scales(4, 1)),
    "scale of each sample": (lambda x, s, z: qo.int8_linear(x, W, WS, B, s, z), [0, 0, 0], X, scales(3), zeros(3)),
    "scale of each sample, its zero point not": (
        lambda x, s, z: qo.int8_linear(x, W, WS, B, s, z),
        [0, 0, None],
        X,
        scales(3),
        zeros(1),
    ),
    "scale of each row of each sample": (lambda x, s: qo.int8_linear(x, W, WS, B, s), [1, 0], X, scales(4, 3, 1)),
    "many scales for one x": (lambda x, s: qo.int8_linear(x, W, WS, B, s), [None, 0], X[0], scales(5, 1)),
    "codes": (
        lambda x, s: qo.int8_linear(x, W, WS, B, s, out_dtype=torch.float16),
        [0, 0],
        codes(3, 4, 8, dtype=torch.uint8),
        scales(3),
    ),
    "int8 out": (lambda x: qo.int8_linear(x, W, WS, B, out_scale=torch.tensor(0.1), out_zero_point=torch.tensor(2)), [0], X),
    "weights": (lambda x, w, s: qo.int8_linear(x, w, s, B), [None, 0, 1], X[0], codes(3, 6, 8), scales(6, 3)),
    "out_scale": (lambda x, s: qo.int8_linear(x, W, WS, B, out_scale=s), [0, 0], X, scales(3)),
    "no rows": (lambda x: qo.int8_linear(x, W, WS), [0], floats(3, 0, 8)),
    "multiplier": (lambda x, m: qo.int8_linear(x, W, WS, x_multiplier=m), [0, None], X, floats(8)),
    "residual": (lambda x, r: qo.int8_linear(x, W, WS, residual=r, activation="gelu"), [0, 1], X, floats(4, 3, 6)),
    "residuals for one x": (lambda x, r: qo.int8_linear(x, W, WS, residual=r), [None, 0], X[0], floats(3, 4, 6)),
    "multipliers": (lambda x, m: qo.int8_linear(x, W, WS, x_multiplier=m), [0, 1], X, floats(8, 3)),
    "multipliers for one x": (lambda x, m: qo.int8_linear(x, W, WS, x_multiplier=m), [None, 0], X[0], floats(3, 8)),
}
W4, W4S, W4Z = codes(6, 40).bitwise_and(7), scales(6, 2), zeros(6, 2)
W4P = qo.pack_weight_only(W4, 4, 32)
ROW, M, M4 = floats(3, 4, 40), floats(40), floats(4, 40)
INDICES = torch.randint(6, (3, 4, 5))


def w4a8(x, w=W4, s=W4S, z=None, b=None, asymmetric=False):
    return qo.weight_only_linear(x, w, s, z, b, 4, 32, dynamic=True, asymmetric=asymmetric)


WEIGHT_ONLY = {
    "dynamic": (w4a8, [0], ROW),
    "asymmetric, second": (lambda x: w4a8(x, z=W4Z, b=B, asymmetric=True), [1], ROW),
    "last": (w4a8, [-1], floats(4, 40, 3)),
    "vectors": (w4a8, [0], ROW[0]),
    "packed": (lambda x: qo.weight_only_linear(x, W4, W4S, None, B, 4, 32, packed_weight=W4P, dynamic=True), [0], ROW.half()),
    "weights": (w4a8, [None, 0, 1], ROW[0], codes(3, 6, 40).bitwise_and(7), scales(6, 3, 2)),
    "no rows": (w4a8, [0], floats(3, 0, 40)),
    "multiplier": (lambda x, m: qo.weight_only_linear(x, W4, W4S, None, B, 4, 32, dynamic=True, x_multiplier=m), [0, None], ROW, M),
    "multipliers": (lambda x, m: qo.weight_only_linear(x, W4, W4S, None, B, 4, 32, dynamic=True, x_multiplier=m), [1, 0], ROW, M4),
    "lookup": (lambda i: qo.weight_only_embedding(i, W4, W4S, W4Z, 4, 32), [0], INDICES),
    "lookup, last": (lambda i: qo.weight_only_embedding(i, W4, W4S, None, 4, 32, packed_weight=W4P), [2], INDICES),
    "lookup, numbers": (lambda i: qo.weight_only_embedding(i, W4, W4S, None, 4, 32), [0], INDICES[0, 0].int()),
    "lookup, scales": (lambda i, s: qo.weight_only_embedding(i, W4, s, None, 4, 32), [None, 2], INDICES, scales(6, 2, 3)),
}
K, KS = codes(6, 2, 3, 3), scales(6)
IMAGES = floats(3, 2, 4, 7, 5)
GEOMETRY = ([1, 2], [1], [1], 2)
CONV = {
    "dynamic": (lambda x: qo.int8_conv2d(x, K, KS, None, *GEOMETRY), [0], IMAGES),
    "images": (lambda x: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, asymmetric=True), [0], IMAGES[:, 0]),
    "second": (lambda x: qo.int8_conv2d(x, K, KS, B, *GEOMETRY), [1], IMAGES),
    "channels_last": (
        lambda x: qo.int8_conv2d(x, K, KS, B, *GEOMETRY),
        [0],
        IMAGES.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (3, 2)),
    ),
    "packed": (lambda x: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, packed_weight=qo.pack_weight(K, 2)), [0], IMAGES),
    "static": (lambda x: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, torch.tensor(0.02)), [0], IMAGES),
    "scale of each sample": (lambda x, s: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, s), [0, None], IMAGES, scales(2, 1, 1, 1)),
    "scale of each batch": (
        lambda x, s, z: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, s, z),
        [0, 0, 0],
        IMAGES,
        scales(3, 1),
        zeros(3),
    ),
    "scale of each image": (lambda x, s: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, s), [0, 0], IMAGES[:, 0], scales(3)),
    "scale of all": (lambda x, s: qo.int8_conv2d(x, K, KS, B, *GEOMETRY, s), [0, 0], IMAGES, scales(3, 2, 1, 1, 1)),
    "weights": (lambda x, w: qo.int8_conv2d(x, w, KS, B, *GEOMETRY), [0, 0], IMAGES, codes(3, 6, 2, 3, 3)),
}
Q = codes(3, 2, 4, 7, 5)
ONE = torch.tensor(0.05)
OUT = {"out_scale": torch.tensor(0.1), "out_zero_point": torch.tensor(2)}
BETWEEN = {
    "requantize": (lambda x: qo.requantize(x, ONE, **OUT, activation="relu"), [0], Q),
    "requantize, last": (lambda x: qo.requantize(x, ONE), [-1], Q),
    "requantize, scales": (qo.requantize, [0, 0], Q, scales(3)),
    "add": (lambda a, b: qo.int8_add(a, b, ONE, ONE, **OUT), [0, 1], Q, Q.transpose(0, 1)),
    "add, one for all": (lambda a, b: qo.int8_add(a, b, ONE, ONE, **OUT), [None, 0], Q[0], Q),
    "mul": (lambda a, b: qo.int8_mul(a, b, ONE, ONE, **OUT), [0, 1], Q, Q.transpose(0, 1)),
    "mul, channels": (lambda a, b: qo.int8_mul(a, b, ONE, ONE, **OUT), [0, None], Q, Q[0, :, :, :1, :1]),
    "mul, images": (lambda a, b: qo.int8_mul(a, b, ONE, ONE, **OUT), [1, 0], Q, Q.transpose(0, 1)[..., :1, :1]),
    "cat": (lambda a, b: qo.int8_cat([a, b], [ONE, ONE], [], **OUT), [0, 0], Q, Q[:, :, :2]),
    "cat, from the end": (lambda a, b: qo.int8_cat([a, b], [ONE, ONE], [], -1, **OUT), [0, None], Q, Q[0]),
    "cat, scales": (lambda a, s: qo.int8_cat([a, a], [s, ONE], [], **OUT), [0, 0], Q, scales(3)),
    "max": (lambda x: qo.int8_max_pool2d(x, 3, 2, 1), [0], Q),
    "max of images": (lambda x: qo.int8_max_pool2d(x, 2), [1], Q[0]),
    "average": (lambda x: qo.int8_avg_pool2d(x, ONE, None, 3, 2, 1, **OUT), [0], Q),
    "adaptive": (lambda x: qo.int8_adaptive_avg_pool2d(x, ONE, None, 2, **OUT), [-1], Q.movedim(0, -1)),
    "upsample": (lambda x: qo.int8_upsample_nearest2d(x, 2), [0], Q),
}
PROGRAM, CONSTANTS = test_int8_chain.network()
SMALL = floats(3, 2, 3, 12, 12)
CHAIN = {
    "images": (lambda x: tuple(qo.int8_chain([x], CONSTANTS, PROGRAM.encode())), [0], SMALL),
    "third": (lambda x: tuple(qo.int8_chain([x], CONSTANTS, PROGRAM.encode())), [2], SMALL.movedim(0, 2)),
    "constants": (lambda x, s: tuple(qo.int8_chain([x], [s, *CONSTANTS[1:]], PROGRAM.encode())), [None, 0], SMALL[0], scales(3)),
}
GEMM = {
    "a": (qo.int8_gemm, [0, None], codes(3, 4, 8), W),
    "a, second": (qo.int8_gemm, [1, None], codes(4, 3, 8, dtype=torch.uint8), W),
    "b": (qo.int8_gemm, [None, 0], codes(4, 8), codes(3, 6, 8)),
    "both": (qo.int8_gemm, [0, 2], codes(3, 4, 8), codes(6, 8, 3)),
}
HEADS = floats(3, 2, 4, 5, 8)  # batch, samples, heads, rows, columns
ATTENTION = {
    "all": (qo.int8_attention, [0, 0, 0], HEADS, HEADS.flip(3), HEADS.cos()),
    "q": (qo.int8_attention, [2, None, None], HEADS.movedim(0, 2), HEADS[0], HEADS[1]),
    "k and v": (qo.int8_attention, [None, 0, 1], HEADS[0], HEADS, HEADS.transpose(0, 1)),
    "mask": (qo.int8_attention, [0, 0, 0, None], HEADS, HEADS, HEADS, floats(5, 5) > 0),
    "mask of each": (qo.int8_attention, [0, None, None, 1], HEADS, HEADS[0], HEADS[0], floats(5, 3, 5)),
    "mask of each sample": (qo.int8_attention, [0, None, None, 0], HEADS, HEADS[0], HEADS[0], floats(3, 2, 1, 1, 5)),
}
ROWS = {
    "matrix": (qo.quantize_rows, [0], X),
    "last, asymmetric": (lambda x: qo.quantize_rows(x, True), [2], X),
    "vectors": (qo.quantize_rows, [0], X[0]),
    "norms": (lambda x, r: qo.norm_quantize_rows(x, None, X[0, 0], 1e-5, residual=r), [1, None], X, X[:, 0]),
    "all": (lambda x: qo.choose_qparams(x, [], -127, 127), [0], X),
    "rows": (lambda x: qo.choose_qparams(x, [-1], -127, 127), [1], X),
    "columns": (lambda x: qo.choose_qparams(x, [0], -128, 127, True), [2], X),
    "numbers": (lambda x: qo.choose_qparams(x, [], -128, 127, True), [0], X[0, 0]),
}


def forward(x, s, z=None, simulate=True, block_size=None):
    return qo.quant_tensor_forward(x, s, z, -100, 100, z is not None, simulate, block_size=block_size)


QUANTIZE = {
    "one scale": (lambda x: forward(x, torch.tensor(0.1)), [1], X),
    "channels": (forward, [0, None], X, scales(4, 1)),
    "codes": (lambda x, s, z: forward(x, s, z, False), [0, None, None], X, scales(8), zeros(8)),
    "scale of each sample": (forward, [0, 0, 0], X, scales(3), zeros(3, 1)),
    "channels of each sample": (forward, [1, 2, 0], X, scales(3, 1, 4), zeros(4, 8)),
    "many scales for one x": (lambda x, s: forward(x, s, None, False), [None, 0], X[0], scales(5, 8)),
    "numbers": (forward, [0, 0], X[0, 0], scales(8, 1)),
    "blocks": (lambda x, s: forward(x, s, None, True, [2, 4]), [0, None], X, scales(2, 2)),
    "blocks of each sample": (lambda x, s: forward(x, s, None, False, [2, 4]), [0, 0], X, scales(3, 2, 2)),
    "one for all blocks": (lambda x, s: forward(x, s, None, False, [2, 4]), [0, 0], X, scales(3)),
    "double": (forward, [0, None], X.double(), scales(8).double()),
    "dequant": (qo.dequant_tensor, [0, None], codes(3, 4, 8), scales(4, 1)),
    "dequant, scale and zero of each sample": (qo.dequant_tensor, [0, 0, 1], codes(3, 4, 8), scales(3, 8), zeros(8, 3)),
    "dequant, blocks": (
        lambda q, s: qo.dequant_tensor(q, s, None, torch.float16, block_size=[4, 2]),
        [2, 0],
        codes(4, 8, 3),
        scales(3, 1, 4),
    ),
}


def e4m3(x, s=None, seed=None, rounding="nearest_even", **options):
    return qo.quant_float_forward(x, 4, 3, s, special="nan", rounding=rounding, seed=seed, **options)


def e2m1_gradient(grad, x, s=None, **options):
    return qo.quant_float_backward(grad, x, 2, 1, s, **options)


def nvfp4(x, tensor_scale=None, dim=-1):
    return qo.quant_block_forward(x, dim, 4, 2, 1, tensor_scale, scale_rule="e4m3")


def seeds(*shape):
    return torch.randint(-(2**63), 2**63 - 1, shape)


FLOAT = {
    "no scale": (e4m3, [1], X * 200),
    "channels": (e4m3, [1, None], X, scales(3, 1)),
    "scale of each sample": (e4m3, [0, 0], X, scales(3)),
    "channels of each sample": (e4m3, [1, 2], X, scales(3, 1, 4)),
    "many scales for one x": (e4m3, [None, 0], X[0], scales(5, 8)),
    "numbers": (e4m3, [0, 0], X[0, 0], scales(8, 1)),
    "blocks of each sample": (lambda x, s: e4m3(x, s, block_size=[2, 4]), [0, 0], X, scales(3, 2, 2)),
    "float16, away": (lambda x: e4m3(x, rounding="nearest_away", saturate=False), [0], X.half() * 50),
    "double": (e4m3, [0, None], X.double(), scales(8).double()),
    "stochastic, one seed": (lambda x: e4m3(x, None, 5, "stochastic"), [1], X),
    "stochastic, a seed each": (lambda x, s: e4m3(x, None, s, "stochastic"), [0, 0], X, seeds(3)),
    "stochastic, many seeds for one x": (lambda x, s: e4m3(x, S[0], s, "stochastic"), [None, 0], X[0], seeds(4, 1)),
    "a seed each that is not read": (
        lambda x, s: torch.ops.quant_ops.quant_float_forward(x, 4, 3, None, s, special=1),
        [0, 0],
        X,
        seeds(3),
    ),
    "gradient": (e2m1_gradient, [0, 1], X, X.movedim(0, 1).contiguous() * 5),
    "one gradient": (e2m1_gradient, [None, 0, 0], X[0], X * 0.1, scales(3)),
    "gradient of one x": (e2m1_gradient, [1, None], floats(4, 5, 8), X[0] * 5),
    "gradient, many scales": (e2m1_gradient, [None, None, 0], X[0], X[0] * 0.1, scales(5, 1, 8)),
    "gradient, blocks": (lambda g, x, s: e2m1_gradient(g, x, s, block_size=[4, 2]), [0, 0, None], X, X * 0.1, scales(4)),
}
BLOCK = {
    "last": (nvfp4, [0], X),
    "first": (lambda x: nvfp4(x, None, 0), [1], X),
    "first from the end": (lambda x: nvfp4(x, None, -2), [2], X),
    "vectors": (nvfp4, [0], X[0]),
    "one tensor_scale": (lambda x: nvfp4(x, S[0]), [0], X),
    "a tensor_scale each": (nvfp4, [0, 0], X, scales(3)),
    "a tensor_scale each for one x": (nvfp4, [None, 0], X[0], scales(3, 1)),
    "bfloat16": (lambda x: qo.quant_block_forward(x, 0, 3, 1, 6, bias=1, scale_rule="round_up"), [0], X.bfloat16()),
    "stochastic": (
        lambda x, s: qo.quant_block_forward(x, 1, 3, 3, 2, rounding="stochastic", seed=s),
        [0, None],
        X,
        seeds(),
    ),
    "stochastic, a seed each": (
        lambda x, s: qo.quant_block_forward(x, 1, 3, 3, 2, rounding="stochastic", seed=s),
        [0, 0],
        X,
        seeds(3, 1),
    ),
    "gradient": (lambda g, x: qo.quant_block_backward(g, x, -1, 3, 2, 1, scale_rule="bfloat16"), [0, 1], X, X.movedim(0, 1)),
    "one gradient": (lambda g, x: qo.quant_block_backward(g, x, 0, 3, 2, 1), [None, 0], X[0], X),
    "gradient, a tensor_scale each": (
        lambda g, x, s: qo.quant_block_backward(g, x, 1, 4, 2, 1, s, scale_rule="e4m3"),
        [0, 0, 0],
        X,
        X,
        scales(3) * 0.01,
    ),
}
SAMPLES = {
    "linear": LINEAR,
    "weight_only": WEIGHT_ONLY,
    "conv2d": CONV,
    "gemm": GEMM,
    "between": BETWEEN,
    "chain": CHAIN,
    "attention": ATTENTION,
    "rows": ROWS,
    "quantize": QUANTIZE,
    "float": FLOAT,
    "block": BLOCK,
}


@pytest.mark.parametrize(
    "sample", [pytest.param(s, id=f"{family}: {name}") for family, samples in SAMPLES.items() for name, s in samples.items()]
)
def test_equals_a_loop(sample):
    same_as_a_loop(*sample)


def test_drawn_seeds_follow_the_randomness_of_vmap():
    """The same random bits in every sample, or each its own; torch refuses to choose."""

    def draw(x):
        return e4m3(x, None, None, "stochastic")

    x = torch.full((4, 50), 1.05)
    same, different = (torch.vmap(draw, randomness=kind)(x) for kind in ("same", "different"))
    assert torch.equal(same, same[:1].expand_as(same))
    assert len({tuple(row.tolist()) for row in different}) == 4
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(draw)(x)


def test_an_empty_batch():
    assert torch.vmap(lambda x: qo.int8_linear(x, W, WS))(floats(0, 2, 8)).shape == (0, 2, 6)


def test_floating_rows_are_those_of_one_call():
    got = torch.vmap(lambda x: qo.weight_only_linear(x, W4, W4S, None, B, 4, 32))(ROW)
    assert torch.equal(got, qo.weight_only_linear(ROW, W4, W4S, None, B, 4, 32))


def test_nested():
    x, s = floats(2, 3, 4, 8), scales(3)
    got = torch.vmap(torch.vmap(lambda x, s: qo.int8_linear(x, W, WS, None, s)), (0, None))(x, s)
    assert torch.equal(
        got, torch.stack([torch.stack([qo.int8_linear(x[i, j], W, WS, None, s[j]) for j in range(3)]) for i in range(2)])
    )


@pytest.mark.parametrize("config", [qo.Int8Dynamic(), qo.Int8Static(num_steps=2)], ids=["dynamic", "static"])
def test_layers(config):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(4, 6, 3), nn.ReLU(), nn.Flatten(-2), nn.Linear(36, 5)).eval()
    x = floats(3, 2, 4, 8)
    qo.prepare_(model, config)
    for step in range(2) if isinstance(config, qo.Int8Static) else ():
        with qo.timestep(model, step):
            qo.calibrate(model, [x[0] * (step + 1)])
    qo.convert_(model)
    same_as_a_loop(model, [0], x)
    functional = torch.vmap(lambda x: torch.func.functional_call(model, dict(model.named_buffers()), (x,)))
    assert torch.equal(functional(x), torch.stack([model(one) for one in x]))


@pytest.mark.parametrize(
    "f",
    [
        lambda x: qo.int8_linear(x, W, WS),
        lambda x: w4a8(x, W4[:, :8], W4S[:, :1]),
        lambda x: qo.weight_only_embedding(x.abs().int() % 6, W, WS),
        e4m3,
        lambda x: e2m1_gradient(x, x),
        nvfp4,
        lambda x: qo.quant_block_backward(x, x, 0, 3, 2, 1),
    ],
)
def test_calls_once(f):
    """One call of the operator for the whole batch."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.calls += func.namespace == "quant_ops"
            return func(*args, **(kwargs or {}))

    with Count() as count:
        torch.vmap(f)(X)
    assert count.calls == 1


@pytest.mark.parametrize(
    "call",
    [
        lambda: torch.vmap(qo.quantize_rows)(floats(3)),
        lambda: torch.vmap(lambda x: qo.int8_linear(x, W[:, :3], WS))(floats(3)),
        lambda: torch.vmap(lambda x: w4a8(x, W4[:, :3], W4S[:, :1]))(floats(3)),
        lambda: torch.vmap(lambda x: w4a8(x, W4, W4S[:, 0]))(ROW),
        lambda: torch.vmap(lambda x: qo.quant_tensor_forward(x, S, None, -7, 7))(floats(3)),
        lambda: torch.vmap(lambda x, s: qo.quant_tensor_forward(x, s, None, -7, 7))(floats(3), scales(3, 3)),
        lambda: torch.vmap(lambda x: qo.choose_qparams(x, [1], -7, 7))(floats(3, 4)),
        lambda: torch.vmap(lambda a: qo.int8_gemm(a, W))(codes(4, 8)),
        lambda: torch.vmap(lambda x: qo.int8_conv2d(x, K, KS))(floats(3, 2)),
        lambda: torch.vmap(lambda x: qo.int8_linear(x, W, WS, None, S[:, None]))(X),
        lambda: torch.vmap(lambda w: qo.int8_linear(X[0], w, WS))(codes(0, 6, 8)),
        lambda: torch.vmap(e4m3)(floats(3), scales(3, 3)),
        lambda: torch.vmap(lambda x: e4m3(x, S))(floats(3)),
        lambda: torch.vmap(e2m1_gradient)(X, X[:, :, :7]),
        lambda: torch.vmap(nvfp4)(floats(3)),
        lambda: torch.vmap(lambda x: nvfp4(x, None, 1))(X[0]),
        lambda: torch.vmap(lambda x: nvfp4(x, None, -2))(X[0]),
        lambda: torch.vmap(lambda x, s: e4m3(x, None, s, "stochastic"))(X, seeds(3, 2)),
        lambda: torch.vmap(lambda x: e4m3(x, None, 5, "stochastic"))(floats(0, 4)),
    ],
)
def test_what_the_operator_refuses_is_refused(call):
    """A batch dimension makes no call valid that is not."""
    with pytest.raises(ValueError, match=r"^quant_ops\."):
        call()
