"""A warm-up that streams: the first step's patches pass the stages three times, and no stage waits for another."""

from __future__ import annotations

import json
from typing import Any

import pytest

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.planner.schedule import Unit, total
from tests import tiny
from tests.models import test_images
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.threads import run_threads
from tests.tiny import images as tiny_images
from tests.tiny import video as tiny_video

FIRST = ("flux", "sd3", "sd35", "pixart", "qwen", "qwen-padded", "flux2", "zimage", "cogview4",
         "wan", "wan-a14b", "ltx")  # fmt: skip
WHOLE = ("flux2-kv",)  # whose first call is, so that nothing goes ahead of it
PICTURES = (name for name in tiny_images.BUILD if test_images.layouts_of(name) and name not in WHOLE)
NAMES = (*FIRST, *PICTURES, *tiny_video.BUILD)
FORECAST = tuple(name for name in NAMES if name != "sana")  # in which rows meet in attention
STEPS = {"num_inference_steps": 3}

small_references = test_images.small_references  # Qwen-Image-Edit enlarges what it is given


def schedule(name: str, **options: Any) -> dict[str, Any]:
    clip = name in tiny_video.BUILD or name.startswith(("wan", "ltx"))
    return {"patches": 2 if clip else 3, "warmup": "streamed", "split_batch": False, **options}


@pytest.mark.some(of=12)
@pytest.mark.parametrize("name", NAMES)
def test_law_2_a_warmup_that_streams_is_the_oracles_on_any_number_of_stages(name: str) -> None:
    asked, steps = schedule(name, forecast=name in FORECAST), {} if name in tiny_video.BUILD else STEPS
    with over("nccl"):
        errors = parity.differences(name, [{"pipefusion": 2}], [asked], run=run_threads, **steps)
    assert max(errors.values()) <= parity.tolerance(name), errors
    streamed, cold = (
        parity.expected(name, json.dumps(each), json.dumps(steps)) for each in (asked, asked | {"warmup": 0})
    )
    assert parity.relative(streamed, cold) > 1e-3, "what went ahead changes nothing: nothing was tested"


@pytest.mark.some(of=2)
@pytest.mark.parametrize(
    "layout", [{"pipefusion": 4}, {"cfg": 2}, {"ulysses": 2, "pipefusion": 2}, {"ring": 2}], ids=str
)
def test_it_is_the_same_in_every_layout(layout: dict[str, int]) -> None:
    for name in ("flux", "sd35"):
        asked = schedule(name, forecast=True)
        with over("nccl"):
            errors = parity.differences(name, [layout], [asked], run=run_threads, **STEPS)
        assert max(errors.values()) <= parity.tolerance(name), errors


@pytest.mark.parametrize(("name", "guided", "drafts"), [("flux", False, 2), ("flux", True, 5), ("pixart", True, 5)])
def test_no_step_is_synchronous_and_guidance_takes_more_drafts(name: str, guided: bool, drafts: int) -> None:
    pipe = patchpipe.parallelize(tiny.pipeline(name), ParallelConfig(**parity.pinned(schedule(name), 4)))
    pipe(**tiny.call_arguments(name, steps=4, guided=guided), output_type="latent")
    calls, last = 2 if guided and name == "flux" else 1, pipe.patchpipe.last
    assert (last.steps_synchronous, last.steps_patched, last.drafts) == (0, 4 * calls, drafts * calls)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"distrifusion": 2}, "is for patches that stream; distrifusion has none"),
        ({"pipefusion": 2, "share_blocks": True}, "needs a synchronous step to begin with"),
    ],
)
def test_layouts_without_one_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ParallelConfig(**{"warmup": "streamed", **options})


def test_the_planner_counts_drafts_as_patches() -> None:
    """Two stages, two patches of a second a stage: ten steps and two drafts of the first stream as twelve steps do."""
    patch, whole = Unit((1.0, 1.0), (1.0, 1.0), (0.0, 0.0)), Unit((2.0, 2.0), (2.0, 2.0), (0.0, 0.0))
    streamed = total([whole], [patch] * 2, 0, 10, ahead=[[patch] * 4])
    assert streamed.seconds == total([whole], [patch] * 2, 0, 12).seconds
    guided = total([whole], [patch] * 2, 0, 10, ahead=[[patch] * 4, [patch] * 4])
    assert guided.seconds == total([whole], [patch] * 2, 0, 14).seconds
    assert guided.worked == (28.0, 28.0)
    later = total([whole], [patch] * 2, 0, 10, ahead=[[patch] * 4] + 3 * [[patch] * 2])
    assert later.seconds == total([whole], [patch] * 2, 0, 15).seconds
