"""The values behind lazy tensors: immutable expressions in patches, and what a write replaces.

Only the holder has expressions. The other ranks have a `Value` without one, which keeps the same books.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from patchpipe.lazy.plan import Args, Cut, Kwargs, Plan, map_leaves

Run = Callable[[int, Sequence[Tensor]], Tensor]
SMALL = 64
"""Plain operands of at most this many elements are copied when an expression captures them."""


class Exchange(Protocol):
    """What a lazy tensor needs from the request it belongs to."""

    holder: bool
    """Does this rank hold the patch values?"""

    provenance: int
    """Of what is shared next: how it was computed, for the ranks to compare."""

    def share(self, full: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Give every rank the whole tensor; collective. The holder passes it, the others pass None."""
        raise NotImplementedError

    def note(self, reason: str) -> None:
        """Count a materialisation; `reason` names the operation, such as `aten.sum`."""
        raise NotImplementedError


class Node:
    """An immutable value in patches, computed on demand and kept.

    Args:
        count: The number of patches.
        inputs: The nodes it is computed from.
        run: Computes patch `index` from that patch of every input.
    """

    __slots__ = ("__weakref__", "inputs", "patches", "run", "waiting")

    def __init__(self, count: int, inputs: Sequence[Node], run: Run) -> None:
        self.inputs = tuple(inputs)
        self.run: Run | None = run
        self.patches: list[Tensor | None] = [None] * count
        self.waiting = count

    def patch(self, index: int) -> Tensor:
        """Patch `index`; iterative, since a chain of operations may be longer than the stack is deep."""
        stack = [self]
        while stack:
            node = stack[-1]
            missing = [other for other in node.inputs if other.patches[index] is None]
            if node.patches[index] is not None:
                stack.pop()
            elif missing:
                stack.extend(reversed(missing))
            else:
                node._compute(index)
        patch = self.patches[index]
        assert patch is not None
        return patch

    def _compute(self, index: int) -> None:
        assert self.run is not None
        ready: list[Any] = [other.patches[index] for other in self.inputs]
        self.patches[index] = self.run(index, ready)
        self.waiting -= 1
        if not self.waiting:  # Let go of the history: fifty steps must not keep each other alive.
            self.inputs, self.run = (), None


class Receiver:
    """Calls `take` at most once a patch: waiting twice for the same receive may hang for ever."""

    def __init__(self, take: Callable[[int], Tensor]) -> None:
        self.take = take
        self.taken: set[int] = set()

    def __call__(self, index: int, _: Sequence[Tensor]) -> Tensor:
        """Patch `index`."""
        if index in self.taken:
            raise RuntimeError(f"patch {index} was asked for before, and did not come")
        self.taken.add(index)
        return self.take(index)


def version_of(tensor: Tensor) -> int | None:
    """How often a tensor was written to; None for an inference tensor, which does not count."""
    return None if tensor.is_inference() else tensor._version


