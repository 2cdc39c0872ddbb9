"""Requests: schedulers of every kind, guidance branches, and what the figures say."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.distributed.joining import join
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.schedule.request import Request
from patchpipe.stage.root.survey import CallShapes, StreamKind
from patchpipe.stage.rows import Rows
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks

FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 2.0}
SCHEDULERS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "flux": {
        "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "flow Euler, shifted by size": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
        "flow Euler, stochastic": ("FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}),
        "flow LCM": ("FlowMatchLCMScheduler", {}),
    },
    "sd3": {
        "flow Euler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        "flow Heun": ("FlowMatchHeunDiscreteScheduler", {}),
        "flow LCM": ("FlowMatchLCMScheduler", {}),
        "DPM++ on flow": ("DPMSolverMultistepScheduler", FLOW),
        "UniPC on flow": ("UniPCMultistepScheduler", FLOW),
        "DEIS on flow": ("DEISMultistepScheduler", FLOW),
    },
    "qwen": {
        "flow Euler": ("FlowMatchEulerDiscreteScheduler", {}),
        "flow Euler, shifted by size": ("FlowMatchEulerDiscreteScheduler", {"use_dynamic_shifting": True}),
    },
    "pixart": {
        "DPM++": ("DPMSolverMultistepScheduler", {}),
        "DPM++, third order": ("DPMSolverMultistepScheduler", {"solver_order": 3}),
        "DPM++ SDE": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        "UniPC": ("UniPCMultistepScheduler", {}),
        "DDIM": ("DDIMScheduler", {}),
        "DDPM": ("DDPMScheduler", {}),
        "Euler": ("EulerDiscreteScheduler", {}),
        "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
        "Heun": ("HeunDiscreteScheduler", {}),
        "LCM": ("LCMScheduler", {}),
    },
}
# Some unpack their tokens first.
ONCE = {"flux": "aten.view", "sd3": "vae.decode", "pixart": "vae.decode", "qwen": "aten.view"}


def setup_module() -> None:
    quieten()


def with_schedulers(place: Place, folder: Path, name: str) -> dict[str, tuple[Any, list[str], int, int]]:
    """Picture, reasons of materialisation and calls for every scheduler, two requests each."""
    config = ParallelConfig(pipefusion=place.world_size, patches=3, warmup=1, timeout=60.0)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    pipe.set_progress_bar_config(disable=True)
    made = {}
    for title, (kind, options) in SCHEDULERS[name].items():
        pipe.scheduler = getattr(diffusers, kind)(**options)
        for steps in (5, 4):  # the second request must not see the first one's history
            arguments = tiny.call_arguments(name, height=128, width=128, steps=steps)
            torch.manual_seed(place.rank)  # some pipelines let the scheduler draw from torch's own generator
            output = pipe(**arguments, generator=torch.Generator().manual_seed(2), output_type="np")
            stats = pipe.patchpipe.last
            picture = None if output is None else output.images
            made[f"{title}, {steps} steps"] = (
                picture, stats.reasons, stats.materialisations, stats.steps_synchronous + stats.steps_patched,
            )  # fmt: skip
    return made


@pytest.mark.some(of=4)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_scheduler_streams_and_equals_one_process(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    ranks = run_ranks(2, with_schedulers, folder, name)
    expected = with_schedulers(Place(0, 1, None), folder, name)
    for title, (picture, _, _, calls) in expected.items():
        assert np.array_equal(ranks[0][title][0], picture), title
        assert picture.std() > 0.01, f"{title} paints nothing to compare"
        branches = 2 if name in ("flux", "qwen") else 1
        steps = int(title.split(", ")[-1].split()[0])
        assert calls == branches * (2 * steps - 1 if "Heun" in title else steps), title
        for rank in ranks:
            assert rank[title][1:3] == ([ONCE[name]], 1), f"{title}: {rank[title][1]}"


def test_the_figures_of_a_request_add_up() -> None:
    pipe = tiny.pipeline("flux")
    patchpipe.parallelize(pipe, ParallelConfig(patches=4, warmup=2, forecast=False))
    pipe(**tiny.call_arguments("flux", steps=5), output_type="latent")
    stats = pipe.patchpipe.last
    assert (stats.steps_synchronous, stats.steps_patched) == (2 * 2, 2 * 3)
    assert (stats.patches, stats.stages, stats.sent_bytes) == (4, 1, 0)
    assert (stats.materialisations, stats.reasons) == (1, ["the pipeline's output"])
    rows, width, layers, branches = 12 + 8, 32, 4, 2
    assert stats.store_bytes == 2 * rows * width * layers * branches * 4
    assert stats.as_dict()["touched"]


def without_generator(place: Place, output_rank: int) -> np.ndarray | None:
    """A scheduler that materialises in the loop, and noise from torch's own generator."""
    pipe = tiny.pipeline("pixart")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="sde-dpmsolver++", thresholding=True, sample_max_value=50.0, final_sigmas_type="sigma_min"
    )
    config = ParallelConfig(pipefusion=place.world_size, patches=3, warmup=1, timeout=60.0, output_rank=output_rank)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    torch.manual_seed(place.rank)
    output = pipe(**tiny.call_arguments("pixart", height=128), output_type="latent")
    assert pipe.patchpipe.last.materialisations > 1
    return None if output is None else output.images.numpy()


