"""The parts, in the order they run, and how long each may take."""

from __future__ import annotations

from dataclasses import dataclass

LIMIT = 535.0  # seconds for all of them
CPU_LIMIT = 600.0  # seconds of each on a CPU, which may have other things to do


@dataclass(frozen=True)
class Part:
    """One part of the command.

    Attributes:
        letter: Its name on the command line.
        title: What it shows.
        module: Where its ``run`` is.
        limit: Seconds it may take.
        nccl: Whether several ranks talk over NCCL in it.
    """

    letter: str
    title: str
    module: str
    limit: float
    nccl: bool = False


PARTS = (
    Part("a", "the laws on two ranks that share the card, over the host", "bench.gpu.laws", 60),
    Part("b", "every layout over NCCL, and a rank that dies", "bench.gpu.layouts", 115, nccl=True),
    Part("c", "what patches cost beside plain diffusers, and blocks by tokens", "bench.gpu.speed", 60),
    Part("d", "which attention kernel runs", "bench.gpu.attention", 55),
    Part("e", "compiled blocks beside eager ones", "bench.gpu.compiled", 105),
    Part("f", "whether the host waits for the device", "bench.gpu.waits", 30, nccl=True),
    Part("g", "peak memory beside the planner's formula", "bench.gpu.memory", 35),
    Part("h", "what a forecast of stale keys and values adds", "bench.gpu.forecasts", 15),
    Part("i", "weights that come from host memory", "bench.gpu.offloading", 60),
)


def chosen(text: str | None) -> list[Part]:
    """The parts named, such as ``a,c``; all of them where none is.

    Raises:
        ValueError: There is no such part.
    """
    if not text:
        return list(PARTS)
    letters = [letter.strip().lower() for letter in text.split(",") if letter.strip()]
    unknown = [letter for letter in letters if letter not in {part.letter for part in PARTS}]
    if unknown or not letters:
        known = "; ".join(f"{part.letter}: {part.title}" for part in PARTS)
        raise ValueError(f"part {', '.join(unknown) or repr(text)} is unknown: there are {known}")
    return [part for part in PARTS if part.letter in letters]