class Plain:
    """A plain operand, as it was when an expression captured it."""

    __slots__ = ("tensor", "version")

    def __init__(self, tensor: Tensor) -> None:
        # Inference tensors count no writes, so a later one could not be noticed.
        self.tensor = tensor.clone() if tensor.numel() <= SMALL or tensor.is_inference() else tensor
        self.version = version_of(self.tensor)

    def read(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: Somebody wrote to it in the meantime.
        """
        if version_of(self.tensor) != self.version:
            raise RuntimeError(
                f"a tensor of shape {tuple(self.tensor.shape)} was modified in place after a lazy "
                "expression captured it and before the expression ran; pass a clone instead"
            )
        return self.tensor


class _Slot:
    """Stands for a cut operand in recorded arguments."""

    __slots__ = ("place",)

    def __init__(self, place: int) -> None:
        self.place = place


class Recorded:
    """An operation with its operands captured, ready to run on any patch.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        plan: How it runs on a patch.
        node_of: The node of an argument that is a lazy tensor, else None.
    """

    def __init__(
        self, func: OpOverload, args: Args, kwargs: Kwargs, plan: Plan, node_of: Callable[[Any], Node | None]
    ) -> None:
        self.func, self.kwargs, self.plan = func, kwargs, plan
        self.inputs: list[Node] = []

        def capture(leaf: Any) -> Any:
            node = node_of(leaf)
            if node is None:
                return Plain(leaf) if isinstance(leaf, Tensor) else leaf
            self.inputs.append(node)
            return _Slot(len(self.inputs) - 1)

        self.args = map_leaves(capture, args)

    def __call__(self, index: int, patches: Sequence[Tensor]) -> Tensor:
        """The result on patch `index`."""
        return (self.plan.func or self.func)(*self.operands(index, patches), **self.kwargs)

    def operands(self, index: int, patches: Sequence[Tensor]) -> Args:
        """The arguments for patch `index`."""

        def fill(leaf: Any) -> Any:
            if type(leaf) is _Slot:
                return patches[leaf.place]
            return self._local(leaf.read(), index) if type(leaf) is Plain else leaf

        args = map_leaves(fill, self.args)
        return self.plan.localise(index, args) if self.plan.localise else args

    def joined(self, start: int, stop: int) -> Tensor | None:
        """These elements along the cut dim, where plain tensors have them all, which wait for no patch."""
        if self.plan.joined is None or start < self.plan.joined[1]:
            return None
        place, begins = self.plan.joined
        parts = [plain.read() for plain in self.args[0][place:]]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts, self.plan.cut.dim)
        return whole.narrow(self.plan.cut.dim, start - begins, stop - start).contiguous()

    def _local(self, tensor: Tensor, index: int) -> Tensor:
        at, cut = self.plan.plain_at, self.plan.cut
        if at is None or tensor.dim() < -at or tensor.shape[at] != cut.size:
            return tensor
        # Contiguous, so that elementwise kernels take the same vectorised path as on the whole tensor.
        return tensor.narrow(at, *cut.span(index)).contiguous()


class View(NamedTuple):
    """One step from a tensor to a view of it."""

    func: OpOverload
    rest: Args
    plan: Plan

    def whole(self, tensor: Tensor) -> Tensor:
        """The view of the whole tensor."""
        return self.func(tensor, *self.rest)

    def local(self, index: int, patches: Sequence[Tensor]) -> Tensor:
        """The view of one patch, given as the only element of `patches`."""
        args: Args = (patches[0], *self.rest)
        if self.plan.localise:
            args = self.plan.localise(index, args)
        return (self.plan.func or self.func)(*args)


class Value:
    """What a lazy tensor and all its views share: the counterpart of a storage.

    Attributes:
        meta: Its geometry, as a meta tensor.
        device: Where the values live.
        cut: Where it is cut.
        exchange: The request's exchange.
        node: Its present value on the holder, until materialised.
        full: The whole tensor, once materialised; from then on the truth.
        constant: Makes the whole tensor anywhere, if nothing was written to it yet.
        version: Counts the writes.
        provenance: Tells values apart that were computed by other operations, alike on all ranks.
    """

    def __init__(self, meta: Tensor, device: torch.device, cut: Cut, exchange: Exchange) -> None:
        self.meta, self.device, self.cut, self.exchange = meta, device, cut, exchange
        self.node: Node | None = None
        self.full: Tensor | None = None
        self.constant: Callable[[], Tensor] | None = None
        self.version = 0
        self.provenance = 0
        self._snapshot: weakref.ref[_Snapshot] | None = None

    @property
    def free(self) -> bool:
        """Can every rank have the whole tensor without asking another?"""
        return self.full is not None or self.constant is not None

    def current(self) -> Node:
        """The present value; later writes do not change it."""
        if self.full is None:
            if self.node is None:
                self.node = self._constant_node()
            return self.node
        known = self._snapshot() if self._snapshot else None
        if known is None or known.version is None or known.version != version_of(self.full):
            known = _Snapshot(self.full, self.cut)
            self._snapshot = weakref.ref(known)
        return known

    def write(self, node: Node | None) -> None:
        """Replace the value of a tensor that is not materialised."""
        self.node, self.constant = node, None
        self.version += 1

    def before_write(self) -> None:
        """Keep the old value for the expressions that captured it; `full` is about to be written."""
        known = self._snapshot() if self._snapshot else None
        if known is not None:
            known.keep()
        self._snapshot = None

    def after_write(self) -> None:
        """Let expressions that captured some plain view of `full` notice: below autograd nobody counts."""
        self.version += 1
        if self.full is not None and not self.full.is_inference():
            torch.autograd.graph.increment_version(self.full)

    def materialise(self, reason: str) -> Tensor:
        """The whole tensor on every rank; collective the first time."""
        if self.full is None and self.constant is not None:
            self.full, self.node, self.constant = self.constant(), None, None
        elif self.full is None:
            self.exchange.note(reason)
            self.exchange.provenance = self.provenance
            full = self.exchange.share(self._gather(), tuple(self.meta.shape), self.meta.dtype, self.device)
            self.full, self.node = _with_strides(full, self.meta), None
        assert self.full is not None
        return self.full

    def _constant_node(self) -> Node:
        constant, cut = self.constant, self.cut
        assert constant is not None
        return Node(cut.patches, (), lambda index, _: constant().narrow(cut.dim, *cut.span(index)).contiguous())

    def _gather(self) -> Tensor | None:
        if not self.exchange.holder:
            return None
        node = self.current()
        # cat copies even a single patch: `full` may be written to, patches may not.
        return torch.cat([node.patch(index) for index in range(len(node.patches))], self.cut.dim)


class _Snapshot(Node):
    """The patches of a materialised tensor as it was at some moment."""

    __slots__ = ("version",)

    def __init__(self, full: Tensor, cut: Cut) -> None:
        self.version = version_of(full)
        plain = Plain(full)

        def run(index: int, _: Sequence[Tensor]) -> Tensor:
            part = plain.read().narrow(cut.dim, *cut.span(index))
            return part.clone(memory_format=torch.contiguous_format)

        super().__init__(cut.patches, (), run)

    def keep(self) -> None:
        """Copy what is not copied yet."""
        for index in range(len(self.patches)):
            self.patch(index)


def _with_strides(full: Tensor, meta: Tensor) -> Tensor:
    """The whole tensor laid out as a plain one would be: views and sums depend on it."""
    if full.stride() == meta.stride():
        return full
    return torch.empty_strided(meta.shape, meta.stride(), dtype=full.dtype, device=full.device).copy_(full)
