"""One block list of a proposed plan: its streams, whose rows its arguments have, and which layers mix them."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from patchpipe.checking.proposal.trace import Asked, Run, asked_in, changed_rows, outer_lists, perturbed
from patchpipe.models import usual
from patchpipe.models.blocks import BlockList, Holds
from patchpipe.models.latent import IMAGE, REFERENCE, Raster

Order = tuple[str, ...]


@dataclass
class Segments:
    """Whose rows streams have, and how many rows each segment has.

    Attributes:
        held: The segments of each stream, and the dim of its rows.
        sizes: Rows by segment.
    """

    held: dict[str, tuple[Order, int]]
    sizes: dict[str, int]

    def rows(self, order: Order) -> int:
        """Of these segments."""
        return sum(self.sizes.get(name, 0) for name in order)


@dataclass
class Found:
    """A list, and what could not be told of it."""

    listing: BlockList
    unknown: list[str] = field(default_factory=list)


def streams_of(runs: Sequence[Run]) -> tuple[str, ...]:
    """The arguments a list's blocks take and return, in the order they return them; none where that is not so.

    What a block returns *is* what the next one is given; where the root changes it in between, names and shapes tell.
    """
    first, following = runs[0], runs[1] if len(runs) > 1 else None
    found: list[str] = []
    for value in first.returned:
        if not isinstance(value, Tensor):
            if value is None:
                continue
            return ()
        name = None if following is None else _named(value, following.arguments)
        name = name or _alike(value, first.arguments, found)
        if name is None:
            return ()
        found.append(name)
    return tuple(found)


def _named(value: Tensor, arguments: Mapping[str, Any]) -> str | None:
    return next((name for name, given in arguments.items() if given is value), None)


def _alike(value: Tensor, arguments: Mapping[str, Any], taken: Sequence[str]) -> str | None:
    fits = [
        name
        for name, given in arguments.items()
        if isinstance(given, Tensor) and name not in taken and given.shape == value.shape and given.is_floating_point()
    ]
    return next((name for name in fits if name == "hidden_states"), fits[0] if fits else None)


def block_list(
    model: nn.Module, path: str, runs: Sequence[Run], streams: Order, segments: Segments, raster: Raster
) -> Found:
    """What a plan says of a list.

    Args:
        model: The model.
        path: The list.
        runs: Its blocks' calls.
        streams: See ``streams_of``.
        segments: Of its streams.
        raster: How the latent divides.
    """
    unknown: list[str] = []
    blocks = outer_lists(model)[path]
    layers = _layers(blocks, runs, streams, segments, unknown, path)
    rows: dict[str, Any] = {name: Holds(*segments.held[name]) for name in streams if name in segments.held}
    joint = max((order for order, _ in layers.values()), key=len, default=())
    others = {name: value for name, value in runs[0].arguments.items() if name not in streams and value is not None}
    for name, value in others.items():
        held = _holds(name, value, segments, joint)
        if held is not None:
            rows[name] = held
    between = any(
        not isinstance(run.arguments.get(name), Tensor)
        or all(run.arguments[name] is not value for value in before.returned)
        for before, run in itertools.pairwise(runs)
        for name in streams
    )
    sums, borders = _mixers(blocks[0], layers)
    listing = BlockList(
        path=path,
        count=_count(model, path, len(blocks), unknown),
        streams=streams,
        rows=rows,
        attention={layer: order for layer, (order, _) in layers.items()},
        asking={layer: asks for layer, (order, asks) in layers.items() if order and asks != order},
        mask=_mask(runs[0], layers, blocks[0]),
        links=_links(runs, streams),
        sums=sums,
        borders=borders,
        row_counts=tuple(name for name, value in others.items() if borders and type(value) is int and "height" in name),
        whole_between=between,
        per_call=_per_call(blocks[0], runs[0], streams),
    )
    if sums or borders:
        unknown.append(f"{path}: rows seem to meet in {', '.join((*sums, *borders))}, which is no attention")
    return Found(listing, unknown)


def _layers(
    blocks: nn.ModuleList, runs: Sequence[Run], streams: Order, segments: Segments, unknown: list[str], path: str
) -> dict[str, tuple[Order, Order]]:
    """The segments whose rows answer in each layer of the blocks, and those whose rows ask."""
    found: dict[str, tuple[Order, Order]] = {}
    for block, run in zip(blocks, runs, strict=True):
        for layer, orders in _layers_of(block, run, streams, segments, unknown, path).items():
            found.setdefault(layer, orders)
    return found


def _layers_of(
    block: nn.Module, run: Run, streams: Order, segments: Segments, unknown: list[str], path: str
) -> dict[str, tuple[Order, Order]]:
    try:
        plain, _ = asked_in(block, run.arguments)
    except Exception as error:
        unknown.append(f"{path}: its layers, since a block cannot be run by itself ({type(error).__name__}: {error})")
        return {}
    names = [*dict.fromkeys(name for order, _ in segments.held.values() for name in order)]
    moved: dict[str, list[Asked]] = {}
    for name in names:
        moved[name] = asked_in(block, _moved(run.arguments, segments, name))[0]
    extra = _texts(run, streams, segments)
    if extra and "text" not in names:
        changed = {**run.arguments, **{name: perturbed(run.arguments[name]) for name in extra}}
        moved["text"] = asked_in(block, changed)[0]
    found: dict[str, tuple[Order, Order]] = {}
    for layer, times in Counter(asked.path for asked in plain).items():
        if times > 1:
            unknown.append(f"{path}: {layer} calls attention {times} times, which patchpipe cannot cut")
    for at, asked in enumerate(plain):
        keys, queries = (
            _labelled(getattr(asked, kind), {name: getattr(some[at], kind) for name, some in moved.items()})
            for kind in ("key", "query")
        )
        if IMAGE not in keys and IMAGE not in queries:
            continue
        found[asked.path] = (keys, queries) if IMAGE in keys else ((), ())
        for name, size in _sizes(asked.key, {name: some[at].key for name, some in moved.items()}).items():
            if IMAGE in keys:
                segments.sizes.setdefault(name, size)
    return found


def _texts(run: Run, streams: Order, segments: Segments) -> list[str]:
    """Arguments that look like a text no block changes."""
    picture = segments.sizes[IMAGE]
    return [
        name
        for name, value in run.arguments.items()
        if isinstance(value, Tensor) and name not in streams and value.ndim == 3 and value.is_floating_point()
        and value.shape[1] != picture and value.shape[2] > 8 and "emb" not in name
    ]  # fmt: skip


def _moved(arguments: Mapping[str, Any], segments: Segments, name: str) -> dict[str, Any]:
    """The arguments with other numbers in the rows of one segment."""
    found = dict(arguments)
    for stream, (order, dim) in segments.held.items():
        if name not in order or not isinstance(arguments.get(stream), Tensor):
            continue
        value, flags, at = arguments[stream], torch.zeros(arguments[stream].shape[dim]), 0
        for each in order:
            flags[at : at + segments.sizes.get(each, 0)] = float(each == name)
            at += segments.sizes.get(each, 0)
        found[stream] = perturbed(value, flags, dim)
    return found


def _labels(plain: Tensor, moved: Mapping[str, Tensor]) -> list[str]:
    rows = [""] * plain.shape[2]
    for name, other in moved.items():
        if other.shape == plain.shape:
            for place in changed_rows(plain, other, 2).nonzero().flatten().tolist():
                rows[place] = rows[place] or name
    return rows


def _labelled(plain: Tensor, moved: Mapping[str, Tensor]) -> Order:
    """The segments of an attention's rows, in their order."""
    order: list[str] = []
    for label in _labels(plain, moved):
        if label and (not order or order[-1] != label):
            order.append(label)
    return tuple(dict.fromkeys(order))


