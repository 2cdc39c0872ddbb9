"""Errors a user can meet, beside ``ValueError`` for a wrong request."""

from __future__ import annotations


class PatchpipeError(RuntimeError):
    """Base of every error that patchpipe raises about a running group."""


class RankFailed(PatchpipeError):
    """Another rank failed first; the message names that rank and its error."""


class RankLost(PatchpipeError):
    """Another rank died or did not answer before the deadline."""


class UnsupportedModel(PatchpipeError, ValueError):
    """The transformer class has no plan, or was asked for something its plan does not cover."""
