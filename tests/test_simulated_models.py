"""Models of transformers and diffusers whose products are simulated: how many operands there are, whoever computes attention."""

import pytest
import torch
from attention_models import Spy
from torch import nn

import quant_ops as qo

LAYERS = 2
ATTENTION = (4, 0, 2)  # inputs, weights and results of the two products


@pytest.fixture(autouse=True)
def _seeded(threads):
    threads(1)
    torch.manual_seed(0)


def tokens():
    return {"input_ids": torch.arange(12).view(2, 6), "attention_mask": torch.tensor([[1] * 6, [1, 1, 1, 1, 0, 0]])}


def image():
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def opt(transformers):
    sizes = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return transformers.OPTForCausalLM, transformers.OPTConfig(vocab_size=50, max_position_embeddings=32, **sizes)


def bert(transformers):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": LAYERS}
    return transformers.BertModel, transformers.BertConfig(vocab_size=50, max_position_embeddings=32, **sizes)


def codegen(transformers):
    sizes = {"n_embd": 32, "n_head": 4, "n_layer": LAYERS, "rotary_dim": 4, "n_positions": 32, "n_ctx": 32}
    return transformers.CodeGenForCausalLM, transformers.CodeGenConfig(vocab_size=50, **sizes)


def llama(transformers):
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
    return transformers.LlamaForCausalLM, transformers.LlamaConfig(vocab_size=50, num_hidden_layers=LAYERS, **sizes)


def gpt2(transformers):
    return transformers.GPT2LMHeadModel, transformers.GPT2Config(vocab_size=50, n_embd=16, n_head=2, n_layer=LAYERS)


def detr_config(transformers, **backbone):
    sizes = {f"{part}_{size}": value for part in ("encoder", "decoder") for size, value in DETR_SIZES.items()}
    return transformers.DetrConfig(use_timm_backbone=False, backbone=None, d_model=16, num_queries=5, **sizes, **backbone)


DETR_SIZES = {"layers": LAYERS, "attention_heads": 2, "ffn_dim": 32}


def detr(transformers):
    resnet = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic", out_features=["stage4"]
    )
    return transformers.DetrForObjectDetection, detr_config(transformers, backbone_config=resnet)


def maskformer(transformers):
    swin = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 2, 2], "out_features": [f"stage{i}" for i in range(1, 5)]}
    backbone = transformers.MaskFormerSwinConfig(image_size=64, window_size=4, **swin)
    sizes = {"fpn_feature_size": 32, "mask_feature_size": 16}
    config = transformers.MaskFormerConfig(backbone_config=backbone, decoder_config=detr_config(transformers), **sizes)
    return transformers.MaskFormerForInstanceSegmentation, config


# How many attentions there are, other products of functions, and what calls the model.
MODELS = {
    opt: (LAYERS, 0, tokens),
    bert: (LAYERS, 0, tokens),
    codegen: (LAYERS, 0, tokens),
    llama: (LAYERS, 0, tokens),
    gpt2: (LAYERS, 0, tokens),
    detr: (3 * LAYERS, 0, image),
    maskformer: (5 + 2 * LAYERS, 1, image),  # 5 blocks of Swin, self and cross attention of the decoder; masks by an einsum
}


