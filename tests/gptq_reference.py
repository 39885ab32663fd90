"""GPTQ column by column in float64, straight from the paper (arXiv 2210.17323, equations 2 and 3).

The inverse of the Hessian is that of the remaining columns, computed anew for each: no Cholesky factor, no blocks of updates.
Scales are float32, since layers hold them so; they come from the weight as it is when the first column of a group is reached.
"""

import torch

import quant_ops as qo


def parameters(w, bits, kind):
    """Scale and zero point of each row of w, as the layers choose them (tests/test_nn_weight_only.py holds them to that)."""
    w = w.float()
    high = 2 ** (bits - 1) - 1
    low = -high - 1
    if kind == "float":
        least, most = w.amin(1), w.amax(1)
        scale = (most - least) / (high - low)
        return scale, least - low * scale
    if kind == "int":
        scale, zero = qo.choose_qparams(w, [1], low, high, asymmetric=True)
        return scale[:, 0], zero[:, 0]
    amax = w.abs().amax(1)
    scale = amax / 7.5 if (bits, kind) == (4, "symmetric") else amax / high
    return torch.where(amax == 0, 1.0, scale), torch.zeros(len(w))


def code(w, scale, zero, bits, kind):
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if kind == "narrow" or (bits, kind) == (8, "symmetric"):
        low = -high
    scale, zero = scale.double(), zero.double()
    if kind == "float":
        return ((w - (zero + low * scale)) / scale).round().clamp(0, high - low) + low
    return ((w / scale).round() + zero).clamp(low, high)


def value(q, scale, zero, kind):
    return q * scale.double() + zero.double() if kind == "float" else (q - zero.double()) * scale.double()


def damped(hessian, damping):
    """With 1 for columns that no input reaches, and a fraction of the mean of the others added."""
    diagonal = hessian.diagonal()
    dead = diagonal == 0
    added = torch.where(dead, 1.0, damping * diagonal[~dead].mean())
    return hessian + torch.diag(added), dead


def gptq(weight, x, bits, group, kind, damping=0.01, act_order=False):
    """Codes, scales and zero points of weight (N, K) for inputs x (n, K); ``group`` columns share them."""
    w, x = weight.double().clone(), x.double()
    hessian, dead = damped(2 * x.T @ x / len(x), damping)
    w[:, dead] = 0
    n, k = w.shape
    groups = [range(start, min(start + group, k)) for start in range(0, k, group)]
    scales, zeros, codes = [None] * len(groups), [None] * len(groups), torch.zeros(n, k, dtype=torch.int8)
    order = list(range(k))
    if act_order:
        order.sort(key=lambda j: -(2 * (x[:, j] ** 2).mean()).item())
        for g, columns in enumerate(groups):
            scales[g], zeros[g] = parameters(w[:, columns], bits, kind)
    remaining = order[:]
    for j in order:
        g = j // group
        if scales[g] is None:
            scales[g], zeros[g] = parameters(w[:, groups[g]], bits, kind)
        inverse = torch.linalg.inv(hessian[remaining][:, remaining])  # of the columns that are still floating
        q = code(w[:, j], scales[g], zeros[g], bits, kind)
        place = remaining.index(j)
        w[:, remaining] -= (w[:, j] - value(q, scales[g], zeros[g], kind))[:, None] / inverse[place, place] * inverse[place]
        codes[:, j] = q.to(torch.int8)
        remaining.remove(j)
    return codes, torch.stack(scales, 1), torch.stack(zeros, 1)
