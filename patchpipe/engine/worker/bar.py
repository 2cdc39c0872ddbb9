"""Stands in for a pipeline's progress bar in a worker and tells the parent of every step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any


class StepBar:
    """What a pipeline sees of a progress bar: ``update``, iteration, a ``with`` block.

    Args:
        tell: Called with the step, the total, and the seconds since ``began``.
        began: When the request began.
        iterable: What to iterate over, as tqdm does.
        total: Number of steps, where known.
    """

    def __init__(
        self,
        tell: Callable[[int, int | None, float], None],
        began: float,
        iterable: Iterable[Any] | None = None,
        total: int | None = None,
    ) -> None:
        self._tell = tell
        self._began = began
        self._iterable = iterable
        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self.total = total
        self.n = 0

    def update(self, n: int = 1) -> None:
        """Counts ``n`` more steps."""
        self.n += n
        self._tell(self.n, self.total, time.monotonic() - self._began)

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """Ignored: there is no line of text to put it on."""

    def set_description(self, *args: Any, **kwargs: Any) -> None:
        """Ignored, as ``set_postfix``."""

    def close(self) -> None:
        """Nothing to close."""

    def __iter__(self) -> Iterator[Any]:
        for item in self._iterable or ():
            yield item
            self.update()

    def __enter__(self) -> StepBar:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
