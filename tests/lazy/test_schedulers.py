"""Every diffusers scheduler steps a lazy tensor as it steps a plain one: `docs/schedulers.md` says how.

`python -m tests.lazy.test_schedulers` prints that page.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import schedulers
from torch import Tensor

from patchpipe.lazy.latent import PatchTensor, lift, materialise_tree, patch_of

DOC = Path(__file__).parents[2] / "docs" / "schedulers.md"
SHAPE, VIDEO, BOUNDS, STEPS = (1, 4, 16, 16), (1, 4, 1, 16, 16), (0, 4, 10, 16), 8

NO_LATENT = "tokens, not a latent"
OUT_OF_SCOPE = {
    "AmusedScheduler": NO_LATENT,
    "BlockRefinementScheduler": NO_LATENT,
    "DiscreteDDIMScheduler": NO_LATENT,
    "EntropyBoundScheduler": NO_LATENT,
    "VQDiffusionScheduler": NO_LATENT,
    "RFD4ProteinaScheduler": "proteins",
    "ConsistencyDecoderScheduler": "decodes, in at most two steps",
    "PiflowScheduler": "its model returns a policy, not a prediction",
    "KarrasVeScheduler": "deprecated, and has no `step(output, timestep, sample)`",
    "ScoreSdeVeScheduler": "has no `step(output, timestep, sample)`",
    "ScoreSdeVpScheduler": "deprecated, and has no `step(output, timestep, sample)`",
}

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
SIGMAS = ({"use_karras_sigmas": True}, {"use_exponential_sigmas": True})
SOLVER = (*SIGMAS, FLOW, {"solver_order": 1}, {"solver_order": 3})
VARIANTS: Mapping[str, Sequence[Mapping[str, Any]]] = {
    "DDIMScheduler": ({"thresholding": True}, {"prediction_type": "v_prediction"}),
    "DDPMScheduler": ({"thresholding": True}, {"variance_type": "fixed_large"}),
    "DEISMultistepScheduler": SOLVER,
    "DPMSolverMultistepScheduler": (
        *SOLVER,
        {"algorithm_type": "sde-dpmsolver++"},
        {"thresholding": True},
        {"solver_type": "heun"},
    ),
    "DPMSolverSinglestepScheduler": (*SOLVER, {"thresholding": True}),
    "EulerAncestralDiscreteScheduler": ({"prediction_type": "v_prediction"},),
    "EulerDiscreteScheduler": (*SIGMAS, {"prediction_type": "v_prediction"}),
    "FlowMatchEulerDiscreteScheduler": (
        {"use_karras_sigmas": True},
        {"shift": 3.0},
        {"stochastic_sampling": True},
        {"use_dynamic_shifting": True},
    ),
    "HeunDiscreteScheduler": SIGMAS,
    "KDPM2DiscreteScheduler": SIGMAS,
    "PNDMScheduler": ({"skip_prk_steps": True},),
    "SASolverScheduler": (*SIGMAS, FLOW, {"thresholding": True}),
    "UniPCMultistepScheduler": (
        *SOLVER,
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"thresholding": True},
    ),
}


class Counter:
    """One rank, which holds the patches."""

    holder = True

    def __init__(self) -> None:
        self.notes: list[str] = []

    def share(self, full: Tensor | None, *_: Any) -> Tensor:
        assert full is not None
        return full

    def note(self, reason: str) -> None:
        self.notes.append(reason)


Model = Callable[[Tensor, Any], Tensor]


def predict(sample: Tensor, timestep: Any) -> Tensor:
    """Stands for a denoiser; pointwise, so that patches give what the whole gives."""
    return (sample * 0.7 - 0.1 * float(timestep) / 1000).clamp(-1.5, 1.5) * 0.9


def lazy_model(exchange: Counter) -> Model:
    def model(sample: Tensor, timestep: Any) -> Tensor:
        given = sample.clone()
        dim = given.dim() - 2

        def take(index: int) -> Tensor:
            return predict(patch_of(given, dim, BOUNDS[index], BOUNDS[index + 1], index), timestep)

        return PatchTensor.promise(given.shape, given.dtype, given.device, dim, BOUNDS, take, exchange)

    return model


def known(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those of the options that the function takes."""
    return {key: value for key, value in options.items() if key in inspect.signature(function).parameters}


