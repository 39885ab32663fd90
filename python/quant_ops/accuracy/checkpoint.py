"""What a long call has finished, in a folder, so that another call goes on from there: one safetensors file for each stage.

``state.json`` says what the files belong to, by digests of the model's tensors and of the data, and by the settings. A file appears
whole or not at all. Nothing is unpickled.
"""

import hashlib
import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_VERSION = 1


def _add(digest: Any, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(pickle.dumps(value))
        return
    plain = value.detach().cpu().contiguous()
    digest.update(f"{plain.dtype} {tuple(plain.shape)}".encode())
    if plain.numel():
        digest.update(plain.reshape(-1).view(torch.uint8).numpy())


def digest_of_model(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(name.encode())
        _add(digest, tensor)
    return digest.hexdigest()


def digest_of_data(op: str, batches: Sequence[Any]) -> str:
    """Of all tensors, and of what else is in the batches.

    Raises:
        TypeError: it cannot be pickled.
    """
    digest = hashlib.sha256()
    for batch in batches:
        for leaf in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch):
            try:
                _add(digest, leaf)
            except Exception as error:
                raise TypeError(
                    f"quant_ops.{op}: expected batches that can be told from others by a checkpoint, got one with a "
                    f"{type(leaf).__name__} that cannot be pickled ({error}). Give tensors, or no checkpoint=."
                ) from error
    return digest.hexdigest()


class Checkpoint:
    """A folder with the finished stages of a call."""

    def __init__(self, op: str, path: str | os.PathLike[str], belongs_to: dict[str, Any]) -> None:
        """Makes the folder, or checks that what is there belongs to this call.

        Args:
            belongs_to: the parts that have to be alike, under the names that a refusal gives them.

        Raises:
            ValueError: the folder holds something else, or the stages of another call.
            NotADirectoryError: the path is a file.
        """
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise NotADirectoryError(f"quant_ops.{op}: expected checkpoint to be a folder, got the file {path}")
        self.path.mkdir(parents=True, exist_ok=True)
        state, wanted = self.path / "state.json", {"op": op, "version": _VERSION} | belongs_to
        if not state.exists():
            if any(self.path.iterdir()):
                raise ValueError(f"quant_ops.{op}: expected checkpoint to be a new, an empty or its own folder, got {path}")
            self._write(state, json.dumps(wanted, indent=1).encode())
            return
        try:
            found = json.loads(state.read_text())
        except ValueError as error:
            raise ValueError(f"quant_ops.{op}: expected {state} to be JSON, got {error}. Delete the folder {path}") from error
        for part, value in json.loads(json.dumps(wanted)).items():
            if not isinstance(found, dict) or found.get(part) != value:
                raise ValueError(
                    f"quant_ops.{op}: expected the checkpoint {path} to be of this call, got one of another {part}. Go on with "
                    "what it was begun with, or name another folder."
                )

    def _write(self, path: Path, content: bytes) -> None:
        partial = path.with_name(f".{path.name}.partial")
        partial.write_bytes(content)
        os.replace(partial, path)

    def _file(self, stage: int) -> Path:
        return self.path / f"stage-{stage:04}.safetensors"

    def load(self, op: str, stage: int) -> tuple[dict[str, Tensor], Any] | None:
        """The tensors of a stage and what was saved with them; None if it is not finished.

        Raises:
            ValueError: the file is damaged.
        """
        path = self._file(stage)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["stage"])  # noqa: SIM118
        except Exception as error:
            raise ValueError(f"quant_ops.{op}: expected {path} to be a whole file, got {error}. Delete it") from error

    def save(self, stage: int, tensors: Mapping[str, Tensor], notes: Any) -> None:
        """Writes a stage; ``notes`` is written as JSON."""
        path = self._file(stage)
        partial = path.with_name(f".{path.name}.partial")
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        save_file(plain, partial, metadata={"stage": json.dumps(notes)})
        os.replace(partial, path)
