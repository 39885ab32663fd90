"""Moving, saving and loading a quantized layer. A refused state_dict changes nothing, and packed weights are in none.

Whatever goes into a state_dict is unpacked first; processes of ``torch.multiprocessing`` share the packed weight. Read first:
state.py; next: loading.py.
"""

from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any, TypeVar

import torch
from torch import Tensor

from .state import NO_STAND_IN, LayerState
from .weight import placeholder

_Self = TypeVar("_Self", bound="SavedState")

_DERIVED = ("_placeholder", "_stand_in", "_kept")  # attributes that are made again instead of being pickled


def _empty(kind: type["SavedState"]) -> "SavedState":
    return kind.__new__(kind)


def _shared(layer: "SavedState") -> tuple[Any, ...]:
    """How ``multiprocessing`` pickles a layer. A plain weight made for the pickle would be gone before the process has started."""
    return _empty, (type(layer),), layer._attributes()


def size_mismatch(key: str, shape: torch.Size, current: torch.Size) -> str:
    """What torch says of a tensor that does not fit."""
    return f"size mismatch for {key}: copying a param with shape {shape} from checkpoint, the shape in current model is {current}."


def is_channels_last(tensor: Tensor) -> bool:
    """Whether a weight or an image lies in channels_last and in no other order."""
    return tensor.dim() == 4 and not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


class SavedState(LayerState):
    """A state that survives being moved, copied, pickled, saved and loaded."""

    _version = 2  # 1: the codes were called weight

    def _apply(self: _Self, fn: Any, recurse: bool = True) -> _Self:
        self._forget_call()
        before = dict(self._buffers)
        # what fn does to a floating weight: another dtype, another memory format
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        small = [2] * len(self._weight_shape)
        probe = fn(torch.empty(small, dtype=self.compute_dtype, device=self.device, memory_format=memory_format))
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self._buffers.items():
            old = before[name]
            if buffer is not None and old is not None and buffer.dtype != old.dtype:
                self._buffers[name] = old.to(buffer.device)  # .half() and friends: scales and bias stay float32
        self.compute_dtype = probe.dtype
        self.channels_last = is_channels_last(probe)
        old_scale = before["weight_scale"]
        if old_scale is not None and old_scale.device != self.device:
            self._placeholder = placeholder(self._weight_shape, self.device)
            self._moved(before, fn)
        return self

    def _moved(self, before: dict[str, Tensor | None], fn: Any) -> None:
        """Brings the weight to the device where fn has brought the other buffers."""
        raise NotImplementedError

    # ---- the state_dict --------------------------------------------------------------------------------------------------

    def saved_shape(self) -> torch.Size:
        """Of ``qweight`` in the state_dict."""
        raise NotImplementedError

    def _saved_codes(self) -> Tensor:
        """``qweight`` in the state_dict."""
        return self.qweight

    def _codes_of(self, saved: Tensor) -> Tensor:
        """The codes of ``qweight`` in a state_dict."""
        return saved

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "qweight"] = self._saved_codes()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def refusal(self, state_dict: Mapping[str, Any], prefix: str) -> str | None:
        """Why this part of a state_dict cannot be loaded, whatever ``strict`` is; None if it can.

        Raises:
            ValueError: scales or zero points that no layer could use.
        """
        layer, dtypes = f"quant_ops.{type(self).__name__}", self.dtypes()
        own = {name: state_dict[prefix + name] for name in (*dtypes, "weight") if prefix + name in state_dict}
        if "weight" in own and "qweight" not in own and own["weight"].dtype == torch.int8:
            own["qweight"] = own.pop("weight")  # written before version 2
        if "weight" in own:
            return (
                f"{layer}: expected {self.form} codes {prefix + 'qweight'!r}, got the float weight {prefix + 'weight'!r}. Load the "
                "float checkpoint into the float model, and quantize that."
            )
        for name, tensor in own.items():
            if not isinstance(tensor, Tensor):
                return f"{layer}: expected {prefix + name!r} to be a Tensor, got {type(tensor).__name__}"
            wanted = dtypes[name]
            if tensor.dtype != wanted and not (tensor.is_floating_point() and wanted.is_floating_point):
                return f"{layer}: expected {prefix + name!r} of dtype {wanted}, got {tensor.dtype}"
            held = self._buffers[name]
            shape = self.saved_shape() if name == "qweight" else held.shape if held is not None else None
            if shape is not None and tensor.shape != shape and not (tensor.numel() == 1 and shape in ((), (1,))):
                return size_mismatch(prefix + name, tensor.shape, shape)
        for name in self._with_codes():
            if "qweight" in own and name not in own:
                return f"{layer}: expected {prefix + name!r} with {prefix + 'qweight'!r}, got the codes alone"
        self._check({**self._buffers, **own})
        return None

    def _with_codes(self) -> tuple[str, ...]:
        """The buffers without which codes have no meaning."""
        return ("weight_scale",)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], strict: bool, *lists: Any
    ) -> None:
        missing_keys, _, error_msgs = lists
        if problem := self.refusal(state_dict, prefix):
            error_msgs.append(problem)
            missing_keys += [prefix + name for name in ("qweight", "weight_scale") if prefix + name not in state_dict]
            return
        self._forget_call()
        old_name, name = prefix + "weight", prefix + "qweight"
        if old_name in state_dict:
            state_dict[name] = state_dict.pop(old_name)
        for buffer, dtype in self.dtypes().items():
            stored, held = state_dict.get(prefix + buffer), self._buffers[buffer]
            if stored is not None and stored.dtype != dtype:
                state_dict[prefix + buffer] = stored = stored.to(dtype)
            if stored is not None:
                state_dict[prefix + buffer] = self._make_room(buffer, stored)
            if held is not None and held is self._buffers[buffer] and held.is_inference() and not torch.is_inference_mode_enabled():
                self._buffers[buffer] = held.clone()  # it could not be written into
        saved, codes = state_dict.pop(name, None), self._buffers["qweight"]
        if saved is None and strict:
            missing_keys.append(name)
        self._buffers["qweight"] = None  # torch would write into it, or assign what is packed first
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *lists)
        self._buffers["qweight"] = codes
        if saved is not None:
            assign = local_metadata.get("assign_to_params_buffers", False)
            self._hold(self._codes_of(saved if assign else saved.to(self.device)), in_place=not assign)
        self._loaded()

    def _make_room(self, name: str, stored: Tensor) -> Tensor:
        """Prepares a buffer for what is about to be loaded into it, which is returned, perhaps in another shape."""
        if name == "input_multiplier" and self._buffers[name] is None:  # a checkpoint says whether there is one
            self._buffers[name] = torch.empty_like(stored, device=self.device)
        return stored

    def _loaded(self) -> None:
        """Called after a state_dict was loaded."""

    # ---- pickles ---------------------------------------------------------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return self._attributes()

    def _attributes(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in _DERIVED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        for name in self.optional:  # that did not exist when the layer was pickled
            self._buffers.setdefault(name, None)
        self._placeholder, self._stand_in = placeholder(self._weight_shape, self.device), NO_STAND_IN

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """To another process of this machine a layer goes as it is, its packed weight in shared memory."""
        super().__init_subclass__(**kwargs)
        ForkingPickler.register(cls, _shared)
