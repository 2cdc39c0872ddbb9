"""The one truth about ranks: who is in the group, who comes before and after, how they talk."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from patchpipe.config import ParallelConfig
from patchpipe.distributed.agreement import agree, gather
from patchpipe.distributed.exchange import Exchange
from patchpipe.distributed.failures import Failures
from patchpipe.distributed.gate import Gate
from patchpipe.distributed.guard import Guard, say_goodbye
from patchpipe.distributed.process_groups import ProcessGroups, let_go
from patchpipe.distributed.rows import WireRows, join_rows
from patchpipe.distributed.transport import Channel, Wire
from patchpipe.errors import RankFailed
from patchpipe.layout.axes import Mesh
from patchpipe.layout.communicators import Link, answer_links, key_links, lines_of, stage_links
from patchpipe.tracing.recorder import Recorder, span

CARRIES = {  # what a line's wire carries, where it is not named like its axis
    "ulysses": "all-to-all",
    "ulysses_inner": "all-to-all inside",
    "ulysses_outer": "all-to-all across",
}


class Group:
    """The ranks of one parallel pipeline, and the wires between them.

    Forward hops, the return hop and everything shared by all ranks have separate process groups, so that
    none waits behind another. A group of one rank has none. Over NCCL every communicator is made here, or when the
    pipeline is attached, and none in a request.

    Args:
        config: The layout.
        rank: This rank.
        device: Where this rank computes.
        store: Where the ranks meet; ``None`` only for a single rank.
        backend: ``"gloo"`` or ``"nccl"``.

    Attributes:
        failures: Who failed first, told and read.
        recorder: Of the request under way, if it is traced.
    """

    def __init__(
        self, config: ParallelConfig, rank: int, device: torch.device, store: dist.Store | None, backend: str
    ) -> None:
        self.config, self.rank, self.device, self.backend = config, rank, device, backend
        self.world_size = config.world_size
        self.mesh = Mesh(config.mesh_shape, rank)
        self._store = store
        self.failures = Failures(store, rank, config.timeout)
        self._control: Any = None
        self._wires: dict[str, Wire] = {}
        self._strips: list[WireRows] = []
        self._apart: list[Wire] = []  # beside the requests, and not in their figures
        self.recorder: Recorder | None = None
        self._in_flight = 1
        self._agreements = 0
        self.lines: dict[str, Exchange] = {}
        self._later: list[Callable[[], None]] = []
        self._groups = ProcessGroups(store, config.timeout)
        self._guard: Guard | None = None
        self._lifeline: Any = None
        if self.world_size == 1:
            return
        self._control = self._groups.make("control", "gloo", rank, self.world_size)
        if backend == "nccl":
            self._guard = self._watch()
        self._add_wire("forward", "stream", stage_links(self.mesh))
        self._add_wire("return", "prediction", answer_links(self.mesh))
        for name, ranks in lines_of(self.mesh, config.ulysses_inner).items():
            self.lines[name] = self._line(name, ranks)

    def open_keys(self, boundaries: Sequence[int]) -> None:
        """Makes the ways for keys and values of blocks that two stages share; every rank calls it alike.

        Args:
            boundaries: The earlier stage of each such pair.
        """
        self._add_wire("keys", "keys", key_links(self.mesh, boundaries))

    def _add_wire(self, name: str, carries: str, links: Sequence[Link]) -> None:
        """Makes what the links need, and over NCCL lets the ranks of each meet, in the order of the links."""
        if not links:
            return
        options = (self.device, self.backend, self.config.timeout, self.failures.explain, carries, self._guard)
        if self.backend == "gloo":
            self._wires[name] = Wire(self._groups.make(name, "gloo", self.rank, self.world_size), *options)
            return
        groups: dict[Link, Any] = {}
        wire = self._wires[name] = Wire(None, *options, groups)
        for link in links:
            if self.rank == link.sender:
                groups[link] = self._groups.make(f"{name}/{link.sender}-{link.receiver}", self.backend, 0, 2)
                wire.channel(link.receiver).send_nothing(torch.Size((1,)), torch.float32)
            elif self.rank == link.receiver:
                groups[link] = self._groups.make(f"{name}/{link.sender}-{link.receiver}", self.backend, 1, 2)
                wire.channel(link.sender).expect((1,), torch.float32)
        self.drain()

    def _line(self, name: str, ranks: tuple[int, ...]) -> Exchange:
        index = ranks.index(self.rank)
        inner = self._groups.make(f"{name}/{ranks[0]}", self.backend, index, len(ranks))
        options = (self.config.timeout, self.failures.explain, CARRIES.get(name, name), self._guard)
        line = Exchange(Wire(inner, self.device, self.backend, *options), index, len(ranks), ranks)
        if self.backend == "nccl":
            line.meet()
        return line

    def _watch(self) -> Guard:
        """Looks on where waits order streams; see ``Guard``."""
        guard = Guard(self.config.timeout, self.failures.told, self.failures.explain_to_all, self._abort)
        self._lifeline = self._groups.make("lifeline", "gloo", self.rank, self.world_size)
        guard.watch(self._lifeline, (self.rank + 1) % self.world_size)
        return guard

    # -- who is where ----------------------------------------------------------------------------

    @property
    def stage(self) -> int:
        """Index of this rank's pipeline stage."""
        return self.mesh.at("pipe")

    @property
    def first(self) -> bool:
        """Whether this rank runs the first stage, which holds the latent."""
        return self.stage == 0

    @property
    def last(self) -> bool:
        """Whether this rank runs the last stage, which makes the noise prediction."""
        return self.stage == self.config.pipefusion - 1

    @property
    def output(self) -> bool:
        """Whether this rank holds the VAE and gets the images."""
        return self.rank == self.config.output_rank

    def channel_from_previous(self) -> Channel:
        """Streams from the stage before."""
        return self._wires["forward"].channel(self.mesh.peer(pipe=self.stage - 1))

    def channel_to_next(self) -> Channel:
        """Streams to the stage after."""
        return self._wires["forward"].channel(self.mesh.peer(pipe=self.stage + 1))

    def channel_for_keys(self, *, to_next: bool) -> Channel:
        """Keys and values to and from the stage after, or the one before."""
        return self._wires["keys"].channel(self.mesh.peer(pipe=self.stage + (1 if to_next else -1)))

    def answers(self, rank: int) -> Channel:
        """Noise predictions between a rank of the last stage and one of the first."""
        return self._wires["return"].channel(rank)

    @property
    def _all_wires(self) -> list[Wire]:
        lines = [line.wire for line in self.lines.values()]
        return [*self._wires.values(), *lines, *(rows.wire for rows in self._strips), *self._apart]

    @property
    def _ends(self) -> list[Channel | Exchange]:
        """All that tensors leave through."""
        return [*(channel for wire in self._wires.values() for channel in wire.channels), *self.lines.values()]

    def begin_requests(self, in_flight: int = 1) -> None:
        """From here on, failures are those of a new request, or of several together; all ranks count alike."""
        self.failures.begin()
        self._in_flight = in_flight

    def set_in_flight(self, requests: int) -> None:
        """From here on there are so many requests in flight."""
        self._in_flight = max(1, requests)

    def next_call(self) -> None:
        """Marks the beginning of a call of the transformer; tensors sent some calls ago are let go."""
        for end in self._ends:
            end.next_call(self._in_flight)

    def later(self, check: Callable[[], None]) -> None:
        """Has something checked at the end of the request, when the host waits for the device anyway."""
        self._later.append(check)

    def drain(self) -> None:
        """Waits until nothing is under way: no hop, and no rows sent for a step that never comes.

        Raises:
            Exception: Something that was to be checked by then was found wrong.
        """
        for end in self._ends:
            end.drain()
        checks, self._later = self._later, []
        for check in checks:
            check()
        if self._guard is not None:
            self._guard.settle()

    def traffic(self) -> tuple[int, float]:
        """Bytes this rank sent in hops and exchanges so far, and seconds it waited for them."""
        return sum(end.sent_bytes for end in self._ends), sum(end.waited_seconds for end in self._ends)

    def rows(self) -> WireRows:
        """All ranks as strips of a picture, for the VAE."""
        rows = join_rows(self._groups, self.rank, self.world_size, device=self.device, explain=self.failures.explain)
        self._strips.append(rows)
        return rows

    def open_line(self, name: str, ranks: tuple[int, ...]) -> Exchange:
        """A line for something beside the requests, such as weights; each of its ranks calls this alike.

        Args:
            name: What it is for, in words of its own.
            ranks: The ranks of the line, this one among them.
        """
        line = self._line(f"{name} {len(self._apart)}", ranks)
        self._apart.append(line.wire)
        return line

    def control_wire(self) -> Wire:
        """Small tensors on the host between any two ranks, counted nowhere."""
        return Wire(self._control, torch.device("cpu"), "gloo", self.config.timeout, self.failures.explain, "control")

    def record(self, recorder: Recorder | None) -> None:
        """From here on, every wait and every tensor sent goes to ``recorder``; ``None`` ends that."""
        self.recorder = recorder
        for wire in self._all_wires:
            if wire not in self._apart:  # threads of their own use these
                wire.recorder = recorder

    def open_gate(self) -> Gate:
        """From here on it is told when tensors of hops and exchanges are on their way; see ``Gate``."""
        gate = Gate(self.device)
        for wire in (*self._wires.values(), *(line.wire for line in self.lines.values())):
            wire.gate = gate
        return gate

    @property
    def store(self) -> dist.Store | None:
        """Where the ranks met; ``None`` for a single rank."""
        return self._store

    # -- what all ranks share --------------------------------------------------------------------

    def broadcast(self, tensor: Tensor | None, root: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The root's tensor on every rank's device; others that have it too keep theirs, or pass ``None``."""
        if self.world_size == 1:
            assert tensor is not None
            return tensor
        if self.rank == root:
            assert tensor is not None
            data = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
            self.check()  # the copy waits for the device, which goes on when communicators are aborted
            self._broadcast_bytes(data, root, "latent")
            return tensor
        staged = torch.empty(shape, dtype=dtype)
        self._broadcast_bytes(staged.reshape(-1).view(torch.uint8), root, "latent")
        return staged.to(self.device) if tensor is None else tensor

    def share(self, root: int, compute: Callable[[], Any], carries: str = "control") -> Any:
        """What ``compute`` returns on the root, on every rank; what it raises there, it raises everywhere.

        Args:
            root: The rank that computes.
            compute: Called there alone.
            carries: What kind of thing it returns, for the timeline.
        """
        if self.world_size == 1:
            return compute()
        if self.rank == root:
            return self._share_mine(root, compute, carries)
        size = torch.zeros(1, dtype=torch.int64)
        self._broadcast_bytes(size.view(torch.uint8), root, carries)
        message = torch.empty(int(size), dtype=torch.uint8)
        self._broadcast_bytes(message, root, carries)
        failed, value = torch.load(io.BytesIO(message.numpy().tobytes()), map_location=self.device, weights_only=False)
        if failed:
            raise value
        return value

    def check(self) -> None:
        """Raises what has gone wrong where no wait could tell, over NCCL.

        Raises:
            PatchpipeError: The first cause.
        """
        if self._guard is not None:
            self._guard.check()

    def _share_mine(self, root: int, compute: Callable[[], Any], carries: str) -> Any:
        error: Exception | None = None
        value: Any = None
        try:
            value = compute()
        except Exception as raised:
            error = raised
        buffer = io.BytesIO()
        torch.save((error is not None, _portable(error) if error else value), buffer)
        message = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
        self._broadcast_bytes(torch.tensor([message.numel()]).view(torch.uint8), root, carries)
        self._broadcast_bytes(message, root, carries)
        if error is not None:
            raise error
        return value

    def _broadcast_bytes(self, data: Tensor, root: int, carries: str) -> None:
        whom = f"rank {root}"
        with span(self.recorder, "wait", channel=carries, peer=whom), self.failures.explaining(whom):
            self._control.broadcast(data, root).wait(timedelta(seconds=self.config.timeout))

    def agree(self, what: dict[str, Any], problem: Exception | None = None) -> None:
        """Checks that every rank was started with the same ``what``, and that none has a problem.

        Raises:
            ValueError: Two ranks differ; every rank raises the same text.
            Exception: This rank's problem.
            RankFailed: Another rank has one that this one has not.
        """
        if self._store is not None:
            self._agreements += 1
            topic = f"agree/{self._agreements}"
            agree(self._store, topic, self.rank, self.world_size, what, self.config.timeout, problem)
        elif problem is not None:
            raise problem

    def tell_all(self, what: Any) -> list[Any]:
        """What every rank tells, by rank; plain data."""
        if self._store is None:
            return [what]
        self._agreements += 1
        return gather(self._store, f"told/{self._agreements}", self.rank, self.world_size, what, self.config.timeout)

    # -- the end ---------------------------------------------------------------------------------

    @property
    def closed(self) -> bool:
        """Whether the ranks can no longer talk."""
        return self.world_size > 1 and self._control is None

    def close(self) -> None:
        """Closes the connections; peers that wait for this rank see it at once."""
        if self._guard is not None and self._lifeline is not None:
            self._guard.end()
            say_goodbye(self._lifeline, (self.rank - 1) % self.world_size)
        for line in self.lines.values():
            line.forget()
        groups = [group for wire in self._all_wires for group in wire.close()] + [self._control, self._lifeline]
        self._control = self._lifeline = None
        self._wires.clear()
        self.lines.clear()
        self._strips.clear()
        self._apart.clear()
        let_go(groups)
        self._groups.close()

    def _abort(self) -> None:
        """Ends all that is under way on the device."""
        for wire in self._all_wires:
            wire.abort()


def _portable(error: Exception) -> Exception:
    """The error itself if it survives pickling, else one that says the same."""
    if type(error) in (ValueError, TypeError, KeyError, NotImplementedError, FileNotFoundError):
        return type(error)(*error.args)
    return RankFailed(f"{type(error).__name__}: {error}")
