"""What each rank of a layout holds, in words."""

from __future__ import annotations

from typing import Any

from patchpipe.layout.axes import Mesh
from patchpipe.layout.text import text_held


def holdings(config: Any, rank: int) -> str:
    """What a rank holds, in words.

    Args:
        config: The layout, a ``ParallelConfig``, whose module imports this one.
        rank: The rank.
    """
    mesh = Mesh(config.mesh_shape, rank)
    held = [f"stage {mesh.at('pipe') + 1}/{config.pipefusion}" if config.pipefusion > 1 else "every block"]
    if config.tensor > 1:
        held.append(f"slice {mesh.at('tensor') + 1}/{config.tensor} of its matrices")
    if mesh.parts > 1:
        held.append(f"rows {mesh.part + 1}/{mesh.parts} of each patch")
    if config.cfg > 1:
        held.append(f"guidance branch {mesh.at('cfg') + 1}")
    if config.data > 1:
        held.append(f"pictures {mesh.at('data') + 1}/{config.data}")
    held += text_held(config.text_rank, mesh.rank, config.world_size, config.output_rank)
    if config.parallel_vae:
        held.append(f"VAE for strip {mesh.rank + 1}/{config.world_size} of the picture")
    if mesh.rank == config.output_rank:
        held.append("gets the images" if config.parallel_vae else "VAE, gets the images")
    return ", ".join(held)
