"""torchao's ``autoquant`` over ``quant_ops.autoquant_``, and the times that it knows."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

import quant_ops as qo

from ....autoquant import AUTOQUANT_CACHE

__all__ = ["AUTOQUANT_CACHE", "DEFAULT_CLASS_LIST", "autoquant"]

DEFAULT_CLASS_LIST = (qo.Int8Dynamic(asymmetric=False), qo.Int8WeightOnly())


def autoquant(
    model: nn.Module,
    example_input: Any = None,
    qtensor_class_list: Sequence[Any] = DEFAULT_CLASS_LIST,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
    mode: Any = None,
    manual: bool = False,
    set_inductor_config: bool = True,
    supress_autoquant_errors: bool = True,
    min_sqnr: float | None = None,
    *,
    error_on_unseen: bool = True,
    **kwargs: Any,
) -> nn.Module:
    """Makes each linear layer of a model what is fastest for the shapes that it sees, float included, in place.

    Args:
        model: may be what ``torch.compile`` returned.
        example_input: a tensor, or a tuple or list of arguments. Without it the model's next call decides.
        qtensor_class_list: configs of ``quant_ops``.
        filter_fn: of module and name; by default every nn.Linear.
        manual: ``model.finalize_autoquant()`` decides, after any number of calls.
        min_sqnr: in dB, of each layer's output; by default 20.
        error_on_unseen: False leaves layers float that were never called.
        mode, set_inductor_config, supress_autoquant_errors: accepted and ignored.
        kwargs: of ``quant_ops.autoquant_``: seconds, cache, ...

    Returns:
        The model. Its attribute ``autoquant_result`` has the times and the choices.

    Raises:
        TypeError, ValueError: as ``quant_ops.autoquant_``.
    """
    include = [nn.Linear] if filter_fn is None else [lambda name, module: bool(filter_fn(module, name))]
    settings: dict[str, Any] = {} if min_sqnr is None else {"max_error": 10 ** (-min_sqnr / 10)}
    example = (example_input,) if isinstance(example_input, Tensor) else example_input
    result = qo.autoquant_(
        model,
        None if manual else example,
        candidates=tuple(qtensor_class_list),
        manual=manual,
        error_on_unseen=error_on_unseen,
        include=include,
        **settings,
        **kwargs,
    )
    real: Any = getattr(model, "_orig_mod", model)
    real.autoquant_result = result
    if manual:

        def finalize_autoquant() -> None:
            """Decides by the calls so far."""
            result.finalize()
            del real.finalize_autoquant

        real.finalize_autoquant = finalize_autoquant
        if example is not None:
            model(*example)
    return model
