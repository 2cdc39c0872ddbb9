"""The seam between the root ``forward`` of a model, which sees whole shapes, and its blocks, which see a patch.

A seam stands around every block of the model. Blocks of stages before hand their streams through; at the stage's first
block the streams that came from the stage before take their place; arguments are cut to the patch's rows before a block
and put back among zeros after the last one of a list; and the next stage's first block ends the run. Code of the root
``forward`` between two block lists so runs before a hop, on the sender.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from patchpipe.layout.split import StageBlocks
from patchpipe.models.plan import BlockPlace
from patchpipe.stage.context import CallContext, Streams
from patchpipe.stage.survey import Survey, has_tensor, link_name


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
        self.passage, self.listing, self.index = passage, place.listing, index
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
            return context.received.get(link_name(self.index), self._through(arguments))
        if self.index == now.start and not self.passage.first:
            self._receive(arguments, context)
        elif (self.first or self.listing.whole_between) and context.cutter is not None:
            arguments |= {
                name: context.cutter.narrow(arguments[name], self.listing.rows[name])
                for name in self.listing.streams
                if arguments.get(name) is not None
            }
        if self.index == now.stop:
            self._leave(arguments, context)
        return self._run(arguments, context)

    def _through(self, arguments: Mapping[str, Any]) -> Any:
        return self._returned([arguments.get(name) for name in self.listing.streams])

    def _returned(self, streams: list[Any]) -> Any:
        return tuple(streams) if len(streams) > 1 else streams[0]

    def _receive(self, arguments: dict[str, Any], context: CallContext) -> None:
        """Puts what the stage before sent in the place of the streams."""
        some = next(iter(context.received.values()))
        for name in context.shapes.streams[self.listing.path]:
            blank = context.received.get(name)
            arguments[name] = context.shapes.blank(self.listing, name, some) if blank is None else blank

    def _leave(self, arguments: dict[str, Any], context: CallContext) -> None:
        """Ends the stage; the next one is not kept waiting for a block that both run in a synchronous step."""
        if self.passage.trails:
            context.trailing = partial(self._run, arguments, context)
        streams = {name: arguments[name] for name in self.listing.streams if arguments.get(name) is not None}
        for source in context.shapes.linked(self.index):
            name = link_name(source)
            streams[name] = context.results[source] if source in context.results else context.received[name]
        raise StageDone(streams)

    def _run(self, arguments: dict[str, Any], context: CallContext) -> Any:
        listing = self.listing
        context.masked = has_tensor(arguments.get(listing.mask or ""))
        if context.cutter is not None:
            arguments = {**arguments, **self._others(arguments, context)}
        context.before(self.index)
        result = self.compute(**arguments)
        context.after(self.index)
        if self.index in context.shapes.links.values():
            context.results[self.index] = result
        widens = self.last or self.listing.whole_between
        if context.cutter is None or not widens or (self.ends and context.tail):
            return result
        values = result if isinstance(result, tuple) else (result,)
        return self._returned(
            [
                None if value is None else context.cutter.widen(value, listing.stream_rows(name))
                for name, value in zip(listing.streams, values, strict=True)
            ]
        )

    def _others(self, arguments: Mapping[str, Any], context: CallContext) -> dict[str, Any]:
        """The patch's rows of the arguments that are no streams."""
        found = {}
        for name, held in self.listing.rows.items():
            value = arguments.get(name)
            if value is not None and name not in self.listing.streams:
                found[name] = context.narrowed(value, held)
        low, high = context.patch.rows
        found |= dict.fromkeys(self.listing.row_counts, high - low)
        mask = found.get(self.listing.mask or "")
        if isinstance(mask, Tensor) and mask.numel() == 0:
            found[self.listing.mask or ""] = None
        return found
