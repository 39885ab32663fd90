"""Exported models in onnxruntime against the models themselves: equal wherever ONNX has the formula of the operators.

An export takes seconds whatever the model, so layers of a kind are exported together, as one model with an output for each.
"""

import collections
import importlib.metadata
import io

import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.onnx._internal.exporter import _registration

import quant_ops as qo

IMAGES = ({0: "batch"},)


@pytest.fixture(autouse=True, scope="module")
def one_registry():
    """torch's exporter reads the source of all of its translations in every call, which takes most of the time: read once here."""
    make, made = _registration.ONNXRegistry.from_torchlib, {}

    def copied(opset_version=18):
        if opset_version not in made:
            made[opset_version] = make(opset_version=opset_version)
        registry = _registration.ONNXRegistry()
        registry._opset_version = opset_version
        registry.functions = {target: list(found) for target, found in made[opset_version].functions.items()}
        return registry

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_registration.ONNXRegistry, "from_torchlib", staticmethod(copied))
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(program, *inputs, optimized=True, **config):
    """The outputs of onnxruntime, on one thread."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    for name, value in config.items():
        options.add_session_config_entry(name.replace("__", "."), value)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"])
    feeds = {given.name: x.numpy() for given, x in zip(session.get_inputs(), inputs, strict=True)}
    return [torch.from_numpy(result) for result in session.run(None, feeds)]


def count(program):
    return collections.Counter(node.op_type for node in program.model.graph)


class Each(nn.Module):
    """Layers that all take the same input."""

    def __init__(self, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return tuple(layer(x) for layer in self.layers)


def assert_same(results, expected, equal=None, tolerance=2**-21):
    """Bit for bit where ``equal`` says so, else within a few roundings of float32."""
    assert len(results) == len(expected)
    for i, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        assert (result.dtype, result.shape) == (wanted.dtype, wanted.shape)
        if equal is None or equal[i]:
            assert torch.equal(result, wanted), i
        else:
            assert (result - wanted).abs().max() <= tolerance * wanted.abs().max(), i


# ---- int8 layers ---------------------------------------------------------------------------------------------------------


def linears(form):
    """Layers and whether their results are to be equal."""
    torch.manual_seed(0)
    plain, biased = nn.Linear(96, 48, bias=False), nn.Linear(96, 48)
    make, multiplier = qo.QuantLinear.from_float, torch.rand(96) + 0.5
    static = {"input_scale": 0.02, "input_zero_point": 7}
    layers = {
        make(plain, asymmetric=True): True,
        make(plain): True,
        make(plain, weight_bits=4, asymmetric=True, relu=True): True,
        make(plain, asymmetric=True, input_multiplier=multiplier): True,
        make(plain, asymmetric=True, output_scale=0.05, output_zero_point=-3): True,
        make(biased, asymmetric=True): False,
        make(biased): False,
        make(plain, **static): form == "integer",
        make(plain, input_scale=0.02): form == "integer",
        make(plain, **static, output_scale=0.05): form == "integer",
        make(biased, **static): False,
    }
    return Each(*layers).eval(), list(layers.values())


@pytest.mark.parametrize("rank", [2, 3])
def test_linear_layers(rank):
    form = "integer" if rank == 2 else "qdq"
    model, equal = linears(form)
    x, other = (randn(5, 96), 4 * randn(3, 96)) if rank == 2 else (randn(2, 5, 96), 4 * randn(3, 5, 96))
    other[1] = 0
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES, form=form)
    assert count(program)["MatMulInteger"] == (len(equal) if rank == 2 else 7)
    for given in (x, other):
        for optimized in (True, False):
            results = run(program, given, optimized=optimized)
            # codes near the middle between two may fall to either side where the product was rounded once more
            assert (results[9].int() - model(given)[9].int()).abs().max() <= (rank == 3)
            if rank == 3:
                results[9] = model(given)[9]
            # with Q/DQ nodes the bias is in units of the product
            assert_same(results, model(given), equal, tolerance=2**-21 if rank == 2 else 2**-16)


def test_convolutions():
    torch.manual_seed(0)
    plain, biased = nn.Conv2d(8, 16, 3, 2, 1, bias=False), nn.Conv2d(8, 16, 3, 2, 1)
    odd = nn.Conv2d(8, 16, (3, 2), (1, 2), "valid", (2, 1), groups=4, bias=False)
    make, static = qo.QuantConv2d.from_float, {"input_scale": 0.02, "input_zero_point": -9}
    layers = {
        make(plain, asymmetric=True): True,
        make(plain): True,
        make(odd, asymmetric=True): True,
        make(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False, padding_mode="reflect"), asymmetric=True): True,
        make(biased, asymmetric=True): False,
        make(biased): False,
        make(plain, **static, relu=True): True,
        make(plain, **static, relu=True, output_scale=0.01, output_zero_point=-128): True,
        make(odd, **static): True,
        make(biased, **static): False,
    }
    model = Each(*layers).eval()
    x, other = randn(2, 8, 12, 12), 3 * randn(3, 8, 12, 12)
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES, form="integer")
    assert [count(program)[name] for name in ("ConvInteger", "Conv")] == [len(layers) - 3, 3]
    for given in (x, other):
        for optimized in (True, False):
            assert_same(run(program, given, optimized=optimized), model(given), list(layers.values()))


class Ends(nn.Module):
    """Every activation, and residuals of floats and of codes."""

    def __init__(self):
        super().__init__()
        names = ("relu", "relu6", "hardswish", "silu", "gelu", "gelu_tanh", "sigmoid", "hardsigmoid")
        self.layers = Each(*(qo.QuantLinear.from_float(nn.Linear(24, 24, bias=False), activation=name) for name in names))
        self.register_buffer("weight", torch.randint(-127, 128, (24, 24), dtype=torch.int8))
        self.register_buffer("kernel", torch.randint(-127, 128, (3, 3, 1, 1), dtype=torch.int8))
        self.register_buffer("scale", torch.tensor(0.02))
        self.register_buffer("zero", torch.tensor(3))

    def forward(self, x, codes):
        scale, zero = self.scale, self.zero
        added = {"residual": codes, "residual_scale": scale, "residual_zero_point": zero}
        return (
            *self.layers(x),
            qo.int8_linear(x, self.weight, scale, **added, activation="relu"),
            qo.int8_linear(x, self.weight, scale, residual=x),
            qo.int8_conv2d(x, self.kernel, scale, **added),
        )


def test_residuals_and_activations():
    torch.manual_seed(0)
    model, x = Ends().eval(), (randn(3, 5, 24), torch.randint(-128, 128, (3, 5, 24), dtype=torch.int8))
    for form in ("integer", "qdq"):
        program = qo.onnx.export(model, x, form=form)
        assert_same(run(program, *x), model(*x), [False] * 11, tolerance=2**-18)


def test_one_row_or_image_is_quantized_by_the_operator_of_the_standard():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = qo.QuantConv1d.from_float(nn.Conv1d(4, 8, 3, padding=1, bias=False), asymmetric=True)
            self.linear = qo.QuantLinear.from_float(nn.Linear(8, 5, bias=False), asymmetric=True)

        def forward(self, x):
            return self.linear(self.conv(x).amax(-1))

    torch.manual_seed(0)
    model, x = Net().eval(), randn(1, 4, 9)
    program = qo.onnx.export(model, x)
    assert count(program)["DynamicQuantizeLinear"] == 2
    assert_same(run(program, x), [model(x)])


def chain():
    torch.manual_seed(0)
    first, second, last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Linear(128, 10)
    conv, zero = qo.QuantConv2d.from_float, -128
    for layer in (first, second, last):
        layer.bias.data *= 0.1
    return nn.Sequential(
        conv(first, input_scale=0.02, input_zero_point=3, output_scale=0.02, output_zero_point=zero, relu=True),
        conv(second, input_scale=0.02, input_zero_point=zero, output_scale=0.01, output_zero_point=zero, relu=True),
        nn.Flatten(),
        qo.QuantLinear.from_float(last, input_scale=0.01, input_zero_point=zero),
    ).eval()


def test_a_chain_of_int8_layers_stays_in_integers(tmp_path):
    model, x, other = chain(), randn(4, 3, 4, 4), randn(2, 3, 4, 4, seed=1)
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(tmp_path / "optimized.onnx")
    onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options, ["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node]
    assert [name for name in fused if name.startswith("Q")] == ["QuantizeLinear", "QLinearConv", "QLinearConv", "QGemm"]
    assert not {"Conv", "Gemm", "DequantizeLinear"} & set(fused)
    for given in (x, other):
        result, wanted = run(program, given)[0], model(given)
        # a code more or less changes a sum by its scale times a weight
        assert (result - wanted).abs().max() <= 2 * 0.01 * model[3].dequantize().weight.abs().max()


# ---- weight-only layers --------------------------------------------------------------------------------------------------


def weight_only_layers(dynamic):
    torch.manual_seed(0)
    plain, biased, make = nn.Linear(96, 48, bias=False), nn.Linear(96, 48), qo.WeightOnlyLinear.from_float
    kinds = [(8, 32, False), (8, -1, True), (4, 32, True), (4, 64, False), (4, 64, True), (4, -1, False)]
    layers = [
        make(plain, bits=bits, group_size=size, asymmetric=asymmetric, dynamic=dynamic, asymmetric_input=dynamic and i % 2 == 0)
        for i, (bits, size, asymmetric) in enumerate(kinds)
    ]
    layers.append(make(biased, bits=4, group_size=32, asymmetric=True, dynamic=dynamic, input_multiplier=torch.rand(96) + 0.5))
    if not dynamic:
        layers.append(make(biased, bits=4, group_size=64, asymmetric=True, zero_point="float"))
    return layers


def embeddings():
    torch.manual_seed(0)
    table, make = nn.Embedding(50, 96), qo.WeightOnlyEmbedding.from_float
    kinds = [(8, 32, False, "int"), (8, -1, True, "int"), (4, 64, True, "int"), (4, 64, True, "float"), (4, -1, False, "int")]
    return [make(table, bits=b, group_size=size, asymmetric=a, zero_point=zero) for b, size, a, zero in kinds]


class Words(nn.Module):
    """Embeddings of words, and linear layers of another input."""

    def __init__(self, tables, layers):
        super().__init__()
        self.tables, self.layers = Each(*tables), Each(*layers)

    def forward(self, ids, x):
        return *self.tables(ids), *self.layers(x)


def test_weight_only_layers():
    """Embeddings are equal. Two groups have sums that are added in another order; one group has the operator's formula."""
    floating, integers, tables = weight_only_layers(False), weight_only_layers(True), embeddings()
    model = Words(tables, floating + integers).eval()
    x, other = (torch.randint(0, 50, (2, 5)), randn(2, 5, 96)), (torch.randint(0, 50, (3, 2)), 4 * randn(3, 2, 96))
    shapes = ({0: "batch", 1: "length"},) * 2
    equal = [True] * len(tables) + [False] * len(floating)
    equal += [layer.group_size == -1 and layer.bias is None for layer in integers]
    program = qo.onnx.export(model, x, dynamic_shapes=shapes)
    kinds = {weight.dtype.name for weight in program.model.graph.initializers.values() if weight.name.endswith("qweight")}
    assert kinds == {"INT4", "INT8", "UINT8"}
    own = qo.onnx.export(Each(*floating).eval(), x[1], dynamic_shapes=shapes[:1], weight_only="MatMulNBits")
    assert count(own)["MatMulNBits"] == 5
    for given in (x, other):
        expected = model(*given)
        assert_same(run(program, *given, optimized=False), expected, equal)
        assert_same(run(program, *given, session__qdq_matmulnbits_accuracy_level="1"), expected, equal)
        first = len(tables)
        in_float32 = {"session__qdq_matmulnbits_accuracy_level": "1"}  # for what stays DequantizeLinear and MatMul
        assert_same(run(own, given[1], **in_float32), expected[first : first + len(floating)], equal[first:])


