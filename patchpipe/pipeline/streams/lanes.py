"""One pipeline that each of its ranks holds whole, served by some of them at a time: as many as a request is given.

The groups are made once. What a rank computes with (the model, and the hooks in its layers) is the same for every
group; what differs is who shares a step, and that is looked up in the group whose turn it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from patchpipe.config import ParallelConfig
from patchpipe.distributed.mesh import Group
from patchpipe.loading.choice import check_served, original_class
from patchpipe.pipeline.callbacks import Callbacks
from patchpipe.pipeline.extent import Extent
from patchpipe.pipeline.parts import Hooks, Parts, hook_transformer
from patchpipe.pipeline.requests import Requests, copy_for
from patchpipe.pipeline.streams.serving import Calls, Served
from patchpipe.schedule.runner import Runner


class Lane:
    """Some of the ranks, on one of them.

    Args:
        pipe: The pipeline, parallel on this rank alone.
        config: How these ranks share a request.
        group: These ranks.

    Raises:
        ValueError: The layout does not leave the model whole on each rank, or does not fit it.
    """

    def __init__(self, pipe: Any, config: ParallelConfig, group: Group) -> None:
        self._pipe, self._kind, self.group = pipe, original_class(pipe), group
        alone: Runner = pipe.patchpipe.runner
        check_whole(config)
        self._runner = Runner(alone.plan, config, group, alone.stages, halves=False)
        self._extent, callbacks = Extent(group, self._runner), Callbacks()
        self._requests = Requests(config, group, self._runner, self._extent, callbacks)
        self._parts = Parts(config, group, self._runner, callbacks, lambda: None)
        self.timeout = config.timeout

    def serve(self, calls: Calls) -> None:
        """Serves calls until told to end; every rank of the lane calls it alike. See ``streams.serving.serve``."""
        check_served(self._pipe)
        hooks, vae = Hooks(), getattr(self._pipe, "vae", None)
        try:
            for stage in self._runner.stages:
                hook_transformer(stage, self._runner, {}, hooks)
            if isinstance(vae, nn.Module):
                encode, decode = (getattr(type(vae), name).__get__(vae) for name in ("encode", "decode"))
                hooks.set(vae, "encode", self._parts.on_owner(encode, self.group.config.output_rank, "vae"))
                hooks.set(vae, "decode", self._parts.decode(decode))
            self._requests.stream(self._pipe, Served(self._pipe, calls, self._requests, self._copied))
        finally:
            hooks.undo()

    def cancel(self) -> bool:
        """Ends all its requests; see ``Extent.cancel``."""
        return self._extent.cancel()

    def _copied(self, number: int, bar: Callable[..., Any] | None) -> Any:
        copied, _ = copy_for(self._pipe, number, bar)
        encode = getattr(self._kind, "encode_prompt", None)
        if encode is not None:
            vars(copied)["encode_prompt"] = self._parts.share_text(partial(encode, copied))
        return copied


def check_whole(config: ParallelConfig) -> None:
    """Refuses a layout in which a rank holds or runs a part of the model.

    Raises:
        ValueError: It is one.
    """
    if config.ulysses_inner > 1 or config.values_first or config.changed_tokens is not None:
        raise ValueError(
            f"{config.describe()} cannot change its number of ranks while it runs: ulysses_inner, values_first and "
            f"changed_tokens are not tested with that. Leave them out"
        )
    if config.methods - {"ulysses", "ring"} or config.compile or config.parallel_vae:
        raise ValueError(
            f"{config.describe()} cannot change its number of ranks while it runs: its ranks do not all hold the "
            f"whole model, or nothing tests it. Use ulysses or ring alone"
        )
