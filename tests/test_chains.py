"""chain_: what is found and fused, that the bits are those of the steps, and that chained models are saved, copied and exported.

With sums in float32, the default, every value of a chain is the one that the layers give when they are called one by one, as
long as no pool averages codes: then the chained model has to be equal to the unchained one.
"""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
import vision_models
from torch import nn
from vision_models import Bottleneck, ResNet, static

import quant_ops as qo
from quant_ops.ops.program import run_steps


def conv(inputs, outputs, kernel=3, **arguments):
    return nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, **arguments)


def images(count=3, channels=3, size=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, channels, size, size, generator=generator) for _ in range(count)]


def pair(network, data=None, **arguments):
    """The unchained int8 network, and the result of chaining a copy of it."""
    data = images() if data is None else data
    unchained = static(network.eval(), data)
    return unchained, qo.chain_(copy.deepcopy(unchained), data[0], calibration=data[1:], **arguments)


def sqnr(expected, got):
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


def steps(result):
    return [step for _, step in result.fused]


class Of(nn.Module):
    """A network of a function of itself."""

    def __init__(self, function, **modules):
        super().__init__()
        torch.manual_seed(0)
        self.function = function
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.function(self, x)


def equal_bits(network, expected_steps, data=None):
    """Chains it, without an average pool in it: the bits stay, and these steps are found."""
    data = images() if data is None else data
    unchained, result = pair(network, data)
    assert steps(result) == expected_steps
    for batch in data:
        assert torch.equal(result.model(batch), unchained(batch))
    return result


