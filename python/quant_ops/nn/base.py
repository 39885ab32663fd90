"""Base class of the quantized layers: what stands for a float layer in a model, whose ``forward`` is one operator call.

Read first: state.py, what a layer holds; next: int8.py, weight_only.py.
"""

import operator
import sys
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.compiler import is_compiling
from torch.fx import Proxy

from ..ops._register import wants_derivative
from .kept import KeptCall, kept_call
from .saving import SavedState
from .scaled import ScaledLinear, checked_multiplier
from .transposed import as_linear

_below_autograd = torch._C._AutoDispatchBelowAutograd
_in_transform = torch._C._functorch.maybe_current_level
_dispatch_modes = torch._C._len_torch_dispatch_stack
_tracer = torch._C._get_tracing_state  # of torch.jit.trace
_hooks, _pre_hooks = torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks
_Self = TypeVar("_Self", bound="QuantizedLayer")


def _is_watched() -> bool:
    """Whether somebody has to see the operator itself: a transform, a mode of dispatch, torch.jit.trace."""
    return _in_transform() is not None or forward_ad._current_level >= 0 or _dispatch_modes() > 0 or _tracer() is not None


def _in_onnx_export() -> bool:
    onnx = sys.modules.get("torch.onnx")  # whose import takes a quarter of a second
    return onnx is not None and onnx.is_in_onnx_export()


# Dynamo takes torch's function for False; it calls one with this mark, which torch.compiler.assume_constant_result would set (that
# imports Dynamo, which takes a second).
_in_onnx_export._dynamo_marked_constant = True  # type: ignore[attr-defined]


