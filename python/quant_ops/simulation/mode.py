"""Simulated products inside any model: a torch function mode sees the functions that a model calls, before torch does.

It covers the functions of the table ``_METHODS``; the rest runs as it is. While a function is handled the mode is off, and what
computes by ATen operators, as the simulated layers do, is no function of the table: nothing is rounded twice. What products do is
in products.py.
"""

import functools
import sys
import weakref
from types import FrameType
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

from ..convert.config import Simulated
from .products import Products

# Methods of Products by the names of functions: those of torch, and of tensors where they have them.
_NAMES = """matmul mm bmm mv dot vdot inner addmm addmv baddbmm addbmm addmm_ addmv_ baddbmm_ addbmm_ tensordot einsum chain_matmul
bilinear""".split()


def _methods() -> dict[Any, Any]:
    methods = {getattr(owner, name): getattr(Products, name) for name in _NAMES for owner in (torch, Tensor) if hasattr(owner, name)}
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

# Fused functions that cannot be taken apart here. Torch's modules do not call them while a mode is active.
_REFUSED = {
    torch._native_multi_head_attention: "nn.MultiheadAttention's fast path",
    torch._transformer_encoder_layer_fwd: "nn.TransformerEncoderLayer's fast path",
    torch.ops.higher_order.flex_attention: "flex_attention",
}


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

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        method = _METHODS.get(func)
        if method is None:
            if func in _REFUSED:
                raise RuntimeError(
                    f"quant_ops.simulated_products: expected products that can be taken apart, got {_REFUSED[func]}. Turn it off."
                )
            if func is Tensor.unflatten and torch.compiler.is_compiling():
                func = torch.unflatten  # Dynamo cannot trace the method, which calls super()
            return func(*args, **kwargs)
        if self.spares_layers and self._is_layers(func, args):
            return func(*args, **kwargs)
        if not torch.compiler.is_compiling():
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
        return frame.f_code is nn.Linear.forward.__code__ or (func is torch.addmm and _is_transposed(frame.f_locals.get("self")))


def _is_transposed(module: Any) -> bool:
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


def _weights_of_layers(model: nn.Module) -> frozenset[int]:
    layers = (module for module in model.modules() if isinstance(module, nn.Linear) or _is_transposed(module))
    return frozenset([id(layer.weight) for layer in layers])


# ---- gradient checkpointing ----------------------------------------------------------------------------------------------


class _InMode:
    """A function that is called in a mode."""

    def __init__(self, function: Any, mode: ProductMode) -> None:
        self.function, self.mode = function, mode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self.mode:
            return self.function(*args, **kwargs)


def _simulate_recomputation(mode: ProductMode, frame: FrameType | None) -> None:
    """Lets what gradient checkpointing recomputes be computed in the mode, too: the backward pass runs outside of it.

    ``frame`` is that of a product. It is looked at whether torch.utils.checkpoint has called it.
    """
    while frame is not None:
        code = frame.f_code
        if code is _REENTRANT:
            _replace(frame.f_locals["ctx"], "run_function", mode)
        elif code is _CHECKPOINT and (region := frame.f_locals.get("gen")) is not None:
            _replace(region.gi_frame.f_locals["new_frame"], "recompute_fn", mode)
        frame = frame.f_back


def _replace(owner: Any, name: str, mode: ProductMode) -> None:
    function = getattr(owner, name)
    if not (isinstance(function, _InMode) and function.mode is mode):
        setattr(owner, name, _InMode(function, mode))


_REENTRANT = checkpoint.CheckpointFunction.forward.__code__
_CHECKPOINT = checkpoint.checkpoint.__wrapped__.__code__


# ---- where products are simulated ----------------------------------------------------------------------------------------


def simulated_products(config: Simulated) -> ProductMode:
    return ProductMode(Products(_expected("simulated_products", config)))


def _expected(op: str, config: Any) -> Simulated:
    if not isinstance(config, Simulated):
        raise TypeError(f"quant_ops.{op}: expected config to be quant_ops.Simulated, got {config!r}")
    return config


_MODE = "_product_mode"


class SimulatedProducts:
    """What :func:`simulate_products_` returns."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)

    def remove(self) -> None:
        """Makes the model's products ordinary ones again. A copy of the model stays as it is."""
        model = self._model()
        if model is not None and _MODE in model.__dict__:
            model.__class__ = type(model).__bases__[0]
            del model.__dict__[_MODE]


def simulate_products_(model: nn.Module, config: Simulated) -> SimulatedProducts:
    _expected("simulate_products_", config)
    model.__dict__[_MODE] = ProductMode(Products(config), spares_layers=True)
    model.__class__ = _simulating(type(model))
    return SimulatedProducts(model)


@functools.lru_cache(maxsize=None)
def _simulating(cls: type[nn.Module]) -> type[nn.Module]:
    @functools.wraps(cls.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        mode = self.__dict__[_MODE]
        mode.spared = _weights_of_layers(self)
        with mode:
            return cls.forward(self, *args, **kwargs)

    body = {"forward": forward, "__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), body)
