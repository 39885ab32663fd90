"""What methods with calibration data save of the perplexity that int8 and int4 weights cost: torchao's table, in small.

    python examples/accuracy.py            two minutes; exit status 1 if a method does not do what it is for
    python examples/accuracy.py --quick    fewer steps, less text, for the test

The model is the decoder of generation.py, trained here on the same text: help("topics"), byte by byte. The linear layers of its
blocks are quantized; its embedding and its head stay float, so that every row is about the same weights.
"""

import argparse
import copy
import pydoc_data.topics
import sys
import time
from collections.abc import Callable

import torch
from generation import LENGTH, Decoder, perplexity, train
from torch import Tensor, nn

import quant_ops as qo

BLOCKS = ["blocks.*"]
ROWS = qo.Int4WeightOnly(group_size=-1, asymmetric=False)  # one scale a row: what costs the most
GROUPS = qo.Int4WeightOnly(group_size=32)


def static(model: nn.Module, data: list[Tensor]) -> None:
    qo.prepare_(model, qo.Int8Static(), include=BLOCKS)
    qo.calibrate(model, data)
    qo.convert_(model)


# Each makes the model a quantized one, perhaps with batches of text.
METHODS: dict[str, Callable[[nn.Module, list[Tensor]], object]] = {
    "float32": lambda model, _: None,
    "int8 dynamic": lambda model, _: qo.quantize_(model, qo.Int8Dynamic(), include=BLOCKS),
    "int8 static": static,
    "int8 static, SmoothQuant": lambda model, data: qo.smoothquant_(model, data, qo.Int8Static(), include=BLOCKS),
    "int8 weight-only": lambda model, _: qo.quantize_(model, qo.Int8WeightOnly(), include=BLOCKS),
    "int4, groups of 32": lambda model, _: qo.quantize_(model, GROUPS, include=BLOCKS),
    "int4, groups of 32, GPTQ": lambda model, data: qo.gptq_(model, data, GROUPS, include=BLOCKS),
    "int4, groups of 32, AWQ": lambda model, data: qo.awq_(model, data[:2], GROUPS, include=BLOCKS),
    "int4, rows": lambda model, _: qo.quantize_(model, ROWS, include=BLOCKS),
    "int4, rows, GPTQ": lambda model, data: qo.gptq_(model, data, ROWS, include=BLOCKS),
    "int4, rows, AWQ": lambda model, data: qo.awq_(model, data[:2], ROWS, include=BLOCKS),
}
NOT_QUICK = ("int4, groups of 32, GPTQ", "int4, groups of 32, AWQ")  # the methods of the rows below once more
# The share of the lost perplexity that each has to save, of the row whose loss it is for.
SAVES = {"int4, rows, GPTQ": ("int4, rows", 0.4), "int4, rows, AWQ": ("int4, rows", 0.2)}


def main(arguments: list[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps, less text")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)  # the model is small; on a busy machine threads would mostly wait for each other
    torch.manual_seed(0)
    text = torch.tensor(list("".join(pydoc_data.topics.topics.values()).encode()))
    held, text = text[: 4096 if options.quick else 32768], text[32768:]
    float_model = Decoder()
    train(float_model, text, steps=20 if options.quick else 250)
    float_model.eval()
    rows = text.unfold(0, LENGTH, LENGTH)
    data = list(rows[torch.randperm(len(rows))[: 8 if options.quick else 96]].split(8))

    print(f"{'':<28}{'perplexity':>12}{'lost':>9}{'seconds':>9}")
    judged, ok = {}, True
    for name, method in METHODS.items():
        if options.quick and name in NOT_QUICK:
            continue
        model, begun = copy.deepcopy(float_model), time.perf_counter()
        result = method(model, data)
        seconds = time.perf_counter() - begun
        judged[name] = perplexity(model, held)
        print(f"{name:<28}{judged[name]:>12.3f}{judged[name] / judged['float32'] - 1:>9.2%}{seconds:>9.1f}")
        if isinstance(result, qo.GPTQResult):  # of the output of every layer GPTQ loses less than rounding
            ok &= all(gptq < rounded for gptq, rounded in result.errors.values())
    ok &= max(judged["int8 dynamic"], judged["int8 weight-only"]) < 1.01 * judged["float32"]
    for name, (of, share) in SAVES.items() if not options.quick else ():  # a model that has hardly been trained loses nothing
        saved = 1 - (judged[name] - judged["float32"]) / (judged[of] - judged["float32"])
        print(f"{name}: saves {saved:.0%} of what {of} lose")
        ok &= saved > share
    print("OK: int8 costs less than a percent, and each method saves what it has to" if ok else "FAILED")
    return ok


if __name__ == "__main__":
    sys.exit(0 if main() else 1)
