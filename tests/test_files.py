"""save and load_: what comes back is the same bits, and an old file survives a failed write."""

import json
import os
import signal

import pytest
import torch
from processes import python
from safetensors.torch import load_file
from saved_models import FIXTURES, INT8, Net, assert_same_state, format_1, format_2, header_of, on_meta, saved
from torch import nn

import quant_ops as qo
from quant_ops.convert import files

# ---- what comes back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)], ids=["float", "meta"])
def test_round_trip(tmp_path, make):
    path = tmp_path / "m.safetensors"
    model, fresh = saved(path), make().eval()
    result = qo.load_(fresh, path)
    assert set(result.converted) == INT8
    assert {name for name, _ in result.skipped} == {"head", "tied"}
    assert_same_state(fresh, model)
    assert repr(fresh) == repr(model)
    x = torch.randn(4, 3, 9, 9)
    assert torch.equal(fresh(x), model(x))
    assert not any(tensor.is_meta for tensor in fresh.state_dict().values())


@pytest.mark.parametrize("make", [format_1.Net, lambda: on_meta(format_1.Net)], ids=["float", "meta"])
def test_every_kind_of_layer_comes_back(tmp_path, make):
    path = tmp_path / "m.safetensors"
    model, fresh = format_1.quantized(), make()
    qo.save(model, path)
    qo.load_(fresh, path)
    assert repr(fresh) == repr(model)
    assert_same_state(fresh, model)
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, (qo.QuantLinear, qo.QuantConv2d)):
            other = fresh.get_submodule(name)
            assert (other.weight_bits, other.relu, other.asymmetric) == (layer.weight_bits, layer.relu, layer.asymmetric)
            assert torch.equal(other.packed_weight, layer.packed_weight)
    x = torch.randn(2, 3, 7, 8)
    assert torch.equal(fresh(x), model(x))


def test_version_1_files_are_still_read(isa):
    fresh = on_meta(format_1.Net)
    qo.load_(fresh, FIXTURES / "format_1.safetensors")
    run = load_file(FIXTURES / "format_1_run.safetensors")
    assert torch.equal(fresh(run["x"]), run["y"])
    assert fresh.grouped.weight_bits == 4


def test_version_2_files_are_still_read(isa, tmp_path):
    fresh, expected = on_meta(format_2.Net), format_2.quantized()
    qo.load_(fresh, FIXTURES / "format_2.safetensors")
    run = load_file(FIXTURES / "format_2_run.safetensors")
    assert torch.equal(fresh(run["x"]), run["y"])
    assert repr(fresh) == repr(expected)
    assert fresh.head.shares_weight(fresh.embedding)
    qo.save(fresh, tmp_path / "m")
    written = (FIXTURES / "format_2.safetensors").read_bytes()  # by version 0.1.0, which its metadata name
    assert written.count(b"0.1.0") == 1
    assert (tmp_path / "m").read_bytes() == written.replace(b"0.1.0", qo.__version__.encode())


def test_codes_of_the_first_files_are_called_weight(tmp_path):
    """The fixture has them; a model that is int8 already takes it too."""
    assert "stem.weight" in load_file(FIXTURES / "format_1.safetensors")
    model = format_1.quantized()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    qo.load_(model, FIXTURES / "format_1.safetensors")
    assert "stem.qweight" in model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())
    qo.save(model, tmp_path / "m")
    assert {"stem.qweight", "second.qweight"} <= load_file(tmp_path / "m").keys()
    assert nn.Sequential(nn.Linear(16, 12)).load_state_dict(load_file(tmp_path / "m"), strict=False).missing_keys == [
        "0.weight",
        "0.bias",
    ]


def test_every_format_has_a_fixture():
    assert [path.name for path in sorted(FIXTURES.glob("format_?.safetensors"))] == [
        f"format_{version}.safetensors" for version in range(1, files.FORMAT_VERSION + 1)
    ]


def test_configs_come_back(tmp_path):
    path = tmp_path / "m.safetensors"
    model = saved(path)
    model.up.config = qo.Int8Dynamic(weight_bits=6)
    qo.save(model, path)
    fresh = Net()
    qo.load_(fresh, path)
    assert fresh.up.config == qo.Int8Dynamic(weight_bits=6)
    assert header_of(path)["layers"]["up"]["config"] == json.loads(qo.Int8Dynamic(weight_bits=6).to_json())


