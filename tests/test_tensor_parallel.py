"""quant_ops.distributed in two processes (gloo, on the CPU): parts of layers against the whole ones, plans, files, whole models."""

import pytest
import torch
from processes import in_two_processes

import quant_ops as qo

PRELUDE = """
import copy
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from quant_ops.distributed import ColwiseParallel, RowwiseParallel, ShardedLayer, parallelize_module

torch.manual_seed(0)


def sharded(layer, style):
    return parallelize_module(copy.deepcopy(layer), mesh, style)


"""


@pytest.mark.parametrize("magnitude", [1.0, 1e-38, 1e36])
def test_the_epilogue_of_added_sums_is_that_of_the_operator(magnitude):
    """One rounding of product and bias, also where results are subnormal or overflow, and where the sum lies next to a tie."""
    pytest.importorskip("torch.distributed.tensor")
    from quant_ops.distributed.sums import finished, fused_multiply_add
    from quant_ops.ops.int8 import ACTIVATIONS

    torch.manual_seed(0)
    x, weight = torch.randint(-128, 128, (60, 50), dtype=torch.int8), torch.randint(-127, 128, (70, 50), dtype=torch.int8)
    scale, bias, one = torch.rand(70) * magnitude, torch.randn(70) * 1e4 * magnitude, torch.tensor(1.0)
    sums = qo.int8_linear(x, weight, scale, None, one, out_dtype=torch.int32)
    for b in (None, bias, -(sums[0] * scale)):
        codes = {"out_scale": torch.tensor(300.0 * magnitude), "out_zero_point": torch.tensor(-7)}
        for options in ({}, {"relu": True}, {"activation": "relu6"}, codes):
            expected = qo.int8_linear(x, weight, scale, b, one, **options)
            if "activation" in options:
                options = {"activation": ACTIVATIONS.index("relu6") + 1}
            assert torch.equal(finished(sums, one, scale, b, torch.float32, **options), expected)
        assert torch.equal(
            finished(sums, one, scale, b, torch.float16), qo.int8_linear(x, weight, scale, b, one, out_dtype=torch.float16)
        )
    # 1 + 2^-24 lies halfway between two floats; what is 2^-60 beyond it decides
    a, tie = torch.tensor([2.0**-30, -(2.0**-30)]), torch.tensor([1 + 2.0**-23, 1 + 2.0**-23])
    assert fused_multiply_add(tie, torch.tensor(2.0**-24), torch.tensor(1.0)).tolist() == [1 + 2.0**-23] * 2
    assert fused_multiply_add(a, a.abs(), torch.tensor([2.0**-24]).double() + 1).tolist() == [1 + 2.0**-23, 1.0]


