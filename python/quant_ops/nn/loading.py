"""A refused ``load_state_dict`` of a model with quantized layers changes nothing: all is looked at before anything is written.

torch loads module by module and raises at the end. A hook of the model itself comes first. It cannot know whether missing names
will be allowed (``strict``), so those are torch's affair as ever.
"""

from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from .base import QuantizedLayer
from .saving import size_mismatch


def check_loads(model: nn.Module) -> None:
    """Lets ``load_state_dict`` of a model look at all of its quantized layers, and at all shapes, before it writes anything."""
    if all(getattr(hook, "hook", None) is not _refuse_before_loading for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_refuse_before_loading)


def _refuse_before_loading(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    problems = []
    for name, module in model.named_modules(prefix=prefix.removesuffix("."), remove_duplicate=False):
        start = f"{name}." if name else ""
        if isinstance(module, QuantizedLayer):
            problems.append(module.refusal(state_dict, start))
        elif type(module)._load_from_state_dict is nn.Module._load_from_state_dict:  # no other shapes are made to fit
            problems += _size_mismatches(module, state_dict, start)
    if problems := [problem for problem in problems if problem]:
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t" + "\n\t".join(problems))


def _size_mismatches(module: nn.Module, state_dict: dict[str, Any], start: str) -> list[str]:
    """What ``load_state_dict`` would say of a float module's tensors after it had written the others."""
    hooks = module._load_state_dict_pre_hooks.values()
    if any(getattr(hook, "hook", None) is not _refuse_before_loading for hook in hooks):
        return []  # a hook may change the shapes
    own = {**module._parameters, **{k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}}
    return [
        size_mismatch(start + name, state_dict[start + name].shape, tensor.shape)
        for name, tensor in own.items()
        if tensor is not None and not is_lazy(tensor) and isinstance(state_dict.get(start + name), Tensor)
        if state_dict[start + name].shape != tensor.shape and not (tensor.dim() == 0 and state_dict[start + name].shape == (1,))
    ]
