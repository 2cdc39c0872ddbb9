"""The stale key/value store of one attention layer (PipeFusion, arXiv 2405.14430, section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchpipe.stage.keys.forecast import SEQUENCE, Pace, Trend
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Range, Rows, joined

Entries = tuple[int, int, int]  # of what is kept together: the first, one past the last, and how many there are
FORECAST = 2  # keys and values, not what masks add to them


class LayerStore:
    """Keys and values of the whole sequence, fresh rows written in place over one-step-stale ones.

    Where keys are masked, what the mask adds to their scores is a third tensor, ``[batch, 1 or heads, rows, 1]``, and
    goes wherever the keys go.

    Given the pace of the calls, stale rows are not shown as they were but as a forecast: see ``stage.keys.forecast``.

    Belongs to one layer, one half of a batch, one guidance branch and one request.

    Args:
        rows: The layer's sequence.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._kept: tuple[Tensor, ...] = ()
        self._trends: tuple[Trend, ...] = ()  # of keys and values, where they are forecast
        self._written: list[Range] = []  # rows there are, until the store is whole
        self._whole = False

    def keep(self, *fresh: Tensor, entries: Entries | None = None, pace: Pace | None = None) -> tuple[Tensor, ...]:
        """Takes over what a synchronous step computed.

        Args:
            fresh: Keys and values ``[batch, heads, rows, channels]`` in the model's order, and their column where keys
                are masked.
            entries: Which entries of the batch they belong to; ``None`` for all.
            pace: Of the call, where stale rows are to be forecast.
        """
        ordered = [self.rows.by_cut(rows, SEQUENCE) for rows in fresh]
        start, stop, total = entries or (0, ordered[0].shape[0], ordered[0].shape[0])
        known, everything = self._whole and self._kept[0].shape[0] == total, (start, stop) == (0, total)
        taken_over = everything and not (known and pace is not None)  # else there are rows whose change is to be kept
        if taken_over:
            self._kept = tuple(map(_own, ordered))
        elif not known and start == 0:
            self._kept = tuple(rows.new_empty(total, *rows.shape[1:]) for rows in ordered)
        self._follow(pace)
        if not taken_over:
            self._renew([(0, self.rows.total)], ordered, pace, entries=(start, stop), begins=True, known=known)
        self._whole = self._whole or stop == total
        return fresh

    def write(self, patch: Patch, *fresh: Tensor, pace: Pace | None = None) -> tuple[Tensor, ...]:
        """Puts a patch's fresh rows in their place.

        Args:
            patch: The patch the rows belong to.
            fresh: Keys and values ``[batch, heads, rows, channels]``, with the text rows if the patch carries them,
                and their column where keys are masked.
            pace: Of the call, where stale rows are to be forecast.

        Returns:
            Keys, values and column of every row that exists: fresh for the patches done in this step, one step
            stale for the others, and none for rows no step has computed yet.

        Raises:
            RuntimeError: The rows are not as many as the patch has, or only some steps mask keys.
        """
        self._kept = self._kept or tuple(self._allocate(rows) for rows in fresh)
        self._check(patch, fresh)
        self._follow(pace)
        ranges, begins = self.rows.spans(patch), patch.index == 0
        self._renew(ranges, fresh, pace, begins=begins, known=self._whole)
        if not self._whole:
            self._written = joined([*self._written, *self.rows.ranges(patch)])
            self._whole = self._written == [(0, self.rows.total)]
        return tuple(self._existing(kept) for kept in self._kept)

    def others(self, patch: Patch, *, with_column: bool = False) -> list[tuple[Tensor, ...]]:
        """Keys, values and, where riders are among them, column of the rows that exist outside a patch, as views.

        Args:
            patch: A patch as a whole, not a rank's part of it.
            with_column: Whether rows of the picture alone have their column too.
        """
        if not self._kept:
            return []
        ranges = _without(self._there, self.rows.spans(patch))
        return [tuple(kept[:, :, low:high] for kept in self._seen_of(low, high, with_column)) for low, high in ranges]

    def _seen_of(self, low: int, high: int, with_column: bool) -> tuple[Tensor, ...]:
        """Keys, values and, if riders are among these rows, the column: a mask of nothing costs the fast kernel."""
        if len(self._kept) == FORECAST:
            return self._kept
        start, stop = self.rows.image
        return self._kept[:2] if start <= low and high <= stop and not with_column else self._kept

    @property
    def _there(self) -> list[Range]:
        return [(0, self.rows.total)] if self._whole else self._written

    def rows_of(self, patch: Patch) -> Tensor:
        """A copy of a patch's keys, values and column, in one piece."""
        return torch.cat([self._taken(kept, patch).reshape(-1) for kept in self._kept])

    def expected(self, patch: Patch) -> tuple[int, torch.dtype]:
        """Elements of ``rows_of``, and what they are."""
        return sum(size.numel() for size in self._shapes(patch)), self._kept[0].dtype

    def put(self, patch: Patch, rows: Tensor, pace: Pace | None = None) -> None:
        """Takes over what ``rows_of`` gave on another rank, as if it had been written here.

        Args:
            patch: The patch.
            rows: Its rows.
            pace: Of the call that computed them, where stale rows are to be forecast.
        """
        shapes = self._shapes(patch)
        pieces = rows.split([shape.numel() for shape in shapes])
        fresh = [piece.view(shape) for shape, piece in zip(shapes, pieces, strict=True)]
        self._renew(self.rows.spans(patch), fresh, pace, begins=patch.index == 0, known=True)

    @property
    def bytes(self) -> int:
        """Memory the store holds."""
        return sum(kept.nbytes for kept in self._kept) + sum(trend.bytes for trend in self._trends)

    @property
    def error(self) -> float:
        """Of the forecast of values in the last call, in the first patch of the first entry; see ``Trend.error``."""
        return self._trends[-1].error if self._trends else 0.0

    def move(self, device: torch.device) -> None:
        """Takes all it holds to another device."""
        self._kept = tuple(kept.to(device) for kept in self._kept)
        for trend, kept in zip(self._trends, self._kept, strict=False):
            trend.move(kept)

    def _follow(self, pace: Pace | None) -> None:
        """Keeps the trends of what is kept, where there is to be a forecast."""
        if pace is not None and (not self._trends or self._trends[0].kept is not self._kept[0]):
            self._trends = tuple(map(Trend, self._kept[:FORECAST]))

    def _renew(
        self,
        ranges: Sequence[Range],
        fresh: Sequence[Tensor],
        pace: Pace | None,
        *,
        entries: tuple[int, int] | None = None,
        begins: bool = False,
        known: bool = False,
    ) -> None:
        """Puts fresh rows in their place."""
        if not ranges:  # of segments that ride with another patch
            return
        for at, (kept, rows) in enumerate(zip(self._kept, fresh, strict=True)):
            if pace is not None and at < FORECAST:
                trend = self._trends[at] if entries is None else self._trends[at].entries(*entries)
                trend.renew(ranges, rows, pace, begins=begins, known=known)
                continue
            target = kept if entries is None else kept[slice(*entries)]
            pieces = rows.split([high - low for low, high in ranges], SEQUENCE)
            for (low, high), piece in zip(ranges, pieces, strict=True):
                target.narrow(SEQUENCE, low, high - low).copy_(piece)

    def _allocate(self, rows: Tensor) -> Tensor:
        batch, heads, _, channels = rows.shape
        return rows.new_empty(batch, heads, self.rows.total, channels)

    def _check(self, patch: Patch, fresh: tuple[Tensor, ...]) -> None:
        expected, found = self.rows.count(patch), fresh[0].shape[SEQUENCE]
        if found != expected:
            raise RuntimeError(
                f"patch {patch.index} brought {found} rows to an attention layer whose store "
                f"expects {expected}: the model's plan does not fit this layer"
            )
        if len(fresh) != len(self._kept):
            raise RuntimeError("some calls of a guidance branch mask text rows and some do not: give all a mask")

    def _shapes(self, patch: Patch) -> list[torch.Size]:
        count = self.rows.count(patch)
        return [torch.Size((*kept.shape[:SEQUENCE], count, *kept.shape[SEQUENCE + 1 :])) for kept in self._kept]

    def _taken(self, kept: Tensor, patch: Patch) -> Tensor:
        """The rows that a patch's fresh ones would replace, in the same order."""
        return _rows_in(kept, self.rows.spans(patch))

    def _existing(self, kept: Tensor) -> Tensor:
        return kept if self._whole else _rows_in(kept, self._written)


def again_of(layer: str) -> str:
    """The name under which keys and values are kept that a layer with an IP-Adapter attends to once more."""
    return f"{layer}, again"


LayerStores = dict[str, Any]  # by the layer's name: its ``LayerStore``, or ``PartsStore`` where it attends to nothing


def _own(rows: Tensor) -> Tensor:
    """The tensor itself if it alone uses its memory, else a copy: the store writes into what it keeps."""
    memory = rows.untyped_storage().nbytes()
    return rows if memory == rows.numel() * rows.element_size() else rows.clone()


def _rows_in(kept: Tensor, ranges: list[Range]) -> Tensor:
    """The rows in some ranges: a view, if it is one range."""
    parts = [kept.narrow(SEQUENCE, low, high - low) for low, high in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=SEQUENCE)


def _without(ranges: list[Range], taken: list[Range]) -> list[Range]:
    """What is left of sorted ranges outside others."""
    left = []
    for low, high in ranges:
        for start, stop in taken:
            left.append((low, min(high, start)))
            low = max(low, stop)
        left.append((low, high))
    return [span for span in left if span[0] < span[1]]