# ---- whole networks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", vision_models.NETWORKS)
def test_network(name):
    network, data = vision_models.network_and_images(name)
    unchained = static(copy.deepcopy(network), data)
    x = torch.randn(8, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = network(x)
    result = qo.chain_(copy.deepcopy(unchained), data[0], calibration=data[1:])
    assert result.stopped == []
    assert list(result.chains) == ["chain_0"]
    layers = sum(isinstance(module, qo.QuantConv2d | qo.QuantLinear) for module in unchained.modules())
    assert len(steps(result)) - layers == {"resnet-50": 3, "u-net": 9}.get(name, 1)  # pools, and beside them cat and upsampling
    y = result.model(x)
    assert sqnr(expected, y) > sqnr(expected, unchained(x)) - 0.5

    chain = result.chains["chain_0"]
    assert torch.equal(run_steps(chain.program, [x], chain.constants())[0], y)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert torch.equal(result.model(x[:3]), y[:3])


def test_residual_network_keeps_its_bits():
    class Features(ResNet):
        def forward(self, x):
            return self.layers(self.maxpool(self.relu(self.bn1(self.conv1(x)))))

    torch.manual_seed(0)
    network = Features((1, 2)).eval()
    qo.fold_batchnorm_(network)
    blocks = [
        *("conv1 + relu", "maxpool (max_pool2d)"),
        *("layers.0.conv1 + relu", "layers.0.conv2 + relu", "layers.0.conv3", "layers.0.downsample.0 + add + relu"),
        *("layers.1.conv1 + relu", "layers.1.conv2 + relu", "layers.1.conv3", "layers.1.downsample.0 + add + relu"),
        *("layers.2.conv1 + relu", "layers.2.conv2 + relu", "layers.2.conv3 + add + relu"),
    ]
    equal_bits(network, blocks, images(size=32))


@pytest.mark.parametrize("residual_dtype", [torch.int8, torch.float16])
def test_residual_dtype(residual_dtype):
    unchained, result = pair(Bottleneck(16, 4, 1).eval(), images(channels=16), residual_dtype=residual_dtype)
    # its BatchNorms were not folded; each is folded into the layer before it
    assert steps(result) == [
        *("conv1 + batchnorm + relu", "conv2 + batchnorm + relu", "conv3 + batchnorm + add + relu"),
    ]
    x = images()[0].repeat(1, 6, 1, 1)[:, :16]
    assert sqnr(unchained(x), result.model(x)) > 30


# ---- fusion -----------------------------------------------------------------------------------------------------------------

ACTIVATIONS = {
    "relu": [
        nn.ReLU(),
        torch.relu,
        F.relu,
        lambda x: x.relu(),
        lambda x: x.clamp(min=0),
        nn.ReLU(inplace=True),
        lambda x: x.relu_(),
    ],
    "relu6": [nn.ReLU6(), F.relu6, nn.Hardtanh(0, 6), lambda x: F.hardtanh(x, 0, 6), lambda x: x.clamp(0, 6)],
    "hardswish": [nn.Hardswish(), F.hardswish],
    "silu": [nn.SiLU(), F.silu],
    "gelu": [nn.GELU(), F.gelu],
    "gelu_tanh": [nn.GELU("tanh"), lambda x: F.gelu(x, approximate="tanh")],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, F.sigmoid, lambda x: x.sigmoid()],
    "hardsigmoid": [nn.Hardsigmoid(), F.hardsigmoid],
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    for activation in ACTIVATIONS[name]:
        network = Of(lambda self, x: self.b(self.act(self.a(x))), a=conv(3, 8), b=conv(8, 4))
        network.act = activation
        unchained, result = pair(network)
        assert steps(result) == [f"a + {name}", "b"]
        for x in images():
            y = unchained(x)
            # relu and relu6 are exact; torch's hardswish, silu and gelu differ in the last bits, which may move a code
            assert torch.equal(result.model(x), y) if name.startswith("relu") else sqnr(y, result.model(x)) > 45


SUMS = {
    "second": (lambda self, x: self.c(self.b(self.a(x)) + self.a(x)), ["a", "b", "a + add", "c"]),
    "methods": (lambda self, x: self.c(self.a(x).relu().add_(x)), ["a + relu", "add_ (add)", "c"]),
    "in place": (lambda self, x: self.c(F.relu_(self.a(x).add_(self.b(x.relu())))), None),
    "float": (lambda self, x: self.c(self.a(x) + x).relu(), ["a + add", "c + relu"]),
    "twice": (lambda self, x: (lambda y: self.c(y + y))(self.a(x)), ["a", "add (add)", "c"]),
    "read elsewhere": (lambda self, x: (lambda y: self.c(self.b(y).relu() + y))(self.a(x)), ["a", "b + relu", "add (add)", "c"]),
    "three": (lambda self, x: self.c(self.a(x) + self.b(x) + x), ["a", "b + add", "add_1 (add)", "c"]),
}


@pytest.mark.parametrize("name", SUMS)
def test_additions(name):
    function, expected = SUMS[name]
    unchained, result = pair(Of(function, a=conv(3, 3), b=conv(3, 3), c=conv(3, 2)))
    if expected is not None:
        assert steps(result) == expected
    for x in images():
        assert sqnr(unchained(x), result.model(x)) > 28


def test_pools_and_shapes():
    def function(self, x):
        x = F.avg_pool2d(F.max_pool2d(self.a(x).relu(), 3, 2, 1), 2)
        x = self.b(x).mean((2, 3))
        return self.head(x.view(x.size(0), -1))

    unchained, result = pair(Of(function, a=conv(3, 8), b=conv(8, 8), head=nn.Linear(8, 5)), images(size=16))
    assert steps(result) == [
        "a + relu",
        "max_pool2d (max_pool2d)",
        "avg_pool2d (avg_pool2d)",
        "b",
        "mean (mean)",
        "view (flatten)",
        "head",
    ]
    for x in images(size=16):
        assert sqnr(unchained(x), result.model(x)) > 28


def test_concatenations_keep_their_bits():
    """A value takes the scale of the concatenation's reader, so that the codes are those of the unchained network."""
    function = lambda self, x: self.c(torch.cat([self.a(x), F.interpolate(self.b(F.max_pool2d(x, 2)), scale_factor=2)], 1))  # noqa: E731
    network = Of(function, a=conv(3, 4), b=conv(3, 4), c=conv(8, 2))
    equal_bits(network, ["a", "max_pool2d (max_pool2d)", "b", "interpolate (upsample_nearest2d)", "cat (cat)", "c"])


class SqueezeExcitation(nn.Module):
    """Hu et al. 2018, with either of the two gates that networks have."""

    def __init__(self, channels, gate, image_first):
        super().__init__()
        self.down, self.up = nn.Conv2d(channels, 4, 1), nn.Conv2d(4, channels, 1)
        self.gate, self.image_first = gate, image_first

    def forward(self, x):
        y = self.gate(self.up(self.down(x.mean((2, 3), keepdim=True)).relu()))
        return x * y if self.image_first else y * x


@pytest.mark.parametrize("gate", [nn.Sigmoid(), nn.Hardsigmoid()])
@pytest.mark.parametrize("image_first", [True, False])
def test_squeeze_and_excitation(gate, image_first):
    network = Of(
        lambda self, x: self.b(self.se(F.silu(self.a(x))).relu()),
        a=conv(3, 8),
        se=SqueezeExcitation(8, gate, image_first),
        b=conv(8, 4),
    )
    unchained, result = pair(network)
    assert steps(result) == [
        "a + silu",
        "mean (adaptive_avg_pool2d)",
        "se.down + relu",
        f"se.up + {type(gate).__name__.lower()}",
        "mul (mul) + relu",
        "b",
    ]
    for x in images():
        assert sqnr(unchained(x), result.model(x)) > 28


GATES = {
    "silu": [lambda x: x * torch.sigmoid(x), lambda x: x.sigmoid() * x, lambda x: x.mul(F.sigmoid(x))],
    "hardswish": [lambda x: x * F.hardsigmoid(x)],
}


@pytest.mark.parametrize("name", GATES)
def test_gates_that_are_activations(name):
    for gate in GATES[name]:
        unchained, result = pair(Of(lambda self, x, gate=gate: self.b(gate(self.a(x))), a=conv(3, 8), b=conv(8, 4)))
        assert steps(result) == [f"a + {name}", "b"]
        for x in images():
            assert sqnr(unchained(x), result.model(x)) > 45


def test_products_of_two_images():
    function = lambda self, x: self.c(self.a(x).relu() * self.b(x))  # noqa: E731
    unchained, result = pair(Of(function, a=conv(3, 8), b=conv(3, 8), c=conv(8, 4)))
    assert steps(result) == ["a + relu", "b", "mul (mul)", "c"]
    for x in images():
        assert sqnr(unchained(x), result.model(x)) > 28


def test_scales_of_several_readers():
    """The widest range of those that the readers were calibrated with; all read the codes of that scale."""

    def function(self, x):
        y = self.a(x).relu()
        return self.b(y).mean((2, 3)) + self.c(y).mean((2, 3))

    unchained = static(Of(function, a=conv(3, 8), b=conv(8, 4), c=conv(8, 4)).eval(), images())
    unchained.c.input_scale *= 1.125
    x = images()[0]
    result = qo.chain_(copy.deepcopy(unchained), x)
    assert unchained.b.input_scale not in result.chains["chain_0"].scales
    assert unchained.c.input_scale in result.chains["chain_0"].scales
    assert sqnr(unchained(x), result.model(x)) > 30


def test_batchnorm_is_folded_into_codes():
    network = Of(
        lambda self, x: self.b(self.norm(self.a(x)).relu()), a=conv(3, 4, bias=False), norm=nn.BatchNorm2d(4), b=conv(4, 2)
    )
    network.norm.weight.data = torch.tensor([1.5, -0.5, 0.0, 1.0])
    network.norm.bias.data = torch.tensor([0.1, 0.2, 0.3, -0.1])
    network.norm.running_mean.add_(0.2)
    unchained, result = pair(network)
    assert steps(result) == ["a + batchnorm + relu", "b"]
    assert sqnr(unchained(images()[0]), result.model(images()[0])) > 40


class NormAct2d(nn.BatchNorm2d):
    """Written as timm's BatchNormAct2d."""

    def __init__(self, norm, act):
        super().__init__(norm.num_features)
        self.load_state_dict(norm.state_dict())
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return self.act(self.drop(y))


def test_batchnorm_before_an_activation():
    """One that no convolution can take in, as DenseNet's, is a depthwise convolution of one pixel."""
    network = Of(
        lambda self, x: self.b(self.norm(torch.cat([self.a(x), F.max_pool2d(self.a(x), 3, 1, 1)], 1)).relu()),
        a=conv(3, 4),
        norm=nn.BatchNorm2d(8),
        b=conv(8, 2),
    )
    network.norm.weight.data = torch.tensor([1.5, -0.5, 0.0, 1.0, 2.0, 0.1, -3.0, 1e-4])
    network.norm.bias.data.uniform_(-0.3, 0.3)
    network.norm.running_mean.add_(0.2)
    network.norm.running_var.uniform_(0.2, 2)
    unchained, result = pair(network)
    assert steps(result) == ["a", "a", "max_pool2d (max_pool2d)", "cat (cat)", "norm + relu", "b"]
    for x in images():
        assert sqnr(unchained(x), result.model(x)) > 30
    for function, expected in (
        (lambda self, x: self.b(self.norm(torch.cat([self.a(x), self.a(x)], 1))), ["a", "a", "cat (cat)", "norm + silu", "b"]),
        (lambda self, x: self.b(self.norm(self.d(x))), ["d + batchnorm + silu", "b"]),
    ):
        silu = Of(function, a=conv(3, 4), b=conv(8, 2), d=conv(3, 8), norm=NormAct2d(network.norm, nn.SiLU()))
        unchained, result = pair(silu)
        assert steps(result) == expected
        assert sqnr(unchained(images()[0]), result.model(images()[0])) > 30
    alone = pair(Of(lambda self, x: self.b(self.norm(x)), norm=nn.BatchNorm2d(3), b=conv(3, 2)))[1]
    assert not alone.fused  # it reads no codes


PARTS = {
    "index": lambda y: (y[:, :6], y[:, -6:]),
    "index of all": lambda y: (y[:, :6, :, :], y[:, 6:12, ...]),
    "chunk": lambda y: y.chunk(2, 1),
    "chunk, dim": lambda y: torch.chunk(y, 2, dim=1),
    "split": lambda y: torch.split(y, 6, -3),
    "split, sizes": lambda y: y.split([6, 6], dim=1),
    "tensor_split": lambda y: torch.tensor_split(y, (6,), 1),
}


@pytest.mark.parametrize("name", PARTS)
def test_parts_of_the_channels(name):
    """As in CSPNet and the C2f blocks of YOLO: one half goes through layers, and both are joined."""

    def function(self, x):
        left, right = PARTS[name](self.a(x).relu())
        return self.c(torch.cat([left, self.b(right).relu()], 1))

    unchained, result = pair(Of(function, a=conv(3, 12), b=conv(6, 6), c=conv(12, 4)))
    kinds = sorted(step.rsplit(" ", 1)[-1] if "(" in step else step for step in steps(result))
    assert kinds == ["(cat)", "(slice)", "(slice)", "a + relu", "b + relu", "c"]
    for x in images():
        assert sqnr(unchained(x), result.model(x)) > 30


def shuffled(self, y):
    n, c, h, w = y.shape
    return y.view(n, 3, c // 3, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


SHUFFLES = {
    "views": shuffled,
    "reshapes": lambda self, y: y.reshape(y.size(0), 3, -1, y.shape[2], y.shape[3]).transpose(2, 1).reshape(y.shape),
    "function": lambda self, y: torch.channel_shuffle(y, 3),
    "module": lambda self, y: self.shuffle(y),
}


@pytest.mark.parametrize("name", SHUFFLES)
def test_channel_shuffle(name):
    function = lambda self, x: self.b(SHUFFLES[name](self, self.a(x).relu()))  # noqa: E731
    unchained, result = pair(Of(function, a=conv(3, 12), b=conv(12, 4), shuffle=nn.ChannelShuffle(3)))
    assert [step.rsplit(" ", 1)[-1] for step in steps(result)] == ["relu", "(channel_shuffle)", "b"]
    for x in images():
        assert torch.equal(unchained(x), result.model(x))


def test_what_is_changed_in_place_keeps_its_bits():
    """A slice shares memory with its tensor, and what is only changed in place is read by nobody."""

    def function(self, x):
        y = self.a(x).relu()
        part = y[:, :4]
        part.add_(1.0)
        extra = y.amax()
        extra.mul_(2.0)
        return self.c(self.b(y).relu()), extra

    unchained, result = pair(Of(function, a=conv(3, 8), b=conv(8, 8), c=conv(8, 3)))
    assert steps(result) == ["a + relu"]
    for x in images():
        for got, expected in zip(result.model(x), unchained(x), strict=True):
            assert torch.equal(got, expected)


MIXED = {
    "sum": lambda self, x: self.c(self.a(x) + self.lin(x)),
    "product": lambda self, x: self.c(self.a(x) * self.lin(x)),
    "input": lambda self, x: self.c(self.a(x) + x) + self.lin(x),
    "linear layer after a convolution": lambda self, x: self.lin(self.a(x).relu()) + self.a(x),
    "activations between": lambda self, x: self.lin((x + self.c(x)).relu()) + F.max_pool2d(self.c(x).relu() + x, 3, 1, 1),
}


@pytest.mark.parametrize("name", MIXED)
def test_images_and_rows_are_not_mixed(name):
    """A linear layer on four dimensions reads rows, which lie otherwise in memory than images."""
    unchained, result = pair(Of(MIXED[name], a=conv(3, 3), c=conv(3, 3), lin=nn.Linear(8, 8)))
    assert not result.fused or any("lie differently in memory" in reason for _, reason in result.stopped)
    for x in images():
        for layout in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=layout)
            assert sqnr(unchained(x), result.model(x)) > 28


# ---- where chains end ----------------------------------------------------------------------------------------------------


def test_what_stops_a_chain():
    def function(self, x):
        y = self.b(self.a(x).relu())
        return self.d(self.c(torch.tanh(y) * y).relu()), y

    unchained, result = pair(Of(function, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4), d=conv(4, 2)))
    assert result.fused == [("chain_0", "a + relu"), ("chain_0", "b"), ("chain_1", "c + relu"), ("chain_1", "d")]
    assert result.stopped == [("tanh", "tanh has no int8 operator"), ("mul", "of its factors tanh is computed in float")]
    assert str(result).startswith("4 steps in 2 chains\n  fused    chain_0: a + relu\n")
    for x in images():
        for got, expected in zip(result.model(x), unchained(x), strict=True):
            assert torch.equal(got, expected)


