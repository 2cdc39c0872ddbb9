"""Ulysses: ranks share a patch by rows, and in attention by heads (arXiv 2309.14509; hybrid as in arXiv 2411.01738).

Each rank keeps the keys and values of all rows of its own heads, so that the store is whole at the next
step with no traffic beyond the exchange itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange
from patchpipe.layout.axes import shares
from patchpipe.stage.attention import Attend, Attending
from patchpipe.stage.masks import gather_columns
from patchpipe.stage.patches import Patch

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
        self._column: Tensor | None = None  # the same for every layer that masks keys

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: heads are exchanged for rows, attended, and exchanged back."""
        text = (layer.text_rows, layer.text_first)
        query, key, value = self.gather([query, key, value], *text)
        columns = [self.gather_column(column, *text) for column in attend.columns]
        return self.scatter(attend(query, *layer.remember(self.patch, key, value, *columns)), *text)

    def gather(self, rows: list[Tensor], text_rows: int, text_first: bool) -> list[Tensor]:
        """Own rows of all heads, ``[batch, heads, own rows, channels]``, to all rows of own heads."""
        packed = torch.stack(rows)
        mine = self.exchange.index
        self._heads = rows[0].shape[HEADS]
        heads = shares(self._heads, self.exchange.size)
        sent = [packed[:, :, low:high] for low, high in heads]
        shape = list(sent[mine].shape)
        lengths = [self._length(piece, text_rows) for piece in self.pieces]
        received = self.exchange.all_to_all(sent, [(*shape[:3], length, shape[4]) for length in lengths])
        whole = self._in_order(received, text_rows, text_first)
        return list(whole.unbind(0))

    def gather_column(self, own: Tensor, text_rows: int, text_first: bool) -> Tensor:
        """Own rows' column ``[batch, 1, own rows, 1]`` to that of all rows; exchanged for the first layer alone."""
        if self._column is None:
            lengths = [self._length(piece, text_rows) for piece in self.pieces]
            received = [column.unsqueeze(0) for column in gather_columns(self.exchange, own, lengths)]
            self._column = self._in_order(received, text_rows, text_first).squeeze(0)
        return self._column

    def scatter(self, rows: Tensor, text_rows: int, text_first: bool) -> Tensor:
        """All rows of own heads, ``[batch, own heads, rows, channels]``, to own rows of all heads."""
        batch, _, _, channels = rows.shape
        sent = self._by_rank(rows, text_rows, text_first)
        length = self._length(self.pieces[self.exchange.index], text_rows)
        heads = [high - low for low, high in shares(self._heads, self.exchange.size)]
        received = self.exchange.all_to_all(sent, [(batch, count, length, channels) for count in heads])
        return torch.cat(received, dim=HEADS)

    def _length(self, piece: Patch, text_rows: int) -> int:
        start, stop = piece.text_range(text_rows)
        return piece.token_count + stop - start

    def _in_order(self, received: list[Tensor], text_rows: int, text_first: bool) -> Tensor:
        texts, images = [], []
        for piece, rows in zip(self.pieces, received, strict=True):
            text = self._length(piece, text_rows) - piece.token_count
            sizes = [text, piece.token_count] if text_first else [piece.token_count, text]
            first, second = rows.split(sizes, dim=3)
            texts.append(first if text_first else second)
            images.append(second if text_first else first)
        return torch.cat([*texts, *images] if text_first else [*images, *texts], dim=3)

    def _by_rank(self, rows: Tensor, text_rows: int, text_first: bool) -> list[Tensor]:
        text_sizes = [self._length(piece, text_rows) - piece.token_count for piece in self.pieces]
        image_sizes = [piece.token_count for piece in self.pieces]
        count = len(self.pieces)
        parts = rows.split([*text_sizes, *image_sizes] if text_first else [*image_sizes, *text_sizes], dim=ROWS)
        pairs = zip(parts[:count], parts[count:], strict=True)
        return [torch.cat(pair, dim=ROWS) for pair in pairs]
