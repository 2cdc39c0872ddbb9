"""Pipelines of the shape of real models, narrow enough for a CPU, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """

    side: int
    blocks: int


FULL = Size(64, 4)  # 1024 pixels
SMALL = Size(48, 6)  # 768 pixels: for slow links, which some methods need minutes over


@dataclass(frozen=True)
class Shape:
    """A model for the bench.

    Attributes:
        build: Makes the pipeline, and the arguments of its call.
        image: Image tokens.
        text: Text tokens in joint attention.
        width: Channels of a token.
        blocks: Blocks, with one self-attention each.
    """

    build: Build
    image: int
    text: int = 0
    width: int = WIDTH
    blocks: int = FULL.blocks


def bundled() -> tuple[Any, dict[str, Any]]:
    """The bundled model with its call settings."""
    pipe = DiffusionPipeline.from_pretrained(MODEL_DIR)
    return pipe, {"prompt": "red apple, 3d style", **call_defaults()}


def flux(size: Size) -> tuple[Any, dict[str, Any]]:
    """One dual-stream block to two or three single-stream ones; FLUX.1 itself has 19 and 38."""
    transformer = lambda: FluxTransformer2DModel(  # noqa: E731
        in_channels=16, num_layers=size.blocks // 3, num_single_layers=size.blocks - size.blocks // 3,
        attention_head_dim=WIDTH // HEADS, num_attention_heads=HEADS, joint_attention_dim=tiny.WIDTH,
        pooled_projection_dim=16, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip
    return _pipeline("flux", transformer), _call(size, max_sequence_length=64)


def flux_real() -> tuple[Any, dict[str, Any]]:
    """FLUX.1's own sizes at 1024 pixels, for a GPU: 12 billion random weights in bfloat16, made on the device."""
    kept = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda"):
            sizes = {"in_channels": 16, "joint_attention_dim": tiny.WIDTH, "pooled_projection_dim": 16}
            transformer = FluxTransformer2DModel(**sizes)
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
    unguided = {"guidance_scale": 1.0, "use_resolution_binning": False, "clean_caption": False}
    return _pipeline("pixart", transformer), _call(size, max_sequence_length=64, **unguided)


def _pipeline(name: str, transformer: Callable[[], Any]) -> Any:
    pipe = tiny.pipeline(name)
    torch.manual_seed(0)
    pipe.transformer = transformer().eval().requires_grad_(False)
    return pipe


def _call(size: Size, **settings: Any) -> dict[str, Any]:
    """A square picture."""
    pixels = 16 * size.side
    return {"prompt": "red apple", "height": pixels, "width": pixels, "num_inference_steps": STEPS, **settings}


def _shapes(suffix: str, size: Size) -> dict[str, Shape]:
    """The narrow models at a size."""
    counts = {"image": size.side**2, "blocks": size.blocks}
    return {
        f"flux{suffix}": Shape(partial(flux, size), text=64, **counts),
        f"sd3{suffix}": Shape(partial(sd3, size), text=96, **counts),
        f"pixart{suffix}": Shape(partial(pixart, size), **counts),
    }


SHAPES = {
    "bundled": Shape(bundled, image=64, text=32, width=256, blocks=9),
    **_shapes("", FULL),
    **_shapes("-768", SMALL),
    "flux-real": Shape(flux_real, image=4096, text=512, width=3072, blocks=57),
}
