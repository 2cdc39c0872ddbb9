"""GENSERVE (arXiv 2604.04335): clips give way at step boundaries, on as many devices as the knapsack gives them."""

from __future__ import annotations

from dataclasses import dataclass

from patchpipe.scheduling.knapsack import Option, Packing
from patchpipe.scheduling.policies.pictures import Batch, batches
from patchpipe.scheduling.policies.view import View, Wish, order
from patchpipe.scheduling.state import Job

_PROGRESS = 0.01  # worth of a request's whole work, beside that of its deadline: tells equal choices apart
_SLACK = 0.0005  # worth of pausing a clip that has all the time in the world: the one with the most slack gives way
_STAY = 0.0001  # worth of going on as before, so that nothing is moved for nothing


@dataclass(frozen=True)
class Genserve:
    """Pictures come in where their deadlines need it; the clip with the most slack gives way.

    For every clip there is an option for each degree, and to pause. An option is worth the clip's weight if the clip
    could still be in time after a round of it, at its quickest degree from then on. The knapsack finds the best for
    every number of devices; the rest are for batches of pictures, so many that both are together worth the most.

    Attributes:
        name: ``genserve``.
        round: Seconds until the next decision.
    """

    name: str = "genserve"
    round: float = 2.0

    @property
    def reviews(self) -> bool:
        """See ``Policy``."""
        return True

    def plan(self, view: View) -> list[Wish]:
        """See ``Policy``."""
        pictures = [wish for wish in view.running if wish.jobs[0].request.kind == "picture"]
        clips = sorted((job for job in view.jobs if job.request.kind == "clip"), key=order)
        waiting = batches(view, [job for job in view.idle if job.request.kind == "picture"])
        room = view.room - len(pictures)
        packing = Packing([self._options(view, job) for job in clips], room)
        taken = best_share(packing, waiting, room)
        chosen = packing.chosen(room - taken)
        wishes = [Wish((job,), option.devices) for job, option in zip(clips, chosen, strict=True) if option.devices]
        planned = [*pictures, *(batch.wish for batch in waiting[:taken]), *wishes]
        return filled(view, planned, waiting[taken:], clips)

    def _options(self, view: View, job: Job) -> list[Option]:
        deadline, weight = job.request.deadline, job.request.weight
        fastest = view.fastest(job)
        left = deadline - view.now
        late = fastest > left
        degrees = view.degrees(job.request.shape)[: 1 if late else None]
        loose = 0.0 if late else 1 - fastest / left
        options = [Option(0, weight * ((not late and self.round + fastest <= left) + _SLACK * loose))]
        for degree in degrees:
            progress = min(1.0, self.round / view.seconds(job, degree))
            in_time = not late and self.round + (1 - progress) * fastest <= left
            options.append(Option(degree, weight * (in_time + _PROGRESS * progress) + _STAY * (degree == job.degree)))
        return options


def best_share(packing: Packing, waiting: list[Batch], room: int) -> int:
    """How many of the batches should have a device each, so that they and the clips are together worth the most."""
    best, taken, value = -1.0, 0, 0.0
    for count in range(min(room, len(waiting)) + 1):
        value += waiting[count - 1].value if count else 0.0
        if value + packing.values[room - count] > best:
            best, taken = value + packing.values[room - count], count
    return taken


def filled(view: View, planned: list[Wish], pictures: list[Batch], clips: list[Job]) -> list[Wish]:
    """The plan with devices that would idle given to what was left out, one each."""
    room = view.room - sum(wish.degree for wish in planned)
    served = {job.id for wish in planned for job in wish.jobs}
    rest = [batch.wish for batch in pictures]
    rest += [Wish((job,), view.degrees(job.request.shape)[0]) for job in clips if job.id not in served]
    for wish in rest:
        if wish.degree <= room:
            planned = [*planned, wish]
            room -= wish.degree
    return planned