def test_values_that_are_read_outside_stay_exact():
    """A result of a chain that is read inside of it too is computed in float, and quantized for the layers."""

    def function(self, x):
        y = self.a(x).relu()
        return self.b(y), y, F.max_pool2d(y, 2)

    unchained, result = pair(Of(function, a=conv(3, 4), b=conv(4, 4)))
    assert steps(result) == ["a + relu", "b"]
    for got, expected in zip(result.model(images()[0]), unchained(images()[0]), strict=True):
        assert torch.equal(got, expected)


class Untraceable(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        return self.body(x) if x.sum() > -1e9 else x


def test_untraceable_modules_are_looked_into():
    torch.manual_seed(0)
    body = nn.Sequential(conv(4, 4), nn.ReLU(), conv(4, 4))
    network = nn.Sequential(conv(3, 4), nn.ReLU(), Untraceable(body), conv(4, 4), nn.ReLU(), conv(4, 2))
    unchained, result = pair(network)
    assert result.fused == [
        *(("chain_0", "0 + relu"), ("chain_1", "3 + relu"), ("chain_1", "5")),
        *(("2.body.chain_0", "0 + relu"), ("2.body.chain_0", "2")),
    ]
    name, reason = result.stopped[0]
    assert name == "2"
    assert reason.startswith("torch.fx cannot trace it: TraceError: symbolically traced variables cannot be used as inputs")
    assert torch.equal(result.model(images()[0]), unchained(images()[0]))


def test_whole_model_untraceable():
    unchained, result = pair(Untraceable(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 3))))
    assert result.fused == [("body.chain_0", "0 + relu"), ("body.chain_0", "2")]
    assert type(result.model) is Untraceable
    assert torch.equal(result.model(images()[0]), unchained(images()[0]))


