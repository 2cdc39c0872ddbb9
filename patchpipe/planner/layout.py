"""A layout on a workload: its lines of ranks, its patches and its stages."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import ceil

from patchpipe.config import ParallelConfig
from patchpipe.layout.patching import PatchCosts
from patchpipe.layout.split import StageBlocks, balanced, split_costs, stages_of
from patchpipe.planner.cost import Tokens, block_parts
from patchpipe.planner.machine.links import Line
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.machine.system import PATCHPIPE, System
from patchpipe.planner.work.workload import Block, Workload
from patchpipe.stage.balance import goes_in_halves, may_go_apart, patch_costs
from patchpipe.stage.patches import Cut, balanced_rows


@dataclass(frozen=True)
class Layout:
    """A configuration, worked out for one workload.

    Attributes:
        workload: The request.
        config: The configuration.
        profile: The machine.
        system: The program.
    """

    workload: Workload
    config: ParallelConfig
    profile: Profile
    system: System = PATCHPIPE

    @property
    def parts(self) -> int:
        """Ranks that share the rows of a patch."""
        return self.config.distrifusion * self.config.ring * self.config.ulysses

    @property
    def batch(self) -> int:
        """Entries of a call's batch that a rank runs."""
        cfg = self.config.cfg if self.workload.guidance == "batch" else 1
        return ceil(self.workload.batch / (cfg * self.config.data))

    @property
    def calls(self) -> int:
        """Calls of the transformer in a step that a rank takes part in."""
        return ceil(self.workload.calls / self.config.cfg) if self.workload.guidance == "calls" else 1

    @property
    def together(self) -> int:
        """Calls of a step that go through the blocks together, so that offloaded weights come once for them."""
        config = self.config
        whole = len(self.patches) == 1 or config.synchronous
        return self.calls if config.pipefusion == config.distrifusion == 1 and whole else 1

    def line(self, axis: str) -> Line:
        """The ranks along an axis: later axes are inside earlier ones."""
        order = ("pipefusion", "distrifusion", "ring", "ulysses", "tensor")
        inner = order[order.index(axis) + 1 :]
        stride = 1
        for name in inner:
            stride *= getattr(self.config, name)
        return Line(getattr(self.config, axis), stride)

    @property
    def halves(self) -> int:
        """Parts in which the batch goes through the stages where patches stream."""
        return 2 if self.batch % 2 == 0 and goes_in_halves(self.config, self.stages) else 1

    @cached_property
    def patches(self) -> tuple[int, ...]:
        """Image tokens of each patch in streaming order."""
        rows = self.workload.rows
        if self.config.pipefusion == 1 and self.config.patches in (None, 1):
            return (self.workload.image,)
        if self.system.text_every_patch:
            return tuple(size * rows.tokens for size in balanced_rows(rows, self.config.patches or 1))
        return tuple(patch.token_count for patch in self._cut.patches)

    @cached_property
    def _cut(self) -> Cut:
        spreads = self.system.spreads_text and self.workload.spreads_text
        rows, text = self.workload.rows, self.workload.joint_text
        return Cut.of(rows, self.config, text, self._patch_costs, self.halves, self.batch, spreads)

    def _text(self, index: int | None) -> int:
        """Text tokens that ride with a patch, or with the whole latent (``None``)."""
        text = self.workload.joint_text
        if index is None or len(self.patches) == 1 or self.system.text_every_patch:
            return text
        low, high = self._cut.patches[index].rider_range(text)
        return high - low

    @property
    def _patch_costs(self) -> PatchCosts:
        """What the program takes a patch for where the number of patches is left to it: see ``balance.patch_costs``."""
        backend = "nccl" if self.workload.itemsize == 2 else "gloo"
        return patch_costs(self.workload.width, len(self.workload.blocks), self.config, backend)

    @cached_property
    def stages(self) -> tuple[StageBlocks, ...]:
        """The blocks of each stage, as ranges of the workload's."""
        count, stages = len(self.workload.blocks), self.config.pipefusion
        if self.config.stage_blocks is not None:
            return tuple(stages_of(self.config.stage_blocks))
        if self.system.even_stages:
            size = ceil(count / stages)
            return tuple(stages_of(tuple(max(0, min(size, count - stage * size)) for stage in range(stages))))
        halved = self.system.entries_overlap and may_go_apart(self.workload.guidance, self.config)
        costs = block_seconds(self.workload, self.profile)
        return tuple(split_costs(costs, stages, halved=halved, shared=self.config.may_share))

    def held(self, stage: int) -> tuple[Block, ...]:
        """All blocks of a stage."""
        return tuple(self.workload.blocks[index] for index in self.stages[stage].held)

    def run(self, stage: int, half: int, patch: int | None = None) -> tuple[Block, ...]:
        """The blocks that a stage runs for a half of the batch, and for a patch or, with ``None``, the whole latent."""
        owned = self.stages[stage]
        streaming = owned.whole if patch is None else owned.of(patch, len(self.patches))
        return tuple(self.workload.blocks[index] for index in (owned.of(half) if owned.halves else streaming))

    def piece(self, index: int | None) -> Tokens:
        """What a rank computes at once: its part of a half of one patch, or of the whole latent (``None``)."""
        batch = self.batch if index is None else self.batch // self.halves
        image = self.workload.image if index is None else self.patches[index]
        text, key_text = self._text(index), self.workload.text
        return Tokens(ceil(image / self.parts), ceil(text / self.parts), self.workload.image, key_text, batch)


def balanced_stages(workload: Workload, profile: Profile, stages: int) -> tuple[int, ...]:
    """Blocks of each stage so that the dearest takes the least time on this device for this picture."""
    return balanced(block_seconds(workload, profile), stages)


def block_seconds(workload: Workload, profile: Profile) -> list[float]:
    """Seconds of each block on one device, for the whole picture."""
    whole = Tokens(workload.image, workload.joint_text, workload.image, workload.text)
    known: dict[Block, float] = {}
    for block in workload.blocks:
        if block not in known:
            known[block] = block_parts(block, whole, profile.device, itemsize=workload.itemsize).total
    return [known[block] for block in workload.blocks]
