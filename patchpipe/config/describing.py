"""A layout in one line for people."""

from __future__ import annotations

from typing import Any

from patchpipe.config.warmup import told
from patchpipe.layout.axes import DEGREES


def describe(config: Any) -> str:
    """One line for people: the layout used.

    Args:
        config: The layout, a ``ParallelConfig``, whose module imports this one.
    """
    degrees = [f"{name} {size}" for name in DEGREES if (size := getattr(config, name)) > 1]
    patches = "auto" if config.patches is None else str(config.patches)
    if config.patch_rows is not None:
        patches = f"{len(config.patch_rows)} {config.patch_rows}"
    if config.distrifusion == 1 and (config.pipefusion > 1 or patches not in ("auto", "1")):
        degrees.append(f"patches {patches}")
    degrees += _exchanged(config)
    if config.split_batch is not None:
        degrees.append("batch in halves" if config.split_batch else "batch whole")
    if config.share_blocks is not None:
        degrees.append("shared blocks" if config.share_blocks else "whole blocks")
    if config.stale and config.forecast is not None:
        degrees.append("stale keys forecast" if config.forecast else "stale keys as they were")
    degrees = degrees or ["one device"]
    degrees += [] if config.offload is None else [config.offload.describe()]
    steps = "every step synchronous" if config.synchronous else f"warm-up {told(config.warmup, config.forecasts)}"
    return " · ".join([*degrees, steps, *(["compiled"] if config.compile else [])])


def _exchanged(config: Any) -> list[str]:
    """What is special in what ranks send each other."""
    words = [f"ulysses inside {config.ulysses_inner}, then across"] if config.ulysses_inner > 1 else []
    words += ["values first"] if config.values_first else []
    words += [] if config.changed_tokens is None else [f"changed tokens {config.changed_tokens:g}"]
    return [*words, *([] if config.compress is None else [f"changes in {config.compress}"])]
