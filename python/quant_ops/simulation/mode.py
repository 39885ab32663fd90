"""Simulated products inside any model: a torch function mode sees the functions that a model calls, before torch does.

It covers the functions of the table ``_METHODS``; the rest runs as it is. While a function is handled the mode is off, and what
computes by ATen operators, as the simulated layers do, is no function of the table: nothing is rounded twice. What products do is
in products.py.
"""

import functools
import inspect
import sys
import weakref
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.backends import mha
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ..nn import ScaledLinear
from .config import Simulated
from .products import Products

# Methods of Products by the names of functions: those of torch, and of tensors where they have them.
_NAMES = (
    *("matmul", "mm", "bmm", "mv", "dot", "vdot", "inner", "chain_matmul", "tensordot", "einsum", "bilinear"),
    *("addmm", "addmm_", "addmv", "addmv_", "addbmm", "addbmm_", "baddbmm", "baddbmm_"),
)


def _methods() -> dict[Any, Any]:
    methods = {
        getattr(owner, name): getattr(Products, name) for name in _NAMES for owner in (torch, Tensor) if hasattr(owner, name)
    }
    others = {
        torch.linalg.matmul: Products.matmul,
        torch.linalg.multi_dot: Products.multi_dot,
        torch.linalg.vecdot: Products.vecdot,
        Tensor.__matmul__: Products.matmul,
        Tensor.__rmatmul__: Products.rmatmul,
        torch._grouped_mm: Products.grouped_mm,
        F.linear: Products.linear,
        F.scaled_dot_product_attention: Products.scaled_dot_product_attention,
        F.multi_head_attention_forward: Products.multi_head_attention_forward,
    }
    return methods | others


_METHODS = _methods()

# Fused functions, which read the weights of several layers and cannot be taken apart here. Torch's modules do not call the fast
# paths while a mode is active, unless they are compiled.
_FAST_PATH = "{}'s fast path. Call torch.backends.mha.set_fastpath_enabled(False)"
_REFUSED = {
    torch._native_multi_head_attention: _FAST_PATH.format("nn.MultiheadAttention"),
    torch._transformer_encoder_layer_fwd: _FAST_PATH.format("nn.TransformerEncoderLayer"),
    torch.ops.higher_order.flex_attention: "flex_attention. Use scaled_dot_product_attention",
}


def _let_dynamo_see(functions: Any) -> None:
    """Dynamo hands a mode the functions that torch.overrides lists, which leaves out those with a name that begins with "_"."""
    listed = torch.overrides.get_overridable_functions()[torch]
    listed.extend(function for function in functions if function not in listed)
    if (dynamo := sys.modules.get("torch._dynamo.variables.torch")) is not None:  # it has read the list, or soon will
        dynamo.get_overridable_functions().update(functions)


_let_dynamo_see((torch._native_multi_head_attention, torch._transformer_encoder_layer_fwd, torch._grouped_mm))


class ProductMode(TorchFunctionMode):
    """Computes the products that are called inside of it with ``products``.

    Attributes:
        spares_layers: whether those of nn.Linear, and of transformers' Conv1D, are left as they are.
        spared: ids of the weights of these layers, for torch.compile, which does not know who calls.
    """

    def __init__(self, products: Products, spares_layers: bool = False) -> None:
        super().__init__()
        self.products = products
        self.spares_layers = spares_layers
        self.spared: frozenset[int] = frozenset()

    def __deepcopy__(self, memo: Any) -> "ProductMode":
        return ProductMode(self.products, self.spares_layers)  # of a copy of the model; a config never changes

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():  # which hides operators such as @ from modes
            raise RuntimeError("quant_ops.simulated_products: expected torch.export with strict=False, got strict=True")
        method = _METHODS.get(func)
        if method is None:
            if func in _REFUSED:
                raise RuntimeError(
                    f"quant_ops.simulated_products: expected products that can be taken apart, got {_REFUSED[func]}."
                )
            if func is Tensor.unflatten and torch.compiler.is_compiling():
                func = torch.unflatten  # Dynamo cannot trace the method, which calls super()
            if isinstance(func, HigherOrderOperator):  # a checkpointed function or branch, which torch.compile traces now
                args = tuple(_in_mode(arg, self) if callable(arg) and not isinstance(arg, Tensor) else arg for arg in args)
            return func(*args, **kwargs)
        if self.spares_layers and self._is_layers(func, args):
            if torch.compiler.is_compiling():  # a graph that runs as it is, in the mode, must not call the function again
                func = torch.ops.aten.linear.default if func is F.linear else torch.ops.aten.addmm.default
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
            if _is_generated(sys._getframe(1)):
                return func(*args, **kwargs)
            _simulate_recomputation(self, sys._getframe(1))
        if "out" in kwargs:
            out = kwargs.pop("out")
            result = method(self.products, *args, **kwargs)
            return result if out is None else out.resize_(result.shape).copy_(result)
        return method(self.products, *args, **kwargs)

    def _is_layers(self, func: Any, args: Any) -> bool:
        """Whether a layer computes this product."""
        if torch.compiler.is_compiling():
            if func is F.linear and len(args) > 1:
                return id(args[1]) in self.spared
            return func is torch.addmm and len(args) > 2 and id(args[2]) in self.spared
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_code.co_name == "__torch_function__":  # of another mode
            frame = frame.f_back
        return frame.f_code in _OF_LAYERS or (func is torch.addmm and _is_transposed(frame.f_locals.get("self")))


