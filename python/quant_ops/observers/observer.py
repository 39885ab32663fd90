"""Observers: statistics of tensors, batch by batch, and from them the range [lo, hi] that a scale covers.

An observer keeps one statistic per row, where a row is a step (``num_steps``) and a channel or group. All state is in buffers, on
the model's device, and is updated by tensor operations alone: no batch waits for the host. Two observers merge into what one would
have seen. A batch that holds NaN or Inf is left out and counted: it changes no statistic. The scale is one for integer codes or for
a floating format; the statistics are the same. This file has the observers that need extremes and means, histogram.py those that
need the distribution.
"""

from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from ..ops import choose_qparams, quant_tensor_forward

# Ranges beyond these are clipped, so that no scale, no zero point and no simulated value overflows in float32.
_WIDEST = {False: 0.999 * torch.finfo(torch.float32).max, True: 0.499 * torch.finfo(torch.float32).max}


class ScalableFormat(Protocol):
    """What an observer needs of a format of :mod:`quant_ops.formats`: values that one scale stretches to a range."""

    @property
    def largest(self) -> float:
        """The largest value at scale 1."""

    def simulate(self, x: Tensor, scale: Tensor, seed: int) -> Tensor:
        """x rounded to the format's values times the scale, in a new tensor; the seed is for formats that round at random."""


