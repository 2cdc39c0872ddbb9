"""What is given to ``from_pretrained`` and ``Engine`` counts as in diffusers, or is refused before anything starts."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file

import patchpipe
from patchpipe import Engine, ParallelConfig
from patchpipe.cli import app
from patchpipe.loading.dtypes import default_dtype, one_dtype
from patchpipe.loading.options import read_options
from patchpipe.loading.source import fetch, resolve_source
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks

pytestmark = pytest.mark.timeout(180)

EXACT = ParallelConfig(patches=2, warmup="all", timeout=60)
TWO = ParallelConfig(pipefusion=2, patches=2, warmup="all", timeout=60)
CALL = tiny.call_arguments("sd3", steps=2)
HUB_ID = "somebody/tiny-sd3"
WEIGHTS = Path("transformer") / "diffusion_pytorch_model.safetensors"


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("saved") / "sd3")


@pytest.fixture(scope="module")
def cache(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache with two revisions of one model, as the hub's client lays it out, whose weights differ."""
    home = tmp_path_factory.mktemp("cache")
    model = home / f"models--{HUB_ID.replace('/', '--')}"
    for number, branch in enumerate(("main", "other")):
        commit = f"{number + 1}" * 40
        (model / "refs").mkdir(parents=True, exist_ok=True)
        (model / "refs" / branch).write_text(commit, encoding="utf-8")
        for file in (path for path in saved.rglob("*") if path.is_file()):
            blob = model / "blobs" / f"{commit[:4]}-{file.relative_to(saved).as_posix().replace('/', '-')}"
            blob.parent.mkdir(exist_ok=True)
            shutil.copy(file, blob)
            place = model / "snapshots" / commit / file.relative_to(saved)
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(os.path.relpath(blob, place.parent))
    other = model / "snapshots" / ("2" * 40) / WEIGHTS
    changed = {name: tensor * 1.25 for name, tensor in load_file(other).items()}
    save_file(changed, other.resolve(), metadata={"format": "pt"})
    return home


def snapshot(cache: Path, number: int) -> Path:
    return cache / f"models--{HUB_ID.replace('/', '--')}" / "snapshots" / (f"{number}" * 40)


