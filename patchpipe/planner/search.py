"""Every layout that the program would accept for a workload, and which of them is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import prod
from typing import Any, cast

from patchpipe.config import ALL_STEPS, STREAMED, ParallelConfig, WarmupKind
from patchpipe.layout.axes import DEGREES
from patchpipe.layout.offloading import OffloadConfig
from patchpipe.layout.patching import fewest_patches
from patchpipe.layout.split import balanced, shared_blocks, sizes_of
from patchpipe.layout.text import HOST, LAYERS, SPREAD
from patchpipe.models.matrix import untested
from patchpipe.planner.layout import Layout, balanced_stages
from patchpipe.planner.machine.devices import GIB
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.memory import block_memory
from patchpipe.planner.predict import Prediction, predict
from patchpipe.planner.work.quality import Quality
from patchpipe.planner.work.workload import Workload

FRESH = (
    0.5  # DistriFusion at 1/8: FID against the one-device pictures 19.8; PipeFusion, over 1/2: 3.1 (arXiv 2405.14430)
)
ALIKE = 0.01  # a difference in time that the model cannot tell: the picture of one device then counts for more
HEADROOM = 0.95  # of a device's memory: allocators leave gaps
LEAST = tuple(2.0**power for power in range(-4, 6))  # GiB for a rank's blocks that are tried, the first that will do
STREAMS = 4  # stages from which a warm-up that streams is quicker than a synchronous step
OFFLOADED_COUNTS = 3  # numbers of patches to try, from the fewest: weights come once for each
PLACEMENTS: tuple[dict[str, Any], ...] = (
    {},
    {"text_rank": SPREAD},
    {"parallel_vae": True},
    {"text_rank": SPREAD, "parallel_vae": True},
    {"text_rank": LAYERS},
    {"text_rank": LAYERS, "parallel_vae": True},
)


@dataclass(frozen=True)
class Wishes:
    """What a layout must be like.

    Attributes:
        exact: Only methods whose picture is that of one device, up to the order of sums.
        fresh: Least mean share of fresh keys of a layout that may win; others are listed after those that may.
        memory: Bytes a device may hold; ``None`` takes what it has, less a little for gaps.
        warmup: Synchronous steps, ``"all"`` or ``"streamed"``; ``None`` as in ``ParallelConfig``.
        methods: Methods that may be used; ``None`` allows all.
        compile: Whether blocks are compiled.
        offload: Whether weights may come and go where a layout does not fit otherwise.
        quality: What pictures of patches that stream are like, where it was measured: its warm-ups are tried in place
            of ``warmup``, with and without forecast as it has them, and its decibels count in place of ``fresh``.
    """

    exact: bool = False
    fresh: float = FRESH
    memory: int | None = None
    warmup: WarmupKind | None = None
    methods: tuple[str, ...] | None = None
    compile: bool = False
    offload: bool = False
    quality: Quality | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh={self.fresh} must be a share between 0 and 1")
        if self.memory is not None and self.memory <= 0:
            raise ValueError(f"memory={self.memory} must be above 0")
        unknown = [name for name in self.methods or () if name not in DEGREES]
        if unknown:
            raise ValueError(f"method {unknown[0]!r} is unknown: use {', '.join(DEGREES)}")

    def allow(self, one: Prediction) -> bool:
        """Whether a layout may win: its picture is near enough to that of one device."""
        if self.quality is not None:
            return self.quality.meets(one.config, one.patches)
        return one.fresh >= self.fresh


@dataclass(frozen=True)
class Choice:
    """What a search found.

    Attributes:
        single: One device, whether or not the model fits it.
        single_fits: Whether it does.
        ranked: Layouts that fit, the best first.
        refused: Layouts that do not fit the memory.
        quality: What was measured of its pictures.
    """

    workload: Workload
    profile: Profile
    single: Prediction
    ranked: tuple[Prediction, ...]
    refused: tuple[Prediction, ...]
    single_fits: bool = True
    quality: Quality | None = None

    @property
    def best(self) -> Prediction:
        """The winner."""
        return self.ranked[0]

    @property
    def single_is_best(self) -> bool:
        """Whether one device is as quick as any layout of several, and has the memory."""
        several = self.best.config.world_size > 1
        return several and self.single_fits and self.single.seconds <= self.best.seconds * (1 + ALIKE)

    def speed_up(self, prediction: Prediction) -> float:
        """Over one device."""
        return self.single.seconds / prediction.seconds


def search(workload: Workload, devices: int, profile: Profile, wishes: Wishes | None = None) -> Choice:
    """Ranks every layout of so many devices.

    Args:
        workload: The request.
        devices: Ranks.
        profile: The machine.
        wishes: What a layout must be like.

    Raises:
        ValueError: No layout of so many devices is allowed, or none fits the memory.
    """
    if devices < 1:
        raise ValueError(f"devices={devices} must be 1 or more")
    wanted = wishes or Wishes()
    if wanted.quality is not None:
        wanted.quality.check(workload.steps)
    memory = int(HEADROOM * profile.device.memory) if wanted.memory is None else wanted.memory
    found = [
        _best_patches(workload, degrees, profile, wanted, memory) for degrees in _degrees(workload, devices, wanted)
    ]
    if not found:
        raise ValueError(
            f"no tested layout of {workload.model} uses exactly {devices} devices for {workload.rows.count} token rows"
            f"{' with exact methods alone' if wanted.exact else ''}: ask for another number of devices"
        )
    fitting = [one for one in found if one.bytes <= memory]
    if not fitting:
        raise ValueError(_too_large(workload, devices, found, memory))
    ranked = _ranked(fitting, wanted)
    refused = sorted((one for one in found if one.bytes > memory), key=lambda one: one.seconds)
    single = predict(workload, ParallelConfig(compile=wanted.compile), profile)
    return Choice(workload, profile, single, tuple(ranked), tuple(refused), single.bytes <= memory, wanted.quality)


def _ranked(found: list[Prediction], wishes: Wishes) -> list[Prediction]:
    """The quickest first; before layouts that are as quick, one whose picture is that of one device."""
    ranked = sorted(found, key=lambda one: (not wishes.allow(one), one.seconds))
    longest = ranked[0].seconds * (1 + ALIKE)
    exact = next((one for one in ranked if one.exact and one.seconds <= longest), ranked[0])
    ranked.remove(exact)
    return [exact, *ranked]


def _too_large(workload: Workload, devices: int, found: list[Prediction], memory: int) -> str:
    least = min(found, key=lambda one: one.bytes)
    return (
        f"{workload.model} does not fit {devices} devices of {memory / GIB:.1f} GiB: the least any layout needs is "
        f"{least.bytes / GIB:.1f} GiB ({least.config.describe()}); use more devices, larger ones, or a smaller picture"
    )


def _degrees(workload: Workload, devices: int, wishes: Wishes) -> Iterator[dict[str, int]]:
    """Degrees that multiply to the devices and that the program accepts for this model and picture."""
    sizes = [size for size in range(1, devices + 1) if devices % size == 0]
    for chosen in product(sizes, repeat=len(DEGREES)):
        degrees = dict(zip(DEGREES, chosen, strict=True))
        if prod(chosen) == devices and _fits(workload, degrees, wishes) and _accepted(degrees, wishes):
            yield degrees


def _accepted(degrees: dict[str, int], wishes: Wishes) -> bool:
    try:
        ParallelConfig(**degrees, compile=wishes.compile)  # type: ignore[arg-type]
    except ValueError:
        return False
    return True


def _fits(workload: Workload, degrees: dict[str, int], wishes: Wishes) -> bool:
    used = [name for name in DEGREES if degrees[name] > 1]
    if wishes.methods is not None and not set(used) <= set(wishes.methods):
        return False
    if any(untested(workload.transformer, name) for name in used):
        return False
    parts = degrees["distrifusion"] * degrees["ring"] * degrees["ulysses"]
    fewest_patches = degrees["pipefusion"]
    return (
        degrees["cfg"] <= workload.branches
        and workload.pictures % degrees["data"] == 0
        and degrees["pipefusion"] <= len(workload.blocks)
        and parts * fewest_patches <= workload.rows.count
        and workload.heads % (degrees["ulysses"] * degrees["tensor"]) == 0
        and (degrees["tensor"] == 1 or (workload.tensor and _matrices_divide(workload, degrees["tensor"])))
        and not (wishes.exact and degrees["distrifusion"] > 1)
    )


def _matrices_divide(workload: Workload, tensor: int) -> bool:
    matrices = {matrix for block in workload.blocks for matrix in block.matrices if matrix.split}
    return all((one.inputs if one.summed else one.outputs) % tensor == 0 for one in matrices)


def _best_patches(
    workload: Workload, degrees: dict[str, int], profile: Profile, wishes: Wishes, memory: int
) -> Prediction:
    """The fastest number of patches, then the first placement of encoders and VAE that fits."""
    tried = [predict(workload, config, profile) for config in _configs(workload, degrees, profile, wishes)]
    if wishes.quality is not None and any(map(wishes.allow, tried)):
        tried = list(filter(wishes.allow, tried))
    best = min(tried, key=lambda one: one.seconds)
    if best.bytes <= memory:
        return best
    placed = [predict(workload, config, profile) for config in _placements(best.config)]
    found = next((one for one in placed if one.bytes <= memory), None)
    if found is None:
        evener = [
            predict(workload, each, profile) for even in _evener(workload, best.config) for each in _placements(even)
        ]
        fitting = [next((one for one in evener if one.bytes <= memory), None)]
        fitting += [_offloaded(workload, tried, profile, memory)] if wishes.offload else []
        found = min(filter(None, fitting), key=lambda one: one.seconds, default=None)
        placed += evener
    if found is None and wishes.offload:
        placed += _least_offloaded(workload, placed, profile)
    return found or min(placed, key=lambda one: one.bytes)


def _evener(workload: Workload, config: ParallelConfig) -> Iterator[ParallelConfig]:
    """The same with stages of more even weights: blocks that compute as long may weigh twice as much as others."""
    if config.pipefusion > 1 and len(set(workload.blocks)) > 1:
        sizes = balanced([float(block.parameters) for block in workload.blocks], config.pipefusion)
        yield replace(config, stage_blocks=tuple(sizes))


def _offloaded(workload: Workload, tried: list[Prediction], profile: Profile, memory: int) -> Prediction | None:
    """The fastest number of patches and placement with which weights come and go: few patches need few passes.

    Encoders that come from the host too leave more room for blocks, and cost a copy for every prompt.
    """
    counts = sorted({one.config.patches or 1 for one in tried})[:OFFLOADED_COUNTS]
    found = []
    bases = [one.config for one in tried if (one.config.patches or 1) in counts]
    for base in (each for one in bases for each in (one, *_evener(workload, one))):
        several = base.world_size > 1
        staying = [replace(base, **place) for place in (PLACEMENTS if several else PLACEMENTS[:1])]
        for places in (staying, [replace(base, text_rank=HOST, parallel_vae=several)]):
            left, config = max(
                ((block_memory(Layout(workload, each, profile), memory), each) for each in places),
                key=lambda one: one[0],
            )
            if left > 0:
                asked = OffloadConfig(memory=max(1, int(left / GIB * 1000)) / 1000)
                with suppress(ValueError):  # not even the least fits
                    found.append(predict(workload, replace(config, offload=asked), profile))
    fitting = (one for one in found if one.bytes <= memory)
    return min(fitting, key=lambda one: one.seconds + prompt_seconds(workload, one.config, profile), default=None)


def prompt_seconds(workload: Workload, config: ParallelConfig, profile: Profile) -> float:
    """How long the weights of text encoders take to come from the host for a new prompt, where they do."""
    sizes = (size for part, size in workload.components.items() if part.startswith("text_encoder"))
    return sum(sizes) / profile.device.upload if config.text_rank == HOST else 0.0


def _least_offloaded(workload: Workload, placed: list[Prediction], profile: Profile) -> list[Prediction]:
    """What layouts would take with nearly all weights on the host, to say so."""
    found = []
    for config in (one.config for one in placed[: len(PLACEMENTS)]):
        for size in LEAST:
            with suppress(ValueError):
                found.append(predict(workload, replace(config, offload=OffloadConfig(memory=size)), profile))
                break
    return found


def _placements(config: ParallelConfig) -> Iterator[ParallelConfig]:
    """Other homes for text encoders and VAE; at last encoders that come from the host for every new prompt.

    That takes time which is not predicted.
    """
    several = config.world_size > 1
    for place in PLACEMENTS if several else PLACEMENTS[:1]:
        yield replace(config, **place)
    yield replace(config, text_rank=HOST, parallel_vae=several)


def _configs(workload: Workload, degrees: dict[str, int], profile: Profile, wishes: Wishes) -> Iterator[ParallelConfig]:
    """Layouts of these degrees; where a Ulysses line leaves the ranks that fast links join, on two levels too."""
    for config in _on_one_level(workload, degrees, profile, wishes):
        yield config
        inner = profile.link.domain(Layout(workload, config, profile).line("ulysses"))
        if inner > 1:
            yield replace(config, ulysses_inner=inner)


def _on_one_level(
    workload: Workload, degrees: dict[str, int], profile: Profile, wishes: Wishes
) -> Iterator[ParallelConfig]:
    """The same: warm-ups, numbers of patches, splits of the blocks."""
    if degrees["pipefusion"] == 1 or wishes.exact or wishes.warmup == ALL_STEPS:
        yield from _at_once(workload, degrees, profile, wishes)
        return
    for warmup, forecast in _ways(workload, degrees["pipefusion"], wishes):
        yield from _streaming(workload, {**degrees, "forecast": forecast}, profile, replace(wishes, warmup=warmup))


def _ways(workload: Workload, stages: int, wishes: Wishes) -> list[tuple[WarmupKind | None, bool | None]]:
    """Warm-ups to try, each with whether stale rows are forecast; ``None`` does so."""
    forecast = False if untested(workload.transformer, "forecast") else None
    if wishes.quality is not None:
        return [way for way in wishes.quality.ways if forecast is None or not way[1]] or [(None, forecast)]
    if wishes.warmup is None and stages >= STREAMS and not untested(workload.transformer, "streamed"):
        return [(None, forecast), (STREAMED, forecast)]
    return [(wishes.warmup, forecast)]


def _at_once(workload: Workload, degrees: dict[str, int], profile: Profile, wishes: Wishes) -> Iterator[ParallelConfig]:
    """Layouts in which no patches stream: without stages, or with every step synchronous."""
    stages, given = degrees["pipefusion"], cast("dict[str, Any]", {**degrees, "compile": wishes.compile})
    if stages == 1:
        yield ParallelConfig(**given, warmup=None if wishes.warmup == STREAMED else wishes.warmup)
        return
    yield ParallelConfig(**given, patches=stages, warmup=ALL_STEPS, stage_blocks=_uneven(workload, degrees, profile))


def _streaming(
    workload: Workload, degrees: Mapping[str, Any], profile: Profile, wishes: Wishes
) -> Iterator[ParallelConfig]:
    given: dict[str, Any] = {**degrees, "compile": wishes.compile, "warmup": wishes.warmup}
    whole = {**given, "stage_blocks": _uneven(workload, degrees, profile)}
    if shared_blocks(Layout(workload, ParallelConfig(**whole), profile).stages):
        whole["share_blocks"] = False
    as_it_comes = Layout(workload, ParallelConfig(**whole), profile)
    for halves in (1, 2) if as_it_comes.batch % 2 == 0 else (1,):
        split = True if halves == 2 else None if as_it_comes.halves == 1 else False
        for patches in _patch_counts(workload, degrees, halves):
            yield ParallelConfig(**whole, patches=patches, split_batch=split)
    shared = Layout(workload, ParallelConfig(**given, share_blocks=wishes.warmup not in (0, STREAMED)), profile).stages
    if shared_blocks(shared):
        for patches in _patch_counts(workload, degrees, 1):
            yield ParallelConfig(**given, patches=patches, stage_blocks=sizes_of(shared))


def _uneven(workload: Workload, degrees: Mapping[str, Any], profile: Profile) -> tuple[int, ...] | None:
    """Blocks of each stage, where blocks differ."""
    return balanced_stages(workload, profile, degrees["pipefusion"]) if len(set(workload.blocks)) > 1 else None


def _patch_counts(workload: Workload, degrees: Mapping[str, Any], halves: int) -> list[int]:
    """From as few patches as fill the stages to four times as many as these, if there are rows for each rank of one."""
    stages, most = degrees["pipefusion"], workload.rows.count // (degrees["ring"] * degrees["ulysses"])
    counts = {*range(fewest_patches(stages, halves), 2 * stages + 1), 2 * stages + stages // 2, 3 * stages, 4 * stages}
    return sorted(count for count in counts if count <= most)
