"""The same pictures from one device and from several, alternating, and what the difference is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from patchpipe.cli.pairs import Comparison, Pair
from patchpipe.cli.pictures import as_pictures
from patchpipe.cli.view import View

if TYPE_CHECKING:
    from patchpipe.engine import Engine, Result

_STEPS = "num_inference_steps"


def compare(
    many: Engine,
    one: Engine,
    requests: Sequence[tuple[str, int]],
    arguments: dict[str, Any],
    rounds: int,
    view: View,
) -> Comparison:
    """Paints every picture on both engines, after one untimed request on each."""
    short = _shortened(arguments)
    with view.waiting("one untimed request on each side"):
        for engine in (one, many):
            engine.generate(prompt=requests[0][0], seed=requests[0][1], **short)
    pairs = [_pair(many, one, prompt, seed, arguments, rounds, view) for prompt, seed in requests]
    return Comparison(len(many.devices), many.threads, tuple(pairs))


def _pair(
    many: Engine,
    one: Engine,
    prompt: str,
    seed: int,
    arguments: dict[str, Any],
    rounds: int,
    view: View,
) -> Pair:
    results: dict[str, list[Result]] = {"1 device": [], "all devices": []}
    for _ in range(rounds):
        for name, engine in (("1 device", one), ("all devices", many)):
            with view.painting(f"{name}: {prompt}") as on_progress:
                result = engine.generate(prompt=prompt, seed=seed, on_progress=on_progress, **arguments)
            results[name].append(result)
    alone, together = results["1 device"], results["all devices"]
    kind = many.ranks[0].pipeline_class
    return Pair(
        prompt=prompt,
        seed=seed,
        one=as_pictures(alone[-1].images, kind)[0],
        many=as_pictures(together[-1].images, kind)[0],
        one_seconds=tuple(result.seconds for result in alone),
        many_seconds=tuple(result.seconds for result in together),
        stats=dict(together[-1].stats),
    )


def _shortened(arguments: dict[str, Any]) -> dict[str, Any]:
    """Enough steps to touch every path: the synchronous and the patched one."""
    steps = arguments.get(_STEPS)
    return arguments if not isinstance(steps, int) else {**arguments, _STEPS: min(steps, 4)}
