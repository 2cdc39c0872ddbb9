"""What diffusers' layer-skip hooks leave out of a call: whole blocks, or a layer's attention.

Guiders of modular pipelines put such hooks on before some of their calls and take them off after. A block that is left
out is not to be skipped by its hook, which stands outside all else, but noted: its streams still come from another
stage, or go to one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

from diffusers.hooks import HookRegistry
from diffusers.hooks._common import _ATTENTION_CLASSES, _FEEDFORWARD_CLASSES
from diffusers.hooks.layer_skip import AttentionProcessorSkipHook, FeedForwardSkipHook, TransformerBlockSkipHook
from torch import nn

_REGISTRY = "_diffusers_hook"
_PERTURBED = "all_perturbed"  # an argument of attention layers that can do so themselves
SKIPS = (AttentionProcessorSkipHook, FeedForwardSkipHook)


class _Noting(HookRegistry):
    """The hooks of a block, of which those that leave it out are noted only."""

    noted: frozenset[str] = frozenset()

    def register_hook(self, hook: Any, name: str) -> None:
        if isinstance(hook, TransformerBlockSkipHook):
            self.noted |= {name}
        else:
            super().register_hook(hook, name)

    def remove_hook(self, name: str, recurse: bool = True) -> None:
        self.noted -= {name}
        super().remove_hook(name, recurse)


def note_skips(block: nn.Module) -> Callable[[], None]:
    """Has hooks that leave a block out noted in place of put around it.

    Returns:
        A function that undoes it.
    """
    there = hasattr(block, _REGISTRY)
    registry = HookRegistry.check_if_exists_or_initialize(block)
    kind = type(registry)
    registry.__class__ = _Noting

    def undo() -> None:
        registry.__class__ = kind
        if not there and not registry.hooks:
            delattr(block, _REGISTRY)

    return undo


def left_out(block: nn.Module) -> bool:
    """Whether the call at hand leaves the block out."""
    return bool(getattr(vars(block).get(_REGISTRY), "noted", ()))


def layers_of(block: nn.Module) -> list[tuple[str, nn.Module]]:
    """The layers of a block that such hooks are put on, with their names in the block."""
    kinds = (*_ATTENTION_CLASSES, *_FEEDFORWARD_CLASSES)
    return [(name, module) for name, module in block.named_modules() if isinstance(module, kinds)]


def changed(layer: nn.Module) -> bool:
    """Whether the call at hand leaves out a layer, or its attention."""
    return any(isinstance(hook, SKIPS) for hook in _hooks(layer))


def takes_values(layer: nn.Module, arguments: Mapping[str, Any]) -> bool:
    """Whether a call of a layer has each row see itself alone, by a hook or by what it is given."""
    hooked = any(getattr(hook, "skip_attention_scores", False) for hook in _hooks(layer))
    return hooked or bool(arguments.get(_PERTURBED))


def _hooks(module: nn.Module) -> Collection[Any]:
    registry = vars(module).get(_REGISTRY)
    return () if registry is None else registry.hooks.values()