LEFT_OUT = {
    "dynamic": lambda: qo.QuantConv2d.from_float(conv(4, 4)),
    "padding_mode": lambda: qo.QuantConv2d.from_float(conv(4, 4, padding_mode="reflect"), input_scale=0.02),
    "output_scale": lambda: nn.Sequential(
        qo.QuantConv2d.from_float(conv(4, 4), input_scale=0.02, output_scale=0.02),
        qo.QuantConv2d.from_float(conv(4, 4), input_scale=0.02),
    ),
    "steps": lambda: qo.QuantConv2d.from_float(conv(4, 4), input_scale=torch.tensor([0.02, 0.03])),
    "hooks": lambda: hooked(qo.QuantConv2d.from_float(conv(4, 4), input_scale=0.02)),
}


def hooked(module):
    module.register_forward_hook(lambda *_: None)
    return module


@pytest.mark.parametrize("reason", LEFT_OUT)
def test_layers_that_chains_leave_out(reason):
    torch.manual_seed(0)
    layers = [qo.QuantConv2d.from_float(conv(a, b), input_scale=0.02) for a, b in ((3, 4), (4, 4), (4, 4), (4, 2))]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], LEFT_OUT[reason](), layers[2], nn.ReLU(), layers[3]).eval()
    x = images()[0]
    expected = model(x)
    result = qo.chain_(model, x)
    assert len(result.chains) == 2
    text = "quantized from the data of every call" if reason == "dynamic" else reason
    assert any(text in why for _, why in result.stopped), result
    assert torch.equal(model(x), expected)


