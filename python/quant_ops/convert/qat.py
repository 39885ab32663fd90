"""Quantization-aware training: layers whose forward computes with quantized weights and inputs, and whose gradients pass through.

The input and each output channel of the weight are simulated by ``quant_tensor_forward``, with the codes that the int8 layer will
use; its gradient is the straight-through estimator for values and that of LSQ (arXiv 1902.08153) for scales.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..nn import Int8Layer
from ..observers import Observer
from ..ops import choose_qparams, quant_tensor_forward
from ..simulation.recast import Conv, Linear, Transposed
from .config import Int8Scheme, Int8Static
from .prepared import Prepared, choose_weight_scale, to_int8, whole

_TINY = torch.finfo(torch.float32).tiny
_NOT_STARTED = 1.0  # an input scale before the first data
_SCALES = ("weight_scale", "input_scale", "input_zero_point")


def _learned(scale: Tensor, elements: int, qmax: int) -> Tensor:
    """A positive scale whose gradient is divided by sqrt(elements * qmax), so that it moves as fast as the weights do."""
    scale = scale.abs().clamp(min=_TINY)
    slow = scale * (elements * qmax) ** -0.5
    return scale.detach() + (slow - slow.detach())  # the value is the scale's, to the bit


def _is_alone() -> bool:
    """Whether this is the only process of the training."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not distributed or torch.distributed.get_world_size() == 1


def _has_started(count: Tensor | None, scale: Tensor | None) -> bool:
    """Whether an observer has counted batches, or a scale has another value than at the beginning. Waits for the device."""
    seen = count is not None and not count.is_meta and bool(count.any())
    return seen or (scale is not None and not scale.is_meta and bool((scale != _NOT_STARTED).any()))


