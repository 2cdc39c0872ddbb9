"""Guiders of modular pipelines: those that combine predictions, and those that leave layers out of some calls."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import pytest
import torch
from diffusers.hooks import LayerSkipConfig

import patchpipe
from patchpipe import ParallelConfig
from tests.pipeline.test_modular import STREAM, call, made, rows
from tests.pipeline.test_pipelines import attach
from tests.support.oracle import naive_pipefusion
from tests.support.parity import ROUNDED, TOLERANCE, relative
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads


def setup_module() -> None:
    quieten()


GUIDERS: dict[str, dict[str, Any]] = {
    "ClassifierFreeGuidance": {"guidance_rescale": 0.5, "start": 0.3, "stop": 0.8},
    "AdaptiveProjectedGuidance": {"adaptive_projected_guidance_momentum": -0.5},
    "TangentialClassifierFreeGuidance": {},
}


def guided(place: Place, kind: str, **options: Any) -> Any:
    pipe = made("wan")
    pipe.update_components(guider=getattr(diffusers, kind)(**GUIDERS[kind]))
    return call(attach(pipe, place, **options), "wan", output="latents")


@pytest.mark.some(of=2)
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


@pytest.mark.some(of=4)
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


@pytest.mark.some(of=2)
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


def test_guiders_that_are_refused() -> None:
    config = ParallelConfig()
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
    pipe.update_components(guider=diffusers.SmoothedEnergyGuidance(seg_guidance_layers=[1]))
    with pytest.raises(ValueError, match="SmoothedEnergyGuidance changes layers"):
        call(pipe, "wan")
