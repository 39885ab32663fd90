"""fold_batchnorm_: what it folds, what it leaves and why, and that no model computes anything else afterwards."""

import copy
import itertools
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

import quant_ops as qo


def settle(model):
    """Running statistics, gains and offsets that are all different, and eval mode."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.running_mean is not None:
                    module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                    module.running_var.copy_(torch.rand(module.num_features, generator=generator) * 4 + 0.1)
                if module.weight is not None:
                    module.weight.copy_(torch.randn(module.num_features, generator=generator))  # of both signs
                    module.bias.copy_(torch.randn(module.num_features, generator=generator))
    return model.eval()


def check(model, *inputs, example=False):
    """Folds a model, whose output must stay the same, and returns the result."""
    settle(model)
    with torch.no_grad():
        expected = model(*inputs)
        result = qo.fold_batchnorm_(model, inputs if example else None)
        got = model(*inputs)
    for a, b in zip(torch.utils._pytree.tree_leaves(expected), torch.utils._pytree.tree_leaves(got), strict=True):
        assert (a - b).norm() <= 1e-5 * a.norm()
    for layer, batchnorm in result.folded:
        assert type(model.get_submodule(batchnorm)) is nn.Identity
        assert model.get_submodule(layer).bias is not None
    for name, _ in result.skipped:
        assert isinstance(model.get_submodule(name), nn.modules.batchnorm._BatchNorm)
    return result


class Lambda(nn.Module):
    """A model of some children and a forward of (self, *inputs)."""

    def __init__(self, forward, **children):
        super().__init__()
        self.compute = forward
        for name, child in children.items():
            setattr(self, name, child)

    def forward(self, x):
        return self.compute(self, x)


class Untraceable(Lambda):
    def forward(self, x):
        if x.sum() > 1e30:  # torch.fx cannot decide this
            return x
        return super().forward(x)


def conv(inputs=4, outputs=4, kernel=1, **arguments):
    return nn.Conv2d(inputs, outputs, kernel, **arguments)


IMAGES = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(2))


# ---- what is folded --------------------------------------------------------------------------------------------------


LAYERS = {
    "linear": (nn.Linear(6, 8), nn.BatchNorm1d(8), (5, 6)),
    "linear, no bias": (nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), (5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "conv2d": (nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "no bias": (nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "not affine": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), (2, 4, 7, 5)),
    "eps": (nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, eps=0.5, momentum=None), (2, 4, 7, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, stride=2), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, dilation=2, padding=2), nn.BatchNorm2d(8), (2, 4, 7, 5)),
    "reflected": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "conv3d": (nn.Conv3d(2, 3, 2), nn.BatchNorm3d(3), (2, 2, 4, 4, 4)),
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 3), nn.BatchNorm1d(6), (2, 4, 9)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "transposed, grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2, bias=False), nn.BatchNorm2d(6), (2, 4, 7, 5)),
    "transposed 3d": (nn.ConvTranspose3d(4, 4, 2, groups=4), nn.BatchNorm3d(4), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("how", ["graph", "run", "neighbours"])
@pytest.mark.parametrize("name", LAYERS)
def test_each_layer(name, how):
    """Like torch's own fusion of one pair, in float64."""
    layer, batchnorm, shape = copy.deepcopy(LAYERS[name])
    settle(nn.Sequential(batchnorm))
    fuse = fuse_linear_bn_eval if isinstance(layer, nn.Linear) else fuse_conv_bn_eval
    arguments = {"transpose": True} if isinstance(layer, nn.modules.conv._ConvTransposeNd) else {}
    oracle = None
    if not (arguments and layer.groups > 1):  # which fuse_conv_bn_eval does not know
        oracle = fuse(copy.deepcopy(layer).double().eval(), copy.deepcopy(batchnorm).double(), **arguments)
    sequential = nn.Sequential(layer, batchnorm, nn.ReLU())
    model = sequential if how == "graph" else Untraceable(lambda m, x: m.body(x), body=sequential)
    prefix = "" if how == "graph" else "body."
    result = check(model, torch.randn(shape), example=how == "run")
    assert result.folded == [(f"{prefix}0", f"{prefix}1")]
    assert result.skipped == []
    assert sequential[0] is layer
    if oracle is not None:
        assert torch.allclose(layer.weight.double(), oracle.weight, rtol=3e-7, atol=1e-12)
        assert torch.allclose(layer.bias.double(), oracle.bias, rtol=3e-7, atol=3e-7)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_dtypes(dtype):
    model = settle(nn.Sequential(conv(kernel=3), nn.BatchNorm2d(4))).to(dtype)
    expected = model.double()(IMAGES.double())
    result = qo.fold_batchnorm_(model.to(dtype))
    assert result.folded == [("0", "1")]
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    got = model.double()(IMAGES.double())
    assert (got - expected).norm() <= 2 * torch.finfo(dtype).eps * expected.norm()


