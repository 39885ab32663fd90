"""BladeDISC's torch_quant: ``Quantizer`` with calib, amp, fallback, qat and quantize.

Differences from the original:

* No tracing: models with control flow work, and ``tracer`` is accepted and ignored. Inputs of Linear, Conv1d and Conv2d are
  observed, not other activations. ``calib_gm``, ``qat_gm`` and ``quantize_gm`` put the layers of the proxy into a traced model.
* ``toggle_observer`` simulates int8 weights as well as inputs, and no layer both observes and simulates.
* ``quantize`` gives int8 layers that run on this package's kernels for every backend and device; backends differ only in what they
  observe by default: minmax or (FBGEMM, MNN) a histogram, with a zero point or (DISC, MNN) without. As in the original, only DISC
  has defaults for AARCH64 and GPU. MNN files are not written.
* Weights are symmetric int8 with one scale per output channel, biases float32.
* Observers are named (``act_ob_ctr="histogram"``, see ``qo.Int8Static``), or one of the classes below or a ``functools.partial`` of
  one, whose ``qscheme`` then decides about the zero point. ``bias_ob_ctr`` is accepted and ignored.
* ``amp`` compares each int8 layer with its float original on the float model's input and ranks by normalised error
  ``sum (y - y_q)^2 / sum y^2``; the original by the mean square, which depends on a layer's magnitude. ``amp_model.report()`` lists
  it.
* A filter excludes before it includes; a name or a class stands for the module and all within, an operator type for the layer
  itself. A name that no module has is an error.
* As in the original, the observers are part of the calibrated model: its state_dict has them, another Quantizer may quantize it, a
  second ``calib`` goes on, and ``qat`` starts from them. What ``qat`` learns about scales stays in the proxy.
* ``quantize`` before ``calib`` or ``qat`` is an error.
"""

import copy
import dataclasses
import enum
import functools
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

import quant_ops as qo

from .._models import quiet
from ..convert.prepared import Prepared
from ..convert.qat import Qat
from ..nn import Int8Layer
from ..observers import LSQ, Histogram, MinMax, Observer
from ..report.compare import Probes
from ..report.report import LayerReport

__all__ = [
    "AmpModule",
    "Backend",
    "BiasObserver",
    "Device",
    "HistogramObserver",
    "LSQObserver",
    "MinMaxObserver",
    "ModuleFilter",
    "Observer",
    "ObserverTypes",
    "PerChannelMinMaxObserver",
    "QParams",
    "Quantizer",
    "toggle_observer",
]

MinMaxObserver, HistogramObserver, LSQObserver = MinMax, Histogram, LSQ


class PerChannelMinMaxObserver(MinMax):
    """For weights, which always have one scale per output channel."""


class BiasObserver:
    """Kept for its name: biases stay float32."""


class QParams(NamedTuple):
    """How a tensor is quantized."""

    qscheme: torch.qscheme
    dtype: torch.dtype
    scale: Tensor
    zero_point: Tensor
    ch_axis: int = -1


class ObserverTypes(NamedTuple):
    """The observers that ``calib_gm`` and ``qat_gm`` take."""

    act_ob_ctr: Any = None
    w_ob_ctr: Any = None
    bias_ob_ctr: Any = None


class Backend(enum.Enum):
    """Kept for their names; see the module's docstring."""

    REFERENCE = 0
    DISC = 1
    FBGEMM = 2
    MNN = 3


_SYMMETRIC = (Backend.DISC, Backend.MNN)
_HISTOGRAM = (Backend.FBGEMM, Backend.MNN)


class Device(enum.Enum):
    """Kept for their names: tensors are where the model is."""

    X86 = 0
    AARCH64 = 1
    GPU = 2


