"""A seeded stream of hostile operator calls, for test_hostile.py: ``python hostile_calls.py SEED COUNT``.

Each call starts from one that works and gets one to three arguments of sizes near the ends of int64, other dtypes, views, expanded
tensors and tensors without data. It may give a result, or refuse with a sentence of quant_ops; the same call on tensors of device
meta (the fake kernel) must do the same with the same words, unless values or memory decide. The process may not die or hang. It
prints each call before it runs it, so that the last line names the one that killed it.
"""

import functools
import random
import re
import resource
import sys
from pathlib import Path

import torch
from torch import Tensor

import quant_ops as qo
from quant_ops.ops._register import call

HUGE = [2**20, 2**31 - 1, 2**31, 2**40, 2**57, 2**61, 2**62, 2**63 - 1]
SMALL = [0, 1, 1, 2, 3, 4, 5, 7, 8, 16, 17, 33, 64]
FLOATING = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
LEAST_MEMORY = 3 << 29  # that a call may take


def number(rng: random.Random) -> int:
    pick = rng.random()
    return rng.choice(SMALL) if pick < 0.5 else rng.choice(HUGE) + rng.choice([-1, 0]) if pick < 0.9 else -rng.choice(SMALL + HUGE)


def filled(shape: list[int], dtype: torch.dtype) -> Tensor:
    """Small values in every dtype, and no memory for what is expanded anyway."""
    base = torch.arange(min(8, max(1, torch.Size(shape).numel())))
    count = torch.Size(shape).numel()
    if count > 1 << 16:
        return base[1].to(dtype).expand(shape)
    return base.repeat(count // len(base) + 1)[:count].to(dtype).reshape(shape)


def tensor(rng: random.Random, dims: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """Of any shape and layout."""
    while True:
        shape = [rng.choice(SMALL) for _ in range(rng.choice([0, 1, 2, 2, 3, 4, 4, 5]) if dims is None else dims)]
        if rng.random() < 0.3 and shape:
            shape[rng.randrange(len(shape))] = rng.choice(HUGE)
        try:
            made = filled(shape, dtype or rng.choice(FLOATING + INTEGERS))
            return view(rng, made)
        except (RuntimeError, IndexError):  # what torch itself refuses
            continue


def view(rng: random.Random, t: Tensor) -> Tensor:
    """The same tensor, or another layout or a part of it."""
    kind = rng.randrange(8)
    if kind == 0 and t.dim() > 1:
        return t.transpose(0, -1)
    if kind == 1 and t.dim() > 0:
        return t[..., :: rng.choice([1, 2, 3])]
    if kind == 2 and t.dim() > 0:
        return t[..., rng.randrange(1, 3) :]
    if kind == 3 and t.dim() == 4 and t.numel() < 1 << 16:
        return t.to(memory_format=torch.channels_last)
    if kind == 4 and t.numel() <= 1:  # strides of a single element are free
        return t.as_strided(t.shape, [rng.choice([*HUGE, 0, 1]) for _ in t.shape])
    if kind == 5 and t.dim() > 0 and t.shape[0] == 1:
        return t.expand(rng.choice([2, 3, *HUGE]), *t.shape[1:])
    return t


def good(op: str) -> dict[str, object]:
    """The arguments of a call that works."""
    x, image = filled([5, 20], torch.float32), filled([2, 4, 6, 5], torch.float32)
    codes, kernel, scale = filled([3, 20], torch.int8), filled([6, 4, 3, 3], torch.int8), torch.tensor(0.5)
    quantize = {"tensor": image, "scale": scale, "zero_point": None, "qmin": -128, "qmax": 127, "asymmetric": False}
    depthwise = {"weight": filled([4, 1, 3, 3], torch.int8), "weight_scale": filled([4], torch.float32) + 1, "groups": 4}
    image_call = {"x": image, "stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], "x_scale": None, "x_zero_point": None}
    code_image, window = filled([2, 4, 6, 5], torch.int8), {"kernel_size": [2, 2], "stride": [2, 2], "padding": [0, 1]}
    element = {"exponent_bits": 4, "mantissa_bits": 3, "bias": 7, "special": 1}
    blocks = {**element, "dim": 1, "block_size": 3, "scale_rule": 4}
    seed = torch.tensor(5)
    groups = {"input": filled([6, 8], torch.float32), "block_size": [2, 4], "quant_min": -8, "quant_max": 7, "zero_point_domain": 0}
    per_block = {"scale": filled([3, 2], torch.float32) + 1, "zero_point": filled([3, 2], torch.int32)}
    return {
        "quant_tensor_forward": {**quantize, "simulate": True, "block_size": None},
        "quant_tensor_backward": {"grad": image, **quantize, "block_size": None},
        "dequant_tensor": {"tensor": filled([2, 4, 6], torch.int8), "scale": scale, "zero_point": None, "block_size": None},
        "choose_qparams": {"tensor": image, "dim": [1], "qmin": -127, "qmax": 127, "asymmetric": False},
        "quantize_rows": {"x": x, "asymmetric": False},
        "norm_quantize_rows": {"x": x, "weight": x[0], "bias": None, "eps": 1e-5, "rms": False, "asymmetric": True,
                               "residual": x + 1},
        "quant_float_forward": {"tensor": image, **element, "scale": scale, "seed": seed, "saturate": True, "subnormals": True,
                                "rounding": 3, "block_size": None},
        "quant_float_backward": {"grad": image, "tensor": image, **element, "scale": scale, "subnormals": True, "block_size": None},
        "quant_block_forward": {"tensor": image, **blocks, "tensor_scale": None, "seed": seed, "rounding": 3,
                                "scale_divisor": None},
        "quant_block_backward": {"grad": image, "tensor": image, **blocks, "tensor_scale": scale, "scale_divisor": 3.0},
        "choose_qparams_affine": {**groups, "mapping_type": 2, "eps": None, "scale_dtype": None, "zero_point_dtype": torch.int64,
                                  "keepdim": False, "preserve_zero": True},
        "quantize_affine": {**groups, **per_block, "output_dtype": torch.int8},
        "dequantize_affine": {**groups, **per_block, "input": filled([6, 8], torch.int8), "output_dtype": torch.bfloat16},
        "int8_gemm": {"a": filled([5, 20], torch.int8), "b": codes},
        "int8_linear": {"x": x, "weight": codes, "weight_scale": filled([3], torch.float32) + 1, "bias": None, "x_scale": None,
                        "x_zero_point": None, "packed_weight": None, "asymmetric": False, "out_scale": None,
                        "x_multiplier": filled([20], torch.float32) + 1},
        "int8_conv2d": {**image_call, "weight": kernel, "weight_scale": scale, "groups": 1, "asymmetric": False},
        "int8_conv2d depthwise": {**image_call, **depthwise, "asymmetric": False},
        "requantize": {"x": codes, "x_scale": scale, "x_zero_point": None, "out_scale": scale, "out_zero_point": None},
        "int8_add": {"a": codes, "b": codes, "a_scale": scale, "b_scale": scale, "out_scale": None, "out_dtype": None},
        "int8_mul": {"a": code_image, "b": code_image[:, :, :1, :1], "a_scale": scale, "b_scale": scale, "out_scale": scale,
                     "out_dtype": None},
        "int8_max_pool2d": {"x": code_image, **window, "dilation": [1, 1]},
        "int8_avg_pool2d": {"x": code_image, "x_scale": scale, "x_zero_point": None, **window, "out_scale": None},
        "int8_adaptive_avg_pool2d": {"x": code_image, "x_scale": scale, "x_zero_point": None, "output_size": [2, 2]},
        "int8_upsample_nearest2d": {"x": code_image, "scale_factor": [2, 2]},
        "int8_attention": {"q": filled([2, 4, 5, 6], torch.float32), "k": filled([2, 2, 3, 6], torch.float32),
                           "v": filled([2, 2, 3, 7], torch.float32), "mask": filled([2, 1, 5, 3], torch.float32), "causal": False},
        "pack_weight": {"weight": kernel, "groups": 1},
        "unpack_weight": {"packed_weight": qo.pack_weight(kernel), "shape": [6, 4, 3, 3], "groups": 1},
        "weight_only_linear": {"x": x, "weight": codes % 8, "weight_scale": filled([3], torch.float32) + 1,
                               "weight_zero_point": None, "bias": None, "bits": 4, "group_size": -1, "packed_weight": None,
                               "dynamic": True, "asymmetric": False, "out_dtype": None,
                               "x_multiplier": filled([20], torch.float32) + 1},
        "weight_only_embedding": {"indices": filled([2, 3], torch.int64) % 3, "weight": codes % 8,
                                  "weight_scale": filled([3], torch.float32) + 1, "weight_zero_point": None, "bits": 4,
                                  "group_size": -1, "packed_weight": qo.pack_weight_only(codes % 8, 4),
                                  "out_dtype": torch.bfloat16},
        "pack_weight_only": {"weight": codes % 8, "bits": 4, "group_size": 32},
        "unpack_weight_only": {"packed_weight": qo.pack_weight_only(codes % 8, 4, 32), "shape": [3, 20], "bits": 4,
                               "group_size": 32},
    }[op]  # fmt: skip


OPERATORS = [
    "quant_tensor_forward", "quant_tensor_backward", "dequant_tensor", "choose_qparams", "quantize_rows", "norm_quantize_rows",
    "quant_float_forward", "quant_float_backward", "quant_block_forward", "quant_block_backward", "choose_qparams_affine",
    "quantize_affine", "dequantize_affine", "int8_gemm", "int8_linear", "int8_conv2d", "int8_conv2d depthwise", "int8_attention",
    "pack_weight", "unpack_weight", "requantize", "int8_add", "int8_mul", "int8_max_pool2d", "int8_avg_pool2d",
    "int8_adaptive_avg_pool2d", "int8_upsample_nearest2d", "weight_only_linear", "weight_only_embedding", "pack_weight_only",
    "unpack_weight_only",
]  # fmt: skip


# Integers that are small where they are right.
CHOICES = {
    "exponent_bits",
    "mantissa_bits",
    "bias",
    "special",
    "rounding",
    "scale_rule",
    "dim",
    "mapping_type",
    "zero_point_domain",
}


def function_of(name: str) -> object:
    """The wrapper; where it takes names for numbers, the operator with the wrapper's exceptions."""
    if not name.startswith(("quant_float", "quant_block")) and not name.endswith("_affine"):
        return getattr(qo, name.split()[0])
    return functools.partial(call, getattr(torch.ops.quant_ops, name).default)


def changed(rng: random.Random, name: str, value: object) -> object:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.randrange(10) if name in CHOICES and rng.random() < 0.6 else number(rng)
    if name.endswith("dtype"):
        return rng.choice(FLOATING + INTEGERS)
    if name in ("scale_divisor", "eps"):
        return rng.choice([0.0, -1.0, 1e-40, 1e39, float("inf"), float("nan"), 1.0, float(number(rng))])
    if isinstance(value, list):
        values = [*value] if rng.random() < 0.8 else [*value, *value]
        if values:
            values[rng.randrange(len(values))] = number(rng)
        return values
    if name == "block_size":  # of one entry per dimension
        return [rng.choice([1, 2, number(rng)]) for _ in range(4)]
    if isinstance(value, Tensor):
        dtype = value.dtype if rng.random() < 0.8 else None
        return tensor(rng, value.dim(), dtype) if rng.random() < 0.6 else view(rng, value)
    return tensor(rng, None, rng.choice([torch.float32, torch.int32, torch.int8]))


def without_data(t: object) -> object:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta") if isinstance(t, Tensor) else t


def outcome(function: object, arguments: dict[str, object]) -> tuple[str, object]:
    """What a call gives, as text, and the exception."""
    try:
        result = function(**arguments)  # type: ignore[operator]
    except (TypeError, ValueError, IndexError, RuntimeError, MemoryError, NotImplementedError) as error:
        return str(error).split("\n")[0], error
    return " ".join(f"{tuple(r.shape)} {r.dtype}" for r in (result if isinstance(result, tuple) else (result,))), None


def describe(arguments: dict[str, object]) -> str:
    def text(a: object) -> str:
        return f"{a.dtype}{tuple(a.shape)}/{a.stride()}" if isinstance(a, Tensor) else repr(a)

    return ", ".join(f"{name}={text(a)}" for name, a in arguments.items())


# Reasons that only a call with data has.
ONLY_WITH_DATA = re.compile(
    r"bytes of memory|enough memory|zero_point in \[|codes of four bits in|packed_weight made by|indices >= 0"
)


def main(seed: int, count: int) -> None:
    torch.set_num_threads(2)
    torch.ones(1 << 20).exp()  # starts the threads
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + LEAST_MEMORY,) * 2)
    rng = random.Random(seed)
    refused = 0
    for i in range(count):
        name = rng.choice(OPERATORS)
        arguments = good(name)
        for which in rng.sample(sorted(arguments), min(len(arguments), rng.choice([1, 1, 2, 3]))):
            arguments[which] = changed(rng, which, arguments[which])
        function = function_of(name)
        text = f"{i}: {name.split()[0]}({describe(arguments)})"
        print(text, flush=True)
        real, error = outcome(function, arguments)
        refused += error is not None
        ours = error is None or re.match(r"quant_ops(\.|::)", real)
        assert ours, f"{text}\nraised {type(error).__name__}: {real}"
        try:
            meta = {k: without_data(v) for k, v in arguments.items()}
        except RuntimeError:  # strides that torch itself refuses
            continue
        fake, _ = outcome(function, meta)
        same = fake == real or ONLY_WITH_DATA.search(real)
        assert same, f"{text}\ngives {real}\nand without data {fake}"
    print(f"{refused} of {count} refused")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
