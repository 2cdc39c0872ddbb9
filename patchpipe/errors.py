"""Errors a user can meet, beside ``ValueError`` for a wrong request, and what was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

CANCELLED = "the request was cancelled"


class PatchpipeError(RuntimeError):
    """Base of every error that patchpipe raises about a running group."""


class RankFailed(PatchpipeError):
    """Another rank failed first; the message names that rank and its error."""


class RankLost(PatchpipeError):
    """Another rank died or did not answer before the deadline."""


class Cancelled(PatchpipeError):
    """The request was cancelled before its picture was done; the pipeline can serve the next one."""


class UnsupportedModel(PatchpipeError, ValueError):
    """The transformer class has no plan, or was asked for something its plan does not cover."""


NEAR = 0.75  # of difflib's ratio: one or two letters of a word, not another word


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """The name that was probably meant: one or two letters off, or part of it by whole words; ``None`` if none is near.

    Args:
        name: What was given.
        known: The names there are.
    """
    names, given = list(known), name.lower()
    near = difflib.get_close_matches(given, [one.lower() for one in names], n=1, cutoff=NEAR)
    if near:
        return next(one for one in names if one.lower() == near[0])
    words = set(given.replace("-", "_").split("_"))
    holding = [one for one in names if words <= set(one.lower().replace("-", "_").split("_"))]
    return min(holding, key=len) if holding and all(len(word) > 2 for word in words) else None
