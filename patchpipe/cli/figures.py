"""Figures for people: parameters and bytes in few digits."""

from __future__ import annotations


def count(number: int) -> str:
    """A number of parameters for people: ``13.5 M``."""
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return str(number)


def size(number: int) -> str:
    """A number of bytes for people: ``1.5 GiB``."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} B"
