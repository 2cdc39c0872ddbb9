"""Changes in eight bits, in the place of tensors (CompactFusion, arXiv 2507.17511).

Who sends a tensor step after step knows what the other side made of the last one. It sends how the new one differs from
that, in eight bits with a scale for each row, and both sides add the same number to the same tensor. What the rounding
left out is part of the next difference, so that errors do not pile up.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = torch.Size | tuple[int, ...]
LEVELS = 127  # of eight bits with a sign


class Residuals:
    """Tensors as the other side has them."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Tensor] = {}

    @property
    def bytes(self) -> int:
        """Memory of them."""
        return sum(known.nbytes for known in self._known.values())

    def move(self, device: torch.device) -> None:
        """Takes them to another device."""
        self._known = {key: known.to(device) for key, known in self._known.items()}

    def forget(self, belongs: Callable[[Hashable], bool]) -> None:
        """Lets go of some of them, by their key."""
        self._known = {key: known for key, known in self._known.items() if not belongs(key)}

    def knows(self, key: Hashable, shape: Shape, dtype: torch.dtype) -> bool:
        """Whether a change can stand for a tensor."""
        known = self._known.get(key)
        return known is not None and known.shape == shape and known.dtype == dtype and dtype.is_floating_point

    def sent_as(self, key: Hashable, shape: Shape, dtype: torch.dtype) -> tuple[Shape, torch.dtype]:
        """Shape and dtype of what is sent for a tensor: its change, if one is known, else itself."""
        if not self.knows(key, shape, dtype):
            return shape, dtype
        return (packed_bytes(shape, dtype),), torch.uint8

    def keep(self, key: Hashable, whole: Tensor) -> None:
        """Notes a tensor that was sent, or came, as it is."""
        if whole.is_floating_point():
            self._known[key] = whole.clone(memory_format=torch.contiguous_format)

    def pack(self, key: Hashable, fresh: Tensor) -> Tensor:
        """What is sent for a tensor."""
        if not self.knows(key, fresh.shape, fresh.dtype):
            self.keep(key, fresh)
            return fresh
        known, wide = self._known[key], _wide(fresh.dtype)
        change = fresh.to(wide) - known.to(wide)
        scale = change.abs().amax(-1, keepdim=True) / LEVELS
        steps = (change / scale.masked_fill(scale == 0, 1.0)).round().to(torch.int8)
        self._add(key, steps, scale)
        return torch.cat([scale.reshape(-1).view(torch.uint8), steps.reshape(-1).view(torch.uint8)])

    def unpack(self, key: Hashable, came: Tensor, shape: Shape, dtype: torch.dtype) -> Tensor:
        """The tensor that ``pack`` was given on the other side, as far as eight bits tell it."""
        if not self.knows(key, shape, dtype):
            self.keep(key, came)
            return came
        rows = torch.Size((*shape[:-1], 1))
        scales, steps = came.split([rows.numel() * _wide(dtype).itemsize, torch.Size(shape).numel()])
        self._add(key, steps.view(torch.int8).view(shape), scales.view(_wide(dtype)).view(rows))
        return self._known[key].clone()

    def _add(self, key: Hashable, steps: Tensor, scale: Tensor) -> None:
        """By the same sums on both sides."""
        known = self._known[key]
        self._known[key] = (known.to(scale.dtype) + steps.to(scale.dtype) * scale).to(known.dtype)


def packed_bytes(shape: Shape, dtype: torch.dtype) -> int:
    """Bytes of a change: one an element, and a scale for each row."""
    elements = torch.Size(shape).numel()
    return elements + elements // shape[-1] * _wide(dtype).itemsize if elements else 0


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
