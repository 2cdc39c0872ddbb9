"""Attention over the stale store, seen at the one call every diffusers processor ends in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.patches import Patch
from patchpipe.store import LayerStore


@dataclass(frozen=True)
class Attend:
    """``scaled_dot_product_attention`` and whatever a model gave it beside its tensors.

    Attributes:
        compute: The function.
        mask: Its ``attn_mask``.
        dropout: Its ``dropout_p``.
        causal: Its ``is_causal``.
        scale: Its ``scale``; ``None`` is one over the root of the channels.
        grouped: Its ``enable_gqa``.
    """

    compute: Callable[..., Tensor]
    mask: Tensor | None = None
    dropout: float = 0.0
    causal: bool = False
    scale: float | None = None
    grouped: bool = False

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of a query over keys and values on this rank."""
        options = {"enable_gqa": True} if self.grouped else {}
        return self.compute(query, key, value, self.mask, self.dropout, self.causal, scale=self.scale, **options)


class Sharing(Protocol):
    """How the ranks that share a patch attend together."""

    def attend(self, attend: Attend, query: Tensor, key: Tensor, value: Tensor, layer: Attending) -> Tensor:
        """Attention of this rank's rows ``[batch, heads, own rows, channels]`` over all rows there are.

        Args:
            attend: Attention of a query over keys and values on this rank.
            query: Of this rank's rows.
            key: The same.
            value: The same.
            layer: The layer's store, and where its text rows stand.

        Returns:
            The result for this rank's rows and all heads.
        """
        ...


@dataclass(frozen=True)
class Attending:
    """What a self-attention layer needs beside its own module.

    Attributes:
        patch: This rank's rows.
        store: The layer's keys and values; ``None`` where nothing is ever stale.
        sharing: The ranks that share the patch, if there are several.
        text_rows: Text rows in the sequence.
        text_first: Whether they come before the image rows.
    """

    patch: Patch
    store: LayerStore | None
    sharing: Sharing | None
    text_rows: int
    text_first: bool

    def remember(self, patch: Patch, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Stores a whole patch's fresh rows; returns keys and values of every row that exists."""
        if self.store is None:
            return key, value
        return self.store.keep(key, value) if patch.whole else self.store.write(patch, key, value)


class _StoreMode(TorchFunctionMode):
    """Gives ``scaled_dot_product_attention`` the stored keys and values beside the fresh ones.

    By then keys carry qk-norm and rotary embedding, whatever the processor. A mode is local to its
    thread, so that two models in one process do not meet.
    """

    def __init__(self, attending: Attending) -> None:
        super().__init__()
        self.attending = attending
        self.calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls += 1
        return self._attend(func, *args, **kwargs)

    def _attend(
        self,
        func: Callable[..., Tensor],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        layer = self.attending
        if attn_mask is not None and not layer.patch.uncut:
            raise NotImplementedError(
                "a mask on self-attention is not supported while patches stream or are shared: use warmup='all' on "
                "one device, or with pipefusion alone"
            )
        attend = Attend(func, attn_mask, dropout_p, is_causal, scale, enable_gqa)
        if layer.sharing is not None:
            return layer.sharing.attend(attend, query, key, value, layer)
        return attend(query, *layer.remember(layer.patch, key, value))


def attend_through(layer: nn.Module, find: Callable[[], Attending | None]) -> Callable[[], None]:
    """Sends a layer's self-attention through its store and the ranks that share the patch.

    Args:
        layer: The attention module.
        find: What the patch at work needs; ``None`` leaves the layer alone.

    Returns:
        A function that undoes it.
    """
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        attending = find()
        if attending is None:
            return compute(*args, **kwargs)
        with _StoreMode(attending) as mode:
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
