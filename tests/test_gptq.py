"""GPTQ: the codes of the paper, the Hessians, the ways through a model, checkpoints, and what is refused."""

import copy

import gptq_reference
import pytest
import torch
from torch import nn

import quant_ops as qo
from quant_ops.accuracy import hessian as accuracy_hessian
from quant_ops.accuracy import layer as accuracy_layer
from quant_ops.accuracy.hessian import Hessian
from quant_ops.accuracy.solver import inverse_factor

CONFIGS = {
    "int4": (qo.Int4WeightOnly(32), 4, 32, "int"),
    "int4 symmetric": (qo.Int4WeightOnly(32, asymmetric=False), 4, 32, "symmetric"),
    "int4 float": (qo.Int4WeightOnly(32, zero_point="float"), 4, 32, "float"),
    "int4 rows": (qo.Int4WeightOnly(-1), 4, 80, "int"),
    "int8": (qo.Int8WeightOnly(), 8, 80, "symmetric"),
    "int8 groups": (qo.Int8WeightOnly(32, asymmetric=True), 8, 32, "int"),
    "W4A8": (qo.Int8DynamicInt4Weight(32), 4, 32, "symmetric"),
    "3 bits": (qo.Int8Dynamic(weight_bits=3), 3, 80, "narrow"),
    "static": (qo.Int8Static(weight_bits=4), 4, 80, "narrow"),
}
configs = pytest.mark.parametrize("name", CONFIGS)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    """The operations are so small that others would mostly be waited for."""
    threads(1)


