"""An engine's requests that come and go: paused, resumed, cancelled, carried to other ranks, on real workers."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from patchpipe import Cancelled, Engine, ParallelConfig, PatchpipeError, RankLost
from patchpipe.engine import Checkpoint, Elastic, Ticket
from tests import tiny

pytestmark = pytest.mark.timeout(300)

PATIENCE, STEPS = 60.0, 30


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("flux", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    with Engine(model, ParallelConfig(pipefusion=2, patches=3, timeout=30), devices="cpu", threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def elastic(model: Path) -> Iterator[Engine]:
    with Engine(model, Elastic(2, timeout=30), devices="cpu", threads=1) as engine:
        yield engine


def call(steps: int = STEPS, **more: Any) -> dict[str, Any]:
    return {**tiny.call_arguments("flux", height=96, steps=steps), "output_type": "np", "seed": 3, **more}


def held(engine: Engine, **more: Any) -> Ticket:
    """A request that is paused after one of its first steps."""
    ticket = engine.submit(**call(**more))
    ticket.pause()
    assert ticket.wait_for("paused", timeout=PATIENCE) == "paused"
    assert 0 < ticket.step < STEPS
    return ticket


def same(ticket: Ticket, expected: np.ndarray) -> bool:
    return np.array_equal(ticket.result(PATIENCE).images, expected)


def test_requests_come_and_go(engine: Engine) -> None:
    long, short = engine(**call()), engine(**call(6))
    ticket = held(engine)
    with pytest.raises(ValueError, match=f"request {ticket.number} is paused, and until it ends the engine"):
        engine(**call(2))
    with pytest.raises(TimeoutError, match=f"request {ticket.number} is paused"):
        ticket.result(0.01)
    beside = engine.submit(**call(6))  # while the other is held
    assert same(beside, short)
    assert beside.state == "done"
    ticket.resume()
    doomed = engine.submit(**call())
    refused = engine.submit(**{**call(), "prompt": 3})
    with pytest.raises(ValueError, match="prompt"):
        refused.result(PATIENCE)
    doomed.cancel()
    with pytest.raises(Cancelled):
        doomed.result(PATIENCE)
    assert same(ticket, long)
    [resumed] = ticket.result().stats["resumed"]
    assert (resumed["keys"], resumed["step"] > 0) == ("kept", True)
    assert not engine.closed
    assert np.array_equal(engine(**call(6)), short)


def test_what_was_saved_goes_on_as_what_was_let_go(engine: Engine, tmp_path: Path) -> None:
    ticket = held(engine)
    ticket.pause("nothing")
    step = ticket.step
    ticket.resume()
    other = held(engine)
    checkpoint = other.checkpoint(PATIENCE)
    assert (other.state, checkpoint.step, checkpoint.pipeline) == ("saved", other.step, "FluxPipeline")
    with pytest.raises(PatchpipeError, match="was saved and ended here"):
        other.result(PATIENCE)
    checkpoint.save(tmp_path / "request")
    checkpoint = Checkpoint.load(tmp_path / "request")
    again = engine.submit(**other.arguments, checkpoint=checkpoint)
    assert again.result(PATIENCE).stats["resumed"] == [{"step": checkpoint.step, "keys": "dropped"}]
    if step == checkpoint.step:
        assert same(again, ticket.result(PATIENCE).images)
    changed = engine.submit(**{**other.arguments, "seed": 4}, checkpoint=checkpoint)
    with pytest.raises(ValueError, match="the checkpoint is of another call: its generator is a generator seeded 3"):
        changed.result(PATIENCE)


def test_what_a_caller_hears_of_it(engine: Engine) -> None:
    states, steps = [], []
    ticket = engine.submit(
        **call(5), on_state=lambda one: states.append(one.state), on_progress=lambda one: steps.append(one.step)
    )
    ticket.result(PATIENCE)
    assert (states, steps) == (["running", "done"], [1, 2, 3, 4, 5])

    def stumble(_: Any) -> None:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        engine.submit(**call(), on_progress=stumble).result(PATIENCE)
    both = [engine.submit(**call()) for _ in range(2)]
    both[0].wait_for("running", timeout=PATIENCE)
    assert engine.cancel()
    for ticket in both:
        with pytest.raises(Cancelled):
            ticket.result(PATIENCE)
    assert len(engine(**call(2))) == 1


def test_wrong_requests_are_refused_at_once(engine: Engine) -> None:
    for wrong, text in (
        ({"prompts": "x"}, "takes no argument 'prompts': did you mean 'prompt'"),
        ({"ranks": (0,)}, "the ranks of this engine serve every request together: leave ranks out"),
    ):
        with pytest.raises((TypeError, ValueError), match=text):
            engine.submit(**call(), **wrong)
    ticket = engine.submit(**call(2))
    with pytest.raises(ValueError, match="keep='disk' must be one of 'device', 'host', 'nothing'"):
        ticket.pause("disk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="hold parts of the model: give the engine an Elastic layout"):
        ticket.move((0,))
    ticket.result(PATIENCE)


def test_a_request_changes_its_ranks(elastic: Engine) -> None:
    alone = elastic.submit(**call(), ranks=(0,)).result(PATIENCE)
    assert alone.stats["resumed"] == []
    ticket, beside = (elastic.submit(**call(), ranks=(rank,)) for rank in (0, 1))
    assert same(beside, alone.images)  # on ranks of their own, side by side
    ticket.result(PATIENCE)
    ticket = elastic.submit(**call(), ranks=(0,))
    ticket.pause()
    ticket.wait_for("paused", timeout=PATIENCE)
    ticket.move((1,))  # to another rank, bit-equal
    assert same(ticket, alone.images)
    [moved] = ticket.result().stats["resumed"]
    assert moved["keys"] == "dropped"
    ticket = elastic.submit(**call(), ranks=(1,))
    ticket.pause()
    ticket.wait_for("paused", timeout=PATIENCE)
    ticket.move((0, 1))  # to two of them, which sum in another order
    np.testing.assert_allclose(ticket.result(PATIENCE).images, alone.images, atol=1e-4)
    np.testing.assert_allclose(elastic(**call()), alone.images, atol=1e-4)
    with pytest.raises(ValueError, match=r"ranks=\(1, 0\) cannot share a request"):
        elastic.submit(**call(), ranks=(1, 0))
    with pytest.raises(ValueError, match="without previews, timelines and LoRA"):
        elastic.together([call()])


def test_elastic_layouts() -> None:
    assert Elastic(4).lanes == ((0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3))
    assert Elastic(4, "ring").of(2) == ParallelConfig(ring=2)
    for wrong, text in ((3, "must be a power of two"), (1, "must be a power of two"), ("2", "must be a power of two")):
        with pytest.raises(ValueError, match=text):
            Elastic(wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method='tensor' must be"):
        Elastic(2, "tensor")  # type: ignore[arg-type]


def test_a_worker_that_dies_while_a_request_is_paused_ends_it(model: Path) -> None:
    with Engine(model, ParallelConfig(pipefusion=2, timeout=30), devices="cpu", threads=1) as engine:
        ticket = held(engine)
        os.kill(engine.ranks[1].pid, signal.SIGKILL)
        with pytest.raises(RankLost, match=r"rank 1 \(pid \d+\) was killed by SIGKILL"):
            ticket.result(PATIENCE)
        assert engine.closed
        with pytest.raises(PatchpipeError, match="the engine is closed"):
            engine.submit(**call(2))
