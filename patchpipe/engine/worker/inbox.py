"""A worker's messages: requests wait for their turn, a cancellation and what concerns a stream do not."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

from patchpipe.engine.messages import Cancel, Channel, Direct, Submit
from patchpipe.engine.worker.letters import Letters


class Inbox(threading.Thread):
    """Reads the channel while the worker is busy.

    Args:
        channel: The way from the parent.
        on_cancel: Called, in this thread, with the number of the request to end.

    Attributes:
        letters: What came about requests of a stream.
    """

    def __init__(self, channel: Channel, on_cancel: Callable[[int], None]) -> None:
        super().__init__(name="inbox", daemon=True)
        self._channel, self._on_cancel = channel, on_cancel
        self.letters = Letters()
        self._messages: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def run(self) -> None:
        """Reads until the parent is gone."""
        try:
            while True:
                message = self._channel.receive()
                if isinstance(message, Cancel):
                    self._on_cancel(message.request)
                elif isinstance(message, (Submit, Direct)):
                    self.letters.put(message)
                else:
                    self._messages.put(message)
        except (EOFError, OSError) as error:
            self._messages.put(EOFError(str(error)))

    def next(self) -> Any:
        """Waits for the next message that is no cancellation.

        Raises:
            EOFError: The parent is gone.
        """
        message = self._messages.get()
        if isinstance(message, EOFError):
            raise message
        return message
