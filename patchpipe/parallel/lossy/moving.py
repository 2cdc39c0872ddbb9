"""Rows that are renewed now and then, each at its own time, and shown where they will be in between."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpipe.stage.keys.forecast import SEQUENCE, WORTH


class MovingRows:
    """Rows of one layer as they last came, and how fast each moves with the noise level.

    Args:
        forecast: Whether rows are shown where they will be, instead of as they were.
    """

    def __init__(self, forecast: bool) -> None:
        self._forecast = forecast
        self._last: Tensor | None = None
        self._rate: Tensor | None = None  # change for a unit of the noise level, between the last two times
        self._level: Tensor | None = None  # at which each row came last, [batch, 1, rows, 1]

    @property
    def bytes(self) -> int:
        """Memory of the rows and their rates."""
        return sum(own.nbytes for own in (self._last, self._rate, self._level) if own is not None)

    def move(self, device: torch.device) -> None:
        """Takes all of it to another device."""
        self._last, self._rate, self._level = (
            None if own is None else own.to(device) for own in (self._last, self._rate, self._level)
        )

    def fill(self, fresh: Tensor, level: float) -> None:
        """Takes over every row.

        Args:
            fresh: The rows ``[batch, heads, rows, channels]``.
            level: The noise level.
        """
        if self._last is not None:
            every = torch.arange(fresh.shape[SEQUENCE], device=fresh.device).expand(fresh.shape[0], -1)
            self.put(every, fresh, level)
            return
        self._last = fresh.clone(memory_format=torch.contiguous_format)
        if self._forecast:
            self._rate = torch.zeros_like(self._last)
            self._level = fresh.new_full((fresh.shape[0], 1, fresh.shape[SEQUENCE], 1), level, dtype=torch.float64)

    def put(self, index: Tensor, fresh: Tensor, level: float) -> None:
        """Takes over some rows.

        Args:
            index: Which ones, ``[batch, some]``.
            fresh: These, ``[batch, heads, some, channels]``.
            level: The noise level.
        """
        assert self._last is not None
        at = index[:, None, :, None]
        where = at.expand(-1, fresh.shape[1], -1, fresh.shape[3])
        if self._rate is not None and self._level is not None:
            step = (level - self._level.gather(SEQUENCE, at)).to(fresh.dtype)
            rate = (fresh - self._last.gather(SEQUENCE, where)) / step.masked_fill(step == 0, 1.0)
            again = self._rate.gather(SEQUENCE, where)  # a level that comes twice tells nothing of the way
            self._rate.scatter_(SEQUENCE, where, torch.where(step == 0, again, rate))
            self._level.scatter_(SEQUENCE, at, level)
        self._last.scatter_(SEQUENCE, where, fresh)

    def worth(self, index: Tensor | None, true: Tensor, level: float) -> Tensor | None:
        """In which heads ``[batch, heads, 1, 1]`` a forecast explains how rows have moved that are known.

        Where a scheduler adds fresh noise, the last change says nothing of the next one. Sums are made in float64, so
        that their order does not decide.

        Args:
            index: The rows that are known, ``[batch, some]``; ``None`` for all.
            true: What they are at this level, ``[batch, heads, some, channels]``.
            level: The noise level.
        """
        if self._rate is None or self._level is None:
            return None
        assert self._last is not None
        last, rate, ahead = self._last, self._rate, (level - self._level).to(true.dtype)
        if index is not None:
            at = index[:, None, :, None]
            where = at.expand(-1, true.shape[1], -1, true.shape[3])
            last, rate, ahead = (own.gather(SEQUENCE, to) for own, to in ((last, where), (rate, where), (ahead, at)))
        change, came = rate * ahead, true - last
        met, size = ((change * other).sum((2, 3), keepdim=True, dtype=torch.float64) for other in (came, change))
        return met > WORTH * size

    def shown(self, level: float, worth: Tensor | None) -> Tensor:
        """Every row, as far on as the noise level has gone since it came; not to be written to.

        Args:
            level: The noise level.
            worth: In which heads; see ``worth``.
        """
        assert self._last is not None
        if self._rate is None or self._level is None or worth is None:
            return self._last
        ahead = (level - self._level).to(self._rate.dtype)
        return torch.addcmul(self._last, self._rate, torch.where(worth, ahead, 0.0))
