"""Operators and modules in torch.compile, torch.export, autocast and inference mode, bit for bit what the plain call gives."""

import copy
import io

import pytest
import torch
from operands import codes, floats, images, scales, vision_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

import quant_ops as qo


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    yield
    torch._dynamo.reset()


# ---- torch.compile -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "static"), [("inductor", False), ("aot_eager", False), ("aot_eager", True)])
def test_compile_equals_eager_without_recompiling(backend, static):
    model = vision_model(static)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (4, 7, 3):
            assert torch.equal(compiled(images(batch)), model(images(batch)))
    assert counter.frame_count == 1


def test_compile_outside_no_grad():
    """Inference with parameters that require a gradient, outside no_grad: works compiled as it does in eager mode."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 8), qo.QuantLinear.from_float(nn.Linear(8, 5)), nn.Linear(5, 4)).eval()
    x = floats(3, 9)
    expected = model(x)
    result = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(result, expected)


def test_compile_refuses_the_gradient_of_an_int8_operator():
    model = nn.Sequential(nn.Linear(9, 8), qo.QuantLinear.from_float(nn.Linear(8, 5)))
    with pytest.raises(Exception, match=r"quant_ops\.int8_linear: expected no gradient to be asked for"):
        torch.compile(model, backend="aot_eager")(floats(3, 9)).sum().backward()


def test_compile_of_the_wrappers():
    weight, kernel, scale = codes(6, 12), codes(4, 3, 2, 2), scales(6)

    def everything(x, image):
        q, s, z = qo.quantize_rows(x, asymmetric=True)
        step, zero = qo.choose_qparams(x, [0], -128, 127, True)
        packed = qo.pack_weight(weight)
        return (
            qo.dequant_tensor(q, s, z),
            qo.quant_tensor_forward(x, step, zero, -128, 127, True),
            qo.quant_tensor_backward(x, x, step, zero, -128, 127, True),
            qo.int8_gemm(q, weight),
            qo.int8_linear(x, weight, scale, packed_weight=packed, relu=True),
            qo.int8_linear(q, weight, scale, None, s, z),
            qo.int8_linear(q, weight, scale, None, s, z, residual=x[:, :6], activation="silu"),
            qo.int8_conv2d(image, kernel, torch.tensor(0.01), None, 2, (1, 0), 1),
            qo.norm_quantize_rows(x, None, None, 1e-5, residual=x),
            qo.int8_attention(image, image, image, image[:, :1, :, :1].mT > 0),
            *between(qo.quant_tensor_forward(image, scale[0], None, -128, 127, simulate=False), scale[0]),
        )

    def between(c, s):
        pooled = qo.int8_max_pool2d(c, 3, 2, 1, ceil_mode=True)
        return (
            qo.requantize(c, s, activation="hardswish"),
            qo.int8_add(c, c, s, s, out_scale=s, activation="relu6"),
            qo.int8_mul(c, qo.int8_adaptive_avg_pool2d(c, s, None, 1, out_scale=s), s, s, out_scale=s, activation="sigmoid"),
            qo.int8_cat([c, c], [s, s], [], out_scale=s * 2),
            pooled,
            qo.int8_avg_pool2d(pooled, s, None, 2, 1),
            qo.int8_adaptive_avg_pool2d(c, s, None, 1),
            qo.int8_upsample_nearest2d(c, 2),
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 9):
        arguments = floats(batch, 12), floats(batch, 3, 6, 7)
        flat = torch.utils._pytree.tree_leaves
        for result, expected in zip(flat(compiled(*arguments)), flat(everything(*arguments)), strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)
    assert counter.frame_count == 1


def test_compile_where_only_the_data_tell_a_size():
    weight, kernel, scale = codes(6, 12), codes(4, 3, 2, 2), scales(6)

    def selected(x, image, keep):
        rows, images = x[keep], image[keep]
        q, s, z = qo.quantize_rows(rows)
        return qo.int8_linear(rows, weight, scale), qo.int8_conv2d(images, kernel, scale[:4]), qo.dequant_tensor(q, s, z)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(selected, backend="aot_eager", fullgraph=True, dynamic=True)
        for keep in ([True, False, True, True], [True, False], [True, True, False]):
            arguments = floats(len(keep), 12), floats(len(keep), 3, 6, 7), torch.tensor(keep)
            for result, expected in zip(compiled(*arguments), selected(*arguments), strict=True):
                assert torch.equal(result, expected)


def test_compile_refuses_in_the_words_of_the_operator():
    compiled = torch.compile(qo.int8_linear, backend="aot_eager", fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match=r"quant_ops\.int8_linear: expected x\.shape\[-1\] == weight\.shape\[1\], got 5 and 4"):
        compiled(floats(3, 5), codes(6, 4), scales(6))


def test_compile_of_training_with_a_learned_scale():
    def loss(x, scale, zero_point):
        return (qo.quant_tensor_forward(x, scale, zero_point, -8, 7, asymmetric=True) * x.detach().cos()).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch in (4, 6):
        x = floats(batch, 3, 5, 5)
        start = (x, torch.full((3, 1, 1), 0.2), torch.full((3, 1, 1), 0.7))
        eager, traced = ([t.clone().requires_grad_() for t in start] for _ in range(2))
        loss(*eager).backward()
        compiled(*traced).backward()
        for e, t in zip(eager, traced, strict=True):
            assert e.grad.abs().sum() > 0
            assert torch.equal(e.grad, t.grad)


def test_compile_of_floating_formats():
    scale = torch.rand(12) + 0.5

    def everything(x, grad, seed):
        return (
            qo.quant_float_forward(x, 4, 3, scale, special="nan", saturate=False),
            qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=seed),
            qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=5),
            qo.quant_float_backward(grad, x, 2, 1, scale, bias=3),
            qo.quant_block_forward(x, -1, 5, 2, 1, scale_rule="e4m3"),
            qo.quant_block_forward(x, 0, 4, 5, 2, special="ieee", scale_rule="even", rounding="stochastic", seed=seed),
            qo.quant_block_backward(grad, x, 1, 4, 1, 6, bias=1, scale_rule="bfloat16", scale_divisor=0.5),
        )

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(everything, backend=counter, fullgraph=True, dynamic=True)
    for batch in (5, 9, 2):
        arguments = floats(batch, 12), floats(batch, 12), torch.tensor(batch)
        for result, expected in zip(compiled(*arguments), everything(*arguments), strict=True):
            assert result.dtype == expected.dtype
            assert torch.equal(result, expected)
    assert counter.frame_count == 1


def test_compile_of_training_with_floating_formats():
    def loss(x, seed):
        blocks = qo.quant_block_forward(x * 0.5, -1, 4, 2, 1, scale_rule="e4m3")
        return (qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=seed) * x.detach().cos() + blocks.square()).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=True)
    # drawn before anything is compiled, which may draw numbers of its own; some elements are clipped by both operators
    for x in [floats(batch, 12) * 4 for batch in (4, 6)]:
        seed = torch.tensor(len(x))
        eager, traced = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss(eager, seed).backward()
        compiled(traced, seed).backward()
        assert 0 < (eager.grad == 0).sum() < eager.numel()
        assert torch.equal(eager.grad, traced.grad)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_draws_a_seed_for_every_call(backend):
    """Fresh random bits a call, from torch's generator."""
    compiled = torch.compile(
        lambda x: qo.quant_float_forward(x, 2, 1, rounding="stochastic"), backend=backend, fullgraph=True, dynamic=True
    )
    x = floats(5, 40)
    first = []
    for _ in range(2):
        torch.manual_seed(3)
        first.append([compiled(x) for _ in range(3)])
    assert all(torch.equal(a, b) for a, b in zip(*first, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first[0], first[0][1:], strict=False))


