"""A worker that holds the whole model, and serves requests with some of the others."""

from __future__ import annotations

from typing import Any

from patchpipe.engine.messages import OpenStream
from patchpipe.engine.worker.serve import Server


class LaneServer(Server):
    """Answers the parent's messages with one pipeline, in one lane at a time."""

    _lane: Any = None  # the one at work
    _lanes: dict[int, Any]

    def _load_pipeline(self) -> Any:
        from torch.distributed import PrefixStore, TCPStore

        from patchpipe.config import ParallelConfig
        from patchpipe.distributed.joining import join
        from patchpipe.pipeline.streams.lanes import Lane

        pipe, start = super()._load_pipeline(), self._start
        assert start.store_port is not None
        store = TCPStore("127.0.0.1", start.store_port, None, False)
        self._lanes = {}
        for number, (ranks, config) in enumerate(start.lanes):
            if start.rank not in ranks:
                continue
            layout = ParallelConfig(**config)
            at, scoped = ranks.index(start.rank), PrefixStore(f"lane/{number}", store)
            group = join(layout, rank=at, world_size=len(ranks), store=scoped, device=start.device)
            self._lanes[number] = Lane(pipe, layout, group)
        return pipe

    def _stream(self, call: OpenStream) -> None:
        self._lane = self._lanes[call.lane]
        try:
            with self._warnings(call.request):
                self._lane.serve(self._visitors(call.request, self._lane.group, self._lane.timeout))
        finally:
            self._lane = None

    def _stop(self) -> None:
        lane = self._lane
        if lane is not None:
            lane.cancel()

    @property
    def _usable(self) -> bool:
        return not any(lane.group.closed for lane in self._lanes.values())
