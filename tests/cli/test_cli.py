"""The command line as its users meet it: pictures, tables, and one line for every error."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from PIL import Image, ImageSequence

import patchpipe
from patchpipe.cli import app, options, pictures
from patchpipe.cli.job import call_arguments
from patchpipe.clips import clips_of
from patchpipe.config import ParallelConfig
from patchpipe.engine import Engine, Progress
from patchpipe.loading.dtypes import dtype_name
from tests import tiny

pytestmark = pytest.mark.timeout(120)

TINY_CALL = {"height": 64, "width": 48, "num_inference_steps": 4, "max_sequence_length": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tiny.save("flux", tmp_path_factory.mktemp("flux"))
    (folder / "call.json").write_text(json.dumps({**TINY_CALL, "true_cfg_scale": 3.0, "negative_prompt": ""}))
    return str(folder)


# -- pictures ------------------------------------------------------------------------------------


def test_generate_writes_numbered_pictures_and_a_report(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, report = tmp_path / "new" / "out.png", tmp_path / "report.json"
    layout = ["--cfg", "2", "--pipefusion", "2", "--ulysses", "2", "--patches", "2", "--threads", "1"]
    files = ["--devices", "cpu", "-o", str(out), "--json", str(report)]
    assert app(args=["generate", "red apple", "owl", "--model", model, *layout, *files]) == 0
    text, errors = capsys.readouterr()
    text = " ".join(text.split())
    assert errors == ""
    assert sorted(file.name for file in out.parent.iterdir()) == ["out-1.png", "out-2.png"]
    assert Image.open(out.with_name("out-1.png")).size == (48, 64)
    assert "cfg 2 · pipefusion 2 · ulysses 2 · patches 2" in text
    assert "materialised once" in text
    told = json.loads(report.read_text())
    assert ParallelConfig(**told["config"]) == ParallelConfig(cfg=2, pipefusion=2, ulysses=2, patches=2)
    assert [one["prompt"] for one in told["requests"]] == ["red apple", "owl"]
    assert len(told["ranks"]) == 8


def test_compare_of_a_synchronous_run_is_identical(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sheet.png"
    args = ["generate", "red apple", "--model", model, "--devices", "cpu", "--threads", "1", "-o", str(out)]
    assert app(args=[*args, "--pipefusion", "2", "--warmup", "all", "--compare"]) == 0
    text = capsys.readouterr().out
    assert "identical" in text
    assert "speed-up" in text
    assert Image.open(out).width > 2 * 96


@pytest.mark.extra
def test_compiled_stages_paint_the_same_picture(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report = tmp_path / "sheet.png", tmp_path / "report.json"
    args = ["generate", "red apple", "--model", model, "--devices", "cpu", "--threads", "1", "--pipefusion", "2"]
    files = ["-o", str(out), "--json", str(report)]
    assert app(args=[*args, "--warmup", "all", "--compile", "--compare", *files]) == 0
    assert "compiled" in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert told["config"]["compile"] is True
    assert told["requests"][0]["psnr"] is None or told["requests"][0]["psnr"] > 60  # None: identical


def test_pictures_in_flight_are_painted_in_sets(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, report, trace = tmp_path / "out.png", tmp_path / "report.json", tmp_path / "run.json"
    layout = ["--pipefusion", "2", "--warmup", "all", "--devices", "cpu", "--threads", "1", "--in-flight", "2"]
    files = ["-o", str(out), "--json", str(report), "--trace", str(trace)]
    assert app(args=["generate", "red apple", "owl", "red heart", "--model", model, *layout, *files]) == 0
    assert "2 in flight together" in capsys.readouterr().out
    told = json.loads(report.read_text())
    assert (told["in_flight"], [one["prompt"] for one in told["requests"]]) == (2, ["red apple", "owl", "red heart"])
    made = sorted(file.name for file in tmp_path.iterdir())
    assert made == ["out-1.png", "out-2.png", "out-3.png", "report.json", "run-1.json", "run-2.json"]
    assert json.loads((tmp_path / "run-1.json").read_text())["otherData"]["requests"] == 2


# Options by their names as diffusers has them; of a family that guides by two calls, its two branches on two devices.
FAMILIES: dict[str, dict[str, object]] = {
    "flux": {"true_cfg_scale": 3.0, "negative_prompt": "owl"},
    "sd3": {"guidance_scale": 4.0},
    "qwen": {"true_cfg_scale": 3.0, "negative_prompt": "owl", "max_sequence_length": 16},
    "wan": {"guidance_scale": 3.0, "num_frames": 13},
    "zimage": {"guidance_scale": 3.0, "max_sequence_length": 40},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "exact": {"pipefusion": 2, "warmup": "all"},
    "streams": {"pipefusion": 2, "patches": 2, "warmup": 1, "split_batch": False},
    "branches": {"cfg": 2, "warmup": "all"},
}


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Tiny models on disk, made when they are first asked for."""
    return cache(lambda name: tiny.save(name, tmp_path_factory.mktemp(name)))


