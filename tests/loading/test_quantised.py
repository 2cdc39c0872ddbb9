"""Quantised weights: what plain diffusers paints with the same recipe, or one error that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

import patchpipe
from patchpipe import Engine, OffloadConfig, ParallelConfig
from patchpipe.config import AutoLayout
from patchpipe.loading import checkpoint
from patchpipe.loading import folder as folders
from patchpipe.loading.precheck import check_folder, quantised
from patchpipe.loading.quantised import stored_bytes, without_tensor
from patchpipe.offload.ring import aligned
from patchpipe.planner.work.describe import describe_model
from tests import tiny
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

pytestmark = pytest.mark.timeout(180)

ONE = ParallelConfig(patches=2, warmup="all", timeout=60)
TWO = ParallelConfig(pipefusion=2, patches=2, warmup="all", timeout=60)
CALL = tiny.call_arguments("sd3", steps=2)


def torchao() -> Any:
    pytest.importorskip("torchao")
    from diffusers import TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto() -> Any:
    pytest.importorskip("optimum.quanto")
    from diffusers import QuantoConfig

    return QuantoConfig(weights_dtype="int8")


RECIPES = pytest.mark.parametrize("recipe", [torchao, quanto])


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd3", tmp_path_factory.mktemp("saved") / "sd3")


def of_transformer(recipe: Callable[[], Any]) -> PipelineQuantizationConfig:
    return PipelineQuantizationConfig(quant_mapping={"transformer": recipe()})


def latents(pipe: Any) -> torch.Tensor | None:
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**CALL, output_type="latent", generator=torch.Generator().manual_seed(0))
    return None if made is None else made.images


def spread(folder: Path, config: ParallelConfig, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """The picture of a layout, and the bytes of weights each rank holds of the blocks."""

    def rank(place: Place) -> tuple[torch.Tensor | None, int]:
        pipe = patchpipe.from_pretrained(folder, config, group=place.join(config), **options)
        return latents(pipe), held(pipe.transformer.transformer_blocks)

    ranks = run_threads(config.world_size, rank)
    return next(made for made, _ in ranks if made is not None), [size for _, size in ranks]


def held(module: Any) -> int:
    """Bytes of a module's weights on this rank."""
    return sum(stored_bytes(one) for one in module.parameters() if one.device.type != "meta")


@RECIPES
@pytest.mark.parametrize("name", tiny.MODELS)
def test_a_quantised_pipeline_is_that_of_diffusers(recipe: Callable[[], Any], name: str, tmp_path: Path) -> None:
    asked = of_transformer(recipe)
    folder = tiny.save(name, tmp_path)
    arguments = tiny.call_arguments(name, steps=2) | {"output_type": "latent"}
    made = []
    for pipe in (
        DiffusionPipeline.from_pretrained(folder, quantization_config=asked, dtype=torch.float32),
        patchpipe.from_pretrained(folder, ONE, quantization_config=asked),
        DiffusionPipeline.from_pretrained(folder),
    ):
        pipe.set_progress_bar_config(disable=True)
        made.append(pipe(**arguments, generator=torch.Generator().manual_seed(0)).images)
    theirs, ours, whole = made
    assert torch.equal(ours, theirs)
    assert not torch.equal(whole, theirs)


@RECIPES
def test_a_rank_quantises_what_it_owns(recipe: Callable[[], Any], saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = of_transformer(recipe)
    most: list[int] = []
    read = checkpoint.Checkpoint.read

    def watched(self: Any, names: Any) -> Any:
        found = read(self, names)
        most.append(sum(tensor.nbytes for tensor in found.values()))
        return found

    monkeypatch.setattr(checkpoint.Checkpoint, "read", watched)
    expected = DiffusionPipeline.from_pretrained(saved, quantization_config=asked, dtype=torch.float32)
    made, sizes = spread(saved, TWO, quantization_config=asked)
    assert torch.equal(made, latents(expected))
    whole = held(expected.transformer.transformer_blocks)
    assert sum(sizes) == whole
    assert max(sizes) < 0.6 * whole
    assert whole < 0.5 * held(tiny.pipeline("sd3").transformer.transformer_blocks)
    assert max(most) < 0.3 * sum(file.stat().st_size for file in (saved / "transformer").glob("*.safetensors"))


@RECIPES
@pytest.mark.parametrize(
    "layout",
    [
        {"pipefusion": 2, "patches": 3, "warmup": 1},
        {"ulysses": 2, "warmup": 1},
        {"ring": 2, "warmup": 1},
        {"distrifusion": 2, "warmup": 1},
        {"cfg": 2, "warmup": 1},
    ],
    ids=lambda layout: next(iter(layout)),
)
def test_layouts_with_quantised_weights_paint_what_they_paint_in_memory(
    recipe: Callable[[], Any], layout: dict[str, Any], saved: Path
) -> None:
    """Loaded in parts or parallelised whole: the same to the bit, and near what one device paints."""
    asked, config = of_transformer(recipe), ParallelConfig(**layout, split_batch=False, timeout=60)
    loaded, _ = spread(saved, config, quantization_config=asked)

    def rank(place: Place) -> torch.Tensor | None:
        with folders.BUILDING:
            pipe = DiffusionPipeline.from_pretrained(saved, quantization_config=asked, dtype=torch.float32)
        return latents(patchpipe.parallelize(pipe, config, group=place.join(config)))

    in_memory = next(made for made in run_threads(config.world_size, rank) if made is not None)
    assert torch.equal(loaded, in_memory)


def stored(recipe: Callable[[], Any], saved: Path, folder: Path) -> Path:
    """The pipeline with a transformer that is quantised on disk, in several files."""
    shutil.copytree(saved, folder)
    pipe = DiffusionPipeline.from_pretrained(saved, quantization_config=of_transformer(recipe), dtype=torch.float32)
    shutil.rmtree(folder / "transformer")
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size="30KB")
    return folder


