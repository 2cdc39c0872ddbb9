"""A device that only takes time: a model's blocks sleep for as long as the planner says a real card would compute.

The model is the real diffusers class with its real number of blocks, tokens and heads' worth of exchanges, but a tiny
width. Of each block the parts that would be kernels on a card are left out: its products, norms and gates, and the
attention itself. In their place the rank sleeps, *dilated* by a factor, so that 16 ranks on two cores are idle most
of the time. Everything that is ours still runs: the stage's hooks, the stale store, what an attention layer exchanges
with other ranks, and every hop.

The card is fed the way CUDA is. What a rank gives it starts when the card is done with what came before and the data
from other ranks are there, so that the host's own code is hidden while the card works, and shows where the card waits
for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from inspect import signature
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from patchpipe.distributed.transport import Wire
from patchpipe.layout.split import StageBlocks
from patchpipe.models.blocks import BlockPlace
from patchpipe.models.plan import ModelPlan
from patchpipe.parallel.tensor import INPUTS, SplitLinear, split_linears
from patchpipe.planner.cost import OUTSIDE_OPERATIONS, Tokens, block_parts
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.schedule import MERGE_BYTES, MERGE_OPERATIONS
from patchpipe.planner.work.workload import Block, Workload

BEFORE = 0.3  # of a block's other work that comes before its attention: queries, keys and values of twelve products
SHORT_WAIT = 1e-3  # undilated seconds that a wait may take on a busy host although its data are there
FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


class EmulatedDevice:
    """What a card would be busy with, on one rank.

    Args:
        dilation: Seconds slept for each second the card would compute.

    Attributes:
        started: When it was first given work, and the host's own seconds until then.
        worked: Seconds it has computed, dilated.
    """

    def __init__(self, dilation: float) -> None:
        self.dilation = dilation
        self.started: tuple[float, float] | None = None
        self.worked = 0.0
        self._free = 0.0
        self._ready = 0.0
        self._aside = 0.0
        self._paused: float | None = None

    def compute(self, seconds: float) -> None:
        """Sleeps until the card would be done with so many seconds of work."""
        if self.started is None:
            self._ready = time.perf_counter()
            self.started = self._ready, self.host_seconds
        length = seconds * self.dilation
        self._free = max(self._free, self._ready) + length
        self.worked += length
        left = self._free - time.perf_counter()
        if left > 0:
            time.sleep(left)

    def arrived(self, waited: float) -> None:
        """Notes that data from another rank were waited for, for so long."""
        if waited > SHORT_WAIT:
            self._ready = time.perf_counter()

    # -- the host's clock, without the emulation's own part --------------------------------------

    def aside(self) -> None:
        """From here on the emulation itself uses the processor."""
        self._paused = time.thread_time()

    def back(self) -> None:
        """From here on the project's code does."""
        assert self._paused is not None
        self._aside += time.thread_time() - self._paused
        self._paused = None

    @property
    def host_seconds(self) -> float:
        """Processor time of this thread so far, the emulation's own left out."""
        return time.thread_time() - self._aside


@dataclass(frozen=True)
class Costs:
    """What the planner says a card needs for the parts of a block.

    Args:
        workload: The real model's request.
        profile: The real machine.
        tensor: Ranks that share the matrices.
    """

    workload: Workload
    profile: Profile
    tensor: int = 1

    def __post_init__(self) -> None:
        for name in ("other", "attention"):  # many blocks are alike
            object.__setattr__(self, name, cache(getattr(self, name)))

    def __hash__(self) -> int:
        return id(self)

    def other(self, block: Block, batch: int, image: int, text: int) -> float:
        """Seconds of a block but for its self-attention."""
        tokens = Tokens(image, text, self.workload.image, self.workload.text, batch)
        parts = block_parts(block, tokens, self.profile.device, tensor=self.tensor, itemsize=self.workload.itemsize)
        return self.profile.slowdown * parts.other

    def attention(self, block: Block, batch: int, heads: float, queries: int, keys: int) -> float:
        """Seconds of one self-attention.

        Args:
            block: The block.
            batch: Entries of the batch.
            heads: Share of the model's heads.
            queries: Rows that attend.
            keys: Rows attended to.
        """
        layer = next(one for one in block.attentions if one.kind != "cross")
        alone = replace(
            block, matrices=(), attentions=(replace(layer, kind="image", width=round(layer.width * heads)),)
        )
        tokens = Tokens(queries, 0, keys, 0, batch)
        parts = block_parts(alone, tokens, self.profile.device, itemsize=self.workload.itemsize)
        return self.profile.slowdown * parts.attention

    def merge(self, block: Block, batch: int, heads: float, queries: int) -> float:
        """Seconds to merge two parts of an attention, as Ring does once a hop."""
        device = self.profile.device
        elements = batch * queries * block.width * heads
        return self.profile.slowdown * (elements * MERGE_BYTES / device.bandwidth + MERGE_OPERATIONS * device.launch)

    @property
    def outside(self) -> float:
        """Seconds of what a stage runs beside its blocks."""
        return self.profile.slowdown * OUTSIDE_OPERATIONS * self.profile.device.launch


