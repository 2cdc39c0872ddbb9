"""Checks that the descriptions of a layout share."""

from __future__ import annotations

from numbers import Integral
from typing import Any


def plain_numbers(value: Any) -> Any:
    """Whole numbers of other libraries, such as ``numpy.int64``, as Python's own."""
    if isinstance(value, tuple):
        return tuple(map(plain_numbers, value))
    return int(value) if isinstance(value, Integral) and not isinstance(value, int) else value


def check_at_least(name: str, value: Any, low: int, hint: str = "") -> None:
    """Refuses what is no whole number of ``low`` or more.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        tail = f", {hint}" if hint else ""
        raise ValueError(f"{name}={value!r} must be a whole number of {low} or more{tail}")


def check_positive(name: str, value: Any, unit: str) -> None:
    """Refuses what is no number above 0; ``None`` is let through.

    Raises:
        ValueError: It is not.
    """
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of {unit} above 0")


def check_rank(name: str, rank: Any, world_size: int, hint: str = "") -> None:
    """Refuses what is no rank of so many.

    Raises:
        ValueError: It is not.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or not 0 <= rank < world_size:
        raise ValueError(f"{name}={rank} is not one of the {world_size} ranks 0…{world_size - 1}{hint}")


def check_patch_rows(rows: tuple[int, ...], patches: int | None) -> None:
    """Refuses patches of no rows, or of another number than was asked for.

    Args:
        rows: Token rows of each patch.
        patches: How many patches were asked for, if it was said.

    Raises:
        ValueError: It is so.
    """
    if not rows or any(not isinstance(n, int) or n < 1 for n in rows):
        raise ValueError(f"patch_rows={rows} must list at least one row for each patch")
    if patches not in (None, len(rows)):
        raise ValueError(f"patch_rows={rows} names {len(rows)} patches but patches={patches}: leave one of them out")


def check_stage_blocks(blocks: tuple[float, ...], stages: int) -> None:
    """Refuses stages of no block, or blocks for another number of stages.

    Raises:
        ValueError: It is so.
    """
    if len(blocks) != stages or any(not isinstance(n, int | float) or n < 1 for n in blocks):
        raise ValueError(
            f"stage_blocks={blocks} must list at least one block for each of the {stages} stages (pipefusion={stages})"
        )
