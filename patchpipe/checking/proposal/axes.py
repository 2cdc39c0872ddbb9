"""How a latent is laid out, from its shape, its configuration and what the model is called with beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from patchpipe.checking.loop import Sample
from patchpipe.models.latent import Latent, sizes_by_ids, sizes_by_numbers, sizes_by_shapes

SIZES = ("num_frames", "height", "width")
OUT = ("out_channels", "in_channels", "in_visual_dim", "out_visual_dim", "latent_channels")


def latent_of(model: nn.Module, sample: Sample, unknown: list[str]) -> Latent:
    """How the latent of a call is laid out and cut.

    Args:
        model: The model.
        sample: What it is called with.
        unknown: Takes what cannot be told.

    Raises:
        ValueError: In no way that is known.
    """
    latent, call = sample.latents[0], sample.calls[0].inputs
    named: dict[str, Any] = {"name": sample.latent, "listed": sample.listed}
    if latent.ndim == 3:
        return _packed(model, sample, call, named)
    if latent.ndim == 4:
        return Latent("bchw", **named)
    if latent.ndim == 5:
        channel = _channel_dim(model, latent)
        axes = {1: "bcfhw", 2: "bfchw", 4: "bfhwc"}[channel]
        frames = latent.shape[axes.index("f")]
        if frames == 1:
            return Latent(axes.replace("f", "1"), **named)
        unknown.append("cut: clips are cut by frames here, as all of patchpipe's own plans do")
        return Latent(axes, cut="f", **named)
    raise ValueError(f"a latent of {latent.ndim} dims is laid out in no way that a plan can say")


def _channel_dim(model: nn.Module, latent: Tensor) -> int:
    channels = [getattr(model.config, name, None) for name in OUT]
    return next((dim for dim in (1, 2, 4) if latent.shape[dim] in channels), 1)


def _packed(model: nn.Module, sample: Sample, call: Mapping[str, Any], named: dict[str, Any]) -> Latent:
    tokens = sample.latents[0].shape[1]
    given = {**call, sample.latent: sample.latents[0]}
    if all(isinstance(call.get(name), int) for name in SIZES):
        return Latent("bnc", cut="f", sizes=sizes_by_numbers, **named)
    if "img_shapes" in call:
        return _sized(model, sizes_by_shapes("img_shapes"), given, tokens, named)
    for name, value in call.items():
        if isinstance(value, Tensor) and "ids" in name and not name.startswith("txt") and value.shape[-1] in (3, 4):
            of_text = value.shape[-2] > tokens
            return _sized(model, sizes_by_ids(name, 1, of_text=of_text), given, tokens, named)
    raise ValueError(
        f"{type(model).__name__} takes packed tokens, and none of {', '.join(call)} says how many rows and columns "
        f"they are: write Latent(sizes=…) by hand"
    )


def _sized(model: nn.Module, sizes: Any, given: Mapping[str, Any], tokens: int, named: dict[str, Any]) -> Latent:
    found = sizes(model, given)
    return Latent("bnc", sizes=sizes, references=found["h"] * found["w"] < tokens, **named)
