"""Times a language model of Llama's kind that generates: float, bfloat16, quant_ops, torch's int8, torchao and llama.cpp.

python -m benchmarks.packages.generation --out generation.json        one thread and all, prompts of 128 and 512 tokens: ten minutes
python -m benchmarks.packages.generation --prompts 128 --threads 1
python -m benchmarks.packages.generation --smoke                      a small one, to see that it runs

LlamaForCausalLM of transformers with 100 million random weights, batch 1. Timed are the prompt, the tokens after it, one by one,
with a cache of keys and values, and the Linear layers of one of these tokens, which are what is quantized. Read next: run.py.
"""

import copy
import functools
import importlib.util
import inspect
import tempfile
from pathlib import Path

import numpy as np
import torch
from torch import nn

import quant_ops as qo
from benchmarks.packages import run

TOKENS = 8  # that one timed call generates
LEAST_SQNR = 3.0  # dB against float32: errors of 85 layers of random weights add up, most of all those of four bits

SIZE = {
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
}
SMALL = SIZE | {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}


def llama(smoke, tied):
    """Weights of such a scale that every layer passes on about the variance of its input."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**(SMALL if smoke else SIZE), tie_word_embeddings=tied, attn_implementation="sdpa")
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            nn.init.normal_(weight, std=1.0 if name.endswith("embed_tokens.weight") else weight.shape[1] ** -0.5)
    return model


# ---- contenders ----------------------------------------------------------------------------------------------------------


class Generator:
    """A converted model of transformers. Its tokens are given rather than chosen, so that all contenders compute the same."""

    def __init__(self, model):
        self.model = model
        names = inspect.signature(type(model).forward).parameters
        self.cache_name = "cache" if "cache" in names else "past_key_values"

    def _logits(self, ids, cache):
        return self.model(ids, **{self.cache_name: cache}, use_cache=True, logits_to_keep=1).logits[0, -1]

    def read(self, prompt):
        """Starts anew with the prompt."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        return self._logits(prompt, self.cache)

    def generate(self, tokens):
        """The logits after each token; the cache is again as it was."""
        logits = []
        for token in tokens.split(1, dim=1):
            logits.append(self._logits(token, self.cache))
            logits[-1].argmax()  # which a user would need
        self.cache.crop(-len(logits))
        return torch.stack(logits)

    def layers(self, token):
        """A call of all Linear layers with the inputs that they have in one token."""
        calls, handles = [], []
        for name, layer in self.model.named_modules():
            if name.endswith(("_proj", "lm_head")):
                handles.append(layer.register_forward_pre_hook(lambda layer, args: calls.append((layer, args[0].clone()))))
        with torch.inference_mode():
            self.generate(token)
        for handle in handles:
            handle.remove()

        def call():
            for layer, x in calls:
                y = layer(x)
            return y

        return call

    @functools.cached_property
    def size(self):
        """Bytes of all that the model keeps."""
        storages = {}
        for module in self.model.modules():
            for tensor in [*module._parameters.values(), *module._buffers.values(), *packed_by_torch_ao(module)]:
                for plain in plain_tensors(tensor):
                    storage = plain.untyped_storage()
                    storages[storage.data_ptr()] = storage
        return sum(storage.nbytes() for storage in storages.values())


def packed_by_torch_ao(module):
    """Weight and bias of torch.ao's Linear: what it keeps packed has as many bytes."""
    packed = getattr(module, "_packed_params", None)
    return packed._weight_bias() if isinstance(packed, nn.Module) else ()


def plain_tensors(tensor):
    """The tensors that a subclass such as torchao's consists of."""
    if tensor is None:
        return []
    if tensor.is_quantized:
        return [tensor.int_repr(), *([tensor.q_per_channel_scales()] if tensor.qscheme() == torch.per_channel_affine else [])]
    if hasattr(tensor, "__tensor_flatten__"):
        return [plain for name in tensor.__tensor_flatten__()[0] for plain in plain_tensors(getattr(tensor, name))]
    return [tensor]


class LlamaCpp:
    """The same weights in llama.cpp, from a file in GGUF; keys and values are kept in float16."""

    def __init__(self, model, format):
        import llama_cpp

        self.api, api = llama_cpp, llama_cpp
        silent = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(silent, None)
        api.llama_backend_init()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "model.gguf")
            write_gguf(model, format, path)
            self.model = api.llama_model_load_from_file(str(path).encode(), api.llama_model_default_params())
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch = 1024, 512, 512
        self.context = api.llama_init_from_model(self.model, settings)
        self.memory = api.llama_get_memory(self.context)
        self.vocabulary, self.size, self.silent = model.config.vocab_size, api.llama_model_size(self.model), silent
        self.layers = None

    def _logits(self, ids):
        tokens = (self.api.llama_token * len(ids))(*ids)
        if self.api.llama_decode(self.context, self.api.llama_batch_get_one(tokens, len(ids))):
            raise RuntimeError("llama_decode failed")
        logits = self.api.llama_get_logits_ith(self.context, -1)
        return torch.from_numpy(np.ctypeslib.as_array(logits, (self.vocabulary,)))

    def read(self, prompt):
        self.api.llama_set_n_threads(self.context, torch.get_num_threads(), torch.get_num_threads())
        self.api.llama_memory_clear(self.memory, True)
        self.length = prompt.shape[1]
        return self._logits(prompt[0].tolist()).clone()

    def generate(self, tokens):
        logits = []
        for token in tokens[0].tolist():
            logits.append(self._logits([token]).clone())
            logits[-1].argmax()
        self.api.llama_memory_seq_rm(self.memory, -1, self.length, -1)
        return torch.stack(logits)