def test_tensors_changed_in_place_are_left_alone():
    def function(self, x):
        y = self.a(x)
        z = self.b(y)
        y.mul_(2)
        return self.c(z) + y

    network = Of(function, a=conv(3, 4), b=conv(4, 4), c=conv(4, 4))
    unchained, result = pair(network)
    assert torch.equal(result.model(images()[0]), unchained(images()[0]))
    assert ("b", "mul_ changes a in place, which it reads") in result.stopped


def test_nothing_to_chain():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval()
    with pytest.warns(UserWarning, match="expected at least one chain, got none"):
        result = qo.chain_(model, torch.randn(2, 4))
    assert type(model) is nn.Sequential
    assert not result.fused


def test_refusals():
    model = static(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval(), images())
    with pytest.raises(ValueError, match="expected a model in eval mode"):
        qo.chain_(copy.deepcopy(model).train(), images()[0])
    with pytest.raises(ValueError, match="expected residual_dtype in"):
        qo.chain_(model, images()[0], residual_dtype=torch.int16)
    with pytest.raises(TypeError, match=r"got one Tensor. Write \[batch\]"):
        qo.chain_(model, images()[0], calibration=images()[0])
    with pytest.raises(ValueError, match="got a bare QuantConv2d"):
        qo.chain_(model[0], images()[0])
    assert type(model) is nn.Sequential