# ---- the quantize family -------------------------------------------------------------------------------------------------


class Family(nn.Module):
    """Calls of operators with every granularity and range."""

    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randint(-128, 128, (5, 96), dtype=torch.int8, generator=torch.Generator().manual_seed(0)))
        self.register_buffer("scale", torch.rand(5, generator=torch.Generator().manual_seed(1)) + 0.1)

    def forward(self, x):
        rows, symmetric = qo.quantize_rows(x, True), qo.quantize_rows(x)
        by_column, by_tensor = qo.choose_qparams(x, [0], -128, 127, True), qo.choose_qparams(x, [], 0, 255, True)
        codes = qo.quant_tensor_forward(x, *by_column, -128, 127, True, False)
        learned = by_tensor[1] + 0.4
        return (
            *rows,
            *symmetric,
            *by_column,
            *by_tensor,
            codes,
            qo.dequant_tensor(codes, *by_column),
            qo.quant_tensor_forward(x, *by_column, -128, 127, True),
            qo.quant_tensor_forward(x, rows[1], rows[2], -128, 127, True),
            qo.quant_tensor_forward(x, by_tensor[0], learned, 0, 255, True),
            qo.quant_tensor_forward(x, *by_column, -7, 7, True),
            qo.quant_tensor_forward(x, symmetric[1], None, 0, 15, False, False),
            qo.quant_tensor_forward(x, by_tensor[0], None, -1000, 1000),
            qo.quant_tensor_forward(x, by_tensor[0] * 1e-4, None, -(2**20), 2**20),
            qo.quant_tensor_forward(x.double(), by_tensor[0].double(), None, -127, 127),
            qo.quant_tensor_forward(x.half(), by_tensor[0], None, -127, 127),
            qo.quant_float_forward(x, 4, 3),
            qo.quant_float_forward(x, 5, 2, rows[1]),
            qo.int8_gemm(rows[0], self.w),
            qo.int8_linear(rows[0], self.w, self.scale, None, rows[1], rows[2]),
            qo.int8_linear(symmetric[0], self.w, self.scale, None, symmetric[1]),
        )