class Qat(Prepared):
    """What the trainable layers share.

    Where scales are learned (observer "lsq"), ``weight_scale``, ``input_scale`` and a floating ``input_zero_point`` are
    parameters; where they stay as calibrated, buffers; where they follow the data, None.
    """

    kind = "qat"
    own = (
        *Prepared.own,
        "observing",
        "until_seen",
        "all_seen",
        "started",
        "learned",
        "weight_scale",
        "input_scale",
        "input_zero_point",
    )

    config: Int8Scheme
    weight_scale: Tensor | None
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def _prepare(self, config: Any) -> None:
        before = self._modules.get("observer")  # of a prepared layer
        for name in Prepared.own:
            if hasattr(self, name):
                delattr(self, name)
        super()._prepare(config)
        observer = self.observer
        self.observing = self.all_seen = False
        self.until_seen = 0  # batches of each step that :meth:`observe_first` asked for
        self.started = observer is None
        self.learned = isinstance(config, Int8Static) and config.observer == "lsq"

        weight = self.weight_by_channel()
        weight_scale = choose_weight_scale(weight, config)
        if self.learned:
            weight_scale = self._mended(self._range_scale() if weight_scale is None else weight_scale)
        shape = (-1, *[1] * (weight.dim() - 1))
        self._keep("weight_scale", None if weight_scale is None else weight_scale.reshape(shape))
        kept = observer is not None and not observer.live
        # a learned scale is no 0-dim tensor, since FSDP2 shards parameters along their first dimension
        steps = (self.num_steps,) if self.timestep is not None or self.learned else ()
        settings: dict[str, Any] = {"dtype": torch.float32, "device": self.weight.device}
        self._keep("input_scale", torch.full(steps, _NOT_STARTED, **settings) if kept else None)
        asymmetric = kept and observer is not None and observer.asymmetric
        self._keep("input_zero_point", torch.zeros(steps, **settings) if asymmetric else None)

        if observer is not None and isinstance(before, Observer):
            fits = (before.num_steps, before.asymmetric) == (observer.num_steps, observer.asymmetric)
            if fits and (kept or type(before) is type(observer)):
                self.observer = before
                self.end_calibration()

    def _keep(self, name: str, value: Tensor | None) -> None:
        if self.learned and value is not None:
            self.register_parameter(name, nn.Parameter(value.clone()))
        else:
            self.register_buffer(name, value)

    def _mended(self, weight_scale: Tensor) -> Tensor:
        """Channels that are all zero, as those of a layer that starts at zero, have no range to start a learned scale from.

        They take the widest scale of the other channels; without any, that of the uniform distribution of torch's layers.
        """
        weight = self.weight_by_channel().detach()
        zero = (weight == 0).flatten(1).all(1).reshape(weight_scale.shape)
        usual = max(1, weight.shape[1:].numel()) ** -0.5 / self._weight_qmax
        widest = torch.where(zero, 0, weight_scale).amax() if zero.numel() else zero.new_zeros(())
        return torch.where(zero, torch.where(widest > 0, widest, usual), weight_scale)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in _SCALES[1:]:  # scales that are learned used to be 0-dim
            stored, own = state_dict.get(prefix + name), getattr(self, name)
            if stored is not None and own is not None and stored.numel() == own.numel():
                state_dict[prefix + name] = stored.reshape(own.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
        count, scale = (state_dict.get(prefix + name) for name in ("observer.count", "input_scale"))
        self.started = self.observer is None or _has_started(count, scale)

    def _apply(self, fn: Any, recurse: bool = True) -> "Qat":
        """Moves; but .half() and friends leave the scales in float32."""
        before = {name: (scale.data, scale.grad) for name in _SCALES if (scale := getattr(self, name)) is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, (old, grad) in before.items():
            scale = getattr(self, name)
            if scale.dtype != old.dtype:
                scale.grad = None
                scale.data = old.to(scale.device)
                scale.grad = None if grad is None else grad.to(scale.device, old.dtype)
        return self

    # ---- where the input's scale starts ----------------------------------------------------------------------------------

    def begin_calibration(self) -> None:
        """Until :meth:`end_calibration`, forward computes in float and observes."""
        self.observing = True

    def observe_first(self, batches: int = 1) -> None:
        """From now on the first batches of each step are computed in float and observed, and later ones simulated."""
        self.until_seen, self.all_seen = 0 if self.observer is None else batches, False

    def _is_first(self) -> bool:
        """Whether the current step wants more data. Waits for the device until no step does."""
        assert self.observer is not None
        if not self.all_seen:
            count = self.observer.count
            self.all_seen = bool((count >= self.until_seen).all())
            return bool((count[0] if self.timestep is None else count[self.timestep]) < self.until_seen)
        return False

    def end_calibration(self) -> None:
        """Takes the scales from the observed data, if there are any."""
        self.observing = False
        observer = self.observer
        if observer is None or observer.empty:
            return
        if self.input_scale is not None:
            scale, zero_point = observer.qparams()
            with torch.no_grad():
                self.input_scale.copy_(scale)
                if self.input_zero_point is not None:
                    self.input_zero_point.copy_(zero_point)
        # zeros say nothing about a scale to learn; the first batch that holds more will start it
        self.started = not (self.learned and _is_alone() and observer.only_zeros)

    def _is_started(self) -> bool:
        """Whether there are scales to compute with: observed ones, or those that an averaged copy has got as parameters."""
        if not self.started and not torch.compiler.is_compiling():
            assert self.observer is not None
            self.started = _has_started(None if self.learned else self.observer.count, self.input_scale)
        return self.started

    def _start(self, x: Tensor) -> None:
        """Takes the first scales from the first batch, which is allowed only where a single process learns them afterwards."""
        assert self.observer is not None
        alone = _is_alone()
        if not (self.learned and alone) or torch.compiler.is_compiling():
            why = "several processes would start differently" if self.learned and not alone else "they are not learned"
            why = "a compiled model cannot" if torch.compiler.is_compiling() else why
            raise RuntimeError(
                f"quant_ops.{type(self).__name__}: expected the scales of observer {self.observer.name!r} to be calibrated before "
                f"training, got no data ({why}). Call calibrate(model, data) first."
            )
        if not self.observer.empty:
            self.observer.reset()  # it has seen zeros alone, which would lower the mean
        self._observe(x)
        self.end_calibration()

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The layer's output with quantized weights and input; the float layer's while calibrating."""
        if self.until_seen:
            if self._is_first():
                self.begin_calibration()
            elif self.observing:
                self.end_calibration()
        return super().forward(*args, **kwargs)

    def _input(self, x: Tensor) -> Tensor:
        return super()._input(x) if self.observing else self._simulate_input(x)

    def _weight(self) -> Tensor:
        return self.weight if self.observing else self._simulate_weight().movedim(0, self.weight_layout.channel)

    def _simulate_input(self, x: Tensor) -> Tensor:
        if self.observer is None:
            asymmetric = self.config.asymmetric
            qmin = -128 if asymmetric else -127
            scale, zero_point = choose_qparams(x.detach(), list(self.input_layout.row), qmin, 127, asymmetric)
            return quant_tensor_forward(x, scale, zero_point, qmin, 127, asymmetric)
        qmin, qmax, asymmetric = self.observer.qmin, self.observer.qmax, self.observer.asymmetric
        if self.input_scale is None:
            if self.training or not self._is_started():
                self._observe(x)
                self.started = self.started or torch.compiler.is_compiling()
            scale, zero_point = self.observer.live_qparams()
        else:
            if not self._is_started():
                self._start(x)
            scale, zero_point = self.input_scale, self.input_zero_point  # type: ignore[assignment]
        if self.timestep is not None:
            step = self.timestep.clone()  # the backward pass wants it, and the next step may come before that
            scale = scale.index_select(0, step)
            zero_point = None if zero_point is None else zero_point.index_select(0, step)
        if self.learned:
            scale = _learned(scale, max(1, x.numel() // max(1, x.shape[0])), qmax)
        return quant_tensor_forward(x, scale, zero_point, qmin, qmax, asymmetric)

    @property
    def _weight_qmax(self) -> int:
        return 2 ** (self.config.weight_bits - 1) - 1

    def _range_scale(self) -> Tensor:
        weight = self.weight_by_channel().detach()
        dims, qmax = list(range(1, weight.dim())), self._weight_qmax
        return choose_qparams(weight, dims, -qmax, qmax)[0].float()

    def _simulate_weight(self) -> Tensor:
        weight, qmax = self.weight_by_channel(), self._weight_qmax
        scale = self._range_scale() if self.weight_scale is None else self.weight_scale
        if self.learned:
            scale = _learned(scale, max(1, weight.shape[1:].numel()), qmax)
        return quant_tensor_forward(weight, scale, None, -qmax, qmax)

    # ---- to int8 ---------------------------------------------------------------------------------------------------------

    def input_qparams(self) -> dict[str, Tensor]:
        """As :meth:`Prepared.input_qparams`, with the scales that were learned or kept."""
        if self.input_scale is None:
            return super().input_qparams()
        scale = whole(self.input_scale.detach()).abs().clamp(min=_TINY)
        return (
            {"input_scale": scale}
            if self.input_zero_point is None
            else {"input_scale": scale, "input_zero_point": whole(self.input_zero_point.detach())}
        )

    def problem(self) -> str | None:
        """As :meth:`Prepared.problem`; training may have diverged."""
        for name in ("weight_scale", "input_scale", "input_zero_point"):
            value = getattr(self, name)
            if value is not None and not whole(value.detach()).isfinite().all():
                return f"expected a finite {name}, got NaN or Inf from training, in layer"
        return super().problem()

    def to_int8(self) -> Int8Layer:
        """The int8 layer with the codes that this one computes with."""
        scale = None if self.weight_scale is None else whole(self.weight_scale.detach()).abs().clamp(min=_TINY).flatten()
        if scale is None:
            scale = whole(self._range_scale()).flatten()
        return to_int8(self, self.config, scale, **self.input_qparams())


class QatLinear(Linear, Qat, nn.Linear):
    """nn.Linear that trains with quantized weights and inputs."""


class QatTransposedLinear(Transposed, Qat):
    """transformers' Conv1D that trains with quantized weights and inputs."""

    own = (*Qat.own, "made_from")


class QatConv1d(Conv, Qat, nn.Conv1d):
    """nn.Conv1d that trains with quantized weights and inputs."""

    float_class = nn.Conv1d


class QatConv2d(Conv, Qat, nn.Conv2d):
    """nn.Conv2d that trains with quantized weights and inputs."""

    float_class = nn.Conv2d


QAT: dict[type[nn.Module], type[Qat]] = {kind.float_class: kind for kind in (QatLinear, QatTransposedLinear, QatConv1d, QatConv2d)}
