"""Tells what runs inside a user's callback, where the pipeline goes on afterwards, from what ends a request."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

NAMES = ("callback_on_step_end", "callback")


class Callbacks:
    """Notices when a callback runs.

    Attributes:
        running: Whether one does.
    """

    def __init__(self) -> None:
        self.running = False

    def noticed(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """A call's arguments with callbacks that are noticed; those of diffusers itself stay what they are."""
        noticed = dict(arguments)
        for name in NAMES:
            given = noticed.get(name)
            if callable(given) and not isinstance(given, (PipelineCallback, MultiPipelineCallbacks)):
                noticed[name] = self._wrapped(given)
        return noticed

    def _wrapped(self, callback: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(callback, updated=())
        def run(*args: Any, **kwargs: Any) -> Any:
            self.running = True
            try:
                return callback(*args, **kwargs)
            finally:
                self.running = False

        return run
