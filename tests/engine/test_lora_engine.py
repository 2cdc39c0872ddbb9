"""LoRA through the engine and the command line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from patchpipe import Engine, ParallelConfig
from patchpipe.cli.loras import Lora, read_loras
from patchpipe.config import PLAIN
from patchpipe.engine.loras import describe_lora
from tests import tiny
from tests.support.ranks import quieten
from tests.tiny import loras

HEIGHT = 112


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, two LoRAs for it, and one for nothing."""
    root = tmp_path_factory.mktemp("engine")
    pipe = tiny.pipeline("flux")
    for seed in (1, 2):
        loras.save(pipe, root / f"lora-{seed}", seed=seed)
    loras.save(tiny.pipeline("qwen"), root / "foreign", takes=lambda name: "img_mod" in name)
    pipe.save_pretrained(root / "model")
    return root


def plain(root: Path, strengths: dict[str, float]) -> torch.Tensor:
    pipe = tiny.pipeline("flux")
    for name in strengths:
        pipe.load_lora_weights(root / name, adapter_name=name.replace("-", "_"))
    if strengths:
        pipe.set_adapters([name.replace("-", "_") for name in strengths], list(strengths.values()))
    arguments = tiny.call_arguments("flux", height=HEIGHT, steps=2)
    return pipe(**arguments, generator=torch.Generator().manual_seed(3), output_type="latent").images


@pytest.mark.parametrize("config", [ParallelConfig(pipefusion=2, warmup="all", patches=2, timeout=60), PLAIN])
def test_load_and_unload(config: ParallelConfig, folder: Path) -> None:
    arguments = {**tiny.call_arguments("flux", height=HEIGHT, steps=2), "seed": 3, "output_type": "latent"}
    with Engine(folder / "model", config, devices="cpu", threads=1) as engine:
        assert engine.load_lora(folder / "lora-1", scale=0.5) == "lora_1"
        assert torch.equal(engine(**arguments), plain(folder, {"lora-1": 0.5}))
        engine.load_lora(str(folder / "lora-2" / loras.FILE), name="two")
        assert engine.loras == {"lora_1": 0.5, "two": 1.0}
        both = plain(folder, {"lora-1": 0.5, "lora-2": 1.0})
        assert torch.equal(engine(**arguments), both)
        with pytest.raises(ValueError, match="holds no weights for any layer of this pipeline"):
            engine.load_lora(folder / "foreign")
        with pytest.raises(ValueError, match=r"there is no LoRA 'three': loaded are 'lora_1', 'two'"):
            engine.unload_lora("three")
        assert torch.equal(engine(**arguments), both)
        engine.unload_lora("lora_1")
        assert torch.equal(engine(**arguments), plain(folder, {"lora-2": 1.0}))
        engine.unload_lora()
        assert torch.equal(engine(**arguments), plain(folder, {}))


def test_what_cannot_be_a_lora_is_refused_before_any_worker_hears_of_it(folder: Path) -> None:
    for path, message in ((folder, "holds no weights"), (folder / "none", "there is no LoRA")):
        with pytest.raises(FileNotFoundError, match=message):
            describe_lora(path, None, None, 1.0, {})
    with pytest.raises(FileNotFoundError, match=rf"holds no other\.safetensors; it has {loras.FILE}"):
        describe_lora(folder / "lora-1", "other.safetensors", None, 1.0, {})
    for name, scale, message in (("a.b", 1.0, "cannot name"), ("one", 1.0, "loaded already"), (None, "x", "a number")):
        with pytest.raises(ValueError, match=message):
            describe_lora(folder / "lora-1", None, name, scale, {"one": 1.0})  # type: ignore[arg-type]
    assert describe_lora(folder / "lora-1", None, None, 1.0, {"lora_1": 1.0}).name == "lora_1_2"


def test_the_command_line_reads_paths_with_colons(folder: Path) -> None:
    odd = loras.save(tiny.pipeline("flux"), folder / "style:2", takes=lambda name: name == "proj_out")
    assert read_loras([str(odd), f"{odd}:0.5", f"{folder}/lora-1:0.8", "owner/name:-1"]) == (
        Lora(str(odd)),
        Lora(str(odd), 0.5),
        Lora(str(folder / "lora-1"), 0.8),
        Lora("owner/name", -1.0),
    )
    with pytest.raises(ValueError, match="there is no such path, and 'strong' is no strength"):
        read_loras([f"{odd}:strong"])
    with pytest.raises(FileNotFoundError, match="there is no LoRA"):
        read_loras([f"{folder}/none:0.5"])
