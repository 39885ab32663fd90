"""Attention inside of ``simulated_products``: its arguments against a decomposition by hand, and models."""

import copy
import itertools
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from attention_models import Graphormer, ImageBind, Spy
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import quant_ops as qo

LOWEST = torch.finfo(torch.float32).min
BLOCKS = qo.MXFP8_E4M3.with_(block_size=4)


@pytest.fixture(autouse=True)
def _seeded(threads):
    threads(1)
    torch.manual_seed(0)


def by_hand(q, k, v, mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False, *, a, o):
    """Attention whose operands `a` rounds along a dimension, and whose results `o` rounds."""
    if enable_gqa:
        k, v = (x.repeat_interleave(q.shape[-3] // x.shape[-3], -3) for x in (k, v))
    scores = o(a(q, -1) @ a(k, -1).mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = scores + (torch.zeros(mask.shape).masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else mask)
    p = scores.softmax(-1).nan_to_num(0)  # rows without keys
    return o(a(F.dropout(p, dropout_p), -1) @ a(v, -2))


Q, K, V = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 7, 8), torch.randn(2, 4, 7, 6)
BOOLEAN = torch.rand(5, 7) > 0.4
BOOLEAN[2] = False  # a row without keys
CASES = {
    "plain": ((Q, K, V), {}),
    "boolean mask": ((Q, K, V), {"attn_mask": BOOLEAN}),
    "mask of infinities": ((Q, K, V), {"attn_mask": torch.zeros(2, 1, 5, 7).masked_fill(~BOOLEAN, -math.inf)}),
    "mask of the least float": ((Q, K, V), {"attn_mask": torch.zeros(2, 1, 1, 7).index_fill(-1, torch.tensor([6, 2]), LOWEST)}),
    "mask of -3.4e38": ((Q, K, V), {"attn_mask": torch.randn(4, 5, 7).index_fill(-1, torch.tensor([0]), -3.4e38)}),
    "causal": ((Q, K, V), {"is_causal": True}),
    "scale": ((Q, K, V), {"scale": 0.3}),
    "dropout": ((Q, K, V), {"dropout_p": 0.5}),
    "groups": ((Q, K[:, :2], V[:, :2]), {"enable_gqa": True, "attn_mask": BOOLEAN}),
    "other groups": ((Q, K[:, :2], V[:, :1]), {"enable_gqa": True, "is_causal": True}),
    "one head": ((Q[0, 0], K[0, 0], V[0, 0]), {}),
    "broadcast": ((Q[:1], K, V[:, :1]), {}),
    "one key": ((Q, K[..., :1, :], V[..., :1, :]), {}),
}


def attention(config, *args, **kwargs):
    torch.manual_seed(1)  # of dropout
    with qo.simulated_products(config):
        return F.scaled_dot_product_attention(*args, **kwargs)


@pytest.mark.parametrize("name", CASES)
def test_attention_is_decomposed(name):
    """By blocks for their dimensions, by a scale of the tensor, and without rounding against torch's own, in float64 too."""
    args, kwargs = CASES[name]
    other = {"mask" if key == "attn_mask" else key: value for key, value in kwargs.items()}
    for format, output in ((BLOCKS, BLOCKS), (qo.INT8, qo.E4M3), (qo.E2M1, None)):
        torch.manual_seed(1)
        want = by_hand(*args, **other, a=lambda x, dim: format.along(dim)(x), o=output or (lambda x: x))  # noqa: B023
        torch.testing.assert_close(
            attention(qo.Simulated(input=format, output=output), *args, **kwargs), want, rtol=1e-5, atol=1e-5
        )
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float64, 1e-14), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)):
        given = [x.to(dtype) for x in args]
        masked = {key: x.to(dtype) if torch.is_tensor(x) and x.is_floating_point() else x for key, x in kwargs.items()}
        spy, output = Spy(), Spy()
        got = attention(qo.Simulated(input=spy, output=output), *given, **masked)
        torch.manual_seed(1)
        with sdpa_kernel(SDPBackend.MATH):
            want = F.scaled_dot_product_attention(*given, **masked)
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        assert not spy.saw_masks()
        assert not output.saw_masks()
        assert [len(spy.seen), len(output.seen)] == [4, 2]