# ---- arguments of the model ------------------------------------------------------------------------------------------------


def test_models_with_keyword_arguments_and_defaults():
    def function(self, x, *, scale=1.0, skip=None):
        y = self.b(self.a(x).relu()) * scale
        return {"y": y if skip is None else y + skip}

    class Net(Of):
        def forward(self, x, *, scale=1.0, skip=None):
            return function(self, x, scale=scale, skip=skip)

    batches = [{"x": x, "skip": torch.ones(())} for x in images()]
    unchained, result = pair(Net(None, a=conv(3, 4), b=conv(4, 2)), batches)
    assert steps(result) == ["a + relu", "b"]
    assert torch.equal(result.model(**batches[0])["y"], unchained(**batches[0])["y"])


def test_half_precision():
    torch.manual_seed(0)
    data = [x.bfloat16() for x in images()]
    unchained, result = pair(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).bfloat16(), data)
    y = result.model(data[0])
    assert y.dtype == torch.bfloat16
    assert sqnr(unchained(data[0]).float(), y.float()) > 35  # the chain does not round to bfloat16 between its layers


def test_linear_chain():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))
    data = [torch.randn(2, 5, 8) for _ in range(3)]
    unchained, result = pair(network, data)
    assert steps(result) == ["0 + gelu", "2 + relu", "4"]
    assert sqnr(unchained(data[0]), result.model(data[0])) > 40


