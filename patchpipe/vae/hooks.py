"""What the hooks on a spread module share: who the ranks are, whether a strip is under way, how to undo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from patchpipe.distributed.rows import RowGroup

Undo = Callable[[], None]


@dataclass
class Spread:
    """One VAE spread over one group of ranks.

    Attributes:
        group: The ranks.
        active: Whether a strip is being computed. Outside of that the hooks do nothing, so that calling
            ``vae.decoder`` directly still computes the whole.
    """

    group: RowGroup
    active: bool = False

    @contextmanager
    def computing(self) -> Iterator[None]:
        """The extent of one strip's computation."""
        self.active = True
        try:
            yield
        finally:
            self.active = False


def override(owner: Any, name: str, value: Any) -> Undo:
    """Sets an attribute on one instance, past ``nn.Module``'s bookkeeping, and returns what takes it back."""
    had, previous = name in owner.__dict__, owner.__dict__.get(name)
    object.__setattr__(owner, name, value)

    def undo() -> None:
        if had:
            object.__setattr__(owner, name, previous)
        else:
            object.__delattr__(owner, name)

    return undo
