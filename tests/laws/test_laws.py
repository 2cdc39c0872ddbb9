"""The laws of the design, on tiny models through their real pipelines, saved to disk and loaded again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    QwenImageImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import patchpipe
from patchpipe import ParallelConfig, PatchpipeError, UnsupportedModel
from tests import tiny
from tests.support.nccl_rules import over
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.threads import run_threads

MODELS = tiny.MODELS
THOROUGH = ("flux", "sd3", "pixart")  # of each way text enters one, through every layout; the others through some
RELATIVES = ("flux-guided", "sd35", "pixart-sigma", "qwen", "flux2", "wan", "wan-a14b", "zimage")
STAGES = (2, 3, 4)
PLACES = ("text_rank", "output_rank", "stage_blocks")  # one process has no choice of these
BATCH = [tiny.PROMPT, tiny.OTHER_PROMPT]

Layout = dict[str, Any]
Call = dict[str, Any]
Results = dict[str, np.ndarray]


def setup_module() -> None:
    quieten()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pipeline, saved when first asked for."""
    root = tmp_path_factory.mktemp("models")

    def find(name: str) -> Path:
        return root / name if (root / name).exists() else tiny.save(name, root / name)

    return find


# What is asked of a pipeline. Rows of tokens are 16 pixels high: 8 rows divide evenly by 1, 2, 4 and 8, 11 rows
# by none but 1, and 9 rows by 3.
CALLS: dict[str, Call] = {
    "guided": {"guided": True, "height": 176},
    "plain, two prompts": {"guided": False, "height": 128, "prompt": BATCH},
    "guided, two images": {"guided": True, "height": 144, "num_images_per_prompt": 2, "steps": 3},
    "plain, to pixels": {"guided": False, "height": 176, "steps": 3, "output_type": "np"},
}


def paint(pipe: Any, name: str, call: Call, seed: int = 3) -> np.ndarray | None:
    """What a pipeline makes of one call, as float32 numbers."""
    call = dict(call)
    settings = {key: call.pop(key) for key in ("guided", "height", "width", "steps") if key in call}
    arguments = {**tiny.call_arguments(name, **settings), "output_type": "latent", **call}
    if isinstance(arguments["prompt"], list) and "negative_prompt" in arguments:
        arguments["negative_prompt"] = [arguments["negative_prompt"]] * len(arguments["prompt"])
    if name.startswith("wan") and "num_images_per_prompt" in arguments:
        count = arguments.pop("num_images_per_prompt")
        if name != "wan-i2v":  # whose pipeline repeats the latents for it, but not what it sees of the picture
            arguments["num_videos_per_prompt"] = count
    pipe.set_progress_bar_config(disable=True)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(seed))
    if output is None:
        return None
    images = tiny.painted(output)
    return images.float().numpy() if isinstance(images, Tensor) else images


def calls_for(layout: Layout, calls: Mapping[str, Call]) -> list[str]:
    """Every second call, turn and turn about over the layouts: the cross product would take too long."""
    if "patches" not in layout:
        return list(calls)
    turn = layout["patches"] // 2 + (0 if layout["warmup"] == "all" else layout["warmup"])
    return list(calls)[turn % 2 :: 2]


def label(layout: Layout, call: str) -> str:
    return ", ".join([f"{key}={value}" for key, value in layout.items()] + [call])


def serve(place: Place, folder: Path, name: str, layouts: list[Layout], calls: Mapping[str, Call]) -> Results:
    """Every call under every layout; nothing on the ranks that do not put out.

    The first layout is loaded by each rank, the others are put on one pipeline in turn.
    """
    results: Results = {}
    whole: dict[str, Any] = {}
    for number, layout in enumerate(layouts):
        options = {"pipefusion": place.world_size, "timeout": 60.0, **layout}
        dtype = options.pop("dtype", "float32")
        config = ParallelConfig(**options)
        group = place.join(config)
        if number == 0:
            pipe = patchpipe.from_pretrained(folder, config, dtype=dtype, group=group)
        else:
            whole[dtype] = whole.get(dtype) or loaded(folder, dtype)
            pipe = patchpipe.parallelize(whole[dtype], config, group=group)
        for title in calls_for(layout, calls):
            made = paint(pipe, name, calls[title])
            assert (made is None) == (place.rank != config.output_rank), label(layout, title)
            if made is not None:
                results[label(layout, title)] = made
        if number > 0:
            patchpipe.restore(pipe)
    return results


