"""The same passes in Triton: each row is read once and written once.

A program takes some rows of one head. Numbers are float32 in between, so that results differ from those of torch's
operations in 16 bits by their rounding. Sums are made row by row, in an order that the row alone decides, then in
float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from patchpipe.kernels.trends import LEVELS, Passes, Rows, Sums

NUMBERS = 4096  # that a program takes


@triton.jit
def _mine(heads, count, CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr):  # type: ignore[no-untyped-def]
    """A program's entry of the batch, head and rows, which of the rows there are, and which of their cells."""
    head = tl.program_id(0).to(tl.int64)
    row = (tl.program_id(1) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = row < count
    inside = there[:, None] & (tl.arange(0, WIDTH) < CHANNELS)[None, :]
    return head // heads, head % heads, row, there, inside


@triton.jit
def _cells(first, row, stride, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    return first + row[:, None] * stride + tl.arange(0, WIDTH)[None, :]


@triton.jit
def _renew_kernel(  # type: ignore[no-untyped-def]
    fresh, kept, change, scale, ahead, again, sums,
    fresh_batch, fresh_head, fresh_row, kept_batch, kept_head, kept_row, change_batch, change_head, change_row,
    scale_batch, scale_head, scale_row, ahead_batch, ahead_head, heads, count, largest,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    batch, of, row, there, inside = _mine(heads, count, CHANNELS, WIDTH, ROWS)
    kept_at = _cells(kept + batch * kept_batch + of * kept_head, row, kept_row, WIDTH)
    change_at = _cells(change + batch * change_batch + of * change_head, row, change_row, WIDTH)
    scale_at = scale + batch * scale_batch + of * scale_head + row * scale_row
    fresh_at = _cells(fresh + batch * fresh_batch + of * fresh_head, row, fresh_row, WIDTH)
    new = tl.load(fresh_at, mask=inside, other=0.0)
    shown = tl.load(kept_at, mask=inside, other=0.0).to(tl.float32)
    step = tl.load(scale_at, mask=there, other=0.0).to(tl.float32)
    before = tl.load(change_at, mask=inside, other=0).to(tl.float32) * step[:, None]
    part = tl.load(ahead + batch * ahead_batch + of * ahead_head).to(tl.float32) + tl.load(again).to(tl.float32)
    moved = new.to(tl.float32) + part * before - shown
    if SUMMED:
        place = sums + tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        apart = tl.num_programs(0).to(tl.int64) * tl.num_programs(1)
        tl.store(place, tl.sum(tl.sum(before * before, 1).to(tl.float64), 0))
        tl.store(place + apart, tl.sum(tl.sum(moved * before, 1).to(tl.float64), 0))
        tl.store(place + 2 * apart, tl.sum(tl.sum(moved * moved, 1).to(tl.float64), 0))
    unit = (tl.max(tl.abs(moved), 1) / largest).to(scale.dtype.element_ty)
    tl.store(scale_at, unit, mask=there)
    divisor = tl.where(unit == 0, 1.0, unit.to(tl.float32))
    tl.store(change_at, tl.floor(moved / divisor[:, None] + 0.5).to(tl.int8), mask=inside)
    tl.store(kept_at, new, mask=inside)


@triton.jit
def _show_kernel(  # type: ignore[no-untyped-def]
    kept, change, scale, ahead, kept_batch, kept_head, kept_row, change_batch, change_head, change_row,
    scale_batch, scale_head, scale_row, ahead_batch, ahead_head, heads, count,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    batch, of, row, there, inside = _mine(heads, count, CHANNELS, WIDTH, ROWS)
    kept_at = _cells(kept + batch * kept_batch + of * kept_head, row, kept_row, WIDTH)
    change_at = _cells(change + batch * change_batch + of * change_head, row, change_row, WIDTH)
    scale_at = scale + batch * scale_batch + of * scale_head + row * scale_row
    part = tl.load(ahead + batch * ahead_batch + of * ahead_head).to(tl.float32)
    step = tl.load(scale_at, mask=there, other=0.0).to(tl.float32)
    moved = tl.load(change_at, mask=inside, other=0).to(tl.float32) * step[:, None] * part
    shown = tl.load(kept_at, mask=inside, other=0.0).to(tl.float32) + moved
    tl.store(kept_at, shown.to(kept.dtype.element_ty), mask=inside)


def renew(rows: Rows, fresh: Tensor, ahead: Tensor, again: Tensor, summed: bool) -> Sums | None:
    """See ``trends.renew``."""
    fresh = fresh if fresh.stride(-1) == 1 else fresh.contiguous()
    grid, sizes = _programs(rows)
    places = _strides(rows.kept, rows.change)
    sums = torch.empty(3, *grid, dtype=torch.float64, device=fresh.device) if summed else again
    _renew_kernel[grid](
        fresh, rows.kept, rows.change, rows.scale, ahead, again, sums, *_strides(fresh), *places,
        *rows.scale.stride()[:3], *ahead.stride()[:2], rows.kept.shape[1], rows.kept.shape[2], float(LEVELS),
        **sizes, SUMMED=summed,
    )  # fmt: skip
    if not summed:
        return None
    return Sums(*sums.sum(-1).view(3, *ahead.shape))


def show(rows: Rows, ahead: Tensor) -> None:
    """See ``trends.show``."""
    grid, sizes = _programs(rows)
    places = _strides(rows.kept, rows.change)
    _show_kernel[grid](
        rows.kept, rows.change, rows.scale, ahead, *places, *rows.scale.stride()[:3], *ahead.stride()[:2],
        rows.kept.shape[1], rows.kept.shape[2], **sizes,
    )  # fmt: skip


def _programs(rows: Rows) -> tuple[tuple[int, int], dict[str, Any]]:
    """How many there are, and what each takes."""
    batch, heads, count, channels = rows.kept.shape
    width = triton.next_power_of_2(channels)
    taken = max(1, NUMBERS // width)
    return (batch * heads, triton.cdiv(count, taken)), {"CHANNELS": channels, "WIDTH": width, "ROWS": taken}


def _strides(*tensors: Tensor) -> list[int]:
    """From entry to entry, head to head and row to row; channels lie side by side."""
    return [stride for each in tensors for stride in each.stride()[:3]]


FUSED = Passes(renew, show, "Triton")
