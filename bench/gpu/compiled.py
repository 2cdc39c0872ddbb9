"""Part e: compiled blocks beside eager ones, plain diffusers' and ours: seconds, and how many graphs there are."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch._dynamo.utils import counters

import patchpipe
from bench.gpu.painting import HEIGHT
from bench.gpu.setting import Note, Setting
from bench.one_device import request, timed
from bench.rounds import FEW_STEPS
from bench.shapes import flux_real
from patchpipe import ParallelConfig
from patchpipe.stage import compiling
from tests import tiny

PATCHES, STEPS, ROUNDS = 4, 6, 3
LAYERS = (4, 8)  # of 19 and 38: the kinds of blocks, and so the graphs, are the same
GIB = 12.0


def run(setting: Setting, note: Note) -> None:
    """A row each for ours and plain diffusers, eager and compiled."""
    setting.needs(GIB)
    with _backend(setting):
        for patches in (PATCHES, 0):
            for compiled in (False, True):
                torch._dynamo.reset()
                counters.clear()
                pipe, call = _build(setting)
                note(*_row(pipe, call, patches, compiled, setting))


def _build(setting: Setting) -> tuple[Any, dict[str, Any]]:
    if setting.tiny:
        pipe = tiny.pipeline("flux", blocks=2)
        return pipe, {**tiny.call_arguments("flux", guided=False, height=HEIGHT), "output_type": "latent"}
    pipe, call = flux_real(*LAYERS)
    pipe.to("cuda", torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**call, "output_type": "latent"}


def _backend(setting: Setting) -> AbstractContextManager[Any]:
    """On a CPU graphs are traced and run without generated code, which would take a minute."""
    return mock.patch.object(compiling, "BACKEND", "eager") if setting.tiny else nullcontext()


def _row(
    pipe: Any, call: dict[str, Any], patches: int, compiled: bool, setting: Setting
) -> tuple[str, bool | None, dict[str, Any]]:
    graphs: Callable[[], int] = lambda: 0  # noqa: E731
    if patches:
        patchpipe.parallelize(pipe, ParallelConfig(patches=patches, compile=compiled))
        graphs = lambda: sum(pipe.patchpipe.graphs.values())  # noqa: E731
    elif compiled:
        options = {"backend": "eager"} if setting.tiny else {}
        pipe.transformer.compile_repeated_blocks(fullgraph=True, **options)
        graphs = lambda: counters["stats"]["unique_graphs"]  # noqa: E731
    first = timed(lambda: request(pipe, call, FEW_STEPS + 1))
    after_one = graphs()
    steps = [_step(pipe, call) for _ in range(1 if setting.tiny else ROUNDS)]
    figures = {
        "patches": patches, "compiled": compiled, "first_seconds": round(first, 2), "step_seconds": median(steps),
        "steps": steps, "graphs": graphs(), "graphs_after_one_request": after_one,
    }  # fmt: skip
    if patches:
        patchpipe.restore(pipe)
    name = f"{patches} patches" if patches else "plain diffusers"
    fine = (figures["graphs"] > 0 and figures["graphs"] == after_one) if compiled else None
    return f"{name}, {'compiled' if compiled else 'eager'}", fine, figures


def _step(pipe: Any, call: dict[str, Any]) -> float:
    """Seconds of a steady step."""
    short, long = (timed(lambda count=count: request(pipe, call, count)) for count in (FEW_STEPS, STEPS))
    return (long - short) / (STEPS - FEW_STEPS)
