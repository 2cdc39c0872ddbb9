"""What a request costs depends on its shape: the model, the size, the frames, and what keeps it from a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from patchpipe.scheduling import Shape
from patchpipe.serve.work.model import Facts
from patchpipe.serve.work.tickets import Work

USUAL_SIDE = 1024
USUAL_FRAMES = 81
_MARK = "#"  # no model's name has one


def shape_of(work: Work, facts: Facts, alone: bool = False) -> Shape:
    """A request's shape, as far as it is known before it runs.

    Args:
        work: The request.
        facts: Its model's.
        alone: It is to be painted without others.
    """
    marks = [f"{name}@{scale:g}" for name, scale in work.loras]
    marks += ["alone"] if alone or work.previews else []
    width, height = (_number(work.arguments, facts, name, USUAL_SIDE) for name in ("width", "height"))
    frames = max(2, _number(work.arguments, facts, "num_frames", USUAL_FRAMES)) if work.kind == "clip" else 1
    return Shape(_MARK.join([work.model, *marks]), width, height, frames)


def stays(work: Work, facts: Facts) -> tuple[bool, bool]:
    """What a request must have once it has begun: the engine to itself, and its devices to its end."""
    whole = not facts.together or (work.previews > 0 and facts.elastic is None)
    return whole, facts.elastic is not None and not facts.carried


def model_of(shape: Shape) -> str:
    """The model's name."""
    return shape.model.split(_MARK)[0]


def bare(shape: Shape) -> Shape:
    """The shape without what keeps it from a batch, which costs nothing."""
    name = model_of(shape)
    return shape if name == shape.model else Shape(name, shape.width, shape.height, shape.frames)


def joins(shape: Shape) -> bool:
    """Whether requests of a shape can be painted together."""
    return not shape.model.endswith(f"{_MARK}alone")


def _number(arguments: Mapping[str, Any], facts: Facts, name: str, otherwise: int) -> int:
    found = arguments.get(name)
    if found is None:
        found = facts.usual(name)
    return found if type(found) is int and found > 0 else otherwise
