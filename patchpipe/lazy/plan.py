"""The words rules are written in: where a tensor is cut, a call on cut tensors, and how it runs patch by patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor
from torch._ops import OpOverload

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


def map_leaves(change: Callable[[Any], Any], args: Sequence[Any]) -> Args:
    """`args` with every leaf changed; operations nest at most one list deep."""
    return tuple([change(x) for x in arg] if isinstance(arg, (list, tuple)) else change(arg) for arg in args)


class Cut(NamedTuple):
    """Where a tensor is cut.

    Attributes:
        dim: The dim that is cut, non-negative.
        bounds: One offset more than there are patches, from 0 to the size of that dim.
    """

    dim: int
    bounds: tuple[int, ...]

    @property
    def size(self) -> int:
        """The size of the whole tensor along the cut dim."""
        return self.bounds[-1]

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return len(self.bounds) - 1

    def span(self, index: int) -> tuple[int, int]:
        """Start and length of one patch."""
        return self.bounds[index], self.bounds[index + 1] - self.bounds[index]


@dataclass(frozen=True)
class Call:
    """One operation on at least one cut tensor.

    Attributes:
        func: The operation.
        args: Its positional arguments, cut tensors included.
        cuts: The cut tensors among the operands, with their cuts.
        infer: Runs the operation on meta tensors.
    """

    func: OpOverload
    args: Args
    cuts: Sequence[tuple[Tensor, Cut]]
    infer: Callable[[], Tensor]

    @cached_property
    def out(self) -> Tensor:
        """The result, as a meta tensor; asked for only by rules that know it does not hang on values."""
        return self.infer()

    def arg(self, index: int, default: Any = None) -> Any:
        """Positional argument `index`, or `default` where the caller left it out."""
        return self.args[index] if index < len(self.args) else default

    def dim(self, index: int, default: int = 0, extra: int = 0) -> int:
        """Positional argument `index` as a non-negative dim of the first operand (plus `extra` dims)."""
        return int(self.arg(index, default)) % (self.args[0].dim() + extra)

    @property
    def only(self) -> Cut | None:
        """The cut of the first operand, if that is the one cut tensor of the call."""
        tensor, cut = self.cuts[0]
        return cut if len(self.cuts) == 1 and tensor is self.args[0] else None


@dataclass(frozen=True)
class Plan:
    """How an operation runs patch by patch.

    Attributes:
        cut: Where the result is cut.
        plain_at: Dim, counted from the end, along which plain operands are cut too; None passes them whole.
        localise: Turns the arguments for patch `index` (patches already in place) into those of the
            operation on that patch, where they differ: sizes, offsets.
        func: The operation for one patch, if not the recorded one.
        joined: Of plain operands after the cut one, joined to its end: the place of the first of them, and where it
            begins in the result.
        identity: The result is the operand itself (an alias of everything).
        may_copy: A view of the whole tensor may be a copy on a patch: fit for reading only.
    """

    cut: Cut
    plain_at: int | None = None
    localise: Callable[[int, Args], Args] | None = None
    func: OpOverload | None = None
    joined: tuple[int, int] | None = None
    identity: bool = False
    may_copy: bool = False


Rule = Callable[[Call], "Plan | None"]
