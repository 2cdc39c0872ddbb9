"""The rows of a sequence, by segment: which of them a patch has, and how patches make up the whole.

The rows of the picture are kept in the order of the axis that is cut, so that a patch is one range of them. The model
has another order where a clip is cut by rows: frames come first. ``narrow`` and ``widen`` go from one to the other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from patchpipe.models.blocks import Holds
from patchpipe.models.latent import IMAGE, REFERENCE, Raster
from patchpipe.stage.patches import Patch

Range = tuple[int, int]


@dataclass(frozen=True)
class Rows:
    """The rows of one sequence in a whole call.

    Attributes:
        segments: Its segments, in order.
        sizes: Rows of each.
        raster: How the picture divides.
    """

    segments: tuple[str, ...]
    sizes: tuple[int, ...]
    raster: Raster

    @classmethod
    def of(cls, segments: tuple[str, ...], sizes: Mapping[str, int], raster: Raster) -> Rows:
        """The rows of these segments, given the sizes of all there are."""
        return cls(segments, tuple(sizes[name] for name in segments), raster)

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.sizes)

    @property
    def image(self) -> Range:
        """Where the rows of the picture are."""
        start = sum(self.sizes[: self.segments.index(IMAGE)])
        return start, start + self.sizes[self.segments.index(IMAGE)]

    def ranges(self, piece: Patch) -> tuple[Range, ...]:
        """A piece's rows of each segment, as ranges of the whole; empty ones where it has none."""
        return _ranges(self, piece)

    def spans(self, piece: Patch) -> list[Range]:
        """The same in order, without empty ones, those that touch made one."""
        return [*_spans(self, piece)]

    def lengths(self, piece: Patch) -> tuple[int, ...]:
        """How many rows of each segment a piece has."""
        return tuple(high - low for low, high in _ranges(self, piece))

    def count(self, piece: Patch) -> int:
        """Rows of a piece."""
        return sum(self.lengths(piece))

    def riders(self, piece: Patch) -> int:
        """Those of them that are not the picture's."""
        return self.count(piece) - piece.token_count

    def empty(self, piece: Patch, names: Sequence[str]) -> tuple[int, ...]:
        """Where, among a piece's rows and these, a row of zeros stands for each of these segments it has none of."""
        found, at = [], 0
        for name, length in zip(self.segments, self.lengths(piece), strict=True):
            if name in names and not length and not piece.uncut:
                found.append(at)
                at += 1
            at += length
        return tuple(found)

    def by_cut(self, whole: Tensor, dim: int) -> Tensor:
        """All rows in the model's order, put in the order of the axis that is cut."""
        if self.raster.outer == 1 or IMAGE not in self.segments:
            return whole
        parts = list(whole.split(self.sizes, dim))
        at, shape = self.segments.index(IMAGE), (self.raster.outer, self.raster.count, self.raster.inner)
        parts[at] = parts[at].unflatten(dim, shape).transpose(dim, dim + 1).flatten(dim, dim + 2)
        return torch.cat(parts, dim)

    def join(self, chunks: Sequence[Tensor], pieces: Sequence[Patch], dim: int) -> Tensor:
        """The rows of several pieces as one sequence: segment by segment, each segment piece by piece."""
        parts = [chunk.split(self.lengths(piece), dim) for chunk, piece in zip(chunks, pieces, strict=True)]
        return torch.cat([part[at] for at in range(len(self.segments)) for part in parts], dim)

    def part(self, whole: Tensor, pieces: Sequence[Patch], dim: int) -> list[Tensor]:
        """The reverse of ``join``: each piece's rows of a sequence that has them all."""
        lengths = [self.lengths(piece) for piece in pieces]
        parts = iter(whole.split([each[at] for at in range(len(self.segments)) for each in lengths], dim))
        by_segment = [[next(parts) for _ in pieces] for _ in self.segments]
        return [torch.cat(own, dim) for own in zip(*by_segment, strict=True)]


# Asked for several times by every layer of every patch.
@lru_cache(maxsize=1024)
def _ranges(rows: Rows, piece: Patch) -> tuple[Range, ...]:
    found, start = [], 0
    for name, size in zip(rows.segments, rows.sizes, strict=True):
        own = piece.reference_range if name == REFERENCE else piece.rider_range(size)
        low, high = piece.tokens if name == IMAGE else own
        found.append((start + low, start + high))
        start += size
    return tuple(found)


@lru_cache(maxsize=1024)
def _spans(rows: Rows, piece: Patch) -> tuple[Range, ...]:
    return tuple(joined(_ranges(rows, piece)))


def joined(ranges: Sequence[Range]) -> list[Range]:
    """Ranges in order, without empty ones, those that touch made one."""
    found: list[Range] = []
    for low, high in sorted(span for span in ranges if span[0] < span[1]):
        if found and found[-1][1] == low:
            found[-1] = (found[-1][0], high)
        else:
            found.append((low, high))
    return found


