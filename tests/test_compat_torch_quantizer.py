"""quant_ops.compat.torch_quantizer: the blocks of its document, steps and checkpoints, its operators and benchmarks."""

import copy
import pickle
import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from documents import run
from processes import python
from torch import nn

import quant_ops as qo

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


def test_torch_quantizer_with_several_calls_in_each_step(tmp_path):
    """Guidance without a doubled batch: both calls of a step are observed, and have its scales."""
    from quant_ops.compat import torch_quantizer as tq

    run = [30, 30, 20, 20, 10, 10]
    fake = tq.fake_quant(TinyUNet().eval(), {}, {}, num_steps=3, calls_per_step=2)
    assert runs(fake, run) == [0, 0, 1, 1, 2, 2]
    assert fake.up.observer.count.tolist() == [2, 2, 2]
    assert runs(fake, run) == [0, 0, 1, 1, 2, 2]
    assert fake.up.observer.count.tolist() == [2, 2, 2]  # it simulates now
    real = tq.fake2real(fake, tmp_path)
    with pytest.warns(UserWarning, match="expected runs of 6 calls of the model, got one of 2"):
        assert runs(real, [15, 15, *run, *run]) == [0, 0, *[0, 0, 1, 1, 2, 2] * 2]
    path = str(tmp_path / "TinyUNet_8bits_3steps.safetensors")
    loaded = tq.real_quant(TinyUNet().eval(), 8, 3, path, calls_per_step=2)
    assert runs(loaded, run + run) == [0, 0, 1, 1, 2, 2] * 2
    loaded = tq.real_quant(TinyUNet().eval(), 8, 3, path, calls_per_step=2)
    with pytest.warns(UserWarning, match="expected runs of 6 calls of the model, got one of 3"):
        assert runs(loaded, [15, *run, *run])[3:] == [1, 1, 2, 2, *[0, 0, 1, 1, 2, 2]]  # the direction shows at the fourth call
    for call in (tq.fake_quant, tq.real_quant):
        with pytest.raises(ValueError, match=rf"^quant_ops\.{call.__name__}: expected calls_per_step >= 1, got 0$"):
            call(TinyUNet(), {}, {}, calls_per_step=0)


def test_torch_quantizer_looks_at_the_checkpoint_first(tmp_path):
    from quant_ops.compat import torch_quantizer as tq

    fake = tq.fake_quant(TinyUNet().eval(), {"n_bits": 4}, {})
    fake(torch.randn(1, 4, 8, 8), torch.tensor(1.0))
    tq.fake2real(fake, tmp_path)
    path = str(tmp_path / "TinyUNet_8bits_1steps.safetensors")
    model = TinyUNet().eval()
    with pytest.raises(ValueError, match=r"^quant_ops\.real_quant: expected a checkpoint of 8 bits, got \[4\] in "):
        tq.real_quant(model, ckpt_path=path)
    with pytest.raises(ValueError, match=r"expected a checkpoint of 5 steps, got \[1\] in "):
        tq.real_quant(model, 4, 5, path)
    assert {type(layer) for layer in model.children()} == {nn.Conv2d, nn.Linear}
    assert type(tq.real_quant(model, 4, 1, path).up) is qo.QuantConv2d


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
    done = python("-m", "quant_ops", "bench", *options.split(), "--seconds", "0.01")
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
