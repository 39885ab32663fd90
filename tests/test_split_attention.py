"""split_attention_: torch's attention as four layers, its results, and what is quantized of it."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

import quant_ops as qo


def sqnr(expected, got):
    return 10 * torch.log10(expected.square().sum() / (expected - got).square().sum()).item()


def pair(**options):
    """torch's module with biases that are not 0, and the one that is made of it."""
    torch.manual_seed(0)
    module = nn.MultiheadAttention(24, 4, **options).eval().requires_grad_(False)
    for name, parameter in module.named_parameters():
        if "bias" in name:
            parameter.data.normal_()
    return module, qo.MultiheadAttention.from_float(module)


def masks(name, n, length, keys):
    hidden = torch.zeros(n, keys, dtype=torch.bool)
    hidden[1:, keys // 2 :] = True
    causal = torch.ones(length, keys, dtype=torch.bool).triu(1)
    floats = torch.randn(n * 4, length, keys)
    return {
        "none": {},
        "padding": {"key_padding_mask": hidden},
        "padding, float": {"key_padding_mask": torch.where(hidden, -math.inf, 0.5)},
        "causal": {"attn_mask": causal, "is_causal": True},
        "float of each head": {"attn_mask": floats},
        "both": {"attn_mask": causal, "key_padding_mask": hidden},
        "both, mixed": {"attn_mask": floats, "key_padding_mask": hidden},
    }[name]


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "other widths": {"kdim": 10, "vdim": 7, "batch_first": True},
    "appended": {"add_bias_kv": True, "add_zero_attn": True},
    "appended, batch_first": {"add_bias_kv": True, "batch_first": True},
}


