"""The passes that a forecast makes over keys and values: in torch's operations, or fused where Triton runs.

What both do is told in ``stage.keys.forecast``. In torch each operation reads and writes the rows anew, some twenty
times for a patch. Fused they are read once and written once, and the host starts one kernel instead of twenty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

LEVELS = 126  # of eight bits with a sign; scales are rounded, in bfloat16 by so much that 127 could come to 128


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


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each head ``[batch, heads, 1, 1]``."""
    return (one * other).sum((2, 3), keepdim=True, dtype=torch.float64)
