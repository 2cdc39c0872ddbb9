"""Worker processes on one machine that paint together, driven from a plain script or a notebook."""

from __future__ import annotations

from patchpipe.engine.engine import Engine
from patchpipe.engine.messages import RankInfo
from patchpipe.engine.results import Preview, Progress, Result

__all__ = ["Engine", "Preview", "Progress", "RankInfo", "Result"]
