"""Runs a function on the ranks of one group, which are threads of this process: a layout so costs about a second.

They talk over gloo as processes do. What only processes show (deaths, sockets, memory, launchers) is tested with
``tests.ranks``.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from tests.ranks import Place, quieten

FIRST_CAUSE_SECONDS = 15  # for the others to end, once one has failed


def run_threads(world_size: int, target: Callable[..., Any], *args: Any, timeout: float = 270) -> list[Any]:
    """Calls ``target(place, *args)`` on every rank and returns what each returned.

    Args:
        world_size: Number of ranks.
        target: Any function; what it closes over is shared by all ranks.
        args: Its further arguments, also shared: give each rank its own pipeline.
        timeout: Seconds the whole may take.

    Raises:
        AssertionError: A rank raised or was late; the text shows every rank's traceback.
    """
    quieten()
    store = dist.HashStore()
    places = [Place(rank, world_size, store if world_size > 1 else None) for rank in range(world_size)]
    results: dict[int, Any] = {}
    problems: dict[int, str] = {}

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = target(places[rank], *args)
        except BaseException:
            problems[rank] = traceback.format_exc()

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(world_size)
    ]
    for thread in threads:
        thread.start()
    try:
        _wait(threads, problems, time.monotonic() + timeout)
    finally:  # also where a test runs out of time: what its ranks still do would disturb the next one
        _leave(places)
    if len(results) == world_size:
        return [results[rank] for rank in range(world_size)]
    told = {rank: problems.get(rank, "no answer before the deadline") for rank in range(world_size)}
    raise AssertionError(
        "\n".join(f"--- rank {rank} ---\n{'finished' if rank in results else text}" for rank, text in told.items())
    )


def _leave(places: list[Place]) -> None:
    """All at once: each waits for the next one's word."""
    threads = [threading.Thread(target=place.leave, name="leaving", daemon=True) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(FIRST_CAUSE_SECONDS)


def _wait(threads: list[threading.Thread], problems: dict[int, str], deadline: float) -> None:
    """Until all have ended, or the deadline, which comes sooner once a rank has failed."""
    shortened = False
    while any(thread.is_alive() for thread in threads) and time.monotonic() < deadline:
        next(thread for thread in threads if thread.is_alive()).join(0.05)
        if problems and not shortened:
            deadline, shortened = min(deadline, time.monotonic() + FIRST_CAUSE_SECONDS), True
