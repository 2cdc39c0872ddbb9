"""IP-Adapters: their attention sees the whole of their picture in every patch, and is what it is in plain diffusers."""

from __future__ import annotations

import inspect
from functools import partial
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.config import PASSES
from patchpipe.models.adapters import processors_of
from patchpipe.recipes.checks import check_recipes
from tests import tiny
from tests.parallel.test_displaced import naive_distrifusion
from tests.pipeline.test_pipelines import arguments, attach, layout, picture
from tests.support.oracle import naive_pipefusion
from tests.support.parity import ROUNDED, TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import ip_adapters

# By title: the tiny pipeline, the class that is called, how many adapters there are, and the call's own arguments.
CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "FLUX": ("flux", "", 1, {}),
    "FLUX, two adapters and pictures": ("flux", "", 2, {"num_images_per_prompt": 2}),
    "FLUX without true guidance": ("flux", "", 1, {"true_cfg_scale": 1.0}),
    "FLUX image to image": ("flux", "FluxImg2ImgPipeline", 1, {}),
    "SD3": ("sd3", "", 1, {}),
    "SD3.5": ("sd35", "", 1, {}),
    "SD3.5, three pictures": ("sd35", "", 1, {"num_images_per_prompt": 3}),
    "SD3.5, skip-layer guidance": (
        "sd35", "", 1, {"skip_guidance_layers": [0, 3], "skip_layer_guidance_stop": 0.9},
    ),
    "SD3 image to image": ("sd3-16", "StableDiffusion3Img2ImgPipeline", 1, {}),
    "Chroma": ("chroma", "", 1, {}),
}  # fmt: skip
STREAM: dict[str, Any] = {"patch_rows": (1, 3), "warmup": 1, "forecast": False}


def setup_module() -> None:
    quieten()


def made(title: str, dtype: torch.dtype = torch.float64, adapters: int | None = None) -> Any:
    name, kind, several, _ = CASES[title]
    pipe = tiny.pipeline(name, dtype=dtype)
    if kind:
        pipe = getattr(diffusers, kind).from_pipe(pipe, torch_dtype=dtype)
        pipe.set_progress_bar_config(disable=True)
    if several if adapters is None else adapters:
        ip_adapters.load(pipe, several)
    return pipe


def call_of(pipe: Any, title: str, seed: int = 5, **changes: Any) -> dict[str, Any]:
    """The arguments of a call, with pictures drawn from a seed."""
    name, _, adapters, own = CASES[title]
    known = inspect.signature(type(pipe).__call__).parameters
    wanted = arguments(name, type(pipe)) | own
    wanted["ip_adapter_image_embeds"] = ip_adapters.pictures(pipe, adapters, seed)
    if "negative_ip_adapter_image_embeds" in known:
        wanted["negative_ip_adapter_image_embeds"] = ip_adapters.pictures(pipe, adapters, seed + 1)
    wanted |= {"generator": torch.Generator().manual_seed(0), "output_type": "latent"} | changes
    return {key: value for key, value in wanted.items() if value is not None}


def latents(pipe: Any, title: str, seed: int = 5, **changes: Any) -> np.ndarray | None:
    output = pipe(**call_of(pipe, title, seed, **changes))
    return None if output is None else output.images.numpy()


def painted(place: Place, title: str, **options: Any) -> tuple[np.ndarray | None, Any]:
    pipe = attach(made(title), place, **{"split_batch": False, **options})
    return latents(pipe, title), pipe.patchpipe.last


@pytest.mark.some(of=5)
@pytest.mark.parametrize("title", CASES)
def test_an_ip_adapter_is_exact_and_streams_as_it_should(title: str) -> None:
    """Bit-equal to diffusers where every step is synchronous; where patches stream, as one process and the oracle."""
    plain = made(title)
    exact = latents(plain, title)
    assert relative(exact, latents(plain, title, seed=9)) > TOLERANCE, "the picture changes nothing"
    alone = run_threads(1, partial(painted, **STREAM), title)[0][0]
    for stages in (2, 4):
        assert np.array_equal(run_threads(stages, painted, title)[0][0], exact)
        found, figures = run_threads(stages, partial(painted, **STREAM), title)[0]
        assert np.array_equal(found, alone)
        assert figures.materialisations == 1  # at the end
    given = arguments(CASES[title][0], type(plain)) | CASES[title][3]
    branches = 2 if given.get("true_cfg_scale", 1.0) > 1 or title == "Chroma" else 1
    with naive_pipefusion(plain, (1, 3), 1, branches=branches):
        assert relative(alone, latents(plain, title)) < TOLERANCE
    assert relative(alone, exact) > TOLERANCE


