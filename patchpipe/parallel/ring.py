"""Ring: ranks share a patch by rows, and its keys and values go around (arXiv 2310.01889; hybrid: arXiv 2411.01738).

Each rank keeps its queries. The fresh keys and values of the patch travel the ring in one hop less than there
are ranks, each hop under way while the rows at hand are attended to; the parts of the result are merged by
their log-sum-exp. Where patches stream, every rank stores all rows, so that only fresh ones ever travel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Exchange
from patchpipe.kernels.lse import attend_with_lse
from patchpipe.parallel.ulysses import Ulysses
from patchpipe.stage.attending import Attend, Attending
from patchpipe.stage.keys.early import Ahead, Part
from patchpipe.stage.keys.masks import as_mask, gather_columns
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows


class Ring:
    """One patch shared by the ranks of a ring, or of a ring of Ulysses lines; rows need not divide evenly.

    Args:
        exchange: The ring.
        patch: The patch, whole.
        pieces: Each sharing rank's own rows of it, a Ulysses line's next to each other.
        ulysses: This rank's line, if each place of the ring has several ranks.
    """

    def __init__(
        self, exchange: Exchange, patch: Patch, pieces: tuple[Patch, ...], ulysses: Ulysses | None = None
    ) -> None:
        width = len(pieces) // exchange.size
        self.exchange, self.patch, self.ulysses = exchange, patch, ulysses
        self.slices = tuple(pieces[start : start + width] for start in range(0, len(pieces), width))
        self._columns: dict[Any, list[Tensor]] = {}  # of every slice; the same for every layer of these segments

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> Ahead | None:
        """See ``Sharing``: values go ahead inside a Ulysses line alone."""
        return None if self.ulysses is None else self.ulysses.ahead(layer, parts, heads)

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """See ``Sharing``: keys and values of own heads go around, inside Ulysses' exchange of heads for rows.

        Raises:
            NotImplementedError: Dropout, causal or grouped attention, or no kernel for these tensors.
        """
        _check(attend)
        if layer.ahead is not None and attend.column is not None:
            layer.ahead.take(value)  # what was begun first is taken first
        columns = [self._gather_columns(column, layer) for column in attend.columns]
        if self.ulysses is None:
            return self._attend(query, key, value, columns, attend, layer)
        query, key, value = self.ulysses.gather_all(query, key, value, layer)
        attend = attend.of_heads(self.ulysses.heads_of(self.ulysses.exchange.index))
        return self.ulysses.scatter(self._attend(query, key, value, columns, attend, layer), layer.asking)

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        columns: list[list[Tensor]],
        attend: Attend,
        layer: Attending,
    ) -> Tensor:
        """Own rows over all rows there are, ``[batch, own heads, own rows, channels]`` all three.

        Where keys are masked, ``columns`` has one entry: the column of every slice of the ring.
        """
        tabled = attend.table is not None
        asking = columns[0][self.exchange.index] if columns else None
        merged = Merged(query, attend.scale, partial(attend.mask, asking=asking))
        fresh: dict[int, Tensor] = {}
        streams = layer.store is not None and not self.patch.whole
        late = streams and layer.pace is not None and self.patch.index == 0  # what is fresh decides on the forecast
        stale = self._others(layer, tabled) if streams and not late else []
        for source, chunk in self._around(torch.stack([key, value]), layer.rows):
            riders = any(layer.rows.riders(piece) for piece in self.slices[source])
            masks = [column[source] for column in columns if riders or tabled]  # of image rows alone none is masked
            for rows in (*stale, (*chunk.unbind(0), *masks)):
                merged.add(*rows)
            stale = []  # the first hop alone is hidden behind them
            if layer.store is not None:
                fresh[source] = chunk
        if layer.store is not None:
            ordered = self._in_order([fresh[place] for place in range(len(fresh))], layer.rows, 3).unbind(0)
            layer.remember(self.patch, *ordered, *(self._joined(column, layer) for column in columns))
        for rows in self._others(layer, tabled) if late else ():
            merged.add(*rows)
        if attend.further:
            merged.add(*attend.further)
        return merged.result

    def _others(self, layer: Attending, tabled: bool) -> list[tuple[Tensor, ...]]:
        assert layer.store is not None
        return layer.store.others(self.patch, with_column=tabled)

    def _gather_columns(self, own: Tensor, layer: Attending) -> list[Tensor]:
        """The column of every slice, from own rows' ``[batch, 1, rows, 1]``; exchanged for the first layer alone."""
        key = layer.rows.segments, layer.entry
        if key not in self._columns:
            if self.ulysses is not None:
                own = self.ulysses.gather_column(own, layer.rows, layer.entry)
            lengths = [_count(slice_, layer.rows) for slice_ in self.slices]
            self._columns[key] = gather_columns(self.exchange, own, lengths)
        return self._columns[key]

    def _joined(self, columns: list[Tensor], layer: Attending) -> Tensor:
        """The columns of all slices as that of one sequence."""
        return self._in_order(columns, layer.rows, 2)

    def _around(self, own: Tensor, rows: Rows) -> Iterator[tuple[int, Tensor]]:
        """The place and the ``[keys and values, batch, heads, rows, channels]`` of every slice, this rank's first.

        While the caller uses one, the next is on its way.
        """
        index, size = self.exchange.index, self.exchange.size
        chunk = own
        for place in ((index - hop) % size for hop in range(size - 1)):
            shape = list(own.shape)
            shape[3] = _count(self.slices[place - 1], rows)
            coming = self.exchange.pass_on(chunk, torch.Size(shape))
            yield place, chunk
            chunk = coming.take()
        yield (index + 1) % size, chunk

    def _in_order(self, chunks: list[Tensor], rows: Rows, dim: int) -> Tensor:
        """The rows of all slices as one sequence, each segment in one piece."""
        pieces: list[Patch] = []
        parts: list[Tensor] = []
        for slice_, chunk in zip(self.slices, chunks, strict=True):
            pieces += slice_
            parts += rows.part(chunk, slice_, dim)
        return rows.join(parts, pieces, dim)


