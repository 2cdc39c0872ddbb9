"""What several places refuse, in the same words: before processes start, when ranks meet, when a request begins."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import gcd
from typing import Any

from patchpipe.config import WATCHED, ParallelConfig
from patchpipe.models.matrix import check_tested
from patchpipe.models.plan import ModelPlan


def no_guidance(plan: ModelPlan) -> ValueError:
    """The error for ranks of a second branch of guidance in a request that has but one."""
    remedy = "true_cfg_scale above 1 and a negative_prompt" if plan.guidance == "calls" else "guidance_scale above 1"
    return ValueError(
        f"cfg=2 gives the second branch of guidance ranks of its own, but this request has one branch only: set "
        f"{remedy} (of a modular pipeline its guider's), or cfg=1; idle_branch=True lets those ranks wait"
    )


def check_guidance(
    call: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any], plan: ModelPlan, config: ParallelConfig
) -> None:
    """Refuses a request without guidance where ``cfg=2``, by its arguments alone: no rank has begun anything yet.

    Of pipelines that name their arguments otherwise nothing is known here; the transformer's calls tell later.

    Args:
        call: The pipeline's ``__call__``, bound.
        args: Its arguments by position.
        kwargs: Its arguments by name.
        plan: The plan of the pipeline's transformer.
        config: The layout.

    Raises:
        ValueError: The request has no second branch.
    """
    if config.cfg == 1 or config.idle_branch:
        return
    try:
        bound = inspect.signature(call).bind(*args, **kwargs)
    except TypeError:
        return  # the pipeline itself says it best
    bound.apply_defaults()
    if not guided(bound.arguments, plan):
        raise no_guidance(plan)


def guided(given: Mapping[str, Any], plan: ModelPlan) -> bool:
    """Whether a call with these arguments, defaults among them, has two branches of guidance, as far as they tell."""
    if plan.beside:  # which is called whatever the strength
        return True
    true = plan.guidance == "calls" and "true_cfg_scale" in given  # a scale of its own, beside a distilled one
    scale = given.get("true_cfg_scale" if true else "guidance_scale")
    negative = [given[name] for name in ("negative_prompt", "negative_prompt_embeds") if name in given]
    lacks_negative = true and negative and all(value is None for value in negative)
    return not (lacks_negative or (isinstance(scale, (int, float)) and scale <= 1))


def check_calls(
    calls: Sequence[Mapping[str, Any]],
    seeds: Sequence[int] | None = None,
    bars: Sequence[Callable[..., Any]] | None = None,
) -> None:
    """Refuses what cannot be a set of calls in flight together.

    Raises:
        ValueError: There are none, lengths differ, or calls share a generator, whose draws would then mix.
        TypeError: A call is no mapping of arguments.
    """
    if not calls:
        raise ValueError("there are no calls: give one dict of the pipeline's arguments for each")
    for name, entries in (("seeds", seeds), ("bars", bars)):
        if entries is not None and len(entries) != len(calls):
            raise ValueError(f"{len(entries)} {name} for {len(calls)} calls: give one for each")
    owners: dict[int, int] = {}
    for number, call in enumerate(calls):
        if not isinstance(call, Mapping):
            raise TypeError(f"call {number + 1} is a {type(call).__name__}: give a dict of the pipeline's arguments")
        given = call.get("generator")
        for generator in given if isinstance(given, (list, tuple)) else [given]:
            if generator is not None and owners.setdefault(id(generator), number) != number:
                raise ValueError(
                    f"calls {owners[id(generator)] + 1} and {number + 1} share a generator: give each its own, or "
                    f"what they draw would mix"
                )


def no_tensor_plan(plan: ModelPlan, degree: int) -> ValueError:
    """The error for a model whose matrices nobody has said how to split."""
    return ValueError(
        f"tensor={degree} is not supported for {plan.model}, whose plan does not say how its matrices split: "
        f"use tensor=1, for example with pipefusion={degree}"
    )


def check_special(plan: ModelPlan, config: ParallelConfig) -> None:
    """Refuses methods that nothing tests with what is special in a model.

    Raises:
        ValueError: One is asked for.
    """
    if config.distrifusion > 1 and not plan.plain:
        raise ValueError(
            f"distrifusion={config.distrifusion} has not been tested with {plan.model}: use "
            f"pipefusion={config.distrifusion}, ulysses or ring"
        )
    if config.changed_tokens is not None and not plan.plain:
        raise ValueError(
            f"changed_tokens={config.changed_tokens:g} has not been tested with {plan.model}: leave it out, so that "
            f"all tokens are exchanged"
        )
    if config.compress is not None and not plan.plain:
        raise ValueError(f"compress={config.compress!r} has not been tested with {plan.model}: leave it out")
    if (config.text_patches or 1) > 1 and not plan.spreads_text:
        raise ValueError(
            f"text_patches={config.text_patches} has not been tested with {plan.model}: leave it out, so that all "
            f"text goes with the first patch"
        )
    if config.warmup == WATCHED and not plan.plain:
        raise ValueError(f'warmup="{config.warmup}" has not been tested with {plan.model}: use warmup=1')
    if config.compile and any(listing.drops_masked for listing in plan.blocks):
        raise ValueError(f"compile=True is not for {plan.model}, which attends to one clip of a batch after the other")
    if config.compile and not plan.attends:
        raise ValueError(f"compile=True is not for {plan.model}, in which rows meet in sums and convolutions")
    if plan.prefix is not None and plan.prefix.always:
        _check_keeping(plan, config)
    _check_tested(plan, config)


def check_prefix(plan: ModelPlan, config: ParallelConfig, inputs: Mapping[str, Any], *, streams: bool) -> None:
    """Refuses what nothing tests with a request that keeps keys and values of its first call.

    Args:
        plan: The plan.
        config: The layout.
        inputs: Of the request's first call.
        streams: Whether patches stream in later ones.

    Raises:
        ValueError: It is asked for.
    """
    if plan.prefix is None or not (plan.prefix.always or plan.keeps_prefix(inputs)):
        return
    if not plan.keeps_prefix(inputs):
        raise ValueError(
            f"{plan.model} without the keys and values that its pipeline keeps of the first step has not been tested: "
            f"leave out use_kv_cache=False"
        )
    _check_keeping(plan, config)
    if streams and inputs.get(plan.prefix.mask) is not None:
        raise ValueError(
            f"{plan.model} keeps keys and values of its first step, which has not been tested with prompts of "
            f'different lengths where patches stream: paint them one after the other, or use warmup="all"'
        )


def _check_keeping(plan: ModelPlan, config: ParallelConfig) -> None:
    """Refuses methods that nothing tests where keys and values of the first call are kept."""
    for name in ("ulysses", "ring", "distrifusion"):
        degree = getattr(config, name)
        if degree > 1:
            raise _untested_keeping(plan, f"{name}={degree}", f"pipefusion={degree}")
    if config.compile:
        raise _untested_keeping(plan, "compile=True", "compile=False")
    if config.warmup == WATCHED:
        raise _untested_keeping(plan, f'warmup="{config.warmup}"', "warmup=1")


def _untested_keeping(plan: ModelPlan, what: str, instead: str) -> ValueError:
    return ValueError(
        f"{plan.model} keeps keys and values of its first step, which has not been tested with {what}: use {instead}"
    )


def check_elsewhere(plan: ModelPlan, inputs: Mapping[str, Any]) -> None:
    """Refuses to go on with a request whose first calls were made on other ranks, where these gave more than a latent.

    Raises:
        ValueError: They gave more.
    """
    if plan.keeps_prefix(inputs):
        raise ValueError(
            f"{plan.model} keeps keys and values of its first step, so its requests cannot move to other ranks"
        )
    if plan.second:
        raise ValueError(f"{plan.model} gives clip and sound, so its requests cannot move to other ranks")


def _check_tested(plan: ModelPlan, config: ParallelConfig) -> None:
    """Refuses what no test runs with the class."""
    degree, data = config.distrifusion, config.data
    for asked, column, what, instead in (
        (config.forecast, "forecast", "forecast=True", "use forecast=False"),
        (degree > 1, "distrifusion", f"distrifusion={degree}", f"use pipefusion={degree}, ulysses or ring"),
        (data > 1, "data", f"data={data}", "use data=1, and paint one picture after the other"),
        (config.offload is not None, "offload", "offload", "leave it out"),
        (config.compile, "compile", "compile=True", "use compile=False"),
    ):
        if asked:
            check_tested(plan.model, column, what, instead)


def heads_of(plan: ModelPlan, heads: int) -> str:
    """What they are called in messages."""
    return f"the {heads} attention heads of {plan.model}"


def check_divisible(degree: int, sizes: Mapping[int, str]) -> None:
    """Refuses a degree of tensor parallelism that does not divide what it splits.

    Args:
        degree: Ranks that share every matrix.
        sizes: What is split, each size with its name.

    Raises:
        ValueError: It does not divide all of them; names the nearest degrees that do.
    """
    for size, what in sizes.items():
        if size % degree:
            raise ValueError(f"tensor={degree} does not divide {what}: use tensor={_nearest(degree, sizes)}")


def _nearest(degree: int, sizes: Mapping[int, str]) -> str:
    """The nearest degrees that divide every size, on either side."""
    common = gcd(*sizes)
    possible = [number for number in range(1, common + 1) if common % number == 0]
    below = max(number for number in possible if number < degree)
    above = min((number for number in possible if number > degree), default=None)
    return str(below) if above is None else f"{below} or {above}"
