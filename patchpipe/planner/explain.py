"""Says in words and figures what a layout means: who is where, who holds what, what travels."""

from __future__ import annotations

from dataclasses import dataclass, replace

from patchpipe.config import SPREAD, ParallelConfig
from patchpipe.layout.axes import AXES, Mesh
from patchpipe.layout.communicators import count


@dataclass(frozen=True)
class Volume:
    """What one step works on.

    Attributes:
        tokens: Image and text tokens of one guidance branch of one picture, as they go from block to block.
        width: Channels of a token.
        attended: Rows of all self-attention layers together: p·L where each block has one over all tokens.
        summed: Rows of the sums that end split matrices, all blocks together: 2·p·L with two a block.
        itemsize: Bytes of an element.
        shared: Of the rows attended, those in blocks that two stages share.
    """

    tokens: int
    width: int
    attended: int
    summed: int
    itemsize: int
    shared: int = 0


# More than these no pipeline of diffusers has.
ENCODERS = {"text_encoder": "text encoder 1", **{f"text_encoder_{n}": f"text encoder {n}" for n in (2, 3, 4)}}
# 19 dual-stream blocks with two sums over all tokens each, 38 single-stream blocks with one.
FLUX_AT_1024 = Volume(tokens=4608, width=3072, attended=57 * 4608, summed=(2 * 19 + 38) * 4608, itemsize=2)


def traffic(config: ParallelConfig, volume: Volume) -> dict[str, float]:
    """Bytes a rank sends per step of one branch of one picture, by method.

    The papers' cost table (arXiv 2405.14430, table 1; arXiv 2411.01738) with its constants; the mean over ranks where
    rows, heads or blocks divide unevenly, and of PipeFusion what every stage but the last sends on, and for blocks that
    two stages share, in both directions, keys and values. Predictions of the noise, a few channels wide, are left out.
    """
    ulysses, ring, tensor, displaced = config.ulysses, config.ring, config.tensor, config.distrifusion
    parts, element = displaced * ring * ulysses, volume.width * volume.itemsize
    attended, summed = volume.attended / config.pipefusion * element, volume.summed / config.pipefusion * element
    shared = 2 * volume.shared * element / (ulysses * tensor) / max(1, config.pipefusion - 1)
    sent = {
        "pipefusion": volume.tokens / parts * element + shared,
        "ulysses": 4 * attended / (displaced * ring * tensor) / ulysses * (ulysses - 1) / ulysses,
        "ring": 2 * attended / (displaced * ulysses * tensor) * (ring - 1) / ring,
        "tensor": 2 * summed / parts * (tensor - 1) / tensor,
        "distrifusion": 2 * attended / parts * (displaced - 1),
    }
    return {method: size for method, size in sent.items() if getattr(config, method) > 1}


def kept(config: ParallelConfig, volume: Volume) -> float:
    """Bytes of keys and values a rank holds for one branch of one picture; the mean over ranks of uneven shares.

    The papers' table again: ``2·p·h·L`` over the stages and over the ranks that share heads. With every step a
    warm-up step, or the latent in one patch, nothing is kept.
    """
    whole = 2 * (volume.attended + volume.shared) * volume.width * volume.itemsize
    return whole / (config.pipefusion * config.ulysses * config.tensor)


def ranks_table(config: ParallelConfig) -> list[tuple[str, ...]]:
    """A header and a row for each rank: its coordinates on the axes in use, and what it holds."""
    used = [axis for axis, size in zip(AXES, config.mesh_shape, strict=True) if size > 1]
    rows: list[tuple[str, ...]] = [("rank", *used, "holds")]
    for rank in range(config.world_size):
        mesh = Mesh(config.mesh_shape, rank)
        rows.append((str(rank), *(str(mesh.at(axis)) for axis in used), _holdings(config, mesh)))
    return rows


def describe_ranks(config: ParallelConfig) -> str:
    """The layout as plain text: the mesh, then a line for each rank."""
    rows = ranks_table(config)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    mesh = " × ".join(f"{axis} {size}" for axis, size in zip(AXES, config.mesh_shape, strict=True) if size > 1)
    title = [config.describe(), f"{config.world_size} ranks: {mesh or 'one device'}"]
    return "\n".join([*title, *lines, *_expected(config), *communicators(config)])


def communicators(config: ParallelConfig) -> list[str]:
    """How many communicators a rank makes at start-up, of the rank that makes most."""
    every = [count(Mesh(config.mesh_shape, rank)) for rank in range(config.world_size)]
    most = max(every, key=lambda found: sum(found.values()))
    if not most:
        return []
    told = ", ".join(f"{what} {number}" for what, number in most.items())
    return [f"communicators over NCCL, all made at start-up, on a rank: at most {sum(most.values())} ({told})"]


def _expected(config: ParallelConfig) -> list[str]:
    """What a rank sends in a step, for a model everybody knows the size of."""
    from patchpipe.stage.balance import may_share, shared_blocks, split_costs  # brings torch in

    blocks = FLUX_AT_1024.attended // FLUX_AT_1024.tokens
    split = split_costs([1.0] * blocks, min(config.pipefusion, blocks), shared=may_share(config))
    volume = replace(FLUX_AT_1024, shared=len(shared_blocks(split)) * FLUX_AT_1024.tokens)
    sent = [f"{method} {size / 1e6:,.0f} MB" for method, size in traffic(config, volume).items()]
    told = f"sends per step for FLUX.1 at 1024×1024 in bf16: {', '.join(sent)}"
    if sent:
        return [told + "; for other models `patchpipe explain MODEL`"]
    return ["sends per step: its noise predictions alone"] if config.world_size > 1 else []


def _holdings(config: ParallelConfig, mesh: Mesh) -> str:
    held = [f"stage {mesh.at('pipe') + 1}/{config.pipefusion}" if config.pipefusion > 1 else "every block"]
    if config.tensor > 1:
        held.append(f"slice {mesh.at('tensor') + 1}/{config.tensor} of its matrices")
    if mesh.parts > 1:
        held.append(f"rows {mesh.part + 1}/{mesh.parts} of each patch")
    if config.cfg > 1:
        held.append(f"guidance branch {mesh.at('cfg') + 1}")
    if config.data > 1:
        held.append(f"pictures {mesh.at('data') + 1}/{config.data}")
    if config.text_rank == SPREAD:
        held += [f"{title}, if any" for name, title in ENCODERS.items() if config.encoder_rank(name) == mesh.rank]
    elif mesh.rank == config.encoder_rank():
        held.append("text encoders")
    if config.parallel_vae:
        held.append(f"VAE for strip {mesh.rank + 1}/{config.world_size} of the picture")
    if mesh.rank == config.output_rank:
        held.append("gets the images" if config.parallel_vae else "VAE, gets the images")
    return ", ".join(held)