class Residual(nn.Module):
    """ResNet's basic block, with a projection."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)
        self.conv2, self.bn2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.down = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += self.down(x)
        return self.relu(y)


class Inverted(nn.Module):
    """MobileNetV2's block."""

    def __init__(self, channels):
        super().__init__()
        hidden = 6 * channels
        self.body = nn.Sequential(
            *(nn.Conv2d(channels, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True)),
            *(nn.Conv2d(hidden, channels, 1, bias=False), nn.BatchNorm2d(channels)),
        )

    def forward(self, x):
        return x + self.body(x)


class Network(nn.Module):
    def __init__(self, traceable):
        super().__init__()
        self.traceable = traceable
        self.features = nn.Sequential(Residual(4, 8, 2), Inverted(8), Residual(8, 8, 1))
        self.head = nn.Sequential(nn.Linear(8, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 3))

    def forward(self, x):
        x = self.features(x).mean((2, 3))
        if not self.traceable and x.norm() < 0:
            return None
        return self.head(x)


PAIRS = {
    *((f"features.{i}.conv{j}", f"features.{i}.bn{j}") for i, j in itertools.product((0, 2), (1, 2))),
    *((f"features.{i}.down.0", f"features.{i}.down.1") for i in (0, 2)),
    *((f"features.1.body.{i}", f"features.1.body.{i + 1}") for i in (0, 3, 6)),
    ("head.0", "head.1"),
}


