"""The stale key/value store of one attention layer (PipeFusion, arXiv 2405.14430, section 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpipe.stage.patches import Patch

Entries = tuple[int, int, int]  # of what is kept together: the first, one past the last, and how many there are
SEQUENCE = 2  # dim of the rows in [batch, heads, rows, channels]


class LayerStore:
    """Keys and values of the whole sequence, fresh rows written in place over one-step-stale ones.

    Where keys are masked, what the mask adds to their scores is a third tensor, ``[batch, 1 or heads, rows, 1]``, and
    goes wherever the keys go.

    Belongs to one layer, one half of a batch, one guidance branch and one request.

    Args:
        text_rows: Text rows in the sequence; 0 where the layer sees the image alone.
        text_first: Whether the text rows come before the image rows.
    """

    def __init__(self, text_rows: int, text_first: bool) -> None:
        self.text_rows = text_rows
        self.text_first = text_first
        self._kept: tuple[Tensor, ...] = ()
        self._fresh_tokens = 0  # image rows written so far, until the store is whole
        self._whole = False

    def keep(self, *fresh: Tensor, entries: Entries | None = None) -> tuple[Tensor, ...]:
        """Takes over what a synchronous step computed.

        Args:
            fresh: Keys and values ``[batch, heads, rows, channels]``, and their column where keys are masked.
            entries: Which entries of the batch they belong to; ``None`` for all.
        """
        self._whole = True
        if entries is None or entries[:2] == (0, entries[2]):
            self._kept = tuple(_own(rows) for rows in fresh)
            return fresh
        start, stop, total = entries
        if not self._kept or self._kept[0].shape[0] != total:
            self._kept = tuple(rows.new_empty(total, *rows.shape[1:]) for rows in fresh)
        for kept, rows in zip(self._kept, fresh, strict=True):
            kept[start:stop].copy_(rows)
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
        self._kept = self._kept or tuple(self._allocate(rows, patch) for rows in fresh)
        self._check(patch, fresh)
        for kept, rows in zip(self._kept, fresh, strict=True):
            self._put(kept, rows, patch)
        if not self._whole:
            self._fresh_tokens = patch.tokens[1]
            self._whole = self._fresh_tokens == patch.total_tokens
        return tuple(self._existing(kept) for kept in self._kept)

    def others(self, patch: Patch) -> list[tuple[Tensor, ...]]:
        """Keys, values and, where there is text, column of the rows that exist outside a patch, as unbroken views.

        Args:
            patch: A patch as a whole, not a rank's part of it.
        """
        if not self._kept:
            return []
        image = self.text_rows if self.text_first else 0  # where image rows start
        stop = patch.total_tokens if self._whole else self._fresh_tokens
        ranges = [(image, image + patch.tokens[0]), (image + patch.tokens[1], image + stop)]
        if self.text_rows and not patch.carries_text:
            text = 0 if self.text_first else patch.total_tokens
            ranges.append((text, text + self.text_rows))
        joined = _joined(sorted(span for span in ranges if span[0] < span[1]))
        return [tuple(kept[:, :, low:high] for kept in self._seen_of(low, high)) for low, high in joined]

    def _seen_of(self, low: int, high: int) -> tuple[Tensor, ...]:
        """Keys, values and, if text rows are among these, the column: a mask of nothing costs the fast kernel."""
        text = 0 if self.text_first else self._kept[0].shape[SEQUENCE] - self.text_rows
        return self._kept if low < text + self.text_rows and text < high else self._kept[:2]

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

    def _allocate(self, rows: Tensor, patch: Patch) -> Tensor:
        batch, heads, _, channels = rows.shape
        return rows.new_empty(batch, heads, self.text_rows + patch.total_tokens, channels)

    def _check(self, patch: Patch, fresh: tuple[Tensor, ...]) -> None:
        expected, found = patch.token_count + (self.text_rows if patch.carries_text else 0), fresh[0].shape[SEQUENCE]
        if found != expected:
            raise RuntimeError(
                f"patch {patch.index} brought {found} rows to an attention layer whose store "
                f"expects {expected}: the model's plan does not fit this layer"
            )
        if len(fresh) != len(self._kept):
            raise RuntimeError("some calls of a guidance branch mask text rows and some do not: give all a mask")

    def _put(self, kept: Tensor, rows: Tensor, patch: Patch) -> None:
        count = patch.token_count
        image_start = patch.tokens[0] + (self.text_rows if self.text_first else 0)
        if not (patch.carries_text and self.text_rows):
            kept.narrow(SEQUENCE, image_start, count).copy_(rows)
            return
        if self.text_first and patch.tokens[0] == 0:
            kept.narrow(SEQUENCE, 0, self.text_rows + count).copy_(rows)
            return
        image, text = rows.narrow(SEQUENCE, 0, count), rows.narrow(SEQUENCE, count, self.text_rows)
        kept.narrow(SEQUENCE, image_start, count).copy_(image)
        kept.narrow(SEQUENCE, kept.shape[SEQUENCE] - self.text_rows, self.text_rows).copy_(text)

    def _shapes(self, patch: Patch) -> list[torch.Size]:
        count = patch.token_count + (self.text_rows if patch.carries_text else 0)
        return [torch.Size((*kept.shape[:SEQUENCE], count, *kept.shape[SEQUENCE + 1 :])) for kept in self._kept]

    def _taken(self, kept: Tensor, patch: Patch) -> Tensor:
        """The rows that ``_put`` would replace, in the same order."""
        count = patch.token_count
        image = kept.narrow(SEQUENCE, patch.tokens[0] + (self.text_rows if self.text_first else 0), count)
        if not (patch.carries_text and self.text_rows):
            return image
        start = 0 if self.text_first else kept.shape[SEQUENCE] - self.text_rows
        text = kept.narrow(SEQUENCE, start, self.text_rows)
        return torch.cat([text, image] if self.text_first else [image, text], dim=SEQUENCE)

    def _existing(self, kept: Tensor) -> Tensor:
        if self._whole:
            return kept
        if self.text_first or not self.text_rows:
            return kept.narrow(SEQUENCE, 0, self.text_rows + self._fresh_tokens)
        text = kept.narrow(SEQUENCE, kept.shape[SEQUENCE] - self.text_rows, self.text_rows)
        return torch.cat([kept.narrow(SEQUENCE, 0, self._fresh_tokens), text], dim=SEQUENCE)


LayerStores = dict[str, LayerStore]  # by the layer's name


def _own(rows: Tensor) -> Tensor:
    """The tensor itself if it alone uses its memory, else a copy: the store writes into what it keeps."""
    memory = rows.untyped_storage().nbytes()
    return rows if memory == rows.numel() * rows.element_size() else rows.clone()


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges with those that touch made one."""
    joined: list[tuple[int, int]] = []
    for low, high in ranges:
        if joined and joined[-1][1] == low:
            joined[-1] = (joined[-1][0], high)
        else:
            joined.append((low, high))
    return joined
