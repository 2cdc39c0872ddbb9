"""Ours: pictures in time, as many clips in time as the devices can carry, and none of the others forgotten."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from patchpipe.scheduling.knapsack import Option, Packing
from patchpipe.scheduling.policies.genserve import best_share, filled
from patchpipe.scheduling.policies.pictures import batches
from patchpipe.scheduling.policies.view import View, Wish, order
from patchpipe.scheduling.state import Job

_PROGRESS = 0.02  # worth of a late clip's whole work beside a deadline
_STAY = 0.05  # worth of going on as before, so that nothing is moved for nothing
_STAY_URGENT = 0.3  # likewise where pictures wait: then a clip near its boundary gives way, not one far from it
_STARVED = 0.9  # worth of a device for a clip that has waited too long


@dataclass(frozen=True)
class Balanced:
    """Meets as many deadlines as it can, by weight, without starving what it cannot meet.

    1. *Which clips.* In the order of their deadlines, as if work flowed like water: where the device seconds due by a
       deadline are more than the devices have until then, the clip with the least weight for its device seconds is
       given up (Moore and Hodgson's rule). It still runs, but no longer at the expense of others.
    2. *How many devices.* The group knapsack over pause and each degree. An option loses a clip's weight times how
       tight its deadline is times how far the option falls short of the speed it needs. So tight clips get the
       smallest degree that suffices, loose ones are demoted first, and paused last.
    3. *Pictures* get devices where batches and clips together are worth the most, as in GENSERVE.
    4. *Late clips* get one device each where any is left. One that has waited ``patience`` times its seconds alone is
       starved, and then comes before clips with time to spare; at most a share of the devices goes that way.
    5. *Devices that would idle* double the degree of the clips that gain most, but for a reserve: a picture that
       comes can then start at once.

    Attributes:
        name: ``balanced``.
        share: Share of the devices' time that clips are planned against. Pictures take some of the rest; and work does
            not flow like water: it comes in clips, on 1, 2, 4 or 8 devices.
        patience: Multiple of its seconds alone after which a late clip is starved.
        starved: Largest share of the devices for starved clips.
        reserve: Share of the devices that idle rather than make a clip quicker than it must be.
    """

    name: str = "balanced"
    share: float = 0.5
    patience: float = 4.0
    starved: float = 0.25
    reserve: float = 0.125

    def __post_init__(self) -> None:
        for name in ("share", "starved"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1")
        if not self.patience > 0:
            raise ValueError(f"patience={self.patience} must be above 0")

    @property
    def reviews(self) -> bool:
        """See ``Policy``."""
        return True

    def plan(self, view: View) -> list[Wish]:
        """See ``Policy``."""
        pictures = [wish for wish in view.running if wish.jobs[0].request.kind == "picture"]
        waiting = batches(view, [job for job in view.idle if job.request.kind == "picture"])
        clips = sorted((job for job in view.jobs if job.request.kind == "clip"), key=_by_deadline)
        room = view.room - len(pictures)
        kept = carried(view, clips, self.share * room)
        late = sorted((job for job in clips if job.id not in kept), key=order)
        ranked = [job for job in clips if job.id in kept] + late
        starved = self._starved(view, late)
        stay = _STAY_URGENT if any(batch.in_time for batch in waiting) else _STAY
        packing = Packing([self._options(view, job, kept, starved, stay) for job in ranked], room)
        taken = best_share(packing, waiting, room)
        chosen = packing.chosen(room - taken)
        wishes = [Wish((job,), option.devices) for job, option in zip(ranked, chosen, strict=True) if option.devices]
        planned = [*pictures, *(batch.wish for batch in waiting[:taken]), *wishes]
        return grown(view, filled(view, planned, waiting[taken:], ranked), int(self.reserve * view.room))

    def _starved(self, view: View, late: Sequence[Job]) -> frozenset[str]:
        """The late clips that have waited too long, oldest first, as many as may be helped at once."""
        overdue = [
            job.id
            for job in late
            if view.now - job.request.arrival > self.patience * _alone(view, job)
        ]  # fmt: skip
        return frozenset(overdue[: max(1, int(self.starved * view.room))])

    def _options(
        self, view: View, job: Job, kept: frozenset[str], starved: frozenset[str], stay: float
    ) -> list[Option]:
        weight, degrees = job.request.weight, view.degrees(job.request.shape)
        if job.id not in kept:
            seconds = view.seconds(job, degrees[0])
            worth = _STARVED if job.id in starved else _PROGRESS * min(1.0, 10.0 / seconds)
            return [Option(0, 0.0), Option(degrees[0], weight * worth + _stay(view, job, degrees[0], stay))]
        left = max(1e-6, job.request.deadline - max(view.now, job.boundary))
        tight = min(1.0, view.fastest(job) / left)
        options = [Option(0, weight * (1 - tight))]
        for degree in degrees:
            speed = left / view.seconds(job, degree)  # 1 is just in time
            value = weight * (1 - tight * max(0.0, 1 - speed)) - _STAY * 0.1 * degree
            options.append(Option(degree, value + _stay(view, job, degree, stay)))
            if speed >= 1:
                break
        return options


def _stay(view: View, job: Job, degree: int, worth: float) -> float:
    """What it is worth to leave a clip as it is: more, the longer its devices would have to be waited for."""
    if job.degree != degree:
        return 0.0
    return worth * (0.2 + min(1.0, job.boundary - view.now))


def carried(view: View, clips: Sequence[Job], devices: float) -> frozenset[str]:
    """The clips that so many devices can bring to their ends in time, as many by weight as possible.

    Moore and Hodgson's rule for one machine, for work that flows.

    Args:
        view: The view.
        clips: The clips by deadline, earliest first.
        devices: Devices they can count on.
    """
    kept: list[tuple[float, str, float]] = []
    work = 0.0
    for job in clips:
        needs = device_seconds(view, job)
        if needs is None:
            continue
        heapq.heappush(kept, (job.request.weight / needs, job.id, needs))
        work += needs
        while kept and work > devices * (job.request.deadline - view.now):
            work -= heapq.heappop(kept)[2]
    return frozenset(name for _, name, _ in kept)


def device_seconds(view: View, job: Job) -> float | None:
    """What a job takes of the devices at the smallest degree at which it is in time; ``None`` if it is late at all."""
    for degree in view.degrees(job.request.shape):
        seconds = view.seconds(job, degree)
        if view.now + seconds <= job.request.deadline:
            return degree * seconds
    return None


def grown(view: View, planned: list[Wish], reserve: int) -> list[Wish]:
    """The plan with devices that would idle, but for a reserve, given to the clips that gain most from more of them."""
    room = view.room - reserve - sum(wish.degree for wish in planned)
    while room > 0:
        gains = []
        for index, wish in enumerate(planned):
            job = wish.jobs[0]
            larger = [degree for degree in view.degrees(job.request.shape) if degree > wish.degree]
            if job.request.kind == "clip" and larger and larger[0] - wish.degree <= room:
                saved = view.seconds(job, wish.degree) - view.seconds(job, larger[0])
                gains.append((saved / (larger[0] - wish.degree), -index, larger[0]))
        best = max(gains, default=(0.0, 0, 0))
        if best[0] <= 0:
            break
        index = -best[1]
        room -= best[2] - planned[index].degree
        planned = [*planned[:index], Wish(planned[index].jobs, best[2]), *planned[index + 1 :]]
    return planned


def _alone(view: View, job: Job) -> float:
    """Seconds of the whole clip at its quickest degree on the idle machine."""
    shape = job.request.shape
    return job.request.steps * min(view.costs.step(shape, 1, degree) for degree in view.degrees(shape))


def _by_deadline(job: Job) -> tuple[float, tuple[float, str]]:
    return job.request.deadline, order(job)
