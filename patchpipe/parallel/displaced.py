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

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange
from patchpipe.distributed.mesh import Group
from patchpipe.parallel.parts import ROWS, MovingParts, PartStore
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Part
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Rows

Layers = list[PartStore | MovingParts]  # of a guidance branch, in the order they run


class Displaced:
    """Attention of one call's part of the latent.

    Args:
        exchange: Sends to and receives from the ranks of the other parts.
        pieces: Each rank's rows.
        layers: The stores of the call's guidance branch; ``None`` where nothing is ever stale.
        synchronous: Whether to wait for the others' fresh rows.
        pace: Of the call, where stale rows are forecast.
    """

    def __init__(
        self,
        exchange: Exchange,
        pieces: tuple[Patch, ...],
        layers: Layers | None,
        synchronous: bool,
        pace: Pace | None = None,
    ) -> None:
        self.exchange, self.pieces, self.layers = exchange, pieces, layers
        self.synchronous, self.pace = synchronous, pace
        self._layer = 0  # the next one: every call runs the same layers in the same order
        self._columns: tuple[Tensor, ...] = ()  # the same for every layer that masks keys

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> None:
        """See ``Sharing``: here values are seen a step late anyway."""

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: own rows attend to own fresh rows and to what the others' last gathering brought."""
        if attend.column is not None and not self._columns:
            self._columns = self._seen(torch.stack(attend.columns), layer.rows, None)
        seen = self._seen(torch.stack([key, value]), layer.rows, self.pace)
        return attend(query, *seen, *(self._columns if attend.columns else ()))

    def _seen(self, own: Tensor, rows: Rows, pace: Pace | None) -> tuple[Tensor, ...]:
        """Own fresh rows beside the others', which are fresh or stale; the gathering that is started is not awaited."""
        lengths = [rows.count(piece) for piece in self.pieces]
        store = self._next_store(lengths, pace)
        if self.synchronous:
            self._gather(store, own, lengths, pace)
            return store.fresh()
        stale = store.beside(own, pace)
        self._gather(store, own, lengths, pace)  # before the attention, which hides it
        return stale

    def _next_store(self, lengths: Sequence[int], pace: Pace | None) -> PartStore | MovingParts:
        if self.layers is None:
            return PartStore(self.exchange)
        if self._layer == len(self.layers):
            new = PartStore(self.exchange) if pace is None else MovingParts(self.exchange, lengths)
            self.layers.append(new)
        self._layer += 1
        return self.layers[self._layer - 1]

    def _gather(self, store: PartStore | MovingParts, own: Tensor, lengths: Sequence[int], pace: Pace | None) -> None:
        """Starts to gather all parts; returns at once."""
        shapes = [(*own.shape[:ROWS], length, own.shape[-1]) for length in lengths]
        coming, size = self.exchange.spread(own, shapes), sum(map(prod, shapes)) * own.element_size()
        store.expect(coming, size, pace)


def displaced_for(
    group: Group, cut: Cut, layers: Layers | None, synchronous: bool, pace: Pace | None = None
) -> Displaced | None:
    """How this group's ranks attend in one call; ``None`` unless the layout says ``distrifusion``.

    Args:
        group: The ranks.
        cut: The cut of the call's latent.
        layers: The stores of the call's guidance branch, if they are kept.
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
    return Displaced(exchange, cut.split(cut.whole, exchange.size), layers, synchronous, pace)