@dataclass(frozen=True)
class Cutter:
    """Takes a piece's rows out of whole arguments, and puts them back.

    Attributes:
        piece: The piece.
        raster: How the latent divides.
        sizes: Rows of every segment of the call.
    """

    piece: Patch
    raster: Raster
    sizes: Mapping[str, int]

    def narrow(self, value: Any, held: Holds | tuple[Holds | None, ...] | None) -> Any:
        """The piece's rows of an argument: a tensor, or a tuple, list or dict of them."""
        if held is None:
            return value
        if isinstance(value, dict):
            return {key: self.narrow(each, held) for key, each in value.items()}
        if isinstance(value, (tuple, list)):
            each_held = held if isinstance(held, tuple) else (held,) * len(value)
            return type(value)(self.narrow(each, own) for each, own in zip(value, each_held, strict=True))
        assert isinstance(held, Holds)
        return self._narrow(value, held) if isinstance(value, Tensor) and self._has_rows(value, held) else value

    def _has_rows(self, value: Tensor, held: Holds) -> bool:
        """A prompt may be a single row: then one row is all there are."""
        if has_rows(value, held):
            return True
        fits = value.ndim > held.dim if held.ndim is None else value.ndim == held.ndim
        return fits and sum(self.sizes.get(name, 0) for name in held.segments) == 1

    def leading(self, count: int) -> int:
        """How many of the picture's first tokens, in the model's order, are the piece's; they are its own first."""
        if self.raster.outer == 1:
            start, stop = self.piece.tokens
            return min(max(count - start, 0), stop - start)
        low, high = self.piece.rows
        slabs, rest = divmod(count, self.raster.count * self.raster.inner)
        own = (high - low) * self.raster.inner
        return slabs * own + min(max(rest - low * self.raster.inner, 0), own)

    def lacks(self, held: Holds) -> bool:
        """Whether the piece has no rows of this kind."""
        return Rows.of(held.segments, self.sizes, self.raster).count(self.piece) == 0

    def widen(self, rows: Tensor, held: Holds) -> Tensor:
        """The reverse: whole segments, with zeros where this piece has no rows."""
        dim, whole = held.dim, Rows.of(held.segments, self.sizes, self.raster)
        shape = list(rows.shape)
        shape[dim] = whole.total
        wide = rows.new_zeros(shape)
        parts = rows.split(whole.lengths(self.piece), dim)
        for name, (start, stop), part in zip(whole.segments, whole.ranges(self.piece), parts, strict=True):
            if name == IMAGE and self.raster.outer > 1:
                target = self._by_rows(wide.narrow(dim, whole.image[0], self.raster.total), dim)
                sizes = (-1, self.raster.outer, self.raster.inner)
                target.copy_(part.unflatten(dim, sizes).transpose(dim, dim + 1))
            elif stop > start:
                wide.narrow(dim, start, stop - start).copy_(part)
        return wide

    def _narrow(self, value: Tensor, held: Holds) -> Tensor:
        dim, whole = held.dim, self._whole(value, held)
        if self.raster.outer == 1 or IMAGE not in held.segments:
            spans = whole.spans(self.piece) or [(0, 0)]
            parts = [value.narrow(dim, low, high - low) for low, high in spans]
        else:
            parts = [self._segment(value, dim, name, span) for name, span in zip(
                whole.segments, whole.ranges(self.piece), strict=True
            )]  # fmt: skip
        return (parts[0] if len(parts) == 1 else torch.cat(parts, dim)).contiguous()

    def _whole(self, value: Tensor, held: Holds) -> Rows:
        whole = Rows.of(held.segments, self.sizes, self.raster)
        if value.shape[held.dim] != whole.total:
            raise RuntimeError(
                f"a block was given {value.shape[held.dim]} rows where {whole.total} of {' and '.join(held.segments)} "
                f"were expected: the model's plan does not fit"
            )
        return whole

    def _segment(self, value: Tensor, dim: int, name: str, span: Range) -> Tensor:
        if name != IMAGE:
            return value.narrow(dim, span[0], span[1] - span[0])
        start = span[0] - self.piece.tokens[0]
        return (
            self._by_rows(value.narrow(dim, start, self.raster.total), dim)
            .transpose(dim, dim + 1)
            .flatten(dim, dim + 2)
        )

    def _by_rows(self, image: Tensor, dim: int) -> Tensor:
        """The piece's part of the picture's tokens in the model's order, as ``[…, outer, rows, inner, …]``."""
        low, high = self.piece.rows
        shape = (self.raster.outer, self.raster.count, self.raster.inner)
        return image.unflatten(dim, shape).narrow(dim + 1, low, high - low)


def has_rows(value: Tensor, held: Holds) -> bool:
    """Whether a tensor has the rows its plan speaks of: not where one row stands for all."""
    if held.ndim is not None and value.ndim != held.ndim:
        return False
    return value.ndim > held.dim and value.shape[held.dim] != 1
