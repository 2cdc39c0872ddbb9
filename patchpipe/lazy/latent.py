"""A latent whose patches are promises.

A pipeline's loop does plain arithmetic on what the transformer returns. `PatchTensor` looks like that
result at once, while its patches are still being computed on other devices: what the loop does with it is
recorded, and runs patch by patch when a patch is asked for. An operation that mixes patches needs the whole
tensor; it *materialises*, which is collective: every rank runs the same program, so every rank gets there.

Every decision here follows from metadata alone, never from values or from how far the patches have come:
the ranks that hold no values must decide alike.

Results are bit-equal to those of plain tensors as long as vectorised kernels see whole vectors: torch
computes the last few elements of an array with scalar code, whose `pow` or `exp` may differ in the last bit.
Patches whose number of elements is a multiple of 64 are safe.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._ops import OpOverload

from patchpipe.lazy.nodes import Exchange, Node, Receiver, Recorded, Value, View
from patchpipe.lazy.rules import (
    CONSTANTS,
    FACTORIES,
    SPLITS,
    Args,
    Call,
    Cut,
    Kwargs,
    Plan,
    infer,
    map_leaves,
    plan_for,
)

__all__ = ["Exchange", "PatchTensor", "lift", "materialise_tree", "patch_of"]

aten = torch.ops.aten


class PatchTensor(torch.Tensor):
    """A tensor cut along one dim into patches that may not have been computed yet.

    Make one with `promise`; every operation on it gives another one where it can, a plain tensor otherwise.

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
        cls: type[PatchTensor],
        meta: Tensor,
        device: torch.device,
        cut: Cut,
        value: Value,
        chain: tuple[View, ...] = (),
    ) -> PatchTensor:
        """Internal; see `promise`."""
        self = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), dtype=meta.dtype, device=device
        )
        self.cut_dim, self.bounds = cut
        self._meta, self._value, self._chain, self._known = meta, value, chain, None
        return self

    @classmethod
    def promise(
        cls,
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device | str,
        cut_dim: int,
        bounds: Sequence[int],
        take: Callable[[int], Tensor] | None,
        exchange: Exchange,
    ) -> PatchTensor:
        """A tensor whose patches will come.

        Args:
            shape: Shape of the whole tensor.
            dtype: Its dtype.
            device: Its device.
            cut_dim: The dim along which it is cut.
            bounds: Offsets of the patches, from 0 to `shape[cut_dim]`.
            take: Gives patch `index`, called at most once each, and may block; None on ranks that do not
                hold the patches.
            exchange: The request's exchange.
        """
        cut = Cut(cut_dim % len(shape), tuple(bounds))
        _check(cut, shape, take, exchange)
        meta = torch.empty(tuple(shape), dtype=dtype, device="meta")
        value = Value(meta, torch.device(device), cut, exchange)
        if take is not None:
            value.node = Node(cut.patches, (), Receiver(take))
        return cls(meta, value.device, cut, value)

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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Keep einsum in one piece: torch would take it apart into reshapes that lose the cut."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.functional.einsum:
                tensors = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
                return _dispatch(aten.einsum.default, (args[0], list(tensors)), {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Record the operation, or materialise and run it."""
        return _dispatch(func, args, kwargs or {})

    # What torch's own methods would answer from memory that is not there.

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        state = "materialised" if self.materialised else "lazy"
        return (
            f"PatchTensor({state}, shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
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


def _check(cut: Cut, shape: Sequence[int], take: Callable[[int], Tensor] | None, exchange: Exchange) -> None:
    bounds = cut.bounds
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != shape[cut.dim] or sorted(bounds) != list(bounds):
        raise ValueError(f"bounds {bounds} do not cut dim {cut.dim} of shape {tuple(shape)}")
    if exchange.holder != (take is not None):
        raise ValueError("the holder must say how to take a patch, and only the holder can")


# ------------------------------------------------------------------------------------------- dispatch


def _dispatch(func: OpOverload, args: Args, kwargs: Kwargs) -> Any:
    name = func._schema.name
    if name == "aten::detach_":
        return args[0]
    if torch.Tag.inplace_view in func.tags:
        raise NotImplementedError(f"{_reason(func)} on a lazy tensor; use the form that returns a new tensor")
    if name in FACTORIES and type(args[0]) is PatchTensor:
        return _make(func, args, kwargs)
    cut = [x for x in _tensors(args, kwargs) if type(x) is PatchTensor]
    if all(x._value.free for x in cut) or any(arg.is_out for arg in func._schema.arguments):
        return _run_whole(func, args, kwargs)
    if name in SPLITS:
        return _split(func, args)
    call = Call(func, args, [(x, x.cut) for x in cut], lambda: infer(func, args, kwargs, PatchTensor))
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
        return PatchTensor(call.out, first.device, plan.cut, first._value, chain)
    device = _device(kwargs.get("device"), first.device)
    value = Value(call.out, device, plan.cut, first._value.exchange)
    value.provenance = _provenance(func, args, kwargs)
    if value.exchange.holder:
        recorded = Recorded(func, args, kwargs, plan, _node_of)
        value.node = Node(plan.cut.patches, recorded.inputs, recorded)
    return PatchTensor(call.out, device, plan.cut, value)


def _write(func: OpOverload, args: Args, kwargs: Kwargs, plan: Plan) -> Any:
    """An in-place operation: what the target views gets a new value, older expressions keep the old one."""
    target = args[0]
    in_reach = type(target) is PatchTensor and not target.materialised
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
    owners: dict[int, PatchTensor] = {}

    def whole(leaf: Any) -> Any:
        if type(leaf) is not PatchTensor:
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


def _written_to(func: OpOverload, args: Args, kwargs: Kwargs) -> list[PatchTensor]:
    if not func._schema.is_mutable:
        return []
    found: list[PatchTensor] = []
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = kwargs.get(argument.name) if argument.kwarg_only else args[index]
        lazy = [x for x in _tensors((value,), {}) if type(x) is PatchTensor]
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
        if type(tensor) is PatchTensor:
            parts += [str(tensor._value.provenance), *(view.func._schema.name for view in tensor._chain)]
        else:
            parts.append("plain")
    return zlib.crc32("/".join(parts).encode())


def _node_of(leaf: Any) -> Node | None:
    return leaf._node() if type(leaf) is PatchTensor else None


def _make(func: OpOverload, args: Args, kwargs: Kwargs) -> Tensor:
    """A new tensor that takes only its geometry from a lazy one: plain, or a constant cut the same way."""
    like: PatchTensor = args[0]
    meta, device, rest = like._meta, like.device, args[1:]

    def make() -> Tensor:
        blank = torch.empty_strided(meta.shape, meta.stride(), dtype=meta.dtype, device=device)
        return func(blank, *rest, **kwargs)

    made = make()
    if func._schema.name not in CONSTANTS or made.device != device:
        return made
    # A sum of patches often starts from zeros: `total += patch` must find something that is cut.
    return _constant(made, make, like)


def _constant(model: Tensor, make: Callable[[], Tensor], like: PatchTensor) -> PatchTensor:
    meta = torch.empty_strided(model.shape, model.stride(), dtype=model.dtype, device="meta")
    value = Value(meta, model.device, like.cut, like._value.exchange)
    value.constant = make
    return PatchTensor(meta, model.device, value.cut, value)


def _device(asked: torch.device | str | None, default: torch.device) -> torch.device:
    device = torch.device(default if asked is None else asked)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _reason(func: OpOverload) -> str:
    return func._schema.name.replace("::", ".")


# ------------------------------------------------------------------------------------- for the callers


def patch_of(tensor: Tensor, dim: int, start: int, stop: int, index: int) -> Tensor:
    """Elements `start` to `stop` along `dim`, which are patch `index` of the caller's cut.

    Args:
        tensor: Plain, or lazy. A lazy tensor cut the same way waits for that patch alone; cut otherwise it
            waits for all the patches the range touches. Lazy tensors answer on the holder only.
        dim: The dim that is cut.
        start: First element.
        stop: One past the last element.
        index: The patch.
    """
    dim %= tensor.dim()
    if type(tensor) is not PatchTensor:
        return tensor.narrow(dim, start, stop - start).contiguous()
    if tensor.materialised:
        return patch_of(tensor.materialise("patch"), dim, start, stop, index)
    if tensor.cut_dim == dim and tensor.bounds[index : index + 2] == (start, stop):
        return tensor.patch(index)
    return _assemble(tensor, dim, start, stop)


def _assemble(tensor: PatchTensor, dim: int, start: int, stop: int) -> Tensor:
    cut, same = tensor.cut, tensor.cut_dim == dim
    spans = list(enumerate(itertools.pairwise(cut.bounds)))
    touched = [i for i, (low, high) in spans if not same or (low < stop and start < high)] or [0]
    offset = cut.bounds[touched[0]] if same else 0
    with torch.no_grad():
        whole = torch.cat([tensor.patch(i) for i in touched], cut.dim)
        return whole.narrow(dim, start - offset, stop - start).contiguous()


def lift(tensor: Tensor, like: Tensor) -> Tensor:
    """A plain tensor, known on every rank, as a lazy one cut like `like`, so that both can be summed in place.

    Nothing that is later written to either of the two reaches the other.

    Args:
        tensor: The tensor; comes back as it is if it cannot be cut so, or is lazy already.
        like: A lazy tensor; if it is plain, `tensor` comes back as it is.
    """
    if type(like) is not PatchTensor or type(tensor) is PatchTensor or tensor.shape != like.shape:
        return tensor
    return _constant(tensor, tensor.clone().clone, like)


def materialise_tree(value: Any, reason: str) -> Any:
    """`value` with every lazy tensor in it replaced by the whole tensor; collective.

    Args:
        value: A tensor, or tuples, lists, dicts, dataclasses and diffusers outputs of them, at any depth.
            What holds no lazy tensor is returned as it is.
        reason: What needs them, for the count.
    """
    if type(value) is PatchTensor:
        return value.materialise(reason)
    if isinstance(value, Mapping):
        return _replace(value, {key: materialise_tree(part, reason) for key, part in value.items()})
    if isinstance(value, (list, tuple)):
        parts = [materialise_tree(part, reason) for part in value]
        if all(new is old for new, old in zip(parts, value, strict=True)):
            return value
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        old = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        new = {key: materialise_tree(part, reason) for key, part in old.items()}
        changed = {key: part for key, part in new.items() if part is not old[key]}
        return dataclasses.replace(value, **changed) if changed else value
    return value


def _replace(value: Any, parts: dict[Any, Any]) -> Any:
    if all(parts[key] is value[key] for key in parts):
        return value
    changed = copy.copy(value)
    for key, part in parts.items():
        changed[key] = part
    return changed
