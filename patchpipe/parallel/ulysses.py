"""Ulysses: ranks share a patch by rows, and in attention by heads (arXiv 2309.14509; hybrid as in arXiv 2411.01738).

Each rank keeps the keys and values of all rows of its own heads, so that the store is whole at the next
step with no traffic beyond the exchange itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange
from patchpipe.layout.axes import shares
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.masks import gather_columns
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows

HEADS, ROWS = 1, 2  # dims of [batch, heads, rows, channels]


class Ulysses:
    """One patch shared by the ranks of a line; heads and rows need not divide evenly.

    Args:
        exchange: The line's all-to-all.
        patch: The patch, whole.
        pieces: Each rank's own rows of it.
    """

    def __init__(self, exchange: Exchange, patch: Patch, pieces: tuple[Patch, ...]) -> None:
        self.exchange, self.patch, self.pieces = exchange, patch, pieces
        self._heads = 0  # of the layer at work
        self._columns: dict[Any, Tensor] = {}  # the same for every layer of these segments

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: heads are exchanged for rows, attended, and exchanged back."""
        query, key, value = self.gather_all(query, key, value, layer)
        columns = [self.gather_column(column, layer.rows, layer.entry) for column in attend.columns]
        seen = layer.remember(self.patch, key, value, *columns)
        return self.scatter(attend(query, *seen, asking=columns[0] if columns else None), layer.asking)

    def gather_all(self, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> list[Tensor]:
        """Queries, keys and values, at once where they have the same rows."""
        if layer.asking == layer.rows:
            return self.gather([query, key, value], layer.rows)
        return [*self.gather([query], layer.asking), *self.gather([key, value], layer.rows)]

    def gather(self, own: list[Tensor], rows: Rows) -> list[Tensor]:
        """Own rows of all heads, ``[batch, heads, own rows, channels]``, to all rows of own heads."""
        packed = torch.stack(own)
        mine = self.exchange.index
        self._heads = own[0].shape[HEADS]
        heads = shares(self._heads, self.exchange.size)
        sent = [packed[:, :, low:high] for low, high in heads]
        shape = list(sent[mine].shape)
        lengths = [rows.count(piece) for piece in self.pieces]
        received = self.exchange.all_to_all(sent, [(*shape[:3], length, shape[4]) for length in lengths])
        return list(rows.join(received, self.pieces, ROWS + 1).unbind(0))

    def gather_column(self, own: Tensor, rows: Rows, entry: int = 0) -> Tensor:
        """Own rows' column ``[batch, 1, own rows, 1]`` to that of all rows; exchanged for the first layer alone."""
        key = rows.segments, entry
        if key not in self._columns:
            received = gather_columns(self.exchange, own, [rows.count(piece) for piece in self.pieces])
            self._columns[key] = rows.join(received, self.pieces, ROWS)
        return self._columns[key]

    def scatter(self, whole: Tensor, rows: Rows) -> Tensor:
        """All rows of own heads, ``[batch, own heads, rows, channels]``, to own rows of all heads."""
        batch, _, _, channels = whole.shape
        sent = rows.part(whole, self.pieces, ROWS)
        length = rows.count(self.pieces[self.exchange.index])
        heads = [high - low for low, high in shares(self._heads, self.exchange.size)]
        received = self.exchange.all_to_all(sent, [(batch, count, length, channels) for count in heads])
        return torch.cat(received, dim=HEADS)
