"""The set-up of GENSERVE's evaluation (arXiv 2604.04335), as far as it is published, and its figures.

Published: eight RTX PRO 6000 Blackwell cards; SD3.5-medium and Wan2.2-5B with 81 frames, at 256p, 480p and 720p drawn
evenly; 100 requests a run, half of them clips, 12 to 36 a minute and usually 24; a scale of deadlines, usually 1.0;
and that a 720p step on all eight cards takes about 0.74 s (from the overhead it gives for a resume, in seconds and in
shares of a step). Not published: what latency the scale multiplies, the steps of a clip, and the devices
that the policies which do not choose them give a clip. ``docs/scheduling.md`` says how those were settled.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from patchpipe.scheduling.costs import Costs, TableCosts
from patchpipe.scheduling.deadlines import alone
from patchpipe.scheduling.policies import Ordered
from patchpipe.scheduling.scheduler import Scheduler
from patchpipe.scheduling.simulator.arrivals import Ask, Deadline
from patchpipe.scheduling.simulator.simulate import Fleet, Served, simulate
from patchpipe.scheduling.simulator.sweep import Load
from patchpipe.scheduling.state import Kind, Shape

DEVICES, REQUESTS, PER_MINUTE = 8, 100, 24.0
PICTURE_MODEL, CLIP_MODEL, FRAMES = "sd3.5-medium", "wan2.2-5b", 81
PICTURE_STEPS = 40  # as the model's card has it
CLIP_STEPS = 22  # chosen; see the docs
BASELINE_DEGREE = 1  # chosen; see the docs
DEGREES = (1, 2, 4, 8)
STEP_720P_8 = 0.74  # seconds; see above

# Seconds of a step on one card, as the planner predicts them; a test checks that it does.
CLIPS: Mapping[Shape, float] = {
    Shape(CLIP_MODEL, 448, 256, FRAMES): 0.2404,
    Shape(CLIP_MODEL, 832, 480, FRAMES): 0.9435,
    Shape(CLIP_MODEL, 1280, 704, FRAMES): 2.7225,
}
PICTURES: Mapping[Shape, tuple[float, float]] = {  # one picture, and a batch of four
    Shape(PICTURE_MODEL, 448, 256): (0.0237, 0.0639),
    Shape(PICTURE_MODEL, 832, 480): (0.0479, 0.1621),
    Shape(PICTURE_MODEL, 1280, 704): (0.1038, 0.3836),
}
BATCH = 4
FIT_SEED = 0  # the first, as of the runs that are shown
PICTURE_ENDS = 0.2  # seconds of text encoders and VAE


class Share(NamedTuple):
    """Shares of deadlines met."""

    all: float
    picture: float
    clip: float


# The published rows at 24 a minute, half clips, scale 1.0.
PUBLISHED: Mapping[str, Share] = {
    "fcfs": Share(0.59, 0.58, 0.60),
    "sjf": Share(0.61, 0.60, 0.62),
    "srtf": Share(0.71, 0.96, 0.46),
    "rasp": Share(0.56, 0.64, 0.48),
    "genserve": Share(0.78, 1.00, 0.56),
}
RASP = dict(zip(CLIPS, (1, 2, 4), strict=True))  # its fixed degrees


@dataclass(frozen=True)
class Bases:
    """What the scale of deadlines multiplies: so many times a request's seconds alone on one device.

    Attributes:
        picture: For pictures.
        clip: For clips.
    """

    picture: float
    clip: float

    def __post_init__(self) -> None:
        for name in ("picture", "clip"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")

    def of(self, kind: Kind) -> float:
        """The base of a class."""
        return self.picture if kind == "picture" else self.clip


def costs() -> TableCosts:
    """What a step takes on so many of the cards.

    A clip's computing is shared evenly; what its ranks exchange takes time in proportion to its tokens, and so much
    that a 720p step on eight cards takes what was published. Pictures run on one card.
    """
    largest = max(CLIPS, key=_tokens)
    exchange = (STEP_720P_8 - CLIPS[largest] / 8) * 8 / 7 / _tokens(largest)
    steps = {
        (shape, 1, degree): seconds / degree + exchange * _tokens(shape) * (degree - 1) / degree
        for shape, seconds in CLIPS.items()
        for degree in DEGREES
    }
    for shape, (one, four) in PICTURES.items():
        steps[shape, 1, 1], steps[shape, BATCH, 1] = one, four
    ends = dict.fromkeys(PICTURES, PICTURE_ENDS) | dict(CLIPS)  # a clip's VAE, about a step's worth
    return TableCosts(steps, decode=ends)


def asks(clips: float = 0.5, clip_steps: int = CLIP_STEPS) -> list[Ask]:
    """What is asked for: sizes drawn evenly.

    Args:
        clips: Share of the requests that are clips.
        clip_steps: Steps of a clip.

    Raises:
        ValueError: The share is not between 0 and 1.
    """
    if not 0 <= clips <= 1:
        raise ValueError(f"a share of {clips} clips must be between 0 and 1")
    found = [Ask(shape, clip_steps, clips / len(CLIPS)) for shape in CLIPS]
    return found + [Ask(shape, PICTURE_STEPS, (1 - clips) / len(PICTURES)) for shape in PICTURES]


def deadlines(table: Costs, bases: Bases, scale: float = 1.0) -> Deadline:
    """Deadlines by class: scale × base × the seconds alone on one device, or as few as there must be.

    Raises:
        ValueError: The scale is not above 0.
    """
    if not scale > 0:
        raise ValueError(f"scale={scale} of the deadlines must be above 0")

    @functools.cache
    def seconds(shape: Shape, steps: int) -> float:
        return scale * bases.of(shape.kind) * alone(table, shape, steps, table.degrees(shape)[0])

    return seconds


def fit(table: Costs, served: Iterable[Served], wanted: Share) -> Bases:
    """The two bases with which requests served without regard to deadlines meet the wanted shares of them.

    Args:
        table: The costs.
        served: What became of requests under FCFS.
        wanted: The shares.
    """
    one_device = deadlines(table, Bases(1, 1))
    stretched: dict[Kind, list[float]] = {"picture": [], "clip": []}
    for one in served:
        usual = one_device(one.request.shape, one.request.steps)
        stretched[one.request.kind].append(one.seconds / usual)
    return Bases(_quantile(stretched["picture"], wanted.picture), _quantile(stretched["clip"], wanted.clip))


def fitted(degree: int = BASELINE_DEGREE, seeds: int = 20) -> Bases:
    """The two bases with which FCFS meets its published shares at the usual load; no other row is looked at.

    Args:
        degree: Devices of a clip.
        seeds: Runs, with seeds beyond those that the figures are drawn from.
    """
    table = costs()
    load = Load(asks(), lambda shape, steps: math.inf, REQUESTS)
    served: list[Served] = []
    for seed in range(FIT_SEED, FIT_SEED + seeds):
        scheduler = Scheduler(Ordered("fcfs", degree), table)
        served += simulate(load.requests(PER_MINUTE, seed), Fleet(DEVICES, DEVICES), scheduler).served
    return fit(table, served, PUBLISHED["fcfs"])


def _quantile(values: list[float], share: float) -> float:
    """The least value that at least this share of the values does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _tokens(shape: Shape) -> int:
    return (shape.height // 32) * (shape.width // 32) * ((shape.frames - 1) // 4 + 1)
