"""LoRA paints what plain diffusers paints with it, whatever the layout, loaded before or after."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models.lora import adapted_layers
from patchpipe.pipeline.pretrained import from_pretrained
from patchpipe.stage import compiling
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.threads import run_threads
from tests.tiny import loras

NAMES = ("flux", "sd3", "qwen")  # the others' pipelines take no LoRA
KWARGS = {"flux": "joint_attention_kwargs", "sd3": "joint_attention_kwargs", "qwen": "attention_kwargs"}
HEIGHT = 112  # 7 rows of tokens
STREAM = {"patch_rows": (3, 2, 2), "warmup": 1, "split_batch": False}
EXACT = {"patch_rows": (3, 2, 2), "warmup": "all", "split_batch": False}
SUMS = 1e-5  # float32, sums in another order
_injecting = tiny._BUILDING  # while peft makes layers without memory, so are all that other threads make

Recipe = Callable[[Any], None]


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A LoRA of each kind for each model, in one folder each."""
    root, found = tmp_path_factory.mktemp("loras"), {}
    for name in NAMES:
        pipe = tiny.pipeline(name)
        text = name != "qwen"  # its loader knows the transformer alone
        found[name] = loras.save(pipe, root / name, text=text)
        found[f"{name}/other"] = loras.save(pipe, root / f"{name}-other", seed=2)
        found[f"{name}/head"] = loras.save(pipe, root / f"{name}-head", takes=lambda path: path == "proj_out")
        found[f"{name}/first"] = loras.save(pipe, root / f"{name}-first", takes=lambda path: "_blocks.0.attn" in path)
    found["none"] = loras.save(tiny.pipeline("sd3"), root / "none", takes=lambda path: "norm1" in path)
    return found


def paint(pipe: Any, name: str, scale: float | None = None, **options: Any) -> torch.Tensor | None:
    strength = {} if scale is None else {KWARGS[name]: {"scale": scale}}
    arguments = {**tiny.call_arguments(name, height=HEIGHT, steps=3), **strength, **options}
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images


def plain(name: str, recipe: Recipe, **call: Any) -> torch.Tensor:
    pipe = tiny.pipeline(name)
    recipe(pipe)
    made = paint(pipe, name, **call)
    assert made is not None
    return made


def on_ranks(count: int, layout: dict[str, Any], work: Callable[[Place, ParallelConfig], Any]) -> list[Any]:
    config = ParallelConfig(**layout, timeout=60)
    assert config.world_size == count
    return run_threads(count, work, config)


def parallel(
    name: str, layout: dict[str, Any], before: Recipe | None = None, after: Recipe | None = None, **call: Any
) -> torch.Tensor:
    """What rank 0 paints."""

    def work(place: Place, config: ParallelConfig) -> torch.Tensor | None:
        pipe = tiny.pipeline(name)
        with _injecting:
            if before is not None:
                before(pipe)
        patchpipe.parallelize(pipe, config, group=place.join(config))
        if after is not None:
            with _injecting:
                after(pipe)
        return paint(pipe, name, **call)

    return on_ranks(ParallelConfig(**layout).world_size, layout, work)[0]


def load(path: Path, pipe: Any, **options: Any) -> None:
    pipe.load_lora_weights(path, **options)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.some
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("name", NAMES)
def test_lora_loaded_before_or_after_is_bit_equal_to_plain_diffusers(
    name: str, when: str, files: dict[str, Path]
) -> None:
    recipe = partial(load, files[name])
    expected = plain(name, recipe)
    assert not torch.equal(expected, plain(name, lambda _: None)), "the LoRA changes nothing: nothing was tested"
    assert torch.equal(parallel(name, {**EXACT}, **{when: recipe}), expected)
    assert torch.equal(parallel(name, {"pipefusion": 2, **EXACT}, **{when: recipe}), expected)
    alone, two = (parallel(name, {"pipefusion": stages, **STREAM}, **{when: recipe}) for stages in (1, 2))
    assert torch.equal(two, alone)
    assert not torch.equal(two, expected), "no patch streamed: nothing was tested"


