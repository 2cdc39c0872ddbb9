"""Keys and values of a prefix that pipelines keep from their first call on: what the tables of families do not show.

Both families are among those of ``test_images.py``, which has the oracle, and ``test_family_features.py``.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import plan_for
from patchpipe.parallel.refusals import check_elsewhere, check_prefix, check_special
from patchpipe.stage.keys.prefix import BlockCache, PrefixKeys
from tests import tiny
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

STREAM = {"patch_rows": (2, 2, 2), "warmup": 0}
OF_TEXT: dict[str, Any] = {"image": None}
UNGUIDED = {"negative_prompt": None, "true_cfg_scale": 1.0}
TWO = {"prompt": [tiny.PROMPT, tiny.PROMPT], "seeds": [3, 5], **UNGUIDED}
LENGTHS = {"prompt": [tiny.PROMPT, f"{tiny.OTHER_PROMPT} x"], **UNGUIDED}
SHARED = "kv-qwen"
QWEN, KLEIN = "QwenImage21Transformer2DModel", "Flux2Transformer2DModel"
CALLS: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
    ("kv-qwen", OF_TEXT, [{"pipefusion": 2}, {"pipefusion": 2, "cfg": 2}]),
    ("kv-qwen", TWO, [{"pipefusion": 2}, {"data": 2}]),
    ("kv-qwen", {}, [{"pipefusion": 2, "stage_blocks": (1.5, 2.5), "warmup": 1}]),
    ("flux2-kv", {}, [{"pipefusion": 2, "stage_blocks": (1.5, 2.5), "warmup": 1}]),
    ("flux2-kv", OF_TEXT, [{"pipefusion": 2}]),
]


def setup_module() -> None:
    quieten()


def paint(place: Place, name: str, changes: dict[str, Any], layout: dict[str, Any]) -> np.ndarray | None:
    pipe = tiny.pipeline(name)
    config = ParallelConfig(**{"split_batch": False, **layout})
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = {**tiny.call_arguments(name, height=96, steps=3), **changes}
    seeds = arguments.pop("seeds", [3])
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    output = pipe(**arguments, generator=generators if len(seeds) > 1 else generators[0], output_type="latent")
    assert pipe.patchpipe.last.materialisations == 1, "pictures before the latent leave it lazy"
    return None if output is None else np.asarray(tiny.painted(output))


def made(name: str, changes: dict[str, Any], **layout: Any) -> np.ndarray:
    found = run_threads(ParallelConfig(**layout).world_size, paint, name, changes, layout)
    return next(one for one in found if one is not None)


@pytest.mark.parametrize(("name", "changes", "layouts"), CALLS)
def test_the_first_call_is_whole_and_later_ones_stream_alike_on_any_number_of_stages(
    name: str, changes: dict[str, Any], layouts: list[dict[str, Any]]
) -> None:
    alone = made(name, changes, **STREAM)
    for layout in layouts:
        assert np.array_equal(made(name, changes, **{**STREAM, **layout}), alone), layout


@pytest.mark.parametrize("changes", [OF_TEXT, LENGTHS], ids=["text alone", "prompts of different lengths"])
def test_synchronous_steps_are_those_of_plain_diffusers(changes: dict[str, Any]) -> None:
    plain = tiny.pipeline("kv-qwen")
    arguments = {**tiny.call_arguments("kv-qwen", height=96, steps=3), **changes}
    expected = plain(**arguments, generator=torch.Generator().manual_seed(3), output_type="latent")
    found = made("kv-qwen", changes, pipefusion=2, warmup="all")
    assert np.array_equal(found, np.asarray(tiny.painted(expected)))


def test_halves_of_a_batch_keep_their_own() -> None:
    one, two = (made("kv-qwen", TWO, **STREAM, split_batch=True, pipefusion=stages) for stages in (1, 2))
    assert np.array_equal(one, two)


def test_ranks_may_share_matrices() -> None:
    found, expected = made(SHARED, {}, **STREAM, tensor=2), made(SHARED, {}, **STREAM)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout", "changes", "text"),
    [
        ("kv-qwen", {}, {"use_kv_cache": False}, "leave out use_kv_cache=False"),
        ("kv-qwen", STREAM, LENGTHS, "with prompts of different lengths where patches stream: paint them one after"),
        ("flux2-kv", {"warmup": "auto"}, {}, 'has not been tested with warmup="auto": use warmup=1'),
    ],
)
def test_a_request_is_refused_before_any_work(
    name: str, layout: dict[str, Any], changes: dict[str, Any], text: str
) -> None:
    pipe = patchpipe.parallelize(tiny.pipeline(name), ParallelConfig(**layout))
    with pytest.raises(ValueError, match=text):
        pipe(**{**tiny.call_arguments(name, height=96), **changes}, output_type="latent")
    assert not pipe.patchpipe.last.touched


def shared(place: Place, changes: dict[str, Any], layout: dict[str, Any]) -> str:
    pipe, config = tiny.pipeline("flux2-kv"), ParallelConfig(**layout)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    try:
        pipe(**{**tiny.call_arguments("flux2-kv", steps=2), **changes}, output_type="latent")
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("method", ["ulysses", "ring"])
def test_ranks_that_share_patches_are_refused_where_there_is_a_prefix(method: str) -> None:
    text = f"has not been tested with {method}=2: use pipefusion=2"
    for told in run_threads(2, shared, {}, {method: 2}):
        assert text in told
    assert run_threads(2, shared, OF_TEXT, {method: 2}) == ["", ""]
    with pytest.raises(ValueError, match=text):
        check_special(plan_for(QWEN), ParallelConfig(**{method: 2}))


@pytest.mark.parametrize("options", [{"compile": True}, {"distrifusion": 2}])
def test_so_is_what_is_not_tested_without_one(options: dict[str, Any]) -> None:
    [name] = options
    for call in ({"kv_cache_mode": "extract"}, {}):
        with (
            pytest.raises(ValueError, match=f"first step, which has not been tested with {name}=")
            if call
            else nullcontext()
        ):
            check_prefix(plan_for(KLEIN), ParallelConfig(**options), call, streams=True)


@pytest.mark.parametrize("model", [QWEN, KLEIN])
def test_a_request_cannot_go_on_where_its_first_call_was_not_made(model: str) -> None:
    with pytest.raises(ValueError, match=f"{model} keeps keys and values of its first step, so its requests cannot"):
        check_elsewhere(plan_for(model), {"kv_cache_mode": "cached"})
    check_elsewhere(plan_for(KLEIN), {})


def test_entries_of_a_batch_are_put_one_by_one_and_read_together() -> None:
    keys, rows = PrefixKeys(), torch.randn(2, 3, 1, 4)
    with pytest.raises(RuntimeError, match="no call made them"):
        keys.of(None)
    for at in range(2):
        BlockCache(keys, (at, at + 1, 2), apart=False).store(rows[at : at + 1], -rows[at : at + 1])
    assert torch.equal(keys.of(None)[0], rows)
    assert torch.equal(BlockCache(keys, (1, 2, 2), apart=False).get()[1], -rows[1:])
    assert BlockCache(keys, None, apart=True).get()[0].shape == (2, 0, 1, 4)
    assert keys.bytes == 2 * rows.nbytes