class QuantizedLayer(SavedState):
    """Base class of the quantized layers. A subclass says which float layer it stands for and calls its operator in ``_run``."""

    float_class: ClassVar[type[nn.Module]]
    geometry: ClassVar[tuple[str, ...]]  # arguments and attributes that the constructors of both layers share; bias is another
    settings: ClassVar[tuple[str, ...]]  # keyword arguments of the constructor, and attributes
    newer: ClassVar[dict[str, Any]] = {}  # settings that earlier versions lack, which files leave out where they have these values
    backward: bool = False  # whether gradients flow through forward to the input; see ops/backward.py
    has_bias: ClassVar[bool] = True  # whether both constructors take bias
    in_features: int  # of a linear layer, whose buffer input_multiplier may be None

    _repeats: ClassVar[Any] = None  # what repeats the operator call that _run is; None: it is more than such a call
    _kept: KeptCall | None = None

    config: Any = None  # what a converting call made the layer by
    sharding: Any = None  # of a layer whose parts are spread over processes; see quant_ops.distributed

    # ---- from float and back ---------------------------------------------------------------------------------------------

    @classmethod
    def _like(cls: type[_Self], module: nn.Module, **settings: Any) -> tuple[_Self, Any]:
        """An empty layer for a float one, on the meta device; and the float one, an nn.Linear for a Conv1D of transformers.

        Raises:
            TypeError: module is of another class.
        """
        given, module = module, as_linear(module)
        if not isinstance(module, cls.float_class):
            kind = cls.float_class.__name__
            raise TypeError(f"quant_ops.{cls.__name__}.from_float: expected an nn.{kind}, got {type(given).__name__}")
        arguments = {name: getattr(module, name) for name in cls.geometry}
        return cls.empty(arguments, bias=False, **settings), module

    @classmethod
    def empty(cls: type[_Self], geometry: dict[str, Any], bias: bool, **settings: Any) -> _Self:
        """A layer of these arguments on the meta device."""
        make: Any = cls
        layer: _Self = make(**geometry, **({"bias": bias} if cls.has_bias else {}), device="meta", **settings)
        return layer

    @classmethod
    def stored_shape(cls, weight_shape: torch.Size, weight_bits: int) -> torch.Size:
        """Of ``qweight`` in the state_dict."""
        return weight_shape

    def saved_shape(self) -> torch.Size:
        return self.stored_shape(self._weight_shape, self.weight_bits)

    @classmethod
    def are_settings(cls, arguments: dict[str, Any], weight_bits: Any) -> bool:
        """Whether these values, read from a file, can be the settings of a layer."""
        raise NotImplementedError

    def _take_multiplier(self, module: nn.Module, given: Tensor | None) -> None:
        """Takes the multiplier of the input that is given, or that of a ScaledLinear."""
        name = f"{type(self).__name__}.from_float"
        if given is None and isinstance(module, ScaledLinear):
            given = module.input_multiplier
        elif given is not None and isinstance(module, ScaledLinear):
            raise ValueError(f"quant_ops.{name}: expected input_multiplier=None with a ScaledLinear, which has one, got both")
        if given is None:
            return
        if "input_multiplier" not in self._buffers:
            raise ValueError(f"quant_ops.{name}: expected input_multiplier only for a linear layer, got it for a convolution")
        self._buffers["input_multiplier"] = checked_multiplier(name, given, self.in_features).to(self.device)

    def dequantize(self) -> nn.Module:
        """A float32 layer of ``float_class`` with the weights that this layer computes with; a ScaledLinear where its input has a
        multiplier."""
        arguments = {name: getattr(self, name) for name in self.geometry}
        if self.has_bias:
            arguments["bias"] = self.bias is not None
        multiplier = self._buffers.get("input_multiplier")
        make = self.float_class if multiplier is None else ScaledLinear
        layer: Any = make(**arguments, device=self.device, dtype=torch.float32)
        if self.channels_last:
            layer.to(memory_format=torch.channels_last)
        with torch.no_grad():
            layer.weight.copy_(self._values(torch.float32)())
            if self.bias is not None:
                layer.bias.copy_(self.bias)
            if multiplier is not None:
                layer.input_multiplier.copy_(multiplier)
        layer.train(self.training)
        return layer

    # ---- forward ---------------------------------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The usual call, which the library has kept (kept.py), without the Python of nn.Module; else nn.Module's."""
        if not is_compiling() and (kept := self._kept) is not None and len(args) == 1 and not kwargs:
            x = args[0]
            if (
                type(x) is Tensor
                and not x.requires_grad
                and x.dim() == kept.dim
                and all(map(operator.is_, kept.buffers, self._buffers.values()))
                and not (self._forward_hooks or self._forward_pre_hooks or _hooks or _pre_hooks or self._compiled_call_impl)
                and not _is_watched()
            ):
                return kept.call(x, kept.number)
        return super().__call__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output; see the class for shapes and dtypes."""
        # The usual call first, since every check costs. The operator's autograd kernel is Python and takes 3 us only to refuse
        # gradients, so it is skipped where nothing requires one; tensors of inference mode never reach it.
        if type(x) is Tensor and not is_compiling() and not x.requires_grad:
            if x.is_inference():
                return self._run_first(x)
            if _in_transform() is None and forward_ad._current_level < 0:
                with _below_autograd():
                    return self._run_first(x)
        return self._forward_unusual(x)

    def _run_first(self, x: Tensor) -> Tensor:
        """``_run``, whose operator call is kept for the next ones where it can be."""
        if not x.is_cpu or not self._is_one_call() or _is_watched():
            return self._run(x)
        y, self.__dict__["_kept"] = kept_call(self._run, x, self._repeats, self._buffers)
        return y

    def _is_one_call(self) -> bool:
        """Whether a call of the layer is one of an operator, whose arguments but x are the same every time."""
        return self._repeats is not None and "forward" not in self.__dict__  # which accelerate's hooks replace

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not vars(cls).keys().isdisjoint(("_run", "forward")) and "_repeats" not in vars(cls):
            cls._repeats = None

    def _forward_unusual(self, x: Tensor) -> Tensor:
        """Compiled, traced by torch.fx, differentiated, or with a subclass of Tensor."""
        if isinstance(x, Proxy):  # the layer becomes one node of the graph, as torch's own layers do
            tracer: Any = x.tracer
            node: Tensor = tracer.create_proxy("call_module", tracer.path_of_module(self), (x,), {})
            return node
        if _in_onnx_export():
            self._refuse_onnx()
        if type(x) is not Tensor and hasattr(x, "full_tensor"):
            raise TypeError(
                f"quant_ops.{type(self).__name__}: expected a plain tensor, got a DTensor. Pass its full_tensor(), or its "
                "to_local() where every process has rows of its own, or shard the layer with a style of quant_ops.distributed."
            )
        if self.backward and torch.is_grad_enabled() and (x.requires_grad if is_compiling() else wants_derivative((x,))):
            return self._run(x, through=True)
        return self._run(x)

    def _slow_forward(self, *args: Any, **kwargs: Any) -> Any:
        """Called instead of forward by torch.jit.trace."""
        if _in_onnx_export():
            self._refuse_onnx()
        return super()._slow_forward(*args, **kwargs)  # type: ignore[no-untyped-call]

    def _refuse_onnx(self) -> NoReturn:
        raise RuntimeError(
            f"quant_ops.{type(self).__name__}: expected no torch.onnx.export of quantized layers, whose operators ONNX lacks. "
            "Call quant_ops.onnx.export(model, args, path), which writes those of ONNX in their place."
        )

    def __prepare_scriptable__(self) -> NoReturn:
        """Called by torch.jit.script."""
        raise RuntimeError(
            f"quant_ops.{type(self).__name__}: expected no torch.jit.script of quantized layers, which it cannot compile. Use "
            "torch.jit.trace or torch.export.export."
        )

    def _run(self, x: Tensor, through: bool = False) -> Tensor:
        """The operator call; with ``through``, of the differentiable one."""
        raise NotImplementedError
