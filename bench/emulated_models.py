"""The real diffusers classes with their real blocks and tokens, and channels so few that nothing is computed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import calibrated
from patchpipe.planner.work.presets import preset_named
from patchpipe.planner.work.workload import Workload
from tests import tiny

HEADS = 8
FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Model:
    """A real model, and how its like of few channels is made.

    Attributes:
        preset: The planner's name of it.
        steps: Steps of the published runs.
        seconds: What one L40 is published to take for them, by pixels; what is missing, the planner predicts.
        channels: Of a head in the tiny model.
        fewest: Steps that its pipeline can run; PixArt's takes one step for a distilled model.
        build: Makes the tiny model's pipeline and the arguments of its call.
    """

    preset: str
    steps: int
    seconds: dict[int, float]
    channels: int
    fewest: int
    build: Callable[[Workload, int], tuple[Any, dict[str, Any]]]

    @property
    def width(self) -> int:
        """Channels of a token."""
        return HEADS * self.channels

    def workload(self, pixels: int, steps: int | None = None) -> Workload:
        """The real model's request, as the published runs made it."""
        preset = preset_named(self.preset)
        assert preset is not None
        return preset.workload(pixels, pixels, steps=steps or self.steps)

    def calibrated(self, pixels: int, profile: Profile) -> Profile:
        """A profile on which one card takes what is published."""
        seconds = self.seconds.get(pixels)
        return calibrated(self.workload(pixels), profile, seconds) if seconds else profile

    def scale(self) -> float:
        """Bytes of this model's activations for each byte of the real one's."""
        real = self.workload(1024)
        return self.width * FLOAT32 / (real.width * real.itemsize)

    def pipeline(self, pixels: int, steps: int) -> tuple[Any, dict[str, Any]]:
        """The tiny pipeline, and its call without prompts: embeddings of the real number of tokens."""
        pipe, call = self.build(self.workload(pixels), self.width)
        sizes = {"height": pixels, "width": pixels, "num_inference_steps": steps, "output_type": "latent"}
        return pipe, {**call, **sizes}


def _flux(workload: Workload, width: int) -> tuple[Any, dict[str, Any]]:
    duals = sum(block.separate_text for block in workload.blocks)
    channels = width // HEADS
    pipe = _with(
        "flux",
        lambda: FluxTransformer2DModel(
            in_channels=16, num_layers=duals, num_single_layers=len(workload.blocks) - duals,
            attention_head_dim=channels, num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH,
            pooled_projection_dim=16, axes_dims_rope=(channels - 4, 2, 2),
        ),
    )  # fmt: skip
    return pipe, {"prompt_embeds": _rows(workload.text), "pooled_prompt_embeds": torch.zeros(1, 16)}


def _sd3(workload: Workload, width: int) -> tuple[Any, dict[str, Any]]:
    pipe = _with(
        "sd3",
        lambda: SD3Transformer2DModel(
            sample_size=128, patch_size=2, in_channels=4, num_layers=len(workload.blocks),
            attention_head_dim=width // HEADS, num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH,
            caption_projection_dim=width, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=192,
        ),
    )  # fmt: skip
    call = {"prompt_embeds": _rows(workload.text), "pooled_prompt_embeds": torch.zeros(1, 32)}
    return pipe, {**call, **{f"negative_{name}": value for name, value in call.items()}}


def _pixart(workload: Workload, width: int) -> tuple[Any, dict[str, Any]]:
    pipe = _with(
        "pixart",
        lambda: PixArtTransformer2DModel(
            num_attention_heads=HEADS, attention_head_dim=width // HEADS, in_channels=4, out_channels=8,
            num_layers=len(workload.blocks), cross_attention_dim=width, sample_size=64, patch_size=2,
            caption_channels=tiny.WIDTH, use_additional_conditions=False,
        ),
    )  # fmt: skip
    call = {"prompt_embeds": _rows(workload.text), "prompt_attention_mask": torch.ones(1, workload.text)}
    call |= {f"negative_{name}": value for name, value in call.items()}
    return pipe, {**call, "negative_prompt": None, "use_resolution_binning": False, "clean_caption": False}


def _with(name: str, transformer: Callable[[], Any]) -> Any:
    pipe = tiny.pipeline(name)
    torch.manual_seed(0)
    pipe.transformer = transformer().eval().requires_grad_(False)
    return pipe


def _rows(count: int) -> torch.Tensor:
    return torch.zeros(1, count, tiny.WIDTH)


# Seconds of one L40: xDiT's documentation, performance pages of each model; 20 and 28 steps.
MODELS = {
    "pixart": Model("pixart-alpha", 20, {1024: 2.8, 2048: 21.6}, 4, 2, _pixart),
    "sd3": Model("sd3-medium", 20, {1024: 3.92}, 4, 1, _sd3),
    "flux": Model("flux.1-dev", 28, {1024: 18.36, 2048: 105.7}, 8, 1, _flux),
}