def weights_of_layers(model):
    """Those of products that are layers; GPT-2's are transformers' Conv1D."""
    return sum(isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" for module in model.modules())


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_transformers(kind):
    transformers = pytest.importorskip("transformers")
    attentions, others, make_input = MODELS[kind]
    example = make_input()
    counts, results, state = {}, {}, None
    for implementation in ("eager", "sdpa"):
        cls, config = kind(transformers)
        if kind in (detr, maskformer):  # of their parts not all have both
            config._attn_implementation = "eager"
            model = cls(config).eval()
            for part in model.modules():
                if implementation == "sdpa" and hasattr(part, "config") and isinstance(part.config, transformers.DetrConfig):
                    part.config._attn_implementation_internal = implementation
        else:
            model = cls._from_config(config, attn_implementation=implementation).eval()
        state = state or model.state_dict()
        model.load_state_dict(state)
        with torch.no_grad():
            want = model(**example)[0]
            for name, linear in (("model", 0), ("context", weights_of_layers(model))):
                config, seen = spies()
                if name == "model":
                    handle = qo.simulate_products_(model, config)
                    got = model(**example)[0]
                    handle.remove()
                else:
                    with qo.simulated_products(config):
                        got = model(**example)[0]
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
                assert not any(spy.saw_masks() for spy in seen)
                counts[implementation, name] = [len(spy.seen) for spy in seen]
                expected = [attentions * 4 + others * 2 + linear, linear, attentions * 2 + others + linear]
                assert counts[implementation, name] == expected, (implementation, name)
            handle = qo.simulate_products_(model, qo.Simulated(input=qo.INT8, output=qo.FP16))
            results[implementation] = model(**example)[0]
            handle.remove()
        assert 0 < (results[implementation] - want).norm() < 0.5 * want.norm()
    torch.testing.assert_close(results["eager"], results["sdpa"], rtol=1e-3, atol=1e-4)


def spies():
    seen = Spy(), Spy(), Spy()
    return qo.Simulated(input=seen[0], weight=seen[1], output=seen[2]), seen


def test_llama_trains_with_checkpoints_and_generates():
    transformers = pytest.importorskip("transformers")
    cls, config = llama(transformers)
    model = cls._from_config(config, attn_implementation="sdpa").train()
    qo.simulate_products_(model, qo.Simulated(input=qo.E4M3, output=qo.E4M3, backward=qo.E5M2))
    gradients = []
    for use_reentrant in (None, False, True):
        if use_reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(**tokens(), labels=tokens()["input_ids"]).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[1], gradients[0])
    torch.testing.assert_close(gradients[2], gradients[0])
    model.eval()
    generated = model.generate(**tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, 9)
    assert transformers.LlamaForCausalLM in type(model).__mro__


def processors(module):
    return module.AttnProcessor(), module.AttnProcessor2_0()


def test_attention_of_diffusers():
    module = pytest.importorskip("diffusers.models.attention_processor")
    attention = module.Attention(query_dim=16, cross_attention_dim=12, heads=2, dim_head=8).eval()
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    results = []
    for processor in processors(module):
        attention.set_processor(processor)
        config, seen = spies()
        with torch.no_grad():
            want = attention(x, encoder_hidden_states=context)
            handle = qo.simulate_products_(attention, config)
            torch.testing.assert_close(attention(x, encoder_hidden_states=context), want, rtol=1e-5, atol=1e-6)
            handle.remove()
            with qo.simulated_products(qo.Simulated(input=qo.INT8, weight=qo.INT4, output=qo.E4M3)):
                results.append(attention(x, encoder_hidden_states=context))
        assert tuple(len(spy.seen) for spy in seen) == ATTENTION
    torch.testing.assert_close(*results)
    assert not torch.equal(results[0], want)


def test_unet_of_diffusers():
    diffusers, module = pytest.importorskip("diffusers"), pytest.importorskip("diffusers.models.attention_processor")
    blocks = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",)}
    sizes = {"block_out_channels": (16,), "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 12}
    unet = diffusers.UNet2DConditionModel(sample_size=8, attention_head_dim=2, **blocks, **sizes).eval()
    example = (torch.randn(2, 4, 8, 8), torch.tensor(3), torch.randn(2, 7, 12))
    attentions = sum(isinstance(part, module.Attention) for part in unet.modules())
    results = []
    for processor in processors(module):
        unet.set_attn_processor(processor)
        config, seen = spies()
        with torch.no_grad():
            want = unet(*example).sample
            handle = qo.simulate_products_(unet, config)
            torch.testing.assert_close(unet(*example).sample, want, rtol=1e-4, atol=1e-5)
            handle.remove()
            with qo.simulated_products(qo.Simulated(input=qo.E4M3, weight=qo.E4M3)):
                results.append(unet(*example).sample)
        assert attentions == 2 * (1 + 1 + 2)  # of the blocks down, between and up
        assert tuple(len(spy.seen) for spy in seen) == tuple(attentions * count for count in ATTENTION)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)
    assert not torch.equal(results[0], want)
