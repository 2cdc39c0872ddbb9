"""Other pipelines on the weights of a parallel one: made before or after, in every way diffusers has."""

from __future__ import annotations

import copy
import gc
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxImg2ImgPipeline,
    FluxPipeline,
)
from PIL import Image

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.pipeline.relatives import _USERS
from tests import tiny
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

KINDS = {
    "flux": ("FluxImg2ImgPipeline", "FluxInpaintPipeline"),
    "sd3-16": ("StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "qwen": ("QwenImageImg2ImgPipeline", "QwenImageInpaintPipeline"),
}


def setup_module() -> None:
    quieten()


def picture(seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 48, 3), dtype=np.uint8))


def mask() -> Image.Image:
    return Image.fromarray(np.where(np.arange(64 * 48).reshape(64, 48) % 7 > 3, 255, 0).astype(np.uint8))


def arguments(name: str, kind: type, **changes: Any) -> dict[str, Any]:
    """What suits a tiny pipeline of a class, pictures included."""
    known = inspect.signature(kind.__call__).parameters
    wanted = tiny.call_arguments(name, steps=3) | {"image": picture(), "mask_image": mask(), "strength": 0.75} | changes
    return {key: value for key, value in wanted.items() if key in known}


def paint(pipe: Any, name: str, **changes: Any) -> np.ndarray | None:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipe(**arguments(name, type(pipe), **changes), generator=generator, output_type="np")
    return None if output is None else output.images


def layout(place: Place, **options: Any) -> ParallelConfig:
    return ParallelConfig(**{"pipefusion": place.world_size, "warmup": "all", "timeout": 20.0, **options})


def attach(pipe: Any, place: Place, **options: Any) -> Any:
    config = layout(place, **options)
    return patchpipe.parallelize(pipe, config, group=place.join(config))


def same(place: Place, found: np.ndarray | None, expected: np.ndarray) -> bool:
    """Whether the output rank has the picture and the others have none."""
    return np.array_equal(found, expected) if place.rank == 0 else found is None


def of_components(kind: type) -> Callable[[Any], Any]:
    def make(pipe: Any) -> Any:
        return kind(**{name: part for name, part in pipe.components.items() if name in known})

    known = inspect.signature(kind).parameters
    return make


def in_turn(place: Place, name: str, expected: dict[str, np.ndarray]) -> None:
    """Every class made before and after, and the pipeline itself, served in turn; then all of them plain again."""
    pipe = tiny.pipeline(name)
    classes = [getattr(diffusers, kind) for kind in KINDS[name]]
    before = [kind.from_pipe(pipe) for kind in classes]
    attach(pipe, place)
    after = [make(pipe) for kind in classes for make in (kind.from_pipe, of_components(kind))]
    for each in [pipe, *before, *after, pipe]:
        assert same(place, paint(each, name), expected[type(each).__name__]), type(each).__name__
        assert each.patchpipe.last.stages == place.world_size
        assert each.patchpipe.last.steps_synchronous > 0
    patchpipe.restore(after[0])
    for each in [pipe, *before, *after]:
        assert not hasattr(each, "patchpipe")
        assert getattr(diffusers, type(each).__name__) is type(each)
        assert "encode_prompt" not in vars(each)
    assert np.array_equal(paint(before[0], name), expected[KINDS[name][0]])


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", KINDS)
def test_pipelines_on_the_same_weights_are_served_in_turn(name: str) -> None:
    plain, others = tiny.pipeline(name), users()  # what other tests have left parallel
    expected = {type(plain).__name__: paint(plain, name)}
    for kind in KINDS[name]:
        expected[kind] = paint(getattr(diffusers, kind).from_pipe(plain), name)
    for world_size in (1, 2):
        run_threads(world_size, in_turn, name, expected)
    assert users() == others


def users() -> int:
    """Parallel pipelines for which setting an attribute is watched."""
    return getattr(DiffusionPipeline.__setattr__, _USERS, 0)


