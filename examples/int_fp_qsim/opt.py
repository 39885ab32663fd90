"""OPT, a small one with random weights, trained for a few seconds: perplexity of simulated formats, dynamic and calibrated.

python examples/int_fp_qsim/opt.py              needs transformers; less than half a minute
python examples/int_fp_qsim/opt.py --layers 12 --width 768 --heads 12 --threads 16
"""

import copy

import torch
from common import FORMATS, arguments, batches, characters, package, perplexity, simulated, table, train
from torch import Tensor, nn

from quant_ops.compat.int_fp_qsim.replace import replace_layers
from quant_ops.compat.int_fp_qsim.static_calib import calibrate_inputs, calibrate_weights
from quant_ops.report.error import sqnr


def calibrated(model: nn.Module, data: list[Tensor], method: str) -> nn.Module:
    """A copy whose layers keep amax; weights have one for each output channel."""
    model = copy.deepcopy(model)
    calibrate_inputs(
        model, 8, data, method=method, percentile=99.99, batch_process_func=lambda model, batch: model(input_ids=batch)
    )
    calibrate_weights(model, 4, False, method="max", perchannel=True)
    return model


def main() -> None:
    args = arguments(__doc__, layers=2, width=64, heads=4, steps=150)
    transformers = package("transformers")
    config = transformers.OPTConfig(
        vocab_size=128,
        hidden_size=args.width,
        word_embed_proj_dim=args.width,
        ffn_dim=4 * args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=128,
        dropout=0.0,
    )
    model, data = transformers.OPTForCausalLM(config), characters()
    train(model, data[:-8192], args.steps)
    test = batches(data[-8192:], 4)
    with torch.no_grad():
        expected = model(input_ids=test[0]).logits

        def figures(model: nn.Module) -> list[float]:
            return [perplexity(model, test), sqnr(expected, model(input_ids=test[0]).logits)]

        rows = {"float": figures(model)}
        for name in FORMATS:
            rows[name] = figures(simulated(model, name))
        calibration = batches(data[:-8192], 5)
        for method in ("max", "percentile"):
            for name in ("INT8, INT8, FP16", "INT8, INT4, FP16"):
                rows[f"{name}, {method}"] = figures(replace_layers(calibrated(model, calibration, method), *FORMATS[name]))
    table(["perplexity", "logits, dB"], rows)


if __name__ == "__main__":
    main()
