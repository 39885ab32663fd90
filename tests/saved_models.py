"""A model in a file, and the parts of that file, for the tests of save and load_."""

import importlib.util
import json
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import quant_ops as qo

FIXTURES = Path(__file__).parent / "fixtures"


def module_of(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


format_1 = module_of(FIXTURES / "format_1.py")
format_2 = module_of(FIXTURES / "format_2.py")


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
