"""The scheduler: what must hold whatever the state, for every policy; costs, knapsack, admission and router."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random

import pytest

from patchpipe.scheduling import (
    POLICIES,
    Admission,
    Job,
    MeasuredCosts,
    Request,
    Router,
    Scheduler,
    Shape,
    State,
    TableCosts,
    alone,
    policy_named,
    with_deadline,
)
from patchpipe.scheduling.knapsack import Option, Packing
from patchpipe.scheduling.policies.balanced import carried
from patchpipe.scheduling.policies.pictures import batches
from patchpipe.scheduling.policies.view import View

SMALL, PICTURE = Shape("m", 64, 64), Shape("m", 128, 128)
SHORT, LONG = Shape("v", 64, 64, 9), Shape("v", 128, 128, 9)
STEPS = {
    (SMALL, 1, 1): 0.02, (SMALL, 4, 1): 0.05, (PICTURE, 1, 1): 0.1, (PICTURE, 4, 1): 0.35,
    **{(SHORT, 1, degree): 0.4 / degree**0.8 for degree in (1, 2, 4, 8)},
    **{(LONG, 1, degree): 2.0 / degree**0.8 for degree in (1, 2, 4, 8)},
}  # fmt: skip
COSTS = TableCosts(STEPS, decode={PICTURE: 0.2, LONG: 1.0})
NOW = 100.0


def request(name: str, shape: Shape = LONG, *, steps: int = 20, within: float = 60.0, arrival: float = NOW) -> Request:
    return Request(name, shape, steps, arrival, arrival + within)


def chance_state(seed: int) -> State:
    """A state as it may come up: batches that run, some of them ending, clips that were paused, and what waits."""
    chance = random.Random(seed)
    devices = tuple(range(chance.choice((1, 2, 3, 5, 8, 16))))
    free, jobs = list(devices), []

    def draw(shape: Shape) -> Request:
        arrival = NOW - chance.uniform(0, 60)
        return Request(f"r{len(jobs)}", shape, 20, arrival, NOW + chance.uniform(-20, 120), chance.choice((1.0, 3.0)))

    while free and chance.random() < 0.8:
        shape = chance.choice((SMALL, PICTURE, SHORT, LONG))
        degree = 1 if shape.kind == "picture" else chance.choice([one for one in (1, 2, 4, 8) if one <= len(free)])
        taken, free = tuple(sorted(free[:degree])), free[degree:]
        remaining, boundary = chance.choice((0, 1, 7, 19)), NOW + chance.random()
        for _ in range(chance.randint(1, 4) if shape.kind == "picture" else 1):
            jobs.append(Job(draw(shape), remaining, "running", taken, boundary))
    for _ in range(chance.randint(0, 12)):
        shape = chance.choice((SMALL, PICTURE, SHORT, LONG))
        if shape.kind == "clip" and chance.random() < 0.4:
            jobs.append(Job(draw(shape), chance.randint(1, 19), "paused", devices[:1]))
        else:
            jobs.append(Job(draw(shape), 20))
    chance.shuffle(jobs)
    return State(NOW, devices, tuple(jobs))


@pytest.mark.parametrize("name", POLICIES)
def test_decisions_keep_the_rules_whatever_the_state(name: str) -> None:
    scheduler = Scheduler(policy_named(name, degree=2), COSTS)
    for seed in range(150):
        state = chance_state(seed)
        decisions = scheduler.decide(state)
        jobs = {job.id: job for job in state.jobs}
        used = [device for run in decisions.runs for device in run.devices]
        named = [one for run in decisions.runs for one in run.requests]
        assert len(set(used)) == len(used), f"seed {seed}: a device is given twice"
        assert set(used) <= set(state.devices)
        assert len(set(named)) == len(named), f"seed {seed}: a request runs twice"
        for run in decisions.runs:
            shapes = {jobs[one].request.shape for one in run.requests}
            remaining = {jobs[one].remaining for one in run.requests}
            assert len(shapes) == len(remaining) == 1
            assert len(run.devices) in COSTS.degrees(*shapes)
            assert len(run.requests) <= COSTS.largest_batch(*shapes)
        for job in state.jobs:
            if job.ending:
                assert any(job.id in run.requests and run.devices == job.devices for run in decisions.runs)
        # Work conservation: no device idles while something could run on it.
        if len(used) < len(state.devices):
            assert set(named) == set(jobs), f"seed {seed}: a device idles and a request waits"
        # Pure: the same again from the same, and from the same jobs in another order.
        assert scheduler.decide(state) == decisions
        turned = dataclasses.replace(state, jobs=tuple(reversed(state.jobs)))
        assert {(frozenset(run.requests), run.devices) for run in scheduler.decide(turned).runs} == {
            (frozenset(run.requests), run.devices) for run in decisions.runs
        }


def test_what_runs_stays_where_it_is_when_nothing_is_better() -> None:
    state = State(NOW, (0, 1, 2, 3), (Job(request("a"), 9, "running", (1, 3), NOW + 1),))
    for name in ("fcfs", "sjf"):
        [run] = Scheduler(policy_named(name, degree=2), COSTS).decide(state).runs
        assert run.devices == (1, 3)


@pytest.mark.parametrize("name", ["genserve", "balanced"])
def test_a_clip_with_time_to_spare_gives_way_to_a_picture(name: str) -> None:
    tight = Job(request("tight", steps=20, within=42.0), 20, "running", (0,), NOW)
    loose = Job(request("loose", steps=20, within=400.0), 20, "running", (1,), NOW)
    urgent = Job(request("urgent", PICTURE, steps=20, within=2.5), 20)
    decisions = Scheduler(policy_named(name), COSTS).decide(State(NOW, (0, 1), (tight, loose, urgent)))
    assert {run.requests[0]: run.devices for run in decisions.runs} == {"urgent": (1,), "tight": (0,)}
    assert decisions.paused(State(NOW, (0, 1), (tight, loose, urgent))) == ("loose",)


def test_a_clip_is_demoted_before_one_is_paused() -> None:
    wide = Job(request("wide", within=200.0), 10, "running", (0, 1), NOW)
    picture = Job(request("picture", PICTURE, within=2.5), 20)
    state = State(NOW, (0, 1), (wide, picture))
    decisions = Scheduler(policy_named("balanced"), COSTS).decide(state)
    assert {run.requests[0]: len(run.devices) for run in decisions.runs} == {"wide": 1, "picture": 1}
    assert (decisions.paused(state), decisions.stopped(state)) == ((), ((0, 1),))


def test_a_starved_clip_comes_before_clips_with_time_to_spare() -> None:
    starved = Job(request("starved", arrival=NOW - 500, within=50.0), 20)
    loose = [Job(request(f"loose{index}", within=1000.0), 20, "running", (index,), NOW) for index in range(4)]
    state = State(NOW, (0, 1, 2, 3), (starved, *loose))
    assert any("starved" in run.requests for run in Scheduler(policy_named("balanced"), COSTS).decide(state).runs)
    young = dataclasses.replace(starved, request=dataclasses.replace(starved.request, arrival=NOW - 45))
    state = State(NOW, (0, 1, 2, 3), (young, *loose))
    assert not any("starved" in run.requests for run in Scheduler(policy_named("balanced"), COSTS).decide(state).runs)


def test_clips_that_are_kept_are_as_many_as_can_be() -> None:
    """Moore and Hodgson's rule against every subset."""
    for seed in range(40):
        chance = random.Random(seed)
        jobs = [
            Job(Request(f"c{index}", chance.choice((SHORT, LONG)), 20, NOW, NOW + chance.uniform(5, 120)), 20)
            for index in range(7)
        ]
        view = View(State(NOW, (0, 1), tuple(jobs)), COSTS)
        jobs.sort(key=lambda job: job.request.deadline)
        possible = [job for job in jobs if NOW + view.fastest(job) <= job.request.deadline]
        best = max(
            size
            for size in range(len(possible) + 1)
            if any(_flows(view, subset) for subset in itertools.combinations(possible, size))
        )
        assert len(carried(view, jobs, 2.0)) == best