# Layouts that only reorder sums.
METHODS: tuple[dict[str, Any], ...] = (
    {"ulysses": 2}, {"ring": 2}, {"cfg": 2}, {"data": 2}, {"pipefusion": 2, "ulysses": 2},
    {"pipefusion": 2, "split_batch": True},
)  # fmt: skip
TWO_PICTURES = {"num_images_per_prompt": 2, "height": 160}  # ten rows of tokens


def painted_two(place: Place, title: str, **options: Any) -> np.ndarray | None:
    pipe = attach(made(title), place, **{"pipefusion": 1, "split_batch": False, **options})
    return latents(pipe, title, **TWO_PICTURES)


@pytest.mark.some(of=5, first=1)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("title", ["FLUX, two adapters and pictures", "SD3.5"])
def test_other_methods_see_the_same_picture(title: str, method: dict[str, Any]) -> None:
    """Synchronous as diffusers, and streaming as one process does."""
    ranks = int(np.prod([degree for degree in method.values() if degree is not True]))
    schedule = STREAM | {"patch_rows": (3, 3, 4)}
    exact = latents(made(title), title, **TWO_PICTURES)
    assert relative(run_threads(ranks, partial(painted_two, **method), title)[0], exact) < TOLERANCE
    alone = run_threads(1, partial(painted_two, **schedule), title)[0]
    assert relative(run_threads(ranks, partial(painted_two, **schedule, **method), title)[0], alone) < TOLERANCE


@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_distrifusion_sees_the_rows_of_others_a_step_late_and_the_whole_picture(title: str) -> None:
    exact, ranks = latents(made(title), title), partial(painted, pipefusion=1, distrifusion=2)
    assert relative(run_threads(2, ranks, title)[0][0], exact) < TOLERANCE
    late, plain = run_threads(2, partial(ranks, warmup=1, forecast=False), title)[0][0], made(title)
    with naive_distrifusion(plain, 2, 1, 4, 1 + (title == "FLUX")):
        assert relative(late, latents(plain, title)) < TOLERANCE
    assert relative(late, exact) > TOLERANCE


def together(place: Place, title: str) -> list[Any]:
    pipe = attach(made(title), place, split_batch=False, **STREAM)
    outputs = pipe.patchpipe.together([call_of(pipe, title, seed) for seed in (5, 9)])
    return [None if output is None else output.images.numpy() for output in outputs]


@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_requests_in_flight_together_each_see_their_own_picture(title: str) -> None:
    pipe = run_threads(1, lambda place: attach(made(title), place, split_batch=False, **STREAM))[0]
    for found, seed in zip(run_threads(2, together, title)[0], (5, 9), strict=True):
        assert np.array_equal(found, latents(pipe, title, seed))


# Beside one synchronous step.
SCHEDULES: dict[str, dict[str, Any]] = {
    "a block that two stages share": {"stage_blocks": (1.5, 2.5)},
    "text over two patches": {"text_patches": 2},
    "a warm-up that streams": {"warmup": "streamed", "patch_rows": (2, 2)},
    "a forecast": {"forecast": True, "warmup": 1},
    "weights that come and go": {"offload": OffloadConfig(resident=0.4, chunk=0.004, depth=3, gate="on")},
}


@pytest.mark.some(of=2)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_other_schedules_stream_as_they_should(title: str, schedule: str) -> None:
    options = STREAM | SCHEDULES[schedule]
    alone = {key: value for key, value in options.items() if key not in ("stage_blocks", "offload")}
    found = run_threads(2, partial(painted, **options), title)[0][0]
    assert np.array_equal(found, run_threads(1, partial(painted, **alone), title)[0][0])
    plain, streamed = made(title), PASSES[True] if options["warmup"] == "streamed" else ()
    told = {"streamed": streamed, "forecast": options["forecast"], "text_patches": options.get("text_patches", 1)}
    with naive_pipefusion(plain, options["patch_rows"], 0 if streamed else 1, branches=1 + (title == "FLUX"), **told):
        assert relative(found, latents(plain, title)) < (ROUNDED if options["forecast"] else TOLERANCE)


# ------------------------------------------------------------------------------------------------ before and after


