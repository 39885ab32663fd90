"""A quantized model as one safetensors file, and back into a fresh float model.

The file holds the model's state_dict as plain tensors, each one once: int8 weights (of 4 bits two codes + 8 in a byte), float32
scales, and whatever stayed float; also the buffers that a state_dict leaves out, for models on the meta device. Its metadata has
one key, "quant_ops", which holds as JSON everything that the state_dict lacks:

    {"format_version": 1, "quant_ops": "0.2.0",
     "layers": {"blocks.0.up": {"class": "QuantLinear", "arguments": {...}, "weight_bits": 8, "compute_dtype": "float32",
                                "config": {...} or null}, ...},
     "shared": {"head.weight": "embedding.weight", ...},    further names of a tensor that the file has under its first name
     "not_in_state_dict": ["rotary.inv_freq", ...],
     "fused_activations": ["blocks.0.gelu", ...]}         modules that layers have taken in, if there are any

``arguments`` are those of the layer's constructor. Packed weights are derived, never saved. Nothing is ever unpickled. Files from
before ``compute_dtype`` and ``not_in_state_dict``, whose codes are called ``weight`` instead of ``qweight``, are read as well. The
version is 2 where there are weight-only layers or multipliers of inputs, which earlier versions of the package do not know, else 1.
"""

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, Protocol, cast

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import _library
from .._models import has_hooks, patched
from ..nn import QUANTIZED_LAYERS, FusedActivation, Int8Layer, QuantizedLayer, WeightOnlyLayer, as_linear, is_original, show_forms
from ..nn.saving import is_channels_last
from ..simulation.recast import Recast
from . import config
from .prepared import Prepared, is_sharded, whole
from .select import FAMILIES, ConversionResult, Survey, settle

FORMAT_VERSION = 2

_KEY = "quant_ops"
_VERSIONS = {name: 2 if issubclass(kind, WeightOnlyLayer) else 1 for name, kind in QUANTIZED_LAYERS.items()}
_REQUIRED = ("qweight", "weight_scale")
_FLOATS = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}


# ---- save ------------------------------------------------------------------------------------------------------------


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Writes a quantized model to one safetensors file, which :func:`load_` reads.

    A model that is sharded (FSDP2, tensor parallel styles) is gathered: every process has to call it, and may name the same file.

    The file appears whole or not at all: whatever happens while it is written, an older file of that name stays as it was. The same
    model gives the same bytes.

    Args:
        model: any module with quantized layers; what stayed float is saved as it is.
        path: of the file; its name usually ends in ``.safetensors``.

    Raises:
        TypeError: the state_dict holds something else than tensors.
        ValueError: model is itself one layer, or not converted yet, or a tensor has no data.
        OSError: the file cannot be written.
    """
    model = _without_compile(model)
    if isinstance(model, QuantizedLayer):
        raise ValueError(
            f"quant_ops.save: expected a model that contains layers, got a bare {type(model).__name__}, which load_ could not "
            "replace in place. Wrap it in an nn.Sequential."
        )
    for name, module in model.named_modules():
        if isinstance(module, Recast):
            first = "Call convert_ first, or keep" if isinstance(module, Prepared) else "Keep"
            raise ValueError(
                f"quant_ops.save: expected a float or int8 model, got the {module.kind} layer {name!r}. {first} the state_dict."
            )
    state, rest = state_of(model), _not_in_state_dict(model)
    tensors, shared = _distinct(state | rest)
    layers = {
        name: describe(module) for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, QuantizedLayer)
    }
    version = max((_VERSIONS[entry["class"]] for entry in layers.values()), default=1)
    header = {
        "format_version": 2 if any(f"{name}.input_multiplier" in state for name in layers) else version,
        "quant_ops": _library.VERSION,
        "layers": layers,
        "shared": shared,
        "not_in_state_dict": list(rest),
    }
    if fused := [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FusedActivation)]:
        header["fused_activations"] = fused
    with _replacing(Path(path)) as temporary:
        save_file(tensors, temporary, metadata={_KEY: json.dumps(header)})


def _without_compile(model: nn.Module) -> nn.Module:
    """The module that torch.compile has wrapped; its names are those of the fresh model."""
    return getattr(model, "_orig_mod", model)


def state_of(model: nn.Module) -> dict[str, Any]:
    """The state_dict, in which the codes of a layer that has several names are one tensor; each name unpacks its own."""
    state = model.state_dict()
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer) and f"{name}.qweight" in state:
            state[f"{name}.qweight"] = state[f"{first.setdefault(module, name)}.qweight"]
    gathered: dict[tuple[Any, ...], Tensor] = {}  # by the part that this process has, so that tied tensors stay so
    for name, tensor in state.items():
        if isinstance(tensor, Tensor) and is_sharded(tensor):
            local = tensor.to_local()  # type: ignore[attr-defined]
            key = (local.data_ptr() if local.numel() else name, tensor.shape, tensor.stride())
            state[name] = gathered[key] = gathered[key] if key in gathered else whole(tensor)
    return state


def _not_in_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The non-persistent buffers outside int8 layers; those with the same elements are one tensor."""
    buffers: dict[str, Tensor] = {}
    same: dict[Any, Tensor] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute in [] if isinstance(module, QuantizedLayer) else sorted(module._non_persistent_buffers_set):
            buffer = module._buffers.get(attribute)
            if buffer is None:
                continue
            if buffer.is_meta:
                buffers[_join(name, attribute)] = buffer  # refused with a sentence, as others are
                continue
            plain = buffer.detach().cpu().contiguous()
            data = plain.flatten().view(torch.uint8).numpy() if plain.numel() else b""
            key = (plain.dtype, plain.shape, hashlib.sha256(data).digest())
            buffers[_join(name, attribute)] = same.setdefault(key, plain)
    return buffers


