"""The planner given what was measured of a model's pictures: which layouts may win, and what is said of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from patchpipe import ParallelConfig
from patchpipe.cli import app
from patchpipe.models.latent import Raster
from patchpipe.planner import Profile, Workload
from patchpipe.planner.report import layout_words, reasons
from patchpipe.planner.search import Choice, Wishes, search
from patchpipe.planner.work.presets import crossed
from patchpipe.planner.work.quality import Quality

PCIE = Profile.named("l40", "pcie4")
MADE_UP = Workload(
    "made up", (crossed(1536),) * 8, heads=24, rows=Raster(64, 64, 1), text=64, joint=False, steps=20, branches=1
)
DECIBELS: dict[tuple[Any, bool], dict[int, float]] = {
    (1, False): {8: 37.0, 16: 35.0}, (1, True): {8: 52.0, 16: 50.0}, ("streamed", True): {8: 45.0, 16: 43.0},
}  # fmt: skip


def measured(folder: Path, steps: int = 20) -> Path:
    """A file such as ``patchpipe quality`` writes."""
    found = [
        {
            "patches": count,
            "warmup": warmup,
            "forecast": forecast,
            "psnr": [mean - 2, mean + 2, None],
            "ssim": [1.0] * 3,
        }
        for (warmup, forecast), counts in DECIBELS.items()
        for count, mean in counts.items()
    ]
    told = {"model": "./FLUX.1-dev", "prompts": ["a"] * 3, "call": {"num_inference_steps": steps}, "found": found}
    path = folder / "quality.json"
    path.write_text(json.dumps(told))
    return path


def chosen(folder: Path, least: float) -> Choice:
    return search(MADE_UP, 4, PCIE, Wishes(methods=("pipefusion",), quality=Quality.read(measured(folder), least)))


def test_the_quickest_of_those_near_enough_wins(tmp_path: Path) -> None:
    """A warm-up that streams is the quickest, one with forecast the nearest; nothing is known of seventeen patches."""
    for least, way in ((40, ("streamed", True)), (44, ("streamed", True)), (48, (1, True))):
        choice = chosen(tmp_path, least)
        best = choice.best
        assert (best.config.warmup, best.config.forecast) == way, least
        assert best.patches <= (8 if least == 44 else 16)
        assert choice.quality is not None
        assert choice.quality.meets(best.config, best.patches)
        assert f"{choice.quality.of(best.config, best.patches):.1f} dB" in " ".join(reasons(choice, 0.5))
        assert "--forecast" in layout_words(best.config)


def test_where_none_is_near_enough_it_is_said(tmp_path: Path) -> None:
    choice = chosen(tmp_path, 60)
    assert "no layout is known to have 60 dB" in " ".join(reasons(choice, 0.5))
    every = search(MADE_UP, 4, PCIE, Wishes(quality=choice.quality))
    assert every.best.exact
    assert all(one.exact for one in every.ranked if choice.quality and choice.quality.meets(one.config, one.patches))


def test_of_patches_that_were_not_measured_more_count(tmp_path: Path) -> None:
    quality = Quality.read(measured(tmp_path), 40)
    of = [quality.of(ParallelConfig(patches=count, forecast=True), count) for count in (1, 2, 8, 9, 16, 17)]
    assert of == [float("inf"), 52, 52, 50, 50, None]
    assert quality.of(ParallelConfig(patches=8, warmup=2), 8) is None
    assert quality.of(ParallelConfig(distrifusion=2), 1) is None


def test_distrifusion_has_figures_of_its_own(tmp_path: Path) -> None:
    """They count by ranks, and are nothing that patches which stream could be painted with."""
    told = json.loads(measured(tmp_path).read_text())
    told["found"].append({"patches": 4, "warmup": 1, "forecast": True, "distrifusion": True, "psnr": [46.0, 48.0]})
    (tmp_path / "both.json").write_text(json.dumps(told))
    both, streaming = Quality.read(tmp_path / "both.json", 40), Quality.read(measured(tmp_path), 40)
    assert [both.of(ParallelConfig(distrifusion=ranks), 1) for ranks in (2, 4, 8)] == [47.0, 47.0, None]
    assert both.ways == streaming.ways


def test_plan_reads_what_quality_wrote(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["plan", "--model", "flux.1-dev", "--devices", "2", "--device", "l40", "--link", "pcie4"]
    file = str(measured(tmp_path))
    assert app(args=[*args, "--quality", file, "--min-psnr", "48", "--json", "-"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["layouts"][0]["psnr"] in (50, 52)
    assert "--forecast" in told["command"]
    for more, text in (
        (["--quality", "none.json"], "none.json: there is no such file"),
        (["--quality", str(Path(__file__))], "is not what `patchpipe quality` writes"),
        (["--quality", file, "--steps", "8"], "measure again with `patchpipe quality --steps 8`"),
        (["--quality", file, "--min-psnr", "nan"], "must be a number of decibels"),
    ):
        assert app(args=[*args, *more]) == 2
        assert text in capsys.readouterr().err
