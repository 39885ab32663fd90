"""Adapters on a frozen int8 network: LoRA by hand and by peft.

    python examples/adapters.py            about ten seconds; exit status 1 if an adapter on int8 learns less than one on float32
    python examples/adapters.py --quick    fewer epochs, for the test

A network learns handwritten digits and is quantized with `backward=True`: its weights are int8 codes that nothing trains, but
gradients flow through them. The digits are then turned by 90 degrees. Adapters of rank 8, a tenth of the network's size, learn
that.
Without peft (pip install peft) its part is left out.
"""

import argparse
import copy
import importlib.util
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from digits import accuracy, digits, train
from torch import Tensor, nn

import quant_ops as qo

RANK = 8


class LoRA(nn.Module):
    """A frozen layer and a product of two small matrices beside it (arXiv 2106.09685), which begins as zero."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, RANK, bias=False)
        self.up = nn.Linear(RANK, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + 2.0 * self.up(self.down(x))


def network() -> nn.Sequential:
    hidden = [nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, 10))


def by_hand(model: nn.Sequential) -> nn.Module:
    """LoRA around every linear layer, quantized or float; nothing else is trained."""
    model.requires_grad_(False)
    for name, layer in list(model.named_children()):
        if isinstance(layer, nn.Linear | qo.QuantLinear | qo.WeightOnlyLinear):
            setattr(model, name, LoRA(layer))
    return model


def by_peft(model: nn.Sequential) -> nn.Module:
    import peft

    import quant_ops.integrations.peft  # noqa: F401  # lets peft adapt quantized layers

    names = [name for name, layer in model.named_children() if hasattr(layer, "in_features")]
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=names, r=RANK, lora_alpha=2 * RANK))


def adapted(
    name: str, base: nn.Sequential, adapt: Callable[[nn.Sequential], nn.Module], data: tuple[Tensor, ...], epochs: int
) -> float:
    """Trains adapters on a copy of the base, prints losses on the training data, and returns the accuracy on the test data."""
    train_x, train_y, test_x, test_y = data
    torch.manual_seed(1)
    model = adapt(copy.deepcopy(base))
    losses = []
    for epoch in range(5):
        if epoch:
            train(model, train_x, train_y, epochs // 4)
        with torch.no_grad():
            losses.append(F.cross_entropy(model(train_x), train_y).item())
    with torch.no_grad():
        reached = accuracy(model, test_x, test_y)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    print(f"  {name:<26}{' -> '.join(f'{loss:.3f}' for loss in losses):<44}{reached:6.2f}%   {trained} parameters")
    return reached


def main(arguments: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer epochs")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    train_x, train_y, test_x, test_y = digits()
    floating, epochs = network(), 8 if options.quick else 16
    train(floating, train_x, train_y, epochs)

    bases = {"float32": floating}
    for name, config in {
        "int8": qo.Int8Dynamic(backward=True),
        "int4 weights": qo.Int4WeightOnly(group_size=64, backward=True),
    }.items():
        bases[name] = copy.deepcopy(floating)
        print(qo.quantize_(bases[name], config), end="\n\n")
    turned = (train_x.rot90(1, (2, 3)), train_y, test_x.rot90(1, (2, 3)), test_y)
    with torch.no_grad():
        found = {"before": accuracy(bases["int8"], test_x, test_y), "turned": accuracy(bases["int8"], turned[2], test_y)}
    print(f"int8: {found['before']:.2f}% of the digits, {found['turned']:.2f}% once they are turned\n")

    print("adapters                      loss while they train                       accuracy")
    for base, model in bases.items():
        found[f"{base}, by hand"] = adapted(f"{base}, by hand", model, by_hand, turned, epochs)
    if importlib.util.find_spec("peft") is not None:
        found["int8, by peft"] = adapted("int8, by peft", bases["int8"], by_peft, turned, epochs)
    reference = found["float32, by hand"]
    ok = all(percent >= reference - 2 for name, percent in found.items() if name.startswith("int"))
    print(f"\n{'OK' if ok else 'FAILED'}: adapters on quantized weights learn what those on float32 do, within two points")
    return {"accuracy": found, "ok": ok}


if __name__ == "__main__":
    sys.exit(0 if main()["ok"] else 1)
