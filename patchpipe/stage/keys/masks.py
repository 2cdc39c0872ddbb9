"""Masks of keys, as columns: one number a row, so that they are cut, stored and sent like the rows they mask.

A padded prompt is the reason for them: text rows beyond a prompt's end must not be attended to.

A mask that differs from query to query too has one number for every pair of rows, and is the same in every patch of a
call. It is left whole, as a table; the column then has the numbers of rows, which tell which keys are there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from patchpipe.distributed.exchange import Trading
from patchpipe.stage.rows import Rows

SHARED_BY_HEADS = 1


def key_column(mask: Tensor | None, key: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to the scores of each key.

    Args:
        mask: As ``scaled_dot_product_attention`` takes it: boolean (true where a key takes part) or additive, to be
            broadcast to ``[batch, heads, queries, keys]``; ``None`` masks nothing.
        key: ``[batch, heads, rows, channels]``.
        dtype: Of the query, as the kernels ask.

    Returns:
        ``[batch, 1 or heads, rows, 1]``, with minus infinity where a key takes no part.

    Raises:
        NotImplementedError: The mask differs from query to query.
    """
    batch, _, rows, _ = key.shape
    if mask is None:
        return key.new_zeros((batch, 1, rows, 1), dtype=dtype)
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[2] != 1:
        raise NotImplementedError(
            f"a self-attention mask of {mask.shape[2]} queries by {mask.shape[3]} keys is not supported while patches "
            f"stream or are shared, only one that is alike for all queries: use warmup='all' on one device, or with "
            f"pipefusion alone"
        )
    return added(mask, dtype).to(dtype).expand(batch, -1, 1, rows).transpose(2, 3)


def added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores: nothing where a key takes part, minus infinity where it does not."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def table_of(mask: Tensor | None, rows: Rows) -> Tensor | None:
    """A mask of all rows by all rows as ``[batch, heads, rows, rows]``, as it is; ``None`` for any other mask.

    Args:
        mask: As ``scaled_dot_product_attention`` takes it.
        rows: The layer's sequence.
    """
    whole = (rows.total, rows.total)
    if mask is None or mask.shape[-2:] != whole or rows.total == 1 or rows.raster.outer > 1:
        return None
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def row_numbers(ranges: Sequence[tuple[int, int]], key: Tensor) -> Tensor:
    """The numbers of some rows as a column ``[batch, 1, rows, 1]``."""
    numbers = torch.cat([torch.arange(low, high, device=key.device) for low, high in ranges])
    return numbers.view(1, 1, -1, 1).expand(key.shape[0], -1, -1, -1)


def as_mask(column: Tensor) -> Tensor:
    """A column ``[batch, 1 or heads, rows, 1]`` as a mask ``[batch, 1 or heads, 1, keys]``."""
    return column.transpose(2, 3)


def gather_columns(exchange: Trading, own: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The column of every rank of a line, which all of them ask for at the same place.

    Args:
        exchange: The line.
        own: This rank's, ``[batch, 1, own rows, 1]``.
        lengths: Rows of each rank.
    """
    given = [own.contiguous()] * exchange.size
    return exchange.trade(given, lambda source, _: (own.shape[0], SHARED_BY_HEADS, lengths[source], 1)).take()
