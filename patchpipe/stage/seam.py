"""The seam between the root ``forward`` of a model, which sees whole shapes, and its blocks, which see a patch.

A seam stands around every block of the model. Blocks of stages before hand their streams through; at the stage's first
block the streams that came from the stage before take their place; arguments are cut to the patch's rows before a block
and put back among zeros after the last one of a list; and the next stage's first block ends the run. Code of the root
``forward`` between two block lists so runs before a hop, on the sender.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from patchpipe.models.plan import BlockPlace
from patchpipe.stage.context import CallContext, Streams

if TYPE_CHECKING:
    from patchpipe.stage.stage import Stage


class StageDone(Exception):
    """Ends the root ``forward`` before the next stage's first block; carries its streams."""

    def __init__(self, streams: Streams) -> None:
        super().__init__()
        self.streams = streams


class Seam:
    """Stands in for the ``forward`` of one block.

    Args:
        stage: The stage of this rank.
        place: The block.
        index: Its place among all blocks.
        last: Whether it is the last one of its list.
    """

    def __init__(self, stage: Stage, place: BlockPlace, index: int, *, last: bool) -> None:
        self.stage, self.listing, self.index = stage, place.listing, index
        self.first, self.last = place.index == 0, last
        self.compute: Callable[..., Any] = place.block.forward
        self.names = [name for name in inspect.signature(type(place.block).forward).parameters if name != "self"]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The block's streams; of blocks that other stages run, what they were given."""
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if self.stage.survey is not None:
            self.stage.survey.see(self.listing, arguments)
            return self._through(arguments)
        context, now = self.stage.at_work
        if self.index < now.start:
            return self._through(arguments)
        if self.index == now.start and not self.stage.first:
            self._receive(arguments, context)
        elif self.first and context.cutter is not None:
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
        if self.stage.trails:
            context.trailing = partial(self._run, arguments, context)
        raise StageDone({name: arguments[name] for name in self.listing.streams if arguments.get(name) is not None})

    def _run(self, arguments: dict[str, Any], context: CallContext) -> Any:
        listing = self.listing
        context.masked = listing.mask is not None and arguments.get(listing.mask) is not None
        if context.cutter is not None:
            arguments = {**arguments, **self._others(arguments, context)}
        context.before(self.index)
        result = self.compute(**arguments)
        context.after(self.index)
        if not self.last or context.cutter is None:
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
        mask = found.get(self.listing.mask or "")
        if isinstance(mask, Tensor) and mask.numel() == 0:
            found[self.listing.mask or ""] = None
        return found