@pytest.mark.some(of=3)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.3, 0.0])
def test_strength_of_a_call(name: str, scale: float, files: dict[str, Path]) -> None:
    recipe = partial(load, files[name])
    expected = plain(name, recipe, scale=scale)
    assert not torch.equal(expected, plain(name, recipe))
    for layout in ({**EXACT}, {"pipefusion": 2, **EXACT}):
        assert torch.equal(parallel(name, layout, after=recipe, scale=scale), expected)
    alone, two = (parallel(name, {"pipefusion": n, **STREAM}, recipe, scale=scale) for n in (1, 2))
    assert torch.equal(two, alone)


def two_at_strengths(path: Path, other: Path, pipe: Any) -> None:
    pipe.load_lora_weights(path, adapter_name="one")
    pipe.load_lora_weights(other, adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.5, 0.25])


def fused(path: Path, pipe: Any) -> None:
    pipe.load_lora_weights(path)
    pipe.fuse_lora(lora_scale=0.5)


def fused_for_good(path: Path, pipe: Any) -> None:
    fused(path, pipe)
    pipe.unload_lora_weights()


def fused_and_back(path: Path, pipe: Any) -> None:
    fused(path, pipe)
    pipe.unfuse_lora()


def swapped(path: Path, other: Path, pipe: Any) -> None:
    pipe.load_lora_weights(path, adapter_name="hot")
    pipe.load_lora_weights(other, adapter_name="hot", hotswap=True)


def unloaded(path: Path, pipe: Any) -> None:
    pipe.load_lora_weights(path)
    pipe.unload_lora_weights()


def one_deleted(path: Path, other: Path, pipe: Any) -> None:
    two_at_strengths(path, other, pipe)
    pipe.delete_adapters("one")


def switched_off(path: Path, pipe: Any) -> None:
    pipe.load_lora_weights(path)
    pipe.disable_lora()


def switched_on_again(path: Path, pipe: Any) -> None:
    switched_off(path, pipe)
    pipe.enable_lora()


def by_the_model(path: Path, pipe: Any) -> None:
    pipe.transformer.load_lora_adapter(path, weight_name=loras.FILE, adapter_name="own")
    pipe.transformer.set_adapters("own", 0.5)


def recipes(files: dict[str, Path], name: str) -> dict[str, Recipe]:
    one, other = files[f"{name}/other"], files[name]
    both = {"two at strengths": two_at_strengths, "one deleted": one_deleted}
    alone = {
        "fused": fused, "fused for good": fused_for_good, "fused and back": fused_and_back, "unloaded": unloaded,
        "switched off": switched_off, "switched on again": switched_on_again, "by the model": by_the_model,
    }  # fmt: skip
    swap = {"swapped": partial(swapped, one, files[f"{name}/other"])}
    return {
        **{title: partial(recipe, one, other) for title, recipe in both.items()},
        **{title: partial(recipe, one) for title, recipe in alone.items()},
        **swap,
    }


TITLES = [
    "two at strengths", "one deleted", "fused", "fused for good", "fused and back", "unloaded", "switched off",
    "switched on again", "by the model", "swapped",
]  # fmt: skip


@pytest.mark.some(of=2)
@pytest.mark.parametrize("title", TITLES)
def test_every_method_of_diffusers_after_parallelize(title: str, files: dict[str, Path]) -> None:
    recipe = recipes(files, "flux")[title]
    expected = plain("flux", recipe)
    assert torch.equal(parallel("flux", {"pipefusion": 2, **EXACT}, after=recipe), expected)


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("title", TITLES)
def test_every_method_with_split_matrices(title: str, files: dict[str, Path]) -> None:
    recipe = recipes(files, "flux")[title]
    expected = plain("flux", recipe)
    for when in ("before", "after"):
        assert relative(parallel("flux", {"tensor": 2, **EXACT}, **{when: recipe}), expected) < SUMS, when


@pytest.mark.some(of=3)
@pytest.mark.parametrize("name", NAMES)
def test_lora_with_tensor_parallelism_and_stages(name: str, files: dict[str, Path]) -> None:
    recipe = partial(load, files[name])
    expected = plain(name, recipe, scale=0.5)
    made = parallel(name, {"tensor": 2, "pipefusion": 2, **EXACT}, after=recipe, scale=0.5)
    assert relative(made, expected) < SUMS
    assert relative(expected, plain(name, lambda _: None)) > 100 * SUMS


