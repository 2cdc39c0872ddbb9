"""What belongs to one request and ends with it: patches, guidance branches, keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from patchpipe.config import WATCHED, ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.lazy.latent import materialise_tree
from patchpipe.lockstep.points import Points
from patchpipe.models.plan import ModelPlan
from patchpipe.offload.riding import Riders
from patchpipe.parallel.batches import BatchShare, share_batch
from patchpipe.parallel.refusals import check_prefix, no_guidance
from patchpipe.schedule.branches import Branch, watch_for
from patchpipe.schedule.prompts import Prompts
from patchpipe.schedule.shared_keys import SharedBlock, SharedKeys
from patchpipe.stage.balance import patch_costs
from patchpipe.stage.keys.forecast import Clock
from patchpipe.stage.patches import Cut
from patchpipe.stage.root.survey import CallShapes, shapes_key
from patchpipe.stage.stage import Stage

# Of a branch: the id of the transformer's part, its name, its prompt, what is left out, its order on a latent.
BranchKey = tuple[int, str | None, int, frozenset[int | str], int]


@dataclass
class RequestStats:
    """What a request did, for people and for tests.

    Attributes:
        materialisations: How often the lazy latent had to be gathered in full.
        reasons: The operations that asked for it.
        patches: Patches of the latent.
        patch_rows: Token rows of each.
        text_patches: Over how many of the first ones the text was spread.
        stages: Pipeline stages.
        steps_synchronous: Calls of the transformer that saw fresh keys and values only.
        steps_patched: Calls that ran the latent patch by patch, or part by part, beside stale ones.
        drafts: Passes of all patches ahead of the calls' own, where a warm-up streams.
        seconds: Wall-clock seconds of the request on this rank.
        store_bytes: Memory of the keys and values this rank held.
        waited_seconds: Time this rank spent waiting for other ranks.
        sent_bytes: Bytes this rank sent to the next stage or, from the last one, to the first.
        resumed: Each time it went on after it was held or carried elsewhere: after which ``step``, and whether its
            ``keys`` were ``"kept"`` or ``"dropped"``, in which case it began with one synchronous step.
    """

    materialisations: int = 0
    reasons: list[str] = field(default_factory=list)
    patches: int = 1
    patch_rows: tuple[int, ...] = ()
    text_patches: int = 1
    stages: int = 1
    steps_synchronous: int = 0
    steps_patched: int = 0
    drafts: int = 0
    seconds: float = 0.0
    store_bytes: int = 0
    waited_seconds: float = 0.0
    sent_bytes: int = 0
    resumed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def touched(self) -> bool:
        """Whether the transformer was called at all."""
        return self.steps_synchronous + self.steps_patched > 0

    def add(self, inner: RequestStats) -> None:
        """Counts in what a pipeline did that was called by the pipeline of this request."""
        if not self.touched:
            self.patches, self.patch_rows, self.text_patches = inner.patches, inner.patch_rows, inner.text_patches
        self.materialisations += inner.materialisations
        self.reasons += inner.reasons
        self.steps_synchronous += inner.steps_synchronous
        self.steps_patched += inner.steps_patched
        self.drafts += inner.drafts
        self.store_bytes = max(self.store_bytes, inner.store_bytes)

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain data."""
        lists = {"reasons": list(self.reasons), "resumed": list(self.resumed)}
        return {**self.__dict__, **lists, "touched": self.touched}


class Traffic:
    """What one request sends and waits for, counted while it is at work.

    Args:
        group: The ranks.

    Attributes:
        sent_bytes: Bytes so far.
        waited_seconds: Seconds so far.
    """

    def __init__(self, group: Group) -> None:
        self.sent_bytes, self.waited_seconds = 0, 0.0
        self._group, self._since = group, group.traffic()

    def resume(self) -> None:
        """Counts from here on."""
        self._since = self._group.traffic()

    def pause(self) -> None:
        """What follows is another request's."""
        sent, waited = self._group.traffic()
        self.sent_bytes += sent - self._since[0]
        self.waited_seconds += waited - self._since[1]


