"""Where a request begins and ends: all ranks come to it with the same arguments and leave it at the same point."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from patchpipe.distributed.agreement import attempt
from patchpipe.distributed.mesh import Group
from patchpipe.errors import CANCELLED, PatchpipeError
from patchpipe.lockstep.board import Board, agree_on_calls
from patchpipe.lockstep.inputs import describe_call
from patchpipe.lockstep.points import Points
from patchpipe.schedule.runner import Runner

Given = tuple[Sequence[Any], Mapping[str, Any]]  # a call's arguments by position and by name


class Extent:
    """Opens and ends the requests of the pipelines that one runner serves.

    Args:
        group: The ranks.
        runner: Runs the transformer's calls.
        adapters: The transformer's adapters in words, by kind: all ranks must have the same.
    """

    def __init__(self, group: Group, runner: Runner, adapters: Callable[[], Mapping[str, str]] = dict) -> None:
        self._group, self._runner, self._adapters = group, runner, adapters
        self._requests = 0
        self._board: Board | None = None  # of the last request

    def begin(self, run: Callable[..., Any], calls: Sequence[Given], problem: Exception | None = None) -> None:
        """Opens a request once all ranks know that they were called alike.

        Args:
            run: The pipeline's ``__call__``, bound.
            calls: What each of the calls is given; none for a loop of the user's own.
            problem: Why this rank cannot go on, if it cannot.

        Raises:
            ValueError: Ranks were called differently; every rank raises the same text.
            Exception: This rank's problem.
            RankFailed: Another rank has one that this one has not.
            RankLost: A rank did not call, or has left.
        """
        self._runner.check_idle()
        if self._group.closed:
            raise PatchpipeError("the ranks have closed their connections after a failure: start them anew")
        adapters = {kind: (told, "") for kind, told in self._adapters().items()}
        told = attempt(lambda: [{**describe_call(run, *call), **adapters} for call in calls])
        if self._runner.points.depth:  # a call within a call
            self._begin_inner(told[0] or [], problem or told[1])
            return
        board = stale = None
        if self._group.world_size > 1:
            self._requests += 1
            board = Board(self._group, self._requests)
            stale, self._board = self._board, board
        self._runner.points = Points(board)
        if board is not None:
            agree_on_calls(board, "call", told[0] or [], problem or told[1], stale)
        elif problem is not None:
            raise problem

    def _begin_inner(self, told: Sequence[Any], problem: Exception | None) -> None:
        points = self._runner.points
        with points.passing():
            if points.board is not None:
                agree_on_calls(points.board, f"call at {points.begun}", told, problem)
            elif problem is not None:
                raise problem

    @contextmanager
    def ending(self) -> Iterator[None]:
        """Where a request fails in the block, the ranks end it at the same point or, if they cannot, part."""
        points = self._runner.points
        with points.watched():
            try:
                yield
            except BaseException as error:
                if not points.fail(error) or attempt(self._runner.settle)[1] is not None:
                    self._group.failures.report(f"{type(error).__name__}: {error}")
                    self._group.close()  # peers that wait for this rank must not wait for the deadline
                raise

    @property
    def board(self) -> Board | None:
        """Where the ranks write to each other about the request under way, if there are several."""
        return self._runner.points.board

    def cancel(self) -> bool:
        """Ends the request under way on all ranks; see ``Points.cancel``."""
        return self._runner.points.cancel(CANCELLED)
