"""Several requests in flight in one patch pipeline: where a stage has nothing to do for one, it works for another.

A synchronous step passes through one stage at a time. With a second request in flight the other stages work for that
one meanwhile, and the fill and the drain of each are filled by the other. Every request runs the unmodified pipeline in
a thread of its own, but only the thread that has the *baton* runs. It passes it on after every call of the
transformer, to the next request in turn. All ranks so do the same things in the same order: channels stay ordered
with no tags on messages, and no result depends on timing.

Before the first call of the transformer all requests are prepared (prompts encoded, noise drawn) and the ranks tell
each other which were refused: up to there nothing has gone from stage to stage, so that whatever all ranks refuse alike
can be left out.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.errors import RankFailed, RankLost
from patchpipe.schedule.baton import Baton, Grounded
from patchpipe.schedule.request import Request
from patchpipe.schedule.runner import Runner
from patchpipe.schedule.surroundings import Draws, Surroundings, forwards_through
from patchpipe.tracing.recorder import Where

GRACE_SECONDS = 5.0  # for threads to end after an interrupt
SEEDS = 2**32

Paint = Callable[[], Any]


def put_away(runner: Runner, draws: Draws) -> Where | None:
    """Puts away what the process has once, as it is for the request at work; gives where that one is traced."""
    draws.keep()
    if runner.request is not None:
        runner.request.traffic.pause()
    runner.request, where = None, None
    if runner.group.recorder is not None:
        where, runner.group.recorder.where = runner.group.recorder.where, None
    return where


def bring_back(runner: Runner, draws: Draws, request: Request | None, where: Where | None) -> None:
    """Brings it back."""
    draws.restore()
    runner.request = request
    if request is not None:
        request.traffic.resume()
    if runner.group.recorder is not None:
        runner.group.recorder.where = where


class Refused(Exception):
    """A call is refused on every rank alike, before anything was painted.

    Args:
        error: What the caller is to read.
    """

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass
class Flight:
    """One of the requests.

    Attributes:
        number: Its place among them.
        paint: Runs the pipeline.
        draws: Its default generators.
        request: What it keeps, once it has begun.
        where: The part of its denoising loop it is in, where it is traced.
        prepared: Whether it has got to its first call of the transformer, or to its end.
        refusal: Why it cannot be painted.
        output: What it gave.
    """

    number: int
    paint: Paint
    draws: Draws
    request: Request | None = None
    where: Where | None = None
    prepared: bool = False
    refusal: Exception | None = None
    output: Any = None


class Flights:
    """Requests in flight together, on one rank.

    Args:
        runner: Runs the transformer's calls.
        group: The ranks.
        seeds: What each request seeds the default generators with; ``None`` draws them from these.
        count: How many requests there are.
    """

    def __init__(self, runner: Runner, group: Group, seeds: Sequence[int] | None, count: int) -> None:
        self._runner, self._group = runner, group
        # Ranks wait for each other no longer than the timeout, so that the other ranks have given up before.
        self._baton = Baton(count, 2 * group.config.timeout if group.world_size > 1 else None)
        self._seeds = seeds if seeds is not None else torch.randint(SEEDS, (count,)).tolist()
        self._flights: list[Flight] = []
        self._agreed = False
        self._keep_refused = False
        self._failure: BaseException | None = None

    def run(self, paints: Sequence[Paint], keep_refused: bool = False) -> list[Any]:
        """Runs them all.

        Args:
            paints: Runs the pipeline, for each request.
            keep_refused: Whether the others go on without the refused ones.

        Returns:
            What each gave; of those refused the error.

        Raises:
            Refused: A request is refused, and not kept.
            PatchpipeError: Another rank failed.
        """
        device, self._keep_refused = self._group.device, keep_refused
        draws = [Draws(device, seed) for seed in self._seeds]
        self._flights = [Flight(*entry, own) for entry, own in zip(enumerate(paints), draws, strict=True)]
        callers = Draws(device)
        try:
            with self._runner.open(len(self._flights)):
                with self._taking_turns():
                    self._join(self._start(Surroundings(device)))
                if self._failure is not None:
                    raise self._failure
                self._agree()  # where none of them got to a call of the transformer
                self._runner.end()
        finally:
            self._failure = None
            callers.restore()
        return [flight.output if flight.refusal is None else flight.refusal for flight in self._flights]

    # -- threads ---------------------------------------------------------------------------------

    def _start(self, surroundings: Surroundings) -> list[threading.Thread]:
        threads = []
        for flight in self._flights:
            run = (contextvars.copy_context().run, self._fly, flight, surroundings)
            threads.append(threading.Thread(target=run[0], args=run[1:], name=f"request {flight.number + 1}"))
            threads[-1].daemon = True  # an interrupted process must not wait for them
            threads[-1].start()
        return threads

    def _join(self, threads: list[threading.Thread]) -> None:
        try:
            self._baton.wait_until_left()  # not by joining: a thread whose join was interrupted counts as ended
        except BaseException:
            self._baton.drop()
            self._baton.wait_until_left(GRACE_SECONDS)
            raise
        for thread in threads:
            thread.join()

    def _fly(self, flight: Flight, surroundings: Surroundings) -> None:
        try:
            with surroundings.entered():
                self._baton.take(flight.number)
                self._resume(flight)
                with self._runner.serving_one(flight.number) as flight.request:
                    flight.output = flight.paint()
            self._pause(flight)
        except Grounded:
            return
        except BaseException as error:
            self._fail(flight, error)
        finally:
            flight.prepared = True
            self._baton.leave(flight.number)

    def _fail(self, flight: Flight, error: BaseException) -> None:
        """Before the first call of the transformer a wrong request only is left out; later all of them end."""
        if isinstance(error, (ValueError, TypeError)) and not flight.prepared:
            flight.refusal = error
            self._group.failures.report(f"{type(error).__name__}: {error}")  # should the others wait for this rank
            self._pause(flight)
            return
        self._failure = self._failure or error
        self._baton.drop()

    # -- turns -----------------------------------------------------------------------------------

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """In the block, the transformer's calls pass the baton on."""

        def in_turn(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            flight = self._flights[self._baton.holder]
            if not flight.prepared:
                self._runner.check(*args, **kwargs)
                flight.prepared = True
                self._let_others_go_on(flight)  # until all are prepared
                self._agree()
            result = forward(*args, **kwargs)
            self._let_others_go_on(flight)
            return result

        with forwards_through(in_turn, self._runner.models):
            yield

    def _let_others_go_on(self, flight: Flight) -> None:
        self._pause(flight)
        self._baton.pass_on()
        self._baton.take(flight.number)
        self._resume(flight)

    def _pause(self, flight: Flight) -> None:
        flight.where = put_away(self._runner, flight.draws)

    def _resume(self, flight: Flight) -> None:
        bring_back(self._runner, flight.draws, flight.request, flight.where)

    # -- agreement -------------------------------------------------------------------------------

    def _agree(self) -> None:
        """Makes sure, once all requests are prepared, that every rank refuses the same ones.

        Raises:
            Refused: There are such, and the others are not to go on without them.
            RankFailed: Another rank refuses what this one does not.
        """
        if self._agreed:
            return
        self._agreed = True
        refused = [flight for flight in self._flights if flight.refusal is not None]
        own = {str(flight.number + 1): f"{type(flight.refusal).__name__}: {flight.refusal}" for flight in refused}
        try:
            with self._runner.points.passing():
                told = self._group.tell_all(own)
        except RankLost:
            told = []
        alone = self._refused_alone(own, told)
        if alone is not None:
            raise alone
        if refused and not self._keep_refused:
            raise Refused(self._named(refused[0]))
        if refused:  # what was reported is no failure after all
            self._group.begin_requests(len(self._flights))

    def _refused_alone(self, own: dict[str, str], told: list[dict[str, str]]) -> Exception | None:
        """The error where some ranks refuse what others do not, or do not answer."""
        if told and all(each == told[0] for each in told):
            return None
        first = next((flight.refusal for flight in self._flights if flight.refusal is not None), None)
        if first is not None:
            return first
        for rank, each in enumerate(told):
            for text in each.values():
                return RankFailed(f"rank {rank} failed first: {text}")
        return self._group.failures.explain(TimeoutError("timed out"), "another rank")

    def _named(self, flight: Flight) -> Exception:
        """The refusal with the request's number in it."""
        refusal = flight.refusal
        assert refusal is not None
        kind = ValueError if isinstance(refusal, ValueError) else TypeError
        named = kind(f"request {flight.number + 1} of {len(self._flights)}: {refusal}")
        named.__cause__ = refusal
        return named
