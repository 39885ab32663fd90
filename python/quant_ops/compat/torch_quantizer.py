"""torch_quantizer: ``fake_quant`` -> calibrate by running the model -> ``fake2real`` -> ``real_quant``.

As in the original, the first forward of each step calibrates, and later ones simulate the int8 model and can be trained.

Differences from the original:

* CPU as well as CUDA; float32, float16 or bfloat16 in and out. ``unet.half()`` is allowed, not required.
* Every Linear, Conv1d and Conv2d is quantized: any channels, groups, dilation, padding. The original leaves out Conv1d, and layers
  whose channels are no multiples of 32, without saying so.
* Calibration computes in float; in the original every layer sees the simulated outputs of those before it. For more data than one
  run, use ``qo.prepare_`` and ``qo.calibrate``.
* Steps are counted by forwards of the model, from 0 up, and start again after ``num_steps`` of them; the original counts the calls
  of each layer. The model's timestep, its argument ``timestep`` or ``t`` or the second one, shows where a run starts: a run of
  another number of calls is a warning, and shifts no other run. A pipeline that calls the model more than once in each step, for
  guidance without a doubled batch, takes ``calls_per_step``.
* Weights always have one scale per output channel (their ``channel_wise`` is ignored) and codes in [-127, 127]; activations have
  one scale and zero point per layer and step. "mse" is a search over the whole range, not from 0.95 to 1.05.
* Checkpoints are safetensors files, ``{class}_8bits_{steps}steps.safetensors``, and strict. The original's pickles are not read.
* ``real_quant`` without a checkpoint quantizes the model's own weights, with dynamic activations; the original's are random.
* ``asymmetric`` and ``matmul`` compute in float32 where the original uses float16. They are for code that calls them; the layers
  use fused operators. ``int8Conv`` takes any channels.
"""

import contextlib
import logging
import warnings
import weakref
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

import quant_ops as qo

from ..convert.files import read_layers
from ..convert.qat import Qat
from ..report.bench import conv2d, linear, text

_log = logging.getLogger("quant_ops")
_OBSERVERS = {"max": "minmax", "mse": "mse"}
_PARAMS = {"n_bits", "symmetric", "channel_wise", "scale_method", "leaf_param"}

__all__ = ["asymmetric", "benchmark_conv2d", "benchmark_linear", "fake2real", "fake_quant", "matmul", "real_quant"]


# ---- models --------------------------------------------------------------------------------------------------------------


def fake_quant(
    model: nn.Module,
    weight_quant_params: dict[str, Any],
    act_quant_params: dict[str, Any],
    num_steps: int = 1,
    *,
    calls_per_step: int = 1,
) -> nn.Module:
    """Makes the model, in place, one that calibrates in its first run and then simulates int8.

    ``num_steps * calls_per_step`` forwards are a run. Returns the model. It can be trained: gradients pass straight through.
    """
    _check_calls("fake_quant", calls_per_step)
    weight_bits, weight_observer = _settings("weight_quant_params", weight_quant_params)
    bits, observer = _settings("act_quant_params", act_quant_params)
    if bits != 8:
        raise ValueError(f"quant_ops.fake_quant: expected act_quant_params['n_bits'] == 8, got {bits}")
    if act_quant_params.get("channel_wise", False):
        raise ValueError("quant_ops.fake_quant: expected act_quant_params['channel_wise'] == False, got True")
    config = qo.Int8Static(
        observer=observer,
        asymmetric=not act_quant_params.get("symmetric", False),
        num_steps=num_steps,
        weight_bits=weight_bits,
        weight_observer=weight_observer,
    )
    qo.prepare_qat_(model, config)
    for layer in model.modules():
        if isinstance(layer, Qat):
            layer.observe_first(calls_per_step)
    _count_steps(model, num_steps, calls_per_step)
    model.n_bits = 8  # type: ignore[assignment]
    return model


def _settings(argument: str, params: dict[str, Any]) -> tuple[int, str]:
    """Bits and observer."""
    if unknown := sorted(params.keys() - _PARAMS):
        raise TypeError(f"quant_ops.fake_quant: expected {argument} with keys among {sorted(_PARAMS)}, got {unknown}")
    method = params.get("scale_method", "max")
    if method not in _OBSERVERS:
        raise ValueError(f"quant_ops.fake_quant: expected {argument}['scale_method'] in {sorted(_OBSERVERS)}, got {method!r}")
    return params.get("n_bits", 8), _OBSERVERS[method]


def _check_calls(function: str, calls_per_step: int) -> None:
    if calls_per_step < 1:
        raise ValueError(f"quant_ops.{function}: expected calls_per_step >= 1, got {calls_per_step}")


