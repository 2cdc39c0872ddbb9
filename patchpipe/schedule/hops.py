"""What goes from stage to stage, call after call, with receives posted before they can be met.

gloo moves nothing before the receive is posted. So a stage posts those of a whole call when the call begins, and
that of the next call's first patch too: it travels while this call's last patch is computed. Both sides work out from
the calls so far what the next one begins with; where they guessed wrong, an empty message uses the receive up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.distributed.transport import Receive
from patchpipe.parallel.lossy.residuals import Residuals

Shapes = dict[str, tuple[torch.Size, torch.dtype]]  # by stream


@dataclass(frozen=True)
class Crossing:
    """What a part of a call is as it enters this rank's stage, and as it leaves it.

    Attributes:
        entering: The streams from the stage before; none on the first stage.
        leaving: The streams for the next stage; none on the last stage.
        large: Whether it is the whole latent of a synchronous step, for which nothing is posted ahead.
        place: Its place among what both sides know, where changes are sent; else ``None``.
        come: The streams from the stage before as they are sent, if otherwise than as they are.
        go: The same for the next stage.
    """

    entering: Shapes
    leaving: Shapes
    large: bool
    place: Hashable = None
    come: Shapes | None = None
    go: Shapes | None = None

    @property
    def incoming(self) -> Shapes:
        """What comes from the stage before."""
        return self.entering if self.come is None else self.come

    @property
    def outgoing(self) -> Shapes:
        """What goes to the next stage."""
        return self.leaving if self.go is None else self.go


class Decoded:
    """A stream on its way as a change.

    Args:
        receive: Of the change.
        known: What is known of streams that come.
        key: Of the stream.
        told: Its shape and dtype.
    """

    def __init__(self, receive: Receive, known: Residuals, key: Hashable, told: tuple[torch.Size, torch.dtype]) -> None:
        self._receive, self._known, self._key, self._told = receive, known, key, told

    def take(self) -> torch.Tensor:
        """The stream; once only."""
        return self._known.unpack(self._key, self._receive.take(), *self._told)


Receives = dict[str, Receive]
Taken = dict[str, Receive | Decoded]


class Hops:
    """The streams that enter and leave this rank's stage, call after call.

    Args:
        group: The ranks.
    """

    def __init__(self, group: Group) -> None:
        self._group = group
        self._after: dict[Hashable, Crossing | None] = {}  # how the call after its last one began
        self._key: Hashable = None  # of the last call
        self._guess: Crossing | None = None  # how the next call begins
        self._ahead: Receives = {}  # posted for it
        self._came, self._went = Residuals(), Residuals()  # streams as both sides have them, where changes are sent

    def coded(self, key: Hashable, parts: Sequence[Crossing]) -> list[Crossing]:
        """The parts of a call as they will be sent: what has been sent before goes as its change, if so configured."""
        if self._group.config.compress is None:
            return list(parts)
        return [part if part.large else self._as_change((key, at), part) for at, part in enumerate(parts)]

    def _as_change(self, place: Hashable, part: Crossing) -> Crossing:
        come, go = (
            {name: known.sent_as((place, name), *told) for name, told in streams.items()}
            for known, streams in ((self._came, part.entering), (self._went, part.leaving))
        )
        return replace(part, place=place, come=come, go=go)

    def begin(self, key: Hashable, parts: Sequence[Crossing]) -> list[Taken]:
        """Posts what a call will receive, and what the next one will first.

        Args:
            key: The call's request and guidance branch.
            parts: What runs one after the other.

        Returns:
            The receives of each part by stream; empty ones on the first stage.
        """
        self._use_up(parts[0])
        posted = [self._ahead or self._expect(parts[0]), *map(self._expect, parts[1:])]
        if self._key is not None:
            # The whole latent of a synchronous step is large, and the call after a warm-up step seldom is another.
            self._after[self._key] = None if parts[0].large else parts[0]
        self._key, self._guess = key, self._after.get(key)
        self._ahead = self._expect(self._guess) if self._guess else {}
        return [self._decoded(*each) for each in zip(parts, posted, strict=True)]

    def _decoded(self, part: Crossing, receives: Receives) -> Taken:
        if part.place is None:
            return dict(receives)
        told = part.entering
        return {name: Decoded(one, self._came, (part.place, name), told[name]) for name, one in receives.items()}

    def pass_on(self, streams: dict[str, torch.Tensor], crossing: Crossing) -> None:
        """Sends a patch's streams to the next stage.

        Raises:
            RuntimeError: A block returned another dtype or shape than the next stage expects.
        """
        channel = self._group.channel_to_next() if crossing.leaving else None
        for name, (shape, dtype) in crossing.leaving.items():
            if (streams[name].shape, streams[name].dtype) != (shape, dtype):
                raise RuntimeError(
                    f"{name} left the stage as {tuple(streams[name].shape)} in {streams[name].dtype}, the next one "
                    f"expects {tuple(shape)} in {dtype}"
                )
            assert channel is not None
            own = streams[name].contiguous()
            channel.send(own if crossing.place is None else self._went.pack((crossing.place, name), own))

    def forget(self, request: int) -> None:
        """A request's calls are over; all ranks come to this alike."""
        own = [key for key in self._after if isinstance(key, tuple) and key[0] == request]
        for key in own:
            del self._after[key]
        for known in (self._came, self._went):
            known.forget(lambda key: key[0][0][0] == request)  # type: ignore[index]  # made of place and name above
        if isinstance(self._key, tuple) and self._key[0] == request:
            self._key = None

    def end(self) -> None:
        """Leaves nothing posted when the request ends."""
        self._use_up(Crossing({}, {}, large=False))

    def _use_up(self, begun: Crossing) -> None:
        """Meets the receives of a call that does not come; one side decides it by what the other does."""
        guess, self._guess = self._guess, None
        if guess is None:
            return
        if guess.outgoing != begun.outgoing:
            for shape, dtype in guess.outgoing.values():
                self._group.channel_to_next().send_nothing(shape, dtype)
        if guess.incoming != begun.incoming:
            for receive in self._ahead.values():
                receive.wait()
            self._ahead = {}

    def _expect(self, crossing: Crossing) -> Receives:
        return {
            name: self._group.channel_from_previous().expect(shape, dtype)
            for name, (shape, dtype) in crossing.incoming.items()
        }