def test_gradients_of_attention():
    mask = torch.zeros(5, 7).masked_fill(~BOOLEAN, -math.inf)
    gradients = []
    for config in (None, qo.Simulated(input=Spy(), output=Spy(), backward=Spy())):
        leaves = [x.double().requires_grad_() for x in (Q, K[:, :2], V[:, :2])]
        if config is None:
            with sdpa_kernel(SDPBackend.MATH):
                y = F.scaled_dot_product_attention(*leaves, mask.double(), enable_gqa=True)
        else:
            y = attention(config, *leaves, mask.double(), enable_gqa=True)
        y.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    torch.testing.assert_close(gradients[1], gradients[0])
    assert config.backward.shapes == [(2, 4, 5, 6), (2, 4, 5, 7)]
    mask[2] = 0  # the reference by hand has no gradient of a row without keys
    rounded = [x.clone().requires_grad_() for x in (Q, K, V)]
    attention(qo.Simulated(input=qo.E4M3, backward=qo.E5M2), *rounded, attn_mask=mask).square().sum().backward()
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    by_hand(*leaves, mask, a=lambda x, dim: qo.E4M3(x), o=qo.with_gradient(None, qo.E5M2)).square().sum().backward()
    for got, want in zip(rounded, leaves, strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_autocast_gives_attention_its_dtype():
    with torch.autocast("cpu", torch.bfloat16):
        want = F.scaled_dot_product_attention(Q, K, V)
        got = attention(qo.Simulated(input=Spy()), Q, K, V)
    assert got.dtype == want.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"attn_mask": BOOLEAN, "is_causal": True}, ValueError, "expected no attn_mask where is_causal is set, got both"),
        ({"attn_mask": BOOLEAN.int()}, TypeError, "expected attn_mask to be boolean or floating, got torch.int32"),
        ({"query": Q.double()}, TypeError, "one floating dtype, got"),
        ({"query": Q[0, 0, 0]}, ValueError, "two dimensions at least"),
        ({"key": K[:, :3], "enable_gqa": True}, ValueError, "a multiple of those of key and value, got 4 and 3"),
        ({"query": Q[0, 0], "enable_gqa": True}, ValueError, "expected a dimension of heads"),
        ({"key": torch.nested.nested_tensor([K[0], K[1]])}, TypeError, "not nested.*Pad the sequences"),
    ],
)
def test_bad_arguments(kwargs, error, match):
    with pytest.raises(error, match=match):
        attention(qo.Simulated(input=qo.INT8), **{"query": Q, "key": K, "value": V, **kwargs})


# ---- multi-head attention ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bias_kv", "zero", "batch_first", "kdim"), itertools.product([False, True], [False, True], [False, True], [None, 4])
)
def test_multi_head_attention_computes_what_torch_does(bias_kv, zero, batch_first, kdim):
    module = nn.MultiheadAttention(8, 2, 0.0, True, bias_kv, zero, kdim, kdim, batch_first).eval()
    nn.init.normal_(module.in_proj_bias)
    x, y = torch.randn(3, 5, 8), torch.randn(3, 5, kdim or 8)
    batch, length = (3, 5) if batch_first else (5, 3)
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    masks = [None, future, torch.zeros(length, length).masked_fill(future, LOWEST), torch.randn(2 * batch, length, length)]
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, -1] = True
    calls = [(x, y, y), (x, y, y + 1), *([(x, x, x), (x, x, y)] if kdim is None else [])]
    numbers = [None, padding, torch.zeros(padding.shape).masked_fill(padding, -math.inf)]
    options = itertools.product((True, False), (True, False), range(4), range(3), (False, True))
    for operands, (need_weights, average, mask, pad, causal) in itertools.product(calls, options):
        kwargs = {"need_weights": need_weights, "average_attn_weights": average, "attn_mask": masks[mask], "is_causal": causal}
        if (causal and mask in (0, 3)) or (mask and pad and (mask == 1) != (pad == 1)):
            continue  # no causal mask, or masks of two dtypes
        spy, weight, output = Spy(), Spy(), Spy()
        with torch.no_grad():
            want = module(*operands, key_padding_mask=numbers[pad], **kwargs)
            with qo.simulated_products(qo.Simulated(input=spy, weight=weight, output=output)):
                got = module(*operands, key_padding_mask=numbers[pad], **kwargs)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        different = len({id(operand) for operand in operands})
        if batch_first and operands[1] is not operands[2]:
            different = 3  # the module transposes each
        assert len(spy.seen) == different + 4 + 1, "projections, attention and the last projection"
        assert len(weight.seen) == (2 if kdim is None else 4)
        assert len(output.seen) == 3 + 2 + 1
        assert not any(s.saw_masks() for s in (spy, weight, output))