def _count(pieces: tuple[Patch, ...], rows: Rows) -> int:
    """Rows of a slice of the ring."""
    return sum(rows.count(piece) for piece in pieces)


class Merged:
    """Attention of one query over keys and values that come in parts (arXiv 2310.01889, section 3).

    Args:
        query: ``[batch, heads, rows, channels]``.
        scale: Of its products with keys; ``None`` is one over the root of the channels.
        mask_of: The mask that a column of keys stands for.
    """

    def __init__(
        self, query: Tensor, scale: float | None = None, mask_of: Callable[[Tensor], Tensor] = as_mask
    ) -> None:
        self._query, self._scale, self._mask_of = query, scale, mask_of
        self._sum: Tensor | None = None
        self._lse: Tensor | None = None

    def add(self, key: Tensor, value: Tensor, column: Tensor | None = None) -> None:
        """Takes in further keys and values, ``[batch, heads, any rows, channels]``.

        Keys that take no part weigh next to nothing instead: were all of these masked for an entry of the batch, its
        result would be no number. As it is, what the others weigh lets theirs vanish.

        Args:
            key: The keys.
            value: The values.
            column: What a mask adds to their scores, ``[batch, 1 or heads, rows, 1]``.
        """
        if not (self._query.numel() and key.numel()):  # a line may have more ranks than heads
            return
        mask = None if column is None else self._mask_of(column)
        mask = None if mask is None else mask.clamp(min=torch.finfo(mask.dtype).min / 4)
        part, lse = attend_with_lse(self._query, key, value, self._scale, mask)
        part = part.to(lse.dtype)  # summed at least in float32
        if self._sum is None or self._lse is None:
            self._sum, self._lse = part, lse
            return
        self._sum.lerp_(part, torch.sigmoid(lse - self._lse).unsqueeze(-1))
        self._lse = torch.logaddexp(self._lse, lse)

    @property
    def result(self) -> Tensor:
        """Attention over all of them, in the query's shape and dtype."""
        return torch.zeros_like(self._query) if self._sum is None else self._sum.to(self._query.dtype)


def _check(attend: Attend) -> None:
    """Raises for what the merged kernels would not honour."""
    asked = {
        "dropout": attend.dropout != 0.0,
        "causal attention": attend.causal,
        "grouped heads": attend.grouped,
    }
    found = [name for name, given in asked.items() if given]
    if found:
        raise NotImplementedError(f"ring does not support {' or '.join(found)} in self-attention: use ulysses instead")
