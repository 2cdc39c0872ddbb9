"""Clips as files that play, and on the command line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from patchpipe.cli import app
from patchpipe.cli import clips as cli_clips
from patchpipe.clips import check_suffix, clips_of, suffix_for_clips, write_clip
from patchpipe.engine.results import result_of
from tests import tiny

FRAMES, SIZE = 5, (48, 32)


def frames() -> list[Image.Image]:
    """A bar that moves, so that no two frames are alike."""
    found = []
    for number in range(FRAMES):
        picture = np.zeros((SIZE[1], SIZE[0], 3), dtype=np.uint8)
        picture[:, number * 8 : number * 8 + 8] = (255, 40 * number, 0)
        found.append(Image.fromarray(picture))
    return found


def numbers() -> np.ndarray:
    return np.stack([np.asarray(frame, dtype=np.float32) / 255 for frame in frames()])[None]


@pytest.mark.parametrize(
    "made", [[frames()], numbers(), torch.from_numpy(numbers()).permute(0, 1, 4, 2, 3)], ids=["pil", "np", "pt"]
)
def test_every_output_type_gives_the_same_frames(made: Any) -> None:
    [clip] = result_of(SimpleNamespace(frames=made), 1.0, {}, 0).clips
    assert [np.array_equal(one, other) for one, other in zip(clip, frames(), strict=True)] == [True] * FRAMES


@pytest.mark.parametrize(
    "made", [torch.zeros(1, 4, 5, 8, 6), "clip", [], frames()[0]], ids=["latent", "", "none", "one"]
)
def test_what_is_no_clip_is_refused(made: Any) -> None:
    with pytest.raises(ValueError, match="ask for output_type='pil' or 'np'"):
        clips_of(made)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_an_animated_picture_has_every_frame_and_its_speed(suffix: str, tmp_path: Path) -> None:
    write_clip(frames(), tmp_path / f"clip{suffix}", 8)
    with Image.open(tmp_path / f"clip{suffix}") as file:
        assert (file.n_frames, file.size) == (FRAMES, SIZE)
        file.seek(3)
        file.load()
        assert file.info["duration"] == pytest.approx(125, abs=6)
        assert np.abs(np.asarray(file.convert("RGB"), dtype=int) - np.asarray(frames()[3], dtype=int)).mean() < 8


def test_a_film_has_every_frame_and_its_speed(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    write_clip(frames(), tmp_path / "clip.part", 8, ".mp4")
    with av.open(str(tmp_path / "clip.part")) as file:
        [stream] = file.streams.video
        shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in file.decode(stream)]
        assert (len(shown), stream.average_rate, stream.codec_context.name) == (FRAMES, 8, "h264")
    for one, other in zip(shown, frames(), strict=True):
        assert np.abs(one - np.asarray(other, dtype=int)).mean() < 12


def test_without_an_encoder_a_clip_is_a_gif(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert suffix_for_clips() == ".gif"
    with pytest.raises(ValueError, match="pip install av"):
        check_suffix(Path("clip.mp4"))
    with pytest.raises(ValueError, match=r"must end in \.mp4"):
        check_suffix(Path("clip.jpg"))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny.save("wan", tmp_path_factory.mktemp("wan"))
    call = {"height": 32, "width": 48, "num_inference_steps": 2, "max_sequence_length": 8, "guidance_scale": 1.0}
    (folder / "call.json").write_text(json.dumps(call))
    return folder


def test_the_command_line_makes_a_clip(wan: Path, tmp_path: Path) -> None:
    """Of nine frames, three of the latent, cut into two patches on two ranks."""
    made, report = tmp_path / "waves.png", tmp_path / "report.json"
    layout = ["--pipefusion", "2", "--patches", "2", "--devices", "cpu", "--threads", "1"]
    files = ["--frames", "9", "-o", str(made), "--json", str(report)]
    assert app(args=["generate", "waves", "--model", str(wan), *layout, *files]) == 0
    with Image.open(made) as file:
        assert (file.n_frames, file.size) == (9, (48, 32))
    [request] = json.loads(report.read_text())["requests"]
    assert (request["stats"]["patch_rows"], request["stats"]["steps_patched"]) == ([1, 2], 1)


@pytest.mark.parametrize(
    ("option", "named"), [("--sheet", "--sheet"), ("--compare", "--compare"), ("-o", "must end in")]
)
def test_what_is_for_pictures_is_refused_before_anything_starts(
    wan: Path, tmp_path: Path, option: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [option, str(tmp_path / "clip.jpg")] if option == "-o" else [option]
    assert app(args=["generate", "waves", "--model", str(wan), *given]) != 0
    assert named in capsys.readouterr().err


def test_a_clip_plays_as_asked_for_or_told_or_as_its_makers_show() -> None:
    engine: Any = SimpleNamespace(ranks=[SimpleNamespace(transformer_class="WanTransformer3DModel")], defaults={})
    assert cli_clips.speed(engine, None, {}) == 16
    engine.defaults = {"frame_rate": 25}
    assert cli_clips.speed(engine, None, {}) == 25
    assert cli_clips.speed(engine, None, {"fps": 30}) == 30
    assert cli_clips.speed(engine, 12.5, {"fps": 30}) == 12.5
