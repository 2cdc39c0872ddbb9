"""Ranks as threads of this process: a model so small needs no others."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from patchpipe.config import ParallelConfig
from patchpipe.distributed.joining import join
from patchpipe.distributed.mesh import Group
from patchpipe.errors import PatchpipeError

SECONDS_FOR_THE_OTHERS = 10  # once one has failed


def on_ranks(config: ParallelConfig, target: Callable[[Group, int], Any], seconds: float) -> list[Any]:
    """Calls ``target(group, rank)`` on every rank of a layout.

    Args:
        config: The layout.
        target: What each rank does.
        seconds: How long the whole may take.

    Returns:
        What each rank returned.

    Raises:
        Exception: What a rank raised, the first cause of several.
        TimeoutError: A rank was late.
    """
    ranks, store = config.world_size, dist.HashStore()
    results: dict[int, Any] = {}
    problems: dict[int, BaseException] = {}
    groups: list[Group] = []

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            met = store if ranks > 1 else None
            group = join(config, rank=rank, world_size=ranks, store=met, device="cpu")
            groups.append(group)
            results[rank] = target(group, rank)
        except BaseException as error:
            problems[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    _wait(threads, problems, time.monotonic() + seconds)
    _close(groups)
    if problems:
        raise min(problems.values(), key=lambda error: isinstance(error, PatchpipeError))
    if len(results) < ranks:
        raise TimeoutError(f"no answer of all {ranks} ranks in {seconds:.0f} s")
    return [results[rank] for rank in range(ranks)]


def _wait(threads: list[threading.Thread], problems: dict[int, BaseException], deadline: float) -> None:
    """Until all have ended, or the deadline, which comes sooner once a rank has failed."""
    shortened = False
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        next(thread for thread in threads if thread.is_alive()).join(0.02)
        if problems and not shortened:
            deadline, shortened = min(deadline, time.monotonic() + SECONDS_FOR_THE_OTHERS), True


def _close(groups: list[Group]) -> None:
    """All at once: each waits for the next one's word."""
    threads = [threading.Thread(target=group.close, name="leaving", daemon=True) for group in groups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SECONDS_FOR_THE_OTHERS)
