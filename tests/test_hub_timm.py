"""Models of timm, quantized and back from their files, by the functions of docs/timm.md."""

import contextlib
import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import quant_ops as qo

timm = pytest.importorskip("timm", exc_type=ImportError)

PAGE = Path(__file__).parent.parent / "docs" / "timm.md"


@pytest.fixture(scope="module")
def page():
    """The names that the page's code leaves, when it has run."""
    names = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
            exec(compile(code, str(PAGE), "exec"), names)
    return names


def dynamic(model, images):
    return qo.quantize_(model)


def static(model, images):
    qo.prepare_(model)
    qo.calibrate(model, [images])
    return qo.convert_(model)


@pytest.mark.parametrize(
    ("name", "arguments", "size", "quantize"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2}, 32, static),
        ("convnext_atto", {"depths": (1, 1, 1, 1)}, 32, dynamic),
    ],
)
def test_save_and_load(page, name, arguments, size, quantize, tmp_path):
    images = torch.randn(1, 3, size, size)
    model = timm.create_model(name, num_classes=7, **arguments).eval()
    result = quantize(model.to(memory_format=torch.channels_last), images)
    assert not [entry for entry in result.skipped if "Conv2d" in entry[1] or "Linear" in entry[1]]
    page["save_folder"](model, tmp_path)
    again = page["load_folder"](tmp_path)
    assert torch.equal(again(images), model(images))


def test_conv2d_same_stays_float_without_the_recipe(page):
    model = timm.create_model("tf_efficientnet_lite0", num_classes=7).eval()
    result = qo.quantize_(model)
    assert {reason for _, reason in result.skipped} == {"Conv2dSame is a subclass whose forward may differ"}
    images = torch.randn(1, 3, 65, 65)
    layer = copy.deepcopy(model.conv_stem)
    fixed = page["fix_padding_"](nn.Sequential(layer), images)
    assert torch.equal(fixed(images), layer(images))