class Observer(nn.Module):
    """Base class: the extremes, and the rules for rows, steps, merging and saving.

    Call it with the tensors to observe. ``qparams()`` is scale and zero point by the rules of :func:`choose_qparams`, from the
    range that the subclass chooses; they broadcast to the tensor, or with ``group_size`` to its grid of blocks. ``amax()`` is the
    end of a symmetric range, shaped as the scale.

    Args:
        format: the format to choose a scale for, in place of integer codes: ``amax / format.largest``, and zero point 0.
        qmin, qmax: smallest and largest code, -128 and 127 by default; not with a format.
        asymmetric: the range is [lo, hi] with a zero point; otherwise [-max(-lo, hi), max(-lo, hi)].
        axis: the dimension that keeps a scale of its own for every index (per channel); None for one scale.
        group_size: the last dimension is split into groups of this size, each with a scale of its own.
        num_steps: as many sets of statistics; the call then names the step.
    """

    kinds: ClassVar[dict[str, type["Observer"]]] = {}
    name: ClassVar[str]
    settings: ClassVar[tuple[str, ...]] = ()  # the subclass's own arguments, which are fields of the configs
    live: ClassVar[bool] = False  # cheap enough to choose the scale again in every step of training
    takes_format: ClassVar[bool] = True
    observe = True  # set it to False on an observer to let tensors pass it by

    min: Tensor
    max: Tensor
    count: Tensor
    left_out: Tensor

    def __init_subclass__(cls) -> None:
        if "name" in vars(cls):
            Observer.kinds[cls.name] = cls

    def __init__(
        self,
        *,
        format: ScalableFormat | None = None,
        qmin: int | None = None,
        qmax: int | None = None,
        asymmetric: bool = False,
        axis: int | None = None,
        group_size: int | None = None,
        num_steps: int = 1,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if format is not None:
            self._check_format(format, codes=qmin is not None or qmax is not None, asymmetric=asymmetric)
        self.format, self.asymmetric = format, asymmetric
        self.qmin, self.qmax = -128 if qmin is None else qmin, 127 if qmax is None else qmax
        self.axis, self.group_size, self.num_steps = axis, group_size, num_steps
        for name in ("count", "left_out"):  # batches observed, and batches that held NaN or Inf
            self.register_buffer(name, torch.zeros(num_steps, dtype=torch.int64, device=device))
        self._allocate((0,) if axis is not None or group_size is not None else (), device)

    def _check_format(self, format: ScalableFormat, codes: bool, asymmetric: bool) -> None:
        start = "quant_ops.observers: expected"
        if not self.takes_format:
            raise ValueError(f"{start} an observer with a rule for formats, such as mse, got {self.name} with {format}")
        if codes or asymmetric:
            given = "qmin or qmax" if codes else "asymmetric=True"
            raise ValueError(f"{start} codes from qmin to qmax or a format, which is symmetric, got {given} with {format}")
        try:
            format.simulate(torch.zeros(1), torch.ones(1), seed=0)
        except (AttributeError, NotImplementedError, TypeError, ValueError) as reason:
            raise ValueError(f"{start} a format with one scale for all values, got {format}") from reason

    # ---- state -----------------------------------------------------------------------------------------------------------

    def _state(self) -> dict[str, tuple[tuple[int, ...], float, torch.dtype]]:
        """For every statistic: the shape of one row's value, its initial value, and its dtype."""
        return {"min": ((), float("inf"), torch.float32), "max": ((), float("-inf"), torch.float32)}

    def _allocate(self, grid: tuple[int, ...], device: torch.device | str | None) -> None:
        with torch.inference_mode(False):  # its tensors could not be updated outside of inference mode
            for name, (shape, start, dtype) in self._state().items():
                self.register_buffer(name, torch.full((self.num_steps, *grid, *shape), start, dtype=dtype, device=device))

    @property
    def _grid(self) -> tuple[int, ...]:
        return tuple(self.min.shape[1:])

    def reset(self) -> None:
        """Forgets everything."""
        self.count.zero_()
        self.left_out.zero_()
        for name, (_, start, _) in self._state().items():
            self._buffers[name].fill_(start)  # type: ignore[union-attr]

    def _get(self, name: str, step: Tensor | None) -> Tensor:
        """The rows of a step, ``(1, *grid, ...)``."""
        buffer = self._buffers[name]
        assert buffer is not None
        return buffer if step is None else buffer.index_select(0, step)

    def _set(self, name: str, step: Tensor | None, value: Tensor) -> None:
        buffer = self._buffers[name]
        assert buffer is not None
        if step is None:
            buffer.copy_(value)
        else:
            buffer.index_copy_(0, step.reshape(1), value)

    def _apply(self, fn: Any, recurse: bool = True) -> "Observer":
        """Moves; but .half() and friends leave the statistics in the precision that they need."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored = state_dict.get(prefix + "min")
        if stored is not None and self._grid == (0,) and stored.dim() > 1:  # the number of channels came with the first batch
            self._allocate(tuple(stored.shape[1:]), self.count.device)
        if prefix + "count" in state_dict:  # a state of version 0.1 before there was this count
            state_dict.setdefault(prefix + "left_out", torch.zeros_like(state_dict[prefix + "count"]))
        super()._load_from_state_dict(state_dict, prefix, *args)

    # ---- observing -------------------------------------------------------------------------------------------------------

    def _rows(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """The tensor as (rows, elements), and the shape in which the rows' scales broadcast to it or to its blocks."""
        if self.axis is None and self.group_size is None:
            if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                x = x.permute(0, 2, 3, 1)  # in the order of memory, so that flattening is no copy
            return x.reshape(1, -1), ()
        dims = x.dim()
        if self.axis is not None and not -dims <= self.axis < dims:
            raise ValueError(f"quant_ops.observers: expected axis in [{-dims}, {dims - 1}], got {self.axis}")
        kept = [] if self.axis is None else [self.axis % dims]
        shape = [size if d in kept else 1 for d, size in enumerate(x.shape)]
        if self.group_size is not None:
            if kept == [dims - 1] or dims == 0 or x.shape[-1] % self.group_size:
                raise ValueError(
                    f"quant_ops.observers: expected group_size to divide the last dimension, and axis to be another, got "
                    f"group_size {self.group_size}, axis {self.axis} and shape {tuple(x.shape)}"
                )
            x = x.unflatten(-1, (-1, self.group_size))
            shape[-1] = x.shape[-2]
            kept.append(dims - 1)
        reduced = [d for d in range(x.dim()) if d not in kept]
        rows = x.permute(*kept, *reduced).reshape([x.shape[d] for d in kept] + [-1]).flatten(0, -2)
        return rows, tuple(shape)

    def forward(self, x: Tensor, step: Tensor | None = None) -> Tensor:
        """Observes a tensor and returns it. ``step``: 0-dim, integer, on the device; needed with ``num_steps > 1``.

        A tensor that holds NaN or Inf is counted in ``left_out`` and changes nothing else. While ``observe`` is False, nothing
        changes at all.
        """
        if not self.observe or x.numel() == 0:
            return x
        if self.num_steps == 1:
            step = None
        elif step is None:
            raise ValueError(f"quant_ops.observers: expected a step with num_steps={self.num_steps}, got None")
        with torch.no_grad():
            rows, grid = self._rows(x.detach())
            if grid != self._grid:
                if self._grid != (0,):
                    raise ValueError(f"quant_ops.observers: expected scales of shape {self._grid} as before, got {grid}")
                self._allocate(grid, self.count.device)
            lo, hi = (e.reshape(1) for e in rows.aminmax()) if rows.shape[0] == 1 else rows.aminmax(dim=1)
            lo, hi = lo.float().reshape(1, *grid), hi.float().reshape(1, *grid)
            finite = (lo.isfinite() & hi.isfinite()).all()  # NaN and Inf both show in the extremes
            updated = self._accumulated(rows, lo, hi, step)
            updated["min"] = torch.minimum(self._get("min", step), lo)
            updated["max"] = torch.maximum(self._get("max", step), hi)
            updated["count"] = self._get("count", step) + 1
            for name, value in updated.items():
                self._set(name, step, torch.where(finite, value, self._get(name, step)))
            self._set("left_out", step, self._get("left_out", step) + ~finite)
        return x

    def _accumulated(self, rows: Tensor, lo: Tensor, hi: Tensor, step: Tensor | None) -> dict[str, Tensor]:
        """The subclass's statistics with a batch added; what it gives for a batch that is not finite is not used."""
        return {}

    # ---- choosing the range ----------------------------------------------------------------------------------------------

    @property
    def empty(self) -> bool:
        """Whether nothing has been observed. Waits for the device."""
        return not bool(self.count.any())

    @property
    def only_zeros(self) -> bool:
        """Whether nothing but zeros has been observed, or nothing at all. Waits for the device."""
        return not bool((self.min < 0).any() | (self.max > 0).any())

    def unseen_steps(self) -> list[int]:
        """The steps without data, which take the widest range of the others. Waits for the device."""
        return (self.count == 0).nonzero().flatten().tolist()

    @property
    def batches_left_out(self) -> int:
        """How many batches held NaN or Inf and were not observed. Waits for the device."""
        return int(self.left_out.sum())

    def _range(self) -> tuple[Tensor, Tensor]:
        """lo and hi of every row, shaped as ``min``; rows without data may hold anything."""
        raise NotImplementedError

    def _filled_range(self) -> tuple[Tensor, Tensor]:
        """:meth:`_range`, where steps without data have the widest range of the others; shaped as the scale."""
        lo, hi = self._range()
        if self.num_steps > 1:
            seen = (self.count > 0).reshape(-1, *[1] * (lo.dim() - 1))
            lo = torch.where(seen, lo, torch.where(seen, lo, float("inf")).amin(0))
            hi = torch.where(seen, hi, torch.where(seen, hi, float("-inf")).amax(0))
            return lo, hi
        return lo[0], hi[0]

    def live_qparams(self) -> tuple[Tensor, Tensor]:
        """:meth:`qparams` without a look at the values: NaN where nothing finite has been observed."""
        lo, hi = self._filled_range()
        scale, zero_point = self._choose(lo.flatten(), hi.flatten())
        return scale.reshape(lo.shape), zero_point.reshape(lo.shape)

    def _clipped_range(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        widest = _WIDEST[self.asymmetric]
        return lo.clamp(min=-widest), hi.clamp(max=widest)

    def _choose(self, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of every range, with a last dimension of 1."""
        lo, hi = self._clipped_range(lo, hi)
        if self.format is None:
            return choose_qparams(torch.stack([lo, hi], -1), [-1], self.qmin, self.qmax, self.asymmetric)
        finite = lo.isfinite() & hi.isfinite()
        amax = torch.where(finite, torch.maximum(-lo, hi), float("nan")).unsqueeze(-1)
        scale = amax / torch.full_like(amax, self.format.largest)  # CUDA multiplies by the reciprocal of a number
        limits = torch.finfo(scale.dtype)
        scale = torch.where(amax == 0, 1, scale.clamp(limits.tiny, limits.max))
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def _simulate(self, values: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
        """What the quantizer of the range [lo, hi] makes of the values; a range for each of their rows, or one for all."""
        scale, zero_point = self._choose(lo, hi)
        if self.format is None:
            return quant_tensor_forward(values, scale, zero_point, self.qmin, self.qmax, self.asymmetric)
        return self.format.simulate(values, scale, seed=0)

    def qparams(self) -> tuple[Tensor, Tensor]:
        """float32 scale and int32 zero point, shaped ``grid``, or ``(num_steps, *grid)``; grid is () for one scale.

        A step that was never seen gets the widest range of the others. All zeros: scale 1.

        Raises:
            ValueError: nothing has been observed, or nothing finite.
        """
        self._expect_data("qparams")
        return self.live_qparams()

    def amax(self) -> Tensor:
        """The end of the symmetric range [-amax, amax] that is chosen, in float32, shaped as the scale.

        Raises:
            ValueError: nothing has been observed, or nothing finite; or the range is asymmetric.
        """
        if self.asymmetric:
            raise ValueError("quant_ops.observers: expected a symmetric range, which has an amax, got asymmetric=True")
        self._expect_data("amax")
        lo, hi = self._clipped_range(*self._filled_range())
        return torch.maximum(-lo, hi)

    def _expect_data(self, method: str) -> None:
        if self.empty:
            got = "batches with NaN or Inf alone" if self.batches_left_out else "none"
            raise ValueError(f"quant_ops.observers: expected data before {method}, got {got} in the {self.name} observer")

    # ---- merging ---------------------------------------------------------------------------------------------------------

    def merge_(self, other: "Observer") -> "Observer":
        """Takes in what another observer of the same kind has seen. Returns this one."""
        names = ("format", "qmin", "qmax", "asymmetric", "axis", "group_size", "num_steps")
        if type(self) is not type(other) or any(getattr(self, name) != getattr(other, name) for name in names):
            raise ValueError(f"quant_ops.observers: expected an observer of the same settings to merge, got {self} and {other}")
        if other._grid == (0,):
            return self  # it has seen nothing
        if self._grid == (0,):
            self._allocate(other._grid, self.count.device)
        if self._grid != other._grid:
            raise ValueError(f"quant_ops.observers: expected scales of shape {self._grid} to merge, got {other._grid}")
        self._merge(other)
        self.min.copy_(torch.minimum(self.min, other.min.to(self.min.device)))
        self.max.copy_(torch.maximum(self.max, other.max.to(self.max.device)))
        self.count += other.count.to(self.count.device)
        self.left_out += other.left_out.to(self.count.device)
        return self

    def _merge(self, other: "Observer") -> None:
        """Merges the subclass's statistics; called before the extremes and counts are merged."""

    def extra_repr(self) -> str:
        parts = [f"qmin={self.qmin}, qmax={self.qmax}", "asymmetric" if self.asymmetric else "symmetric"]
        if self.format is not None:
            parts = [f"format={self.format}"]
        for name, default in (("axis", None), ("group_size", None), ("num_steps", 1)):
            if getattr(self, name) != default:
                parts.append(f"{name}={getattr(self, name)}")
        return ", ".join(parts)


class MinMax(Observer):
    """The whole range of all data: nothing is clipped."""

    name = "minmax"
    live = True

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.min, self.max


class EMA(Observer):
    """Exponential moving averages of each batch's extremes: follows data that drift, as in training.

    The order of batches matters. Merged observers average, weighted by their numbers of batches.
    """

    name = "ema"
    settings = ("momentum",)
    live = True

    average_min: Tensor
    average_max: Tensor

    def __init__(self, *, momentum: float = 0.1, **settings: Any) -> None:
        super().__init__(**settings)
        self.momentum = momentum

    def _state(self) -> dict[str, tuple[tuple[int, ...], float, torch.dtype]]:
        average = ((), 0.0, torch.float32)
        return {**super()._state(), "average_min": average, "average_max": average}

    def _accumulated(self, rows: Tensor, lo: Tensor, hi: Tensor, step: Tensor | None) -> dict[str, Tensor]:
        first = (self._get("count", step) == 0).reshape(-1, *[1] * (lo.dim() - 1))
        averages = {}
        for name, value in (("average_min", lo), ("average_max", hi)):
            average = self._get(name, step)
            # halves, so that the difference of two finite values is finite
            moved = average + 2 * self.momentum * (value / 2 - average / 2)
            averages[name] = torch.where(first, value, moved)
        return averages

    def _range(self) -> tuple[Tensor, Tensor]:
        return self.average_min, self.average_max

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, EMA)
        mine, theirs = (o.count.to(self.count.device).reshape(-1, *[1] * len(self._grid)).double() for o in (self, other))
        for name in ("average_min", "average_max"):
            average, others = self._get(name, None), other._get(name, None).to(self.count.device)
            average.copy_((average * mine + others * theirs) / (mine + theirs).clamp(min=1))


class LSQ(Observer):
    """Where learned step sizes start (arXiv 1902.08153): ``scale = 2 * mean(|x|) / sqrt(qmax)``, never beyond the data's range.

    An asymmetric range has no such rule and starts from the extremes; floating formats have none either, and are refused.
    """

    name = "lsq"
    takes_format = False

    magnitude: Tensor
    elements: Tensor

    def _state(self) -> dict[str, tuple[tuple[int, ...], float, torch.dtype]]:
        return {**super()._state(), "magnitude": ((), 0.0, torch.float64), "elements": ((), 0, torch.int64)}

    def _accumulated(self, rows: Tensor, lo: Tensor, hi: Tensor, step: Tensor | None) -> dict[str, Tensor]:
        magnitude = rows.abs().sum(1, dtype=torch.float64)  # in float32 a sum of finite values may be infinite
        return {
            "magnitude": self._get("magnitude", step) + magnitude.reshape(lo.shape),
            "elements": self._get("elements", step) + rows.shape[1],
        }

    def _range(self) -> tuple[Tensor, Tensor]:
        if self.asymmetric:
            return self.min, self.max
        scale = 2 * self.magnitude / self.elements.clamp(min=1) / self.qmax**0.5
        hi = torch.minimum((scale * self.qmax).float(), torch.maximum(-self.min, self.max))
        return -hi, hi

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, LSQ)
        self.magnitude += other.magnitude.to(self.magnitude.device)
        self.elements += other.elements.to(self.elements.device)
