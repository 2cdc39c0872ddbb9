"""Modular pipelines of diffusers: blocks and a state in place of a pipeline's own code, run as they are."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.lazy.latent import PatchTensor
from patchpipe.loading.choice import ORIGINAL
from tests import tiny
from tests.pipeline.test_pipelines import attach, mask, picture
from tests.support.oracle import naive_pipefusion
from tests.support.parity import ROUNDED, TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

BLOCKS = {"flux": "FluxAutoBlocks", "qwen": "QwenImageAutoBlocks", "wan": "WanBlocks"}
OTHERS = {
    "flux-kontext": "FluxKontextAutoBlocks",
    "flux2": "Flux2KleinAutoBlocks",
    "sd3": "StableDiffusion3AutoBlocks",
    "zimage": "ZImageAutoBlocks",
    "ernie": "ErnieImageAutoBlocks",
    "wan-a14b": "Wan22Blocks",
    "wan-i2v": "WanImage2VideoAutoBlocks",
    "ltx": "LTXAutoBlocks",
    "helios": "HeliosAutoBlocks",
}


def setup_module() -> None:
    quieten()


def made(name: str) -> Any:
    """A modular pipeline with the components of a tiny one."""
    parts = tiny.pipeline(name, dtype=torch.float64 if name in BLOCKS else torch.float32).components
    pipe = getattr(diffusers, {**BLOCKS, **OTHERS}[name])().init_pipeline()
    pipe.update_components(**{part: value for part, value in parts.items() if part in pipe.components})
    if "guider" in pipe.components:
        pipe.update_components(guider=pipe.guider.new(guidance_scale=3.0))
    for block in tree(pipe._blocks):
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
    return pipe


def tree(block: Any) -> list[Any]:
    return [block, *(each for part in block.sub_blocks.values() for each in tree(part))]


def arguments(pipe: Any, name: str, seed: int = 0) -> dict[str, Any]:
    """What of a tiny pipeline's arguments a modular one takes."""
    known = {each.name for each in pipe.blocks.inputs}
    wanted = {**tiny.call_arguments(name), "output_type": "np", "generator": torch.Generator().manual_seed(seed)}
    return {key: value for key, value in wanted.items() if key in known}


def call(pipe: Any, name: str, output: Any = "pictures", **changes: Any) -> Any:
    """The pictures or the clip, as an array unless ``output`` says otherwise."""
    wanted = next(each.name for each in pipe.blocks.outputs if each.name in ("images", "videos"))
    found = pipe(**{**arguments(pipe, name), **changes}, output=wanted if output == "pictures" else output)
    return np.asarray(found) if output == "pictures" and found is not None else found


def painted(place: Place, name: str, **options: Any) -> tuple[Any, Any]:
    pipe = attach(made(name), place, **options)
    return call(pipe, name), pipe.patchpipe.last


@pytest.mark.parametrize("name", BLOCKS)
def test_synchronous_is_exact(name: str) -> None:
    exact = call(made(name), name)
    for ranks in (1, 2):
        found = run_threads(ranks, painted, name)
        assert np.array_equal(found[0][0], exact)
        assert all(picture is None for picture, _ in found[1:])
        assert all(figures.stages == ranks and figures.steps_synchronous > 0 for _, figures in found)


def streamed(place: Place, name: str) -> list[Any]:
    pipe = attach(made(name), place)
    exact = call(pipe, name)
    patchpipe.restore(pipe)
    return [exact, call(attach(pipe, place, patches=2, warmup=1, split_batch=False), name)]


@pytest.mark.some(of=3)
@pytest.mark.parametrize("name", OTHERS)
def test_other_families_synchronous_and_streaming(name: str) -> None:
    exact = call(made(name), name)
    alone, (found, streaming) = run_threads(1, streamed, name)[0][1], run_threads(2, streamed, name)[0]
    assert np.array_equal(found, exact)
    assert np.array_equal(streaming, alone)
    assert not np.array_equal(streaming, exact)


CHANGES = {"a picture": {}, "inpainting": {"mask_image": mask()}}
TASKS = [("flux", "a picture"), ("qwen", "a picture"), ("qwen", "inpainting")]


