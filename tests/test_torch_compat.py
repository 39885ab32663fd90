"""The operators and modules inside torch: opcheck, compile, export, autocast, copies, checkpoints, DDP, gradients.

Everything is compared bit for bit with the plain call; only the gradient of a float32 tensor has a tolerance, for its sums.
"""

import copy
import inspect
import io
import pickle
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import quant_ops as qo

ops = torch.ops.quant_ops
_generator = torch.Generator().manual_seed(0)


def floats(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=_generator).to(dtype)


def codes(*shape, dtype=torch.int8):
    info = torch.iinfo(dtype)
    return torch.randint(info.min, info.max + 1, shape, generator=_generator, dtype=dtype)


def scales(*shape, dtype=torch.float32):
    return (torch.rand(shape, generator=_generator) * 0.05 + 0.01).to(dtype)


# ---- opcheck: schema, fake kernel, autograd registration, tracing with symbolic shapes -------------------------------

_IMAGE = floats(2, 6, 5, 7)
_LAST = _IMAGE.to(memory_format=torch.channels_last)
_S = scales()
_Z = torch.tensor(3, dtype=torch.int32)


def call(*args, **kwargs):
    return args, kwargs


def _learning(*tensors):
    return [t.clone().requires_grad_() for t in tensors]


_FORWARD = {
    "per_tensor": call(_IMAGE, _S, None, -128, 127),
    "one_element_scale": call(_IMAGE, scales(1), None, -128, 127),
    "per_channel": call(_IMAGE, scales(6, 1, 1), None, -128, 127),
    "batch_and_column": call(_IMAGE, scales(2, 1, 1, 7), None, -8, 7),
    "asymmetric_uint8": call(_IMAGE, scales(1, 6, 1, 1), codes(1, 6, 1, 1, dtype=torch.uint8), 0, 255, True),
    "asymmetric_int64": call(_IMAGE, _S, torch.tensor(-5), -128, 127, True),
    "codes_int8": call(_IMAGE, _S, None, -128, 127, False, False),
    "codes_uint8": call(_IMAGE, _S, _Z, 0, 255, True, False),
    "codes_int16": call(_IMAGE, _S, None, -129, 127, False, False),
    "codes_int32": call(_IMAGE, _S, None, 0, 70000, False, False),
    "float16": call(_IMAGE.half(), _S, None, -128, 127),
    "bfloat16": call(_IMAGE.bfloat16(), scales(6, 1, 1, dtype=torch.bfloat16), None, -128, 127),
    "float64": call(_IMAGE.double(), _S.double(), None, -128, 127),
    "channels_last": call(_LAST, scales(6, 1, 1), None, -128, 127, False, False),
    "transposed": call(floats(5, 9).T, scales(9, 1), None, -128, 127),
    "sliced": call(floats(6, 12)[1:, ::3], scales(6, 4)[1:], None, -128, 127, False, False),
    "expanded": call(floats(1, 4).expand(3, 4), _S, None, -128, 127),
    "scalar": call(floats(), _S, None, -128, 127),
    "empty": call(floats(0, 6, 5), scales(6, 1), None, -128, 127),
    "blocks": call(floats(6, 8), scales(3, 2), codes(3, 2), -128, 127, True, block_size=[2, 4]),
    "learned": call(*_learning(_IMAGE, scales(6, 1, 1), floats(6, 1, 1)), -8, 7, True),
    "learned_symmetric": call(*_learning(_LAST, _S), None, -8, 7),
}
_BACKWARD = {
    "per_tensor": call(floats(3, 5), floats(3, 5), _S, None, -8, 7),
    "per_channel": call(floats(2, 6, 5, 7), _LAST, scales(6, 1, 1), None, -8, 7),
    "zero_point": call(floats(3, 5), floats(3, 5), scales(5), codes(5), -128, 127, True),
    "learned_zero_point": call(floats(3, 5), floats(3, 5), scales(3, 1), floats(1, 5), -8, 7, True),
    "float16": call(floats(3, 5, dtype=torch.float16), floats(3, 5, dtype=torch.float16), _S, None, -8, 7),
    "bfloat16": call(floats(3, 5).bfloat16(), floats(3, 5).bfloat16(), scales(1, 5).bfloat16(), None, -8, 7),
    "float64": call(floats(3, 5).double(), floats(3, 5).double(), _S.double(), floats().double(), -8, 7, True),
    "expanded_grad": call(torch.ones(()).expand(3, 5), floats(3, 5), _S, None, -8, 7),
    "blocks": call(floats(4, 6), floats(6, 4).T, scales(2, 3), None, -8, 7, block_size=[2, 2]),
    "empty": call(floats(0, 5), floats(0, 5), scales(5), None, -8, 7),
}
_DEQUANT = {
    "int8": call(codes(3, 5), _S),
    "uint8": call(codes(2, 6, 5, 7, dtype=torch.uint8), scales(6, 1, 1), codes(6, 1, 1, dtype=torch.uint8)),
    "int16_float16": call(codes(3, 5, dtype=torch.int16), scales(5), None, torch.float16),
    "int32_float64": call(codes(3, 5, dtype=torch.int32), _S, _Z, torch.float64),
    "bfloat16": call(codes(3, 5), scales(3, 1), floats(3, 1), torch.bfloat16),
    "channels_last": call(codes(2, 6, 5, 7).to(memory_format=torch.channels_last), scales(6, 1, 1)),
    "transposed": call(codes(5, 3).T, scales(3, 1)),
    "blocks": call(codes(6, 8), scales(3, 2), codes(3, 2), block_size=[2, 4]),
    "scalar": call(codes(), _S),
    "empty": call(codes(0, 4), _S),
}
_QPARAMS = {
    "all": call(_IMAGE, [], -127, 127),
    "rows": call(floats(4, 9), [-1], -127, 127),
    "channels": call(_LAST, [0, 2, 3], -128, 127, True),
    "float16": call(_IMAGE.half(), [1], 0, 255, True),
    "bfloat16": call(_IMAGE.bfloat16(), [0, -1], -7, 7),
    "float64": call(_IMAGE.double(), [1, 2, 3], -128, 127, True),
    "transposed": call(floats(5, 9).T, [0], -127, 127),
    "scalar": call(floats(), [], -127, 127),
    "empty": call(floats(0, 4), [1], -127, 127),
}
_ROWS = {
    "matrix": call(floats(5, 9)),
    "asymmetric": call(floats(5, 9), True),
    "float16": call(floats(2, 3, 9, dtype=torch.float16)),
    "bfloat16": call(floats(2, 3, 9, dtype=torch.bfloat16), True),
    "vector": call(floats(9)),
    "transposed": call(floats(9, 5).T),
    "sliced": call(floats(4, 3, 12)[:, 1:, :7]),
    "no_rows": call(floats(0, 9)),
    "no_columns": call(floats(4, 0), True),
}
_GEMM = {
    "int8": call(codes(5, 37), codes(19, 37)),
    "uint8": call(codes(5, 37, dtype=torch.uint8), codes(19, 37)),
    "views": call(codes(37, 5).T, codes(37, 19).T),
    "offset": call(codes(6, 40)[1:, 3:], codes(20, 38)[1:, :37]),
    "one": call(codes(1, 1), codes(1, 1)),
    "no_rows": call(codes(0, 8), codes(3, 8)),
    "no_columns": call(codes(4, 8), codes(0, 8)),
    "no_depth": call(codes(4, 0), codes(3, 0)),
}
_W = codes(19, 37)
_WS = scales(19)
_BIAS = floats(19)
_LINEAR = {
    "dynamic": call(floats(5, 37), _W, _WS),
    "dynamic_asymmetric": call(floats(5, 37), _W, _WS, _BIAS, asymmetric=True),
    "packed": call(floats(5, 37), _W, _WS, _BIAS, packed_weight=ops.pack_weight(_W), relu=True),
    "static": call(floats(5, 37), _W, _WS, _BIAS, _S),
    "static_zero_point": call(floats(5, 37), _W, _WS, _BIAS, _S, _Z),
    "static_per_row": call(floats(2, 5, 37), _W, _WS, None, scales(2, 5, 1), codes(2, 5, 1)),
    "quantized_int8": call(codes(5, 37), _W, _WS, _BIAS, _S),
    "quantized_uint8": call(codes(5, 37, dtype=torch.uint8), _W, _S, None, scales(1), torch.tensor([128.2])),
    "quantized_to_bfloat16": call(codes(5, 37), _W, _WS, None, _S, out_dtype=torch.bfloat16),
    "float16": call(floats(5, 37, dtype=torch.float16), _W, _WS.half(), _BIAS.half()),
    "bfloat16": call(floats(5, 37, dtype=torch.bfloat16), _W, _WS, _BIAS),
    "float16_to_float32": call(floats(5, 37, dtype=torch.float16), _W, _WS, out_dtype=torch.float32),
    "out_int8": call(floats(5, 37), _W, _WS, _BIAS, out_scale=_S, out_zero_point=_Z),
    "out_uint8": call(floats(5, 37), _W, _WS, out_scale=_S, out_zero_point=_Z, out_dtype=torch.uint8, relu=True),
    "vector": call(floats(37), _W, _WS),
    "rank_4": call(floats(2, 1, 3, 37), _W, _WS),
    "transposed": call(floats(37, 5).T, codes(37, 19).T, _WS),
    "sliced": call(floats(4, 3, 40)[:, ::2, 1:38], _W, scales(38)[::2]),
    "empty_batch": call(floats(0, 37), _W, _WS),
    "one": call(floats(1, 1), codes(1, 1), scales(1)),
}
_K = codes(8, 6, 3, 3)
_KS = scales(8)
_KB = floats(8)
_GROUPED = codes(9, 2, 1, 1)
_DEPTHWISE = codes(6, 1, 3, 3)
_CONV = {
    "dynamic": call(_IMAGE, _K, _KS),
    "padded": call(_IMAGE, _K, _KS, _KB, [1, 2], [1, 2]),
    "asymmetric": call(_IMAGE, _K, _KS, _KB, [1], [1], asymmetric=True, relu=True),
    "four_paddings": call(_IMAGE, _K, _KS, None, [1], [0, 1, 2, 3]),
    "dilated": call(_IMAGE, _K, _KS, None, [2], [2], [2, 1]),
    "groups": call(_IMAGE, codes(8, 3, 3, 3), _KS, _KB, [1], [1], [1], 2),
    "depthwise": call(_IMAGE, _DEPTHWISE, scales(6, 1, 1, 1), None, [1], [1], [1], 6),
    "packed": call(_IMAGE, _K, _KS, _KB, packed_weight=ops.pack_weight(_K)),
    "packed_groups": call(_IMAGE, _GROUPED, scales(9), groups=3, packed_weight=ops.pack_weight(_GROUPED, 3)),
    "packed_depthwise": call(_LAST, _DEPTHWISE, scales(6), groups=6, packed_weight=ops.pack_weight(_DEPTHWISE, 6)),
    "static": call(_IMAGE, _K, _KS, _KB, [1], [1], [1], 1, _S, _Z),
    "static_per_sample": call(_IMAGE, _K, _KS, None, x_scale=scales(2, 1, 1, 1)),
    "quantized": call(codes(2, 6, 5, 7), _K, _KS, _KB, [1], [1], [1], 1, _S, _Z),
    "quantized_uint8": call(codes(2, 6, 5, 7, dtype=torch.uint8), _K, _S, None, [1], [1], x_scale=_S, x_zero_point=_Z),
    "channels_last": call(_LAST, _K, _KS, _KB, [1], [1]),
    "channels_last_odd": call(floats(2, 3, 5, 7).to(memory_format=torch.channels_last), codes(5, 3, 2, 2), scales(5)),
    "weight_channels_last": call(_IMAGE, _K.to(memory_format=torch.channels_last), _KS),
    "sliced_channels": call(floats(2, 12, 5, 7)[:, ::2], _K, _KS),
    "sliced_pixels": call(floats(2, 6, 9, 14)[:, :, ::2, ::2], _K, _KS),
    "sliced_to_one_pixel": call(floats(2, 6, 1, 2)[..., ::2], _K, _KS, None, [1], [2]),
    "transposed_pixels": call(floats(2, 6, 7, 5).transpose(2, 3), _K, _KS),
    "image": call(_IMAGE[0], _K, _KS, _KB),
    "image_permuted": call(floats(5, 7, 6).permute(2, 0, 1), _K, _KS, _KB),
    "image_static": call(_IMAGE[0], _K, _KS, x_scale=scales(1, 1, 1)),
    "float16": call(_IMAGE.half(), _K, _KS, _KB.half()),
    "bfloat16_last": call(_LAST.bfloat16(), _K, _KS, _KB),
    "out_int8": call(_LAST, _K, _KS, _KB, out_scale=_S, out_zero_point=_Z, relu=True),
    "out_float16": call(codes(2, 6, 5, 7), _K, _KS, x_scale=_S, out_dtype=torch.float16),
    "one_channel": call(floats(1, 1, 4, 4), codes(1, 1, 2, 2), scales(1)),
    "empty_batch": call(floats(0, 6, 5, 7), _K, _KS, _KB),
}
_PACK = {
    "linear": call(_W),
    "linear_view": call(codes(37, 19).T),
    "one": call(codes(1, 1)),
    "conv": call(_K),
    "conv_channels_last": call(_K.to(memory_format=torch.channels_last)),
    "groups": call(codes(8, 3, 3, 3), 2),
    "depthwise": call(codes(17, 1, 3, 3), 17),
    "multiplier": call(codes(10, 1, 3, 3), 5),
    "no_columns": call(codes(0, 5)),
}
SAMPLES = {
    "quant_tensor_forward": _FORWARD,
    "quant_tensor_backward": _BACKWARD,
    "dequant_tensor": _DEQUANT,
    "choose_qparams": _QPARAMS,
    "quantize_rows": _ROWS,
    "int8_gemm": _GEMM,
    "int8_linear": _LINEAR,
    "int8_conv2d": _CONV,
    "pack_weight": _PACK,
    "unpack_weight": {
        name: call(ops.pack_weight(*args), list(args[0].shape), *args[1:]) for name, (args, _) in _PACK.items() if args[0].numel()
    },
}