# int8: the whole layer's bits both ways. Weight-only: column-wise the same bits, row-wise the documented bounds.
LINEAR_LAYERS = """
def linear_layers():
    gathered, whole_input = {"output_layouts": Replicate()}, {"input_layouts": Replicate()}
    linear, no_bias = nn.Linear(128, 62), nn.Linear(128, 62, bias=False)
    static = {"input_scale": 0.03, "input_zero_point": 4}
    layers = [
        qo.QuantLinear.from_float(linear, asymmetric=True),
        qo.QuantLinear.from_float(no_bias, activation="silu"),
        qo.QuantLinear.from_float(linear, **static, output_scale=0.1, output_zero_point=3, relu=True),
        qo.QuantLinear.from_float(linear, weight_bits=4, input_multiplier=torch.rand(128)),
        qo.QuantLinear.from_float(linear, **static, input_multiplier=torch.rand(128)),
        qo.QuantLinear.from_float(linear, input_scale=torch.tensor([0.02, 0.03]), input_zero_point=torch.tensor([3, -5])),
    ]
    with qo.timestep(nn.Sequential(layers[-1]), 1):
        for layer in layers:
            for dtype in (torch.float32, torch.bfloat16):
                for x in (torch.randn(3, 5, 128, dtype=dtype), torch.randn(128, dtype=dtype), torch.randn(0, 128, dtype=dtype)):
                    expected = layer(x)
                    got = sharded(layer, ColwiseParallel(**gathered))(x)
                    assert got.dtype == expected.dtype and torch.equal(got, expected), layer
                    assert torch.equal(sharded(layer, ColwiseParallel())(x), expected.chunk(2, -1)[rank])
                    got = sharded(layer, RowwiseParallel())(x.chunk(2, -1)[rank])
                    assert got.dtype == expected.dtype and torch.equal(got, expected), layer
    codes = qo.quant_tensor_forward(torch.randn(6, 128), torch.tensor(0.03), None, -128, 127, simulate=False)
    assert torch.equal(sharded(layers[2], RowwiseParallel())(codes.chunk(2, -1)[rank]), layers[2](codes))

    layer = layers[0]
    for shape, even in (((3, 5, 128), False), ((2, 4, 128), True)):
        x = torch.randn(shape)
        expected = layer(x)
        for at in (Shard(0), Shard(1), Shard(-1), Replicate()):
            there = distribute_tensor(x, mesh, [at])
            for way in (ColwiseParallel, RowwiseParallel):
                style = way(input_layouts=Replicate(), output_layouts=at, use_local_output=False)
                for given in (x, there):
                    got = sharded(layer, style)(given)
                    assert isinstance(got, DTensor) and got.placements == (Shard(2) if at == Shard(-1) else at,)
                    assert got.shape == expected.shape and torch.equal(got.full_tensor(), expected)
                if even:  # torch takes parts of unequal sizes only as DTensors
                    got = sharded(layer, way(input_layouts=at, output_layouts=at))(there.to_local())
                    assert torch.equal(got, distribute_tensor(expected, mesh, [at]).to_local())

    eps = torch.finfo(torch.float32).eps
    for settings in (
        {"bits": 8},
        {"bits": 4, "group_size": 32, "asymmetric": True},
        {"bits": 4, "group_size": 64, "zero_point": "float", "asymmetric": True, "input_multiplier": torch.rand(128)},
        {"bits": 4, "group_size": 32, "dynamic": True, "asymmetric": True, "asymmetric_input": True},
        {"bits": 8, "group_size": 128, "dynamic": True},
    ):
        layer = qo.WeightOnlyLinear.from_float(linear, **settings)
        w, b, m = layer.weight.double(), layer.bias.double(), settings.get("input_multiplier", torch.ones(128))
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(3, 5, 128, dtype=dtype)
            expected = layer(x)
            assert torch.equal(sharded(layer, ColwiseParallel(**gathered))(x), expected), settings
            got = sharded(layer, RowwiseParallel(**whole_input))(x)
            assert got.dtype == dtype
            xm = x.float().mul(m).double()
            bound = 3 * eps * (xm.abs() @ w.abs().T + b.abs())
            if layer.dynamic:
                for part in (slice(0, 64), slice(64, 128)):
                    scale = qo.quantize_rows(x.float()[..., part], layer.asymmetric_input)[1].double()
                    bound += 0.5001 * scale * w[:, part].abs().sum(1)
            exact = xm @ w.T + b
            bound += torch.finfo(dtype).eps * exact.abs()
            assert ((got.double() - exact).abs() <= bound).all(), settings

    # no gradient passes a row-wise part in silence
    x = torch.randn(2, 64, requires_grad=True)
    for layer in (layers[0], layer):
        y = sharded(layer, RowwiseParallel())(x)
        refused(RuntimeError, "expected no gradient to be asked for", y.sum().backward)


linear_layers()
"""


