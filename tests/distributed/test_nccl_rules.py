"""Under NCCL's rules: nothing hangs, nothing is read before it came, the host never stalls, and failures are told.

The layouts themselves run under them in `test_parallel.py`, and the laws in `test_laws.py`.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from traceback import extract_stack
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.distributed.process_groups import ProcessGroups
from patchpipe.errors import PatchpipeError
from patchpipe.layout.axes import Mesh
from patchpipe.layout.communicators import Link, answer_links, count, key_links, stage_links
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over, under_nccl_rules
from tests.support.ranks import Place, run_ranks
from tests.support.threads import run_threads

# -- the double itself: what hung before, and would again --------------------------------------------


def both(place: Place, act: Callable[[int, Any], Any], names: tuple[str, ...] = ("one",)) -> Any:
    """Calls ``act(rank, groups)`` with groups of two ranks under NCCL's rules."""
    groups = ProcessGroups(place.store, 30.0)
    return act(place.rank, [groups.make(name, "nccl", place.rank, 2) for name in names])


def told(act: Callable[[int, Any], Any], *names: str) -> str:
    """What breaks when two ranks act so."""
    with under_nccl_rules(), pytest.raises(AssertionError) as caught:
        run_threads(2, both, act, names or ("one",), timeout=60)
    return str(caught.value)


@pytest.fixture
def impatient() -> Iterator[None]:
    rules = "tests.support.nccl_rules"
    with mock.patch(f"{rules}.STUCK_SECONDS", 1.0), mock.patch(f"{rules}.CONTACT_SECONDS", 1.0):
        yield


def test_the_double_catches_a_first_contact_that_both_ranks_make_elsewhere(impatient: None) -> None:
    """As a receive of the prediction on one communicator met a receive of hidden states on another."""

    def act(rank: int, groups: Any) -> None:
        groups[rank].recv([torch.empty(1)], 1 - rank, 0)

    assert "blocks for ever in the first contact of 0:1" in told(act, "return", "forward")


def test_the_double_catches_two_ranks_that_receive_before_they_send(impatient: None) -> None:
    """As two branches of guidance did: each expected the other's prediction on the pair's only communicator."""

    def act(rank: int, groups: Any) -> None:
        arriving = torch.empty(1)
        receive = groups[0].recv([arriving], 1 - rank, 0)
        groups[0].send([torch.ones(1)], 1 - rank, 0)
        receive.wait()

    assert "never ends: one 0:1 is at «one: receive on" in told(act)


def test_the_double_poisons_what_has_not_been_waited_for_and_counts_stalls() -> None:
    def act(rank: int, groups: Any) -> Any:
        if rank == 0:
            groups[0].send([torch.ones(2)], 1, 0).wait()
            return None
        arriving = torch.zeros(2)
        work = groups[0].recv([arriving], 0, 0)
        while not work.is_completed():
            time.sleep(0.01)
        before = arriving.clone()
        work.wait(timedelta(seconds=5))
        return before, arriving

    with under_nccl_rules() as seen:
        before, after = run_threads(2, both, act, ("one",))[1]
    assert before.isnan().all()
    assert torch.equal(after, torch.ones(2))
    assert seen.stalls == ["one: receive on 1 from 0"]


def test_the_double_notices_a_tensor_that_is_written_to_while_it_is_sent() -> None:
    def act(rank: int, groups: Any) -> None:
        if rank == 1:
            groups[0].recv([torch.empty(1)], 0, 0).wait()  # the pair has met
            time.sleep(0.3)
            groups[0].recv([torch.empty(1)], 0, 0).wait()
            return
        groups[0].send([torch.ones(1)], 1, 0).wait()
        tensors = [torch.ones(1), torch.ones(1)]
        works = [groups[0].send([tensor], 1, 0) for tensor in tensors[:1]]
        tensors[0].add_(1)
        for work in works:
            work.wait()

    with under_nccl_rules() as seen:
        run_threads(2, both, act, ("one",))
    assert len(seen.written) <= 1  # the line may have read it before


# -- communicators ------------------------------------------------------------------------------------


