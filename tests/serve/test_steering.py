"""Who has which devices next, and what is done about it: the service's own thread, on engines that only pretend."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest

from patchpipe.scheduling import POLICIES, Shape, policy_named
from patchpipe.scheduling.policies.view import View, Wish
from patchpipe.serve.refusals import Refusal
from patchpipe.serve.settings import Limits
from patchpipe.serve.steer.costs import LiveCosts, Machine
from patchpipe.serve.steer.runs import Run
from patchpipe.serve.work.tickets import Ended, Painted
from tests.support import steered
from tests.support.steered import Engine, Floor, Heard, ask, states, until


def both(ranks: int = 2, carries: bool = True) -> dict[str, Any]:
    return {name: lambda: Engine(ranks, carries) for name in ("pictures", "clips")}


def figure(running: Any, line: str) -> float:
    found = [one for one in running.metrics.text().decode().splitlines() if one.startswith(line)]
    return sum(float(one.split()[-1]) for one in found)


def test_a_clip_gives_way_to_a_picture_and_goes_on_from_where_it_was(tmp_path: Path) -> None:
    whole = {name: lambda: Engine(2, elastic=False) for name in ("pictures", "clips")}
    with steered.service(tmp_path, whole) as running:
        heard = Heard()
        ask(running, heard, "long", model="clips", steps=400, deadline_s=1e5)
        until(lambda: states(running).get("long") == "running" and running.conductor.snapshot()[0].ticket.step > 2)
        ask(running, heard, "soon", deadline_s=30.0)
        until(lambda: states(running).get("long") == "paused")
        shown = running.state()
        assert [one["due"] > 0 for one in shown["paused"]] == [True]
        until(lambda: len(heard.order) == 2)
        assert heard.order == ["soon", "long"]
        assert isinstance(heard.ends["long"], Painted)
        assert running.models["clips"].engine.ran == [("long", (0, 1))]  # held and gone on with, not begun again
        assert figure(running, "patchpipe_preemptions_total") >= 1
        assert figure(running, 'patchpipe_deadlines_total{by="client"') == 2


def test_a_clip_changes_its_degree(tmp_path: Path) -> None:
    with steered.service(tmp_path, both(4)) as running:
        heard = Heard()
        ask(running, heard, "long", model="clips", steps=300, deadline_s=3.0)
        until(lambda: running.conductor.snapshot()[0].devices)
        first = running.conductor.snapshot()[0].devices
        for number in range(6):
            ask(running, heard, f"soon-{number}", steps=60, deadline_s=2.0)
        until(lambda: len(heard.order) == 7)
        degrees = {len(ranks) for prompt, ranks in running.models["clips"].engine.ran}
        assert len(first) > 1
        assert len(degrees) > 1
        assert figure(running, "patchpipe_degree_changes_total") >= 1
        assert not running.models["clips"].engine.clashes


def test_a_clip_that_is_held_goes_on_where_devices_are_free(tmp_path: Path) -> None:
    with steered.service(tmp_path, both(), policy_named("edf")) as running:
        heard = Heard()

        def devices(name: str) -> tuple[int, ...]:
            return next((one.devices for one in running.conductor.snapshot() if one.ticket.work.id == name), ())

        ask(running, heard, "first", steps=150, deadline_s=20.0)
        until(lambda: devices("first") == (0,))
        ask(running, heard, "long", model="clips", steps=400, deadline_s=1e5)
        until(lambda: devices("long") == (1,))
        ask(running, heard, "second", steps=400, deadline_s=10.0)
        until(lambda: devices("second") == (1,) and states(running)["long"] == "paused")
        until(lambda: "first" in heard.ends)
        until(lambda: devices("long") == (0,))
        until(lambda: running.models["clips"].engine.ran == [("long", (1,)), ("long", (0,))])
        assert devices("second") == (1,)
        until(lambda: len(heard.order) == 3)
        assert all(isinstance(end, Painted) for end in heard.ends.values())


@pytest.mark.parametrize("policy", POLICIES)
def test_every_request_has_one_answer_whatever_happens(policy: str, tmp_path: Path) -> None:
    """Arrivals, cancellations, and engines that die, under every policy."""
    draw = random.Random(policy)
    made: list[Engine] = []
    floor = Floor()

    def engine() -> Engine:
        made.append(Engine(2, floor=floor))
        return made[-1]

    engines = {"pictures": engine, "clips": engine, "clips that stay": lambda: Engine(2, carries=False, floor=floor)}
    with steered.service(tmp_path, engines, policy_named(policy, 2), limits=Limits(waiting=99)) as running:
        heard, asked = Heard(), []
        for number in range(40):
            name = draw.choice(["fine", "fine", "fine", "fine", "wrong", "deadly"])
            model = draw.choice(["pictures", "pictures", "clips", "clips that stay"])
            fields = {"steps": draw.choice([2, 6, 30]), "seeds": (1,) * draw.choice([1, 1, 3])}
            if model.startswith("clip"):
                fields["seeds"] = (1,)
            if draw.random() < 0.5:
                fields["deadline_s"] = draw.choice([0.05, 0.5, 5.0])
            try:
                asked.append(ask(running, heard, f"{name}-{number}", model=model, **fields))
            except Refusal as refusal:
                assert refusal.status == 503  # noqa: PT017
            if draw.random() < 0.2 and asked:
                running.cancel(draw.choice(asked))
            time.sleep(draw.choice([0.0, 0.01, 0.03]))
        until(lambda: all(ticket.over for ticket in asked), 90)
        until(lambda: not running.conductor.snapshot())
    assert not heard.twice
    for ticket in asked:
        end, name = heard.ends[ticket.work.id], ticket.work.arguments["prompt"]
        if ticket.cancelled:
            continue
        if name == "fine":
            assert isinstance(end, Painted) or end.refusal.status == 503, end
        elif name == "wrong":
            assert isinstance(end, Ended)
            assert end.refusal.status in (400, 503)
        else:
            assert isinstance(end, Ended) or ticket.work.steps == 2
        if isinstance(end, Painted):
            assert len(end.outputs) == len(ticket.work.seeds)
    assert not [clash for one in made for clash in one.clashes]
    assert not floor.crowds


def test_a_pause_taken_back_too_late_is_not_taken_for_the_next_one(tmp_path: Path) -> None:
    """The engine holds a request, goes on, and holds it again, before the conductor hears of the first time."""
    with steered.service(tmp_path, {"pictures": lambda: Engine(2)}, policy_named("fcfs", 2)) as running:
        heard, conductor = Heard(), running.conductor
        ticket = ask(running, heard, "fine-0", steps=30)
        until(lambda: conductor._parts and conductor._parts[0].done > 2)
        with conductor._changed:  # it decides nothing meanwhile
            (part,), stands = conductor._parts, conductor._stands
            assert isinstance(part.run, Run)
            handle: Any = part.run._handle
            stands._stop(part, moves=False)
            until(lambda: handle.state == "paused")
            stands._go_on(part)
            until(lambda: handle.state == "running")
            stands._stop(part, moves=False)
            until(lambda: handle.state == "paused")
            conductor.look()  # once it has heard all of this
        until(lambda: ticket.over, 20)
    assert isinstance(heard.ends["fine-0"], Painted)


class Broken:
    """A policy that fails in turns in every way it can."""

    name, reviews = "broken", True

    def __init__(self) -> None:
        self.asked = 0

    def plan(self, view: View) -> list[Wish]:
        self.asked += 1
        if self.asked % 2:
            raise ZeroDivisionError("a policy that fails")
        return []


def test_a_policy_that_fails_holds_nobody_up(tmp_path: Path) -> None:
    with steered.service(tmp_path, both(), policy=Broken()) as running:
        heard = Heard()
        for number in range(4):
            ask(running, heard, f"fine-{number}", model=("pictures", "clips")[number % 2])
        until(lambda: len(heard.ends) == 4)
        assert all(isinstance(end, Painted) for end in heard.ends.values())
        assert figure(running, "patchpipe_failed_decisions_total") >= 2


class Forgetful:
    """A policy that gives all devices to what comes, and to nothing once it runs."""

    name, reviews = "forgetful", True

    def plan(self, view: View) -> list[Wish]:
        idle = [job for job in view.state.jobs if not view.state.running]
        return [Wish((job,), 1) for job in idle]


def test_what_runs_is_not_held_for_nothing(tmp_path: Path) -> None:
    """Nothing would go on with it, since nothing more happens."""
    with steered.service(tmp_path, both(), policy=Forgetful()) as running:
        heard = Heard()
        ask(running, heard, "long", model="clips", steps=400)
        until(lambda: len(heard.ends) == 1, 20)
        assert isinstance(heard.ends["long"], Painted)
        assert figure(running, "patchpipe_preemptions_total") == 0
        assert figure(running, "patchpipe_failed_decisions_total") >= 1


def test_what_cannot_be_in_time_is_turned_away_where_asked_for(tmp_path: Path) -> None:
    with steered.service(tmp_path, both(), admission=True) as running:
        heard = Heard()
        ask(running, heard, "fine", steps=20)
        until(lambda: heard.ends)  # so that it knows what a step takes
        with pytest.raises(Refusal, match="this would be late") as told:
            ask(running, heard, "late", steps=2000, deadline_s=0.5)
        assert (told.value.status, told.value.code) == (429, "deadline_cannot_be_met")
        ask(running, heard, "usual", steps=20)
        until(lambda: "usual" in heard.ends)
    assert figure(running, 'patchpipe_rejections_total{reason="deadline_cannot_be_met"}') == 1


def test_a_picture_that_waits_is_told_when_it_can_be_in_time_no_more(tmp_path: Path) -> None:
    whole = {"pictures": lambda: Engine(2, elastic=False)}
    with steered.service(tmp_path, whole, policy_named("fcfs"), admission=True) as running:
        heard = Heard()
        ask(running, heard, "fine", steps=20)
        until(lambda: heard.ends)  # so that it knows what a step takes
        ask(running, heard, "long", steps=600, deadline_s=1e5)
        until(lambda: states(running).get("long") == "running")
        ask(running, heard, "hurried", steps=20, deadline_s=0.6)
        ask(running, heard, "patient", steps=20, deadline_s=1e5)
        until(lambda: "hurried" in heard.ends)
        assert "long" not in heard.ends
        end = heard.ends["hurried"]
        assert isinstance(end, Ended)
        assert (end.refusal.status, end.refusal.code) == (429, "deadline_missed")
        until(lambda: len(heard.ends) == 4)
        assert isinstance(heard.ends["patient"], Painted)


def test_a_full_queue_and_an_end_leave_nobody_without_an_answer(tmp_path: Path) -> None:
    with steered.service(tmp_path, both(), limits=Limits(waiting=2), drain_seconds=0.1) as running:
        heard = Heard()
        for number in range(4):
            until(lambda: list(states(running).values()).count("waiting") < 2)
            ask(running, heard, f"long-{number}", steps=5000)
        until(lambda: list(states(running).values()).count("waiting") == 2)
        with pytest.raises(Refusal, match="2 requests wait already") as full:
            ask(running, heard, "one too many")
        assert (full.value.status, 1 <= int(full.value.headers()["Retry-After"]) <= 120) == (429, True)
        asked = len(states(running))
    assert len(heard.ends) == asked
    with pytest.raises(Refusal, match="shutting down"):
        ask(running, heard, "after")


def test_priority_goes_first_and_requests_of_a_size_go_together(tmp_path: Path) -> None:
    whole = {"pictures": lambda: Engine(2, elastic=False)}
    with steered.service(tmp_path, whole, policy_named("fcfs"), in_flight=2) as running:
        heard = Heard()
        ask(running, heard, "first", steps=60)
        until(lambda: states(running)["first"] == "running")
        for name, priority in (("low", -1), ("usual", 0), ("high", 3)):
            ask(running, heard, name, priority=priority)
        until(lambda: len(heard.order) == 4)
        assert heard.order == ["first", "high", "usual", "low"]
        assert sum(figure(running, f'patchpipe_batch_size_bucket{{le="{size}.0"}}') for size in (1, 2)) == 8
    with steered.service(tmp_path, whole, in_flight=2) as running:
        heard = Heard()
        ask(running, heard, "first", steps=60)
        until(lambda: states(running)["first"] == "running")
        for name in ("one", "two"):
            ask(running, heard, name)
        streamed = ask(running, heard, "other size", steps=7)
        until(lambda: len(heard.order) == 4)
        assert figure(running, "patchpipe_batch_size_count") == 3  # one and two together
        assert streamed.attempts == 1


def test_costs_are_the_planners_until_they_are_measured() -> None:
    machine = Machine(2, (1, 2), 4, elastic=True)
    clip, larger = Shape("wan", 64, 64, 9), Shape("wan", 128, 64, 9)
    costs = LiveCosts(machine, lambda shape, degree: shape.width / 64 / degree)
    assert (costs.step(clip, 1, 1), costs.step(clip, 1, 2), costs.step(larger, 1, 1)) == (1.0, 0.5, 2.0)
    costs.measured(clip, 1, 1, 3.0)
    assert (costs.step(clip, 1, 1), costs.step(clip, 1, 2)) == (3.0, 1.5)
    assert costs.step(larger, 1, 1) == 6.0  # of the same model
    assert costs.ends(clip, 1) == 3.0  # as long as a step, until it is known
    costs.ended(clip, 0.5)
    assert costs.ends(Shape("wan#ink@1", 64, 64, 9), 1) == 0.5
    assert (costs.largest_batch(clip), costs.largest_batch(Shape("flux", 64, 64))) == (1, 4)
    assert costs.largest_batch(Shape("flux#alone", 64, 64)) == 1
    slower = LiveCosts(machine, lambda shape, degree: float(degree))  # where more devices gain nothing
    assert slower.degrees(clip) == (1,)

    def fails(shape: Shape, degree: int) -> float:
        raise ZeroDivisionError

    assert LiveCosts(machine, fails).step(clip, 1, 1) > 0
