"""The stale key/value store of one attention layer (PipeFusion, arXiv 2405.14430, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Range, Rows, joined

Entries = tuple[int, int, int]  # of what is kept together: the first, one past the last, and how many there are
SEQUENCE = 2  # dim of the rows in [batch, heads, rows, channels]


class LayerStore:
    """Keys and values of the whole sequence, fresh rows written in place over one-step-stale ones.

    Where keys are masked, what the mask adds to their scores is a third tensor, ``[batch, 1 or heads, rows, 1]``, and
    goes wherever the keys go.

    Belongs to one layer, one half of a batch, one guidance branch and one request.

    Args:
        rows: The layer's sequence.
    """

    def __init__(self, rows: Rows) -> None:
        self.rows = rows
        self._kept: tuple[Tensor, ...] = ()
        self._written: list[Range] = []  # rows there are, until the store is whole
        self._whole = False

    def keep(self, *fresh: Tensor, entries: Entries | None = None) -> tuple[Tensor, ...]:
        """Takes over what a synchronous step computed.

        Args:
            fresh: Keys and values ``[batch, heads, rows, channels]`` in the model's order, and their column where keys
                are masked.
            entries: Which entries of the batch they belong to; ``None`` for all.
        """
        self._whole = True
        if entries is None or entries[:2] == (0, entries[2]):
            self._kept = tuple(_own(self.rows.by_cut(rows, SEQUENCE)) for rows in fresh)
            return fresh
        start, stop, total = entries
        if not self._kept or self._kept[0].shape[0] != total:
            self._kept = tuple(rows.new_empty(total, *rows.shape[1:]) for rows in fresh)
        for kept, rows in zip(self._kept, fresh, strict=True):
            kept[start:stop].copy_(self.rows.by_cut(rows, SEQUENCE))
        return fresh

    def write(self, patch: Patch, *fresh: Tensor) -> tuple[Tensor, ...]:
        """Puts a patch's fresh rows in their place.

        Args:
            patch: The patch the rows belong to.
            fresh: Keys and values ``[batch, heads, rows, channels]``, with the text rows if the patch carries them,
                and their column where keys are masked.

        Returns:
            Keys, values and column of every row that exists: fresh for the patches done in this step, one step
            stale for the others, and none for rows no step has computed yet.

        Raises:
            RuntimeError: The rows are not as many as the patch has, or only some steps mask keys.
        """
        self._kept = self._kept or tuple(self._allocate(rows) for rows in fresh)
        self._check(patch, fresh)
        for kept, rows in zip(self._kept, fresh, strict=True):
            self._put(kept, rows, patch)
        if not self._whole:
            self._written = joined([*self._written, *self.rows.ranges(patch)])
            self._whole = self._written == [(0, self.rows.total)]
        return tuple(self._existing(kept) for kept in self._kept)

    def others(self, patch: Patch) -> list[tuple[Tensor, ...]]:
        """Keys, values and, where riders are among them, column of the rows that exist outside a patch, as views.

        Args:
            patch: A patch as a whole, not a rank's part of it.
        """
        if not self._kept:
            return []
        ranges = _without(self._there, joined(self.rows.ranges(patch)))
        return [tuple(kept[:, :, low:high] for kept in self._seen_of(low, high)) for low, high in ranges]

    def _seen_of(self, low: int, high: int) -> tuple[Tensor, ...]:
        """Keys, values and, if riders are among these rows, the column: a mask of nothing costs the fast kernel."""
        start, stop = self.rows.image
        return self._kept[:2] if start <= low and high <= stop else self._kept

    @property
    def _there(self) -> list[Range]:
        return [(0, self.rows.total)] if self._whole else self._written

    def rows_of(self, patch: Patch) -> Tensor:
        """A copy of a patch's keys, values and column, in one piece."""
        return torch.cat([self._taken(kept, patch).reshape(-1) for kept in self._kept])

    def expected(self, patch: Patch) -> tuple[int, torch.dtype]:
        """Elements of ``rows_of``, and what they are."""
        return sum(size.numel() for size in self._shapes(patch)), self._kept[0].dtype

    def put(self, patch: Patch, rows: Tensor) -> None:
        """Takes over what ``rows_of`` gave on another rank."""
        shapes = self._shapes(patch)
        pieces = rows.split([shape.numel() for shape in shapes])
        for kept, shape, piece in zip(self._kept, shapes, pieces, strict=True):
            self._put(kept, piece.view(shape), patch)

    @property
    def bytes(self) -> int:
        """Memory the store holds."""
        return sum(kept.numel() * kept.element_size() for kept in self._kept)

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

    def _put(self, kept: Tensor, rows: Tensor, patch: Patch) -> None:
        ranges = joined(self.rows.ranges(patch))
        pieces = rows.split([high - low for low, high in ranges], SEQUENCE)
        for (low, high), piece in zip(ranges, pieces, strict=True):
            kept.narrow(SEQUENCE, low, high - low).copy_(piece)

    def _shapes(self, patch: Patch) -> list[torch.Size]:
        count = self.rows.count(patch)
        return [torch.Size((*kept.shape[:SEQUENCE], count, *kept.shape[SEQUENCE + 1 :])) for kept in self._kept]

    def _taken(self, kept: Tensor, patch: Patch) -> Tensor:
        """The rows that ``_put`` would replace, in the same order."""
        return _rows_in(kept, joined(self.rows.ranges(patch)))

    def _existing(self, kept: Tensor) -> Tensor:
        return kept if self._whole else _rows_in(kept, self._written)


LayerStores = dict[str, LayerStore]  # by the layer's name


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
