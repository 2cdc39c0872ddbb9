"""How a picture is cut into strips of rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise


def cut_rows(units: int, ranks: int, shares: Sequence[float] | None = None, minimum: int = 1) -> tuple[int, ...]:
    """Heights of the strips, in units, from top to bottom.

    Args:
        units: Height of the picture.
        ranks: Number of strips.
        shares: Their wished relative heights; ``None`` for strips that differ by one at most.
        minimum: Least height of a strip.

    Raises:
        ValueError: The picture is too low for that many strips.
    """
    spare = units - ranks * minimum
    if spare < 0:
        raise ValueError(
            f"{ranks} ranks need at least {ranks * minimum} latent rows ({minimum} each) but there are {units}: "
            f"use at most {units // minimum} ranks for the VAE, or a higher picture"
        )
    wished = [units * share / sum(shares) for share in shares] if shares else [units / ranks] * ranks
    # Each strip gets its minimum; what is left goes out in proportion to what each still lacks.
    reached = [0.0, *accumulate(max(0.0, wish - minimum) for wish in wished)]
    ends = [round(spare * part / (reached[-1] or 1.0)) for part in reached]
    return tuple(minimum + end - start for start, end in pairwise(ends))


def check_shares(shares: Sequence[float] | None, ranks: int) -> None:
    """Refuses shares that are not one positive number per rank.

    Raises:
        ValueError: They are not.
    """
    if shares is not None and (len(shares) != ranks or any(not share > 0 for share in shares)):
        raise ValueError(f"shares must be {ranks} positive numbers, one per rank, but is {tuple(shares)}")