def latents(pipe: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return pipe(**CALL, output_type="latent", generator=torch.Generator().manual_seed(0)).images


def plain(folder: Path, **options: Any) -> torch.Tensor:
    return latents(DiffusionPipeline.from_pretrained(folder, **options))


# -- options of the hub --------------------------------------------------------------------------


@pytest.mark.parametrize(("revision", "number"), [(None, 1), ("main", 1), ("other", 2), ("2" * 40, 2)])
def test_a_revision_gives_its_own_picture(cache: Path, revision: str | None, number: int) -> None:
    options = {"cache_dir": cache, "revision": revision, "local_files_only": True}
    ours = latents(patchpipe.from_pretrained(HUB_ID, EXACT, **options))
    assert torch.equal(ours, plain(snapshot(cache, number)))
    assert torch.equal(ours, latents(DiffusionPipeline.from_pretrained(HUB_ID, **options)))
    assert not torch.equal(ours, plain(snapshot(cache, 3 - number)))


@pytest.mark.some(of=2)
@pytest.mark.parametrize("config", ["plain", TWO], ids=["plain", "parallel"])
def test_the_engine_paints_the_revision_asked_for(cache: Path, config: Any) -> None:
    options = {"cache_dir": str(cache), "revision": "other", "local_files_only": True}
    with Engine(HUB_ID, config, devices="cpu", threads=1, **options) as engine:
        made = engine(seed=0, output_type="latent", **CALL)
        assert HUB_ID in engine.describe()
    assert torch.equal(made, plain(snapshot(cache, 2)))


def revised(place: Place, cache: Path) -> Any:
    torch.set_num_threads(1)
    options = {"cache_dir": cache, "revision": "other", "local_files_only": True, "group": place.join(TWO)}
    pipe = patchpipe.from_pretrained(HUB_ID, TWO, **options)
    for part in (pipe, pipe.transformer):
        with pytest.raises(ValueError, match="save_pretrained: this rank holds only its own part of the weights"):
            part.save_pretrained(cache / "never")
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
    return None if made is None else made.images.numpy()


def test_every_rank_of_a_group_reads_the_revision_and_saves_nothing(cache: Path) -> None:
    first, second = run_ranks(2, revised, cache)
    assert second is None
    assert np.array_equal(first, plain(snapshot(cache, 2)).numpy())
    assert not (cache / "never").exists()


def test_the_command_line_takes_a_revision(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    model = ["--model", HUB_ID, "--revision"]
    paint = ["generate", "x", "--devices", "cpu", "--threads", "1", "--steps", "2", "-o", str(tmp_path / "x.png")]
    assert app(args=[*paint, *model, "nowhere"]) == 2
    assert f"{HUB_ID} at revision 'nowhere' is no local folder" in capsys.readouterr().err
    size = ["--height", "64", "--width", "48", "--set", "max_sequence_length=8"]
    assert app(args=[*paint, *model, "other", *size]) == 0
    assert (tmp_path / "x.png").exists()
    for command in (
        ["info", HUB_ID],
        ["explain", HUB_ID],
        ["plan", "--device", "l40", "--link", "pcie4", "--model", HUB_ID],
    ):
        assert app(args=[*command, "--revision", "nowhere"]) == 2
        assert "revision 'nowhere'" in capsys.readouterr().err
        assert app(args=[*command, "--revision", "other"]) == 0


def test_a_revision_nobody_has_is_named(cache: Path) -> None:
    options = {"cache_dir": cache, "revision": "third", "local_files_only": True}
    words = rf"{HUB_ID} at revision 'third' is no local folder.*local_files_only=True asks for no more"
    for start in (patchpipe.from_pretrained, Engine):
        with pytest.raises(FileNotFoundError, match=words):
            start(HUB_ID, EXACT, **options)


def test_the_hub_gets_the_options_it_knows(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def index(repository: str, file: str, **options: Any) -> str:
        asked["index"] = (repository, file, options)
        return str(saved / file)

    def download(repository: str, **options: Any) -> str:
        asked["download"] = (repository, options)
        return str(saved)

    monkeypatch.setattr("patchpipe.loading.source._hub_answers", lambda: True)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", index)
    monkeypatch.setattr(DiffusionPipeline, "download", download)
    options = {"revision": "v2", "token": "abc", "cache_dir": "/c", "force_download": True}
    patchpipe.from_pretrained(HUB_ID, EXACT, variant=None, **options, proxies=None, text_encoder_3=None)
    assert asked["index"] == (HUB_ID, "model_index.json", options)
    assert asked["download"] == (HUB_ID, {**options, "variant": None, "text_encoder_3": None})


def test_a_local_folder_passes_a_revision_over_with_a_warning(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = latents(patchpipe.from_pretrained(saved, EXACT, revision="other"))
    assert torch.equal(ours, plain(saved, revision="other"))
    assert [one.getMessage() for one in caplog.records if "revision" in one.getMessage()] == [
        f"revision='other' is passed over: {saved} is a local folder, not a hub id"
    ]


# -- options nobody takes ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"revison": "x"}, TypeError, "StableDiffusion3Pipeline takes no option 'revison': did you mean 'revision'"),
        ({"torch_dtypes": "x"}, TypeError, "did you mean 'torch_dtype'"),
        ({"sheduler": 1}, TypeError, "did you mean 'scheduler'"),
        ({"zzz": 1}, TypeError, "takes no option 'zzz': its components are transformer, scheduler, vae"),
        ({"subfolder": "x"}, ValueError, "subfolder='x' is not taken: diffusers takes none for a whole pipeline"),
        ({"device_map": "balanced"}, ValueError, "device_map='balanced' is not taken: patchpipe places the parts"),
        ({"mirror": "x"}, ValueError, "HF_ENDPOINT"),
        ({"use_safetensors": False}, ValueError, "use_safetensors=False is not taken"),
        ({"dtype": "bf16", "torch_dtype": torch.float16}, ValueError, "contradict each other: give one"),
        ({"torch_dtype": "int3"}, ValueError, "dtype='int3' is unknown"),
        (
            {"quantization_config": {"bits": 4}},
            ValueError,
            "diffusers.PipelineQuantizationConfig, not a dict",
        ),
    ],
)
def test_what_no_pipeline_takes_is_refused_before_anything_starts(
    saved: Path, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    before = {child.pid for child in psutil.Process().children()}
    for start in (patchpipe.from_pretrained, Engine):
        with pytest.raises(kind, match=words):
            start(saved, TWO if start is Engine else EXACT, **options)
    assert {child.pid for child in psutil.Process().children()} <= before


def test_options_left_open_are_no_options(saved: Path) -> None:
    index = resolve_source(saved).index
    read = read_options({"subfolder": None, "device_map": None, "revision": None, "text_encoder_3": None}, index)
    assert (read.hub, read.files, read.load) == ({}, {}, {"text_encoder_3": None})
    assert fetch(resolve_source(saved)) == saved.resolve()


def test_components_travel_to_the_engine_and_a_transformer_does_not(saved: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    with Engine(saved, TWO, devices="cpu", threads=1, scheduler=scheduler) as engine:
        made = engine(seed=0, output_type="latent", **CALL)
    assert torch.equal(made, plain(saved, scheduler=scheduler))
    with pytest.raises(ValueError, match="transformer= cannot be given to the engine"):
        Engine(saved, TWO, transformer=torch.nn.Linear(1, 1))


def test_a_transformer_that_is_given_is_used(saved: Path, cache: Path) -> None:
    other = DiffusionPipeline.from_pretrained(snapshot(cache, 2)).transformer
    ours = patchpipe.from_pretrained(saved, EXACT, transformer=other)
    assert ours.transformer is other
    assert torch.equal(latents(ours), plain(snapshot(cache, 2)))


# -- dtypes --------------------------------------------------------------------------------------


def test_one_dtype_in_either_name() -> None:
    assert one_dtype("bf16", None) == one_dtype(None, torch.bfloat16) == one_dtype("bf16", torch.bfloat16) == "bfloat16"
    assert one_dtype({"transformer": "bf16", "default": torch.float32}, None) == {
        "transformer": "bfloat16",
        "default": "float32",
    }
    assert one_dtype(None, None) is None


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_the_dtype_is_the_checkpoint_s_own(stored: torch.dtype, tmp_path: Path) -> None:
    folder = tiny.save("sd3", tmp_path, dtype=stored)
    name = str(stored).removeprefix("torch.")
    assert default_dtype(folder, None, ["cuda:0", "cuda:1"]) == name
    assert default_dtype(folder, None, ["cuda:0", "cpu"]) == "float32"  # a CPU has no units for half precision
    assert patchpipe.from_pretrained(folder, EXACT).transformer.dtype == torch.float32
    assert default_dtype(tmp_path / "transformer", None, ["cuda"]) is None


def test_the_engine_takes_torch_dtype_and_the_checkpoint_s_own(saved: Path, tmp_path: Path) -> None:
    with Engine(saved, EXACT, devices="cpu", threads=1, torch_dtype=torch.bfloat16) as engine:
        assert engine.ranks[0].dtype == "bfloat16"
    half = tiny.save("sd3", tmp_path, dtype=torch.bfloat16)
    for config in ("plain", EXACT):
        with Engine(half, config, devices="cpu", threads=1) as engine:
            assert engine.ranks[0].dtype == "float32"


def test_dtypes_by_component_are_those_of_diffusers(saved: Path) -> None:
    asked = {"transformer": torch.bfloat16, "vae": "fp16"}
    ours = patchpipe.from_pretrained(saved, EXACT, torch_dtype=asked)
    theirs = DiffusionPipeline.from_pretrained(saved, dtype={"transformer": torch.bfloat16, "vae": torch.float16})
    for part in ("transformer", "vae", "text_encoder", "text_encoder_3"):
        assert getattr(ours, part).dtype == getattr(theirs, part).dtype


# -- saving --------------------------------------------------------------------------------------


def test_a_parallel_pipeline_does_not_save_itself(saved: Path, tmp_path: Path) -> None:
    pipe = patchpipe.parallelize(DiffusionPipeline.from_pretrained(saved), EXACT)
    with pytest.raises(ValueError, match=r"every rank .* would write the same files. Call patchpipe.restore\(pipe\)"):
        pipe.save_pretrained(tmp_path / "never")
    assert not (tmp_path / "never").exists()
    patchpipe.restore(pipe).save_pretrained(tmp_path / "now")
    assert torch.equal(plain(tmp_path / "now"), plain(saved))


# -- numbers of numpy, folders of any name, any locale -------------------------------------------


def test_numbers_of_numpy_are_numbers(saved: Path) -> None:
    numbers = {name: np.int64(value) if isinstance(value, int) else value for name, value in CALL.items()}
    numbers |= {"guidance_scale": np.float32(CALL["guidance_scale"]), "output_type": "latent"}
    layout = ParallelConfig(pipefusion=np.int64(2), patches=np.int32(2), warmup="all", timeout=60)  # type: ignore[arg-type]
    assert layout == TWO
    with Engine(saved, layout, devices="cpu", threads=np.int64(1)) as engine:
        expected = engine(seed=7, output_type="latent", **CALL)
        assert torch.equal(engine(seed=np.int64(7), **numbers), expected)
        both = engine(seed=np.array([7, 8]), num_images_per_prompt=np.int64(2), **numbers)
        assert torch.equal(both, engine(seed=[7, 8], num_images_per_prompt=2, output_type="latent", **CALL))
        with pytest.raises(TypeError, match="must be a whole number"):
            engine(seed=np.float32(1.5), **CALL)
    pipe = patchpipe.from_pretrained(saved, EXACT)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**numbers, generator=torch.Generator().manual_seed(7)).images
    assert torch.equal(made, expected)


SCRIPT = """
import sys
from patchpipe import Engine, ParallelConfig
with Engine(sys.argv[1], ParallelConfig(pipefusion=2, patches=2, timeout=60), devices="cpu", threads=1) as engine:
    engine(seed=0, trace=sys.argv[2] + "/trace.json", **{call!r})[0].save(sys.argv[2] + "/picture.png")
print("painted")
"""
ROOT = Path(patchpipe.__file__).resolve().parents[1]
ASCII = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # Python would take UTF-8 by itself


def run_elsewhere(folder: Path, args: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    return subprocess.run(args, cwd=folder, env=env, capture_output=True, text=True, timeout=150, check=False)


@pytest.fixture
def named(saved: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A model and a folder for pictures, whose names are not ASCII."""
    (tmp_path / "größe").mkdir()
    return Path(shutil.copytree(saved, tmp_path / "modèle 模型")), tmp_path / "größe"


@pytest.mark.extra
@pytest.mark.parametrize(
    ("locale", "prompt"),
    [({"LANG": "C", "LC_ALL": "POSIX"}, "größer Apfel"), (ASCII, "an apple")],
    ids=["posix", "ascii"],
)
def test_the_command_line_takes_folders_of_any_name_in_any_locale(
    named: tuple[Path, Path], tmp_path: Path, locale: dict[str, str], prompt: str
) -> None:
    model, out = named
    options = ["--model", str(model), "--devices", "cpu", "--threads", "1", "--steps", "2", "-o", str(out / "ä.png")]
    options += ["--height", "64", "--width", "48", "--set", "max_sequence_length=8", "--json", str(out / "ö.json")]
    ran = run_elsewhere(tmp_path, [sys.executable, "-m", "patchpipe", "generate", prompt, *options], locale)
    assert ran.returncode == 0, ran.stderr
    assert sorted(file.name for file in out.iterdir()) == ["ä.png", "ö.json"]


@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize("python_path", [f"{ROOT}{os.pathsep}", f".{os.pathsep}{ROOT}"], ids=["empty", "dot"])
def test_workers_import_nothing_from_the_current_folder(
    named: tuple[Path, Path], tmp_path: Path, python_path: str
) -> None:
    """Nor do they, or the engine, mind what folders are called, in any locale."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("queue", "random", "types", "select", "typing", "torch", "diffusers"):
        (here / f"{name}.py").write_text(f"open({str(tmp_path / 'caught')!r}, 'a').write({name!r})", encoding="utf-8")
    start = "import os, patchpipe.engine, torch, diffusers\n"  # the parent has what it needs
    start += f"os.chdir({str(here)!r}); os.environ['PYTHONPATH'] = {python_path!r}\n"
    (tmp_path / "script.py").write_text(start + SCRIPT.format(call=CALL), encoding="utf-8")
    ran = run_elsewhere(tmp_path, [sys.executable, "script.py", *map(str, named)], ASCII)
    assert ran.stdout.strip() == "painted", ran.stderr
    assert sorted(file.name for file in named[1].iterdir()) == ["picture.png", "trace.json"]
    assert not (tmp_path / "caught").exists()
