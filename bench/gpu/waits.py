"""Part f: whether the host waits for the device between the second and the last step of a request.

torch tells of every synchronisation it makes. Those that plain diffusers makes at the same places are its own.
On a CPU nothing waits; there, reads of a tensor's value are counted, each of which would be a wait on a GPU.
"""

from __future__ import annotations

import functools
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import patchpipe
from bench.gpu.machine import ROOT
from bench.gpu.painting import Case, pipeline, request, rules
from bench.gpu.ranks import Ranks, Spot, problems
from bench.gpu.setting import Note, Setting

STEPS = 6
DTYPE = "bf16"
MODELS = ("flux", "sd3", "pixart", "qwen")
PATCHES: dict[str, Any] = {"patches": 4, "warmup": 1}
TWO: list[dict[str, Any]] = [
    {"pipefusion": 2, **PATCHES}, {"ulysses": 2}, {"ring": 2}, {"tensor": 2}, {"distrifusion": 2}, {"cfg": 2},
]  # fmt: skip
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::is_nonzero"}
SYNCHRONISING = "synchronizing CUDA operation"
OWN = ("patchpipe", "diffusers")  # packages whose lines are named, the innermost first


def run(setting: Setting, note: Note) -> None:
    """A row for every model on one rank, and for every method on two."""
    models = MODELS[:1] if setting.tiny else MODELS
    place = setting.places(1, own=False)[0]
    allowed = {}
    for model in models:
        allowed[model] = waits(Spot(0, 1, None, place), Case(model, DTYPE))
        note(f"{model}, plain diffusers", None, {"waits": allowed[model]})
        ours = waits(Spot(0, 1, None, place), Case(model, DTYPE, PATCHES))
        note(*_row(f"{model}, one rank, 4 patches", [ours], allowed[model]))
    why = setting.why_no_nccl(2)
    if why is not None:
        note(f"two ranks: skipped, {why}", None, {})
        return
    with Ranks(setting.places(2, own=True)) as ranks:
        for layout in TWO[:2] if setting.tiny else TWO:
            case = Case(models[0], DTYPE, layout, nccl=True)
            answers = ranks.run(waits, case)
            title, trouble = case.config(place).describe(), problems(answers)
            if trouble:
                note(title, False, {"why": trouble})
            else:
                note(*_row(title, [answer.value for answer in answers], allowed[models[0]]))


def _row(title: str, ranks: list[dict[str, int]], allowed: dict[str, int]) -> tuple[str, bool, dict[str, Any]]:
    """Right where no rank waits anywhere that plain diffusers does not."""
    found: Counter[str] = Counter()
    for rank in ranks:
        found.update({place: count for place, count in rank.items() if place not in allowed})
    return title, not found, {"waits": dict(found)}


def waits(spot: Spot, case: Case) -> dict[str, int]:
    """Where the host waited between the second step and the last one, and how often."""
    pipe, call = pipeline(case.model, case.dtype, spot.device, case.blocks)
    with rules(spot, case):
        if case.layout is not None:
            config = case.config(spot.device)
            patchpipe.parallelize(pipe, config, group=spot.join(config))
        try:
            request(pipe, call, num_inference_steps=2)  # what is made once is made
            with steady(pipe, watch_for(spot.device)) as found:
                request(pipe, call, num_inference_steps=STEPS)
        except BaseException:
            pipeline.cache_clear()
            raise
        finally:
            if getattr(pipe, "patchpipe", None) is not None:
                patchpipe.restore(pipe)
    return dict(found)


@contextmanager
def steady(pipe: Any, watch: Watch) -> Iterator[Counter[str]]:
    """Has the watch look on from the second step of the scheduler to the last but one."""
    step, taken = pipe.scheduler.step, 0

    @functools.wraps(step)
    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal taken
        made, taken = step(*args, **kwargs), taken + 1
        if taken == 2:
            watch.begin()
        elif taken == STEPS - 1:
            watch.end()
        return made

    pipe.scheduler.step = counted
    try:
        yield watch.found
        if taken < STEPS:
            raise RuntimeError(f"the scheduler made {taken} steps of {STEPS}: nothing was looked at")
    finally:
        watch.end()
        del pipe.scheduler.step


class Watch:
    """Counts waits by the place in the code they come from."""

    def __init__(self) -> None:
        self.found: Counter[str] = Counter()
        self._undo: Callable[[], None] | None = None

    def begin(self) -> None:
        """Starts to look."""
        self._undo = self._start()

    def end(self) -> None:
        """Looks no more."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def _start(self) -> Callable[[], None]:
        raise NotImplementedError

    def saw(self) -> None:
        """There was one, here."""
        self.found[_place(traceback.extract_stack())] += 1


class CudaWatch(Watch):
    """torch's own debug mode, which warns at each: so all of them are found, and not only the first."""

    def _start(self) -> Callable[[], None]:
        show = warnings.showwarning
        filters = warnings.catch_warnings()
        filters.__enter__()
        warnings.simplefilter("always")

        def seen(message: Any, *rest: Any, **named: Any) -> None:
            if SYNCHRONISING in str(message):
                self.saw()
            else:
                show(message, *rest, **named)

        warnings.showwarning = seen
        torch.cuda.set_sync_debug_mode("warn")

        def undo() -> None:
            torch.cuda.set_sync_debug_mode("default")
            filters.__exit__(None, None, None)

        return undo


class CpuWatch(Watch):
    """Reads of values, which a GPU would have to be waited for."""

    def _start(self) -> Callable[[], None]:
        watch = self

        class Reads(TorchDispatchMode):
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                if func._schema.name in READS:
                    watch.saw()
                return func(*args, **(kwargs or {}))

        mode = Reads()
        mode.__enter__()
        return lambda: mode.__exit__(None, None, None)


def watch_for(device: str) -> Watch:
    """The watch for a device."""
    return CpuWatch() if device == "cpu" else CudaWatch()


def _place(stack: traceback.StackSummary) -> str:
    """The innermost line of patchpipe or diffusers, and the function it is in."""
    for frame in reversed(stack):
        parts = Path(frame.filename).parts
        package = next((name for name in OWN if name in parts), None)
        if package is not None and not frame.filename.startswith(str(ROOT / "bench")):
            short = "/".join(parts[len(parts) - 1 - parts[::-1].index(package) :])
            return f"{short}:{frame.lineno} {frame.name}"
    return "elsewhere"
