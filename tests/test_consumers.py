"""Smoothing changes no output of a float model: what a scale is folded into, what forbids that, and which layers are left alone."""

import copy
import ctypes

import pytest
import torch
import torch.nn.functional as F
from smoothing_models import (
    Experts,
    Function,
    GemmaNorm,
    GPT2Block,
    LlamaBlock,
    LlamaNorm,
    ParallelBlock,
    randomize_,
)
from torch import nn

import quant_ops as qo

SIZE = 32


def data(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 5, SIZE, generator=generator) for _ in range(2)]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def smoothed(model, alpha=0.5, **filters):
    """The result of smoothing, after a check that the model computes what it did and holds as many values."""
    model, x = randomize_(model), torch.randn(3, 5, SIZE, generator=torch.Generator().manual_seed(1))
    size = sum(parameter.numel() for parameter in model.parameters())
    modes = [module.training for module in model.modules()]
    with torch.no_grad():
        expected = model(x)
        result = qo.smoothquant_(model, data(), None, alpha=alpha, **filters)
        got = model(x)
    assert type(got) is type(expected)
    for a, b in zip(*((y if isinstance(y, tuple) else (y,)) for y in (got, expected)), strict=True):
        assert (a - b).abs().max() < 3e-6 * b.abs().max()
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    assert modes == [module.training for module in model.modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    return result


def encoder(norm_first):
    return nn.TransformerEncoderLayer(SIZE, 4, 64, batch_first=True, norm_first=norm_first)


LLAMA = {"norm1": ["attention.q", "attention.k", "attention.v"], "norm2": ["mlp.gate", "mlp.up"]}
FOLDED = {  # model, what is folded into what, and the layers with a multiplier
    "llama": (LlamaBlock, LLAMA, ["attention.o", "mlp.down"]),
    "torch's rmsnorm": (lambda: LlamaBlock(norm=nn.RMSNorm), LLAMA, ["attention.o", "mlp.down"]),
    "layernorm": (lambda: LlamaBlock(norm=nn.LayerNorm), LLAMA, ["attention.o", "mlp.down"]),
    "no bias": (lambda: LlamaBlock(norm=lambda n: nn.LayerNorm(n, bias=False)), LLAMA, ["attention.o", "mlp.down"]),
    "gemma": (lambda: LlamaBlock(norm=GemmaNorm), LLAMA, ["attention.o", "mlp.down"]),
    "no affine": (
        lambda: LlamaBlock(norm=lambda n: nn.LayerNorm(n, elementwise_affine=False)),
        {},
        ["attention.q", "attention.k", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down"],
    ),
    "parallel": (
        ParallelBlock,
        {"norm": ["attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up"]},
        ["attention.o", "mlp.down"],
    ),
    "gpt2": (GPT2Block, {"ln_1": ["c_attn"], "ln_2": ["c_fc"]}, ["c_proj", "c_out"]),
    "norm first": (lambda: encoder(True), {"norm2": ["linear1"]}, ["linear2"]),
    "norm last": (lambda: encoder(False), {}, ["linear1", "linear2"]),  # the residual reads the norm's output
    "encoder": (
        lambda: nn.TransformerEncoder(encoder(False), 2),
        {},
        [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)],
    ),
    "chain": (
        lambda: nn.Sequential(nn.Linear(SIZE, 48), nn.Dropout(), nn.Linear(48, 16), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)),
        {"0": ["2"], "2": ["3"]},
        ["0", "5"],
    ),
    "batchnorm": (
        lambda: nn.Sequential(nn.Flatten(0, 1), nn.BatchNorm1d(SIZE), nn.Linear(SIZE, 4)),
        {"1": ["2"]},
        [],
    ),
}


@pytest.mark.parametrize("case", FOLDED)
def test_what_is_folded(case):
    make, folded, multiplied = FOLDED[case]
    result = smoothed(make())
    assert dict(result.folded) == folded
    assert [name for names, _ in result.multiplied for name in names] == multiplied
    assert result.scales.keys() == {*multiplied, *(name for names in folded.values() for name in names)}


def norm_and(forward, **modules):
    return Function(forward, norm=nn.LayerNorm(SIZE), a=nn.Linear(SIZE, SIZE), b=nn.Linear(SIZE, SIZE), **modules)


def keep(self, x):
    self.kept = self.norm(x)
    return self.a(self.kept)


def twice(self, x):
    return self.a(self.norm(x)) + self.a(self.other(x))


def switch(self, x):
    h = self.norm(x)
    return self.b(h) if x.mean() > 1e3 else self.a(h)


class Kernel(nn.Module):
    """Reads its input past torch's operators, as a kernel of Triton does."""

    def forward(self, x):
        read = ctypes.c_float.from_address(x.data_ptr()).value
        return torch.full((1,), read)


