"""Saving a pipeline that is spread over ranks: refused, since no rank would write the whole of it, or all would."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def no_saving(parts: Sequence[Any], *, split: bool) -> ValueError:
    """The error for ``save_pretrained`` of a parallel pipeline, which says what to do instead.

    Args:
        parts: The modules of the pipeline.
        split: Whether this rank's matrices are slices.
    """
    if any(tensor.is_meta for part in parts for tensor in part.parameters()):
        return ValueError(
            "save_pretrained: this rank holds only its own part of the weights. Load the model once with plain "
            "diffusers and save that"
        )
    what = "its slices of the matrices" if split else "the same files"
    return ValueError(
        f"save_pretrained: every rank of a parallel pipeline would write {what}. Call patchpipe.restore(pipe), and "
        f"save on one rank"
    )
