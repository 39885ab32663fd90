"""How to quantize a model: one frozen dataclass per scheme, with a JSON round trip."""

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class Int8Dynamic:
    """int8 weights, one scale per output channel; activations quantized to int8 in every call, from their data.

    Linear quantizes per row (token), Conv2d per sample. Needs no calibration data.

    Attributes:
        asymmetric: activations get a zero point; helps where they are one-sided, e.g. after ReLU.
        weight_bits: 2 to 8; fewer than 8 bits coarsen the weights, which stay int8 in memory.
    """

    asymmetric: bool = False
    weight_bits: int = 8

    def __post_init__(self) -> None:
        if not (isinstance(self.weight_bits, int) and 2 <= self.weight_bits <= 8):
            raise ValueError(f"quant_ops.Int8Dynamic: expected 2 <= weight_bits <= 8, got {self.weight_bits}")

    def to_json(self) -> str:
        """The config as JSON, with its class's name."""
        return json.dumps({"config": type(self).__name__, **dataclasses.asdict(self)})


def from_json(text: str) -> Int8Dynamic:
    """The config that :meth:`Int8Dynamic.to_json` wrote. Raises ValueError for another name or field."""
    fields: dict[str, Any] = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"quant_ops: expected a JSON object with a config, got {text}")
    name = fields.pop("config", None)
    if name != "Int8Dynamic":
        raise ValueError(f"quant_ops: expected a config named Int8Dynamic, got {name}")
    known = {field.name for field in dataclasses.fields(Int8Dynamic)}
    if not set(fields) <= known:
        raise ValueError(f"quant_ops.{name}: expected fields among {sorted(known)}, got {sorted(set(fields) - known)}")
    return Int8Dynamic(**fields)
