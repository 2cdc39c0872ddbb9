"""Makes sure that ranks that are about to share the latent are all at the same point of the program.

A callback that reads the latent on one rank alone makes that rank wait for the others, and these go on without it. Each
rank writes on the board what it is about to do. One whose note is alone for a while calls the roll: the others' threads
that look on then tell what they have done, and whoever is elsewhere is named.
"""

from __future__ import annotations

import time
from typing import Any

from patchpipe.lockstep.board import Board

ROLL_CALL = "roll"
ROLL_SECONDS = 1.0  # alone at a point, before a rank asks where the others are
PATIENCE_SECONDS = 5.0  # after which the wait itself must tell
FIRST_SLEEP, LONGEST_SLEEP = 0.0001, 0.001


def check_meeting(board: Board, point: int, name: str, provenance: int) -> None:
    """Waits until all ranks have come to a point.

    Args:
        board: Of the request.
        point: The point's number.
        name: What this rank does there.
        provenance: How what is shared there was computed.

    Raises:
        ValueError: Another rank is elsewhere, or has computed it otherwise.
    """
    topic = f"point {point}"
    board.tell(topic, [name, provenance])
    began, sleep, called = time.monotonic(), FIRST_SLEEP, False
    while (told := board.told(topic)) is None:
        waited = time.monotonic() - began
        if waited > PATIENCE_SECONDS:
            return
        if waited > ROLL_SECONDS:
            if not called:
                board.tell_first(ROLL_CALL, "where are you?")
                called = True
            _check_roll(board, point, name)
        time.sleep(sleep)
        sleep = min(2 * sleep, LONGEST_SLEEP)
    _compare(told)


def _check_roll(board: Board, point: int, name: str) -> None:
    for other in range(board.world_size):
        if other == board.rank:
            continue
        over = board.told("at", [other])
        if over is not None and over[0][1] and over[0][0] < point:
            raise _elsewhere(board.rank, name, other, "has ended the request")
        for names in board.told(ROLL_CALL, [other]) or []:
            there = dict(map(tuple, names)).get(point)
            if there is not None and there != name:
                raise _elsewhere(board.rank, name, other, there)


def _compare(told: list[Any]) -> None:
    for other, (name, provenance) in enumerate(told):
        if name != told[0][0]:
            raise _elsewhere(0, told[0][0], other, name)
        if provenance != told[0][1]:
            raise ValueError(
                f"the latent was not computed by the same operations on rank {other} as on rank 0: a callback changes "
                f"it on some ranks only. Every rank must change it alike; only the first stage's changes would show"
            )


def _elsewhere(rank: int, name: str, other: int, there: str) -> ValueError:
    return ValueError(
        f"rank {rank} {name} where rank {other} {there}. The latent is spread over the ranks, so every rank must read "
        f"it at the same point: in a callback, read or decode it on every rank and use the result on one, in place of "
        f"`if rank == 0: latents.mean()`; and stop early on every rank alike, or with pipe.patchpipe.cancel()"
    )
