"""Worker processes on one machine that paint together, driven from a plain script or a notebook."""

from __future__ import annotations

from patchpipe.engine.engine import Engine
from patchpipe.engine.messages import RankInfo
from patchpipe.engine.results import Preview, Progress, Result
from patchpipe.engine.tickets.checkpoint import Checkpoint
from patchpipe.engine.tickets.elastic import Elastic
from patchpipe.engine.tickets.ticket import Ticket

__all__ = ["Checkpoint", "Elastic", "Engine", "Preview", "Progress", "RankInfo", "Result", "Ticket"]