# Convolutions by output channels, by groups and by input channels; embeddings by columns and by rows.
CONVOLUTIONS_AND_EMBEDDINGS = """
def convolutions_and_embeddings():
    image, sound = torch.randn(3, 8, 7, 6), torch.randn(3, 8, 9)
    last = image.contiguous(memory_format=torch.channels_last)
    cases = [
        (qo.QuantConv2d, nn.Conv2d(8, 12, 3, padding=1), {"asymmetric": True}, [image, image[0], last.bfloat16()]),
        (qo.QuantConv2d, nn.Conv2d(8, 12, 3, 2, padding="valid", bias=False), {"relu": True}, [last]),
        (qo.QuantConv2d, nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), {"input_scale": 0.03}, [image]),
        (qo.QuantConv2d, nn.Conv2d(8, 8, 3, padding=1, groups=8), {"asymmetric": True}, [image, last, image[0]]),
        (qo.QuantConv2d, nn.Conv2d(8, 12, 3, groups=2), {"input_scale": 0.03, "input_zero_point": 5}, [image]),
        (qo.QuantConv1d, nn.Conv1d(8, 12, 3, padding=1), {"asymmetric": True}, [sound, sound[0]]),
        (qo.QuantConv1d, nn.Conv1d(8, 8, 3, groups=4), {}, [sound.half()]),
        (qo.QuantConv1d, nn.Conv1d(8, 12, 3), {"input_scale": 0.03, "output_scale": 0.1, "relu": True}, [sound]),
    ]
    for kind, float_layer, settings, inputs in cases:
        layer = kind.from_float(float_layer, **settings)
        channel = -3 if kind is qo.QuantConv2d else -2
        if inputs[0] is last:
            layer.to(memory_format=torch.channels_last)
        for x in inputs:
            expected, mine = layer(x), x.chunk(2, channel)[rank]
            assert torch.equal(sharded(layer, ColwiseParallel())(x), expected.chunk(2, channel)[rank])
            by_input = ColwiseParallel(input_layouts=Shard(channel), output_layouts=Replicate())
            got = sharded(layer, by_input)(mine)
            assert got.dtype == expected.dtype and torch.equal(got, expected), layer
            if float_layer.groups > 1:
                who = "RowwiseParallel of a " + kind.__name__
                refused(ValueError, who + ": expected a row-wise convolution without groups", sharded, layer, RowwiseParallel())
                continue
            got = sharded(layer, RowwiseParallel())(mine)
            assert got.dtype == expected.dtype and torch.equal(got, expected), layer
            style = RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(channel), use_local_output=False)
            got = sharded(layer, style)(x)
            assert got.placements == (Shard(x.dim() + channel),) and torch.equal(got.full_tensor(), expected)
            got = sharded(layer, RowwiseParallel(output_layouts=Shard(0)))(mine)  # 3 samples, or 12 channels
            assert torch.equal(got, distribute_tensor(expected, mesh, [Shard(0)]).to_local())

    table, indices = nn.Embedding(50, 64, padding_idx=49), torch.randint(50, (3, 7))
    for settings in ({"bits": 8}, {"bits": 4, "group_size": 32, "asymmetric": True}):
        for dtype in (torch.float32, torch.bfloat16):
            layer = qo.WeightOnlyEmbedding.from_float(table, **settings).to(dtype)
            expected = layer(indices)
            assert torch.equal(sharded(layer, ColwiseParallel())(indices), expected.chunk(2, -1)[rank])
            rows = sharded(layer, RowwiseParallel())
            got = rows(indices)
            assert got.dtype == dtype and torch.equal(got, expected) and rows.padding_idx == 49
            got = sharded(layer, RowwiseParallel(output_layouts=Shard(1)))(indices)
            assert torch.equal(got, distribute_tensor(expected, mesh, [Shard(1)]).to_local())
            refused(IndexError, "50", rows, torch.tensor([3, 50]))
            refused(IndexError, "-1", rows, torch.tensor([3, -1]))


convolutions_and_embeddings()
"""


