"""Pipelines of the shape of real models, narrow enough for a CPU, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

from patchpipe.demo import MODEL_DIR, call_defaults
from tests import tiny


def bundled() -> tuple[Any, dict[str, Any]]:
    """The bundled model with its call settings: 64 image tokens."""
    pipe = DiffusionPipeline.from_pretrained(MODEL_DIR)
    return pipe, {"prompt": "red apple, 3d style", **call_defaults()}


def flux() -> tuple[Any, dict[str, Any]]:
    """FLUX-shaped: width 512, 3 dual and 7 single blocks, 1,024 image tokens and 64 of text, 20 steps."""
    pipe = tiny.pipeline("flux")
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=3, num_single_layers=7, attention_head_dim=64, num_attention_heads=8,
        joint_attention_dim=tiny.WIDTH, pooled_projection_dim=16, axes_dims_rope=(16, 24, 24),
    ).eval().requires_grad_(False)  # fmt: skip
    call = {"prompt": "red apple", "height": 512, "width": 512, "num_inference_steps": 20, "max_sequence_length": 64}
    return pipe, call


SHAPES = {"bundled": bundled, "flux": flux}
