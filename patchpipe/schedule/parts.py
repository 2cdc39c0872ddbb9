"""What a rank runs one after the other in a call: rows of a patch, for entries of the batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.mesh import Group
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.batches import BatchShare, ragged, slice_inputs
from patchpipe.parallel.sharing import sharing_for
from patchpipe.schedule.answers import Call
from patchpipe.schedule.hops import Crossing, Shapes
from patchpipe.schedule.request import Request
from patchpipe.stage.attending import Sharing
from patchpipe.stage.context import CallContext, Streams
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.patches import Patch
from patchpipe.stage.root.survey import CallShapes


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
        pace: How its noise level follows the last ones, where stale rows are forecast.
        draft: Whether its keys and values alone are asked for, and no prediction.
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
    pace: Pace | None
    draft: bool

    def crossing(self, call: Call, group: Group) -> Crossing:
        """What it is as it enters and as it leaves this rank's stage."""
        owned = call.stage.owned
        now = owned.whole if self.turn is None else owned.of(*self.turn)
        entering = {} if group.first else self._hop(call, now.start)
        leaving = {} if group.last else self._hop(call, now.stop)
        return Crossing(entering, leaving, large=self.patch.whole)

    def _hop(self, call: Call, index: int) -> Shapes:
        return self.shapes.hop(call.stage.places[index].listing, self.share.size, self.piece, index)

    def context(self, call: Call, request: Request, group: Group, alone: Sharing | None) -> CallContext:
        """What the hooks of the blocks are to know of it.

        Args:
            call: The call.
            request: Its request.
            group: The ranks.
            alone: How ranks that each have a part of the latent see each other's, if they do.
        """
        half, patch = self.share.half, self.patch
        stores = None if call.stores is None else call.stores[half or 0]
        context = CallContext(self.piece, self.shapes, stores, memo=self.memo, request_memo=request.memo)
        context.sharing = alone or sharing_for(group, patch, self.pieces)
        context.prefixes = call.prefixes[half or 0]
        context.entries, context.pace, context.draft = self.share.entries, self.pace, self.draft
        context.turn, context.patches = self.turn, call.cut.patches
        for keys in call.shared:
            if keys.own(patch):
                context.entering[keys.block] = keys.take
                if not keys.earlier:
                    context.leaving[keys.block] = partial(keys.give, patch)
        return context

    def blank(self, call: Call, crossing: Crossing, dim: int, device: torch.device) -> Streams | Tensor:
        """Zeros of the shapes in which it leaves this rank's stage.

        Args:
            call: The call.
            crossing: What it is as it leaves the stage.
            dim: The latent's dim that is cut.
            device: Where they are to be.
        """
        if crossing.leaving or self.draft:
            shapes = crossing.leaving.items()
            return {name: torch.zeros(shape, dtype=dtype, device=device) for name, (shape, dtype) in shapes}
        shape = list(call.shapes.output)
        shape[0], shape[dim] = self.share.size, self.piece.extent
        return torch.zeros(shape, dtype=call.shapes.dtype, device=device)


def may_ride(call: Call, parts: Sequence[Part], plan: ModelPlan) -> bool:
    """Whether a call may wait for others of its step, to go through the blocks with them: one that goes as a whole."""
    special = plan.second or plan.prefix or call.stores is not None or call.stage.left_out(call.inputs)
    return len(parts) == 1 and not special


def parts_of(call: Call, share: BatchShare, request: Request, group: Group, *, halves: bool) -> list[Part]:
    """What a rank runs one after the other: the patches, each in halves of the batch if so configured.

    In a synchronous step it is the whole latent of every entry of the batch: a stage so begins with the second branch
    of guidance, or the second picture, while the next one is still busy with the first.

    Args:
        call: The call.
        share: The rank's entries of the batch.
        request: The call's request.
        group: The ranks.
        halves: Whether batches go through the stages in halves.
    """
    plan, mesh = request.plan, group.mesh
    streams_later = call.stores is not None and request.config.distrifusion == 1 and not ragged(call.inputs)
    shares = share.halves() if streams_later and halves else (share,)
    if streams_later and call.patches[0].whole:
        shares = tuple(entry for half in shares for entry in half.one_by_one())
    batch = call.inputs[plan.latent].shape[0]
    inputs = [slice_inputs(call.inputs, plan, batch, entries, request.memo) for entries in shares]
    memos: list[dict[str, Any]] = [{} for _ in shares]
    shapes = request.shapes_of(inputs[0]) if ragged(call.inputs) else call.shapes
    parts = []
    for passing in call.passing:
        patch, pieces = passing.patch, call.pieces(passing.patch, mesh.parts)
        for entries, own_inputs, memo in zip(shares, inputs, memos, strict=True):
            last, own = entries is shares[-1] and not passing.draft, pieces[mesh.part]
            turn = None if patch.whole else (patch.index, len(call.patches))
            if halves:
                turn = entries.half or 0, 2
            how = passing.pace, passing.draft
            parts.append(Part(entries, patch, pieces, own, own_inputs, shapes, memo, last, turn, *how))
    return parts
