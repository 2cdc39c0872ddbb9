"""Says in words and figures what a layout means: who is where, who holds what, what travels."""

from __future__ import annotations

from dataclasses import dataclass

from patchpipe.axes import AXES, Mesh
from patchpipe.config import SPREAD, ParallelConfig


@dataclass(frozen=True)
class Volume:
    """What one step works on.

    Attributes:
        tokens: Image and text tokens of one guidance branch of one picture.
        width: Channels of a token.
        blocks: Blocks of the model, with one self-attention each.
        itemsize: Bytes of an element.
    """

    tokens: int
    width: int
    blocks: int
    itemsize: int


FLUX_AT_1024 = Volume(tokens=4096 + 512, width=3072, blocks=57, itemsize=2)


def traffic(config: ParallelConfig, volume: Volume) -> dict[str, float]:
    """Bytes a rank sends per step of one branch of one picture, by method.

    The papers' cost table (arXiv 2405.14430, table 1; arXiv 2411.01738) with its constants. Predictions of the
    noise, a few channels wide, are left out.
    """
    p, h, blocks, size = volume.tokens, volume.width, volume.blocks, volume.itemsize
    parts, own_blocks = config.distrifusion * config.ring * config.ulysses, blocks / config.pipefusion
    found = {}
    if config.pipefusion > 1:
        found["pipefusion"] = p / parts * h * size
    if config.ulysses > 1:
        line = p / (config.distrifusion * config.ring)
        heads = h / config.tensor
        found["ulysses"] = 4 * line * heads / config.ulysses * (config.ulysses - 1) / config.ulysses * own_blocks * size
    if config.ring > 1:
        heads = h / (config.ulysses * config.tensor)
        found["ring"] = 2 * p / config.distrifusion * heads * (config.ring - 1) / config.ring * own_blocks * size
    if config.tensor > 1:
        found["tensor"] = 4 * p / parts * h * (config.tensor - 1) / config.tensor * own_blocks * size
    if config.distrifusion > 1:
        found["distrifusion"] = 2 * p / parts * h * (config.distrifusion - 1) * own_blocks * size
    return found


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
    return "\n".join(
        [config.describe(), f"{config.world_size} ranks: {mesh or 'one device'}", *lines, *_expected(config)]
    )


def _expected(config: ParallelConfig) -> list[str]:
    """What a rank sends in a step, for a model everybody knows the size of."""
    sent = [f"{method} {size / 1e6:,.0f} MB" for method, size in traffic(config, FLUX_AT_1024).items()]
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
        held += ["a text encoder, if there are as many"] if mesh.rank != config.output_rank else []
    elif mesh.rank == config.encoder_rank():
        held.append("text encoders")
    if config.parallel_vae:
        held.append(f"VAE for strip {mesh.rank + 1}/{config.world_size} of the picture")
    if mesh.rank == config.output_rank:
        held.append("gets the images" if config.parallel_vae else "VAE, gets the images")
    return ", ".join(held)
