"""A latent whose patches are promises.

A pipeline's loop does plain arithmetic on what the transformer returns. `PatchTensor` looks like that
result at once, while its patches are still being computed on other devices: what the loop does with it is
recorded, and runs patch by patch when a patch is asked for. An operation that mixes patches needs the whole
tensor; it *materialises*, which is collective: every rank runs the same program, so every rank gets there.

Results are bit-equal to those of plain tensors as long as vectorised kernels see whole vectors: torch
computes the last few elements of an array with scalar code, whose `pow` or `exp` may differ in the last bit.
Patches whose number of elements is a multiple of 64 are safe.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from patchpipe.lazy.dispatch import constant_like, dispatch
from patchpipe.lazy.nodes import Exchange, Node, Receiver, Value
from patchpipe.lazy.plan import Args, Cut, Kwargs
from patchpipe.lazy.tensor import LazyTensor

__all__ = ["Exchange", "PatchTensor", "lift", "materialise_tree", "patch_of"]

aten = torch.ops.aten


class PatchTensor(LazyTensor):
    """A tensor cut along one dim into patches that may not have been computed yet.

    Make one with `promise`; every operation on it gives another one where it can, a plain tensor otherwise.

    Attributes:
        cut_dim: The dim that is cut, non-negative.
        bounds: Offsets of the patches along it, from 0 to its size, one more than there are patches. Slices
            along the cut dim may leave patches empty.
    """

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

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Keep einsum in one piece: torch would take it apart into reshapes that lose the cut."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.functional.einsum:
                tensors = args[1] if isinstance(args[1], (list, tuple)) else args[1:]
                return dispatch(aten.einsum.default, (args[0], list(tensors)), {})
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: OpOverload, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        """Record the operation, or materialise and run it."""
        return dispatch(func, args, kwargs or {})


def _check(cut: Cut, shape: Sequence[int], take: Callable[[int], Tensor] | None, exchange: Exchange) -> None:
    bounds = cut.bounds
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != shape[cut.dim] or sorted(bounds) != list(bounds):
        raise ValueError(f"bounds {bounds} do not cut dim {cut.dim} of shape {tuple(shape)}")
    if exchange.holder != (take is not None):
        raise ValueError("the holder must say how to take a patch, and only the holder can")


def patch_of(tensor: Tensor, dim: int, start: int, stop: int, index: int) -> Tensor:
    """Elements `start` to `stop` along `dim`, which are patch `index` of the caller's cut.

    Args:
        tensor: Plain, or lazy. A lazy tensor cut the same way waits for that patch alone, and for none where a plain
            one was joined to it; cut otherwise it waits for all the patches the range touches. Lazy tensors answer
            on the holder only.
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
    known = tensor.joined(start, stop) if tensor.cut_dim == dim else None
    if known is not None:
        return known
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
    return constant_like(tensor, tensor.clone().clone, like)


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
