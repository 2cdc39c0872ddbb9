"""Worker processes on one machine that paint together, driven from a plain script or a notebook."""

from __future__ import annotations

from patchpipe.engine.engine import Engine, Progress, Result
from patchpipe.engine.messages import RankInfo

__all__ = ["Engine", "Progress", "RankInfo", "Result"]
