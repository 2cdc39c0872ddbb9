"""Displaced patch parallelism (DistriFusion, arXiv 2402.19481): each rank runs the whole model on a part of the latent.

In the warm-up, every attention layer gathers the keys and values of all parts and waits for them, which is
exact. From then on it attends to its own fresh rows and to the others' rows of the step before, while its own
travel to the others for their next step.

A rank so keeps the keys and values of the whole latent, for all layers: as much as one device would. Given the pace of
the calls, the others' rows are not shown as they were but as a forecast: see ``parallel.parts``.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange, Pieces, Shape
from patchpipe.distributed.mesh import Group
from patchpipe.parallel.lossy.residuals import Residuals
from patchpipe.parallel.parts import ROWS, MovingParts, PartStore
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Part
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Rows

Layers = list[PartStore | MovingParts]  # of a guidance branch, in the order they run


class Kept(Protocol):
    """What a guidance branch keeps."""

    parts: Layers
    told: Residuals


class Displaced:
    """Attention of one call's part of the latent.

    Args:
        exchange: Sends to and receives from the ranks of the other parts.
        pieces: Each rank's rows.
        layers: The stores of the call's guidance branch; ``None`` where nothing is ever stale.
        synchronous: Whether to wait for the others' fresh rows.
        pace: Of the call, where stale rows are forecast.
        told: Rows as the other ranks have them, where changes are sent.
    """

    def __init__(
        self,
        exchange: Exchange,
        pieces: tuple[Patch, ...],
        layers: Layers | None,
        synchronous: bool,
        pace: Pace | None = None,
        told: Residuals | None = None,
    ) -> None:
        self.exchange, self.pieces, self.layers = exchange, pieces, layers
        self.synchronous, self.pace, self.told = synchronous, pace, told
        self._layer = 0  # the next one: every call runs the same layers in the same order
        self._columns: tuple[Tensor, ...] = ()  # the same for every layer that masks keys

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> None:
        """See ``Sharing``: here values are seen a step late anyway."""

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: own rows attend to own fresh rows and to what the others' last gathering brought."""
        if attend.column is not None and not self._columns:
            self._columns = self._seen(torch.stack(attend.columns), layer.rows, None, None)
        seen = self._seen(torch.stack([key, value]), layer.rows, self.pace, self.told)
        return attend(query, *seen, *(self._columns if attend.columns else ()))

    def _seen(self, own: Tensor, rows: Rows, pace: Pace | None, told: Residuals | None) -> tuple[Tensor, ...]:
        """Own fresh rows beside the others', which are fresh or stale; the gathering that is started is not awaited."""
        lengths = [rows.count(piece) for piece in self.pieces]
        store = self._next_store(lengths, pace)
        if self.synchronous:
            self._gather(store, own, lengths, pace, told)
            return store.fresh()
        stale = store.beside(own, pace)
        self._gather(store, own, lengths, pace, told)  # before the attention, which hides it
        return stale

    def _next_store(self, lengths: Sequence[int], pace: Pace | None) -> PartStore | MovingParts:
        if self.layers is None:
            return PartStore(self.exchange)
        if self._layer == len(self.layers):
            new = PartStore(self.exchange) if pace is None else MovingParts(self.exchange, lengths)
            self.layers.append(new)
        self._layer += 1
        return self.layers[self._layer - 1]

    def _gather(
        self, store: PartStore | MovingParts, own: Tensor, lengths: Sequence[int], pace: Pace | None,
        told: Residuals | None,
    ) -> None:  # fmt: skip
        """Starts to gather all parts; returns at once."""
        shapes = [(*own.shape[:ROWS], length, own.shape[-1]) for length in lengths]
        size = sum(map(prod, shapes)) * own.element_size()
        if told is None:
            store.expect(self.exchange.spread(own, shapes), size, pace)
            return
        changes = Changes(told, self._layer, own, shapes, self.exchange.index, whole=self.synchronous)
        store.expect(changes.begin(self.exchange), size, pace)


class Changes:
    """A gathering of which only changes travel, where all ranks know the rows before.

    Args:
        told: Rows as the other ranks have them.
        layer: The layer's place among all.
        own: This rank's rows.
        shapes: Of each rank's.
        index: This rank's place.
        whole: Whether rows are sent as they are all the same.
    """

    def __init__(
        self, told: Residuals, layer: int, own: Tensor, shapes: Sequence[Shape], index: int, *, whole: bool
    ) -> None:
        self._told, self._own, self._shapes, self._index, self._whole = told, own, shapes, index, whole
        self._keys = [(layer, part) for part in range(len(shapes))]
        self._coming: Pieces | None = None

    def begin(self, exchange: Exchange) -> Changes:
        """Starts it; returns at once."""
        if self._whole:
            self._told.keep(self._keys[self._index], self._own)
            self._coming = exchange.spread(self._own, self._shapes)
            return self
        sent = [self._told.sent_as(key, shape, self._own.dtype)[0] for key, shape in self._parts]
        self._coming = exchange.spread(self._told.pack(self._keys[self._index], self._own), sent)
        return self

    def take(self) -> list[Tensor]:
        """Each rank's rows, as far as is known; once only."""
        assert self._coming is not None
        pieces = self._coming.take()
        for part, (key, shape) in enumerate(self._parts):
            if part == self._index:
                pieces[part] = self._own
            elif self._whole:
                self._told.keep(key, pieces[part])
            else:
                pieces[part] = self._told.unpack(key, pieces[part], shape, self._own.dtype)
        return pieces

    @property
    def _parts(self) -> list[tuple[tuple[int, int], Shape]]:
        return list(zip(self._keys, self._shapes, strict=True))


def displaced_for(
    group: Group, cut: Cut, kept: Kept | None, synchronous: bool, pace: Pace | None = None
) -> Displaced | None:
    """How this group's ranks attend in one call; ``None`` unless the layout says ``distrifusion``.

    Args:
        group: The ranks.
        cut: The cut of the call's latent.
        kept: What the call's guidance branch keeps, if anything.
        synchronous: Whether the call is part of the warm-up.
        pace: Of the call, where stale rows are forecast.

    Raises:
        ValueError: There are fewer rows than ranks, or the parts are shared once more.
    """
    exchange = group.lines.get("displaced")
    if exchange is None:
        return None
    if group.mesh.parts != exchange.size:
        raise ValueError(
            f"distrifusion={exchange.size} with ulysses or ring has not been tested: use one of them, and cfg, data"
        )
    layers, told = (None, None) if kept is None else (kept.parts, kept.told)
    told = told if group.config.compress else None
    return Displaced(exchange, cut.split(cut.whole, exchange.size), layers, synchronous, pace, told)
