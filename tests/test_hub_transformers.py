"""Models of transformers that are quantized while they are loaded, or in memory, and come back with the same bits."""

import copy
import functools
import importlib
import json
import pickle
import sys
import types

import pytest
import torch
from processes import python
from torch import nn

import quant_ops as qo

transformers = pytest.importorskip("transformers", minversion="5")
pytest.importorskip("accelerate")

from quant_ops.integrations.transformers import QuantOpsConfig, attach  # noqa: E402

SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(1, 13)[None]
IMAGES = torch.linspace(-2, 2, 3 * 32 * 32).sin().reshape(1, 3, 32, 32)
GROUPS = qo.Int4WeightOnly(group_size=32)
MIXED = {"model.embed_tokens": qo.Int8WeightOnly(), "lm_head": qo.Int8WeightOnly(), "*mlp*": GROUPS, "*": qo.Int8Dynamic()}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def llama(tied=True):
    config = transformers.LlamaConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied, max_position_embeddings=64)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=96, n_embd=64, n_layer=1, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2)
    return transformers.GPT2LMHeadModel(config)


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4)
    )


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SMALL | {"num_hidden_layers": 1}))


def mixtral():
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(**SMALL | {"num_hidden_layers": 1}, num_key_value_heads=2, num_local_experts=4)
    )


def resnet():
    config = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=4)
    return transformers.ResNetForImageClassification(config)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=96, d_model=64, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=96, decoder_ffn_dim=96, num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


INPUTS = {
    t5: {"input_ids": IDS, "decoder_input_ids": IDS[:, :5]},
    whisper: {"input_features": IMAGES.flatten()[: 16 * 40].reshape(1, 16, 40), "decoder_input_ids": IDS[:, :5]},
    resnet: {"pixel_values": IMAGES},
}


def inputs_of(make):
    return INPUTS.get(make, {"input_ids": IDS})


@functools.cache
def float_model(make):
    torch.manual_seed(3)
    return make().eval()


def fresh(make):
    return copy.deepcopy(float_model(make))


