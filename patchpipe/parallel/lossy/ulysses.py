"""Ulysses whose ranks give each other only the rows that have moved (CoCoDiff's V-major choice, arXiv 2604.14561).

In every layer a rank chooses, among its own rows, those whose values are farthest from what the other ranks believe
them to be. Queries, keys and values of these rows go out, and their results come back. The other ranks know the rest
from before. What they show in its place is not what was but a forecast, if so configured: see ``MovingRows``. The rank
keeps the same account of its own values, so that it knows how wrong the others are. A row that is not sent so becomes
ever more likely to be the next; nothing need be sent whole from time to time.

Rows that are not sent ask nothing either: their result in other ranks' heads is the last one, or its forecast. In the
heads that a rank attends to itself, its own rows are always fresh.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Trading
from patchpipe.layout.axes import shares
from patchpipe.parallel.lossy.moving import MovingRows
from patchpipe.parallel.ulysses import HEADS, ROWS, Ulysses
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Part
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows

FALL = 0.5  # how much more than the mean share is sent at the beginning, and less at the end


@dataclass(frozen=True)
class Moment:
    """Where a call stands in its request.

    Attributes:
        level: Its noise level, beside that of the first call.
        share: Of a rank's rows, those to send; ``None`` in the warm-up, which sends all.
        forecast: Whether rows that are not sent are forecast.
    """

    level: float
    share: float | None
    forecast: bool

    @classmethod
    def of(cls, level: float, share: float, *, synchronous: bool, forecast: bool) -> Moment:
        """That of a call, given the share over the whole request: more at the beginning, where pictures take shape."""
        now = min(1.0, share * (1 + FALL * (2 * level - 1))) if share < 1 else 1.0
        return cls(level, None if synchronous else now, forecast)

    def count(self, rows: int) -> int:
        """How many of a rank's rows are sent."""
        return rows if self.share is None else min(rows, max(1, math.ceil(self.share * rows)))


class ChangedLayer:
    """What a rank keeps of one layer, one guidance branch and one request.

    Args:
        forecast: Whether rows are forecast.

    Attributes:
        keys: Of all rows, in own heads.
        values: The same.
        told: Values of own rows in all heads, as the other ranks have them.
        results: Of own rows in all heads.
    """

    def __init__(self, forecast: bool) -> None:
        self.keys, self.values, self.told, self.results = (MovingRows(forecast) for _ in range(4))

    @property
    def bytes(self) -> int:
        """Memory of all of it."""
        return sum(own.bytes for own in (self.keys, self.values, self.told, self.results))

    def move(self, device: torch.device) -> None:
        """Takes all of it to another device."""
        for own in (self.keys, self.values, self.told, self.results):
            own.move(device)


@dataclass(frozen=True)
class _Came:
    """Rows that are fresh in a layer: this rank's own, and those that other ranks sent.

    Attributes:
        rows: Queries, keys and values ``[3, batch, own heads, some, channels]``, rank by rank.
        index: Where they belong in the sequence, ``[batch, some]``.
        sizes: How many come from each rank.
    """

    rows: Tensor
    index: Tensor
    sizes: list[int]