@pytest.mark.parametrize(("op", "sample"), [(op, sample) for op in SAMPLES for sample in SAMPLES[op]])
def test_opcheck(op, sample):
    args, kwargs = SAMPLES[op][sample]
    torch.library.opcheck(getattr(ops, op).default, args, kwargs)


@pytest.mark.parametrize(("op", "sample"), [(op, sample) for op in SAMPLES for sample in SAMPLES[op]])
def test_fake_strides(op, sample):
    """The fake result has the real one's strides wherever more than one element makes them matter, not only its shape and dtype."""
    args, kwargs = SAMPLES[op][sample]
    real = getattr(ops, op)(*args, **kwargs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        to_fake = lambda t: mode.from_tensor(t) if isinstance(t, Tensor) else t  # noqa: E731
        fake = getattr(ops, op)(*map(to_fake, args), **{k: to_fake(v) for k, v in kwargs.items()})
    for r, f in zip(*((x,) if isinstance(x, Tensor) else x for x in (real, fake)), strict=True):
        assert (r.shape, r.dtype) == (f.shape, f.dtype)
        assert [s for s, n in zip(r.stride(), r.shape, strict=True) if n > 1] == [
            s for s, n in zip(f.stride(), f.shape, strict=True) if n > 1
        ]


def test_every_operator_is_checked():
    names = {name.removeprefix("quant_ops::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("quant_ops::")}
    assert {name for name in names if not name.startswith("_")} == set(SAMPLES)


@pytest.mark.parametrize("op", SAMPLES)
def test_the_signature_of_the_wrapper_is_the_schema(op):
    """Names, order, what is keyword-only, and defaults: the schema in C++ is the source, the typed wrapper its documentation."""

    def default(parameter):
        if isinstance(parameter.default, int) and parameter.name in ("stride", "padding", "dilation"):
            return [parameter.default] * 2
        return {torch.float32: 6}.get(parameter.default, parameter.default)  # as schemas number it

    empty = inspect.Parameter.empty
    wrapper = [
        (p.name, p.kind is p.KEYWORD_ONLY, empty if p.default is empty else default(p))
        for p in inspect.signature(getattr(qo, op)).parameters.values()
    ]
    schema = getattr(ops, op).default._schema.arguments
    assert wrapper == [(a.name, a.kwarg_only, a.default_value if a.has_default_value() else empty) for a in schema]


@pytest.mark.parametrize("sample", SAMPLES["unpack_weight"])
def test_unpacking_gives_the_packed_weight(sample):
    args, _ = _PACK[sample]
    packed, shape, *groups = SAMPLES["unpack_weight"][sample][0]
    assert torch.equal(ops.unpack_weight(packed, shape, *groups), args[0])


# ---- models --------------------------------------------------------------------------------------------------------------


def vision_model(static=False):
    """Conv2d, depthwise Conv2d and Linear, int8, with a ReLU and a flatten between them (exact in any backend)."""
    torch.manual_seed(1)
    settings = [{"input_scale": 0.02, "input_zero_point": 5}, {"input_scale": 0.01}, {"input_scale": 0.03}] if static else [{}] * 3
    return nn.Sequential(
        qo.QuantConv2d.from_float(nn.Conv2d(3, 10, 3, padding=1), **settings[0]),
        nn.ReLU(),
        qo.QuantConv2d.from_float(nn.Conv2d(10, 10, 3, stride=2, groups=10), **settings[1]),
        nn.Flatten(1),
        qo.QuantLinear.from_float(nn.Linear(10 * 3 * 3, 7), **settings[2]),
    ).eval()


def images(batch, dtype=torch.float32):
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(batch)).to(dtype)


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
            qo.int8_conv2d(image, kernel, torch.tensor(0.01), None, 2, (1, 0), 1),
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


# ---- copies and checkpoints ------------------------------------------------------------------------------------------------


def _through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("duplicate", [copy.deepcopy, _through_pickle, _through_torch_save])
def test_a_copy_is_equal_and_independent(duplicate, static):
    model = vision_model(static)
    expected = model(images(3))
    other = duplicate(model)
    assert repr(other) == repr(model)
    assert torch.equal(other(images(3)), expected)
    for mine, theirs in zip(model.buffers(), other.buffers(), strict=True):
        assert mine.data_ptr() != theirs.data_ptr()
        assert torch.equal(mine, theirs)
    for layer in other:
        if isinstance(layer, (qo.QuantConv2d, qo.QuantLinear)):
            layer.qweight = torch.zeros_like(layer.qweight)
    assert torch.equal(model(images(3)), expected)
    assert not torch.equal(other(images(3)), expected)


def test_pickles_do_not_hold_the_packed_weight():
    layer = qo.QuantLinear.from_float(nn.Linear(512, 512))
    assert len(pickle.dumps(layer)) < 1.5 * layer.weight.numel()


def empty_vision_model(device=None):
    return nn.Sequential(
        qo.QuantConv2d(3, 10, 3, padding=1, device=device),
        nn.ReLU(),
        qo.QuantConv2d(10, 10, 3, stride=2, groups=10, device=device),
        nn.Flatten(1),
        qo.QuantLinear(10 * 3 * 3, 7, device=device),
    ).eval()


def _state_by_torch(model, path):
    torch.save(model.state_dict(), path)
    return torch.load(path, weights_only=True)


def _state_by_safetensors(model, path):
    safetensors.torch.save_file(model.state_dict(), path)
    return safetensors.torch.load_file(path)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("through_file", [_state_by_torch, _state_by_safetensors])
def test_state_dict_round_trip(through_file, static, tmp_path):
    model = vision_model(static)
    state = through_file(model, tmp_path / "state")
    assert not any("packed" in key for key in state)
    assert state["4.qweight"].dtype == torch.int8
    assert state["4.weight_scale"].dtype == torch.float32
    assert ("0.input_zero_point" in state) == static

    expected = model(images(3))
    fresh = empty_vision_model()
    missing, unexpected = fresh.load_state_dict(state, strict=True)
    assert not missing
    assert not unexpected
    assert torch.equal(fresh(images(3)), expected)

    torch.manual_seed(9)  # a quantized model with other weights
    other = nn.Sequential(nn.Conv2d(3, 10, 3, padding=1), nn.ReLU(), nn.Conv2d(10, 10, 3, stride=2, groups=10))
    other.extend([nn.Flatten(1), nn.Linear(90, 7)])
    qo.quantize_(other, qo.Int8Dynamic(asymmetric=False))
    assert not torch.equal(other(images(3)), expected)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(images(3)), expected)
    assert torch.equal(copy.deepcopy(other)(images(3)), expected)


@pytest.mark.parametrize("static", [False, True])
def test_state_dict_onto_the_meta_device(static):
    model = vision_model(static)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    expected = model(images(3))

    assigned = empty_vision_model("meta")
    assert all(b.is_meta for b in assigned.buffers())
    assert assigned(images(2).to("meta")).shape == (2, 7)
    assigned.load_state_dict(state, strict=True, assign=True)
    assert not any(b.is_meta for b in assigned.buffers())
    assert assigned[0].weight_scale.data_ptr() == state["0.weight_scale"].data_ptr()
    assert torch.equal(assigned(images(3)), expected)

    with torch.device("meta"):
        emptied = empty_vision_model()
    emptied.to_empty(device="cpu")
    emptied.load_state_dict(state, strict=True)
    assert torch.equal(emptied(images(3)), expected)


def test_strict_loading_reports_what_does_not_fit():
    static = qo.QuantLinear.from_float(nn.Linear(4, 3), input_scale=0.1)
    dynamic = qo.QuantLinear.from_float(nn.Linear(4, 3))
    with pytest.raises(RuntimeError, match=r"Missing key.*input_scale"):
        static.load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r"Unexpected key.*bias"):
        qo.QuantLinear(4, 3, bias=False).load_state_dict(dynamic.state_dict())
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_scale"):
        dynamic.load_state_dict(nn.Linear(4, 3).state_dict())
    with pytest.raises(RuntimeError, match="size mismatch for qweight"):
        dynamic.load_state_dict(qo.QuantLinear(5, 3).state_dict())


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "output_scale"])
def test_loading_refuses_a_bad_scale(name, bad):
    layer = qo.QuantLinear.from_float(nn.Linear(4, 3), input_scale=0.1, output_scale=0.2)
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    state[name].view(-1)[0] = bad
    with pytest.raises(ValueError, match=rf"^quant_ops\.QuantLinear: expected {name} > 0 and finite, got "):
        qo.QuantLinear(4, 3).load_state_dict(state)


