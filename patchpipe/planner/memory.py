"""What each rank holds, in bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import Mesh
from patchpipe.layout.text import LAYERS, ON_THE_LAST
from patchpipe.offload.choice import Chosen
from patchpipe.planner.layout import Layout
from patchpipe.planner.machine.devices import GIB
from patchpipe.planner.work.workload import Block

RUNTIME = int(1.2 * GIB)  # the CUDA context, communication buffers, what the allocator cannot use
WORKING_WIDTHS = 16  # activations of a block at once, in channels of a token: streams, queries to values, feed-forward
DECODED_CHANNELS = 128 * 6  # of a pixel in the last, widest level of an autoencoder, several tensors of it at once
# Of an encoder, in its largest module: the table of Gemma 2 2B has a quarter of it, that of Qwen2.5-VL 7B a twelfth.
LARGEST_MODULE = 0.25


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    Attributes:
        parameters: Its part of the transformer; of weights that come and go, what is on the device at most.
        components: Text encoders and VAE it holds.
        store: Keys and values it keeps from step to step.
        working: The largest activations at once.
        runtime: What the runtime takes.
    """

    parameters: int
    components: int
    store: int
    working: int
    runtime: int = RUNTIME

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.components + self.store + self.working + self.runtime


def rank_memory(layout: Layout, offloads: Sequence[Chosen] = ()) -> tuple[RankMemory, ...]:
    """What every rank of a layout holds.

    Args:
        layout: The layout.
        offloads: How the weights of each stage come and go, if they do.
    """
    working = _working(layout)
    ranks = []
    for rank in range(layout.config.world_size):
        stage = Mesh(layout.config.mesh_shape, rank).at("pipe")
        blocks = layout.held(stage)
        if offloads:
            parameters = offloads[stage].bytes + _around(layout)
        else:
            parameters = stage_parameters(layout, blocks) * layout.workload.itemsize
        decoding = _decoding(layout) if layout.config.parallel_vae or rank == layout.config.output_rank else 0
        ranks.append(
            RankMemory(
                parameters,
                _components(layout, rank),
                stored(layout, stage),
                max(working, decoding),
            )
        )
    return tuple(ranks)


def block_memory(layout: Layout, memory: int) -> int:
    """Bytes that every rank of a layout has left for its blocks' weights, of so many in all."""
    return memory - max(rank.total - rank.parameters + _around(layout) for rank in rank_memory(layout))


def _around(layout: Layout) -> int:
    """Bytes of what surrounds the blocks."""
    return layout.workload.transformers * layout.workload.embedders * layout.workload.itemsize


def stage_parameters(layout: Layout, blocks: tuple[Block, ...]) -> int:
    """Parameters of the transformer, or of several alike, that a rank of a stage holds."""
    tensor = layout.config.tensor
    own = sum(block.parameters - block.split_parameters + block.split_parameters // tensor for block in blocks)
    return layout.workload.transformers * (own + layout.workload.embedders)


def stored(layout: Layout, stage: int) -> int:
    """Bytes of the keys and values a rank of a stage keeps: of all tokens, for its own blocks and heads."""
    workload, config = layout.workload, layout.config
    if config.synchronous or (len(layout.patches) == 1 and config.distrifusion == 1):
        return 0
    apart = layout.stages[stage].halves
    held = [layout.run(stage, half) if apart else layout.held(stage) for half in range(layout.halves)]
    entries = layout.batch * layout.calls / layout.halves
    elements = 0.0
    for block in (block for blocks in held for block in blocks):
        for attention in block.attentions:
            tokens = {"joint": workload.image + workload.text, "image": workload.image, "cross": 0}[attention.kind]
            elements += 2 * tokens * attention.width / (config.ulysses * config.tensor)
    change = 1 if config.forecasts else 0  # in eight bits, beside the rows themselves
    return int(entries * elements * (workload.itemsize + change))


def _working(layout: Layout) -> int:
    """Activations of a whole synchronous step, and the keys and values of all rows of own heads."""
    workload, config, piece = layout.workload, layout.config, layout.piece(None)
    rows = piece.batch * (piece.image + piece.text)
    keys = piece.batch * (workload.image + workload.joint_text) / (config.ulysses * config.ring * config.tensor)
    return int((WORKING_WIDTHS * rows + 2 * keys) * workload.width * workload.itemsize)


def _decoding(layout: Layout) -> int:
    size = layout.workload.pixels * DECODED_CHANNELS * layout.workload.itemsize
    return size // layout.config.world_size if layout.config.parallel_vae else size


def _components(layout: Layout, rank: int) -> int:
    config = layout.config
    held = 0
    for part, size in layout.workload.components.items():
        if part.startswith("text_encoder"):
            held += _encoder(config, part, size, rank)
        else:
            held += size if rank == config.output_rank or (part == "vae" and config.parallel_vae) else 0
    return held


def _encoder(config: ParallelConfig, part: str, size: int, rank: int) -> int:
    """Bytes of a text encoder on a rank."""
    if config.text_rank == LAYERS:
        return ceil(size / config.world_size)
    if rank != config.encoder_rank(part):
        return 0
    return ceil(size * LARGEST_MODULE) if config.text_rank in ON_THE_LAST else size