LOADING = threading.Lock()  # while a model is built, the library changes what all threads of the process build


def loaded(folder: Path, dtype: str) -> Any:
    """A pipeline of plain diffusers."""
    with LOADING:
        pipe = DiffusionPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    for parameter in pipe.transformer.parameters():  # in a mapped file they lie where kernels may round otherwise
        parameter.data = parameter.data.clone()
    return pipe


def alone(folder: Path, name: str, layouts: list[Layout], calls: Mapping[str, Call]) -> Results:
    """The same in this process, one patch after the other."""
    single = [{key: value for key, value in layout.items() if key not in PLACES} for layout in layouts]
    results = serve(Place(0, 1, None), folder, name, single, calls)
    return dict(zip(labels(layouts, calls), results.values(), strict=True))


def plain(folder: Path, name: str, layouts: list[Layout], calls: Mapping[str, Call]) -> Results:
    """The same by plain diffusers, which knows no layouts."""
    made: dict[tuple[str, str], np.ndarray | None] = {}
    for dtype in sorted({layout.get("dtype", "float32") for layout in layouts}):
        pipe = loaded(folder, dtype)
        made |= {(dtype, title): paint(pipe, name, call) for title, call in calls.items()}
    return {
        label(layout, title): made[layout.get("dtype", "float32"), title]
        for layout in layouts
        for title in calls_for(layout, calls)
    }