def _due(job: Job) -> float:
    return job.request.deadline


def _flows(view: View, jobs: tuple[Job, ...]) -> bool:
    work = 0.0
    for job in jobs:
        work += next(degree * took for degree in (1, 2) if NOW + (took := view.seconds(job, degree)) <= _due(job))
        if work > 2.0 * (job.request.deadline - NOW):
            return False
    return True


def test_the_knapsack_is_as_good_as_trying_everything() -> None:
    chance = random.Random(0)
    for _ in range(60):
        groups = [
            [Option(0, chance.random()), *(Option(degree, 2 * chance.random()) for degree in (1, 2, 4, 8))]
            for _ in range(chance.randint(0, 4))
        ]
        packing = Packing(groups, 8)
        for capacity in range(9):
            best = max(
                sum(option.value for option in options)
                for options in itertools.product(*groups)
                if sum(option.devices for option in options) <= capacity
            )
            chosen = packing.chosen(capacity)
            assert packing.values[capacity] == pytest.approx(best)
            assert sum(option.value for option in chosen) == pytest.approx(best)
            assert sum(option.devices for option in chosen) <= capacity
    with pytest.raises(ValueError, match="takes no devices"):
        Packing([[Option(1, 1.0)]], 8)


def test_pictures_share_a_batch_only_while_all_are_in_time() -> None:
    roomy = [Job(request(f"p{index}", PICTURE, within=60.0), 20) for index in range(5)]
    tight = [Job(request(f"t{index}", PICTURE, within=2.3), 20) for index in range(2)]
    view = View(State(NOW, (0, 1, 2), (*roomy, *tight)), COSTS)
    found = batches(view, [*roomy, *tight])
    sizes = sorted(len(batch.wish.jobs) for batch in found)
    assert sizes == [1, 1, 1, 4]  # the tight ones alone; four is the largest batch
    assert all(batch.in_time for batch in found)


