"""The planner's arithmetic: what blocks, links, schedules and memory cost, against formulas worked out apart."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from accelerate import init_empty_weights
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SD3Transformer2DModel

import patchpipe
from bench.planner import PATCHES, choices, compare, read_rows
from patchpipe import ParallelConfig, UnsupportedModel
from patchpipe.layout.volume import traffic
from patchpipe.models import plan_for
from patchpipe.models.latent import Raster
from patchpipe.planner import (
    XDIT,
    Device,
    Layout,
    Line,
    Link,
    Prediction,
    Profile,
    Workload,
    block_seconds,
    calibrated,
    predict,
    preset_named,
)
from patchpipe.planner.layout import balanced_stages
from patchpipe.planner.machine.cards import DEVICES
from patchpipe.planner.machine.links import LINKS
from patchpipe.planner.machine.measure import fit_products
from patchpipe.planner.memory import stage_parameters, stored
from patchpipe.planner.schedule import Unit, total
from patchpipe.planner.work.describe import describe_model, volume_of
from patchpipe.planner.work.named import Asked, _blocks, workload_for, workload_of
from patchpipe.planner.work.presets import PRESETS, crossed, dual, single
from patchpipe.stage.balance import patch_costs
from tests import tiny

IDEAL = Device("ideal", 1e12, 1.0, 2**40, 1e30, 0.0, 0.0, "made up")
FREE = Link("free", 1e30, 0.0, 1024, 1e30, 0.0, 0.0, "made up")
SLOW = Link("slow", 1e9, 1e-3, 1024, 1e9, 0.0, 0.0, "made up")
NOTHING_LOST = Profile(IDEAL, FREE)


def picture(blocks: int = 8, **changes: Any) -> Workload:
    """Cross-attention, so that every patch costs the same."""
    given: dict[str, Any] = {
        "model": "made up", "blocks": (crossed(256),) * blocks, "heads": 8, "rows": Raster(64, 64, 1), "text": 16,
        "joint": False, "steps": 20,
    }  # fmt: skip
    return Workload(**{**given, **changes})


# -- the schedule --------------------------------------------------------------------------------


@pytest.mark.parametrize(("stages", "patches"), [(2, 2), (2, 5), (4, 4), (4, 5), (4, 12), (8, 9)])
@pytest.mark.parametrize("hop", [0.0, 0.1, 0.9])
def test_period_is_the_longer_of_a_stages_work_and_a_patchs_way(stages: int, patches: int, hop: float) -> None:
    unit = Unit((1.0,) * stages, (1.0,) * stages, (hop,) * stages)
    timing = total([unit], [unit] * patches, warmup=1, steps=50)
    assert timing.period == pytest.approx(max(patches * 1.0, stages * (1.0 + hop)))


def test_unequal_stages_set_the_pace_by_the_slowest() -> None:
    unit = Unit((1.0, 2.0, 1.0), (1.0, 2.0, 1.0), (0.0,) * 3)
    assert total([unit], [unit] * 6, warmup=0, steps=9).period == pytest.approx(12.0)


def test_total_fills_runs_and_drains() -> None:
    unit = Unit((1.0, 1.0), (1.0, 1.0), (0.0, 0.0))
    whole = Unit((3.0, 3.0), (3.0, 3.0), (0.0, 0.0))
    timing = total([whole], [unit] * 3, warmup=2, steps=10)
    assert timing.seconds == pytest.approx(2 * 6 + 8 * 3 + 1)  # the last patch leaves the second stage one later
    assert timing.worked == pytest.approx((2 * 3 + 8 * 3,) * 2)


def test_entries_of_a_batch_overlap_in_a_synchronous_step() -> None:
    whole = Unit((3.0, 3.0), (3.0, 3.0), (0.0, 0.0))
    assert total([whole, whole], [whole], warmup=1, steps=1).seconds == pytest.approx(9.0)


@pytest.mark.parametrize("stages", [2, 4, 8])
def test_free_links_reach_the_bound(stages: int) -> None:
    workload = picture(steps=1000)
    one = predict(workload, ParallelConfig(), NOTHING_LOST).seconds
    many = predict(workload, ParallelConfig(pipefusion=stages, patches=stages), NOTHING_LOST)
    bound = workload.steps / (1 + (workload.steps - 1) / stages)
    assert one / many.seconds == pytest.approx(bound, rel=2e-3)
    assert one / many.seconds <= bound
    assert many.period == pytest.approx(one / workload.steps / stages)


@pytest.mark.parametrize("method", ["ulysses", "ring", "tensor", "cfg"])
def test_exact_methods_divide_the_work_on_free_links(method: str) -> None:
    workload = picture(branches=2)
    one = predict(workload, ParallelConfig(), NOTHING_LOST).seconds
    two = predict(workload, ParallelConfig(**{method: 2}), NOTHING_LOST)  # type: ignore[arg-type]
    assert one / two.seconds == pytest.approx(2, rel=1e-6)
    assert (two.fresh, two.exact, two.busy) == (1.0, True, pytest.approx(1.0))


def test_halves_of_a_batch_even_out_stages_that_blocks_do_not_divide() -> None:
    """Of 28 blocks on 8 stages 7 in each for both halves, where whole batches would wait for stages of 4."""
    guided = picture(blocks=28, branches=2)
    one = predict(guided, ParallelConfig(), NOTHING_LOST)
    even = predict(guided, ParallelConfig(pipefusion=8, patches=8), NOTHING_LOST)
    uneven = predict(guided, ParallelConfig(pipefusion=8, patches=8, stage_blocks=(4,) * 4 + (3,) * 4), NOTHING_LOST)
    assert one.period / even.period == pytest.approx(8)
    assert one.period / uneven.period == pytest.approx(7)
    assert max(rank.parameters for rank in even.memory) == max(rank.parameters for rank in uneven.memory)
    store = {sum(rank.store for rank in found.memory) for found in (even, uneven)}
    assert len(store) == 1, "a block at a boundary keeps keys and values of one half on either side"


def test_halves_of_a_batch_fill_the_stages_with_half_as_many_patches() -> None:
    guided = picture(blocks=24, branches=2)

    def stream(patches: int, split: bool) -> Prediction:
        return predict(guided, ParallelConfig(pipefusion=8, patches=patches, split_batch=split), NOTHING_LOST)

    whole = stream(8, False)
    assert stream(5, True).period == pytest.approx(whole.period)
    # with as many pieces as stages each waits one more piece, since a patch is back with its second half
    assert stream(4, True).period == pytest.approx(9 / 8 * whole.period)
    assert stream(5, False).period > 1.5 * whole.period  # three stages have nothing to do
    assert stream(5, True).fresh > whole.fresh


def test_synchronous_is_no_faster_than_one_device() -> None:
    workload = picture()
    one = predict(workload, ParallelConfig(), NOTHING_LOST).seconds
    many = predict(workload, ParallelConfig(pipefusion=4, patches=4, warmup="all"), NOTHING_LOST)
    assert many.seconds == pytest.approx(one)
    assert many.exact


def test_text_again_with_every_patch_costs_what_it_costs() -> None:
    flux = preset_named("flux.1-dev").workload(1024, 1024)  # type: ignore[union-attr]
    config = ParallelConfig(pipefusion=8, patches=8)
    ours = Layout(flux, config, NOTHING_LOST)
    theirs = Layout(flux, config, NOTHING_LOST, XDIT)
    once = sum(ours.piece(index).image + ours.piece(index).text for index in range(8))
    again = sum(theirs.piece(index).image + theirs.piece(index).text for index in range(8))
    assert once == 4096 + 512
    assert again / once == pytest.approx(1.78, abs=0.01)
    assert [len(stage.held) for stage in theirs.stages] == [8] * 7 + [1]


def test_a_device_faster_than_its_host_waits_for_it() -> None:
    slow_host = dataclasses.replace(NOTHING_LOST, device=dataclasses.replace(IDEAL, host=1.0))
    few, many = (ParallelConfig(pipefusion=2, patches=patches) for patches in (2, 8))
    assert predict(picture(), few, slow_host).host_bound
    assert not predict(picture(), few, NOTHING_LOST).host_bound
    assert predict(picture(), many, slow_host).period == pytest.approx(4 * predict(picture(), few, slow_host).period)
    compiled = predict(picture(), dataclasses.replace(few, compile=True), slow_host)
    assert compiled.period < predict(picture(), few, slow_host).period / 2


@pytest.mark.parametrize("seconds", [0.1, 1e6])
def test_calibration_hits_a_device_that_waits_for_its_host(seconds: float) -> None:
    slow_host = dataclasses.replace(NOTHING_LOST, device=dataclasses.replace(IDEAL, host=1e-3))
    profile = calibrated(picture(), slow_host, seconds)
    assert predict(picture(), ParallelConfig(), profile).seconds == pytest.approx(seconds)


# -- blocks and devices --------------------------------------------------------------------------


def test_a_block_on_an_ideal_device_takes_its_operations() -> None:
    for block in (dual(256), single(256)):
        seconds = block_seconds(block, 1024, 4096, IDEAL, text=128)
        assert seconds == pytest.approx(2 * block.multiply_adds(1024, 128, 4096) / IDEAL.rate)


def test_small_patches_are_less_efficient() -> None:
    card = next(device for device in DEVICES if device.name == "l40")
    per_token = [block_seconds(single(3072), count, 4096, card, text=0) / count for count in (128, 512, 2048, 4096)]
    assert per_token == sorted(per_token, reverse=True)
    assert per_token[0] > 1.3 * per_token[-1]


def test_seconds_grow_with_queries_keys_text_and_batch() -> None:
    card = next(device for device in DEVICES if device.name == "l40")
    base = block_seconds(dual(1536), 1024, 4096, card, text=128)
    assert block_seconds(dual(1536), 1100, 4096, card, text=128) > base
    assert block_seconds(dual(1536), 1024, 8192, card, text=128) > base
    assert block_seconds(dual(1536), 1024, 4096, card, text=256) > base
    assert block_seconds(dual(1536), 1024, 4096, card, text=128, batch=2) > base


def test_fit_finds_rate_and_fill_again() -> None:
    rows, width, rate, fill = (16, 64, 256, 1024), 512, 5e10, 9000.0
    seconds = [2 * width * (count * width + fill) / rate for count in rows]
    assert fit_products(rows, seconds, width) == pytest.approx((rate, fill))


def test_calibration_hits_the_single_device() -> None:
    workload, profile = picture(), Profile.named("l40", "pcie4")
    assert predict(workload, ParallelConfig(), calibrated(workload, profile, 12.5)).seconds == pytest.approx(12.5)
    with pytest.raises(ValueError, match="must be above 0"):
        calibrated(workload, profile, 0.0)


# -- links ---------------------------------------------------------------------------------------


def test_collectives_follow_their_formulas() -> None:
    line, size = Line(4), 8e6
    assert SLOW.send(size, line) == pytest.approx(1e-3 + 8e-3)
    assert SLOW.all_reduce(size, line) == pytest.approx(6 * (1e-3 + 2e-3))
    assert SLOW.all_gather(size, line) == pytest.approx(3 * (1e-3 + 8e-3))
    assert SLOW.all_to_all(size, line) == pytest.approx(3e-3 + 8e-3)


def test_exchanges_of_all_suffer_from_contention_and_rings_from_the_trunk() -> None:
    link = Link("host", 18e9, 0.0, 4, 27e9, 2.0, 0.0, "made up")
    assert link.all_to_all(1e9, Line(8)) == pytest.approx(16 / 18)
    assert link.flow(Line(8)) == 18e9  # one flow crosses each way
    assert link.flow(Line(2, stride=4)) == 27e9 / 4  # four do
    assert link.flow(Line(4)) == 18e9


def test_interference_is_what_overlap_cannot_hide() -> None:
    link = dataclasses.replace(SLOW, interference=0.5)
    assert link.exposed(3.0, 1.0) == pytest.approx(2.5)
    assert link.exposed(1.0, 3.0) == pytest.approx(0.5)
    assert SLOW.exposed(1.0, 3.0) == 0.0


@pytest.mark.parametrize("method", ["pipefusion", "ulysses", "ring", "tensor", "distrifusion"])
def test_slower_links_and_devices_take_longer(method: str) -> None:
    workload, config = picture(), ParallelConfig(**{method: 2})  # type: ignore[arg-type]
    fast = predict(workload, config, Profile(IDEAL, FREE)).seconds
    assert predict(workload, config, Profile(IDEAL, SLOW)).seconds > fast
    assert predict(workload, config, Profile(dataclasses.replace(IDEAL, efficiency=0.5), FREE)).seconds > fast


# -- memory, traffic, quality --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["flux", "sd3", "sd35", "pixart", "qwen", "ideogram4"])
def test_workload_of_a_folder_equals_what_info_and_explain_tell(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    workload = workload_for(folder, Asked(height=64, width=64, text_tokens=8, dtype="fp32"))
    for config in (ParallelConfig(), ParallelConfig(pipefusion=2, patches=2), ParallelConfig(pipefusion=2, ulysses=2)):
        sizes = balanced_stages(workload, NOTHING_LOST, config.pipefusion)  # not those of a nominal device
        config = dataclasses.replace(config, stage_blocks=sizes)
        told = describe_model(folder, config)
        memory = predict(workload, config, NOTHING_LOST).memory
        assert [rank.parameters + rank.components for rank in memory] == [stage.bytes for stage in told.stages]
        volume = volume_of(folder, config, workload.image, 8)
        once = predict(dataclasses.replace(workload, branches=1), config, NOTHING_LOST).traffic
        assert once == pytest.approx(traffic(config.mesh_shape, volume))


def test_store_and_matrices_divide_as_documented() -> None:
    workload = picture(blocks=8)
    whole = 2 * 4096 * 256 * 2 * 8  # keys and values, tokens, width, bytes, blocks

    def held(forecast: bool = False, **degrees: int) -> int:
        layout = Layout(workload, ParallelConfig(**degrees, forecast=forecast), NOTHING_LOST)  # type: ignore[arg-type]
        return stored(layout, 0)

    assert held(pipefusion=4) == whole // 4
    assert held(pipefusion=4, forecast=True) == whole // 4 * 3 // 2
    assert held(pipefusion=4, ulysses=2) == whole // 8
    assert held(pipefusion=4, ring=2) == whole // 4
    assert held(distrifusion=4) == whole
    assert held(ulysses=4) == 0
    layout = Layout(workload, ParallelConfig(tensor=2), NOTHING_LOST)
    block = workload.blocks[0]
    assert stage_parameters(layout, layout.held(0)) == 8 * (block.parameters - block.split_parameters // 2)


def test_fresh_shares() -> None:
    workload = picture()
    assert predict(workload, ParallelConfig(pipefusion=4, patches=8), NOTHING_LOST).fresh == 9 / 16
    assert predict(workload, ParallelConfig(distrifusion=4), NOTHING_LOST).fresh == 1 / 4
    assert predict(workload, ParallelConfig(ring=4), NOTHING_LOST).fresh == 1


# -- data ----------------------------------------------------------------------------------------

_SD3 = {
    "sample_size": 128, "patch_size": 2, "in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048, "attention_head_dim": 64, "pos_embed_max_size": 192,
}  # fmt: skip
CLASSES = {
    "flux.1-dev": lambda: FluxTransformer2DModel(guidance_embeds=True),
    "sd3-medium": lambda: SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536, **_SD3
    ),
    "pixart-alpha": lambda: PixArtTransformer2DModel(sample_size=128, caption_channels=4096),
}


@pytest.mark.parametrize("name", CLASSES)
def test_presets_are_the_classes_they_stand_for(name: str) -> None:
    preset = preset_named(name)
    assert preset is not None
    with init_empty_weights():
        model = CLASSES[name]()
    workload, plan = preset.workload(1024, 1024), plan_for(model)
    built = dataclasses.replace(workload, blocks=_blocks(model, plan))
    assert workload.multiply_adds == pytest.approx(built.multiply_adds, rel=0.01)  # SD3's last block lacks text
    counted = sum(value.numel() for value in model.state_dict().values())
    assert workload.parameters == pytest.approx(counted, rel=0.02)
    assert [block.self_attentions for block in built.blocks] == [block.self_attentions for block in workload.blocks]
    assert preset.heads == model.config.num_attention_heads
    for config in (ParallelConfig(pipefusion=4), ParallelConfig(pipefusion=2, tensor=2)):
        costs = patch_costs(plan.width(model), len(plan.blocks_of(model)), config, "nccl")
        assert Layout(workload, config, NOTHING_LOST)._patch_costs == costs
    for ours, theirs in zip(workload.blocks[:-1], built.blocks[:-1], strict=True):
        assert sum(matrix.summed for matrix in ours.matrices) == sum(matrix.summed for matrix in theirs.matrices)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_every_preset_can_be_predicted(preset: Any) -> None:
    workload = preset.workload(512, 512)
    assert predict(workload, ParallelConfig(pipefusion=2, patches=2), Profile.named("a100", "nvlink3")).seconds > 0
    assert preset.runnable


def test_every_figure_has_a_source() -> None:
    assert all(one.source for one in (*DEVICES, *LINKS))


def test_profiles_survive_a_file_and_refuse_another_version(tmp_path: Path) -> None:
    profile = Profile(IDEAL, SLOW, "fp32", 1.5)
    file = tmp_path / "profile.json"
    profile.save(file)
    assert Profile.load(file) == profile
    data = json.loads(file.read_text())
    file.write_text(json.dumps({**data, "version": 99}))
    with pytest.raises(ValueError, match="version 99, this patchpipe reads version 2: write it anew with"):
        Profile.load(file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is no profile"):
        Profile.load(file)
    with pytest.raises(FileNotFoundError, match="write one with `patchpipe profile"):
        Profile.load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("device", "link", "text"), [("m9", "pcie4", "'m9' is unknown: use gb200"), ("l40", "x", "use pcie3")]
)
def test_unknown_names_list_the_known(device: str, link: str, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        Profile.named(device, link)


# -- against published times ---------------------------------------------------------------------


def test_published_times_are_met() -> None:
    compared = compare(read_rows())
    errors = sorted(abs(one.error) for one in compared)
    assert len(errors) >= 20
    assert errors[len(errors) // 2] <= 0.2
    picked = choices(compared)
    assert len(picked) >= 4
    assert all(one.published == one.predicted for one in picked), picked


def test_published_runs_are_predicted_without_their_own_numbers() -> None:
    """Another row's seconds must not change a prediction."""
    rows = read_rows()
    before = {(one.row.group, one.row.config, one.row.devices): one.predicted for one in compare(rows)}
    changed = [row if row.config == "single" else dataclasses.replace(row, seconds=1.0) for row in rows]
    after = {(one.row.group, one.row.config, one.row.devices): one.predicted for one in compare(changed)}
    assert before == after
    assert max(PATCHES) == 32


def test_clips_are_refused_by_the_planner_and_run_on_one_device_unless_a_layout_is_given() -> None:
    pipe = tiny.pipeline("wan")
    with pytest.raises(UnsupportedModel, match="makes clips, which the planner does not know yet: give a layout"):
        workload_of("wan", plan_for(pipe.transformer), pipe.transformer, 8, {}, {}, Asked())
    patchpipe.parallelize(pipe)
    assert pipe.patchpipe.config.world_size == 1
