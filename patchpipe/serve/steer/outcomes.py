"""Whose fault it was that a picture was not painted, and what its client is told."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from patchpipe.serve.refusals import Refusal
from patchpipe.serve.work.model import Model

if TYPE_CHECKING:
    from patchpipe.serve.steer.runs import Run

logger = logging.getLogger("patchpipe.serve")

MOST_ATTEMPTS = 2  # of a request whose worker died
_REQUESTS_FAULT = (ValueError, TypeError, FileNotFoundError, NotImplementedError)


@dataclass(frozen=True)
class Outcome:
    """What came of a run that failed.

    Attributes:
        refusal: What the client is told, if it is not tried again.
        unbegun: The engine had not taken it: it waits on.
        clients: The model refuses the request itself.
        carried_badly: It was to go on from what was kept, and could not: it begins anew, and stays where it is.
    """

    refusal: Refusal
    unbegun: bool = False
    clients: bool = False
    carried_badly: bool = False


def outcome_of(model: Model, run: Run, error: BaseException) -> Outcome:
    """What came of it; gets a model up again whose engine it has ended.

    Args:
        model: The model.
        run: The run.
        error: What ended it.
    """
    if isinstance(error, Refusal):  # the model went down before anything was begun
        return Outcome(error, unbegun=True)
    if isinstance(error, _REQUESTS_FAULT):
        refusal = Refusal(400, str(error), code="refused_by_model")
        return Outcome(refusal, clients=True, carried_badly=run.carried)
    cause = f"{type(error).__name__}: {error}"
    logger.error("painting failed", extra={"fields": {"model": model.name, "cause": cause}})
    if run.engine is None or not run.engine.closed:
        return Outcome(Refusal(500, f"{model.public} could not paint this: {error}", code="worker_failed"))
    model.lost(run.engine, str(error))
    refusal = Refusal(503, f"a worker of {model.public} failed: {error}", code="worker_lost", retry_after=10)
    return Outcome(refusal, unbegun=not run.taken)