def logits(model, inputs=None):
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the float Llama in several shards."""
    path = tmp_path_factory.mktemp("llama")
    float_model(llama).save_pretrained(path, max_shard_size="100KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def loaded(folder, config=None, **kwargs):
    kwargs |= {} if config is None else {"quantization_config": config}
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)


# ---- from_pretrained of a float checkpoint ----------------------------------------------------------------------------------


def untied():
    return llama(tied=False)


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, qo.Int8Dynamic()),
        (llama, MIXED),
        (untied, GROUPS),
        (gpt2, qo.Int8Dynamic()),
        (t5, GROUPS),
        (whisper, qo.Int8Dynamic()),
        (mixtral, qo.Int8DynamicInt4Weight()),
    ],
)
def test_loading_quantizes_as_quantize_does(make, config, tmp_path):
    expected, inputs = fresh(make), inputs_of(make)
    expected.save_pretrained(tmp_path / "float")
    model = type(expected).from_pretrained(tmp_path / "float", quantization_config=QuantOpsConfig(config))
    result = qo.quantize_(expected, config)
    assert str(model.hf_quantizer.result) == str(result)
    wanted = logits(expected, inputs)
    assert torch.equal(logits(model, inputs), wanted)
    for number, quantized in enumerate((model, expected)):
        path = tmp_path / str(number)
        quantized.save_pretrained(path, max_shard_size="30KB" if number else "5GB")
        assert (len(list(path.glob("*.safetensors"))) > 1) == bool(number)
        assert torch.equal(logits(type(expected).from_pretrained(path), inputs), wanted)


def test_generation(folder, tmp_path):
    model = loaded(folder, QuantOpsConfig(MIXED))
    options = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(IDS, **options)
    assert expected.shape == (1, 20)
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert torch.equal(again.generate(IDS, **options), expected)
    assert again.lm_head.shares_weight(again.model.embed_tokens)
    assert torch.equal(again.generate(IDS, num_beams=2, **options), model.generate(IDS, num_beams=2, **options))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}], ids=str)
def test_device_maps(folder, tmp_path, device_map):
    model = loaded(folder, QuantOpsConfig(), device_map=device_map)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path, device_map=device_map)), logits(model))


def test_dtypes(folder, tmp_path):
    expected = loaded(folder, dtype="bfloat16")
    qo.quantize_(expected)
    model = loaded(folder, QuantOpsConfig(), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert torch.equal(logits(model), logits(expected))
    model.save_pretrained(tmp_path)
    again = loaded(tmp_path)
    assert again.dtype == torch.bfloat16
    assert torch.equal(logits(again), logits(model))
    layer = loaded(tmp_path, dtype=torch.float32).model.layers[0].mlp.up_proj
    assert layer.compute_dtype == layer.weight.dtype == torch.float32
    assert model.half().dtype == torch.float16
    assert logits(model).dtype == torch.float16


def test_modules_to_not_convert(folder):
    exclude = ["lm_head", "model.layers.0", "self_attn.k_proj", "*.up_proj", "no_such_module"]
    result = loaded(folder, QuantOpsConfig(modules_to_not_convert=exclude)).hf_quantizer.result
    assert result.converted == [
        f"model.layers.1.{name}" for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj")
    ] + [f"model.layers.1.mlp.{name}" for name in ("gate_proj", "down_proj")]
    assert ("lm_head", "excluded by modules_to_not_convert") in result.skipped


def test_the_config_as_json(folder):
    config = QuantOpsConfig({nn.Embedding: None, "*mlp*": GROUPS, "*": qo.Int8Dynamic()}, modules_to_not_convert=["lm_head"])
    plain = json.loads(config.to_json_string())
    assert QuantOpsConfig.from_dict(plain) == config
    model = loaded(folder, plain)
    assert isinstance(model.model.layers[0].mlp.up_proj, qo.WeightOnlyLinear)
    assert torch.equal(logits(model), logits(loaded(folder, config)))
    assert not config.is_saved  # one config serves many models
    function = QuantOpsConfig({lambda name, _: "mlp" in name: GROUPS})
    assert loaded(folder, function).config.to_json_string()
    with pytest.raises(ValueError, match="expected filters that JSON can hold"):
        QuantOpsConfig.from_dict(function.to_dict())


def test_a_layer_is_freed_before_the_next_is_read(folder, monkeypatch):
    from quant_ops.integrations import checkpoint

    waiting = []
    take = checkpoint.OnTheFly.take

    def watched(self, name, value):
        take(self, name, value)
        floats = [m for m in self._model.modules() if type(m) is nn.Linear and not m.weight.is_meta]
        waiting.append(len(floats))

    monkeypatch.setattr(checkpoint.OnTheFly, "take", watched)
    loaded(folder, QuantOpsConfig())
    assert len(waiting) == 14  # all but the tied head
    assert set(waiting) == {0}


# ---- models that were quantized in memory ---------------------------------------------------------------------------------------


def static(model, inputs):
    qo.prepare_(model)
    qo.calibrate(model, [inputs])
    qo.convert_(model)


def folded(model, inputs):
    qo.fold_batchnorm_(model)
    qo.quantize_(model, exclude=["*classifier*"] if isinstance(model, transformers.ResNetForImageClassification) else [])


def smoothed(model, inputs):
    qo.smoothquant_(model, [inputs], qo.Int8Dynamic())


def multiplied(model, inputs):
    qo.smoothquant_(model, [inputs], None)
    assert any(isinstance(module, qo.ScaledLinear) for module in model.modules())


@pytest.mark.parametrize(
    ("make", "quantize"),
    [(bert, static), (gpt2, static), (gpt2, smoothed), (llama, multiplied), (resnet, folded)],
)
def test_save_pretrained_of_a_model_in_memory(make, quantize, tmp_path):
    model, inputs = fresh(make), inputs_of(make)
    quantize(model, inputs)
    expected = logits(model, inputs)
    copy.deepcopy(pickle.loads(pickle.dumps(model))).save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), expected)
    again.tie_weights()
    assert torch.equal(logits(again, inputs), expected)


def test_static_scales_of_steps(tmp_path):
    model = fresh(bert)
    qo.prepare_(model, qo.Int8Static(num_steps=2))
    for step in range(2):
        with qo.timestep(model, step):
            qo.calibrate(model, [IDS + step])
    qo.convert_(model)
    model.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    for step in range(2):
        with qo.timestep(model, step), qo.timestep(again, step):
            assert torch.equal(logits(again), logits(model))


def test_what_is_saved_is_what_is_there(tmp_path):
    model = fresh(llama)
    qo.quantize_(model)
    qo.fallback_(model, qo.compare(float_model(llama), model, IDS), num=3)
    model.save_pretrained(tmp_path / "some")
    again = loaded(tmp_path / "some")
    assert sum(isinstance(module, qo.QuantLinear) for module in again.modules()) == 12
    assert torch.equal(logits(again), logits(model))
    model = model.dequantize()
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "none")
    assert "quantization_config" not in json.loads((tmp_path / "none" / "config.json").read_text())
    assert type(loaded(tmp_path / "none").model.layers[0].mlp.up_proj) is nn.Linear


def test_layers_that_were_replaced_by_hand(tmp_path):
    model = fresh(bert)
    model.bert.encoder.layer[0].output.dense = qo.QuantLinear.from_float(model.bert.encoder.layer[0].output.dense)
    attach(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(transformers.BertForMaskedLM.from_pretrained(tmp_path)), logits(model))


def test_a_model_and_its_base(tmp_path):
    model = fresh(llama)
    qo.quantize_(model.model)
    model.save_pretrained(tmp_path / "whole")
    model.model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        hidden = model.model(IDS).last_hidden_state
        for name in ("whole", "base"):
            assert torch.equal(transformers.AutoModel.from_pretrained(tmp_path / name)(IDS).last_hidden_state, hidden)
    assert torch.equal(logits(loaded(tmp_path / "whole")), logits(model))
    assert isinstance(loaded(tmp_path / "base").model.layers[0].mlp.up_proj, qo.QuantLinear)


def test_save_and_load_of_the_package(folder, tmp_path):
    model = loaded(folder, QuantOpsConfig())
    qo.save(model, tmp_path / "model.safetensors")
    other = fresh(llama)
    qo.load_(other, tmp_path / "model.safetensors")
    other.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


def test_resizing_the_vocabulary(folder, tmp_path):
    model = loaded(folder, QuantOpsConfig())
    assert model.resize_token_embeddings(96) is model.model.embed_tokens
    for one in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(ValueError, match="Resize the float model and quantize that"):
            one.resize_token_embeddings(100)
    model = loaded(folder, QuantOpsConfig(modules_to_not_convert=["lm_head"]))
    model.resize_token_embeddings(100)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(loaded(tmp_path)), logits(model))


# ---- what is refused ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantized")
    loaded(folder, QuantOpsConfig()).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        (qo.Int8Dynamic, AttributeError, r"Write QuantOpsConfig\(Int8Dynamic"),
        (lambda: QuantOpsConfig(qo.Int8Static()), TypeError, "Use prepare_, calibrate and convert_"),
        (lambda: QuantOpsConfig(qo.Simulated(weight=qo.INT4)), TypeError, "Use quantize_ after loading"),
        (lambda: QuantOpsConfig({"*.none": qo.Int8Dynamic()}), ValueError, "expected the pattern"),
        (lambda: QuantOpsConfig("int8"), TypeError, "expected a config such as"),
        (lambda: QuantOpsConfig(modules_to_not_convert="lm_head"), TypeError, r"Write \['lm_head'\]"),
        (lambda: QuantOpsConfig(format_version=9, quant_ops="7.0"), ValueError, "written by quant_ops 7.0. Upgrade"),
        (lambda: QuantOpsConfig(bits=4), ValueError, r"got \['bits'\]"),
        (lambda: {"quant_method": "quant_ops", "config": {"config": "Int9"}}, ValueError, "Int9"),
    ],
)
def test_configs_that_are_refused(folder, config, kind, message):
    with pytest.raises(kind, match=message):
        loaded(folder, config())


def test_configs_of_checkpoints(folder, quantized):
    with pytest.raises(ValueError, match="got that of a quantized one"):
        loaded(folder, QuantOpsConfig(**json.loads((quantized / "config.json").read_text())["quantization_config"]))
    with pytest.raises(ValueError, match="quantized with QuantOpsConfig but you are passing a QuantoConfig"):
        loaded(quantized, transformers.QuantoConfig(weights="int8"))
    with pytest.raises(ValueError, match=r"got a layer 'model.layers.0.self_attn.q_proj' in the checkpoint and none of that name"):
        transformers.BertModel.from_pretrained(quantized)
    with pytest.raises(ValueError, match="expected a device_map of one kind of devices"):
        loaded(folder, QuantOpsConfig(), device_map={"model": "cpu", "lm_head": "disk"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["layers"][0].update({"class": "Linear"}), "KeyError"),
        (lambda c: c["layers"][0].update(names=["model.norm"]), "LlamaRMSNorm of that name in the model"),
        (lambda c: c["layers"][0].update(tensors=["other"]), "other"),
        (lambda c: c["layers"][0].update(weight_bits="8"), "expected the quantization_config of save_pretrained"),
        (lambda c: c.update(layers=3), "expected the quantization_config of save_pretrained"),
    ],
)
def test_damaged_configs(quantized, tmp_path, change, message):
    config = json.loads((quantized / "config.json").read_text())
    change(config["quantization_config"])
    (tmp_path / "model.safetensors").symlink_to(quantized / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        loaded(tmp_path)


def test_damaged_tensors(quantized, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").symlink_to(quantized / "config.json")
    tensors = load_file(quantized / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got no model.layers.1.mlp.up_proj.weight_scale in the checkpoint"):
        loaded(tmp_path)
    model = fresh(llama)
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp.up_proj'.*NaN"):
        loaded(tmp_path / "nan", QuantOpsConfig())


def test_a_model_that_is_not_finished(folder, tmp_path):
    model = loaded(folder, QuantOpsConfig(modules_to_not_convert=["lm_head"]))
    qo.prepare_(model)
    with pytest.raises(ValueError, match=r"the prepared layer 'lm_head' beside quantized ones. Call convert_ first"):
        model.save_pretrained(tmp_path)


def test_a_program_that_only_loads(quantized):
    """It imports quant_ops, which imports none of the libraries and is registered once transformers is imported."""
    code = f"""
