"""What a call looks like inside: rows of every segment, streams between blocks, the prediction.

Found by running the root ``forward`` with blocks that hand their streams through, once for inputs of the same shapes.
Nothing of it need be in a plan, and every rank finds the same, whatever blocks it holds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from patchpipe.models.blocks import BlockList, Holds
from patchpipe.models.latent import IMAGE, PREFIX, REFERENCE, Raster
from patchpipe.models.plan import ModelPlan
from patchpipe.stage.patches import Patch
from patchpipe.stage.rows import Rows, has_rows


@dataclass(frozen=True)
class StreamKind:
    """A stream as it enters the blocks of a list.

    Attributes:
        rows: Its rows.
        width: Its channels.
        dtype: What it is in.
        dim: The dim of its rows; the batch is in the other of the first two.
    """

    rows: Rows
    width: int
    dtype: torch.dtype
    dim: int = 1

    def shape(self, batch: int, count: int) -> torch.Size:
        """Of so many rows of it."""
        return torch.Size((count, batch, self.width) if self.dim == 0 else (batch, count, self.width))


@dataclass(frozen=True)
class CallShapes:
    """What is known of a call before any patch runs; the same on every rank.

    Attributes:
        raster: How the latent divides.
        sizes: Rows of every segment.
        streams: The streams of every block list, by its path.
        output: Shape of the prediction.
        dtype: What it is in.
        second: Shape of the class's second output, where the plan has one.
        carried: Blocks whose results later ones need, by their place among all blocks: the list whose first stream has
            rows like theirs, and the last place that needs them.
        cache: What a call returns for its pipeline to keep, with nothing in it; see ``plan.Prefix``.
    """

    raster: Raster
    sizes: Mapping[str, int]
    streams: Mapping[str, Mapping[str, StreamKind]]
    output: torch.Size
    dtype: torch.dtype
    carried: Mapping[int, tuple[str, int]] = field(default_factory=dict)
    second: torch.Size | None = None
    cache: Any = None

    @property
    def riders(self) -> int:
        """Rows that go through the blocks with the first patch, beside the picture's."""
        return sum(size for name, size in self.sizes.items() if name not in (IMAGE, PREFIX, REFERENCE))

    @property
    def width(self) -> int:
        """Channels of the tokens between blocks."""
        return next(kind.width for streams in self.streams.values() for kind in streams.values())

    def along(self, index: int) -> dict[str, StreamKind]:
        """Results of blocks before a place that blocks from there on need, by ``result_name``."""
        return {
            result_name(source): next(iter(self.streams[path].values()))
            for source, (path, last) in sorted(self.carried.items())
            if source < index <= last
        }

    def hop(
        self, listing: BlockList, batch: int, piece: Patch, index: int = 0
    ) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """What goes from stage to stage before a block of this list, by stream; streams without rows do not.

        Args:
            listing: The list.
            batch: Entries of the batch.
            piece: The rows.
            index: The block's place among all blocks, where results of earlier ones may go along.
        """
        kinds = {**self.streams[listing.path], **self.along(index)}
        found = {}
        for name, kind in kinds.items():
            count = kind.rows.count(piece)
            if count:
                found[name] = kind.shape(batch, count), kind.dtype
        return found

    def blank(self, listing: BlockList, name: str, like: Tensor) -> Tensor:
        """A stream without rows, as the blocks of a list take it."""
        kind = self.streams[listing.path][name]
        return like.new_zeros(kind.shape(like.shape[1 - kind.dim], 0))


