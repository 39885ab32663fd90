"""Code written for other packages runs with the import line changed. The blocks are those of the packages' own documents."""

import copy
import pickle
import re
import subprocess
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import quant_ops as qo
from quant_ops.compat import torch_quant_ext
from quant_ops.nn import Int8Layer


def run(block, **names):
    """Executes a document's code block; `names` are what the document takes for granted."""
    namespace = dict(names)
    exec(compile(block, "document", "exec"), namespace)
    return namespace


# ---- torch_quant_ext -----------------------------------------------------------------------------------------------------

TORCH_QUANT_EXT = """
import torch
from quant_ops.compat import torch_quant_ext
tensor=torch.randn(1,128, 56,56).cuda()
scale=torch.ones(1).cuda()*0.1
zero_point=torch.zeros(1).cuda()
qmin=-128
qmax=127
asymmetric = False
simulate = True
qtensor=torch_quant_ext.quant_tensor_forward(tensor, scale, zero_point, qmin, qmax, asymmetric, simulate)
"""


@pytest.fixture
def cuda_or_cpu(monkeypatch):
    """Without a GPU, .cuda() leaves a tensor where it is."""
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)


def test_torch_quant_ext_document(cuda_or_cpu):
    found = run(TORCH_QUANT_EXT)
    expected = (found["tensor"] / found["scale"]).round().clamp(-128, 127) * found["scale"]
    assert torch.equal(found["qtensor"], expected)


@pytest.mark.parametrize("shape", [(1,), (32, 1, 1, 1), (1, 128, 1, 1)])
@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("simulate", [False, True])
def test_torch_quant_ext_benchmarked_shapes(shape, asymmetric, simulate):
    """The scales of its own benchmark, whose formula rounds half up: no half step occurs in random data."""
    x, scale = torch.randn(32, 128, 7, 7), torch.rand(shape) + 0.05
    zero_point = torch.randint(-5, 6, shape).float()
    codes = torch.floor(x / scale + 0.5) + (zero_point if asymmetric else 0)
    codes = codes.clamp(-128, 127)
    expected = (codes - (zero_point if asymmetric else 0)) * scale if simulate else codes
    got = torch_quant_ext.quant_tensor_forward(x, scale, zero_point, -128, 127, asymmetric, simulate)
    assert torch.equal(got.float(), expected)
    assert got.dtype == (torch.float32 if simulate else torch.int8)


# ---- torch_quantizer -----------------------------------------------------------------------------------------------------

FAKE_QUANT = """
from quant_ops.compat import torch_quantizer as tq

unet.half()
# do FP16 inference

wq_params = {'n_bits': 8, 'channel_wise': True, 'scale_method': 'max'}
aq_params = {'n_bits': 8, 'channel_wise': False, 'scale_method': 'mse'}
ddim_steps = STEPS # Define diffusion steps here, 1 for non-temporal models

fakeq_model = tq.fake_quant(unet, wq_params, aq_params, num_steps=ddim_steps)

from some_diffusion_library import DiffusionPipeline

pipe = DiffusionPipeline()
prompt = "a photo of a flying dog"
image = pipe(prompt, guidance_scale=7.5)["sample"][0]

qunet = tq.fake2real(fakeq_model, save_dir='.')
"""

REAL_QUANT = """
from quant_ops.compat import torch_quantizer as tq

ckpt_path = 'path_to_checkpoint'
qnn = tq.real_quant(unet, n_bits, ddim_steps, ckpt_path)
"""