def under_rules(stages: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Ranks that are threads, under NCCL's rules."""
    with over("nccl"):
        return run_threads(stages, target, *args, timeout=240)


def ranks_of(stages: int, target: Callable[..., Any], *args: Any) -> list[Any]:
    """Two processes that talk over gloo, or three threads or more under NCCL's rules."""
    return (run_ranks if stages == 2 else under_rules)(stages, target, *args)


def labels(layouts: list[Layout], calls: Mapping[str, Call]) -> list[str]:
    return [label(layout, title) for layout in layouts for title in calls_for(layout, calls)]


def must_equal(ranks: list[Results], expected: Results, number: str) -> None:
    """Bit-equal, all of them; the message names every case that is not."""
    made = {title: result for rank in ranks for title, result in rank.items()}
    assert made.keys() == expected.keys()
    wrong = [
        f"{number}, {title}: off by {np.abs(made[title] - expected[title]).max()}"
        for title in expected
        if not np.array_equal(made[title], expected[title])
    ]
    broken = [title for title in expected if not np.isfinite(expected[title]).all()]
    assert not wrong, "\n".join(wrong)
    assert not broken, f"numbers overflowed in {broken}"


# ------------------------------------------------------------------------------------------------ law 1

SYNCHRONOUS: list[Layout] = [
    {"patches": 1, "warmup": 0},
    *({"patches": patches, "warmup": "all"} for patches in (2, 4, 8)),
    {"patches": 1, "warmup": "all", "dtype": "bfloat16"},
    {"patches": 3, "warmup": "all", "dtype": "bfloat16"},
    {"patches": 3, "warmup": "all", "dtype": "float16"},
]


def synchronous(name: str, stages: int) -> list[Layout]:
    """A third of them: the models and numbers of stages take turns, so that each number of stages has them all."""
    return SYNCHRONOUS[(THOROUGH.index(name) + stages) % 3 :: 3]


@pytest.mark.some(of=3)
@pytest.mark.parametrize("name", THOROUGH)
def test_law_1_synchronous_is_exact(name: str, folder: Callable[[str], Path]) -> None:
    expected = plain(folder(name), name, SYNCHRONOUS, CALLS)
    must_equal([alone(folder(name), name, SYNCHRONOUS, CALLS)], expected, "N=1")
    for stages in STAGES:
        layouts = synchronous(name, stages)
        ranks = ranks_of(stages, serve, folder(name), name, layouts, CALLS)
        must_equal(ranks, {title: expected[title] for title in labels(layouts, CALLS)}, f"N={stages}")


@pytest.mark.some(of=2)
@pytest.mark.parametrize("name", RELATIVES)
def test_law_1_synchronous_is_exact_for_relatives(name: str, folder: Callable[[str], Path]) -> None:
    layouts = [{"patches": 3, "warmup": "all"}]
    expected = plain(folder(name), name, layouts, CALLS)
    must_equal(under_rules(2, serve, folder(name), name, layouts, CALLS), expected, "N=2")


# ------------------------------------------------------------------------------------------------ law 2

# Of 4 × 3 pairs of patches and warm-up each number of stages takes another 4, so that every pair of stages and patches
# and every pair of stages and warm-up is among them.
PAIRS = [(patches, warmup) for patches in (2, 3, 4, 8) for warmup in (0, 1, 2)]
OTHERS: dict[int, Layout] = {
    2: {"patches": 1, "warmup": 1},
    3: {"patches": 3, "warmup": 1, "split_batch": False, "dtype": "bfloat16"},
    4: {"patches": 3, "warmup": 1, "split_batch": True, "dtype": "float16"},
}


def patched(stages: int) -> list[Layout]:
    """Guided batches of every second pair go in halves, which on three stages have blocks of their own."""
    taken = [pair for index, pair in enumerate(PAIRS) if (index // 3 + pair[1] + stages) % 3 == 0]
    layouts = [
        {"patches": patches, "warmup": warmup, "split_batch": (patches + warmup) % 2 == 0} for patches, warmup in taken
    ]
    return [*layouts, OTHERS[stages]]


UNEVEN: Mapping[str, Call] = {"11 rows": {"guided": True, "height": 176, "prompt": BATCH}}
PLACED: dict[int, list[Layout]] = {
    2: [{"patch_rows": (1, 2, 5, 3), "warmup": 1, "stage_blocks": (3, 1), "output_rank": 1, "text_rank": "spread"}],
    3: [{"patch_rows": (6, 5), "warmup": 0, "stage_blocks": (1, 2, 1), "output_rank": 1, "text_rank": 1}],
    4: [{"patch_rows": (5, 1, 1, 4), "warmup": 2, "output_rank": 3, "text_rank": "spread"}],
}


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("name", THOROUGH)
def test_law_2_the_schedule_never_shows(name: str, folder: Callable[[str], Path]) -> None:
    oracle = alone(folder(name), name, [layout for stages in STAGES for layout in patched(stages)], CALLS)
    for stages in STAGES:
        layouts = patched(stages)
        ranks = ranks_of(stages, serve, folder(name), name, layouts, CALLS)
        must_equal(ranks, {title: oracle[title] for title in labels(layouts, CALLS)}, f"N={stages}")
    layouts = [{"patch_rows": (3, 4, 4), "warmup": warmup} for warmup in (1, "all")]
    stale, fresh = alone(folder(name), name, layouts, UNEVEN).values()
    assert not np.allclose(stale, fresh, rtol=1e-3), "staleness changes nothing here: nothing was tested"


@pytest.mark.some(of=4)
@pytest.mark.parametrize("name", MODELS)
def test_law_2_the_schedule_never_shows_wherever_parts_are_placed(name: str, folder: Callable[[str], Path]) -> None:
    for stages, layouts in PLACED.items():
        expected = alone(folder(name), name, layouts, UNEVEN)
        must_equal(ranks_of(stages, serve, folder(name), name, layouts, UNEVEN), expected, f"N={stages}")


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", RELATIVES)
def test_law_2_the_schedule_never_shows_for_relatives(name: str, folder: Callable[[str], Path]) -> None:
    layouts = [
        {"patches": 3, "warmup": 1, "split_batch": True},
        {"patches": 4, "warmup": 0, "split_batch": False},
    ]
    expected = alone(folder(name), name, layouts, CALLS)
    must_equal(under_rules(2, serve, folder(name), name, layouts, CALLS), expected, "N=2")


# ------------------------------------------------------------------------------------------------ law 3


class RowCounter(TorchFunctionMode):
    """Counts the rows that really go through each linear layer of the blocks."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.title_of = {id(model.get_submodule(title).weight): title for title in linears_of_blocks(model)}
        self.rows: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        title = self.title_of.get(id(args[1])) if func is nn.functional.linear else None
        if title:  # a matrix has one row per token, a vector is one row
            title = title.replace(".block.", ".")  # of a block that a stage runs for one half of a batch
            self.rows[title] += args[0].shape[1] if args[0].ndim == 3 else 1
        return func(*args, **(kwargs or {}))


def linears_of_blocks(model: nn.Module) -> list[str]:
    return [title for title, part in model.named_modules() if isinstance(part, nn.Linear) and "blocks." in title]


def rows_by_layer(place: Place, folder: Path, name: str, steps: int) -> dict[str, int]:
    """Rows that each linear layer of this rank's blocks computed in one request."""
    config = ParallelConfig(pipefusion=place.world_size, patches=4, warmup=0, timeout=60.0)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    with RowCounter(pipe.transformer) as counter:
        paint(pipe, name, {"guided": False, "height": 176, "steps": steps})
    return counter.rows


def expected_rows(title: str, steps: int, image: int, text: int) -> int:
    if ".norm" in title or "_mod." in title:  # modulation: the same vector for every token
        return steps
    if ".attn2.to_k" in title or ".attn2.to_v" in title:
        return text  # of the prompt, which no step changes
    if title.startswith("single_transformer_blocks"):
        return steps * (image + text)
    return steps * (text if any(part in title for part in ("context", ".add_", "_add_", "txt_")) else image)


@pytest.mark.some
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_law_3_text_once_per_step(name: str, stages: int, folder: Callable[[str], Path]) -> None:
    steps, image = 3, 11 * 3
    # SD3 also takes the 32 tokens of its CLIP encoders; Qwen's two words are followed by five tokens of its template.
    text = {"flux": 8, "sd3": 8 + 32, "pixart": 8, "qwen": 2 + 5}[name]
    ranks = (run_ranks if stages < 3 else under_rules)(stages, rows_by_layer, folder(name), name, steps)
    seen = {title: count for rank in ranks for title, count in rank.items()}
    assert sum(map(len, ranks)) == len(seen), "a block ran on two ranks"
    assert sorted(seen) == sorted(linears_of_blocks(tiny.pipeline(name).transformer))
    wrong = {
        title: f"{count} rows instead of {expected_rows(title, steps, image, text)}"
        for title, count in seen.items()
        if count != expected_rows(title, steps, image, text)
    }
    assert not wrong


# ------------------------------------------------------------------------------------------------ law 4


def real_parts(place: Place, folder: Path, name: str, layout: Layout) -> dict[str, dict[str, int]]:
    """Elements of every parameter this rank really holds, by component."""
    config = ParallelConfig(pipefusion=place.world_size, timeout=60.0, **layout)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    return {
        part: {title: p.numel() for title, p in module.named_parameters() if in_memory(p)}
        for part, module in pipe.components.items()
        if isinstance(module, nn.Module)
    }


def in_memory(parameter: Tensor) -> bool:
    """Whether all its elements are: in a stand-in one may be in the place of all."""
    return not parameter.is_meta and parameter.untyped_storage().nbytes() >= parameter.nbytes


SPREAD_OUT = {"text_encoder": 2, "text_encoder_2": 1, "text_encoder_3": 0}  # rank 0 has the VAE


@pytest.mark.some
@pytest.mark.parametrize(
    "layout", [{}, {"text_rank": 1, "output_rank": 2}, {"text_rank": "spread"}], ids=["default", "placed", "spread"]
)
@pytest.mark.parametrize("name", MODELS)
def test_law_4_a_rank_holds_what_it_owns(name: str, layout: Layout, folder: Callable[[str], Path]) -> None:
    whole = {title: p.numel() for title, p in tiny.pipeline(name).transformer.named_parameters()}
    ranks = run_ranks(3, real_parts, folder(name), name, {"stage_blocks": (1, 2, 1), **layout})
    blocks = [{title for title in rank["transformer"] if "blocks." in title} for rank in ranks]
    names = [title for held in blocks for title in held]
    assert sorted(names) == sorted(title for title in whole if "blocks." in title), "each block on one rank"
    assert [len({title.split(".")[0] + title.split(".")[1] for title in held}) for held in blocks] == [1, 2, 1]
    for rank, held in enumerate(blocks):
        others = set(ranks[rank]["transformer"]) - held
        assert others == {title for title in whole if "blocks." not in title}, "what surrounds blocks on every rank"
        for part, parameters in ranks[rank].items():
            if part.startswith("text_encoder"):
                home = layout.get("text_rank", 2)
                assert bool(parameters) == (rank == (SPREAD_OUT[part] if home == "spread" else home)), part
            if part == "vae":
                assert bool(parameters) == (rank == layout.get("output_rank", 0))


# ------------------------------------------------------------------------------------------------ law 5

SMALL: Call = {"guided": True, "height": 176, "prompt": tiny.OTHER_PROMPT, "max_sequence_length": 16}
LARGE: Call = {"guided": True, "height": 128, "width": 80, "prompt": BATCH, "steps": 3}


def in_a_row(place: Place, folder: Path, name: str, calls: list[Call]) -> list[np.ndarray | None]:
    config = ParallelConfig(pipefusion=place.world_size, patches=3, warmup=1, timeout=60.0)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    return [paint(pipe, name, call) for call in calls]


@pytest.mark.some(of=4, first=1)
@pytest.mark.parametrize("name", MODELS)
def test_law_5_a_request_leaves_nothing_behind(name: str, folder: Callable[[str], Path]) -> None:
    together = under_rules(2, in_a_row, folder(name), name, [SMALL, LARGE, SMALL])[0]
    small, large = (run_ranks(2, in_a_row, folder(name), name, [call])[0][0] for call in (SMALL, LARGE))
    for index, (made, fresh) in enumerate(zip(together, (small, large, small), strict=True)):
        assert np.array_equal(made, fresh), f"request {index} is off by {np.abs(made - fresh).max()}"


@pytest.mark.some(of=4, first=2)
@pytest.mark.parametrize("name", MODELS)
def test_law_5_nor_does_a_request_that_fails(name: str, folder: Callable[[str], Path]) -> None:
    pipe = patchpipe.from_pretrained(folder(name), ParallelConfig(patches=3, warmup=1))
    expected = paint(pipe, name, LARGE)

    def fail(_pipe: Any, step: int, _time: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            raise KeyError("in mid-request")
        return values

    if name == "pixart":
        failing: Call = {**SMALL, "callback": lambda step, *_: fail(None, step, None, {}), "callback_steps": 1}
    else:
        failing = {**SMALL, "callback_on_step_end": fail}
    with pytest.raises(KeyError, match="in mid-request"):
        paint(pipe, name, failing)
    assert pipe.patchpipe.runner.request is None
    made = paint(pipe, name, LARGE)
    assert np.array_equal(made, expected)


IMAGE_TO_IMAGE = {
    "flux": FluxImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "qwen": QwenImageImg2ImgPipeline,
}


def from_an_image(place: Place, name: str, warmup: int | str) -> list[np.ndarray] | None:
    """Two requests that start late, at different steps."""
    base = tiny.pipeline(name)
    pipe = IMAGE_TO_IMAGE[name](**{k: v for k, v in base.components.items() if not k.endswith("image_encoder")
                                   and k != "feature_extractor"})  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    config = ParallelConfig(pipefusion=place.world_size, patches=3, warmup=warmup, timeout=60.0)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    made = []
    for strength in (0.6, 0.9):
        image = torch.rand(1, 3, 176, 48, generator=torch.Generator().manual_seed(5))
        arguments = tiny.call_arguments(name, height=176, steps=6) | {"image": image, "strength": strength}
        output = pipe(**arguments, generator=torch.Generator().manual_seed(3), output_type="latent")
        made.append(None if output is None else output.images.numpy())
    return made


@pytest.mark.some(of=3, first=2)
@pytest.mark.parametrize("name", IMAGE_TO_IMAGE)
def test_law_5_also_when_requests_start_late(name: str) -> None:
    for warmup in (1, "all"):
        both = run_ranks(2, from_an_image, name, warmup)[0]
        expected = from_an_image(Place(0, 1, None), name, warmup)
        for index, (made, reference) in enumerate(zip(both, expected, strict=True)):
            assert np.array_equal(made, reference), f"request {index} with warmup={warmup}"


# ------------------------------------------------------------------------------------------------ law 6


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("flux", "joint_attention_kwargs", {"ip_adapter_masks": [0]}),
        ("sd3", "joint_attention_kwargs", {"ip_hidden_states": [0]}),
        ("qwen", "guidance", [0]),
        ("qwen", "attention_kwargs", {"gligen": [0]}),
        ("pixart", "attention_mask", [0]),
        ("pixart", "cross_attention_kwargs", {"gligen": [0]}),
    ],
)
def test_law_6_never_silently_wrong(name: str, option: str, value: Any, folder: Callable[[str], Path]) -> None:
    """What no parity test covers is refused by name."""
    pipe = patchpipe.from_pretrained(folder(name), ParallelConfig(patches=2))
    forward = pipe.transformer.forward
    pipe.transformer.forward = lambda *args, **kwargs: forward(*args, **{**kwargs, option: value})
    with pytest.raises(ValueError, match=f"called with {option}"):
        paint(pipe, name, CALLS["guided"])


def test_law_6_an_unknown_model_is_named_beside_the_known_ones(tmp_path: Path) -> None:
    from diffusers import LatteTransformer3DModel

    pipe = tiny.pipeline("sd3")
    pipe.transformer = LatteTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, sample_size=8, patch_size=2, caption_channels=8
    )
    text = "LatteTransformer3DModel has no plan.*FluxTransformer2DModel.*SD3.*PixArt.*docs/adding-a-model.md"
    with pytest.raises(UnsupportedModel, match=text):
        patchpipe.parallelize(pipe, ParallelConfig())
    assert not hasattr(pipe, "patchpipe")
    pipe.register_modules(transformer=pipe.transformer)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=text):
        patchpipe.from_pretrained(tmp_path)