def test_the_operators_of_the_quantize_family_are_equal():
    model, x, other = Family().eval(), 100 * randn(5, 96), randn(3, 96)
    other[1], other[2, 0] = 0, 1e6
    x[0, :4] = torch.tensor([-500.5, 1e-30, -1e-30, 0.0])
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES)
    for given in (x, other):
        for optimized in (True, False):
            assert_same(run(program, given, optimized=optimized), model(given))


# ---- whole models --------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """A residual block of two convolutions."""

    def __init__(self, width, wider, stride):
        super().__init__()
        self.first, self.norm = nn.Conv2d(width, wider, 3, stride, 1, bias=False), nn.BatchNorm2d(wider)
        self.second, self.last = nn.Conv2d(wider, wider, 3, 1, 1, bias=False), nn.BatchNorm2d(wider)
        self.short = nn.Conv2d(width, wider, 1, stride) if width != wider else nn.Identity()

    def forward(self, x):
        return (self.last(self.second(self.norm(self.first(x)).relu())) + self.short(x)).relu()


class Inverted(nn.Module):
    """The block of MobileNetV2."""

    def __init__(self, width, wider, stride):
        super().__init__()
        hidden = 4 * width
        self.layers = nn.Sequential(
            nn.Conv2d(width, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(),
            nn.Conv2d(hidden, wider, 1, bias=False),
            nn.BatchNorm2d(wider),
        )
        self.adds = stride == 1 and width == wider

    def forward(self, x):
        return x + self.layers(x) if self.adds else self.layers(x)


def resnet():
    layers = [nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(*layers, Block(8, 8, 1), Block(8, 16, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10))


def mobilenet():
    layers = [nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), Inverted(8, 8, 1), Inverted(8, 12, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10))


def network(make):
    """With its batch normalisations folded, and images."""
    torch.manual_seed(0)
    model, x = make().eval(), randn(2, 3, 32, 32)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    qo.fold_batchnorm_(model, (x,))
    return model, x


def static(model, x):
    qo.prepare_(model, qo.Int8Static())
    qo.calibrate(model, [x])
    qo.convert_(model)
    return model


def assert_valid(path):
    onnx.checker.check_model(path, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), strict_mode=True, data_prop=True)
    assert all(value.type.tensor_type.elem_type for value in inferred.graph.output)