import quant_ops, sys
assert not {{"transformers", "diffusers", "accelerate"}} & set(sys.modules)
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained({str(quantized)!r})
print(sum(isinstance(module, quant_ops.QuantLinear) for module in model.modules()))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4


def test_adapters_can_be_trained_where_gradients_flow(folder):
    for backward in (False, True):
        model = loaded(folder, QuantOpsConfig(qo.Int8Dynamic(backward=backward)))
        assert model.hf_quantizer.is_trainable is backward
        model = fresh(llama)
        qo.quantize_(model, {"model.embed_tokens": qo.Int8WeightOnly(), "*": qo.Int8Dynamic(backward=backward)})
        assert model.hf_quantizer.is_trainable is backward


def test_a_transformers_that_is_too_old(monkeypatch):
    model = fresh(bert)
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.delitem(sys.modules, "quant_ops.integrations.transformers")
    with pytest.raises(ImportError, match=r"expected transformers >= 5, got.*Install it with pip install"):
        importlib.import_module("quant_ops.integrations.transformers")
    with pytest.warns(UserWarning, match="expected transformers >= 5"):
        qo.quantize_(model)
    assert isinstance(model.bert.encoder.layer[0].output.dense, qo.QuantLinear)


# ---- attention -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [bert, llama])
def test_attention_by_name(make):
    """All layers call int8_attention, also with padding, and the float model comes back."""
    torch.manual_seed(0)
    model = make().eval()
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[1, 7:] = 0
    ids = IDS.expand(2, -1)
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("quant_ops")
        with torch.profiler.profile() as profile:
            got = model(ids, attention_mask=mask).logits
        names = [event.name for event in profile.events()]
        assert names.count("quant_ops::int8_attention") == model.config.num_hidden_layers
        assert 0 < (got - expected)[mask.bool()].norm() < 0.05 * expected[mask.bool()].norm()
        assert not torch.equal(model(ids).logits, got)  # without a mask
        model.set_attn_implementation("sdpa")
        assert torch.equal(model(ids, attention_mask=mask).logits, expected)


def test_attention_refuses_dropout():
    model = bert().train()
    model.set_attn_implementation("quant_ops")
    with (
        torch.no_grad(),
        pytest.raises(ValueError, match=r"^quant_ops\.int8_attention: expected attention without dropout and soft"),
    ):
        model(IDS)


def test_fused_activations_are_kept(tmp_path):
    torch.manual_seed(0)
    model = bert().eval()
    qo.quantize_(model, exclude=["cls.*"])
    result = qo.fuse_activations_(model, IDS)
    assert [(activation, function) for _, activation, function in result.fused] == [
        ("bert.encoder.layer.0.intermediate.intermediate_act_fn", "gelu")
    ]
    model.save_pretrained(tmp_path)
    again = transformers.BertForMaskedLM.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(IDS).logits, model(IDS).logits)