def changed(pipe: Any, title: str) -> list[np.ndarray | None]:
    """What people do with an adapter, from loading it to taking it off again."""
    found = [latents(pipe, title, ip_adapter_image_embeds=None, negative_ip_adapter_image_embeds=None)]
    ip_adapters.load(pipe)
    found.append(latents(pipe, title))
    for scale in (0.3, 0.0, *([[0.2, 0.9]] if title == "FLUX" else ())):
        pipe.set_ip_adapter_scale(scale)
        found.append(latents(pipe, title))
    pipe.unload_ip_adapter()
    found.append(latents(pipe, title, ip_adapter_image_embeds=None, negative_ip_adapter_image_embeds=None))
    ip_adapters.load(pipe)
    pipe.set_ip_adapter_scale(0.3)
    found.append(latents(pipe, title))
    return found


def changed_on_ranks(place: Place, title: str, options: dict[str, Any]) -> list[np.ndarray | None]:
    pipe = attach(made(title, adapters=0), place, **options)
    return changed(pipe, title)


@pytest.mark.some(of=3)
@pytest.mark.parametrize("options", [{}, SCHEDULES["weights that come and go"]], ids=str)
@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_loaded_rescaled_and_taken_off_after_parallelize(title: str, options: dict[str, Any]) -> None:
    expected = changed(made(title, adapters=0), title)
    assert np.array_equal(expected[0], expected[-2])
    assert np.array_equal(expected[2], expected[-1])
    different = [relative(one, other) for one, other in pairwise(expected[:-2])]
    assert min(different) > TOLERANCE
    for found, right in zip(run_threads(2, changed_on_ranks, title, options)[0], expected, strict=True):
        assert np.array_equal(found, right)


def rescaled(place: Place, title: str, scales: tuple[float, ...], plain: bool) -> Any:
    pipe = made(title) if plain else attach(made(title), place, **STREAM)

    def rescale(given: Any, step: int, _time: Any, _tensors: Any) -> dict[str, Any]:
        given.set_ip_adapter_scale(scales[min(step, len(scales) - 1)])
        return {}

    if not plain:
        return latents(pipe, title, callback_on_step_end=rescale)
    with naive_pipefusion(pipe, (1, 3), 1, branches=1 + (title == "FLUX")):
        return latents(pipe, title, callback_on_step_end=rescale)


@pytest.mark.parametrize(("title", "scales"), [("FLUX", (0.5, 0.0, 0.2)), ("SD3.5", (0.5, 0.1))], ids=str)
def test_another_strength_in_a_callback_holds_from_the_next_step_on(title: str, scales: tuple[float, ...]) -> None:
    expected = rescaled(Place(0, 1, None), title, scales, plain=True)
    assert relative(run_threads(2, rescaled, title, scales, False)[0], expected) < TOLERANCE
    assert relative(expected, run_threads(1, partial(painted, **STREAM), title)[0][0]) > TOLERANCE


def switched(place: Place) -> Any:
    pipe = attach(made("SD3.5"), place, split_batch=False, **STREAM)
    for work, error, text in (
        (lambda: pipe.set_ip_adapter_scale(0.0), ValueError, "set_ip_adapter_scale would switch .* use a small scale"),
        (pipe.unload_ip_adapter, RuntimeError, "unload_ip_adapter would change the request under way"),
    ):

        def off(_pipe: Any, step: int, _time: Any, _tensors: Any, work: Any = work) -> dict[str, Any]:
            if step == 1:
                work()
            return {}

        with pytest.raises(error, match=text):
            latents(pipe, "SD3.5", callback_on_step_end=off)
    return latents(pipe, "SD3.5")


def test_what_would_lose_keys_and_values_in_a_callback_is_refused_and_changes_nothing() -> None:
    expected = run_threads(1, partial(painted, **STREAM), "SD3.5")[0][0]
    assert np.array_equal(run_threads(2, switched)[0], expected)


def on_one_rank(place: Place) -> Any:
    pipe = attach(made("SD3.5"), place)
    if place.rank == 1:
        pipe.set_ip_adapter_scale(0.25)
    with pytest.raises(ValueError, match=r"IP-Adapter is SD3IPAdapter.* at 0\.5 on rank 0 but .* at 0\.25 on rank 1"):
        latents(pipe, "SD3.5")
    pipe.set_ip_adapter_scale(0.5)
    return latents(pipe, "SD3.5")


def test_another_strength_on_one_rank_is_one_error_on_all_ranks() -> None:
    assert np.array_equal(run_threads(2, on_one_rank)[0], latents(made("SD3.5"), "SD3.5"))


# ------------------------------------------------------------------------------------------------ disk and pictures