def test_communicators_are_those_a_layout_needs() -> None:
    def mesh(rank: int = 0, **layout: int) -> Mesh:
        return Mesh(ParallelConfig(**layout).mesh_shape, rank)

    assert stage_links(mesh(pipefusion=3)) == [Link(0, 1), Link(1, 2)]
    assert answer_links(mesh(pipefusion=3)) == [Link(2, 0)]
    assert answer_links(mesh(cfg=2)) == [Link(0, 1), Link(1, 0)]
    assert answer_links(mesh(tensor=2)) == [Link(0, 1)], "rank 1 makes the same, but holds the latent too"
    assert key_links(mesh(pipefusion=3), [1]) == [Link(1, 2), Link(2, 1)]
    assert count(mesh(1, pipefusion=3)) == {"streams": 2}
    assert count(mesh(0, pipefusion=2, ulysses=2)) == {"streams": 1, "predictions": 2, "ulysses": 1}
    assert count(mesh()) == {}


def contacts_of(place: Place, layout: dict[str, Any]) -> None:
    config = ParallelConfig(**layout)
    patchpipe.restore(patchpipe.parallelize(tiny.pipeline("pixart"), config, group=place.join(config)))


@pytest.mark.parametrize("layout", [{"pipefusion": 3}, {"cfg": 2, "pipefusion": 2}, {"ring": 2, "ulysses": 2}], ids=str)
def test_explain_counts_the_communicators_that_are_made(layout: dict[str, int]) -> None:
    config = ParallelConfig(**layout, share_blocks=False)
    with under_nccl_rules() as seen:
        run_threads(config.world_size, contacts_of, {**layout, "share_blocks": False})
    expected = sum(sum(count(Mesh(config.mesh_shape, rank)).values()) for rank in range(config.world_size))
    assert len(seen.contacts) == expected
    assert "communicators over NCCL, all made at start-up, on a rank: at most" in str(config)


# -- shared blocks, halves, flights -------------------------------------------------------------------

MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "shared blocks": ("flux", {"pipefusion": 3, "patches": 4, "share_blocks": True}),
    "halves": ("pixart", {"pipefusion": 3, "patches": 3, "split_batch": True}),
    "masked text": ("qwen-padded", {"pipefusion": 2, "patches": 3}),
    "masked text, shared": ("qwen-padded", {"ulysses": 2, "ring": 2}),
    "displaced": ("sd3", {"distrifusion": 3}),
    "displaced, two calls": ("flux", {"distrifusion": 2, "cfg": 2}),
}


def paint(place: Place, name: str, layout: dict[str, Any], calls: int = 1) -> list[np.ndarray | None]:
    config, pipe = ParallelConfig(**layout), tiny.pipeline(name)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    outputs = [parity.call_pipeline(pipe, tiny.call_arguments(name, height=112 + 16 * call)) for call in range(calls)]
    patchpipe.restore(pipe)
    return [None if output is None else output.images.numpy() for output in outputs]


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("title", MORE)
def test_what_gloo_paints_is_painted_under_the_rules(title: str) -> None:
    name, layout = MORE[title]
    size = ParallelConfig(**layout).world_size
    made = []
    for transport in ("gloo", "nccl"):
        with over(transport):
            made.append(run_threads(size, paint, name, layout, 2)[0])
    for over_gloo, under_rules in zip(*made, strict=True):
        assert np.array_equal(over_gloo, under_rules)


def together(place: Place) -> list[np.ndarray] | None:
    config = ParallelConfig(pipefusion=2, patches=3)
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
    calls = [
        {**tiny.call_arguments("flux", height=height), "generator": torch.Generator().manual_seed(height)}
        for height in (112, 64, 96)
    ]
    outputs = pipe.patchpipe.together([{**call, "output_type": "latent"} for call in calls])
    patchpipe.restore(pipe)
    return None if place.rank else [output.images.numpy() for output in outputs]


def test_requests_in_flight_together_keep_the_rules() -> None:
    made = []
    for transport in ("gloo", "nccl"):
        with over(transport):
            made.append(run_threads(2, together)[0])
    assert all(np.array_equal(*pair) for pair in zip(*made, strict=True))


# -- the steady state ---------------------------------------------------------------------------------

WAITS = {"item", "tolist", "cpu", "numpy", "nonzero", "equal", "__bool__", "__int__", "__float__", "__index__"}