@pytest.mark.parametrize("example", [False, True])
@pytest.mark.parametrize("traceable", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_networks(traceable, example, memory_format):
    model = Network(traceable).to(memory_format=memory_format)
    result = check(model, IMAGES, example=example)
    if traceable or example:
        assert set(result.folded) == PAIRS
        assert result.skipped == []
    else:  # neighbours in a Sequential only
        assert set(result.folded) == {pair for pair in PAIRS if ".bn" not in pair[1]}
        assert all("Give example_inputs" in reason for _, reason in result.skipped)
    assert model.features[1].body[0].weight.is_contiguous(memory_format=memory_format)
    assert not any(module._forward_hooks for module in model.modules())
    again = qo.fold_batchnorm_(model)
    assert again.folded == []


def test_then_quantize():
    model = settle(Network(True))
    with torch.no_grad():
        expected = model(IMAGES)
        qo.fold_batchnorm_(model)
        assert len(qo.quantize_(model).converted) == 11
        assert (model(IMAGES) - expected).norm() < 0.1 * expected.norm()


def test_result_as_text():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    assert str(check(model, IMAGES)) == (
        "1 folded, 1 skipped\n  folded   1 into 0\n  skipped  3: it follows ReLU '2', no Linear or convolution"
    )


def test_example_may_be_a_tensor_a_tuple_or_a_mapping():
    for example in (IMAGES, (IMAGES,), {"x": IMAGES}):
        model = settle(Untraceable(lambda m, x: m.bn(m.conv(x)), conv=conv(), bn=nn.BatchNorm2d(4)))
        assert qo.fold_batchnorm_(model, example).folded == [("conv", "bn")]


@pytest.mark.parametrize("bias", [False, True])
def test_frozen_parameters_stay_frozen(bias):
    for weight_trains, other_trains in itertools.product([False, True], repeat=2):
        model = settle(nn.Sequential(conv(bias=bias), nn.BatchNorm2d(4)))
        model[0].weight.requires_grad_(weight_trains)
        (model[0].bias if bias else model[1].bias).requires_grad_(other_trains)
        qo.fold_batchnorm_(model)
        assert model[0].weight.requires_grad is weight_trains
        assert model[0].bias.requires_grad is other_trains
        assert model[0].weight.is_leaf


def test_a_folded_model_is_like_any_other():
    model = settle(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU()))
    qo.fold_batchnorm_(model)
    x = torch.randn(3, 6)
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.fx.symbolic_trace(model)):
        assert torch.equal(other(x), expected)
    assert torch.allclose(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
    assert list(model.state_dict()) == ["0.weight", "0.bias"]


# ---- what is left alone, and why -------------------------------------------------------------------------------------


def two_users(m, x):
    y = m.conv(x)
    return m.bn(y) + y


def returned(m, x):
    y = m.conv(x)
    return m.bn(y), y


def kept(m, x):
    m.features = m.conv(x)
    return m.bn(m.features)


def kept_in_a_list(m, x):
    y = m.conv(x)
    m.__dict__.setdefault("seen", []).append(y)
    return m.bn(y)


def detached(m, x):
    y = m.conv(x)
    m.features = y.detach()
    return m.bn(y)


def conv_twice(m, x):
    return m.bn(m.conv(m.conv(x)))


def bn_twice(m, x):
    return m.bn(m.bn(m.conv(x)))


def between(m, x):
    return m.bn(m.conv(x).relu())


def through_a_view(m, x):
    return m.bn(m.conv(x).view(2, 4, 3, 12))


def weight_read(m, x):
    return m.bn(m.conv(x)) + nn.functional.conv2d(x, m.conv.weight)


def mean_read(m, x):
    return m.bn(m.conv(x)) + m.bn.running_mean.mean()


def changed_in_place(m, x):
    y = m.conv(x)
    y.relu_()
    return m.bn(y)


@pytest.mark.parametrize("how", ["graph", "run"])
@pytest.mark.parametrize(
    ("forward", "graph_reason", "run_reason"),
    [
        (two_users, r"the output of Conv2d 'conv' goes to \['add'\] as well", "the output of Conv2d 'conv' is used elsewhere"),
        (returned, r"the output of Conv2d 'conv' goes to \['output'\] as well", "the output of Conv2d 'conv' is used elsewhere"),
        (kept, "torch.fx cannot trace the model", "the output of Conv2d 'conv' is used elsewhere"),
        (kept_in_a_list, "torch.fx cannot trace the model", "the output of Conv2d 'conv' is used elsewhere"),
        (detached, "torch.fx cannot trace the model", "the output of Conv2d 'conv' is used elsewhere"),
        (conv_twice, "forward calls Conv2d 'conv' 2 times", "the example's run calls Conv2d 'conv' 2 times"),
        (bn_twice, "forward calls it 2 times", "the example's run calls it 2 times"),
        (between, "its input comes from 'relu'", "its input does not come directly"),
        (through_a_view, "its input comes from 'view'", "its input does not come directly"),
        (weight_read, "forward reads the tensors of Conv2d 'conv'", "the example's run reads the tensors of Conv2d 'conv'"),
        (mean_read, "forward reads the tensors of BatchNorm2d 'bn'", "the example's run reads the tensors of BatchNorm2d 'bn'"),
        (changed_in_place, r"the output of Conv2d 'conv' goes to \['relu_'\]", "the output of Conv2d 'conv' is used elsewhere"),
        (lambda m, x: m.conv(x), "forward calls it 0 times", "the example's run calls it 0 times"),
        (lambda m, x: m.conv(m.bn(x)), "its input comes from 'x'", "its input does not come directly"),
    ],
)
def test_uses_that_forbid_it(forward, graph_reason, run_reason, how):
    kind = Lambda if how == "graph" else Untraceable
    model = kind(forward, conv=conv(), bn=nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in settle(model).state_dict().items()}
    result = check(model, IMAGES, example=how == "run")
    assert result.folded == []
    [(name, reason)] = result.skipped
    assert name == "bn"
    assert re.match(graph_reason if how == "graph" else run_reason, reason)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def hooked(module, register="register_forward_hook"):
    getattr(module, register)(lambda *_: None)
    return module


class Mine(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + 1


@pytest.mark.parametrize("how", ["graph", "run", "neighbours"])
@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: (Mine(4, 4, 1), nn.BatchNorm2d(4)), "Mine is a subclass whose forward may differ"),
        (lambda: (conv(), nn.SyncBatchNorm(4)), "SyncBatchNorm is a subclass whose forward may differ"),
        (lambda: (hooked(conv()), nn.BatchNorm2d(4)), "Conv2d '{}0' has hooks, which would see other values"),
        (lambda: (conv(), hooked(nn.BatchNorm2d(4))), "BatchNorm2d '{}1' has hooks, which would see other values"),
        (
            lambda: (parametrizations.weight_norm(conv()), nn.BatchNorm2d(4)),
            "ParametrizedConv2d is a subclass whose forward may differ",
        ),
        (
            lambda: (conv(), nn.BatchNorm2d(4, track_running_stats=False)),
            "it has no running statistics: it normalizes with those of each batch in eval mode too",
        ),
        (
            lambda: (qo.QuantConv2d.from_float(conv()), nn.BatchNorm2d(4)),
            "QuantConv2d '{}0' before it is int8 already. Fold before quantizing",
        ),
    ],
)
def test_layers_that_forbid_it(make, reason, how):
    layers = make()
    sequential = nn.Sequential(*layers)
    model = sequential if how == "graph" else Untraceable(lambda m, x: m.body(x), body=sequential)
    result = check(model, IMAGES, example=how == "run")
    prefix = "" if how == "graph" else "body."
    assert (result.folded, result.skipped) == ([], [(f"{prefix}1", reason.format(prefix))])


