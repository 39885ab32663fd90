"""Times of layers and of what may stand for them, by what they depend on: a dictionary that can be saved, as JSON or pickled.

A key says what was timed and on what input. The machine (its CPU and instruction set) and the versions of the packages belong to
the whole cache, which refuses the times of others. The GPU and the number of threads are in the key.
"""

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import _library
from ..info import cpu_model

_FORMAT = "times of quant_ops.autoquant_"
FLOAT = "float"  # the candidate that is the layer itself


class Key(NamedTuple):
    """What a time depends on; the first five are those of torchao's AUTOQUANT_CACHE.

    Attributes:
        candidate: "float" or the config as JSON.
        activation: shape of the input; of a linear layer its rows and columns.
        weight, bias: shapes; None without a bias.
        dtype: of the input.
        layer: the class and, of a convolution, its geometry and memory format.
        weight_dtype, autocast: dtypes of the weight and of autocast, which is "" where it is off.
        device: "cpu", or the name of the GPU.
        threads: of torch on the CPU.
    """

    candidate: str
    activation: tuple[int, ...]
    weight: tuple[int, ...]
    bias: tuple[int, ...] | None
    dtype: str
    layer: str
    weight_dtype: str
    autocast: str
    device: str
    threads: int


def here() -> dict[str, str]:
    """What the times of a cache have in common on this machine."""
    return {
        "cpu": cpu_model(),
        "instruction set": _library.isa(),
        "quant_ops": _library.VERSION,
        "torch": str(torch.__version__),
    }


class TimingCache(dict[Key, float]):
    """Seconds by :class:`Key`. ``update`` refuses a cache of another machine or version, and so does :meth:`load`.

    Pickled, it remembers where it was measured. A plain ``dict`` of it does not: ``cache.update(dict(other))`` takes any times.

    Attributes:
        origin: the machine and the versions of the times; None where they are this machine's and these.
    """

    origin: dict[str, str] | None = None

    def update(self, *args: Any, **kwargs: Any) -> None:
        """As that of a dict.

        Raises:
            ValueError: the other one is a TimingCache of another machine, or of other versions of quant_ops or torch.
        """
        for other in args:
            if isinstance(other, TimingCache) and other:
                _expect_here(
                    "TimingCache.update", self.origin or here(), other.origin or here(), "Measure anew, or pass dict(other)."
                )
        super().update(*args, **kwargs)

    def __reduce__(self) -> tuple[Callable[..., "TimingCache"], tuple[Any, ...]]:
        return _restored, (dict(self), self.origin or here())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the times as JSON; a file that is there is replaced at once."""
        path, lines = Path(path), [json.dumps([*key, seconds]) for key, seconds in self.items()]
        head = {"format": _FORMAT, "measured on": self.origin or here(), "fields": [*Key._fields, "seconds"]}
        text = json.dumps(head)[:-1] + ', "times": [\n' + ",\n".join(sorted(lines)) + "\n]}\n"
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            partial.write_text(text)
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, ignore_other: bool = False) -> "TimingCache":
        """The times that :meth:`save` wrote.

        Args:
            ignore_other: a file of another machine or version gives an empty cache.

        Raises:
            ValueError: the file is none of :meth:`save`, or of another machine or version.
            OSError: it cannot be read.
        """
        try:
            content = json.loads(Path(path).read_text())
            measured_on, times = content["measured on"], [_entry(entry) for entry in content["times"]]
            right = content["format"] == _FORMAT and isinstance(measured_on, dict)
            if not right or content["fields"] != [*Key._fields, "seconds"]:
                raise ValueError("it has another format")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"quant_ops.TimingCache.load: expected a file of TimingCache.save, got {os.fspath(path)!r}, which cannot be read "
                f"as one ({type(error).__name__}: {error}). Delete it, or give another path."
            ) from None
        if measured_on != here():
            if ignore_other:
                return cls()
            remedy = f"Delete {os.fspath(path)!r}, give another path, or pass ignore_other=True, which measures anew."
            _expect_here("TimingCache.load", here(), measured_on, remedy)
        return cls(times)


def _restored(times: Mapping[Key, float], origin: dict[str, str]) -> TimingCache:
    cache = TimingCache(times)
    cache.origin = None if origin == here() else origin
    return cache


def _expect_here(op: str, expected: Mapping[str, str], got: Mapping[str, str], remedy: str) -> None:
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)]
    if names:
        wanted, found = (", ".join(f"{name} {where.get(name)!r}" for name in names) for where in (expected, got))
        raise ValueError(f"quant_ops.{op}: expected times of {wanted}, got times of {found}. {remedy}")


def _entry(entry: Any) -> tuple[Key, float]:
    """A key and its time, from the list in a file."""
    *fields, seconds = entry
    made: Any = Key
    key: Key = made(*(tuple(field) if isinstance(field, list) else field for field in fields))
    if not (isinstance(seconds, float) and math.isfinite(seconds) and seconds > 0):
        raise ValueError(f"a time is {seconds}")
    for shape in (key.activation, key.weight, key.bias or ()):
        if not all(type(size) is int for size in shape):
            raise ValueError(f"a shape is {shape}")
    if not (all(isinstance(text, str) for text in (key.candidate, *key[4:9])) and type(key.threads) is int):
        raise ValueError(f"a key is {tuple(key)}")
    return key, seconds


AUTOQUANT_CACHE = TimingCache()  # what this process has measured, and what was added to it


def short(dtype: torch.dtype) -> str:
    """The name without the package."""
    return re.sub(r"^torch\.", "", str(dtype))
