"""The layout taken where none is asked for: the planner's, for the devices there are and the request at hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from patchpipe.config import ALL_STEPS, AutoLayout, ParallelConfig
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.predict import Prediction, predict
from patchpipe.planner.search import HEADROOM, Wishes, search
from patchpipe.planner.work.workload import Workload

WORTH = 0.1  # of the time: several devices, or a picture other than one device's, that nobody asked for must gain more


@dataclass(frozen=True)
class Taken:
    """What was chosen.

    Attributes:
        config: The layout; ``None`` is plain diffusers on one device.
        why: Why, in one line.
    """

    config: ParallelConfig | None
    why: str


@dataclass(frozen=True)
class _Candidate:
    prediction: Prediction
    seconds: float  # of all pictures

    @property
    def ranks(self) -> int:
        return self.prediction.config.world_size


def take(
    auto: AutoLayout,
    workload: Workload,
    devices: int,
    profile: Callable[[int], Profile],
    *,
    all_devices: bool = False,
) -> Taken:
    """Chooses a layout.

    Args:
        auto: What is asked for.
        workload: The request for one picture.
        devices: Devices there are.
        profile: The machine with so many of them in use.
        all_devices: Whether every device must have a rank, as processes that were started must.

    Raises:
        ValueError: Every device must have a rank, and no layout does so.
    """
    counts = [devices] if all_devices else _counts(devices)
    found = [each for count in counts for each in _layouts(auto, workload, count, profile(count))]
    single = _single(auto, workload, profile(1))
    if all_devices:
        return _taken(auto, best_of(found), single, devices) if found else _refuse(workload, devices)
    fits = single.prediction.bytes <= HEADROOM * profile(1).device.memory
    candidates = [*([single] if fits or not found else []), *found]
    best = best_of(candidates)
    if best is single:
        return one_device(auto, _why_single(single, found, devices))
    return _taken(auto, best, single if fits else None, devices)


def best_of(candidates: Iterable[_Candidate]) -> _Candidate:
    """The quickest; of those that gain little over one another an exact one, then one of few devices."""
    ranked = sorted(candidates, key=lambda one: one.seconds)
    alike = [one for one in ranked if one.seconds <= ranked[0].seconds * (1 + WORTH)]
    return min(alike, key=lambda one: (not one.prediction.exact, one.ranks, one.seconds))


def _counts(devices: int) -> list[int]:
    """Numbers of devices to look at: powers of two, and all of them."""
    return sorted({*(1 << power for power in range(1, devices.bit_length()) if 1 << power <= devices), devices} - {1})


def _single(auto: AutoLayout, workload: Workload, profile: Profile) -> _Candidate:
    prediction = predict(workload, auto.alone(), profile)
    return _Candidate(prediction, prediction.seconds * auto.pictures)


def _layouts(auto: AutoLayout, workload: Workload, count: int, profile: Profile) -> Iterable[_Candidate]:
    """The best layout for picture after picture, and the best for all in one request."""
    wishes = Wishes(
        auto.exact or auto.warmup == ALL_STEPS, warmup=auto.warmup, methods=auto.methods, compile=auto.compile
    )
    for pictures in {1, auto.pictures if auto.batched else 1}:
        try:
            choice = search(replace(workload, pictures=pictures), count, profile, wishes)
        except ValueError:  # none of so many devices, or none that fits
            continue
        fresh = [one for one in choice.ranked if one.fresh >= wishes.fresh]
        allowed = [one for one in fresh if (one.config.data > 1) == (pictures > 1)]
        rounds = auto.pictures if pictures == 1 else 1
        if allowed:
            yield best_of(_Candidate(one, one.seconds * rounds) for one in allowed)


def one_device(auto: AutoLayout, why: str) -> Taken:
    """Plain diffusers, or one rank of patchpipe where what is asked for needs it."""
    plain = auto.plain and not auto.compile
    return Taken(None if plain else auto.alone(), why)


def _refuse(workload: Workload, ranks: int) -> Taken:
    raise ValueError(
        f"no tested layout of {workload.model} uses exactly {ranks} ranks: start another number, or give a config"
    )


def _taken(auto: AutoLayout, best: _Candidate, single: _Candidate | None, devices: int) -> Taken:
    picture = "the picture is one device's" if best.prediction.exact else "the picture is close to one device's"
    if single is None:
        gain = "one device has too little memory"
    else:
        gain = f"predicted {single.seconds / best.seconds:.1f}× as fast as one device"
    return Taken(auto.finished(best.prediction.config), f"{gain}, the best of {devices} devices; {picture}")


def _why_single(single: _Candidate, found: list[_Candidate], devices: int) -> str:
    if not found:
        return f"no layout of {devices} devices serves this model" if devices > 1 else "there is one device"
    longer = best_of(found).seconds / single.seconds
    return f"the quickest layout of several devices would take {longer:.1f}× as long"
