"""A choice in words: what was asked, why the winner wins, and the command that runs it."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

from patchpipe.config import ParallelConfig
from patchpipe.demo import MODEL_DIR
from patchpipe.planner.predict import Prediction
from patchpipe.planner.search import ALIKE, Choice, prompt_seconds
from patchpipe.planner.work.presets import preset_named
from patchpipe.planner.work.workload import Workload

DEGREE_FLAGS = ("data", "cfg", "pipefusion", "distrifusion", "ring", "ulysses", "tensor")
PROMPT = "a lighthouse in a storm"
BUNDLED_PROMPT = "red heart, flat style"  # the bundled model paints but what it knows


def reasons(choice: Choice, fresh: float) -> list[str]:
    """Why the winner wins, in lines.

    Args:
        choice: What the search found.
        fresh: Least share of fresh keys that was asked of a winner.
    """
    if choice.single_is_best:
        return [line for line in (_one_device(choice), _host(choice)) if line]
    stale = _stale(choice, fresh) if choice.quality is None else ""
    found = [
        _gain(choice),
        _quality(choice),
        _offload(choice),
        _prompts(choice),
        _over_next(choice),
        _exact(choice),
        stale,
    ]
    found += [_host(choice), _refused(choice)]
    return [line for line in found if line]


def _one_device(choice: Choice) -> str:
    longer = choice.best.seconds / choice.single.seconds
    ranks = choice.best.config.world_size
    return (
        f"one device is best: the quickest layout of {ranks}, {layout_name(choice.best)}, takes {longer:.2f}× as long; "
        f"let each device paint pictures of its own"
    )


def _gain(choice: Choice) -> str:
    best, config = choice.best, choice.best.config
    gain = f"{choice.speed_up(best):.2f}× over one device"
    if choice.speed_up(best) < 1 + ALIKE and config.world_size > 1:
        gain = f"no layout here beats one device ({choice.single.seconds:.2f} s)"
    if config.pipefusion == 1 or not (warmup := config.warmup_steps(guided=choice.workload.branches == 2)):
        return gain
    warmup = min(warmup, choice.workload.steps)
    spent = warmup * best.timing.synchronous
    return f"{gain}; of its {best.seconds:.2f} s, {spent:.2f} s go to the {_steps(warmup)}, in which stages wait"


def _quality(choice: Choice) -> str:
    measured, best = choice.quality, choice.best
    if measured is None or best.exact:
        return ""
    decibels = measured.of(best.config, best.patches)
    if decibels is None:
        return f"no layout is known to have {measured.least:g} dB; nothing was measured of this one ({measured.told})"
    found = f"{decibels:.1f} dB from one device's picture on average ({measured.told})"
    return found if decibels >= measured.least else f"{found}: no layout is known to have {measured.least:g} dB"


def _offload(choice: Choice) -> str:
    best = choice.best
    if not best.uploads:
        return ""
    most = max(best.uploads) / 1e9
    kept = sum(best.hosted) * best.config.tensor / 1e9
    once = (
        ", once for ranks that hold the same"
        if best.config.world_size > best.config.pipefusion * best.config.tensor
        else ""
    )
    return (
        f"its weights do not fit: {most:.1f} GB of them come from the host in every step, through "
        f"{choice.profile.device.upload / 1e9:.0f} GB/s; what of that is not hidden is in the seconds"
        + (f"; a host that runs all ranks has {kept:.1f} GB of them in its memory{once}" if kept else "")
    )


def _prompts(choice: Choice) -> str:
    took = prompt_seconds(choice.workload, choice.best.config, choice.profile)
    return f"its text encoders are in host memory, from where a new prompt fetches them in {took:.1f} s" if took else ""


def _steps(count: int) -> str:
    return "synchronous step" if count == 1 else f"{count} synchronous steps"


def _over_next(choice: Choice) -> str:
    if len(choice.ranked) < 2:
        return "no other layout fits" if choice.best.config.world_size > 1 else ""
    best, second = choice.ranked[:2]
    longer = second.seconds / best.seconds - 1
    name = layout_name(second)
    if longer < -ALIKE:
        less = (
            "sees fewer fresh keys" if choice.quality is None else "is not known to be as near to one device's picture"
        )
        return f"the next, {name}, is faster but {less}"
    told = f"about as fast is {name}" if longer < ALIKE else f"the next, {name}, takes {longer:.0%} longer"
    return (
        f"{told}: it computes {second.busy:.0%} of the time and sends {megabytes(second)} MB a step, "
        f"against {best.busy:.0%} and {megabytes(best)} MB"
    )


def layout_name(prediction: Prediction) -> str:
    """The layout without what is as ever: the usual warm-up, and compiled blocks, which all have or none."""
    *parts, warmup = prediction.config.describe().removesuffix(" · compiled").split(" · ")
    return " · ".join([*parts, *([] if prediction.config.warmup is None else [warmup])])


def _exact(choice: Choice) -> str:
    if choice.best.exact:
        return "its picture is that of one device, up to the order of sums"
    exact = next((one for one in choice.ranked if one.exact), None)
    if exact is None:
        return "no method with the picture of one device fits; a pipeline with every step synchronous may (--exact)"
    name = layout_name(exact)
    return f"the fastest whose picture is that of one device (--exact): {name}, {exact.seconds:.2f} s"


def _stale(choice: Choice, fresh: float) -> str:
    faster = [one for one in choice.ranked if one.fresh < fresh and one.seconds < choice.best.seconds]
    if not faster:
        return ""
    first = faster[0]
    return (
        f"{layout_name(first)} would take {first.seconds:.2f} s, but only {first.fresh:.0%} "
        f"of the keys it sees are fresh (--fresh {fresh:g} asks for more)"
    )


def _host(choice: Choice) -> str:
    if not choice.best.host_bound:
        return ""
    cause = "the host starts kernels more slowly than the device runs them, so that a faster device would not help"
    return cause if choice.best.config.compile else f"{cause}; compiled blocks have fewer of them (--compile)"


def _refused(choice: Choice) -> str:
    count = len(choice.refused)
    return f"{count} more layout{'s' if count > 1 else ''} need more memory than a device has" if count else ""


def megabytes(prediction: Prediction) -> str:
    """Megabytes that a rank sends in a step, for people."""
    sent = sum(prediction.traffic.values()) / 1e6
    return f"{sent:,.0f}" if sent >= 10 else f"{sent:.2g}"


def model_name(model: str) -> str:
    """A model's name for people."""
    return "the bundled model" if Path(model) == MODEL_DIR else model


