"""Pictures on disk and on a sheet: whole files or none, side by side with labels, and how alike two are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from patchpipe.files import check_writable, replacing

_MARGIN = 12
_LINE = 20
_FONT_SIZE = 14
_SMALL = 192
_PAPER = (238, 238, 238)
_INK = (40, 40, 40)


@dataclass(frozen=True)
class Tile:
    """A part of a sheet: pictures next to each other, a label over each, a caption under all."""

    pictures: Sequence[Image.Image]
    labels: Sequence[str]
    caption: str


def check_target(path: Path) -> Path:
    """Makes sure, before any work, that a picture can be written to ``path``; makes its folder.

    Raises:
        ValueError: The suffix names no picture format, or the place cannot be written to.
    """
    path = path.expanduser()
    suffix = path.suffix.lower()
    if Image.registered_extensions().get(suffix) not in Image.SAVE:
        raise ValueError(f"{path} must end in a picture format such as .png, .jpg or .webp")
    check_writable(path)
    return path


def write_picture(picture: Image.Image, path: Path) -> None:
    """Writes a picture so that the file is either whole or not there."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg"):
        picture = picture.convert("RGB")
    with replacing(path) as temporary:
        picture.save(temporary, format=Image.registered_extensions()[suffix])


def as_pictures(images: Any, pipeline: str) -> list[Image.Image]:
    """The pictures of a pipeline's output.

    Raises:
        ValueError: The output is something else.
    """
    if isinstance(images, Image.Image):
        return [images]
    if isinstance(images, (list, tuple)) and images and all(isinstance(one, Image.Image) for one in images):
        return list(images)
    raise ValueError(f"{pipeline} returned no pictures but {type(images).__name__}: use the Python interface for it")


def psnr(one: Image.Image, other: Image.Image) -> float:
    """Peak signal-to-noise ratio of two pictures in decibels; infinite where they are equal."""
    import numpy as np

    difference = np.asarray(one.convert("RGB"), np.float64) - np.asarray(other.convert("RGB"), np.float64)
    error = float((difference**2).mean())
    return math.inf if error == 0 else 10 * math.log10(255**2 / error)


def sheet(tiles: Sequence[Tile]) -> Image.Image:
    """All tiles on one sheet, about as wide as high."""
    drawn = [_draw_tile(tile) for tile in tiles]
    width, height = (max(one.size[axis] for one in drawn) for axis in (0, 1))
    columns = min(len(drawn), max(1, round(math.sqrt(len(drawn) * height / width * 1.4))))
    rows = math.ceil(len(drawn) / columns)
    size = (_MARGIN + columns * (width + _MARGIN), _MARGIN + rows * (height + _MARGIN))
    canvas = Image.new("RGB", size, _PAPER)
    for index, one in enumerate(drawn):
        row, column = divmod(index, columns)
        canvas.paste(one, (_MARGIN + column * (width + _MARGIN), _MARGIN + row * (height + _MARGIN)))
    return canvas


def _draw_tile(tile: Tile) -> Image.Image:
    pictures = [_enlarge(picture.convert("RGB")) for picture in tile.pictures]
    width = sum(picture.width for picture in pictures) + _MARGIN // 2 * (len(pictures) - 1)
    top = _LINE if any(tile.labels) else 0
    height = max(picture.height for picture in pictures)
    canvas = Image.new("RGB", (width, top + height + _LINE), _PAPER)
    pen = ImageDraw.Draw(canvas)
    left = 0
    for picture, label in zip(pictures, tile.labels, strict=True):
        canvas.paste(picture, (left, top))
        _write(pen, label, left, 0, picture.width)
        left += picture.width + _MARGIN // 2
    _write(pen, tile.caption, 0, top + height, width)
    return canvas


def _enlarge(picture: Image.Image) -> Image.Image:
    """Doubles a small picture, so that the text around it can be read."""
    if picture.width >= _SMALL:
        return picture
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.LANCZOS)


def _write(pen: ImageDraw.ImageDraw, text: str, left: int, top: int, width: int) -> None:
    font = ImageFont.load_default(_FONT_SIZE)
    if pen.textlength(text, font) > width:
        while text and pen.textlength(text + "...", font) > width:
            text = text[:-1]
        text += "..."
    pen.text((left + width / 2, top + _LINE / 2), text, _INK, font, anchor="mm")
