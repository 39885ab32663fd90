"""LoRA of peft around quantized layers: trains, saves and loads as peft does, and leaves the base weights alone."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo

peft = pytest.importorskip("peft")

from quant_ops.integrations.peft import QuantizedLora  # noqa: E402


@pytest.fixture(autouse=True)
def _one_thread(threads):
    threads(1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


def _network():
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(32, 8))


def _lora(**settings):
    return peft.LoraConfig(target_modules=["up", "down"], r=4, **settings)


X, Y = torch.randn(64, 32, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 8


def _trained(model, steps=30):
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(X).float(), Y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


CONFIGS = [qo.Int8Dynamic(backward=True), qo.Int4WeightOnly(group_size=32, backward=True), qo.Int8DynamicInt4Weight(backward=True)]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: type(config).__name__)
def test_adapters_train_save_and_load(config, tmp_path, recwarn):
    torch.manual_seed(3)
    expected = _trained(peft.get_peft_model(_network(), _lora()))
    base = _network()
    qo.quantize_(base, config)
    before, alone = copy.deepcopy(base.state_dict()), base(X)
    torch.manual_seed(3)
    model = peft.get_peft_model(base, _lora())
    assert not [str(w.message) for w in recwarn if "Unsupported layer" in str(w.message)]
    assert torch.equal(model(X), alone)  # lora_B is zeros
    assert sum(isinstance(module, QuantizedLora) for module in model.modules()) == 4
    assert all("lora_" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    losses = _trained(model)
    assert losses[-1] < 0.8 * losses[0]
    assert abs(losses[-1] - expected[-1]) < 0.15 * (expected[0] - expected[-1])
    result = model(X)
    with model.disable_adapter():
        assert torch.equal(model(X), alone)

    model.save_pretrained(tmp_path)
    fresh = _network()
    qo.quantize_(fresh, type(config)(**{**vars(config), "backward": False}))  # which is enough to run an adapter
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path)
    assert torch.equal(loaded(X), result)
    with pytest.raises(ValueError, match=r"^quant_ops\.integrations\.peft: expected layers with backward=True, got a "):
        peft.PeftModel.from_pretrained(copy.deepcopy(fresh), tmp_path, is_trainable=True)

    with pytest.raises(ValueError, match=r"^quant_ops\.integrations\.peft: expected no merge into a quantized layer"):
        model.merge_and_unload()
    assert torch.equal(model(X), result)
    assert torch.equal(model.unload()(X), alone)
    assert all(torch.equal(value, before[key]) for key, value in base.state_dict().items())


def test_several_adapters_and_what_is_refused():
    base = _network()
    qo.quantize_(base, qo.Int8Dynamic(backward=True))
    model = peft.get_peft_model(base, _lora())
    model.add_adapter("second", _lora(lora_alpha=32, init_lora_weights="gaussian"))
    model.set_adapter("second")
    _trained(model, 3)
    assert not torch.equal(model(X), (model.set_adapter("default"), model(X))[1])
    assert repr(model.base_model.model[0].up).startswith("quant_ops.QuantizedLora(")
    for settings, match in [
        ({"use_dora": True}, r"expected plain LoRA of a quantized layer, got: .*use_dora"),
        ({"init_lora_weights": "pissa"}, r"expected init_lora_weights in .*, got 'pissa', which changes the base weight"),
    ]:
        with pytest.raises(ValueError, match=rf"^quant_ops\.integrations\.peft: {match}"):
            peft.get_peft_model(copy.deepcopy(base), _lora(**settings))
    fused = nn.Sequential(qo.QuantLinear.from_float(nn.Linear(8, 8), relu=True, backward=True))
    with pytest.raises(ValueError, match="expected a layer without a fused ReLU, got a QuantLinear"):
        peft.get_peft_model(fused, peft.LoraConfig(target_modules=["0"]))
    image = nn.Sequential(qo.QuantConv2d.from_float(nn.Conv2d(3, 4, 3), backward=True))
    with pytest.raises(ValueError, match="expected linear layers as targets, got a QuantConv2d"):
        peft.get_peft_model(image, peft.LoraConfig(target_modules=["0"]))
    assert isinstance(peft.get_peft_model(_network(), _lora()).base_model.model[0].up, peft.tuners.lora.Linear)
