"""Part g: the memory a request needs beside its weights, and what the planner's formula says of it."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import patchpipe
from bench.gpu.painting import HEIGHT
from bench.gpu.ranks import Ranks, Spot, problems
from bench.gpu.setting import Note, Setting
from bench.one_device import request
from bench.shapes import SHAPES, flux_real
from patchpipe import ParallelConfig
from patchpipe.planner import Layout, Profile, Workload
from patchpipe.planner.memory import _working, rank_memory
from patchpipe.planner.work.named import Asked, workload_for
from tests import tiny

STEPS = 3
GIB = 32.0
LAYERS = (4, 8)  # of 19 and 38, on two ranks that share a card
# The scales of a forecast are not in the formula.
ALONE: list[dict[str, Any]] = [{}, *({"patches": count, "forecast": False} for count in (2, 4, 8))]
STAGES = {True: (2, 2), False: (6, 6)}  # blocks of each, pinned: the formula is not to guess them
PROFILE = Profile.named("h100", "nvlink4")  # the formula does not depend on it
OFF = 1.5  # times what the formula says: more is a layout that would not fit where the planner says it does


def run(setting: Setting, note: Note) -> None:
    """A row for every number of patches on one rank, and for every rank of layouts of two."""
    setting.needs(GIB)
    place = setting.places(1, own=False)[0]
    pipe, call = built(place, None)
    workload = workload_of(setting, None)
    for layout in ALONE[:3:2] if setting.tiny else ALONE:
        measured = needed(Spot(0, 1, None, place), pipe, call, layout)
        note(*_row("one rank", layout, 0, measured, workload))
    del pipe
    gc.collect()
    if not setting.tiny:
        torch.cuda.empty_cache()
    short = workload_of(setting, LAYERS)
    with Ranks(setting.places(2, own=False)) as ranks:
        for layout in of_two(setting):
            answers = ranks.run(on_a_rank, layout)
            why = problems(answers)
            if why:
                note(f"two ranks, {ParallelConfig(**layout).describe()}", False, {"why": why})
                continue
            for rank, answer in enumerate(answers):
                note(*_row(f"rank {rank} of two", layout, rank, answer.value, short))


def of_two(setting: Setting) -> list[dict[str, Any]]:
    """Layouts of two ranks."""
    staged = {"pipefusion": 2, "patches": 4, "stage_blocks": STAGES[setting.tiny], "forecast": False}
    return [staged] if setting.tiny else [staged, {"ulysses": 2}, {"ulysses": 2, "patches": 2, "forecast": False}]


def built(place: str, layers: tuple[int, int] | None) -> tuple[Any, dict[str, Any]]:
    """FLUX.1 at its own sizes, or with fewer blocks; tiny on a CPU."""
    if place == "cpu":
        pipe = tiny.pipeline("flux")
        return pipe, {**tiny.call_arguments("flux", guided=False, height=HEIGHT), "output_type": "latent"}
    pipe, call = SHAPES["flux-real"].build() if layers is None else flux_real(*layers)
    pipe.to(place, torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "output_type": "latent"}


def workload_of(setting: Setting, layers: tuple[int, int] | None) -> Workload:
    """The same for the planner."""
    if setting.tiny:
        with tempfile.TemporaryDirectory() as folder:
            saved = tiny.save("flux", Path(folder) / "flux")
            asked = Asked(height=HEIGHT, width=48, steps=STEPS, text_tokens=8, dtype="fp32", guidance=False)
            return workload_for(saved, asked)
    whole = workload_for("flux.1-dev", Asked(height=1024, width=1024))
    if layers is None:
        return whole
    return replace(whole, blocks=(*whole.blocks[: layers[0]], *whole.blocks[-layers[1] :]))


def on_a_rank(spot: Spot, layout: dict[str, Any]) -> dict[str, int]:
    """What a rank of two needs."""
    pipe, call = built(spot.device, LAYERS)
    return needed(spot, pipe, call, layout)


def needed(spot: Spot, pipe: Any, call: dict[str, Any], layout: dict[str, Any]) -> dict[str, int]:
    """Bytes of the keys and values kept, of the weights and, on a GPU, of the peak beside the weights."""
    on_gpu = spot.device != "cpu"
    if layout:
        config = ParallelConfig(**layout, backend="gloo", split_batch=False, share_blocks=False, timeout=30.0)
        patchpipe.parallelize(pipe, config, group=spot.join(config))
    try:
        weights = torch.cuda.memory_allocated(spot.device) if on_gpu else _bytes_of(pipe.transformer)
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(spot.device)
        request(pipe, call, STEPS)
        peak = torch.cuda.max_memory_allocated(spot.device) - weights if on_gpu else 0
        store = pipe.patchpipe.last.store_bytes if layout else 0
    finally:
        if layout:
            patchpipe.restore(pipe)
    return {"weights": weights, "peak": peak, "store": store}


def _bytes_of(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())


def _row(
    where: str, layout: dict[str, Any], rank: int, measured: dict[str, int], workload: Workload
) -> tuple[str, bool, dict[str, Any]]:
    """Right where keys and values are as many as the formula says, and the peak is not far above it."""
    config = ParallelConfig(**layout)
    predicted = Layout(workload, replace(config, split_batch=False, share_blocks=False), PROFILE)
    formula = rank_memory(predicted)[rank]
    store, working = formula.store, _working(predicted)
    figures = {**measured, "formula_store": store, "formula_working": working, "formula_weights": formula.parameters}
    fine = measured["store"] == store and measured["peak"] <= OFF * (store + working)
    return f"{where}, {config.describe() if layout else 'plain diffusers'}", fine, figures
