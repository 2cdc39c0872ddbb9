"""Keys of the tokens beside a sample's: those of the sample, at its neighbours' positions.

A key carries the position of its token, by rotary embedding. Where it stands for its neighbours too, it must be turned
to theirs. How a model turns keys is its own affair, so the layer's own ``forward`` runs once more for every neighbour,
up to its attention, given the positions of those tokens. Its matrices are not multiplied again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.stage.coarse.sample import Offset


class Positions(Protocol):
    """Gives the neighbours' part of an argument."""

    def __call__(self, value: Any, offset: Offset) -> Any:
        """The argument for the tokens so far from the sample's; itself, where it has nothing to do with positions."""
        ...


class _Seen(Exception):
    """Ends a ``forward`` at its attention."""

    def __init__(self, key: Tensor) -> None:
        super().__init__()
        self.key = key


class Products(TorchFunctionMode):
    """Multiplies the matrices of a ``forward`` the first time, and knows the results from then on."""

    def __init__(self) -> None:
        super().__init__()
        self._known: list[Tensor] = []
        self._next = 0
        self.ends = True  # whether it ends at the attention

    def __enter__(self) -> Products:
        self._next = 0
        super().__enter__()
        return self

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is functional.scaled_dot_product_attention:
            if self.ends:
                raise _Seen(args[1] if len(args) > 1 else kwargs["key"])
            self._next = len(self._known) + 1  # what comes after has not been seen
        if func is not functional.linear or self._next > len(self._known):
            return func(*args, **kwargs)
        if self._next == len(self._known):
            self._known.append(func(*args, **kwargs))
        self._next += 1
        return self._known[self._next - 1]


def keys_beside(
    compute: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    offsets: Sequence[Offset],
    at: Positions,
    products: Products,
) -> list[Tensor]:
    """The sample's keys at the positions of its neighbours; none where nothing that the layer is given tells positions.

    Args:
        compute: The layer's ``forward``.
        args: What it is given for the sample.
        kwargs: Likewise.
        offsets: How far the neighbours are.
        at: Gives their part of an argument.
        products: Of its matrices, which this fills.
    """
    found = []
    for offset in offsets:
        own_args = [at(value, offset) for value in args]
        own_kwargs = {name: at(value, offset) for name, value in kwargs.items()}
        pairs = zip([*args, *kwargs.values()], [*own_args, *own_kwargs.values()], strict=True)
        if all(value is own for value, own in pairs):
            return []
        try:
            with products:
                compute(*own_args, **own_kwargs)
        except _Seen as seen:
            found.append(seen.key)
    return found
