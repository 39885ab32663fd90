"""Models and pipelines of diffusers that are quantized while they are loaded, or in memory, and come back with the same bits."""

import copy
import functools
import json

import pytest
import torch

import quant_ops as qo

diffusers = pytest.importorskip("diffusers", minversion="0.36")
transformers = pytest.importorskip("transformers", minversion="5")

from quant_ops.integrations.diffusers import QuantOpsConfig, attach  # noqa: E402
from quant_ops.integrations.transformers import QuantOpsConfig as TextConfig  # noqa: E402

LATENT = torch.linspace(-3, 3, 2 * 4 * 8 * 8).cos().reshape(2, 4, 8, 8)
TEXT = torch.linspace(-3, 3, 2 * 5 * 32).sin().reshape(2, 5, 32)
STEPS = torch.tensor([3, 3])
GROUPS = qo.Int4WeightOnly(group_size=32)
MIXED = {"*to_*": GROUPS, "*": qo.Int8Dynamic()}


@pytest.fixture(autouse=True, scope="module")
def _quiet():
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 32), layers_per_block=1, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), norm_num_groups=8,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def sd3():
    return diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
        joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip


def dit():
    return diffusers.DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=8,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        out_channels=4,
        num_embeds_ada_norm=10,
    )


def vae():
    blocks = {"down_block_types": ("DownEncoderBlock2D",), "up_block_types": ("UpDecoderBlock2D",), "block_out_channels": (32,)}
    return diffusers.AutoencoderKL(**blocks, latent_channels=4, norm_num_groups=8, sample_size=8)


INPUTS = {
    unet: {"sample": LATENT, "timestep": STEPS, "encoder_hidden_states": TEXT},
    sd3: {"hidden_states": LATENT, "timestep": STEPS, "encoder_hidden_states": TEXT, "pooled_projections": TEXT[:, 0]},
    dit: {"hidden_states": LATENT, "timestep": STEPS, "class_labels": torch.tensor([1, 2])},
}


@functools.cache
def float_model(make):
    torch.manual_seed(3)
    return make().eval()


def fresh(make):
    return copy.deepcopy(float_model(make))


def output(model, make):
    inputs = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in INPUTS[make].items()}
    with torch.no_grad():
        return model(**inputs).sample


@pytest.mark.parametrize(
    ("make", "config", "dtype"),
    [(unet, qo.Int8Dynamic(), None), (unet, MIXED, torch.bfloat16), (sd3, MIXED, None), (dit, qo.Int8WeightOnly(), torch.float16)],
)
def test_loading_quantizes_as_quantize_does(make, config, dtype, tmp_path):
    fresh(make).save_pretrained(tmp_path / "float")
    kind = type(float_model(make))
    model = kind.from_pretrained(tmp_path / "float", torch_dtype=dtype, quantization_config=QuantOpsConfig(config))
    expected = kind.from_pretrained(tmp_path / "float", torch_dtype=dtype)
    result = qo.quantize_(expected, config)
    assert model.hf_quantizer.result.converted == result.converted
    wanted = output(expected, make)
    assert torch.equal(output(model, make), wanted)
    for number, quantized in enumerate((model, expected, copy.deepcopy(model))):
        path = tmp_path / str(number)
        quantized.save_pretrained(path, max_shard_size="30KB" if number == 1 else "5GB")
        assert (len(list(path.glob("*.safetensors"))) > 1) == (number == 1)
        again = kind.from_pretrained(path, torch_dtype=dtype)
        assert torch.equal(output(again, make), wanted)
    assert again.to(torch.float32).dtype == torch.float32
    assert output(again, make).dtype == torch.float32


def test_a_static_model_of_steps(tmp_path):
    model = fresh(unet)
    qo.prepare_(model, qo.Int8Static(num_steps=2))
    for step in range(2):
        with qo.timestep(model, step):
            qo.calibrate(model, [INPUTS[unet] | {"sample": LATENT * (step + 1)}])
    qo.convert_(model)
    model.save_pretrained(tmp_path)
    again = diffusers.UNet2DConditionModel.from_pretrained(tmp_path)
    for step in range(2):
        with qo.timestep(model, step), qo.timestep(again, step):
            assert torch.equal(output(again, unet), output(model, unet))


def text_encoder():
    config = transformers.CLIPTextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=8,
        bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return transformers.CLIPTextModel(config)


