"""From a drawing to an array: rasterised, composited on white, ``uint8`` of shape (size, size, 3)."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .icons import Icon

Picture = NDArray[np.uint8]


def render(icon: Icon, size: int) -> Picture:
    """Draw one icon on white at ``size`` x ``size`` pixels."""
    if icon.svg is not None:
        return on_white(_rasterise(icon.svg, size))
    if icon.file is None:
        raise ValueError(f"icon {icon.name!r} has neither a drawing nor a file")
    with Image.open(icon.file) as image:
        return shrink(on_white(image.convert("RGBA")), size)


def _rasterise(svg: str, size: int) -> Image.Image:
    png = bytes(_resvg().svg_to_bytes(svg_string=svg, width=size, height=size))
    with Image.open(io.BytesIO(png)) as image:
        drawing = image.convert("RGBA")
    if drawing.size == (size, size):
        return drawing
    canvas = Image.new("RGBA", (size, size))  # an icon that is not square keeps its shape
    canvas.paste(drawing, ((size - drawing.width) // 2, (size - drawing.height) // 2))
    return canvas


def _resvg() -> Any:
    try:
        import resvg_py
    except ImportError as error:
        raise RuntimeError("rasterising needs resvg-py: pip install resvg-py") from error
    return resvg_py


def on_white(image: Image.Image) -> Picture:
    """Composite an RGBA picture on white."""
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


def shrink(picture: Picture, size: int) -> Picture:
    """Average a picture down to ``size`` x ``size`` pixels; one that is not square gets white margins."""
    height, width = picture.shape[:2]
    side = max(height, width)
    square = Image.new("RGB", (side, side), "white")
    square.paste(Image.fromarray(picture), ((side - width) // 2, (side - height) // 2))
    return np.asarray(square.resize((size, size), Image.Resampling.BOX))