class HostReads(TorchFunctionMode):
    """Counts what would make the host wait for a GPU, by the innermost file of the package it comes from."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.on = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if self.on and (name in WAITS or (name == "to" and "cpu" in args)) and not _is_plain_number(args):
            frames = [frame for frame in extract_stack() if "/patchpipe/" in frame.filename]
            deepest = extract_stack()[-2].filename
            if frames and "/diffusers/" not in deepest:
                self.found[f"{name} in {frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}"] += 1
        return func(*args, **(kwargs or {}))


def _is_plain_number(args: Any) -> bool:
    return not (args and isinstance(args[0], Tensor))


def reads(place: Place, name: str, layout: dict[str, Any]) -> Counter[str]:
    config, pipe, counter = ParallelConfig(**layout), tiny.pipeline(name), HostReads()
    patchpipe.parallelize(pipe, config, group=place.join(config))
    forward, calls = pipe.transformer.forward, Counter[str]()
    arguments = tiny.call_arguments(name, height=112, steps=6)
    per_step = 2 if name == "flux" else 1

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls["all"] += 1
        counter.on = 2 * per_step < calls["all"] <= 5 * per_step  # of six steps the third to the fifth
        return forward(*args, **kwargs)

    pipe.transformer.forward = counted
    with counter:
        parity.call_pipeline(pipe, arguments)
    assert calls["all"] == 6 * per_step
    return counter.found


@pytest.mark.some(of=2)
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("flux", {"pipefusion": 2, "patches": 3}),
        ("flux", {"pipefusion": 2, "patches": 3, "forecast": True}),
        ("pixart", {"pipefusion": 2, "patches": 3}),
        ("pixart", {"cfg": 2, "ulysses": 2}),
        ("flux", {"ring": 2}),
        ("sd3", {"tensor": 2}),
        ("sd3", {"distrifusion": 2}),
    ],
    ids=str,
)
def test_the_host_reads_nothing_from_the_device_in_the_steady_state(name: str, layout: dict[str, Any]) -> None:
    with over("nccl"):
        found = run_threads(ParallelConfig(**layout).world_size, reads, name, layout)
    assert not any(found), found


def test_a_read_by_the_host_would_be_found() -> None:
    counter = HostReads()
    counter.on = True
    frames = [mock.Mock(filename="/patchpipe/x.py")] * 2
    with (
        counter,
        mock.patch("tests.distributed.test_nccl_rules.extract_stack", return_value=frames),
    ):
        torch.ones(()).item()
        torch.equal(torch.ones(1), torch.ones(1))
    assert sum(counter.found.values()) == 2


# -- trouble ------------------------------------------------------------------------------------------

SECONDS = 15  # any trouble is told by then


def afflicted(place: Place, affliction: str, timeout: float) -> tuple[str, float]:
    """What a rank says of trouble on rank 1, and how long after it began."""
    config = ParallelConfig(pipefusion=3, patches=4, timeout=timeout)
    with under_nccl_rules():
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        stage_run, calls = pipe.patchpipe.runner.stages[0].run, Counter[str]()

        def run(*args: Any) -> Any:
            calls["patches"] += 1
            if place.rank == 1 and calls["patches"] == 12:
                _suffer(affliction)
            return stage_run(*args)

        pipe.patchpipe.runner.stages[0].run = run
        began = time.monotonic()
        try:
            parity.call_pipeline(pipe, tiny.call_arguments("flux", height=112, steps=8))
        except (PatchpipeError, ValueError) as error:
            return f"{type(error).__name__}: {error}", time.monotonic() - began
    return "nothing", time.monotonic() - began


def _suffer(affliction: str) -> None:
    if affliction == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if affliction == "fails":
        raise ValueError("the block is on fire")
    threading.Event().wait(60)


@pytest.mark.some(of=3)
@pytest.mark.parametrize(
    ("affliction", "text"),
    [
        ("dies", "RankLost: rank 1 closed its connection: its process has died or was killed"),
        ("fails", "rank 1 failed first: ValueError: the block is on fire"),
        ("is silent", "RankLost: rank 1 did not answer within 3 s"),
    ],
)
def test_law_7_trouble_is_told_within_seconds_where_no_wait_can_tell(affliction: str, text: str) -> None:
    timeout = 3.0 if affliction == "is silent" else 60.0
    mortal = [1] if affliction in ("dies", "is silent") else []
    target, arguments = afflicted, (affliction, timeout)
    found = run_ranks(3, _only_the_living if affliction == "is silent" else target, *arguments, mortal=mortal)
    for rank in (0, 2):
        said, seconds = found[rank]
        assert text in said, (rank, said)
        assert seconds < SECONDS, (rank, said)


def _only_the_living(place: Place, affliction: str, timeout: float) -> tuple[str, float]:
    if place.rank == 1:
        threading.Timer(12, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return afflicted(place, affliction, timeout)
