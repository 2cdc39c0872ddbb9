"""Runs layouts on real processes and compares their latents with plain diffusers, or with the naive oracle."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.config import PASSES, STREAMED
from patchpipe.distributed.mesh import Group
from patchpipe.models import plan_for
from tests import tiny
from tests.support.oracle import naive_pipefusion
from tests.support.ranks import Place, quieten, run_ranks
from tests.tiny import images as tiny_images
from tests.tiny import video as tiny_video

TOLERANCE = 1e-10  # relative, in float64: sums are reordered
ROUNDED = 1e-5  # of models that compute norms or rotations in float32, whatever their own dtype is
IN_FLOAT32 = ("wan", "zimage", "cogview4", "ltx")
SEPARATE = ("flux2", "wan", "cogview4")  # guide by two calls a step, beside those that have a true_cfg_scale
HEIGHT = 112  # 7 rows of tokens: divides by nothing
AXES = {"ulysses": "ulysses", "ring": "ring", "tensor": "tensor", "distrifusion": "displaced"}


@dataclass(frozen=True)
class Made:
    """What a layout came to under a schedule.

    Attributes:
        error: Relative error of its latents.
        sent: Bytes by method, of all ranks together.
        kept: Bytes of keys and values, of all ranks together.
    """

    error: float
    sent: dict[str, int]
    kept: int


def differences(
    name: str, layouts: Sequence[dict[str, Any]], schedules: Sequence[dict[str, Any]], **options: Any
) -> dict[str, float]:
    """The relative errors of ``compare``."""
    return {case: made.error for case, made in compare(name, layouts, schedules, **options).items()}


def compare(
    name: str,
    layouts: Sequence[dict[str, Any]],
    schedules: Sequence[dict[str, Any]],
    *,
    run: Callable[..., list[Any]] = run_ranks,
    **call: Any,
) -> dict[str, Made]:
    """Each layout under each schedule against plain diffusers, or the oracle where keys and values are stale.

    Args:
        name: A tiny pipeline.
        layouts: Degrees, all of one world size.
        schedules: Patches and warm-up.
        run: Runs a function on every rank: ``run_ranks`` or ``run_threads``.
        call: Changes to the call's arguments.
    """
    world_size = ParallelConfig(**layouts[0]).world_size
    right = {
        (model, str(schedule)): expected(model, json.dumps(schedule), json.dumps(call))
        for model in {suited(name, layout) for layout in layouts}
        for schedule in schedules
    }
    ranks = run(world_size, paint, name, list(layouts), schedules, call)
    found = {}
    for layout in layouts:
        for schedule in schedules:
            case = str((layout, schedule))
            error = relative(ranks[0][case]["latents"], right[suited(name, layout), str(schedule)])
            methods = ranks[0][case]["sent"]
            sent = {method: sum(rank[case]["sent"][method] for rank in ranks) for method in methods}
            found[case] = Made(error, sent, sum(rank[case]["store_bytes"] for rank in ranks))
    return found


@cache
def expected(name: str, schedule_text: str, call_text: str) -> np.ndarray:
    """Latents of plain diffusers on one device, under the naive PipeFusion of the oracle if patches stream."""
    quieten()
    schedule, call = json.loads(schedule_text), json.loads(call_text)
    pipe = tiny.pipeline(name, dtype=tiny_images.DTYPES.get(name, torch.float64))
    arguments = {**tiny.call_arguments(name, height=HEIGHT), **call}
    config, oracle = ParallelConfig(**pinned(schedule, rows_of(arguments, name))), nullcontext()
    if not config.synchronous and config.patch_rows is not None:
        two_calls = arguments.get("true_cfg_scale", 1.0) > 1 and arguments.get("negative_prompt") is not None
        two_calls |= name.startswith((*SEPARATE, *tiny_video.TWO_CALLS, *tiny_images.TWO_CALLS))
        two_calls &= name not in tiny_images.UNGUIDED
        references = tiny_images.REFERENCES.get(name, 0)
        plan = plan_for(type(pipe.transformer).__name__)
        guided = two_calls or plan.guidance == "batch" or bool(plan.beside)
        streamed = PASSES[guided] if config.warmup == STREAMED else ()
        oracle = naive_pipefusion(
            pipe, config.patch_rows, 0 if streamed else int(config.warmup), branches=1 + two_calls,
            references=references, text_patches=config.text_patches or 1, forecast=config.forecast, streamed=streamed,
        )  # fmt: skip
    with oracle:
        return np.asarray(tiny.painted(call_pipeline(pipe, arguments)))


def paint(
    place: Place, name: str, layouts: list[dict[str, Any]], schedules: Sequence[dict[str, Any]], call: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Latents and figures of every layout and schedule, on this rank."""
    dtype = tiny_images.DTYPES.get(name, torch.float64)
    pipes = {model: tiny.pipeline(model, dtype=dtype) for model in {suited(name, each) for each in layouts}}
    arguments = {**tiny.call_arguments(name, height=HEIGHT), **call}
    found = {}
    for layout in layouts:
        pipe = pipes[suited(name, layout)]
        for schedule in schedules:
            config = ParallelConfig(**layout, **pinned(schedule, rows_of(arguments, name)))
            patchpipe.parallelize(pipe, config, group=place.join(config))
            output = call_pipeline(pipe, arguments)
            figures = {**pipe.patchpipe.last.as_dict(), "sent": sent_by_method(pipe.patchpipe.group)}
            latents = None if output is None else np.asarray(tiny.painted(output))
            found[str((layout, schedule))] = {"latents": latents, **figures}
            patchpipe.restore(pipe)
    return found