@pytest.mark.parametrize(("name", "task"), TASKS)
def test_from_a_picture(name: str, task: str) -> None:
    given = {"image": picture(), "strength": 0.75, "output_type": "pil", **CHANGES[task]}

    def paint(place: Place) -> Any:
        return call(attach(made(name), place), name, **given)

    assert np.array_equal(run_threads(2, paint)[0], call(made(name), name, **given))


STREAM: dict[str, Any] = {"patch_rows": (1, 3), "warmup": 1, "split_batch": False, "forecast": False}


def latents(place: Place, name: str, **options: Any) -> tuple[Any, Any]:
    """The denoised latents, which a pipeline that ends before it decodes gives."""
    pipe = attach(made(name), place, **options)
    found = call(pipe, name, output="latents")
    return found, pipe.patchpipe.last


def rows(name: str) -> dict[str, Any]:
    return STREAM | ({"patch_rows": (2, 3)} if name == "wan" else {})


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", BLOCKS)
def test_patches_stream_as_in_one_process_and_as_the_oracle_has_it(name: str) -> None:
    schedule, plain = rows(name), made(name)
    exact = call(plain, name, output="latents")
    alone = run_threads(1, partial(latents, **schedule), name)[0][0]
    for ranks in (2, 4):
        found, figures = run_threads(ranks, partial(latents, **schedule), name)[0]
        assert torch.equal(found, alone)
        assert figures.materialisations == 1, figures.reasons
    with naive_pipefusion(plain, schedule["patch_rows"], 1, branches=1 if name == "flux" else 2):
        expected = call(plain, name, output="latents")
    assert relative(alone.numpy(), expected.numpy()) < (ROUNDED if name == "wan" else TOLERANCE)
    assert relative(alone.numpy(), exact.numpy()) > ROUNDED


METHODS = [
    *(("flux", method) for method in ("ulysses", "ring", "tensor")),
    *(("qwen", method) for method in ("ulysses", "ring", "tensor", "cfg")),
    *(("wan", method) for method in ("ulysses", "ring", "cfg")),
]


@pytest.mark.some
@pytest.mark.parametrize(("name", "method"), METHODS)
def test_other_methods(name: str, method: str) -> None:
    exact = call(made(name), name, output="latents")
    found = run_threads(2, partial(latents, pipefusion=1, **{method: 2}), name)[0][0]
    assert relative(found.numpy(), exact.numpy()) < (ROUNDED if name == "wan" else TOLERANCE)


def counted(place: Place, name: str, **options: Any) -> tuple[dict[str, int], Any]:
    """How often each text encoder of a rank ran, and what all ranks make of the text."""
    pipe, calls = made(name), {}
    for part, encoder in pipe.components.items():
        if part.startswith("text_encoder"):
            calls[part] = 0
            encoder.forward = partial(count, calls, part, encoder.forward)
    attach(pipe, place, output_rank=1, **options)
    return calls, call(pipe, name, output=["images", "prompt_embeds", "prompt"])


def count(calls: dict[str, int], part: str, forward: Any, *args: Any, **kwargs: Any) -> Any:
    calls[part] += 1
    return forward(*args, **kwargs)


@pytest.mark.parametrize("options", [{}, {"text_rank": 0}, {"text_rank": "spread"}], ids=str)
def test_text_is_encoded_once(options: dict[str, Any]) -> None:
    exact = call(made("flux"), "flux", output=["images", "prompt_embeds", "prompt"])
    ranks = run_threads(2, partial(counted, **options), "flux")
    assert {part: sum(calls[part] for calls, _ in ranks) for part in ranks[0][0]} == {
        "text_encoder": 1,
        "text_encoder_2": 1,
    }
    if options.get("text_rank") != "spread":
        assert sum(any(calls.values()) for calls, _ in ranks) == 1
    found = ranks[1][1]
    assert ranks[0][1] is None
    assert np.array_equal(found["images"], exact["images"])
    assert torch.equal(found["prompt_embeds"], exact["prompt_embeds"])
    assert found["prompt"] == exact["prompt"]


def of_a_folder(place: Place, folder: Path) -> tuple[Any, Any]:
    """A modular pipeline on the parts of a parallel one, of which a rank reads only its own."""
    config = ParallelConfig(pipefusion=2, warmup="all", timeout=20)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), dtype=torch.float32)
    modular = diffusers.FluxAutoBlocks().init_pipeline()
    modular.update_components(**pipe.components)
    return call(modular, "flux"), pipe(**arguments(modular, "flux"))