def painted_by_what_it_holds(
    place: Place, folder: Path, layout: dict[str, Any], files: dict[str, Path]
) -> dict[str, Any]:
    """Latents of every recipe on a rank that read only its own blocks."""
    found = {}
    every = {"loaded": partial(load, files["flux"]), **recipes(files, "flux")}
    every |= {f"{part} alone": partial(load, files[f"flux/{part}"]) for part in ("head", "first")}
    for title, recipe in every.items():
        config = ParallelConfig(**layout, timeout=60)
        pipe = from_pretrained(folder, config, device="cpu", group=place.join(config))
        pipe.set_progress_bar_config(disable=True)
        recipe(pipe)
        made = paint(pipe, "flux"), paint(pipe, "flux", scale=0.5)
        found[title] = [None if each is None else each.numpy() for each in made]  # a tensor would need this process
        patchpipe.restore(pipe)
        layers = [layer for part in (pipe.transformer, pipe.text_encoder) for layer in adapted_layers(part).values()]
        absent = [layer for layer in layers if layer.get_base_layer().weight.is_meta]
        if "pipefusion" in layout:
            assert absent or title != "loaded"
            assert all(parameter.is_meta for layer in absent for parameter in layer.parameters()), title
    return found


@pytest.mark.extra
@pytest.mark.parametrize("layout", [{"pipefusion": 2}, {"tensor": 2}])
def test_a_rank_that_has_only_its_own_blocks_keeps_only_their_lora(
    layout: dict[str, Any], files: dict[str, Path], tmp_path: Path
) -> None:
    """Also where the LoRA matches no layer of a stage, or blocks alone."""
    folder = tiny.save("flux", tmp_path / "flux")
    ranks = run_ranks(2, painted_by_what_it_holds, folder, {**layout, **EXACT}, files)
    for title, made in ranks[0].items():
        path, _, alone = title.partition(" ")
        recipe = partial(load, files[f"flux/{path}"]) if alone == "alone" else recipes(files, "flux").get(title)
        pipe = tiny.pipeline("flux")
        (recipe or partial(load, files["flux"]))(pipe)
        for scale, found in zip((None, 0.5), map(torch.from_numpy, made), strict=True):
            expected = paint(pipe, "flux", scale=scale)
            assert expected is not None
            assert torch.equal(found, expected) or ("tensor" in layout and relative(found, expected) < SUMS), title


def test_lora_that_matches_no_layer_is_one_error_and_changes_nothing(files: dict[str, Path]) -> None:
    pipe = tiny.pipeline("flux")
    expected = paint(pipe, "flux")
    patchpipe.parallelize(pipe, ParallelConfig(**EXACT))
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"holds no weights for any layer of this pipeline .*FluxTransformer2DModel"
        ):
            pipe.load_lora_weights(
                {f"transformer.no.such.{leaf}.weight": torch.ones(2, 2) for leaf in ("lora_A", "lora_B")}
            )
        with pytest.raises(ValueError, match="holds no weights for any layer"):
            pipe.load_lora_weights({f"unet.down.{leaf}.weight": torch.ones(2, 2) for leaf in ("lora_A", "lora_B")})
    assert torch.equal(paint(pipe, "flux"), expected)
    pipe.load_lora_weights(files["flux"])
    assert not torch.equal(paint(pipe, "flux"), expected)


def test_restored_with_its_lora(files: dict[str, Path]) -> None:
    """Blocks that a rank stands in for have the LoRA too, once the pipeline is whole again."""
    expected = plain("flux", partial(load, files["flux"]))
    without = plain("flux", lambda _: None)

    def work(place: Place, config: ParallelConfig) -> Any:
        pipe = tiny.pipeline("flux")
        patchpipe.parallelize(pipe, config, group=place.join(config))
        with _injecting:
            pipe.load_lora_weights(files["flux"])
        patchpipe.restore(pipe)
        first = paint(pipe, "flux")
        pipe.unload_lora_weights()
        return first, paint(pipe, "flux")

    for layout in ({"pipefusion": 2, **EXACT}, {"tensor": 2, **EXACT}):
        for first, second in on_ranks(2, layout, work):
            assert torch.equal(first, expected)
            assert torch.equal(second, without)


