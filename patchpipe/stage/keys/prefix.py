"""Keys and values of rows before the picture, which a pipeline's first call makes and later ones read."""

from __future__ import annotations

import torch
from torch import Tensor

from patchpipe.stage.keys.store import Entries

ROWS = 1  # dim of the rows in [batch, rows, heads, channels], as blocks keep them


class PrefixKeys:
    """Those of one block, one half of a batch and one guidance branch."""

    def __init__(self) -> None:
        self._kept: tuple[Tensor, ...] = ()

    @property
    def count(self) -> int:
        """How many rows there are."""
        return self._kept[0].shape[ROWS] if self._kept else 0

    @property
    def bytes(self) -> int:
        """Memory they hold."""
        return sum(kept.nbytes for kept in self._kept)

    def put(self, entries: Entries | None, *fresh: Tensor) -> None:
        """Takes over keys and values of some entries of the batch, or of all."""
        start, stop, total = entries or (0, len(fresh[0]), len(fresh[0]))
        if (start, stop) == (0, total):
            self._kept = fresh
            return
        if start == 0:
            self._kept = tuple(rows.new_empty(total, *rows.shape[1:]) for rows in fresh)
        for kept, rows in zip(self._kept, fresh, strict=True):
            kept[start:stop].copy_(rows)

    def of(self, entries: Entries | None) -> tuple[Tensor, ...]:
        """Keys and values of some entries of the batch, or of all.

        Raises:
            RuntimeError: No call has made them.
        """
        if not self._kept:
            raise RuntimeError("keys and values of what comes before the picture are asked for, and no call made them")
        return self._kept if entries is None else tuple(kept[slice(*entries[:2])] for kept in self._kept)

    def beside(self, entries: Entries | None) -> tuple[Tensor, ...]:
        """The same as attention takes them, ``[batch, heads, rows, channels]``."""
        return tuple(rows.transpose(1, 2) for rows in self.of(entries))

    def without(self, rows: Tensor, at: int) -> Tensor:
        """``[batch, heads, rows, channels]`` without as many rows as there are here, from this one on."""
        rest = rows[:, :, at + self.count :]
        return rest if not at else torch.cat((rows[:, :, :at], rest), 2)

    def move(self, device: torch.device) -> None:
        """Takes them to another device."""
        self._kept = tuple(kept.to(device) for kept in self._kept)


Prefixes = dict[str, PrefixKeys]  # by the block's name


class BlockCache:
    """What a block is given in the place of its part of a pipeline's cache.

    Args:
        keys: Where they are kept.
        entries: Which entries of the batch are at work.
        apart: Whether attention is given them beside the block's own, since those are a patch's.
    """

    def __init__(self, keys: PrefixKeys, entries: Entries | None, *, apart: bool) -> None:
        self._keys, self._entries, self._apart = keys, entries, apart

    def store(self, key: Tensor, value: Tensor) -> None:
        """Takes over what the first call made."""
        self._keys.put(self._entries, key, value)

    def get(self) -> tuple[Tensor, Tensor]:
        """What is put among the block's own keys and values: of a patch no rows."""
        key, value = self._keys.of(self._entries)
        return (key[:, :0], value[:, :0]) if self._apart else (key, value)
