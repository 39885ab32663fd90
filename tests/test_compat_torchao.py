"""quant_ops.compat.torchao: every block of its document runs, with torchao's codes and the values of a float64 reference."""

import copy
import io
import itertools
import pickle
import types
from pathlib import Path

import language_model
import pytest
import torch
import torch.nn.functional as F
from documents import run
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import quant_ops as qo
from quant_ops.autoquant import choice as choice_module
from quant_ops.compat import torchao
from quant_ops.compat.torchao import forms
from quant_ops.compat.torchao._eval import InputRecorder, MultiInput, TransformerEvalWrapper
from quant_ops.compat.torchao.dtypes.aqt import AffineQuantizedTensor, QuantizeRows, to_aq, to_laq
from quant_ops.compat.torchao.quantization import quant_api, quant_primitives, smoothquant
from quant_ops.compat.torchao.quantization.GPTQ import batches_of
from quant_ops.compat.torchao.quantization.utils import compute_error, get_model_size_in_bytes, unwrap_tensor_subclass
from quant_ops.report.error import sqnr

# The document's code blocks in its order. Import lines are changed; without CUDA `"cuda"` and `.cuda()` are the CPU. torch.compile
# is without inductor, which would take a minute. What else is mended is said above each block.

# `import torchao` is `from quant_ops.compat import torchao`.
AUTOQUANT = """
import torch
from quant_ops.compat import torchao

# inductor settings which improve torch.compile performance for quantized modules
torch._inductor.config.force_fuse_int_mm_with_mul = True
torch._inductor.config.use_mixed_mm = True

# Plug in your model and example input
model = torch.nn.Sequential(torch.nn.Linear(32, 64)).cuda().to(torch.bfloat16)
input = torch.randn(32,32, dtype=torch.bfloat16, device='cuda')

# perform autoquantization and torch.compile
model = torchao.autoquant(torch.compile(model, mode='max-autotune'))

# pass in an input which is used in order to pick fastest quantization operations
# and apply torch compilation.
model(input)
"""

# pickle.dump gets the file. `import torchao.quantization` binds torchao, as the changed line does.
CACHE = """
import pickle
from quant_ops.compat import torchao
import quant_ops.compat.torchao.quantization

# After the first forward pass (when quantization was done)
with open("quantization-cache.pkl", "wb") as f:
    pickle.dump(torchao.quantization.AUTOQUANT_CACHE, f)

# On load
with open("quantization-cache.pkl", "rb") as f:
    torchao.quantization.AUTOQUANT_CACHE.update(pickle.load(f))
"""

# torch is the test's.
INT8_DYNAMIC = """
# Fuse the int8*int8 -> int32 matmul and subsequent mul op avoiding materialization of the int32 intermediary tensor
torch._inductor.config.force_fuse_int_mm_with_mul = True
from quant_ops.compat.torchao.quantization import quant_api
# convert linear modules to quantized tensor subclasses
quant_api.change_linear_weights_to_int8_dqtensors(model)
"""

INT8_WEIGHT_ONLY = """
from quant_ops.compat.torchao.quantization import quant_api
quant_api.change_linear_weights_to_int8_woqtensors(model)
"""

INT4_WEIGHT_ONLY = """
from quant_ops.compat.torchao.quantization import quant_api
quant_api.change_linear_weights_to_int4_woqtensors(model)
"""

# What is not imported is the test's: torch, Path, Transformer, SentencePieceProcessor, prepare_inputs_for_model. A text takes the
# place of the task's name.
GPTQ = """
from quant_ops.compat.torchao._eval import InputRecorder, TransformerEvalWrapper
from quant_ops.compat.torchao.quantization.GPTQ import Int4WeightOnlyGPTQQuantizer
precision = torch.bfloat16
device = "cuda"
checkpoint_file_name = "../gpt-fast/checkpoints/meta-llama/Llama-2-7b-chat-hf/model.pth"
checkpoint_path = Path(checkpoint_file_name)
model = Transformer.from_name(checkpoint_path.parent.name)
checkpoint = torch.load(str(checkpoint_path), mmap=True, weights_only=True)
model.load_state_dict(checkpoint, assign=True)
model = model.to(dtype=precision, device="cpu")
model.eval()
tokenizer_path = checkpoint_path.parent / "tokenizer.model"
assert tokenizer_path.is_file(), tokenizer_path
tokenizer = SentencePieceProcessor(  # pyre-ignore[28]
    model_file=str(tokenizer_path)
)
blocksize = 128
percdamp = 0.01
groupsize = 128
calibration_tasks = [calibration_text]
calibration_limit = 1
calibration_seq_length = 100
input_prep_func = prepare_inputs_for_model
pad_calibration_inputs = False

inputs = InputRecorder(
    tokenizer,
    calibration_seq_length,
    input_prep_func,
    pad_calibration_inputs,
    model.config.vocab_size,
    device="cpu",
).record_inputs(
    calibration_tasks,
    calibration_limit,
).get_inputs()

quantizer = Int4WeightOnlyGPTQQuantizer(
    blocksize,
    percdamp,
    groupsize,
)
model.setup_caches(max_batch_size=1, max_seq_length=calibration_seq_length)
model = quantizer.quantize(model, inputs).cuda()
"""

INT4_DYNAMIC = """
from quant_ops.compat.torchao.quantization.quant_api import Int8DynActInt4WeightQuantizer
quantizer = Int8DynActInt4WeightQuantizer(groupsize=32)
model = quantizer.quantize(model)
"""