def test_adapters_changed_in_a_callback_hold_from_the_next_step_on(files: dict[str, Path]) -> None:
    def on_step(pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            with _injecting:
                pipe.set_adapters("one", 0.25)
        return values

    recipe = partial(load, files["flux"], adapter_name="one")
    expected = plain("flux", recipe, callback_on_step_end=on_step)
    assert not torch.equal(expected, plain("flux", recipe))
    made = parallel("flux", {"pipefusion": 2, **EXACT}, recipe, callback_on_step_end=on_step)
    assert torch.equal(made, expected)


def test_requests_in_flight_together_keep_their_own_strength(files: dict[str, Path]) -> None:
    pipe = tiny.pipeline("flux")
    pipe.load_lora_weights(files["flux"])
    arguments = tiny.call_arguments("flux", height=HEIGHT, steps=3)
    calls = [
        {
            **arguments,
            KWARGS["flux"]: {"scale": scale},
            "generator": torch.Generator().manual_seed(0),
            "output_type": "latent",
        }
        for scale in (0.25, 1.0, 0.5)
    ]
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    alone = [paint(pipe, "flux", scale=scale) for scale in (0.25, 1.0, 0.5)]
    made = [output.images for output in pipe.patchpipe.together(calls)]
    assert all(torch.equal(*pair) for pair in zip(made, alone, strict=True))

    def on_step(own: Any, *_: Any) -> dict[str, Any]:
        own.set_adapters("default_0", 0.5)
        return {}

    with pytest.raises(RuntimeError, match="set_adapters would change the adapters of all requests in flight"):
        pipe.patchpipe.together([{**calls[0], "callback_on_step_end": on_step}, calls[1]])


def test_dora_is_refused_by_name_where_matrices_are_split(files: dict[str, Path]) -> None:
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["to_q"], use_dora=True)

    def work(place: Place, layout: ParallelConfig) -> None:
        pipe = tiny.pipeline("flux")
        before = paint(pipe, "flux")
        patchpipe.parallelize(pipe, layout, group=place.join(layout))
        with _injecting, pytest.raises(ValueError, match=r"attn\.to_q is Dora, not plain LoRA.* use tensor=1"):
            pipe.transformer.add_adapter(config)
        after = paint(pipe, "flux")
        assert after is None or relative(after, before) < SUMS
        patchpipe.restore(pipe)
        pipe.transformer.add_adapter(config)
        with pytest.raises(ValueError, match=r"is Dora, not plain LoRA"):
            patchpipe.parallelize(pipe, layout, group=place.join(layout))

    on_ranks(2, {"tensor": 2, **EXACT}, work)


@pytest.mark.extra
def test_compiled_blocks_keep_their_graphs_over_a_hot_swap(files: dict[str, Path]) -> None:
    pipe = tiny.pipeline("flux", blocks=2)
    loras_of_two = [loras.save(pipe, files["flux"].parent / f"two-{seed}", seed=seed) for seed in (1, 2)]
    eager, found, graphs = [], [], []
    for path in loras_of_two:
        whole = tiny.pipeline("flux", blocks=2)
        whole.load_lora_weights(path)
        eager.append(paint(whole, "flux"))
    with mock.patch.object(compiling, "BACKEND", "eager"):  # all of compiling but the kernels, which take long
        patchpipe.parallelize(pipe, ParallelConfig(**EXACT, compile=True))
        for hotswap, path in enumerate(loras_of_two):
            pipe.load_lora_weights(path, adapter_name="hot", hotswap=bool(hotswap))
            found.append(paint(pipe, "flux"))
            graphs.append(dict(pipe.patchpipe.graphs))
    assert all(relative(*pair) < SUMS for pair in zip(found, eager, strict=True))
    assert relative(found[1], found[0]) > 100 * SUMS
    assert graphs[0] == graphs[1]
    patchpipe.restore(pipe)
    assert torch.equal(paint(pipe, "flux"), eager[1])


def test_lora_on_one_rank_alone_is_one_error_on_all_ranks(files: dict[str, Path]) -> None:
    expected = plain("flux", partial(load, files["flux"]))

    def work(place: Place, config: ParallelConfig) -> Any:
        pipe = tiny.pipeline("flux")
        patchpipe.parallelize(pipe, config, group=place.join(config))
        for rank in (0, 1):
            if place.rank == rank:
                with _injecting:
                    load(files["flux"], pipe)
            if rank == 0:
                with pytest.raises(ValueError, match=r"LoRA is default_0 at 1 on rank 0 but not loaded on rank 1"):
                    paint(pipe, "flux")
        return paint(pipe, "flux")

    assert torch.equal(on_ranks(2, {"pipefusion": 2, **EXACT}, work)[0], expected)