# Where a graph breaks, Dynamo would compile the handler by itself, and take the result for one function for that of another: its
# guards do not tell methods of tensors apart. As a part of other graphs the handler is traced as before.
_frames = torch._C._dynamo.eval_frame
_skip = _frames._FrameExecStrategy(_frames._FrameAction.SKIP, _frames._FrameAction.DEFAULT)
_frames.set_code_exec_strategy(ProductMode.__torch_function__.__code__, _skip)


def _is_generated(frame: FrameType) -> bool:
    """Whether Inductor's code calls, which runs products that were simulated when they were traced as torch.mm and the like."""
    return "extern_kernels" in frame.f_globals or str(frame.f_globals.get("__name__")).startswith("torch._inductor")


_OF_LAYERS = (nn.Linear.forward.__code__, ScaledLinear.forward.__code__)


def _is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _weights_of_layers(model: nn.Module) -> frozenset[int]:
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) or _is_transposed(module))
    return frozenset([id(layer._parameters.get("weight")) for layer in layers])


# ---- functions that are called later, or elsewhere -------------------------------------------------------------------------


def _in_mode(function: Any, mode: ProductMode) -> Any:
    """A function that runs in the mode: what a higher order operator traces is otherwise traced without."""

    def inside(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return function(*args, **kwargs)

    return inside


class _Recomputed:
    """A function that runs in the mode, and can be told from others."""

    def __init__(self, function: Any, mode: ProductMode) -> None:
        self.function, self.mode = function, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.function(*args, **kwargs)


_CHECKPOINT = inspect.unwrap(checkpoint.checkpoint).__code__
_REENTRANT = checkpoint.CheckpointFunction.forward.__code__


def _simulate_recomputation(mode: ProductMode, frame: FrameType | None) -> None:
    """Lets gradient checkpointing recompute in the mode, too, since the backward pass runs outside of it.

    ``frame`` is that of the caller of a product. If torch.utils.checkpoint is among the callers, what it will call in the backward
    pass is replaced by the same in the mode. No public interface does that for checkpoints that a model makes itself.
    """
    while frame is not None:
        if frame.f_code is _REENTRANT:
            _replace(frame.f_locals.get("ctx"), "run_function", mode)
        elif frame.f_code is _CHECKPOINT and not frame.f_locals.get("use_reentrant"):
            generator = frame.f_locals.get("gen")
            _replace(generator and generator.gi_frame.f_locals.get("new_frame"), "recompute_fn", mode)
        frame = frame.f_back


def _replace(owner: Any, name: str, mode: ProductMode) -> None:
    function = getattr(owner, name, None)
    if function is None:
        raise RuntimeError(
            "quant_ops.simulated_products: expected gradient checkpointing as of torch 2.13, got another, which would recompute "
            "products without rounding. Turn it off."
        )
    if not (isinstance(function, _Recomputed) and function.mode is mode):
        setattr(owner, name, _Recomputed(function, mode))


# ---- where products are simulated ----------------------------------------------------------------------------------------

_MODE = "_product_mode"  # in the __dict__ of a model


def simulated_products(config: Simulated) -> ProductMode:
    """A context in which the products that functions compute have rounded operands.

    These are ``@``, ``torch.matmul``, ``mm``, ``bmm``, ``mv``, ``dot``, ``inner``, ``addmm``, ``baddbmm`` and their like,
    ``einsum`` and ``tensordot`` where they sum, ``torch.nn.functional.linear``, ``bilinear``, ``scaled_dot_product_attention`` and
    ``multi_head_attention_forward``, which nn.MultiheadAttention calls. Simulated layers round by themselves and are left alone,
    as are other operands than floating ones and outer products, a column times a row.

    Operands are rounded by ``config.input``, parameters and the weight of ``linear`` by ``config.weight``, results by
    ``config.output`` and their gradients by ``config.backward``. Blocks lie along the dimension that is summed. What is added to
    a product, such as a mask, is not rounded; attention is taken apart, in the order that simulation/attention.py says.
    What gradient checkpointing recomputes is simulated like the first time. Where contexts are nested, the innermost counts.

    Example::

        with quant_ops.simulated_products(quant_ops.Simulated(input=quant_ops.E4M3)):
            y = model(x)

    Raises:
        TypeError: the config is no :class:`Simulated`.
        RuntimeError: inside, where a fused function is called that cannot be taken apart, such as flex_attention.
    """
    return ProductMode(Products(_expected("simulated_products", config)))


def simulate_products_(model: nn.Module, config: Simulated) -> "SimulatedProducts":
    """Simulates the products of functions, as :func:`simulated_products` does, whenever the model is called, in copies of it too.

    Products of nn.Linear layers, and of transformers' Conv1D, are left as they are, for ``quantize_`` says which of them are
    simulated. ``torch.compile`` tells these layers by their parameter; one whose weight is computed counts as a function there.
    The model gets a class of the same name, derived from its own; its parameters and its state_dict do not change.

    Returns:
        A handle whose method ``remove()`` makes the model what it was.

    Raises:
        TypeError: the model is no module, or the config no :class:`Simulated`.
        ValueError: the model's products are simulated already.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quant_ops.simulate_products_: expected model to be a module, got {type(model).__name__}")
    products = Products(_expected("simulate_products_", config))
    if _MODE in model.__dict__:
        raise ValueError("quant_ops.simulate_products_: expected ordinary products, got simulated ones. Call remove() first.")
    model.__dict__[_MODE] = ProductMode(products, spares_layers=True)
    if not hasattr(model, "_simulates_products"):
        own: Any = type(model)
        model.__class__ = _simulating(own)
    return SimulatedProducts(model)


class SimulatedProducts:
    """What :func:`simulate_products_` returns."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def remove(self) -> None:
        """Makes the model's products ordinary ones again; copies of the model stay as they are. Once more does nothing."""
        model = self._model()
        if model is None or model.__dict__.pop(_MODE, None) is None:
            return
        if "_simulates_products" in type(model).__dict__:  # another class may have been derived since, which needs this one
            model.__class__ = type(model).__bases__[0]


def _expected(op: str, config: Any) -> Simulated:
    if not isinstance(config, Simulated):
        raise TypeError(f"quant_ops.{op}: expected config to be quant_ops.Simulated, got {config!r}")
    return config


@functools.cache
def _simulating(cls: Any) -> Any:
    """The class of a model whose products are simulated. Forward stays as it is: its signature is looked at, and it is replaced."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = self.__dict__.get(_MODE)
        if mode is None:
            return cls.__call__(self, *args, **kwargs)
        mode.spared = _weights_of_layers(self)
        fast = mha._is_fastpath_enabled
        mha._is_fastpath_enabled = False  # compiled modules ask for this, but not for modes
        try:
            with mode:
                return cls.__call__(self, *args, **kwargs)
        finally:
            if fast:
                mha._is_fastpath_enabled = True

    def reduce(self: Any, protocol: Any) -> Any:
        return _new, (cls,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__

    body = {"__call__": call, "__reduce_ex__": reduce, "_simulates_products": True}
    return type(cls.__name__, (cls,), body | {name: getattr(cls, name) for name in ("__module__", "__qualname__", "__doc__")})


def _new(cls: Any) -> Any:
    simulating = _simulating(cls)
    return simulating.__new__(simulating)
