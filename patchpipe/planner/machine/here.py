"""The machine at hand as the planner sees it, without a measurement: the same on every start, and known at once."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Sequence

import torch

from patchpipe.planner.machine.cards import CARDS, Card, card_found
from patchpipe.planner.machine.devices import GB, Device
from patchpipe.planner.machine.links import Link, link_named
from patchpipe.planner.machine.profiles import Profile

# A core of a current x86 server in float32, and two processes of one host over gloo: what `patchpipe profile` measures
# on them. A layout follows from nominal figures, never from a clock: the same call must paint the same picture.
CORE_RATE, CORE_BANDWIDTH, CORE_FILL, CORE_LAUNCH = 50 * GB, 11 * GB, 11_000, 7.5e-6
SCALING = 0.7  # threads to this power: what several of them make of a model's many small operations
LOOPBACK, LOOPBACK_LATENCY = 1.7 * GB, 120e-6
MOST_CPU_RANKS = 8  # each is a process with its own copy of the libraries
BETWEEN_HOSTS = 11.6 * GB  # bytes a second: 100 Gbit/s


def cpu_ranks(cores: int) -> int:
    """How many ranks so many cores may serve: a power of two."""
    return min(MOST_CPU_RANKS, 1 << max(0, cores.bit_length() - 1))


def profile_of(devices: Sequence[str], cores: int, hosts: int = 1) -> Profile:
    """A nominal profile of ranks on these devices.

    Args:
        devices: The device of every rank on this host, such as ``cuda:0``.
        cores: Cores of this host, which ranks on the CPU share.
        hosts: Hosts with as many ranks as this one.
    """
    if any(name.startswith("cpu") for name in devices):
        found = Profile(_cores(max(1, cores // len(devices)), len(devices)), _loopback(len(devices)), "fp32")
    else:
        cards = [_card(torch.device(name)) for name in dict.fromkeys(devices)]
        slowest = min(cards, key=lambda card: card.device.rate)
        memory = min(card.device.memory for card in cards) * len(set(devices)) // len(devices)
        device = dataclasses.replace(slowest.device, memory=memory)
        found = Profile(device, link_named(slowest.link), "bf16")
    if hosts == 1:
        return found
    link = dataclasses.replace(found.link, island=len(devices), trunk=min(found.link.trunk, BETWEEN_HOSTS))
    return dataclasses.replace(found, link=link)


def _cores(threads: int, ranks: int) -> Device:
    gain = threads**SCALING
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    name = f"{platform.machine()} CPU, {threads} core{'s' if threads > 1 else ''}"
    figures = CORE_RATE * gain, 1.0, memory, CORE_BANDWIDTH * gain, CORE_FILL * gain, CORE_LAUNCH
    source = "nominal: a core of a current server; measure yours with `patchpipe profile`"
    return Device(name, *figures, source, upload=CORE_BANDWIDTH / 2)  # every byte is read and written


def _loopback(ranks: int) -> Link:
    figures = LOOPBACK, LOOPBACK_LATENCY, ranks, LOOPBACK, 0.0, 1.0
    return Link("this host", *figures, "nominal: gloo between processes of one host")


def _card(place: torch.device) -> Card:
    """The card at hand; one that is unknown is taken for an RTX 4090 of its size."""
    properties = torch.cuda.get_device_properties(place)
    known = card_found(properties.name)
    if known is None:
        alike = next(card for card in CARDS if card.device.name == "rtx4090")
        share = properties.multi_processor_count / 128
        device = dataclasses.replace(
            alike.device, flops=alike.device.flops * share, bandwidth=alike.device.bandwidth * share
        )
        known = dataclasses.replace(alike, device=device)
    device = dataclasses.replace(known.device, name=properties.name, memory=int(properties.total_memory))
    return dataclasses.replace(known, device=device)
