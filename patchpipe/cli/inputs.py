"""The pictures that ``generate`` starts from: read and checked before anything is started."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

_MULTIPLE = 16  # of pixels: a token of the models there are is so wide
_AREA = 1024 * 1024  # pixels such models were trained on, where a model's folder says nothing


def picture_arguments(
    image: Path | None, mask: Path | None, strength: float | None, given: dict[str, Any], advised: dict[str, Any]
) -> dict[str, Any]:
    """The pipeline's arguments for a picture to start from.

    Args:
        image: Its file.
        mask: The file of the picture that is white where it is to be painted anew.
        strength: How much of it is painted anew, from 0 to 1.
        given: Arguments that were asked for by name; a height or width among them stays.
        advised: Arguments that the model advises: its height and width bound the size.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture, the two differ in size, or one is given that needs the other.
    """
    if image is None:
        for name, value in (("--mask", mask), ("--strength", strength)):
            if value is not None:
                raise ValueError(f"{name} {value} needs a picture to start from: add --image FILE")
        return {}
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"--strength {strength:g} must be from 0 (the picture as it is) to 1 (nothing left of it)")
    arguments: dict[str, Any] = {"image": read_picture(image, "RGB")}
    if mask is not None:
        arguments["mask_image"] = read_picture(mask, "L")
        _check_sizes(image, mask, arguments)
    if strength is not None:
        arguments["strength"] = strength
    if given.get("height") is None and given.get("width") is None:
        area = advised.get("height", 0) * advised.get("width", 0) or _AREA
        width, height = arguments["image"].size
        arguments["width"], arguments["height"] = fitting_size(width, height, area)
    return arguments


def implied_task(image: Path | None, mask: Path | None, pipeline: str | None, task: str | None) -> str | None:
    """The task that pictures imply where neither a task nor a pipeline is named."""
    if pipeline is not None or task is not None or image is None:
        return task
    return "image-to-image" if mask is None else "inpainting"


def read_choice(pipeline: str | None, task: str | None, scheduler: str | None) -> dict[str, str]:
    """What was chosen of them, as the engine takes it."""
    choice = {"pipeline": pipeline, "task": task, "scheduler": scheduler}
    return {name: value for name, value in choice.items() if value is not None}


def fitting_size(width: int, height: int, area: int) -> tuple[int, int]:
    """A size of the same shape, of no more than so many pixels, that a latent divides."""
    scale = min(1.0, math.sqrt(area / (width * height)))
    wide, high = (max(_MULTIPLE, int(side * scale + 1e-6) // _MULTIPLE * _MULTIPLE) for side in (width, height))
    return wide, high


def check_there(*paths: Path | None) -> None:
    """Makes sure that files to read are there, as far as any are named.

    Raises:
        FileNotFoundError: One is not.
        ValueError: One is a folder.
    """
    for path in (each.expanduser() for each in paths if each is not None):
        if not path.exists():
            raise FileNotFoundError(f"there is no file {path}")
        if not path.is_file():
            raise ValueError(f"{path} is a folder: name a picture")


def read_picture(path: Path, mode: str) -> Image.Image:
    """A picture the right way up, in a mode.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is no picture that can be read.
    """
    path = path.expanduser()
    check_there(path)
    try:
        with Image.open(path) as found:
            return ImageOps.exif_transpose(found).convert(mode)
    except UnidentifiedImageError:
        raise ValueError(f"{path} is no picture that can be read") from None
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} cannot be read as a picture: {error}") from error


def _check_sizes(image: Path, mask: Path, arguments: dict[str, Any]) -> None:
    sizes = [arguments[name].size for name in ("image", "mask_image")]
    if sizes[0] != sizes[1]:
        (width, height), (other_width, other_height) = sizes
        raise ValueError(
            f"{mask} is {other_width} × {other_height} but {image} is {width} × {height}: a mask must be of the "
            f"picture's size"
        )
