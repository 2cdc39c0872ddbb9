"""Calls of one step that go through the blocks together, so that weights come once for all of them.

Pipelines that guide in separate calls run the model twice a step, and its weights would come twice. A call's prediction
is lazy, so it need not be computed before the next call is made: then both go from block to block side by side. Each
has a thread, of which one runs at a time, and computes just what it computes alone.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[[], None]


class Held(Protocol):
    """A block whose weights are there until it is let go."""

    def hold(self) -> None:
        """Waits until its weights are there."""
        ...

    def let_go(self) -> None:
        """They may go."""
        ...


class Company(Protocol):
    """What moves the weights of the calls."""

    @property
    def streams(self) -> bool:
        """Whether any weight comes and goes."""
        ...

    def together(self, stage: Any, runs: Sequence[Run]) -> None:
        """Runs several calls from block to block side by side."""
        ...


class _Stranded(Exception):
    """Ends a call because another one has failed."""


class Ride:
    """Calls that take turns at every block.

    Args:
        runs: The calls.
        exchange: Gives a call what it is at work with, and returns what the one before was.
        device: Where they compute.
    """

    def __init__(self, runs: Sequence[Run], exchange: Callable[[Any], Any], device: torch.device) -> None:
        self._runs, self._exchange, self._device = runs, exchange, device
        self._turns = [threading.Semaphore(0) for _ in runs]
        self._alive = list(range(len(runs)))
        self._now = 0
        self._held: Held | None = None
        self._seen = 0  # calls that have passed the block that is held
        self._error: BaseException | None = None

    def go(self) -> None:
        """Runs all of them to their end.

        Raises:
            BaseException: What the first one that failed has raised.
        """
        stream = torch.cuda.current_stream(self._device) if self._device.type == "cuda" else None
        threads = [
            threading.Thread(target=self._ride, args=(number, torch.get_num_threads(), stream), daemon=True)
            for number in range(1, len(self._runs))
        ]
        for thread in threads:
            thread.start()
        self._turns[0].release()
        self._ride(0)
        for thread in threads:
            thread.join()
        self._let_go()  # of a block that not all of them have passed
        if self._error is not None:
            raise self._error

    def through(self, block: Held, compute: Callable[[], Any]) -> Any:
        """Runs a block for the call whose turn it is; its weights go when all calls have passed it."""
        if block is not self._held:
            self._let_go()
            block.hold()
            self._held, self._seen = block, 0
        self._seen += 1
        try:
            result = compute()
        except BaseException:
            self._let_go()
            raise
        if self._seen >= len(self._alive):
            self._let_go()
        else:
            self._switch()
        return result

    def _let_go(self) -> None:
        if self._held is not None:
            held, self._held = self._held, None
            held.let_go()

    def _switch(self) -> None:
        """The next call's turn, until it is this one's again."""
        number = self._now
        mine = self._exchange(None)
        self._pass_on(number)
        self._turns[number].acquire()
        self._now = number
        self._exchange(mine)
        if self._error is not None:
            raise _Stranded

    def _pass_on(self, number: int) -> None:
        others = [one for one in self._alive if one > number] or self._alive
        if others:
            self._turns[others[0]].release()

    def _ride(self, number: int, threads: int = 0, stream: Any = None) -> None:
        self._turns[number].acquire()
        self._now = number
        try:
            if self._error is None:
                with _as_in_the_first(threads, stream):
                    self._runs[number]()
        except BaseException as error:
            if self._error is None and not isinstance(error, _Stranded):
                self._error = error
        finally:
            self._alive.remove(number)
            self._pass_on(number)


@contextmanager
def _as_in_the_first(threads: int, stream: Any) -> Iterator[None]:
    """What torch keeps for each thread: the number of its helpers, gradients off, and the stream of a device."""
    if threads:
        torch.set_num_threads(threads)
    with torch.no_grad(), nullcontext() if stream is None else torch.cuda.stream(stream):
        yield


class Riders:
    """The calls of a step that wait for each other.

    How many there are the step before has told. One whose prediction is asked for waits no longer.

    Args:
        offload: Runs some of them together.
        expected: How many there may be in the first step.
    """

    def __init__(self, offload: Company, expected: int = 1) -> None:
        self._offload = offload
        self._waiting: list[Run] = []
        self._step: tuple[Any, Any] = (None, None)
        self._calls, self._expected = 0, expected

    def add(
        self, latent: Any, stage: Any, inputs: Iterable[Any], run: Run, answer: Callable[[int], Tensor]
    ) -> Callable[[int], Tensor]:
        """A call; it is run with those before it, if it is the last of its step.

        Args:
            latent: What it is for; calls of one step are for the same.
            stage: This rank's part of the transformer, which is the same too.
            inputs: What it is given.
            run: Runs it.
            answer: A patch of its prediction, once it was run.

        Returns:
            A patch of its prediction, at any time.
        """
        if self._step[0] is not latent or self._step[1] is not stage:
            self.run()  # what nobody has asked for
            self._step, self._expected, self._calls = (latent, stage), self._calls or self._expected, 0
        self._calls += 1
        self._waiting.append(_unchanged(inputs, run))
        if self._calls >= self._expected or not self._offload.streams or torch.is_autocast_enabled():
            self.run()

        def asked(patch: int) -> Tensor:
            self.run()
            return answer(patch)

        return asked

    def run(self) -> None:
        """Runs those that wait."""
        waiting, self._waiting = self._waiting, []
        if len(waiting) > 1:
            self._offload.together(self._step[1], waiting)
        elif waiting:
            waiting[0]()


def _unchanged(inputs: Iterable[Any], run: Run) -> Run:
    """Refuses to run a call late whose inputs were written to since it was made."""
    given = [(one, one._version) for one in inputs if type(one) is Tensor and not one.is_inference()]

    def checked() -> None:
        if any(one._version != version for one, version in given):
            raise RuntimeError(
                "an input of the transformer was written to before the next call of the same step: with offload, calls "
                "of a step run together; give the next call a tensor of its own"
            )
        run()

    return checked
