"""Process groups: few threads, and errors that say what went wrong."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from patchpipe import ParallelConfig
from patchpipe.distributed.process_groups import ProcessGroups
from tests.support.ranks import Place, run_ranks

LOOP = "gloo_tcp_loop"


def _threads() -> int:
    """Threads of gloo's that look again and again whether a socket has something."""
    return sum(LOOP in task.read_text() for task in Path("/proc/self/task").glob("*/comm"))


def _join_and_close(place: Place) -> tuple[int, int]:
    config = ParallelConfig(pipefusion=2, ulysses=2, timeout=30)
    group = place.join(config)
    group.control_wire()
    group.rows()
    joined = _threads()
    place.store.set(f"joined/{place.rank}", "yes")
    place.store.wait([f"joined/{rank}" for rank in range(place.world_size)])
    group.close()
    deadline = time.monotonic() + 5
    while _threads() and time.monotonic() < deadline:  # a thread that has ended is listed a moment longer
        time.sleep(0.01)
    return joined, _threads()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's list of threads")
def test_all_groups_of_a_rank_share_one_thread_and_it_ends_with_them() -> None:
    assert run_ranks(4, _join_and_close) == [(1, 0)] * 4


def test_an_interface_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(ValueError, match="GLOO_SOCKET_IFNAME=nosuch0 names no interface"):
        ProcessGroups(dist.HashStore(), 5).make("alone", "gloo", 0, 1)


def test_interfaces_that_the_environment_names_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    group = ProcessGroups(dist.HashStore(), 5).make("alone", "gloo", 0, 1)
    total = torch.ones(2)
    group.allreduce([total]).wait()
    assert total.tolist() == [1.0, 1.0]