def test_a_checkpoint_that_is_stored_quantised(saved: Path, tmp_path: Path) -> None:
    folder = stored(torchao, saved, tmp_path / "stored")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 2
    assert quantised(folder, {})
    expected = latents(DiffusionPipeline.from_pretrained(folder, dtype=torch.float32))
    made, sizes = spread(folder, TWO)
    assert torch.equal(made, expected)
    told, whole = describe_model(folder, TWO), describe_model(saved, TWO)
    assert told.dtype == "float32, quantised by torchao"
    assert all(less.bytes < size.bytes for less, size in zip(told.stages, whole.stages, strict=True))
    assert max(sizes) < 0.6 * sum(sizes)


def test_quanto_in_a_checkpoint_is_refused(saved: Path, tmp_path: Path) -> None:
    folder = stored(quanto, saved, tmp_path / "stored")
    for start in (
        lambda: patchpipe.from_pretrained(folder, ONE),
        lambda: Engine(folder, TWO, devices="cpu"),
        lambda: patchpipe.parallelize(DiffusionPipeline.from_pretrained(folder), ONE),
    ):
        with pytest.raises(ValueError, match=r"stored as quantised by quanto.* load the whole weights with"):
            start()


@RECIPES
def test_parallelize_of_a_quantised_pipeline_is_bit_equal(recipe: Callable[[], Any], saved: Path) -> None:
    pipe = DiffusionPipeline.from_pretrained(saved, quantization_config=of_transformer(recipe), dtype=torch.float32)
    expected = latents(pipe)
    assert torch.equal(latents(patchpipe.parallelize(pipe, ONE)), expected)
    assert torch.equal(latents(patchpipe.restore(pipe)), expected)


def test_weights_quantised_in_place_by_torchao(saved: Path) -> None:
    ao = pytest.importorskip("torchao.quantization")
    pipe = tiny.pipeline("sd3")
    ao.quantize_(pipe.transformer, ao.Int8WeightOnlyConfig())
    expected = latents(pipe)
    assert torch.equal(latents(patchpipe.parallelize(pipe, ONE)), expected)
    patchpipe.restore(pipe)
    with pytest.raises(ValueError, match="tensor=2 would split matrices quantised by torchao"):
        patchpipe.parallelize(pipe, ParallelConfig(tensor=2))


def test_text_encoders_are_quantised_where_they_are_held(saved: Path) -> None:
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig as OfTransformers

    def asked() -> PipelineQuantizationConfig:
        config = OfTransformers(Int8WeightOnlyConfig())
        return PipelineQuantizationConfig(quant_mapping={"transformer": torchao(), "text_encoder_3": config})

    expected = latents(DiffusionPipeline.from_pretrained(saved, quantization_config=asked(), dtype=torch.float32))
    made, _ = spread(saved, TWO, quantization_config=asked())
    assert torch.equal(made, expected)
    from_host, _ = spread(saved, replace(TWO, text_rank="host"), quantization_config=asked())
    assert torch.equal(from_host, expected), "copied to the device as they are"
    assert not torch.equal(made, spread(saved, TWO, quantization_config=of_transformer(torchao))[0])


