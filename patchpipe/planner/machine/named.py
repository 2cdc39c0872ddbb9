"""From names to a machine: a card and a link, a profile, or what is at hand."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import torch

from patchpipe.planner.machine.cards import card_named, device_named
from patchpipe.planner.machine.here import cpu_ranks, profile_of
from patchpipe.planner.machine.links import link_named
from patchpipe.planner.machine.profiles import Profile

NAMED = 2  # devices of a card that is named, and their number not


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


def machine_and_count(
    device: str | None, link: str | None, profile: Profile | str | Path | None, count: int | None
) -> tuple[Profile, int]:
    """The machine that names describe, or the one at hand, and how many of its devices.

    Raises:
        ValueError: A name is unknown.
        FileNotFoundError: There is no such profile.
    """
    if device is None and profile is None and link is None:
        here, cores = _devices_here(), os.cpu_count() or 1
        ranks = len(here) if count is None else count
        devices = [here[rank % len(here)] for rank in range(max(1, ranks))] if count is not None else here
        return profile_of(devices, cores), ranks
    usual = card_named(device).link if device and not (link or profile) else link
    machine = read_machine(device, usual, profile)
    if count is not None:
        return machine, count
    return machine, NAMED if profile is None else max(NAMED, len(_devices_here()))


def _devices_here() -> list[str]:
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return [f"cuda:{index}" for index in range(cards)] or ["cpu"] * cpu_ranks(os.cpu_count() or 1)
