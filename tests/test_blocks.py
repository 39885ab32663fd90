"""A model as a chain of blocks: which they are, and that each can be run alone with what it gets in the model."""

import language_model
import pytest
import torch
from torch import nn

from quant_ops.accuracy.blocks import NoChain, batches_of, capture, find_blocks


class Cached(nn.Module):
    """A block that changes what it is given, as one that keeps keys and values does, and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, *, hidden, cache, scale):
        cache["seen"].append(hidden * 1)
        return hidden + scale * self.fc(sum(cache["seen"])), cache


class Net(nn.Module):
    def __init__(self, block=Cached):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.blocks = nn.ModuleList(block() for _ in range(3))
        self.pair = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))

    def forward(self, x, scale=2.0):
        x, cache = self.stem(x), {"seen": []}
        for block in self.blocks:
            x = block(hidden=x, cache=cache, scale=scale)[0]
        return self.head(self.pair(x))


def test_blocks_are_found():
    assert find_blocks("op", Net()) == ["blocks.0", "blocks.1", "blocks.2"]
    assert find_blocks("op", Net(), "pair") == ["pair.0", "pair.1"]
    assert find_blocks("op", Net(), ["stem", "head"]) == ["stem", "head"]
    assert find_blocks("op", Net(), []) == []
    assert find_blocks("op", nn.Sequential(nn.Linear(2, 2), nn.ReLU())) == []
    assert find_blocks("op", nn.Sequential(*(nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(3)))) == ["0", "1", "2"]
    experts = nn.Module()
    experts.layers = nn.ModuleList(nn.ModuleList(nn.Linear(2, 2) for _ in range(5)) for _ in range(2))
    assert find_blocks("op", experts) == ["layers.0", "layers.1"]  # not the experts within one, though they are more
    with pytest.raises(ValueError, match=r"expected blocks to be names of modules, got 'layers'\. Containers here: \['blocks',"):
        find_blocks("op", Net(), "layers")
    with pytest.raises(ValueError, match="expected 'stem' to contain blocks, got a Linear without"):
        find_blocks("op", Net(), "stem")
    with pytest.raises(TypeError, match="names of modules, got a Linear"):
        find_blocks("op", Net(), [nn.Linear(1, 1)])


def test_a_chain_is_the_model():
    model, batches = language_model.trained(), language_model.calibration(2, 4)
    chain = capture(model, find_blocks("op", model), batches)
    assert chain.names == [f"layers.{i}" for i in range(language_model.LAYERS)]
    while chain.name:
        chain.advance()
    with torch.no_grad():
        for hidden, batch in zip(chain.hidden, batches, strict=True):
            assert torch.equal(model.lm_head(model.norm(hidden)), model(batch))


@pytest.mark.parametrize(
    ("name", "norm", "sizes"),
    [
        ("Llama", "model.norm", {"num_key_value_heads": 2}),
        ("Gemma2", "model.norm", {"num_key_value_heads": 2, "head_dim": 8, "sliding_window": 4}),  # masks that differ by layer
        ("GPT2", "transformer.ln_f", {"n_embd": 32, "n_layer": 3, "n_head": 4, "bos_token_id": 1, "eos_token_id": 2}),
    ],
)
def test_a_chain_is_a_model_of_transformers(name, norm, sizes):
    """Its blocks add to a cache of keys and values, which each run of one gets as it was; batches are padded."""
    transformers = pytest.importorskip("transformers")
    common = (
        {} if name == "GPT2" else {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    )
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(vocab_size=50, **common, **sizes))
    batches = [{"input_ids": torch.randint(50, (3, 9)), "attention_mask": torch.ones(3, 9).tril(6).long()} for _ in range(2)]
    expected = []
    handle = model.eval().get_submodule(norm).register_forward_pre_hook(lambda _, args: expected.append(args[0]))
    chain = capture(model, find_blocks("op", model), batches)
    handle.remove()
    for _ in range(3):
        list(chain.outputs())  # which leaves nothing behind
        chain.advance()
    assert len(chain.hidden) == 2
    assert all(map(torch.equal, chain.hidden, expected))


def test_blocks_see_what_earlier_ones_have_become():
    model, batches = Net().eval(), [torch.randn(3, 4), {"x": torch.randn(2, 4), "scale": 0.5}]
    chain = capture(model, find_blocks("op", model), batches)
    assert next(chain.calls())[1].keys() == {"hidden", "cache", "scale"}
    before = [output[0] for output in chain.outputs()]
    assert all(map(torch.equal, before, (output[0] for output in chain.outputs())))  # a call does not see what the last one left
    with torch.no_grad():
        model.blocks[0].fc.weight.zero_()
        model.blocks[0].fc.bias.zero_()
    given = chain.hidden
    chain.advance()
    assert all(map(torch.equal, given, chain.hidden))
    (args, kwargs), _ = chain.calls()
    assert args == ()
    assert kwargs["scale"] == 2.0
    assert kwargs["hidden"] is chain.hidden[0]
    assert torch.equal(kwargs["cache"]["seen"][0], given[0])


def test_every_call_of_a_batch_counts():
    model = Net().eval()
    chain = capture(model, find_blocks("op", model), [torch.randn(3, 4)], lambda net, x: net(net(x)))
    assert len(chain.hidden) == 2


def test_mixed_precision_is_repeated():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()

    def forward(net, x):
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    chain = capture(model, find_blocks("op", model), [torch.randn(3, 4)], forward)
    chain.advance()
    assert chain.hidden[0].dtype == torch.bfloat16


class Broken(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        make = (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 4))) if kind == "writes" else lambda: nn.Linear(4, 4)
        self.blocks = nn.ModuleList([make(), make(), nn.Bilinear(4, 4, 4)][: 2 + (kind == "skip")])

    def forward(self, x):
        a, b = self.blocks[:2]
        if self.kind == "skip":
            return self.blocks[2](b(y := a(x)), y)
        if self.kind == "between":
            return b(a(x).relu())
        if self.kind == "order":
            return a(b(x))
        return a(x) if self.kind == "missing" else b(a(x))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("skip", "'blocks.2' gets what an earlier block gives, not the one before it alone"),
        ("between", "'blocks.1' does not get what 'blocks.0' gives"),
        ("order", "'blocks.1' is called where 'blocks.0' was expected"),
        ("missing", "'blocks.1' was not called"),
        ("writes", "'blocks.0' writes into its input"),
    ],
)
def test_what_is_no_chain(kind, message):
    model = Broken(kind).train()
    names = find_blocks("op", model, "blocks")
    with pytest.raises(NoChain, match=message):
        capture(model, names, [torch.randn(2, 4)])
    hooks = [*model.blocks[0]._forward_pre_hooks, *model.blocks[1]._forward_hooks]
    assert hooks == []
    assert model.training


def test_batches():
    model = nn.Linear(2, 2)
    assert len(batches_of("op", model, iter([torch.zeros(1, 2)] * 3), steps=2)) == 2
    with pytest.raises(ValueError, match="op: expected calibration data, got no batch"):
        batches_of("op", model, [])
    with pytest.raises(TypeError, match=r"op: expected data to be an iterable of batches, got one Tensor\. Write \[batch\]\."):
        batches_of("op", model, torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"op: expected data to be an iterable of batches, got one NoneType$"):
        batches_of("op", model, None)
    with pytest.raises(ValueError, match="op: expected steps >= 1, got 0"):
        batches_of("op", model, [torch.zeros(1, 2)], steps=0)
