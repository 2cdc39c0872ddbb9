"""Which views of a cut tensor stay cut, and how each of them is taken of one patch."""

from __future__ import annotations

import math

import torch

from patchpipe.lazy.plan import Args, Call, Cut, Plan

aten = torch.ops.aten


def identity(call: Call) -> Plan | None:
    """An alias of everything."""
    return call.only and Plan(call.only, identity=True)


def select(call: Call) -> Plan | None:
    """One index of a dim that is not cut."""
    cut, dim = call.only, call.dim(1)
    if cut is None or dim == cut.dim:
        return None
    return Plan(Cut(cut.dim - (dim < cut.dim), cut.bounds))


def slice_(call: Call) -> Plan | None:
    """A range of a dim; along the cut every patch keeps what it has of it."""
    cut, dim, step = call.only, call.dim(1), call.arg(4, 1)
    if cut is None:
        return None
    if call.out.shape == call.args[0].shape and step == 1:
        return Plan(cut, identity=True)
    if dim != cut.dim:
        return Plan(cut)
    if step != 1:
        return None
    start, stop, _ = slice(call.arg(2), call.arg(3)).indices(cut.size)
    return _slice_along_cut(cut, start, max(start, stop))


def _slice_along_cut(cut: Cut, start: int, stop: int) -> Plan:
    """Every patch keeps what it has of the range: some may end up empty, none changes its index."""

    def localise(index: int, args: Args) -> Args:
        begin, size = cut.span(index)
        low, high = (min(max(edge - begin, 0), size) for edge in (start, stop))
        return args[0], cut.dim, low, high

    bounds = tuple(min(max(bound, start), stop) - start for bound in cut.bounds)
    return Plan(Cut(cut.dim, bounds), localise=localise)


def unsqueeze(call: Call) -> Plan | None:
    """A new dim of size 1."""
    cut, dim = call.only, call.dim(1, extra=1)
    return cut and Plan(Cut(cut.dim + (dim <= cut.dim), cut.bounds))


def squeeze(call: Call) -> Plan | None:
    """Without dims of size 1."""
    cut, shape = call.only, call.args[0].shape
    asked = call.arg(1, range(len(shape)))
    dims = {dim % len(shape) for dim in ([asked] if isinstance(asked, int) else asked)}
    if cut is None or (cut.dim in dims and cut.size == 1):
        return None
    gone = sorted(dim for dim in dims if shape[dim] == 1)
    place = cut.dim - sum(dim < cut.dim for dim in gone)
    # Named dims, because a patch may have size 1 along the cut where the whole does not.
    return Plan(Cut(place, cut.bounds), localise=lambda _, args: (args[0], gone), func=aten.squeeze.dims)


def permute(call: Call) -> Plan | None:
    """Dims in another order."""
    cut, rank = call.only, call.args[0].dim()
    return cut and Plan(Cut([dim % rank for dim in call.arg(1)].index(cut.dim), cut.bounds))


def transpose(call: Call) -> Plan | None:
    """Two dims exchanged."""
    cut, first, second = call.only, call.dim(1), call.dim(2, default=1)
    if cut is None:
        return None
    return Plan(Cut({first: second, second: first}.get(cut.dim, cut.dim), cut.bounds))


def expand(call: Call) -> Plan | None:
    """Dims of size 1 made larger."""
    cut, sizes = call.only, list(call.arg(1))
    if cut is None:
        return None
    place = cut.dim + len(sizes) - call.args[0].dim()
    local = [*sizes[:place], -1, *sizes[place + 1 :]]
    return Plan(Cut(place, cut.bounds), localise=lambda _, args: (args[0], local))


def repeat(call: Call) -> Plan | None:
    """Repeated along dims that are not cut."""
    cut, repeats = call.only, call.arg(1)
    if cut is None:
        return None
    place = cut.dim + len(repeats) - call.args[0].dim()
    return Plan(Cut(place, cut.bounds)) if repeats[place] == 1 else None


def reshape(call: Call) -> Plan | None:
    """Dims before the cut may be merged or split among themselves, and so may those after it."""
    cut, shape = call.only, tuple(call.out.shape)
    if cut is None or call.out.numel() == 0 or call.out.dtype != call.args[0].dtype:
        return None
    before = math.prod(call.args[0].shape[: cut.dim])
    places = [i for i, size in enumerate(shape) if size == cut.size and math.prod(shape[:i]) == before]
    if not places:
        return None
    place = places[0]

    def localise(index: int, args: Args) -> Args:
        return args[0], [*shape[:place], cut.span(index)[1], *shape[place + 1 :]]

    return Plan(Cut(place, cut.bounds), localise=localise, func=aten.reshape.default, may_copy=True)
