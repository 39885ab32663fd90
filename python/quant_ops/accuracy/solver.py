"""GPTQ of one weight (arXiv 2210.17323, algorithm 1): the columns are quantized one after the other, and those that are still
floating make good the error of each.

    H = 2/n sum x x^T + damping mean(diag H) I         U = upper Cholesky factor of H^-1
    e_j = (w_j - value(code(w_j))) / U_jj              w_k -= e_j U_jk    for k > j

Within a block of columns the update is made at once, of those behind it when the block is done, as one product. Weights are
(G, R, K): G matrices side by side, those of a grouped convolution. Read next: hessian.py, layer.py.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

Parameters = Callable[[Tensor], tuple[Tensor, Tensor | None]]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that a weight may have: groups of columns, and the codes of one.

    Attributes:
        size: columns that share scales.
        low, high: the smallest and the largest code.
        parameters: scales and zero points, perhaps floating ones, of float32 values (rows, columns of a group); (rows, 1) each.
    """

    size: int
    low: int
    high: int
    parameters: Parameters

    def codes(self, values: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """The nearest codes, as floats; see nn/groups.py for the formulas."""
        if zero_point is None:
            return (values / scale).round().clamp(self.low, self.high)
        if zero_point.is_floating_point():
            least = zero_point + self.low * scale
            return ((values - least) / scale).round().clamp(0, self.high - self.low) + self.low
        return ((values / scale).round() + zero_point).clamp(self.low, self.high)

    def values(self, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
        """What codes stand for."""
        if zero_point is None:
            return codes * scale
        return codes * scale + zero_point if zero_point.is_floating_point() else (codes - zero_point) * scale

    def parameters_of(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Those of one group (G, R, columns): (G, R, 1)."""
        scale, zero_point = self.parameters(weight.flatten(0, 1).float())
        shape = (*weight.shape[:2], 1)
        return scale.reshape(shape), None if zero_point is None else zero_point.reshape(shape)


@dataclasses.dataclass
class Solution:
    """Codes (G, R, K), int8, with scales and zero points (G, R, groups)."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def values(self, grid: Grid, dtype: torch.dtype) -> Tensor:
        """(G, R, K)."""
        column = torch.arange(self.codes.shape[2], device=self.codes.device) // grid.size
        zero = None if self.zero_point is None else self.zero_point[..., column]
        return grid.values(self.codes.to(dtype), self.scale[..., column].to(dtype), zero)


def inverse_factor(hessian: Tensor, damping: float) -> tuple[Tensor, float] | None:
    """The upper Cholesky factors of the inverses of (G, K, K), in float64, and the damping that was needed.

    A column that no input has reached, whose diagonal is 0, gets 1 there. Damping is added to the diagonal as a fraction of its
    mean over the others, and made ten times as large until the factorization succeeds; None if it does not succeed below 10.
    """
    matrix = hessian.double()
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    dead = diagonal == 0
    mean = diagonal.sum(1, keepdim=True) / (~dead).sum(1, keepdim=True).clamp(min=1)
    if not torch.isfinite(mean).all():
        return None
    while damping < 10:
        damped = matrix.clone()
        damped.diagonal(dim1=1, dim2=2).copy_(torch.where(dead, 1.0, diagonal + damping * mean))
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any() and torch.isfinite(upper).all():
                return upper, damping
        damping = 10 * damping or 0.01
    return None


def nearest(weight: Tensor, grid: Grid) -> Solution:
    """Every group rounded by itself."""
    parts = weight.split(grid.size, dim=2)
    codes, scales, zeros = [], [], []
    for part in parts:
        scale, zero = grid.parameters_of(part)
        codes.append(grid.codes(part, scale.to(part.dtype), zero).to(torch.int8))
        scales.append(scale)
        zeros.append(zero)
    has_zeros = all(zero is not None for zero in zeros)
    return Solution(torch.cat(codes, 2), torch.cat(scales, 2), torch.cat(zeros, 2) if has_zeros else None)  # type: ignore[arg-type]


def solve(weight: Tensor, factor: Tensor, grid: Grid, block_size: int, order: Tensor | None = None) -> Solution:
    """GPTQ's codes.

    Args:
        weight: (G, R, K), in the dtype of the computation; overwritten.
        factor: (G, K, K), of :func:`inverse_factor`; with ``order`` of the Hessian whose rows and columns are in that order.
        block_size: columns whose updates of the columns behind them are made together.
        order: (G, K), the columns in the order in which they are quantized. Groups stay those of neighbouring columns, and their
            parameters are then those of the weight as it is given. Otherwise each group's are those of the weight as it is when the
            first of its columns is reached.
    """
    columns = weight.shape[2]
    static = None
    if order is not None:
        static = nearest(weight, grid)
        weight = _permuted(weight, order)
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales, zeros = list[Tensor](), list[Tensor | None]()
    start = 0
    while start < columns:
        end = _block_end(start, columns, block_size, columns if static is not None else grid.size)
        block = weight[..., start:end].transpose(1, 2).contiguous()  # (G, columns, R): what is updated together lies together
        done = torch.empty(block.shape, dtype=torch.int8, device=weight.device)
        for i in range(end - start):
            j = start + i
            if static is not None:
                assert order is not None
                scale, zero = _of_column(static, order[:, j] // grid.size, weight.dtype)
            elif j % grid.size == 0:
                group = weight[..., j : j + grid.size] if i == 0 else block[:, i : i + grid.size].transpose(1, 2)
                found, zero = grid.parameters_of(group)
                scales.append(found)
                zeros.append(zero)
                scale, zero = found[..., 0].to(weight.dtype), None if zero is None else zero[..., 0]
            column = block[:, i]
            code = grid.codes(column, scale, zero)
            done[:, i] = code
            error = (column - grid.values(code, scale, zero)) / factor[:, j, j, None]
            block[:, i:].baddbmm_(factor[:, j, j:end, None], error[:, None], alpha=-1)
            block[:, i] = error  # the column itself is done with
        weight[..., end:].baddbmm_(block.transpose(1, 2), factor[:, start:end, end:], alpha=-1)
        codes[..., start:end] = done.transpose(1, 2)
        start = end
    if static is not None:
        assert order is not None
        return Solution(
            torch.empty_like(codes).scatter_(2, order[:, None].expand_as(codes), codes), static.scale, static.zero_point
        )
    has_zeros = all(zero is not None for zero in zeros)
    return Solution(codes, torch.cat(scales, 2), torch.cat(zeros, 2) if has_zeros else None)  # type: ignore[arg-type]


def _of_column(solution: Solution, group: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points (G, R) of a column of these groups (G,)."""
    place = group[:, None, None].expand(-1, solution.scale.shape[1], 1)
    zero = None if solution.zero_point is None else solution.zero_point.gather(2, place)[..., 0]
    return solution.scale.gather(2, place)[..., 0].to(dtype), zero


def _block_end(start: int, columns: int, block_size: int, group_size: int) -> int:
    """Where the block of columns ends: before a group that it does not hold whole, whose parameters need the block's updates."""
    end = min(start + block_size, columns)
    cut = end // group_size * group_size
    return cut if end < columns and cut > start else end


def _permuted(weight: Tensor, order: Tensor) -> Tensor:
    return weight.gather(2, order[:, None].expand_as(weight))


def permuted_hessian(hessian: Tensor, order: Tensor) -> Tensor:
    """Rows and columns in this order."""
    rows = hessian.gather(1, order[:, :, None].expand_as(hessian))
    return rows.gather(2, order[:, None].expand_as(rows))


def relative_errors(weight: Tensor, others: list[Tensor], hessian: Tensor) -> list[float]:
    """What each of these weights loses of the output: the sum of squares of (weight - other) x over that of weight x.

    In float32, which is enough for sums of squares.
    """
    hessian = hessian.float()

    def energy(matrix: Tensor) -> float:
        return float(((matrix @ hessian) * matrix).sum(dtype=torch.float64))

    whole = energy(weight.float())
    return [energy((weight - other).float()) / whole if whole > 0 else 0.0 for other in others]
