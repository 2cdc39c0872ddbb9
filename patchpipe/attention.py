"""Attention over the stale store, seen at the one call every diffusers processor ends in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.patches import Patch
from patchpipe.store import LayerStore

FindStore = Callable[[], "tuple[LayerStore, Patch] | None"]


class _StoreMode(TorchFunctionMode):
    """Gives ``scaled_dot_product_attention`` the stored keys and values beside the fresh ones.

    By then keys carry qk-norm and rotary embedding, whatever the processor. A mode is local to its
    thread, so that two models in one process do not meet.
    """

    def __init__(self, store: LayerStore, patch: Patch) -> None:
        super().__init__()
        self.store, self.patch = store, patch
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self._attend(func, *args, **kwargs)

    def _attend(
        self, func: Any, query: Any, key: Any, value: Any, attn_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if self.patch.whole:
            result = func(query, key, value, attn_mask, *args, **kwargs)
            self.store.keep(key, value)
            return result
        if attn_mask is not None:
            raise NotImplementedError(
                "a mask on self-attention is not supported while patches stream: use warmup='all'"
            )
        key, value = self.store.write(self.patch, key, value)
        return func(query, key, value, None, *args, **kwargs)


def attend_through(layer: nn.Module, find: FindStore) -> Callable[[], None]:
    """Sends a layer's self-attention through its store.

    Args:
        layer: The attention module.
        find: Gives the store and the patch at work; ``None`` leaves the layer alone.

    Returns:
        A function that undoes it.
    """
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        found = find()
        if found is None:
            return compute(*args, **kwargs)
        with _StoreMode(*found) as mode:
            result = compute(*args, **kwargs)
        if mode.calls != 1:
            raise RuntimeError(
                f"{type(layer).__name__} called scaled_dot_product_attention {mode.calls} times instead of once, so "
                f"its keys and values cannot be kept: use diffusers' native attention backend"
            )
        return result

    layer.forward = forward  # type: ignore[method-assign]

    def undo() -> None:
        del layer.__dict__["forward"]

    return undo
