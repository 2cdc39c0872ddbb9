"""Makes sure that every rank was started alike, before anything that could hang is begun."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from patchpipe.errors import RankFailed, RankLost

T = TypeVar("T")


def agree(
    store: dist.Store,
    topic: str,
    rank: int,
    world_size: int,
    what: dict[str, Any],
    timeout: float,
    problem: Exception | None = None,
) -> None:
    """Checks that every rank was started with the same ``what``, and that none has found a reason not to go on.

    Args:
        store: Where the ranks meet.
        topic: Names the matter; every rank uses it once.
        rank: This rank.
        world_size: Number of ranks.
        what: Plain data, possibly nested. What only some ranks could find out is compared among those alone.
        timeout: Seconds to wait for each rank.
        problem: Why this rank cannot go on, if it cannot: it would leave the others waiting. Ranks that were started
            alike have the same one.

    Raises:
        ValueError: Two ranks differ; every rank raises the same text.
        Exception: This rank's problem.
        RankFailed: Another rank has one that this one has not.
        RankLost: A rank did not show up in time.
    """
    trouble = f"{type(problem).__name__}: {problem}" if problem else None
    told = gather(store, topic, rank, world_size, [what, trouble], timeout)
    for other, (theirs, _) in enumerate(told):
        known = {key: value for key, value in told[0][0].items() if key in theirs}
        difference = first_difference(known, {key: theirs[key] for key in known})
        if difference:
            name, ours, their = difference
            raise ValueError(
                f"the ranks were started differently: {name} is {ours!r} on rank 0 but {their!r} on rank {other}; "
                f"start every rank with the same configuration and model"
            )
    if problem is not None:
        raise problem
    for other, (_, text) in enumerate(told):
        if text:
            raise RankFailed(f"rank {other} failed first: {text}")


def attempt(compute: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What a function returns, or what it raises, for the other ranks to hear of."""
    try:
        return compute(), None
    except Exception as error:
        return None, error


def gather(store: dist.Store, topic: str, rank: int, world_size: int, what: Any, timeout: float) -> list[Any]:
    """What every rank tells of a topic, by rank; see ``agree``."""
    store.set(f"{topic}/{rank}", json.dumps(what, sort_keys=True, default=str))
    return [json.loads(read(store, f"{topic}/{other}", other, timeout)) for other in range(world_size)]


def first_difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first field in which two pieces of plain data differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            found = first_difference(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if ours == theirs else (name, ours, theirs)


def read(store: dist.Store, key: str, rank: int, timeout: float) -> bytes:
    """What a rank has told under a key.

    Raises:
        RankLost: It has not, within ``timeout`` seconds.
    """
    try:
        store.wait([key], timedelta(seconds=timeout))
        return store.get(key)
    except RuntimeError as error:
        raise RankLost(
            f"rank {rank} did not join within {timeout:g} s: was it started, and with the same layout?"
        ) from error
