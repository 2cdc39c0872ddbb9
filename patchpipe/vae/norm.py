"""Group norms on a strip of rows, with the statistics of the whole picture."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchpipe.vae.hooks import Spread, Undo, override

EXACT = (torch.float32, torch.float64)


def spread_group_norm(norm: nn.GroupNorm, spread: Spread) -> Undo:
    """Lets a group norm use the statistics of all ranks' rows.

    Each rank takes mean and variance of its own elements in two passes, the ranks exchange them with the
    element counts in float64, and all merge them in the same order by Chan's formula. Sums of squares, which
    lose all digits where the mean is large against the deviation, appear nowhere, and every rank holds
    bit-equal statistics after a single exchange of a few hundred bytes.

    Args:
        norm: The module; inputs are of shape (batch, channels, ...), each rank with positions of its own.
        spread: The ranks.

    Returns:
        What takes the hook off.
    """
    whole = norm.forward

    def forward(x: Tensor) -> Tensor:
        if not spread.active:
            return whole(x)
        variance, mean = _merge(spread, *_own_moments(x.unflatten(1, (norm.num_groups, -1))))
        return _normalise(norm, x, mean, variance)

    return override(norm, "forward", forward)


def _own_moments(grouped: Tensor) -> tuple[Tensor, Tensor, int]:
    """Variance and mean of shape (batch, groups) in float64, and the number of elements behind each."""
    count = grouped[0, 0].numel()
    if grouped.is_cuda and grouped.dtype in EXACT:
        variance, mean = torch.var_mean(grouped, dim=tuple(range(2, grouped.dim())), correction=0)
        return variance.cpu().double(), mean.cpu().double(), count
    # One group at a time: four times as fast as var_mean on a CPU, and low precision is widened piecemeal.
    variances, means = [], []
    for part in grouped.unbind(1):
        wide, dims = part if part.dtype in EXACT else part.float(), tuple(range(1, part.dim()))
        mean = wide.mean(dims, keepdim=True)
        variances.append((wide - mean).square_().mean(dims))
        means.append(mean.flatten())
    return torch.stack(variances, 1).cpu().double(), torch.stack(means, 1).cpu().double(), count


def _merge(spread: Spread, variance: Tensor, mean: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Variance and mean over all ranks' elements."""
    mine = torch.stack((variance, mean, torch.full_like(mean, count)))
    ranks = spread.group.size
    variances, means, counts = spread.group.all_gather(mine[None], [1] * ranks, 0).cpu().unbind(1)
    share = counts / counts.sum(0)
    merged = (share * means).sum(0)
    return (share * (variances + (means - merged).square())).sum(0), merged


def _normalise(norm: nn.GroupNorm, x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """``x`` of shape (batch, channels, ...) by statistics of shape (batch, groups).

    With batch and groups folded into the channels this is a batch norm with given statistics: one fused
    pass, one output, float32 arithmetic for half-precision inputs.
    """
    batch, channels = x.shape[:2]
    precision = x.dtype if x.dtype in EXACT else torch.float32

    def per_channel(statistic: Tensor) -> Tensor:
        wide = statistic.to(x.device, precision)
        return wide.repeat_interleave(channels // norm.num_groups, 1).flatten()

    def per_sample(parameter: Tensor | None) -> Tensor | None:
        return None if parameter is None else parameter.to(precision).repeat(batch)

    folded = x.reshape(1, batch * channels, *x.shape[2:])
    weight, bias = per_sample(norm.weight), per_sample(norm.bias)
    return F.batch_norm(folded, per_channel(mean), per_channel(variance), weight, bias, False, 0.0, norm.eps).view(
        x.shape
    )