def fake2real(fakeq_model: nn.Module, save_dir: str = ".") -> nn.Module:
    """Converts the calibrated model to int8, in place, and writes its checkpoint to ``save_dir``. Returns it."""
    steps: int = getattr(fakeq_model, "num_steps", 1)
    if not Path(save_dir).is_dir():
        raise FileNotFoundError(f"quant_ops.fake2real: expected save_dir to be a folder, got {str(save_dir)!r}")
    for layer in fakeq_model.modules():
        if isinstance(layer, Qat) and layer.observing:
            layer.end_calibration()
    qo.convert_(fakeq_model)
    _count_steps(fakeq_model, steps)
    path = Path(save_dir) / f"{type(fakeq_model).__name__}_8bits_{steps}steps.safetensors"
    qo.save(fakeq_model, path)
    _log.info("saved %s", path)
    return fakeq_model


def real_quant(
    model: nn.Module, n_bits: int = 8, num_steps: int = 1, ckpt_path: str | None = None, *, calls_per_step: int = 1
) -> nn.Module:
    """Makes the float model, in place, the int8 model of a checkpoint of :func:`fake2real`. Returns it.

    A checkpoint whose weights have other bits, or whose layers have other steps, is refused before the model is touched.
    """
    _check_calls("real_quant", calls_per_step)
    if ckpt_path is None:
        qo.quantize_(model, qo.Int8Dynamic(weight_bits=n_bits))
        return model
    layers = read_layers(ckpt_path).values()
    for what, wanted, found in (
        ("bits", n_bits, {bits for bits, _ in layers}),
        ("steps", num_steps, {steps for _, steps in layers}),
    ):
        if found - {wanted}:
            raise ValueError(
                f"quant_ops.real_quant: expected a checkpoint of {wanted} {what}, got {sorted(found)} in {ckpt_path}. Pass what "
                "it was made with."
            )
    qo.load_(model, ckpt_path)
    _count_steps(model, num_steps, calls_per_step)
    return model