@dataclasses.dataclass
class ModuleFilter:
    """Which layers are quantized: all, or those in the modules included, and none in the modules excluded.

    Args:
        include_names, exclude_names: of modules: layers, or containers of layers.
        include_classes, exclude_classes: of modules, as classes or by their names.
        include_op_types, exclude_op_types: classes of layers: nn.Linear, nn.Conv2d.
    """

    include_names: list[str] | None = None
    include_classes: list[type[nn.Module] | str] | None = None
    include_op_types: list[type[nn.Module]] | None = None
    exclude_names: list[str] | None = None
    exclude_classes: list[type[nn.Module] | str] | None = None
    exclude_op_types: list[type[nn.Module]] | None = None

    def within(self, name: str) -> "ModuleFilter":
        """The filter for the module of this name alone, as its own model."""

        def inside(names: list[str] | None) -> list[str] | None:
            if not names or not name:
                return names or None
            return [one.removeprefix(f"{name}.") for one in names if one.startswith(f"{name}.")] or None

        return dataclasses.replace(self, include_names=inside(self.include_names), exclude_names=inside(self.exclude_names))

    def left_float(self, model: nn.Module) -> set[str]:
        """The names of the modules that stay float. Raises ValueError for a name that no module has."""
        modules = dict(model.named_modules(remove_duplicate=False))
        for field in ("include_names", "exclude_names"):
            if unknown := sorted(set(getattr(self, field) or ()) - modules.keys()):
                raise ValueError(f"quant_ops.ModuleFilter: expected {field} of modules of the model, got {unknown}")
        chosen = self.include_names is not None or self.include_classes is not None
        left = set()
        for name, module in modules.items():
            around = {n: m for n, m in modules.items() if not n or name == n or name.startswith(f"{n}.")}
            out = _holds(self.exclude_names, self.exclude_classes, around)
            out |= chosen and not _holds(self.include_names, self.include_classes, around)
            out |= self.include_op_types is not None and not isinstance(module, tuple(self.include_op_types))
            if out or isinstance(module, tuple(self.exclude_op_types or ())):
                left.add(name)
        return left


def _holds(names: Iterable[str] | None, classes: Iterable[type[nn.Module] | str] | None, around: dict[str, nn.Module]) -> bool:
    """Whether one of the modules around a layer, itself included, is named or of one of the classes."""
    kinds = tuple(classes or ())
    return not around.keys().isdisjoint(names or ()) or any(
        type(module).__name__ == kind if isinstance(kind, str) else isinstance(module, kind)
        for module in around.values()
        for kind in kinds
    )


def _observer(argument: str, given: Any, default: str) -> tuple[str, bool | None]:
    """The observer's name, and whether its scheme asks for a zero point; None where it does not say."""
    scheme = None
    if isinstance(given, functools.partial):
        scheme, given = given.keywords.get("qscheme"), given.func
    if given is None or isinstance(given, str):
        name = given or default
    elif isinstance(given, type) and issubclass(given, Observer):
        name = given.name
    else:
        raise TypeError(f"quant_ops.Quantizer: expected {argument} to be an observer's name or class, got {given!r}")
    symmetric = (torch.per_tensor_symmetric, torch.per_channel_symmetric)
    return name, None if scheme is None else scheme not in symmetric