def from_disk(place: Place, title: str, folder: Path, read: Barrier) -> Any:
    config = layout(place)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), dtype="fp32")
    read.wait()  # models are made without weights by a switch that ranks in threads share
    ip_adapters.load(pipe)
    processors = processors_of(pipe.transformer).values()
    absent = sum(next(processor.parameters()).is_meta for processor in processors)
    found = latents(pipe, title)
    pipe.unload_ip_adapter()
    plain = latents(pipe, title, ip_adapter_image_embeds=None, negative_ip_adapter_image_embeds=None)
    return found, plain, (absent, len(processors))


@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_a_rank_that_has_only_its_own_blocks_keeps_only_their_processors(title: str, tmp_path: Path) -> None:
    tiny.save(CASES[title][0], tmp_path)
    pipe = made(title, torch.float32)
    with_picture = latents(pipe, title)
    pipe.unload_ip_adapter()
    without = latents(pipe, title, ip_adapter_image_embeds=None, negative_ip_adapter_image_embeds=None)
    ranks = run_threads(2, from_disk, title, tmp_path, Barrier(2))
    assert np.array_equal(ranks[0][0], with_picture)
    assert np.array_equal(ranks[0][1], without)
    assert [rank[2] for rank in ranks] == {"FLUX": [(0, 2), (2, 2)], "SD3.5": [(2, 6), (4, 6)]}[title]


def seeing(title: str) -> Any:
    """A pipeline that can look at a picture itself."""
    pipe = made(title, torch.float32, adapters=0)
    sizes = {"hidden_size": ip_adapters.CHANNELS, "intermediate_size": 16, "num_hidden_layers": 2, "image_size": 32,
             "num_attention_heads": 2, "patch_size": 16}  # fmt: skip
    with tiny._BUILDING:
        torch.manual_seed(2)
        if title == "FLUX":
            encoder: Any = CLIPVisionModelWithProjection(CLIPVisionConfig(projection_dim=ip_adapters.CHANNELS, **sizes))
            extractor: Any = CLIPImageProcessor(size=32, crop_size=32)
        else:
            encoder = SiglipVisionModel(SiglipVisionConfig(**sizes))
            extractor = SiglipImageProcessor(size={"height": 32, "width": 32})
    pipe.register_modules(image_encoder=encoder.eval().requires_grad_(False), feature_extractor=extractor)
    ip_adapters.load(pipe)
    return pipe


def looked_at(pipe: Any, title: str, shade: int = 0) -> Any:
    given = {"ip_adapter_image": picture(shade), "ip_adapter_image_embeds": None}
    return latents(pipe, title, negative_ip_adapter_image_embeds=None, **given)


def looked_at_on_ranks(place: Place, title: str) -> Any:
    return looked_at(attach(seeing(title), place), title)


@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_a_picture_is_looked_at_by_the_pipeline(title: str) -> None:
    expected = looked_at(seeing(title), title)
    assert np.array_equal(run_threads(2, looked_at_on_ranks, title)[0], expected)
    assert not np.array_equal(expected, looked_at(seeing(title), title, shade=1))


# ------------------------------------------------------------------------------------------------ refused


@pytest.mark.parametrize("title", ["FLUX", "SD3.5"])
def test_split_matrices_and_compiled_blocks_are_refused_by_name(title: str) -> None:
    """Before anything begins, or at the next call where the adapter came later; without it the pipeline works."""
    for options in ({"compile": True}, {"tensor": 2}):
        with pytest.raises(ValueError, match=r"^IP-Adapter attends .* use tensor=1 and compile=False"):
            check_recipes(made(title), ParallelConfig(**options))  # type: ignore[arg-type]
    run_threads(2, refused_later, title)


def refused_later(place: Place, title: str) -> None:
    pipe = attach(made(title, adapters=0), place, pipefusion=1, tensor=2)
    none = {"ip_adapter_image_embeds": None, "negative_ip_adapter_image_embeds": None}
    before = latents(pipe, title, **none)
    ip_adapters.load(pipe)
    with pytest.raises(ValueError, match=r"IP-Adapter attends .* tensor 2 .*: use tensor=1 and compile=False"):
        latents(pipe, title)
    pipe.unload_ip_adapter()
    after = latents(pipe, title, **none)
    assert place.rank > 0 or np.array_equal(after, before)


def test_pictures_that_do_not_go_with_the_batch_are_refused() -> None:
    """Plain diffusers would lay the pictures of several entries side by side, and give each entry some of them."""
    pipe = patchpipe.parallelize(made("SD3.5"), ParallelConfig())
    given = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.9, "num_images_per_prompt": 2}
    with pytest.raises(ValueError, match=r"pictures for 4 entries in a call of 2: give one for each"):
        latents(pipe, "SD3.5", **given)
