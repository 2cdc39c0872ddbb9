"""What a user asks for: a layout, in every detail, or that one be chosen."""

from __future__ import annotations

from typing import Literal

from patchpipe.config.auto import AutoLayout
from patchpipe.config.parallel import SPREAD, Backend, ParallelConfig
from patchpipe.config.warmup import ALL_STEPS, PASSES, STREAMED, WATCHED, WarmupKind

PLAIN: Literal["plain"] = "plain"  # in place of a layout: diffusers as it is, on one device

__all__ = [
    "ALL_STEPS",
    "PASSES",
    "PLAIN",
    "SPREAD",
    "STREAMED",
    "WATCHED",
    "AutoLayout",
    "Backend",
    "ParallelConfig",
    "WarmupKind",
]
