"""What is special to single families: lists for latents and prompts, transformers that take turns, times per token."""

from __future__ import annotations

from copy import deepcopy
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import nn

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.models import plan_for, supported, transformers_of
from patchpipe.models.latent import Latent
from patchpipe.parallel.batches import ragged
from patchpipe.schedule.prompts import Prompts
from tests import tiny
from tests.support import parity
from tests.support.nccl_rules import over
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tools import plan_lines
from tools.documents import replaced

STREAM = {"patches": 2, "warmup": 1}


def setup_module() -> None:
    quieten()


def paint(pipe: Any, name: str, **options: Any) -> torch.Tensor:
    arguments = tiny.call_arguments(name) | options
    return tiny.painted(pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent"))


# -- lists ---------------------------------------------------------------------------------------


def test_a_listed_latent_is_one_tensor_inside() -> None:
    grid = Latent("bc1hw", name="x", listed=True)
    latents = [torch.randn(4, 1, 8, 6) for _ in range(3)]
    joined = grid.joined(latents)
    assert joined.shape == (3, 4, 1, 8, 6)
    assert all(map(torch.equal, grid.given(joined), latents))


@pytest.mark.parametrize("latents", [[torch.zeros(4, 1, 8, 6), torch.zeros(4, 1, 8, 8)], [[torch.zeros(4, 1, 8, 6)]]])
def test_a_list_of_several_sizes_or_several_pictures_each_is_refused(latents: Any) -> None:
    with pytest.raises(ValueError, match="only pictures of one size, each by itself, are supported"):
        Latent("bc1hw", name="x", listed=True).joined(latents)


def test_prompts_in_a_list_are_ragged_where_they_differ_in_length() -> None:
    assert ragged({"cap_feats": [torch.zeros(5, 8), torch.zeros(6, 8)]})
    assert not ragged({"cap_feats": [torch.zeros(5, 8), torch.ones(5, 8)], "img_shapes": [[(1, 4, 3)]]})


def test_prompts_are_numbered_as_they_come() -> None:
    prompts, one, other = Prompts(), torch.zeros(1, 3), torch.ones(1, 3)
    assert [prompts.number(text) for text in (one, other, one.clone(), None)] == [0, 1, 0, -1]
    assert prompts.number([one, other]) == 2
    assert prompts.number([one.clone(), other]) == 2
    assert prompts.number([one]) == 0


LONG = {"negative_prompt": tiny.OTHER_PROMPT * 6, "max_sequence_length": 60}


@pytest.mark.parametrize(
    "layout", [{"pipefusion": 2}, {"cfg": 2}, {"ulysses": 2}, {"cfg": 2, "pipefusion": 2}], ids=str
)
def test_zimage_takes_prompts_of_different_lengths(layout: dict[str, int]) -> None:
    """The shorter one is padded and masked where both are one batch, and alone where each has its ranks."""
    with over("nccl"):
        errors = parity.differences("zimage", [layout], [{"warmup": "all"}, STREAM], run=run_threads, **LONG)
    assert max(errors.values()) <= parity.tolerance("zimage"), errors


def test_the_refiners_of_a_prompt_run_once_a_request() -> None:
    pipe = tiny.pipeline("zimage")
    refiner, calls = pipe.transformer.context_refiner[0].attention, []
    refiner.register_forward_hook(lambda *_: calls.append(1))
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    paint(pipe, "zimage", num_inference_steps=4)
    assert len(calls) == 1


# -- transformers that take turns ----------------------------------------------------------------


def test_the_second_transformer_warms_up_with_keys_and_values_of_its_own() -> None:
    pipe = tiny.pipeline("wan-a14b")
    seen: list[nn.Module] = []
    for model in transformers_of(pipe).values():
        model.register_forward_pre_hook(lambda module, _: seen.append(module))
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    paint(pipe, "wan-a14b", num_inference_steps=6)
    turns = [model for index, model in enumerate(seen) if index == 0 or seen[index - 1] is not model]
    assert turns == [pipe.transformer, pipe.transformer_2]
    assert pipe.patchpipe.last.steps_synchronous == 2 * 2, "a warm-up step of each, for both branches of guidance"
    assert pipe.patchpipe.last.steps_patched == 2 * 6 - 4
    patchpipe.restore(pipe)
    assert not any("forward" in vars(model) for model in transformers_of(pipe).values())


def test_transformers_of_different_makes_are_refused() -> None:
    pipe = tiny.pipeline("wan-a14b")
    pipe.transformer_2 = tiny.pipeline("wan", blocks=3).transformer
    with pytest.raises(ValueError, match="transformer_2 of WanPipeline is not made like its transformer"):
        patchpipe.parallelize(pipe, ParallelConfig())


def test_a_second_transformer_that_was_replaced_is_refused() -> None:
    pipe = tiny.pipeline("wan-a14b")
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    pipe.transformer_2 = tiny.pipeline("wan").transformer
    with pytest.raises(ValueError, match="another model than when the pipeline was made parallel"):
        paint(pipe, "wan-a14b")


# -- times per token -----------------------------------------------------------------------------


def test_with_a_time_for_each_token_rows_are_put_back_before_the_head() -> None:
    plan = plan_for("WanTransformer3DModel")
    assert plan.one_time({"timestep": torch.zeros(1)})
    assert not plan.one_time({"timestep": torch.zeros(1, 60)})


# -- plans -----------------------------------------------------------------------------------------


def test_plans_are_short_and_their_table_is_current() -> None:
    lines = plan_lines.plan_lines()
    assert set(lines) == set(supported())
    assert max(lines.values()) <= 25
    assert median(lines.values()) < 12
    assert not plan_lines.Statements().branches, "a plan is data"
    page = (plan_lines.ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    assert replaced(page, "plan lines", plan_lines.table()) == page, "run python -m tools.plan_lines --write"


def test_a_module_that_a_plan_names_counts_more_than_what_is_usual() -> None:
    video, image = tiny.pipeline("hunyuan-video").transformer, tiny.pipeline("flux").transformer
    assert "context_embedder" in plan_for(video).shared_in_call(video)
    assert "context_embedder" not in plan_for(video).shared_in_request(video)
    assert plan_for(image).shared_in_request(image)["context_embedder"] == ("encoder_hidden_states",)


def test_a_module_that_is_called_twice_in_a_call_keeps_both_results() -> None:
    """Helios embeds the time of the frames before and that of the clip."""
    pipe, seen = tiny.pipeline("helios"), []
    embedder = pipe.transformer.condition_embedder
    embedder.time_embedder.register_forward_hook(lambda *_: seen.append(1))
    paint(pipe, "helios")
    alone = len(seen)
    patchpipe.parallelize(pipe, ParallelConfig(**STREAM))
    paint(pipe, "helios")
    assert len(seen) - alone == alone + 2, "once for all patches of a call, and once to look at its shapes"


# -- lists without blocks ------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [{"pipefusion": 2, "patches": 2}, {"tensor": 2}], ids=str)
@pytest.mark.parametrize("lacking", ["num_layers", "num_single_layers"])
def test_a_model_may_lack_one_of_its_lists(lacking: str, layout: dict[str, int]) -> None:
    """A distilled FLUX may have dual blocks alone, or single ones."""
    whole = tiny.pipeline("flux", dtype=torch.float64)
    counts = {"num_layers": 4, "num_single_layers": 4, lacking: 0}
    model = FluxTransformer2DModel.from_config({**whole.transformer.config, **counts})
    whole.register_modules(transformer=model.to(torch.float64).eval())

    def work(place: Place, pipe: Any) -> Any:
        config = ParallelConfig(**layout, warmup="all")
        patchpipe.parallelize(pipe, config, group=place.join(config))
        return parity.call_pipeline(pipe, tiny.call_arguments("flux"))

    copies = [deepcopy(whole) for _ in range(2)]
    found = run_threads(2, lambda place: work(place, copies[place.rank]))
    right = tiny.painted(parity.call_pipeline(whole, tiny.call_arguments("flux")))
    tolerance = 0 if "pipefusion" in layout else 1e-12
    torch.testing.assert_close(tiny.painted(found[0]), right, rtol=0, atol=tolerance)