# A refused plan changes nothing; state_dicts are those of the whole model, in torch.distributed.checkpoint too.
PLANS_AND_CHECKPOINTS = """
def plans_and_checkpoints():
    import torch.distributed.checkpoint as checkpoint
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
    from torch.distributed.tensor import parallel

    def make(seed):
        torch.manual_seed(seed)
        sizes = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.Linear(64, 64), nn.Linear(64, 32)]
        model = nn.Sequential(nn.Embedding(32, 64), *sizes, nn.Linear(32, 10)).eval()
        int4 = qo.Int4WeightOnly(group_size=32)
        by_name = {"0": int4, "1": qo.Int8Dynamic(), "3": qo.Int8Dynamic(), "4": int4, "5": qo.Int8WeightOnly()}
        qo.quantize_(model, by_name)
        return model

    # torch's styles, a word of transformers, a pattern, and a layer that stayed float
    plan = {"0": "embedding_rowwise", "1": parallel.ColwiseParallel(), "3": parallel.RowwiseParallel(), "4": ColwiseParallel()}
    plan |= {"[5]": RowwiseParallel(), "6": ColwiseParallel(output_layouts=Replicate())}
    model, other, x = make(0), make(1), torch.randint(32, (3, 5))
    y = model(x)
    parts = parallelize_module(make(rank), mesh, plan)  # all get the values of the first process
    expected = parts(x)
    torch.testing.assert_close(expected, y)
    assert [isinstance(layer, ShardedLayer) for layer in parts] == [True, True, False, True, True, True, False]
    assert "colwise part" in repr(parts[1]) and parts[1].out_features == 64 and isinstance(parts[1], qo.QuantLinear)
    one_by_one = make(0)  # torch's own function takes our styles
    ours = {"0": RowwiseParallel(), "[14]": ColwiseParallel(), "[35]": RowwiseParallel()}
    assert torch.equal(parallel.parallelize_module(one_by_one, mesh, ours)(x), make(0)[6](parts[:6](x)))

    for name, tensor in model.state_dict().items():
        assert torch.equal(full(parts.state_dict()[name]), tensor), name
    for state in (parts.state_dict(), model.state_dict(), parallelize_module(copy.deepcopy(model), mesh, plan).state_dict()):
        for assign in (False, True):
            loaded = parallelize_module(make(1), mesh, plan)
            loaded[:6].load_state_dict({k: v for k, v in state.items() if k[0] != "6"}, assign=assign)
            assert torch.equal(loaded[:6](x), parts[:6](x))
    bad = {**model.state_dict(), "1.qweight": torch.zeros(100, 64, dtype=torch.int8)}
    refused(RuntimeError, "size mismatch for 1.qweight", parts.load_state_dict, bad)
    assert torch.equal(parts(x), expected)

    checkpoint.save(get_model_state_dict(parts), checkpoint_id=f"{folder}/checkpoint")
    again = parallelize_module(make(1), mesh, plan)
    state = get_model_state_dict(again)
    checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint")
    set_model_state_dict(again, state)
    assert torch.equal(again(x), expected)
    whole = make(1)  # cut anew: the same file in a model that is not sharded
    state = whole.state_dict()
    checkpoint.load(state, checkpoint_id=f"{folder}/checkpoint")
    whole.load_state_dict(state)
    assert torch.equal(whole(x), y)
    state = get_model_state_dict(parts, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    assert rank or all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.device("meta"):
        empty = make(0)
    empty = parallelize_module(empty[:6], mesh, {k: v for k, v in plan.items() if k != "6"}).to_empty(device="cpu")
    empty.load_state_dict(parts[:6].state_dict())
    assert torch.equal(empty(x), parts[:6](x))
    assert torch.equal(copy.deepcopy(parts[:6])(x), parts[:6](x))

    # an embedding and its head go on sharing one packed weight
    embedding = qo.WeightOnlyEmbedding.from_float(nn.Embedding(32, 64))
    head = nn.Linear(64, 32, bias=False)
    tied = nn.Sequential(embedding, qo.WeightOnlyLinear.from_float(head, shared_with=embedding))
    y = tied(x)
    parallelize_module(tied, mesh, {"0": RowwiseParallel(), "1": ColwiseParallel(output_layouts=Replicate())})
    assert tied[0].shares_weight(tied[1]) and torch.equal(tied(x), y)

    for saved, name in ((parts, "parts"), (model, "whole")):
        qo.save(saved, f"{folder}/{name}")
    dist.barrier()
    assert open(f"{folder}/parts", "rb").read() == open(f"{folder}/whole", "rb").read()
    refused(RuntimeError, "expected a whole layer to dequantize, got one of 2 parts", parts[1].dequantize)
    refused(ValueError, "layer '1' that is sharded already", parallelize_module, parts, mesh, {"1": ColwiseParallel()})

    def refuses(kind, sentence, layer, style, name="1"):
        fine = qo.QuantLinear.from_float(nn.Linear(8, 8))
        model = nn.Sequential(fine, layer)
        refused(kind, sentence, parallelize_module, model, mesh, {"0": ColwiseParallel(), name: style})
        assert type(model[0]) is qo.QuantLinear

    column, row = ColwiseParallel(), RowwiseParallel()
    odd, int4 = qo.QuantLinear.from_float(nn.Linear(7, 9)), {"bits": 4, "group_size": 64}
    split = qo.WeightOnlyLinear.from_float(nn.Linear(192, 8), **int4)
    bytes_ = qo.WeightOnlyLinear.from_float(nn.Linear(14, 8), bits=4)
    grouped = qo.QuantConv2d.from_float(nn.Conv2d(9, 9, 3, groups=3))
    many = "to be a multiple of the 2 processes of the mesh, got "
    style = "quant_ops.ColwiseParallel of layer '1': expected "
    refuses(ValueError, style + "out_features " + many + "9. Use a row-wise plan for this layer", odd, column)
    refuses(ValueError, "expected in_features " + many + "7. Use a column-wise plan for this layer", odd, row)
    refuses(ValueError, "expected groups " + many + "3. Use no style, which leaves the layer whole", grouped, column)
    refuses(ValueError, "multiples of group_size 64, so that no group is split, got 96 columns a process. Quantize", split, row)
    refuses(ValueError, "an even number of columns, two in a byte, got 7 columns a process", bytes_, row)
    refuses(ValueError, "num_embeddings " + many + "3", qo.WeightOnlyEmbedding.from_float(nn.Embedding(3, 8)), row)
    refuses(TypeError, "expected an nn.Linear, an nn.Embedding or a quantized layer, got a ReLU", nn.ReLU(), column)
    refuses(ValueError, "expected one of colwise, colwise_gather_output", odd, "columns")
    refuses(TypeError, "expected a style for '1', got int", odd, 3)


plans_and_checkpoints()
"""