@pytest.mark.parametrize(("make", "form"), [(resnet, "qdq"), (mobilenet, "integer")])
def test_networks_of_convolutions(make, form, tmp_path):
    model, x = network(make)
    program = qo.onnx.export(static(model, x), x, tmp_path / "net.onnx", dynamic_shapes=IMAGES, form=form, input_names=["image"])
    assert_valid(tmp_path / "net.onnx")
    assert [value.name for value in program.model.graph.inputs] == ["image"]
    other = randn(3, 3, 32, 32, seed=1)
    for given in (x, other):
        for optimized in (True, False):
            error = (run(program, given, optimized=optimized)[0] - model(given)).norm() / model(given).norm()
            assert error < (1e-6 if form == "integer" else 0.02)


class Bert(nn.Module):
    """A layer of BERT with its embeddings, and a mask of the words that are there."""

    def __init__(self, width=64, hidden=96):
        super().__init__()
        self.words, self.places, self.norm = nn.Embedding(100, width), nn.Embedding(32, width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        self.up, self.down, self.between, self.last = (
            nn.Linear(width, hidden),
            nn.Linear(hidden, width),
            *(nn.LayerNorm(width),) * 2,
        )

    def forward(self, ids, mask):
        x = self.norm(self.words(ids) + self.places(torch.arange(ids.shape[1])))
        q, k, v = (layer(x).unflatten(-1, (4, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None] > 0)
        x = self.between(x + self.output(y.transpose(1, 2).flatten(2)))
        return self.last(x + self.down(nn.functional.gelu(self.up(x))))


def test_a_language_model_with_dynamic_layers_and_an_embedding(tmp_path):
    torch.manual_seed(0)
    model = Bert().eval()
    qo.quantize_(model, {"words": qo.Int4WeightOnly(group_size=32), "*": qo.Int8Dynamic()})
    ids, mask = torch.randint(0, 100, (2, 12)), torch.ones(2, 12, dtype=torch.int64)
    program = qo.onnx.export(model, (ids, mask), tmp_path / "bert.onnx", dynamic_shapes=({0: "batch", 1: "length"},) * 2)
    assert_valid(tmp_path / "bert.onnx")
    found = count(program)
    assert [found["MatMulInteger"], found["QuantizeLinear"]] == [6, 4]  # query, key and value share theirs
    mask[1, 5:] = 0
    for given in ((ids, mask), (ids[:1, :9], mask[:1, :9])):
        with torch.no_grad():
            expected = model(*given)
        assert (run(program, *given)[0] - expected).norm() < 1e-5 * expected.norm()


def test_a_model_in_training_has_the_codes_of_the_converted_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    x = randn(4, 3, 4, 4)
    qo.prepare_qat_(model, {"0": qo.Int8Static(), "3": qo.Int8Static(observer="lsq")})
    qo.calibrate(model, [x])
    model.eval()
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES)
    found = count(program)
    assert [found[name] for name in ("QuantizeLinear", "DequantizeLinear", "Conv", "Gemm", "Mul", "Cast")] == [2, 4, 1, 1, 0, 0]
    weights = {weight.name: weight.const_value.numpy() for weight in program.model.graph.initializers.values()}
    result = run(program, x[:3], optimized=False)[0]
    with torch.no_grad():
        assert (result - model(x[:3])).norm() < 1e-5 * result.norm()
    qo.convert_(model)
    for name in ("0", "3"):
        codes = torch.from_numpy(weights[f"{name}.qweight"])
        assert torch.equal(codes.int() - 128, model.get_submodule(name).qweight.int())


def test_simulated_layers():
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10)).eval(), randn(4, 3, 4, 4)
    qo.quantize_(model, {"0": qo.Simulated(input=qo.INT8, weight=qo.MXFP4), "3": qo.Simulated(input=qo.E4M3, weight=qo.INT4)})
    program = qo.onnx.export(model, x, dynamic_shapes=IMAGES)
    onnx.checker.check_model(program.model_proto, full_check=True)
    with torch.no_grad():
        assert (run(program, x[:3])[0] - model(x[:3])).norm() < 1e-5 * model(x[:3]).norm()