# get_model, get_calibration_data, MyDataset, DataLoader and input are the test's.
SMOOTHQUANT = """
import torch
from quant_ops.compat.torchao.quantization.smoothquant import swap_linear_with_smooth_fq_linear, smooth_fq_linear_to_inference

# Fuse the int8*int8 -> int32 matmul and subsequent mul op avoiding materialization of the int32 intermediary tensor
torch._inductor.config.force_fuse_int_mm_with_mul = True

# plug in your model
model = get_model()

# convert linear modules to smoothquant
# linear module in calibration mode
swap_linear_with_smooth_fq_linear(model)

# Create a data loader for calibration
calibration_data = get_calibration_data()
calibration_dataset = MyDataset(calibration_data)
calibration_loader = DataLoader(calibration_dataset, batch_size=32, shuffle=True)

# Calibrate the model
model.train()
for batch in calibration_loader:
    inputs = batch
    model(inputs)

# set it to inference mode
smooth_fq_linear_to_inference(model)

# compile the model to improve performance
model = torch.compile(model, mode='max-autotune')
model(input)
"""

# torch, nn, MappingType and m are the test's.
FLOW = """
from quant_ops.compat.torchao.dtypes.aqt import to_aq
def apply_int8wo_quant(weight):
    mapping_type = MappingType.SYMMETRIC
    target_dtype = torch.int8
    eps = torch.finfo(torch.float32).eps
    zero_point_dtype = torch.int64
    block_size = (1, weight.shape[1])
    return to_aq(weight, mapping_type, block_size, target_dtype, eps=eps, zero_point_dtype=zero_point_dtype)

for n, m in model.named_modules():
    if isinstance(m, torch.nn.Linear):
        # optional filtering for module name, shape etc.
        m.weight = nn.Parameter(apply_int8wo_quant(m.weight))
        # note: quantization for activation need to be applied after the weight quantization
        # quantization activation (needed by dynamic quantization)
        # input_quant_func = apply_int8wo_quant  # specify how input activation is quantized
        # m.weight = nn.Parameter(to_laq(m.weight, input_quant_func))
"""

# The two commented lines of the block, with the import that they need.
FLOW_INPUTS = """
from quant_ops.compat.torchao.dtypes.aqt import to_laq
for n, m in model.named_modules():
    if isinstance(m, torch.nn.Linear):
        input_quant_func = apply_int8wo_quant  # specify how input activation is quantized
        m.weight = nn.Parameter(to_laq(m.weight, input_quant_func))
"""

# The result of aot_compile has a name.
EXPORT = """
from quant_ops.compat.torchao.quantization.utils import unwrap_tensor_subclass
m_unwrapped = unwrap_tensor_subclass(m)


# export
m = torch.export.export(m_unwrapped, example_inputs).module()

# aot_compile
compiled = torch._export.aot_compile(m_unwrapped, example_inputs)
"""

# do_bench_gpu, which is not used, is not imported: torch 2.13 has none. The printed output below the code is left out. The model
# and the number of runs are smaller.
EXAMPLE = """
import torch
from quant_ops.compat.torchao.quantization.quant_primitives import MappingType, ZeroPointDomain
from quant_ops.compat.torchao.dtypes import to_aq
import copy
from quant_ops.compat.torchao.quantization.quant_api import (
    quantize,
    get_apply_int4wo_quant,
)

class ToyLinearModel(torch.nn.Module):
    def __init__(self, m=64, n=32, k=64):
        super().__init__()
        self.linear1 = torch.nn.Linear(m, n, bias=False)
        self.linear2 = torch.nn.Linear(n, k, bias=False)

    def example_inputs(self, batch_size=1, dtype=torch.float32, device="cpu"):
        return (torch.randn(batch_size, self.linear1.in_features, dtype=dtype, device=device),)

    def forward(self, x):
        x = self.linear1(x)
        x = self.linear2(x)
        return x

dtype = torch.bfloat16
m = ToyLinearModel(1024, 1024, 1024).eval().to(dtype).to("cuda")
m_bf16 = copy.deepcopy(m)
example_inputs = m.example_inputs(dtype=dtype, device="cuda")

m_bf16 = torch.compile(m_bf16, mode='max-autotune')
# apply int4 weight only quant (compatible with tinygemm int4 weight only quant mm kernel in torchao)
groupsize = 32
m = quantize(m, get_apply_int4wo_quant(groupsize=groupsize))

torch._inductor.config.force_fuse_int_mm_with_mul = True
torch._inductor.config.use_mixed_mm = True

# temporary workaround for tensor subclass + torch.compile
from quant_ops.compat.torchao.quantization.utils import unwrap_tensor_subclass
m = unwrap_tensor_subclass(m)
# compile the model to improve performance
m = torch.compile(m, mode='max-autotune')

# benchmark to see the speedup
from quant_ops.compat.torchao.utils import benchmark_model

num_runs = 100
torch._dynamo.reset()
bf16_time = benchmark_model(m_bf16, num_runs, example_inputs[0])
print(f"bf16 mean time: {bf16_time}")
int4_time = benchmark_model(m, num_runs, example_inputs[0])
print(f"int4 weight only quantized mean time: {int4_time}")
print(f"speedup: {bf16_time / int4_time}")
"""


