"""``patchpipe quality``: the settings, the likeness, and the page."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderKLWan
from PIL import Image

from patchpipe.cli import app
from patchpipe.cli.quality.features import Features
from patchpipe.cli.quality.front import drawing, front
from patchpipe.cli.quality.measure import Found, Setting, settings, structure
from patchpipe.cli.quality.page import page
from patchpipe.demo import MODEL_DIR

SOLVER = "dpm++:use_dynamic_shifting=true"


def grey(seed: int, noise: float = 0.0) -> Image.Image:
    make = np.random.default_rng(seed)
    ramp = np.linspace(20, 230, 32)[None].repeat(32, 0) + noise * make.standard_normal((32, 32))
    return Image.fromarray(ramp.clip(0, 255).astype(np.uint8)).convert("RGB")


def test_every_combination_is_a_setting() -> None:
    found = settings([2, 4], [1], [False, True])
    assert [one.label for one in found] == [
        "2 patches, warm-up 1, as they were", "2 patches, warm-up 1, forecast",
        "4 patches, warm-up 1, as they were", "4 patches, warm-up 1, forecast",
    ]  # fmt: skip
    assert found[1].config.forecast
    assert found[1].config.patches == 2
    assert settings([2], ["auto"], [False, True]) == [Setting(2, "auto", forecast=True)], (
        "without one there is no error"
    )


def test_distrifusion_is_a_setting_where_there_is_one() -> None:
    found = settings([2], [1, "streamed"], [True], [4])
    assert [one.label for one in found] == [
        "2 patches, warm-up 1, forecast", "2 patches, warm-up streamed, forecast",
        "DistriFusion on 4, warm-up 1, forecast",
    ]  # fmt: skip
    assert found[-1].config.distrifusion == found[-1].config.world_size == 4


def test_structure_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    assert structure(grey(0), grey(0)) == pytest.approx(1.0)
    little, much = structure(grey(0), grey(1, 5)), structure(grey(0), grey(1, 40))
    assert 1 > little > much > 0


def test_the_page_shows_the_farthest_picture_and_says_where_there_is_no_difference() -> None:
    setting, pictures = Setting(2, 1, forecast=True), [grey(0), grey(1, 30)]
    found = [
        Found(setting, [40.0, 20.0], [1.0, 0.5], [0.001, 0.02], pictures),
        Found(setting, [math.inf] * 2, [1.0] * 2, [], pictures),
    ]
    text = page("a <model>", "2 prompts.", ["an apple", "an owl & a frog"], pictures, found)
    assert "a &lt;model&gt;" in text
    assert "the farthest, 20.0 dB" in text
    assert "an owl &amp; a frog" in text
    assert "identical" in text
    assert text.count("data:image/png;base64,") == 2 * 3


def test_features_tell_pictures_apart_as_the_model_sees_them() -> None:
    vae = AutoencoderKL.from_pretrained(MODEL_DIR / "vae")
    features = Features(vae)
    same, little, much = (features.distance(grey(0), one) for one in (grey(0), grey(1, 5), grey(1, 40)))
    assert 0 == same < little < much < 4
    assert not vae.encoder.down_blocks[0]._forward_hooks


def test_features_of_a_clip_s_encoder_and_of_none() -> None:
    torch.manual_seed(0)
    sizes = {"base_dim": 8, "z_dim": 4, "dim_mult": [1, 2], "num_res_blocks": 1, "temperal_downsample": [False]}
    features = Features.of(SimpleNamespace(vae=AutoencoderKLWan(**sizes)))
    assert features is not None
    assert 0 == features.distance(grey(0), grey(0)) < features.distance(grey(0), grey(1, 40))
    assert Features.of(SimpleNamespace(vae=None)) is None


@pytest.mark.extra
def test_the_command_compares_distrifusion_with_another_scheduler(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "quality.html"
    prompts.write_text("red heart, flat style\n")
    arguments = ["--prompts", str(prompts), "--patches", "2", "--steps", "6", "--guidance", "1", "-o", str(out)]
    assert app(["quality", *arguments, "--forecast", "on", "--distrifusion", "2", "--scheduler", SOLVER]) == 0
    told = json.loads(out.with_suffix(".json").read_text())
    streamed, beside = told["found"]
    assert (streamed["distrifusion"], beside["distrifusion"], told["scheduler"]) == (False, True, SOLVER)
    assert 20 < beside["psnr"][0] < 80
    assert beside["psnr"] != streamed["psnr"]
    assert 0 < beside["features"][0] < 1
    assert "DPMSolverMultistepScheduler" in out.read_text()
    assert "2 ranks" in capsys.readouterr().out


def test_the_command_compares_and_writes_page_and_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prompts, out = tmp_path / "prompts.txt", tmp_path / "quality.html"
    prompts.write_text("red heart, flat style\n\n")
    arguments = ["--prompts", str(prompts), "--patches", "4", "--steps", "8", "--guidance", "1", "-o", str(out)]
    assert app(["quality", *arguments]) == 0
    told = json.loads(out.with_suffix(".json").read_text())
    assert told["call"]["true_cfg_scale"] == 1
    stale, forecast = (one["psnr"][0] for one in told["found"])
    assert 20 < stale < 80
    assert 20 < forecast < 80
    assert f"{forecast:.1f}" in capsys.readouterr().out
    assert "red heart, flat style" in out.read_text()
    assert app(["quality", *arguments]) == 2, "nothing is overwritten unasked"


@pytest.mark.extra
def test_pictures_painted_at_once_are_as_near(tmp_path: Path) -> None:
    prompts, found = tmp_path / "prompts.txt", []
    prompts.write_text("red heart, flat style\n a green leaf \n")
    for batch in ("1", "2"):
        out = tmp_path / f"{batch}.html"
        arguments = ["--prompts", str(prompts), "--patches", "4", "--steps", "5", "--guidance", "1", "--batch", batch]
        assert app(["quality", *arguments, "--forecast", "on", "-o", str(out)]) == 0
        found.append([one["psnr"] for one in json.loads(out.with_suffix(".json").read_text())["found"]])
    assert len(found[0][0]) == 2
    assert np.allclose(*found, atol=0.1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--patches", "0"], "--patches 0 must be whole numbers of 1 or more"),
        (["--batch", "0"], "--batch 0 must be 1 or more"),
        (["--distrifusion", "2", "--device", "cuda"], "cuda"),
        (["--distrifusion", "1"], "--distrifusion 1 must be whole numbers of 2 or more"),
        (["--scheduler", "unipc:order=2"], "UniPCMultistepScheduler has no setting 'order'"),
        (["--warmup", "all"], '--warmup all: "all" is one device\'s picture'),
        (["--warmup", "x"], "--warmup x must be a whole number of 0 or more"),
        (["--forecast", "maybe"], "--forecast maybe must be on, off or on,off"),
        (["--prompts", "nowhere.txt"], "nowhere.txt: there is no such file"),
        (["-o", "page.pdf"], "page.pdf must end in .html"),
        (["--on", "l40"], "--on l40 must be a number of cards and their kind, such as 8xl40"),
    ],
)
def test_bad_input_is_one_line_before_any_work(
    options: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert app(["quality", *options]) == 2
    assert told in capsys.readouterr().err


def test_the_front_has_those_that_none_beats_in_time_and_likeness() -> None:
    quick, near, slow = (
        Found(Setting(count, 1, forecast=True), [decibels]) for count, decibels in ((2, 40), (4, 50), (8, 45))
    )
    quick.seconds, near.seconds, slow.seconds = 1.0, 2.0, 3.0
    assert front([slow, near, quick]) == [quick, near]
    text = drawing([slow, near, quick], 9.0, "8 × l40 over pcie4")
    assert (text.count("<circle"), text.count("patches, warm-up")) == (3, 2)
    assert "one takes 9 s" in text
    assert drawing([Found(Setting(2, 1, forecast=True), [40.0])], None, "") == ""
