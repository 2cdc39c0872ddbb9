"""Every family that makes pictures against plain diffusers and the naive oracle: a row for each tiny pipeline.

What is special to a family is how its rows are cut, which all methods do alike: so each method runs once, where patches
stream after a warm-up step, and what is synchronous throughout comes from disk. FLUX, SD3, PixArt, Qwen-Image, Z-Image
and CogView4 are in ``test_parallel.py``.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import GlmImageTransformer2DModel
from diffusers.models.transformers.transformer_glm_image import GlmImageKVCache
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.lazy import latent
from patchpipe.models import plan_for, supported
from patchpipe.parallel.refusals import check_special
from patchpipe.stage.balance import check_stages
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place
from tests.support.threads import run_threads
from tests.tiny import images as tiny_images

NAMES = tuple(tiny_images.BUILD)
SYNCHRONOUS, STREAM = {"warmup": "all"}, {"patches": 3, "warmup": 1, "split_batch": False}
TWO: list[dict[str, int]] = [{degree: 2} for degree in ("pipefusion", "cfg", "ulysses", "ring")]
FOUR_STAGES = (
    "qwen-edit",
    "fibo",
    "hidream",
    "hunyuan-dit",
    "sana",
    "ernie",
    "ideogram4",
)  # whose hops or rows are special
STEPS = {"num_inference_steps": 3}


@pytest.fixture(autouse=True)
def small_references(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen-Image-Edit enlarges what it is given to 1024 pixels."""
    for module in (pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus):
        monkeypatch.setattr(module, "calculate_dimensions", partial(_small, module.calculate_dimensions))


def _small(calculate: Callable[..., Any], _: int, ratio: float) -> Any:
    return calculate(64 * 64, ratio)


def layouts_of(name: str) -> list[dict[str, int]]:
    """What it is tested with where patches stream."""
    if name in tiny_images.UNCUT:
        return []
    without = {"ulysses", "ring"} if name in tiny_images.UNSHARED else set()
    without |= {"cfg"} if name in tiny_images.UNGUIDED else set()
    return [layout for layout in TWO if not without & set(layout)]


@pytest.mark.some(of=6)
@pytest.mark.parametrize("name", [name for name in NAMES if layouts_of(name)])
def test_every_family_paints_what_one_device_paints(name: str) -> None:
    with over("nccl"):
        errors = parity.differences(name, layouts_of(name), [STREAM], run=run_threads, **STEPS)
        if name in FOUR_STAGES:
            errors |= parity.differences(name, [{"pipefusion": 4}], [STREAM], run=run_threads, **STEPS)
    assert max(errors.values()) <= parity.tolerance(name), errors
    assert moved(name) > 1e-3, "staleness moves nothing: nothing was tested"


def moved(name: str) -> float:
    """How far the oracle of streaming patches is from plain diffusers."""
    plain, stale = (parity.expected(name, json.dumps(each), json.dumps(STEPS)) for each in (SYNCHRONOUS, STREAM))
    return parity.relative(stale, plain)


def from_disk(place: Place, folder: Path, name: str, lacking: dict[str, Any], expected: np.ndarray) -> None:
    config = ParallelConfig(pipefusion=2, warmup="all")
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), torch_dtype=torch.float32, **lacking)
    made = parity.call_pipeline(tiny_images.settled(pipe), tiny.call_arguments(name, steps=2))
    own = [parameter for parameter in pipe.transformer.parameters() if not parameter.is_meta]
    assert len(own) < len([*pipe.transformer.parameters()]), "each rank reads its own blocks"
    assert all(parameter.requires_grad for parameter in own), "as in plain diffusers; else torch rounds otherwise"
    assert place.rank != 0 or np.array_equal(np.asarray(tiny.painted(made)), expected)


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", NAMES)
def test_every_family_from_disk_is_bit_equal_where_all_steps_are_synchronous(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / name)
    index = json.loads((folder / "model_index.json").read_text())
    lacking = {part: None for part, held in index.items() if held == [None, None]} | tiny_images.GIVEN.get(name, dict)()
    plain: Any = tiny.kind_of(name).from_pretrained(folder, torch_dtype=torch.float32, **lacking)
    plain.set_progress_bar_config(disable=True)
    for parameter in plain.transformer.parameters():  # in a mapped file they lie where kernels may round otherwise
        parameter.data = parameter.data.clone()
    made = parity.call_pipeline(tiny_images.settled(plain), tiny.call_arguments(name, steps=2))
    run_threads(2, from_disk, folder, name, lacking, np.asarray(tiny.painted(made)))


# -- what is refused -----------------------------------------------------------------------------


