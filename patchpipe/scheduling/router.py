"""Which of many groups of devices a request goes to: the one with the least work before it."""

from __future__ import annotations

import heapq


class Router:
    """The loads of groups of devices, kept so that the least is found at once among thousands.

    A fleet is cut into groups, a node or a replica each, and each has decisions of its own. So what a decision takes
    depends on one group's requests, not on the fleet's size. The router is told each group's load when it changes, and
    finds the least in time that grows with the logarithm of their number. It remembers what it was told, and no more.
    """

    def __init__(self) -> None:
        self._loads: dict[int, float] = {}
        self._heap: list[tuple[float, int]] = []

    def __len__(self) -> int:
        return len(self._loads)

    def update(self, group: int, load: float) -> None:
        """Tells the load of a group, new or known.

        Args:
            group: Its number.
            load: Seconds of work it has, such as the device seconds of its requests over its devices.
        """
        if self._loads.get(group) == load:
            return
        self._loads[group] = load
        heapq.heappush(self._heap, (load, group))
        if len(self._heap) > 2 * len(self._loads) + 64:
            self._heap = [(load, group) for group, load in self._loads.items()]
            heapq.heapify(self._heap)

    def remove(self, group: int) -> None:
        """A group is gone, or takes no more requests.

        Raises:
            ValueError: It isn't known.
        """
        if group not in self._loads:
            raise ValueError(f"there is no group {group}")
        del self._loads[group]

    def choose(self) -> int:
        """The group with the least load; of equal ones the lowest number.

        Raises:
            ValueError: There are no groups.
        """
        while self._heap:
            load, group = self._heap[0]
            if self._loads.get(group) == load:
                return group
            heapq.heappop(self._heap)
        raise ValueError("there is no group of devices to send a request to")
