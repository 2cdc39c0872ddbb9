"""Where a part runs, and what it says of what it finds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Note = Callable[[str, bool | None, dict[str, Any]], None]

SHARING = 23000  # NCCL's version from which on several ranks may share a card
NCCL_SETTINGS = {
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",
    "NCCL_NVLS_ENABLE": "0",  # switches' multicast needs a card for every rank
    "NCCL_MAX_CTAS": "2",  # ranks on one card take turns: a waiting kernel must leave room
    "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # a hardware queue for the stream of every communicator
}


class Skip(Exception):
    """A part cannot show anything here; says why."""


@dataclass(frozen=True)
class Setting:
    """Where a part runs.

    Attributes:
        device: ``"cuda"``, or ``"cpu"`` for tiny shapes that only show that the code runs.
        card: The card's name.
        gpus: Cards.
        nccl: NCCL's version as it gives it, such as 23203; 0 where there is none.
        memory: Bytes of the first card.
    """

    device: str
    card: str = ""
    gpus: int = 0
    nccl: int = 0
    memory: int = 0

    @property
    def tiny(self) -> bool:
        """Whether shapes are tiny, because a CPU runs them."""
        return self.device == "cpu"

    def places(self, ranks: int, *, own: bool) -> list[str]:
        """The device of every rank: the first card or, if they are to ``own`` it and there are enough, one each."""
        if self.tiny:
            return ["cpu"] * ranks
        return [f"cuda:{rank if own and self.gpus >= ranks else 0}" for rank in range(ranks)]

    def why_no_nccl(self, ranks: int) -> str | None:
        """What keeps so many ranks from talking over NCCL, if anything does."""
        if self.tiny or self.gpus >= ranks:
            return None
        if not self.nccl:
            return "no NCCL was found"
        if self.nccl < SHARING:
            cards = f"{self.gpus} card{'s' if self.gpus > 1 else ''}"
            return (
                f"{ranks} ranks would share {cards}, which NCCL {version(self.nccl)} does not let them: bring 2.30 "
                f"or later of it, packed by `python -m bench.gpu.pack_nccl`, and name it with --nccl"
            )
        return None

    def needs(self, gib: float) -> None:
        """Skips the part where the card has less memory."""
        if not self.tiny and self.memory < gib * 2**30:
            raise Skip(f"it needs {gib:g} GiB on one card, and {self.card} has {self.memory / 2**30:.0f}")

    def as_text(self) -> str:
        """For a command line."""
        return json.dumps(asdict(self))


def version(code: int) -> str:
    """NCCL's version as people write it."""
    return f"{code // 10000}.{code // 100 % 100}.{code % 100}"


class Rows:
    """What a part has found so far, on disk after every row.

    Args:
        path: A line of JSON for every row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: list[dict[str, Any]] = []
        path.write_text("")

    def note(self, title: str, ok: bool | None, figures: dict[str, Any]) -> None:
        """Adds a row.

        Args:
            title: What was tried.
            ok: Whether it came out as it must; ``None`` for figures that cannot be wrong.
            figures: What was found, plain data.
        """
        row = {"title": title, "ok": ok, **figures}
        self.found.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a part that may still be writing, or was ended while it wrote."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