def test_multi_head_attention_without_a_batch_and_with_static_keys():
    module = nn.MultiheadAttention(8, 2)
    x, config = torch.randn(5, 8), qo.Simulated(input=Spy(), output=Spy())
    want = module(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), key_padding_mask=torch.arange(5) > 3)
    with qo.simulated_products(config):
        got = module(x, x, x, attn_mask=torch.ones(5, 5, dtype=torch.bool).triu(1), key_padding_mask=torch.arange(5) > 3)
    torch.testing.assert_close(got, want)
    x = torch.randn(5, 3, 8)
    packed = (module.in_proj_weight, module.in_proj_bias, None, None, True, 0.0, module.out_proj.weight, None)
    static = {"static_k": torch.randn(6, 4, 4), "static_v": torch.randn(6, 4, 4)}
    want = F.multi_head_attention_forward(x, x, x, 8, 2, *packed, **static)
    with qo.simulated_products(config):
        got = F.multi_head_attention_forward(x, x, x, 8, 2, *packed, **static)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("packed", [True, False])
def test_multi_head_attention_by_hand(packed):
    module = nn.MultiheadAttention(8, 2, add_bias_kv=True, kdim=None if packed else 6)
    query, key = torch.randn(5, 3, 8), torch.randn(7, 3, 8 if packed else 6)
    value = key if packed else torch.randn(7, 3, 8)
    mask = torch.randn(5, 7)
    a, w, o = qo.INT8, qo.INT4, qo.E4M3
    weights = [module.in_proj_weight] if packed else [module.q_proj_weight, module.k_proj_weight, module.v_proj_weight]
    weights = [part for weight in weights for part in w(weight, axis=0).chunk(3 if packed else 1)]
    with torch.no_grad():
        operands = zip((query, key, value), weights, module.in_proj_bias.chunk(3), strict=True)
        q, k, v = (o(F.linear(a(x), weight, bias)) for x, weight, bias in operands)
        k, v = torch.cat([k, module.bias_k.expand(1, 3, 8)]), torch.cat([v, module.bias_v.expand(1, 3, 8)])
        q, k, v = (x.reshape(len(x), 3, 2, 4).permute(1, 2, 0, 3) for x in (q, k, v))
        y = by_hand(q, k, v, F.pad(mask, (0, 1)), a=lambda x, dim: a(x), o=o)
        out = module.out_proj
        want = o(F.linear(a(y.permute(2, 0, 1, 3).reshape(5, 3, 8)), w(out.weight, axis=0), out.bias))
        with qo.simulated_products(qo.Simulated(input=a, weight=w, output=o)):
            got = module(query, key, value, attn_mask=mask)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_fast_path_of_an_encoder_is_not_taken(mode):
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = getattr(nn.TransformerEncoder(layer, 2), mode)()
    x, padding = torch.randn(3, 5, 8), torch.arange(5).expand(3, 5) > torch.tensor([[2], [4], [4]])
    counts = []
    for simulate in (qo.simulated_products, lambda config: _during(encoder, config)):
        spy, weight, output = Spy(), Spy(), Spy()
        with torch.no_grad():
            want = encoder(x, src_key_padding_mask=padding)
            with simulate(qo.Simulated(input=spy, weight=weight, output=output)):
                got = encoder(x, src_key_padding_mask=padding)
        torch.testing.assert_close(got[~padding], want[~padding], rtol=1e-5, atol=1e-5)
        counts.append([len(s.seen) for s in (spy, weight, output)])
    attention, linear = 2, 2 * 2  # of 6 inputs, 2 weights and 6 outputs; of one each
    assert counts == [
        [attention * 6 + linear, attention * 2 + linear, attention * 6 + linear],
        [attention * 6, attention * 2, attention * 6],
    ]


class _during:
    def __init__(self, model, config):
        self.model, self.config = model, config

    def __enter__(self):
        self.handle = qo.simulate_products_(self.model, self.config)

    def __exit__(self, *exception):
        self.handle.remove()


# ---- models --------------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention by functions, with a weight of its own, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8) / 3)

    def mix(self, x):
        return torch.tanh(x @ self.weight @ x.mT @ x)

    def forward(self, x):
        return self.last(self.mix(self.first(x)))


class Checkpointed(Block):
    """The same with a checkpoint around what is no module, and one around a layer."""

    use_reentrant = False

    def forward(self, x):
        y = checkpoint(self.mix, self.first(x), use_reentrant=self.use_reentrant)
        return checkpoint(self.last, y, use_reentrant=self.use_reentrant)