def _sizes(plain: Tensor, moved: Mapping[str, Tensor]) -> dict[str, int]:
    return {name: count for name, count in Counter(_labels(plain, moved)).items() if name}


def _holds(name: str, value: Any, segments: Segments, joint: Order) -> Holds | tuple[Holds | None, ...] | None:
    """Whose rows an argument has, by how many it has; ``None`` where it goes in whole."""
    if isinstance(value, (tuple, list)) and value and all(isinstance(each, Tensor) for each in value):
        held = tuple(_of_tensor(name, each, segments, joint) for each in value)
        return held[0] if all(each == held[0] for each in held) else held
    if isinstance(value, dict):
        tensors = [each for each in value.values() if isinstance(each, Tensor)]
        return _of_tensor(f"{name} mask", tensors[0], segments, joint) if tensors else None
    return _of_tensor(name, value, segments, joint) if isinstance(value, Tensor) else None


def _of_tensor(name: str, value: Tensor, segments: Segments, joint: Order) -> Holds | None:
    pictures = tuple(each for each in (IMAGE, REFERENCE) if each in segments.sizes)
    riders = tuple(each for each in joint if each not in pictures)
    orders = [order for order in dict.fromkeys((pictures, joint, *((each,) for each in riders))) if order]
    of_mask = "mask" in name
    dims = [dim for dim in range(value.ndim) if of_mask or dim < value.ndim - 1 or value.ndim == 1]
    fits = [(order, dim) for order in orders for dim in dims if value.shape[dim] == segments.rows(order)]
    fits = [fit for fit in fits if fit[1] or value.ndim <= 3]
    if of_mask:
        fits = [fit for fit in fits if value.ndim < 4 or fit[1] >= 2]
        if len({dim for _, dim in fits}) > 1:  # by query and key: it stays whole
            return None
    if not fits:
        return None
    order, dim = fits[0]
    return Holds(order, dim)


