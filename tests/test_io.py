"""save and load_: what comes back is the same bits, and whatever does not fit is refused with its name."""

import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import quant_ops as qo
from quant_ops.convert import files

FIXTURES = Path(__file__).parent / "fixtures"


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


format_1 = module_of(FIXTURES / "format_1.py")


class Net(nn.Module):
    """Convolutions, a normalisation with buffers, tied float parameters, an embedding, a head that stays float."""

    def __init__(self, width=16, stride=1, bias=True):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride, padding="same" if stride == 1 else 1, bias=bias)
        self.norm = nn.BatchNorm2d(width)
        self.up = nn.Linear(width, 24)
        self.down = nn.Linear(24, width, bias=False)
        self.head = nn.Linear(width, 10)
        self.tied = nn.Linear(width, 10)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = self.norm(self.stem(x)).mean((2, 3))
        x = x + self.down(self.up(x).relu())
        return self.head(x) - 0.5 * self.tied(x)


INT8 = {"stem", "up", "down"}


def saved(path, **kwargs):
    torch.manual_seed(1)
    model = Net(**kwargs).eval()
    model.norm.running_mean.normal_()
    qo.quantize_(model, qo.Int8Dynamic(weight_bits=6), exclude=["head", "tied"])
    qo.save(model, path)
    return model


def on_meta(make):
    with torch.device("meta"):
        return make().eval()


def header_of(path):
    with safetensors.safe_open(path, "pt") as file:
        return json.loads(file.metadata()["quant_ops"])


def rewritten(path, tensors=None, header=None):
    """Writes the file again with other tensors or another header."""
    tensors = load_file(path) if tensors is None else tensors
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    metadata = {"quant_ops": json.dumps(header_of(path) if header is None else header)}
    save_file(tensors, path, metadata=metadata)


def assert_same_state(model, expected):
    state, wanted = model.state_dict(), expected.state_dict()
    assert list(state) == list(wanted)
    for name, tensor in wanted.items():
        assert state[name].dtype == tensor.dtype
        assert torch.equal(state[name], tensor), name


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
    assert tensors["up.weight"].dtype == torch.int8
    assert torch.equal(tensors["up.weight"], model.up.weight)
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
    qo.quantize_(other, qo.Int8Dynamic(asymmetric=True), exclude=["head", "tied"])
    qo.load_(other, tmp_path / "m")
    assert_same_state(other, model)
    assert not other.up.asymmetric


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
        done = subprocess.run(
            [sys.executable, "-c", script.replace("{write}", str(write))], capture_output=True, text=True, check=False
        )
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
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
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
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


# ---- files of other models -----------------------------------------------------------------------------------------------


def refused(model, path, words, kind=ValueError):
    """load_ refuses with these words and leaves the model exactly as it was."""
    before = {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)}
    held = [*model.parameters(), *model.buffers()]
    versions = [(id(tensor), tensor._version) for tensor in held]
    with pytest.raises(kind, match=words) as caught:
        qo.load_(model, path)
    assert str(caught.value).startswith("quant_ops.load_: expected ")
    assert {name: (id(module), module.training) for name, module in model.named_modules(remove_duplicate=False)} == before
    assert [(id(tensor), tensor._version) for tensor in [*model.parameters(), *model.buffers()]] == versions


def test_refuses_other_shapes(tmp_path):
    saved(tmp_path / "m", width=8)
    words = r"to be a file of this model, got 'stem.weight' of shape \(8, 3, 3, 3\) in the file and \(16, 3, 3, 3\) in the model"
    refused(Net(), tmp_path / "m", words)
    refused(on_meta(Net), tmp_path / "m", words)


def test_refuses_other_settings_with_the_same_shapes(tmp_path):
    saved(tmp_path / "m", stride=2)
    refused(Net(), tmp_path / "m", r"got 'stem' with stride=\(2, 2\) in the file and \(1, 1\) in the model")


def test_refuses_other_biases(tmp_path):
    saved(tmp_path / "m", bias=False)
    refused(Net(), tmp_path / "m", r"got no 'stem.bias' in the file \(model: \(16,\)")
    saved(tmp_path / "m")
    refused(Net(bias=False), tmp_path / "m", r"got 'stem' with a bias in the file and without in the model")


def test_refuses_names_that_only_one_side_has(tmp_path):
    saved(tmp_path / "m")
    fresh = Net()
    fresh.more = nn.LayerNorm(3)
    refused(fresh, tmp_path / "m", r"got no 'more.weight' in the file \(model: \(3,\)")
    fresh = Net()
    del fresh.norm
    refused(fresh, tmp_path / "m", r"got 'norm.\w+' of shape \(16,\) in the file alone")
    fresh = Net()
    del fresh.up
    refused(fresh, tmp_path / "m", r"got a QuantLinear 'up' in the file and nothing of that name in the model")


def test_refuses_layers_that_cannot_be_replaced(tmp_path):
    saved(tmp_path / "m")

    class Special(nn.Linear):
        pass

    fresh = Net()
    fresh.up = Special(16, 24)
    refused(fresh, tmp_path / "m", r"got a QuantLinear 'up' in the file and Special of that name in the model")
    fresh = Net()
    fresh.up.register_forward_hook(lambda *_: None)
    refused(fresh, tmp_path / "m", r"got hooks on 'up', which its replacement would lose")


