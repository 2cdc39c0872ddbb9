"""What a self-attention layer is given beside its own module, and how ranks that share a patch answer for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from patchpipe.kernels.choice import KernelWatch
from patchpipe.stage.keys.early import Ahead, Part
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.keys.masks import added, as_mask
from patchpipe.stage.keys.prefix import PrefixKeys
from patchpipe.stage.keys.store import Entries, LayerStore, LayerStores
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows


@dataclass(frozen=True)
class Attend:
    """``scaled_dot_product_attention`` and whatever a model gave it beside its tensors.

    Attributes:
        compute: The function.
        column: What its ``attn_mask`` adds to the scores of this rank's fresh keys, ``[batch, 1 or heads, rows, 1]``;
            ``None`` where no key of the layer is masked, on any rank.
        table: The mask of all rows ``[batch, 1 or heads, rows, rows]``, where it differs from query to query. The
            column then has the number of each key's row.
        dropout: Its ``dropout_p``.
        causal: Its ``is_causal``.
        scale: Its ``scale``; ``None`` is one over the root of the channels.
        grouped: Its ``enable_gqa``.
        further: Keys and values of all heads that every rank has, to be seen beside those of the rows: of the picture
            of an IP-Adapter.
        dtype: Of the query.
    """

    compute: Callable[..., Tensor]
    column: Tensor | None = None
    table: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False
    further: tuple[Tensor, ...] = ()
    dtype: torch.dtype = torch.float32

    def of_heads(self, heads: tuple[int, int]) -> Attend:
        """The same where a rank has the rows of some heads alone."""
        return replace(self, further=tuple(rows[:, slice(*heads)] for rows in self.further)) if self.further else self

    @property
    def columns(self) -> tuple[Tensor, ...]:
        """The column, if there is one: what is kept and sent beside keys and values."""
        return () if self.column is None else (self.column,)

    def mask(self, column: Tensor, asking: Tensor | None = None) -> Tensor:
        """A column as a mask ``[batch, 1 or heads, 1 or queries, keys]``.

        Args:
            column: Of keys.
            asking: Of the queries, where it tells the numbers of rows; this rank's fresh rows, if not given.
        """
        if self.table is None:
            return as_mask(column)
        asking = self.column if asking is None else asking
        assert asking is not None
        return added(self.table[:, :, asking[0, 0, :, 0]][..., column[0, 0, :, 0]], self.dtype)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, column: Tensor | None = None, *, asking: Tensor | None = None
    ) -> Tensor:
        """Attention of a query over keys and values on this rank, and the column of all those keys; see ``mask``."""
        if not query.shape[2]:  # segments that ask ride with another patch
            return query.new_empty(*query.shape[:3], value.shape[3])
        options = {"enable_gqa": True} if self.grouped else {}
        if self.further:  # where nothing is masked
            key, value = (torch.cat(pair, 2) for pair in zip((key, value), self.further, strict=True))
        mask = None if column is None else self.mask(column, asking)
        return self.compute(query, key, value, mask, self.dropout, self.causal, scale=self.scale, **options)


class Sharing(Protocol):
    """How the ranks that share a patch attend together."""

    def ahead(self, layer: Attending, parts: Sequence[Part], heads: int) -> Ahead | None:
        """Values that will be sent as soon as they are projected; ``None`` where that gains nothing.

        Args:
            layer: The layer's rows.
            parts: The projections that make its values.
            heads: Of the layer, on this rank.
        """
        ...

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """Attention of this rank's rows ``[batch, heads, own rows, channels]`` over all rows there are.

        Args:
            attend: Attention of a query over keys and values on this rank, and the column of its own keys.
            query: Of this rank's rows.
            key: The same.
            value: The same.
            layer: The layer's store, and its rows.

        Returns:
            The result for this rank's rows and all heads.
        """
        ...


@dataclass(frozen=True)
class Attending:
    """What a self-attention layer needs beside its own module.

    Attributes:
        patch: This rank's rows.
        store: The layer's keys and values; ``None`` where nothing is ever stale.
        sharing: The ranks that share the patch, if there are several.
        rows: The layer's sequence: its keys and values.
        masked: Whether some of its keys are masked, on whatever rank.
        entries: Which entries of the batch are at work; ``None`` for all.
        kernels: Looks at what torch's kernels are given; ``None`` where there is but one.
        pace: Of the call, where stale rows are forecast.
        blanks: Rows of zeros that stand in for segments this rank has no rows of; no key and no query.
        masks_queries: Whether the layer masks queries as it does keys.
        entry: Which entry of what is kept together this is of, where a layer attends to them one by one.
        kept_keys: Which of this rank's keys take part, ``[1, rows]``, where the layer would drop the others.
        queries: The rows that ask, if they are not all of them.
        each: What the layer needs for each of its calls, where it attends to the entries of the batch one by one.
        ahead: Its values, where they were sent as soon as they were projected.
        adapted: Whether the attention of an IP-Adapter may follow the layer's own.
        again: What that one needs, where rows of the patches are among its keys, and those of the adapter's picture
            after them; ``None`` where it sees the picture alone, which no patch changes.
        prefix: Keys and values of rows before the picture, as the request's first call made them.
    """

    patch: Patch
    store: LayerStore | None
    sharing: Sharing | None
    rows: Rows
    masked: bool = False
    entries: Entries | None = None
    kernels: KernelWatch | None = None
    pace: Pace | None = None
    blanks: tuple[int, ...] = ()
    masks_queries: bool = False
    entry: int = 0
    kept_keys: Tensor | None = None
    queries: Rows | None = None
    each: tuple[Attending, ...] = ()
    ahead: Ahead | None = None
    adapted: bool = False
    again: Attending | None = None
    prefix: PrefixKeys | None = None

    @property
    def further(self) -> tuple[Tensor, ...]:
        """Keys and values that are seen beside those of a patch."""
        return () if self.prefix is None or self.patch.uncut else self.prefix.beside(self.entries)

    @property
    def asking(self) -> Rows:
        """The rows of its queries."""
        return self.queries or self.rows

    @property
    def calls(self) -> int:
        """How often the layer attends."""
        return len(self.each) or 1

    def one_by_one(self, name: str, stores: LayerStores | None, kept: Tensor, segments: tuple[str, ...]) -> Attending:
        """For a layer that attends to the entries of the batch one by one, and drops masked rows.

        Args:
            name: The layer.
            stores: The branch's keys and values, of each entry by itself here.
            kept: Which rows of the masked segments take part, ``[entries, rows]``.
            segments: These.
        """
        first = 0 if self.entries is None else self.entries[0]
        lengths = zip(self.rows.segments, self.rows.lengths(self.patch), strict=True)
        parts = [kept if segment in segments else kept.new_ones(len(kept), length) for segment, length in lengths]
        found = []
        for index, row in enumerate(torch.cat(parts, 1).split(1)):
            entry = first + index
            store = None if stores is None else stores.setdefault(f"{name}.{entry}", LayerStore(self.rows))
            found.append(replace(self, store=store, masked=True, entries=None, entry=entry, kept_keys=row))
        return replace(self, each=tuple(found))

    @property
    def outlives(self) -> bool:
        """Whether something may hold on to queries, keys or values themselves after the layer is done with them."""
        return self.sharing is not None or (self.store is not None and self.patch.whole)

    def remember(self, patch: Patch, *fresh: Tensor) -> tuple[Tensor, ...]:
        """Stores a whole patch's fresh keys, values and column, if any; returns those of every row that exists.

        Args:
            patch: The patch.
            fresh: What there is to store.
        """
        if self.store is None:
            return fresh
        if patch.whole:
            return self.store.keep(*fresh, entries=self.entries, pace=self.pace)
        return self.store.write(patch, *fresh, pace=self.pace)