@pytest.mark.some(of=6)
@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, layout) for name in FAMILIES for layout in ("exact", "streams")]
    + [("flux", "branches"), ("wan", "branches")],
)
def test_five_families_from_disk_paint_what_diffusers_paints(
    name: str, layout: str, families: Callable[[str], Path], tmp_path: Path
) -> None:
    """The file has the picture, or the clip, of plain diffusers; where patches stream, that of one process."""
    folder, out = families(name), tmp_path / "out.png"
    given = {**TINY_CALL, **FAMILIES[name]}
    options = ["--no-split-batch" if value is False else f"--{key}={value}" for key, value in LAYOUTS[layout].items()]
    settings = [word for key, value in given.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    files = ["--devices", "cpu", "--threads", "1", "-o", str(out)]
    assert app(args=["generate", "red apple", "--model", str(folder), *options, *settings, "--seed", "3", *files]) == 0
    pipe = tiny.kind_of(name).from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if layout == "streams":
        patchpipe.parallelize(pipe, ParallelConfig(**{**LAYOUTS[layout], "pipefusion": 1}))
    made = tiny.painted(pipe(prompt="red apple", generator=torch.Generator().manual_seed(3), **given))
    expected = clips_of(made)[0] if name == "wan" else made
    with Image.open(out) as file:
        found = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
    assert len(found) == len(expected)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


def test_killed_worker_ends_the_command_with_one_line(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workers: list[psutil.Process] = []
    struck: list[float] = []
    generate = Engine.generate

    def and_be_killed(engine: Engine, *args: Any, on_progress: Callable[[Progress], None], **call: Any) -> Any:
        workers.extend(psutil.Process(rank.pid) for rank in engine.ranks)

        def kill(progress: Progress) -> None:
            on_progress(progress)
            if progress.step == 3:
                struck.append(time.monotonic())
                workers[1].send_signal(signal.SIGKILL)

        return generate(engine, *args, on_progress=kill, **call)

    monkeypatch.setattr(Engine, "generate", and_be_killed)
    args = ["generate", "owl", "--model", model, "--pipefusion", "2", "--steps", "900", "--devices", "cpu"]
    assert app(args=[*args, "--threads", "1", "-o", str(tmp_path / "never.png")]) == 1
    assert time.monotonic() - struck[0] < 15
    errors = capsys.readouterr().err
    assert errors.startswith("error: rank 1 (pid ")
    assert "was killed by SIGKILL while painting" in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
    assert not any(worker.is_running() and worker.status() != "zombie" for worker in workers)


# -- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["generate"], "Missing argument"),
        (["genarate", "x"], "No such command 'genarate'"),
        (["generate", "x", "--pipefusion", "two"], "--pipefusion"),
        (["generate", "x", "--in-flight", "0"], "--in-flight 0 must be 1 or more"),
        (["generate", "x", "--in-flight", "2", "--compare"], "--in-flight several at once: leave one of them out"),
        (["generate", "x", "y", "--in-flight", "2", "--data", "2"], "leave out --in-flight, or --data"),
        (["generate", "x", "--in-flight", "2", "--cfg", "2", "--ulysses", "2"], "nearest that is tested is"),
        (["generate", "x", "--pipefusion", "0"], "pipefusion=0 must be a whole number"),
        (["generate", "x", "--warmup", "some"], 'a whole number of 0 or more, "all", "streamed" or "auto"'),
        (["generate", "x", "--patch-rows", "1;2"], "--patch-rows 1;2 must be whole numbers"),
        (["generate", "x", "--backend", "mpi"], "--backend"),
        (["generate", "x", "--dtype", "int3"], "dtype='int3' is unknown: use bf16, fp16 or fp32"),
        (["generate", "x", "--set", "novalue"], "--set novalue must look like key=value"),
        (["generate", "x", "--set", "seed=3"], "use --seed"),
        (["generate", "x", "-n", "0"], "--images 0 must be 1 or more"),
        (["generate", "x", "-o", "x.doc"], "must end in a picture format"),
        (["generate", "x", "-o", "/proc/nowhere/x.png"], "cannot be written"),
        (["generate", "x", "--model", "/no/such/model"], "there is no folder /no/such/model"),
        (["generate", "x", "--devices", "tpu"], "device 'tpu' is unknown"),
        (["generate", "x", "--cfg", "3"], "cfg=3 must be 1 or 2: there are two guidance branches"),
        (["generate", "x", "--data", "2"], "--data 2 splits the pictures of a request, but 1 would be painted"),
        (["generate", "x", "--tensor", "2", "--data", "2"], "data × tensor is not tested together and so refused"),
        (["generate", "x", "--pipefusion", "99"], "pipefusion=99 is more stages than the"),
        (["generate", "x", "--tensor", "64"], "tensor=64 does not divide the"),
        (["generate", "x", "--pipefusion", "2", "--devices", "cpu,cpu,cpu"], "3 devices for 2 ranks"),
        (["explain", "--pipefusion", "99"], "pipefusion=99 is more stages than the"),
        (["explain", "--tensor", "64"], "tensor=64 does not divide the"),
        (["info", "--tensor", "64"], "tensor=64 does not divide the"),
        (["info", "/no/such/model"], "there is no folder /no/such/model"),
        (["info", "--pipefusion", "0"], "pipefusion=0 must be a whole number"),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    args: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert app(args=args) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert words in errors
    assert errors.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--set", "heigth=3"], "FluxPipeline takes no argument 'heigth': did you mean 'height'?"),
        (["--cfg", "2", "--guidance", "1"], "cfg=2 gives the second branch of guidance ranks of its own, but this"),
    ],
)
def test_what_only_the_pipeline_can_refuse_is_one_line_too(
    options: list[str], words: str, model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "x", "--model", model, "--devices", "cpu", "-o", str(tmp_path / "x.png")]
    assert app(args=[*args, *options]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"error: {words}")
    assert errors.count("\n") == 1


