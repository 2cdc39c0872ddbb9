"""Previews: what a picture looks like on the way, without the pipe waiting for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.pipeline.preview import Preview
from tests import tiny
from tests.support.ranks import Place
from tests.support.threads import run_threads

pytestmark = pytest.mark.timeout(100, method="thread")
STEPS, EVERY = 8, 2
TWO = {"pipefusion": 2, "patches": 2}


def paint(place: Place, name: str, layout: dict[str, Any], every: int | None) -> tuple[Any, list[Preview], int]:
    pipe = tiny.pipeline(name)
    config = ParallelConfig(timeout=30, **layout)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    call = {
        **tiny.call_arguments(name, steps=STEPS),
        "output_type": "np",
        "generator": torch.Generator().manual_seed(0),
    }
    seen: list[Preview] = []
    if every is None:
        output = pipe(**call)
    else:
        with pipe.patchpipe.preview(every=every, show=seen.append):
            output = pipe(**call)
    return output and np.asarray(output.images), seen, pipe.patchpipe.last.materialisations


@pytest.mark.some
@pytest.mark.parametrize("name", tiny.MODELS)
@pytest.mark.parametrize(
    "layout", [{"pipefusion": 2, "patches": 2}, {"pipefusion": 2, "patches": 2, "output_rank": 1}], ids=str
)
def test_previews_come_near_the_picture_and_change_nothing(name: str, layout: dict[str, Any]) -> None:
    where = layout.get("output_rank", 0)
    plain, _, gathered = run_threads(2, paint, name, layout, None)[where]
    ranks = run_threads(2, paint, name, layout, EVERY)
    picture, seen, again = ranks[where]
    assert np.array_equal(picture, plain)
    assert again == gathered
    assert ranks[1 - where][1] == []
    assert [preview.step for preview in seen] == [2, 4, 6]
    away = [float(np.abs(np.asarray(preview.images) - picture).mean()) for preview in seen]
    assert all(np.asarray(preview.images).shape == picture.shape for preview in seen)
    assert away[-1] < away[0]


@pytest.mark.parametrize("every", [0, -1, 1.5, True])
def test_previews_need_a_number_of_steps(every: Any) -> None:
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig())
    with pytest.raises(ValueError, match="must be a number of steps"), pipe.patchpipe.preview(every, show=print):
        pass
