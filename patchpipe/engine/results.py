"""What the engine tells its caller: progress, and what a request came to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from patchpipe.clips import clips_of
from patchpipe.engine.requests import OwnSeed, pictures

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class Progress:
    """How far a request is.

    Attributes:
        step: Turns of the pipeline's loop that are over.
        total: How many there will be, where the pipeline tells.
        seconds: Since the request began.
        call: Which call it is, of several in flight together.
    """

    step: int
    total: int | None
    seconds: float
    call: int = 0


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Preview:
    """What pictures look like on the way.

    Attributes:
        step: Steps that are over.
        images: The pictures, of the kind the request gives.
    """

    step: int
    images: Any


OnPreview = Callable[[Preview], None]


@dataclass(frozen=True)
class Result:
    """What a request came to.

    Attributes:
        images: The pictures (or frames) of the pipeline's output.
        seconds: How long the request took, as the caller saw it.
        stats: What the run was like: materialisations, patches, synchronous and patched steps.
        output: The pipeline's whole output.
        seed: The seed used, also where none was given; ``None`` where a generator was.
    """

    images: Any
    seconds: float
    stats: Mapping[str, Any]
    output: Any
    seed: int | list[int] | None

    @property
    def clips(self) -> list[list[Image.Image]]:
        """The frames of every clip, as pictures, of a pipeline that makes clips.

        Raises:
            ValueError: It gave no frames, such as latents.
        """
        return clips_of(self.images)


def result_of(output: Any, seconds: float, stats: Mapping[str, Any], seed: OwnSeed) -> Result:
    """A request's result, from what a worker gave."""
    return Result(pictures(output), seconds, dict(stats), output, seed)


def check_every(steps: Any) -> int:
    """The number of steps between previews.

    Raises:
        ValueError: It is none.
    """
    if type(steps) is not int or steps < 1:
        raise ValueError(f"preview_every={steps!r} must be a number of steps, 1 or more")
    return steps