def test_parts_of_a_pipeline_from_disk_serve_a_modular_one(tmp_path: Path) -> None:
    pipe = tiny.pipeline("flux")
    pipe.save_pretrained(tmp_path / "ordinary")
    modular = diffusers.FluxAutoBlocks().init_pipeline()
    modular.update_components(**pipe.components)
    exact = call(modular, "flux")
    found = run_threads(2, of_a_folder, tmp_path / "ordinary")
    assert np.array_equal(found[0][0], exact)
    assert np.array_equal(found[0][1].images, exact)
    assert found[1] == (None, None)
    modular.save_pretrained(str(tmp_path / "modular"), overwrite_modular_index=True)
    with pytest.raises(ValueError, match=r"was saved as a modular pipeline, .*load_components\(\)"):
        patchpipe.from_pretrained(tmp_path / "modular", ParallelConfig())


def in_turn(place: Place) -> None:
    """A whole state, several outputs, a pipeline of fewer blocks on the same weights; then plain again."""
    plain, pipe = made("qwen"), made("qwen")
    exact = call(plain, "qwen")
    attach(pipe, place)
    for _ in range(2):
        state = call(pipe, "qwen", output=None)
        assert (state is None) == (place.rank != 0)
        if state is not None:
            assert np.array_equal(state.images, exact)
            assert all(type(value) is not PatchTensor for value in state.values.values())
    blocks = pipe.blocks
    blocks.sub_blocks.pop("text_encoder")
    other = blocks.init_pipeline()
    other.update_components(**{name: part for name, part in pipe.components.items() if name in other.components})
    assert other.patchpipe.group is pipe.patchpipe.group
    embeddings = plain(**arguments(plain, "qwen"), output=["prompt_embeds", "prompt_embeds_mask"])
    negative = {f"negative_{name}": value.clone() for name, value in embeddings.items()}
    given = {**arguments(other, "qwen"), **embeddings, **negative}
    expected = plain(**{**arguments(plain, "qwen"), "negative_prompt": tiny.PROMPT}, output="images")
    found = other(**given, output="images")
    assert found is None if place.rank else np.array_equal(found, expected)
    patchpipe.restore(other)
    for each in (pipe, other):
        assert not hasattr(each, "patchpipe")
    assert all(not hasattr(type(block), ORIGINAL) for block in tree(pipe._blocks))
    assert np.array_equal(call(pipe, "qwen"), exact)


def test_pipelines_of_blocks_are_served_in_turn_and_put_back() -> None:
    run_threads(2, in_turn)


def flown(place: Place) -> list[Any]:
    pipe = attach(made("qwen"), place, **STREAM)
    calls = [{**arguments(pipe, "qwen", seed), "prompt": prompt} for seed, prompt in enumerate(PROMPTS)]
    return pipe.patchpipe.together([{**each, "output": "images"} for each in calls])


PROMPTS = (tiny.PROMPT, tiny.OTHER_PROMPT)


def test_calls_fly_together() -> None:
    found = run_threads(2, flown)[0]

    def alone(place: Place, seed: int) -> Any:
        pipe = attach(made("qwen"), place, **STREAM)
        return pipe(**{**arguments(pipe, "qwen", seed), "prompt": PROMPTS[seed]}, output="images")

    for seed in range(2):
        assert np.array_equal(found[seed], run_threads(1, alone, seed)[0])


def test_what_is_refused() -> None:
    config = ParallelConfig()
    blocks = diffusers.FluxAutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match="FluxModularPipeline has no transformer: load its components first"):
        patchpipe.parallelize(blocks, config)
    pipe = patchpipe.parallelize(made("wan"), config)
    with pytest.raises(ValueError, match="previews of a WanModularPipeline"), pipe.patchpipe.preview(show=print):
        pass


def test_a_second_branch_that_no_guider_asks_for_is_refused() -> None:
    def paint(place: Place) -> None:
        pipe = attach(made("flux"), place, pipefusion=1, cfg=2)
        with pytest.raises(ValueError, match="this request has one branch only"):
            call(pipe, "flux")

    run_threads(2, paint)
