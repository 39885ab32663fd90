"""CodeGen, a small one with random weights, trained on Python for a few seconds: perplexity, and what it writes, by format.

python examples/int_fp_qsim/codegen.py          needs transformers; less than half a minute
"""

import torch
from common import FORMATS, agreement, arguments, batches, characters, package, perplexity, simulated, table, train


def main() -> None:
    args = arguments(__doc__, layers=2, width=64, heads=4, steps=150, tokens=32)
    transformers = package("transformers")
    config = transformers.CodeGenConfig(
        vocab_size=128,
        n_positions=128,
        n_ctx=128,
        n_embd=args.width,
        n_layer=args.layers,
        n_head=args.heads,
        rotary_dim=args.width // args.heads // 2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model, data = transformers.CodeGenForCausalLM(config), characters()
    train(model, data[:-8192], args.steps)
    test = batches(data[-8192:], 4)
    prompt = test[0][:, :32]

    def written(model: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            attended = torch.ones_like(prompt)
            return model.generate(prompt, attention_mask=attended, max_new_tokens=args.tokens, do_sample=False)[:, 32:]

    expected = written(model)
    rows = {"float": [perplexity(model, test), 100.0]}
    for name in FORMATS:
        other = simulated(model, name)
        rows[name] = [perplexity(other, test), agreement(expected, written(other))]
    table(["perplexity", "same tokens, %"], rows)


if __name__ == "__main__":
    main()