def streaming(place: Place) -> np.ndarray | None:
    pipe = attach(tiny.pipeline("flux"), place, patches=2, warmup=1, split_batch=False)
    return paint(FluxImg2ImgPipeline.from_pipe(pipe), "flux")


def test_patches_stream_for_them_too() -> None:
    alone, together = run_threads(1, streaming)[0], run_threads(2, streaming)[0]
    exact = paint(FluxImg2ImgPipeline.from_pipe(tiny.pipeline("flux")), "flux")
    assert np.array_equal(alone, together)
    assert not np.array_equal(alone, exact)


def by_auto_pipelines(place: Place, expected: dict[str, np.ndarray]) -> None:
    pipe = attach(tiny.pipeline("flux"), place)
    for auto in (AutoPipelineForImage2Image, AutoPipelineForInpainting, AutoPipelineForText2Image):
        made = auto.from_pipe(pipe)
        assert same(place, paint(made, "flux"), expected[type(made).__name__])
        back = AutoPipelineForText2Image.from_pipe(made)
        assert same(place, paint(back, "flux"), expected["FluxPipeline"])
    patchpipe.restore(pipe)


def test_auto_pipelines_are_served_both_ways() -> None:
    plain = tiny.pipeline("flux")
    kinds = [getattr(diffusers, kind) for kind in ("FluxPipeline", *KINDS["flux"])]
    expected = {kind.__name__: paint(kind.from_pipe(plain), "flux") for kind in kinds}
    run_threads(2, by_auto_pipelines, expected)


def image_to_image_first(place: Place, expected: np.ndarray) -> None:
    """The pipeline that is made parallel is the derived one; text to image follows."""
    derived = FluxImg2ImgPipeline.from_pipe(tiny.pipeline("flux"))
    attach(derived, place)
    assert same(place, paint(FluxPipeline.from_pipe(derived), "flux"), expected)
    patchpipe.restore(derived)


def test_text_to_image_from_a_parallel_image_to_image_pipeline() -> None:
    run_threads(2, image_to_image_first, paint(tiny.pipeline("flux"), "flux"))


