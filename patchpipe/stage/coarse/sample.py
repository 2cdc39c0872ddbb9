"""A start on fewer tokens: every second one of every second row stands for all, so that no stage waits in a warm-up.

In place of a synchronous step, a quarter of the picture's tokens goes through the stages ahead of the first patch.
Their keys and values, repeated to full size, are the stale rows of the first step. Tokens keep their own positions,
and the model's own blocks run: to them it is a shorter sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchpipe.models.blocks import Holds
from patchpipe.models.latent import IMAGE, REFERENCE, Raster
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Cutter, Rows

STRIDE = 2
Offset = tuple[int, int]  # from a token of the sample: rows, and tokens in a row


@dataclass(frozen=True)
class Sample:
    """The tokens that stand for all: of the rows along the axis that is cut, and of the tokens of a row, some.

    Attributes:
        full: How the latent divides.
        stride: One of so many rows, and of so many tokens in a row.
    """

    full: Raster
    stride: int = STRIDE

    @property
    def raster(self) -> Raster:
        """How they divide."""
        rows, inner = (-(-size // self.stride) for size in (self.full.count, self.full.inner))
        return Raster(rows, self.full.outer * inner, 1, self.full.outer)

    @property
    def cut(self) -> Cut:
        """All of them as one patch."""
        return Cut(self.raster, (0, self.raster.count))

    @property
    def offsets(self) -> list[Offset]:
        """Where the tokens are for which one stands, its own place first."""
        return [(rows, inner) for rows in range(self.stride) for inner in range(self.stride)]

    def tokens(self, piece: Patch, device: torch.device, offset: Offset = (0, 0)) -> Tensor:
        """The places of a piece's tokens among the picture's in the model's order, row after row of the sample.

        Args:
            piece: Rows of the sample.
            device: Where the places are to be.
            offset: Asks for the tokens so far from them; at the edge, for the last there are.
        """
        full = self.full
        rows = (torch.arange(*piece.rows, device=device) * self.stride + offset[0]).clamp(max=full.count - 1)
        outer = torch.arange(full.outer, device=device) * full.count * full.inner
        inner = (torch.arange(0, full.inner, self.stride, device=device) + offset[1]).clamp(max=full.inner - 1)
        return (rows[:, None, None] * full.inner + outer[:, None] + inner).flatten()

    def nearest(self, device: torch.device) -> Tensor:
        """For each token of the picture, in the order of the axis that is cut, the one of the sample at its place."""
        full, inner = self.full, self.raster.inner
        rows = torch.arange(full.count, device=device) // self.stride * self.raster.tokens
        outer = torch.arange(full.outer, device=device) * inner
        return (rows[:, None, None] + outer[:, None] + torch.arange(full.inner, device=device) // self.stride).flatten()

    def which(self, device: torch.device) -> Tensor:
        """For each token of the picture, in the same order, which of the offsets it has."""
        full = self.full
        rows = torch.arange(full.count, device=device) % self.stride * self.stride
        inner = torch.arange(full.inner, device=device) % self.stride
        return (rows[:, None, None] + inner).expand(-1, full.outer, -1).flatten()

    def spread(self, rows: Sequence[Tensor], sequence: Rows, dim: int) -> Tensor:
        """Rows of the sample repeated to full size; those of other segments as they are.

        Args:
            rows: Of a whole sequence, at the sample's places alone or at each of the offsets.
            sequence: Its segments, as the sample has them.
            dim: Where its rows are.
        """
        parts, at = list(rows[0].split(sequence.sizes, dim)), sequence.segments.index(IMAGE)
        places, (start, stop) = self.nearest(rows[0].device), sequence.image
        if len(rows) > 1:
            places = places + self.which(places.device) * (stop - start)
        parts[at] = torch.cat([each.narrow(dim, start, stop - start) for each in rows], dim).index_select(dim, places)
        return torch.cat(parts, dim)


@dataclass(frozen=True)
class Sampler(Cutter):
    """Takes a sample's rows out of whole arguments, and puts them back; ``raster`` and ``sizes`` are of the whole.

    Attributes:
        sample: The sample.
        offset: Takes the rows so far from its own.
    """

    sample: Sample
    offset: Offset = (0, 0)

    def widen(self, rows: Tensor, held: Holds) -> Tensor:
        """Whole segments, with zeros where the piece has no rows."""
        dim, whole = held.dim, Rows.of(held.segments, self.sizes, self.raster)
        wide = rows.new_zeros([whole.total if at == dim else size for at, size in enumerate(rows.shape)])
        start = 0
        for name, size, part in zip(
            whole.segments, whole.sizes, rows.split(whole.lengths(self.piece), dim), strict=True
        ):
            places = self._places(name, size, rows.device) + start
            wide.index_copy_(dim, places, part)
            start += size
        return wide

    def _narrow(self, value: Tensor, held: Holds) -> Tensor:
        whole = self._whole(value, held)
        parts = value.split(whole.sizes, held.dim)
        found = [
            part.index_select(held.dim, self._places(name, size, value.device))
            for name, size, part in zip(whole.segments, whole.sizes, parts, strict=True)
        ]
        return found[0] if len(found) == 1 else torch.cat(found, held.dim)

    def _places(self, segment: str, size: int, device: torch.device) -> Tensor:
        if segment == IMAGE:
            return self.sample.tokens(self.piece, device, self.offset)
        own = self.piece.reference_range if segment == REFERENCE else self.piece.rider_range(size)
        return torch.arange(*own, device=device)
