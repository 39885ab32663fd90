"""GPTQ for whole models: the codes of each weight are chosen so that the layer's output on calibration data changes little.

The model is worked through in stages: what comes before its blocks, block after block, and the rest. Read next: gptq_run.py.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._models import Forward
from ..convert.config import Int4WeightOnly, Int8Dynamic, Int8DynamicInt4Weight, Int8Static, Int8WeightOnly, Scheme
from ..convert.prepared import is_sharded
from ..convert.select import Configs, Filter, Places, Survey, family_of, select, settle
from ..nn import QuantizedLayer, show_forms
from .blocks import batches_of
from .gptq_run import GPTQResult, Run
from .layer import Settings

_KINDS: tuple[type[Scheme], ...] = (Int4WeightOnly, Int8WeightOnly, Int8DynamicInt4Weight, Int8Dynamic, Int8Static)
_ORDERS = ("blocks", "layers", "together")
_EVERYTHING: tuple[Filter, ...] = ("*",)

__all__ = ["GPTQResult", "gptq_"]


def gptq_(
    model: nn.Module,
    data: Iterable[Any],
    config: Configs | None = None,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    order: str = "blocks",
    blocks: str | Sequence[str] | None = None,
    forward: Forward | None = None,
    steps: int | None = None,
    include: Sequence[Filter] = _EVERYTHING,
    exclude: Sequence[Filter] = (),
    checkpoint: str | Path | None = None,
) -> GPTQResult:
    """Quantizes the weights of a model's linear layers and convolutions by GPTQ (arXiv 2210.17323), in place.

    The weight's columns are quantized one after the other, and those that follow make good what each one loses on the calibration
    data: equations 2 and 3 of the paper, in the form of its algorithm 1. The layers are those of :func:`quantize_` with the same
    config, and so are their groups; the parameters of a group come from the weight as it is when the group is reached. Embeddings
    multiply nothing and stay float; :func:`quantize_` takes them afterwards.

    The float weights are kept until the call is done: if it is interrupted or refused, the model is as it was.

    Args:
        model: any module, as for :func:`quantize_`. Biases stay as they are.
        data: batches, as for :func:`calibrate`. All are kept, and run more than once; so are the hidden states between blocks.
        config: default ``Int4WeightOnly()``; an ``Int8WeightOnly``, ``Int8DynamicInt4Weight``, ``Int8Dynamic`` or ``Int8Static``
            (one step), or a mapping as for :func:`quantize_`. Scales of an ``Int8Static`` layer's input are observed in the same
            runs.
        block_size: columns whose updates of the columns behind them are made as one product. Changes time, and rounding.
        damping: fraction of the mean of the Hessian's diagonal that is added to it; ten times as much if its factorization fails.
        act_order: columns of the largest inputs first. The parameters of groups are then those of the weight as it is given, so
            that groups stay those of neighbouring columns.
        order: "blocks": the layers of a block at once, and block after block, so that later blocks see quantized inputs. "layers":
            within a block too, those of one input at a time; one run of the block for each. "together": all layers of the model at
            once, from inputs of the float model.
        blocks: the name of the container of the repeated blocks, or names of the blocks; [] takes the model as one block. By
            default they are looked for, and a model without such blocks is taken as one.
        forward, steps: as for :func:`calibrate`.
        include, exclude: as for :func:`quantize_`.
        checkpoint: a folder, to which each finished stage is written. A later call with the same model, data and settings goes on
            from there, and gives the same bits as one that was never interrupted.

    Returns:
        What was converted, what was skipped and why, with the errors of the layers. Layers that no data has reached, such as some
        experts, are rounded to the nearest, and the notes say so; an ``Int8Static`` layer of this kind stays float.

    Raises:
        TypeError: config is of another kind, or data is no iterable of batches.
        ValueError: arguments out of range, no calibration data, no layer that data reaches, NaN or Inf at the input of a layer, a
            Hessian that stays indefinite, ``blocks`` that do not follow one another, or a checkpoint of another call.
    """
    _check("block_size >= 1", isinstance(block_size, int) and block_size >= 1, block_size)
    _check("damping >= 0 and below 10", isinstance(damping, int | float) and 0 <= damping < 10, damping)
    _check(f"order to be one of {_ORDERS}", order in _ORDERS, repr(order))
    model = getattr(model, "_orig_mod", model)  # hooks do not reach into what torch.compile has compiled
    config = Int4WeightOnly() if config is None else config
    family = family_of("gptq_", config)
    places, selected = select("gptq_", model, config, include, exclude, _KINDS)
    result = GPTQResult(**{field.name: getattr(selected, field.name) for field in dataclasses.fields(selected)})
    _leave_out(model, places, result)
    with torch.inference_mode(False):
        batches = batches_of("gptq_", model, data, forward, steps)
        survey = Survey("gptq_", model, family)
        settings = Settings(block_size, float(damping), act_order, order)
        run = Run(model, batches, forward, settings, places, result)
        run.to_the_end(blocks, checkpoint)
    result.kind = show_forms(module.form for module in run.made if isinstance(module, QuantizedLayer))
    settle(model)
    return survey.finish(result)  # type: ignore[return-value]


def _check(relation: str, holds: bool, got: Any) -> None:
    if not holds:
        raise ValueError(f"quant_ops.gptq_: expected {relation}, got {got}")


def _leave_out(model: nn.Module, places: dict[nn.Module, Places], result: GPTQResult) -> None:
    """Takes out the layers that have no columns to quantize, and refuses what cannot be done."""
    for module, place in list(places.items()):
        if isinstance(module, nn.Embedding):
            result.skip(model, module, "an embedding multiplies nothing. quantize_ rounds it to the nearest")
            del places[module]
        elif isinstance(place.config, Int8Static) and place.config.num_steps > 1:
            _check("num_steps=1", False, f"{place.config.num_steps} for layer {place.name!r}. Calibrate steps with prepare_")
        elif is_sharded(module.weight):  # type: ignore[arg-type]
            _check("whole weights", False, f"a sharded one (DTensor) in layer {place.name!r}. Quantize before the model is sharded")
