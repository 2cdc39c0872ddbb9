"""How a request begins: synchronous steps, steps that stream several times, or what the forecast tells."""

from __future__ import annotations

from typing import Any, Literal

from patchpipe.layout.checks import check_at_least

ALL_STEPS: Literal["all"] = "all"
STREAMED: Literal["streamed"] = "streamed"
WATCHED: Literal["auto"] = "auto"
WarmupKind = int | Literal["all", "streamed", "auto"]
# How often the patches of the first steps stream in place of a synchronous one. The latter with guidance, which
# amplifies the errors of the first stale steps.
PASSES = ((3,), (3, 2, 2, 2))


def check_warmup(warmup: Any) -> None:
    """Refuses what is no warm-up.

    Raises:
        ValueError: It is neither a number of steps nor one of the words.
    """
    if warmup not in (None, ALL_STEPS, STREAMED, WATCHED):
        hint = 'or "all" to run every step synchronously, or "streamed" or "auto"'
        check_at_least("warmup", warmup, 0, hint=hint)


def synchronous_steps(warmup: WarmupKind | None, *, guided: bool, forecast: bool) -> int:
    """Synchronous steps before patches stream, if ever they do."""
    if warmup in (None, WATCHED):
        return 2 if guided and forecast else 1
    return warmup if isinstance(warmup, int) else 0


def passes(warmup: WarmupKind | None, call: int, *, guided: bool) -> int:
    """How often the patches of a call that streams go through the stages."""
    several = PASSES[guided] if warmup == STREAMED else ()
    return several[call] if call < len(several) else 1


def told(warmup: WarmupKind | None, forecast: bool) -> str:
    """For people: the warm-up."""
    if warmup not in (None, WATCHED):
        return str(warmup)
    one, two = (synchronous_steps(warmup, guided=guided, forecast=forecast) for guided in (False, True))
    steps = f"{one} or {two} with guidance" if one != two else str(one)
    return steps if warmup is None else f"{steps}, and where a forecast fails"
