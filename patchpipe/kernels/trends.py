"""The passes that a forecast makes over keys and values: in torch's operations, or fused where Triton runs.

What both do is told in ``stage.keys.forecast``. In torch each operation reads and writes the rows anew, some twenty
times for a patch. Fused they are read once and written once, and the host starts one kernel instead of twenty.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

LEVELS = 126  # of eight bits with a sign; scales are rounded, in bfloat16 by so much that 127 could come to 128
ALIKE = 0.03  # of the largest value: two ways in 16 bits and eight may differ by this much

logger = logging.getLogger("patchpipe")


@dataclass(frozen=True)
class Rows:
    """Some rows of one layer's keys or values, as views.

    Attributes:
        kept: What is shown ``[batch, heads, rows, channels]``.
        change: The last change of each, in eight bits.
        scale: What one step of these bits is worth ``[batch, heads, rows, 1]``.
    """

    kept: Tensor
    change: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Sums:
    """Over the rows of each head ``[batch, heads, 1, 1]``, in float64, so that their order does not decide.

    Attributes:
        size: The squares of the change before.
        met: That change times the new one.
        came: The squares of the new one.
    """

    size: Tensor
    met: Tensor
    came: Tensor


@dataclass(frozen=True)
class Passes:
    """How it is done on a device.

    Attributes:
        renew: Puts fresh rows in place of others, and their change; given whether sums are wanted, returns them.
        show: Moves rows on by their change, so far for each head as is given.
        told: For people.
    """

    renew: Callable[[Rows, Tensor, Tensor, Tensor, bool], Sums | None]
    show: Callable[[Rows, Tensor], None]
    told: str


def renew(rows: Rows, fresh: Tensor, ahead: Tensor, again: Tensor, summed: bool) -> Sums | None:
    """Puts fresh rows in place of others, and their change since the last call.

    Args:
        rows: Where they go.
        fresh: The rows ``[batch, heads, rows, channels]``.
        ahead: How far on the others are shown ``[batch, heads, 1, 1]``.
        again: 1 where the noise level is that of the call before, else 0.
        summed: Whether the sums are wanted.
    """
    before = rows.change * rows.scale
    change = torch.addcmul(fresh, before, ahead + again.to(fresh.dtype)).sub_(rows.kept)
    sums = Sums(_dot(before, before), _dot(change, before), _dot(change, change)) if summed else None
    scale = torch.linalg.vector_norm(change, torch.inf, -1, keepdim=True).div_(LEVELS)
    rows.scale.copy_(scale)
    rows.change.copy_(change.div_(scale.masked_fill_(scale == 0, 1.0)).round_())
    rows.kept.copy_(fresh)
    return sums


def show(rows: Rows, ahead: Tensor) -> None:
    """Moves rows on by their change, so far for each head ``[batch, heads, 1, 1]``."""
    rows.kept.addcmul_(rows.change * rows.scale, ahead)


PLAIN = Passes(renew, show, "torch's operations")


@cache
def passes_for(device: torch.device, dtype: torch.dtype) -> Passes:
    """The passes of a device: fused if Triton is there and gives, on a few rows, what torch gives."""
    if device.type != "cuda" or find_spec("triton") is None or dtype is torch.float64:
        return PLAIN
    try:
        from patchpipe.kernels.trends_fused import FUSED

        error = difference(FUSED, device, dtype)
    except Exception as problem:  # of a compiler that is missing, say
        logger.warning("forecasts run in torch's operations, which are slower: Triton fails (%s)", problem)
        return PLAIN
    if not error <= ALIKE:
        logger.warning("forecasts run in torch's operations, which are slower: Triton's are off by %.2g", error)
        return PLAIN
    return FUSED


def difference(passes: Passes, device: torch.device, dtype: torch.dtype, channels: int = 64) -> float:
    """How far passes are from those in torch's operations, as a share of the largest value, after some calls.

    Args:
        passes: What is tried.
        device: Where.
        dtype: Of keys and values.
        channels: Of a head.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4, 2, 3, 40, channels, generator=generator).to(device, dtype)
    found = []
    for each in (PLAIN, passes):
        kept, change = drawn[0].clone(), torch.zeros_like(drawn[0], dtype=torch.int8)
        scale, ahead = kept.new_zeros(2, 3, 40, 1), kept.new_zeros(2, 3, 1, 1)
        again = torch.zeros((), dtype=torch.float64, device=device)
        sums = []
        for fresh in drawn[1:]:
            rows = [Rows(kept[:, :, part], change[:, :, part], scale[:, :, part]) for part in _PARTS]
            sums.append(each.renew(rows[0], fresh[:, :, _PARTS[0]], ahead * 0, again, True))
            ahead = torch.full_like(ahead, 0.75)
            each.show(rows[1], ahead)
            each.renew(rows[1], fresh[:, :, _PARTS[1]], ahead, again + 1, False)
        told = [getattr(one, name).flatten() / drawn[0].numel() for one in sums for name in ("size", "met", "came")]
        found.append(torch.cat([kept.flatten().double(), (change * scale).flatten().double(), *told]))
    return float((found[0] - found[1]).abs().max() / found[0].abs().max())


_PARTS = (slice(0, 17), slice(17, 40))


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each head ``[batch, heads, 1, 1]``."""
    return (one * other).sum((2, 3), keepdim=True, dtype=torch.float64)