class Survey:
    """Collects what the first block of every list is given.

    Args:
        plan: The model's plan.
        raster: How the latent divides.
    """

    def __init__(self, plan: ModelPlan, raster: Raster) -> None:
        self._plan, self._raster = plan, raster
        self._seen: dict[str, Mapping[str, Any]] = {}
        self._carried: dict[int, tuple[str, int]] = {}
        self._returned: list[tuple[int, Any]] = []  # kept, lest another tensor takes its id

    def see(self, listing: BlockList, arguments: Mapping[str, Any], index: int) -> Mapping[str, Any]:
        """Takes a look at a block's arguments; returns those that the block hands through."""
        self._seen.setdefault(listing.path, arguments)
        if listing.emits:
            self._carried[index] = listing.path, sys.maxsize  # to the last block, whichever that is
        if not listing.links:
            return arguments
        for given in (arguments[name] for name in listing.links if arguments.get(name) is not None):
            source = next(source for source, result in self._returned if result is given)
            self._carried[source] = listing.path, index
        through = {name: arguments[name].view_as(arguments[name]) for name in listing.streams}  # known by identity
        self._returned += [(index, result) for result in through.values()]
        return {**arguments, **through}

    def shapes(self, prediction: Tensor, second: Tensor | None = None) -> CallShapes:
        """What was found.

        Args:
            prediction: What the root ``forward`` returned.
            second: Its second output, where the plan has one.

        Raises:
            RuntimeError: The model's plan does not fit what the blocks were given.
        """
        sizes = self._sizes()
        streams = {listing.path: self._streams(listing, sizes) for listing in self._plan.blocks}
        beside = None if second is None else second.shape
        return CallShapes(self._raster, sizes, streams, prediction.shape, prediction.dtype, self._carried, beside)

    def _given(self, listing: BlockList, name: str) -> Any:
        """An argument of a list's first block; ``None`` if the model has no such blocks."""
        return self._seen.get(listing.path, {}).get(name)

    def _sizes(self) -> dict[str, int]:
        sizes = {IMAGE: self._raster.total}
        if self._plan.prefix is not None:
            sizes[REFERENCE] = self._raster.joined
        for listing in self._plan.blocks:
            for name, held in listing.rows.items():
                for each, value in _pairs(held, self._given(listing, name)):
                    unknown = [segment for segment in each.segments if segment not in sizes]
                    if len(unknown) == 1 and (has_rows(value, each) or name in listing.streams):
                        sizes[unknown[0]] = value.shape[each.dim] - sum(
                            sizes[segment] for segment in each.segments if segment in sizes
                        )
        return sizes

    def _streams(self, listing: BlockList, sizes: Mapping[str, int]) -> dict[str, StreamKind]:
        found = {}
        for name in (*listing.streams, *listing.passes):
            value, held = self._given(listing, name), listing.stream_rows(name)
            if value is None:
                continue
            missing = [segment for segment in held.segments if segment not in sizes]
            rows = None if missing else Rows.of(held.segments, sizes, self._raster)
            if rows is None or value.shape[held.dim] != rows.total or min(rows.sizes) < 0:
                raise RuntimeError(
                    f"{name} has {value.shape[held.dim]} rows before {listing.path}, but the plan of "
                    f"{self._plan.model} says {', '.join(f'{key} {size}' for key, size in sizes.items())}"
                )
            found[name] = StreamKind(rows, value.shape[-1], value.dtype, held.dim)
        return found


def _pairs(held: Holds | tuple[Holds | None, ...], value: Any) -> Sequence[tuple[Holds, Tensor]]:
    """Every tensor of an argument, with whose rows it has."""
    if isinstance(held, tuple):
        values = value if isinstance(value, (tuple, list)) else (None,) * len(held)
        return [(own, each) for own, each in zip(held, values, strict=True) if own and isinstance(each, Tensor)]
    found = _first_tensor(value)
    return [] if found is None else [(held, found)]


def _first_tensor(value: Any) -> Tensor | None:
    """The tensor, or the first one of a tuple, a list or a dict of them."""
    if isinstance(value, Tensor):
        return value
    values = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return next((each for each in values if isinstance(each, Tensor)), None)


def has_tensor(value: Any) -> bool:
    """Whether an argument is a tensor, or a tuple, list or dict with one."""
    return _first_tensor(value) is not None


def result_name(index: int) -> str:
    """What a block's result that later blocks need is called where it goes from stage to stage."""
    return f"from block {index}"


def shapes_key(inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What the shapes inside a call follow from."""
    return tuple((name, _key(value)) for name, value in sorted(inputs.items()))


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return shapes_key(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(_key, value))
    return value if isinstance(value, (int, float, bool, str, type(None))) else type(value)