def correlated(rows, columns, seed=0):
    """Inputs like those of real layers: few directions and some large columns carry most of them."""
    random = torch.Generator().manual_seed(seed)
    mixed = torch.randn(rows, columns // 3, generator=random) @ torch.randn(columns // 3, columns, generator=random)
    return (mixed + 0.3 * torch.randn(rows, columns, generator=random)) * (1 + 4 * torch.rand(columns, generator=random) ** 4)


def loss(layer, x, weight):
    """Squares of what the weight loses of the output."""
    values = layer.weight.dequantize() if hasattr(layer.weight, "dequantize") else layer.weight
    return ((x @ (values - weight).T) ** 2).sum().item()


# ---- the paper's codes -------------------------------------------------------------------------------------------------------


@configs
@pytest.mark.parametrize("act_order", [False, True])
def test_codes_are_those_of_the_paper(name, act_order):
    """K of 80: two groups and a shorter one. Blocks of 48 columns end inside of the second group. Two inputs are always zero."""
    config, bits, group, kind = CONFIGS[name]
    torch.manual_seed(0)
    linear, x = nn.Linear(80, 12), correlated(200, 80)
    x[:, [5, 70]] = 0
    weight = linear.weight.detach().clone()
    model = nn.Sequential(linear, nn.ReLU())
    result = qo.gptq_(model, [x[:90], x[90:]], config, block_size=48, act_order=act_order)
    codes, scale, zero = gptq_reference.gptq(weight, x, bits, group, kind, act_order=act_order)
    layer = model[0]
    assert torch.equal(layer.qweight, codes)
    assert torch.equal(layer.weight_scale, scale.reshape(layer.weight_scale.shape))
    if getattr(layer, "weight_zero_point", None) is not None:
        assert torch.equal(layer.weight_zero_point.double(), zero.double())
    assert layer.config == config
    rounded = nn.Sequential(copy.deepcopy(linear))
    with torch.no_grad():
        rounded[0].weight.copy_(weight)
    qo.prepare_(rounded, config) if name == "static" else qo.quantize_(rounded, config)
    if name == "static":
        qo.calibrate(rounded, [x[:90], x[90:]])
        qo.convert_(rounded)
        assert torch.equal(layer.input_scale, rounded[0].input_scale)
        assert torch.equal(layer.input_zero_point, rounded[0].input_zero_point)
    lost, lost_by_rounding = loss(layer, x, weight), loss(rounded[0], x, weight)
    assert lost < (0.9 if act_order and bits == 8 else 0.7) * lost_by_rounding
    whole = ((x @ weight.T) ** 2).sum().item()
    assert result.errors["0"] == pytest.approx((lost / whole, lost_by_rounding / whole), rel=1e-3)
    assert "2 of its 80 inputs were always zero: weights 0" in dict(result.notes)["0"]
    assert f"{result.errors['0'][0]:.2e}, rounded" in str(result)


def test_bfloat16():
    """Weights and inputs are taken as they are, and updated in float64."""
    torch.manual_seed(0)
    linear, x = nn.Linear(80, 12).bfloat16(), correlated(60, 80).bfloat16()
    model = nn.Sequential(copy.deepcopy(linear))
    result = qo.gptq_(model, [x], qo.Int8Dynamic(weight_bits=4))
    assert torch.equal(model[0].qweight, gptq_reference.gptq(linear.weight.detach(), x, 4, 80, "narrow")[0])
    assert model[0](x).dtype == torch.bfloat16
    assert result.notes == [("0", "60 rows of data are few for its 80 inputs")]


@pytest.mark.parametrize("block_size", [1, 7, 32, 50, 1000])
def test_blocks_of_updates_change_nothing(block_size):
    torch.manual_seed(0)
    linear, x = nn.Linear(300, 8), correlated(500, 300)
    for config in (qo.Int4WeightOnly(64), qo.Int4WeightOnly(256), qo.Int4WeightOnly(-1)):
        models = [nn.Sequential(copy.deepcopy(linear)) for _ in range(2)]
        for model, size in zip(models, (128, block_size), strict=True):
            qo.gptq_(model, [x], config, block_size=size)
        assert torch.equal(models[0][0].qweight, models[1][0].qweight)


@pytest.mark.parametrize(
    ("conv", "shape"),
    [
        (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (3, 4, 9, 8)),
        (nn.Conv2d(4, 8, (3, 2), padding="same", dilation=2, padding_mode="reflect"), (3, 4, 9, 8)),
        (nn.Conv2d(6, 6, 3, groups=6, bias=False), (6, 9, 8)),
        (nn.Conv1d(4, 6, 3, padding=2, padding_mode="circular"), (3, 4, 20)),
        (nn.Conv1d(4, 6, 1), (4, 20)),
    ],
    ids=["groups", "same", "depthwise", "1d", "pointwise"],
)
def test_convolutions(conv, shape):
    """One Hessian for each group: against the reference on columns that are read off the convolution itself."""
    model, x = nn.Sequential(copy.deepcopy(conv)), 2 * torch.randn(shape)
    qo.gptq_(model, [x, x * 0.5], qo.Int8Dynamic(weight_bits=3))
    groups, k = conv.groups, conv.weight[0].numel()
    taps = copy.deepcopy(conv)  # its outputs are the columns: output j of a group is the group's tap j
    taps.out_channels, taps.bias = groups * k, None
    taps.weight = nn.Parameter(torch.eye(k).reshape(k, *conv.weight.shape[1:]).repeat(groups, *[1] * (conv.weight.dim() - 1)))
    channel = x.dim() - conv.weight.dim() + 1
    for g, codes in enumerate(model[0].qweight.chunk(groups)):
        columns = taps(x).detach().movedim(channel, -1).reshape(-1, groups, k)[:, g]
        rows = torch.cat([columns, columns * 0.5])
        weight = conv.weight.detach().chunk(groups)[g].flatten(1)
        expected, scale, _ = gptq_reference.gptq(weight, rows, 3, k, "narrow")
        assert torch.equal(codes.flatten(1), expected)
        assert torch.equal(model[0].weight_scale.chunk(groups)[g], scale[:, 0])


def test_transformers_conv1d():
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    conv, x = Conv1D(12, 80), correlated(200, 80)
    nn.init.normal_(conv.weight)
    weight = conv.weight.detach().t().clone()
    model = nn.Sequential(conv)
    qo.gptq_(model, [x], qo.Int4WeightOnly(32))
    assert torch.equal(model[0].qweight, gptq_reference.gptq(weight, x, 4, 32, "int")[0])


@pytest.mark.parametrize("config", [qo.Int4WeightOnly(32), qo.Int8Static(weight_bits=4)])
def test_multipliers(config):
    """The Hessian is that of the input times the multiplier, which layers may have in common, and the layer keeps it."""
    torch.manual_seed(0)
    float_model, x = nn.ModuleList(nn.Linear(64, 12) for _ in range(4)), correlated(200, 64)
    multipliers = [torch.rand(64) + 0.1] * 2 + [torch.rand(64) + 0.1, torch.ones(64)]
    layers = [qo.ScaledLinear.from_linear(*pair) for pair in zip(float_model, multipliers, strict=True)]
    model = nn.ModuleList([*layers[:3], copy.deepcopy(float_model[3])])
    result = qo.gptq_(model, [x], config, forward=lambda model, x: [layer(x) for layer in model], blocks=[])
    group, kind = (32, "int") if isinstance(config, qo.Int4WeightOnly) else (64, "narrow")
    for layer, linear, multiplier in zip(model, float_model, multipliers, strict=True):
        expected, *_ = gptq_reference.gptq(linear.weight.detach(), x * multiplier, 4, group, kind)
        assert torch.equal(layer.qweight, expected)
        if layer is not model[3]:
            assert torch.equal(layer.input_multiplier, multiplier)
    if group == 64:
        assert [model[i].input_scale.item() for i in (0, 2, 3)] == pytest.approx(
            [((x * m).amax().clamp(min=0) - (x * m).amin().clamp(max=0)).item() / 255 for m in multipliers[1:]]
        )
    assert len(result.errors) == 4


# ---- Hessians ----------------------------------------------------------------------------------------------------------------


class Shares(nn.Module):
    """q and k always get one tensor, v only in the first call; late is called for the second time before q's second call."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        for name in "qkvo":
            self.add_module(name, nn.Linear(32, 32))
        self.late = nn.Linear(32, 32)

    def forward(self, x, other, again):
        y = self.q(x) + self.k(x) + self.v(other) + self.late(x)
        if again is not None:
            y = y + self.late(again)
        return self.o(y)


def test_layers_that_share_an_input_share_a_hessian(monkeypatch):
    made, add = [], Hessian.add
    monkeypatch.setattr(Hessian, "add", lambda self, *args, **kwargs: made.append(1) or add(self, *args, **kwargs))
    x, y, z = (correlated(60, 32, seed) for seed in range(3))
    for calls, products in [
        ([(x, x, None), (y, y, None)], 4),  # one for q, k, v and late, one for o, in each call
        ([(x, x, None), (y, z, None), (z, x, y)], 2 + 3 + 4),  # v goes its own way at the second call, late at the third
        ([(x, x, None), (y, y.clone(), None)], 5),
        ([(x, x, y), (y, y, None)], 6),  # late is ahead from the first call on
    ]:
        model, float_model = Shares(), Shares()
        made.clear()
        qo.gptq_(model, calls, qo.Int4WeightOnly(32), blocks=[])
        assert len(made) == products
        seen = {name: [] for name in ("q", "k", "v", "o", "late")}
        for name, rows in seen.items():
            getattr(float_model, name).register_forward_pre_hook(lambda _, args, rows=rows: rows.append(args[0].detach()))
        for call in calls:
            float_model(*call)
        for name, rows in seen.items():
            weight = getattr(float_model, name).weight.detach()
            expected = gptq_reference.gptq(weight, torch.cat(rows), 4, 32, "int")[0]
            assert torch.equal(getattr(model, name).qweight, expected), name


def test_the_mean_is_that_of_all_rows():
    """Batches of different sizes."""
    torch.manual_seed(0)
    linear, x = nn.Linear(64, 8), correlated(300, 64).half().float()
    models = [nn.Sequential(copy.deepcopy(linear)) for _ in range(2)]
    qo.gptq_(models[0], [x])
    qo.gptq_(models[1], [x[:1], x[1:40], x[40:]])
    assert torch.equal(models[0][0].qweight, models[1][0].qweight)


def test_sums_in_float32(monkeypatch):
    """As on devices other than the CPU: nearly all codes are the same, and the errors too."""
    torch.manual_seed(0)
    float_model, x = nn.Sequential(nn.Linear(160, 24), nn.Linear(24, 24)), correlated(600, 160)
    models = [copy.deepcopy(float_model) for _ in range(2)]
    first = qo.gptq_(models[0], [x[:300], x[300:]], qo.Int4WeightOnly(32), act_order=True)
    for module in (accuracy_hessian, accuracy_layer):
        monkeypatch.setattr(module, "sum_dtype", lambda device: torch.float32)
    second = qo.gptq_(models[1], [x[:300], x[300:]], qo.Int4WeightOnly(32), act_order=True)
    assert (models[0][0].qweight != models[1][0].qweight).float().mean() < 0.01
    for name in ("0", "1"):
        assert second.errors[name] == pytest.approx(first.errors[name], rel=0.05)


def test_factor_of_the_inverse():
    x = correlated(40, 24).double()
    hessian = (2 / 40) * x.T @ x
    upper, damping = inverse_factor(hessian[None], 0.01)
    assert damping == 0.01
    damped, _ = gptq_reference.damped(hessian, 0.01)
    assert torch.allclose(upper[0].T @ upper[0], torch.linalg.inv(damped))
    assert torch.equal(upper.triu(), upper)
    indefinite = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(24)
    assert inverse_factor(indefinite[None], 0.001)[1] == pytest.approx(0.1)  # after 0.001 and 0.01
    assert inverse_factor(hessian[None] * 0, 0.01)[0].equal(torch.eye(24).double()[None])
    rank_one = torch.ones(1, 24, 24)
    assert inverse_factor(rank_one, 0.0)[1] == pytest.approx(0.01)
    assert inverse_factor(-100 * rank_one, 0.01) is None
    assert inverse_factor(rank_one * torch.nan, 0.01) is None


# ---- through a model ---------------------------------------------------------------------------------------------------------


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(32)
        self.a, self.b, self.out = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)

    def forward(self, x, scale):
        y = self.norm(x)
        return (x + scale * self.out(self.a(y) * self.b(y).sigmoid()),)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.stem = nn.Embedding(20, 16), nn.Linear(16, 32)
        self.blocks = nn.ModuleList(Mixer() for _ in range(3))
        self.head = nn.Linear(32, 20)

    def forward(self, tokens, scale=2.0):
        x = self.stem(self.table(tokens))
        for block in self.blocks:
            x = block(x, scale)[0]
        return self.head(x)


def tokens(count=3, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [(torch.randint(20, (4, 9 + i), generator=random), 2.0 - i / 2) for i in range(count)]


STEPS = {
    "blocks": [["stem"], *([f"blocks.{i}.{name}" for name in ("a", "b", "out")] for i in range(3)), ["head"]],
    "layers": [["stem"], *([f"blocks.{i}.{name}" for name in part] for i in range(3) for part in ("ab", ("out",))), ["head"]],
    "together": [["stem", *(f"blocks.{i}.{name}" for i in range(3) for name in ("a", "b", "out")), "head"]],
}


def by_reference(model, data, steps, config):
    """Every step on what the model, with the layers of the steps before it quantized, gives to its layers."""
    group = config.group_size
    for names in steps:
        rows = {name: [] for name in names}
        handles = [
            model.get_submodule(name).register_forward_pre_hook(
                lambda _, args, rows=rows[name]: rows.append(args[0].flatten(0, -2))
            )
            for name in names
        ]
        with torch.no_grad():
            for batch in data:
                model(*batch)
        for handle in handles:
            handle.remove()
        for name in names:
            linear = model.get_submodule(name)
            kind = "int" if config.settings()["asymmetric"] else "symmetric"
            codes, scale, zero = gptq_reference.gptq(linear.weight.detach(), torch.cat(rows[name]), 4, group, kind)
            given = {"weight_scale": scale.float(), "codes": codes}
            if kind == "int":
                given["weight_zero_point"] = zero
            settings = config.settings() | config.linear_settings()
            model.set_submodule(name, qo.WeightOnlyLinear.from_float(linear, **settings, **given))
    return model


@pytest.mark.parametrize("config", [qo.Int4WeightOnly(32), qo.Int8DynamicInt4Weight(32)], ids=["W4", "W4A8"])
@pytest.mark.parametrize("order", STEPS)
def test_orders(order, config):
    """Which layers see quantized inputs. With int8 rows the later ones see what the earlier ones compute with them."""
    model, data = Net(), tokens()
    expected = by_reference(Net().eval(), data, STEPS[order], config)
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    result = qo.gptq_(model, iter(data), config, order=order, exclude=[nn.Embedding])
    for name in STEPS["together"][0]:
        ours, theirs = model.get_submodule(name), expected.get_submodule(name)
        assert torch.equal(ours.qweight, theirs.qweight), name
        assert torch.equal(ours.weight_scale, theirs.weight_scale), name
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert result.converted == STEPS["together"][0]
    assert result.blocks == ([] if order == "together" else ["blocks.0", "blocks.1", "blocks.2"])
    assert result.kind == "int4"
    with torch.no_grad():
        assert torch.equal(model.eval()(*data[0]), expected(*data[0]))


def test_the_result(tmp_path):
    model = Net()
    result = qo.gptq_(model, tokens(), {"blocks.1.*": qo.Int8Dynamic(), "*": qo.Int4WeightOnly(32)}, exclude=["head"], steps=2)
    lines = str(result).splitlines()
    assert lines[0] == "10 converted, 2 skipped"
    assert lines[2].startswith("GPTQ in 3 blocks, median error 0.")
    assert ("table", "an embedding multiplies nothing. quantize_ rounds it to the nearest") in result.skipped
    assert ("head", "excluded by 'head'") in result.skipped
    assert result.errors.keys() == set(result.converted)
    assert {type(layer).__name__ for layer in model.blocks[1].children()} == {"LayerNorm", "QuantLinear"}
    assert result.forms["blocks.1.a"] == "int8"
    assert result.share < 1
    qo.quantize_(model, qo.Int4WeightOnly(32))
    assert isinstance(model.table, qo.WeightOnlyEmbedding)
    qo.save(model, tmp_path / "model.safetensors")
    with torch.device("meta"):
        fresh = Net()
    qo.load_(fresh, tmp_path / "model.safetensors")
    with torch.no_grad():
        assert torch.equal(fresh(*tokens()[0]), model(*tokens()[0]))


def test_a_model_without_a_chain_is_taken_as_a_whole():
    class Skips(Net):
        def forward(self, tokens, scale=2.0):
            x = self.stem(self.table(tokens))
            for block in self.blocks:
                x = block(x, scale)[0] * 1
            return self.head(x)

    model, data = Skips(), tokens()
    result = qo.gptq_(model, data, qo.Int4WeightOnly(32))
    assert result.whole == "'blocks.1' does not get what 'blocks.0' gives"
    assert "GPTQ as a whole: 'blocks.1' does not get what 'blocks.0' gives" in str(result)
    assert torch.equal(
        model.head.qweight, by_reference(Skips().eval(), data, STEPS["together"], qo.Int4WeightOnly(32)).head.qweight
    )
    with pytest.raises(
        ValueError, match=r"expected blocks that follow one another, got .* 'blocks\.1' does not get .* blocks=\[\]"
    ):
        qo.gptq_(Skips(), data, blocks="blocks")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(32, 32) for _ in range(3))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        return self.head(torch.stack([self.experts[int(row[0] > 0)](row) for row in x]))


@pytest.mark.parametrize("config", [qo.Int4WeightOnly(32), qo.Int8Dynamic(weight_bits=4), qo.Int8Static(weight_bits=4)])
def test_layers_that_no_data_reaches(config):
    model = Experts()
    result = qo.gptq_(model, [correlated(50, 32)], config)
    if isinstance(config, qo.Int8Static):
        assert isinstance(model.experts[2], nn.Linear)
        assert result.skipped == [("experts.2", "no calibration data has reached it")]
    else:
        rounded = Experts()
        qo.quantize_(rounded, config)
        assert torch.equal(model.experts[2].qweight, rounded.experts[2].qweight)
        assert not torch.equal(model.experts[1].qweight, rounded.experts[1].qweight)
        assert ("experts.2", "no calibration data has reached it: rounded to the nearest") in result.notes
    assert result.errors.keys() == {"experts.0", "experts.1", "head"}


def test_tied_and_shared_layers():
    torch.manual_seed(0)
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.Linear(32, 32))
    model[3].weight = shared.weight
    x, weight = correlated(60, 32), shared.weight.detach().clone()
    second = torch.relu(shared(x)).detach()
    result = qo.gptq_(model, [x], qo.Int4WeightOnly(32))
    assert model[0] is model[2]
    assert result.converted == ["0", "2", "3"]
    assert torch.equal(model[0].qweight, gptq_reference.gptq(weight, torch.cat([x, second]), 4, 32, "int")[0])
    assert not model[3].shares_weight(model[0])


def test_torchs_encoder():
    """Its fused path reads float weights and calls no layer."""
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2).eval()
    x = torch.randn(3, 7, 32)
    with torch.no_grad():
        expected = model(x)
    result = qo.gptq_(model, [x], qo.Int8WeightOnly())
    assert result.converted == [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]
    assert len(result.errors) == 4
    with torch.no_grad():
        assert (model(x) - expected).norm() < 0.02 * expected.norm()


# ---- checkpoints and interruptions -------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupting(calls):
    """A forward that fails at its call of this number."""
    left = [calls]

    def forward(model, batch):
        left[0] -= 1
        if left[0] < 0:
            raise Interrupted
        return model(*batch)

    forward.__qualname__ = "forward"
    return forward


def same(model, other):
    states = model.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("order", ["blocks", "layers"])
def test_a_call_goes_on_from_its_checkpoint(order, tmp_path):
    arguments = {"config": {"blocks.1.*": qo.Int8Static(weight_bits=4), "*": qo.Int4WeightOnly(32)}, "order": order}
    whole = Net()
    expected = qo.gptq_(whole, tokens(), **arguments)
    before, most = Net(), 0
    for calls in (0, 3, 5, 6, 100):  # ends in the plan, the stem, the capture of the blocks, the head
        model = Net()
        try:
            result = qo.gptq_(model, tokens(), forward=interrupting(calls), checkpoint=tmp_path, **arguments)
        except Interrupted:
            assert same(model, before)
            assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
            most = max(most, len(list(tmp_path.glob("stage-*"))))
    assert most == 4
    assert same(model, whole)
    assert (result.resumed, result.errors, result.notes) == (4, expected.errors, expected.notes)
    assert str(result).splitlines()[2:] == str(expected).splitlines()[2:]
    again = Net()
    assert qo.gptq_(again, tokens(), forward=interrupting(100), checkpoint=tmp_path, **arguments).resumed == 5
    assert same(again, whole)


def test_interrupted_within_the_blocks(tmp_path, monkeypatch):
    """The float layers come back wherever it stops, with and without a folder."""
    import quant_ops.accuracy.gptq_run as module

    before, solve, model, done = Net(), module.solved, Net(), []

    def interrupted(*arguments):
        done.append(1)
        if len(done) == 6:
            raise KeyboardInterrupt
        return solve(*arguments)

    monkeypatch.setattr(module, "solved", interrupted)
    for folder in (None, tmp_path):
        done.clear()
        with pytest.raises(KeyboardInterrupt):
            qo.gptq_(model, tokens(), qo.Int4WeightOnly(32), order="layers", checkpoint=folder)
        assert same(model, before)
        assert type(model.blocks[0].a) is nn.Linear
    result = qo.gptq_(model, tokens(), qo.Int4WeightOnly(32), order="layers", checkpoint=tmp_path)
    assert result.resumed == 2
    monkeypatch.undo()
    whole = Net()
    qo.gptq_(whole, tokens(), qo.Int4WeightOnly(32), order="layers")
    assert same(model, whole)


def test_checkpoints_of_other_calls_are_refused(tmp_path):
    qo.gptq_(Net(), tokens(), qo.Int4WeightOnly(32), checkpoint=tmp_path / "mine")

    def refused(part, model=None, data=None, config=None, folder="mine", **arguments):
        model = model or Net()
        before = copy.deepcopy(model)
        with pytest.raises(ValueError, match=part):
            qo.gptq_(model, data or tokens(), config or qo.Int4WeightOnly(32), checkpoint=tmp_path / folder, **arguments)
        assert same(model, before)

    other = Net()
    with torch.no_grad():
        other.blocks[2].norm.bias[0] = 1
    refused("of this call, got one of another model", model=other)
    refused("of this call, got one of another data", data=tokens(seed=1))
    refused("of this call, got one of another data", data=tokens(2))
    refused("of this call, got one of another config", config=qo.Int4WeightOnly(64))
    refused("of this call, got one of another config", exclude=["head"])
    refused("of this call, got one of another settings", damping=0.1)
    refused("of this call, got one of another settings", order="layers")
    refused("of this call, got one of another settings", forward=lambda model, batch: model(*batch))
    stage = tmp_path / "mine" / "stage-0001.safetensors"
    stage.write_bytes(stage.read_bytes()[:-9])
    refused(r"expected .*stage-0001\.safetensors to be a whole file, got .*\. Delete it")
    (tmp_path / "mine" / "state.json").write_text("{")
    refused(r"expected .*state\.json to be JSON, got .*\. Delete the folder")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "file").touch()
    refused("expected checkpoint to be a new, an empty or its own folder, got .*theirs", folder="theirs")
    with pytest.raises(TypeError, match=r"expected batches that can be told .*, got one with a function that cannot be pickled"):
        qo.gptq_(Net(), [lambda: tokens()[0]], forward=lambda model, batch: model(*batch()), checkpoint=tmp_path / "new")
    with pytest.raises(NotADirectoryError, match="expected checkpoint to be a folder, got the file"):
        qo.gptq_(Net(), tokens(), checkpoint=tmp_path / "theirs" / "file")


# ---- what is refused ---------------------------------------------------------------------------------------------------------


def infinite():
    (batch, _), *rest = tokens()
    return [*rest, (batch, float("inf"))]


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        ([], {}, "expected calibration data, got no batch"),
        (None, {}, "expected data to be an iterable of batches, got one NoneType"),
        (torch.zeros(1), {}, r"got one Tensor\. Write \[batch\]"),
        ([0], {"forward": lambda model, batch: None}, "expected calibration data to reach a layer, got none that did"),
        ([(torch.zeros(2, 3),)], {}, None),  # the model's own words
        (infinite(), {}, "expected finite activations, got NaN or Inf at the input of layer 'blocks.0.out'|of layer 'blocks.1.a'"),
        (tokens(), {"block_size": 0}, "expected block_size >= 1, got 0"),
        (tokens(), {"damping": -1}, "expected damping >= 0 and below 10, got -1"),
        (tokens(), {"damping": float("nan")}, "expected damping >= 0 and below 10, got nan"),
        (tokens(), {"order": "layer"}, r"expected order to be one of \('blocks', 'layers', 'together'\), got 'layer'"),
        (tokens(), {"steps": 0}, "expected steps >= 1, got 0"),
        (tokens(), {"config": qo.Int8Static(num_steps=4)}, "expected num_steps=1, got 4 for layer 'stem'"),
        (tokens(), {"config": qo.Simulated(weight=qo.INT4)}, "expected config to be Int4WeightOnly, .*, got Simulated"),
        (tokens(), {"blocks": "layers"}, r"expected blocks to be names of modules, got 'layers'\. Containers here: \['blocks'\]"),
        (tokens(), {"include": ["mlp"]}, "expected the pattern 'mlp' to match"),
    ],
)
def test_refusals_leave_the_model_as_it_was(data, arguments, message):
    model = Net().train()
    with pytest.raises((ValueError, TypeError, RuntimeError), match=message):
        qo.gptq_(model, data, **arguments)
    assert same(model, Net())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())
    assert model.training


def test_group_sizes():
    """Those that are not allowed are refused by the config; a row that is shorter than a group is one."""
    for size in (0, 16, 48, 512, 64.0):
        with pytest.raises(ValueError, match="expected group_size 32, 64, 128, 256 or -1"):
            qo.Int4WeightOnly(size)
    model = Net()
    qo.gptq_(model, tokens(), qo.Int4WeightOnly(256))
    assert model.stem.weight_scale.shape == (32, 1)


def test_a_hessian_that_is_not_positive(monkeypatch):
    model = Net()
    monkeypatch.setattr(accuracy_layer, "inverse_factor", lambda *_: None)
    with pytest.raises(
        ValueError, match=r"expected the Hessian of layer 'stem' to be positive, got one that is not.*exclude the layer"
    ):
        qo.gptq_(model, tokens())


def test_nothing_to_convert():
    with pytest.warns(UserWarning, match="gptq_: expected at least one"):
        result = qo.gptq_(nn.Sequential(nn.Embedding(4, 4)), [torch.tensor([1])])
    assert result.converted == []
