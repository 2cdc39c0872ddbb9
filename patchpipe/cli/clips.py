"""What ``generate`` does for models that make clips: files, speeds, and what it refuses there."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from patchpipe.cli.pictures import as_pictures
from patchpipe.clips import check_suffix, write_clip
from patchpipe.files import check_writable, replacing

if TYPE_CHECKING:
    from PIL import Image

    from patchpipe.engine import Engine, Result
    from patchpipe.models import ModelPlan

USUAL_SIZE = {"height": 480, "width": 832}  # which most models for clips were trained on
RATES = ("frame_rate", "fps")  # what pipelines call the speed, where they are told it


def known_to_make(model: str) -> bool:
    """Whether a folder's model makes clips, as far as can be told before it is loaded."""
    index = Path(model).expanduser() / "model_index.json"
    try:
        entry = json.loads(index.read_text(encoding="utf-8")).get("transformer")
    except (OSError, ValueError, AttributeError):
        return False
    return isinstance(entry, list) and _plan(entry[-1]) is not None


def makes(engine: Engine) -> bool:
    """Whether an engine's model makes clips."""
    return _plan(engine.ranks[0].transformer_class) is not None


def check_target(path: Path, fps: float | None, **for_pictures: bool) -> Path:
    """Makes sure, before any work, that a clip can be written to ``path``, and that nothing else is asked for.

    Args:
        path: The file.
        fps: Frames a second, if asked for.
        for_pictures: Which options that pictures have are asked for.

    Raises:
        ValueError: It cannot, or an option is for pictures only.
    """
    for name, asked in for_pictures.items():
        if asked:
            raise ValueError(f"--{name} is for pictures, and the model makes clips: leave it out")
    if fps is not None and not 0 < fps <= 240:
        raise ValueError(f"--fps {fps:g} must be above 0 and at most 240 frames a second")
    path = path.expanduser()
    check_suffix(path)
    check_writable(path)
    return path


def frames_of(engine: Engine, result: Result) -> list[list[Image.Image]]:
    """The frames of every clip of a result; of a picture there is one.

    Raises:
        ValueError: The pipeline gave something else.
    """
    if makes(engine):
        return result.clips
    return [[picture] for picture in as_pictures(result.images, engine.ranks[0].pipeline_class)]


def speed(engine: Engine, fps: float | None, arguments: Mapping[str, Any]) -> float:
    """Frames a second: as asked for, as the pipeline was told, or as its makers show it."""
    plan = _plan(engine.ranks[0].transformer_class)
    assert plan is not None
    told = [given[name] for given in (arguments, engine.defaults) for name in RATES if name in given]
    return next((float(rate) for rate in (fps, *told) if isinstance(rate, (int, float))), plan.frames_per_second)


def write(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    """Writes a clip so that the file is either whole or not there."""
    with replacing(path) as temporary:
        write_clip(frames, temporary, frames_per_second, path.suffix)


def _plan(kind: Any) -> ModelPlan | None:
    """The plan of a transformer class, if it makes clips."""
    from patchpipe.models import PLANS

    return next((plan for plan in PLANS if plan.model == kind and plan.makes_clips), None)
