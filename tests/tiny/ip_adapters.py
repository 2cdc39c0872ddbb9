"""IP-Adapters with random weights, in the format in which diffusers loads them, and tiny pictures for them."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import ImageProjection, IPAdapterTimeImageProjection
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from torch import Tensor, nn

from tests import tiny

CHANNELS = 12  # of a picture's embedding
TOKENS = 5  # of it, for Stable Diffusion 3, and as many come of it


def state_of(model: Any, seed: int = 0) -> dict[str, dict[str, Tensor]]:
    """The weights of an IP-Adapter for a model."""
    with tiny._BUILDING:
        torch.manual_seed(seed)
        made = _sd3(model) if type(model).__name__.startswith("SD3") else _flux(model)
        projection, processors = made
        for part in made:
            tiny._stir(part)
    assert isinstance(processors, nn.ModuleList)
    return {"image_proj": projection.state_dict(), "ip_adapter": processors.state_dict()}


def _flux(model: Any) -> tuple[nn.Module, nn.Module]:
    class Named(nn.Module):
        """One adapter's projections, without their number."""

        def __init__(self, processor: FluxIPAdapterAttnProcessor) -> None:
            super().__init__()
            self.to_k_ip, self.to_v_ip = processor.to_k_ip[0], processor.to_v_ip[0]

    width = model.config.joint_attention_dim
    projection = ImageProjection(CHANNELS, width, num_image_text_embeds=4)
    projection.proj = projection.image_embeds
    del projection.image_embeds
    blocks = range(model.config.num_layers)
    return projection, nn.ModuleList([Named(FluxIPAdapterAttnProcessor(model.inner_dim, width)) for _ in blocks])


def _sd3(model: Any) -> tuple[nn.Module, nn.Module]:
    width = model.inner_dim
    projection = IPAdapterTimeImageProjection(CHANNELS, width, 64, heads=1, num_queries=TOKENS, timestep_in_dim=8)
    heads = model.config.attention_head_dim
    made = [SD3IPAdapterJointAttnProcessor2_0(width, width, heads, 64) for _ in model.attn_processors]
    return projection, nn.ModuleList(made)


def load(pipe: Any, adapters: int = 1) -> None:
    """Loads one or several adapters with the pipeline's own method."""
    states = [state_of(pipe.transformer, seed) for seed in range(adapters)]
    with tiny._BUILDING:  # modules that others make meanwhile would have no weights
        if type(pipe.transformer).__name__.startswith("SD3"):
            pipe.load_ip_adapter(states[0], weight_name="", image_encoder_folder=None)
        else:
            none = {"image_encoder_pretrained_model_name_or_path": None}
            pipe.load_ip_adapter(states, weight_name=[""] * adapters, **none)


def pictures(pipe: Any, adapters: int = 1, seed: int = 5) -> Any:
    """The embedding of a picture for each of them; for Stable Diffusion 3, of no picture and of one."""
    draw = torch.Generator().manual_seed(seed)
    if type(pipe.transformer).__name__.startswith("SD3"):
        return torch.randn(2, TOKENS, CHANNELS, generator=draw, dtype=torch.float64).to(pipe.transformer.dtype)
    return [
        torch.randn(1, 1, CHANNELS, generator=draw, dtype=torch.float64).to(pipe.transformer.dtype)
        for _ in range(adapters)
    ]
