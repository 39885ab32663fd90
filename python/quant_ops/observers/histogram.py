"""Observers that keep the distribution: percentile, mse, histogram, entropy.

The bins are dyadic. A row covers [-2^e, 2^e) with 2H bins of width 2^e / H, where e is the smallest exponent that holds the data.
When e grows by k, 2^k bins become one, exactly: the counts after any number of batches, in any order, in any number of processes,
are those of one histogram of all the data. The range doubles at most once too far, so at least H / 2 bins a side are in use.
"""

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from .observer import Observer, ScalableFormat

_HALF = 2048  # H: at least 8 bins for each of the 128 codes of a sign
_CACHED = 1 << 18  # elements at a time, so that intermediate results stay in the cache
_LOWEST = -100  # exponent of a row without data; 2^(11 + 100) is still a float32


def _coarsen(counts: Tensor, octaves: Tensor) -> Tensor:
    """The counts when the range is 2^octaves as wide: bin i, seen from the middle, goes to floor(i / 2^octaves)."""
    bins = torch.arange(-_HALF, _HALF, device=counts.device)
    return torch.zeros_like(counts).scatter_add_(-1, (bins >> octaves.long().unsqueeze(-1)) + _HALF, counts)


class Distribution(Observer):
    """Base class: the dyadic histogram."""

    widens: ClassVar[bool] = False  # the range of a format may be up to twice that of the data

    counts: Tensor
    exponent: Tensor

    def _state(self) -> dict[str, tuple[tuple[int, ...], float, torch.dtype]]:
        own = {"counts": ((2 * _HALF,), 0, torch.int64), "exponent": ((), _LOWEST, torch.int32)}
        return {**super()._state(), **own}

    def _accumulated(self, rows: Tensor, lo: Tensor, hi: Tensor, step: Tensor | None) -> dict[str, Tensor]:
        before = self._get("exponent", step)
        fitting = torch.frexp(torch.maximum(-lo, hi)).exponent.clamp(_LOWEST, 128)  # 2^fitting > |x|
        exponent = torch.maximum(before, fitting.to(before.dtype))
        counts = _coarsen(self._get("counts", step), exponent - before)
        # a power of two scales exactly, so that every process puts a value into the same bin
        factor = torch.ldexp(torch.ones_like(lo), int(math.log2(_HALF)) - exponent).reshape(-1, 1)
        total = counts.view(-1)
        first = 2 * _HALF * torch.arange(len(rows), device=rows.device).unsqueeze(1) if len(rows) > 1 else None
        on_cpu = rows.device.type == "cpu"
        for part in rows.split(max(1, (_CACHED if on_cpu else 256 * _CACHED) // len(rows)), dim=1):
            bins = (part * factor).floor_().to(torch.int32).add_(_HALF).clamp_(0, 2 * _HALF - 1)
            bins = (bins if first is None else bins + first).flatten()
            if on_cpu:
                total += torch.bincount(bins, minlength=len(total))
            else:  # bincount would wait for the largest bin, to know its result's size
                total.scatter_add_(0, bins.long(), torch.ones_like(total[:1]).expand(len(bins)))
        return {"counts": counts, "exponent": exponent}

    def _merge(self, other: Observer) -> None:
        assert isinstance(other, Distribution)
        theirs = other.exponent.to(self.exponent.device)
        exponent = torch.maximum(self.exponent, theirs)
        counts = _coarsen(self.counts, exponent - self.exponent)
        counts += _coarsen(other.counts.to(counts.device), exponent - theirs)
        self.counts.copy_(counts)
        self.exponent.copy_(exponent)

    def _range(self) -> tuple[Tensor, Tensor]:
        """Searches row by row in blocks, so that thousands of channels need no gigabytes."""
        width = torch.ldexp(torch.ones_like(self.min), self.exponent - int(math.log2(_HALF)))
        parts = [
            self._search(*block)
            for block in zip(
                *(t.flatten(0, self.min.dim() - 1).split(64) for t in (self.counts, width, self.min, self.max)), strict=True
            )
        ]
        lo, hi = (torch.cat(part).float().reshape(self.min.shape) for part in zip(*parts, strict=True))
        lowest, highest = self.min, self.max
        if self.format is not None and self.widens:
            highest = 2 * torch.maximum(-lowest, highest)
            lowest = -highest
        return torch.minimum(torch.maximum(lo, lowest), highest), torch.maximum(torch.minimum(hi, highest), lowest)

    def _search(self, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        """The chosen lo and hi of some rows: counts (rows, 2H), width of a bin, lowest and highest value (rows,)."""
        raise NotImplementedError


def _folded(counts: Tensor) -> Tensor:
    """The histogram of magnitudes, (rows, H)."""
    return counts[:, _HALF:] + counts[:, :_HALF].flip(1)


def _quantile(counts: Tensor, fraction: float) -> Tensor:
    """In bins from the left: where the distribution function reaches the fraction, linear inside of a bin."""
    cumulated = counts.double().cumsum(1)
    target = fraction * cumulated[:, -1:]
    at = torch.searchsorted(cumulated, target).clamp(max=counts.shape[1] - 1)
    inside = counts.gather(1, at).double()
    before = cumulated.gather(1, at) - inside
    return (at + (target - before) / inside.clamp(min=1)).squeeze(1)


class Percentile(Distribution):
    """The range that holds ``percentile`` percent of the magnitudes, or (asymmetric) of the values from either end."""

    name = "percentile"
    settings = ("percentile",)

    def __init__(self, *, percentile: float = 99.99, **settings: Any) -> None:
        super().__init__(**settings)
        self.percentile = percentile

    def _search(self, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        fraction = self.percentile / 100
        if not self.asymmetric:
            top = _quantile(_folded(counts), fraction) * width
            return -top, top
        return (_HALF - _quantile(counts.flip(1), fraction)) * width, (_quantile(counts, fraction) - _HALF) * width


class MSE(Distribution):
    """The range with the least mean squared error, by trying: each candidate's error is that of the real quantizer on the bins.

    Candidates shrink the data's range by up to 2^8 in steps of a sixth of an octave; then, twice, sixteen steps around the best. An
    asymmetric range is searched one end after the other, twice.

    For a format the range also grows by up to an octave, over which its relative precision varies, and the first steps are shorter:
    the error of a few large values rises and falls with each mantissa. Formats of more than 8 bits are finer than the bins, so that
    the search is no better than "minmax".
    """

    name = "mse"
    widens = True

    def _search(self, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt_().float() / width.unsqueeze(1)
        if self.format is None:
            coarse = [-i / 6 for i in range(1, 49)]
            centres = (torch.arange(-_HALF, _HALF, device=counts.device) + 0.5) * width.unsqueeze(1)
        else:
            coarse = [i / 48 for i in range(48, -49, -1)] + [-i / 12 for i in range(13, 97)]
            # those of half bins, since near 0 a format is finer than the bins; beyond the data they would be infinite in a format
            # that does not saturate, and 0 * Inf is NaN
            centres = (torch.arange(-2 * _HALF, 2 * _HALF, device=counts.device) + 0.5) * (width / 2).unsqueeze(1)
            centres = torch.minimum(torch.maximum(centres, lo.unsqueeze(1)), hi.unsqueeze(1))
            share = share.repeat_interleave(2, 1)
        ladders = [[2.0**x for x in coarse], *([2.0 ** (i / fine) for i in range(-8, 9)] for fine in (48, 384))]

        def error(lo: Tensor, hi: Tensor) -> Tensor:
            simulated = self._simulate(centres, lo, hi)
            return simulated.sub_(centres).mul_(share).square_().sum(1)  # in units of bins: nothing overflows

        def shrink(lo: Tensor, hi: Tensor, ratios: list[float], low: bool, high: bool) -> tuple[Tensor, Tensor]:
            best, best_lo, best_hi = error(lo, hi), lo, hi
            for ratio in ratios:
                trial_lo, trial_hi = lo * ratio if low else lo, hi * ratio if high else hi
                found = error(trial_lo, trial_hi)
                better = found < best
                best = torch.where(better, found, best)
                best_lo, best_hi = torch.where(better, trial_lo, best_lo), torch.where(better, trial_hi, best_hi)
            return best_lo, best_hi

        if self.asymmetric:
            lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        else:
            hi = torch.maximum(-lo, hi)
            lo = -hi
        for ratios in ladders:
            if not self.asymmetric:
                lo, hi = shrink(lo, hi, ratios, True, True)
                continue
            for low, high in ((False, True), (True, False)) * 2:
                lo, hi = shrink(lo, hi, ratios, low, high)
        return lo, hi


class Histogram(Distribution):
    """The range with the least L2 error in closed form: ``scale^2 / 12`` for a value inside, its distance for one outside.

    The error of every pair of ends is read off prefix sums, so that the minimum is the global one: all bin edges if symmetric, 128
    edges a side otherwise. For a format, whose values are equally far apart within an octave, a value inside has the mean squared
    error of its octave.
    """

    name = "histogram"
    widens = True

    def _search(self, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        if not self.asymmetric:
            clipped, total = self._clipped(_folded(counts))
            edges = torch.arange(1, _HALF + 1, device=counts.device, dtype=torch.float64)
            if self.format is None:
                rounding = (total[:, :1] - total[:, 1:]) * (edges / self.qmax).square() / 12
            else:
                rounding = self._rounding_error(self.format, total, edges)
                if not _saturates(self.format):
                    clipped = torch.where(total > 0, float("inf"), 0)
            best = (rounding + clipped[:, 1:]).argmin(1) + 1
            return -best * width, best * width
        (above, count_above), (below, count_below) = (
            (t[:, ::16] for t in self._clipped(half)) for half in (counts[:, _HALF:], counts[:, :_HALF].flip(1))
        )
        edges = torch.arange(0, _HALF + 1, 16, device=counts.device, dtype=torch.float64)
        scale = (edges.unsqueeze(1) + edges) / (self.qmax - self.qmin)  # [below, above]
        inside = counts.sum(1).reshape(-1, 1, 1) - count_above.unsqueeze(1) - count_below.unsqueeze(2)
        error = inside * scale.square() / 12 + above.unsqueeze(1) + below.unsqueeze(2)
        best = error.flatten(1).argmin(1)
        low, high = best // len(edges), best % len(edges)
        return -edges[low] * width, edges[high] * width

    @staticmethod
    def _rounding_error(format: ScalableFormat, total: Tensor, edges: Tensor) -> Tensor:
        """For every edge, the summed error of what is inside, when the format's largest value lies on the edge."""
        top = math.ceil(math.log2(format.largest))
        bounds = [0.0, *(2.0**octave for octave in range(top - 12, top)), format.largest]  # what is lower is in bin 0
        even = (torch.arange(4096, device=total.device) + 0.5) / 4096
        sums = total[:, :1] - torch.nn.functional.pad(total, (0, 1))  # values below each edge
        summed, below = torch.zeros_like(total[:, 1:]), torch.zeros_like(total[:, 1:])
        for low, high in itertools.pairwise(bounds):
            values = low + (high - low) * even
            error = (format.simulate(values, torch.ones_like(values[:1]), seed=0) - values).double().square().mean()
            end = edges * (high / format.largest)
            at = end.long()
            up_to = sums[:, at] + (sums[:, at + 1] - sums[:, at]) * (end - at)
            summed += (up_to - below) * error
            below = up_to
        return summed * (edges / format.largest).square()

    @staticmethod
    def _clipped(counts: Tensor) -> tuple[Tensor, Tensor]:
        """For every edge b = 0..H, in bins: the sum of (x - b)^2 over the bins above it, and their count."""
        centres = torch.arange(counts.shape[1], device=counts.device, dtype=torch.float64) + 0.5
        zeroth, first, second = (
            torch.nn.functional.pad((counts * centres**power).flip(1).cumsum(1).flip(1), (0, 1)) for power in range(3)
        )
        edges = torch.arange(counts.shape[1] + 1, device=counts.device, dtype=torch.float64)
        return second - 2 * edges * first + edges.square() * zeroth, zeroth


class Entropy(Distribution):
    """The range whose quantized distribution has the least Kullback-Leibler divergence from the data's, clipped to that range.

    Symmetric: over magnitudes, as TensorRT's calibrator. Asymmetric: one end after the other, twice. The bin of zero takes its
    neighbour's count: exact zeros, as after a ReLU, cost nothing and would hide the rest. The bins inside of a candidate's range
    are spread over the codes, and each code's mass evenly over its occupied bins. The narrowest candidate has as many bins as
    codes.

    For a format, whose values are not equally far apart, a bin has the code to which the format rounds its centre. The narrowest
    candidate has a bin for each code of the top octave, where codes are furthest apart. For a uniform grid that is the rule above,
    which is that of TensorRT (S. Migacz, 8-bit Inference with TensorRT, GTC 2017); below the top octave, codes may share a bin. A
    format that does not saturate keeps the whole range.

    The divergence is no error: it is 0 for a range so narrow that it holds a single occupied bin, and it prefers a clipped range
    for data with few distinct values. So a range counts only if its squared error is at most twice that of the whole range, and
    discrete data (also a few hundred values, from which no density can be told) keep the whole range.
    """

    name = "entropy"

    def _search(self, counts: Tensor, width: Tensor, lo: Tensor, hi: Tensor) -> tuple[Tensor, Tensor]:
        discrete = _discrete(counts).tolist()  # before folding, which puts a value and its negative into neighbouring bins
        counts = counts.double()
        # The bins in use: one that ends at -k * width holds that value, and one that begins at k * width holds this one.
        below = (-lo / width).ceil().clamp(0, _HALF).long()
        above = ((hi / width).floor() + 1).clamp(0, _HALF).long()
        if self.asymmetric:
            counts[:, _HALF] = counts[:, _HALF + 1]
            levels = self.qmax - self.qmin + 1
        else:
            counts = _folded(counts)
            counts[:, 0] = counts[:, 1]
            counts = torch.nn.functional.pad(counts, (_HALF, 0))
            below, above, levels = torch.zeros_like(above), torch.maximum(below, above), self.qmax + 1
        if self.format is not None:
            levels = _levels(self.format)
        found = []
        for row, low, high, whole in zip(counts, below.tolist(), above.tolist(), discrete, strict=True):
            found.append((low, high) if whole else self._best(row, low, high, levels))
        low_ends, high_ends = (torch.tensor(ends, device=width.device) * width for ends in zip(*found, strict=True))
        return (-low_ends, high_ends) if self.asymmetric else (-high_ends, high_ends)

    def _best(self, row: Tensor, below: int, above: int, levels: int) -> tuple[int, int]:
        """How many bins below and above zero to keep, together as many as ``levels`` at least."""
        kept = [below, above]
        longer = 1 if above >= below else 0  # first, for it has the outliers
        sides = (longer, 1 - longer) * 2 if below and above else (longer,)
        candidates = 128 if len(sides) == 1 else 48  # of one search
        allowed = 2 * self._error(row, below, above)
        for side in sides:
            least, most = max(levels - kept[1 - side], 1), kept[side]
            if most < least:
                continue
            trials = [least + (most - least) * (i + 1) // candidates for i in range(candidates)]
            ranges = [(kept[0], trial) if side else (trial, kept[1]) for trial in trials]
            divergences = [_divergence(row, *kept_bins, self._codes(row, *kept_bins, levels)) for kept_bins in ranges]
            for i in sorted(range(candidates), key=divergences.__getitem__):
                if self._error(row, *ranges[i]) <= allowed:
                    kept[side] = trials[i]
                    break
        return kept[0], kept[1]

    def _codes(self, row: Tensor, low: int, high: int, levels: int) -> Tensor:
        """The code of every bin from ``low`` below to ``high`` above zero, counted from 0."""
        bins = torch.arange(low + high, device=row.device)
        if self.format is None:
            return bins * levels // (low + high)
        end = torch.full((), high, dtype=torch.float32, device=row.device)
        return torch.unique(self._simulate(bins + 0.5, -end, end), return_inverse=True)[1]

    def _error(self, row: Tensor, low: int, high: int) -> float:
        """The squared error of the quantizer in bins, when ``low`` below and ``high`` above zero are kept.

        A bin stands for its end nearest to zero: in heavy-tailed data most values lie near 0 in the two bins beside it, and their
        centres would overstate the error of the whole range.
        """
        ends = torch.tensor([-low if self.asymmetric else -high, high], dtype=torch.float32, device=row.device)
        bins = torch.arange(-_HALF, _HALF, device=row.device)
        values = torch.where(bins < 0, bins + 1, bins).float()
        simulated = self._simulate(values, *ends)
        return float((row * simulated.sub_(values).square_()).sum())


def _discrete(counts: Tensor) -> Tensor:
    """Whether most of a row's mass lies in bins without an occupied neighbour: the data have few distinct values."""
    occupied = torch.nn.functional.pad(counts > 0, (1, 1))
    alone = ~(occupied[:, 2:] | occupied[:, :-2])
    return (counts * alone).sum(1) > 0.5 * counts.sum(1)


def _levels(format: ScalableFormat) -> int:
    """How many magnitudes the format would have, were all as far apart as the largest two."""
    values = format.simulate(torch.linspace(0, format.largest, 4097), torch.ones(1), seed=0).unique()
    return round(format.largest / float(values[-1] - values[-2])) + 1


def _saturates(format: ScalableFormat) -> bool:
    """Whether values beyond the format's largest become that, and not infinite or NaN."""
    return bool(format.simulate(torch.full((1,), 2.0), torch.full((1,), 1 / format.largest), seed=0).isfinite())


def _divergence(row: Tensor, low: int, high: int, code: Tensor) -> float:
    """KL(P || Q) of the bins from ``low`` below to ``high`` above the middle; what is clipped counts at the ends of P."""
    inside = row[_HALF - low : _HALF + high]
    clipped = inside.clone()
    clipped[0] += row[: _HALF - low].sum()
    clipped[-1] += row[_HALF + high :].sum()
    mass = torch.zeros(len(row), dtype=row.dtype, device=row.device).index_add_(0, code, inside)
    occupied = torch.zeros_like(mass).index_add_(0, code, (inside > 0).to(row.dtype))
    spread = torch.where(inside > 0, (mass / occupied.clamp(min=1))[code], 0)
    p, q = clipped / clipped.sum(), spread / spread.sum().clamp(min=1)  # nothing inside: all of it is lost
    return float(torch.where(p > 0, p * (p / q.clamp(min=1e-12)).log(), 0).sum())