class ConvNeXtBlock(nn.Module):
    """A depthwise convolution, and linear layers on what it gives with the channels as the last of four dimensions."""

    def __init__(self, channels):
        super().__init__()
        self.depthwise = conv(channels, channels, 7, groups=channels)
        self.norm, self.expand, self.reduce = nn.LayerNorm(channels), nn.Linear(channels, 16), nn.Linear(16, channels)

    def forward(self, x):
        y = self.reduce(F.gelu(self.expand(self.norm(self.depthwise(x).permute(0, 2, 3, 1)))))
        return x + y.permute(0, 3, 1, 2)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_linear_layers_on_four_dimensions(layout):
    torch.manual_seed(0)
    data = [x.contiguous(memory_format=layout) for x in images(channels=8)]
    unchained, result = pair(nn.Sequential(conv(8, 8), nn.ReLU(), ConvNeXtBlock(8), ConvNeXtBlock(8)), data)
    assert {"2.expand + gelu", "2.reduce", "3.expand + gelu", "3.reduce"} <= set(steps(result))
    for x in data:
        for other in (torch.contiguous_format, torch.channels_last):
            x = x.contiguous(memory_format=other)
            assert sqnr(unchained(x), result.model(x)) > 40
    linear = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    unchained, result = pair(linear, data)
    assert steps(result) == ["0 + relu", "2"]
    for x in data:
        assert torch.equal(result.model(x), unchained(x))
        assert torch.equal(result.model(x.permute(0, 2, 3, 1)[..., :8].contiguous()), unchained(x.permute(0, 2, 3, 1)[..., :8]))


def test_tensors_that_a_forward_makes():
    """torch.fx keeps them as constants of the module that it traces."""

    def shifted(m, x):
        return m.b(F.relu(m.a(x)) + torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1, 1))

    unchained, result = pair(Of(lambda m, x: m.c(m.inner(x)), inner=Of(shifted, a=conv(3, 4), b=conv(4, 4)), c=conv(4, 2)))
    assert steps(result) == ["inner.a + relu", "inner.b", "c"]
    for model in (result.model, copy.deepcopy(result.model)):
        assert torch.equal(model(images()[1]), unchained(images()[1]))


def test_a_layout_that_float_operators_need_stays():
    """A view needs the contiguous tensor before it."""

    def swapped(m, x):
        y = m.b(F.relu(m.a(x)))
        n, c, h, w = y.shape
        return m.c(y.contiguous().view(n, 2, c // 2, h, w).flip(1).view(n, c, h, w)).contiguous()

    unchained, result = pair(Of(swapped, a=conv(3, 4), b=conv(4, 8), c=conv(8, 3)))
    assert steps(result) == ["a + relu", "b"]
    for layout in (torch.contiguous_format, torch.channels_last):
        x = images()[0].contiguous(memory_format=layout)
        assert torch.equal(result.model(x), unchained(x))
        assert result.model(x).is_contiguous()
    again = pair(Of(lambda m, x: m.b(m.a(x).contiguous()), a=conv(3, 4), b=conv(4, 8)))[1]
    assert steps(again) == ["a", "b"]


# ---- what becomes of a chained model ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chained():
    torch.manual_seed(0)
    network = nn.Sequential(
        conv(3, 8), nn.ReLU(), Bottleneck(8, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    ).eval()
    qo.fold_batchnorm_(network)
    data = images()
    result = qo.chain_(static(network, data), data[0], calibration=data[1:], residual_dtype=torch.int8)
    return result.model, data[0], result.model(data[0])


def spoiled(model):
    """A copy with other scales."""
    model = copy.deepcopy(model)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.mul_(1.5)
    return model


def test_copies_and_pickles(chained):
    model, x, y = chained
    assert torch.equal(copy.deepcopy(model)(x), y)
    assert torch.equal(pickle.loads(pickle.dumps(model))(x), y)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), y)


def test_state_dict_and_files(chained, tmp_path):
    model, x, y = chained
    other = spoiled(model)
    assert not torch.equal(other(x), y)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file))
    assert torch.equal(other(x), y)

    qo.save(model, tmp_path / "model.safetensors")
    other = spoiled(model)
    qo.load_(other, tmp_path / "model.safetensors")
    assert torch.equal(other(x), y)


