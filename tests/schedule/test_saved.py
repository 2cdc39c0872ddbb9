"""Every scheduler of diffusers goes on from its saved state as if it had never stopped, or is refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from diffusers import schedulers

from patchpipe.engine.tickets.checkpoint import Checkpoint
from patchpipe.schedule.steps.following import Steps
from patchpipe.schedule.steps.saved import Saved, draws, first_unlike, looks_of, on_host, scheduler_state
from tests.lazy.test_schedulers import OUT_OF_SCOPE, cases, predict, prepare, step

CPU = torch.device("cpu")
REFUSED = {"CogVideoXDPMScheduler"}  # gives its pipeline a second tensor to carry
AT = 3  # steps before it is saved


def state_of(scheduler: Any, steps: Steps) -> Saved:
    assert steps.latest is not None
    generators = [each.get_state() for each in steps.generators]
    return Saved(
        steps.done, "A", type(scheduler).__name__, {"prompt": ("'cat'", "")}, on_host(steps.latest, "latent"),
        scheduler_state(scheduler), generators, draws(CPU), [(torch.ones(2), None)], {"hidden_states": [1.0, 2.0]},
    )  # fmt: skip


@torch.no_grad()
def denoise(scheduler: Any, steps: Steps, stop: int | None = None) -> Any:
    """A pipeline's loop, to its end or until it is saved."""
    torch.manual_seed(0)
    steps.follow(scheduler)
    steps.generators = [torch.Generator().manual_seed(1)]
    latents, extra = prepare(scheduler, steps.generators[0])
    arrives = isinstance(scheduler, schedulers.SCMScheduler | schedulers.DDPMWuerstchenScheduler)
    for index, time in enumerate(scheduler.timesteps[:-1] if arrives else scheduler.timesteps):
        if steps.done == stop:
            return state_of(scheduler, steps)
        scale = getattr(scheduler, "scale_model_input", None)
        output = predict(scale(latents, time) if scale else latents, time)
        output = torch.full_like(output, 7.0) if steps.answering else output
        latents = step(scheduler, output, index, latents, extra)
    return latents


@pytest.mark.parametrize(("name", "options"), [case for case in cases() if case[0] not in OUT_OF_SCOPE])
def test_a_scheduler_goes_on_from_its_saved_state(name: str, options: Mapping[str, Any]) -> None:
    kind = getattr(schedulers, name)
    try:
        make = [kind(**options) for _ in range(3)]
    except ImportError as error:
        pytest.skip(str(error))
    at = 1 if name == "SCMScheduler" else AT
    if name in REFUSED:
        with pytest.raises(ValueError, match=f"{name} cannot be moved: its step"):
            denoise(make[0], Steps(None, CPU), at)
        return
    saved = Saved.from_bytes(denoise(make[0], Steps(None, CPU), at).to_bytes())
    assert torch.equal(denoise(make[1], Steps(saved, CPU)), denoise(make[2], Steps(None, CPU)))


def test_what_is_no_plain_data_is_refused_by_name() -> None:
    scheduler = schedulers.DDIMScheduler()
    scheduler.noise = object()
    with pytest.raises(ValueError, match=r"DDIMScheduler\.noise is a object, which cannot be saved"):
        scheduler_state(scheduler)


def test_bytes_hold_all_of_it_and_nothing_is_run() -> None:
    scheduler = schedulers.UniPCMultistepScheduler()
    saved = denoise(scheduler, Steps(None, CPU), 2)
    saved = replace(saved, state={**saved.state, "kind": torch.bfloat16, "array": np.arange(3), "far": float("inf")})
    data = saved.to_bytes()
    again = Saved.from_bytes(data)
    assert (again.step, again.state["kind"], again.state["far"]) == (2, torch.bfloat16, float("inf"))
    assert again.state["array"].tolist() == [0, 1, 2]
    assert again.call == {"prompt": ("'cat'", "")}
    assert torch.equal(again.texts[0][0], torch.ones(2))
    assert (Checkpoint(data).step, Checkpoint(data).pipeline) == (2, "A")
    other = safetensors.torch.save({"a": torch.ones(1)}, {"patchpipe": '{"format": 1}'})
    for wrong in (b"", b"nonsense" * 9, other, data[: len(data) // 2]):
        with pytest.raises(ValueError, match="this is no checkpoint of a request"):
            Saved.from_bytes(wrong)
    for wrong in (b"", b"nonsense" * 9, other):
        with pytest.raises(ValueError, match="this is no checkpoint of a request"):
            Checkpoint(wrong)


def test_inputs_look_alike_or_not() -> None:
    one = torch.linspace(-1, 1, 600)
    inputs = {"hidden_states": one, "timestep": torch.tensor([500.0]), "joint": [one, one * 2], "flag": True}
    looks = looks_of(inputs)
    assert first_unlike(looks, looks_of({**inputs, "hidden_states": one + 1e-7})) is None
    for name, value in (("hidden_states", one.flip(0)), ("timestep", torch.tensor([510.0])), ("joint", [one])):
        assert first_unlike(looks, looks_of({**inputs, name: value})) == name
