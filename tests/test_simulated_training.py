"""Training simulated layers: accuracy on digits, gradients against a float64 reference, several processes, torch.compile."""

import copy
import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from processes import in_two_processes
from torch import nn

import quant_ops as qo

SCALED_E4M3, SCALED_E2M1 = qo.E4M3.with_(scaled=True), qo.E2M1.with_(scaled=True)


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)  # the models are small: threads would mostly wait for each other


# ---- accuracy ------------------------------------------------------------------------------------------------------------


class Digits:
    """The data of the example qat_digits, and its network with BatchNorms, trained in float."""

    def __init__(self):
        examples = Path(__file__).parent.parent / "examples"
        sys.path.insert(0, str(examples))
        try:
            spec = importlib.util.spec_from_file_location("qat_digits", examples / "qat_digits.py")
            example = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(example)
        finally:
            sys.path.remove(str(examples))
        self._example = example
        torch.manual_seed(0)
        self.x, self.y, self.test_x, self.test_y = example.digits()
        self.model = example.network()
        example.train(self.model, self.x, self.y, epochs=12)
        self.accuracy = self.accuracy_of(self.model)

    def train(self, model, epochs):
        self._example.train(model, self.x, self.y, epochs)

    def accuracy_of(self, model):
        with torch.no_grad():
            return self._example.accuracy(model.eval(), self.test_x, self.test_y)

    def simulated(self, config, model=None):
        model = copy.deepcopy(model or self.model)
        qo.quantize_(model, config)
        return model


@pytest.fixture(scope="module")
def digits():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield Digits()
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "config",
    [
        qo.Simulated(qo.E4M3, qo.E4M3, qo.E4M3),
        qo.Simulated(input=qo.INT8, weight=qo.INT8, output=qo.FP16),
        qo.Simulated(input=qo.E4M3, weight=qo.E4M3, backward=qo.E5M2),
        qo.Simulated(input=qo.MXFP8_E4M3, weight=qo.MXFP8_E4M3, backward=qo.MXFP8_E5M2),
    ],
    ids=["E4M3", "INT8, INT8, FP16", "gradients in E5M2", "gradients in MXFP8_E5M2"],
)
def test_training_in_8_bits_keeps_the_accuracy(digits, config):
    model = digits.simulated(config)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    digits.train(model, epochs=6)
    assert digits.accuracy_of(model) >= digits.accuracy - 1
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, start[name])]
    assert moved == list(start)  # parameters, and the statistics of the BatchNorms


def test_training_recovers_what_4_bit_weights_lose(digits):
    """Per tensor, where neighbouring channels have ranges of 1, 1/2 and 1/4. The BatchNorms make up for that in float."""
    model = copy.deepcopy(digits.model)
    for layer, norm in zip(model, [*model][1:], strict=False):
        if isinstance(norm, nn.BatchNorm2d):
            factors = 0.5 ** (torch.arange(norm.num_features) % 3)
            with torch.no_grad():
                layer.weight.mul_(factors.view(-1, 1, 1, 1))
                norm.running_mean.mul_(factors)
                norm.running_var.mul_(factors.square())
    assert digits.accuracy_of(model) >= digits.accuracy - 0.5
    simulated = digits.simulated(qo.Simulated(weight=qo.INT4, weight_per="tensor"), model)
    assert digits.accuracy_of(simulated) < digits.accuracy - 5
    digits.train(simulated, epochs=12)
    assert digits.accuracy_of(simulated) >= digits.accuracy - 1
    weight = simulated[0].weight
    assert len(qo.INT4(weight).unique()) <= 15 < len(weight.unique())


# ---- gradients -----------------------------------------------------------------------------------------------------------


def inside(format, x, amax):
    """Where the gradient passes, by docs/numerics.md; and how far the values are from the edges of that range."""
    edge = (format.qmax + 0.5) / format.qmax if isinstance(format, qo.IntFormat) else 1.0
    ratio = x.detach().abs().double() / (amax * edge)
    return ratio <= 1, (ratio - 1).abs().min()