@pytest.fixture(autouse=True)
def _devices(monkeypatch):
    """Without CUDA the blocks run on the CPU; torch.compile stops before inductor."""
    torch._dynamo.reset()
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model, mode=None, **kwargs: compile_(model, backend="aot_eager", **kwargs))
    if not torch.cuda.is_available():
        monkeypatch.setattr(nn.Module, "cuda", lambda self, *_: self)
    with torch._inductor.config.patch(force_fuse_int_mm_with_mul=False, use_mixed_mm=False):
        yield
    torch._dynamo.reset()


def block(text, **names):
    """Runs a block of the document."""
    if not torch.cuda.is_available():
        text = text.replace("'cuda'", "'cpu'").replace('"cuda"', '"cpu"')
    return run(text, **names)


def model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(96, 64), nn.GELU(), nn.Linear(64, 32)).to(dtype).eval()


def reference(net, weight_of, input_of=lambda x: x):
    """What two linear layers with GELU give in float64, with weights and inputs that are changed by functions."""

    def call(x):
        x = x.double()
        for layer in net:
            if isinstance(layer, nn.Linear):
                x = F.linear(input_of(x), weight_of(layer.weight.detach()).double(), layer.bias.detach().double())
            else:
                x = layer(x)
        return x

    return call


def symmetric(w, bits=8, group=None):
    """A weight of codes [-2^(bits-1), 2^(bits-1) - 1], whose scale is amax / (2^(bits-1) - 1/2): torchao's symmetric mapping.

    In float32 and with its reciprocal, since the largest magnitude is a tie.
    """
    half = 2 ** (bits - 1)
    groups = w.unflatten(1, (-1, group or w.shape[1]))
    scale = groups.abs().amax(2, keepdim=True) / (half - 0.5)
    codes = (groups * (1 / scale)).round().clamp(-half, half - 1)
    return (codes.double() * scale.double()).flatten(1)


def tinygemm(w, group):
    """A weight of codes [0, 15] whose zero point is the value of code 8: (max - min) / 15 and min + 8 scale."""
    groups = w.double().unflatten(1, (-1, group))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-6)
    return (((groups - low) / scale).round().clamp(0, 15) * scale + low).flatten(1)


def rows(x, asymmetric=False):
    """int8 inputs by rows."""
    if not asymmetric:
        scale = x.abs().amax(-1, keepdim=True) / 127
        return (x / scale).round() * scale
    low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
    scale = (high - low) / 255
    zero = (-128 - (low / scale).round()).clamp(-128, 127)
    return ((x / scale).round() + zero).clamp(-128, 127).sub(zero) * scale


# ---- the document --------------------------------------------------------------------------------------------------------


def test_document_autoquant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    qo.AUTOQUANT_CACHE.clear()
    found = block(AUTOQUANT)
    compiled = found["model"]
    assert compiled.autoquant_result.finished
    assert len(qo.AUTOQUANT_CACHE) == 3
    known, config = dict(qo.AUTOQUANT_CACHE), compiled.autoquant_result.layers[0].config
    block(CACHE)
    assert pickle.loads(Path("quantization-cache.pkl").read_bytes()) == known
    assert torchao.quantization.AUTOQUANT_CACHE is qo.AUTOQUANT_CACHE
    assert dict(qo.AUTOQUANT_CACHE) == known

    qo.AUTOQUANT_CACHE.clear()  # another process
    block(CACHE.replace("pickle.dump(torchao", "{}  # ").replace('"wb"', '"rb"'))
    monkeypatch.setattr(choice_module, "interleave", None)
    again = block(AUTOQUANT)["model"]
    assert again.autoquant_result.layers[0].config == config
    assert known == qo.AUTOQUANT_CACHE
    for key in known:  # int8 is the fastest from now on
        qo.AUTOQUANT_CACHE[key] = 1.0 if "Int8Dynamic" in key.candidate else 2.0
    found = block(AUTOQUANT)
    assert isinstance(found["model"]._orig_mod[0], qo.QuantLinear)
    assert found["model"](found["input"]).dtype == torch.bfloat16
    qo.AUTOQUANT_CACHE.clear()


@pytest.mark.parametrize(
    ("text", "weight_of", "input_of", "layer", "dtype"),
    [
        (INT8_DYNAMIC, symmetric, rows, "QuantLinear", torch.float32),
        (INT8_WEIGHT_ONLY, symmetric, lambda x: x, "WeightOnlyLinear", torch.float32),
        (INT4_WEIGHT_ONLY, lambda w: tinygemm(w, w.shape[1]), lambda x: x, "WeightOnlyLinear", torch.float32),
        (INT4_DYNAMIC, lambda w: symmetric(w, 4, 32), lambda x: rows(x, True), "WeightOnlyLinear", torch.float32),
        (INT8_DYNAMIC, symmetric, rows, "QuantLinear", torch.bfloat16),
        (INT4_WEIGHT_ONLY, lambda w: tinygemm(w, w.shape[1]), lambda x: x, "WeightOnlyLinear", torch.bfloat16),
    ],
)
def test_document_layers(text, weight_of, input_of, layer, dtype):
    net, x = model(dtype), torch.randn(3, 5, 96).to(dtype)
    expected, before = reference(net, weight_of, input_of)(x), net(x)
    made = block(text, torch=torch, model=net)["model"]
    assert made is net
    assert [type(part).__name__ for part in net] == [layer, "GELU", layer]
    y = net(x)
    # int4's zero points are bfloat16, as in the original
    assert sqnr(expected, y) > (25 if dtype == torch.bfloat16 or text is INT4_WEIGHT_ONLY else 45)
    assert sqnr(before, y) > (15 if "int4" in text.lower() else 35)
    exported = torch.export.export(net, (x,)).module()
    assert torch.equal(exported(x), y)
    assert torch.equal(torch.compile(net)(x), y)


