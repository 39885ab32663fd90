"""The quantized layers of a checkpoint: what ``config.json`` says of them, and how they are made while a library reads tensors.

The tensors of a checkpoint are those of the state_dict. ``quantization_config`` in ``config.json`` has what is needed to build the
layers before a tensor is read; layers that differ in nothing but their sizes, which the float model tells, are one entry:

    {"quant_method": "quant_ops", "format_version": 1, "quant_ops": "0.1.0",
     "layers": [{"class": "QuantLinear", "arguments": {...}, "weight_bits": 8, "compute_dtype": "float32", "config": {...} or null,
                 "tensors": ["bias", ...], "num_steps": 1, "names": ["model.layers.0.mlp.up_proj", ...]}, ...],
     "shared": {"lm_head": "model.embed_tokens"},      layers that have the weight of another one; the checkpoint has it once
     "multiplied": [...], "folded": [...], "with_bias": [...],    what else the calls of the package changed in the float model
     "fused_activations": [...]}                                  modules that layers have taken in

Both libraries build the model on the meta device and hand over one tensor after the other. :class:`Awaited` layers collect them,
and become the quantized layer with the last one; :class:`OnTheFly` quantizes each float layer when it is complete. So no more than
one layer is in memory twice. Read first: convert/files.py, whose entries and checks these are.
"""

import collections
import copy
import enum
import fnmatch
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from .. import _library
from .._description import Config
from .._models import has_hooks, patched
from ..convert import config as configs
from ..convert import files
from ..convert.select import Configs, ConversionResult, Filter, Places, Survey, replace_, settle
from ..convert.workflow import Plan, layer_of, tied_layers
from ..nn import QUANTIZED_LAYERS, FusedActivation, QuantizedLayer, ScaledLinear, WeightOnlyLayer, as_linear, is_original
from ..simulation.recast import Recast

FORMAT_VERSION = 1
_KEPT = ("layers", "shared", "multiplied", "folded", "with_bias", "fused_activations")  # fields of the quantization_config
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)  # which fold_batchnorm_ replaces by nn.Identity
_WITH_BIAS = (nn.Linear, nn.Conv1d, nn.Conv2d)


class Method(str, enum.Enum):
    """The name under which both libraries know the package. They ask for its ``value``."""

    QUANT_OPS = "quant_ops"


# ---- the configuration -------------------------------------------------------------------------------------------------------


