"""Refuses, before any work, a layout that cannot fit a model by its files, and calls that cannot fly together."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from patchpipe.balance import check_stages
from patchpipe.config import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.source import read_index


def check_folder(folder: Path, config: ParallelConfig) -> None:
    """Checks what a pipeline's configuration tells; what it leaves open is checked when the ranks load it.

    Raises:
        UnsupportedModel: The transformer's class has no plan, or not as it is configured.
        ValueError: More stages than blocks, or heads that do not divide.
    """
    _, name = read_index(folder).get("transformer") or (None, None)
    path = folder / "transformer" / "config.json"
    if name is None or not path.is_file():
        return
    plan, settings = plan_for(name), json.loads(path.read_text(encoding="utf-8"))
    plan.check_settings(settings)
    counts = [settings.get(listing.count) for listing in plan.blocks]
    if None not in counts:
        check_stages(config, sum(counts), plan)
    heads = settings.get("num_attention_heads")
    if heads and heads % config.tensor:
        raise ValueError(
            f"tensor={config.tensor} does not divide the {heads} attention heads of {plan.model}: "
            f"use a divisor of {heads}"
        )


def check_calls(
    calls: Sequence[Mapping[str, Any]],
    seeds: Sequence[int] | None = None,
    bars: Sequence[Callable[..., Any]] | None = None,
) -> None:
    """Refuses what cannot be a set of calls in flight together.

    Raises:
        ValueError: There are none, lengths differ, or calls share a generator, whose draws would then mix.
        TypeError: A call is no mapping of arguments.
    """
    if not calls:
        raise ValueError("there are no calls: give one dict of the pipeline's arguments for each")
    for name, entries in (("seeds", seeds), ("bars", bars)):
        if entries is not None and len(entries) != len(calls):
            raise ValueError(f"{len(entries)} {name} for {len(calls)} calls: give one for each")
    owners: dict[int, int] = {}
    for number, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise TypeError(f"call {number + 1} is a {type(call).__name__}: give a dict of the pipeline's arguments")
        given = call.get("generator")
        for generator in given if isinstance(given, (list, tuple)) else [given]:
            if generator is not None and owners.setdefault(id(generator), number) != number:
                raise ValueError(
                    f"calls {owners[id(generator)] + 1} and {number + 1} share a generator: give each its own, or "
                    f"what they draw would mix"
                )