class Characters:
    """As SentencePiece's."""

    def __init__(self, model_file):
        written = Path(model_file).read_text()
        self.numbers = {character: i for i, character in enumerate(sorted(set(written)))}
        self.written = written

    def encode(self, text):
        return [self.numbers[character] for character in text]


class Transformer(language_model.Decoder):
    """gpt-fast's, by name: in bfloat16, with positions, a config and caches."""

    caches = None

    @classmethod
    def from_name(cls, name):
        assert name == "Llama-2-7b-chat-hf"
        made = cls(language_model.text()[1])
        made.config = types.SimpleNamespace(vocab_size=language_model.text()[1])
        return made

    def setup_caches(self, max_batch_size, max_seq_length):
        self.caches = max_batch_size, max_seq_length

    def forward(self, tokens, positions):
        half = language_model.WIDTH // language_model.HEADS // 2
        angles = positions[:, None] * 1e4 ** (-torch.arange(half) / half)
        x = self.embed_tokens(tokens)
        rotary = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, rotary=rotary)
        return self.lm_head(self.norm(x))


def test_document_gptq(tmp_path, monkeypatch, threads):
    threads(1)  # more would mostly wait for each other in a model this small
    import pydoc_data.topics

    folder = tmp_path / "gpt-fast" / "checkpoints" / "meta-llama" / "Llama-2-7b-chat-hf"
    (tmp_path / "here").mkdir()
    folder.mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    torch.save(language_model.original().state_dict(), folder / "model.pth")
    written = "".join(pydoc_data.topics.topics.values())
    (folder / "tokenizer.model").write_text(written)
    found = block(
        GPTQ,
        torch=torch,
        Path=Path,
        Transformer=Transformer,
        SentencePieceProcessor=Characters,
        prepare_inputs_for_model=lambda tokens: (tokens, torch.arange(tokens.shape[1])),
        calibration_text=written[24000:25250],
    )
    net, inputs = found["model"], found["inputs"]
    assert net.caches == (1, 100)
    assert [len(argument.values) for argument in inputs] == [12, 12]
    linear = [name for name, layer in language_model.original().named_modules() if isinstance(layer, nn.Linear)]
    assert all(isinstance(net.get_submodule(name), qo.WeightOnlyLinear) for name in linear)
    tokens = Characters(folder / "tokenizer.model").encode(written[:9600])

    def perplexity(net):
        wrapper = TransformerEvalWrapper(
            copy.deepcopy(net).float(), None, 64, lambda tokens: (tokens, torch.arange(tokens.shape[1]))
        )
        return wrapper.run_eval([tokens])["results"]["texts"]["perplexity"]

    floating, rounded = Transformer.from_name("Llama-2-7b-chat-hf"), Transformer.from_name("Llama-2-7b-chat-hf")
    for one in (floating, rounded):
        one.load_state_dict(language_model.original().state_dict())
    rounded.to(torch.bfloat16)
    torchao.quantization.Int4WeightOnlyQuantizer(groupsize=128).quantize(rounded)
    base, plain, gptq = perplexity(floating), perplexity(rounded), perplexity(net)
    assert gptq < plain
    assert gptq < 1.01 * base


