"""torchao's quantizers of int4 weights: rounded as they are, or by GPTQ with recorded inputs. They change the model in place."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

import quant_ops as qo

from .._eval import MultiInput

__all__ = [
    "Int4WeightOnlyGPTQQuantizer",
    "Int4WeightOnlyQuantizer",
    "Int8DynActInt4WeightGPTQQuantizer",
    "Int8DynActInt4WeightQuantizer",
]


class _Int4Quantizer:
    """What they share: the size of groups. Layers keep the dtype of their input, and any number of features has groups."""

    def __init__(self, groupsize: int) -> None:
        if groupsize not in (32, 64, 128, 256):
            raise ValueError(f"quant_ops.{type(self).__name__}: expected groupsize 32, 64, 128 or 256, got {groupsize!r}")
        self.groupsize = groupsize


class Int8DynActInt4WeightQuantizer(_Int4Quantizer):
    """Symmetric int4 weights in groups, and inputs quantized by rows with a zero point; products of integers are exact.

    Args:
        groupsize: 32, 64, 128 or 256.
        padding_allowed, precision, scales_precision: accepted and ignored.

    Raises:
        ValueError: another group size.
    """

    def __init__(
        self,
        groupsize: int = 256,
        padding_allowed: bool = False,
        precision: torch.dtype = torch.float32,
        scales_precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(groupsize)

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Replaces the linear layers, in place, and returns the model."""
        from .quant_api import change, get_apply_8da4w_quant

        change(model, get_apply_8da4w_quant(self.groupsize))
        return model


class Int4WeightOnlyQuantizer(_Int4Quantizer):
    """int4 weights in groups with floating zero points.

    Args:
        groupsize: 32, 64, 128 or 256.
        padding_allowed, inner_k_tiles, device: accepted and ignored; the model stays where it is.

    Raises:
        ValueError: another group size.
    """

    def __init__(
        self, groupsize: int = 256, padding_allowed: bool = True, inner_k_tiles: int | None = 8, device: Any = None
    ) -> None:
        super().__init__(groupsize)

    def quantize(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """Replaces the linear layers, in place, and returns the model."""
        from .quant_api import change_linear_weights_to_int4_woqtensors

        change_linear_weights_to_int4_woqtensors(model, self.groupsize)
        return model


class _GPTQQuantizer(_Int4Quantizer):
    def __init__(self, blocksize: int, percdamp: float, groupsize: int) -> None:
        super().__init__(groupsize)
        self.blocksize, self.percdamp = blocksize, percdamp

    def _config(self) -> Any:
        raise NotImplementedError

    def quantize(self, model: nn.Module, inputs: Any, **kwargs: Any) -> nn.Module:
        """Replaces the linear layers, in place, and returns the model.

        Args:
            inputs: what ``InputRecorder.get_inputs()`` gives, or a list of tuples of tensors, each the model's arguments.
            kwargs: of ``quant_ops.gptq_``: order, act_order, ...

        Raises:
            ValueError: no inputs, and as ``quant_ops.gptq_``.
        """
        qo.gptq_(
            model,
            batches_of(type(self).__name__, inputs),
            self._config(),
            block_size=self.blocksize,
            damping=self.percdamp,
            include=[nn.Linear],
            **kwargs,
        )
        return model


def batches_of(op: str, inputs: Any) -> list[tuple[Any, ...]]:
    """One tuple of arguments for each call of the model."""
    if not isinstance(inputs, Iterable) or isinstance(inputs, torch.Tensor):
        got = type(inputs).__name__
        raise ValueError(
            f"quant_ops.{op}: expected inputs of InputRecorder.get_inputs(), or a list of tuples of tensors, got {got}"
        )
    inputs = list(inputs)
    if inputs and all(isinstance(one, MultiInput) for one in inputs):
        batches = list(zip(*(one.values for one in inputs), strict=True))
    else:
        batches = [tuple(one) if isinstance(one, tuple | list) else (one,) for one in inputs]
    if not batches:
        raise ValueError(f"quant_ops.{op}: expected inputs to calibrate with, got none. Record some with InputRecorder.")
    return batches


class Int4WeightOnlyGPTQQuantizer(_GPTQQuantizer):
    """int4 weights in groups with floating zero points, chosen by GPTQ.

    Args:
        blocksize: columns whose updates are applied together.
        percdamp: damping, as a share of the mean of the Hessian's diagonal.
        groupsize: 32, 64, 128 or 256.
        inner_k_tiles, padding_allowed, device: accepted and ignored; the model stays where it is.

    Raises:
        ValueError: another group size.
    """

    def __init__(
        self,
        blocksize: int,
        percdamp: float,
        groupsize: int,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
        device: Any = None,
    ) -> None:
        super().__init__(blocksize, percdamp, groupsize)

    def _config(self) -> Any:
        return qo.Int4WeightOnly(group_size=self.groupsize, zero_point="float")


class Int8DynActInt4WeightGPTQQuantizer(_GPTQQuantizer):
    """Symmetric int4 weights in groups, chosen by GPTQ, and inputs quantized by rows with a zero point.

    Args:
        blocksize, percdamp, groupsize: as for Int4WeightOnlyGPTQQuantizer.
        inner_k_tiles, padding_allowed, precision: accepted and ignored.

    Raises:
        ValueError: another group size.
    """

    def __init__(
        self,
        blocksize: int,
        percdamp: float,
        groupsize: int,
        inner_k_tiles: int = 8,
        padding_allowed: bool = True,
        precision: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(blocksize, percdamp, groupsize)

    def _config(self) -> Any:
        return qo.Int8DynamicInt4Weight(group_size=self.groupsize)
