"""An engine that serves many requests, some of them cancelled: none is lost, and nothing grows."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from patchpipe import Cancelled, Engine, ParallelConfig
from tests import tiny

pytestmark = pytest.mark.timeout(600)

REQUESTS, EVERY = 200, 10
SIZES = [(64, 48), (96, 64), (48, 48), (64, 96)]
SETTLED = 60  # requests after which memory is looked at: by then all sizes have been met
GROWTH = 24 * 2**20  # bytes a worker may grow by in the rest: what an allocator scatters, not what a leak adds up to


def call(number: int) -> dict[str, Any]:
    height, width = SIZES[number % len(SIZES)]
    steps = 40 if number % EVERY == EVERY - 1 else 2 + number % 2
    return tiny.call_arguments("flux", guided=number % 3 == 0, height=height, width=width, steps=steps)


def memory(engine: Engine) -> list[int]:
    return [psutil.Process(rank.pid).memory_info().rss for rank in engine.ranks]


@pytest.mark.extra
def test_200_requests_a_tenth_cancelled_at_random_times(tmp_path: Path) -> None:
    model, draw = tiny.save("flux", tmp_path), random.Random(0)
    config = ParallelConfig(pipefusion=2, patches=2, timeout=60)
    pictures: dict[int, list[bytes]] = {}
    cancelled = 0
    with Engine(model, config, devices="cpu", threads=1) as engine:
        for number in range(REQUESTS):
            if number % EVERY == EVERY - 1:
                timer = threading.Timer(draw.random() * 0.3, engine.cancel)
                timer.start()
            try:
                made = engine(seed=number % 4, **call(number))
                kind = number % 12  # of size, guidance and steps; the seed goes with the size
                if number % EVERY != EVERY - 1:
                    pictures.setdefault(kind, []).append(made[0].tobytes())
            except Cancelled:
                cancelled += 1
            finally:
                if number % EVERY == EVERY - 1:
                    timer.cancel()
                    timer.join()
            if number == SETTLED:
                before, keys = memory(engine), engine._crew.store.num_keys()
        time.sleep(0.2)
        after = memory(engine)
        assert not engine.closed
        assert engine._crew.store.num_keys() <= keys
    assert cancelled >= REQUESTS // EVERY // 2
    assert sum(map(len, pictures.values())) == REQUESTS - REQUESTS // EVERY
    assert all(len(set(alike)) == 1 for alike in pictures.values())
    assert all(late - early < GROWTH for early, late in zip(before, after, strict=True)), (before, after)
