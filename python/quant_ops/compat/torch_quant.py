"""BladeDISC's torch_quant: ``Quantizer`` with calib, amp, fallback, qat and quantize.

Differences from the original:

* No tracing: models with control flow work, ``tracer`` is accepted and ignored, and there are no ``*_gm`` methods. Inputs of
  Linear, Conv1d and Conv2d are observed, not other activations.
* ``quantize`` gives int8 layers that run on this package's kernels for every backend and device; DISC, FBGEMM and REFERENCE differ
  only in the zero point of activations, as their default observers do. MNN is not offered.
* Weights are symmetric int8 with one scale per output channel, biases float32.
* Observers are named (``act_ob_ctr="histogram"``, see ``qo.Int8Static``), not passed as classes.
* ``amp`` compares each int8 layer with its float original on the float model's input and ranks by normalised error
  ``sum (y - y_q)^2 / sum y^2``; the original by the mean square, which depends on a layer's magnitude. ``amp_model.report()`` lists
  it.
* A filter excludes before it includes, for names as for classes; a name stands for the module and all within. Operators have no
  filters.
* ``quantize`` before ``calib`` or ``qat`` is an error.
"""

import copy
import dataclasses
import enum
import weakref
from typing import Any

from torch import nn

import quant_ops as qo

from ..nn import Int8Layer
from ..report.compare import Probes, quiet
from ..report.report import LayerReport

__all__ = ["AmpModule", "Backend", "Device", "ModuleFilter", "Quantizer"]


class Backend(enum.Enum):
    """Kept for their names; see the module's docstring."""

    REFERENCE = 0
    DISC = 1
    FBGEMM = 2


class Device(enum.Enum):
    """Kept for their names: tensors are where the model is."""

    X86 = 1
    AARCH64 = 2
    GPU = 3


@dataclasses.dataclass
class ModuleFilter:
    """Which modules are quantized: all, or those included, and none of those excluded."""

    include_names: list[str] | None = None
    include_classes: list[type[nn.Module]] | None = None
    exclude_names: list[str] | None = None
    exclude_classes: list[type[nn.Module]] | None = None

    def excludes(self, name: str, module: nn.Module) -> bool:
        """Whether a layer stays float."""
        if _holds(self.exclude_names, self.exclude_classes, name, module):
            return True
        if self.include_names is None and self.include_classes is None:
            return False
        return not _holds(self.include_names, self.include_classes, name, module)


def _holds(names: list[str] | None, classes: list[type[nn.Module]] | None, name: str, module: nn.Module) -> bool:
    return any(name == n or name.startswith(f"{n}.") for n in names or ()) or isinstance(module, tuple(classes or ()))


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
    """Makes proxies of a model, which itself is never changed. Proxies share its parameters.

    Args:
        module_filter: which modules to quantize.
        backend: decides whether activations have a zero point by default: all but DISC.
        device, tracer: accepted and ignored.
        act_ob_ctr, w_ob_ctr, qat_ob_ctr: names of observers: "minmax", "percentile", "mse", "histogram", ...
    """

    def __init__(
        self,
        module_filter: ModuleFilter | None = None,
        backend: Backend = Backend.REFERENCE,
        device: Device = Device.X86,
        tracer: Any = None,
        act_ob_ctr: str | None = None,
        w_ob_ctr: str | None = None,
        qat_ob_ctr: str | None = None,
    ) -> None:
        self.module_filter = module_filter or ModuleFilter()
        self.backend, self.device = backend, device
        for argument, observer in (("act_ob_ctr", act_ob_ctr), ("w_ob_ctr", w_ob_ctr), ("qat_ob_ctr", qat_ob_ctr)):
            if observer is not None and not isinstance(observer, str):
                raise TypeError(f"quant_ops.Quantizer: expected {argument} to be an observer's name, got {observer!r}")
        self._config = qo.Int8Static(
            observer=act_ob_ctr or "minmax", asymmetric=backend is not Backend.DISC, weight_observer=w_ob_ctr or "minmax"
        )
        self._qat_config = dataclasses.replace(self._config, observer=qat_ob_ctr or "lsq")
        self._proxies: weakref.WeakKeyDictionary[nn.Module, nn.Module] = weakref.WeakKeyDictionary()

    def calib(self, model: nn.Module) -> nn.Module:
        """A proxy to be run on typical data; it observes."""
        proxy = _sharing_parameters(model)
        qo.prepare_(proxy, self._config, exclude=[self.module_filter.excludes])
        self._proxies[model] = proxy
        return proxy

    def qat(self, model: nn.Module) -> nn.Module:
        """A proxy to be trained; what it learns is in the model's own parameters too."""
        proxy = _sharing_parameters(model)
        qo.prepare_qat_(proxy, self._qat_config, exclude=[self.module_filter.excludes])
        self._proxies[model] = proxy
        return proxy

    def quantize(self, model: nn.Module) -> nn.Module:
        """The int8 model of what the last proxy of the model has seen or learned."""
        if model not in self._proxies:
            raise ValueError("quant_ops.Quantizer: expected quantize after calib or qat of the same model, got neither")
        quantized = copy.deepcopy(self._proxies[model])
        qo.convert_(quantized)
        for name, layer in list(quantized.named_modules()):
            if isinstance(layer, Int8Layer):
                original = model.get_submodule(name)
                if self.module_filter.excludes(name, original):  # since a fallback
                    quantized.set_submodule(name, copy.deepcopy(original))
        return quantized.train(model.training)

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


def _sharing_parameters(model: nn.Module) -> nn.Module:
    """A copy of the modules, but not of their parameters and buffers."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
