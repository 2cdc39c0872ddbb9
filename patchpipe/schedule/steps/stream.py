"""Requests in flight that come and go: each joins beside the others, is held, goes on, is carried away or withdrawn.

As with ``flights``, every request runs the unmodified pipeline in a thread of its own and only the thread with the
baton runs. Here the round changes. After every call of the transformer all ranks hear what is to become of whom, in
the same turn. A request that is to be held keeps the baton until its next step is about to begin, and then leaves the
round: its thread waits, with all it has. When nobody is in the round the thread that opened the stream has the baton,
and listens.
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.errors import CANCELLED, Cancelled, PatchpipeError, RankFailed, RankLost
from patchpipe.lockstep.inputs import first_difference
from patchpipe.schedule.baton import IDLE, Baton, Grounded
from patchpipe.schedule.flights import GRACE_SECONDS, bring_back, put_away
from patchpipe.schedule.runner import Runner
from patchpipe.schedule.steps.entries import Flight, Source, Told, Withdrawn
from patchpipe.schedule.steps.following import Steps
from patchpipe.schedule.steps.orders import Order, Orders
from patchpipe.schedule.steps.saved import Saved, draws, first_unlike, looks_of, on_host, scheduler_state
from patchpipe.schedule.steps.verbs import Keys, Verb
from patchpipe.schedule.surroundings import Draws, Surroundings, forwards_through

BEAT_SECONDS = 1.0  # between words of rank 0 while nothing is to be done


class Stream:
    """Requests that come and go, on one rank.

    Args:
        runner: Runs the transformer's calls.
        group: The ranks.
        source: Where requests come from.
    """

    def __init__(self, runner: Runner, group: Group, source: Source) -> None:
        self._runner, self._group, self._source = runner, group, source
        self._orders = Orders(group, source.orders)
        self._baton = Baton(0, 2 * group.config.timeout if group.world_size > 1 else None)
        self._beat = min(BEAT_SECONDS, group.config.timeout / 4)
        self._flights: dict[int, Flight] = {}
        self._threads: dict[int, threading.Thread] = {}
        self._surroundings = Surroundings(group.device)
        self._joined: str | None = None  # the last topic on which ranks told each other of one that joined
        self._ending = False
        self._failure: BaseException | None = None

    def run(self) -> None:
        """Serves requests until told to end.

        Raises:
            PatchpipeError: A rank failed, or all requests were cancelled.
        """
        callers = Draws(self._group.device)
        try:
            with self._runner.open(), self._taking_turns():
                self._listen()
                self._runner.end()
        finally:
            callers.restore()

    # -- the thread that opened the stream -------------------------------------------------------

    def _listen(self) -> None:
        try:
            while True:
                self._baton.take(IDLE)
                if self._ending and not self._flights:
                    break
                self._baton.beat()
                self._check_points()
                self._obey(self._orders.hear(self._beat))
                self._baton.pass_on()
        except BaseException as error:
            self._baton.drop()
            self._join(GRACE_SECONDS)
            raise self._failure or error from None
        self._join(None)

    def _check_points(self) -> None:
        """Ends the stream where it is cancelled, or another rank has failed, while no call is made that would tell."""
        self._runner.points.begin("waits for requests")
        self._runner.points.finish()

    def _join(self, seconds: float | None) -> None:
        self._baton.wait_until_left(seconds)
        for thread in [*self._threads.values()]:
            thread.join(seconds)

    # -- what is to become of whom ---------------------------------------------------------------

    def _obey(self, orders: Sequence[Order]) -> None:
        for order in orders:
            if order.verb is Verb.END:
                self._ending = True
            elif order.verb is Verb.JOIN:
                self._admit(order.number)
            elif order.number in self._flights:  # else it is over by now
                self._wish(self._flights[order.number], order)

    def _admit(self, number: int) -> None:
        entry = self._source.entry(number)
        steps = Steps(entry.saved, self._group.device)
        steps.generators = list(entry.generators)
        flight = self._flights[number] = Flight(number, entry, steps, Draws(self._group.device, entry.seed))
        self._group.set_in_flight(len(self._flights))
        run = (contextvars.copy_context().run, self._fly, flight)
        thread = threading.Thread(target=run[0], args=run[1:], name=f"request {number}", daemon=True)
        self._threads[number] = thread
        self._baton.join(number)
        thread.start()

    def _wish(self, flight: Flight, order: Order) -> None:
        if flight.held is None or flight.waking is not None:
            flight.wish = None if order.verb is Verb.GO_ON else order
        elif order.verb is Verb.HOLD:
            self._place_keys(flight, Keys(order.option))
        else:
            flight.waking = order
            self._baton.join(flight.number)

    # -- one request's thread --------------------------------------------------------------------

    def _fly(self, flight: Flight) -> None:
        try:
            with self._surroundings.entered():
                self._baton.take(flight.number)
                bring_back(self._runner, flight.draws, None, None)
                told = self._paint(flight)
                if not flight.prepared:  # its pipeline never called the transformer
                    self._agree(flight, told.error)
                self._land(flight, withdrawn=told.what in ("saved", "withdrawn"))
                self._source.tell(told)
        except Grounded:
            return
        except BaseException as error:
            self._failure = self._failure or error
            self._baton.drop()
        finally:
            self._threads.pop(flight.number, None)
            self._baton.leave(flight.number)

    def _paint(self, flight: Flight) -> Told:
        number, steps, output = flight.number, flight.steps, None
        try:
            with self._runner.serving_one(number) as flight.request:
                request = flight.request
                request.answering = steps.answering
                output = flight.entry.paint(steps)
        except Withdrawn:
            if flight.saved is not None:
                return Told(number, "saved", steps.done, saved=flight.saved)
            return Told(number, "withdrawn", steps.done, error=Cancelled(CANCELLED))
        except (ValueError, TypeError) as error:
            if flight.prepared:
                raise
            self._group.failures.report(f"{type(error).__name__}: {error}")  # should the others wait for this rank
            return Told(number, "refused", error=error)
        return Told(number, "done", steps.done, output, request.stats.as_dict())

    def _land(self, flight: Flight, *, withdrawn: bool) -> None:
        """It is over; what was under way for it has been awaited."""
        if withdrawn:
            self._runner.settle()
        put_away(self._runner, flight.draws)
        del self._flights[flight.number]
        self._runner.forget(flight.number)
        self._group.set_in_flight(len(self._flights))

    # -- turns -----------------------------------------------------------------------------------

    @contextmanager
    def _taking_turns(self) -> Iterator[None]:
        """In the block, the transformer's calls pass the baton on."""

        def in_turn(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            flight = self._flights[self._baton.holder]
            assert flight.request is not None
            if flight.steps.answering:
                flight.steps.called()
                return forward(*args, **kwargs)
            if not flight.prepared:
                self._prepare(flight, args, kwargs)
            if flight.steps.between and flight.wish is not None:
                self._at_a_step(flight, flight.wish, args, kwargs)
            flight.steps.called()
            result = forward(*args, **kwargs)
            self._obey(self._orders.hear())
            self._let_others_go_on(flight)
            return result

        with forwards_through(in_turn, self._runner.models):
            yield

    def _let_others_go_on(self, flight: Flight) -> None:
        flight.where = put_away(self._runner, flight.draws)
        self._baton.pass_on()
        self._baton.take(flight.number)
        bring_back(self._runner, flight.draws, flight.request, flight.where)

    def _at_a_step(self, flight: Flight, wish: Order, args: Any, kwargs: Any) -> None:
        """Does what is to become of a request before its next step begins.

        Raises:
            Withdrawn: It ends here.
        """
        flight.wish = None
        if wish.verb is Verb.HOLD:
            wish = self._hold(flight, Keys(wish.option))
        if wish.verb is Verb.WITHDRAW:
            raise Withdrawn
        if wish.verb is Verb.SAVE:
            try:
                flight.saved = self._save(flight, args, kwargs)
            except ValueError as error:
                self._source.tell(Told(flight.number, "not saved", flight.steps.done, error=error))
            else:
                raise Withdrawn

    def _hold(self, flight: Flight, keys: Keys) -> Order:
        """Leaves the round until it is to go on, or to end; gives what it is to do."""
        request = flight.request
        assert request is not None
        self._place_keys(flight, keys)
        self._source.tell(Told(flight.number, "held", flight.steps.done))
        flight.where = put_away(self._runner, flight.draws)
        self._baton.leave(flight.number)
        self._baton.take(flight.number)
        bring_back(self._runner, flight.draws, request, flight.where)
        if flight.held is Keys.HOST:
            request.move_keys(self._group.device)
        kept = "dropped" if flight.held is Keys.DROPPED else "kept"
        order, flight.held, flight.waking = flight.waking, None, None
        assert order is not None
        if order.verb is Verb.GO_ON:
            request.stats.resumed.append({"step": flight.steps.done, "keys": kept})
            self._source.tell(Told(flight.number, "running", flight.steps.done))
        return order

    def _place_keys(self, flight: Flight, keys: Keys) -> None:
        """Takes keys and values where they are to be while it is held; what was dropped stays so."""
        assert flight.request is not None
        before, flight.held = flight.held or Keys.DEVICE, keys
        if Keys.DROPPED in (before, keys):
            flight.held = Keys.DROPPED
        if flight.held is before:
            return
        self._runner.settle()
        if keys is Keys.DROPPED:
            flight.request.drop_keys()
        else:
            flight.request.move_keys(torch.device("cpu") if keys is Keys.HOST else self._group.device)

    # -- what a request is carried as ------------------------------------------------------------

    def _save(self, flight: Flight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Saved:
        """Its state; gathers the latent, on all ranks alike.

        Raises:
            ValueError: It has something that cannot be carried.
        """
        steps, name = flight.steps, flight.entry.pipeline
        flight.entry.may_be_saved()
        if steps.several or steps.latest is None:
            raise ValueError(
                f"{name} takes several steps of its scheduler at once, so its requests cannot move to other ranks"
            )
        return Saved(
            step=steps.done,
            pipeline=name,
            scheduler=type(steps.scheduler).__name__,
            call=flight.entry.about,
            latent=on_host(steps.latest, "the latent"),
            state=scheduler_state(steps.scheduler),
            generators=[each.get_state() for each in steps.generators],
            draws=draws(self._group.device),
            texts=[on_host(text, f"a result of {name}.encode_prompt") for text in steps.texts],
            looks=looks_of(self._runner.inputs_of(args, kwargs)),
        )

    def _prepare(self, flight: Flight, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before its first call all ranks make sure that it can be painted.

        Raises:
            ValueError: It cannot.
        """
        request, saved = flight.request, flight.entry.saved
        assert request is not None
        if saved is not None:
            request.answering = False
            unlike = first_unlike(saved.looks, looks_of(self._runner.inputs_of(args, kwargs)))
            if unlike is not None:
                raise ValueError(
                    f"a request of {flight.entry.pipeline} cannot be moved: {unlike} changes at every step, and only "
                    f"the latent and the scheduler are saved. Resume it where it was paused"
                )
            request.stats.resumed.append({"step": saved.step, "keys": "dropped"})
        self._runner.check(*args, **kwargs)
        self._agree(flight, None)
        flight.prepared = True
        self._source.tell(Told(flight.number, "running", flight.steps.done))

    def _agree(self, flight: Flight, refusal: Exception | None) -> None:
        """Makes sure that every rank was given the same request, and refuses it or does not.

        Raises:
            ValueError: Ranks were given different ones.
            RankFailed: Another rank refuses what this one does not.
        """
        points = self._runner.points
        board = points.board
        if board is None:
            return
        own = None if refusal is None else f"{type(refusal).__name__}: {refusal}"
        topic = f"joins/{flight.number}"
        with points.passing():
            board.tell(topic, [flight.entry.about, own])
            told = board.hear_all(topic, _no_answer)
        if self._joined is not None:
            board.withdraw(self._joined)
        self._joined = topic
        unlike = first_difference([[about] for about, _ in told])
        if unlike is not None:
            raise PatchpipeError(f"the ranks were given different requests: {unlike}")
        for rank, (_, text) in enumerate(told):
            if text and own is None:
                raise RankFailed(f"rank {rank} failed first: {text}")
        if refusal is not None:
            if any(text != own for _, text in told):
                raise refusal
            self._group.begin_requests(len(self._flights))  # what was reported is no failure after all


def _no_answer(rank: int) -> RankLost:
    return RankLost(f"rank {rank} did not prepare a request that the others have prepared")