def prepare(scheduler: Any, generator: torch.Generator) -> tuple[Tensor, dict[str, Any]]:
    options: dict[str, Any] = known(scheduler.set_timesteps, stage_index=0, jump_length=2, jump_n_sample=1)
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = 0.7
    scheduler.set_timesteps(2 if isinstance(scheduler, schedulers.SCMScheduler) else STEPS, **options)
    shape = VIDEO if isinstance(scheduler, schedulers.HeliosDMDScheduler) else SHAPE
    latents = torch.randn(shape, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
    image = torch.randn(shape, generator=generator)
    mask = (image > 0).float()
    extra = known(scheduler.step, generator=generator, eta=0.5, original_image=image, mask=mask)
    times = scheduler.timesteps
    extra |= known(
        scheduler.step,
        dmd_noisy_tensor=image,
        dmd_sigmas=getattr(scheduler, "sigmas", None),
        dmd_timesteps=times,
        all_timesteps=times,
    )
    return latents, extra


def step(scheduler: Any, output: Tensor, index: int, latents: Tensor, extra: dict[str, Any]) -> Tensor:
    """One step, the way the pipelines of that scheduler call it."""
    times = scheduler.timesteps
    time, later = times[index], times[index + 1] if index + 1 < len(times) else torch.tensor(0.0)
    if isinstance(scheduler, schedulers.CogVideoXDPMScheduler):
        back = times[index - 1] if index else None
        previous = extra.pop("previous", None)
        result = scheduler.step(output, previous, time, back, latents, return_dict=False, **extra)
        extra["previous"] = result[1]
        return result[0]
    if isinstance(scheduler, schedulers.DDPMWuerstchenScheduler):
        time = time[None]
    more = known(scheduler.step, r_timestep=later, cur_sampling_step=index)
    return scheduler.step(output, time, latents, return_dict=False, **extra, **more)[0]


@torch.no_grad()
def denoise(scheduler: Any, model: Model, lifted: bool = False) -> Tensor:
    """A pipeline's loop."""
    torch.manual_seed(0)  # DPMSolverSDEScheduler draws the seed of its noise from the global generator.
    latents, extra = prepare(scheduler, torch.Generator().manual_seed(1))
    # The last of these timesteps is where to arrive.
    arrives = isinstance(scheduler, schedulers.SCMScheduler | schedulers.DDPMWuerstchenScheduler)
    for index, time in enumerate(scheduler.timesteps[:-1] if arrives else scheduler.timesteps):
        scale = getattr(scheduler, "scale_model_input", None)
        output = model(scale(latents, time) if scale else latents, time)
        latents = step(scheduler, output, index, lift(latents, output) if lifted else latents, extra)
    return latents


Row = tuple[str, str, bool | str, int, str]


def measure(name: str, options: Mapping[str, Any], lifted: bool = False) -> Row:
    """Name, options, bit-equal (or why not run), materialisations inside the loop, and what made them."""
    shown = ", ".join(f"{key}={value}" for key, value in options.items())
    if name in OUT_OF_SCOPE:
        return name, shown, f"not run: {OUT_OF_SCOPE[name]}", 0, ""
    try:
        make = getattr(schedulers, name)
        plain = denoise(make(**options), predict)
    except ImportError as error:
        library = str(error).split("requires the ")[1].split(" ")[0]
        return name, shown, f"not run: needs {library}", 0, ""
    exchange = Counter()
    lazy = denoise(make(**options), lazy_model(exchange), lifted)
    notes = list(exchange.notes)
    equal = torch.equal(materialise_tree(lazy, "result"), plain) and bool(plain.isfinite().all())
    return name, shown, equal, len(notes), ", ".join(sorted(set(notes)))


def cases() -> list[tuple[str, Mapping[str, Any]]]:
    kinds = inspect.getmembers(schedulers, inspect.isclass)
    names = sorted(name for name, _ in kinds if name.endswith("Scheduler"))
    return [(name, options) for name in names for options in ({}, *VARIANTS.get(name, ()))]


def line(row: Row) -> str:
    name, options, equal, count, reasons = row
    verdict = {True: "yes", False: "**no**"}.get(equal, equal) if isinstance(equal, bool) else equal
    cells = (
        f"`{name}`",
        f"`{options}`" if options else "",
        verdict,
        *((str(count), reasons) if equal is True else ("", "")),
    )
    return f"| {' | '.join(cells)} |"


INTRO = f"""# Schedulers

All latent schedulers in this table give bit-equal results. Most of them also never stop the stages.

Inside the loop the latent is lazy: what the scheduler does to it is recorded and runs patch by patch. An
operation that mixes patches needs the whole latent (it *materialises*), and then all devices must wait for each
other. The table counts how often that happens, and names the operation. Every row is a loop of {STEPS} steps on a
small latent in three patches of uneven height, compared with the same loop on a plain tensor.

This page is written by `python -m tests.lazy.test_schedulers`. A test compares it with what it measures.

"""


def page(rows: Sequence[Row]) -> str:
    run = [row for row in rows if row[2] is True]
    good = [row for row in run if row[3] == 0]
    summary = (
        f"{len({row[0] for row in run})} schedulers in {len(run)} configurations are bit-equal; "
        f"{len({row[0] for row in good})} schedulers in {len(good)} configurations never materialise.\n\n"
    )
    head = "| scheduler | options | bit-equal | materialisations | operation |\n| --- | --- | --- | --- | --- |\n"
    return INTRO + summary + head + "\n".join(map(line, rows)) + "\n"


ROWS = [row for row in cases() if row[0] not in OUT_OF_SCOPE]


@pytest.mark.parametrize(("name", "options"), ROWS, ids=lambda value: value if isinstance(value, str) else None)
def test_steps_as_a_plain_tensor_and_as_documented(name: str, options: Mapping[str, Any]) -> None:
    row = measure(name, options)
    if not isinstance(row[2], bool):
        pytest.skip(row[2])
    assert row[2], "not bit-equal"
    assert line(row) in DOC.read_text().splitlines()


def test_most_schedulers_never_materialise() -> None:
    free = {name for name, options in ROWS if not options and measure(name, options)[2:4] == (True, 0)}
    assert len(free) > 28
    assert {"FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler", "PNDMScheduler"} <= free


def test_page_lists_every_scheduler() -> None:
    text = DOC.read_text()
    assert [name for name, _ in cases() if f"`{name}`" not in text] == []


def test_sums_that_start_from_plain_zeros_want_a_lifted_latent() -> None:
    assert measure("SASolverScheduler", {}, lifted=True)[2:4] == (True, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(page([measure(*case) for case in cases()]), end="")
