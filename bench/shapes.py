"""Pipelines of the shape of real models, narrow enough for a CPU, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from diffusers import (
    DiffusionPipeline,
    FluxTransformer2DModel,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
)

from patchpipe.demo import MODEL_DIR, call_defaults
from tests import tiny

WIDTH, HEADS, STEPS = 512, 8, 20
Build = Callable[[], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Size:
    """How much there is to compute.

    Attributes:
        side: Rows of the picture, and tokens of a row: a sixteenth of the pixels.
        blocks: Blocks of the model.
        width: Channels of a token.
        guided: Whether both branches of guidance are asked for.
    """

    side: int
    blocks: int
    width: int = WIDTH
    guided: bool = False


FULL = Size(64, 4)  # 1024 pixels
WIDE = Size(64, 4, 1024)  # heads of 128 channels, as FLUX.1 has them, and a third of its width
GUIDED = Size(48, 4, guided=True)  # 768 pixels: two branches are as many tokens as one of 1086
DEEP = 8  # blocks, twice as many: a hop is hidden behind more of them


@dataclass(frozen=True)
class Shape:
    """A model for the bench.

    Attributes:
        build: Makes the pipeline, and the arguments of its call.
        image: Image tokens.
        text: Text tokens in joint attention.
        width: Channels of a token.
        blocks: Blocks, with one self-attention each.
        batch: Branches of guidance in a batch.
    """

    build: Build
    image: int
    text: int = 0
    width: int = WIDTH
    blocks: int = FULL.blocks
    batch: int = 1


def bundled() -> tuple[Any, dict[str, Any]]:
    """The bundled model with its call settings."""
    pipe = DiffusionPipeline.from_pretrained(MODEL_DIR)
    return pipe, {"prompt": "red apple, 3d style", **call_defaults()}


def flux(size: Size) -> tuple[Any, dict[str, Any]]:
    """One dual-stream block to two or three single-stream ones; FLUX.1 itself has 19 and 38."""
    channels = size.width // HEADS
    transformer = lambda: FluxTransformer2DModel(  # noqa: E731
        in_channels=16, num_layers=size.blocks // 3, num_single_layers=size.blocks - size.blocks // 3,
        attention_head_dim=channels, num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH,
        pooled_projection_dim=16, axes_dims_rope=(16, (channels - 16) // 2, (channels - 16) // 2),
    )  # fmt: skip
    return _pipeline("flux", transformer), _call(size, max_sequence_length=64)


def flux_real(dual: int = 19, single: int = 38, device: str = "cuda") -> tuple[Any, dict[str, Any]]:
    """FLUX.1's own sizes at 1024 pixels, for a GPU: 12 billion random weights in bfloat16, made on the device.

    Args:
        dual: Dual-stream blocks.
        single: Single-stream blocks.
        device: Where the weights are made.
    """
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            sizes = {"in_channels": 16, "joint_attention_dim": tiny.WIDTH, "pooled_projection_dim": 16}
            transformer = FluxTransformer2DModel(num_layers=dual, num_single_layers=single, **sizes)
    finally:
        torch.set_default_dtype(kept)
    pipe, call = _pipeline("flux", lambda: transformer), _call(FULL, max_sequence_length=512)
    return pipe, call


def sd3(size: Size) -> tuple[Any, dict[str, Any]]:
    """Joint blocks; the text is CLIP's 32 tokens and T5's 64."""
    transformer = lambda: SD3Transformer2DModel(  # noqa: E731
        sample_size=2 * size.side, patch_size=2, in_channels=4, num_layers=size.blocks,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH,
        caption_projection_dim=WIDTH, pooled_projection_dim=32, out_channels=4, pos_embed_max_size=96,
    )  # fmt: skip
    return _pipeline("sd3", transformer), _call(size, max_sequence_length=64, guidance_scale=1.0)


def pixart(size: Size) -> tuple[Any, dict[str, Any]]:
    """Self-attention over the image, cross-attention to 64 tokens of text."""
    transformer = lambda: PixArtTransformer2DModel(  # noqa: E731
        num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, in_channels=4, out_channels=8,
        num_layers=size.blocks, cross_attention_dim=WIDTH, sample_size=2 * size.side, patch_size=2,
        caption_channels=tiny.WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    guidance = {"guidance_scale": 4.5 if size.guided else 1.0}
    settings = {**guidance, "use_resolution_binning": False, "clean_caption": False}
    return _pipeline("pixart", transformer), _call(size, max_sequence_length=64, **settings)


def _pipeline(name: str, transformer: Callable[[], Any]) -> Any:
    pipe = tiny.pipeline(name)
    torch.manual_seed(0)
    pipe.transformer = transformer().eval().requires_grad_(False)
    return pipe


def _call(size: Size, **settings: Any) -> dict[str, Any]:
    """A square picture."""
    pixels = 16 * size.side
    return {"prompt": "red apple", "height": pixels, "width": pixels, "num_inference_steps": STEPS, **settings}


def _shape(build: Callable[[Size], Any], size: Size, text: int = 0) -> Shape:
    """A narrow model at a size."""
    return Shape(partial(build, size), size.side**2, text, size.width, size.blocks, 2 if size.guided else 1)


SHAPES = {
    "bundled": Shape(bundled, image=64, text=32, width=256, blocks=9),
    "flux": _shape(flux, FULL, 64),
    "flux-wide": _shape(flux, WIDE, 64),
    "sd3": _shape(sd3, FULL, 96),
    "pixart": _shape(pixart, FULL),
    "flux-deep": _shape(flux, replace(WIDE, blocks=DEEP), 64),
    "pixart-guided": _shape(pixart, GUIDED),
    "pixart-deep": _shape(pixart, replace(GUIDED, blocks=DEEP)),
    "flux-real": Shape(flux_real, image=4096, text=512, width=3072, blocks=57),
}
