"""Workers that all hold the whole model, any aligned few of which can serve a request together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from patchpipe.config import Backend, ParallelConfig


@dataclass(frozen=True)
class Elastic:
    """A layout that gives each request as many ranks as it asks for, and changes that between two steps.

    Every rank holds the whole model. Requests run side by side on ranks of their own: ``engine.submit(..., ranks=(0,
    1))``, and ``ticket.move((0, 1, 2, 3))``. Ranks that share a request split its tokens.

    Args:
        ranks: Number of ranks; a power of two.
        method: How ranks share a request.
        backend: See ``ParallelConfig``.
        timeout: Seconds any wait for another rank may last.

    Raises:
        ValueError: There is no such layout.
    """

    ranks: int
    method: Literal["ulysses", "ring"] = "ulysses"
    backend: Backend = "auto"
    timeout: float = 300.0

    def __post_init__(self) -> None:
        if type(self.ranks) is not int or self.ranks < 2 or self.ranks & (self.ranks - 1):
            raise ValueError(f"ranks={self.ranks!r} must be a power of two, 2 or more")
        if self.method not in ("ulysses", "ring"):
            raise ValueError(f"method={self.method!r} must be 'ulysses' or 'ring'")
        self.of(1)  # refuses a wrong backend or timeout

    def of(self, degree: int) -> ParallelConfig:
        """The layout of so many ranks."""
        given: dict[str, Any] = {self.method: degree, "backend": self.backend, "timeout": self.timeout}
        return ParallelConfig(**given)

    @property
    def widest(self) -> ParallelConfig:
        """The layout of all ranks."""
        return self.of(self.ranks)

    @property
    def lanes(self) -> tuple[tuple[int, ...], ...]:
        """The ranks that can share a request: each alone, two neighbours, four, and so on up to all."""
        degrees = [2**power for power in range(self.ranks.bit_length())]
        return tuple(
            tuple(range(first, first + degree)) for degree in degrees for first in range(0, self.ranks, degree)
        )

    @property
    def layouts(self) -> tuple[tuple[tuple[int, ...], dict[str, Any]], ...]:
        """The same, and how the ranks of each share a request."""
        return tuple((ranks, self.of(len(ranks)).as_dict()) for ranks in self.lanes)

    def lane(self, ranks: Sequence[int] | None) -> int:
        """The place of some ranks among the lanes; ``None`` are all.

        Raises:
            ValueError: They are none.
        """
        wanted = tuple(range(self.ranks)) if ranks is None else tuple(ranks)
        if wanted not in self.lanes:
            raise ValueError(f"ranks={wanted} cannot share a request: use one of {', '.join(map(str, self.lanes))}")
        return self.lanes.index(wanted)
