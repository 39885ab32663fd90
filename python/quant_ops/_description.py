"""What configs and formats have in common: frozen dataclasses that check their fields and can be written as JSON.

A class is registered under its kind, "config" or "format". JSON has the kind as the key of the class's name, so that a description
can be a field of another.
"""

import dataclasses
import json
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn

_REGISTERED: "dict[str, dict[str, type[Description]]]" = {}


@dataclasses.dataclass(frozen=True)
class Description:
    """Can be compared, hashed, and written as JSON."""

    kind: ClassVar[str]
    newer: ClassVar[tuple[str, ...]] = ()  # fields that earlier versions lack, which JSON leaves out where they are False

    def to_json(self) -> str:
        """The fields as JSON, with the class's name."""
        return json.dumps(_plain(self))

    def _expect(self, condition: bool, relation: str) -> None:
        if not condition:
            raise ValueError(f"quant_ops.{type(self).__name__}: expected {relation}")

    def _expect_integer(self, name: str, low: int, high: int | None = None) -> None:
        value = getattr(self, name)
        integer = isinstance(value, int) and not isinstance(value, bool)
        bound = f" <= {high}" if high is not None else ""
        self._expect(integer and low <= value and (high is None or value <= high), f"{low} <= {name}{bound}, got {value}")

    def _expect_bool(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            self._expect(isinstance(value, bool), f"{name} to be True or False, got {value!r}")

    def _expect_choice(self, name: str, known: Iterable[str]) -> None:
        names, value = sorted(known), getattr(self, name)
        self._expect(value in names, f"{name} to be one of {names}, got {value!r}")


@dataclasses.dataclass(frozen=True)
class Config(Description):
    """How to quantize a model."""

    kind = "config"
    newer = ("backward",)

    @property
    def quant_method(self) -> NoReturn:
        """What transformers and diffusers ask of their own configs. Raises AttributeError with the remedy."""
        raise AttributeError(
            f"quant_ops.{type(self).__name__}: expected from_pretrained to get a QuantOpsConfig, got {self}. Write "
            f"QuantOpsConfig({self}), from quant_ops.integrations.transformers or .diffusers."
        )


def _plain(value: Any) -> Any:
    """A description as what json writes."""
    if not isinstance(value, Description):
        return value
    names = [field.name for field in dataclasses.fields(value)]
    fields = {name: _plain(getattr(value, name)) for name in names if name not in value.newer or getattr(value, name)}
    return {value.kind: type(value).__name__, **fields}


def register(*classes: type[Description]) -> None:
    """Lets JSON name these classes."""
    for described in classes:
        _REGISTERED.setdefault(described.kind, {})[described.__name__] = described


def from_json(kind: str, text: str) -> Any:
    """The description of this kind that :meth:`Description.to_json` wrote. Raises ValueError for another name, field or value."""
    fields = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError(f"quant_ops: expected a JSON object with a {kind}, got {text}")
    return _made(kind, fields)


def _made(kind: str, fields: dict[str, Any]) -> Description:
    name, known = fields.pop(kind, None), _REGISTERED[kind]
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"quant_ops: expected a {kind} named one of {sorted(known)}, got {name}")
    described = known[name]
    expected = {field.name for field in dataclasses.fields(described)}
    if not set(fields) <= expected:
        raise ValueError(f"quant_ops.{name}: expected fields among {sorted(expected)}, got {sorted(set(fields) - expected)}")
    required = {f.name for f in dataclasses.fields(described) if f.default is dataclasses.MISSING}
    if not required <= set(fields):
        raise ValueError(f"quant_ops.{name}: expected the fields {sorted(required)}, got {sorted(fields)}")
    return described(**{field: _value(value) for field, value in fields.items()})


def _value(value: Any) -> Any:
    """The value of a field: a description where JSON has an object with the key of its kind."""
    inner = next((kind for kind in _REGISTERED if isinstance(value, dict) and kind in value), None)
    return value if inner is None else _made(inner, value)