def test_the_engine_quantises(saved: Path) -> None:
    asked = of_transformer(torchao)
    expected = latents(DiffusionPipeline.from_pretrained(saved, quantization_config=asked, dtype=torch.float32))
    with Engine(saved, TWO, devices="cpu", threads=1, quantization_config=asked) as engine:
        generator = torch.Generator().manual_seed(0)
        assert torch.equal(engine(generator=generator, output_type="latent", **CALL), expected)
        sizes = [rank.bytes for rank in engine.ranks]
    with Engine(saved, TWO, devices="cpu", threads=1) as engine:
        assert all(less.bytes > size for less, size in zip(engine.ranks, sizes, strict=True))


# -- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"load_in_4bit": True}, "quantised by bitsandbytes, which is not tested in parts .torchao and quanto are.*"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised by bitsandbytes.*use TorchAoConfig"),
        ({"quant_method": "gguf"}, "quantised by gguf.*from_single_file"),
        ({"quant_method": "modelopt"}, "quantised by modelopt.*use TorchAoConfig"),
    ],
)
def test_other_recipes_in_a_checkpoint_are_refused_by_name(
    saved: Path, tmp_path: Path, stored: dict[str, Any], words: str
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "stored"))
    file = folder / "transformer" / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) | {"quantization_config": stored}
    file.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(ValueError, match=words):
        patchpipe.from_pretrained(folder, ONE)
    with pytest.raises(ValueError, match=words):
        Engine(folder, TWO, devices="cpu")


def test_other_recipes_in_a_call_are_refused_by_name(saved: Path) -> None:
    from diffusers import BitsAndBytesConfig

    asked = PipelineQuantizationConfig(quant_mapping={"transformer": BitsAndBytesConfig(load_in_8bit=True)})
    for start in (patchpipe.from_pretrained, Engine):
        with pytest.raises(ValueError, match=r"asks for a transformer quantised by bitsandbytes.*use TorchAoConfig"):
            start(saved, TWO if start is Engine else ONE, quantization_config=asked)


@RECIPES
@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({"tensor": 2}, "tensor=2 would split matrices quantised by .*: use tensor=1, for example with pipefusion=2"),
        ({"compile": True}, "compile=True with weights quantised by .* is not tested: leave one of them out"),
    ],
    ids=["tensor", "compile"],
)
def test_layouts_that_do_not_go_with_it_are_refused(
    recipe: Callable[[], Any], layout: dict[str, Any], words: str, saved: Path
) -> None:
    asked = of_transformer(recipe)
    config = ParallelConfig(**layout)
    with pytest.raises(ValueError, match=words):
        check_folder(saved, config, {"quantization_config": asked})
    with pytest.raises(ValueError, match=words):
        Engine(saved, config, devices="cpu", quantization_config=asked)
    pipe = DiffusionPipeline.from_pretrained(saved, quantization_config=asked)
    with pytest.raises(ValueError, match=words):
        patchpipe.parallelize(pipe, config)


def test_the_planner_is_asked_for_no_layout_that_would_be_refused() -> None:
    methods = without_tensor(AutoLayout()).methods
    assert methods is not None
    assert "tensor" not in methods
    assert "pipefusion" in methods
    assert without_tensor(AutoLayout(methods=("tensor", "cfg"))).methods == ("cfg",)


def test_a_library_that_is_missing_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("it requires the quanto library (`pip install optimum-quanto`)")

    from diffusers import QuantoConfig
    from diffusers.quantizers.quanto import QuantoQuantizer

    monkeypatch.setattr(QuantoQuantizer, "validate_environment", missing)
    asked = PipelineQuantizationConfig(quant_mapping={"transformer": QuantoConfig()})
    with pytest.raises(ValueError, match=r"the transformer cannot be quantised here: .*pip install optimum-quanto"):
        patchpipe.from_pretrained(saved, ONE, quantization_config=asked)


def of_gguf(pipe: Any, kind: Any) -> dict[str, torch.Tensor]:
    """Leaves a transformer as ``from_single_file`` does: every Linear unpacks its weight when it is called."""
    import gguf
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    model, packed, biases = pipe.transformer, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module.in_features % 32 == 0:
            data = gguf.quants.quantize(module.weight.numpy(), kind)
            packed[f"{name}.weight"] = GGUFParameter(torch.from_numpy(data), quant_type=kind)
            biases[name] = module.bias
    _replace_with_gguf_linear(model, torch.float32, packed)
    for name, weight in packed.items():
        linear = model.get_submodule(name.removesuffix(".weight"))
        linear.weight, linear.bias = weight, biases[name.removesuffix(".weight")]
    model.is_quantized, model.quantization_method = True, "gguf"
    return packed


