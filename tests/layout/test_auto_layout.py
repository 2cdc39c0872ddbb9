"""A layout taken without being asked: which one, why, the same on every rank, and every request is served."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchpipe
from patchpipe import AutoLayout, Engine, ParallelConfig
from patchpipe.cli import app
from patchpipe.demo import MODEL_DIR, call_defaults
from patchpipe.distributed.joining import settle
from patchpipe.engine.choosing import devices_for, read_wanted
from patchpipe.planner import choosing
from patchpipe.planner.automatic import take
from patchpipe.planner.machine import here
from patchpipe.planner.machine import named as machines
from patchpipe.planner.machine.here import cpu_ranks, profile_of
from patchpipe.planner.machine.profiles import Profile
from patchpipe.planner.search import search
from patchpipe.planner.work.named import Asked, workload_for
from tests import tiny
from tests.layout.test_refusals import as_torchrun_starts
from tests.support.ranks import Place, run_ranks
from tests.support.threads import run_threads

pytestmark = pytest.mark.timeout(120)

# -- a second branch that has nothing to do ------------------------------------------------------


@pytest.mark.some(of=3)
@pytest.mark.parametrize(
    "degrees", [{}, {"pipefusion": 2}, {"distrifusion": 2}, {"ulysses": 2}], ids=["cfg", "pipe", "displaced", "ulysses"]
)
@pytest.mark.parametrize("name", tiny.MODELS)
def test_unguided_requests_leave_the_second_branch_idle(name: str, degrees: dict[str, int]) -> None:
    if name == "pixart" and "ulysses" in degrees:
        pytest.skip("three heads")
    call = {**tiny.call_arguments(name, guided=False), "output_type": "latent"}
    config = ParallelConfig(cfg=2, idle_branch=True, warmup="all", **degrees)

    def paint(place: Place) -> Any:
        pipe = patchpipe.parallelize(tiny.pipeline(name), config, group=place.join(config))
        try:
            return [pipe(**call, generator=torch.Generator().manual_seed(0)) for _ in range(2)]
        finally:
            patchpipe.restore(pipe)

    first, again = run_threads(config.world_size, paint)[0]
    plain = tiny.pipeline(name)(**call, generator=torch.Generator().manual_seed(0)).images
    np.testing.assert_array_equal(first.images, again.images)
    if set(degrees) & {"distrifusion", "ulysses"}:  # sums in another order
        assert np.linalg.norm(first.images - plain) < 1e-5 * np.linalg.norm(plain)
    else:
        np.testing.assert_array_equal(first.images, plain)


# -- which layout, and why -----------------------------------------------------------------------

CALL = call_defaults()
UNGUIDED = {**CALL, "true_cfg_scale": 1.0}


def bundled(auto: AutoLayout, cores: int) -> choosing.Taken:
    return choosing.layout_for_model(auto, MODEL_DIR, ["cpu"] * cpu_ranks(cores), cores)


def on_cards(model: str, auto: AutoLayout, card: str, cards: int, **asked: Any) -> choosing.Taken:
    return take(auto, workload_for(model, Asked(**asked)), cards, lambda _: Profile.named(card, "nvlink4"))


@pytest.mark.parametrize("request_", [{}, CALL], ids=["usual", "given"])
def test_two_cores_give_the_bundled_model_a_branch_of_guidance_each(request_: dict[str, Any]) -> None:
    taken = bundled(AutoLayout(request=request_), 2)
    assert taken.config == ParallelConfig(cfg=2, idle_branch=True)
    assert "as fast as one device" in taken.why
    assert "the picture is one device's" in taken.why
    assert "\n" not in taken.why


def test_several_pictures_are_split_over_the_cores() -> None:
    taken = bundled(AutoLayout(request=UNGUIDED, pictures=4, batched=True), 2)
    assert taken.config == ParallelConfig(data=2)
    assert bundled(AutoLayout(request=UNGUIDED, pictures=4), 2).config is None  # they come one after the other


def test_little_gain_is_not_worth_several_devices_nor_another_picture() -> None:
    assert bundled(AutoLayout(request=UNGUIDED, exact=True), 2).config is None
    assert bundled(AutoLayout(plain=False, request=UNGUIDED, exact=True), 2).config == ParallelConfig()
    two = on_cards("sd3-medium", AutoLayout(), "h100", 2)
    assert two.config is not None
    assert two.config.cfg == 2


def test_one_device_is_plain_diffusers() -> None:
    assert bundled(AutoLayout(), 1) == choosing.Taken(None, "there is one device")
    assert bundled(AutoLayout(compile=True), 1).config == ParallelConfig(compile=True)


def test_a_model_too_large_for_one_card_is_spread() -> None:
    taken = on_cards("flux.1-dev", AutoLayout(), "rtx4090", 4, height=1024, width=1024)
    assert taken.config is not None
    assert taken.config.pipefusion * taken.config.tensor > 1
    assert taken.why.startswith("one device has too little memory")


def test_without_a_plan_it_is_plain_diffusers_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "X"]}')
    taken = choosing.layout_for_model(AutoLayout(), tmp_path, ["cpu"] * 2, 2)
    assert taken.config is None
    assert "StableDiffusionPipeline has no transformer" in taken.why


def test_a_layout_for_unknown_requests_cuts_each_picture_anew() -> None:
    auto = AutoLayout()
    planned = ParallelConfig(pipefusion=2, cfg=2, patches=7, split_batch=False, stage_blocks=(3, 1))
    assert auto.finished(planned) == ParallelConfig(pipefusion=2, cfg=2, idle_branch=True)
    known = AutoLayout(request={"height": 1024}, backend="gloo", timeout=9.0).finished(planned)
    assert (known.patches, known.stage_blocks, known.backend, known.timeout) == (7, (3, 1), "gloo", 9.0)


@pytest.mark.parametrize("cores", [1, 2, 3, 4, 7, 8, 64])
def test_ranks_on_a_cpu_are_a_power_of_two_within_its_cores(cores: int) -> None:
    assert cpu_ranks(cores) == max(one for one in (1, 2, 4, 8) if one <= cores)
    profile = profile_of(["cpu"] * cpu_ranks(cores), cores)
    assert profile.dtype == "fp32"
    assert profile.device.rate >= here.CORE_RATE


def test_devices_are_those_there_are_until_a_layout_is_chosen() -> None:
    assert devices_for(AutoLayout(), ["cpu", "cpu", "cpu"], None) == ("cpu",) * 3
    assert devices_for(ParallelConfig(cfg=2), None, None)[0] in ("cpu", "cuda:0")
    assert len(devices_for(None, "cpu", None)) == 1
    assert len(devices_for(AutoLayout(), "cpu", 10**6)) == 1  # all threads go to one rank
    with pytest.raises(ValueError, match="device 'tpu' is unknown"):
        devices_for(AutoLayout(), "tpu", None)
    with pytest.raises(ValueError, match="config='fast' must be a ParallelConfig, an AutoLayout, \"plain\""):
        read_wanted("fast")


# -- an engine and ranks that were given none ----------------------------------------------------


def test_an_engine_without_a_layout_serves_every_request(tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path)
    guided, unguided = (tiny.call_arguments("flux", guided=yes) for yes in (True, False))
    (folder / "call.json").write_text(
        json.dumps({name: guided[name] for name in ("height", "width", "true_cfg_scale")})
    )
    with Engine(folder, devices=["cpu", "cpu"], threads=1) as engine:
        assert engine.layout_reason is not None
        found = [engine(**call, seed=3, output_type="pt") for call in (guided, unguided)]
        config, devices = engine.config, engine.devices
    with Engine(folder, "plain", devices="cpu", threads=1) as engine:
        assert (engine.config, engine.layout_reason, engine.devices) == (None, None, ("cpu",))
        plain = [engine(**call, seed=3, output_type="pt") for call in (guided, unguided)]
    if config is not None:
        assert len(devices) == config.world_size
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def launched(place: Place, folder: Path) -> list[Any]:
    """What two launched ranks take without a layout: for a pipeline in memory, and for one on disk."""
    as_torchrun_starts(place)
    spread = patchpipe.parallelize(tiny.pipeline("sd3"))
    loaded = patchpipe.from_pretrained(folder, device="cpu")
    call = {**tiny.call_arguments("sd3"), "output_type": "latent"}
    made = [pipe(**call, generator=torch.Generator().manual_seed(0)) for pipe in (spread, loaded)]
    return [
        spread.patchpipe.config,
        loaded.patchpipe.config,
        *(one if one is None else one.images.numpy() for one in made),
    ]


def test_launched_ranks_take_one_layout(tmp_path: Path) -> None:
    folder = tiny.save("sd3", tmp_path)
    first, second = run_ranks(2, launched, folder)
    assert first[:2] == second[:2]
    assert [config.world_size for config in first[:2]] == [2, 2]
    assert second[2:] == [None, None]
    call = {**tiny.call_arguments("sd3"), "output_type": "latent"}
    plain = tiny.pipeline("sd3")(**call, generator=torch.Generator().manual_seed(0)).images.numpy()
    for made in first[2:]:
        assert np.linalg.norm(made - plain) < 1e-4 * np.linalg.norm(plain)


def test_ranks_that_were_given_differently_say_so() -> None:
    given: list[Any] = [None, AutoLayout(exact=True)]

    def meet(place: Place) -> str:
        try:
            settle(
                given[place.rank], None, lambda auto, ranks: ParallelConfig(cfg=ranks),
                rank=place.rank, world_size=2, store=place.store,
            )  # fmt: skip
        except ValueError as error:
            return str(error)
        return ""

    texts = run_threads(2, meet)
    assert texts[0] == texts[1]
    assert "config.exact is False on rank 0 but True on rank 1" in texts[0]
    given[:] = [None, None]
    assert run_threads(2, meet) == ["", ""]


def test_a_number_of_ranks_without_a_layout_is_one_error_on_all() -> None:
    def meet(place: Place) -> str:
        with pytest.raises(ValueError, match="no tested layout") as caught:
            settle(None, None, refuse, rank=place.rank, world_size=2, store=place.store)
        return str(caught.value)

    def refuse(auto: AutoLayout, ranks: int) -> ParallelConfig:
        raise ValueError(f"no tested layout of {ranks}")

    assert run_threads(2, meet) == ["no tested layout of 2"] * 2


# -- the planner of this machine -----------------------------------------------------------------


def planned(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    assert app(args=["plan", *args, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


def test_plan_looks_at_the_devices_there_are(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines, "_devices_here", lambda: ["cpu", "cpu"])
    found = planned(capsys)
    assert found["layouts"][0]["config"]["cfg"] == 2
    assert found["command"].startswith("patchpipe generate 'red heart, flat style' --dtype fp32")
    assert found["link"] == "this host"


def test_plan_takes_the_usual_link_of_a_named_card(capsys: pytest.CaptureFixture[str]) -> None:
    found = planned(capsys, "--model", "flux.1-dev", "--device", "RTX 4090")
    assert (found["device"], found["link"], len(found["layouts"][0]["memory_bytes"])) == ("rtx4090", "pcie4", 2)


def test_plan_says_when_one_device_is_best(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--model", "pixart-sigma", "--devices", "2", "--device", "h100", "--link", "25gbe", "--no-guidance"]
    args = [*small, "--height", "256", "--width", "256", "--exact"]
    found = planned(capsys, *args)
    assert found["one_device_is_best"]
    assert found["command"].endswith("--layout plain")
    assert app(args=["plan", *args]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "one device is best: the quickest layout of 2, pipefusion 2" in text


def test_an_exact_layout_comes_before_one_that_is_as_quick() -> None:
    workload, machine = workload_for("flux.1-dev", Asked()), Profile.named("h100", "nvlink4")
    ranked = search(workload, 8, machine).ranked
    quickest = min(one.seconds for one in ranked if one.fresh >= 0.5)
    alike = [one for one in ranked if one.fresh >= 0.5 and one.seconds <= 1.01 * quickest]
    assert ranked[0].seconds <= 1.01 * quickest
    assert ranked[0].exact or not any(one.exact for one in alike)