def test_the_state_is_that_of_another_chain(chained):
    model, x, _ = chained
    state = model.state_dict()
    other = static(nn.Sequential(conv(3, 8), nn.ReLU(), conv(8, 4)).eval(), images())
    qo.chain_(other, x)
    before = other(x)
    with pytest.raises(RuntimeError, match="expected a chain of the same layers, got a difference in"):
        other.load_state_dict(state, strict=False)
    state["chain_0._extra_state"] = torch.zeros(3, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="expected the state of a chain"):
        other.load_state_dict(state, strict=False)
    assert torch.equal(other(x), before)


def test_loading_takes_the_program_over():
    """Where the scales come from depends on the data that a model was calibrated with."""
    network = Of(
        lambda self, x: self.b(self.a(x).relu()) + self.c(self.a(x).relu()), a=conv(3, 4), b=conv(4, 4), c=conv(4, 4)
    ).eval()
    one = static(copy.deepcopy(network), images())
    two = copy.deepcopy(one)
    one.b.input_scale *= 1.25
    two.c.input_scale *= 1.25
    x = images()[0]
    qo.chain_(one, x)
    qo.chain_(two, x, residual_dtype=torch.int8)
    assert one.chain_0.program != two.chain_0.program
    two.load_state_dict(one.state_dict())
    assert one.chain_0.program == two.chain_0.program
    assert torch.equal(two(x), one(x))


@pytest.mark.parametrize("strict", [False, True])
def test_export(chained, strict):
    model, x, y = chained
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},), strict=strict)
    assert torch.equal(program.module()(x), y)
    assert torch.equal(program.module()(x[:1]), y[:1])
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(x), y)
    assert torch.equal(model(x), y)


def test_compile_and_trace(chained):
    model, x, y = chained
    assert torch.equal(torch.compile(model, fullgraph=True, backend="aot_eager")(x), y)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), y)
    assert torch.equal(torch.jit.trace(model, x)(x), y)
    with torch.inference_mode():
        assert torch.equal(model(x), y)


def test_times_name_every_step(chained):
    """Adds up the steps of a call by the steps of a program; with samples apart and together, on one thread and on two."""
    model, x, _ = chained
    chain = model.chain_0
    for batch, threads in ((x[:1], 1), (x, 2), (x.repeat(4, 1, 1, 1), 2)):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        times = chain.times(batch, calls=3)
        torch.set_num_threads(before)
        names = [name for name, _ in times.steps]
        assert names[:3] == ["quantize", "0 + relu", "2.conv1 + relu"]
        assert "2.conv3 + add + relu" in names
        assert len(names) == len(chain.program.steps)
        assert all(seconds > 0 for _, seconds in times.steps)
        assert times.seconds == sum(seconds for _, seconds in times.steps)
        assert str(times).splitlines()[1].endswith("%  0 + relu")
    with pytest.raises(ValueError, match=r"calls >= 1, got cpu and 0"):
        chain.times(x, calls=0)


def test_no_gradient(chained):
    model, x, _ = chained
    loss = model(x.clone().requires_grad_()).sum()
    with pytest.raises(RuntimeError, match="expected no gradient to be asked for"):
        loss.backward()


def test_weights_are_shared_and_half_keeps_the_bits(chained):
    model, x, y = chained
    quantized = static(nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 2)).eval(), images())
    layers = [quantized[0], quantized[2]]
    chain = qo.chain_(quantized, x).chains["chain_0"]
    assert [chain.layers.get_submodule(name) for name in ("0", "2")] == layers
    assert torch.equal(copy.deepcopy(model).half().float()(x), y)