def write_gguf(model, format, path):
    """Matrices in the format, vectors in float32. Rotated pairs are neighbours in llama.cpp, halves of a head in transformers."""
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[format]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in model.named_parameters():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2], 0)
        if heads:
            weight = weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)
        as_kind = kind if weight.dim() == 2 else gguf.GGMLQuantizationType.F32
        data = gguf.quants.quantize(weight.contiguous().numpy(), as_kind)
        writer.add_tensor(names.get_name(name, (".weight",)), data, raw_dtype=as_kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Each contender makes a generator from the float model.


def fp32(model):
    return Generator(model)


def bf16(model):
    return Generator(copy.deepcopy(model).bfloat16())


def ours(config, model):
    model = copy.deepcopy(model)
    qo.quantize_(model, config)
    return Generator(model)


def ours_bf16(config, model):
    return ours(config, bf16(model).model)


def torch_ao(engine, model):
    run.use_engine(engine)
    settings = {nn.Linear: torch.ao.quantization.per_channel_dynamic_qconfig}
    return Generator(torch.ao.quantization.quantize_dynamic(model, settings))


def torchao(config, model):
    """`config`: from the modules torchao.quantization and torchao.prototype.quantization.int4."""
    import torchao.prototype.quantization.int4 as prototype
    import torchao.quantization

    model = copy.deepcopy(model)
    torchao.quantization.quantize_(model, config(torchao.quantization, prototype))
    return Generator(model)


def torchao_bf16(config, model):
    return torchao(config, bf16(model).model)


def int8_weight_only(public, _):
    return public.Int8WeightOnlyConfig(set_inductor_config=False)


def int8_dynamic(public, _):
    return public.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False)


def int4_weight_only(_, prototype):
    return prototype.PrototypeInt4WeightOnlyConfig(group_size=128, set_inductor_config=False)


def w4a8(public, _):
    return public.Int8DynamicActivationIntxWeightConfig(weight_dtype=torch.int4, weight_granularity=public.PerGroup(32))


CONTENDERS = {
    "ours int8 dynamic": functools.partial(ours, qo.Int8Dynamic(asymmetric=False)),
    "ours int8 weight-only": functools.partial(ours, qo.Int8WeightOnly()),
    "ours int4 weight-only": functools.partial(ours, qo.Int4WeightOnly()),
    "ours int4 weight-only bf16": functools.partial(ours_bf16, qo.Int4WeightOnly()),
    "ours W4A8": functools.partial(ours, qo.Int8DynamicInt4Weight()),
    "ours W4A8 bf16": functools.partial(ours_bf16, qo.Int8DynamicInt4Weight()),
    "fp32": fp32,
    "bf16": bf16,
    "torch.ao fbgemm": functools.partial(torch_ao, "fbgemm"),
    "torch.ao onednn": functools.partial(torch_ao, "onednn"),
    "torchao int8 dynamic": functools.partial(torchao, int8_dynamic),
    "torchao int8 weight-only": functools.partial(torchao, int8_weight_only),
    "torchao int4 weight-only": functools.partial(torchao, int4_weight_only),
    "torchao int4 weight-only bf16": functools.partial(torchao_bf16, int4_weight_only),
    "torchao W4A8": functools.partial(torchao, w4a8),
    "llama.cpp Q8_0": lambda model: LlamaCpp(model, "Q8_0"),
    "llama.cpp Q4_0": lambda model: LlamaCpp(model, "Q4_0"),
}


# ---- the run -------------------------------------------------------------------------------------------------------------


# What is timed of a generator: a call.


def prompt(generator, ids, tokens):
    return functools.partial(generator.read, ids)


def decode(generator, ids, tokens):
    generator.read(ids)
    return functools.partial(generator.generate, tokens)


def layers(generator, ids, tokens):
    generator.read(ids)
    return generator.layers(tokens[:, :1])


def measure(stem, generators, ids, tokens, count, results):
    """`count`: tokens of a call."""
    threads, name = torch.get_num_threads(), f"{ids.shape[1]}+{tokens.shape[1]}"

    def contender(make):
        return lambda: stem(make(), ids, tokens)

    with torch.inference_mode():
        reference = stem(generators["fp32"](), ids, tokens)()
    _, rows = results.measure(
        {name: contender(make) for name, make in generators.items() if stem is not layers or not name.startswith("llama.cpp")},
        reference=reference,
        least=LEAST_SQNR,
        case=f"{stem.__name__} {name}, {threads} thread(s)",
        stem=stem.__name__,
        shape=name,
        tokens=count,
        threads=threads,
    )
    for name, row in rows.items():
        row["bytes"] = generators[name]().size


def main():
    parser = run.parser(__doc__, seconds=20.0)
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, torch.get_num_threads()}), help="default: 1 and all")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512], help="tokens")
    parser.add_argument("--contenders", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS), help="fp32 is always one")
    parser.add_argument("--tied", action="store_true", help="the head shares the weight of the embedding")
    parser.add_argument("--smoke", action="store_true", help="a small model, to see that it runs")
    options = parser.parse_args()
    if importlib.util.find_spec("transformers") is None:
        print("skipped: No module named 'transformers'. Install it with: pip install transformers")
        return
    results = run.Run("generation", options, options.threads)
    model = llama(options.smoke, options.tied)
    chosen = ["fp32", *(name for name in options.contenders if name != "fp32")]
    generators = {name: functools.cache(functools.partial(CONTENDERS[name], model)) for name in chosen}
    for threads in options.threads:
        torch.set_num_threads(threads)
        for length in options.prompts:
            ids = torch.randint(model.config.vocab_size, (1, length + TOKENS))
            given = ids.split([length, TOKENS], dim=1)
            measure(prompt, generators, *given, length, results)
            measure(decode, generators, *given, TOKENS, results)
        measure(layers, generators, *given, 1, results)
    results.finish()


if __name__ == "__main__":
    main()
