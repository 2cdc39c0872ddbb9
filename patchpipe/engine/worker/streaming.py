"""A worker's side of requests that come and go: their calls and orders from the parent, their fate to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from patchpipe.engine.messages import Alive, Became, Channel, Failed, Submit
from patchpipe.engine.requests import decode, portable
from patchpipe.engine.worker.bar import StepBar
from patchpipe.engine.worker.letters import Letters
from patchpipe.pipeline.streams.serving import Asked
from patchpipe.schedule.steps.entries import Told
from patchpipe.schedule.steps.orders import Order
from patchpipe.schedule.steps.saved import Saved
from patchpipe.schedule.steps.verbs import Verb

MakeBar = Callable[[int, float, int], Callable[..., StepBar]]


class Visitors:
    """The calls of one stream, as the pipeline's side asks for them.

    Args:
        request: The stream's number.
        channel: The way to the parent.
        letters: What the parent sent.
        timeout: Seconds a call may take to come.
        output: Whether this rank tells the parent what becomes of requests.
        bar: Makes what stands in for a call's progress bar: of the call, since when, and how many steps are over.
        failed: Puts an error into words.
    """

    def __init__(
        self,
        request: int,
        channel: Channel,
        letters: Letters,
        timeout: float,
        *,
        output: bool,
        bar: MakeBar,
        failed: Callable[[Exception], Failed],
    ) -> None:
        self._request, self._channel, self._letters, self._timeout = request, channel, letters, timeout
        self._output, self._bar, self._failed = output, bar, failed

    def orders(self, seconds: float) -> list[Order]:
        """See ``pipeline.streams.serving.Calls``."""
        if seconds:
            self._channel.send(Alive(self._request))
        return [
            Order(Verb.JOIN, letter.ticket)
            if isinstance(letter, Submit)
            else Order(Verb(letter.verb), letter.ticket, letter.option)
            for letter in self._letters.orders(self._request, seconds)
        ]

    def call(self, number: int) -> Asked:
        """See ``pipeline.streams.serving.Calls``."""
        letter = self._letters.call(self._request, number, self._timeout)
        saved = None if letter.state is None else Saved.from_bytes(letter.state)
        bar = self._bar(number, time.monotonic(), 0 if saved is None else saved.step)
        return Asked(decode(letter.call.arguments), letter.call.seed, bar, saved)

    def tell(self, told: Told) -> None:
        """See ``pipeline.streams.serving.Calls``."""
        if not self._output:
            return
        state = None if told.saved is None else told.saved.to_bytes()
        failed = None if told.error is None else self._failed(told.error)
        output: Any = portable(told.output)
        self._channel.send(
            Became(self._request, told.number, told.what, told.step, output, dict(told.stats), state, failed)
        )
