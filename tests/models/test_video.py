"""Every family that makes clips against plain diffusers and the naive oracle: two rows for each tiny pipeline.

All layouts of two ranks stream in one go: what is special to a family is how its rows are cut, which all methods do
alike. That synchronous steps are bit-equal is seen on pipelines read from disk. Wan and LTX-Video, which came first,
are in ``test_parallel.py``.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.models.refused import REFUSED
from patchpipe.pipeline.apply import fit
from patchpipe.stage.attention import with_rows, without_rows
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Cutter
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place
from tests.support.threads import run_threads
from tests.tiny import video as tiny_video
from tests.tiny import video_cross as tiny_video_cross

NAMES = tuple(tiny_video.BUILD)
SYNCHRONOUS, STREAM = {"warmup": "all"}, {"patches": 2, "warmup": 1, "split_batch": False}
TWO: list[dict[str, int]] = [{degree: 2} for degree in ("pipefusion", "cfg", "ulysses", "ring")]
FOUR: list[dict[str, int]] = [{"pipefusion": 4}]


@pytest.mark.some(of=8)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_streams_as_the_oracle_does(name: str) -> None:
    """Patches of two and three frames; the number of ranks and the method never show."""
    with over("nccl"):
        errors = parity.differences(name, TWO, [STREAM], run=run_threads)
        errors |= parity.differences(name, FOUR, [STREAM], run=run_threads)
    assert max(errors.values()) <= parity.tolerance(name), errors
    plain, stale = (parity.expected(name, json.dumps(each), "{}") for each in (SYNCHRONOUS, STREAM))
    assert parity.relative(stale, plain) > 1e-3, "staleness moves nothing: nothing was tested"


def given(pipe: Any) -> dict[str, Any]:
    """The parts that a folder lacks, or that nothing can read."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if part is None or isinstance(part, tiny_video_cross.Harmless)}


def from_disk(place: Place, folder: Path, name: str, parts: dict[str, Any], expected: np.ndarray) -> None:
    config = ParallelConfig(pipefusion=2, warmup="all")
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), torch_dtype=torch.float32, **parts)
    made = parity.call_pipeline(pipe, tiny.call_arguments(name))
    assert any(parameter.is_meta for parameter in pipe.transformer.parameters()), "each rank reads its own blocks"
    assert place.rank != 0 or np.array_equal(tiny.painted(made).numpy(), expected)


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_from_disk_is_bit_equal_where_all_steps_are_synchronous(name: str, tmp_path: Path) -> None:
    made = tiny.pipeline(name)
    assert type(made) is tiny.kind_of(name)
    made.save_pretrained(tmp_path / name)
    index = tmp_path / name / "model_index.json"
    known = {key: [None, None] if key in given(made) else value for key, value in json.loads(index.read_text()).items()}
    index.write_text(json.dumps(known))
    plain: Any = type(made).from_pretrained(tmp_path / name, torch_dtype=torch.float32, **given(made))
    plain.set_progress_bar_config(disable=True)
    for parameter in plain.transformer.parameters():  # in a mapped file they lie where kernels may round otherwise
        parameter.data = parameter.data.clone()
    expected = tiny.painted(parity.call_pipeline(plain, tiny.call_arguments(name))).numpy()
    run_threads(2, from_disk, tmp_path / name, name, given(made), expected)


# -- what is special in clips ----------------------------------------------------------------------


def cutter(rows: tuple[int, int], raster: Raster) -> Cutter:
    tokens = rows[0] * raster.tokens, rows[1] * raster.tokens
    return Cutter(Patch(0, rows, rows, tokens, raster.total), raster, {"image": raster.total})


def test_a_patch_is_told_how_many_of_the_first_tokens_it_has() -> None:
    by_frames = Raster(count=5, tokens=12, units=1)
    assert [cutter(rows, by_frames).leading(12) for rows in ((0, 2), (2, 5))] == [12, 0]
    assert [cutter(rows, by_frames).leading(40) for rows in ((0, 2), (2, 5))] == [24, 16]
    by_rows = Raster(count=4, tokens=15, units=2, outer=5)  # of five frames of four rows of three tokens
    assert [cutter(rows, by_rows).leading(12) for rows in ((0, 1), (1, 4))] == [3, 9]
    assert [cutter(rows, by_rows).leading(12 + 7) for rows in ((0, 1), (1, 4))] == [6, 13]


def test_rows_that_stand_in_for_none_come_and_go() -> None:
    rows = torch.randn(1, 2, 6, 4)
    assert torch.equal(without_rows(with_rows(rows, (0, 3, 7)), (0, 3, 7)), rows)
    assert with_rows(rows, (2,))[:, :, 2].abs().max() == 0


def test_every_section_of_a_clip_warms_up() -> None:
    pipe = tiny.pipeline("helios")
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    parity.call_pipeline(pipe, tiny.call_arguments("helios"))
    last, sections, branches = pipe.patchpipe.last, 2, 2
    assert (last.steps_synchronous, last.steps_patched) == (sections * branches, sections * branches * 2)
    patchpipe.restore(pipe)


def test_sound_comes_as_the_second_of_a_pair_or_not_at_all() -> None:
    pipe = tiny.pipeline("ltx2")
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    made = parity.call_pipeline(pipe, tiny.call_arguments("ltx2"))
    assert (made.frames.shape[2], made.audio.isfinite().all()) == (5, True)
    patchpipe.restore(pipe)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_class_that_is_not_carried_says_why(kind: str) -> None:
    assert hasattr(diffusers, kind)
    with pytest.raises(patchpipe.UnsupportedModel, match=re.escape(f"{kind} cannot be spread over devices")):
        plan_for(kind)


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        ("ltx2", {"distrifusion": 2}, "distrifusion=2 has not been tested with LTX2VideoTransformer3DModel"),
        ("mochi", {"compile": True}, "compile=True is not for MochiTransformer3DModel"),
    ],
)
def test_methods_that_nothing_tests_with_what_is_special_are_refused(name: str, options: Any, told: str) -> None:
    pipe = tiny.pipeline(name)
    with pytest.raises(ValueError, match=told):
        fit(pipe, [pipe.transformer], ParallelConfig(**options))