class Request:
    """One call of the pipeline. Also the lazy latent's way to the other ranks.

    Args:
        config: The layout.
        plan: The model's plan.
        group: The ranks.
        number: Its place among the requests in flight together.
        halves: Whether batches go through the stages in halves.
        shared: The blocks that this rank's stage shares with another.
        points: What all ranks pass in the same order.
        stage: This rank's part of the transformer.

    Attributes:
        stage: That of the transformer whose turn it is, where several take turns.
    """

    def __init__(
        self,
        config: ParallelConfig,
        plan: ModelPlan,
        group: Group,
        number: int = 0,
        *,
        halves: bool = False,
        shared: Sequence[SharedBlock] = (),
        points: Points | None = None,
        stage: Stage,
    ) -> None:
        self.points = points or Points(None)
        self.config, self.plan, self.group, self.number, self.stage = config, plan, group, number, stage
        self._halves, self._shared = halves, shared
        self.traffic = Traffic(group)
        self.context: str | None = None  # how the pipeline names the guidance branch of the calls it makes now
        self.answering = False  # whether calls are answered with nothing, since they were made elsewhere
        self.holder = group.first  # whether this rank holds the values of the lazy latent
        self.stats = RequestStats(stages=config.pipefusion)
        self.memo: dict[tuple[Any, ...], tuple[Any, Any]] = {}  # results every call of the request shares
        self._branches: dict[BranchKey, Branch] = {}
        self._prompts = Prompts()
        self._cuts: dict[int, tuple[torch.Size, Cut]] = {}  # by a transformer's part, with the shape of the latent
        self._shapes: dict[tuple[Any, ...], CallShapes] = {}
        self._last: tuple[Any, BranchKey] | None = None
        self._level: float | None = None  # of noise, in the last call
        self._started = perf_counter()
        self.provenance = 0  # of the latent that is asked for
        self._asked: Any = None  # when the latent was last asked for in full
        self._watch = watch_for(group, self.points)
        self.riders: Riders | None = None  # where calls of one step go through the blocks together
        self._draw_alike()

    # -- the lazy latent's Exchange --------------------------------------------------------------

    def share(self, full: Tensor | None, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Gives the first stage's tensor to every rank."""
        with self.points.passing(f"reads the latent ({self.stats.reasons[-1]})"):
            self.points.meet(self.provenance)
            whole = self.group.broadcast(full, 0, shape, dtype)
        recorder = self.group.recorder
        if recorder is not None:
            recorder.add("materialise", self._asked, recorder.where, reason=self.stats.reasons[-1])
        return whole

    def note(self, reason: str) -> None:
        """Counts a materialisation."""
        self.stats.materialisations += 1
        self.stats.reasons.append(reason)
        self._asked = self.group.recorder.now() if self.group.recorder is not None else None

    def _draw_alike(self) -> None:
        """Lets every rank draw the first one's noise, where the pipeline is given no generator.

        What ranks draw meets values that all of them hold as soon as the lazy latent has materialised.
        """
        if self.group.world_size == 1:
            return
        cuda = self.group.device if self.group.device.type == "cuda" else None
        with self.points.passing():
            states = self.group.share(
                0, lambda: (torch.get_rng_state(), torch.cuda.get_rng_state(cuda) if cuda is not None else None)
            )
        if self.group.rank != 0:
            torch.set_rng_state(states[0].cpu())
            if cuda is not None:
                torch.cuda.set_rng_state(states[1].cpu(), cuda)

    # -- calls -----------------------------------------------------------------------------------

    @contextmanager
    def naming(self, name: str) -> Iterator[None]:
        """Names the guidance branch of the calls inside."""
        outer, self.context = self.context, name
        try:
            yield
        finally:
            self.context = outer

    def turn_to(self, stage: Stage) -> None:
        """The calls from here on are another transformer's; where they take turns, no patch has its keys and values."""
        if stage is not self.stage and not self.plan.beside:
            self._last = None
            self._branches.clear()
        self.stage = stage

    def known(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A call's inputs, of which only the latent is lazy: not the frames of a section before, say."""
        latent = self.plan.latent
        others = {name: value for name, value in inputs.items() if name != latent}
        return {**materialise_tree(others, "an input beside the latent"), latent: inputs[latent]}

    def begin_section(self, inputs: Mapping[str, Any]) -> None:
        """A noise level above the last one begins another section of a clip, of which there are no keys and values."""
        if not self.plan.sections:
            return
        level = float(inputs[self.plan.time].max())
        if self._level is not None and level > self._level:
            self._branches.clear()
            self._last = None
        self._level = level

    def count(self, synchronous: bool, drafts: int = 0) -> None:
        """Counts a call of the transformer, and the passes ahead of its own."""
        self.stats.drafts += drafts
        if synchronous:
            self.stats.steps_synchronous += 1
        else:
            self.stats.steps_patched += 1

    def shapes_of(self, inputs: Mapping[str, Any]) -> CallShapes:
        """The shapes inside a call."""
        key = (*shapes_key(inputs), *(self._ones(inputs[name]) for name in self.plan.lengths))
        if key not in self._shapes:
            raster = self.plan.grid.rows(self.stage.model, inputs[self.plan.latent].shape, inputs)
            self._shapes[key] = self.stage.look(inputs, raster, self.memo)
        return self._shapes[key]

    def _ones(self, mask: Tensor) -> int:
        """How many ones a mask has; read from a device once."""
        known, count = self.memo.get(("ones", id(mask)), (None, 0))
        if known is not mask:  # which is kept too, lest another one takes its id
            count = int(mask.sum())
            self.memo["ones", id(mask)] = mask, count
        return count

    def cut_for(self, inputs: Mapping[str, Any]) -> Cut:
        """The cut of this request's latent; a latent of another shape starts afresh."""
        shape, known = inputs[self.plan.latent].shape[1:], self._cuts.get(id(self.stage))
        if known is not None and known[0] != shape:
            self._branches.clear()
            self.memo.clear()
            self._cuts.clear()
        if id(self.stage) not in self._cuts:
            self._cuts[id(self.stage)] = shape, self._cut_of(inputs)
        return self._cuts[id(self.stage)][1]

    def _cut_of(self, inputs: Mapping[str, Any]) -> Cut:
        """A latent's cut: as that of the transformer before, whose prediction is to meet this one's patch by patch."""
        shapes = self.shapes_of(inputs)
        for _, other in self._cuts.values():
            if replace(other.rows, room=shapes.raster.room) == shapes.raster:
                return replace(other, rows=shapes.raster)
        costs = patch_costs(shapes.width, len(self.stage.places), self.config, self.group.backend)
        entries = [share.size for share in self.shares_of(inputs)]
        halves = 2 if self._halves and all(size % 2 == 0 for size in entries) else 1
        spreads = self.plan.spreads_text
        cut = Cut.of(shapes.raster, self.config, shapes.riders, costs, halves, max(entries), spreads)
        self._check_shares(cut)
        check_prefix(self.plan, self.config, inputs, streams=self.keeps_stores(cut))
        self.stats.patches = len(cut.patches)
        self.stats.text_patches = cut.text_patches
        self.stats.patch_rows = tuple(patch.rows[1] - patch.rows[0] for patch in cut.patches)
        return cut

    def shares_of(self, inputs: Mapping[str, Any], branch: int = 0) -> tuple[BatchShare, ...]:
        """Who runs what of a call of a guidance branch; see ``share_batch``."""
        apart, batch = bool(self.stage.left_out(inputs)), inputs[self.plan.latent].shape[0]
        return share_batch(batch, branch, self.plan, self.config, apart=apart)

    def _check_shares(self, cut: Cut) -> None:
        """Refuses rows too few for the ranks that share them while no rank has begun anything.

        Raises:
            ValueError: A patch has fewer rows than ranks, or there are references where nothing tests them.
        """
        if cut.rows.joined and self.config.distrifusion > 1:
            raise ValueError(
                f"distrifusion={self.config.distrifusion} with pictures joined to the latent as references has not "
                f"been tested: use pipefusion, ulysses or ring"
            )
        streams = self.keeps_stores(cut) and self.config.distrifusion == 1
        for patch in (cut.whole, *(cut.patches if streams else ())):
            cut.split(patch, self.group.mesh.parts)

    def branch_for(self, inputs: Mapping[str, Any], context: str | None) -> Branch:
        """The guidance branch a call belongs to.

        Calls are told apart by the name the pipeline gives them (``cache_context``), by the prompt they
        are conditioned on, by the blocks they leave out, and, where all agree, by their order among the calls on one
        latent.

        Raises:
            ValueError: Ranks are set aside for a second branch, but the pipeline makes no such call.
        """
        latent = inputs[self.plan.latent]
        left_out = self.stage.left_out(inputs)
        key: BranchKey = (id(self.stage), context, self._prompts.number(inputs.get(self.plan.text)), left_out, 0)
        if self._last is not None:
            last_latent, last_key = self._last
            if last_latent is latent and last_key[:-1] == key[:-1]:
                key = (*key[:-1], last_key[-1] + 1)
        self._last = (latent, key)
        alone = self.plan.guidance == "calls" and list(self._branches) == [key]
        if self.config.cfg > 1 and alone and not self.config.idle_branch:
            raise no_guidance(self.plan)
        if key not in self._branches:
            self._branches[key] = self._begun(Branch(index=len(self._branches), left_out=left_out))
        return self._branches[key]

    def synchronous(self, branch: Branch, cut: Cut, batch: int) -> bool:
        """Whether the branch's next call sees fresh keys and values only.

        Args:
            branch: The branch.
            cut: The latent's.
            batch: Entries of the call's batch.
        """
        if not self.keeps_stores(cut):
            return True
        warms_up = branch.cold or branch.calls < self.config.warmup_steps(guided=self._guided(branch, batch))
        return (self._watch is not None and self._watch.follows(branch)) or warms_up

    def passes(self, branch: Branch, batch: int) -> int:
        """How often the patches of the branch's next call go through the stages."""
        return self.config.passes(branch.calls, guided=self._guided(branch, batch))

    def _guided(self, branch: Branch, batch: int) -> bool:
        # Two branches in one batch look like two pictures, which are taken for branches.
        guided = batch % 2 == 0 if self.plan.guidance == "batch" else len(self._branches) > 1
        return guided or bool(branch.left_out)

    def keeps_stores(self, cut: Cut) -> bool:
        """Whether keys and values will ever be read again."""
        config = self.config
        sees_stale = len(cut.patches) > 1 or config.distrifusion > 1 or config.changed_tokens is not None
        return sees_stale and not config.synchronous

    def answer(self, inputs: Mapping[str, Any], branch: Branch) -> Tensor:
        """Stands in for a call that was made elsewhere, whose result nobody reads; every rank has it."""
        branch.calls, branch.cold = branch.calls + 1, True
        shapes, latent = self.shapes_of(inputs), inputs[self.plan.latent]
        return torch.zeros(shapes.output, dtype=shapes.dtype, device=latent.device)

    def drop_keys(self) -> None:
        """Lets go of all keys and values; nothing of the request is under way."""
        for key, branch in self._branches.items():
            self._branches[key] = self._begun(
                Branch(branch.index, branch.left_out, branch.calls, prefixes=branch.prefixes, cold=True)
            )

    def move_keys(self, device: torch.device) -> None:
        """Takes all keys and values to another device, where they wait; nothing of the request is under way."""
        for branch in self._branches.values():
            branch.move(device)

    def _begun(self, branch: Branch) -> Branch:
        blocks = [block for block in self._shared if self.stage.keeps_keys(block.boundary.block, branch.left_out)]
        branch.shared = [SharedKeys(block, branch.stores[0]) for block in blocks]
        branch.clock = Clock(watched=self.config.warmup == WATCHED)
        return branch

    def finish(self) -> None:
        """Ends the request: keys, values and lazy tensors are let go, the figures stay."""
        self.stats.store_bytes = sum(branch.bytes for branch in self._branches.values())
        self.stats.seconds = perf_counter() - self._started
        self.stats.sent_bytes, self.stats.waited_seconds = self.traffic.sent_bytes, self.traffic.waited_seconds
        self._branches.clear()
        self._prompts.clear()
        self.memo.clear()
        self._last = None