CHANNELS = torch.arange(SIZE).flip(0)
REFUSED = {  # the norm's output is used in other ways, or its reader in other places
    "residual": (lambda self, x: (h := self.norm(x)) + self.a(h), "uses it in add.Tensor"),
    "returned": (lambda self, x: (self.a(h := self.norm(x)), h), "the model returns it"),
    "kept": (keep, "something keeps it after the call"),
    "written": (lambda self, x: self.a(self.norm(x).mul_(2.0)), "uses it in mul_.Tensor"),
    "functional": (lambda self, x: (self.a(h := self.norm(x)), F.linear(h, self.b.weight))[0], "uses it in"),
    "permuted": (lambda self, x: self.a(self.norm(x)[..., CHANNELS]) + self.b(self.norm(x)), "uses it in index.Tensor"),
    "reshaped": (lambda self, x: self.a(self.norm(x).transpose(1, 2).reshape(-1, SIZE)), "computed, by no module"),
    "relu": (lambda self, x: self.a(self.norm(x).relu_()), "uses it in relu_"),
    "elsewhere": (lambda self, x: self.a(self.norm(x)) * self.norm.weight, "reads its parameters"),
    "unseen": (lambda self, x: self.a(h := self.norm(x)) + self.kernel(h), "is called with it, and is not seen to use it"),
    "not taken": (switch, "'b', which no data has reached, may read"),
    "twice": (twice, "reads the outputs of several modules"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_keeps_a_scale_from_being_folded(case):
    forward, reason = REFUSED[case]
    result = smoothed(norm_and(forward, other=nn.LayerNorm(SIZE), kernel=Kernel()))
    assert not result.folded
    assert reason in " ".join(why for _, why in result.multiplied)


SEEN_AS_ONE = {
    "views": lambda self, x: self.a(self.norm(x).flatten(0, 1)).view_as(x) + self.b(self.norm(x)[None])[0],
    "rows": lambda self, x: self.a(self.norm(x)[:, -1:]) + self.b(self.norm(x).transpose(0, 1).contiguous()).transpose(0, 1),
    "indexed": lambda self, x: self.a(self.norm(x)[x.sum(-1) > -1e3]).view_as(x) + self.b(self.norm(x)[torch.arange(len(x))]),
    "identity": lambda self, x: self.a(F.dropout(self.norm(x), 0.5, self.training)) + self.b(self.norm(x).float()),
    "shapes": lambda self, x: torch.zeros_like(h := self.norm(x)) + self.a(h) + self.b(h),
}


@pytest.mark.parametrize("case", SEEN_AS_ONE)
def test_views_and_copies_are_the_tensor(case):
    result = smoothed(norm_and(SEEN_AS_ONE[case]))
    assert result.folded == [("norm", ["a", "b"])]


def test_layers_that_are_left_alone():
    def forward(self, x):
        return F.linear(self.tied(h := self.norm(x)), self.read.weight) + self.a(h) + self.read(x) + self.twin(x)

    def linear():
        return nn.Linear(SIZE, SIZE)

    model = norm_and(forward, tied=linear(), twin=linear(), read=linear())
    model.twin.weight = model.tied.weight
    result = smoothed(model)
    why = dict(result.skipped)
    assert why["tied"] == "its weight is tied to that of 'twin'"
    assert why["twin"] == "its weight is tied to that of 'tied'"
    assert why["read"] == "something other than the layer itself reads its weight"
    assert why["b"] == "no calibration data has reached it"
    (names, reason) = result.multiplied[0]
    assert names == ["a"]
    assert "'tied', which stays as it was, reads the output" in reason

    result = smoothed(LlamaBlock(), exclude=["attention.v"])  # it reads the output of norm1, and is to stay as it is
    assert result.folded == [("norm2", ["mlp.gate", "mlp.up"])]
    assert ["attention.q", "attention.k"] in [names for names, _ in result.multiplied]

    model = LlamaBlock()
    result = smoothed(model, alpha={"mlp.*": 0.8, "*.o": None, "*": 0.3})
    assert result.alphas["mlp.down"] == 0.8
    assert result.alphas["attention.q"] == 0.3
    assert dict(result.skipped)["attention.o"] == "its alpha is None"
    again = qo.smoothquant_(model, data(), None)
    assert "it has an input_multiplier already" in dict(again.skipped).values()


def test_experts():
    model = Experts()
    model.used = 2
    result = smoothed(model)
    assert not result.folded
    assert dict(result.skipped) == {"experts.2": "no calibration data has reached it"}
    assert "'experts.2', which no data has reached, may read" in result.multiplied[0][1]
    result = smoothed(Experts())
    assert result.folded == [("norm", ["router", "experts.0", "experts.1", "experts.2"])]


def test_a_shared_layer_and_shared_norm():
    model = Function(lambda self, x: self.two(self.one(x)), one=LlamaBlock(), two=LlamaBlock())
    model.two.mlp = model.one.mlp  # one MLP behind two norms
    result = smoothed(model)
    assert result.folded == [(f"{name}.norm1", [f"{name}.attention.{layer}" for layer in "qkv"]) for name in ("one", "two")]
    assert isinstance(model.one.mlp.gate, qo.ScaledLinear)
    assert model.two.mlp.gate is model.one.mlp.gate

    result = smoothed(nn.Sequential(*[LlamaBlock()] * 2))  # the whole block twice
    assert [name for name, _ in result.folded] == ["0.norm1", "0.norm2"]


def test_low_precision():
    """What the dtype cannot hold is not folded: 1 + weight in bfloat16 when the sum becomes small."""
    model = randomize_(LlamaBlock(norm=GemmaNorm))
    with torch.no_grad():
        for layer in (model.mlp.gate, model.mlp.up):
            layer.weight[:, 5] *= 1e-5  # so that the scale is large
    model.bfloat16()
    x = [batch.bfloat16() for batch in data()]
    expected = copy.deepcopy(model).float()(x[0].float()).detach()
    plain = (model(x[0]) - expected).norm()
    result = qo.smoothquant_(model, x, None)
    assert [name for name, _ in result.folded] == ["norm1"]
    assert (["mlp.gate", "mlp.up"], "torch.bfloat16 cannot hold the weight of 'norm2' divided by the scale") in result.multiplied
    assert (model(x[0]) - expected).norm() < 1.3 * plain

    model = nn.Sequential(LlamaNorm(SIZE), nn.Linear(SIZE, SIZE)).half()
    with torch.no_grad():
        model[1].weight[:, 3] = 3e-4
        model[1].weight[0, 3] = 2e4  # times 1 / sqrt(2e4), and the norm's times its inverse
    result = qo.smoothquant_(model, [batch.half() for batch in data()], None)
    assert result.folded == [("0", ["1"])]


def test_a_compiled_model():
    model = torch.compile(randomize_(LlamaBlock()), backend="eager")
    x = data()[0]
    expected = model(x).detach()
    result = qo.smoothquant_(model, data(), None)
    assert [name for name, _ in result.folded] == ["_orig_mod.norm1", "_orig_mod.norm2"]
    assert (model(x) - expected).abs().max() < 3e-6 * expected.abs().max()


def test_inference_mode_and_frozen_parameters():
    with torch.inference_mode():
        made = randomize_(LlamaBlock())
    for model in (made, randomize_(LlamaBlock()).requires_grad_(False)):
        with torch.inference_mode():
            expected = model(data()[0])
            qo.smoothquant_(model, data(), None)
        assert not any(parameter.requires_grad for parameter in model.parameters()) or model is made
        assert (model(data()[0]) - expected).abs().max() < 3e-6 * expected.abs().max()


SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "vocab_size": 50}
GPT2 = {"n_embd": 32, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 16}
TRANSFORMERS = {  # settings, and how many layers are folded into norms, have a multiplier, or are tied
    "LlamaForCausalLM": (SMALL, 6, 2, 0),
    "GemmaForCausalLM": ({**SMALL, "head_dim": 8, "num_key_value_heads": 1}, 5, 2, 1),
    "Qwen3ForCausalLM": ({**SMALL, "head_dim": 8, "num_key_value_heads": 2}, 6, 2, 0),
    "PhiForCausalLM": (SMALL, 5, 2, 0),
    "GPT2LMHeadModel": (GPT2, 2, 2, 1),
    "BertForMaskedLM": (SMALL, 1, 6, 1),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_models_of_transformers(name):
    transformers = pytest.importorskip("transformers")
    settings, folded, multiplied, tied = TRANSFORMERS[name]
    kind = getattr(transformers, name)
    model = randomize_(kind(kind.config_class(**settings)))
    batches = [{"input_ids": torch.randint(50, (2, 9))} for _ in range(2)]
    with torch.no_grad():
        expected = model(**batches[0]).logits
        result = qo.smoothquant_(model, batches, None)
        assert (model(**batches[0]).logits - expected).abs().max() < 3e-6 * expected.abs().max()
    assert sum(len(names) for _, names in result.folded) == folded
    assert sum(len(names) for names, _ in result.multiplied) == multiplied
    assert sum("is tied to" in reason for _, reason in result.skipped) == tied


def test_an_interrupted_run_changes_nothing():
    model = randomize_(LlamaBlock()).train()
    before = copy.deepcopy(model.state_dict())
    calls = []

    def forward(model, batch):
        calls.append(model(batch))
        if len(calls) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        qo.smoothquant_(model, data(), forward=forward)
    for bad in (
        {"data": []},
        {"alpha": 1.5},
        {"alpha": {"*.gate": 0.2, "*": 0.4}},
        {"alpha": {"typo": 0.2}},
        {"steps": 0},
        {"include": ["nothing"]},
    ):
        with pytest.raises(ValueError, match=r"quant_ops\.smoothquant_: expected"):
            qo.smoothquant_(model, **({"data": data()} | bad))
    with pytest.raises(TypeError, match=r"Write \[batch\]"):
        qo.smoothquant_(model, data()[0])
    with pytest.raises(ValueError, match="data that can be read twice"):
        qo.smoothquant_(model, iter(data()), qo.Int8Static(observer="mse"))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