class ChangedUlysses:
    """Attention of one call.

    Args:
        exchange: The line's all-to-all.
        patch: The latent, whole.
        pieces: Each rank's own rows of it.
        layers: What the call's guidance branch keeps, in the order layers run.
        moment: Where the call stands.
    """

    def __init__(
        self, exchange: Trading, patch: Patch, pieces: tuple[Patch, ...], layers: list[ChangedLayer], moment: Moment
    ) -> None:
        self.exchange, self.pieces, self.layers, self.moment = exchange, pieces, layers, moment
        self._whole = Ulysses(exchange, patch, pieces, turns=1)
        self._layer = 0  # the next one: every call runs the same layers in the same order
        self._places: dict[Rows, list[Tensor]] = {}

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> None:
        """See ``Sharing``: here values decide what is sent."""

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: rows that have moved are exchanged for heads, attended, and exchanged back."""
        if layer.asking != layer.rows or attend.table is not None or attend.causal:
            return self._whole.attend(attend, query, key, value, layer)  # whose queries cannot be a choice of rows
        columns = [self._whole.gather_column(column, layer.rows, layer.entry) for column in attend.columns]
        attend = attend.of_heads(shares(query.shape[HEADS], self.exchange.size)[self.exchange.index])
        if self._layer == len(self.layers):
            self.layers.append(ChangedLayer(self.moment.forecast))
        kept, self._layer = self.layers[self._layer], self._layer + 1
        if self.moment.share is None:
            return self._of_all(attend, query, key, value, columns, layer, kept)
        return self._of_some(attend, torch.stack([query, key, value]), columns, layer, kept)

    def _of_all(
        self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, columns: list[Tensor], layer: Attending,
        kept: ChangedLayer,
    ) -> Tensor:  # fmt: skip
        """As Ulysses does it; everything that came is kept."""
        level, own = self.moment.level, value
        query, key, value = self._whole.gather_all(query, key, value, layer)
        result = self._whole.scatter(attend(query, key, value, *columns), layer.rows)
        for rows, fresh in ((kept.keys, key), (kept.values, value), (kept.told, own), (kept.results, result)):
            rows.fill(fresh, level)
        return result

    def _of_some(
        self, attend: Attend, own: Tensor, columns: list[Tensor], layer: Attending, kept: ChangedLayer
    ) -> Tensor:
        """Own queries, keys and values ``[3, batch, heads, own rows, channels]``, of which some go to others."""
        level, here = self.moment.level, self.exchange.index
        low, high = shares(own.shape[1 + HEADS], self.exchange.size)[here]
        worth = kept.told.worth(None, own[2], level)
        index = self._choose(own[2], kept.told.shown(level, worth), (low, high))
        came = self._gather(own, index, layer.rows)
        known = self._place(layer.rows, own.device)[here].expand(own.shape[1], -1)
        fresh_own = came.rows.split(came.sizes, 1 + ROWS)[here]
        seen = []
        for rows, fresh, true in zip((kept.keys, kept.values), came.rows[1:], fresh_own[1:], strict=True):
            moved = rows.worth(known, true, level)
            rows.put(came.index, fresh, level)
            seen.append(rows.shown(level, moved))
        order = came.index.argsort(1)  # queries stand as in the sequence
        result = _taken(attend(_taken(came.rows[0], order), *seen, *columns), order.argsort(1))
        back = self._give_back(result.split(came.sizes, ROWS), own.shape[1 + HEADS], layer.rows)
        mine, back[here] = back[here], _taken(back[here], index)
        kept.told.put(index, _taken(own[2], index), level)
        kept.results.put(index, torch.cat(back, HEADS), level)
        others = kept.results.shown(level, worth)
        return torch.cat([others[:, :low], mine, others[:, high:]], HEADS)

    def _choose(self, value: Tensor, told: Tensor, heads: tuple[int, int]) -> Tensor:
        """The own rows ``[batch, some]``, in order, whose values other ranks know worst."""
        error = (value - told).abs()
        error = error.sum((1, 3), dtype=torch.float32) - error[:, slice(*heads)].sum((1, 3), dtype=torch.float32)
        return error.topk(self.moment.count(value.shape[ROWS]), sorted=False).indices.sort(1).values

    def _place(self, rows: Rows, device: torch.device) -> list[Tensor]:
        """Where each rank's rows are in the sequence."""
        if rows not in self._places:
            every = torch.arange(rows.total, device=device)
            self._places[rows] = rows.part(every, self.pieces, 0)
        return self._places[rows]

    # -- some rows for heads, and back -----------------------------------------------------------

    def _gather(self, own: Tensor, index: Tensor, rows: Rows) -> _Came:
        """Gives the chosen rows of all heads for those that others chose, of own heads; with them, which they are."""
        ranks, here = self.exchange.size, self.exchange.index
        heads, places = shares(own.shape[1 + HEADS], ranks), self._place(rows, own.device)
        chosen = torch.stack([_taken(each, index) for each in own])
        number = index.to(torch.int32).reshape(-1).view(torch.uint8)
        nothing = number.new_empty((0,))
        batch, counts = own.shape[1], [self.moment.count(len(place)) for place in places]

        def size(source: int, to: int) -> tuple[int, int]:
            """Bytes of the rows, and of their numbers."""
            shape = 3, batch, heads[to][1] - heads[to][0], counts[source], own.shape[-1]
            return math.prod(shape) * own.element_size(), batch * counts[source] * number.new_empty(4).nbytes

        sent = [
            nothing if rank == here else torch.cat([_bytes(chosen[:, :, low:high]), number])
            for rank, (low, high) in enumerate(heads)
        ]
        taken = self.exchange.trade(sent, lambda source, to: (0 if source == to else sum(size(source, to)),)).take()
        parts, numbers = [], []
        for source, packed in enumerate(taken):
            if source == here:
                parts.append(own[:, :, heads[here][0] : heads[here][1]])
                numbers.append(places[here].expand(batch, -1))
                continue
            packed_rows, packed_numbers = packed.split(size(source, here))
            shape = 3, batch, heads[here][1] - heads[here][0], counts[source], own.shape[-1]
            parts.append(_seen_as(packed_rows, own.dtype).view(shape))
            numbers.append(places[source][_seen_as(packed_numbers, torch.int32).view(batch, -1).long()])
        sizes = [part.shape[1 + ROWS] for part in parts]
        return _Came(torch.cat(parts, 1 + ROWS), torch.cat(numbers, 1), sizes)

    def _give_back(self, results: Sequence[Tensor], heads: int, rows: Rows) -> list[Tensor]:
        """Gives every rank the results of its rows in own heads, for those of own rows in theirs."""
        batch, _, _, channels = results[0].shape
        counts = [self.moment.count(rows.count(piece)) for piece in self.pieces]
        spans = shares(heads, self.exchange.size)
        return self.exchange.trade(
            results, lambda source, to: (batch, spans[source][1] - spans[source][0], counts[to], channels)
        ).take()


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """Some rows ``[batch, some]`` of ``[batch, heads, rows, channels]``."""
    return rows.gather(ROWS, index[:, None, :, None].expand(-1, rows.shape[HEADS], -1, rows.shape[3]))


def _bytes(rows: Tensor) -> Tensor:
    return rows.reshape(-1).view(torch.uint8)


def _seen_as(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """The reverse; bytes that begin at an odd place are copied."""
    return (packed.clone() if packed.storage_offset() % dtype.itemsize else packed).view(dtype)