# ---- what is refused -----------------------------------------------------------------------------------------------------


def linear(config=None):
    model = nn.Sequential(nn.Linear(8, 4)).eval()
    if config is not None:
        qo.quantize_(model, config)
    return model


def test_what_cannot_be_exported_is_said_before_torch_prints(capfd):
    x = randn(2, 8)
    prepared, trained, steps = linear(), linear(), linear()
    qo.prepare_(prepared, qo.Int8Static())
    qo.prepare_qat_(trained, qo.Int8Static())
    trained.eval()
    qo.prepare_(steps, qo.Int8Static(num_steps=2))
    for step in range(2):
        with qo.timestep(steps, step):
            qo.calibrate(steps, [x])
    qo.convert_(steps)
    refused = {
        r"expected a model in eval mode, got one in training mode\. Call model\.eval": nn.Linear(8, 4),
        r"expected converted layers, got PreparedLinear '0', which only observes\. Call convert_": prepared.eval(),
        r"expected scales in QatLinear '0', got no data\. Call calibrate": trained,
        r"one set of activation scales, got QuantLinear '0' with 2 steps, .* Convert with Int8Static\(num_steps=1\)": steps,
        r"of the floating formats only E4M3 and E5M2, .* got one with 2 exponent and 1 mantissa bits": linear(
            qo.Simulated(input=qo.E2M1)
        ),
        r"operators that ONNX can express, got quant_block_forward\. Quantize to integers": linear(
            qo.Simulated(input=qo.MXFP8_E4M3)
        ),
        r"a model on the CPU, got tensors on meta\. Move it": nn.Linear(8, 4, device="meta").eval(),
    }
    for sentence, model in refused.items():
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"^quant_ops\.onnx\.export: expected .*" + sentence.removeprefix("expected ")):
            qo.onnx.export(model, x)
        assert all(tensor.is_meta or torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    for settings in ({"form": "fast"}, {"codes": "int4"}, {"weight_only": "Gemm"}, {"opset": 17}):
        with pytest.raises(ValueError, match=rf"^quant_ops\.onnx\.export: expected {next(iter(settings))} .* got"):
            qo.onnx.export(linear(qo.Int8Dynamic()), x, **settings)
    with pytest.raises(TypeError, match=r"^quant_ops\.onnx\.export: expected an nn\.Module or ExportedProgram, got str"):
        qo.onnx.export("net.pt", x)
    assert capfd.readouterr() == ("", "")


def test_missing_and_old_packages(monkeypatch):
    def version(package, found):
        if package in found:
            return found[package]
        raise importlib.metadata.PackageNotFoundError(package)

    for found, sentence in (
        ({"onnx": "1.17.0", "onnxscript": "0.7"}, r"package onnx, version 1\.18 or newer, got version 1\.17\.0\. pip install"),
        ({"onnx": "1.23.2"}, r"package onnxscript, version 0\.5\.4 or newer, got none\. pip install 'quant_ops\[onnx\]'"),
    ):
        monkeypatch.setattr(importlib.metadata, "version", lambda package, found=found: version(package, found))
        with pytest.raises(ImportError, match=sentence):
            qo.onnx.export(linear(), randn(2, 8))


def test_the_exporter_of_torch_says_what_to_call():
    with pytest.raises(
        Exception, match=r"QuantLinear: expected no torch\.onnx\.export .* Call quant_ops\.onnx\.export\(model, args, path\)"
    ):
        torch.onnx.export(linear(qo.Int8Dynamic()), (randn(2, 8),), io.BytesIO(), dynamo=True)
