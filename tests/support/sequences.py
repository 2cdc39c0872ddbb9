"""Sequences of attention layers for tests that have no model."""

from __future__ import annotations

from patchpipe.models.latent import Raster
from patchpipe.stage.rows import Rows


def sequence_of(raster: Raster, text: int = 0, text_first: bool = True) -> Rows:
    """The rows of a picture, with so many rows of text before or after them."""
    if not text:
        return Rows(("image",), (raster.total,), raster)
    segments, sizes = ("text", "image"), (text, raster.total)
    return Rows(segments, sizes, raster) if text_first else Rows(segments[::-1], sizes[::-1], raster)
