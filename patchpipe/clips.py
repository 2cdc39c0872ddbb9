"""Clips as people handle them: a list of frames for each, and files that play."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from PIL import Image

ENCODED = ".mp4"  # needs the package av, which brings ffmpeg's libraries
DRAWN = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG", ".apng": "PNG"}  # Pillow alone; PNG is animated
CHANNELS = (1, 3, 4)

Frames = list[Image.Image]


def clips_of(made: Any) -> list[Frames]:
    """The clips of a pipeline's output, as pictures.

    Args:
        made: ``frames`` of the output: for each clip a list of pictures, or numbers from 0 to 1 as an array
            ``[clips, frames, rows, columns, channels]`` or a tensor ``[clips, frames, channels, rows, columns]``.

    Raises:
        ValueError: It is something else, such as latents.
    """
    clips = [_frames(clip) for clip in made] if _several(made) else []
    if not clips or not all(clips):
        raise ValueError(f"no clips but {_told(made)}: ask for output_type='pil' or 'np'")
    return clips


def suffix_for_clips() -> str:
    """The kind of file for a clip that nobody named: MP4, or GIF where no encoder is installed."""
    return ENCODED if importlib.util.find_spec("av") else ".gif"


def check_suffix(path: Path) -> None:
    """Refuses a file that no clip can be written to.

    Raises:
        ValueError: Its suffix is of no such kind, or the encoder is not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ENCODED and not importlib.util.find_spec("av"):
        raise ValueError(f"{path} needs the package av: pip install av, or name a .gif, .webp or .png (animated)")
    if suffix != ENCODED and suffix not in DRAWN:
        raise ValueError(f"{path} must end in .mp4, .gif, .webp or .png (animated), since the model makes clips")


def write_clip(frames: Sequence[Image.Image], path: Path, frames_per_second: float, suffix: str = "") -> None:
    """Writes a clip: MP4 as H.264, any other kind as an animated picture that loops.

    Args:
        frames: Its pictures, all of one size. MP4 loses the last row or column of an odd number.
        path: The file.
        frames_per_second: How fast it plays.
        suffix: The kind of file, if its name does not tell.
    """
    suffix = (suffix or path.suffix).lower()
    if suffix == ENCODED:
        _encode(frames, path, frames_per_second)
        return
    first, *others = frames
    loop: dict[str, Any] = {"save_all": True, "append_images": others, "loop": 0, "duration": 1000 / frames_per_second}
    if suffix == ".webp":
        loop["quality"] = 90
    first.save(path, format=DRAWN[suffix], **loop)


def _encode(frames: Sequence[Image.Image], path: Path, frames_per_second: float) -> None:
    import av

    width, height = (side // 2 * 2 for side in frames[0].size)  # its colours are at half the size
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
        stream: Any = file.add_stream("libx264", rate=Fraction(frames_per_second).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "16"}
        for frame in frames:
            picture = frame.convert("RGB").crop((0, 0, width, height))
            for packet in stream.encode(av.VideoFrame.from_image(picture)):
                file.mux(packet)
        for packet in stream.encode(None):
            file.mux(packet)


def _several(made: Any) -> bool:
    return (isinstance(made, (list, tuple)) and bool(made)) or getattr(made, "ndim", 0) == 5


def _frames(clip: Any) -> Frames:
    if isinstance(clip, (list, tuple)) and all(isinstance(frame, Image.Image) for frame in clip):
        return list(clip)
    import numpy as np

    if getattr(clip, "ndim", 0) != 4:
        return []
    numbers = np.asarray(clip)
    if numbers.shape[-1] not in CHANNELS and numbers.shape[1] in CHANNELS:
        numbers = numbers.transpose(0, 2, 3, 1)
    if numbers.shape[-1] != 3:
        return []
    if numbers.dtype != np.uint8:
        numbers = (numbers.astype(np.float32).clip(0, 1) * 255).round().astype(np.uint8)
    return [Image.fromarray(frame) for frame in numbers]


def _told(made: Any) -> str:
    shape = getattr(made, "shape", None)
    return type(made).__name__ if shape is None else f"{type(made).__name__} of {tuple(shape)}"