def command(
    workload: Workload, config: ParallelConfig | None, asked_guidance: bool | None = None, dtype: str = "bf16"
) -> str:
    """The command that runs a layout.

    Args:
        workload: The request.
        config: The layout; ``None`` is one device.
        asked_guidance: Whether guidance was asked for; ``None`` where the model's usual one is meant.
        dtype: In which the model is loaded.
    """
    preset = preset_named(workload.model)
    bundled = Path(workload.model) == MODEL_DIR
    words = ["patchpipe", "generate", BUNDLED_PROMPT if bundled else PROMPT]
    words += [] if bundled else ["--model", preset.hub if preset else workload.model]
    words += ["--dtype", dtype]
    words += ["--steps", str(workload.steps), *_size(workload), *_guidance(workload, asked_guidance)]
    words += ["--images", str(workload.pictures)] if workload.pictures > 1 else []
    return shlex.join([*words, *(["--layout", "plain"] if config is None else layout_words(config))])


def _size(workload: Workload) -> list[str]:
    return ["--height", str(workload.height), "--width", str(workload.pixels // workload.height)]


def _guidance(workload: Workload, asked: bool | None) -> list[str]:
    if asked is False and workload.guidance == "batch":
        return ["--guidance", "1"]
    wanted = asked if asked is not None else preset_named(workload.model) is not None and workload.branches == 2
    return ["--set", "true_cfg_scale=4", "--negative", " "] if wanted and workload.guidance == "calls" else []


def layout_words(config: ParallelConfig) -> list[str]:
    """The options of ``patchpipe generate`` that describe a layout."""
    words: list[str] = []
    for name in DEGREE_FLAGS:
        words += [f"--{name}", str(size)] if (size := getattr(config, name)) > 1 else []
    words += ["--ulysses-inner", str(config.ulysses_inner)] if config.ulysses_inner > 1 else []
    words += ["--values-first"] if config.values_first else []
    words += ["--changed-tokens", f"{config.changed_tokens:g}"] if config.changed_tokens is not None else []
    words += ["--compress", config.compress] if config.compress is not None else []
    words += ["--patches", str(config.patches)] if config.patches is not None else []
    words += ["--warmup", str(config.warmup)] if config.warmup is not None else []
    if config.forecast is not None:
        words.append("--forecast" if config.forecast else "--no-forecast")
    if config.split_batch is not None:
        words.append("--split-batch" if config.split_batch else "--no-split-batch")
    if config.share_blocks is not None:
        words.append("--share-blocks" if config.share_blocks else "--no-share-blocks")
    words += ["--stage-blocks", ",".join(map(str, config.stage_blocks))] if config.stage_blocks else []
    words += ["--text-rank", str(config.text_rank)] if config.text_rank is not None else []
    words += ["--parallel-vae"] if config.parallel_vae else []
    words += [] if config.offload is None else ["--offload", config.offload.words]
    return [*words, "--compile"] if config.compile else words


def as_dict(choice: Choice, runs: str | None) -> dict[str, Any]:
    """The whole choice as plain data.

    Args:
        choice: What the search found.
        runs: The command that runs the winner, if there is one.
    """
    workload, profile = choice.workload, choice.profile
    return {
        "model": workload.model,
        "image_tokens": workload.image,
        "text_tokens": workload.text,
        "branches": workload.branches,
        "steps": workload.steps,
        "multiply_adds_per_step": workload.multiply_adds,
        "device": profile.device.name,
        "link": profile.link.name,
        "one_device_seconds": choice.single.seconds,
        "one_device_is_best": choice.single_is_best,
        "layouts": [
            {**one.as_dict(), "speed_up": choice.speed_up(one), **_decibels(choice, one)} for one in choice.ranked
        ],
        "too_large": [one.as_dict() for one in choice.refused],
        "command": runs,
    }


def _decibels(choice: Choice, one: Prediction) -> dict[str, float | None]:
    """Mean decibels, where they were measured; an identical picture has none."""
    found = None if choice.quality is None else choice.quality.of(one.config, one.patches)
    return {} if choice.quality is None else {"psnr": None if found == math.inf else found}
