"""Every family that makes clips against plain diffusers and the naive oracle: two rows for each tiny pipeline.

All layouts of two ranks stream in one go: what is special to a family is how its rows are cut, which all methods do
alike. That synchronous steps are bit-equal is seen on pipelines read from disk. Wan and LTX-Video, which came first,
are in ``test_parallel.py``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from tests import parity, tiny, tiny_video
from tests.nccl_rules import over
from tests.ranks import Place
from tests.threads import run_threads

NAMES = tuple(tiny_video.BUILD)
SYNCHRONOUS, STREAM = {"warmup": "all"}, {"patches": 2, "warmup": 1, "split_batch": False}
TWO: list[dict[str, int]] = [{degree: 2} for degree in ("pipefusion", "cfg", "ulysses", "ring")]
FOUR: list[dict[str, int]] = [{"pipefusion": 4}]


@pytest.mark.parametrize("name", NAMES)
def test_every_family_streams_as_the_oracle_does(name: str) -> None:
    """Patches of two and three frames; the number of ranks and the method never show."""
    with over("nccl"):
        errors = parity.differences(name, TWO, [STREAM], run=run_threads)
        errors |= parity.differences(name, FOUR, [STREAM], run=run_threads)
    assert max(errors.values()) <= parity.tolerance(name), errors
    plain, stale = (parity.expected(name, json.dumps(each), "{}") for each in (SYNCHRONOUS, STREAM))
    assert parity.relative(stale, plain) > 1e-3, "staleness moves nothing: nothing was tested"


def from_disk(place: Place, folder: Path, name: str, expected: np.ndarray) -> None:
    config = ParallelConfig(pipefusion=2, warmup="all")
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), torch_dtype=torch.float32)
    made = parity.call_pipeline(pipe, tiny.call_arguments(name))
    assert any(parameter.is_meta for parameter in pipe.transformer.parameters()), "each rank reads its own blocks"
    assert place.rank != 0 or np.array_equal(tiny.painted(made).numpy(), expected)


@pytest.mark.parametrize("name", NAMES)
def test_every_family_from_disk_is_bit_equal_where_all_steps_are_synchronous(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / name)
    plain: Any = type(tiny.pipeline(name)).from_pretrained(folder, torch_dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    for parameter in plain.transformer.parameters():  # in a mapped file they lie where kernels may round otherwise
        parameter.data = parameter.data.clone()
    expected = tiny.painted(parity.call_pipeline(plain, tiny.call_arguments(name))).numpy()
    run_threads(2, from_disk, folder, name, expected)
