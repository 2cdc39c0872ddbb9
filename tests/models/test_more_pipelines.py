"""Further pipelines of classes that have a plan: synchronous as plain diffusers, the same on any number of ranks.

How rows are cut is tested with each class's first pipelines, against the oracle. What others may add are inputs, an
order of arithmetic on the latent, and a time for each row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_inpaint as qwen
from PIL import Image
from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import PLANS
from tests import tiny
from tests.support import parity
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

Parts = dict[str, Any]
SIZE = (48, 112)  # pixels: seven rows of tokens


def picture(width: int = SIZE[0], height: int = SIZE[1], seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def mask(width: int = SIZE[0], height: int = SIZE[1]) -> Image.Image:
    striped = np.arange(height * width).reshape(height, width) % 7 > 3
    return Image.fromarray(np.where(striped, 255, 0).astype(np.uint8))


def like(parts: Parts, **changes: Any) -> Parts:
    """The parts with a transformer of another configuration."""
    model = parts["transformer"]
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    with tiny._BUILDING:
        torch.manual_seed(5)
        made = type(model)(**settings | changes).eval()
        tiny._stir(made)
    return {**parts, "transformer": made.requires_grad_(False)}


def sprint(parts: Parts) -> Parts:
    return {**like(parts, guidance_embeds=True), "scheduler": diffusers.SCMScheduler()}


def seeing(parts: Parts) -> Parts:
    with tiny._BUILDING:
        torch.manual_seed(6)
        sizes = {"hidden_size": 16, "intermediate_size": 32, "image_size": 32, "patch_size": 16}
        vision = SiglipVisionModel(SiglipVisionConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)).eval()
    processor = SiglipImageProcessor(size={"height": 32, "width": 32})
    return {**like(parts, image_embed_dim=16), "image_encoder": vision, "feature_extractor": processor}


def of_wan(parts: Parts, **changes: Any) -> Parts:
    """With Wan's text encoder and autoencoder."""
    others = {name: part for name, part in tiny.pipeline("wan").components.items() if name != "transformer"}
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)
    return {**like(parts, **changes), **others, "scheduler": scheduler}


def skyreels(parts: Parts) -> Parts:
    seen = tiny.pipeline("chronoedit").components
    eyes = {name: seen[name] for name in ("image_encoder", "image_processor")}
    return {**like(parts, in_channels=12, image_dim=16, added_kv_proj_dim=tiny.WIDTH), **eyes}


@dataclass(frozen=True)
class Case:
    """A pipeline to try.

    Attributes:
        of: The tiny pipeline whose parts it takes.
        call: What its call has beside that one's.
        change: What its parts have otherwise.
        channels_last: Whether its latent begins with its channels last in memory. Patches have them first, for which
            some products are rounded otherwise.
    """

    of: str
    call: dict[str, Any] = field(default_factory=dict)
    change: Callable[[Parts], Parts] = dict
    channels_last: bool = False


PAINTED_OVER = {"image": picture(), "strength": 0.8}
INPAINTED = {**PAINTED_OVER, "mask_image": mask()}
OF_FOUR_CALLS = {"stg_scale": 1.0, "modality_scale": 3.0, "spatio_temporal_guidance_blocks": [1]}  # in two branches
TWO_STEPS = {"num_inference_steps": 2}
SQUARE = {"height": 64, "width": 64}


def controlled(parts: Parts) -> Parts:
    return like(parts, in_channels=2 * parts["transformer"].config.in_channels, out_channels=16)


