"""Runs layouts on real processes and compares their latents with what one process paints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.ranks import Place, run_ranks

TOLERANCE = 1e-10  # relative, in float64: sums are reordered
HEIGHT = 112  # 7 rows of tokens: divides by nothing


def differences(
    name: str, layouts: Sequence[dict[str, Any]], schedules: Sequence[dict[str, Any]], **call: Any
) -> dict[str, float]:
    """Relative error of each layout under each schedule against the same schedule on one process.

    Args:
        name: A tiny pipeline.
        layouts: Degrees, all of one world size.
        schedules: Patches and warm-up.
        call: Changes to the call's arguments.
    """
    world_size = ParallelConfig(**layouts[0]).world_size
    [reference] = run_ranks(1, paint, name, [{}], schedules, call)
    found = run_ranks(world_size, paint, name, list(layouts), schedules, call)[0]
    alone = {str(schedule): reference[str(({}, schedule))] for schedule in schedules}
    return {
        str((layout, schedule)): relative(found[str((layout, schedule))]["latents"], alone[str(schedule)]["latents"])
        for layout in layouts
        for schedule in schedules
    }


def paint(
    place: Place, name: str, layouts: list[dict[str, Any]], schedules: Sequence[dict[str, Any]], call: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Latents and figures of every layout and schedule, on this rank."""
    pipe = tiny.pipeline(name, dtype=torch.float64)
    arguments = {**tiny.call_arguments(name, height=HEIGHT), **call}
    found = {}
    for layout in layouts:
        for schedule in schedules:
            config = ParallelConfig(**layout, **pinned(schedule, arguments["height"]))
            patchpipe.parallelize(pipe, config, group=place.join(config))
            output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
            latents = None if output is None else output.images.numpy()
            found[str((layout, schedule))] = {"latents": latents, **pipe.patchpipe.last.as_dict()}
            patchpipe.restore(pipe)
    return found


def pinned(schedule: dict[str, Any], height: int) -> dict[str, Any]:
    """The schedule with its patches cut evenly in so many words.

    A cut of the program's own choice has a row of the first patch for every rank that shares it, so that it may
    differ between layouts where pictures are tiny and the text is long.
    """
    rows, patches = height // 16, schedule.get("patches")
    if patches is None:
        return schedule
    sizes = tuple((index + 1) * rows // patches - index * rows // patches for index in range(patches))
    return {**{key: value for key, value in schedule.items() if key != "patches"}, "patch_rows": sizes}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
