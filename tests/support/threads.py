"""Runs a function on the ranks of one group, which are threads of this process: a layout so costs about a second.

They talk over gloo as processes do. What only processes show (deaths, sockets, memory, launchers) is tested with
``tests.ranks``.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from patchpipe.checking.threads import at_once, stay_on_a_core, wait_for
from tests.support.ranks import Place, quieten

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
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))

    def run(rank: int) -> None:
        stay_on_a_core(worker)
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
        wait_for(threads, problems, time.monotonic() + timeout, FIRST_CAUSE_SECONDS)
    finally:  # also where a test runs out of time: what its ranks still do would disturb the next one
        at_once([place.leave for place in places], FIRST_CAUSE_SECONDS)
    if len(results) == world_size:
        return [results[rank] for rank in range(world_size)]
    told = {rank: problems.get(rank, "no answer before the deadline") for rank in range(world_size)}
    raise AssertionError(
        "\n".join(f"--- rank {rank} ---\n{'finished' if rank in results else text}" for rank, text in told.items())
    )