def test_compile_refuses_a_format_in_the_words_of_the_operator():
    compiled = torch.compile(qo.quant_float_forward, backend="aot_eager", fullgraph=True, dynamic=True)
    with pytest.raises(Exception, match=r"quant_ops\.quant_float_forward: expected exponent_bits in \[1, 8\], got 9"):
        compiled(floats(3, 5), 9, 3)


# ---- torch.export --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("strict", [False, True])
def test_export_with_a_dynamic_batch(static, strict):
    model = vision_model(static)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert {"quant_ops.int8_conv2d.default", "quant_ops.int8_linear.default"} <= targets

    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for exported in (program, torch.export.load(file), program.run_decompositions()):
        for n in (4, 1, 9):
            assert torch.equal(exported.module()(images(n)), model(images(n)))


class _Stochastic(nn.Module):
    def __init__(self, of_blocks):
        super().__init__()
        self.of_blocks = of_blocks

    def forward(self, x, seed=None):
        if self.of_blocks:
            return qo.quant_block_forward(x, -1, 8, 2, 1, rounding="stochastic", seed=seed)
        return qo.quant_float_forward(x, 2, 1, rounding="stochastic", seed=seed)


@pytest.mark.parametrize("of_blocks", [False, True], ids=["format", "blocks"])
def test_export_of_stochastic_rounding(of_blocks):
    """A seed that is an input decides the bits; one that is drawn is drawn in every call, from torch's generator."""
    module, x = _Stochastic(of_blocks), floats(4, 50)
    batch = {0: torch.export.Dim("batch", min=1, max=64)}
    with_seed = torch.export.export(module, (x, torch.tensor(0)), dynamic_shapes=(batch, None)).module()
    for seed in (torch.tensor(5), torch.tensor(-6)):
        assert torch.equal(with_seed(x[:3], seed), module(x[:3], seed))
    assert not torch.equal(with_seed(x, torch.tensor(5)), with_seed(x, torch.tensor(-6)))

    program = torch.export.export(module, (x,), dynamic_shapes=(batch,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for drawing in (program.module(), torch.export.load(file).module(), program.run_decompositions().module()):
        torch.manual_seed(8)
        got = drawing(x), drawing(x)
        torch.manual_seed(8)
        assert torch.equal(got[0], module(x))
        assert torch.equal(got[1], module(x))
        assert not torch.equal(*got)


@pytest.mark.slow
def test_ahead_of_time_compilation(tmp_path):
    """The C++ runtime that calls the operators gives the same bits, for every batch size."""
    model = vision_model(static=True)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (images(4),), dynamic_shapes=({0: batch},))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for n in (4, 1, 9):
        assert torch.equal(loaded(images(n)), model(images(n)))


# ---- autocast, inference_mode ----------------------------------------------------------------------------------------------


def test_autocast_follows_the_input():
    """Under autocast a layer gives what it is given: bfloat16 after a bfloat16 layer, float32 for a float32 input."""
    torch.manual_seed(0)
    first, second = nn.Linear(12, 16), qo.QuantLinear.from_float(nn.Linear(16, 8))
    x = floats(5, 12)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = first(x)
        y = second(hidden)
        z = qo.QuantLinear.from_float(first)(x)
    assert hidden.dtype == y.dtype == torch.bfloat16
    assert torch.equal(y, second(hidden.detach()))
    assert z.dtype == torch.float32
    assert second.weight_scale.dtype == second.bias.dtype == torch.float32


def test_inference_mode():
    """A model that was quantized and run in inference mode works outside it too, also with inputs that require a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(4 * 36, 5)).eval()
    with torch.inference_mode():
        qo.quantize_(model)
        inside = model(images(3))
    assert torch.equal(model(images(3)), inside)
    assert torch.equal(model(images(3).requires_grad_()), inside)
    assert torch.equal(copy.deepcopy(model)(images(3)), inside)
