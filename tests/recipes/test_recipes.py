"""What people do to a pipeline before or after it is made parallel: right to the bit, or one error that names it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    FirstBlockCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    attention_backend,
)
from diffusers.hooks import SeaCacheConfig, TextKVCacheConfig
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.recipes.checks import check_recipes
from tests import tiny
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

HEIGHT = 112  # 7 rows of tokens
CUT = {"patch_rows": (3, 2, 2), "split_batch": False}
ALONE, EXACT, STREAM = {}, {**CUT, "warmup": "all"}, {**CUT, "warmup": 1}
CPU = torch.device("cpu")

Recipe = Callable[[Any], Any]


def setup_module() -> None:
    quieten()


def paint(pipe: Any, name: str, around: AbstractContextManager[Any] | None = None, **call: Any) -> torch.Tensor | None:
    arguments = {**tiny.call_arguments(name, height=HEIGHT), **call}
    with around or nullcontext():
        output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else tiny.painted(output)


def changed(name: str, recipe: Recipe) -> Any:
    """A pipeline to which the recipe was applied; one at a time, since new layers draw from a generator all share."""
    pipe = tiny.pipeline(name)
    with tiny._BUILDING:
        recipe(pipe)
    return pipe


def by_ranks(name: str, recipe: Recipe, layout: dict[str, Any], **call: Any) -> torch.Tensor:
    """What rank 0 paints."""
    config = ParallelConfig(**layout, timeout=30)

    def work(place: Place) -> torch.Tensor | None:
        pipe = changed(name, recipe)
        return paint(patchpipe.parallelize(pipe, config, group=place.join(config)), name, **call)

    return run_threads(config.world_size, work)[0]


def check_equal(name: str, recipe: Recipe, *layouts: dict[str, Any]) -> None:
    """Every exact layout paints what plain diffusers does, and streaming is the same on one rank and two."""
    expected = paint(changed(name, recipe), name)
    for layout in layouts:
        assert torch.equal(by_ranks(name, recipe, layout), expected), layout


# ------------------------------------------------------------------------------------ works


def hooked(pipe: Any) -> None:
    for block in (pipe.transformer.transformer_blocks[0], pipe.transformer.transformer_blocks[-1]):
        block.register_forward_hook(lambda _module, _args, output: tuple(each * 1.5 for each in output))


def own_processors(pipe: Any) -> None:
    kind = type(next(iter(pipe.transformer.attn_processors.values())))

    class Louder(kind):  # type: ignore[misc, valid-type]
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            result = super().__call__(*args, **kwargs)
            return tuple(each * 1.5 for each in result) if isinstance(result, tuple) else result * 1.5

    pipe.transformer.set_attn_processor(Louder())


def own_forward(pipe: Any) -> None:
    layer = pipe.transformer.transformer_blocks[0].attn
    compute = layer.forward
    layer.forward = lambda *args, **kwargs: tuple(each * 1.5 for each in compute(*args, **kwargs))


def cast(pipe: Any) -> None:
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)


def offloaded(pipe: Any, kind: str = "leaf_level") -> None:
    groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type=kind, **groups)


def sliced_vae(pipe: Any) -> None:
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    pipe.enable_attention_slicing()


WORKS: dict[str, Recipe] = {
    "forward hooks on blocks": hooked,
    "attention processors of one's own": own_processors,
    "an attention forward of one's own": own_forward,
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "layerwise casting": cast,
    "group offload of layers": offloaded,
    "group offload of blocks": partial(offloaded, kind="block_level"),
    "tiles and slices": sliced_vae,
    "torch's own attention": lambda pipe: pipe.transformer.set_attention_backend("native"),
    "channels last": lambda pipe: pipe.transformer.to(memory_format=torch.channels_last),
}


@pytest.mark.some(of=3)
@pytest.mark.parametrize("title", WORKS)
def test_recipes_before_parallelize_that_paint_the_same(title: str) -> None:
    recipe = WORKS[title]
    check_equal("flux", recipe, ALONE, EXACT, {"pipefusion": 2, **EXACT})
    alone, two = (by_ranks("flux", recipe, {"pipefusion": stages, **STREAM}) for stages in (1, 2))
    assert torch.equal(two, alone)


@pytest.mark.parametrize("title", ["forward hooks on blocks", "an attention forward of one's own", "layerwise casting"])
def test_recipes_are_still_there_after_restore(title: str) -> None:
    pipe = changed("flux", WORKS[title])
    expected = paint(pipe, "flux")
    patchpipe.restore(patchpipe.parallelize(pipe, ParallelConfig(**STREAM)))
    assert torch.equal(paint(pipe, "flux"), expected)


def test_inference_mode_around_the_call() -> None:
    expected = paint(tiny.pipeline("flux"), "flux")
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**EXACT))
    assert torch.equal(paint(pipe, "flux", torch.inference_mode()), expected)


# ------------------------------------------------------------------------------------ step caches


def cached(config: Callable[[Any], Any]) -> Recipe:
    return lambda pipe: pipe.transformer.enable_cache(config(pipe))


def timed(kind: Any, **options: Any) -> Callable[[Any], Any]:
    skipped = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 1000)}
    return lambda pipe: kind(**skipped, current_timestep_callback=lambda: pipe._current_timestep, **options)


ACROSS: dict[str, Recipe] = {
    "FirstBlockCache": cached(lambda _: FirstBlockCacheConfig(threshold=5.0)),
    "MagCache": cached(
        lambda _: MagCacheConfig(mag_ratios=torch.ones(4), num_inference_steps=4, threshold=0.5, retention_ratio=0.25)
    ),
    "SeaCache": cached(lambda _: SeaCacheConfig()),
    "FasterCache": cached(timed(FasterCacheConfig, tensor_format="BCHW", is_guidance_distilled=True)),
}
WITHIN: dict[str, Recipe] = {
    "PyramidAttentionBroadcast": cached(timed(PyramidAttentionBroadcastConfig)),
    "TaylorSeerCache": cached(lambda _: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1)),
    "TextKVCache": cached(lambda _: TextKVCacheConfig()),
}


@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize("title", [*ACROSS, *WITHIN])
def test_step_caches_are_right_where_every_step_is_whole(title: str) -> None:
    stages = [{"pipefusion": 2, **EXACT}] if title in WITHIN else []
    check_equal("flux", (ACROSS | WITHIN)[title], ALONE, EXACT, *stages)


FRAMES = {"patch_rows": (2, 3), "split_batch": False, "warmup": "all"}
FAMILY_CACHES = {  # those that plain diffusers itself runs with the tiny pipeline
    "qwen": ("FirstBlockCache", "MagCache", "SeaCache", "TaylorSeerCache"),
    "wan": ("FirstBlockCache", "MagCache", "SeaCache", "PyramidAttentionBroadcast"),
}


@pytest.mark.some(of=2)
@pytest.mark.parametrize(("name", "title"), [(name, title) for name, each in FAMILY_CACHES.items() for title in each])
def test_step_caches_of_other_families_are_right_where_every_step_is_whole(name: str, title: str) -> None:
    """They guide by two calls a step, each of which has its own results."""
    whole = FRAMES if name == "wan" else EXACT
    stages = [{"pipefusion": 2, **whole}] if title in WITHIN else []
    check_equal(name, (ACROSS | WITHIN)[title], ALONE, whole, *stages)
    with pytest.raises(ValueError, match=f"^{title} keeps"):
        check_recipes(changed(name, (ACROSS | WITHIN)[title]), ParallelConfig(**{**whole, "warmup": 1}))


@pytest.mark.some(of=2)
@pytest.mark.parametrize("title", [*ACROSS, *WITHIN])
def test_step_caches_are_refused_by_name_elsewhere(title: str) -> None:
    layouts = [STREAM, {"pipefusion": 2, **STREAM}, {"cfg": 2, **EXACT}, {"ulysses": 2, **EXACT}, {"tensor": 2}]
    layouts += [{"pipefusion": 2, **EXACT}] if title in ACROSS else []
    for layout in layouts:
        config = ParallelConfig(**layout, timeout=30)
        with pytest.raises(ValueError, match=rf"^{title} keeps .* not right with .*: call pipe\.transformer\.disable"):
            check_recipes(changed("flux", (ACROSS | WITHIN)[title]), config)


def test_a_step_cache_enabled_afterwards_is_noticed_by_all_ranks_and_taken_back() -> None:
    config = ParallelConfig(pipefusion=2, **STREAM, timeout=30)
    expected = by_ranks("flux", lambda _: None, {"pipefusion": 2, **STREAM})

    def work(place: Place) -> torch.Tensor | None:
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        for title in ("FirstBlockCache", "TaylorSeerCache", "MagCache"):
            (ACROSS | WITHIN)[title](pipe)
            with pytest.raises(ValueError, match=f"^{title} keeps"):
                paint(pipe, "flux")
            pipe.transformer.disable_cache()
        return paint(pipe, "flux")

    assert torch.equal(run_threads(2, work)[0], expected)


@pytest.mark.parametrize("title", ["fused projections", "layerwise casting", "attention processors of one's own"])
def test_recipes_after_parallelize_that_paint_the_same(title: str) -> None:
    config = ParallelConfig(pipefusion=2, **EXACT, timeout=30)
    expected = paint(changed("flux", WORKS[title]), "flux")

    def work(place: Place) -> torch.Tensor | None:
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        with tiny._BUILDING:
            WORKS[title](pipe)
        made = paint(pipe, "flux")
        assert torch.equal(paint(patchpipe.restore(pipe), "flux"), expected)
        return made

    assert torch.equal(run_threads(2, work)[0], expected)


# ------------------------------------------------------------------------------------ one file, compiled


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan"])
def test_a_transformer_from_one_file_is_served(name: str, tmp_path: Path) -> None:
    folder, pipe = tiny.save(name, tmp_path / name), tiny.pipeline(name)
    file, kind = folder / "transformer" / "diffusion_pytorch_model.safetensors", type(pipe.transformer)
    config = ParallelConfig(pipefusion=2, **(FRAMES if name == "wan" else EXACT), timeout=30)
    parts = [kind.from_single_file(str(file), config=str(folder), subfolder="transformer") for _ in range(2)]

    def work(place: Place) -> torch.Tensor | None:
        group, transformer = place.join(config), parts[place.rank]
        return paint(patchpipe.from_pretrained(folder, config, group=group, transformer=transformer), name)

    assert torch.equal(run_threads(2, work)[0], paint(pipe, name))


def test_compiled_blocks_of_a_clip_are_refused() -> None:
    pipe = tiny.pipeline("wan")
    with pytest.raises(
        ValueError, match=r"compile=True has not been tested with WanTransformer3DModel .*compile=False"
    ):
        patchpipe.parallelize(pipe, ParallelConfig(compile=True))


# ------------------------------------------------------------------------------------ refused by name


def offloaded_by_model(pipe: Any) -> None:
    pipe.enable_model_cpu_offload(device="cpu")


def compiled(pipe: Any) -> None:
    pipe.transformer = torch.compile(pipe.transformer, backend="eager")


REFUSED: dict[str, tuple[Recipe, str]] = {
    "torch.compile": (compiled, r"^torch\.compile\(pipe\.transformer\).* use ParallelConfig\(compile=True\)"),
    "compile": (
        lambda pipe: pipe.transformer.compile(backend="eager"),
        r"^pipe\.transformer\.compile\(\).* use ParallelConfig\(compile=True\)",
    ),
    "compile_repeated_blocks": (
        lambda pipe: pipe.transformer.compile_repeated_blocks(backend="eager"),
        r"compile_repeated_blocks\(\).* use ParallelConfig\(compile=True\)",
    ),
    "model offload": (offloaded_by_model, r"^enable_model_cpu_offload\(\).*use patchpipe\.from_pretrained"),
}


def test_weights_of_nunchaku_are_refused_by_name() -> None:
    """Its classes derive from those of diffusers, whose plans do not fit what its kernels do."""
    pipe = tiny.pipeline("flux")
    block = pipe.transformer.transformer_blocks[0]
    block.ff.__class__ = type("FusedMLP", (type(block.ff),), {"__module__": "nunchaku.models.ffn"})
    for layout in (ParallelConfig(), ParallelConfig(patches=2)):
        with pytest.raises(ValueError, match=r"quantised by nunchaku, which is not tested .* its kernels are not cut"):
            patchpipe.parallelize(pipe, layout)


@pytest.mark.parametrize("title", REFUSED)
def test_recipes_before_parallelize_that_are_refused(title: str) -> None:
    recipe, message = REFUSED[title]
    pipe = changed("flux", recipe)
    with pytest.raises(ValueError, match=message):
        patchpipe.parallelize(pipe, ParallelConfig())


def test_the_same_afterwards_is_refused_at_the_next_call() -> None:
    for title in ("torch.compile", "compile", "compile_repeated_blocks"):
        recipe, message = REFUSED[title]
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**STREAM))
        recipe(pipe)
        with pytest.raises(ValueError, match=message):
            paint(pipe, "flux")
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**STREAM))
    for offload in (pipe.enable_model_cpu_offload, pipe.enable_sequential_cpu_offload):
        with pytest.raises(ValueError, match="cannot be offloaded model by model"):
            offload(device="cpu")
    assert paint(pipe, "flux") is not None


def test_autocast_around_the_call_is_refused_and_leaves_the_pipeline_usable() -> None:
    config = ParallelConfig(pipefusion=2, **EXACT, timeout=30)
    expected = paint(tiny.pipeline("flux"), "flux")

    def work(place: Place) -> torch.Tensor | None:
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        with pytest.raises(ValueError, match=r"^torch\.autocast around the call .* load the pipeline in that dtype"):
            paint(pipe, "flux", torch.autocast("cpu", torch.bfloat16))
        return paint(pipe, "flux")

    assert torch.equal(run_threads(2, work)[0], expected)


def test_another_dtype_or_transformer_after_parallelize_is_refused() -> None:
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**STREAM))
    pipe.transformer.double()
    with pytest.raises(ValueError, match=r"was torch\.float32 when .*, and is torch\.float64 now"):
        paint(pipe, "flux")
    pipe.transformer.float()
    mine, pipe.transformer = pipe.transformer, tiny.pipeline("flux").transformer
    with pytest.raises(ValueError, match="is another model than when the pipeline was made parallel"):
        paint(pipe, "flux")
    pipe.transformer = mine
    assert paint(pipe, "flux") is not None


def test_attention_that_hides_its_keys_is_refused_where_patches_need_them() -> None:
    expected = paint(tiny.pipeline("flux"), "flux", attention_backend("flex"))
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**EXACT))
    assert torch.equal(paint(pipe, "flux", attention_backend("flex")), expected)
    pipe = patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(**STREAM))
    with pytest.raises(
        ValueError, match=r"attention backend other than torch's own .*set_attention_backend\('native'\)"
    ):
        paint(pipe, "flux", attention_backend("flex"))
    old = changed("pixart", lambda pipe: pipe.transformer.set_attn_processor(AttnProcessor()))
    with pytest.raises(ValueError, match=r"old attention processor .*set_default_attn_processor"):
        patchpipe.parallelize(old, ParallelConfig(**STREAM))


def test_casting_and_offloading_are_refused_where_matrices_are_split() -> None:
    for recipe, name in ((cast, "enable_layerwise_casting"), (offloaded, "enable_group_offload")):
        for layout in ({"tensor": 2}, {"compile": True}):
            with pytest.raises(ValueError, match=rf"^{name}\(\) .* use tensor=1 and compile=False"):
                check_recipes(changed("flux", recipe), ParallelConfig(**layout))


def test_an_ip_adapter_that_no_test_runs_is_refused_by_name() -> None:
    """That of another class; or one whose processors are not there."""
    other = tiny.pipeline("qwen")
    other.transformer.transformer_blocks[0].attn.processor = FluxIPAdapterAttnProcessor(2, 2)
    pipe = tiny.pipeline("flux")
    pipe.transformer.encoder_hid_proj = torch.nn.Linear(2, 2)
    for given in (other, pipe):
        with pytest.raises(ValueError, match=r"^an IP-Adapter that is not tested .* call pipe\.unload_ip_adapter\(\)"):
            patchpipe.parallelize(given, ParallelConfig())