def _join(module: str, attribute: str) -> str:
    return f"{module}.{attribute}" if module else attribute


def describe(layer: QuantizedLayer) -> dict[str, Any]:
    """Everything needed to build the layer again, except its tensors."""
    settings, whole_sizes = layer.config, layer.sharding.whole if layer.sharding is not None else {}
    return {
        "class": next(kind.__name__ for kind in type(layer).__mro__ if kind.__name__ in QUANTIZED_LAYERS),  # FSDP2 derives others
        "arguments": {
            name: value
            for name in (*layer.geometry, *layer.settings)
            if (value := whole_sizes.get(name, getattr(layer, name))) != layer.newer.get(name, ...)
        },
        "weight_bits": layer.weight_bits,
        "compute_dtype": str(layer.compute_dtype).removeprefix("torch."),
        "config": None if settings is None else json.loads(settings.to_json()),
    }


def _distinct(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors under their first names, and for each further name the first one."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    views: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"quant_ops.save: expected a state_dict of tensors, got {type(tensor).__name__} under {name!r}")
        if tensor.is_meta:
            raise ValueError(f"quant_ops.save: expected tensors with data, got {name!r} on the meta device. Load the model first.")
        storage = tensor.untyped_storage().data_ptr()
        view = (storage, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
        if tensor.numel() and view in views:
            shared[name] = views[view]
            continue
        views[view] = name
        overlaps = storage in storages  # another part of a storage that is saved already: safetensors wants a copy
        tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format) if overlaps else tensor.detach().contiguous()
        storages.add(storage)
    return tensors, shared


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside the file, which takes the file's place once it is whole and on the disk."""
    target = Path(os.path.realpath(path))  # replaces the target of a symbolic link, not the link
    if not target.parent.is_dir():
        raise FileNotFoundError(f"quant_ops.save: expected a path in an existing folder, got {path}")
    if target.is_dir():
        raise IsADirectoryError(f"quant_ops.save: expected the path of a file, got the folder {path}")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            temporary = Path(folder) / target.name
            temporary.touch()
            mode = (target if target.exists() else temporary).stat().st_mode  # safetensors would leave 0600
            yield temporary
            temporary.chmod(mode & 0o777)
            _flush(temporary)
            os.replace(temporary, target)
            _flush(target.parent)
    except (safetensors.SafetensorError, OSError) as error:
        raise OSError(f"quant_ops.save: {path} was not written: {error}") from error


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ---- load ------------------------------------------------------------------------------------------------------------


def load_(model: nn.Module, path: str | os.PathLike[str], *, device: torch.device | str | None = None) -> ConversionResult:
    """Turns a fresh float model into the quantized one that :func:`save` wrote, in place.

    The model may be on the meta device (``with torch.device("meta"): model = Net()``): then no float weight is ever allocated. The
    file is mapped, not copied; on the CPU the plain tensors stay backed by it, so replace the file as :func:`save` does and do not
    write into it. Everything is checked before the model is touched: after an error it is as it was.

    Args:
        model: built as the float model was, or already quantized.
        path: a file of :func:`save`.
        device: where the tensors go; by default where the model's are, the CPU for those on the meta device.

    Returns:
        The int8 layers, and the layers and other modules whose weights the file keeps float. Dtypes are the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, no file of :func:`save`, of a newer format, or of another model. The first difference is
            named.
    """
    model = _without_compile(model)
    file = _File(path)
    _check_fit(model, file)

    def place(tensor: Tensor) -> torch.device | str:
        return device or ("cpu" if tensor.is_meta else tensor.device)

    family = "weight-only" if any(_VERSIONS[entry["class"]] == 2 for entry in file.layers.values()) else "int8"
    survey = Survey("load_", model, family)
    layers, floats_of_file, rest = _layers(model, file, place), _float_state(model, file, place), _rest(model, file, place)
    before = [(module, dict(module._parameters), dict(module._buffers)) for module in model.modules()]
    try:
        model.load_state_dict(floats_of_file, strict=False, assign=True)
    except Exception:
        for module, parameters, buffers in before:
            module._parameters.update(parameters)
            module._buffers.update(buffers)
        raise
    for name, buffer in rest.items():
        owner, _, attribute = name.rpartition(".")
        model.get_submodule(owner)._buffers[attribute] = buffer
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    for name in file.header.get("fused_activations", []):
        model.set_submodule(name, FusedActivation())
    settle(model)
    floats = [name for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, FAMILIES[family])]
    result = ConversionResult(converted=list(layers), skipped=[(name, "float in the file") for name in floats])
    result.kind = show_forms(layer.form for layer in layers.values())
    return survey.finish(result)