def test_document_smoothquant():
    """Outliers in one feature: the layer by layer reference of the paper, and less error than without."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 32))
    data = torch.randn(80, 64)
    data[:, 7] *= 60
    floating = copy.deepcopy(net).eval()
    x = data[:10]

    class MyDataset(TensorDataset):
        def __getitem__(self, index):
            return super().__getitem__(index)[0]

    found = block(
        SMOOTHQUANT,
        get_model=lambda: net,
        get_calibration_data=lambda: data,
        MyDataset=MyDataset,
        DataLoader=DataLoader,
        input=x,
    )
    assert [type(layer).__name__ for layer in net] == ["QuantLinear", "GELU", "QuantLinear"]
    expected, seen = x.double(), data
    for layer in floating:
        if isinstance(layer, nn.Linear):
            weight = layer.weight.detach()
            s = (seen.detach().abs().amax(0).double() / weight.abs().amax(0)).sqrt()
            smoothed = symmetric(weight * s.float())
            expected = F.linear(rows(expected / s), smoothed, layer.bias.detach().double())
        else:
            expected = layer(expected)
        seen = layer(seen)
    with torch.no_grad():
        y = found["model"](x)
    assert sqnr(expected, y) > 45
    plain = copy.deepcopy(floating)
    quant_api.change_linear_weights_to_int8_dqtensors(plain)
    assert sqnr(floating(x), y) > sqnr(floating(x), plain(x)) + 6


def test_document_flow_and_export(tmp_path):
    net, x = model(), torch.randn(4, 96)
    expected = reference(net, symmetric)(x)
    found = block(FLOW, torch=torch, nn=nn, MappingType=quant_primitives.MappingType, model=net)
    assert isinstance(net[0].weight, nn.Parameter)
    assert isinstance(net[0].weight, AffineQuantizedTensor)
    y = net(x)
    assert sqnr(expected, y) > 90
    quantized = copy.deepcopy(net)
    block(FLOW_INPUTS, torch=torch, nn=nn, model=net, apply_int8wo_quant=found["apply_int8wo_quant"])
    both = net(x)
    assert sqnr(reference(model(), symmetric, symmetric)(x), both) > 45
    with pytest.raises(TypeError, match=r"unwrap_tensor_subclass: expected the input of layer '0' to be quantized by QuantizeRows"):
        unwrap_tensor_subclass(net)
    assert torch.equal(net(x), both)
    exported = block(EXPORT[: EXPORT.index("# aot_compile")], torch=torch, m=quantized, example_inputs=(x,))
    assert torch.equal(exported["m"](x), y)
    assert [type(layer).__name__ for layer in exported["m_unwrapped"]] == ["WeightOnlyLinear", "GELU", "WeightOnlyLinear"]


@pytest.mark.slow
def test_document_ahead_of_time_compilation():
    net, x = model(), torch.randn(4, 96)
    quant_api.quantize(net, quant_api.get_apply_int8dyn_quant())
    y = net(x)
    compiled = block(EXPORT, torch=torch, m=net, example_inputs=(x,))["compiled"]
    assert sqnr(y, torch._export.aot_load(compiled, "cpu")(x)) > 45  # the compiled GELU has other last bits


def test_document_example(capsys):
    text = EXAMPLE.replace("(1024, 1024, 1024)", "(256, 128, 256)").replace("num_runs = 100", "num_runs = 5")
    found = block(text)
    printed = capsys.readouterr().out
    assert [line.split(":")[0] for line in printed.splitlines()] == [
        "bf16 mean time",
        "int4 weight only quantized mean time",
        "speedup",
    ]
    x = found["example_inputs"][0]
    original = found["m_bf16"]._orig_mod
    assert isinstance(found["m"]._orig_mod.linear1, qo.WeightOnlyLinear)
    expected = x.double()
    for layer in (original.linear1, original.linear2):
        expected = expected @ tinygemm(layer.weight.detach(), 32).T
    with torch.no_grad():
        assert sqnr(expected, found["m"](x)) > 22  # x, zero points and scales are bfloat16


# ---- against torchao -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_against_torchao(dtype):
    """Its codes and scales, and its layers' outputs."""
    ao = pytest.importorskip("torchao.quantization")
    net, x = model(dtype), torch.randn(5, 96).to(dtype)
    for theirs, ours in (
        (ao.Int8WeightOnlyConfig(), quant_api.Int8WeightOnlyConfig()),
        (ao.Int8DynamicActivationInt8WeightConfig(), quant_api.Int8DynamicActivationInt8WeightConfig()),
    ):
        original, made = copy.deepcopy(net), copy.deepcopy(net)
        ao.quantize_(original, theirs)
        quant_api.quantize_(made, ours)
        for i in (0, 2):
            differ = (original[i].weight.qdata.int() - made[i].qweight).abs()
            assert differ.max() <= (dtype == torch.bfloat16)  # 0.18 has reciprocals of scales in float32
            assert torch.equal(original[i].weight.scale.flatten().to(dtype).float(), made[i].weight_scale.flatten())
        assert sqnr(original(x), made(x)) > 33  # and has inputs in [-128, 127], where the document's version has [-127, 127]
    original = ao.Int8DynActInt4WeightQuantizer(groupsize=32).quantize(copy.deepcopy(net).float())
    made = quant_api.Int8DynActInt4WeightQuantizer(groupsize=32).quantize(copy.deepcopy(net).float())
    assert torch.equal(original[0].weight, made[0].qweight)
    assert sqnr(original(x.float()), made(x.float())) > 45
    primitives = pytest.importorskip("torchao.quantization.quant_primitives")
    weight = net[0].weight.detach()
    settings = ((1, 32), torch.int32, 0, 15, 1e-6, None, torch.bfloat16)
    mapping = primitives.MappingType.ASYMMETRIC
    scale, zero = primitives._choose_qparams_affine_tinygemm(weight, mapping, *settings)
    codes = primitives._quantize_affine_tinygemm(weight, (1, 32), scale, zero, torch.int32, 0, 15)
    made = quant_api.get_apply_int4wo_quant(32)(weight)
    assert torch.equal(made.scale, scale)
    assert torch.equal(made.zero_point, zero)
    assert torch.equal(made.int_data.int(), codes)
    settings = (primitives.MappingType.SYMMETRIC, (1, 96), torch.int8, None, None, torch.finfo(torch.float32).eps)
    scale, zero = primitives.choose_qparams_affine(weight, *settings, zero_point_dtype=torch.int64)
    codes = primitives.quantize_affine(weight, (1, 96), scale, zero, torch.int8)
    made = quant_api.get_apply_int8wo_quant()(weight)
    assert torch.equal(made.scale, scale)
    assert torch.equal(made.int_data, codes)
    assert torch.equal(made.dequantize(), primitives.dequantize_affine(codes, (1, 96), scale, zero, torch.int8, output_dtype=dtype))


# ---- tensors -------------------------------------------------------------------------------------------------------------

