"""Makes sure that every rank was started alike, before anything that could hang is begun."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from patchpipe.errors import RankLost


def agree(store: dist.Store, topic: str, rank: int, world_size: int, what: dict[str, Any], timeout: float) -> None:
    """Checks that every rank was started with the same ``what``.

    Args:
        store: Where the ranks meet.
        topic: Names the matter; every rank uses it once.
        rank: This rank.
        world_size: Number of ranks.
        what: Plain data, possibly nested.
        timeout: Seconds to wait for each rank.

    Raises:
        ValueError: Two ranks differ; every rank raises the same text.
        RankLost: A rank did not show up in time.
    """
    told = gather(store, topic, rank, world_size, what, timeout)
    for other, theirs in enumerate(told):
        difference = first_difference(told[0], theirs)
        if difference:
            name, ours, their = difference
            raise ValueError(
                f"the ranks were started differently: {name} is {ours!r} on rank 0 but {their!r} on rank {other}; "
                f"start every rank with the same configuration and model"
            )


def gather(store: dist.Store, topic: str, rank: int, world_size: int, what: Any, timeout: float) -> list[Any]:
    """What every rank tells of a topic, by rank; see ``agree``."""
    store.set(f"{topic}/{rank}", json.dumps(what, sort_keys=True, default=str))
    return [_told(store, f"{topic}/{other}", other, timeout) for other in range(world_size)]


def first_difference(ours: Any, theirs: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first field in which two pieces of plain data differ."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key in sorted({*ours, *theirs}):
            found = first_difference(ours.get(key), theirs.get(key), f"{name}.{key}" if name else key)
            if found:
                return found
        return None
    return None if ours == theirs else (name, ours, theirs)


def _told(store: dist.Store, key: str, rank: int, timeout: float) -> Any:
    try:
        store.wait([key], timedelta(seconds=timeout))
        return json.loads(store.get(key))
    except RuntimeError as error:
        raise RankLost(
            f"rank {rank} did not join within {timeout:g} s: was it started, and with the same layout?"
        ) from error
