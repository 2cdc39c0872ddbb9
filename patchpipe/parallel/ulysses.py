"""Ulysses: ranks share a patch by rows, and in attention by heads (arXiv 2309.14509; hybrid as in arXiv 2411.01738).

Each rank keeps the keys and values of all rows of its own heads, so that the store is whole at the next
step with no traffic beyond the exchange itself.

Over links of two speeds the exchange has two levels. There, and where values go first, a layer's heads take turns:
while some are attended to, others are on their way. A head is attended to by itself, so that neither changes a bit of
the result.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Coming, Trading
from patchpipe.layout.axes import shares
from patchpipe.parallel.levels import Levels
from patchpipe.parallel.values import ValuesAhead
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Part
from patchpipe.stage.keys.masks import gather_columns
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows

HEADS, ROWS = 1, 2  # dims of [batch, heads, rows, channels]
MOST_TURNS = 4
TURN_BYTES = 2**20  # of queries, keys and values that a rank is given in a turn: smaller messages are not worth it


class Ulysses:
    """One patch shared by the ranks of a line; heads and rows need not divide evenly.

    Args:
        exchange: The line's all-to-all.
        patch: The patch, whole.
        pieces: Each rank's own rows of it.
        turns: In how many turns heads are exchanged and attended to; ``None`` finds out, by the size of what is sent.
    """

    def __init__(self, exchange: Trading, patch: Patch, pieces: tuple[Patch, ...], turns: int | None = None) -> None:
        self.exchange, self.patch, self.pieces = exchange, patch, pieces
        self.turns = turns
        self.ahead_of: list[ValuesAhead] = []  # whose values were sent first
        self._heads = 0  # of the layer at work
        self._columns: dict[Any, Tensor] = {}  # the same for every layer of these segments

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> ValuesAhead:
        """See ``Sharing``."""
        ahead = ValuesAhead(self.exchange, self.pieces, layer.rows, parts, heads)
        self.ahead_of.append(ahead)
        return ahead

    def settle(self) -> None:
        """Makes sure that no values were changed after they were sent.

        Raises:
            RuntimeError: Some were.
        """
        for ahead in self.ahead_of:
            ahead.settle()

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: heads are exchanged for rows, attended, and exchanged back."""
        if layer.ahead is not None and attend.column is not None:
            layer.ahead.take(value)  # what was begun first is taken first
        columns = [self.gather_column(column, layer.rows, layer.entry) for column in attend.columns]
        turns = self._turns(query, layer)
        if turns > 1:
            return self._in_turns(turns, attend, query, key, value, columns, layer)
        query, key, value = self.gather_all(query, key, value, layer)
        seen = layer.remember(self.patch, key, value, *columns)
        attend = attend.of_heads(self.heads_of(self.exchange.index))
        return self.scatter(attend(query, *seen, asking=columns[0] if columns else None), layer.asking)

    # -- in turns --------------------------------------------------------------------------------

    def _turns(self, query: Tensor, layer: Attending) -> int:
        """In how many turns this layer's heads go; the same on every rank of the line."""
        batch, heads, _, channels = query.shape
        most = -(-heads // self.exchange.size)
        if layer.asking != layer.rows:  # queries have rows of their own
            return 1
        if self.turns is not None:
            return min(self.turns, most)
        if layer.ahead is None and not isinstance(self.exchange, Levels):
            return 1
        size = 3 * batch * most * layer.rows.count(self.patch) * channels * query.element_size()
        return max(1, min(MOST_TURNS, most, size // TURN_BYTES))

    def _in_turns(
        self, turns: int, attend: Attend, query: Tensor, key: Tensor, value: Tensor, columns: list[Tensor],
        layer: Attending,
    ) -> Tensor:  # fmt: skip
        """All that comes is under way at once; a turn's result sets out before the next turn is waited for.

        Keys and values come first and whole where they are stored: stale rows of all heads are renewed together.
        """
        stored, ahead = layer.store is not None, layer.ahead
        fresh = [key] if ahead is not None else [key, value]
        with_each = [query] if stored else [query, *fresh]
        first = self.begin(fresh, layer.rows) if stored else None
        coming = [self.begin(with_each, layer.rows, (turn, turns)) for turn in range(turns)]
        values = [] if ahead is None else [ahead.take(value)]
        seen: tuple[Tensor, ...] = (*values, *columns)
        if first is not None:
            seen = layer.remember(self.patch, *first.take(), *values, *columns)
        asking = columns[0] if columns else None
        going: list[Coming] = []
        mine = shares(self._heads, self.exchange.size)[self.exchange.index]
        for (low, high), gathering in zip(shares(mine[1] - mine[0], turns), coming, strict=True):
            taken = gathering.take()
            whole = 3 - len(taken)  # keys and values of all own heads that are here already; columns come after them
            kept = [rows[:, low:high] for rows in seen[:whole]]
            of_turn = attend.of_heads(self.heads_of(self.exchange.index, (len(going), turns)))
            result = of_turn(*taken, *kept, *seen[whole:], asking=asking)
            going.append(self._send_back(result, layer.asking, (len(going), turns)))
        back = [each.take() for each in going]
        return torch.cat([turn[rank] for rank in range(self.exchange.size) for turn in back], dim=HEADS)

    def heads_of(self, rank: int, turn: tuple[int, int] = (0, 1)) -> tuple[int, int]:
        """The heads that a rank attends to in a turn, of so many."""
        low, high = shares(self._heads, self.exchange.size)[rank]
        start, stop = shares(high - low, turn[1])[turn[0]]
        return low + start, low + stop

    # -- rows for heads, and back ----------------------------------------------------------------

    def gather_all(self, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> list[Tensor]:
        """Queries, keys and values, at once where they have the same rows and none went ahead."""
        ahead = layer.ahead
        fresh = [key] if ahead is not None else [key, value]
        if layer.asking == layer.rows:
            coming = [self.begin([query, *fresh], layer.rows)]
        else:
            coming = [self.begin([query], layer.asking), self.begin(fresh, layer.rows)]
        values = [] if ahead is None else [ahead.take(value)]
        return [*(rows for gathering in coming for rows in gathering.take()), *values]

    def begin(self, own: list[Tensor], rows: Rows, turn: tuple[int, int] = (0, 1)) -> Gathering:
        """Starts to give own rows of all heads, ``[batch, heads, own rows, channels]``, for all rows of own heads.

        Args:
            own: This rank's rows of some tensors.
            rows: The sequence.
            turn: Which turn of how many; each has a part of every rank's heads.
        """
        packed = torch.stack(own)
        self._heads = own[0].shape[HEADS]
        heads = [self.heads_of(rank, turn) for rank in range(self.exchange.size)]
        shape, lengths = packed.shape, [rows.count(piece) for piece in self.pieces]
        coming = self.exchange.trade(
            [packed[:, :, low:high] for low, high in heads],
            lambda source, to: (*shape[:2], heads[to][1] - heads[to][0], lengths[source], shape[4]),
        )
        return Gathering(coming, rows, self.pieces)

    def gather_column(self, own: Tensor, rows: Rows, entry: int = 0) -> Tensor:
        """Own rows' column ``[batch, 1, own rows, 1]`` to that of all rows; exchanged for the first layer alone."""
        key = rows.segments, entry
        if key not in self._columns:
            received = gather_columns(self.exchange, own, [rows.count(piece) for piece in self.pieces])
            self._columns[key] = rows.join(received, self.pieces, ROWS)
        return self._columns[key]

    def scatter(self, whole: Tensor, rows: Rows) -> Tensor:
        """All rows of own heads, ``[batch, own heads, rows, channels]``, to own rows of all heads."""
        return torch.cat(self._send_back(whole, rows).take(), dim=HEADS)

    def _send_back(self, whole: Tensor, rows: Rows, turn: tuple[int, int] = (0, 1)) -> Coming:
        """Starts to give every rank its rows of a turn's heads."""
        batch, _, _, channels = whole.shape
        heads = [self.heads_of(rank, turn) for rank in range(self.exchange.size)]
        lengths = [rows.count(piece) for piece in self.pieces]
        return self.exchange.trade(
            rows.part(whole, self.pieces, ROWS),
            lambda source, to: (batch, heads[source][1] - heads[source][0], lengths[to], channels),
        )


class Gathering:
    """All rows of own heads, on their way.

    Args:
        coming: Each rank's rows, ``[tensors, batch, own heads, its rows, channels]``.
        rows: The sequence.
        pieces: Each rank's rows of it.
    """

    def __init__(self, coming: Coming, rows: Rows, pieces: tuple[Patch, ...]) -> None:
        self._coming, self._rows, self._pieces = coming, rows, pieces

    def take(self) -> list[Tensor]:
        """Each tensor, ``[batch, own heads, rows, channels]``; once only."""
        return list(self._rows.join(self._coming.take(), self._pieces, ROWS + 1).unbind(0))