APPLY = {
    "int8wo": quant_api.get_apply_int8wo_quant(),
    "int8dyn": quant_api.get_apply_int8dyn_quant(),
    "int4wo": quant_api.get_apply_int4wo_quant(32),
    "8da4w": quant_api.get_apply_8da4w_quant(64),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", APPLY)
def test_a_quantized_parameter(name, dtype):
    """Copied, moved, saved, loaded, transposed: the same bits everywhere, and those of the layer that unwrapping makes."""
    net, x = model(dtype), torch.randn(3, 5, 96).to(dtype)
    bias = net[0].bias
    quantized = quant_api.quantize(net, APPLY[name])
    assert quantized is net
    w = net[0].weight
    assert (w.shape, w.dtype, w.requires_grad) == ((64, 96), dtype, False)
    y = net(x)
    expected = net[0](x)
    with torch.no_grad():
        flat = x.flatten(0, 1)
        for got in (
            F.linear(x, weight=w, bias=bias),
            torch.addmm(bias, flat, w.t()).unflatten(0, (3, 5)),
            torch.ops.aten.linear(x, w, bias),
        ):
            assert torch.equal(got, expected)
        unbiased = F.linear(flat, w)
        for got in (flat @ w.t(), torch.mm(flat, w.t()), torch.matmul(flat, w.mT), flat @ w.t().t().t()):
            assert torch.equal(got, unbiased)
        assert w.t().shape == (96, 64)
        torch.testing.assert_close(flat[:, :64] @ w, flat[:, :64] @ w.dequantize(), rtol=1e-2, atol=3e-2)
    buffer = io.BytesIO()
    torch.save(net.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    loaded, assigned = quant_api.quantize(nn.Sequential(*map(_other, model(dtype))), APPLY[name]), model(dtype)
    loaded.load_state_dict(state)
    assigned.load_state_dict(state, assign=True)
    moved = copy.deepcopy(net).to(torch.float16).to(dtype)
    for other in (copy.deepcopy(net), loaded, assigned, moved, copy.deepcopy(net).to("cpu").requires_grad_(False)):
        assert type(other[0].weight) is type(w)
        assert sqnr(y, other(x)) > (55 if other is moved else 1000)
    with torch.inference_mode():
        assert torch.equal(net(x), y)
    for operator in (lambda: w + 1, lambda: w[0], w.sum, lambda: w.to(torch.int32)):
        with pytest.raises(NotImplementedError, match=rf"^quant_ops\.{type(w).__name__}: expected .* Dequantize it first"):
            operator()
    assert (w.dequantize() + 1).shape == (64, 96)
    if dtype == torch.float32:
        assert torch.equal(torch.compile(net)(x), y)
    size = get_model_size_in_bytes(net)
    unwrapped = unwrap_tensor_subclass(net)
    assert unwrapped is net
    assert torch.equal(net(x), y)
    assert size < get_model_size_in_bytes(model(torch.float32)) / 2
    assert torch.equal(torch.export.export(net, (x,)).module()(x), y)


def _other(layer):
    if isinstance(layer, nn.Linear):
        nn.init.normal_(layer.weight)
    return layer


@pytest.mark.parametrize(
    ("settings", "operator"),
    [
        (("ASYMMETRIC", (1, 32), torch.int8), True),
        (("ASYMMETRIC", (1, 96), torch.uint8), True),
        (("ASYMMETRIC", (1, 32), torch.uint4), True),
        (("ASYMMETRIC", (1, 32), torch.int32, 0, 15), True),
        (("SYMMETRIC", (1, -1), torch.uint8), True),
        (("SYMMETRIC", (1, 32), torch.uint4), True),
        (("SYMMETRIC", (1, 96), torch.int8, -127, 127), True),
        (("SYMMETRIC", (1, 96), torch.int8, -100, 127), True),
        (("SYMMETRIC", (1, 32), torch.int8, None, None, None, None, None, True, "NONE"), True),
        (("ASYMMETRIC", (1, 32), torch.uint8, None, None, None, None, torch.float32, False, "FLOAT"), True),
        (("SYMMETRIC", (1, 16), torch.int8), False),
        (("SYMMETRIC", (96, 96), torch.int8), False),
        (("SYMMETRIC", (16, 96), torch.int8), False),
        (("ASYMMETRIC", (1, 32), torch.int16), False),
        (("SYMMETRIC", (1, 32), torch.uint3), True),
        (("ASYMMETRIC", (1, 32), torch.uint3), True),
    ],
)
def test_every_scheme_has_the_values_of_its_dequantized_weight(settings, operator):
    layer, x = nn.Linear(96, 96), torch.randn(7, 96)
    weight = to_aq(layer.weight, *settings)
    error = sqnr(layer.weight.detach(), weight.dequantize())
    assert error > (10 if settings[2] == torch.uint3 else 15 if weight.scheme.quant_max <= 15 else 30)
    expected = F.linear(x.double(), weight.dequantize().double(), layer.bias.detach().double())
    layer.weight = nn.Parameter(weight)
    assert (forms.form_of(layer.weight) is not None) is operator
    y = layer(x)
    assert sqnr(expected, y) > 100
    net = nn.Sequential(layer)
    assert unwrap_tensor_subclass(net) is net
    assert isinstance(net[0], qo.WeightOnlyLinear if operator else forms.DequantizedLinear)
    assert sqnr(expected, net(x)) > 100
    assert sqnr(expected, torch.export.export(net, (x,)).module()(x)) > 100


@pytest.mark.parametrize("asymmetric", [False, True])
def test_quantized_inputs(asymmetric):
    """What a function of the user's makes of the input goes to the operator that multiplies codes; QuantizeRows gives the same."""
    layer, x = nn.Linear(96, 64), torch.randn(2, 5, 96)
    weight = quant_api.get_apply_int8wo_quant()(layer.weight)
    function = QuantizeRows(asymmetric)
    expected = F.linear(rows(x.double(), asymmetric), weight.dequantize().double(), layer.bias.detach().double())
    codes = function(x)
    assert codes.int_data.shape == x.shape
    assert sqnr(expected, F.linear(codes, weight, layer.bias)) > 70
    for func in (function, lambda x: to_aq(x, *function_settings(asymmetric))):
        layer.weight = nn.Parameter(to_laq(weight, func), requires_grad=False)
        assert sqnr(expected, layer(x)) > 70
    plain = nn.Linear(96, 64)
    assert sqnr(plain(codes.dequantize()), F.linear(codes, plain.weight, plain.bias)) > 1000


def function_settings(asymmetric):
    blocks = (1, 1, 96)
    return ("ASYMMETRIC", blocks, torch.int8) if asymmetric else ("SYMMETRIC", blocks, torch.int8, -127, 127)


def test_any_number_of_features():
    net, x = nn.Sequential(nn.Linear(45, 7)), torch.randn(3, 45)
    weight = F.pad(net[0].weight.detach(), (0, 19))
    expected = F.linear(x.double(), tinygemm(weight, 32)[:, :45], net[0].bias.detach().double())
    quant_api.change_linear_weights_to_int4_woqtensors(net, groupsize=32)
    assert sqnr(expected, net(x)) > 25


def test_which_layers():
    class Own(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 1

    net = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32), nn.MultiheadAttention(32, 2), Own(32, 8)).eval()
    quant_api.change_linear_weights_to_int8_dqtensors(net, lambda module, name: name in ("0", "1"))
    assert isinstance(net[1], qo.QuantLinear)
    narrow = nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 32))
    quant_api.change_linear_weights_to_int8_dqtensors(narrow)
    assert [type(layer).__name__ for layer in narrow] == ["Linear", "QuantLinear"]
    quant_api.quantize(net, APPLY["int8wo"])
    assert isinstance(net[3].weight, AffineQuantizedTensor)
    assert type(net[2].out_proj.weight) is nn.Parameter
    with pytest.warns(UserWarning, match="got '3', which keeps its tensor: it has a forward of its own"):
        unwrap_tensor_subclass(net)
    assert isinstance(net[3].weight, AffineQuantizedTensor)
    shared = nn.Linear(32, 32)
    both = nn.Sequential(shared, nn.Sequential(shared))
    quant_api.quantize_(both, qo.Int8Dynamic())
    assert both[0] is both[1][0]
    assert isinstance(both[0], qo.QuantLinear)


