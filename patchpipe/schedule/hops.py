"""What goes from stage to stage, call after call, with receives posted before they can be met.

gloo moves nothing before the receive is posted. So a stage posts those of a whole call when the call begins, and
that of the next call's first patch too: it travels while this call's last patch is computed. Both sides work out from
the calls so far what the next one begins with; where they guessed wrong, an empty message uses the receive up.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch

from patchpipe.distributed.mesh import Group
from patchpipe.distributed.transport import Receive
from patchpipe.stage.patches import Patch

Shapes = dict[str, torch.Size]
Receives = dict[str, Receive]


class Hops:
    """The streams that enter and leave this rank's stage, call after call.

    Args:
        group: The ranks.
        text: Name of the text stream.
        width: Channels of the tokens between blocks.
        dtype: Of the streams.
    """

    def __init__(self, group: Group, text: str, width: int, dtype: torch.dtype) -> None:
        self._group, self._text, self._width, self._dtype = group, text, width, dtype
        self._after: dict[Hashable, Shapes | None] = {}  # how the call after its last one began
        self._key: Hashable = None  # of the last call
        self._guess: Shapes | None = None  # how the next call begins
        self._ahead: Receives = {}  # posted for it

    def begin(self, key: Hashable, parts: Sequence[tuple[int, Patch]], text_rows: int) -> list[Receives]:
        """Posts what a call will receive, and what the next one will first.

        Args:
            key: The call's request and guidance branch.
            parts: What runs one after the other: entries of the batch, and this rank's rows of a patch.
            text_rows: Text rows in joint attention.

        Returns:
            The receives of each part by stream; empty ones on the first stage.
        """
        shapes = [self._shapes(batch, piece, text_rows) for batch, piece in parts]
        if self._guess != shapes[0]:
            self._use_up()
        posted = [self._ahead or self._expect(shapes[0]), *map(self._expect, shapes[1:])]
        if self._key is not None:
            # The whole latent of a synchronous step is large, and the call after a warm-up step seldom is another.
            self._after[self._key] = None if parts[0][1].whole else shapes[0]
        self._key, self._guess = key, self._after.get(key)
        self._ahead = self._expect(self._guess) if self._guess else {}
        return posted

    def pass_on(self, streams: dict[str, torch.Tensor], piece: Patch, text_rows: int) -> None:
        """Sends a patch's streams to the next stage.

        Raises:
            RuntimeError: A block returned another dtype than the next stage expects.
        """
        channel = self._group.channel_to_next()
        for name in self._shapes(0, piece, text_rows):
            if streams[name].dtype != self._dtype:
                raise RuntimeError(
                    f"{name} left the stage as {streams[name].dtype}, the next one expects {self._dtype}"
                )
            channel.send(streams[name])

    def shapes(self, batch: int, piece: Patch, text_rows: int) -> Shapes:
        """Shapes of what goes from stage to stage for some rows of a patch."""
        return self._shapes(batch, piece, text_rows)

    def end(self) -> None:
        """Leaves nothing posted when the request ends."""
        self._use_up()

    def _use_up(self) -> None:
        """Meets the receive of a call that does not come, on both sides."""
        if self._guess and not self._group.last:
            for shape in self._guess.values():
                self._group.channel_to_next().send_nothing(shape, self._dtype)
        for receive in self._ahead.values():
            receive.wait()
        self._guess, self._ahead = None, {}

    def _shapes(self, batch: int, piece: Patch, text_rows: int) -> Shapes:
        """Shapes of what goes from stage to stage, the same worked out on both sides."""
        shapes = {"hidden_states": torch.Size((batch, piece.token_count, self._width))}
        start, stop = piece.text_range(text_rows)
        if stop > start:
            shapes[self._text] = torch.Size((batch, stop - start, self._width))
        return shapes

    def _expect(self, shapes: Shapes) -> Receives:
        if self._group.first:
            return {}
        channel = self._group.channel_from_previous()
        return {name: channel.expect(shape, self._dtype) for name, shape in shapes.items()}
