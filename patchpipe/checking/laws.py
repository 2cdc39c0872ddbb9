"""The laws of the patch pipeline, each tried on a tiny model: what holds, what fails and where."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from patchpipe.checking.loop import Loop, Sample
from patchpipe.checking.threads import on_ranks
from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.models.plan import ModelPlan
from patchpipe.pipeline.apply import fit, parallelize, restore

STEPS, PATCHES, SECONDS = 3, 3, 120.0
ROUNDED = {torch.float64: 1e-6, torch.float32: 2e-4}  # relative; some models compute in float32 whatever they are in
SEEN = 1e-5  # relative; the least that stale keys and values must change
Outcome = Literal["holds", "fails", "refused", "left out"]


@dataclass(frozen=True)
class Law:
    """One thing that must hold.

    Attributes:
        name: Of it, for people.
        degrees: The layout.
        synchronous: Whether every step is a warm-up step; otherwise patches stream after the first.
        against: What it must equal: plain diffusers, or one process that runs the patches in their order.
        exact: Whether to the bit.
        still: Whether every step sees the same latent, so that stale keys and values are true ones.
    """

    name: str
    degrees: Mapping[str, int] = field(default_factory=dict)
    synchronous: bool = False
    against: Literal["plain", "one rank"] = "one rank"
    exact: bool = False
    still: bool = False

    def layout(self, rows: int) -> ParallelConfig:
        """What is tried, of a latent of so many rows of tokens: a patch has two at least, for two ranks to share it."""
        count = min(PATCHES, rows // 2)
        sizes = tuple((at + 1) * rows // count - at * rows // count for at in range(count))
        options: dict[str, Any] = {"warmup": "all"} if self.synchronous else {"patch_rows": sizes, "warmup": 1}
        options |= {"split_batch": False, "share_blocks": False, "forecast": False, "timeout": SECONDS}
        return ParallelConfig(**{**options, **self.degrees})


LAWS = (
    Law("synchronous on 1 rank = plain", synchronous=True, against="plain", exact=True),
    Law("synchronous on 2 stages = plain", {"pipefusion": 2}, synchronous=True, against="plain", exact=True),
    Law("patches with true keys = plain", against="plain", still=True),
    Law("patches on 2 stages = on 1 rank", {"pipefusion": 2}, exact=True),
    Law("patches on 3 stages = on 1 rank", {"pipefusion": 3}, exact=True),
    Law("guidance on 2 ranks = on 1 rank", {"cfg": 2}),
    Law("Ulysses on 2 ranks = on 1 rank", {"ulysses": 2}),
    Law("Ring on 2 ranks = on 1 rank", {"ring": 2}),
)


@dataclass(frozen=True)
class Finding:
    """What came of a law.

    Attributes:
        law: The law.
        outcome: What.
        detail: The largest difference, what failed and where, or why it was not tried.
    """

    law: str
    outcome: Outcome
    detail: str

    def as_dict(self) -> dict[str, str]:
        """As plain data."""
        return {"law": self.law, "outcome": self.outcome, "detail": self.detail}


class Trial:
    """Tries laws on a tiny model.

    Args:
        model: The model, plain.
        sample: What it is called with.
        plan: A plan to try in the place of the class's own.
    """

    def __init__(self, model: nn.Module, sample: Sample, plan: ModelPlan | None = None) -> None:
        self.model, self.sample = model, sample
        if plan is not None:
            model.patchpipe_plan = plan  # type: ignore[assignment]
        self.plan = plan or plan_for(model)
        self.tolerance = ROUNDED[next(model.parameters()).dtype]
        self._known: dict[tuple[str, bool], Tensor] = {}

    @property
    def _raster(self) -> Raster:
        """How the latent divides."""
        sample, latent = self.sample, self.sample.latents[0]
        return self.plan.grid.rows(self.model, latent.shape, sample.inputs(0, latent) | {sample.latent: latent})

    @property
    def _rows(self) -> int:
        """Rows of tokens of the latent, along the axis that is cut."""
        return self._raster.count

    def _pictures(self, images: Tensor) -> Tensor:
        """What a loop gave, without the room for the text: what is predicted there no pipeline looks at."""
        room, dim = self._raster.room, self.plan.grid.dim + 1  # the first dim is the call's
        return images.narrow(dim, room, images.shape[dim] - room)

    def findings(self, laws: Sequence[Law] = LAWS, tell: Callable[[str], None] = lambda _: None) -> Iterator[Finding]:
        """Tries one law after the other.

        Args:
            laws: The laws.
            tell: Called with the name of each before it is tried.
        """
        for law in laws:
            tell(law.name)
            outcome, detail = self._try(law)
            yield Finding(law.name, outcome, detail)

    def _try(self, law: Law) -> tuple[Outcome, str]:
        try:
            config = law.layout(self._rows)
            if "cfg" in law.degrees and not self.sample.guided:
                return "left out", "no guidance: the model is called once a step"
            fit(Loop.of(self.model, self.sample), [self.model], config)
        except ValueError as error:
            return "refused", str(error)
        try:
            found, right = self._run(config, law.still), self._right(law)
            if law.against == "one rank" and _apart(right, self._plain(still=False)) < SEEN:
                return "fails", "stale keys and values change nothing here, so that this shows nothing"
        except Exception as error:
            return "fails", f"{type(error).__name__}: {' '.join(str(error).split())}"
        return self._compared(law, found, right)

    def _compared(self, law: Law, found: Tensor, right: Tensor) -> tuple[Outcome, str]:
        if torch.equal(found, right):
            return "holds", "to the bit"
        apart = _apart(found, right)
        if not law.exact and apart <= self.tolerance:
            return "holds", f"to {apart:.0e}"
        return "fails", f"differs by {apart:.0e} of the largest value, {where(found, right, self.plan)}"

    def _right(self, law: Law) -> Tensor:
        if law.against == "plain":
            return self._plain(still=law.still)
        if ("one rank", False) not in self._known:
            self._known["one rank", False] = self._run(Law("").layout(self._rows), still=False)
        return self._known["one rank", False]

    def _plain(self, *, still: bool) -> Tensor:
        if ("plain", still) not in self._known:
            self._known["plain", still] = self._pictures(
                Loop.of(copy.deepcopy(self.model), self.sample)(STEPS, still).images
            )
        return self._known["plain", still]

    def _run(self, config: ParallelConfig, still: bool) -> Tensor:
        loops = [Loop.of(copy.deepcopy(self.model), self.sample) for _ in range(config.world_size)]

        def rank(group: Group, at: int) -> Tensor | None:
            loop = parallelize(loops[at], config, group=group)
            output = loop(STEPS, still)
            streamed = loop.patchpipe.last.steps_patched
            restore(loop)
            if not config.synchronous and not streamed:
                raise RuntimeError("no patch streamed, so that this shows nothing")
            return None if output is None else self._pictures(output.images)

        found = on_ranks(config, rank, SECONDS)[0]
        assert found is not None
        return found


def _apart(found: Tensor, right: Tensor) -> float:
    """The largest difference, as a share of the largest value."""
    if found.isnan().any():
        return float("inf")
    return float((found - right).abs().max() / right.abs().max())


def where(found: Tensor, right: Tensor, plan: ModelPlan) -> str:
    """Where two results differ, along the axis that is cut."""
    wrong = (found - right).abs()
    dims = [dim for dim in range(wrong.ndim) if dim != plan.grid.dim + 1]  # the first dim is the call's
    along = wrong.nan_to_num(float("inf")).amax(dims)
    bad = (along > 1e-3 * along.max()).nonzero().flatten().tolist()
    count = len(along)
    if len(bad) == count:
        return "everywhere"
    return f"at {_ranges(bad)} of {count} along {plan.grid.axes[plan.grid.dim]!r}"


def _ranges(numbers: Sequence[int]) -> str:
    """``0-3, 7``."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ", ".join(f"{low}-{high}" if low < high else f"{low}" for low, high in found)