class CheckpointConfig:
    """The ``quantization_config`` of a model: what is to be quantized, or, of a quantized model, what is.

    Args:
        config: as for :func:`quant_ops.quantize_`: a config that needs no data, or a mapping from filters to such configs or None;
            default ``Int8Dynamic()``. Also in the form that ``to_dict`` gives it.
        modules_to_not_convert: names of modules that stay float with all that they contain, whole (``"model.layers.0"``) or their
            last parts (``"lm_head"``, ``"mlp.down_proj"``), or patterns of ``fnmatch``. A name that the model lacks is allowed.
        saved: the other fields of the ``config.json`` of a quantized model.

    Raises:
        TypeError: config is of another kind.
        ValueError: fields that :meth:`to_dict` does not write, or of a newer version.
    """

    quant_method = Method.QUANT_OPS

    def __init__(
        self,
        config: Configs | list[Any] | dict[str, Any] | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        **saved: Any,
    ) -> None:
        if saved.pop("quant_method", Method.QUANT_OPS) != Method.QUANT_OPS:
            raise ValueError("quant_ops.QuantOpsConfig: expected quant_method 'quant_ops', got that of another package")
        version = saved.pop("format_version", FORMAT_VERSION)
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise ValueError(
                f"quant_ops.QuantOpsConfig: expected format_version <= {FORMAT_VERSION}, got {version!r}, written by quant_ops "
                f"{saved.get('quant_ops')}. Upgrade quant_ops."
            )
        self.written_by = saved.pop("quant_ops", _library.VERSION)
        self.saved = {name: saved.pop(name) for name in _KEPT if name in saved}
        if saved:
            raise ValueError(f"quant_ops.QuantOpsConfig: expected fields of a quant_ops checkpoint, got {sorted(saved)}")
        if isinstance(modules_to_not_convert, str):
            raise TypeError(
                "quant_ops.QuantOpsConfig: expected modules_to_not_convert to be a list of names, got one str. Write "
                f"[{modules_to_not_convert!r}]."
            )
        self.modules_to_not_convert = list(modules_to_not_convert or [])
        self.config: Configs | None = None if self.is_saved else _config_of(config)

    @property
    def is_saved(self) -> bool:
        """Whether this describes a quantized model."""
        return "layers" in self.saved

    @property
    def hands_gradients_on(self) -> bool:
        """Whether gradients pass through all quantized layers, so that adapters can be trained."""
        if self.is_saved:
            entries = [entry for entry in self.saved["layers"] if entry["class"] != "WeightOnlyEmbedding"]
            return all(entry["arguments"].get("backward", False) for entry in entries)
        given = self.config.values() if isinstance(self.config, Mapping) else [self.config]
        return all(one is None or getattr(one, "backward", False) for one in given)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        head = {"quant_method": Method.QUANT_OPS.value, "format_version": FORMAT_VERSION, "quant_ops": self.written_by}
        if self.is_saved:
            return head | copy.deepcopy(self.saved)
        made = head | {"config": _plain(self.config)}
        return made | {"modules_to_not_convert": list(self.modules_to_not_convert)} if self.modules_to_not_convert else made

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """The config that :meth:`to_dict` wrote."""
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_diff_dict(self) -> dict[str, Any]:
        """The same as :meth:`to_dict`."""
        return self.to_dict()

    def to_json_string(self, use_diff: bool = True) -> str:
        """As JSON."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def update(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing here can be changed by arguments of from_pretrained: all are returned."""
        return kwargs

    def get_loading_attributes(self) -> dict[str, Any]:
        """None."""
        return {}

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CheckpointConfig) and vars(self) == vars(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        if self.is_saved:
            return f"QuantOpsConfig({sum(len(entry['names']) for entry in self.saved['layers'])} quantized layers)"
        exclude = f", modules_to_not_convert={self.modules_to_not_convert}" if self.modules_to_not_convert else ""
        return f"QuantOpsConfig({self.config}{exclude})"


class LibraryQuantizer:
    """What the two libraries' quantizers share. The library's own class comes after it in their bases."""

    quantization_config: Any
    pre_quantized: bool

    def _check_device_map(self, device_map: Any, instead: str) -> None:
        """Raises ValueError for a device_map whose parts accelerate would have to move in every call."""
        places = {str(place) for place in device_map.values()} if isinstance(device_map, Mapping) else set()
        if "disk" in places or ("cpu" in places and len(places) > 1):
            raise ValueError(
                f"quant_ops.from_pretrained: expected a device_map of one kind of devices, got {sorted(places)}. Quantized layers "
                f"are not offloaded: choose {instead}, or a smaller config such as Int4WeightOnly()."
            )

    def _check_is_float(self, where: str) -> None:
        """Raises ValueError for the config of a quantized model beside a float checkpoint."""
        if not self.pre_quantized and self.quantization_config.is_saved:
            raise ValueError(
                f"quant_ops.from_pretrained: expected a QuantOpsConfig of what to quantize in the float checkpoint {where}, got "
                "that of a quantized one. Give a config such as QuantOpsConfig(Int8Dynamic())."
            )

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: all quantized layers have ``backward=True``. The quantized weights never are."""
        return bool(self.quantization_config.hands_gradients_on)

    @property
    def is_compileable(self) -> bool:
        """torch.compile takes the quantized layers."""
        return True


def _config_of(given: Any) -> Any:
    """A config, or a mapping to configs, which may be in JSON's form: ``[[filter, config], ...]`` for a mapping."""
    if given is None:
        return configs.Int8Dynamic()
    if isinstance(given, list):
        return {_filter_of(filter): one if one is None else _config_of(one) for filter, one in given}
    if isinstance(given, Mapping) and Config.kind in given:
        return configs.from_json(json.dumps(given))
    if isinstance(given, Mapping):
        return dict(given)
    if isinstance(given, CheckpointConfig):
        raise TypeError(
            "quant_ops.QuantOpsConfig: expected a config such as Int8Dynamic(), got a QuantOpsConfig in a QuantOpsConfig"
        )
    if not isinstance(given, Config):
        raise TypeError(
            "quant_ops.QuantOpsConfig: expected a config such as Int8Dynamic(), or a mapping from filters to configs, got "
            f"{type(given).__name__}"
        )
    return given


def _plain(config: Any) -> Any:
    """For JSON. The order of a mapping matters, so that it becomes a list of pairs."""
    if isinstance(config, Mapping):
        return [[_plain_filter(filter), None if one is None else _plain(one)] for filter, one in config.items()]
    return json.loads(config.to_json())


def _plain_filter(filter: Filter) -> Any:
    if isinstance(filter, str):
        return filter
    if isinstance(filter, type) and getattr(nn, filter.__name__, None) is filter:
        return {"class": filter.__name__}
    return {"function": getattr(filter, "__name__", type(filter).__name__)}  # for the eye: nothing can read it back


def _filter_of(plain: Any) -> Filter:
    if isinstance(plain, Mapping) and "function" in plain:
        raise ValueError(
            "quant_ops.QuantOpsConfig: expected filters that JSON can hold, patterns or classes of torch.nn, got the function or "
            f"class {plain['function']!r}. Give it to QuantOpsConfig itself: a quantized model is saved without its filters."
        )
    if isinstance(plain, Mapping):
        found = getattr(nn, str(plain.get("class")), None)
        if not (isinstance(found, type) and issubclass(found, nn.Module)):
            raise ValueError(f"quant_ops.QuantOpsConfig: expected the name of a class of torch.nn, got {plain.get('class')!r}")
        return found
    return plain


def _excluded(modules: Collection[str]) -> list[Filter]:
    """The filter of the layers that are, or are in, one of the modules."""

    def modules_to_not_convert(name: str, _: nn.Module) -> bool:  # results show this name
        return any(f".{module}." in f".{name}." or fnmatch.fnmatchcase(name, module) for module in modules)

    return [modules_to_not_convert] if modules else []


# ---- what a model has -----------------------------------------------------------------------------------------------------


def described(model: nn.Module) -> dict[str, Any] | None:
    """The fields of the quantization_config that say what is quantized in a model; None if nothing is."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLayer)}
    multiplied = [name for name, module in model.named_modules() if isinstance(module, ScaledLinear)]
    if not layers and not multiplied:
        return None
    first: dict[Any, str] = {}
    shared: dict[str, str] = {}
    for name, layer in layers.items():
        if isinstance(layer, WeightOnlyLayer) and (source := first.setdefault(id(layer.packed_weight), name)) != name:
            shared[name] = source
    entries: dict[str, dict[str, Any]] = {}
    for name, layer in layers.items():
        entry = files.describe(layer)
        entry["arguments"] = {key: value for key, value in entry["arguments"].items() if key in layer.settings}
        entry["tensors"] = [key for key in layer.optional if layer._buffers[key] is not None]
        entry["num_steps"] = getattr(layer, "num_steps", 1)
        entries.setdefault(json.dumps(entry), entry | {"names": []})["names"].append(name)
    folded = [name for name, module in model.named_modules() if type(module) is nn.Identity]
    with_bias = [name for name, m in model.named_modules() if isinstance(m, _WITH_BIAS) and m.bias is not None] if folded else []
    fused = [name for name, module in model.named_modules() if isinstance(module, FusedActivation)]
    return {
        "layers": list(entries.values()),
        **({"shared": shared} if shared else {}),
        **({"multiplied": multiplied} if multiplied else {}),
        **({"folded": folded, "with_bias": with_bias} if folded else {}),
        **({"fused_activations": fused} if fused else {}),
    }


def check_finished(model: nn.Module) -> None:
    """Raises ValueError if layers beside quantized ones are prepared or simulated and not converted yet."""
    for name, module in model.named_modules():
        if isinstance(module, Recast):
            raise ValueError(
                f"quant_ops.save_pretrained: expected a float or a quantized model, got the {module.kind} layer {name!r} beside "
                "quantized ones. Call convert_ first."
            )


def state_of(model: nn.Module, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict, in which each quantized weight is once."""
    state, dropped = files.state_of(model), set(repeated(model, saved))
    return {name: tensor for name, tensor in state.items() if name not in dropped}


def repeated(model: nn.Module, saved: Mapping[str, Any]) -> list[str]:
    """The further names of quantized layers' tensors, and those of weights that layers share with another one."""
    names: list[str] = []
    first: dict[nn.Module, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, QuantizedLayer) and first.setdefault(module, name) != name:
            names += [f"{name}.{key}" for key in module.dtypes()]
    return names + [f"{name}.{key}" for name in saved.get("shared", {}) for key in _WEIGHT]


def dequantized_(model: nn.Module, dtype: torch.dtype | None = None) -> None:
    """Puts float layers, of the dtype or that in which each computes, in place of the quantized ones."""
    made: dict[nn.Module, nn.Module] = {}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, QuantizedLayer):
            if module not in made:
                made[module] = module.dequantize().to(dtype or module.compute_dtype)
            model.set_submodule(name, made[module])


