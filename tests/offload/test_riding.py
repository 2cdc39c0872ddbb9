"""Calls of one step go through the blocks together: the same pictures, and weights come once."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from patchpipe import OffloadConfig, ParallelConfig, parallelize, restore
from patchpipe.offload.riding import Ride, Riders, Run
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import predict
from patchpipe.planner.schedule import Schedule
from patchpipe.planner.work.named import Asked, workload_for
from patchpipe.schedule.steps.verbs import Keys
from tests import tiny
from tests.offload.test_offload_parity import paint, poisoned
from tests.schedule.test_stream import attached, carry, hold_and_go_on, latent, live_through, numbers, seeded
from tests.support.parity import call_pipeline
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import loras

__all__ = ["poisoned"]  # what a block leaves behind is NaN
ALL = OffloadConfig(resident=0.0, chunk=0.01, depth=2)
STEPS = 4


def setup_module() -> None:
    quieten()


def passes(told: dict[str, Any]) -> int:
    """How often the weights came; what came ahead at the end is less than once."""
    return int(told["bytes"] + told["gathered"]) // int(told["streamed_bytes_per_pass"])


# -- pictures ------------------------------------------------------------------------------------


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", ["qwen", "wan", "wan-a14b", "chroma", "flux"])
def test_the_calls_of_guidance_share_one_copy_of_the_weights(name: str) -> None:
    config = ParallelConfig(warmup="all", offload=ALL)
    [(expected, _)] = run_threads(1, paint, name, ParallelConfig(warmup="all"))
    [(made, told)] = run_threads(1, paint, name, config)
    assert torch.equal(made[0], expected[0])
    assert passes(told) == tiny.call_arguments(name)["num_inference_steps"] == STEPS


@pytest.mark.some(of=2)
@pytest.mark.parametrize(
    ("layout", "asked", "often"),
    [
        ({"ulysses": 2}, ALL, STEPS),
        ({"ulysses": 2}, OffloadConfig(resident=0.0, chunk=0.01, depth=2, gathered=True), STEPS),
        ({"tensor": 2}, ALL, STEPS),
        ({"cfg": 2}, ALL, STEPS),
        ({"pipefusion": 2}, ALL, 2 * STEPS),
    ],
    ids=str,
)
def test_ranks_paint_the_same(layout: dict[str, Any], asked: OffloadConfig, often: int) -> None:
    exact = {"warmup": "all", "patch_rows": (7,)}
    plain = run_threads(2, paint, "qwen", ParallelConfig(**layout, **exact))
    found = run_threads(2, paint, "qwen", ParallelConfig(**layout, **exact, offload=asked))
    for (expected, _), (made, told) in zip(plain, found, strict=True):
        assert expected[0] is None or torch.equal(made[0], expected[0])
        assert passes(told) == often


def test_requests_in_flight_together_each_make_theirs_together() -> None:
    calls = [
        {**tiny.call_arguments("qwen", steps=steps), "output_type": "latent", "prompt": prompt}
        for steps, prompt in ((STEPS, "owl"), (3, "fox"))
    ]
    pipe = tiny.pipeline("qwen")
    alone = [tiny.painted(pipe(**call, generator=torch.Generator().manual_seed(1))) for call in calls]
    parallelize(pipe, ParallelConfig(warmup="all", offload=ALL))
    made = pipe.patchpipe.together([{**call, "generator": torch.Generator().manual_seed(1)} for call in calls])
    for one, other in zip(made, alone, strict=True):
        assert torch.equal(tiny.painted(one), other)
    assert passes(pipe.patchpipe.offload.as_dict()) == STEPS + 3


@pytest.mark.some(of=2)
@pytest.mark.parametrize("layout", [{}, {"ulysses": 2, "patch_rows": None}], ids=["one rank", "ulysses"])
def test_requests_that_come_and_go_paint_what_they_paint_alone(layout: dict[str, Any]) -> None:
    ranks = layout.get("ulysses", 1)
    given = {**layout, "warmup": "all", "offload": ALL}
    assert run_threads(ranks, live_through, "qwen", given) == [[]] * ranks
    for found in run_threads(ranks, hold_and_go_on, "qwen", given, Keys.DROPPED):
        assert all(found.values()), found


def test_a_request_saved_between_two_calls_of_a_step_goes_on_elsewhere() -> None:
    expected = tiny.pipeline("qwen")(**latent(tiny.call_arguments("qwen", steps=4)), generator=seeded(0))
    for turns in (2, 3, 4, 5):

        def carry_away(place: Place, state: bytes | None, turns: int = turns) -> Any:
            return carry(attached(place, "qwen", warmup="all", offload=ALL), "qwen", state, turns)

        [state] = run_threads(1, carry_away, None)
        [(found, _)] = run_threads(1, carry_away, state)
        assert (found == numbers(expected)).all(), turns


def test_without_guidance_nothing_waits_for_long() -> None:
    pipe, call = tiny.pipeline("flux"), tiny.call_arguments("flux", guided=False)
    expected = tiny.painted(call_pipeline(pipe, call))
    parallelize(pipe, ParallelConfig(offload=ALL))
    assert torch.equal(tiny.painted(call_pipeline(pipe, call)), expected)
    assert passes(pipe.patchpipe.offload.as_dict()) == STEPS


def test_a_loop_of_ones_own_may_read_a_prediction_at_once() -> None:
    pipe = tiny.pipeline("qwen")
    parallelize(pipe, ParallelConfig(warmup="all"))
    right = own_loop(pipe)
    restore(pipe)
    parallelize(pipe, ParallelConfig(warmup="all", offload=ALL))
    for one, other in zip(own_loop(pipe), right, strict=True):
        assert torch.equal(one, other)
    with pytest.raises(RuntimeError, match="an input of the transformer was written to before the next call"):
        own_loop(pipe, spoil=True)
    for one, other in zip(own_loop(pipe), right, strict=True):
        assert torch.equal(one, other), "usable afterwards"


def own_loop(pipe: Any, *, spoil: bool = False) -> list[Tensor]:
    """Predictions of two prompts in turns; one of them is read before the next call is made."""
    torch.manual_seed(0)
    latent, prompts = torch.randn(1, 12, 16), [torch.randn(1, 5, tiny.WIDTH) for _ in range(2)]
    found = []
    with torch.no_grad(), pipe.patchpipe.serving():
        for step in range(3):
            made = []
            for prompt in prompts:
                given = prompt.clone()
                made.append(
                    pipe.transformer(
                        hidden_states=latent, encoder_hidden_states=given, timestep=torch.tensor([0.9 - step / 10]),
                        encoder_hidden_states_mask=torch.ones(1, 5), img_shapes=[[(1, 4, 3)]], return_dict=False,
                    )[0]
                )  # fmt: skip
                if step == 1:
                    made[-1] = made[-1] + 0.0
                    _ = made[-1].sum().item()
                if spoil:
                    given.zero_()
            latent = latent + made[0] * 2 - made[1]
            found += [torch.as_tensor(one + 0) for one in made]
        return [one.clone() for one in map(whole, [*found, latent])]


def whole(value: Any) -> Tensor:
    return value.materialise("the end") if hasattr(value, "materialise") else value


def test_a_traced_request_makes_its_calls_one_by_one(tmp_path: Any) -> None:
    pipe, call = tiny.pipeline("qwen"), tiny.call_arguments("qwen")
    parallelize(pipe, ParallelConfig(warmup="all", offload=ALL))
    with pipe.patchpipe.tracing(tmp_path / "trace.json"):
        call_pipeline(pipe, call)
    assert passes(pipe.patchpipe.offload.as_dict()) == 2 * STEPS


def test_strengths_of_lora_are_each_calls_own(tmp_path: Any) -> None:
    plain, call = tiny.pipeline("qwen"), tiny.call_arguments("qwen")
    call["attention_kwargs"] = {"scale": 0.5}
    lora = loras.save(plain, tmp_path)
    plain.load_lora_weights(lora)
    expected = tiny.painted(call_pipeline(plain, call))
    pipe = tiny.pipeline("qwen")
    parallelize(pipe, ParallelConfig(warmup="all", offload=ALL))
    pipe.load_lora_weights(lora)
    assert torch.equal(tiny.painted(call_pipeline(pipe, call)), expected)


@pytest.mark.parametrize("call_that_fails", [4, 5])
def test_a_call_that_fails_ends_both_and_the_pipeline_stays_usable(call_that_fails: int) -> None:
    pipe, call = tiny.pipeline("qwen"), tiny.call_arguments("qwen")
    expected = tiny.painted(call_pipeline(pipe, call))
    block, calls = pipe.transformer.transformer_blocks[2], []
    forward: Callable[..., Any] = block.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == call_that_fails + 1:
            raise ValueError("the third block is tired")
        return forward(*args, **kwargs)

    block.forward = failing
    parallelize(pipe, ParallelConfig(warmup="all", offload=ALL))
    with pytest.raises(ValueError, match="the third block is tired"):
        call_pipeline(pipe, call)
    assert torch.equal(tiny.painted(call_pipeline(pipe, call)), expected)


def paint_and_fail(place: Place) -> str:
    pipe, call = tiny.pipeline("qwen"), tiny.call_arguments("qwen")
    block = pipe.transformer.transformer_blocks[2]
    forward: Callable[..., Any] = block.forward

    def failing(*args: Any, **kwargs: Any) -> Any:
        if place.rank == 1:
            raise ValueError("the third block is tired")
        return forward(*args, **kwargs)

    block.forward = failing
    config = ParallelConfig(ulysses=2, warmup="all", offload=ALL, timeout=10)
    parallelize(pipe, config, group=place.join(config))
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call_pipeline(pipe, call)
    return str(caught.value)


def test_a_rank_that_fails_is_named() -> None:
    for text in run_threads(2, paint_and_fail):
        assert "the third block is tired" in text


# -- the ride ------------------------------------------------------------------------------------


class Block:
    """Notes when it is held."""

    def __init__(self, number: int, log: list[tuple[str, int]]) -> None:
        self.number, self.log = number, log

    def hold(self) -> None:
        self.log.append(("hold", self.number))

    def let_go(self) -> None:
        self.log.append(("let go", self.number))


def ride_of(routes: list[list[int]], fails: tuple[int, int] | None = None) -> tuple[list[Any], list[Any], Any]:
    """Calls along routes of blocks; what was held when, and who passed what with what it was at work with."""
    log: list[tuple[str, int]] = []
    passed: list[tuple[int, int]] = []
    blocks = {number: Block(number, log) for route in routes for number in route}
    at_work: list[Any] = [None]

    def exchange(other: Any) -> Any:
        mine, at_work[0] = at_work[0], other
        return mine

    def run(call: int) -> None:
        at_work[0] = call
        for number in routes[call]:

            def compute(number: int = number) -> None:
                assert log[-1] == ("hold", number)
                assert at_work[0] == call
                assert not torch.is_grad_enabled()
                passed.append((call, number))
                if (call, number) == fails:
                    raise KeyError("failed")

            ride.through(blocks[number], compute)
            assert at_work[0] == call
        at_work[0] = None

    runs: list[Run] = [lambda call=call: run(call) for call in range(len(routes))]  # type: ignore[misc]
    ride = Ride(runs, exchange, torch.device("cpu"))
    error = None
    try:
        ride.go()
    except KeyError as raised:
        error = raised
    return log, passed, error


@pytest.mark.parametrize("calls", [2, 3])
def test_every_block_is_held_once_for_all_calls(calls: int) -> None:
    log, passed, error = ride_of([list(range(5))] * calls)
    assert error is None
    assert log == [(what, number) for number in range(5) for what in ("hold", "let go")]
    assert sorted(passed) == [(call, number) for call in range(calls) for number in range(5)]


def test_calls_of_different_routes_are_right_too() -> None:
    draw = random.Random(2)
    for _ in range(50):
        routes = [[number for number in range(6) if draw.random() < 0.7] for _ in range(3)]
        log, passed, _ = ride_of(routes)
        assert sorted(passed) == sorted((call, number) for call, route in enumerate(routes) for number in route)
        assert [what for what, _ in log] == ["hold", "let go"] * (len(log) // 2), "one at a time"


@pytest.mark.parametrize("fails", [(0, 0), (0, 3), (1, 0), (1, 4), (2, 2)])
def test_where_one_fails_all_end_and_nothing_stays_held(fails: tuple[int, int]) -> None:
    log, passed, error = ride_of([list(range(5))] * 3, fails)
    assert isinstance(error, KeyError)
    assert [what for what, _ in log] == ["hold", "let go"] * (len(log) // 2)
    assert max(number for _, number in passed) <= fails[1] + 1


class Alone:
    """Runs calls and notes how many at once."""

    streams = True

    def __init__(self) -> None:
        self.together_: list[int] = []

    def together(self, stage: Any, runs: Any) -> None:
        self.together_.append(len(runs))
        for run in runs:
            run()


def test_a_step_tells_how_many_calls_the_next_one_has() -> None:
    company = Alone()
    riders, ran = Riders(company, 2), []

    def call(latent: Any, stage: str = "one") -> Callable[[int], Tensor]:
        return riders.add(latent, stage, (), lambda: ran.append(latent), lambda _: torch.zeros(1))

    first, second, third, fourth = (object() for _ in range(4))
    for _ in range(3):  # two are expected, and a third comes
        call(first)
    assert (company.together_, len(ran)) == ([2], 3)
    asked = [call(second), call(second)]
    assert len(ran) == 3
    asked[0](0)  # all that wait are run where one is asked for
    assert (company.together_, len(ran)) == ([2, 2], 5)
    asked[1](0)
    call(third)
    assert len(ran) == 5, "two, as in the step before"
    call(fourth)  # another step: what nobody has asked for is run, and one call is expected from here on
    assert len(ran) == 7
    call(third, "another transformer")
    assert len(ran) == 8


# -- the planner ---------------------------------------------------------------------------------


def test_the_planner_counts_one_copy_a_step() -> None:
    workload, card = workload_for("qwen-image", Asked()), Profile.named("rtx4090", "pcie4")
    asked = OffloadConfig(memory=8)
    alone = predict(workload, ParallelConfig(offload=asked), card)
    assert workload.calls == 2
    [chosen] = Schedule(Layout(workload, alone.config, card)).offloads
    assert alone.uploads == (sum(chosen.streamed),)
    staged = predict(workload, ParallelConfig(pipefusion=2, patches=2, offload=asked), card)
    first = Schedule(Layout(workload, staged.config, card)).offloads[0]
    assert staged.uploads[0] == 2 * 2 * sum(first.streamed), "for every patch of both calls"
    exact = predict(workload, ParallelConfig(pipefusion=2, patches=2, warmup="all", offload=asked), card)
    first = Schedule(Layout(workload, exact.config, card)).offloads[0]
    assert exact.uploads[0] == 2 * sum(first.streamed), "whole, for both calls"
