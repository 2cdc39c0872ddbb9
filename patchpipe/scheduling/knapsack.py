"""The group knapsack: one option for each request, so that all fit the devices and are worth the most."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Option(NamedTuple):
    """One way to treat a request.

    Attributes:
        devices: Devices it takes; 0 is to pause.
        value: What it is worth.
    """

    devices: int
    value: float


class Packing:
    """The best choice for every number of devices up to a capacity.

    Dynamic programming over the requests: for each, and each number of devices, the best option given the best of the
    requests before it. It takes capacity × all options steps.

    Args:
        groups: The options of each request; the first of equally good ones wins.
        capacity: The devices there are.

    Raises:
        ValueError: A request has no option of 0 devices, so that nothing might fit.
    """

    def __init__(self, groups: Sequence[Sequence[Option]], capacity: int) -> None:
        if any(all(option.devices for option in options) for options in groups):
            raise ValueError("every request needs an option that takes no devices")
        self._groups = groups
        self._choices: list[list[int]] = []
        best = [0.0] * (capacity + 1)
        for options in groups:
            best = self._add(best, options)
        self.values = best

    def _add(self, before: list[float], options: Sequence[Option]) -> list[float]:
        after, choices = [], []
        for room in range(len(before)):
            value, choice = float("-inf"), -1
            for index, (devices, worth) in enumerate(options):
                if devices <= room and before[room - devices] + worth > value:
                    value, choice = before[room - devices] + worth, index
            after.append(value)
            choices.append(choice)
        self._choices.append(choices)
        return after

    def chosen(self, capacity: int) -> list[Option]:
        """The option of each request, in their order, when there are so many devices."""
        found: list[Option] = []
        for options, choices in zip(reversed(self._groups), reversed(self._choices), strict=True):
            option = options[choices[capacity]]
            found.append(option)
            capacity -= option.devices
        return found[::-1]
