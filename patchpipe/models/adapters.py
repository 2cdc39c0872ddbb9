"""IP-Adapters as diffusers puts them into a model: attention processors with weights, which attend to a picture too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from patchpipe.models.usual import ATTENTION_ARGUMENTS

PICTURES = "ip_adapter_image_embeds"  # their name among a call's attention arguments
PROJECTIONS = ("encoder_hid_proj", "image_proj")  # of a model, which make the processors' tokens of them


def processors_of(model: nn.Module) -> dict[str, Any]:
    """The attention processors of IP-Adapters in a model, by name of the layer."""
    found = {name: module._modules.get("processor") for name, module in model.named_modules()}
    return {name: each for name, each in found.items() if each is not None and "IPAdapter" in type(each).__name__}


def strengths_of(model: nn.Module) -> dict[str, Any]:
    """How strong they are, by name of the layer: a number, or one for each adapter."""
    return {name: processor.scale for name, processor in processors_of(model).items()}


def set_strengths(model: nn.Module, strengths: Mapping[str, Any]) -> None:
    """Sets them as ``strengths_of`` has found them."""
    for name, processor in processors_of(model).items():
        processor.scale = strengths[name]


def told_of(model: nn.Module) -> str:
    """A model's IP-Adapters in words that are the same on all ranks, whatever blocks they hold."""
    kinds = sorted({type(each).__name__ for each in processors_of(model).values()})
    strengths = list(map(str, strengths_of(model).values()))
    same = len(set(strengths)) == 1
    return f"{', '.join(kinds)} at {', '.join(strengths[:1] if same else strengths)}" if kinds else "not loaded"


def drop_absent(model: nn.Module) -> None:
    """Frees the processors of layers that are not in this rank's memory."""
    for name, processor in processors_of(model).items():
        layer = model.get_submodule(name)
        own = [parameter for part, parameter in layer.named_parameters() if not part.startswith("processor.")]
        if any(parameter.is_meta for parameter in own):
            processor.to("meta")


def check_batch(inputs: Mapping[str, Any], batch: int) -> None:
    """Refuses pictures that are not one set for each entry of a batch, which no rank could take its entries of.

    Args:
        inputs: Of a call.
        batch: Entries of its batch; for one, plain diffusers takes whatever there is, and so does this.

    Raises:
        ValueError: There are more or fewer of them.
    """
    for given in (inputs.get(name) for name in ATTENTION_ARGUMENTS):
        pictures = given.get(PICTURES) if isinstance(given, dict) else None
        each: Sequence[Any] = pictures if isinstance(pictures, (list, tuple)) else [pictures]
        sizes = {len(value) for value in each if isinstance(value, Tensor)}
        if batch > 1 and sizes - {batch}:
            raise ValueError(
                f"the IP-Adapter was given pictures for {max(sizes - {batch})} entries in a call of {batch}: give "
                f"one for each, or paint one picture after the other"
            )