@pytest.mark.parametrize("example", [False, True])
def test_a_batchnorm_with_an_activation(example):
    """Subclasses whose forward is that of the BatchNorm and then of its children, as timm's."""

    class NormAct(nn.BatchNorm2d):
        def __init__(self, channels, act):
            super().__init__(channels)
            self.drop, self.act = nn.Identity(), act

        def forward(self, x):
            return self.act(
                self.drop(nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps))
            )

    class Doubled(NormAct):
        def forward(self, x):
            return 2 * super().forward(x)

    def network(norm):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4, nn.ReLU(inplace=True)), nn.Conv2d(4, 4, 3), norm(4, nn.PReLU()))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
        return model.eval()

    x = torch.randn(2, 3, 9, 9)
    model = network(NormAct)
    expected = model(x)
    result = qo.fold_batchnorm_(model, x if example else None)
    assert result.folded == [("0", "1"), ("2", "3")]
    assert [type(module) for module in model] == [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.PReLU]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    result = qo.fold_batchnorm_(network(Doubled), x if example else None)
    assert [reason for _, reason in result.skipped] == ["Doubled is a subclass whose forward may differ"] * 2


@pytest.mark.parametrize("how", ["graph", "run", "neighbours"])
def test_shared_modules_and_tensors(how):
    shared, tied, batchnorm = conv(), conv(), nn.BatchNorm2d(4)
    tied.weight = shared.weight
    cases = [
        ([shared, nn.BatchNorm2d(4), shared], "Conv2d is shared by ['{0}0', '{0}2']"),
        ([conv(), batchnorm, conv(), batchnorm], "BatchNorm2d is shared by ['{0}1', '{0}3']"),
        ([tied, nn.BatchNorm2d(4), conv(), shared], "Conv2d '{0}0' shares its weight with ['{0}3']"),
    ]
    for layers, reason in cases:
        sequential = nn.Sequential(*layers)
        model = sequential if how == "graph" else Untraceable(lambda m, x: m.body(x), body=sequential)
        prefix = "" if how == "graph" else "body."
        result = check(model, IMAGES, example=how == "run")
        assert result.folded == []
        got = dict(result.skipped)[f"{prefix}1"]
        counted = ("forward calls", "the example's run calls")
        assert got == reason.format(prefix) or got.startswith(counted)


