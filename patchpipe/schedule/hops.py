"""What goes from stage to stage, call after call, with receives posted before they can be met.

gloo moves nothing before the receive is posted. So a stage posts those of a whole call when the call begins, and
that of the next call's first patch too: it travels while this call's last patch is computed. Both sides work out from
the calls so far what the next one begins with; where they guessed wrong, an empty message uses the receive up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.distributed.transport import Receive

Shapes = dict[str, tuple[torch.Size, torch.dtype]]  # by stream
Receives = dict[str, Receive]


@dataclass(frozen=True)
class Crossing:
    """What a part of a call is as it enters this rank's stage, and as it leaves it.

    Attributes:
        entering: The streams from the stage before; none on the first stage.
        leaving: The streams for the next stage; none on the last stage.
        large: Whether it is the whole latent of a synchronous step, for which nothing is posted ahead.
    """

    entering: Shapes
    leaving: Shapes
    large: bool


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

    def begin(self, key: Hashable, parts: Sequence[Crossing]) -> list[Receives]:
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
        return posted

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
            channel.send(streams[name].contiguous())

    def forget(self, request: int) -> None:
        """A request's calls are over; all ranks come to this alike."""
        own = [key for key in self._after if isinstance(key, tuple) and key[0] == request]
        for key in own:
            del self._after[key]
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
        if guess.leaving != begun.leaving:
            for shape, dtype in guess.leaving.values():
                self._group.channel_to_next().send_nothing(shape, dtype)
        if guess.entering != begun.entering:
            for receive in self._ahead.values():
                receive.wait()
            self._ahead = {}

    def _expect(self, crossing: Crossing) -> Receives:
        return {
            name: self._group.channel_from_previous().expect(shape, dtype)
            for name, (shape, dtype) in crossing.entering.items()
        }