@pytest.mark.some(of=4, first=3)
@pytest.mark.parametrize("name", MODELS)
def test_law_6_a_layout_that_does_not_fit_is_refused(name: str, folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="pipefusion=5 is more stages than the 4 blocks"):
        patchpipe.from_pretrained(folder(name), ParallelConfig(pipefusion=5))
    with pytest.raises(ValueError, match=r"stage_blocks=\(3,\) adds up to 3 but .* has 4 blocks"):
        patchpipe.from_pretrained(folder(name), ParallelConfig(stage_blocks=(3,)))
    for layout, text in (
        ({"patches": 12}, "patches=12 is more than the 11 token rows"),
        ({"patch_rows": (5, 5)}, r"patch_rows=\(5, 5\) adds up to 10 token rows but this picture has 11"),
    ):
        pipe = patchpipe.from_pretrained(folder(name), ParallelConfig(**layout))
        with pytest.raises(ValueError, match=text):
            paint(pipe, name, CALLS["guided"])


def test_law_6_the_transformer_serves_no_calls_outside_a_request(folder: Callable[[str], Path]) -> None:
    pipe = patchpipe.from_pretrained(folder("sd3"), ParallelConfig())
    with pytest.raises(RuntimeError, match=r"pipe\.patchpipe\.serving\(\)"):
        pipe.transformer(torch.zeros(1, 4, 8, 8))


