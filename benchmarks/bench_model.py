"""Times a whole model, in turns, in one process: an encoder of BERT-base's size with random weights, 128 tokens.

python benchmarks/bench_model.py --out model.json             batch 1 and 8, one thread and all: about five minutes
python benchmarks/bench_model.py --smoke                      a small one, to see that it runs

float32, bfloat16, torch's dynamic quantization of every nn.Linear, and quant_ops.quantize_, each from the same weights.
"""

import argparse
import copy
import functools
import sys
from pathlib import Path

import peers
import table
import torch
from torch import nn

import quant_ops as qo

TOKENS = 128
LEAST_SQNR = 20.0  # dB against float32: the errors of dozens of layers add up


def bert(smoke):
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 100}
    config = BertConfig(**small if smoke else {})
    return BertModel(config, add_pooling_layer=False).eval().requires_grad_(False), config.vocab_size


# Each contender: from the float model to the model to time.


def fp32(model):
    return model


def bf16(model):
    return copy.deepcopy(model).bfloat16()


def torch_ao(engine, model):
    peers.use_engine(engine)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def ours_dynamic(model):
    model = copy.deepcopy(model)
    qo.quantize_(model, qo.Int8Dynamic())
    return model


def ours_dynamic_bf16(model):
    return ours_dynamic(bf16(model))


CONTENDERS = {
    "ours dynamic": ours_dynamic,
    "ours dynamic bf16": ours_dynamic_bf16,
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
}


def on(contender, model, ids):
    """The contender's call on some tokens; converting a model again costs little beside timing it."""
    converted = contender(model)
    return lambda: converted(ids).last_hidden_state


def measure(model, ids, options):
    threads, reference = torch.get_num_threads(), model(ids).last_hidden_state
    contenders = {name: functools.partial(on, contender) for name, contender in CONTENDERS.items()}
    calls, distances, missing = peers.prepare(contenders, model, ids, reference=reference, least=LEAST_SQNR)
    times = peers.interleave(calls, options.seconds, options.rounds)
    rows = []
    for name in calls:
        row = peers.row(times[name], stem="bert", shape=f"{len(ids)}x{TOKENS}", batch=len(ids), threads=threads, contender=name)
        rows.append(row | {"sqnr_db": round(min(distances[name], 300), 1)})  # 300: the same result
    return rows, missing


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}), help="default: 1 and all")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=20, help="per batch and number of threads (default 20)")
    parser.add_argument("--rounds", type=int, default=5, help="at least (default 5)")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--cpu", help="a better name for the processor")
    options = parser.parse_args()
    try:
        model, vocabulary = bert(options.smoke)
    except ImportError as error:
        print(f"skipped: {error}. Install it with: pip install transformers")
        sys.exit(0)
    data = {"kind": "model", "machine": peers.machine(options.cpu), "missing": {}, "results": []}
    data["machine"]["threads"] = options.threads
    for threads in options.threads:
        torch.set_num_threads(threads)
        for batch in options.batch:
            rows, missing = measure(model, torch.randint(vocabulary, (batch, TOKENS)), options)
            data["results"] += rows
            for contender, reason in missing.items():
                data["missing"].setdefault(contender, {})[f"{batch}x{TOKENS}, {threads} thread(s)"] = reason
    if options.out:
        options.out.write_text(table.text(data))
    print(table.show(data))


if __name__ == "__main__":
    main()
