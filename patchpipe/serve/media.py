"""Pictures that come in, and pictures and clips that go out."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from patchpipe.serve.refusals import Refusal, bad

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP"}
UPLOADS = tuple(FORMATS.values())
SHEET = 16  # frames at most on a clip's sheet
_SMALL = 320  # pixels of a thumbnail's longer side


def decode_upload(data: bytes, most_pixels: int, param: str, mode: str = "RGB") -> Image.Image:
    """A picture that a client sent, the right way up.

    Args:
        data: The file.
        most_pixels: What it may have; told from its head, before anything is decoded.
        param: The field it came in.
        mode: What to turn it into.

    Raises:
        Refusal: It is no PNG, JPEG or WebP, or too large.
    """
    try:
        with Image.open(io.BytesIO(data), formats=UPLOADS) as found:
            width, height = found.size
            if width * height > most_pixels:
                allowed = f"{most_pixels:,} pixels are allowed"
                raise Refusal(413, f"{param} is {width} × {height}: {allowed}", code="image_too_large", param=param)
            return ImageOps.exif_transpose(found).convert(mode)
    except Refusal:
        raise
    except Image.DecompressionBombError:
        raise Refusal(413, f"{param} has too many pixels", code="image_too_large", param=param) from None
    except Exception:  # a broken file makes Pillow raise anything
        raise bad(f"{param} is no picture that can be read: send PNG, JPEG or WebP", param, "invalid_image") from None


def encode_picture(picture: Image.Image, kind: str = "png", quality: int = 100) -> bytes:
    """A picture's file.

    Args:
        picture: The picture.
        kind: ``png``, ``jpeg`` or ``webp``.
        quality: From 0 to 100; PNG loses nothing whatever it is.
    """
    buffer = io.BytesIO()
    options: dict[str, Any] = {} if kind == "png" else {"quality": min(quality, 95 if kind == "jpeg" else 100)}
    (picture.convert("RGB") if kind == "jpeg" else picture).save(buffer, FORMATS[kind], **options)
    return buffer.getvalue()


def thumbnail(frames: Sequence[Image.Image]) -> Image.Image:
    """A clip's first frame, small."""
    small = frames[0].convert("RGB")
    small.thumbnail((_SMALL, _SMALL))
    return small


def contact_sheet(frames: Sequence[Image.Image]) -> Image.Image:
    """Frames from all over a clip, four to a row."""
    count = min(SHEET, len(frames))
    chosen = [thumbnail([frames[number * len(frames) // count]]) for number in range(count)]
    width, height = chosen[0].size
    sheet = Image.new("RGB", (width * min(4, count), height * -(-count // 4)))
    for number, frame in enumerate(chosen):
        sheet.paste(frame, (number % 4 * width, number // 4 * height))
    return sheet


def write_whole(data: bytes, path: Path) -> None:
    """Writes a file that is either whole or not there, also after the power has failed."""
    part = path.with_name(f".{path.name}.part")
    with part.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
