"""Which operations keep a cut tensor cut, and how each of them runs on one patch.

A rule looks at a call whose operands include cut tensors. It answers with a `Plan`, or with None where
the operation mixes patches (or nobody has thought about it), and then the caller needs the whole tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from patchpipe.lazy import views
from patchpipe.lazy.plan import Args, Call, Cut, Kwargs, Plan, Rule, map_leaves

SHORT_SUM = 4
"""So many products a contraction may add up and still run per patch."""


def pointwise(call: Call) -> Plan | None:
    """Operands broadcast, and every element of the result depends on one element of each."""
    ends = {(cut.dim - tensor.dim(), cut.bounds) for tensor, cut in call.cuts}
    if len(ends) != 1:
        return None
    at, bounds = ends.pop()
    return Plan(Cut(call.out.dim() + at, bounds), plain_at=at)


def _cat(call: Call) -> Plan | None:
    tensors: Sequence[Tensor] = call.args[0]
    (first, cut), rank = call.cuts[0], tensors[0].dim()
    if any(tensor.dim() != rank for tensor in tensors):
        return None
    if int(call.arg(1, 0)) % rank != cut.dim:
        same = all(other == cut for _, other in call.cuts)
        return Plan(cut, plain_at=cut.dim - rank) if same else None
    if len(call.cuts) > 1 or any(tensor.dtype != first.dtype for tensor in tensors):
        return None
    return _cat_along_cut(tensors, next(i for i, tensor in enumerate(tensors) if tensor is first), cut)


def _cat_along_cut(tensors: Sequence[Tensor], place: int, cut: Cut) -> Plan:
    """What comes before the cut tensor joins its first patch, what comes after joins its last."""
    sizes = [tensor.shape[cut.dim] for tensor in tensors]
    shift, last = sum(sizes[:place]), cut.patches - 1

    def localise(index: int, args: Args) -> Args:
        parts = args[0]
        before = parts[:place] if index == 0 else []
        after = parts[place + 1 :] if index == last else []
        return [*before, parts[place], *after], cut.dim

    inner = (bound + shift for bound in cut.bounds[1:-1])
    joined = (place + 1, shift + cut.size) if place + 1 < len(sizes) else None
    return Plan(Cut(cut.dim, (0, *inner, sum(sizes))), localise=localise, joined=joined)


def _stack(call: Call) -> Plan | None:
    cut, rank = call.cuts[0][1], call.args[0][0].dim()
    if any(other != cut for _, other in call.cuts):
        return None
    dim = int(call.arg(1, 0)) % (rank + 1)
    return Plan(Cut(cut.dim + (dim <= cut.dim), cut.bounds), plain_at=cut.dim - rank)


def _index_select(call: Call) -> Plan | None:
    cut = call.only
    return Plan(cut) if cut and call.dim(1) != cut.dim else None


def _index(call: Call) -> Plan | None:
    """One integer index on one dim; anything richer moves dims about."""
    cut, indices = call.only, call.args[1]
    used = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    if cut is None or len(used) != 1 or used[0][0] == cut.dim:
        return None
    dim, index = used[0]
    if index.dtype not in (torch.int32, torch.int64):
        return None
    return Plan(Cut(cut.dim + (index.dim() - 1 if dim < cut.dim else 0), cut.bounds))


def _along_other_dims(at: int) -> Rule:
    """An operation that works along the dims in argument `at` and keeps the shape."""

    def rule(call: Call) -> Plan | None:
        cut, rank = call.only, call.args[0].dim()
        dims = [dim % rank for dim in call.arg(at, ())]
        return Plan(cut) if cut and dims and cut.dim not in dims else None

    return rule


def _reduce(at: int) -> Rule:
    """A reduction within each patch, over the dims in argument `at`.

    Only over dims inside the cut one: there a patch's rows lie in memory as they do in the whole tensor,
    so the sums are made in the same order and come out bit-equal.
    """

    def rule(call: Call) -> Plan | None:
        cut, rank = call.only, call.args[0].dim()
        asked = call.arg(at)
        dims = [dim % rank for dim in asked] if isinstance(asked, (list, tuple)) else []
        if cut is None or not dims or min(dims) <= cut.dim or not call.args[0].is_contiguous():
            return None
        return Plan(cut, localise=lambda _, args: (args[0].contiguous(), *args[1:]))

    return rule


def _einsum(call: Call) -> Plan | None:
    """A short sum of products, one of whose factors is cut along a dim that is not summed over.

    Short, because then every kernel adds the products in the order they come; a long sum is split up
    differently for a patch than for the whole.
    """
    (inputs, _, output), tensors = call.args[0].replace(" ", "").partition("->"), call.args[1]
    terms = [_labels(term, x.dim()) for term, x in zip(inputs.split(","), tensors, strict=True)]
    (lazy, cut), result = call.cuts[0], _labels(output, call.out.dim())
    place = next(i for i, x in enumerate(tensors) if x is lazy)
    label = terms[place][cut.dim]
    sizes = dict(zip(itertools.chain(*terms), (n for x in tensors for n in x.shape), strict=True))
    summed = math.prod(size for name, size in sizes.items() if name not in result)
    alone = len(call.cuts) == 1 and sum(term.count(label) for term in terms) == 1
    if not output or not alone or label not in result or summed > SHORT_SUM:
        return None
    return Plan(Cut(result.index(label), cut.bounds))


def _labels(term: str, rank: int) -> list[str]:
    """One label per dim; those of an ellipsis are counted from its end, as it broadcasts."""
    before, dots, after = term.partition("...")
    hidden = rank - len(before) - len(after) if dots else 0
    return [*before, *(f".{hidden - i}" for i in range(hidden)), *after]


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "aten::_to_copy": pointwise,
        "aten::copy": pointwise,
        "aten::fill": pointwise,
        "aten::zero": pointwise,
        "aten::masked_fill": pointwise,
        "aten::alias": views.identity,
        "aten::detach": views.identity,
        "aten::lift_fresh": views.identity,
        "aten::select": views.select,
        "aten::slice": views.slice_,
        "aten::unsqueeze": views.unsqueeze,
        "aten::squeeze": views.squeeze,
        "aten::permute": views.permute,
        "aten::transpose": views.transpose,
        "aten::t": views.transpose,
        "aten::expand": views.expand,
        "aten::repeat": views.repeat,
        "aten::view": views.reshape,
        "aten::_unsafe_view": views.reshape,
        "aten::cat": _cat,
        "aten::stack": _stack,
        "aten::einsum": _einsum,
        "aten::index_select": _index_select,
        "aten::index": _index,
        "aten::flip": _along_other_dims(1),
        "aten::roll": _along_other_dims(2),
        "aten::sum": _reduce(1),
        "aten::mean": _reduce(1),
        "aten::std": _reduce(1),
        "aten::var": _reduce(1),
        "aten::amax": _reduce(1),
        "aten::amin": _reduce(1),
        "aten::linalg_vector_norm": _reduce(2),
    }
)

FACTORIES = frozenset(
    f"aten::{name}"
    for name in (
        *("empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like"),
        *("new_empty", "new_zeros", "new_ones", "new_full", "new_empty_strided"),
    )
)
"""Operations that look at the metadata of their first operand, never at its values."""

CONSTANTS = frozenset({"aten::zeros_like", "aten::ones_like", "aten::full_like"})
"""Those of them that always give the same values and the same shape."""

SPLITS = frozenset({"aten::split", "aten::split_with_sizes", "aten::unbind"})
"""Operations that return several views, each of which is a slice or a select."""


def plan_for(call: Call) -> Plan | None:
    """How the call runs patch by patch, or None where it needs the whole tensors."""
    rule = rule_for(call.func)
    plan = rule(call) if rule else None
    if plan is None or not isinstance(call.out, Tensor):
        return None
    # Broadcasting a tensor of size 1 along its cut dim would leave nothing to cut.
    return plan if call.out.shape[plan.cut.dim] == plan.cut.size else None


def rule_for(func: OpOverload) -> Rule | None:
    """The rule for an operation or for the functional form of an in-place one, if there is one."""
    schema = func._schema
    if torch.Tag.nondeterministic_seeded in func.tags or len(schema.returns) != 1:
        return None
    if torch.Tag.pointwise in func.tags:
        return pointwise if str(schema.returns[0].type) == "Tensor" else None
    rule = RULES.get(schema.name.removesuffix("_"))
    return rule if schema.name in RULES or rule is pointwise else None


def infer(func: OpOverload, args: Args, kwargs: Kwargs, lazy: type[Tensor]) -> Any:
    """The geometry of what the operation returns, as a meta tensor.

    Args:
        func: The operation.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        lazy: The type whose instances carry their geometry in `_meta`.
    """
    if "device" in kwargs:
        kwargs = {**kwargs, "device": None}
    quick = _infer_pointwise(func, args, kwargs) if rule_for(func) is pointwise else None
    if quick is not None:
        return quick

    def to_meta(leaf: Any) -> Any:
        if type(leaf) is lazy:
            return leaf._meta  # type: ignore[attr-defined]
        if isinstance(leaf, Tensor):
            return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
        return leaf

    return func(*map_leaves(to_meta, args), **kwargs)


def _infer_pointwise(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor | None:
    """By way of one element, which costs a tenth of what torch's own inference does."""
    tensors = [leaf for leaf in args if isinstance(leaf, Tensor)]
    if kwargs.get("memory_format") is not None or not all(x.is_contiguous() for x in tensors):
        return None
    shapes = {x.shape for x in tensors if x.dim()}
    shape = shapes.pop() if len(shapes) == 1 else torch.broadcast_shapes(*(x.shape for x in tensors))
    if func._schema.is_mutable and shape != tensors[0].shape:
        return None  # Wrong; torch has the words for it.
    ones = [torch.ones((1,) * x.dim(), dtype=x.dtype) if isinstance(x, Tensor) else x for x in args]
    return torch.empty(shape, dtype=func(*ones, **kwargs).dtype, device="meta")
