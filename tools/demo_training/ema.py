"""The running average of the weights, which is what gets evaluated and exported."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """Exponential moving average of a module's parameters."""

    def __init__(self, module: nn.Module) -> None:
        self._live = list(module.parameters())
        self.values: list[Tensor] = [param.detach().clone() for param in self._live]

    @torch.no_grad()
    def update(self, decay: float) -> None:
        """Move the average towards the live weights."""
        torch._foreach_lerp_(self.values, [param.detach() for param in self._live], 1 - decay)

    @torch.no_grad()
    def load(self, values: list[Tensor]) -> None:
        """Take over saved averages."""
        torch._foreach_copy_(self.values, values)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Put the average in place of the live weights inside a ``with`` block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def keep(self) -> None:
        """Put the average in place of the live weights for good."""
        torch._foreach_copy_(self._live, self.values)

    @torch.no_grad()
    def _swap(self) -> None:
        for param, value in zip(self._live, self.values, strict=True):
            live = param.detach().clone()
            param.copy_(value)
            value.copy_(live)