@pytest.mark.parametrize(
    ("input", "weight", "output", "backward"),
    [
        (SCALED_E4M3, qo.INT4, qo.E5M2.with_(scaled=True), qo.E5M2),
        (qo.INT8, SCALED_E2M1, qo.INT8, qo.INT8),
        (qo.INT8, qo.INT8, None, None),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_gradients_are_those_of_the_formulas(kind, input, weight, output, backward):
    """Straight through within each format's range and 0 outside: through the output's, then the input's and the weight's."""
    if kind == "linear":
        layer, x = nn.Linear(24, 10), torch.randn(6, 24)
        product = lambda x, w, b: x @ w.T + b  # noqa: E731
    else:
        layer, x = nn.Conv2d(8, 6, 3, stride=2, padding=1, groups=2), torch.randn(2, 8, 7, 6)
        product = lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 2)  # noqa: E731
    shape = (-1,) + (1,) * (layer.weight.dim() - 1)
    amax = {
        "input": torch.tensor(1.3),
        "weight": 0.8 * layer.weight.detach().abs().flatten(1).amax(1),
        "output": torch.tensor(0.55),
    }
    for name, value in amax.items():  # calibrated, so that all three clip
        layer.register_buffer(f"amax_{name}", value)
    model = nn.Sequential(layer)
    qo.quantize_(model, qo.Simulated(input, weight, output, backward=backward))
    x.requires_grad_()
    y = model(x)
    grad = torch.randn(y.shape)
    y.backward(grad)

    exact = {
        "input": input(x.detach(), amax=amax["input"]).double(),
        "weight": weight(layer.weight.detach(), amax=amax["weight"], axis=0).double(),
        "bias": layer.bias.detach().double(),
    }
    for value in exact.values():
        value.requires_grad_()
    pre = product(*exact.values())
    masks = {"input": inside(input, x, amax["input"]), "weight": inside(weight, layer.weight, amax["weight"].view(shape))}
    g = (grad if backward is None else backward(grad)).double()
    if output is not None:
        masks["output"] = inside(output, pre, amax["output"])
        g = g * masks["output"][0]
        expected = output(pre.detach().float(), amax=amax["output"])
        assert (y == expected).double().mean() > 0.95  # the product in float32 may fall on the other side of a tie
    pre.backward(g)
    assert all(0 < mask.double().mean() < 1 and margin > 1e-5 for mask, margin in masks.values())
    tight = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(x.grad.double(), exact["input"].grad * masks["input"][0], **tight)
    torch.testing.assert_close(model[0].weight.grad.double(), exact["weight"].grad * masks["weight"][0], **tight)
    torch.testing.assert_close(model[0].bias.grad.double(), exact["bias"].grad, **tight)


# ---- torch.compile and several processes ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        qo.Simulated(qo.E4M3, qo.E4M3, qo.E4M3, backward=qo.E5M2),
        qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.FP16, input_per="row", weight_per=8),
    ],
    ids=["E4M3", "integers"],
)
def test_a_compiled_training_step_is_that_of_eager(config):
    torch._dynamo.reset()
    model = nn.Sequential(
        nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4)
    )
    qo.quantize_(model, config)
    other = copy.deepcopy(model)
    x, y = torch.randn(4, 8, 4, 4), torch.randint(4, (4,))

    def step(model):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    losses = [step(model), step(torch.compile(other, fullgraph=True, backend="aot_eager"))]
    assert torch.equal(*losses)
    for (name, expected), got in zip(model.named_parameters(), other.parameters(), strict=True):
        assert expected.grad.abs().sum() > 0
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-5, atol=1e-7, msg=name)


def test_two_processes_train_one_model(tmp_path):
    """DistributedDataParallel: after each step both have the same parameters; without scales of the data, those of one process."""
    in_two_processes(
        tmp_path,
        """
        def make(config, *norm):
            torch.manual_seed(0)
            model = nn.Sequential(nn.Linear(6, 8), *norm, nn.ReLU(), nn.Linear(8, 3))
            qo.quantize_(model, config)
            return model

        def train(model, part):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            for x, y in steps:
                optimizer.zero_grad()
                F.mse_loss(model(x[part]), y[part]).backward()
                optimizer.step()

        torch.manual_seed(1)
        steps = [(torch.randn(8, 6), torch.randn(8, 3)) for _ in range(5)]
        half = slice(4 * rank, 4 * rank + 4)
        for config, norm in (
            (qo.Simulated(qo.E4M3, qo.E4M3, qo.E4M3), ()),
            (qo.Simulated(qo.INT8, qo.INT4, qo.FP16, backward=qo.E5M2), (nn.BatchNorm1d(8),)),
        ):
            one, two = make(config, *norm), make(config, *norm)
            start = [parameter.clone() for parameter in two.parameters()]
            train(nn.parallel.DistributedDataParallel(two), half)
            for got, before in zip(two.parameters(), start):
                others = [torch.zeros_like(got) for _ in range(2)]
                dist.all_gather(others, got.detach())
                assert torch.equal(*others), config
                assert not torch.equal(got, before)
            if not norm:
                train(one, slice(None))
                for expected, got in zip(one.parameters(), two.parameters()):
                    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)
            with torch.no_grad():  # no weight of before the last step is kept
                x = steps[0][0]
                for layer in two.eval():
                    x = layer(x)
                two[0].weight.zero_()
                assert torch.equal(two[0](steps[0][0]), two[0](torch.zeros(8, 6)))
        """,
    )
