"""Requests in flight together paint what each paints alone, and fail as one."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

import patchpipe
from patchpipe import ParallelConfig, RankLost
from patchpipe.parallel.refusals import check_calls
from patchpipe.schedule.baton import Baton, Grounded
from patchpipe.tracing import timeline as files
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.threads import run_threads

pytestmark = pytest.mark.timeout(120)

SCHEDULES: list[dict[str, Any]] = [{"patches": 3, "warmup": 1}, {"warmup": "all"}]
LAYOUTS: dict[int, list[dict[str, Any]]] = {
    1: [{**schedule, "patches": 2} for schedule in SCHEDULES],
    2: [*({"pipefusion": 2, **schedule} for schedule in SCHEDULES), {"distrifusion": 2, "parallel_vae": True}],
    3: [{"pipefusion": 3, **schedule} for schedule in SCHEDULES],
    4: [
        {"pipefusion": 2, method: 2, "patches": 2, "text_rank": "spread"}
        for method in ("cfg", "ulysses", "ring", "tensor", "data")
    ],
}


def setup_module() -> None:
    quieten()


def calls_for(name: str, layout: dict[str, Any]) -> list[dict[str, Any]]:
    """Three calls that differ in size, steps, prompt, guidance and number of pictures."""
    several = {"num_images_per_prompt": 2} if layout.get("data", 1) > 1 else {}
    guided = layout.get("cfg", 1) > 1  # ranks are set aside for the second branch
    return [
        {**tiny.call_arguments(name, height=112, steps=3), **several},
        {**tiny.call_arguments(name, guided=guided, height=64, width=64, steps=4), "prompt": tiny.OTHER_PROMPT}
        | several,
        {**tiny.call_arguments(name, height=96, steps=2), "num_images_per_prompt": 2},
    ]


def numbers(output: Any) -> np.ndarray:
    return np.asarray(output.images)


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)]


def compare(place: Place, cases: dict[str, list[dict[str, Any]]]) -> list[str]:
    """What differs between calls alone, the same together, and once more alone."""
    wrong = []
    for name, layouts in cases.items():
        pipe = tiny.pipeline(name)
        for layout in layouts:
            config = ParallelConfig(**layout, timeout=60.0)
            patchpipe.parallelize(pipe, config, group=place.join(config))
            kind = "np" if layout.get("parallel_vae") else "latent"
            calls = [{**call, "output_type": kind} for call in calls_for(name, layout)]
            alone = paint_alone(pipe, calls)
            with_generators = [{**call, "generator": own} for call, own in zip(calls, generators(), strict=True)]
            together = pipe.patchpipe.together(with_generators)
            counted = [(one.sent_bytes, one.steps_patched, one.store_bytes) for one in pipe.patchpipe.stats]
            afterwards = alone if config.synchronous else paint_alone(pipe, calls)
            for number, (one, same, again) in enumerate(zip(alone, together, afterwards, strict=True)):
                title = f"{name}, {layout}, call {number + 1}"
                if counted[number] != one[1]:
                    wrong.append(f"{title}: counts {counted[number]}, alone {one[1]}")
                if place.rank != config.output_rank:
                    assert (one[0], same, again[0]) == (None, None, None)
                    continue
                assert np.isfinite(numbers(one[0])).all()
                if not np.array_equal(numbers(one[0]), numbers(same)):
                    wrong.append(f"{title}: not what it is alone")
                if not np.array_equal(numbers(one[0]), numbers(again[0])):
                    wrong.append(f"{title}: something was left behind")
            assert pipe.patchpipe.runner.request is None
            patchpipe.restore(pipe)
    return wrong


def paint_alone(pipe: Any, calls: list[dict[str, Any]]) -> list[tuple[Any, tuple[int, int, int]]]:
    """Every call on its own: what it gives, and what it counts."""
    found = []
    for call, generator in zip(calls, generators(), strict=True):
        output, last = pipe(**call, generator=generator), pipe.patchpipe.last
        found.append((output, (last.sent_bytes, last.steps_patched, last.store_bytes)))
    return found


@pytest.mark.some(of=3)
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_law_2_together_is_what_each_is_alone(ranks: int) -> None:
    wrong = run_ranks(ranks, compare, dict.fromkeys(tiny.MODELS, LAYOUTS[ranks]))
    assert wrong == [[]] * ranks


def test_law_6_every_layout_that_may_fly_together_is_tested() -> None:
    guided = {"flux": LAYOUTS[4], "pixart-4": LAYOUTS[4][:1]}  # in two calls, and in one
    wrong = run_threads(4, compare, guided)
    assert wrong == [[]] * 4
    with pytest.raises(ValueError, match=r"requests in flight together .* nearest that is tested is distrifusion"):
        patchpipe.layout.combinations.check_together(frozenset({"cfg", "distrifusion"}))
    with pytest.raises(ValueError, match="compile=True is not tested with requests in flight together"):
        patchpipe.layout.combinations.check_together(frozenset({"pipefusion"}), compiled=True)


# -- what requests share, and must not --------------------------------------------------------------


def draw(place: Place) -> dict[str, bool]:
    """Noise in every step from the default generator, which the requests do not share."""
    config = ParallelConfig(pipefusion=2, patches=2, timeout=60.0)
    pipe = tiny.pipeline("pixart")
    pipe.scheduler = DDPMScheduler.from_config(pipe.scheduler.config)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    calls = [{**call, "output_type": "latent"} for call in calls_for("pixart", {})[:2]]
    torch.manual_seed(place.rank)  # ranks that disagree go on as rank 0 does
    untouched = torch.get_rng_state()
    seeded = pipe.patchpipe.together(calls, seeds=[3, 4])
    kept = torch.equal(torch.get_rng_state(), untouched)
    alone = []
    for call, seed in zip(calls, (3, 4), strict=True):
        torch.manual_seed(seed)
        alone.append(pipe(**call))
    unseeded = []
    for _ in range(2):
        torch.manual_seed(9)
        unseeded += pipe.patchpipe.together([calls[0], calls[0]])
    if not pipe.patchpipe.group.output:
        return {"the caller's generator is left alone": kept}
    first, second, again, _ = map(numbers, unseeded)
    return {
        "the caller's generator is left alone": kept,
        "each draws what it draws alone": all(map(np.array_equal, map(numbers, seeded), map(numbers, alone))),
        "seeds follow from the default generator": np.array_equal(first, again),
        "each has a seed of its own": not np.array_equal(first, second),
    }


def test_every_request_draws_for_itself() -> None:
    for found in run_ranks(2, draw):
        assert all(found.values()), found


def trace_together(place: Place, file: str) -> list[int]:
    """Traces two requests in flight; gives the bytes this rank says it sent for each."""
    config = ParallelConfig(pipefusion=2, warmup="all", timeout=60.0)
    pipe = patchpipe.parallelize(tiny.pipeline("sd3"), config, group=place.join(config))
    with pipe.patchpipe.tracing(file):
        pipe.patchpipe.together([tiny.call_arguments("sd3", steps=steps) for steps in (2, 3)])
    return [one.sent_bytes for one in pipe.patchpipe.stats]


def test_stages_take_requests_in_turn_and_the_trace_tells(tmp_path: Path) -> None:
    sent = run_ranks(2, trace_together, str(tmp_path / "run.json"))
    timeline = files.read(tmp_path / "run.json")
    assert (timeline.about["requests"], timeline.about["steps"]) == (2, 3)
    for track, sizes in zip(timeline.tracks, sent, strict=True):
        order = [(where.request, where.step) for found, _, where in timeline.computes() if found is track]
        assert order == [(0, 0), (1, 0), (0, 1), (1, 1), (1, 2)]
        for number, size in enumerate(sizes):
            events = [event for event in track.events if event.kind == "send" and event.where is not None]
            assert sum(event.details["bytes"] for event in events if event.where.request == number) == size
        assert track.sent_bytes == sum(sizes)


# -- failures ----------------------------------------------------------------------------------------

WRONG = {"prompt": 3}


def be_refused(place: Place) -> list[Any]:
    """Refuses a call with the others, alone, and where only one rank was given a wrong one."""
    config = ParallelConfig(pipefusion=2, patches=2, timeout=4.0)
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))

    def calls() -> list[dict[str, Any]]:
        arguments = {**tiny.call_arguments("flux"), "output_type": "latent"}
        return [{**arguments, "generator": torch.Generator().manual_seed(seed)} for seed in (1, 2)]

    [one, two] = pipe.patchpipe.together(calls())
    told = []
    for at, wrong in ((0, WRONG), (1, WRONG), (1, {"height": 16})):
        with pytest.raises(ValueError) as caught:
            pipe.patchpipe.together([call | wrong if at == number else call for number, call in enumerate(calls())])
        told.append(str(caught.value))
    assert pipe.patchpipe.last.touched is False
    first, refused, second = pipe.patchpipe.together(
        [calls()[0], calls()[0] | WRONG, calls()[1]], return_exceptions=True
    )
    if pipe.patchpipe.group.output:
        assert np.array_equal(numbers(one), numbers(first))
        assert np.array_equal(numbers(two), numbers(second))
    told.append(f"{type(refused).__name__}: {refused}")
    began = time.monotonic()
    with pytest.raises((ValueError, patchpipe.PatchpipeError)) as lone:
        pipe.patchpipe.together([calls()[0], calls()[1] | (WRONG if place.rank == 1 else {})])
    return [*told, f"{type(lone.value).__name__}: {lone.value}", time.monotonic() - began, flying()]


def flying() -> list[str]:
    """Requests whose threads are still there."""
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("request")]


def test_a_wrong_call_is_refused_before_anything_is_painted() -> None:
    for first, second, flat, alone, lone, seconds, threads in run_ranks(2, be_refused):
        assert first.startswith("request 1 of 2: `prompt` has to be of type")
        assert second.startswith("request 2 of 2: `prompt` has to be of type")
        assert flat.startswith("request 2 of 2: patches=2 is more than the 1 token rows of this picture")
        assert alone.startswith("ValueError: `prompt` has to be of type")
        assert lone.startswith(
            "ValueError: the ranks were called differently: in call 2, prompt is 'red apple' on rank 0"
        )
        assert seconds < 15
        assert threads == []


def be_struck(place: Place, dies: bool) -> tuple[str, float, list[str]]:
    """The second of three ranks fails in the second request's third step."""
    config = ParallelConfig(pipefusion=3, patches=3, timeout=20.0)
    pipe = patchpipe.parallelize(tiny.pipeline("sd3"), config, group=place.join(config))
    calls, began = [tiny.call_arguments("sd3", steps=steps) for steps in (4, 6, 5)], [0.0]

    def strike(*_: Any) -> None:
        request = pipe.patchpipe.runner.request
        if request.number == 1 and request.stats.steps_patched == 2:
            began[0] = time.monotonic()
            os.kill(os.getpid(), signal.SIGKILL) if dies else _raise(ArithmeticError("the block is on fire"))

    if place.rank == 1:
        pipe.transformer.transformer_blocks[1].register_forward_pre_hook(strike)
    started = time.monotonic()
    with pytest.raises((ArithmeticError, patchpipe.PatchpipeError)) as caught:
        pipe.patchpipe.together(calls)
    assert pipe.patchpipe.runner.request is None
    return f"{type(caught.value).__name__}: {caught.value}", time.monotonic() - (began[0] or started), flying()


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.some(of=2)
@pytest.mark.parametrize("dies", [False, True])
def test_law_7_a_failing_request_ends_all_of_them_everywhere(dies: bool) -> None:
    ranks = run_ranks(3, be_struck, dies, mortal=[1])
    for rank in (0, 2):
        text, seconds, threads = ranks[rank]
        expected = (
            ("RankLost: rank 1 closed", "RankFailed: rank")
            if dies
            else ("RankFailed: rank 1 failed first: ArithmeticError: the block is on fire",)
        )
        assert text.startswith(expected)
        assert "rank 1" in text
        assert seconds < 15
        assert threads == []
    if not dies:
        assert ranks[1][0] == "ArithmeticError: the block is on fire"
        assert ranks[1][2] == []


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Has an interrupt raise, also where a shell started the tests in the background and so with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_leaves_no_request_running() -> None:
    config = ParallelConfig(patches=2)
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), config)
    call, struck = {**tiny.call_arguments("flux"), "output_type": "latent"}, []

    def interrupt(*_: Any) -> None:
        if pipe.patchpipe.runner.request.stats.steps_patched == 2 and not struck:
            struck.append(True)  # a second one would end the wait for the requests' threads
            signal.raise_signal(signal.SIGINT)  # which Python answers in its main thread

    hook = pipe.transformer.transformer_blocks[0].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        pipe.patchpipe.together([{**call, "num_inference_steps": 900}] * 2)
    hook.remove()
    one, other = pipe.patchpipe.together([call, call], seeds=[1, 1])
    assert np.array_equal(numbers(one), numbers(other))
    assert flying() == []