class TinyUNet(nn.Module):
    """Its activations grow from step to step, so that scales per step matter."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(4, 16, 3, stride=2, padding=1)
        self.time = nn.Linear(8, 16)
        self.mid = nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.up = nn.Conv2d(16, 4, 1)

    def forward(self, x, t):
        wave = torch.cos(t * torch.arange(8.0)).to(x.dtype).expand(len(x), 8)
        h = self.down(x) + self.time(wave)[..., None, None]
        return self.up(F.interpolate(self.mid(F.relu(h)), scale_factor=2)) * 0.5


class Pipeline:
    """As many calls of the model as there are steps; guidance doubles the batch."""

    def __init__(self, model, steps):
        self.model, self.steps = model, steps

    def __call__(self, prompt, guidance_scale):
        generator = torch.Generator().manual_seed(len(prompt))
        x = torch.randn(1, 4, 8, 8, generator=generator).half()
        with torch.no_grad():
            for i in range(self.steps):
                t = torch.tensor(float(i))
                free, guided = self.model(torch.cat([x, x]) * 2.0**i, t).chunk(2)
                x = x + 0.1 * (free + guidance_scale * (guided - free))
        return {"sample": x}


@pytest.mark.parametrize("steps", [1, 4])
def test_torch_quantizer_document(tmp_path, monkeypatch, steps):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    unet = TinyUNet().eval()
    reference, fresh = copy.deepcopy(unet).half(), copy.deepcopy(unet)
    library = types.ModuleType("some_diffusion_library")
    library.DiffusionPipeline = lambda: Pipeline(unet, steps)
    monkeypatch.setitem(sys.modules, "some_diffusion_library", library)

    qunet = run(FAKE_QUANT.replace("STEPS", str(steps)), unet=unet)["qunet"]
    path = tmp_path / f"TinyUNet_8bits_{steps}steps.safetensors"
    assert path.is_file()
    layers = [m for m in qunet.modules() if isinstance(m, (qo.QuantLinear, qo.QuantConv2d))]
    assert [layer.num_steps for layer in layers] == [steps] * 4

    block = REAL_QUANT.replace("path_to_checkpoint", str(path))
    qnn = run(block, unet=fresh, n_bits=8, ddim_steps=steps)["qnn"]
    expected, first, again, loaded = (Pipeline(m, steps)("a cat", 7.5)["sample"] for m in (reference, qunet, qunet, qnn))
    assert torch.equal(first, again)  # the count starts again with every run
    assert torch.equal(first, loaded)
    for copied in (copy.deepcopy(qunet), pickle.loads(pickle.dumps(qunet))):
        assert torch.equal(first, Pipeline(copied, steps)("a cat", 7.5)["sample"])
    assert (first - expected).norm() < 0.03 * expected.norm()
    if steps > 1:
        with pytest.raises(ValueError, match=rf"expected a checkpoint of 3 steps, got \[{steps}\]"):
            run(block, unet=TinyUNet(), n_bits=8, ddim_steps=3)


def test_torch_quantizer_fake_model_simulates_and_trains():
    """The first forward is the float model's; later ones have the values of 2-bit weights, and gradients."""
    from quant_ops.compat import torch_quantizer as tq

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), torch.randn(64, 8)
    expected = model(x)
    fake = tq.fake_quant(model, {"n_bits": 2, "scale_method": "mse"}, {"scale_method": "mse"})
    assert torch.equal(fake(x), expected)
    simulated = fake(x)
    assert 0.05 < (simulated - expected).norm() / expected.norm() < 1
    simulated.square().mean().backward()
    assert all(p.grad is not None for p in fake.parameters())
    scale = float(fake[0].input_scale)
    fake.train()(10 * x)
    assert float(fake[0].input_scale) == scale


def runs(model, timesteps):
    """What step the model is in at each call."""
    steps = []
    handle = model.up.register_forward_hook(lambda layer, *_: steps.append(int(layer.timestep)))
    for t in timesteps:
        model(torch.randn(1, 4, 8, 8), torch.tensor(float(t)))
    handle.remove()
    return steps