def test_dimensions_that_do_not_match():
    """BatchNorm1d normalizes dimension 1, which after a Linear on tokens is not the features."""
    tokens = torch.randn(2, 8, 6)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
    [(name, reason)] = check(model, tokens, example=True).skipped
    assert (name, reason) == ("1", "the output of Linear '0' has 3 dimensions, of which it normalizes another one")
    assert qo.fold_batchnorm_(model).folded == [("0", "1")]  # not knowing better
    with pytest.raises(ValueError, match=r"^quant_ops\.fold_batchnorm_: expected x\.dim\(\) == 2 .*, got 3: .* Fold with such"):
        model(tokens)
    assert model(tokens[0]).shape == (8, 8)

    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(5))
    assert check(model, torch.randn(2, 5, 6)).skipped == [("1", "it normalizes 5 channels, and Linear '0' has 8")]
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm2d(5))
    assert check(model, torch.randn(2, 5, 4, 6)).skipped == [
        ("1", "after Linear '0' a BatchNorm2d does not normalize the layer's outputs")
    ]


def test_weights_that_would_not_be_finite():
    model = settle(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    model[1].running_var[2] = -1.0
    assert qo.fold_batchnorm_(model).skipped == [("1", "the weights of Conv2d '0' would not be finite")]
    model = settle(nn.Sequential(conv(), nn.BatchNorm2d(4, device="meta")))
    assert qo.fold_batchnorm_(model).skipped == [("1", "BatchNorm2d '1' has no data, only shapes")]


class Optional(nn.Module):
    """The path without the optional argument uses the layer's output a second time."""

    def __init__(self, default):
        super().__init__()
        self.conv, self.bn, self.default = conv(), nn.BatchNorm2d(4), default

    def forward(self, x, other=None):
        y = self.conv(x)
        if other is None:
            other = y
        return self.bn(y) + other


def test_optional_arguments():
    """A proxy is not None: the graph of the default is looked at as well."""
    result = check(Optional(None), IMAGES)
    assert result.skipped == [("bn", "the output of Conv2d 'conv' goes to ['add'] as well")]
    assert check(Optional(None), IMAGES, IMAGES, example=True).folded == []  # the graph knows more than the example


def test_hooks_of_containers():
    """A hook on a block may keep what it sees."""
    seen = []
    block = nn.Sequential(conv())
    block.register_forward_hook(lambda module, args, output: seen.append(output))
    model = nn.Sequential(block, nn.BatchNorm2d(4))
    [(_, reason)] = check(model, IMAGES).skipped
    assert reason.startswith("torch.fx cannot trace the model")
    assert all(isinstance(output, torch.Tensor) for output in seen)
    assert check(model, IMAGES, example=True).skipped == [("1", "the output of Conv2d '0.0' is used elsewhere as well")]


# ---- errors ----------------------------------------------------------------------------------------------------------


def test_training_mode():
    model = nn.Sequential(conv(), nn.BatchNorm2d(4))
    with pytest.raises(
        ValueError, match=r"^quant_ops\.fold_batchnorm_: expected a model in eval mode, got the model in training mode\."
    ):
        qo.fold_batchnorm_(model)
    model.eval()[1].train()
    with pytest.raises(ValueError, match=r"got BatchNorm2d '1' in training mode\. Call model\.eval\(\) first\.$"):
        qo.fold_batchnorm_(model)
    assert isinstance(model[1], nn.BatchNorm2d)


def test_an_example_that_fails_leaves_no_hooks():
    model = settle(nn.Sequential(conv(), nn.BatchNorm2d(4)))
    with pytest.raises(RuntimeError):
        qo.fold_batchnorm_(model, torch.randn(2, 5, 6, 6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert isinstance(model[1], nn.BatchNorm2d)
