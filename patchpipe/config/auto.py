"""Asks that a layout be chosen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from patchpipe.config.parallel import Backend, ParallelConfig
from patchpipe.config.warmup import WarmupKind


@dataclass(frozen=True)
class AutoLayout:
    """Asks for the layout that the planner predicts to be the quickest.

    Attributes:
        exact: Only methods whose picture is that of one device, up to the order of sums.
        request: Arguments of the calls to come, as far as known; others are the model's usual ones. The layout serves
            any request all the same.
        pictures: Pictures that are wanted at once.
        batched: Whether these may be painted in one request.
        plain: Whether plain diffusers will do where one device is best.
        methods: Methods that may be used; ``None`` allows all.
        warmup: As in ``ParallelConfig``.
        compile: Whether blocks are compiled.
        backend: As in ``ParallelConfig``.
        timeout: As in ``ParallelConfig``.
    """

    exact: bool = False
    request: Mapping[str, Any] = field(default_factory=dict)
    pictures: int = 1
    batched: bool = False
    plain: bool = True
    methods: tuple[str, ...] | None = None
    warmup: WarmupKind | None = None
    compile: bool = False
    backend: Backend = "auto"
    timeout: float = 300.0

    def __post_init__(self) -> None:
        self.alone()  # the fields they share are checked there
        if self.pictures < 1:
            raise ValueError(f"pictures={self.pictures} must be 1 or more")

    def alone(self) -> ParallelConfig:
        """One rank."""
        return ParallelConfig(warmup=self.warmup, compile=self.compile, backend=self.backend, timeout=self.timeout)

    def finished(self, config: ParallelConfig) -> ParallelConfig:
        """A layout that the planner found, as it is run: it serves requests of other sizes and without guidance too."""
        own: dict[str, Any] = {"backend": self.backend, "timeout": self.timeout, "idle_branch": config.cfg > 1}
        if self.request.get("height") is None:  # other sizes may come: patches are cut for each
            own |= {"patches": None, "split_batch": None, "share_blocks": None}
            own |= {} if config.parallel_vae or config.text_rank is not None else {"stage_blocks": None}
        return replace(config, **own)
