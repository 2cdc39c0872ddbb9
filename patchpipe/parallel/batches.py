"""How the batch of a call is shared among the ranks of the ``data`` and ``cfg`` axes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import shares
from patchpipe.models.adapters import PICTURES
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.refusals import no_guidance

Range = tuple[int, int]
SLICES_KEPT = 4  # of each input: one for every guidance branch there is


@dataclass(frozen=True)
class BatchShare:
    """Part of a call's batch, and the coordinates of the ranks that run it.

    Attributes:
        data: Their place along ``data``.
        cfg: Their place along ``cfg``.
        range: The entries of the batch.
        within: The entries whose keys and values are kept together, where this is but a part of them.
        half: Which half of what these ranks run it is, or is part of; ``None`` where that has no halves.
    """

    data: int
    cfg: int
    range: Range
    within: Range | None = None
    half: int | None = None

    @property
    def entries(self) -> tuple[int, int, int]:
        """First entry and the one past the last, counted among those that are kept together, and how many these are."""
        start, stop = self.within or self.range
        return self.range[0] - start, self.range[1] - start, stop - start

    def halves(self) -> tuple[BatchShare, ...]:
        """Its two halves, such as the branches of guidance; itself where it has an odd number of entries."""
        start, stop = self.range
        if self.size % 2:
            return (self,)
        middle = (start + stop) // 2
        return replace(self, range=(start, middle), half=0), replace(self, range=(middle, stop), half=1)

    def one_by_one(self) -> tuple[BatchShare, ...]:
        """A share for every single entry."""
        start, stop = self.range
        return tuple(replace(self, range=(at, at + 1), within=self.range) for at in range(start, stop))

    @property
    def size(self) -> int:
        """Entries of the batch."""
        return self.range[1] - self.range[0]


def share_batch(
    batch: int, branch: int, plan: ModelPlan, config: ParallelConfig, *, apart: bool = False
) -> tuple[BatchShare, ...]:
    """Who runs what of one call, in the order of the batch.

    Where both guidance branches come in one batch, ``cfg`` splits it into its halves; where each branch is a
    call of its own, the ranks of one branch run it and the others wait for their own. With ``idle_branch`` the ranks of
    the second branch have nothing to do in a request that has but one.

    A branch that leaves out blocks is a call by itself beside others that have two branches in a batch, and has fewer
    entries than they: it may have none for some ranks.

    Args:
        batch: Entries of the call's batch.
        branch: Which guidance branch the call is, where branches are calls.
        plan: The model's plan.
        config: The layout.
        apart: Whether it is such a call.

    Raises:
        ValueError: The batch does not divide as the layout asks.
    """
    halves: list[tuple[int, Range]] = [(branch % config.cfg, (0, batch))]
    if config.cfg == 2 and plan.guidance == "batch" and batch % 2:
        if not (apart or config.idle_branch):
            raise no_guidance(plan)
    elif config.cfg == 2 and plan.guidance == "batch":
        halves = [(0, (0, batch // 2)), (1, (batch // 2, batch))]
    if not apart and min(stop - start for _, (start, stop) in halves) < config.data:
        raise ValueError(
            f"data={config.data} splits the pictures of a call, but there are only {halves[0][1][1]}: ask for more "
            f"pictures at once, or set data={halves[0][1][1]}"
        )
    return tuple(
        BatchShare(data, cfg, (start + low, start + high))
        for cfg, (start, stop) in halves
        for data, (low, high) in enumerate(shares(stop - start, config.data))
        if low < high
    )


def ragged(inputs: Mapping[str, Any]) -> bool:
    """Whether entries of the batch differ in shape, as prompts in a list may: some of them have other rows than all.

    Keys and values of such entries are kept together, and they go through the stages as one.
    """
    lists = [value for value in inputs.values() if isinstance(value, list)]
    return any(len({each.shape for each in value if isinstance(each, Tensor)}) > 1 for value in lists)


def slice_inputs(
    inputs: Mapping[str, Any], plan: ModelPlan, batch: int, share: BatchShare, kept: dict[tuple[Any, ...], Any]
) -> dict[str, Any]:
    """The inputs of a call for part of its batch; the latent is only given its shape.

    Args:
        inputs: The call's inputs.
        plan: The model's plan.
        batch: Entries of the whole batch.
        share: The part.
        kept: Slices made before, so that the same tensor gives the same slice in every call of a request.
    """
    latent = inputs[plan.latent]
    shape = (share.size, *latent.shape[1:])
    sliced = {name: _sliced(value, name, plan, batch, share.range, kept) for name, value in inputs.items()}
    sliced[plan.latent] = torch.zeros((), dtype=latent.dtype, device=latent.device).expand(shape)
    return sliced


def _sliced(value: Any, name: str, plan: ModelPlan, batch: int, part: Range, kept: dict[tuple[Any, ...], Any]) -> Any:
    if part == (0, batch) or name == plan.latent or plan.unbatched(name, value):
        return value
    if isinstance(value, dict):
        return {key: _sliced(entry, f"{name}.{key}", plan, batch, part, kept) for key, entry in value.items()}
    pictures = name.endswith(f".{PICTURES}") and isinstance(value, list)  # one tensor for each adapter
    dim = 1 if pictures or name in plan.residuals else plan.batch_dims.get(name, 0)
    if isinstance(value, (list, tuple)) and dim > 0:
        return [_along(each, dim - 1, f"{name}.{at}", batch, part, kept) for at, each in enumerate(value)]
    if isinstance(value, list) and len(value) == batch:
        return value[part[0] : part[1]]
    return _along(value, dim, name, batch, part, kept)


def _along(value: Any, dim: int, name: str, batch: int, part: Range, kept: dict[tuple[Any, ...], Any]) -> Any:
    if not isinstance(value, Tensor) or value.ndim <= dim or value.shape[dim] != batch:
        return value
    key = ("batch", name, part)
    known: list[tuple[Tensor, int, Tensor]] = kept.setdefault(key, ([], None))[0]
    version = 0 if value.is_inference() else value._version
    for tensor, seen, piece in known:
        if tensor is value and seen == version:
            return piece
    known.append((value, version, value.narrow(dim, part[0], part[1] - part[0]).contiguous()))
    del known[:-SLICES_KEPT]  # what changes from call to call, such as the residuals of a ControlNet, must not pile up
    return known[-1][2]