@pytest.mark.parametrize("mask", ["none", "padding", "padding, float", "causal", "float of each head", "both", "both, mixed"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask")
def test_results_are_those_of_torch(options, mask):
    options = OPTIONS[options]
    module, split = pair(**options)
    n, length, keys = 3, 6, 8
    query = torch.randn(n, length, 24)
    key, value = torch.randn(n, keys, options.get("kdim", 24)), torch.randn(n, keys, options.get("vdim", 24))
    if not options.get("batch_first"):
        query, key, value = (x.transpose(0, 1) for x in (query, key, value))
    given = masks(mask, n, length, keys)
    for average in (True, False):
        expected = module(query, key, value, **given, average_attn_weights=average)
        for got, exact in zip(split(query, key, value, **given, average_attn_weights=average), expected, strict=True):
            torch.testing.assert_close(got, exact, atol=2e-6, rtol=1e-5)
    got, none = split(query, key, value, **given, need_weights=False)
    assert none is None
    torch.testing.assert_close(got, expected[0], atol=2e-6, rtol=1e-5)


def test_without_a_batch_and_in_other_dtypes():
    module, split = pair()
    x = torch.randn(5, 24)
    hidden = torch.tensor([False, False, True, False, True])
    for got, exact in zip(split(x, x, x, hidden), module(x, x, x, hidden), strict=True):
        torch.testing.assert_close(got, exact)
    module, split = module.double(), split.double()
    torch.testing.assert_close(split(x.double(), x.double(), x.double())[0], module(x.double(), x.double(), x.double())[0])


def test_gradients_and_dropout():
    module, _ = pair(dropout=0.5)
    module.requires_grad_(True)
    split = qo.MultiheadAttention.from_float(module)
    x = torch.randn(5, 2, 24)
    for attention in (module, split):
        attention(x, x, x, need_weights=False)[0].square().sum().backward()
    weights = torch.cat([layer.weight.grad for layer in (split.q_proj, split.k_proj, split.v_proj)])
    torch.testing.assert_close(weights, module.in_proj_weight.grad, atol=1e-5, rtol=1e-4)
    assert all(parameter.requires_grad for parameter in split.parameters())
    assert not torch.equal(split.train()(x, x, x)[0], split(x, x, x)[0])


class Encoder(nn.Module):
    """torch's encoder and decoder, and an attention over another sequence."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, batch_first=True), 1)
        self.cross = self.same = nn.MultiheadAttention(32, 2, batch_first=True, kdim=20, vdim=20)

    def forward(self, x, other, hidden=None):
        x = self.encoder(x, src_key_padding_mask=hidden)
        x = x + self.cross(x, other, other)[0] + self.same(x, other, other, need_weights=False)[0]
        return self.decoder(x, x)


def encoder():
    torch.manual_seed(0)
    model = Encoder().eval().requires_grad_(False)
    x, other = torch.randn(3, 10, 32), torch.randn(3, 7, 20)
    hidden = torch.zeros(3, 10, dtype=torch.bool)
    hidden[1, 6:] = True
    return model, (x, other, hidden)


def test_models_of_torch():
    model, inputs = encoder()
    x, _, hidden = inputs
    split = copy.deepcopy(model)
    result = qo.split_attention_(split)
    names = [*(f"encoder.layers.{i}.self_attn" for i in range(2)), "decoder.layers.0.self_attn", "decoder.layers.0.multihead_attn"]
    assert result.split == [*names, "cross", "same"]
    assert str(result).startswith("6 split, 0 skipped\n  split    encoder.layers.0.self_attn\n")
    assert split.cross is split.same
    fused, got = (m.encoder(x, src_key_padding_mask=hidden)[~hidden] for m in (model, split))  # torch's gives 0 for hidden tokens
    torch.testing.assert_close(got, fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(split(*inputs[:2]), model(*inputs[:2]), atol=1e-5, rtol=1e-4)
    assert not qo.split_attention_(split).split


@pytest.mark.parametrize("attention", ["float", "int8"])
def test_everything_is_quantized(attention, tmp_path):
    model, inputs = encoder()
    expected = model(*inputs[:2])
    qo.split_attention_(model, attention=attention)
    result = qo.quantize_(model)
    assert not result.skipped
    assert result.share == 1
    assert sqnr(expected, model(*inputs[:2])) > (30 if attention == "float" else 28)
    model(*inputs)
    fresh, _ = encoder()
    qo.split_attention_(fresh, attention=attention)
    qo.save(model, tmp_path / "model.safetensors")
    qo.load_(fresh, tmp_path / "model.safetensors")
    assert torch.equal(fresh(*inputs), model(*inputs))
    assert torch.equal(copy.deepcopy(model)(*inputs), model(*inputs))


def test_calibrated_weight_only_and_simulated():
    model, inputs = encoder()
    expected = model(*inputs[:2])
    qo.split_attention_(model)
    static, weights, simulated = copy.deepcopy(model), copy.deepcopy(model), copy.deepcopy(model)
    qo.prepare_(static, qo.Int8Static())
    qo.calibrate(static, [inputs[:2]])
    assert not qo.convert_(static).skipped
    assert sqnr(expected, static(*inputs[:2])) > 25
    qo.quantize_(weights, qo.Int4WeightOnly(group_size=-1))
    assert isinstance(weights.cross.q_proj, qo.WeightOnlyLinear)
    assert sqnr(expected, weights(*inputs[:2])) > 12
    qo.quantize_(simulated, qo.Simulated(weight=qo.INT8, input=qo.INT8))
    assert sqnr(expected, simulated(*inputs[:2])) > 25


def test_export_and_compile():
    split = pair(batch_first=True)[1]
    qo.quantize_(split)
    x = torch.randn(2, 5, 24)
    expected = split(x, x, x, need_weights=False)[0]
    exported = torch.export.export(split, (x, x, x), {"need_weights": False}).module()
    assert torch.equal(exported(x, x, x, need_weights=False)[0], expected)
    compiled = torch.compile(split, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, x, x, need_weights=False)[0], expected)


def test_what_stays_as_it_is():
    class Own(nn.MultiheadAttention):
        pass

    hooked = nn.MultiheadAttention(8, 2)
    hooked.register_forward_hook(lambda *_: None)
    model = nn.ModuleDict({"own": Own(8, 2), "hooked": hooked, "plain": nn.MultiheadAttention(8, 2)})
    result = qo.split_attention_(model)
    assert result.split == ["plain"]
    assert [name for name, _ in result.skipped] == ["own", "hooked"]
    assert "subclass" in result.skipped[0][1]
    assert "hooks" in result.skipped[1][1]
    assert "model itself" in qo.split_attention_(nn.MultiheadAttention(8, 2)).skipped[0][1]


def test_refusals():
    split = pair()[1]
    x = torch.randn(3, 2, 24)
    for call, error, text in (
        (lambda: split(x, x, x, is_causal=True), ValueError, "attn_mask together with is_causal"),
        (lambda: qo.MultiheadAttention(24, 5), ValueError, "num_heads to divide embed_dim, got 5 and 24"),
        (lambda: qo.MultiheadAttention(24, 4, attention="int4"), ValueError, "attention in .'float', 'int8'., got 'int4'"),
        (lambda: qo.split_attention_(split, attention="int4"), ValueError, "attention in .'float', 'int8'., got 'int4'"),
        (lambda: qo.MultiheadAttention.from_float(nn.Linear(2, 2)), TypeError, "an nn.MultiheadAttention, got Linear"),
    ):
        with pytest.raises(error, match=rf"^quant_ops\..*expected {text}"):
            call()


def test_made_from_nothing():
    for bias, tokens in itertools.product((True, False), (True, False)):
        made = qo.MultiheadAttention(24, 4, bias=bias, add_bias_kv=tokens, batch_first=True)
        x = torch.randn(2, 5, 24)
        y, weights = made(x, x, x)
        assert y.shape == x.shape
        assert weights.shape == (2, 5, 5 + tokens)
        assert (made.q_proj.bias is not None) == bias
