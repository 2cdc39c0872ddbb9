"""A tensor whose patches are promises, as torch sees it: geometry without memory, and a value behind it."""

from __future__ import annotations

from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from patchpipe.lazy.nodes import Node, Recorded, Value, View
from patchpipe.lazy.plan import Cut

Lazy = TypeVar("Lazy", bound="LazyTensor")


class LazyTensor(torch.Tensor):
    """A tensor cut along one dim into patches that may not have been computed yet: its geometry and its values.

    Attributes:
        cut_dim: The dim that is cut, non-negative.
        bounds: Offsets of the patches along it, from 0 to its size, one more than there are patches. Slices
            along the cut dim may leave patches empty.
    """

    cut_dim: int
    bounds: tuple[int, ...]
    _value: Value
    _chain: tuple[View, ...]
    _meta: Tensor
    _known: tuple[int, Node] | None

    @staticmethod
    def __new__(
        cls: type[Lazy],
        meta: Tensor,
        device: torch.device,
        cut: Cut,
        value: Value,
        chain: tuple[View, ...] = (),
    ) -> Lazy:
        """Internal; see `PatchTensor.promise`."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        self.cut_dim, self.bounds = cut
        self._meta, self._value, self._chain, self._known = meta, value, chain, None
        return self

    @property
    def cut(self) -> Cut:
        """Where it is cut."""
        return Cut(self.cut_dim, self.bounds)

    @property
    def materialised(self) -> bool:
        """Is the whole tensor on every rank already?"""
        return self._value.full is not None

    def patch(self, index: int) -> Tensor:
        """Patch `index` as a plain tensor, not to be written to; on the holder only.

        Raises:
            RuntimeError: This rank does not hold the patches.
        """
        if not self._value.exchange.holder:
            raise RuntimeError("only the first stage holds the patches of a lazy tensor")
        with torch.no_grad():
            return self._node().patch(index)

    def joined(self, start: int, stop: int) -> Tensor | None:
        """Elements along the cut dim that a plain tensor has which was joined to the end, if it has them all."""
        node = None if self._chain else self._value.node
        return node.run.joined(start, stop) if node is not None and isinstance(node.run, Recorded) else None

    def materialise(self, reason: str) -> Tensor:
        """The whole tensor, plain; collective the first time.

        The result shares its memory with this tensor: a write to one is seen through the other.

        Args:
            reason: What needs it, for the count.
        """
        with torch.no_grad():
            full = self._value.materialise(reason)
            for view in self._chain:
                full = view.whole(full)
            return full

    def _node(self) -> Node:
        """The present value on the holder, reading through the views to what they view."""
        value = self._value
        if self._known and self._known[0] == value.version and value.full is None:
            return self._known[1]
        node = value.current()
        for view in self._chain:
            node = Node(self.cut.patches, (node,), view.local)
        self._known = None if value.full is not None else (value.version, node)
        return node

    # What torch's own methods would answer from memory that is not there.

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        state = "materialised" if self.materialised else "lazy"
        return (
            f"{type(self).__name__}({state}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"cut_dim={self.cut_dim}, bounds={self.bounds})"
        )

    def numpy(self, *, force: bool = False) -> Any:
        """The whole tensor as an array; materialises."""
        return self.materialise("numpy").numpy(force=force)

    def __array__(self, dtype: Any = None) -> Any:
        return self.materialise("numpy").__array__(dtype)

    def tolist(self) -> Any:
        """The whole tensor as nested lists; materialises."""
        return self.materialise("tolist").tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self.materialise("dlpack").__dlpack__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialise("pickle").__reduce_ex__(protocol)

    def __copy__(self) -> Tensor:
        return self.detach()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        known = memo.get(id(self))
        if known is None:
            known = memo[id(self)] = self.clone()
        return known

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        """An alias of it."""
        return self.detach()

    @data.setter
    def data(self, new: Tensor) -> None:
        raise NotImplementedError("assigning .data of a lazy tensor; materialise it first")

    def _no_memory(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("a lazy tensor has no memory of its own; materialise it first")

    data_ptr = storage = untyped_storage = set_ = resize_ = share_memory_ = _no_memory