def _mask(run: Run, layers: Mapping[str, Any], block: nn.Module) -> str | None:
    """The argument that masks keys of layers that mix."""
    names = [name for name, value in run.arguments.items() if "mask" in name and _has_tensor(value)]
    asked, _ = asked_in(block, run.arguments)
    masked = any(each.mask is not None for each in asked if layers.get(each.path, ((), ()))[0])
    dicts = [name for name, value in run.arguments.items() if isinstance(value, dict) and _has_tensor(value)]
    return next(iter([*names, *dicts]), None) if masked else None


def _has_tensor(value: Any) -> bool:
    some = value.values() if isinstance(value, dict) else (value,)
    return any(isinstance(each, Tensor) for each in some)


def _links(runs: Sequence[Run], streams: Order) -> tuple[str, ...]:
    """Arguments that are what an earlier block returned, and not the one before."""
    found = []
    for at, run in enumerate(runs):
        for name, value in run.arguments.items():
            earlier = any(value is each for before in runs[:at] for each in before.returned)
            if isinstance(value, Tensor) and name not in streams and earlier:
                found.append(name)
    return tuple(dict.fromkeys(found))


def _mixers(block: nn.Module, layers: Mapping[str, Any]) -> tuple[Order, Order]:
    """Attention modules that never ask attention, and convolutions over more than one place."""
    attention = [path for path, part in block.named_modules() if hasattr(part, "to_q") and hasattr(part, "to_k")]
    sums = tuple(path for path in attention if path not in layers)
    borders = tuple(
        path
        for path, part in block.named_modules()
        if isinstance(part, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and max(part.kernel_size) > 1
    )
    return (sums if borders else ()), borders


def _count(model: nn.Module, path: str, length: int, unknown: list[str]) -> str:
    """The field of the configuration that tells how long a list is: with one more, so is the list."""
    config = {name: value for name, value in dict(model.config).items() if not name.startswith("_")}
    for name, value in config.items():
        if type(value) is int and 0 < value <= length:
            try:
                with torch.device("meta"):
                    longer = type(model).from_config({**config, name: value + 1}).get_submodule(path)
            except Exception:
                continue
            if len(longer) > length:
                return name
    for name, value in config.items():
        if isinstance(value, (list, tuple)) and len(value) == length:
            return name
    unknown.append(f"{path}: count, the field of the configuration that tells how many blocks it has")
    return "num_layers"


@torch.no_grad()
def _per_call(block: nn.Module, run: Run, streams: Order) -> Order:
    """Linears that see no rows, such as those that modulate: the same for every patch of a call."""
    batch = next(value.shape[0] for name in streams if isinstance(value := run.arguments.get(name), Tensor))
    found: list[str] = []
    handles = []
    for path, part in block.named_modules():
        if isinstance(part, nn.Linear):

            def seen(_: nn.Module, given: Any, path: str = path) -> None:
                if given and given[0].ndim == 2 and given[0].shape[0] == batch:
                    found.append(path)

            handles.append(part.register_forward_pre_hook(seen))
    try:
        asked_in(block, run.arguments)
    finally:
        for handle in handles:
            handle.remove()
    return usual.BLOCK_TIME if set(found) <= set(usual.BLOCK_TIME) else tuple(dict.fromkeys(found))
