"""In which order the patches of a step should go through a stage's blocks whose weights come and go: played, not run.

python -m bench.offload_order

*Patch by patch* every patch goes through all blocks before the next one begins, and the weights come M times a step.
*In windows* of g patches all g go through a group of blocks before the next group replaces it, so that they come M / g
times; but a stage then hands on the first patch of a window only when it has begun the last group. *Fewer patches*
brings weights as seldom with no window at all. A stage's weights are streamed through two groups' worth of memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

STEPS = 8  # played; the last one counts
GROUPS = 8  # of blocks in a stage


@dataclass(frozen=True)
class Order:
    """A way through the stages.

    Attributes:
        stages: Stages N.
        patches: Patches M of a step.
        window: Patches that go through a group of blocks together.
        patch: Seconds of a stage for one patch.
        load: Seconds in which a stage's weights come once.
        hop: Seconds from one stage to the next.
    """

    stages: int
    patches: int
    window: int
    patch: float
    load: float
    hop: float = 0.0

    @property
    def loads(self) -> int:
        """How often the weights come in a step."""
        return self.patches // self.window

    def period(self) -> float:
        """Seconds from one steady step to the next."""
        arrived = [0.0] * self.patches  # of every patch at the stage that is next
        stages = [_Stage(self) for _ in range(self.stages)]
        ends = []
        for _ in range(STEPS):
            for first in range(0, self.patches, self.window):
                for stage in stages:
                    stage.run(arrived, range(first, first + self.window))
            ends.append(max(arrived))
        return (ends[-1] - ends[STEPS // 2 - 1]) / (STEPS - STEPS // 2)


class _Stage:
    def __init__(self, order: Order) -> None:
        self.order, self.free, self.link = order, 0.0, 0.0
        self.left = [0.0, 0.0]  # when the two groups before this one were done with

    def run(self, arrived: list[float], window: range) -> None:
        """Takes a window through all groups; notes when its patches arrive at the next stage."""
        own = {patch: arrived[patch] for patch in window}
        for _ in range(GROUPS):
            self.link = max(self.link, self.left[0]) + self.order.load / GROUPS
            for patch in window:
                self.free = max(self.free, self.link, own[patch]) + self.order.patch / GROUPS
                own[patch] = self.free
            self.left = [self.left[1], self.free]
        for patch in window:
            arrived[patch] = own[patch] + self.order.hop


def main(stages: int = 4) -> None:
    """Prints the periods beside the work of a stage, which is 1."""
    table = Table(title=f"{stages} stages; a step's work of one stage is 1, hops a fiftieth of that")
    columns = (
        "weights come in",
        "patches",
        "patch by patch",
        "windows of 2",
        "windows of 4",
        "half the patches",
        "a quarter",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for load in (0.05, 0.1, 0.2, 0.4):
        for patches in (stages, 2 * stages, 4 * stages):
            periods = [_period(stages, patches, window, load) for window in (1, 2, 4)]
            fewer = [_period(stages, patches // share, 1, load) for share in (2, 4)]
            table.add_row(f"{load:.2f}", str(patches), *(f"{one:.2f}" if one else "-" for one in (*periods, *fewer)))
    Console().print(table)


def _period(stages: int, patches: int, window: int, load: float) -> float | None:
    if patches < stages or patches % window:
        return None
    return Order(stages, patches, window, 1 / patches, load, 0.02).period()


if __name__ == "__main__":
    main()
