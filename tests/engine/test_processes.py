"""Workers are forked from a process that has loaded the libraries, or are fresh interpreters; nobody can tell which."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from patchpipe import Engine, ParallelConfig
from patchpipe.engine.processes import Workers, describe_exit, forkserver, warm
from patchpipe.engine.processes.forkserver import ForkServer
from patchpipe.engine.processes.fresh import environment
from tests import tiny

pytestmark = pytest.mark.skipif(not forkserver.SUPPORTED, reason="workers are fresh interpreters here")

TWO = ParallelConfig(pipefusion=2, patches=2, timeout=60)
CALL = tiny.call_arguments("flux", steps=2)


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def parents(workers: Workers) -> set[int]:
    return {psutil.Process(worker.pid).ppid() for worker in workers.members}


@pytest.mark.extra
def test_forked_and_fresh_workers_paint_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.save("flux", tmp_path)
    pictures, owners = [], []
    for supported in (True, False):
        monkeypatch.setattr(forkserver, "SUPPORTED", supported)
        with Engine(model, TWO, devices="cpu", threads=1) as engine:
            pictures.append(engine(seed=1, **CALL)[0].tobytes())
            owners.append(psutil.Process(engine.ranks[0].pid).ppid() == os.getpid())
    assert owners == [False, True]
    assert pictures[0] == pictures[1]


def test_engines_share_a_server_that_ends_with_the_last_unless_it_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "_SERVERS", forkserver._Servers())  # of this test's own
    first = Workers(2, threads=1)
    second = Workers(1, threads=1)  # which alone would be a fresh interpreter
    other = Workers(1, threads=2)  # another environment
    try:
        [server] = parents(first)
        assert parents(second) == {server}
        assert parents(other) == {os.getpid()}
        first.shutdown(grace=0)
        with warm():
            second.shutdown(grace=0)
            assert psutil.pid_exists(server)
            third = Workers(1, threads=1)
            assert parents(third) == {server}
        _without_its_server_a_worker_goes_on_and_new_ones_are_fresh(third, server)
    finally:
        for workers in (first, second, other):
            workers.shutdown(grace=0)
    assert not psutil.pid_exists(server)


def _without_its_server_a_worker_goes_on_and_new_ones_are_fresh(workers: Workers, server: int) -> None:
    os.kill(server, signal.SIGKILL)
    assert within(5, lambda: server not in parents(workers))
    fresh = Workers(1, threads=1)
    [worker] = workers.members
    assert parents(fresh) == {os.getpid()}
    assert worker.alive
    fresh.shutdown(grace=0)
    workers.shutdown()
    assert describe_exit(worker.exit_code()) == "closed its connection"  # nobody knows more


def test_the_end_of_a_forked_worker_is_told() -> None:
    workers = Workers(2, threads=1)
    try:
        first, second = workers.members
        assert (first.alive, first.exit_code(wait=0)) == (True, None)
        os.kill(first.pid, signal.SIGKILL)
        assert within(5, lambda: not first.alive)
        assert describe_exit(first.exit_code()) == "was killed by SIGKILL"
        first.signal(signal.SIGTERM)  # comes to nothing
        assert not psutil.pid_exists(first.pid)
        assert os.getsid(second.pid) == second.pid  # a Ctrl-C in the terminal does not reach it
    finally:
        workers.shutdown()
    assert second.exit_code() == 0


def test_a_server_ends_with_its_parent() -> None:
    server = ForkServer(environment(1, offline=False))
    server._control.close()  # which is what the end of this process would do
    assert server._process.wait(60) == 0  # once it has loaded