class AmpModule(nn.Module):
    """Computes what the float model does, and measures beside it what each layer would lose in int8."""

    def __init__(self, model: nn.Module, quantized: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._probes = Probes(model, quantized)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The float model's output. The figures add up over all calls."""
        with quiet(self.model), self._probes:
            return self.model(*args, **kwargs)

    def report(self) -> list[LayerReport]:
        """The layers seen so far, worst first."""
        layers, _ = self._probes.results({})
        return sorted(layers, key=lambda layer: -layer.error)


class Quantizer:
    """Makes proxies of a model, which itself gets observers and keeps its layers. Proxies share its parameters.

    Args:
        module_filter: which modules to quantize.
        backend: decides what activations are observed with by default; see the module's docstring.
        device: decides which backends have default observers.
        tracer, bias_ob_ctr: accepted and ignored.
        act_ob_ctr, w_ob_ctr, qat_ob_ctr: observers: "minmax", "percentile", "mse", "histogram", ..., or classes.

    Raises:
        RuntimeError: the backend has no default observers on the device, and they are not given.
    """

    def __init__(
        self,
        module_filter: ModuleFilter | None = None,
        backend: Backend = Backend.REFERENCE,
        device: Device = Device.X86,
        tracer: Any = None,
        act_ob_ctr: Any = None,
        w_ob_ctr: Any = None,
        bias_ob_ctr: Any = None,
        qat_ob_ctr: Any = None,
    ) -> None:
        if device is not Device.X86 and backend is not Backend.DISC and (act_ob_ctr is None or w_ob_ctr is None):
            raise RuntimeError(
                f"quant_ops.Quantizer: expected Backend.DISC, which alone has default observers on Device.{device.name}, got "
                f"Backend.{backend.name}. Pass act_ob_ctr and w_ob_ctr, or Device.X86: int8 layers run wherever the model is."
            )
        self.module_filter = module_filter or ModuleFilter()
        self.backend, self.device = backend, device
        self._act, self._weight = act_ob_ctr, w_ob_ctr
        self._qat = _observer("qat_ob_ctr", qat_ob_ctr, "lsq")
        self._config(None, None)
        self._trained: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()

    def _config(self, act_ob_ctr: Any, w_ob_ctr: Any) -> qo.Int8Static:
        name, asymmetric = _observer("act_ob_ctr", act_ob_ctr or self._act, "histogram" if self.backend in _HISTOGRAM else "minmax")
        weights, _ = _observer("w_ob_ctr", w_ob_ctr or self._weight, "minmax")
        asymmetric = self.backend not in _SYMMETRIC if asymmetric is None else asymmetric
        return qo.Int8Static(observer=name, asymmetric=asymmetric, weight_observer=weights)

    def _prepared(self, model: nn.Module, config: qo.Int8Static, calibrate: bool = False) -> nn.Module:
        """A proxy that observes with the model's observers; to calibrate, the model gets those that it does not have."""
        left = self.module_filter.left_float(model)
        proxy = _sharing_tensors(model)
        observed = {name: layer for name, layer in proxy.named_modules() if isinstance(_observer_of(layer), Observer)}
        observers = {name: _observer_of(layer) for name, layer in observed.items()}
        for layer in observed.values():
            del layer._modules["observer"]
        qo.prepare_(proxy, config, exclude=[lambda name, _: name in left])
        for name, layer in proxy.named_modules():
            if not isinstance(layer, Prepared) or layer.observer is None:
                continue
            before = observers.get(name)
            if before is not None and not (calibrate and repr(before) != repr(layer.observer)):
                layer.config = dataclasses.replace(config, observer=before.name, asymmetric=before.asymmetric)
                layer.observer = before
            elif calibrate:
                model.get_submodule(name).add_module("observer", layer.observer)
        return proxy

    def calib(self, model: nn.Module, act_ob_ctr: Any = None, w_ob_ctr: Any = None, bias_ob_ctr: Any = None) -> nn.Module:
        """A proxy to be run on typical data; it observes, and goes on from what the model's observers have seen before."""
        self._trained.pop(model, None)
        proxy = self._prepared(model, self._config(act_ob_ctr, w_ob_ctr), calibrate=True)
        toggle_observer(proxy, observe=True, fake_quant=False)
        return proxy

    def qat(self, model: nn.Module, act_ob_ctr: Any = None, w_ob_ctr: Any = None, bias_ob_ctr: Any = None) -> nn.Module:
        """A proxy to be trained, from the calibration if there is one; what it learns is in the model's own parameters too."""
        proxy = self._prepared(model, self._config(None, w_ob_ctr))
        name, asymmetric = self._qat if act_ob_ctr is None else _observer("act_ob_ctr", act_ob_ctr, "lsq")
        configs = {}
        for layer_name, layer in proxy.named_modules(remove_duplicate=False):
            if isinstance(layer, Prepared) and layer.observer is not None:
                assert isinstance(layer.config, qo.Int8Static)
                layer.observer = copy.deepcopy(layer.observer)  # training goes on with it
                layer.observer.observe = True
                zero_point = layer.config.asymmetric if asymmetric is None else asymmetric
                configs[layer_name] = dataclasses.replace(layer.config, observer=name, asymmetric=zero_point)
        if configs:
            qo.prepare_qat_(proxy, configs)
        self._trained[model] = proxy
        return proxy

    def quantize(self, model: nn.Module) -> nn.Module:
        """The int8 model of what has been learned since the last ``calib`` of the model, or of its observers."""
        trained = self._trained.get(model)
        if trained is None and not any(isinstance(_observer_of(layer), Observer) for layer in model.modules()):
            raise ValueError("quant_ops.Quantizer: expected quantize after calib or qat of the same model, got neither")
        left = self.module_filter.left_float(model)
        quantized = copy.deepcopy(self._prepared(model, self._config(None, None)) if trained is None else trained)
        if any(isinstance(layer, Prepared) for layer in quantized.modules()):
            qo.convert_(quantized)
        for name, layer in list(quantized.named_modules()):
            if isinstance(layer, Int8Layer) and name in left:  # since a fallback
                original = copy.deepcopy(model.get_submodule(name))
                original._modules.pop("observer", None)
                quantized.set_submodule(name, original)
        return quantized.train(model.training)

    def calib_gm(self, name: str, gm: nn.Module, root: nn.Module, ob_types: ObserverTypes) -> None:
        """Makes ``gm``, in place, the proxy of :meth:`calib` for ``root``, the module of this name that it was traced from."""
        _take_layers("calib_gm", gm, root, self._within(name).calib(root, *ob_types))

    def qat_gm(self, name: str, gm: nn.Module, root: nn.Module, ob_types: ObserverTypes) -> None:
        """Makes ``gm``, in place, the proxy of :meth:`qat` for ``root``, the module of this name that it was traced from."""
        _take_layers("qat_gm", gm, root, self._within(name).qat(root, *ob_types))

    def quantize_gm(self, name: str, gm: nn.Module, root: nn.Module) -> None:
        """Makes ``gm``, in place, what :meth:`quantize` gives for ``root``, the module of this name that it was traced from."""
        _take_layers("quantize_gm", gm, root, self._within(name).quantize(root))

    def amp_gm(self, name: str, gm: nn.Module, root: nn.Module) -> NoReturn:
        """Refused: :meth:`amp` measures beside the model, not by layers in its graph."""
        raise NotImplementedError("quant_ops.Quantizer: expected amp(root), got amp_gm. Run the module that amp returns.")

    def export_mnn_params(self, *_: Any) -> NoReturn:
        """Refused: MNN files are not written."""
        raise NotImplementedError(
            "quant_ops.Quantizer: expected quantize, got an export to MNN, whose files are not written here. Export the float "
            "model with torch.onnx and quantize it with MNN's own tools."
        )

    export_mnn_params_gm = export_mnn_params

    def _within(self, name: str) -> "Quantizer":
        """This quantizer for the module of this name; it knows the same trained models."""
        part = copy.copy(self)
        part.module_filter = self.module_filter.within(name)
        return part

    def amp(self, model: nn.Module) -> AmpModule:
        """A proxy to be run on typical data; it measures how sensitive each layer is."""
        return AmpModule(model, self.quantize(model))

    def fallback(self, amp_model: AmpModule, num: int) -> list[str]:
        """Excludes the ``num`` most sensitive layers from now on, for ``quantize``. Returns their names.

        Raises:
            ValueError: amp_model has not been run.
        """
        worst = amp_model.report()[:num]
        if num > 0 and not worst:
            raise ValueError("quant_ops.Quantizer: expected fallback after a run of the amp model, got one without")
        names = [layer.name for layer in worst]
        self.module_filter = dataclasses.replace(
            self.module_filter, exclude_names=[*(self.module_filter.exclude_names or ()), *names]
        )
        return names


def _observer_of(layer: nn.Module) -> Any:
    return layer._modules.get("observer")


def _sharing_tensors(model: nn.Module) -> nn.Module:
    """A copy of the modules, but not of their parameters and buffers, nor of the observers."""
    shared: list[Any] = [*model.parameters(), *model.buffers(), *(m for m in model.modules() if isinstance(m, Observer))]
    return copy.deepcopy(model, {id(one): one for one in shared})


def _take_layers(function: str, gm: nn.Module, root: nn.Module, made: nn.Module) -> None:
    """Puts the layers of a proxy or an int8 model into a traced one, whose layers have the same names."""
    if gm is root:
        raise ValueError(
            f"quant_ops.Quantizer: expected {function} with root, the module that gm was traced from, got gm itself. Call "
            f"{function.removesuffix('_gm')}(gm) instead."
        )
    names = {name for name, _ in gm.named_modules(remove_duplicate=False)}
    for name, layer in list(made.named_modules(remove_duplicate=False)):
        if name in names and isinstance(layer, Prepared | Int8Layer):
            gm.set_submodule(name, layer)


def toggle_observer(root: nn.Module, *, observe: bool, fake_quant: bool) -> None:
    """Sets, in a proxy of ``calib`` or ``qat``, whether layers observe their inputs, and whether they compute as in int8.

    With neither it is the float model. A layer that learns its scales ("lsq") does not observe while it simulates.

    Raises:
        ValueError: both are asked for, or ``fake_quant`` before a layer has observed anything.
    """
    layers = {name: layer for name, layer in root.named_modules(remove_duplicate=False) if isinstance(layer, Prepared)}
    if observe and fake_quant:
        raise ValueError(
            "quant_ops.toggle_observer: expected observe or fake_quant, got both. Run the data with observe=True, and then "
            "simulate with fake_quant=True."
        )
    if fake_quant:
        unseen = [name for name, layer in layers.items() if not getattr(layer, "learned", False) and layer.unreached()]
        if unseen:
            raise ValueError(
                f"quant_ops.toggle_observer: expected calibrated layers for fake_quant=True, got no data in {unseen}. Run the "
                "proxy with observe=True first."
            )
        if configs := {name: layer.config for name, layer in layers.items() if not isinstance(layer, Qat)}:
            qo.prepare_qat_(root, configs)
    for module in root.modules():
        if isinstance(module, Qat):
            _simulate(module, fake_quant)
        elif isinstance(module, Observer):
            module.observe = observe
    for module in root.modules():
        if isinstance(module, Qat) and module.learned and module.observer is not None:
            module.observer.observe = observe or fake_quant  # its first batch may have to start the scales


def _simulate(layer: Qat, fake_quant: bool) -> None:
    if not fake_quant:
        layer.begin_calibration()
    elif layer.learned and layer.started:
        layer.observing = False  # the scales go on from where training has left them
    else:
        layer.end_calibration()