def call_pipeline(pipe: Any, arguments: dict[str, Any]) -> Any:
    """One call; ``seeds`` among the arguments gives every picture a generator of its own."""
    seeds = arguments.get("seeds", 0)
    single = torch.Generator().manual_seed(seeds) if isinstance(seeds, int) else None
    generator = single or [torch.Generator().manual_seed(seed) for seed in seeds]
    rest = {key: _cast(value, pipe.transformer.dtype) for key, value in arguments.items() if key != "seeds"}
    return pipe(**rest, generator=generator, output_type="latent")


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """Embeddings among a call's arguments, in the pipeline's dtype."""
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def sent_by_method(group: Group) -> dict[str, int]:
    """Bytes this rank has sent, by the method that sent them; noise predictions left out."""
    found = {method: group.lines[axis].sent_bytes for method, axis in AXES.items() if axis in group.lines}  # type: ignore[index]
    if group.config.pipefusion > 1:
        wires = [wire for name, wire in group._wires.items() if name != "return"]
        found["pipefusion"] = sum(channel.sent_bytes for wire in wires for channel in wire.channels)
    return found


def suited(name: str, layout: dict[str, Any]) -> str:
    """The pipeline, or one with an even number of heads where two ranks are to share them."""
    return "pixart-4" if name == "pixart" and layout.get("tensor") == 2 else name


def tolerance(name: str) -> float:
    """Relative error that a model's latents may have."""
    rounded = name in tiny_images.BUILD and not name.startswith(tiny_images.EXACT)
    rounded |= name in tiny_video.FRAMES and not name.startswith(tiny_video.IN_FLOAT64)
    return ROUNDED if rounded or name.startswith(IN_FLOAT32) else TOLERANCE


def rows_of(arguments: dict[str, Any], name: str = "") -> int:
    """Rows of tokens of a picture, or frames of a clip's latent."""
    rows = tiny_video.FRAMES | tiny_images.ROWS
    if name in rows:
        return rows[name]
    frames = arguments.get("num_frames")
    if frames is None:
        return int(arguments["height"]) // 16
    return (frames - 1) // (8 if arguments["width"] == 32 else 4) + 1  # LTX takes eight to one


def pinned(schedule: dict[str, Any], rows: int) -> dict[str, Any]:
    """The schedule with its patches cut evenly in so many words, and without a forecast unless it has one.

    The eight bits of a forecast would hide a small error of what it continues.

    A cut of the program's own choice has a row of the first patch for every rank that shares it, so that it may
    differ between layouts where pictures are tiny and the text is long.
    """
    patches = schedule.get("patches")
    schedule = {"forecast": False, **schedule}
    if patches is None:
        return schedule
    sizes = tuple((index + 1) * rows // patches - index * rows // patches for index in range(patches))
    return {**{key: value for key, value in schedule.items() if key != "patches"}, "patch_rows": sizes}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference, as a share of the largest value."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())
