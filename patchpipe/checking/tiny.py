"""A tiny random copy of a transformer class: few blocks, two heads; what other parts must fit stays as it is."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from math import lcm
from typing import Any

import torch
from torch import nn

BLOCKS = 3  # of every list: enough for three stages
LAYERS = re.compile(r"layers$|^depth$|blocks$|^n_layers$")
HEADS = ("num_attention_heads", "num_heads", "n_heads", "heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads")
HEAD_WIDTHS = ("attention_head_dim", "head_dim")
WIDTHS = ("hidden_size", "model_dim", "inner_dim", "dim", "width")
AXES = re.compile(r"^(axes_dims?|axes_dims_rope|rope_axes_dims?|axes_dim)$")
CROSS_HEADS = "num_cross_attention_heads"
FEED_FORWARD = re.compile(r"ffn|ff_dim|intermediate|mlp_hidden")
OF_TEXT = re.compile(r"text|caption|cap_|joint|cross|context|pooled")
WIDE, NARROW = 512, 64  # channels of what only inputs, or nothing, must fit


class CannotShrink(ValueError):
    """A class cannot be made tiny without being told more."""


def tiny_settings(
    kind: type, given: Mapping[str, Any] | None = None, *, alone: bool = True, narrow: bool = True
) -> dict[str, Any]:
    """The configuration of a tiny model of a class.

    Blocks and heads become few; the width follows, and so does every other field that was as large. Heads stay as
    wide as they were, so that rotary embeddings fit, and so do inputs: other parts of a model go with it.

    Args:
        kind: The transformer class.
        given: Fields that are set, such as a model's own configuration; the rest are the class's defaults.
        alone: Whether no other parts of a model must fit: then the text's channels are few too.
        narrow: Whether heads become few too, and not blocks alone.

    Raises:
        CannotShrink: Fields without a default are not given.
    """
    fields = [each for each in inspect.signature(kind.__init__).parameters.values() if each.name != "self"]  # type: ignore[misc]
    settings = {each.name: each.default for each in fields if each.kind is not each.VAR_KEYWORD}
    settings |= {name: value for name, value in (given or {}).items() if name in settings}
    missing = [name for name, value in settings.items() if value is inspect.Parameter.empty]
    if missing:
        raise CannotShrink(
            f"{kind.__name__} has no default for {', '.join(missing)}: say what they are with "
            f"{' '.join(f'--set {name}=…' for name in missing)}, or give a folder that has its config.json"
        )
    settings = _fewer_blocks(settings)
    if not narrow:
        return settings
    settings = _narrower(settings)
    return {name: NARROW if _needless(name, value, alone) else value for name, value in settings.items()}


def _needless(name: str, value: Any, alone: bool) -> bool:
    """Whether a field makes a model larger than a check needs."""
    wide = type(value) is int and value > WIDE
    return wide and bool(FEED_FORWARD.search(name) or (alone and OF_TEXT.search(name)))


def _fewer_blocks(settings: dict[str, Any]) -> dict[str, Any]:
    counts = {name: value for name, value in settings.items() if LAYERS.search(name) and type(value) is int}
    longest = sum(counts.values())
    fewer = {name: _few(name, value) for name, value in counts.items()}
    kept = sum(fewer.values())
    found = {**settings, **fewer}
    for name, value in settings.items():
        if isinstance(value, (list, tuple)) and "layers" in name and all(type(each) is int for each in value):
            found[name] = type(value)(
                value[:kept] if len(value) == longest else [each for each in value if each < kept]
            )
    return found


def _few(name: str, value: int) -> int:
    aside = any(part in name for part in ("refiner", "text", "approximator", "pooled"))
    return min(value, 1 if aside else BLOCKS)


def _narrower(settings: dict[str, Any]) -> dict[str, Any]:
    heads, width = _first(settings, HEADS), _first(settings, WIDTHS)
    head = _first(settings, HEAD_WIDTHS) or _sum_of_axes(settings)
    if width and heads and not head:
        head = settings[width] // settings[heads]
    elif isinstance(head, str):
        head = settings[head]
    if not head:
        return settings
    old = settings[width] if width else settings[heads] * head if heads else 0
    new = 2 * head
    if settings.get(CROSS_HEADS):
        new = lcm(head, old // settings[CROSS_HEADS]) * 2
    found = {name: new if type(value) is int and value == old else value for name, value in settings.items()}
    if heads:
        found[heads] = new // head
    key_heads = _first(settings, KEY_HEADS)
    if key_heads and heads:
        found[key_heads] = 1 if settings[key_heads] < settings[heads] else new // head
    if settings.get(CROSS_HEADS):
        found[CROSS_HEADS] = new // (old // settings[CROSS_HEADS])
    return found


def _first(settings: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    return next((name for name in names if type(settings.get(name)) is int), None)


def _sum_of_axes(settings: Mapping[str, Any]) -> int | None:
    return next((sum(value) for name, value in settings.items() if AXES.match(name) and value), None)


def build(kind: type, settings: Mapping[str, Any], dtype: torch.dtype, seed: int = 0) -> nn.Module:
    """A model with random weights everywhere: diffusers starts some layers at zero, where an error would not show.

    Args:
        kind: The class.
        settings: Its configuration.
        dtype: Of its weights.
        seed: Of the weights.

    Raises:
        CannotShrink: It cannot be built so.
    """
    torch.manual_seed(seed)
    try:
        model: nn.Module = kind(**settings)
    except Exception as error:
        raise CannotShrink(
            f"a tiny {kind.__name__} cannot be built: {type(error).__name__}: {error}. Set what it needs with "
            f"--set NAME=VALUE, or give a folder that has its config.json"
        ) from error
    stir(model)
    return model.to(dtype).eval().requires_grad_(False)


@torch.no_grad()
def stir(module: nn.Module) -> None:
    """Gives every parameter random values, of an order that keeps activations near one."""
    for parameter in module.parameters():
        if not parameter.is_floating_point():
            continue
        scale = 0.5 if parameter.ndim < 2 else 1.2 / parameter[0].numel() ** 0.5
        noise = torch.randn_like(parameter) * scale
        parameter.copy_(1 + 0.2 * noise if parameter.ndim < 2 and parameter.abs().sum() else noise)