CONFIG = qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.E4M3, backward=qo.E5M2)


def passes(model, x):
    """The result, and the gradients of the parameters and of x."""
    x = x.clone().requires_grad_()
    y = model(x)
    return y.detach(), torch.autograd.grad(y.square().sum(), [x, *model.parameters()]) if torch.is_grad_enabled() else None


def passes_backward(model, x):
    """The same by backward(), which reentrant checkpoints need."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.square().sum().backward()
    return y.detach(), [x.grad, *(p.grad for p in model.parameters())]


def test_the_products_of_a_model_whoever_calls_it():
    model, x = Block(), torch.randn(2, 5, 8)
    parent, plain = nn.Sequential(model, nn.Flatten()), passes(model, x)
    spy, weight, output = Spy(), Spy(), Spy()
    names = dict(model.named_modules()), list(model.state_dict()), type(model)
    handle = qo.simulate_products_(model, qo.Simulated(input=spy, weight=weight, output=output))
    parent(x)
    assert (len(spy.seen), len(weight.seen), len(output.seen)) == (1 + 2 + 2, 1, 3)  # the layers' products are their own
    assert (dict(model.named_modules()), list(model.state_dict())) == names[:2]
    assert isinstance(model, Block)
    assert (type(model).__name__, type(model).__module__) == (Block.__name__, Block.__module__)
    with pytest.raises(ValueError, match=r"simulated ones. Call remove\(\) first"):
        qo.simulate_products_(model, CONFIG)
    handle.remove()
    handle.remove()
    assert type(model) is names[2]
    torch.testing.assert_close(passes(model, x), plain, rtol=0, atol=0)
    assert len(spy.seen) == 5


def test_a_model_is_simulated_as_in_a_context():
    """Where its layers are replaced by what computes by ATen operators, as simulated layers do, and where they are not."""

    class Layer(nn.Linear):
        def forward(self, x):
            return torch.ops.aten.linear.default(x, self.weight, self.bias)

    model, x = Block(), torch.randn(2, 5, 8)
    other = copy.deepcopy(model)
    other.first.__class__ = other.last.__class__ = Layer
    with qo.simulated_products(CONFIG):
        want = passes(other, x)
    for each in (model, other):
        with _during(each, CONFIG):
            torch.testing.assert_close(passes(each, x), want, rtol=0, atol=0)


def test_copies_are_simulated_too():
    model, x = Block(), torch.randn(2, 5, 8)
    plain = model(x)
    handle = qo.simulate_products_(model, CONFIG)
    want = model(x)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    handle.remove()
    assert torch.equal(model(x), plain)
    for other in (copied, pickled):
        assert torch.equal(other(x), want)
        assert copied.first.weight is not model.first.weight
    fresh = Block()
    fresh.load_state_dict(copied.state_dict())
    assert torch.equal(fresh(x), plain)
    with torch.no_grad():
        copied.weight.zero_()
    assert not torch.equal(copied(x), want)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_call_that_fails_leaves_nothing_behind(error):
    class Failing(Block):
        def mix(self, x):
            raise error

    model, spy = Failing(), Spy()
    qo.simulate_products_(model, qo.Simulated(input=spy))
    with pytest.raises(error):
        model(torch.randn(2, 5, 8))
    torch.randn(2, 2) @ torch.randn(2, 2)
    assert not spy.seen


def test_of_nested_models_the_inner_counts():
    outer, inner = Spy(), Spy()
    model = nn.Sequential(Block(), Block())
    qo.simulate_products_(model[1], qo.Simulated(input=inner))
    qo.simulate_products_(model, qo.Simulated(input=outer))
    model(torch.randn(2, 5, 8))
    assert (len(outer.seen), len(inner.seen)) == (5, 5)


def test_hooks_and_another_forward_are_kept():
    model, seen, spy = Block(), [], Spy()
    model.register_forward_hook(lambda *given: seen.append(1))
    model.forward = lambda x: x @ x.mT
    qo.simulate_products_(model, qo.Simulated(input=spy))
    model(torch.randn(2, 5, 8))
    assert (len(seen), len(spy.seen)) == (1, 2)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_what_a_checkpoint_recomputes_is_simulated(use_reentrant):
    model, x = Checkpointed(), torch.randn(2, 5, 8)
    model.use_reentrant = use_reentrant
    plain = Block()
    plain.load_state_dict(model.state_dict())
    for simulate in (lambda each: _during(each, CONFIG), lambda each: qo.simulated_products(CONFIG)):
        with simulate(plain):
            want = passes_backward(plain, x)
        with simulate(model):
            got = passes_backward(model, x)
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    model.zero_grad()
    with qo.simulated_products(CONFIG):
        y = model(x)
    y.square().sum().backward()  # outside
    torch.testing.assert_close([p.grad for p in model.parameters()], list(want[1][1:]), rtol=0, atol=0)
    torch.testing.assert_close(passes_backward(model, x), passes_backward(plain, x), rtol=0, atol=0)  # without any


@pytest.mark.parametrize("kind", [Block, Checkpointed])
def test_a_simulated_model_is_compiled(kind):
    model, x = kind(), torch.randn(2, 5, 8)
    handle = qo.simulate_products_(model, CONFIG)
    want = passes(model, x)
    torch.testing.assert_close(passes(torch.compile(model, fullgraph=True, backend="aot_eager"), x), want)
    handle.remove()
    plain = passes(model, x)
    assert not torch.equal(plain[0], want[0])
    parts = nn.Sequential(model, nn.Identity())
    model.compile(backend="aot_eager")  # a part of what is simulated; with a graph break for a checkpoint
    torch.testing.assert_close(passes(parts, x), plain)
    with _during(parts, CONFIG):
        torch.testing.assert_close(passes(parts, x), want)
    torch.testing.assert_close(passes(parts, x), plain)


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_compiled_graph_is_simulated_once_however_it_is_run(backend):
    """Where a graph breaks, what is compiled runs in the mode, and calls torch's functions again."""

    class Breaking(Block):
        def forward(self, x):
            y = self.first(x)
            torch._dynamo.graph_break()
            return self.last(self.mix(y))

    model, x = Breaking(), torch.randn(2, 5, 8)
    config = qo.Simulated(input=lambda x: x * 2)
    with _during(model, config), torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    torch._dynamo.reset()
    with qo.simulated_products(config), torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))


