"""The planner's choices, as Python and as a command: what is allowed, what wins, and what is said of it."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

import patchpipe.cli.commands.generate
from patchpipe import ParallelConfig
from patchpipe.cli import app
from patchpipe.config import STREAMED
from patchpipe.layout.axes import DEGREES
from patchpipe.layout.combinations import check_combination
from patchpipe.layout.split import balanced, shared_blocks, stages_of
from patchpipe.models.latent import Raster
from patchpipe.planner import Profile, Workload, predict
from patchpipe.planner.layout import balanced_stages
from patchpipe.planner.machine.draw import draw_map, told
from patchpipe.planner.machine.links import link_named
from patchpipe.planner.report import command, layout_words, reasons
from patchpipe.planner.search import Choice, Wishes, search
from patchpipe.planner.work.named import Asked, workload_for
from patchpipe.planner.work.presets import crossed, preset_named
from tests import tiny

PCIE = Profile.named("l40", "pcie4")
FLUX = preset_named("flux.1-dev").workload(1024, 1024)  # type: ignore[union-attr]
SD3 = preset_named("sd3-medium").workload(1024, 1024)  # type: ignore[union-attr]
MACHINE = ["--device", "l40", "--link", "pcie4"]


@pytest.fixture(scope="module")
def flux() -> Choice:
    return search(FLUX, 8, PCIE)


@pytest.fixture(scope="module")
def sd3() -> Choice:
    return search(SD3, 4, PCIE)


# -- what is allowed -----------------------------------------------------------------------------


def test_every_layout_uses_all_devices_and_is_accepted(flux: Choice, sd3: Choice) -> None:
    for choice, devices in ((flux, 8), (sd3, 4)):
        for one in (*choice.ranked, *choice.refused):
            assert one.config.world_size == devices
            assert ParallelConfig(**one.config.as_dict()) == one.config
            check_combination(frozenset(name for name in DEGREES if getattr(one.config, name) > 1))
            assert one.config.pipefusion <= len(choice.workload.blocks)
            parts = one.config.ring * one.config.ulysses * one.config.distrifusion
            assert (one.config.patches or 1) * parts <= choice.workload.rows.count


def test_layouts_are_ranked_by_seconds_and_each_is_there_once(flux: Choice) -> None:
    trusted = [one for one in flux.ranked if one.fresh >= 0.5]
    assert [one.seconds for one in trusted] == sorted(one.seconds for one in trusted)
    assert list(flux.ranked[: len(trusted)]) == trusted
    degrees = [tuple(getattr(one.config, name) for name in DEGREES) for one in flux.ranked]
    assert len(set(degrees)) == len(degrees)


def test_cfg_needs_two_branches_and_data_needs_pictures(flux: Choice, sd3: Choice) -> None:
    assert all(one.config.cfg == 1 and one.config.data == 1 for one in flux.ranked)
    assert any(one.config.cfg == 2 for one in sd3.ranked)
    several = search(dataclasses.replace(SD3, pictures=2), 2, PCIE)
    assert any(one.config.data == 2 for one in several.ranked)


def test_exact_leaves_nothing_stale() -> None:
    choice = search(FLUX, 4, PCIE, Wishes(exact=True))
    assert all(one.exact for one in choice.ranked)
    assert all(one.config.synchronous for one in choice.ranked if one.config.pipefusion > 1)
    assert choice.best.config.distrifusion == 1


def test_stale_layouts_are_listed_last_unless_wished() -> None:
    ethernet = Profile.named("a100", "nvlink3")
    careful = search(FLUX, 8, ethernet)
    assert careful.ranked[-1].config.distrifusion == 8
    careless = search(FLUX, 8, ethernet, Wishes(fresh=0.0))
    assert [one.seconds for one in careless.ranked] == sorted(one.seconds for one in careless.ranked)


def test_heads_and_rows_limit_the_degrees() -> None:
    workload = Workload(
        "made up", (crossed(96),) * 6, heads=3, rows=Raster(4, 4, 1), text=8, joint=False, steps=8, branches=2
    )
    for devices in (2, 3, 4, 6):
        for one in search(workload, devices, PCIE).ranked:
            assert workload.heads % (one.config.ulysses * one.config.tensor) == 0
            assert (one.config.patches or 1) * one.config.ring * one.config.ulysses <= 4
    with pytest.raises(ValueError, match="no tested layout of made up uses exactly 7 devices for 4 token rows"):
        search(workload, 7, PCIE)


def test_no_better_number_of_patches_or_split_was_overlooked(flux: Choice) -> None:
    best = flux.best
    for patches in range(best.config.pipefusion, 33):
        other = predict(FLUX, dataclasses.replace(best.config, patches=patches), PCIE)
        assert other.seconds >= best.seconds * 0.999


def test_batches_are_split_where_that_pays() -> None:
    """PixArt's 28 blocks do not divide by 8, so its halves go apart; SD3's 24 do, and there halves cost more."""
    only = Wishes(methods=("pipefusion",))
    pixart, sd3 = (workload_for(name, Asked(height=1024, width=1024)) for name in ("pixart-alpha", "sd3-medium"))
    halves, whole = search(pixart, 8, PCIE, only).best, search(sd3, 8, PCIE, only).best
    assert (halves.config.split_batch, whole.config.split_batch) == (True, None)
    assert halves.patches < 8 <= whole.patches
    assert halves.seconds < predict(pixart, ParallelConfig(pipefusion=8, patches=8, split_batch=False), PCIE).seconds
    five = ParallelConfig(pipefusion=8, patches=5, stage_blocks=whole.config.stage_blocks)
    split = dataclasses.replace(five, split_batch=True)
    assert whole.seconds < predict(sd3, split, PCIE).seconds < predict(sd3, five, PCIE).seconds
    assert "--split-batch" in layout_words(split)


def test_from_four_stages_on_the_warm_up_streams() -> None:
    """Two more streams of the patches then take less than the wait of all stages but one for a synchronous step."""
    taken = {count: search(FLUX, count, PCIE, Wishes(methods=("pipefusion",))).ranked for count in (2, 4, 8)}
    assert [found[0].config.warmup for found in taken.values()] == [None, STREAMED, STREAMED]
    assert all(one.config.forecasts for found in taken.values() for one in found if one.config.pipefusion > 1)
    best = taken[8][0]
    assert best.seconds < search(FLUX, 8, PCIE, Wishes(methods=("pipefusion",), warmup=1)).best.seconds
    words = " ".join(layout_words(best.config))
    assert "--warmup streamed" in words
    assert "forecast" not in words, "which is the default"
    sana = dataclasses.replace(FLUX, transformer="SanaTransformer2DModel")  # no keys
    plain = search(sana, 4, PCIE, Wishes(methods=("pipefusion",))).best.config
    assert plain.forecast is False
    assert "--no-forecast" in layout_words(plain)


def test_blocks_are_shared_where_that_pays() -> None:
    """57 blocks on 8 stages are 7.125 each, of which no stage need wait for one of 8; neighbours hold a block twice."""
    best = search(FLUX, 8, PCIE, Wishes(methods=("pipefusion",), warmup=1)).best
    sizes = best.config.stage_blocks
    assert sizes is not None
    assert all(6.5 < size < 7.7 for size in sizes)
    assert "--stage-blocks" in layout_words(best.config)
    whole = dataclasses.replace(best.config, stage_blocks=balanced_stages(FLUX, PCIE, 8))
    other = predict(FLUX, whole, PCIE)
    assert best.seconds < 0.95 * other.seconds
    assert other.bytes < best.bytes < 1.4 * other.bytes
    cold = search(FLUX, 8, PCIE, Wishes(methods=("pipefusion",), warmup=0)).best  # no stage would know the other's keys
    assert cold.config.stage_blocks == balanced_stages(FLUX, PCIE, 8)
    keys = 2 * len(shared_blocks(stages_of(sizes))) / 7  # of as many bytes as the stream, by as many stages
    assert best.traffic["pipefusion"] == pytest.approx((1 + keys) * other.traffic["pipefusion"])


# -- memory --------------------------------------------------------------------------------------


def test_a_model_too_large_is_refused_in_one_line() -> None:
    with pytest.raises(
        ValueError, match=r"does not fit 2 devices of 4.0 GiB: the least any layout needs is \d+"
    ) as info:
        search(FLUX, 2, PCIE, Wishes(memory=4 * 2**30))
    assert "use more devices" in str(info.value)
    assert "\n" not in str(info.value)


def test_memory_turns_layouts_down() -> None:
    roomy, tight = search(FLUX, 8, PCIE), search(FLUX, 8, PCIE, Wishes(memory=16 * 2**30))
    assert len(tight.ranked) < len(roomy.ranked)
    assert all(one.bytes <= 16 * 2**30 for one in tight.ranked)
    assert all(one.bytes > 16 * 2**30 for one in tight.refused)


def test_the_layers_of_a_text_encoder_go_to_all_ranks_where_it_must_be() -> None:
    workload, cards = workload_for("qwen-image", Asked()), Profile.named("rtx4090", "pcie4")
    best = search(workload, 4, cards).best
    assert best.config.text_rank == "layers"
    assert best.bytes < predict(workload, dataclasses.replace(best.config, text_rank=None), cards).bytes - 8 * 2**30
    assert "--text-rank layers" in " ".join(layout_words(best.config))
    assert search(FLUX, 8, PCIE).best.config.text_rank is None, "not where all fits"


def test_a_text_encoder_is_read_by_layer_where_nothing_else_will_do() -> None:
    whole = search(FLUX, 1, PCIE, Wishes(memory=64 * 2**30)).best
    assert whole.config.text_rank is None
    tight = search(FLUX, 1, PCIE, Wishes(memory=whole.bytes - 5 * 2**30)).best
    assert tight.config.text_rank == "host"
    assert tight.seconds == whole.seconds


def test_encoders_come_from_the_host_where_that_leaves_blocks_more_room_than_it_costs() -> None:
    workload, cards = workload_for("qwen-image", Asked()), Profile.named("rtx4090", "pcie4")
    choice = search(workload, 1, cards, Wishes(offload=True))
    assert choice.best.config.text_rank == "host"
    staying = predict(workload, dataclasses.replace(choice.best.config, text_rank=None), cards)
    assert staying.bytes > 24 * 2**30, "the blocks have what the encoder left"
    assert f"fetches them in {16.6e9 / cards.device.upload:.1f} s" in " ".join(reasons(choice, 0.5))
    hidden = search(workload_for("flux.1-dev", Asked()), 1, cards, Wishes(offload=True)).best
    assert hidden.uploads, "offloaded too"
    assert hidden.config.text_rank is None, "where copies are hidden it would only cost"


def test_stages_weigh_alike_where_those_that_compute_alike_do_not_fit() -> None:
    workload, cards = workload_for("flux.1-dev", Asked()), Profile.named("rtx4090", "pcie4")
    by_weight = tuple(balanced([float(block.parameters) for block in workload.blocks], 4))

    def best(gib: float, *, offload: bool = True) -> Any:
        wishes = Wishes(memory=int(gib * 2**30), methods=frozenset({"pipefusion"}), offload=offload)
        return search(workload, 4, cards, wishes).best

    roomy, tight, less = best(16), best(11.5, offload=False), best(10)
    assert roomy.config.stage_blocks != by_weight
    assert (tight.config.stage_blocks, tight.uploads) == (by_weight, ()), "all of it stays on the cards"
    assert roomy.seconds <= tight.seconds < less.seconds
    assert less.config.stage_blocks == by_weight
    assert max(less.uploads) < 1.5 * min(less.uploads), "all of them read about as much"
    uneven = dataclasses.replace(less.config, stage_blocks=roomy.config.stage_blocks)
    assert predict(workload, uneven, cards).seconds > 2 * less.seconds


# -- words ---------------------------------------------------------------------------------------


def test_reasons_name_the_next_and_the_exact(flux: Choice) -> None:
    text = "\n".join(reasons(flux, 0.5))
    assert f"{flux.speed_up(flux.best):.2f}× over one device" in text
    assert "--exact" in text
    assert "MB a step" in text


def read_back(words: str, tmp_path: Path) -> Any:
    """What ``patchpipe generate`` would run."""
    jobs: list[Any] = []
    with mock.patch.object(patchpipe.cli.commands.generate, "run", jobs.append):
        assert app(args=[*shlex.split(words)[1:], "-o", str(tmp_path / "out.png")]) == 0
    return jobs[0]


def test_reasons_tell_when_the_host_is_the_limit(flux: Choice) -> None:
    hurried = dataclasses.replace(flux.profile, device=dataclasses.replace(flux.profile.device, host=1e-3))
    told = " ".join(reasons(search(flux.workload, 8, hurried), 0.5))
    assert "the host starts kernels more slowly than the device runs them" in told
    assert "--compile" in told
    assert "host" not in " ".join(reasons(flux, 0.5))


def test_compiled_layouts_are_those_that_can_be_compiled(flux: Choice) -> None:
    compiled = search(FLUX, 8, PCIE, Wishes(compile=True))
    assert all(one.config.compile for one in compiled.ranked)
    assert len(compiled.ranked) < len(flux.ranked)
    assert command(FLUX, compiled.best.config).endswith("--compile")


def test_the_command_runs_the_layout_that_was_predicted(flux: Choice, sd3: Choice, tmp_path: Path) -> None:
    for choice in (flux, sd3, search(FLUX, 2, PCIE, Wishes(exact=True, memory=22 * 2**30))):
        for one in choice.ranked:
            job = read_back(command(choice.workload, one.config), tmp_path)
            assert job.config == one.config
            assert job.arguments["num_inference_steps"] == choice.workload.steps
            assert (job.arguments["height"], job.arguments["width"]) == (1024, 1024)


def test_the_command_guides_as_asked(tmp_path: Path) -> None:
    unguided = workload_for("sd3-medium", Asked(guidance=False))
    assert read_back(command(unguided, ParallelConfig(), False), tmp_path).arguments["guidance_scale"] == 1
    qwen = read_back(command(workload_for("qwen-image", Asked()), ParallelConfig()), tmp_path)
    assert qwen.arguments["true_cfg_scale"] == 4
    assert "negative_prompt" in qwen.arguments


def test_auto_takes_the_winner(flux: Choice, tmp_path: Path) -> None:
    config = ParallelConfig.auto("flux.1-dev", 8, device="l40", link="pcie4", height=1024, width=1024, steps=28)
    assert config == flux.best.config
    file = tmp_path / "mine.json"
    PCIE.save(file)
    assert ParallelConfig.auto("flux.1-dev", 8, profile=file) == config
    assert ParallelConfig.auto("flux.1-dev", 8, profile=PCIE, exact=True).pipefusion == 1
    with pytest.raises(ValueError, match="the link is missing: name a card and a link"):
        ParallelConfig.auto("flux.1-dev", 8, device="l40")


# -- the command ---------------------------------------------------------------------------------


def test_plan_prints_layouts_reasons_and_the_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "140")
    assert app(args=["plan", "--model", "flux.1-dev", "--devices", "8", *MACHINE, "--steps", "28", "--top", "3"]) == 0
    text = capsys.readouterr().out
    assert "Layouts, 3 of " in text
    assert "over one device" in text
    assert "patchpipe generate 'a lighthouse in a storm' --model black-forest-labs/FLUX.1-dev" in text
    assert "fresh keys" in text


def test_plan_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "new" / "plan.json"
    args = ["plan", "--model", "sd3-medium", "--devices", "4", *MACHINE]
    assert app(args=[*args, "--json", str(file)]) == 0
    capsys.readouterr()
    assert app(args=[*args, "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == json.loads(file.read_text())
    best = told["layouts"][0]
    assert ParallelConfig(**best["config"]).world_size == 4
    assert best["seconds"] * best["speed_up"] == pytest.approx(told["one_device_seconds"])
    assert len(best["memory_bytes"]) == 4


def test_plan_reads_a_folder_and_calibrates(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tiny.save("pixart", tmp_path / "pixart")
    args = [
        "plan",
        "--model",
        str(folder),
        "--devices",
        "2",
        *MACHINE,
        "--height",
        "64",
        "--width",
        "64",
        "--json",
        "-",
    ]
    assert app(args=[*args, "--single", "7.5"]) == 0
    assert json.loads(capsys.readouterr().out)["one_device_seconds"] == pytest.approx(7.5)


def test_plan_says_what_cannot_be_run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("patchpipe.planner.work.presets.PLANS", ())
    args = ["plan", "--model", "hunyuandit", "--height", "512", "--width", "512", "--devices", "2", *MACHINE]
    assert app(args=args) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "HunyuanDiT2DModel has no plan yet" in text
    assert "Run it" not in text


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["--device", "l41", "--link", "pcie4"], "device 'l41' is unknown: did you mean l4?"),
        (["--device", "l40", "--link", "token-ring"], "link 'token-ring' is unknown: use pcie3"),
        (["--link", "pcie4"], "the device is missing: name a card and a link"),
        ([*MACHINE, "--model", "no-such-model"], "known without a download are flux.1-dev"),
        ([*MACHINE, "--model", "flux.1-dev", "--memory", "3"], "the least any layout needs"),
        ([*MACHINE, "--devices", "0"], "devices=0 must be 1 or more"),
        ([*MACHINE, "--steps", "0"], "steps=0 must be 1 or more"),
        ([*MACHINE, "--fresh", "2"], "fresh=2.0 must be a share"),
        ([*MACHINE, "--single", "-1"], "must be above 0"),
        ([*MACHINE, "--dtype", "int3"], "dtype='int3' is unknown"),
        ([*MACHINE, "--height", "100"], "no multiple of the 16"),
        (["--profile", "none.json"], "there is no profile none.json"),
    ],
)
def test_plan_refuses_in_one_line(args: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["plan", *args]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_domains_are_told_with_the_option_for_them(tmp_path: Path) -> None:
    """Two sockets of four; six ranks make no two levels; more domains than fit are said to be alike."""
    assert told(link_named("pcie4"), 8).endswith("--ulysses 8 --ulysses-inner 4")
    assert told(link_named("pcie4"), 8).startswith("2 of 4 neighbours · 18 GB/s inside, 27 GB/s between")
    assert "--ulysses" not in told(link_named("pcie4"), 6)
    assert "no use" in told(link_named("pcie4"), 4)
    draw_map("H100", link_named("nvlink4"), 64, tmp_path / "map.svg")
    drawn = (tmp_path / "map.svg").read_text()
    assert "4 further domains alike" in drawn
    assert "48 GB/s between domains" in drawn
    with pytest.raises(ValueError, match="must end in a format of pictures"):
        draw_map("H100", link_named("nvlink4"), 64, tmp_path / "map.txt")


def test_profile_measures_and_plan_reads_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    drawn = tmp_path / "map.png"
    assert app(args=["profile", "--device", "cpu", "--threads", "1", "-o", str(file), "--map", str(drawn)]) == 0
    told = capsys.readouterr().out
    assert "GB/s" in told
    assert "one of 2 ranks that reach each other alike" in " ".join(told.split())
    assert drawn.stat().st_size > 10_000
    found = Profile.load(file)
    assert found.dtype == "fp32"
    assert found.device.rate > 1e8
    assert found.link.bandwidth > 1e6
    assert app(args=["plan", "--devices", "2", "--profile", str(file), "--json", "-"]) == 0
    assert "--dtype fp32" in json.loads(capsys.readouterr().out)["command"]
    assert app(args=["profile", "--ranks", "1"]) == 2
    assert "a link has two ends" in capsys.readouterr().err
