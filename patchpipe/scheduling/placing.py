"""From degrees to devices: what runs stays where it is, and what moves goes where devices are free soonest."""

from __future__ import annotations

from collections.abc import Sequence

from patchpipe.scheduling.policies.view import Wish
from patchpipe.scheduling.state import Run, State


def place(wishes: Sequence[Wish], state: State) -> tuple[Run, ...]:
    """Gives each wish its devices.

    A batch that goes on at its degree keeps its devices, and one that changes degree as many of them as it can.
    Others get devices side by side from a multiple of the degree where such are free equally soon: then few groups
    of devices are ever used, and a group costs memory.

    Args:
        wishes: What should run, on no more devices than are not held by jobs that are ending.
        state: Where everything runs now.
    """
    placer = _Placer(state)
    placed: dict[int, tuple[int, ...]] = {}
    for rank, wish in enumerate(wishes):
        devices = placer.unchanged(wish)
        if devices is not None:
            placed[rank] = devices
    moved = sorted(
        (rank for rank in range(len(wishes)) if rank not in placed), key=lambda rank: not _runs(wishes[rank])
    )
    for rank in moved:
        placed[rank] = placer.take(wishes[rank])
    return tuple(Run(tuple(job.id for job in wishes[rank].jobs), placed[rank]) for rank in range(len(wishes)))


def _runs(wish: Wish) -> bool:
    return wish.jobs[0].degree > 0


class _Placer:
    def __init__(self, state: State) -> None:
        self._now = state.now
        self._free_at = dict.fromkeys(state.devices, state.now)
        self._batches = {devices: frozenset(job.id for job in jobs) for devices, jobs in state.running.items()}
        for devices, jobs in state.running.items():
            for device in devices:
                self._free_at[device] = max(state.now, jobs[0].boundary)
            if jobs[0].ending:
                self._remove(devices)

    def _remove(self, devices: Sequence[int]) -> None:
        for device in devices:
            del self._free_at[device]

    def unchanged(self, wish: Wish) -> tuple[int, ...] | None:
        """The devices of a batch that goes on as it is."""
        devices = wish.jobs[0].devices
        if wish.jobs[0].degree != wish.degree or self._batches[devices] != frozenset(job.id for job in wish.jobs):
            return None
        self._remove(devices)
        return devices

    def take(self, wish: Wish) -> tuple[int, ...]:
        own = [device for device in wish.jobs[0].devices if device in self._free_at]
        if wish.jobs[0].degree > wish.degree <= len(own):
            devices = self._soonest(own, wish.degree)
        else:
            kept = own if wish.jobs[0].degree else []
            rest = [device for device in self._free_at if device not in kept]
            devices = (*kept, *self._soonest(rest, wish.degree - len(kept), own))
        self._remove(devices)
        return tuple(sorted(devices))

    def _soonest(self, devices: list[int], count: int, liked: Sequence[int] = ()) -> tuple[int, ...]:
        """So many devices that are all free the soonest; side by side or where the job was, if that is as soon."""
        ranked = sorted(devices, key=lambda device: (self._free_at[device], device not in liked, device))
        chosen = tuple(ranked[:count])
        if count == 0:
            return ()
        ready = self._free_at[chosen[-1]]
        known = set(devices)
        for first in sorted(device for device in devices if device % count == 0):
            block = range(first, first + count)
            if count > 1 and known.issuperset(block) and max(self._free_at[device] for device in block) <= ready:
                return tuple(block)
        return chosen
