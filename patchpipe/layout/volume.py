"""What a step of a model works on, and by that how much a layout sends and keeps: the papers' cost table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from patchpipe.layout.axes import DEGREES


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


# 19 dual-stream blocks with two sums over all tokens each, 38 single-stream blocks with one.
FLUX_AT_1024 = Volume(tokens=4608, width=3072, attended=57 * 4608, summed=(2 * 19 + 38) * 4608, itemsize=2)


def traffic(shape: Sequence[int], volume: Volume, inner: int = 1, changed: float = 1.0) -> dict[str, float]:
    """Bytes a rank sends per step of one branch of one picture, by method.

    The papers' cost table (arXiv 2405.14430, table 1; arXiv 2411.01738) with its constants; the mean over ranks where
    rows, heads or blocks divide unevenly, and of PipeFusion what every stage but the last sends on, and for blocks that
    two stages share, in both directions, keys and values. Predictions of the noise, a few channels wide, are left out.

    Args:
        shape: Sizes of the axes, as ``ParallelConfig.mesh_shape`` has them.
        volume: What a step works on.
        inner: Ranks of a Ulysses line that share a fast domain; where these are some but not all, ``ulysses inside`` is
            sent over fast links and ``ulysses across`` over slow ones.
        changed: The share of tokens that Ulysses exchanges, on average after the warm-up.
    """
    _, _, stages, displaced, ring, ulysses, tensor = shape
    parts, element = displaced * ring * ulysses, volume.width * volume.itemsize
    attended, summed = volume.attended / stages * element, volume.summed / stages * element
    shared = 2 * volume.shared * element / (ulysses * tensor) / max(1, stages - 1)
    sent = {
        "pipefusion": volume.tokens / parts * element + shared,
        "ulysses": changed * 4 * attended / (displaced * ring * tensor) / ulysses * (ulysses - 1) / ulysses,
        "ring": 2 * attended / (displaced * ulysses * tensor) * (ring - 1) / ring,
        "tensor": 2 * summed / parts * (tensor - 1) / tensor,
        "distrifusion": 2 * attended / parts * (displaced - 1),
    }
    degrees = dict(zip(DEGREES, shape, strict=True))
    if 1 < inner < ulysses:
        given = sent.pop("ulysses") * ulysses / (ulysses - 1)
        sent["ulysses inside"], sent["ulysses across"] = (
            given * (size - 1) / size for size in (inner, ulysses // inner)
        )
    return {method: size for method, size in sent.items() if degrees[method.split()[0]] > 1}


def kept(shape: Sequence[int], volume: Volume, *, forecasts: bool) -> float:
    """Bytes of keys and values a rank holds for one branch of one picture; the mean over ranks of uneven shares.

    The papers' table again: ``2·p·h·L`` over the stages and over the ranks that share heads. With every step a
    warm-up step, or the latent in one patch, nothing is kept. A forecast keeps their last change too, in eight bits.
    """
    _, _, stages, _, _, ulysses, tensor = shape
    whole = 2 * (volume.attended + volume.shared) * volume.width * (volume.itemsize + forecasts)
    return whole / (stages * ulysses * tensor)