def read_header(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The metadata of a file of :func:`save`, checked; errors as in :func:`load_`."""
    return _File(path).header


def read_layers(path: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """Weight bits and number of steps of every quantized layer in a file of :func:`save`; errors as in :func:`load_`."""
    file = _File(path)

    def steps(layer: str) -> int:
        scale = f"{layer}.input_scale"
        return math.prod(file.shape(scale)) if scale in file.sources else 1

    return {name: (entry["weight_bits"], steps(name)) for name, entry in file.layers.items()}


class _File:
    """A mapped file of :func:`save`, its metadata parsed and checked.

    Attributes:
        layers: the int8 layers, as the metadata have them.
        sources: every name in the state_dict, and the name of its tensor in the file.
    """

    op = "quant_ops.load_"

    def __init__(self, path: str | os.PathLike[str]) -> None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"quant_ops.load_: expected the path of a file, got {path}")
        self.path = path
        try:
            self._file = cast(Any, safetensors.safe_open(path, framework="pt"))
        except (safetensors.SafetensorError, OSError) as error:
            raise ValueError(
                f"quant_ops.load_: expected a whole safetensors file, got {path}: {error}. It is cut off, or no file of "
                "quant_ops.save."
            ) from error
        text = (self._file.metadata() or {}).get(_KEY)
        if text is None:
            raise ValueError(
                f"quant_ops.load_: expected a file of quant_ops.save, got {path}, a safetensors file of another program"
            )
        names = list(self._file.keys())
        try:
            self.header: dict[str, Any] = json.loads(text, parse_constant=_refuse_constant)
            version = self.header["format_version"]
            if type(version) is not int or version < 1:
                raise ValueError(f"format_version {version!r}")
            if version <= FORMAT_VERSION:
                _check_header(self.header, names)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"quant_ops.load_: expected metadata of quant_ops.save in {path}, got {error!r}") from error
        if version > FORMAT_VERSION:
            raise ValueError(
                f"quant_ops.load_: expected format_version <= {FORMAT_VERSION}, got {version} in {path}, written by quant_ops "
                f"{self.header.get('quant_ops')}. Upgrade quant_ops."
            )
        self.layers: dict[str, Any] = self.header["layers"]
        self.sources: dict[str, str] = {name: name for name in names} | self.header["shared"]
        self.not_in_state_dict = {name: self.sources.pop(name) for name in self.header.get("not_in_state_dict", [])}
        for layer in self.layers:
            if f"{layer}.weight" in self.sources:  # its name before it was qweight
                self.sources.setdefault(f"{layer}.qweight", self.sources.pop(f"{layer}.weight"))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the tensor of this name."""
        source = self.sources.get(name) or self.not_in_state_dict[name]
        return tuple(self._file.get_slice(source).get_shape())

    def tensor(self, source: str, device: torch.device | str) -> Tensor:
        """A tensor of the file; on the CPU it is a view of the mapped file."""
        return self._file.get_tensor(source).to(device)


def _refuse_constant(constant: str) -> NoReturn:
    raise ValueError(f"{constant}, which JSON does not have")


def _check_header(header: dict[str, Any], names: list[str]) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError for metadata that :func:`save` does not write."""
    stored = set(names)
    for name, entry in header["layers"].items():
        check_entry(name, entry)
    for name, source in header["shared"].items():
        if name in stored or source not in stored:
            raise ValueError(f"{name!r} shared with {source!r}")
    rest = header.get("not_in_state_dict", [])
    if type(rest) is not list or len(set(rest)) != len(rest) or not set(rest) <= stored | header["shared"].keys():
        raise ValueError(f"not_in_state_dict {rest!r}")
    fused = header.get("fused_activations", [])
    if type(fused) is not list or not all(type(name) is str for name in fused) or set(fused) & header["layers"].keys():
        raise ValueError(f"fused_activations {fused!r}")


def check_entry(name: str, entry: dict[str, Any]) -> None:
    """Raises ValueError, TypeError, KeyError or AttributeError for what :func:`describe` does not make."""
    kind = QUANTIZED_LAYERS[entry["class"]]
    arguments = kind.newer | entry["arguments"]
    known = arguments.keys() == {*kind.geometry, *kind.settings} and kind.are_settings(arguments, entry["weight_bits"])
    if not known or entry.get("compute_dtype", "float32") not in _FLOATS:
        raise ValueError(f"layer {name!r}: {entry}")
    if entry["config"] is not None:
        _check_config(name, entry["config"])


def _check_config(name: str, fields: dict[str, Any]) -> None:
    """A config's fields have the types of their defaults; what else is wrong with them the config itself says."""
    found = config.from_json(json.dumps(fields))
    for field in dataclasses.fields(found):
        value = getattr(found, field.name)
        if type(value) is not type(field.default) and (type(field.default), type(value)) != (float, int):
            raise ValueError(f"layer {name!r} with {field.name}={value!r}")


def _check_fit(model: nn.Module, file: _File) -> None:
    """Refuses a file of another model, naming the first tensor or setting that differs."""
    state, modules = model.state_dict(keep_vars=True), dict(model.named_modules(remove_duplicate=False))

    def refuse(what: str) -> NoReturn:
        raise ValueError(f"quant_ops.load_: expected {file.path} to be a file of this model, got {what}")

    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        entry = file.layers.get(owner)
        if entry is not None and attribute not in ("weight", "qweight", "bias"):
            continue  # the model is quantized already; its scales are replaced
        if not isinstance(tensor, Tensor):
            refuse(f"{name!r} in the model, which is no tensor and in no file")
        stored = f"{owner}.qweight" if entry is not None and attribute == "weight" else name
        if stored not in file.sources:
            others = sorted(set(file.sources) - set(state))
            refuse(f"no {stored!r} in the file (model: {tuple(tensor.shape)}; names that the file alone has: {others[:3]})")
        shape = tuple(tensor.shape)
        if entry is not None and attribute != "bias":
            owned: Any = as_linear(modules[owner])
            shape = tuple(QUANTIZED_LAYERS[entry["class"]].stored_shape(owned.weight.shape, entry["weight_bits"]))
        if file.shape(stored) != shape:
            refuse(f"{name!r} of shape {file.shape(stored)} in the file and {shape} in the model")
    for name in file.header.get("fused_activations", []):
        if name not in modules:
            refuse(f"an activation {name!r} that its layer computes, and nothing of that name in the model")
    for name, entry in file.layers.items():
        module, kind = modules.get(name), QUANTIZED_LAYERS[entry["class"]]
        if module is None or (type(module) is not kind and not is_original(module, kind)):
            got = "nothing" if module is None else type(module).__name__
            refuse(f"a {kind.__name__} {name!r} in the file and {got} of that name in the model")
        if has_hooks(module):
            refuse(f"hooks on {name!r}, which its replacement would lose. Load first, then add them")
        if reason := patched(module):
            refuse(f"{name!r} in the model: {reason}")
        module = as_linear(module)
        for setting in kind.geometry:
            argument = _from_json(entry["arguments"][setting])
            if repr(getattr(module, setting)) != repr(argument):  # 8.0 and true are neither 8 nor 1
                refuse(f"{name!r} with {setting}={argument!r} in the file and {getattr(module, setting)!r} in the model")
        for attribute in _REQUIRED:
            if f"{name}.{attribute}" not in file.sources:
                refuse(f"a {kind.__name__} {name!r} without {attribute} in the file")
        if f"{name}.bias" in file.sources and getattr(module, "bias", None) is None:
            refuse(f"{name!r} with a bias in the file and without in the model")
    known = set(state) | {f"{name}.{buffer}" for name, entry in file.layers.items() for buffer in _stored(entry)}
    if unexpected := [name for name in file.sources if name not in known]:
        refuse(f"{unexpected[0]!r} of shape {file.shape(unexpected[0])} in the file alone")
    for name, buffer in _meta_buffers(model, file):
        if name not in file.not_in_state_dict:
            raise ValueError(
                f"quant_ops.load_: expected every buffer on the meta device to be in {file.path}, got the non-persistent {name!r}, "
                "which an earlier quant_ops did not save. Build the model with this buffer on a real device."
            )
        if file.shape(name) != tuple(buffer.shape):
            refuse(f"{name!r} of shape {file.shape(name)} in the file and {tuple(buffer.shape)} in the model")


def _meta_buffers(model: nn.Module, file: _File) -> Iterator[tuple[str, Tensor]]:
    """The buffers without data that are in no state_dict."""
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if buffer.is_meta and name not in file.sources and name.rpartition(".")[0] not in file.layers:
            yield name, buffer


def _from_json(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _stored(entry: dict[str, Any]) -> tuple[str, ...]:
    """The names of a layer's tensors, some of which may not be there."""
    return (*_REQUIRED, *QUANTIZED_LAYERS[entry["class"]].optional)


def _layers(model: nn.Module, file: _File, place: Callable[[Tensor], torch.device | str]) -> dict[str, QuantizedLayer]:
    """The quantized layers under their names; int8 ones whose tensors are all the same are one module.

    Different weight-only layers may have the same tensors: they share a weight, and are one module where they are in the model.
    """
    layers: dict[str, QuantizedLayer] = {}
    made: dict[tuple[Any, ...], QuantizedLayer] = {}
    by_weight: dict[tuple[Any, ...], WeightOnlyLayer] = {}
    for name, entry in file.layers.items():
        old: Any = model.get_submodule(name)
        sources = {key: file.sources[f"{name}.{key}"] for key in _stored(entry) if f"{name}.{key}" in file.sources}
        is_weight_only = issubclass(QUANTIZED_LAYERS[entry["class"]], WeightOnlyLayer)
        identity = (*sources.values(), json.dumps(entry), id(old) if is_weight_only else None)
        if identity not in made:
            layer = built_layer(name, entry, sources, old, file, place, by_weight)
            made[identity] = layer.train(old.training)
        layers[name] = made[identity]
    return layers


class Source(Protocol):
    """Where the tensors of layers come from.

    Attributes:
        op: the call, and
        path: the file, for messages.
    """

    op: str
    path: str | os.PathLike[str]

    def tensor(self, source: str, device: torch.device | str) -> Tensor:
        """A tensor by its name, on the device."""
        raise NotImplementedError


def built_layer(
    name: str,
    entry: dict[str, Any],
    sources: dict[str, str],
    old: Any,
    file: Source,
    place: Callable[[Tensor], torch.device | str],
    by_weight: dict[tuple[Any, ...], WeightOnlyLayer],
) -> QuantizedLayer:
    """A layer of a file, in place of ``old``; ``by_weight`` has those from which it may take its weight, and gets it."""
    settings, arguments = entry["config"], {key: _from_json(value) for key, value in entry["arguments"].items()}
    with _usable(name, file):
        layer = QUANTIZED_LAYERS[entry["class"]].empty(arguments, bias="bias" in sources)
    if isinstance(layer, Int8Layer):
        layer.weight_bits = entry["weight_bits"]
    layer.compute_dtype = _FLOATS[entry["compute_dtype"]] if "compute_dtype" in entry else old.weight.dtype
    layer.channels_last = getattr(old, "channels_last", False) or is_channels_last(old.weight)
    layer.config = settings and config.from_json(json.dumps(settings))
    whole = True
    if isinstance(layer, WeightOnlyLayer):
        weight = [sources.get(key) for key in ("qweight", "weight_scale", "weight_zero_point")]
        shared = by_weight.setdefault((*weight, layer.bits, layer.group_size, place(old.weight)), layer)
        if shared is not layer:
            with _usable(name, file):
                layer.share_weight(shared)
            sources, whole = {key: source for key, source in sources.items() if key in ("bias", "input_multiplier")}, False
    state = {key: file.tensor(source, place(old.weight)) for key, source in sources.items()}
    for key, tensor in state.items():
        if tensor.dtype != (wanted := layer.dtypes()[key]):
            raise ValueError(f"{file.op}: expected {name}.{key} of dtype {wanted} in {file.path}, got {tensor.dtype}")
    if "input_scale" in state and arguments["asymmetric"]:
        raise ValueError(
            f"{file.op}: expected a usable layer {name!r} in {file.path}, got an input_scale in an asymmetric layer, which "
            "finds the range of every input"
        )
    with _usable(name, file):
        layer.load_state_dict(state, strict=whole, assign=True)
    return layer


@contextlib.contextmanager
def _usable(name: str, file: Source) -> Iterator[None]:
    """Says of which layer what is wrong."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{file.op}: expected a usable layer {name!r} in {file.path}, got: {error}") from error


def _float_state(model: nn.Module, file: _File, place: Callable[[Tensor], torch.device | str]) -> dict[str, Tensor]:
    """The tensors outside int8 layers. Names of one tensor get one object, so that tied parameters are tied again."""
    state: dict[str, Tensor] = {}
    made: dict[str, Tensor] = {}
    for name, old in model.state_dict(keep_vars=True).items():
        if name.rpartition(".")[0] in file.layers:
            continue
        source = file.sources[name]
        if source not in made:
            tensor = file.tensor(source, place(old))
            _check_dtype(name, tensor, old, file)
            made[source] = nn.Parameter(tensor, old.requires_grad) if isinstance(old, nn.Parameter) else tensor
        state[name] = made[source]
    return state


def _rest(model: nn.Module, file: _File, place: Callable[[Tensor], torch.device | str]) -> dict[str, Tensor]:
    """The buffers on the meta device that are in no state_dict. Those on a real device stay, as in ``load_state_dict``."""
    rest: dict[str, Tensor] = {}
    made: dict[Tensor, Tensor] = {}
    for name, old in _meta_buffers(model, file):
        if old not in made:  # those with the same elements are one in the file; in the model they are what they were
            made[old] = file.tensor(file.not_in_state_dict[name], place(old)).clone()
            _check_dtype(name, made[old], old, file)
        rest[name] = made[old]
    return rest


def _check_dtype(name: str, tensor: Tensor, old: Tensor, file: _File) -> None:
    """The file's floating dtypes are taken, but an integer or a bool has to be the model's."""
    if tensor.dtype != old.dtype and not (tensor.dtype in _FLOATS.values() and old.dtype in _FLOATS.values()):
        raise ValueError(f"quant_ops.load_: expected {name!r} of a dtype like {old.dtype} in {file.path}, got {tensor.dtype}")