def test_torch_quantizer_counts_runs_by_their_timesteps(tmp_path):
    """A run of another length warns and shifts no later one; so does a stray call."""
    from quant_ops.compat import torch_quantizer as tq

    run = [30, 20, 10]
    fake = tq.fake_quant(TinyUNet().eval(), {}, {}, num_steps=3)
    assert runs(fake, run + run) == [0, 1, 2] * 2
    real = tq.fake2real(fake, tmp_path)
    with pytest.warns(UserWarning, match="expected runs of 3 calls of the model, got one of 1"):
        assert runs(real, [15, *run, *run]) == [0, *[0, 1, 2] * 2]
    loaded = tq.real_quant(TinyUNet().eval(), 8, 3, str(tmp_path / "TinyUNet_8bits_3steps.safetensors"))
    with pytest.warns(UserWarning, match="expected runs of 3 calls of the model, got one of 4"):
        assert runs(loaded, [30, 20, 20, 10, *run]) == [0, 1, 2, 2, 0, 1, 2]
    loaded = tq.real_quant(TinyUNet().eval(), 8, 3, str(tmp_path / "TinyUNet_8bits_3steps.safetensors"))
    with pytest.warns(UserWarning, match="expected runs of 3 calls of the model, got one of 2"):
        assert runs(loaded, [15, *run, *run]) == [0, 1, 1, 2, 0, 1, 2]  # the direction shows at the third call
    fake = tq.fake_quant(TinyUNet().eval(), {}, {}, num_steps=3)
    assert runs(fake, [5, 5]) == [0, 1]
    with pytest.warns(UserWarning, match="expected runs of 3 calls of the model, got one of 2"):
        tq.fake2real(fake, tmp_path)


def test_torch_quantizer_looks_at_the_folder_first(tmp_path):
    from quant_ops.compat import torch_quantizer as tq

    fake = tq.fake_quant(TinyUNet().eval(), {}, {})
    fake(torch.randn(1, 4, 8, 8), torch.tensor(1.0))
    with pytest.raises(FileNotFoundError, match=r"^quant_ops\.fake2real: expected save_dir to be a folder, got "):
        tq.fake2real(fake, tmp_path / "none")
    tq.fake2real(fake, tmp_path)
    with pytest.raises(TypeError, match=r"expected act_quant_params with keys among \[.*\], got \['bogus'\]$"):
        tq.fake_quant(TinyUNet(), {}, {"bogus": 1})


def test_torch_quantizer_without_a_checkpoint():
    from quant_ops.compat import torch_quantizer as tq

    model = TinyUNet().eval()
    x, t = torch.randn(1, 4, 8, 8), torch.tensor(1.0)
    expected = model(x, t)
    assert tq.real_quant(model, n_bits=8) is model
    assert (model(x, t) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("weights", "activations", "words"),
    [
        ({"scale_method": "max"}, {"n_bits": 4}, r"act_quant_params\['n_bits'\] == 8, got 4"),
        ({}, {"channel_wise": True}, r"act_quant_params\['channel_wise'\] == False"),
        ({"scale_method": "kl"}, {}, r"weight_quant_params\['scale_method'\] in \['max', 'mse'\], got 'kl'"),
        ({"n_bits": 9}, {}, "2 <= weight_bits <= 8, got 9"),
    ],
)
def test_torch_quantizer_refuses(weights, activations, words):
    from quant_ops.compat import torch_quantizer as tq

    model = TinyUNet()
    with pytest.raises(ValueError, match=words):
        tq.fake_quant(model, weights, activations)
    assert type(model.up) is nn.Conv2d


def test_torch_quantizer_operators():
    """Against int64 and the formulas of its documentation."""
    from quant_ops.compat.torch_quantizer import asymmetric, matmul

    x, delta, zp = torch.randn(2, 5, 9, 8).half() * 3, torch.tensor([0.05]).half(), torch.tensor([7.0]).half()
    codes = asymmetric.myQuantize(x, delta, zp)
    assert torch.equal(codes, (torch.round(x.float() / delta.float()) + 7).clamp(-128, 127).to(torch.int8))
    nhwc = asymmetric.myQuantizeNCHW(x, delta, zp)
    assert nhwc.is_contiguous()
    assert torch.equal(nhwc.permute(0, 3, 1, 2), codes)

    a, b = (torch.randint(-128, 128, shape, dtype=torch.int8) for shape in ((6, 70), (11, 70)))
    exact = a.long() @ b.long().T
    assert torch.equal(matmul.int8Matmul(a, b).long(), exact)
    sums, scale, bias = torch.randn(11) * 100, torch.rand(11), torch.randn(11)
    assert torch.equal(matmul.myInt8Matmul(a, b, sums, scale[:, None], bias), (exact.float() - sums) * scale + bias)

    kernel = torch.randint(-128, 128, (4, 3, 2, 5), dtype=torch.int8)  # O, R, S, C
    geometry = {"padding": (1, 2), "stride": (2, 1), "dilation": (1, 3)}
    exact = F.conv2d(codes.double(), kernel.permute(0, 3, 1, 2).double(), None, **geometry)
    settings = [*geometry["padding"], *geometry["stride"], *geometry["dilation"]]
    assert torch.equal(matmul.int8Conv(nhwc, kernel, *settings).permute(0, 3, 1, 2).double(), exact)
    sums, scale, bias = torch.randn(4) * 100, torch.rand(4), torch.randn(4)
    got = matmul.myInt8Conv(nhwc, kernel, *settings, sums, scale, bias, True)
    column = (1, 4, 1, 1)
    assert torch.equal(got, ((exact.float() - sums.view(column)) * scale.view(column) + bias.view(column)).relu())


