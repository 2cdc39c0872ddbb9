"""Modular pipelines of diffusers: blocks and a state in place of a pipeline's own code, run as they are."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.hooks import LayerSkipConfig

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.lazy.latent import PatchTensor
from patchpipe.loading.choice import ORIGINAL
from tests import tiny
from tests.oracle import naive_pipefusion
from tests.parity import ROUNDED, TOLERANCE, relative
from tests.ranks import Place, quieten
from tests.test_pipelines import attach, mask, picture
from tests.threads import run_threads

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


@pytest.mark.some(of=2)
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


STREAM: dict[str, Any] = {"patch_rows": (1, 3), "warmup": 1, "split_batch": False}


def latents(place: Place, name: str, **options: Any) -> tuple[Any, Any]:
    """The denoised latents, which a pipeline that ends before it decodes gives."""
    pipe = attach(made(name), place, **options)
    found = call(pipe, name, output="latents")
    return found, pipe.patchpipe.last


def rows(name: str) -> dict[str, Any]:
    return STREAM | ({"patch_rows": (2, 3)} if name == "wan" else {})


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


GUIDERS: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {"guidance_rescale": 0.5, "start": 0.3, "stop": 0.8},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5},
    "TangentialClassifierFreeGuidance": {},
}


def guided(place: Place, kind: str, **options: Any) -> Any:
    pipe = made("wan")
    pipe.update_components(guider=getattr(diffusers, kind)(**GUIDERS[kind]))
    return call(attach(pipe, place, **options), "wan", output="latents")


@pytest.mark.parametrize("kind", GUIDERS)
def test_guiders_that_combine_predictions(kind: str) -> None:
    plain = made("wan")
    plain.update_components(guider=getattr(diffusers, kind)(**GUIDERS[kind]))
    exact = call(plain, "wan", output="latents")
    assert not torch.equal(exact, call(made("wan"), "wan", output="latents"))
    assert torch.equal(run_threads(2, guided, kind)[0], exact)
    alone, found = (run_threads(ranks, partial(guided, **rows("wan")), kind)[0] for ranks in (1, 2))
    assert torch.equal(found, alone)
    assert not torch.equal(found, exact)


SKIPS: dict[str, Callable[[], Any]] = {
    "blocks": lambda: diffusers.SkipLayerGuidance(
        guidance_scale=3.0, skip_layer_config=LayerSkipConfig([1, 2]), skip_layer_guidance_stop=0.8
    ),
    "a block of a worse copy": lambda: diffusers.AutoGuidance(3.0, auto_guidance_config=LayerSkipConfig([3])),
    "feed-forwards": lambda: diffusers.SkipLayerGuidance(
        guidance_scale=3.0, skip_layer_config=LayerSkipConfig([2], skip_attention=False), skip_layer_guidance_stop=0.8
    ),
    "attention": lambda: diffusers.PerturbedAttentionGuidance(
        guidance_scale=3.0, perturbed_guidance_layers=[1, 2], perturbed_guidance_stop=0.8
    ),
}
SKIPPED = [
    *((name, skips) for name in ("wan", "ltx") for skips in SKIPS if skips != "attention"),
    *((name, "attention") for name in ("qwen", "zimage")),
]


def skipping(name: str, skips: str) -> Any:
    pipe = made(name)
    pipe.update_components(guider=SKIPS[skips]())
    return pipe


def skipped(place: Place, name: str, skips: str, **options: Any) -> tuple[Any, Any]:
    pipe = attach(skipping(name, skips), place, **options)
    return call(pipe, name, output="latents"), pipe.patchpipe.last


@pytest.mark.parametrize(("name", "skips"), SKIPPED)
def test_guiders_that_leave_layers_out(name: str, skips: str) -> None:
    """A branch of its own: bit-equal to diffusers where every step is synchronous, else to one process."""
    plain = skipping(name, skips)
    exact = call(plain, name, output="latents")
    without = made(name)
    assert not torch.equal(exact, call(without, name, output="latents")), "the guider changes nothing"
    for stages in (2, 4):
        assert torch.equal(run_threads(stages, skipped, name, skips)[0][0], exact)
    schedule = {"patches": 2, "warmup": 1, "split_batch": False}
    alone = run_threads(1, partial(skipped, **schedule), name, skips)[0][0]
    found, figures = run_threads(2, partial(skipped, **schedule), name, skips)[0]
    assert torch.equal(found, alone)
    assert not torch.equal(found, exact)
    branches = 2 if "copy" in skips else 3
    assert figures.steps_synchronous == branches
    assert figures.materialisations == 1


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("wan", {"ulysses": 2}),
        ("qwen", {"ulysses": 2}),
        ("qwen", {"ring": 2}),
        ("qwen", {"tensor": 2}),
        ("qwen", {"cfg": 2}),
    ],
    ids=str,
)
def test_other_methods_leave_the_same_layers_out(name: str, options: dict[str, int]) -> None:
    skips = "blocks" if name == "wan" else "attention"
    exact = call(skipping(name, skips), name, output="latents")
    found = run_threads(2, partial(skipped, pipefusion=1, **options), name, skips)[0][0]
    assert relative(found.numpy(), exact.numpy()) < (ROUNDED if name == "wan" else TOLERANCE)
    schedule = rows(name) | ({"patch_rows": (2, 2)} if name == "qwen" else {"patch_rows": (3, 2)})
    alone = run_threads(1, partial(skipped, **schedule), name, skips)[0][0]
    found = run_threads(2, partial(skipped, pipefusion=1, **schedule, **options), name, skips)[0][0]
    assert relative(found.numpy(), alone.numpy()) < (ROUNDED if name == "wan" else TOLERANCE)


def test_a_shared_block_without_attention_has_no_keys_to_share() -> None:
    schedule = {**STREAM, "patch_rows": (2, 2)}
    alone = run_threads(1, partial(skipped, **schedule), "qwen", "attention")[0][0]
    shared = {**schedule, "stage_blocks": (1.5, 2.5)}  # block 1 on both
    assert torch.equal(run_threads(2, partial(skipped, **shared), "qwen", "attention")[0][0], alone)


class Always(diffusers.PerturbedAttentionGuidance):
    """In every step, the first one too: the oracle counts calls."""

    def _is_slg_enabled(self) -> bool:
        return True


def test_perturbed_attention_is_that_of_the_oracle() -> None:
    def perturbed() -> Any:
        pipe = made("qwen")
        pipe.update_components(guider=Always(guidance_scale=3.0, perturbed_guidance_layers=[1, 2]))
        return pipe

    def paint(place: Place) -> Any:
        return call(attach(perturbed(), place, **STREAM), "qwen", output="latents")

    plain = perturbed()
    with naive_pipefusion(plain, STREAM["patch_rows"], 1, branches=3):
        expected = call(plain, "qwen", output="latents")
    assert relative(run_threads(2, paint)[0].numpy(), expected.numpy()) < TOLERANCE


def test_what_is_refused() -> None:
    config = ParallelConfig()
    blocks = diffusers.FluxAutoBlocks().init_pipeline()
    with pytest.raises(ValueError, match="FluxModularPipeline has no transformer: load its components first"):
        patchpipe.parallelize(blocks, config)
    pipe = made("wan")
    for skip, words in (
        (LayerSkipConfig([1], dropout=0.5), "SkipLayerGuidance drops at random"),
        (LayerSkipConfig([1], fqn="rope"), "leaves out layers of rope"),
    ):
        pipe.update_components(guider=diffusers.SkipLayerGuidance(skip_layer_config=skip))
        with pytest.raises(ValueError, match=words):
            patchpipe.parallelize(pipe, config)
    pipe.update_components(guider=SKIPS["blocks"]())
    with pytest.raises(ValueError, match="which compile=True would compile anew"):
        patchpipe.parallelize(pipe, ParallelConfig(compile=True))
    two_streams = skipping("qwen", "blocks")
    with pytest.raises(ValueError, match="diffusers then takes one for the other"):
        patchpipe.parallelize(two_streams, config)
    pipe.update_components(guider=diffusers.ClassifierFreeGuidance())
    patchpipe.parallelize(pipe, config)
    with pytest.raises(ValueError, match="previews of a WanModularPipeline"), pipe.patchpipe.preview(show=print):
        pass
    pipe.update_components(guider=diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[1]))
    with pytest.raises(ValueError, match="SmoothedEnergyGuidance changes layers"):
        call(pipe, "wan")


def test_a_second_branch_that_no_guider_asks_for_is_refused() -> None:
    def paint(place: Place) -> None:
        pipe = attach(made("flux"), place, pipefusion=1, cfg=2)
        with pytest.raises(ValueError, match="this request has one branch only"):
            call(pipe, "flux")

    run_threads(2, paint)
