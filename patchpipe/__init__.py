"""Any diffusers pipeline, unmodified, on N devices: PipeFusion for diffusion transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from patchpipe.config import AutoLayout, ParallelConfig
from patchpipe.errors import Cancelled, PatchpipeError, RankFailed, RankLost, UnsupportedModel
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.version import __version__

if TYPE_CHECKING:
    from patchpipe.engine import Engine
    from patchpipe.pipeline.apply import parallelize, restore
    from patchpipe.pipeline.pretrained import from_pretrained

__all__ = [
    "AutoLayout",
    "Cancelled",
    "Engine",
    "OffloadConfig",
    "ParallelConfig",
    "PatchpipeError",
    "RankFailed",
    "RankLost",
    "UnsupportedModel",
    "__version__",
    "from_pretrained",
    "parallelize",
    "restore",
]

_HOMES = {
    "Engine": "patchpipe.engine",
    "from_pretrained": "patchpipe.pipeline.pretrained",
    "parallelize": "patchpipe.pipeline.apply",
    "restore": "patchpipe.pipeline.apply",
}


def __getattr__(name: str) -> Any:
    """Imports the heavy parts when they are asked for, so that ``patchpipe --help`` is quick."""
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'patchpipe' has no attribute {name!r}")