# ---- inputs and perplexity -----------------------------------------------------------------------------------------------


def test_input_recorder_and_perplexity():
    recorder = InputRecorder(None, 4, lambda tokens: (tokens, tokens.shape), vocab_size=20)
    recorder.record_inputs([[1, 2, 3, 4, 5, 6, 7, 8, 9], torch.arange(5)], 2).record_inputs([range(4), range(9)], 1)
    tokens, shapes = recorder.get_inputs()
    assert torch.cat(tokens.values).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [0, 1, 2, 3], [0, 1, 2, 3]]
    assert [len(batch) for batch in batches_of("op", [tokens, shapes])] == [2] * 4
    assert tokens[1:3].values[0].tolist() == [[5, 6, 7, 8]]
    assert batches_of("op", [torch.ones(1), (1, 2)]) == [(torch.ones(1),), (1, 2)]
    padded = InputRecorder(None, 4, pad_calibration_inputs=True, pad_token=9).record_inputs([[1, 2, 3, 4, 5]]).get_inputs()
    assert torch.cat(padded[0].values).tolist() == [[1, 2, 3, 4], [5, 9, 9, 9]]
    tokenizer = types.SimpleNamespace(encode=lambda text: [ord(c) for c in text], bos_id=lambda: 1)
    assert InputRecorder(tokenizer, 4, vocab_size=None).record_inputs("ab cd").get_inputs()[0].values[0].tolist() == [
        [1, 97, 98, 32]
    ]

    logits = torch.randn(50, 50)
    net = nn.Embedding.from_pretrained(logits)
    text = "\x01\x02\t\x03 \x04\x05\x06\x07"
    tokens = tokenizer.encode(text)
    tokenizer = types.SimpleNamespace(encode=tokenizer.encode)
    probabilities = logits.double().log_softmax(1)
    windows = [tokens[:4], tokens[4:8], tokens[8:]]
    total = sum(float(probabilities[a, b]) for window in windows for a, b in itertools.pairwise(window))
    found = TransformerEvalWrapper(net, tokenizer, 4).run_eval([text], limit=3)["results"]["texts"]
    assert found == pytest.approx(
        {
            "perplexity": float(torch.tensor(-total / 6).exp()),
            "word_perplexity": float(torch.tensor(-total / 3).exp()),
            "byte_perplexity": float(torch.tensor(-total / 9).exp()),
        },
        rel=1e-5,
    )
    assert TransformerEvalWrapper(net, None, 4).run_eval([tokens])["results"]["texts"] == pytest.approx(
        {"perplexity": found["perplexity"]}
    )


# ---- refusals ------------------------------------------------------------------------------------------------------------

X = torch.randn(4, 32)