def test_prompts_of_different_lengths_in_one_batch_are_refused_where_the_picture_begins_after_them() -> None:
    pipe = patchpipe.parallelize(tiny.pipeline("lumina2"), ParallelConfig())
    arguments = tiny.call_arguments("lumina2") | {"prompt": [tiny.PROMPT, tiny.OTHER_PROMPT], "negative_prompt": None}
    with pytest.raises(ValueError, match=r"these prompts have \[\d+, \d+\] tokens: paint prompts of different lengths"):
        pipe(**arguments, output_type="latent")


@pytest.mark.parametrize(
    ("model", "options", "text"),
    [
        ("SanaTransformer2DModel", {"ulysses": 2}, "rows meet in sums and convolutions instead of attention"),
        ("SanaTransformer2DModel", {"distrifusion": 2}, "use pipefusion, cfg or data"),
        ("SanaTransformer2DModel", {"pipefusion": 2, "share_blocks": True}, "cannot share a block"),
        ("ChromaTransformer2DModel", {"pipefusion": 2, "stage_blocks": (1.5, 2.5)}, "cannot share a block"),
        ("MochiTransformer3DModel", {"pipefusion": 2, "share_blocks": True}, "cannot share a block"),
    ],
)
def test_ways_of_sharing_that_a_model_does_not_bear_are_refused(model: str, options: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        check_stages(ParallelConfig(**options), 4, plan_for(model))


SPECIAL = ("Sana", "HunyuanDiT2D", "PRX", "Chroma", "BriaFibo", "HiDreamImage")
SPECIAL_CLASSES = [name for name in supported() if name.startswith(SPECIAL)]


@pytest.mark.parametrize("model", SPECIAL_CLASSES)
def test_methods_that_nothing_tests_with_what_is_special_are_refused(model: str) -> None:
    plan = plan_for(model)
    with pytest.raises(ValueError, match=f"has not been tested with {model}"):
        check_special(plan, ParallelConfig(distrifusion=2))


def test_sums_and_convolutions_are_not_compiled() -> None:
    with pytest.raises(ValueError, match="compile=True is not for SanaTransformer2DModel"):
        check_special(plan_for("SanaTransformer2DModel"), ParallelConfig(compile=True))


@pytest.mark.parametrize("name", tiny_images.REFERENCES)
def test_no_patch_waits_for_another_because_of_references(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assemble = latent._assemble

    def watched(tensor: latent.PatchTensor, dim: int, start: int, stop: int) -> torch.Tensor:
        node = tensor._value.node
        all_there = node is not None and not node.waiting
        assert all_there or start == tensor.bounds[-2], "only the last patch's rows, which the references follow"
        return assemble(tensor, dim, start, stop)

    monkeypatch.setattr(latent, "_assemble", watched)
    parity.compare(name, [{"pipefusion": 2}], [STREAM], run=run_threads, **STEPS)


def test_references_are_refused_by_what_nothing_tests_with_them() -> None:
    run_threads(2, refuses_references)


def refuses_references(place: Place) -> None:
    config, pipe = ParallelConfig(distrifusion=2), tiny.pipeline("flux-kontext")
    patchpipe.parallelize(pipe, config, group=place.join(config))
    with pytest.raises(ValueError, match="with pictures joined to the latent as references has not been tested"):
        parity.call_pipeline(pipe, tiny.call_arguments("flux-kontext", steps=2))


def test_references_are_refused_where_nothing_tests_them() -> None:
    ids = torch.tensor([[0, row, column] for row in range(2) for column in range(3)] + [[1, 0, 0], [1, 0, 1]])
    call = {"img_ids": ids, "hidden_states": torch.zeros(1, 8, 4)}
    raster = plan_for("FluxTransformer2DModel").grid.rows(torch.nn.Module(), call["hidden_states"].shape, call)
    assert (raster.count, raster.tokens, raster.joined) == (2, 3, 2)
    with pytest.raises(ValueError, match="a picture of 2 × 3 tokens is followed by 2 others"):
        plan_for("OvisImageTransformer2DModel").grid.rows(torch.nn.Module(), call["hidden_states"].shape, call)


def test_a_cache_of_keys_and_values_of_the_model_itself_is_refused_while_it_is_in_use() -> None:
    plan, caches = plan_for("GlmImageTransformer2DModel"), GlmImageKVCache(2)
    signature = inspect.signature(GlmImageTransformer2DModel.forward)
    call = {"hidden_states": torch.zeros(1, 4, 8, 8), "kv_caches": caches}
    assert plan.bind(signature, (), _filled(signature, call))["kv_caches"] is caches
    caches.set_mode("read")
    with pytest.raises(ValueError, match="was called with kv_caches"):
        plan.bind(signature, (), _filled(signature, call))


def _filled(signature: inspect.Signature, given: dict[str, Any]) -> dict[str, Any]:
    """A call with ``None`` for what it must be given and is not."""
    needed = [name for name, each in signature.parameters.items() if each.default is each.empty and name != "self"]
    return dict.fromkeys(needed) | given