def other_parts(place: Place, expected: np.ndarray) -> None:
    """A derived pipeline with a scheduler and a VAE of its own; a copy; the pipeline's own class."""
    pipe = attach(tiny.pipeline("flux"), place)
    own = {"scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0), "vae": tiny.pipeline("flux", seed=1).vae}
    copied = copy.copy(pipe)
    copied.scheduler, copied.vae = own["scheduler"], own["vae"]
    for derived in (FluxPipeline.from_pipe(pipe, **own), type(pipe)(**{**pipe.components, **own}), copied):
        assert same(place, paint(derived, "flux"), expected)
    patchpipe.restore(pipe)
    assert "decode" not in vars(own["vae"])


def test_derived_pipelines_may_have_parts_of_their_own() -> None:
    plain = tiny.pipeline("flux")
    vae = tiny.pipeline("flux", seed=1).vae
    own = FluxPipeline.from_pipe(plain, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae)
    run_threads(2, other_parts, paint(own, "flux"))


class TwoPasses(DiffusionPipeline):
    """Paints a picture and paints it over: holds two pipelines on the same weights, as combined pipelines do."""

    def __init__(
        self, scheduler: Any, vae: Any, text_encoder: Any, tokenizer: Any, text_encoder_2: Any, tokenizer_2: Any,
        transformer: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        parts = {name: part for name, part in locals().items() if name in inspect.signature(TwoPasses).parameters}
        self.register_modules(**parts)
        self.first_pipe, self.second_pipe = FluxPipeline(**parts), FluxImg2ImgPipeline(**parts)

    def __call__(self, generator: Any, output_type: str, **arguments: Any) -> Any:
        first = self.first_pipe(**arguments, generator=generator, output_type="pil").images
        arguments |= {"image": first, "strength": 0.75}
        return self.second_pipe(**arguments, generator=generator, output_type=output_type)

    @classmethod
    def of(cls, pipe: Any) -> TwoPasses:
        names = inspect.signature(cls).parameters
        made = cls(**{name: part for name, part in pipe.components.items() if name in names})
        for each in (made.first_pipe, made.second_pipe):
            each.set_progress_bar_config(disable=True)
        return made

    def paint(self) -> np.ndarray | None:
        wanted = tiny.call_arguments("flux", steps=3)
        output = self(**wanted, generator=torch.Generator().manual_seed(0), output_type="np")
        return None if output is None else output.images


def two_passes(place: Place, expected: np.ndarray) -> None:
    pipe = tiny.pipeline("flux")
    before = TwoPasses.of(pipe)
    attach(pipe, place)
    for combined in (before, TwoPasses.of(pipe)):
        assert same(place, combined.paint(), expected)
        assert combined.patchpipe.last.steps_synchronous > combined.first_pipe.patchpipe.last.steps_synchronous // 2
    patchpipe.restore(pipe)
    attach(before, place)
    assert same(place, before.paint(), expected)
    patchpipe.restore(before)


def test_a_pipeline_that_holds_two_others_is_served() -> None:
    expected = TwoPasses.of(tiny.pipeline("flux")).paint()
    for world_size in (1, 2):
        run_threads(world_size, two_passes, expected)


def painted_over(place: Place, expected: np.ndarray) -> None:
    pipe = attach(tiny.pipeline("flux"), place)
    first = paint(pipe, "flux")
    image = pipe.patchpipe.everywhere(first)
    assert same(place, paint(FluxImg2ImgPipeline.from_pipe(pipe), "flux", image=image), expected)


def test_a_picture_can_be_given_to_all_ranks() -> None:
    plain = tiny.pipeline("flux")
    over = FluxImg2ImgPipeline.from_pipe(plain)
    run_threads(2, painted_over, paint(over, "flux", image=paint(plain, "flux")))


def test_from_pipe_of_half_precision_weights_says_which_dtype_to_ask_for() -> None:
    pipe = patchpipe.parallelize(tiny.pipeline("flux", dtype=torch.bfloat16), ParallelConfig())
    with pytest.raises(ValueError, match=r"FluxImg2ImgPipeline\.from_pipe\(pipe, torch_dtype=torch\.bfloat16\)"):
        FluxImg2ImgPipeline.from_pipe(pipe)
    made = FluxImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.bfloat16)
    assert made.transformer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="already where its rank computes"):
        made.to("cpu")
    patchpipe.restore(pipe)


def test_what_cannot_be_served_is_refused_by_name() -> None:
    pipe = tiny.pipeline("sd3")
    perturbed = diffusers.StableDiffusion3PAGPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match=r"StableDiffusion3PAGPipeline cannot be served.*Use StableDiffusion3Pipeline"):
        patchpipe.parallelize(perturbed, ParallelConfig())
    patchpipe.parallelize(pipe, ParallelConfig())
    with pytest.raises(ValueError, match="StableDiffusion3PAGPipeline cannot be served"):
        paint(perturbed, "sd3")
    with pytest.raises(ValueError, match="StableDiffusion3PAGPipeline cannot be served"):
        diffusers.StableDiffusion3PAGPipeline.from_pipe(pipe)
    with pytest.raises(ValueError, match="cannot be copied with its weights"):
        copy.deepcopy(pipe)
    patchpipe.restore(pipe)


def test_a_derived_pipeline_is_let_go_of() -> None:
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig())
    gone = weakref.ref(FluxImg2ImgPipeline.from_pipe(pipe))
    gc.collect()
    assert gone() is None
    patchpipe.restore(pipe)


def test_two_parallel_pipelines_may_share_a_vae() -> None:
    first, second = tiny.pipeline("flux"), tiny.pipeline("flux", seed=1)
    second.vae = first.vae
    expected = [paint(pipe, "flux") for pipe in (first, second)]
    for pipe in (first, second):
        patchpipe.parallelize(pipe, ParallelConfig())
    for pipe, right in zip((first, second), expected, strict=True):
        assert np.array_equal(paint(pipe, "flux"), right)
    for pipe in (second, first):
        patchpipe.restore(pipe)
    assert np.array_equal(paint(first, "flux"), expected[0])
