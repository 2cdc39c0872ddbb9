"""What a rank runs one after the other in a call: rows of a patch, for entries of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.mesh import Group
from patchpipe.parallel.batches import BatchShare
from patchpipe.schedule.answers import Call
from patchpipe.schedule.hops import Crossing, Shapes
from patchpipe.stage.context import Streams
from patchpipe.stage.patches import Patch
from patchpipe.stage.survey import CallShapes


@dataclass(frozen=True)
class Part:
    """What goes through a stage at once: some rows of a patch, for some entries of the batch.

    Attributes:
        share: The entries.
        patch: The patch, whole.
        pieces: Each sharing rank's rows of it.
        piece: This rank's own.
        inputs: The call's arguments for those entries.
        shapes: The shapes inside the call for those entries.
        memo: Results shared by the patches of those entries.
        completes: Whether the patch's other entries have run before.
        turn: Which turn it is, of how many, where stages share blocks; see ``balance.Boundary``.
    """

    share: BatchShare
    patch: Patch
    pieces: tuple[Patch, ...]
    piece: Patch
    inputs: dict[str, Any]
    shapes: CallShapes
    memo: dict[str, Any]
    completes: bool
    turn: tuple[int, int] | None

    def crossing(self, call: Call, group: Group) -> Crossing:
        """What it is as it enters and as it leaves this rank's stage."""
        owned = call.stage.owned
        now = owned.whole if self.turn is None else owned.of(*self.turn)
        entering = {} if group.first else self._hop(call, now.start)
        leaving = {} if group.last else self._hop(call, now.stop)
        return Crossing(entering, leaving, large=self.patch.whole)

    def _hop(self, call: Call, index: int) -> Shapes:
        return self.shapes.hop(call.stage.places[index].listing, self.share.size, self.piece, index)

    def blank(self, call: Call, crossing: Crossing, dim: int, device: torch.device) -> Streams | Tensor:
        """Zeros of the shapes in which it leaves this rank's stage.

        Args:
            call: The call.
            crossing: What it is as it leaves the stage.
            dim: The latent's dim that is cut.
            device: Where they are to be.
        """
        if crossing.leaving:
            shapes = crossing.leaving.items()
            return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes}
        shape = list(call.shapes.output)
        shape[0], shape[dim] = self.share.size, self.piece.extent
        return torch.zeros(shape, dtype=call.shapes.dtype, device=device)