# ---- .half() and friends: only the activations change their dtype ------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.bfloat16(),
        lambda m: m.to(torch.float64),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.half().float(),
        lambda m: m.to("cpu"),
    ],
    ids=["half", "bfloat16", "float64", "channels_last", "half_float", "cpu"],
)
def test_conversions_keep_the_numbers(convert, static):
    model = vision_model(static)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    expected = {dtype: model(images(3, dtype)) for dtype in (torch.float32, torch.float16, torch.bfloat16)}
    assert convert(model) is model
    after = model.state_dict()
    assert before.keys() == after.keys()
    for key, value in after.items():
        assert value.dtype == before[key].dtype, key
        assert torch.equal(value, before[key]), key
    for dtype, result in expected.items():
        assert model(images(3, dtype)).dtype == dtype
        assert torch.equal(model(images(3, dtype)), result)
    assert torch.equal(copy.deepcopy(model)(images(3)), expected[torch.float32])


# ---- DDP --------------------------------------------------------------------------------------------------------------------


def test_ddp_trains_the_float_layer(tmp_path):
    """In a process of its own that ends without destructors: the last owner of a gloo group joins the group's thread while it holds
    the interpreter's lock, for which that thread may be waiting."""
    script = f"""
import os, torch, torch.distributed as dist, quant_ops as qo
from torch import nn
torch.manual_seed(0)
convolution = qo.QuantConv2d.from_float(nn.Conv2d(3, 4, 3))
model = nn.Sequential(convolution, nn.Flatten(), qo.QuantLinear.from_float(nn.Linear(64, 7)), nn.Linear(7, 2))
x = torch.randn(4, 3, 6, 6)
dist.init_process_group("gloo", init_method="file://{tmp_path}/rendezvous", rank=0, world_size=1)
result = nn.parallel.DistributedDataParallel(model)(x)
assert torch.equal(result, model(x))
result.square().sum().backward()
assert model[3].weight.grad.abs().sum() > 0
print([name for name, _ in model.named_parameters()], flush=True)
os._exit(0)
"""
    run = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True, text=True, timeout=120)
    assert run.stdout.strip() == "['3.weight', '3.bias']", run.stdout + run.stderr


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
    assert torch.equal(torch.vmap(lambda a: _fake_quantized(a, _S))(x), _fake_quantized(x, _S))
    per_sample = torch.vmap(torch.func.grad(lambda a: _fake_quantized(a, _S).pow(2).sum()))(x)
    assert torch.equal(per_sample, torch.func.grad(lambda a: _fake_quantized(a, _S).pow(2).sum())(x))
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
        transform(lambda a: ops.quant_tensor_forward(a, _S, None, -8, 7).sum())(floats(2, 8))


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