def uncalibrated():
    net = nn.Sequential(nn.Linear(4, 4))
    smoothquant.swap_linear_with_smooth_fq_linear(net)
    smoothquant.smooth_fq_linear_to_inference(net)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quant_api.get_apply_int4wo_quant(48), ValueError, r"get_apply_int4wo_quant: expected groupsize 32, .*, got 48"),
        (
            lambda: quant_api.Int8DynActInt4WeightQuantizer(16),
            ValueError,
            r"Int8DynActInt4WeightQuantizer: expected groupsize .*16",
        ),
        (lambda: torchao.quantization.Int4WeightOnlyGPTQQuantizer(1, 1, 2), ValueError, r"Int4WeightOnlyGPTQQuantizer: .* got 2"),
        (lambda: to_aq(X, "SYMMETRIC", (1, 5), torch.int8), ValueError, r"choose_qparams_affine: .*"),
        (
            lambda: to_aq(X, "SYMMETRIC", (1, 4), torch.int8, extended_layout="x"),
            ValueError,
            r"to_aq: expected extended_layout .*'x'",
        ),
        (lambda: to_laq(X, 3), TypeError, r"to_laq: expected input_quant_func to be a function of the input, got int"),
        (
            lambda: quant_api.quantize(model(), lambda w: 1),
            TypeError,
            r"quantize: expected the function to return a tensor, got int",
        ),
        (lambda: quant_api.quantize_(nn.Linear(32, 4), APPLY["int8wo"]), ValueError, r"quant_api: .*got a bare Linear.*"),
        (
            lambda: InputRecorder(None, 4).record_inputs(["wikitext"], 1),
            ValueError,
            r"InputRecorder\.record_inputs: expected texts or lists of tokens, got \['wikitext'\], .* lm_eval\..*",
        ),
        (
            lambda: InputRecorder(None, 4).record_inputs(["a text"], 1),
            ValueError,
            r"InputRecorder: expected a tokenizer for texts, got None\. Pass lists of tokens\.",
        ),
        (
            lambda: InputRecorder(None, 4, vocab_size=3).record_inputs([[0, 1, 2, 3]]),
            ValueError,
            r"InputRecorder\.record_inputs: expected 0 <= token < vocab_size, 3, got one in \[0, 3\]\..*",
        ),
        (
            lambda: InputRecorder(None, 4).record_inputs([[0]]),
            ValueError,
            r"InputRecorder\.record_inputs: .* of at least 4 tokens.*",
        ),
        (
            lambda: InputRecorder(None, 4).record_inputs([]),
            ValueError,
            r"InputRecorder\.record_inputs: expected at least one text.*",
        ),
        (
            lambda: InputRecorder(None, 4).get_inputs(),
            ValueError,
            r"InputRecorder\.get_inputs: expected recorded inputs, got none.*",
        ),
        (lambda: InputRecorder(None, 0), ValueError, r"InputRecorder: expected calibration_seq_length >= 1, got 0"),
        (lambda: batches_of("op", [MultiInput([])]), ValueError, r"op: expected inputs to calibrate with, got none.*"),
        (lambda: batches_of("op", []), ValueError, r"op: expected inputs to calibrate with, got none.*"),
        (lambda: batches_of("op", X), ValueError, r"op: expected inputs of InputRecorder\.get_inputs\(\), .*, got Tensor"),
        (
            lambda: TransformerEvalWrapper(nn.Identity(), None, 4).run_eval([[1]]),
            ValueError,
            r"TransformerEvalWrapper\.run_eval: expected texts of at least two tokens, got shorter ones",
        ),
        (
            uncalibrated,
            ValueError,
            r"smoothquant: expected finite calibration data other than 0, got none, in layer '0'\. Call the model on data.*",
        ),
        (
            lambda: smoothquant.swap_linear_with_smooth_fq_linear(model(), alpha=2),
            ValueError,
            r"smoothquant: expected 0 <= alpha <= 1, got 2",
        ),
        (lambda: torchao.utils.benchmark_model(nn.Identity(), 0, X), ValueError, r"benchmark_model: expected num_runs >= 1, got 0"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=rf"^quant_ops\.{message}$"):
        call()


def test_smoothquant_settings():
    net, x = model(), torch.randn(40, 96)
    smoothquant.swap_linear_with_smooth_fq_linear(net, skip_fqn_list=["2"], alpha=0.25)
    assert [type(layer).__name__ for layer in net] == ["SmoothFakeDynamicallyQuantizedLinear", "GELU", "Linear"]
    assert torch.equal(net(x), model()(x))
    state = net.state_dict()
    assert torch.equal(state["0.x_running_abs_max"], x.abs().amax(0))
    smoothquant.set_smooth_fq_attribute(net, "alpha", 0.75)
    layer = copy.deepcopy(net)
    smoothquant.smooth_fq_linear_to_inference(layer)
    weight = model()[0].weight.detach()
    s = smoothquant.get_scale(x.abs().amax(0), weight.abs().amax(0), 0.75)
    torch.testing.assert_close(1 / layer[0].input_multiplier, s)
    torch.testing.assert_close(s.double(), x.abs().amax(0).double() ** 0.75 / weight.abs().amax(0).double() ** 0.25)
    assert torch.isfinite(smoothquant.get_scale(torch.zeros(3), torch.zeros(3))).all()
    smoothquant.set_smooth_fq_attribute(net, "debug_skip_scaling", True)
    smoothquant.smooth_fq_linear_to_inference(net, debug_skip_calibration=True)
    assert net[0].input_multiplier is None
    assert compute_error(model()(x), net(x)) > 30


def test_autoquant_manual(monkeypatch):
    net = model()
    quantized = torchao.autoquant(net, manual=True, seconds=0.0, cache=qo.TimingCache(), min_sqnr=10)
    net(torch.randn(3, 96)), net(torch.randn(5, 96))
    assert not quantized.autoquant_result.finished
    net.finalize_autoquant()
    assert net.autoquant_result.layers[0].inputs == {((3, 96), "float32"): 1, ((5, 96), "float32"): 1}
    assert not hasattr(net, "finalize_autoquant")
    assert pickle.loads(pickle.dumps(net.autoquant_result)).finished
