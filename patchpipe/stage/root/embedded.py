"""What the root makes of the latent before the first block: of a patch, only its rows.

The latent that the root is given is zeros outside the patch, and nothing reads what becomes of them. So a convolution
that turns a picture into tokens need not see them, and no positions need be added to their tokens. ``PatchRows`` is a
tensor of the whole shape that has the patch's rows alone. A few operations keep it so. Any other one finds the rows
among zeros, as an ordinary tensor, so that a class may do what it likes between its embedding and its blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

Range = tuple[int, int]


class PatchRows(Tensor):
    """A tensor of the whole shape that has some rows alone.

    Attributes:
        own: The rows.
        along: Their dim.
        start: Where in the whole they begin.
        wide: The rows among zeros, once an operation has asked for them; it then is what counts.
    """

    own: Tensor
    along: int
    start: int
    wide: Tensor | None

    @staticmethod
    def __new__(cls, own: Tensor, along: int, start: int, total: int) -> PatchRows:
        """These rows, of so many in the whole."""
        shape = (*own.shape[:along], total, *own.shape[along + 1 :])
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=own.dtype, device=own.device)  # type: ignore[attr-defined]
        made.own, made.along, made.start, made.wide = own, along, start, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        keep, kwargs = _KEEPING.get(getattr(func, "__name__", "")), kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            kept = None
            if keep is not None and args and isinstance(args[0], PatchRows) and args[0].wide is None:
                kept = keep(*args, **kwargs)
            return func(*args, **kwargs) if kept is None else kept

    @classmethod
    def __torch_dispatch__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return func(*_widened(args), **{name: _widened(value) for name, value in (kwargs or {}).items()})

    def among_zeros(self) -> Tensor:
        """The whole; the same tensor each time, so that a change in place is not lost."""
        if self.wide is None:
            self.wide = self.own.new_zeros(self.shape)
            self.wide.narrow(self.along, self.start, self.own.shape[self.along]).copy_(self.own)
        return self.wide

    def made_into(self, own: Tensor, along: int, every: int = 1) -> PatchRows:
        """The rows after an operation, which may have made several of each."""
        return PatchRows(own, along, self.start * every, self.shape[self.along] * every)


def _widened(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(map(_widened, value))
    return value.among_zeros() if isinstance(value, PatchRows) else value


# -- operations that keep rows apart; ``None`` where this once they cannot -----------------------------------


def _flatten(rows: PatchRows, start_dim: int = 0, end_dim: int = -1) -> PatchRows | None:
    start, end = start_dim % rows.ndim, end_dim % rows.ndim
    if start != rows.along:
        return None
    return rows.made_into(rows.own.flatten(start, end), start, every=prod(rows.own.shape[start + 1 : end + 1]))


def _transpose(rows: PatchRows, dim0: int, dim1: int) -> PatchRows:
    dims = list(range(rows.ndim))
    dims[dim0], dims[dim1] = dims[dim1], dims[dim0]
    return rows.made_into(rows.own.transpose(dim0, dim1), dims.index(rows.along))


def _add(rows: PatchRows, other: Any, **options: Any) -> PatchRows | None:
    if options or isinstance(other, PatchRows) or (isinstance(other, Tensor) and other.ndim > rows.ndim):
        return None
    dim = rows.along - rows.ndim  # from the last: the other may have fewer
    if isinstance(other, Tensor) and other.ndim >= -dim and other.shape[dim] != 1:
        other = other.narrow(dim, rows.start, rows.own.shape[dim])
    return rows.made_into(rows.own + other, rows.along)


def _to(rows: PatchRows, *args: Any, **kwargs: Any) -> PatchRows:
    return rows.made_into(rows.own.to(*args, **kwargs), rows.along)


def _narrow(rows: PatchRows, dim: int, start: int, length: int) -> Tensor | None:
    """An ordinary tensor, if just these rows are asked for."""
    own = rows.along, rows.start, rows.own.shape[rows.along]
    return rows.own if (dim % rows.ndim, start, length) == own else None


_KEEPING: Mapping[str, Callable[..., Any]] = {
    "flatten": _flatten,
    "transpose": _transpose,
    "add": _add,
    "__add__": _add,
    "to": _to,
    "narrow": _narrow,
}


# -- convolutions ---------------------------------------------------------------------------------------------


Convolution: TypeAlias = nn.Conv2d | nn.Conv3d


def embedding(module: nn.Module, dim: int) -> list[Convolution]:
    """The convolutions of a module that make each row of tokens of some rows of the latent and of no others.

    Args:
        module: The embedding.
        dim: The latent's dim that is cut.
    """
    found = [each for each in module.modules() if isinstance(each, (nn.Conv2d, nn.Conv3d))]
    plain = (nn.Conv2d.forward, nn.Conv3d.forward)  # one that pads in a forward of its own makes rows of others too
    return [each for each in found if type(each).forward in plain and _parts_rows(each, dim - 2)]


def _parts_rows(module: Convolution, at: int) -> bool:
    if isinstance(module.padding, str) or not 0 <= at < len(module.stride):
        return False
    return (module.stride[at], module.padding[at], module.dilation[at]) == (module.kernel_size[at], 0, 1)


def of_rows(module: Convolution, dim: int, find: Callable[[Tensor], Range | None]) -> Callable[..., Tensor]:
    """A ``forward`` of such a convolution that sees the patch's rows alone.

    Args:
        module: The convolution.
        dim: The latent's dim that is cut.
        find: Gives the patch's range of a whole latent; ``None`` where all of it is meant.
    """
    compute, every = module.forward, module.stride[dim - 2]

    def forward(input: Tensor) -> Tensor:  # so it is called in the class
        span = find(input)
        if span is None:
            return compute(input)
        rows = compute(input.narrow(dim, span[0], span[1] - span[0]))
        return PatchRows(rows, dim, span[0] // every, input.shape[dim] // every)

    return forward
