"""LoRA layers as ``peft`` puts them into a model: finding them, their matrices, and their strength for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.utils import USE_PEFT_BACKEND
from diffusers.utils.peft_utils import scale_lora_layers, unscale_lora_layers
from torch import nn

SCALE = "scale"  # its name among a call's attention arguments


@dataclass(frozen=True)
class LoraParts:
    """What a Linear with LoRA is made of: the result is ``base(x) + scaling · B(A(x))`` for each adapter.

    Attributes:
        base: The Linear itself.
        inputs: ``A`` of each adapter, by its name in the module.
        outputs: ``B`` of each adapter.
    """

    base: nn.Module
    inputs: Mapping[str, nn.Linear]
    outputs: Mapping[str, nn.Linear]


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    """The layers of a model that have adapters beside them, by name."""
    if not USE_PEFT_BACKEND:
        return {}
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def lora_parts(module: Any) -> LoraParts | None:
    """The parts of a layer with adapters; ``None`` for a layer without."""
    if not _is_adapted(module):
        return None
    inputs, outputs = (
        {f"{part}.{name}": each for name, each in getattr(module, part).items()} for part in ("lora_A", "lora_B")
    )
    return LoraParts(module.get_base_layer(), inputs, outputs)


def check_adapters(name: str, module: Any) -> None:
    """Refuses adapters that no rank could hold a part of.

    Args:
        name: The layer's name, for people.
        module: The layer, with or without adapters.

    Raises:
        ValueError: They are not plain LoRA.
    """
    if not _is_adapted(module):
        return
    from peft.tuners.lora.layer import Linear

    variants = [type(variant).__name__.removesuffix("LinearVariant") for variant in _variants(module).values()]
    if type(module) is not Linear or variants:
        kind = variants[0] if variants else type(module).__name__
        raise ValueError(
            f"the adapter on {name} is {kind}, not plain LoRA, and cannot be split with its matrix: fuse it with "
            f"fuse_lora() and unload_lora_weights() before parallelize, or use tensor=1"
        )


def adapters_of(model: nn.Module) -> str:
    """A model's adapters in words that are the same on all ranks, whatever blocks they hold."""
    strengths: dict[str, set[float]] = {}
    fused: set[str] = set()
    for layer in adapted_layers(model).values():
        fused |= set(layer.merged_adapters)
        active = () if layer.disable_adapters else layer.active_adapters
        for name in layer.scaling:
            strengths.setdefault(name, set()).update([layer.scaling[name]] if name in active else [])
    told = [
        f"{name} at {', '.join(f'{value:g}' for value in sorted(values))}" if values else f"{name} switched off"
        for name, values in sorted(strengths.items())
    ]
    told += [f"{name} fused" for name in sorted(fused)]
    return "; ".join(told) or "not loaded"


def split_scale(inputs: Mapping[str, Any], names: tuple[str, ...]) -> tuple[dict[str, Any], float]:
    """Takes LoRA's strength out of a call's attention arguments.

    Args:
        inputs: The arguments of a transformer call.
        names: Which of them may hold it.

    Returns:
        The arguments without it, and the strength, 1 where there is none.
    """
    left, scale = dict(inputs), 1.0
    for name in names:
        given = left.get(name)
        if isinstance(given, dict) and given.get(SCALE) is not None:
            scale, left[name] = given[SCALE], {key: value for key, value in given.items() if key != SCALE}
    return left, scale


@contextmanager
def scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Gives LoRA another strength in the block, as a class's own ``forward`` does for one call."""
    if not USE_PEFT_BACKEND or scale == 1.0:
        yield
        return
    scale_lora_layers(model, scale)
    try:
        yield
    finally:
        unscale_lora_layers(model, scale)


def _is_adapted(module: Any) -> bool:
    if not USE_PEFT_BACKEND:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return isinstance(module, BaseTunerLayer)


def _variants(module: Any) -> Mapping[str, Any]:
    return getattr(module, "lora_variant", {})