@pytest.mark.parametrize(
    "options", ["linear --bs 5 --cin 96 --cout 64", "conv2d --bs 1 --cin 32 --cout 64 --h 9 --w 8 --k 3 --p 1"]
)
def test_torch_quantizer_benchmark_commands(options):
    """Its ``benchmark.py --o linear --bs 512 --cin 960 --cout 960``."""
    command = [sys.executable, "-m", "quant_ops", "bench", *options.split(), "--seconds", "0.01"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    title, *rows, sqnr = done.stdout.splitlines()
    assert title.startswith(re.sub(r" --(\w+) (\d+)", r" \1=\2", options))
    assert [row.split("  ")[1] for row in rows] in (
        [a, b, "INT8 dynamic", "INT8 static"] for a, b in [("FP32", "BF16"), ("FP32", "FP16")]
    )
    assert all(float(value) > 30 for value in re.findall(r"([\d.]+) dB", sqnr))


def test_torch_quantizer_benchmark_functions(capsys, monkeypatch):
    from quant_ops.compat import torch_quantizer as tq
    from quant_ops.report import bench

    monkeypatch.setattr(
        bench, "interleave", lambda calls, **_: {name: [1e-3] for name, call in calls.items() if call() is not None}
    )
    tq.benchmark_linear(3, 32, 64)
    tq.benchmark_conv2d(bs=1, cin=8, h=5, w=6, cout=12, k=3, padding=1)
    printed = capsys.readouterr().out
    assert "linear bs=3 cin=32 cout=64" in printed
    assert "conv2d bs=1 cin=8 cout=12 h=5 w=6 k=3 p=1" in printed


# ---- torch_quant (BladeDISC) ---------------------------------------------------------------------------------------------

TORCH_QUANT = """
from quant_ops.compat.torch_quant import Quantizer

model = MyModel() # torch.nn.Module
typical_data = torch.tensor([1, 2, 3])
quantizer = Quantizer()

# create a proxy model and run forward to calibrate quantization params
quantizer.calib(model)(typical_data)

# [Optional] perform automatic mixed precision quantization
# create a proxy model and run forward to fallback few sensitive layers to float precision
amp_model = quantizer.amp(model)
amp_model(typical_data)
quantizer.fallback(amp_model, num=1)

# create a proxy model representing quantized model
quant_model = quantizer.quantize(model)

# run inference on quantized model
output = quant_model(typical_data)

# or save model as torchscript
traced = torch.jit.trace(quant_model, typical_data)
torch.jit.save(traced, 'quant.pt')

# or further optimized using BladeDISC
opt = torch_blade.optimize(quant_model)
"""


class Tokens(nn.Module):
    """Takes token ids; the layer "outlier" suffers from int8, whatever its magnitude."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(16, 32)
        self.up = nn.Linear(32, 64)
        self.outlier = nn.Linear(64, 64)
        self.head = nn.Linear(64, 4)
        with torch.no_grad():
            self.outlier.weight.mul_(1e-2)
            self.outlier.weight[:, 0] = 3  # one column of large weights, for an input that is 0, takes the codes of all the others
            self.outlier.bias.zero_()
            self.up.weight[0] = 0
            self.up.bias[0] = 0

    def forward(self, ids):
        return self.head(self.outlier(self.up(self.embedding(ids)).relu()) * 1e2)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*")
def test_torch_quant_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = Tokens().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    blade = types.SimpleNamespace(optimize=torch.compile)
    found = run(TORCH_QUANT, torch=torch, MyModel=lambda: model, torch_blade=blade)
    ids, quantized = found["typical_data"], found["quant_model"]
    assert {name: type(module) for name, module in quantized.named_children()} == {
        "embedding": nn.Embedding,
        "up": qo.QuantLinear,
        "outlier": nn.Linear,
        "head": qo.QuantLinear,
    }
    assert {name: type(module) for name, module in model.named_children()} == {
        "embedding": nn.Embedding,
        "up": nn.Linear,
        "outlier": nn.Linear,
        "head": nn.Linear,
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    expected = model(ids)
    assert (found["output"] - expected).norm() < 0.03 * expected.norm()
    assert torch.equal(torch.jit.load("quant.pt")(ids), found["output"])


def test_torch_quant_filter_backend_and_amp():
    from quant_ops.compat.torch_quant import Backend, Device, ModuleFilter, Quantizer

    model, ids = Tokens().eval(), torch.arange(16)
    quantizer = Quantizer(ModuleFilter(exclude_names=["head"]), Backend.DISC, Device.GPU)
    with pytest.raises(ValueError, match="expected quantize after calib or qat of the same model, got neither"):
        quantizer.quantize(model)
    quantizer.calib(model)(ids)
    amp = quantizer.amp(model)
    with pytest.raises(ValueError, match="expected fallback after a run of the amp model"):
        quantizer.fallback(amp, 1)
    assert torch.equal(amp(ids), model(ids))
    assert not any(module._forward_hooks for module in model.modules())
    assert [layer.name for layer in amp.report()] == ["outlier", "up"]
    assert amp(ids).isfinite().all()
    assert [layer.calls for layer in amp.report()] == [2, 2]
    quantized = quantizer.quantize(model)
    assert type(quantized.head) is nn.Linear
    assert quantized.up.input_zero_point is None
    assert quantizer.fallback(amp, 1) == ["outlier"]
    assert quantizer.module_filter.exclude_names == ["head", "outlier"]
    assert type(quantizer.quantize(model).outlier) is nn.Linear

    only = Quantizer(ModuleFilter(include_classes=[nn.Linear], exclude_names=["up"]))
    only.calib(model)(ids)
    assert type(only.quantize(model).up) is nn.Linear
    assert isinstance(only.quantize(model).head, qo.QuantLinear)
    with pytest.raises(TypeError, match="expected act_ob_ctr to be an observer's name or class"):
        Quantizer(act_ob_ctr=torch.nn.Identity)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        return self.lin(x)


def blocks():
    torch.manual_seed(0)
    return nn.Sequential(Block(), nn.Conv1d(8, 8, 1), nn.Flatten(0), nn.Linear(72, 4)).eval()


@pytest.mark.parametrize(
    ("settings", "quantized"),
    [
        ({"exclude_classes": [Block]}, {"1", "3"}),
        ({"exclude_classes": ["Block"]}, {"1", "3"}),
        ({"include_classes": [Block]}, {"0.lin"}),
        ({"include_classes": [nn.Linear]}, {"0.lin", "3"}),
        ({"include_classes": [Block], "include_names": ["3"]}, {"0.lin", "3"}),
        ({"include_names": ["0"], "exclude_classes": [nn.Linear]}, set()),
        ({"include_op_types": [nn.Linear]}, {"0.lin", "3"}),
        ({"exclude_op_types": [nn.Linear]}, {"1"}),
        ({"include_op_types": [nn.Linear], "exclude_names": ["0"]}, {"3"}),
    ],
)
@pytest.mark.filterwarnings("ignore:quant_ops.prepare_. expected at least one")
def test_torch_quant_filters(settings, quantized):
    """A container class stands for all within."""
    from quant_ops.compat.torch_quant import ModuleFilter, Quantizer

    model, quantizer = blocks(), Quantizer(ModuleFilter(**settings))
    proxy = quantizer.calib(model)
    with torch.no_grad():
        proxy[3](proxy[2](proxy[1](proxy[0](torch.randn(9, 8)).T)))
    if not quantized:
        with pytest.raises(ValueError, match="expected quantize after calib"):
            quantizer.quantize(model)
        return
    made = quantizer.quantize(model)
    assert {name for name, layer in made.named_modules() if isinstance(layer, Int8Layer)} == quantized


@pytest.mark.parametrize("field", ["include_names", "exclude_names"])
def test_torch_quant_refuses_a_name_that_no_module_has(field):
    from quant_ops.compat.torch_quant import ModuleFilter, Quantizer

    with pytest.raises(ValueError, match=rf"^quant_ops\.ModuleFilter: expected {field} of modules of the model, got \['b1'\]$"):
        Quantizer(ModuleFilter(**{field: ["0", "b1"]})).calib(blocks())


def test_torch_quant_calibration_is_the_models():
    """It goes on with a second calib, is saved, may be quantized by another Quantizer, and training starts from it."""
    from quant_ops.compat.torch_quant import Backend, Quantizer

    model, x = nn.Sequential(nn.Linear(8, 4)).eval(), torch.linspace(-12.7, 12.7, 16).reshape(2, 8)
    Quantizer(backend=Backend.DISC).calib(model)(x)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    Quantizer(backend=Backend.DISC).calib(model)(x / 100)
    made = Quantizer(backend=Backend.DISC).quantize(model)
    assert float(made[0].input_scale) == pytest.approx(0.1)
    assert type(model[0]) is nn.Linear
    resumed = nn.Sequential(nn.Linear(8, 4)).eval()
    quantizer = Quantizer(backend=Backend.DISC)
    quantizer.calib(resumed)
    resumed.load_state_dict(state)
    again = quantizer.quantize(resumed)
    assert torch.equal(again(x), made(x))
    assert again.state_dict().keys() == made.state_dict().keys()
    trained = quantizer.qat(resumed)
    trained(x / 100)
    assert float(trained[0].input_scale.detach()) == pytest.approx(0.1)


def test_torch_quant_observers_of_backends_and_by_class():
    from functools import partial

    from quant_ops.compat import torch_quant as tq

    x = torch.distributions.StudentT(3.0).sample((64, 8))
    for backend, observer, zero_point in (("REFERENCE", "minmax", True), ("DISC", "minmax", False), ("FBGEMM", "histogram", True),
                                          ("MNN", "histogram", False)):  # fmt: skip
        model = nn.Sequential(nn.Linear(8, 4)).eval()
        quantizer = tq.Quantizer(backend=tq.Backend[backend], bias_ob_ctr=tq.BiasObserver)
        quantizer.calib(model)(x)
        layer = quantizer.quantize(model)[0]
        assert (layer.config.observer, layer.input_zero_point is not None) == (observer, zero_point)
    given = partial(tq.HistogramObserver, dtype=torch.qint8, qscheme=torch.per_tensor_symmetric)
    quantizer = tq.Quantizer(act_ob_ctr=given, w_ob_ctr=tq.PerChannelMinMaxObserver)
    quantizer.calib(model, act_ob_ctr=tq.MinMaxObserver)(x)
    assert quantizer.quantize(model)[0].config == qo.Int8Static("minmax")


def test_torch_quant_qat_trains_the_models_own_parameters():
    from quant_ops.compat.torch_quant import Quantizer

    model, ids = Tokens(), torch.arange(16)
    quantizer = Quantizer()
    proxy = quantizer.qat(model)
    proxy(ids)
    optimizer = torch.optim.Adam(proxy.parameters(), lr=1e-2)
    before = model.head.weight.detach().clone()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.cross_entropy(proxy(ids), ids % 4)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    assert not torch.equal(model.head.weight, before)
    quantized = quantizer.quantize(model.eval())
    assert (quantized(ids).argmax(1) == ids % 4).float().mean() > 0.8