class EmulatedBlock:
    """One block that sleeps; takes the place of the module's ``forward``, so that the stage's hooks stay.

    Args:
        place: The block of the tiny model.
        block: The block of the real model.
        costs: What it takes.
        device: The card.
        first: Whether the stage's work outside its blocks is to be counted with it.
        sums: Its Linears whose results are summed over the ranks.
        heads: Attention heads of the tiny model.
    """

    def __init__(
        self, place: BlockPlace, block: Block, costs: Costs, device: EmulatedDevice, first: bool,
        sums: list[SplitLinear], heads: int,
    ) -> None:  # fmt: skip
        self.place, self.block, self.costs, self.device = place, block, costs, device
        self.outside = costs.outside if first else 0.0
        self.heads = heads
        self.sums = [(split.linear, place.serves(split.name.removeprefix(f"{place.name}."))) for split in sums]
        self.names = [name for name in signature(type(place.block).forward).parameters if name != "self"]
        self.layers = [(place.block.get_submodule(path), segments) for path, segments in place.self_attention.items()]
        self.kernels = _Kernels(self)
        for layer, _ in self.layers:
            layer.forward = self._attention(layer)
        place.block.forward = self.forward  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Takes a block's time and hands its streams through."""
        device = self.device
        device.aside()
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        streams = {name: given[name] for name in self.place.listing.streams}
        image, text = streams["hidden_states"], streams.get("encoder_hidden_states")
        other = self.costs.other(self.block, image.shape[0], image.shape[1], 0 if text is None else text.shape[1])
        device.compute(self.outside + BEFORE * other)
        for layer, segments in self.layers:
            rows = self._rows(image, text, segments)
            with self.kernels:
                device.back()
                layer(rows)
                device.aside()
        for linear, stream in self.sums:
            rows = {"image": image, "text": text, "both": self._rows(image, text, ("text", "image"))}[stream]
            blank = rows.new_zeros(*rows.shape[:2], linear.weight.shape[1])
            device.back()
            linear(blank)
            device.aside()
        device.compute((1 - BEFORE) * other)
        if getattr(self.place.block, "context_pre_only", False):
            streams["encoder_hidden_states"] = None  # type: ignore[assignment]
        found = tuple(streams.values())
        device.back()
        return found if len(found) > 1 else found[0]

    def _rows(self, image: Tensor, text: Tensor | None, segments: tuple[str, ...]) -> Tensor:
        streams = [{"image": image, "text": text, "reference": None}[name] for name in segments]
        return torch.cat([rows for rows in streams if rows is not None], dim=1)

    def _attention(self, layer: nn.Module) -> Callable[[Tensor], Tensor]:
        """Queries, keys and values of the right shape, to the call that patchpipe looks for."""
        channels = layer.to_q.out_features // layer.heads  # type: ignore[union-attr, operator]

        def forward(rows: Tensor) -> Tensor:
            heads: int = layer.heads  # type: ignore[assignment]
            split = rows[..., : heads * channels].unflatten(-1, (heads, channels)).transpose(1, 2)
            return functional.scaled_dot_product_attention(split, split, split)

        return forward


class _Kernels(TorchFunctionMode):
    """Attention kernels that only take time; below patchpipe's own mode, and so around what that calls."""

    def __init__(self, owner: EmulatedBlock) -> None:
        super().__init__()
        self.owner, self._parts = owner, 0

    def __enter__(self) -> Any:
        self._parts = 0
        return super().__enter__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is functional.scaled_dot_product_attention:
            return self._attend(args[0], args[1])
        if func is FLASH:
            result = self._attend(args[0], args[1], merge=self._parts > 0)
            self._parts += 1
            return result, result.new_zeros(result.shape[:-1])
        return func(*args, **(kwargs or {}))

    def _attend(self, query: Tensor, key: Tensor, merge: bool = False) -> Tensor:
        owner = self.owner
        owner.device.aside()
        batch, heads, rows, _ = query.shape
        share = heads / owner.heads
        seconds = owner.costs.attention(owner.block, batch, share, rows, key.shape[2])
        if merge:
            seconds += owner.costs.merge(owner.block, batch, share, rows)
        owner.device.compute(seconds)
        result = torch.empty_like(query)
        owner.device.back()
        return result


def emulate(model: nn.Module, plan: ModelPlan, costs: Costs, device: EmulatedDevice, owned: StageBlocks) -> None:
    """Puts emulated blocks in the place of those that a rank owns; before ``patchpipe.parallelize``.

    Args:
        model: The tiny model.
        plan: Its plan.
        costs: What the real blocks take.
        device: The card.
        owned: Blocks of this rank's stage.
    """
    places, heads = plan.blocks_of(model), model.config.num_attention_heads
    for index in owned.held:
        linears = split_linears(model, plan, places[index]) if costs.tensor > 1 else []
        sums = [split for split in linears if split.dim == INPUTS]
        first = index == owned.start.places[-1]  # the first that runs in every turn
        EmulatedBlock(places[index], costs.workload.blocks[index], costs, device, first, sums, heads)


def noting_waits(device: EmulatedDevice) -> AbstractContextManager[Any]:
    """While it is open, the device knows when data from other ranks have come."""
    wait_for = Wire.wait_for

    def noted(wire: Wire, work: Any, whom: str) -> None:
        started = time.perf_counter()
        wait_for(wire, work, whom)
        device.arrived(time.perf_counter() - started)

    return mock.patch.object(Wire, "wait_for", noted)
