"""What mixes rows and is no attention over keys: sums over all rows, and convolutions over neighbours' rows.

Linear attention needs of other patches' rows nothing but the sum of their keys' and values' products, and a 3×3
convolution nothing but the rows at their borders. Both are kept by patch, as keys and values are by row: fresh for the
patches done in this step, a step old for the others (PipeFusion, arXiv 2405.14430, section 3, carried over).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.stage.context import CallContext
from patchpipe.stage.keys.parts import PartsStore

ROWS = 2  # dim of the rows in [batch, channels, rows, columns]
ABOVE, BELOW = "first row", "last row"


def summed(layer: nn.Module, name: str, find: Callable[[], CallContext]) -> Callable[..., Any]:
    """The ``forward`` of a linear attention layer whose sums cover all patches.

    Args:
        layer: The layer. Its first ``matmul`` must be that of values ``[…, channels, rows]`` and keys
            ``[…, rows, channels]``.
        name: Its name in the model.
        find: The patch at work.
    """
    compute = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        context = find()
        store = _store(context, name)
        if store is None:
            return compute(*args, **kwargs)
        with _Sums(context, store) as mode:
            result = compute(*args, **kwargs)
        if not mode.seen:
            raise RuntimeError(f"{name} multiplied no values by keys, so that nothing of them could be kept")
        return result

    return forward


class _Sums(TorchFunctionMode):
    """Adds what other patches contributed to the first product of a layer."""

    def __init__(self, context: CallContext, store: PartsStore) -> None:
        super().__init__()
        self.context, self.store, self.seen = context, store, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.matmul or self.seen:
            return func(*args, **(kwargs or {}))
        self.seen = True
        (value, key), context, store = args, self.context, self.store
        if context.patch.whole:
            for patch in context.patches:
                low, high = patch.tokens
                store.put(patch.index, func(value[..., low:high], key[..., low:high, :]), context.entries)
            return func(value, key)
        store.put(context.patch.index, func(value, key), context.entries)
        parts = [store.get(patch.index, context.entries) for patch in context.patches]
        return sum(part for part in parts if part is not None)


def bordered(conv: Any, name: str, find: Callable[[], CallContext]) -> Callable[[Tensor], Tensor]:
    """The ``forward`` of a 3×3 convolution that sees the rows next to the patch.

    Args:
        conv: The convolution, over ``[batch, channels, rows, columns]``, padded with zeros to the same size.
        name: Its name in the model.
        find: The patch at work.
    """
    compute = conv.forward

    def forward(rows: Tensor) -> Tensor:
        context = find()
        store = _store(context, name)
        if store is None:
            return compute(rows)
        if context.patch.whole:
            for patch in context.patches:
                low, high = patch.rows
                _keep(store, patch.index, rows[:, :, low:high], context)
            return compute(rows)
        index = context.patch.index
        _keep(store, index, rows, context)
        near = (store.get((index - 1, BELOW), context.entries), store.get((index + 1, ABOVE), context.entries))
        blank = torch.zeros_like(rows[:, :, :1])  # beyond the picture, and where no step has computed anything yet
        above, below = (blank if row is None else row for row in near)
        rows = torch.cat([above, rows, below], ROWS)
        padding = (0, conv.padding[1])
        return functional.conv2d(rows, conv.weight, conv.bias, conv.stride, padding, conv.dilation, conv.groups)

    return forward


def _keep(store: PartsStore, index: int, rows: Tensor, context: CallContext) -> None:
    store.put((index, ABOVE), rows[:, :, :1], context.entries)
    store.put((index, BELOW), rows[:, :, -1:], context.entries)


def _store(context: CallContext, name: str) -> PartsStore | None:
    """What is kept of other patches; ``None`` where nothing is ever stale."""
    if context.stores is None:
        return None
    return context.stores.setdefault(name, PartsStore())