def with_unet():
    return diffusers.StableDiffusionPipeline(
        vae=fresh(vae),
        text_encoder=text_encoder().eval(),
        tokenizer=None,
        unet=fresh(unet),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def with_transformer():
    return diffusers.DiTPipeline(transformer=fresh(dit), vae=fresh(vae), scheduler=diffusers.DDIMScheduler())


def images(pipeline):
    """Two steps of the pipeline from a given seed."""
    pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 2, "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    if hasattr(pipeline, "unet"):
        with torch.no_grad():
            text = pipeline.text_encoder(torch.arange(8)[None]).last_hidden_state
        return torch.as_tensor(pipeline(prompt_embeds=text, guidance_scale=1.0, height=8, width=8, **options).images)
    return torch.as_tensor(pipeline(class_labels=[1], guidance_scale=1.0, **options).images)


@pytest.mark.parametrize(
    ("make", "mapping"),
    [
        (with_unet, {"unet": QuantOpsConfig(MIXED), "vae": QuantOpsConfig(qo.Int8Dynamic()), "text_encoder": TextConfig()}),
        (with_unet, {"unet": QuantOpsConfig(), "text_encoder": QuantOpsConfig(qo.Int8WeightOnly())}),
        (with_transformer, {"transformer": QuantOpsConfig(MIXED, modules_to_not_convert=["proj_out_2"])}),
    ],
)
def test_pipelines(make, mapping, tmp_path):
    pipeline, parts = make(), {"tokenizer": None} if make is with_unet else {}
    pipeline.save_pretrained(tmp_path / "float")
    quantization = diffusers.PipelineQuantizationConfig(quant_mapping=mapping)
    quantized = type(pipeline).from_pretrained(tmp_path / "float", quantization_config=quantization, **parts)
    for name, config in mapping.items():
        exclude = [f"{excluded}*" for excluded in config.modules_to_not_convert]
        qo.quantize_(getattr(pipeline, name), config.config, exclude=exclude)
    expected = images(pipeline)
    assert torch.equal(images(quantized), expected)
    quantized.save_pretrained(tmp_path / "quantized")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "quantized", **parts)
    assert torch.equal(images(again), expected)
    for name in mapping:
        assert "quantization_config" in json.loads((tmp_path / "quantized" / name / "config.json").read_text())


def test_a_backend_of_pipelines(tmp_path):
    with_transformer().save_pretrained(tmp_path)
    quantization = diffusers.PipelineQuantizationConfig(
        quant_backend="quant_ops", quant_kwargs={"config": qo.Int8WeightOnly()}, components_to_quantize=["transformer"]
    )
    pipeline = diffusers.DiTPipeline.from_pretrained(tmp_path, quantization_config=quantization)
    assert isinstance(pipeline.transformer.proj_out_1, qo.WeightOnlyLinear)
    assert "hf_quantizer" not in vars(pipeline.vae)


def test_what_is_saved_is_what_is_there(tmp_path):
    model = fresh(dit)
    qo.quantize_(model)
    qo.fallback_(model, qo.compare(float_model(dit), model, INPUTS[dit], forward=lambda m, x: m(**x).sample), num=3)
    model.save_pretrained(tmp_path / "some")
    assert torch.equal(output(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "some"), dit), output(model, dit))
    model.proj_out_2 = model.proj_out_2.dequantize() if hasattr(model.proj_out_2, "dequantize") else model.proj_out_2
    model.proj_out_1 = qo.QuantLinear.from_float(float_model(dit).proj_out_1, weight_bits=4)
    attach(model)
    model.save_pretrained(tmp_path / "other")
    assert torch.equal(output(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "other"), dit), output(model, dit))
    model = model.dequantize()
    assert "quantization_config" not in model.config
    model.save_pretrained(tmp_path / "none")
    assert torch.equal(output(diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "none"), dit), output(model, dit))


def test_what_is_refused(tmp_path):
    fresh(dit).save_pretrained(tmp_path / "float")
    load = diffusers.DiTTransformer2DModel.from_pretrained
    with pytest.raises(AttributeError, match=r"Write QuantOpsConfig\(Int8Dynamic"):
        load(tmp_path / "float", quantization_config=qo.Int8Dynamic())
    with pytest.raises(TypeError, match="Use prepare_, calibrate and convert_"):
        load(tmp_path / "float", quantization_config=QuantOpsConfig(qo.Int8Static()))
    model = load(tmp_path / "float", quantization_config=QuantOpsConfig(GROUPS))
    with pytest.raises(ValueError, match="expected a device_map of one kind of devices"):
        model.hf_quantizer.validate_environment(device_map={"a": "cpu", "b": "disk"})
    model.save_pretrained(tmp_path / "quantized")
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    with pytest.raises(ValueError, match="got that of a quantized one"):
        load(tmp_path / "float", quantization_config=QuantOpsConfig(**config))
    tensors = tmp_path / "quantized" / "diffusion_pytorch_model.safetensors"
    from safetensors.torch import load_file, save_file

    state = load_file(tensors)
    del state["proj_out_1.qweight"]
    save_file(state, tensors, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got no proj_out_1.qweight in the checkpoint"):
        load(tmp_path / "quantized")
    model.proj_out_1 = qo.QuantLinear.from_float(float_model(dit).proj_out_1)
    model.proj_out_2 = float_model(dit).proj_out_2
    with pytest.raises(ValueError, match=r"got others: 'proj_out_2.qweight'. Call quant_ops.integrations.diffusers.attach"):
        model.save_pretrained(tmp_path / "by_hand")