@pytest.mark.parametrize("num_steps", [1, 3])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_calibrated_layers_come_back(tmp_path, num_steps, asymmetric):
    config = qo.Int8Static(observer="percentile", asymmetric=asymmetric, num_steps=num_steps)
    model, x = Net().eval(), torch.randn(4, 3, 9, 9)
    qo.prepare_(model, config, exclude=["head", "tied"])

    def outputs(model):
        if num_steps == 1:
            return [model(x)]
        found = []
        for step in range(num_steps):
            with qo.timestep(model, step):
                found.append(model(x * 3**step))
        return found

    outputs(model)
    with pytest.raises(ValueError, match=r"^quant_ops.save: expected a float or int8 model, got the prepared layer 'stem'"):
        qo.save(model, tmp_path / "m")
    qo.convert_(model)
    qo.save(model, tmp_path / "m")
    fresh = on_meta(Net)
    qo.load_(fresh, tmp_path / "m")
    assert repr(fresh) == repr(model)
    assert fresh.up.config == config
    assert fresh.up.num_steps == num_steps
    found = outputs(fresh)
    assert all(torch.equal(a, b) for a, b in zip(outputs(model), found, strict=True))
    assert num_steps == 1 or not torch.equal(found[0], found[1])


def test_file_holds_plain_tensors_once(tmp_path):
    path = tmp_path / "m.safetensors"
    model = saved(path)
    tensors = load_file(path)
    assert not any("packed" in name for name in tensors)
    assert "tied.weight" not in tensors
    assert tensors["up.qweight"].dtype == torch.int8
    assert torch.equal(tensors["up.qweight"], model.up.qweight)
    assert header_of(path)["format_version"] == 1
    assert path.stat().st_size < 1.1 * sum(t.numel() * t.element_size() for t in tensors.values()) + 4000


def test_same_model_same_bytes(tmp_path):
    saved(tmp_path / "a")
    saved(tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    fresh = Net()
    qo.load_(fresh, tmp_path / "a")
    qo.save(fresh, tmp_path / "c")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "c").read_bytes()


