"""Which ranks hold the text encoders."""

from __future__ import annotations

from typing import Literal

SPREAD: Literal["spread"] = "spread"  # each encoder on a rank of its own
LAYERS: Literal["layers"] = "layers"  # the layers of each encoder on all ranks
HOST: Literal["host"] = "host"  # in the last rank's host memory; layers come to the device while they run
DISK: Literal["disk"] = "disk"  # on the last rank, which reads one layer after the other and keeps none
ON_THE_LAST = (HOST, DISK)
WAYS = (SPREAD, LAYERS, *ON_THE_LAST)
WAYS_TOLD = ", ".join(f'"{way}"' for way in WAYS[:-1]) + f' or "{WAYS[-1]}"'
TextRank = int | Literal["spread", "layers", "host", "disk"] | None
# More than these no pipeline of diffusers has.
ENCODERS = {"text_encoder": "text encoder 1", **{f"text_encoder_{n}": f"text encoder {n}" for n in (2, 3, 4)}}


def from_the_last(world_size: int, output_rank: int) -> list[int]:
    """Ranks in the order in which they take text: from the last downwards, and the one with the VAE last of all."""
    return [rank for rank in reversed(range(world_size)) if rank != output_rank] + [output_rank]


def encoder_rank(text_rank: TextRank, encoder: str, world_size: int, output_rank: int) -> int:
    """The rank that runs a text encoder; where its layers are on all ranks, the one that holds what surrounds them.

    Spread encoders go from the last rank downwards, and to the output rank, which has the VAE, last of all.
    """
    if isinstance(text_rank, int):
        return text_rank
    if text_rank in (None, *ON_THE_LAST):
        return world_size - 1
    ranks = from_the_last(world_size, output_rank)
    number = encoder.rpartition("_")[2]
    return ranks[(int(number) - 1 if text_rank == SPREAD and number.isdigit() else 0) % len(ranks)]


def text_held(text_rank: TextRank, rank: int, world_size: int, output_rank: int) -> list[str]:
    """What a rank holds of the text encoders, in words."""
    homes = {name: encoder_rank(text_rank, name, world_size, output_rank) for name in ENCODERS}
    if text_rank == SPREAD:
        return [f"{title}, if any" for name, title in ENCODERS.items() if homes[name] == rank]
    if text_rank == LAYERS:
        return ["layers of every text encoder"]
    if rank != homes["text_encoder"]:
        return []
    words: dict[TextRank, str] = {HOST: "text encoders, in host memory", DISK: "text encoders, one layer at a time"}
    return [words.get(text_rank, "text encoders")]