class _StepCounter:
    """Forward hooks of a model that count its forwards and set the step, from 0, modulo num_steps.

    Every step is ``calls_per_step`` calls. Timesteps rise or fall through a run, so that one against the direction begins the next.
    A run that is too long uses the last step for the rest, and one that is too short ends early; both warn, once.
    """

    def __init__(self, num_steps: int, calls_per_step: int, rising: bool | None = None) -> None:
        self.num_steps, self.calls_per_step, self.run = num_steps, calls_per_step, num_steps * calls_per_step
        self.calls, self.entered = 0, contextlib.ExitStack()
        self.last: float | None = None  # the timestep of the call before
        self.at_last = 0  # calls with this timestep, one after another
        self.rising = rising
        self.moves = 0 if rising is None else 2  # calls from which the direction is known
        self.warned = False

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        now = _timestep_of(args, kwargs)
        if now is not None and self.last is not None and now != self.last:
            rising = now > self.last
            if self.rising is None:
                self.rising = rising
            elif rising != self.rising:
                self._expect_whole_run()
                # after a single move in a run that is not whole, the other one is right, and the timestep before began the run
                stray = self.moves == 1 and self.calls < self.run
                self.rising, self.calls, self.moves = (rising, self.at_last, 0) if stray else (self.rising, 0, self.moves)
            self.moves += 1
        elif now is None and self.calls == self.run:
            self.calls = 0  # nothing tells where a run starts
        elif now == self.last and self.rising is None and self.calls == self.run:
            self.calls = 0
        self.at_last = self.at_last + 1 if now == self.last else 1
        self.last = now
        self.entered.enter_context(qo.timestep(model, min(self.calls // self.calls_per_step, self.num_steps - 1)))
        self.calls += 1

    def leave(self, *_: Any) -> None:
        self.entered.close()

    def _expect_whole_run(self) -> None:
        """Warns where the run that has ended had another number of calls."""
        if self.calls != self.run and not self.warned:
            self.warned = True
            warnings.warn(
                f"quant_ops.torch_quantizer: expected runs of {self.run} calls of the model, got one of {self.calls}. Pass the "
                "number of calls as num_steps, or calls_per_step where every step is the same number of calls.",
                stacklevel=2,
            )

    def pause(self) -> None:
        """The model is about to be converted: a run that has begun does not go on."""
        if self.calls % self.run:
            self._expect_whole_run()


def _timestep_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> float | None:
    """The timestep among a model's arguments; None if it has none."""
    found = next((kwargs[name] for name in ("timestep", "timesteps", "t") if name in kwargs), args[1] if len(args) > 1 else None)
    if isinstance(found, Tensor) and found.numel() and (found.dim() == 0 or (found == found.flatten()[0]).all()):
        return float(found.flatten()[0])
    return float(found) if isinstance(found, int | float) else None


_counters: "weakref.WeakKeyDictionary[nn.Module, list[tuple[_StepCounter, list[Any]]]]" = weakref.WeakKeyDictionary()


def _count_steps(model: nn.Module, num_steps: int, calls_per_step: int | None = None) -> None:
    """Lets the model count its own forwards from now on, if it has steps; by default with as many calls for each as before."""
    model.num_steps = num_steps  # type: ignore[assignment]
    rising = None
    for counter, handles in _counters.pop(model, []):
        counter.pause()
        rising, calls_per_step = counter.rising, calls_per_step or counter.calls_per_step
        for handle in handles:
            handle.remove()
    if num_steps > 1:
        counter = _StepCounter(num_steps, calls_per_step or 1, rising)
        hooks = [
            model.register_forward_pre_hook(counter.enter, with_kwargs=True),
            model.register_forward_hook(counter.leave, always_call=True),
        ]
        _counters[model] = [(counter, hooks)]


# ---- operators -----------------------------------------------------------------------------------------------------------


class asymmetric:
    """Quantization of activations, to int8 with a zero point."""

    @staticmethod
    def myQuantize(src: Tensor, delta: Tensor, zp: Tensor) -> Tensor:
        """int8 codes of src, any shape."""
        return qo.quant_tensor_forward(src, delta.float(), zp, -128, 127, True, False)

    @staticmethod
    def myQuantizeNCHW(src: Tensor, delta: Tensor, zp: Tensor) -> Tensor:
        """int8 codes (N, H, W, C) of src (N, C, H, W)."""
        return asymmetric.myQuantize(src, delta, zp).permute(0, 2, 3, 1).contiguous()


class matmul:
    """Integer products. Activations are (M, K) or (N, H, W, C), weights (N, K) or (O, R, S, C)."""

    @staticmethod
    def int8Matmul(A: Tensor, B: Tensor) -> Tensor:
        """A B^T, int32."""
        return qo.int8_gemm(A, B)

    @staticmethod
    def myInt8Matmul(
        A: Tensor,
        B: Tensor,
        zp_times_weight_channel_sum: Tensor,
        act_times_weight_delta: Tensor,
        y: Tensor,
    ) -> Tensor:
        """(A B^T - zp_times_weight_channel_sum) * act_times_weight_delta + y, float32."""
        product = qo.int8_gemm(A, B).float()
        return (product - zp_times_weight_channel_sum.flatten()) * act_times_weight_delta.flatten() + y.flatten()

    @staticmethod
    def int8Conv(
        input: Tensor,
        filter: Tensor,
        padH: int,
        padW: int,
        strideH: int,
        strideW: int,
        dilationH: int,
        dilationW: int,
    ) -> Tensor:
        """int32 (N, H, W, O), exact: the windows as rows of a matrix."""
        out_channels, r, s, _ = filter.shape
        padded = F.pad(input, (0, 0, padW, padW, padH, padH))
        rows = padded.unfold(1, dilationH * (r - 1) + 1, strideH)[..., ::dilationH]
        windows = rows.unfold(2, dilationW * (s - 1) + 1, strideW)[..., ::dilationW]  # (N, OH, OW, C, R, S)
        matrix = windows.permute(0, 1, 2, 4, 5, 3).reshape(-1, filter[0].numel())
        return qo.int8_gemm(matrix, filter.reshape(out_channels, -1)).view(*windows.shape[:3], out_channels)

    @staticmethod
    def myInt8Conv(
        input: Tensor,
        filter: Tensor,
        padH: int,
        padW: int,
        strideH: int,
        strideW: int,
        dilationH: int,
        dilationW: int,
        zp_times_weight_channel_sum: Tensor,
        act_times_weight_delta: Tensor,
        y: Tensor,
        relu_fushion: bool = False,
    ) -> Tensor:
        """(conv - zp_times_weight_channel_sum) * act_times_weight_delta + y, then the ReLU; float32 (N, O, H, W)."""
        product = matmul.int8Conv(input, filter, padH, padW, strideH, strideW, dilationH, dilationW).float()
        result = (product - zp_times_weight_channel_sum.flatten()) * act_times_weight_delta.flatten() + y.flatten()
        return (result.relu() if relu_fushion else result).permute(0, 3, 1, 2).contiguous()


# ---- benchmarks ----------------------------------------------------------------------------------------------------------


def benchmark_linear(bs: int = 512, cin: int = 960, cout: int = 960) -> None:
    """``python -m quant_ops bench linear``."""
    print(text(linear(bs, cin, cout)))


def benchmark_conv2d(bs: int = 8, cin: int = 384, h: int = 32, w: int = 32, cout: int = 384, k: int = 3, padding: int = 0) -> None:
    """``python -m quant_ops bench conv2d``."""
    print(text(conv2d(bs, cin, cout, h, w, k, padding)))