CASES = {
    "ChromaImg2Img": Case("chroma", PAINTED_OVER),
    "CogView4Control": Case("cogview4", {"control_image": picture()}, lambda parts: like(parts, in_channels=8)),
    "Flux2KleinInpaint": Case(
        "flux2", {"image": picture(64, 64), "mask_image": mask(64, 64), "strength": 0.8, **SQUARE}
    ),
    "FluxControlImg2Img": Case("flux", {**PAINTED_OVER, "control_image": picture(seed=1)}, controlled),
    "FluxControlInpaint": Case("flux", {**INPAINTED, "control_image": picture(seed=1)}, controlled),
    "FluxKontextInpaint": Case("flux-kontext", INPAINTED),
    "QwenImageEditInpaint": Case("qwen-edit", INPAINTED),
    "SanaSprint": Case("sana", TWO_STEPS, sprint),
    "SanaSprintImg2Img": Case("sana", {**TWO_STEPS, "image": picture(64, 160), "strength": 1.0}, sprint, True),
    "ZImageImg2Img": Case("zimage", PAINTED_OVER),
    "ZImageInpaint": Case("zimage", INPAINTED),
    "CogVideoXFunControl": Case("cogvideox-i2v", {"control_video": [picture(48, 64)] * 17}),
    "CogVideoXVideoToVideo": Case("cogvideox", {"video": [picture(48, 64)] * 17, "strength": 0.8}),
    "Cosmos2VideoToWorld": Case(
        "cosmos", {"image": picture(48, 64), "num_frames": 17}, lambda parts: of_wan(parts, in_channels=5)
    ),
    "CosmosVideoToWorld": Case("cosmos", {"image": picture(48, 64)}, lambda parts: like(parts, in_channels=5)),
    "HunyuanVideo15ImageToVideo": Case("hunyuan-video15", {"image": picture(48, 64)}, seeing),
    "Kandinsky5I2V": Case("kandinsky5", {"image": picture(48, 64)}),
    "LTX2": Case("ltx2", OF_FOUR_CALLS, lambda parts: like(parts, perturbed_attn=True)),
    "LTX2Condition": Case("ltx2"),
    "LTX2ImageToVideo": Case("ltx2", {"image": picture(48, 64)}),
    "LTXImageToVideo": Case("ltx", {"image": picture(32, 64)}),
    "LucyEdit": Case("wan", {"video": [picture()] * 17}, lambda parts: like(parts, in_channels=8)),
    "SkyReelsV2ImageToVideo": Case("skyreels", {"image": picture(48, 64)}, skyreels),
    "WanVideoToVideo": Case("wan", {"video": [picture()] * 17, "strength": 0.8}),
}


def setup_module() -> None:
    quieten()


@pytest.fixture(autouse=True)
def small_and_without_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some encode a picture with torch's default generator, which ranks that are threads share; one enlarges it."""
    calculate = qwen.calculate_dimensions
    monkeypatch.setattr(qwen, "calculate_dimensions", lambda _, ratio: calculate(4096, ratio))
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, *_, **__: self.mode())


def made(name: str) -> Any:
    case, kind = CASES[name], getattr(diffusers, f"{name}Pipeline")
    parts, known = case.change(tiny.pipeline(case.of).components), inspect.signature(kind.__init__).parameters
    given = {part: parts.get(part) for part, told in known.items() if part in parts or told.default is told.empty}
    pipe = kind(**{part: value for part, value in given.items() if part != "self"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, name: str) -> np.ndarray | None:
    case, known = CASES[name], inspect.signature(type(pipe).__call__).parameters
    wanted = tiny.call_arguments(case.of, height=SIZE[1], width=SIZE[0], steps=4) | case.call
    done = parity.call_pipeline(pipe, {key: value for key, value in wanted.items() if key in known})
    return None if done is None else np.asarray(tiny.painted(done)).copy()


def paint(place: Place, name: str, options: dict[str, Any]) -> np.ndarray | None:
    config = ParallelConfig(pipefusion=place.world_size, timeout=60.0, **options)
    pipe = patchpipe.parallelize(made(name), config, group=place.join(config))
    return latents(pipe, name)


@pytest.mark.some(of=6)
@pytest.mark.parametrize("name", CASES)
def test_synchronous_steps_are_plain_diffusers_and_streams_do_not_depend_on_the_ranks(name: str) -> None:
    plain = latents(made(name), name)
    synchronous = run_threads(2, paint, name, {"warmup": "all"})[0]
    close = CASES[name].channels_last and parity.relative(synchronous, plain) < 1e-5
    assert close or np.array_equal(synchronous, plain)
    streams = {"patches": 2, "warmup": 1, "split_batch": False, "share_blocks": False}
    alone, together = (run_threads(ranks, paint, name, streams)[0] for ranks in (1, 2))
    assert np.array_equal(alone, together)
    assert parity.relative(alone, plain) > 1e-3, "staleness moves nothing: nothing was tested"


def test_plans_name_them() -> None:
    named = {name for plan in PLANS for name in plan.pipelines}
    assert {f"{name}Pipeline" for name in CASES} <= named
