"""What becomes of an operation on lazy tensors: recorded per patch, taken apart, or run on whole tensors.

Every decision here follows from metadata alone, never from values or from how far the patches have come:
the ranks that hold no values must decide alike.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from patchpipe.lazy.nodes import Node, Recorded, Value, View
from patchpipe.lazy.plan import Args, Call, Kwargs, Plan, map_leaves
from patchpipe.lazy.rules import CONSTANTS, FACTORIES, SPLITS, infer, plan_for
from patchpipe.lazy.tensor import LazyTensor

aten = torch.ops.aten


def dispatch(func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
    """Records an operation on lazy tensors, or materialises them and runs it.

    Raises:
        NotImplementedError: It would change the geometry of a lazy tensor in place, or write a result into one.
    """
    name = func._schema.name
    if name == "aten::detach_":
        return args[0]
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{_reason(func)} on a lazy tensor; use the form that returns a new tensor")
    if name in FACTORIES and isinstance(args[0], LazyTensor):
        return _make(func, args, kwargs)
    cut = [x for x in _tensors(args, kwargs) if isinstance(x, LazyTensor)]
    if all(x._value.free for x in cut) or any(arg.is_out for arg in func._schema.arguments):
        return _run_whole(func, args, kwargs)
    if name in SPLITS:
        return _split(func, args)
    call = Call(func, args, [(x, x.cut) for x in cut], lambda: infer(func, args, kwargs, type(cut[0])))
    plan = plan_for(call)
    if plan is None:
        return _decompose(func, args, kwargs)
    return _record(call, kwargs, plan)


def _record(call: Call, kwargs: Kwargs, plan: Plan) -> Any:
    func, args = call.func, call.args
    first: Any = call.cuts[0][0]
    if func._schema.is_mutable:
        return _write(func, args, kwargs, plan)
    if func.is_view:
        chain = first._chain if plan.identity else (*first._chain, View(func, args[1:], plan))
        return type(first)(call.out, first.device, plan.cut, first._value, chain)
    device = _device(kwargs.get("device"), first.device)
    value = Value(call.out, device, plan.cut, first._value.exchange)
    value.provenance = _provenance(func, args, kwargs)
    if value.exchange.holder:
        recorded = Recorded(func, args, kwargs, plan, _node_of)
        value.node = Node(plan.cut.patches, recorded.inputs, recorded)
    return type(first)(call.out, device, plan.cut, value)


def _write(func: OpOverload, args: Args, kwargs: Kwargs, plan: Plan) -> Any:
    """An in-place operation: what the target views gets a new value, older expressions keep the old one."""
    target = args[0]
    in_reach = isinstance(target, LazyTensor) and not target.materialised
    if not in_reach or any(view.plan.may_copy for view in target._chain):
        return _run_whole(func, args, kwargs)
    value = target._value
    value.provenance = _provenance(func, args, kwargs)
    value.write(_written(func, args, kwargs, plan) if value.exchange.holder else None)
    return target


def _written(func: OpOverload, args: Args, kwargs: Kwargs, plan: Plan) -> Node:
    """What the target's base becomes."""
    target, others = args[0], Recorded(func, args[1:], kwargs, plan, _node_of)
    base, chain = target._value.current(), target._chain

    def run(index: int, patches: Sequence[Tensor]) -> Tensor:
        written = place = patches[0].clone()
        for view in chain:
            place = view.local(index, (place,))
        func(place, *others.operands(index, patches[1:]), **kwargs)
        return written

    return Node(target.cut.patches, (base, *others.inputs), run)


def _split(func: OpOverload, args: Args) -> list[Tensor]:
    tensor, rest = args[0], args[1:]
    parts = func(tensor._meta, *rest)
    if func._schema.name == "aten::unbind":
        dim = rest[0] if rest else 0
        return [aten.select.int(tensor, dim, index) for index in range(len(parts))]
    dim = rest[1] if len(rest) > 1 else 0
    stops = itertools.accumulate(part.shape[dim] for part in parts)
    return [
        aten.slice.Tensor(tensor, dim, stop - part.shape[dim], stop) for part, stop in zip(parts, stops, strict=True)
    ]


def _decompose(func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
    """Into the operations it is made of, which may have rules; inference mode leaves that to us."""
    if func._can_decompose():
        return func.decompose(*args, **kwargs)
    return _run_whole(func, args, kwargs)


def _run_whole(func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
    """Run the operation itself, on whole tensors."""
    written = _written_to(func, args, kwargs)
    owners: dict[int, LazyTensor] = {}

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, LazyTensor):
            return leaf
        full = leaf.materialise(_reason(func))
        if any(leaf is target for target in written):
            owners[id(full)] = leaf
        return full

    whole_args, whole_kwargs = (
        map_leaves(whole, args),
        dict(zip(kwargs, map_leaves(whole, [*kwargs.values()]), strict=True)),
    )
    for target in written:
        target._value.before_write()
    result = func(*whole_args, **whole_kwargs)
    for target in written:
        target._value.after_write()
        target._value.provenance = _provenance(func, args, kwargs)
    if isinstance(result, (list, tuple)):
        return type(result)(owners.get(id(part), part) for part in result)
    return owners.get(id(result), result)


def _written_to(func: OpOverload, args: Args, kwargs: Kwargs) -> list[LazyTensor]:
    if not func._schema.is_mutable:
        return []
    found: list[LazyTensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only else args[index]
        lazy = [x for x in _tensors((value,), {}) if isinstance(x, LazyTensor)]
        if lazy and argument.is_out:
            raise NotImplementedError(f"{_reason(func)} with a lazy tensor as out=; assign the result instead")
        found += lazy
    return found


def _tensors(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    for arg in (*args, *kwargs.values()):
        for leaf in arg if isinstance(arg, (list, tuple)) else (arg,):
            if isinstance(leaf, Tensor):
                yield leaf


def _provenance(func: OpOverload, args: Args, kwargs: Kwargs) -> int:
    """Which operation made a value, of which others: the same number on every rank, where all do the same."""
    parts = [_reason(func)]
    for tensor in _tensors(args, kwargs):
        if isinstance(tensor, LazyTensor):
            parts += [str(tensor._value.provenance), *(view.func._schema.name for view in tensor._chain)]
        else:
            parts.append("plain")
    return zlib.crc32("/".join(parts).encode())


def _node_of(leaf: Any) -> Node | None:
    return leaf._node() if isinstance(leaf, LazyTensor) else None


def _make(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """A new tensor that takes only its geometry from a lazy one: plain, or a constant cut the same way."""
    like: LazyTensor = args[0]
    meta, device, rest = like._meta, like.device, args[1:]

    def make() -> Tensor:
        blank = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
        return func(blank, *rest, **kwargs)

    made = make()
    if func._schema.name not in CONSTANTS or made.device != device:
        return made
    # A sum of patches often starts from zeros: `total += patch` must find something that is cut.
    return constant_like(made, make, like)


def constant_like(model: Tensor, make: Callable[[], Tensor], like: LazyTensor) -> LazyTensor:
    """A lazy tensor that every rank can make whole, cut like another."""
    meta = torch.empty_strided(model.shape, model.stride(), dtype=model.dtype, device="meta")
    value = Value(meta, model.device, like.cut, like._value.exchange)
    value.constant = make
    return type(like)(meta, model.device, value.cut, value)


def _device(asked: torch.device | str | None, default: torch.device) -> torch.device:
    device = torch.device(default if asked is None else asked)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _reason(func: OpOverload) -> str:
    return func._schema.name.replace("::", ".")
