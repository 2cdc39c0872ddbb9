"""Recognises an exhausted memory and says what to do about it."""

from __future__ import annotations

_PHRASES = ("out of memory", "can't allocate memory", "cannot allocate memory", "not enough memory")


def out_of_memory(error: BaseException, rank: int, device: str) -> str | None:
    """A message for people if ``error`` means that memory ran out, else ``None``."""
    text = str(error)
    if not isinstance(error, MemoryError) and not any(phrase in text.lower() for phrase in _PHRASES):
        return None
    detail = text.strip().split("\n")[0]
    return (
        f"rank {rank} ran out of memory on {device}: use more stages (pipefusion), a smaller picture, fewer "
        f"pictures at a time, or a lower dtype (bf16)" + (f" [{detail}]" if detail else "")
    )
