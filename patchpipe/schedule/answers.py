"""One call of the transformer, and how the pieces of its noise prediction come together.

Ranks of the last stage each make a piece: some rows of a patch for a part of the batch. Every rank of the first
stage holds the latent and so needs every piece.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from patchpipe.distributed.mesh import Group
from patchpipe.distributed.transport import Receive
from patchpipe.layout.axes import Mesh
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.batches import BatchShare
from patchpipe.schedule.shared_keys import SharedKeys
from patchpipe.stage.keys.forecast import Pace
from patchpipe.stage.keys.prefix import Prefixes
from patchpipe.stage.keys.store import LayerStores
from patchpipe.stage.patches import Cut, Patch
from patchpipe.stage.root.survey import CallShapes
from patchpipe.stage.rows import Rows
from patchpipe.stage.stage import Stage
from patchpipe.tracing.recorder import Where


@dataclass(frozen=True)
class Passing:
    """A patch, or the whole latent, on its way through the stages.

    Attributes:
        patch: What it is.
        pace: How its noise level follows the last ones, where stale rows are forecast.
        draft: Whether its keys and values alone are asked for.
    """

    patch: Patch
    pace: Pace | None
    draft: bool


@dataclass(frozen=True)
class Call:
    """One call of the transformer, the same on every rank.

    Attributes:
        stage: This rank's part of the transformer.
        inputs: Its arguments by name.
        cut: The cut of its latent.
        patches: The patches to run, or the whole latent as one.
        shares: Who runs which part of its batch.
        stores: The branch's keys and values on this rank, of each half of its batch; ``None`` where nothing is ever
            stale.
        prefixes: What each half of its batch keeps of the branch's first call; see ``plan.Prefix``.
        shared: What comes and goes for blocks that two stages share.
        shapes: The shapes inside it.
        paces: How the noise level of each pass of the patches follows the last ones; ``None`` where stale rows are not
            forecast. All passes but the last are drafts: their keys and values count, their prediction does not.
        where: Which call it is, for the timeline.
    """

    stage: Stage
    inputs: Mapping[str, Any]
    cut: Cut
    patches: tuple[Patch, ...]
    shares: tuple[BatchShare, ...]
    stores: tuple[LayerStores, LayerStores] | None
    prefixes: tuple[Prefixes, Prefixes]
    shared: Sequence[SharedKeys]
    shapes: CallShapes
    paces: tuple[Pace | None, ...]
    where: Where

    def share_of(self, mesh: Mesh) -> BatchShare | None:
        """The part of the batch a rank runs, if any."""
        place = (mesh.at("data"), mesh.at("cfg"))
        return next((share for share in self.shares if (share.data, share.cfg) == place), None)

    def pieces(self, patch: Patch, ranks: int) -> tuple[Patch, ...]:
        """The rows of a patch for each rank that shares it."""
        return self.cut.split(patch, ranks)

    @property
    def pace(self) -> Pace | None:
        """That of the last pass."""
        return self.paces[-1]

    @property
    def passing(self) -> list[Passing]:
        """What goes through the stages, in order."""
        last = len(self.paces) - 1
        return [Passing(patch, pace, number < last) for number, pace in enumerate(self.paces) for patch in self.patches]


class Answers:
    """The noise prediction of one call, as the first stage's ranks put it together.

    A patch's receives are posted when this rank has run it, and it is put together when it is asked for. Not sooner:
    over NCCL a posted receive is a kernel that spins, and this rank's own work on the patch may be what it waits for.
    """

    def __init__(self, call: Call, plan: ModelPlan, group: Group) -> None:
        self.call, self.plan, self.group = call, plan, group
        self._shape, self._dtype = call.shapes.output, call.shapes.dtype
        self._makers = [self._rank(share, part) for share in call.shares for part in range(group.mesh.parts)]
        self._found: dict[tuple[int, int], Tensor | Receive] = {}
        self._whole: Tensor | None = None
        self._parts: dict[int, list[Tensor]] = {}  # of patches: rows of the picture, and of what was joined to it

    def give(self, result: Tensor, patch: Patch) -> None:
        """Sends what this rank made to every rank of the first stage.

        Raises:
            RuntimeError: The model returned another dtype than the first stage expects.
        """
        if self.group.mesh.at("tensor") > 0:
            return  # its neighbour made the same
        if result.dtype != self._dtype:
            raise RuntimeError(
                f"the noise prediction left the model as {result.dtype}, the first stage expects {self._dtype}"
            )
        for rank in self.group.mesh.stage(0):
            if rank == self.group.rank:
                self._found[patch.index, rank] = result
            else:
                self.group.answers(rank).send(result)

    def expect(self, patch: Patch) -> None:
        """Posts what other ranks make of a patch, on a rank that holds the latent."""
        if not self.group.first:
            return
        pieces, makers = self.call.pieces(patch, self.group.mesh.parts), iter(self._makers)
        shape = list(self._shape)
        for share in self.call.shares:
            for piece in pieces:
                rank = next(makers)
                shape[0], shape[self.plan.grid.dim] = share.size, piece.extent
                if rank != self.group.rank:
                    self._found[patch.index, rank] = self.group.answers(rank).expect(tuple(shape), self._dtype)

    def patch(self, index: int) -> Tensor:
        """A patch of the prediction; waits for it."""
        if not self.call.patches[0].whole:
            return self._streamed(index)
        if self.group.mesh.size("displaced") > 1:
            makers = self._makers[index :: self.group.mesh.parts]
            return _joined([self._take(self.call.patches[0], rank) for rank in makers], 0)
        if self._whole is None:
            self._whole = self._together(self.call.patches[0])
        start, stop = self.call.cut.bounds[index : index + 2]
        return self._whole.narrow(self.plan.grid.dim, start, stop - start).contiguous()

    def _streamed(self, index: int) -> Tensor:
        """A patch's rows; the last one's are followed by what all patches have of what was joined to the latent."""
        patches, dim = self.call.patches, self.plan.grid.dim
        if not self.call.cut.rows.joined:
            return self._together(patches[index])
        last = index == len(patches) - 1
        for patch in patches if last else patches[index : index + 1]:
            if patch.index not in self._parts:
                rows = patch.units[1] - patch.units[0]
                self._parts[patch.index] = list(self._together(patch).split([rows, patch.extent - rows], dim))
        rest = [self._parts[patch.index][1] for patch in patches] if last else []
        return _joined([self._parts[index][0], *rest], dim).contiguous()

    def second(self, made: Sequence[Tensor]) -> Tensor:
        """The class's second output, which all ranks come here for.

        Args:
            made: This rank's rows of it, for one entry of the batch after the other.
        """
        shapes, first = self.call.shapes, self.call.patches[0]
        assert shapes.second is not None
        rows = Rows.of((self.plan.second,), shapes.sizes, shapes.raster)
        makers, entries = iter(self._makers), []
        for share in self.call.shares:
            found = []
            for piece in self.call.pieces(first, self.group.mesh.parts):
                shape = torch.Size((share.size, rows.count(piece), shapes.second[2]))
                rank = next(makers)
                if shape.numel():
                    own = torch.cat(list(made)) if rank == self.group.rank else None
                    found.append(self.group.broadcast(own, rank, shape, self._dtype))
            entries.append(_joined(found, 1))
        return _joined(entries, 0)

    def _rank(self, share: BatchShare, part: int) -> int:
        return self.group.mesh.maker(share.data, share.cfg, self.group.config.pipefusion - 1, part)

    def _together(self, patch: Patch) -> Tensor:
        pieces = [self._take(patch, rank) for rank in self._makers]
        size, dim = self.group.mesh.parts, self.plan.grid.dim
        if size > 1 and patch.joined[0] < patch.joined[1]:  # rows of all ranks first, then their parts of references
            rows = [own.units[1] - own.units[0] for own in self.call.pieces(patch, size)]
            parts = [
                piece.split([rows[at % size], piece.shape[dim] - rows[at % size]], dim)
                for at, piece in enumerate(pieces)
            ]
            pieces = [part[at] for start in range(0, len(parts), size) for at in range(2)
                      for part in parts[start : start + size]]  # fmt: skip
            size *= 2
        shares = [_joined(pieces[at : at + size], dim) for at in range(0, len(pieces), size)]
        return _joined(shares, 0)

    def _take(self, patch: Patch, rank: int) -> Tensor:
        found = self._found.pop((patch.index, rank))
        return found.take() if isinstance(found, Receive) else found


def _joined(pieces: list[Tensor], dim: int) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=dim)