def test_what_cannot_be_met_is_refused_at_once() -> None:
    scheduler = Scheduler(policy_named("balanced"), COSTS, Admission())
    idle = State(NOW, (0, 1), ())
    assert scheduler.refusal(idle, request("a", LONG, within=60.0)) is None
    assert "on the idle machine" in str(scheduler.refusal(idle, request("b", LONG, within=5.0)))
    full = State(NOW, (0, 1), tuple(Job(request(f"c{index}", within=70.0), 20) for index in range(3)))
    assert "what is due before it" in str(scheduler.refusal(full, request("d", LONG, within=75.0)))
    assert scheduler.refusal(full, request("e", SMALL, within=5.0)) is None  # it goes before them
    assert Scheduler(policy_named("balanced"), COSTS).refusal(idle, request("f", within=0.1)) is None


def test_costs_between_those_of_the_table() -> None:
    assert COSTS.step(SMALL, 2, 1) == pytest.approx(0.03)
    assert (COSTS.largest_batch(SMALL), COSTS.largest_batch(LONG)) == (4, 1)
    assert COSTS.switch(LONG, 2, 2) == 0 < COSTS.switch(LONG, 0, 2) < COSTS.switch(LONG, 1, 2)
    assert alone(COSTS, LONG, 20, 3) == pytest.approx(0.001 + 20 * 2.0 / 2**0.8 + 1.0)
    assert with_deadline(request("a", SMALL), COSTS, 8, 2.0).deadline == pytest.approx(NOW + 2 * 0.401)
    with pytest.raises(ValueError, match="no costs for x 1x1; known are m 64x64"):
        COSTS.step(Shape("x", 1, 1), 1, 1)
    with pytest.raises(ValueError, match="must take more than 0"):
        TableCosts({(SMALL, 1, 1): math.nan})


def test_costs_learn_from_what_is_measured() -> None:
    costs = MeasuredCosts(COSTS, share=0.5)
    assert costs.step(LONG, 1, 2) == COSTS.step(LONG, 1, 2)
    for _ in range(12):
        costs.measured(LONG, 1, 1, 3.0)
    assert costs.step(LONG, 1, 1) == pytest.approx(3.0)
    assert costs.step(LONG, 1, 4) == pytest.approx(1.5 * COSTS.step(LONG, 1, 4))  # its shape's correction
    assert costs.step(SHORT, 1, 1) == COSTS.step(SHORT, 1, 1)
    costs.measured(LONG, 1, 1, 1.0)
    assert costs.step(LONG, 1, 1) == pytest.approx(2.0)


def test_the_router_finds_the_least_load() -> None:
    router, loads, chance = Router(), dict[int, float](), random.Random(1)
    for _ in range(3000):
        group = chance.randrange(40)
        if loads and chance.random() < 0.05:
            group = chance.choice(list(loads))
            router.remove(group)
            del loads[group]
        else:
            loads[group] = round(chance.random(), 2)
            router.update(group, loads[group])
        if loads:
            assert router.choose() == min(loads, key=lambda one: (loads[one], one))
    with pytest.raises(ValueError, match="no group of devices"):
        Router().choose()


def test_states_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="name one twice"):
        State(NOW, (0, 0), ())
    with pytest.raises(ValueError, match="same request id"):
        State(NOW, (0,), (Job(request("a"), 20), Job(request("a"), 20)))
    with pytest.raises(ValueError, match="not all among the devices"):
        State(NOW, (0,), (Job(request("a"), 20, "running", (1,), NOW),))
    with pytest.raises(ValueError, match="21 steps remain of 20"):
        Job(request("a"), 21)
    with pytest.raises(ValueError, match="must be one of fcfs"):
        policy_named("best")
