"""Ranks as processes that serve one task after the other, and are started anew where one of them died."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist

from patchpipe import ParallelConfig
from patchpipe.distributed.joining import join
from patchpipe.distributed.mesh import Group
from tests.support.ranks import PRELOAD, Place, _die_with_parent, quieten

GRACE_SECONDS = 20.0  # for the others to end, once one has failed


@dataclass
class Spot(Place):
    """Where a rank stands, and where it computes."""

    device: str = "cpu"

    def join(self, config: ParallelConfig) -> Group:
        """A group of all the ranks."""
        return join(config, rank=self.rank, world_size=self.world_size, store=self.store, device=self.device)


@dataclass(frozen=True)
class Answer:
    """What became of a task on one rank.

    Attributes:
        value: What it returned, if it did.
        problem: Why it did not: a traceback, or that the process died or was late.
        seconds: Until it was known.
    """

    value: Any = None
    problem: str = ""
    seconds: float = 0.0


class Ranks:
    """Processes for the ranks of one group after the other; ``with`` ends them.

    Args:
        places: The device of each rank.
    """

    def __init__(self, places: Sequence[str]) -> None:
        self.places = list(places)
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._server: Any = None

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pids(self) -> list[int]:
        """Of the processes there are."""
        return [process.pid for process in self._processes]

    def run(self, target: Callable[..., Any], *args: Any, patience: float = 60.0) -> list[Answer]:
        """Calls ``target(spot, *args)``, a function of a module, on every rank.

        Args:
            target: The function.
            args: Its further arguments.
            patience: Seconds it may take; ranks that are late are ended.

        Returns:
            An answer of every rank.
        """
        if not self._processes:
            self._start()
        began = time.monotonic()
        for pipe in self._pipes:
            pipe.send((target.__module__, target.__qualname__, args))
        answers: dict[int, Answer] = {}
        limit = began + patience
        while len(answers) < len(self._pipes):
            waiting = [pipe for rank, pipe in enumerate(self._pipes) if rank not in answers]
            ready = wait(waiting, max(0.0, limit - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                answers[rank] = _answer(pipe, time.monotonic() - began)
                if answers[rank].problem:
                    limit = min(limit, time.monotonic() + GRACE_SECONDS)
        late = Answer(problem="no answer in time", seconds=time.monotonic() - began)
        found = [answers.get(rank, late) for rank in range(len(self._pipes))]
        if any(answer.problem for answer in found):
            self.end()
        return found

    def end(self) -> None:
        """Ends the processes, at once."""
        processes, self._processes = self._processes, []
        for process in processes:
            process.kill()
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._pipes, self._server = [], None

    def _start(self) -> None:
        # A CUDA process must not be forked from one that has asked for the devices; on the CPU a fork is quicker.
        context = multiprocessing.get_context("forkserver" if self.places[0] == "cpu" else "spawn")
        if self.places[0] == "cpu":
            context.set_forkserver_preload(PRELOAD)
        self._server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank, device in enumerate(self.places):
            ours, theirs = context.Pipe()
            args = (theirs, rank, len(self.places), self._server.port, device)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)


def _answer(pipe: Any, seconds: float) -> Answer:
    try:
        fine, value = pipe.recv()
    except (EOFError, ConnectionError):
        return Answer(problem="the process died", seconds=seconds)
    return Answer(value=value, seconds=seconds) if fine else Answer(problem=value, seconds=seconds)


def _serve(pipe: Connection, rank: int, ranks: int, port: int, device: str) -> None:
    _die_with_parent()
    quieten()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    spot = Spot(rank, ranks, store, device)
    while True:
        try:
            module, name, args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            pipe.send((True, getattr(importlib.import_module(module), name)(spot, *args)))
        except BaseException:
            pipe.send((False, traceback.format_exc()))


def problems(answers: Sequence[Answer]) -> str:
    """What went wrong on which rank, in a line each; empty where nothing did."""
    told = [(rank, answer.problem.strip().splitlines()) for rank, answer in enumerate(answers) if answer.problem]
    return "; ".join(f"rank {rank}: {lines[-1][:300]}" for rank, lines in told)