# -- help and tables -----------------------------------------------------------------------------


def test_help_of_every_command_answers_without_the_heavy_libraries() -> None:
    code = """
import sys
from patchpipe.cli import app
for name in [None, *(command.callback.__name__ for command in app.registered_commands)]:
    assert app(args=[*filter(None, [name]), "--help"]) == 0
heavy = {"torch", "diffusers", "transformers", "huggingface_hub", "fastapi", "sqlalchemy"} & sys.modules.keys()
sys.exit(heavy or None)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.count("Usage:") == 13  # twelve commands, and all of them


@pytest.mark.parametrize("args", [["--help"], ["generate", "--help"], ["info", "--help"], ["models", "--help"]])
def test_help_has_examples(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=args) == 0
    text = capsys.readouterr().out
    assert "Example" in text
    assert "patchpipe" in text


def test_every_layout_option_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["generate", "--help"]) == 0
    text = capsys.readouterr().out
    for name in ParallelConfig().as_dict():
        assert f"--{name.replace('_', '-')}" in text


def test_explain_shows_the_mesh_and_what_travels(capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--cfg", "2", "--pipefusion", "2", "--ulysses", "2", "--text-rank", "1", "--output-rank", "3"]
    assert app(args=["explain", *layout]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "cfg 2 · pipefusion 2 · ulysses 2 · patches auto · warm-up 1 or 2 with guidance · 8 ranks" in text
    assert "rank cfg pipe ulysses holds" in text
    assert "1 0 0 1 stage 1/2, rows 2/2 of each patch, guidance branch 1, text encoders" in text
    assert text.count("VAE, gets the images") == 1
    # nine blocks on two stages: both run the fifth, and tell each other its keys and values
    for words in ("pipefusion 3.4 MiB", "ulysses 10.1 MiB", "of keys and values"):
        assert words in text


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["--version"]) == 0
    assert capsys.readouterr().out.startswith("patchpipe ")


def test_models_lists_the_supported_classes(capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["models"]) == 0
    assert "FluxTransformer2DModel" in capsys.readouterr().out


def test_info_shows_blocks_and_ranks(model: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert app(args=["info", model, "--pipefusion", "2"]) == 0
    text = capsys.readouterr().out
    for words in ("FluxPipeline", "FluxTransformer2DModel", "single_transformer_blocks", "rank", "vae"):
        assert words in text


# -- small parts ---------------------------------------------------------------------------------


def test_options_win_over_advice(model: str) -> None:
    none = {"height": None, "width": None, "steps": None, "guidance": None, "negative": None, "settings": {}}
    assert call_arguments(model, **none)["true_cfg_scale"] == 3.0  # type: ignore[arg-type]
    given = call_arguments(model, **{**none, "guidance": 5.0, "steps": 7, "settings": {"width": 32}})  # type: ignore[arg-type]
    assert (given["true_cfg_scale"], given["num_inference_steps"], given["width"]) == (5.0, 7, 32)
    assert "guidance_scale" not in given


def test_settings_are_read_as_json() -> None:
    assert options.read_settings(["a=1", "b=[1, 2]", "c=text", "d=x=y", "e=null"]) == {
        "a": 1,
        "b": [1, 2],
        "c": "text",
        "d": "x=y",
        "e": None,
    }


def test_dtype_names() -> None:
    import torch

    assert dtype_name(torch.bfloat16) == dtype_name("bf16") == dtype_name("torch.bfloat16") == "bfloat16"
    assert dtype_name(None) is None


def test_psnr() -> None:
    grey, lighter = (Image.new("RGB", (8, 8), (value,) * 3) for value in (100, 101))
    assert math.isinf(pictures.psnr(grey, grey))
    assert pictures.psnr(grey, lighter) == pytest.approx(20 * math.log10(255), abs=1e-6)


def test_failed_write_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    picture = Image.new("RGB", (8, 8))
    monkeypatch.setattr(picture, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        pictures.write_picture(picture, tmp_path / "x.png")
    assert list(tmp_path.iterdir()) == []
