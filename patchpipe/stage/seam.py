"""The seam between the root ``forward`` of a model, which sees whole shapes, and its blocks, which see a patch.

A seam stands around every block of the model. Blocks of stages before hand their streams through; at the stage's first
block the streams that came from the stage before take their place; arguments are cut to the patch's rows before a block
and put back among zeros after the last one of a list; and the next stage's first block ends the run. Code of the root
``forward`` between two block lists so runs before a hop, on the sender. All this is so too at a block that a call
leaves out: the root calls it all the same, and its seam does not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchpipe.layout.split import StageBlocks
from patchpipe.models.blocks import BlockPlace, Holds
from patchpipe.models.latent import Latent
from patchpipe.stage.context import CallContext, Streams
from patchpipe.stage.keys.prefix import BlockCache
from patchpipe.stage.root.survey import Survey, has_tensor, result_name


class StageDone(Exception):
    """Ends the root ``forward`` before the next stage's first block; carries its streams."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams


@dataclass
class Passage:
    """What the seams of a stage read: where the patch at work enters the stage and leaves it.

    Attributes:
        owned: The blocks of the stage.
        first: Whether it is the first stage.
        context: The patch at work.
        survey: Looks at what blocks are given, while the shapes of a call are found out.
    """

    owned: StageBlocks
    first: bool
    context: CallContext | None = None
    survey: Survey | None = None

    @property
    def at_work(self) -> CallContext:
        """The patch at work."""
        assert self.context is not None, "a block was called outside a call of the transformer"
        return self.context

    @property
    def now(self) -> range:
        """The blocks that run in its turn."""
        turn = self.at_work.turn
        return self.owned.whole if turn is None else self.owned.of(*turn)

    @property
    def trails(self) -> bool:
        """Whether the block after these is the next stage's in this step, but its keys and values are kept here too."""
        shared = self.owned.stop.share > 0 and not self.owned.halves
        return shared and self.at_work.turn is None and self.at_work.stores is not None

    def range_of(self, grid: Latent, latent: Tensor) -> tuple[int, int] | None:
        """The range of a patch that streams in the latent that the root was given; ``None`` for any other tensor."""
        context = self.context
        if context is None or context.patch.whole or len(context.patch.spans) > 1:
            return None
        whole = context.inputs[grid.name]
        same = (latent.ndim, latent.shape[grid.dim]) == (whole.ndim, whole.shape[grid.dim])
        return context.patch.spans[0] if same else None


