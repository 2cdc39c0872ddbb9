"""One process of patchpipe computes what PipeFusion means, told naively in `tests/support/oracle.py`."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import FlowMatchHeunDiscreteScheduler
from torch import Tensor

import patchpipe
from patchpipe import ParallelConfig
from tests import tiny
from tests.support.oracle import naive_pipefusion
from tests.support.ranks import quieten

# In float64: matrix products over other numbers of rows may sum in another order.
TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}
ROUNDED = {"rtol": 1e-5, "atol": 1e-5}
TOLERANT = {"rtol": 1e-4, "atol": 1e-4}  # of a forecast, in whose eight bits a rounding in float32 may show
IN_FLOAT32 = ("wan", "zimage", "cogview4", "ltx")  # compute norms or rotations so, whatever their own dtype is
PIPELINES = ("flux", "flux-guided", "sd3", "sd35", "pixart", "pixart-sigma", "qwen", "qwen-padded", "flux2", "wan",
             "wan-i2v", "wan-a14b", "wan-5b", "zimage", "cogview4", "ltx")  # fmt: skip
SEPARATE = ("flux", "qwen", "wan", "cogview4")  # guide by two calls a step
CLIP = 5  # frames of its latent


def setup_module() -> None:
    quieten()


def paint(pipe: Any, name: str, **options: Any) -> Tensor:
    arguments = tiny.call_arguments(name, guided=options.pop("guided", True)) | options
    generator = torch.Generator().manual_seed(7)
    return tiny.painted(pipe(**arguments, generator=generator, output_type="latent"))


@cache
def plain_latents(name: str, options: str) -> Tensor:
    """What plain diffusers paints, once for all that it is compared with."""
    return paint(tiny.pipeline(name, dtype=torch.float64), name, **json.loads(options))


def compare(
    name: str,
    config: ParallelConfig,
    tolerance: dict[str, float] | None = None,
    change: Callable | None = None,
    **options: Any,
) -> tuple[tuple[int, ...], Tensor]:
    """Compares the two and returns the rows of each patch, and what was painted; without a forecast if not asked for.

    Its eight bits would hide a small error.
    """
    config = replace(config, forecast=bool(config.forecast))
    pipe = tiny.pipeline(name, dtype=torch.float64)
    if change is not None:
        change(pipe)
    separate = name.startswith(SEPARATE) and options.get("guided", True)
    plain = plain_latents(name, json.dumps(options)) if change is None else paint(pipe, name, **options)
    patchpipe.parallelize(pipe, config)
    ours, last = paint(pipe, name, **options), pipe.patchpipe.last
    rows, text_patches = last.patch_rows, last.text_patches
    patchpipe.restore(pipe)
    with naive_pipefusion(
        pipe, rows, int(config.warmup), branches=2 if separate else 1, forecast=config.forecast,
        text_patches=text_patches,
    ):  # fmt: skip
        naive = paint(pipe, name, **options)
    scale = plain.std()
    tolerance = tolerance or (ROUNDED if name.startswith(IN_FLOAT32) else TOLERANCE)
    torch.testing.assert_close(ours / scale, naive / scale, **tolerance)
    stale = (naive - plain).abs().max() / scale
    assert stale > 1e-3, f"staleness moves the result by {stale} only: nothing was tested"
    return rows, ours


@pytest.mark.some(of=7)
@pytest.mark.parametrize("warmup", [0, 1, 2])
@pytest.mark.parametrize("name", PIPELINES)
def test_one_process_computes_what_pipefusion_means(name: str, warmup: int) -> None:
    longer = {"num_inference_steps": 7} if name == "wan-a14b" else {}  # which warms up twice
    for patches in (2, 3, 4):
        rows, _ = compare(name, ParallelConfig(patches=patches, warmup=warmup), **longer)
        assert (len(rows), sum(rows)) == (patches, CLIP if name.startswith(("wan", "ltx")) else 4)


@pytest.mark.some(of=18)
@pytest.mark.parametrize("name", PIPELINES)
def test_a_forecast_is_what_it_means(name: str) -> None:
    """The first patch decides for every head, layer and step whether there is one: here it does so both ways."""
    schedules = [(3, 1), (2, 2), (4, 0)]
    at = PIPELINES.index(name) % len(schedules)  # families take turns
    for patches, warmup in schedules if name == "flux" else schedules[at : at + 1]:
        made = [
            compare(
                name,
                ParallelConfig(patches=patches, warmup=warmup, forecast=forecast),
                TOLERANT,
                num_inference_steps=16,
            )[1]
            for forecast in (False, True)
        ]
        assert (made[0] - made[1]).abs().max() > 1e-3 * made[0].std(), "nothing was forecast: nothing was tested"


@pytest.mark.parametrize("name", tiny.MODELS)
def test_the_naive_one_is_plain_diffusers_when_nothing_is_stale(name: str) -> None:
    pipe = tiny.pipeline(name)
    plain = paint(pipe, name)
    with naive_pipefusion(pipe, (4,), 0, branches=2 if name in SEPARATE else 1):
        torch.testing.assert_close(paint(pipe, name), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", tiny.MODELS)
def test_uneven_patches_of_a_batch_without_guidance(name: str) -> None:
    config = ParallelConfig(patch_rows=(3, 1, 5, 2), warmup=1)
    compare(name, config, height=176, guided=False, prompt=[tiny.PROMPT, tiny.OTHER_PROMPT])


def test_a_scheduler_that_calls_twice_a_step() -> None:
    def heun(pipe: Any) -> None:
        pipe.scheduler = FlowMatchHeunDiscreteScheduler()

    compare("sd3", ParallelConfig(patches=2, warmup=1), change=heun)
    compare("sd3", ParallelConfig(patches=2, warmup=1, forecast=True), TOLERANT, heun)
