"""From names to a machine and a winner: what the command line and ``ParallelConfig.auto`` share."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.planner.cards import device_named
from patchpipe.planner.links import link_named
from patchpipe.planner.profiles import Profile
from patchpipe.planner.search import Wishes, search
from patchpipe.planner.workloads import Asked, workload_for


def read_machine(device: str | None, link: str | None, profile: Profile | str | Path | None) -> Profile:
    """The machine that names describe; a device or link that is named takes the place of the profile's.

    Raises:
        ValueError: They describe none, or a name is unknown.
        FileNotFoundError: There is no such profile.
    """
    card = device_named(device) if device else None
    joined = link_named(link) if link else None
    if profile is not None:
        found = profile if isinstance(profile, Profile) else Profile.load(profile)
        return dataclasses.replace(found, device=card or found.device, link=joined or found.link)
    if card is None or joined is None:
        raise ValueError(
            f"the {'device' if card is None else 'link'} is missing: name a card and a link, such as l40 and pcie4, or "
            f"a profile of this machine, which `patchpipe profile` writes"
        )
    return Profile(card, joined)


def best_config(
    model: str | Path,
    devices: int,
    device: str | None,
    link: str | None,
    profile: Profile | str | Path | None,
    wishes: dict[str, Any],
    asked: dict[str, Any],
) -> ParallelConfig:
    """See ``ParallelConfig.auto``."""
    machine = read_machine(device, link, profile)
    return search(workload_for(model, Asked(**asked)), devices, machine, Wishes(**wishes)).best.config
