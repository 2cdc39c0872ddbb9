"""What is kept of each patch as a whole, where single rows would say too little or too much."""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor


class PartsStore:
    """One tensor for each patch of one layer, half of a batch, guidance branch and request.

    Attributes:
        kept: The tensors ``[batch, …]``, by patch.
    """

    def __init__(self) -> None:
        self.kept: dict[Hashable, Tensor] = {}

    def put(self, patch: Hashable, part: Tensor, entries: tuple[int, int, int] | None) -> None:
        """Takes over what a patch computed.

        Args:
            patch: The patch.
            part: The tensor, for the entries at work.
            entries: Which they are: the first, one past the last, and how many there are; ``None`` for all.
        """
        start, stop, total = entries or (0, part.shape[0], part.shape[0])
        known = self.kept.get(patch)
        if known is None or known.shape != (total, *part.shape[1:]):
            known = self.kept[patch] = part.new_zeros(total, *part.shape[1:])
        known[start:stop] = part

    def get(self, patch: Hashable, entries: tuple[int, int, int] | None) -> Tensor | None:
        """What is known of a patch, for the entries at work; ``None`` if it has not run yet."""
        known = self.kept.get(patch)
        return known if known is None or entries is None else known[entries[0] : entries[1]]

    def move(self, device: torch.device) -> None:
        """Takes all it holds to another device."""
        self.kept = {patch: part.to(device) for patch, part in self.kept.items()}

    @property
    def bytes(self) -> int:
        """Memory the store holds."""
        return sum(part.nbytes for part in self.kept.values())