# A Llama generates the tokens of one process by transformers' plan; FSDP2, a pipeline and torch.compile.
MODELS = """
def models():
    from torch.distributed.fsdp import MixedPrecisionPolicy
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe
    from transformers import LlamaConfig, LlamaForCausalLM

    def make():
        torch.manual_seed(0)
        layers = [nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 24), nn.Linear(24, 8), nn.Linear(8, 4)]
        model = nn.Sequential(*layers).eval()
        qo.quantize_(model, {"0": qo.Int8Dynamic(), "2": qo.Int4WeightOnly(group_size=32), "3": qo.Int8Dynamic()})
        return model

    # FSDP2 shards what stayed float; quantized layers have buffers alone, whole in every process
    model, whole, x = make(), make(), torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert [isinstance(p, DTensor) for p in model.parameters()] == [True] * 2
    with torch.no_grad():
        assert torch.equal(model(x), whole(x))
    assert all(not isinstance(b, DTensor) for b in model.buffers())
    assert all(torch.equal(full(a), b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))
    qo.save(model, f"{folder}/{rank}.safetensors")
    qo.load_(loaded := make(), f"{folder}/{rank}.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(x), whole(x))
    half = make()
    fully_shard(half, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=torch.bfloat16))
    with torch.no_grad():
        assert torch.equal(half(x), whole.bfloat16()(x.bfloat16()))

    # a pipeline of two stages
    whole = make()
    stage = PipelineStage(whole[:2] if rank == 0 else whole[2:], rank, 2, torch.device("cpu"))
    with torch.no_grad():
        schedule = ScheduleGPipe(stage, n_microbatches=2)
        result = schedule.step(x) if rank == 0 else schedule.step()
        assert rank == 0 or torch.equal(result, torch.cat([whole(part) for part in x.chunk(2)]))

    plan = {"0": ColwiseParallel(), "2": RowwiseParallel(), "3": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model := make(), mesh, plan)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x))

    sizes = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    config = LlamaConfig(vocab_size=128, num_hidden_layers=2, tie_word_embeddings=False, **sizes)
    torch.manual_seed(0)
    llama, prompt = LlamaForCausalLM(config).eval(), torch.randint(128, (2, 7))

    def tokens(model):
        return model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)

    four = {"*embed*": qo.Int8WeightOnly(), "*": qo.Int8DynamicInt4Weight(group_size=32)}
    for how, exact in ((qo.Int8Dynamic(), True), (four, False)):
        whole = copy.deepcopy(llama)
        qo.quantize_(whole, how)
        parts = parallelize_module(copy.deepcopy(whole), mesh, whole.tp_plan)
        with torch.no_grad():
            got, expected = parts(prompt).logits, whole(prompt).logits
            assert torch.equal(got, expected) if exact else F.cosine_similarity(got, expected, -1).min() > 0.99
            assert torch.equal(tokens(parts), tokens(whole))


models()
"""


def test_in_two_processes(tmp_path):
    """All sections in one pair of processes, since starting them takes most of the time."""
    in_two_processes(tmp_path, PRELUDE + LINEAR_LAYERS + CONVOLUTIONS_AND_EMBEDDINGS + PLANS_AND_CHECKPOINTS + MODELS)