def test_packed_only_layers_are_saved_plain(tmp_path):
    model = saved(tmp_path / "a")
    model.up.keep_packed_only()
    qo.save(model, tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert model.up.is_packed_only


@pytest.mark.parametrize("make", [Net, lambda: on_meta(Net)], ids=["float", "meta"])
def test_tied_parameters_stay_tied_and_trainable_as_they_were(tmp_path, make):
    saved(tmp_path / "m")
    fresh = make()
    fresh.norm.weight.requires_grad_(False)
    qo.load_(fresh, tmp_path / "m")
    assert fresh.tied.weight is fresh.head.weight
    assert fresh.head.weight.requires_grad
    assert not fresh.norm.weight.requires_grad


def test_shared_layers_stay_shared(tmp_path):
    qo.save(format_1.quantized(), tmp_path / "m")
    fresh = on_meta(format_1.Net)
    qo.load_(fresh, tmp_path / "m")
    assert fresh.again is fresh.second


class Rotary(nn.Module):
    """A model with buffers that are in no state_dict: frequencies computed by the constructor, position ids, a mask twice."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(8, 8)
        self.register_buffer("inv_freq", 1.0 / (100.0 ** (torch.arange(0, 8, 2, dtype=torch.float32) / 8)), persistent=False)
        self.register_buffer("position_ids", torch.arange(16).expand(1, -1), persistent=False)
        self.register_buffer("none", None, persistent=False)
        self.blocks = nn.ModuleList(nn.Module() for _ in range(2))
        for block in self.blocks:
            block.register_buffer("mask", torch.ones(16, 16, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("kept", torch.zeros(2))

    def forward(self, x):
        angles = self.position_ids[:, : x.shape[1], None] * self.inv_freq
        x = self.up(x) * torch.cat([angles.cos(), angles.sin()], -1)
        return torch.where(self.blocks[1].mask[: x.shape[1], :8], x, 0)


def test_buffers_that_are_in_no_state_dict_come_back_on_meta(tmp_path):
    torch.manual_seed(0)
    model, x = Rotary().eval(), torch.randn(2, 5, 8)
    qo.quantize_(model)
    model.inv_freq *= 1.5  # scaled for longer texts
    qo.save(model, tmp_path / "m")
    header = header_of(tmp_path / "m")
    assert header["not_in_state_dict"] == ["inv_freq", "position_ids", "blocks.0.mask", "blocks.1.mask"]
    assert header["shared"] == {"blocks.1.mask": "blocks.0.mask"}
    fresh = on_meta(Rotary)
    qo.load_(fresh, tmp_path / "m")
    assert torch.equal(fresh(x), model(x))
    assert fresh.state_dict().keys() == model.state_dict().keys()
    for (name, buffer), (other, wanted) in zip(fresh.named_buffers(), model.named_buffers(), strict=True):
        assert (name, buffer.dtype) == (other, wanted.dtype)
        assert torch.equal(buffer, wanted)
    fresh.inv_freq += 1  # not a view of the file
    real = Rotary().eval()
    qo.load_(real, tmp_path / "m")  # as in load_state_dict, real ones stay
    assert torch.equal(real.inv_freq * 1.5, model.inv_freq)


def test_models_of_transformers_load_on_meta(tmp_path):
    transformers = pytest.importorskip("transformers")
    small = {
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 32,
    }
    ids, image = torch.randint(3, 90, (2, 7)), torch.randn(2, 3, 32, 32)
    swin = {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}
    for kind, settings, x in (("Bert", small, ids), ("Llama", small, ids), ("Qwen2", small, ids), ("Swin", swin, image)):

        def make(kind=kind, settings=settings):
            return getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))

        model = make().eval()
        with torch.no_grad():
            float_output = model(x)[0]
            qo.quantize_(model)
            expected = model(x)[0]
            assert (expected - float_output).norm() < 0.1 * float_output.norm()
            qo.save(model, tmp_path / "m")
            fresh = on_meta(make)
            qo.load_(fresh, tmp_path / "m")
            assert torch.equal(fresh(x)[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_of_weights_comes_back(tmp_path, dtype):
    model = saved(tmp_path / "m").to(dtype)
    qo.save(model, tmp_path / "m")
    for fresh in (Net(), on_meta(Net)):
        qo.load_(fresh, tmp_path / "m")
        assert fresh.up.weight.dtype == fresh.head.weight.dtype == dtype
        assert fresh.up.weight_scale.dtype == torch.float32
        x = torch.randn(4, 3, 9, 9).to(dtype)
        assert torch.equal(fresh.eval()(x), model(x))


def test_a_channels_last_model_stays_one(tmp_path):
    saved(tmp_path / "m")
    fresh = Net().to(memory_format=torch.channels_last)
    qo.load_(fresh, tmp_path / "m")
    assert fresh.stem(torch.randn(2, 3, 9, 9)).is_contiguous(memory_format=torch.channels_last)


def test_unusual_tensors(tmp_path):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            base = torch.arange(12.0)
            self.register_buffer("whole", base)
            self.register_buffer("part", base[3:7])
            self.register_buffer("transposed", base.view(3, 4).T)
            self.register_buffer("empty", torch.zeros(0, 3))
            self.register_buffer("none", torch.zeros(0, 3))
            self.register_buffer("scalar", torch.tensor(True))
            self.register_buffer("bfloat", torch.ones(2, dtype=torch.bfloat16))

    model, fresh = Odd(), Odd()
    qo.quantize_(model)
    qo.save(model, tmp_path / "m")
    for buffer in fresh.buffers():
        buffer.zero_()
    qo.load_(fresh, tmp_path / "m")
    assert_same_state(fresh, model)


def test_load_onto_an_int8_model_again(tmp_path):
    model = saved(tmp_path / "m")
    other = Net().eval()
    qo.quantize_(other, qo.Int8Dynamic(asymmetric=False), exclude=["head", "tied"])
    qo.load_(other, tmp_path / "m")
    assert_same_state(other, model)
    assert other.up.asymmetric


@pytest.mark.parametrize("training", [False, True])
def test_training_mode_is_the_models_own(tmp_path, training):
    saved(tmp_path / "m")
    fresh = Net().train(training)
    qo.load_(fresh, tmp_path / "m")
    assert all(module.training == training for module in fresh.modules())


def test_transformer_encoder(tmp_path):
    """Its fused inference path would read float weights."""

    def encoder():
        torch.manual_seed(0)
        return nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()

    model, x, mask = encoder(), torch.randn(3, 5, 16), torch.tensor([[False] * 5, [False] * 3 + [True] * 2, [False] * 5])
    qo.quantize_(model)
    qo.save(model, tmp_path / "m")
    fresh = encoder()
    qo.load_(fresh, tmp_path / "m")
    with torch.no_grad():
        assert torch.equal(fresh(x, src_key_padding_mask=mask), model(x, src_key_padding_mask=mask))


def test_compiled_models_are_saved_under_their_own_names(tmp_path):
    model = saved(tmp_path / "a")
    qo.save(torch.compile(model), tmp_path / "b")
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    qo.load_(torch.compile(Net()), tmp_path / "b")


# ---- memory and speed ----------------------------------------------------------------------------------------------------


def test_tensors_are_mapped_and_float_weights_never_exist(tmp_path):
    """In a process of its own: 16 MB of int8 weights, whose float form would be 64 MB."""
    script = f"""
import torch, quant_ops as qo
from torch import nn
make = lambda: nn.Sequential(*(nn.Linear(2048, 2048) for _ in range(4)))
path = {str(tmp_path / "m")!r}
if {{write}}:
    model = make(); qo.quantize_(model); qo.save(model, path)
else:
    def anonymous():
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
    with torch.device("meta"):
        model = make()
    before = anonymous()
    qo.load_(model, path)
    assert path in open("/proc/self/maps").read()
    assert anonymous() - before < 24, anonymous() - before  # the packed copies
    assert model(torch.ones(1, 2048)).isfinite().all()
"""
    for write in (True, False):
        done = python("-c", script.replace("{write}", str(write)))
        assert done.returncode == 0, done.stderr


# ---- an old file survives ------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_whole(tmp_path):
    """The disk is full, as far as this process can see."""
    path = tmp_path / "m.safetensors"
    saved(path)
    before = path.read_bytes()
    script = f"""
import resource, signal, torch, quant_ops as qo
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
model = torch.nn.Sequential(torch.nn.Linear(512, 512))
qo.quantize_(model)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    qo.save(model, {str(path)!r})
except OSError as error:
    print(error)
"""
    done = python("-c", script)
    assert done.stdout.startswith(f"quant_ops.save: {path} was not written: "), done.stdout + done.stderr
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [path.name]


def test_a_killed_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "m.safetensors"
    saved(path)
    before = path.read_bytes()
    script = f"""
import os, signal, torch, quant_ops as qo
from quant_ops.convert import files
def save_half(tensors, name, metadata):
    open(name, "wb").write(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
files.save_file = save_half
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
qo.quantize_(model)
qo.save(model, {str(path)!r})
"""
    done = python("-c", script)
    assert done.returncode == -signal.SIGKILL
    assert path.read_bytes() == before


def test_permissions_and_links_are_kept(tmp_path):
    path, link = tmp_path / "m", tmp_path / "link"
    mask = os.umask(0o027)
    try:
        model = saved(path)
    finally:
        os.umask(mask)
    assert path.stat().st_mode & 0o777 == 0o640
    path.chmod(0o604)
    link.symlink_to(path)
    qo.save(model, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o604


def test_replacing_a_file_that_a_model_is_mapped_to(tmp_path):
    path = tmp_path / "m"
    saved(path)
    fresh = on_meta(Net)
    qo.load_(fresh, path)
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    qo.save(nn.Sequential(nn.Linear(2, 2)), path)
    assert all(torch.equal(before[name], tensor) for name, tensor in fresh.state_dict().items())


@pytest.mark.parametrize(
    ("where", "kind", "words"),
    [("nowhere/m", FileNotFoundError, "existing folder"), (".", IsADirectoryError, "path of a file, got the folder")],
)
def test_save_refuses_paths(tmp_path, where, kind, words):
    with pytest.raises(kind, match=f"^quant_ops.save: expected .*{words}"):
        qo.save(Net(), tmp_path / where)


def test_save_into_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(files.tempfile, "mkdtemp", refuse)  # root may write everywhere
    with pytest.raises(OSError, match=r"^quant_ops.save: .*/m was not written: \[Errno 13\] Permission denied"):
        qo.save(Net(), tmp_path / "m")


def test_save_refuses_models():
    with pytest.raises(ValueError, match=r"^quant_ops.save: expected a model that contains layers, got a bare QuantLinear"):
        qo.save(qo.QuantLinear(2, 2), "m")
    with pytest.raises(ValueError, match=r"^quant_ops.save: expected tensors with data, got 'stem.weight' on the meta device"):
        qo.save(on_meta(Net), "m")

    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

    with pytest.raises(TypeError, match=r"^quant_ops.save: expected a state_dict of tensors, got dict under '0._extra_state'"):
        qo.save(nn.Sequential(Extra(2, 2)), "m")