def test_refuses_a_model_with_extra_state(tmp_path):
    saved(tmp_path / "m")

    class Extra(nn.Identity):
        def get_extra_state(self):
            return {"a": 1}

    fresh = Net()
    fresh.more = Extra()
    refused(fresh, tmp_path / "m", "got 'more._extra_state' in the model, which is no tensor")


def test_refuses_a_meta_buffer_that_no_file_holds(tmp_path):
    saved(tmp_path / "m")

    def make():
        model = Net()
        model.register_buffer("table", torch.ones(3), persistent=False)
        return model

    refused(on_meta(make), tmp_path / "m", "got the non-persistent 'table', which is in no state_dict")
    fresh = make()
    qo.load_(fresh, tmp_path / "m")
    assert torch.equal(fresh.table, torch.ones(3))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("up.weight_scale", lambda t: t * 0, "usable layer 'up' .* weight_scale > 0 and finite"),
        ("up.weight_scale", lambda t: t * torch.nan, "usable layer 'up' .* weight_scale > 0 and finite"),
        ("up.weight_scale", lambda t: t[:3], "usable layer 'up'"),
        ("up.weight_scale", lambda t: t.double(), "up.weight_scale of dtype torch.float32"),
        ("up.weight", lambda t: t.int(), "up.weight of dtype torch.int8"),
        ("up.weight_scale", None, "'up' without weight_scale in the file"),
        ("up.weight", None, "no 'up.weight' in the file"),
        ("head.bias", lambda t: t.int(), "'head.bias' of a dtype like torch.float32 in .*, got torch.int32"),
        ("up.extra", lambda _: torch.ones(2), r"'up.extra' of shape \(2,\) in the file alone"),
    ],
)
def test_refuses_unusable_tensors(tmp_path, name, change, words):
    saved(tmp_path / "m")
    tensors = load_file(tmp_path / "m")
    if change is None:
        del tensors[name]
    else:
        tensors[name] = change(tensors.get(name))
    rewritten(tmp_path / "m", tensors)
    refused(Net(), tmp_path / "m", words)


# ---- files that are none -------------------------------------------------------------------------------------------------


def test_refuses_a_missing_file(tmp_path):
    refused(Net(), tmp_path / "m", r"the path of a file, got .*/m$", FileNotFoundError)
    refused(Net(), tmp_path, "the path of a file", FileNotFoundError)


def test_refuses_truncated_files(tmp_path):
    saved(tmp_path / "m")
    data = (tmp_path / "m").read_bytes()
    for length in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        (tmp_path / "m").write_bytes(data[:length])
        refused(Net(), tmp_path / "m", "a whole safetensors file, got .* It is cut off, or no file of quant_ops.save")


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('unpickled')",)


@pytest.mark.parametrize("write", [lambda p: torch.save(Bomb(), p), lambda p: p.write_bytes(pickle.dumps(Bomb()))])
def test_never_unpickles(tmp_path, write):
    write(tmp_path / "m")
    refused(Net(), tmp_path / "m", "a whole safetensors file")


def test_refuses_a_foreign_safetensors_file(tmp_path):
    save_file(Net(bias=False).up.state_dict(), tmp_path / "m", metadata={"format": "pt"})
    refused(Net(), tmp_path / "m", "a file of quant_ops.save, got .*, a safetensors file of another program")
    save_file({"a": torch.ones(1)}, tmp_path / "m")
    refused(Net(), tmp_path / "m", "a file of quant_ops.save")


def test_refuses_a_newer_format(tmp_path):
    saved(tmp_path / "m")
    rewritten(tmp_path / "m", header=header_of(tmp_path / "m") | {"format_version": 2, "quant_ops": "9.0"})
    refused(Net(), tmp_path / "m", r"format_version <= 1, got 2 in .*, written by quant_ops 9.0. Upgrade quant_ops")


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.pop("layers"),
        lambda h: h.pop("shared"),
        lambda h: h.update(format_version="1"),
        lambda h: h.update(layers=[]),
        lambda h: h["layers"]["up"].update({"class": "Linear"}),
        lambda h: h["layers"]["up"].pop("weight_bits"),
        lambda h: h["layers"]["up"].update(weight_bits=9),
        lambda h: h["layers"]["up"].update(config={"config": "os.system"}),
        lambda h: h["layers"]["up"]["arguments"].update(device="cuda"),
        lambda h: h["layers"]["up"]["arguments"].update(relu="yes"),
        lambda h: h["shared"].update({"tied.weight": "nowhere"}),
    ],
)
def test_refuses_damaged_metadata(tmp_path, change):
    saved(tmp_path / "m")
    header = header_of(tmp_path / "m")
    change(header)
    rewritten(tmp_path / "m", header=header)
    refused(Net(), tmp_path / "m", "metadata of quant_ops.save in .*, got ")


@given(where=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255))
@settings(max_examples=150, deadline=None)
def test_a_flipped_byte_in_the_header_is_refused_or_harmless(tmp_path_factory, where, value):
    folder = tmp_path_factory.mktemp("m")
    qo.save(format_1.quantized(), folder / "m")
    data = bytearray((folder / "m").read_bytes())
    end = 8 + int.from_bytes(data[:8], "little")
    data[int(where * end)] = value
    (folder / "m").write_bytes(data)
    fresh = format_1.Net()
    try:
        qo.load_(fresh, folder / "m")
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = ""
    if refusal:
        assert refusal.startswith("quant_ops.load_: expected ")
        assert not any(isinstance(m, (qo.QuantLinear, qo.QuantConv2d)) for m in fresh.modules())