def test_a_simulated_model_is_exported():
    model, x = Block(), torch.randn(2, 5, 8)
    plain = model(x)
    qo.simulate_products_(model, CONFIG)
    with torch.inference_mode():
        want = model(x)
    assert not torch.equal(want, plain)
    torch.testing.assert_close(torch.export.export(model, (x,), strict=False).module()(x), want)
    torch.testing.assert_close(torch.func.functional_call(model, dict(model.named_parameters()), (x,)), want)
    with pytest.raises(Exception, match=r"expected torch.export with strict=False") as error:
        torch.export.export(model, (x,), strict=True)
    assert "quant_ops" in str(error.value)


def test_a_layer_with_a_computed_weight_is_a_layer():
    model, spy = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))), Spy()
    qo.simulate_products_(model, qo.Simulated(input=spy))
    model(torch.randn(2, 8))
    assert not spy.seen


def test_the_encoder_is_compiled():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x = torch.randn(3, 5, 8)
    qo.simulate_products_(encoder, CONFIG)
    with torch.no_grad():
        want = encoder(x)
        got = torch.compile(encoder, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, want)
        assert torch.backends.mha.get_fastpath_enabled()
        with qo.simulated_products(CONFIG):  # Dynamo would take the fast path, and leaves the layer to Python instead
            torch.testing.assert_close(torch.compile(layer.eval(), backend="eager")(x), layer(x))


@pytest.mark.parametrize(
    ("kind", "functions", "layers"),
    # inputs, weights and results of a layer's attention; of ImageBind's two embeddings by two layers, and of its head
    [(Graphormer, (2 * 4, 0, 2 * 2), 2 * 6), (ImageBind, (4 * 6 + 2, 4 * 2, 4 * 6 + 1), 4 * 2)],
)
def test_models_of_other_kinds(kind, functions, layers):
    model, example = kind().eval(), kind.example()
    want = model(*example)
    for simulate, linear in ((lambda config: _during(model, config), 0), (qo.simulated_products, layers)):
        spy, weight, output = Spy(), Spy(), Spy()
        with simulate(qo.Simulated(input=spy, weight=weight, output=output)):
            got = model(*example)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not any(s.saw_masks() for s in (spy, weight, output))
        assert tuple(len(s.seen) for s in (spy, weight, output)) == tuple(count + linear for count in functions)
        with simulate(CONFIG):
            got = model(*example)
        assert 0 < (got - want).norm() < 0.5 * want.norm()