def test_a_transformer_read_from_gguf_is_bit_equal() -> None:
    gguf = pytest.importorskip("gguf")
    pipe = tiny.pipeline("sd3")
    of_gguf(pipe, gguf.GGMLQuantizationType.Q8_0)
    expected = latents(pipe)
    assert not torch.equal(expected, latents(tiny.pipeline("sd3")))
    assert torch.equal(latents(patchpipe.parallelize(pipe, ONE)), expected)
    patchpipe.restore(pipe)
    with pytest.raises(ValueError, match="tensor=2 would split matrices quantised by gguf"):
        patchpipe.parallelize(pipe, ParallelConfig(tensor=2))


# -- weights that come and go --------------------------------------------------------------------

OFFLOAD = OffloadConfig(resident=0.0, chunk=0.01)
FLUX = tiny.call_arguments("flux", steps=2) | {"output_type": "latent"}


def of_flux(pipe: Any) -> torch.Tensor | None:
    pipe.set_progress_bar_config(disable=True)
    made = pipe(**FLUX, generator=torch.Generator().manual_seed(0))
    return None if made is None else made.images


def flux_blocks(pipe: Any) -> list[torch.nn.Module]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


@pytest.mark.parametrize(("kind", "bits"), [("Q4_0", 4.5), ("Q4_1", 5.0), ("Q5_0", 5.5), ("Q8_0", 8.5)])
def test_gguf_weights_come_packed(kind: str, bits: float) -> None:
    gguf = pytest.importorskip("gguf")
    pipe = tiny.pipeline("flux")
    whole = {f"{name}.weight": one.weight.numel() for name, one in pipe.transformer.named_modules() if linear(one)}
    packed = of_gguf(pipe, gguf.GGMLQuantizationType[kind])
    expected = of_flux(pipe)
    assert not torch.equal(expected, of_flux(tiny.pipeline("flux")))
    patchpipe.parallelize(pipe, ParallelConfig(warmup="all", offload=OFFLOAD))
    assert torch.equal(of_flux(pipe), expected)
    told = pipe.patchpipe.offload.as_dict()
    in_blocks = {name: one for name, one in packed.items() if "transformer_blocks" in name}
    assert sum(one.nbytes for one in in_blocks.values()) == sum(whole[name] for name in in_blocks) * bits / 8
    passing = sum(aligned(one.nbytes) for block in flux_blocks(pipe) for one in block.parameters())
    assert told["streamed_bytes_per_pass"] == passing
    assert told["resident_bytes"] == 0
    passes = told["blocks"] // len(flux_blocks(pipe))
    assert 0 <= told["bytes"] - passes * passing <= told["depth"] * told["chunk_bytes"]
    patchpipe.restore(pipe)
    assert torch.equal(of_flux(pipe), expected)


def linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def test_gguf_weights_are_in_a_hosts_memory_once() -> None:
    gguf = pytest.importorskip("gguf")

    def rank(place: Place, offload: OffloadConfig | None) -> tuple[torch.Tensor | None, Any]:
        config = ParallelConfig(ulysses=2, warmup="all", timeout=60, offload=offload)
        with folders.BUILDING:
            pipe = tiny.pipeline("flux")
            of_gguf(pipe, gguf.GGMLQuantizationType.Q4_0)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        made = of_flux(pipe)
        return made, None if offload is None else pipe.patchpipe.offload.as_dict()

    right, found = (run_threads(2, rank, offload) for offload in (None, OFFLOAD))
    assert torch.equal(right[0][0], found[0][0])
    assert all(told["host_shared_bytes"] == told["host_bytes"] > 0 for _, told in found)


def nvfp4() -> Any:
    return pytest.importorskip("torchao.prototype.mx_formats.inference_workflow").NVFP4WeightOnlyConfig()


def intx() -> Any:
    return pytest.importorskip("torchao.quantization").IntxWeightOnlyConfig(weight_dtype=torch.int4)


@pytest.mark.parametrize(("recipe", "bits"), [(nvfp4, 4), (intx, 8)])
def test_four_bits_of_torchao_come_as_torchao_keeps_them(recipe: Callable[[], Any], bits: int) -> None:
    """Two in a byte, or each in a byte of its own; the scales come with them."""
    pipe = tiny.pipeline("flux")
    sizes = {name: one.numel() for name, one in pipe.transformer.named_parameters()}
    asked = recipe()
    pytest.importorskip("torchao.quantization").quantize_(pipe.transformer, asked)
    expected = of_flux(pipe)
    patchpipe.parallelize(pipe, ParallelConfig(warmup="all", offload=OFFLOAD))
    assert torch.equal(of_flux(pipe), expected)
    weights = [weight for block in pipe.patchpipe.offload._attached[0]._blocks for weight in block.weights]
    values = {weight.name: weight.plain[0].nbytes for weight in weights if len(weight.plain) > 1}
    assert len(values) > 10
    assert all(8 * size == bits * sizes[name] for name, size in values.items())
    patchpipe.restore(pipe)