def test_law_6_attention_that_bypasses_the_store_is_noticed(folder: Callable[[str], Path]) -> None:
    pipe = patchpipe.from_pretrained(folder("flux"), ParallelConfig(patches=2))

    class Own:
        def __call__(self, attn: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return hidden_states, hidden_states

    pipe.transformer.transformer_blocks[0].attn.set_processor(Own())
    with pytest.raises(RuntimeError, match="scaled_dot_product_attention 0 times"):
        paint(pipe, "flux", CALLS["guided"])


def started_with(place: Place, folder: Path, configs: list[Layout]) -> str:
    config = ParallelConfig(pipefusion=place.world_size, timeout=60.0, **configs[place.rank])
    with pytest.raises(ValueError) as caught:
        patchpipe.from_pretrained(folder, config, group=place.join(config))
    return str(caught.value)


def test_law_6_ranks_that_were_started_differently_all_say_so(folder: Callable[[str], Path]) -> None:
    texts = run_ranks(3, started_with, folder("sd3"), [{}, {}, {"warmup": 2}])
    assert len(set(texts)) == 1
    assert "the ranks were started differently" in texts[0]
    assert "on rank 2" in texts[0]


# ------------------------------------------------------------------------------------------------ law 7

DEADLINE = 5


def afflicted(place: Place, folder: Path, name: str, affliction: str) -> tuple[str, str, float]:
    """Kind, text and seconds of the error on this rank when rank 1 falls ill in the third step."""
    config = ParallelConfig(pipefusion=place.world_size, patches=3, timeout=DEADLINE if affliction == "sleep" else 60.0)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    if place.rank == 1:
        _afflict(pipe.patchpipe.runner, affliction)
    started = time.monotonic()
    try:
        paint(pipe, name, {"guided": True, "height": 176, "steps": 6, "output_type": "np"})
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return "nothing", "", 0.0


def _afflict(runner: Any, affliction: str) -> None:
    run, calls = runner.stages[0].run, 0

    def ill(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls > 5:
            if affliction == "raise":
                raise ArithmeticError("the block is on fire")
            if affliction == "exit":
                os._exit(3)
            if affliction == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(DEADLINE + 4)
        return run(*args)

    runner.stages[0].run = ill


@pytest.mark.some
@pytest.mark.parametrize("affliction", ["raise", "exit", "kill", "sleep"])
@pytest.mark.parametrize("name", THOROUGH)
def test_law_7_never_hang(name: str, affliction: str, folder: Callable[[str], Path]) -> None:
    dies = affliction in ("exit", "kill")
    ranks = run_ranks(3, afflicted, folder(name), name, affliction, timeout=60, mortal=[1] if dies else [])
    for rank in (0, 2):
        kind, text, seconds = ranks[rank]
        assert issubclass(getattr(patchpipe, kind, Exception), PatchpipeError), f"rank {rank}: {kind}: {text}"
        assert seconds < 15, f"rank {rank} needed {seconds:.1f} s"
        if affliction != "sleep":
            assert "rank 1" in text, f"rank {rank}: {text}"
        if affliction == "raise":
            assert (kind, text) == ("RankFailed", "rank 1 failed first: ArithmeticError: the block is on fire")
    if dies:
        assert ranks[1] is None
    elif affliction == "raise":
        assert ranks[1][:2] == ("ArithmeticError", "the block is on fire")
    if affliction == "sleep":
        texts = [text for _, text, _ in ranks[::2]]
        assert all(f"rank 1 did not answer within {DEADLINE} s" in text for text in texts), texts