def test_the_baton_goes_round_and_waits_have_a_deadline() -> None:
    baton = Baton(3, timeout=0.05)
    held = []
    for _ in range(4):
        held.append(baton.holder)
        baton.pass_on()
    baton.leave(baton.holder)
    assert (held, baton.holder) == ([0, 1, 2, 0], 2)
    baton.leave(0)
    baton.pass_on()
    assert baton.holder == 2
    with pytest.raises(RankLost, match=r"request 3 did not let the others go on within 0\.05 s"):
        baton.take(0)
    baton.drop()
    with pytest.raises(Grounded):
        baton.take(2)
    assert not issubclass(Grounded, Exception), "no pipeline may catch it"


@pytest.mark.parametrize(
    ("calls", "seeds", "words"),
    [
        ([], None, "there are no calls"),
        ([{}, {}], [1], "1 seeds for 2 calls"),
        ([{}, "red apple"], None, "call 2 is a str"),
    ],
)
def test_wrong_sets_of_calls_are_refused(calls: Any, seeds: Any, words: str) -> None:
    with pytest.raises((ValueError, TypeError), match=words):
        check_calls(calls, seeds, None)


def test_calls_must_not_share_a_generator() -> None:
    shared, own = torch.Generator(), torch.Generator()
    check_calls([{"generator": [shared, own]}, {"generator": None}, {}], None, None)
    with pytest.raises(ValueError, match="calls 1 and 3 share a generator"):
        check_calls([{"generator": shared}, {"generator": own}, {"generator": [shared]}], None, None)