_WEIGHT = ("qweight", "weight_scale", "weight_zero_point")  # what tied layers share


class _Shield:
    """Keeps a library from writing into layers that are complete while it goes on loading the model.

    transformers allocates whatever buffers are in no checkpoint, which packed weights are, and initialises what it has not read.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[nn.Module, set[str]]] = []

    def add(self, layer: nn.Module) -> None:
        """Shields a layer."""
        self._layers.append((layer, layer._non_persistent_buffers_set))
        layer._non_persistent_buffers_set = set()
        for part in (layer, layer.weight, *layer._buffers.values()):
            if part is not None:
                part._is_hf_initialized = True  # type: ignore[union-attr]

    def lower(self) -> None:
        """Makes the layers as they were."""
        for layer, names in self._layers:
            layer._non_persistent_buffers_set = names
        self._layers = []


# ---- a quantized checkpoint ----------------------------------------------------------------------------------------------


class Awaited(nn.Module):
    """Stands for a quantized layer whose tensors have not been read yet. Its buffers, on the meta device, are those of the file."""

    def __init__(self, name: str, tensors: dict[str, Tensor], done: Callable[["Awaited"], None]) -> None:
        super().__init__()
        self.name, self._done = name, done
        self.missing = set(tensors)
        for key, tensor in tensors.items():
            self.register_buffer(key, tensor)

    def __setattr__(self, key: str, value: Any) -> None:
        super().__setattr__(key, value)
        # transformers marks what it has read so; what it only allocates, for a tensor that the checkpoint lacks, has no mark
        if isinstance(value, Tensor) and getattr(value, "_is_hf_initialized", False):
            self.take(key, value)

    def take(self, key: str, value: Tensor) -> None:
        """A tensor of the file."""
        self._buffers[key] = value
        self.missing.discard(key)
        if not self.missing:
            self._done(self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if prefix == f"{self.name}.":  # a layer with several names is in the file under its first one
            super()._save_to_state_dict(destination, prefix, keep_vars)


class Checkpoint:
    """Reads a quantized checkpoint into a float model on the meta device, whose layers it replaces by :class:`Awaited` ones.

    Args:
        model: built as the float model was.
        saved: the fields of its quantization_config.
        where: names the checkpoint in messages.
        dtype: in which the model is wanted: layers that computed in the dtype of most layers compute in this one.
        prefix: of the names in a part of the model that can also be loaded alone, as transformers' ``base_model_prefix``.

    Raises:
        ValueError: the fields are damaged, or of another model.
    """

    op = "quant_ops.from_pretrained"

    def __init__(
        self, model: nn.Module, saved: Mapping[str, Any], where: str, dtype: torch.dtype | None = None, prefix: str = ""
    ) -> None:
        self._shield = _Shield()
        self.path: Any = where
        self._model = model
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._prefix = f"{prefix}." if prefix else ""
        self._dtype = None if dtype is None else str(dtype).removeprefix("torch.")
        self._float: dict[str, nn.Module] = {}  # the layers that are replaced
        self._entries: dict[str, dict[str, Any]] = {}
        self._by_weight: dict[tuple[Any, ...], WeightOnlyLayer] = {}
        self._read: dict[str, Tensor] = {}
        self._tensors: dict[str, list[str]] = {}
        self.awaited: dict[str, Awaited] = {}
        try:
            self._prepare(saved)
        except (TypeError, KeyError, AttributeError, IndexError) as error:
            raise ValueError(f"{self.op}: expected the quantization_config of save_pretrained in {where}, got {error!r}") from error

    def _prepare(self, saved: Mapping[str, Any]) -> None:
        entries = {name: entry for entry in saved["layers"] for name in entry["names"]}
        names = {name: own for name in entries if (own := self._own(name)) is not None}
        if entries and not names:
            self._refuse(f"a layer {next(iter(entries))!r} in the checkpoint and none of that name in {type(self._model).__name__}")
        counts = collections.Counter(entry["compute_dtype"] for entry in entries.values())
        self._dtypes = {} if self._dtype is None else {kind: self._dtype for kind, _ in counts.most_common(1)}
        self._shared = {names[a]: names[b] for a, b in saved.get("shared", {}).items() if a in names and b in names}
        self._restructure(saved)
        for name, own in names.items():
            self._await(own, entries[name])

    def _own(self, name: str) -> str | None:
        """The name of a layer here: the checkpoint may be of a whole model and this one its base, or the other way round."""
        found = (name, name.removeprefix(self._prefix), self._prefix + name)
        return next((own for own in found if own in self._modules), None)

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{self.op}: expected {self.path} to be a checkpoint of this model, got {what}")

    def _restructure(self, saved: Mapping[str, Any]) -> None:
        """Folds BatchNorms away and puts multipliers in, as the calls of the package did in the float model."""
        for name in saved.get("folded", ()):
            if isinstance(self._modules.get(own := self._own(name) or ""), _NORMS):
                self._put(own, nn.Identity())
        for name in saved.get("fused_activations", ()):
            if (own := self._own(name) or "") in self._modules:
                self._put(own, FusedActivation())
        for name in saved.get("with_bias", ()):
            module: Any = self._modules.get(self._own(name) or "")
            if isinstance(module, _WITH_BIAS) and module.bias is None:
                weight: Any = module.weight
                module.bias = nn.Parameter(weight.new_empty(weight.shape[0]))
        for name in saved.get("multiplied", ()):
            if (own := self._own(name) or "") in self._modules:
                module = as_linear(self._modules[own])
                if not isinstance(module, nn.Linear):
                    self._refuse(f"a ScaledLinear {name!r} in the checkpoint and {type(module).__name__} in the model")
                multiplier = torch.ones(module.in_features, device="meta")
                scaled = ScaledLinear.from_linear(module, multiplier)
                scaled.weight.requires_grad_(False)
                self._put(own, scaled)

    def _put(self, name: str, layer: nn.Module) -> None:
        """Replaces a module wherever it is."""
        old = self._modules[name]
        for parent in set(self._modules.values()):
            for attribute, child in parent._modules.items():
                if child is old:
                    parent._modules[attribute] = layer
        self._modules = {key: layer if module is old else module for key, module in self._modules.items()}

    def _await(self, name: str, group: Mapping[str, Any]) -> None:
        module: Any = self._modules[name]
        kind = QUANTIZED_LAYERS[group["class"]]
        if not is_original(module, kind):
            self._refuse(f"a {kind.__name__} {name!r} in the checkpoint and {type(module).__name__} of that name in the model")
        linear = as_linear(module)
        geometry = {key: getattr(linear, key) for key in kind.geometry}
        entry = {key: group[key] for key in ("class", "weight_bits", "compute_dtype", "config")}
        entry["arguments"] = geometry | group["arguments"]
        entry["compute_dtype"] = self._dtypes.get(entry["compute_dtype"], entry["compute_dtype"])
        try:
            files.check_entry(name, entry)
        except ValueError as error:
            raise KeyError(str(error)) from error
        if not set(group["tensors"]) <= set(kind.optional):
            raise KeyError(f"tensors {group['tensors']} of layer {name!r}")
        self._float[name], self._entries[name] = module, entry
        tensors = _expected(kind.empty(entry["arguments"], bias="bias" in group["tensors"]), group)
        self._tensors[name] = list(tensors)
        if name in self._shared:
            tensors = {key: tensor for key, tensor in tensors.items() if key not in _WEIGHT}
        self.awaited[name] = stand_in = Awaited(name, tensors, self._complete)
        self._put(name, stand_in)

    def _complete(self, stand_in: Awaited) -> None:
        """All tensors of a layer have been read: it becomes the layer, and so do those that share its weight."""
        name, source = stand_in.name, self._shared.get(stand_in.name)
        if source in self.awaited:
            return  # whose turn is then this one's too
        entry, old = self._entries.pop(name), self._float.pop(name)
        self._read = {f"{name}.{key}": tensor for key, tensor in stand_in._buffers.items() if tensor is not None}
        weight = [key for key in _WEIGHT if key in self._tensors[name]]
        sources = {key: f"{source if source and key in weight else name}.{key}" for key in self._tensors[name]}
        made: Any = self._model.get_submodule(source) if source else None
        device = made.device if made is not None else self._read[sources["qweight"]].device
        with torch.inference_mode(False), torch.no_grad():
            layer = files.built_layer(name, entry, sources, old, self, lambda _: device, self._by_weight)
        layer.train(old.training)
        self._shield.add(layer)
        self._read = {}
        del self.awaited[name]
        self._put(name, layer)
        for other in [other for other, of in self._shared.items() if of == name and other in self.awaited]:
            if not self.awaited[other].missing:
                self._complete(self.awaited[other])

    def takes(self, name: str) -> bool:
        """Whether :meth:`take` is to be called with this tensor."""
        return name.rpartition(".")[0] in self.awaited

    def take(self, name: str, value: Tensor) -> None:
        """A tensor of the file, of a layer that is awaited."""
        owner, _, key = name.rpartition(".")
        self.awaited[owner].take(key, value)

    def tensor(self, source: str, device: torch.device | str) -> Tensor:
        """A tensor that was read."""
        return self._read[source].to(device)

    def finish(self) -> None:
        """To be called after the last tensor.

        Raises:
            ValueError: the checkpoint lacks tensors of quantized layers.
        """
        for name, stand_in in self.awaited.items():
            if stand_in.missing or self._shared.get(name) not in self.awaited:
                self._refuse(f"no {name}.{min(stand_in.missing, default='qweight')} in the checkpoint")
        self._shield.lower()
        settle(self._model)


def _expected(layer: QuantizedLayer, group: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of a layer in a checkpoint, on the meta device."""
    steps = (group["num_steps"],) if group["num_steps"] > 1 else ()
    shapes: dict[str, Any] = {
        "qweight": layer.saved_shape(),
        "weight_scale": layer.weight_scale.shape,
        "weight_zero_point": layer.weight_scale.shape,
        "bias": layer.weight_scale.shape[:1],
        "input_scale": steps,
        "input_zero_point": steps,
        "output_scale": (),
        "output_zero_point": (),
        "input_multiplier": (getattr(layer, "in_features", 0),),
    }
    dtypes = layer.dtypes()
    return {
        key: torch.empty(shapes[key], dtype=dtypes[key], device="meta") for key in ("qweight", "weight_scale", *group["tensors"])
    }


