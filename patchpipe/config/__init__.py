"""What a user asks for: a layout in detail, or that one is chosen automatically."""

from __future__ import annotations

from typing import Literal

from patchpipe.config.auto import AutoLayout
from patchpipe.config.parallel import Backend, ParallelConfig
from patchpipe.config.warmup import ALL_STEPS, PASSES, STREAMED, WATCHED, WarmupKind

PLAIN: Literal["plain"] = "plain"  # in place of a layout: diffusers as it is, on one device

__all__ = [
    "ALL_STEPS",
    "PASSES",
    "PLAIN",
    "STREAMED",
    "WATCHED",
    "AutoLayout",
    "Backend",
    "ParallelConfig",
    "WarmupKind",
]