class Seam:
    """Stands in for the ``forward`` of one block.

    Args:
        passage: The stage's.
        place: The block.
        index: Its place among all blocks.
        last: Whether the next block is of another list, or there is none: its rows are then put back into the whole.
        ends: Whether there is none: what follows may then take the rows as they are, see ``ModelPlan.tail``.
    """

    def __init__(self, passage: Passage, place: BlockPlace, index: int, *, last: bool, ends: bool) -> None:
        self.passage, self.listing, self.index, self.name = passage, place.listing, index, place.name
        self.first, self.last, self.ends = place.index == 0, last, ends
        self.compute: Callable[..., Any] = place.block.forward
        self.names = [name for name in inspect.signature(type(place.block).forward).parameters if name != "self"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's streams; of blocks that other stages run, what they were given."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.passage.survey is not None:
            return self._through(self.passage.survey.see(self.listing, arguments, self.index))
        context, now = self.passage.at_work, self.passage.now
        if self.index < now.start:
            return self._through(arguments, context)
        if self.index == now.start and not self.passage.first:
            self._receive(arguments, context)
        elif (self.first or self.listing.whole_between) and context.cutter is not None:
            arguments |= {
                name: context.cutter.narrow(arguments[name], self.listing.rows[name])
                for name in self.listing.streams
                if arguments.get(name) is not None
            }
        if self.first:  # a list may begin with what came with another's streams
            arguments |= {name: context.passed[name] for name in self.listing.streams if name in context.passed}
        if self.index == now.stop:
            self._leave(arguments, context)
        return self._run(arguments, context)

    def _through(self, arguments: Mapping[str, Any], context: CallContext | None = None) -> Any:
        """What a block of another stage returns to the root: what it was given, and what came of it to this stage."""
        streams, name = [arguments.get(name) for name in self.listing.streams], result_name(self.index)
        if context is not None:
            context.streams_are = "nothing"
        if context is not None and name in context.received:
            context.results[name] = result = context.received[name]
            if not self.listing.emits:  # a block takes it as it was returned
                return result
            return self._returned([self._widened(self.listing.streams[0], result, context), *streams])
        return self._returned([*(streams[0] for _ in self.listing.emits), *streams])

    def _widened(self, name: str, rows: Tensor, context: CallContext) -> Tensor:
        return rows if context.cutter is None else context.cutter.widen(rows, self.listing.stream_rows(name))

    def _returned(self, streams: list[Any]) -> Any:
        return tuple(streams) if len(streams) > 1 else streams[0]

    def _receive(self, arguments: dict[str, Any], context: CallContext) -> None:
        """Puts what the stage before sent in the place of the streams."""
        some = next(iter(context.received.values()))
        context.passed = {name: context.received[name] for name in self.listing.passes}
        for name in self.listing.streams:
            if name not in context.shapes.streams[self.listing.path]:
                continue
            blank = context.received.get(name)
            arguments[name] = context.shapes.blank(self.listing, name, some) if blank is None else blank

    def _leave(self, arguments: dict[str, Any], context: CallContext) -> None:
        """Ends the stage; the next one is not kept waiting for a block that both run in a synchronous step."""
        if self.passage.trails and self.index not in context.left_out:
            context.trailing = partial(self._run, arguments, context)
        streams = {name: arguments[name] for name in self.listing.streams if arguments.get(name) is not None}
        along = {name: context.results[name] for name in context.shapes.along(self.index)}
        raise StageDone({**streams, **self._passed(arguments, context), **along})

    def _passed(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Tensor]:
        """The rows of arguments that a later list begins with: as they came, or the patch's of the whole."""
        found = {}
        for name in self.listing.passes:
            if name in context.passed:
                found[name] = context.passed[name]
            else:
                whole = context.cutter is None
                found[name] = arguments[name] if whole else context.narrowed(arguments[name], self.listing.rows[name])
        return found

    def _run(self, arguments: dict[str, Any], context: CallContext) -> Any:
        listing = self.listing
        context.entered = True
        context.masked = has_tensor(arguments.get(listing.mask or ""))
        if context.cutter is not None:
            arguments = {**arguments, **self._others(arguments, context)}
        arguments = {**arguments, **{name: context.passed[name] for name in listing.passes if name in context.passed}}
        arguments |= self._cached(arguments, context)
        if listing.drops_masked and context.keeps:
            arguments |= self._undropped(arguments, context)
        context.before(self.index)
        result = self._without_blanks(self._computed(arguments, context), context)
        context.after(self.index)
        if self.ends and context.draft:  # no prediction is made of it
            raise StageDone({})
        if self.index in context.shapes.carried:
            context.results[result_name(self.index)] = result[0] if listing.emits else result
        widens = self.last or listing.whole_between or bool(listing.emits)
        stays = context.cutter is None or not widens or (self.ends and context.tail)
        context.streams_are = "rows" if stays or not (self.last or listing.whole_between) else "whole"
        if stays:
            return result
        values = result if isinstance(result, tuple) else (result,)
        named = zip((*(listing.streams[0] for _ in listing.emits), *listing.streams), values, strict=True)
        return self._returned(
            [
                value if value is None or not self._puts_back(at) else self._widened(name, value, context)
                for at, (name, value) in enumerate(named)
            ]
        )

    def _cached(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """The stage's own cache in the place of the pipeline's, if the block is given one."""
        name, _, key = self.listing.cache.partition(".")
        given: Any = arguments.get(name)
        if not given or (key and given.get(key) is None):
            return {}
        own = BlockCache(context.prefix_of(self.name), context.entries, apart=context.cutter is not None)
        return {name: {**given, key: own} if key else own}

    def _computed(self, arguments: dict[str, Any], context: CallContext) -> Any:
        """What the block makes of its streams: nothing new where the call leaves it out."""
        return self._through(arguments) if self.index in context.left_out else self.compute(**arguments)

    def _puts_back(self, at: int) -> bool:
        """Whether a result is put back into the whole: a stream only where no other block of the list follows."""
        return at < len(self.listing.emits) or self.last or self.listing.whole_between

    def _blank(self, name: str, context: CallContext) -> bool:
        """Whether a row of zeros stands in for a stream of which the patch has none."""
        lacking = name in self.listing.never_empty and context.cutter is not None
        return lacking and context.cutter.lacks(self.listing.stream_rows(name))  # type: ignore[union-attr]

    def _without_blanks(self, result: Any, context: CallContext) -> Any:
        """A block's streams, without what became of the rows of zeros."""
        if not any(self._blank(name, context) for name in self.listing.never_empty):
            return result
        values = zip(self.listing.streams, result, strict=True)
        return self._returned([value[:, :0] if self._blank(name, context) else value for name, value in values])

    def _others(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """The patch's rows of the arguments that are no streams."""
        found = {}
        for name, held in self.listing.rows.items():
            value = arguments.get(name)
            if value is not None and name not in self.listing.streams:
                found[name] = context.narrowed(value, held)
        for name in self.listing.never_empty:
            value = arguments.get(name)
            if value is not None and self._blank(name, context):
                found[name] = value.new_zeros(value.shape[0], 1, *value.shape[2:])
        assert context.cutter is not None
        for name in self.listing.counts:
            if arguments.get(name) is not None:
                found[name] = context.cutter.leading(arguments[name])
        low, high = context.patch.rows
        found |= dict.fromkeys(self.listing.row_counts, high - low)
        mask = found.get(self.listing.mask or "")
        if isinstance(mask, Tensor) and mask.numel() == 0 and not self.listing.drops_masked:
            found[self.listing.mask or ""] = None
        return found

    def _undropped(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """A mask of nothing, with the true one put aside."""
        name = self.listing.mask or ""
        context.kept_keys = arguments[name].bool()
        return {name: torch.ones_like(arguments[name])}


class Nothing:
    """Added to a tensor, leaves it as it is: costs nothing where a sum is not read by anybody."""

    def __radd__(self, other: Any) -> Any:
        return other


class Residuals(Sequence[Any]):
    """Tensors that the root adds to streams between blocks: each is cut as the streams are at the time.

    Args:
        whole: The tensors.
        held: Whose rows each has.
        passage: The stage's.
    """

    def __init__(self, whole: Sequence[Tensor], held: Holds, passage: Passage) -> None:
        self._whole, self._held, self._passage = whole, held, passage

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, index: Any) -> Any:
        value, context = self._whole[index], self._passage.context
        if context is None or context.streams_are == "whole":
            return value
        if context.streams_are == "nothing":
            return Nothing()
        return value if context.cutter is None else context.narrowed(value, self._held)
