"""Displaced patch parallelism (DistriFusion, arXiv 2402.19481): each rank runs the whole model on a part of the latent.

In the warm-up, every attention layer gathers the keys and values of all parts and waits for them, which is
exact. From then on it attends to its own fresh rows and to the others' rows of the step before, while its own
travel to the others for their next step.

A rank so keeps the keys and values of the whole latent, for all layers: as much as one device would.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange, Pieces
from patchpipe.distributed.mesh import Group
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.rows import Rows

ROWS = 3  # dim of the rows in a part [key and value, batch, heads, rows, channels]


class PartStore:
    """Keys and values of one layer, each rank's rows in a tensor of their own: they arrive where they stay.

    What a mask adds to the scores of the keys of all layers has a store like it, with one tensor in place of two.

    Belongs to one layer, one guidance branch and one request.

    Args:
        exchange: Among the ranks of the parts.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._parts: list[Tensor | None] = [None] * exchange.size
        self._coming: Pieces | None = None
        self.bytes = 0  # of the rows it holds, with the room for those under way

    def put_own(self, rows: Tensor) -> None:
        """Takes this rank's fresh ``[key and value, batch, heads, rows, channels]`` in place of older ones."""
        self._parts[self._exchange.index] = rows

    def expect(self, coming: Pieces, size: int) -> None:
        """Takes the promise of every part's rows, ``size`` bytes in all."""
        self._coming, self.bytes = coming, size

    def move(self, device: torch.device) -> None:
        """Takes all rows to another device, once those under way are there."""
        self._arrive()
        self._parts = [None if rows is None else rows.to(device) for rows in self._parts]

    def existing(self) -> tuple[Tensor, ...]:
        """Keys and values of every row some step has computed; waits for those under way.

        They come part by part, each with its own text rows: attention does not depend on the order of keys.
        """
        self._arrive()
        return torch.cat([rows for rows in self._parts if rows is not None], dim=ROWS).unbind(0)

    def _arrive(self) -> None:
        if self._coming is not None:
            coming, self._coming = self._coming, None
            own = self._parts[self._exchange.index]
            self._parts[:] = coming.take()
            self._parts[self._exchange.index] = own


class Displaced:
    """Attention of one call's part of the latent.

    Args:
        exchange: Sends to and receives from the ranks of the other parts.
        pieces: Each rank's rows.
        layers: The stores of the call's guidance branch, in the order its layers run; ``None`` where nothing is
            ever stale.
        synchronous: Whether to wait for the others' fresh rows.
    """

    def __init__(
        self, exchange: Exchange, pieces: tuple[Patch, ...], layers: list[PartStore] | None, synchronous: bool
    ) -> None:
        self.exchange, self.pieces, self.layers, self.synchronous = exchange, pieces, layers, synchronous
        self._layer = 0  # the next one: every call runs the same layers in the same order
        self._columns: tuple[Tensor, ...] = ()  # the same for every layer that masks keys

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: own rows attend to own fresh rows and to what the others' last gathering brought."""
        if attend.column is not None and not self._columns:
            self._columns = self._seen(torch.stack(attend.columns), layer.rows)
        seen = self._seen(torch.stack([key, value]), layer.rows)
        return attend(query, *seen, *(self._columns if attend.columns else ()))

    def _seen(self, own: Tensor, rows: Rows) -> tuple[Tensor, ...]:
        """Own fresh rows beside the others', which are fresh or stale; the gathering that is started is not awaited."""
        store = self._next_store()
        store.put_own(own)
        if self.synchronous:
            self._gather(store, own, rows)
            return store.existing()
        stale = store.existing()
        self._gather(store, own, rows)  # before the attention, which hides it
        return stale

    def _next_store(self) -> PartStore:
        if self.layers is None:
            return PartStore(self.exchange)
        if self._layer == len(self.layers):
            self.layers.append(PartStore(self.exchange))
        self._layer += 1
        return self.layers[self._layer - 1]

    def _gather(self, store: PartStore, own: Tensor, rows: Rows) -> None:
        """Starts to gather all parts; returns at once."""
        shapes = [(*own.shape[:ROWS], rows.count(piece), own.shape[-1]) for piece in self.pieces]
        store.expect(self.exchange.spread(own, shapes), sum(map(prod, shapes)) * own.element_size())


def displaced_for(group: Group, cut: Cut, layers: list[PartStore] | None, synchronous: bool) -> Displaced | None:
    """How this group's ranks attend in one call; ``None`` unless the layout says ``distrifusion``.

    Args:
        group: The ranks.
        cut: The cut of the call's latent.
        layers: The stores of the call's guidance branch, if they are kept.
        synchronous: Whether the call is part of the warm-up.

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
    return Displaced(exchange, cut.split(cut.whole, exchange.size), layers, synchronous)
