"""Loading: what a rank reads, from which files, and what it says of folders that are broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import patchpipe
from patchpipe import ParallelConfig, UnsupportedModel
from patchpipe.loading import checkpoint
from patchpipe.loading.dtypes import as_torch, dtype_name
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks

STEM = "diffusion_pytorch_model"


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("saved") / "sd3")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(saved, tmp_path / "sd3"))


def load(folder: Path | str, **options: Any) -> Any:
    pipe = patchpipe.from_pretrained(folder, ParallelConfig(patches=2, warmup="all"), **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def paint(pipe: Any, name: str = "sd3") -> torch.Tensor:
    arguments = tiny.call_arguments(name, steps=2) | {"output_type": "latent"}
    return pipe(**arguments, generator=torch.Generator().manual_seed(0)).images


def reshard(folder: Path, size: str) -> list[Path]:
    pipe = DiffusionPipeline.from_pretrained(folder)
    shutil.rmtree(folder / "transformer")
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size=size)
    return sorted((folder / "transformer").glob("*.safetensors"))


# ------------------------------------------------------------------------------------ what is read


def reading(place: Place, folder: Path) -> tuple[list[str], int]:
    """Names read from files by this rank, and the shards it opened."""
    read: list[str] = []
    opened: set[str] = set()

    class Spy:
        def __init__(self, path: Path, **options: Any) -> None:
            self.file, self.path = safe_open(path, **options), path

        def __enter__(self) -> Spy:
            self.file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self.file.__exit__(*error)

        def keys(self) -> Iterator[str]:
            return self.file.keys()

        def get_slice(self, name: str) -> Any:
            return self.file.get_slice(name)  # its header tells the shape; nothing is read yet

        def get_tensor(self, name: str) -> torch.Tensor:
            read.append(name)
            opened.add(Path(self.path).name)
            return self.file.get_tensor(name)

    checkpoint.safe_open = Spy
    config = ParallelConfig(pipefusion=place.world_size, timeout=60.0)
    patchpipe.from_pretrained(folder, config, group=place.join(config))
    return read, len(opened)


def test_a_rank_reads_its_own_tensors_once_and_from_its_own_shards(folder: Path) -> None:
    shards = reshard(folder, "30KB")
    assert len(shards) > 4
    ranks = run_ranks(4, reading, folder)
    blocks = [{name for name in read if "blocks." in name} for read, _ in ranks]
    assert [{name.split(".")[1] for name in names} for names in blocks] == [{"0"}, {"1"}, {"2"}, {"3"}]
    for read, opened in ranks:
        assert len(read) == len(set(read))
        assert opened < len(shards)


@pytest.mark.parametrize("size", ["30KB", "10GB"])
def test_one_file_or_many_give_the_same_picture(folder: Path, size: str) -> None:
    expected = paint(DiffusionPipeline.from_pretrained(folder))
    reshard(folder, size)
    assert torch.equal(paint(load(folder)), expected)


@pytest.mark.some
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "bf16"])
@pytest.mark.parametrize("name", tiny.MODELS)
def test_dtypes_are_those_of_diffusers(name: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    theirs = DiffusionPipeline.from_pretrained(folder, dtype=as_torch(dtype_name(dtype)))
    ours = load(folder, dtype=dtype)
    for part in ("transformer", "vae"):
        mine = {title: tensor.dtype for title, tensor in getattr(ours, part).state_dict().items()}
        assert mine == {title: tensor.dtype for title, tensor in getattr(theirs, part).state_dict().items()}
        buffers = dict(getattr(ours, part).named_buffers())
        for title, buffer in getattr(theirs, part).named_buffers():
            assert buffers[title].dtype == buffer.dtype, title
            assert torch.equal(buffers[title], buffer), title
    assert ours.transformer.training is False
    needed = {title: parameter.requires_grad for title, parameter in ours.transformer.named_parameters()}
    assert needed == {title: parameter.requires_grad for title, parameter in theirs.transformer.named_parameters()}


@pytest.mark.parametrize("name", ["sd3", "pixart-sigma"])
def test_half_precision_is_exact_at_the_size_a_model_knows_its_positions_for(name: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path)
    arguments = tiny.call_arguments(name, height=64, width=64, steps=2) | {"output_type": "latent"}
    made = []
    for pipe in (DiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16), load(folder, dtype="bf16")):
        made.append(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images)
    assert torch.equal(*made)


def test_a_variant_is_found_by_its_name(folder: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    expected = paint(pipe)
    variant = folder.with_name("variant")
    pipe.save_pretrained(variant, variant="fp16")
    assert torch.equal(paint(load(variant, variant="fp16", dtype="float16")), expected)
    with pytest.raises(FileNotFoundError, match=r"holds no weights of the default variant; it has .*fp16"):
        load(variant)


def test_components_can_be_given(folder: Path) -> None:
    scheduler = DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    assert load(folder, scheduler=scheduler).scheduler is scheduler


# ---------------------------------------------------------------------------------- what is broken


def test_a_missing_shard_is_named(folder: Path) -> None:
    shards = reshard(folder, "30KB")
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"lacks the shard {shards[1].name}.*fetch the model again"):
        load(folder)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "transformer" / f"{STEM}.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=f"{path.name} is damaged or not a safetensors file"):
        load(folder)


def test_a_truncated_shard_is_named_on_the_rank_that_reads_it(folder: Path) -> None:
    for path in reshard(folder, "30KB"):
        path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ValueError, match=r"diffusion_pytorch_model-0000.* is damaged"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda weights: weights.popitem(), "lack .*: the checkpoint is incomplete or belongs to another"),
        (
            lambda weights: weights.update({"proj_out.weight": torch.zeros(3, 3)}),
            r"proj_out.weight is \(3, 3\) in .* but \(16, 32\) by the model's config.json",
        ),
    ],
)
def test_weights_that_do_not_fit_are_refused(folder: Path, change: Any, text: str) -> None:
    path = folder / "transformer" / f"{STEM}.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    with pytest.raises(ValueError, match=text):
        load(folder)


def test_pickled_weights_are_refused(folder: Path) -> None:
    path = folder / "transformer" / f"{STEM}.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(FileNotFoundError, match="holds only pickled weights"):
        load(folder)


def test_a_folder_that_is_no_pipeline_is_refused(folder: Path) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=r"has no model_index\.json"):
        load(folder / "transformer")
    with pytest.raises(FileNotFoundError, match="no folder"):
        load(folder / "nothing" / "here")
    (folder / "transformer" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"lacks transformer/config\.json"):
        load(folder)


@pytest.mark.parametrize(
    ("entry", "value", "text"),
    [
        ("transformer", ["diffusers", "LatteTransformer3DModel"], "Latte.* has no plan.*adding-a-model"),
        ("transformer", [None, None], "has no transformer"),
        ("_class_name", "PipelineOfTomorrow", "has no pipeline class PipelineOfTomorrow: upgrade it"),
    ],
)
def test_a_pipeline_that_cannot_be_spread_says_why(folder: Path, entry: str, value: Any, text: str) -> None:
    path = folder / "model_index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), entry: value}))
    with pytest.raises(UnsupportedModel, match=text):
        load(folder)


def test_a_wrong_dtype_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype='float12' is unknown: use bf16, fp16 or fp32"):
        load(folder, dtype="float12")
    assert dtype_name("torch.bfloat16") == "bfloat16"


def offline(_place: Place) -> str:
    import os

    os.environ["HF_HUB_OFFLINE"] = "1"
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    with pytest.raises(FileNotFoundError) as caught:
        load("nobody/has-this-model")
    return str(caught.value)


def test_a_hub_id_without_network_is_one_clear_message() -> None:
    text = run_ranks(1, offline, timeout=60)[0]
    assert "nobody/has-this-model" in text
    assert "\n" not in text