# ---- a float checkpoint ---------------------------------------------------------------------------------------------------


class OnTheFly:
    """Quantizes a float model on the meta device while its tensors are read, each layer when its own are there.

    Layers whose weight is that of others too wait for the end, when the library has tied them.

    Args:
        op: the call, for messages.
        model: as :func:`quant_ops.quantize_` takes it.
        config: what is to be quantized.
        tied: names of parameters that the library will tie.

    Raises:
        TypeError, ValueError: as :func:`quant_ops.quantize_`.
    """

    def __init__(self, op: str, model: nn.Module, config: CheckpointConfig, tied: Iterable[str] = ()) -> None:
        self._shield = _Shield()
        self._op, self._model = op, model
        assert config.config is not None
        plan = Plan(op, model, config.config, ("*",), _excluded(config.modules_to_not_convert))
        if plan.family == "simulated":
            raise TypeError(f"quant_ops.{op}: expected configs of quantized layers, got Simulated. Use quantize_ after loading.")
        self.places, self._result, self._survey = plan.places, plan.result, Survey(op, model, plan.family)
        owners: dict[int, set[nn.Module]] = {}
        for module in model.modules():
            for parameter in module._parameters.values():
                owners.setdefault(id(parameter), set()).add(module)
        self._alone: dict[str, nn.Module] = {}  # the layer of each parameter that is of no other one
        tied = set(tied)
        for name, module in model.named_modules(remove_duplicate=False):
            own = {f"{name}.{key}": parameter for key, parameter in module._parameters.items() if parameter is not None}
            if module in self.places and not tied & own.keys() and all(owners[id(p)] == {module} for p in own.values()):
                self._alone |= dict.fromkeys(own, module)

    def takes(self, name: str) -> bool:
        """Whether :meth:`take` is to be called with this parameter."""
        return name in self._alone

    def take(self, name: str, value: Tensor) -> None:
        """Gives a layer a parameter, and makes the layer quantized if it was the last one."""
        module = self._alone[name]
        parameter = nn.Parameter(value.detach(), requires_grad=False)
        parameter._is_hf_initialized = True  # type: ignore[attr-defined]
        module._parameters[name.rpartition(".")[2]] = parameter
        if any(p is not None and p.is_meta for p in module._parameters.values()):
            return
        try:
            with torch.inference_mode(False), torch.no_grad():
                layer = self._make(module, self.places[module])
        except ValueError:  # its weights hold NaN: raised in the end, since the libraries only log what is raised here
            return
        for parent, attribute in self.places.pop(module).parents:
            setattr(parent, attribute, layer)

    def _make(self, module: nn.Module, place: Places, tied: Any = None) -> nn.Module:
        try:
            layer = layer_of(module, place.config, tied or {})
        except ValueError as error:
            raise ValueError(
                f"quant_ops.{self._op}: expected a layer {place.name!r} that can be quantized, got: {error}"
            ) from error
        self._shield.add(layer)
        return layer

    def finish(self) -> ConversionResult:
        """Quantizes the layers that are left. To be called after the last tensor, and after weights were tied.

        Returns:
            As :func:`quant_ops.quantize_`.

        Raises:
            ValueError: a layer's weights hold NaN or Inf, or have not been read.
        """
        for module, place in list(self.places.items()):
            if any(p is not None and p.is_meta for p in module._parameters.values()):
                raise ValueError(f"quant_ops.{self._op}: expected the weights of layer {place.name!r} in memory, got none.")
            if has_hooks(module) or patched(module):  # by accelerate, for a model on several devices
                names = [name for name in self._result.converted if self._model.get_submodule(name) is module]
                self._result.converted = [name for name in self._result.converted if name not in names]
                self._result.skipped += [(name, "tied, and the model is on several devices") for name in names]
                del self.places[module]
        tied = tied_layers(self.places)
        replace_(self._model, self.places, lambda module, place: self._make(module, place, tied))
        self._shield.lower()
        return self._survey.finish(self._result)