@pytest.mark.parametrize("output_rank", [0, 1])
def test_ranks_draw_the_same_noise_without_a_generator(output_rank: int) -> None:
    expected = without_generator(Place(0, 1, None), 0)
    assert np.array_equal(run_ranks(2, without_generator, output_rank)[output_rank], expected)


def sent(place: Place) -> list[int]:
    pipe = tiny.pipeline("sd3")
    config = ParallelConfig(pipefusion=2, patches=3, warmup=1, timeout=60.0)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    counts = []
    for steps in (2, 3):
        pipe(**tiny.call_arguments("sd3", guided=False, height=176, steps=steps), output_type="np")
        counts.append(pipe.patchpipe.last.sent_bytes)
    return counts


def test_a_step_sends_the_hidden_states_once_and_the_text_once() -> None:
    forward, back = run_ranks(2, sent)
    image, text, width = 11 * 3, 8 + 32, 32
    assert forward == [steps * (image + text) * width * 4 for steps in (2, 3)]
    assert back == [steps * 4 * (11 * 2) * (3 * 2) * 4 for steps in (2, 3)]  # the noise prediction, as a latent


def test_fewer_steps_than_warm_up_run_synchronously_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    plain = tiny.pipeline("sd3", dtype=torch.float64)  # warm-up runs the entries of a batch one by one
    arguments = tiny.call_arguments("sd3", steps=2) | {"output_type": "latent"}
    expected = plain(**arguments, generator=torch.Generator().manual_seed(0)).images
    patchpipe.parallelize(plain, ParallelConfig(patches=2, warmup=2))
    with caplog.at_level(logging.WARNING, logger="patchpipe"):
        made = plain(**arguments, generator=torch.Generator().manual_seed(0)).images
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
    assert "every step runs synchronously" in caplog.text


def request() -> tuple[Request, Any]:
    model = tiny.pipeline("sd3").transformer
    config = ParallelConfig(patches=2)
    group = join(config, rank=0, world_size=1, device="cpu")
    plan = plan_for(model)
    places, nothing = plan.blocks_of(model), frozenset[int]()
    stage: Any = SimpleNamespace(model=model, places=places, look=look, left_out=lambda _: nothing)
    return Request(config, plan, group, stage=stage), model


def look(inputs: Any, raster: Raster, _memo: Any) -> CallShapes:
    """What there is in a call, as far as the cut asks."""
    rows = Rows(("image",), (raster.total,), raster)
    stream = {"hidden_states": StreamKind(rows, 32, torch.float32)}
    sizes = {"image": raster.total, "text": inputs["encoder_hidden_states"].shape[1]}
    return CallShapes(raster, sizes, {"transformer_blocks": stream}, inputs["hidden_states"].shape, torch.float32)


def call(latent: torch.Tensor, text: torch.Tensor) -> dict[str, Any]:
    return {"hidden_states": latent, "encoder_hidden_states": text}


def test_calls_belong_to_branches_by_name_prompt_and_order() -> None:
    served, _ = request()
    latent, later = torch.zeros(1, 4, 8, 8), torch.zeros(1, 4, 8, 8)
    prompt, negative = torch.ones(1, 2, 3), torch.zeros(1, 2, 3)
    first = served.branch_for(call(latent, prompt), None)
    assert served.branch_for(call(latent, negative), None) is not first
    assert served.branch_for(call(later, prompt.clone()), None) is first, "an equal prompt is the same prompt"
    assert served.branch_for(call(later, prompt), "uncond") is not first
    # the same name and the same prompt on one latent: the calls of one step are told apart by their order
    twins = [served.branch_for(call(latent, prompt), "cond") for _ in range(2)]
    assert twins[0] is not twins[1]
    assert [served.branch_for(call(later, prompt), "cond") for _ in range(2)] == twins


def test_a_latent_of_another_size_starts_afresh() -> None:
    served, _ = request()
    small, large = (call(torch.zeros(1, 4, size, 8), torch.ones(1, 2, 3)) for size in (8, 12))
    assert served.cut_for(small).bounds == (0, 4, 8)
    branch = served.branch_for(small, None)
    assert served.cut_for(small) is served.cut_for(small)
    assert served.branch_for(call(torch.zeros(1, 4, 8, 8), torch.ones(1, 2, 3)), None) is branch
    assert served.cut_for(large).bounds == (0, 6, 12)
    assert served.branch_for(large, None) is not branch
