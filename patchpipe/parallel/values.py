"""Values of a layer that are exchanged before its queries and keys are there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Coming, Trading
from patchpipe.layout.axes import shares
from patchpipe.stage.keys.early import OTHER, Part
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows

HEADS, ROWS = 1, 2  # dims of [batch, heads, rows, channels]
BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NaN is equal to itself


class ValuesAhead:
    """See ``stage.keys.early.Ahead``. Every rank begins the exchanges of a layer's parts in one order.

    Args:
        exchange: The line.
        pieces: Each rank's own rows of the patch.
        rows: The layer's sequence.
        parts: The projections that make its values, in the order of its rows.
        heads: Of the layer, all ranks of the line together.
    """

    def __init__(
        self, exchange: Trading, pieces: tuple[Patch, ...], rows: Rows, parts: Sequence[Part], heads: int
    ) -> None:
        self._exchange, self._pieces, self._rows = exchange, pieces, rows
        self._parts, self._heads = parts, heads
        # Models project the picture's rows before the text's; a rank without rows of a kind may leave them out.
        self._order = sorted(range(len(parts)), key=lambda at: (parts[at].query, parts[at].value) in OTHER)
        self._put: dict[int, Tensor] = {}
        self._coming: dict[int, Coming] = {}
        self._taken: Tensor | None = None
        self._changed: Tensor | None = None  # whether values were changed after they were sent, on a device to be asked

    def put(self, index: int, projected: Tensor) -> None:
        """See ``Ahead``.

        Raises:
            RuntimeError: The projection was asked twice, or has other rows than the layer.
        """
        value = projected.unflatten(-1, (self._heads, -1)).transpose(1, 2)
        length = self._length(self._exchange.index, self._parts[index])
        if index in self._put or value.ndim != 4 or value.shape[ROWS] != length:
            raise RuntimeError(
                f"a layer's {self._parts[index].value} made {tuple(projected.shape)} values where {length} rows were "
                f"expected, once: leave values_first out"
            )
        self._put[index] = value.contiguous().clone() if value.is_contiguous() else value.contiguous()
        self._begin()

    def take(self, value: Tensor) -> Tensor:
        """See ``Ahead``; taken again, it is the same.

        Raises:
            RuntimeError: Values were changed after they were sent.
        """
        if self._taken is not None:
            return self._taken
        for index in self._order:
            if index not in self._put:
                if self._length(self._exchange.index, self._parts[index]):
                    raise RuntimeError(f"a layer never called its {self._parts[index].value}: leave values_first out")
                self._put[index] = value[:, :, :0].contiguous()
        self._begin()
        self._compare(value)
        found = {index: self._coming[index].take() for index in self._order}
        whole = [torch.cat([found[at][rank] for at in range(len(self._parts))], ROWS) for rank in self._ranks]
        self._taken = self._rows.join(whole, self._pieces, ROWS)
        self._put.clear()
        return self._taken

    def settle(self) -> None:
        """Raises ``RuntimeError`` where values were changed after they were sent."""
        if self._changed is not None and bool(self._changed):
            raise RuntimeError(
                "a layer changed its values after it had projected them, so that they were sent too early: leave "
                "values_first out"
            )

    @property
    def _ranks(self) -> range:
        return range(self._exchange.size)

    def _length(self, rank: int, part: Part) -> int:
        """How many rows of a part a rank has."""
        lengths = self._rows.lengths(self._pieces[rank])
        held = zip(self._rows.segments, lengths, strict=True)
        return sum(length for segment, length in held if segment in part.segments)

    def _begin(self) -> None:
        """Begins what can be begun, in order."""
        for index in self._order:
            if index not in self._put:
                return
            if index not in self._coming:
                self._coming[index] = self._trade(self._put[index], self._parts[index])

    def _trade(self, value: Tensor, part: Part) -> Coming:
        heads, (batch, _, _, channels) = shares(self._heads, self._exchange.size), value.shape
        lengths = [self._length(rank, part) for rank in self._ranks]
        return self._exchange.trade(
            [value[:, low:high] for low, high in heads],
            lambda source, to: (batch, heads[to][1] - heads[to][0], lengths[source], channels),
        )

    def _compare(self, value: Tensor) -> None:
        """Whether the layer attends with what was sent: now, or at the end of the request where asking is dear."""
        sent = torch.cat([self._put[index] for index in range(len(self._parts))], ROWS)
        if sent.shape != value.shape or sent.dtype != value.dtype:
            raise RuntimeError(
                f"a layer attends with values of {tuple(value.shape)} where it projected {tuple(sent.shape)}: leave "
                f"values_first out"
            )
        bits = BITS[value.element_size()]
        self._changed = (sent.view(bits) != value.contiguous().view(bits)).any()
        if value.device.type == "cpu":
            self.settle()
