"""One run of a plain model, looked at: what blocks are given and return, and which rows come of which input."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from patchpipe.checking.loop import Sample, copied


@dataclass(frozen=True)
class Run:
    """One call of one block.

    Attributes:
        path: Its list.
        index: Its place in it.
        arguments: What it was given, by name.
        result: What it returned.
    """

    path: str
    index: int
    arguments: Mapping[str, Any]
    result: Any

    @property
    def returned(self) -> tuple[Any, ...]:
        """What it returned, one thing after the other."""
        return self.result if isinstance(self.result, tuple) else (self.result,)


def outer_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    """The module lists that are in no other one, by path."""
    found: dict[str, nn.ModuleList] = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and not any(path.startswith(f"{one}.") for one in found):
            found[path] = module
    return found


@torch.no_grad()
def runs_of(
    model: nn.Module, inputs: Mapping[str, Any], streams: Mapping[str, Sequence[str]] | None = None
) -> list[Run]:
    """Runs a model and tells every call of a block.

    Args:
        model: The model.
        inputs: What it is called with.
        streams: Lists whose blocks hand these arguments through, and so mix no rows.
    """
    runs: list[Run] = []
    changed: list[nn.Module] = []
    for path, blocks in outer_lists(model).items():
        for index, block in enumerate(blocks):
            block.forward = _watched(block, path, index, runs, (streams or {}).get(path))
            changed.append(block)
    try:
        model(**inputs, return_dict=False)
    finally:
        for block in changed:
            del block.forward
    return runs


def _watched(
    block: nn.Module, path: str, index: int, runs: list[Run], through: Sequence[str] | None
) -> Callable[..., Any]:
    forward = block.forward
    names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]

    def watched(*args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(names, args, strict=False)), **kwargs}
        if through is None:
            result = forward(*args, **kwargs)
        else:
            handed = tuple(arguments.get(name) for name in through)
            result = handed if len(handed) > 1 else handed[0]
        runs.append(Run(path, index, arguments, result))
        return result

    return watched


def perturbed(value: Any, rows: Tensor | None = None, dim: int = 1) -> Any:
    """A value with other numbers in it, in some rows or in all; what has none stays."""
    if isinstance(value, Tensor) and value.is_floating_point():
        known = torch.Generator().manual_seed(7)
        noise = torch.randn(value.shape, generator=known, dtype=torch.float64).to(value.dtype)
        if rows is not None:
            shape = [1] * value.ndim
            shape[dim] = len(rows)
            noise = noise * rows.view(shape).to(value.dtype)
        return value + noise
    if isinstance(value, (list, tuple)) and rows is None:
        return type(value)(map(perturbed, value))
    return value


def changed_rows(one: Tensor, other: Tensor, dim: int) -> Tensor:
    """Which rows differ, ``[rows]``."""
    apart = (one != other) & ~(one.isnan() & other.isnan())
    return apart.transpose(0, dim).flatten(1).any(1)


def with_latent(sample: Sample, change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    """The inputs of the first call, with another latent."""
    return sample.inputs(0, change(sample.latents[0]))


@dataclass(frozen=True)
class Asked:
    """One call of attention.

    Attributes:
        path: The module of the block that made it.
        query: Its queries, ``[batch, heads, rows, width]``.
        key: Its keys.
        mask: Its mask, if any.
    """

    path: str
    query: Tensor
    key: Tensor
    mask: Tensor | None


class Unmixed(TorchFunctionMode):
    """Attention that mixes nothing, and tells what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[Asked] = []
        self.within: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if func is not scaled_dot_product_attention:
            return func(*args, **given)
        named = {**dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)), **given}
        query, value = named["query"], named["value"]
        mask = named.get("attn_mask")
        self.asked.append(Asked(self.within[-1] if self.within else "", query, named["key"], mask))
        return query.new_zeros(*query.shape[:-1], value.shape[-1])


@torch.no_grad()
def asked_in(block: nn.Module, arguments: Mapping[str, Any]) -> tuple[list[Asked], Any]:
    """What attention is asked in a block, with nothing mixed; and what the block then returns."""
    mode = Unmixed()
    with _named(block, mode), mode:
        result = block(**{name: copied(value) for name, value in arguments.items()})
    return mode.asked, result


@contextmanager
def _named(block: nn.Module, mode: Unmixed) -> Iterator[None]:
    """Tells the mode which module of the block is at work."""
    handles = []
    for path, module in block.named_modules():
        if path:
            handles.append(module.register_forward_pre_hook(lambda *_, path=path: mode.within.append(path)))
            handles.append(module.register_forward_hook(lambda *_: mode.within.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
