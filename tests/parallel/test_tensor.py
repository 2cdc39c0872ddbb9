"""Tensor parallelism against plain diffusers and the one-process oracle; its traffic, its memory, its refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.loading.owned import owned_names
from patchpipe.models import plan_for
from patchpipe.parallel.tensor import TensorPart, check_tensor
from patchpipe.stage.balance import split_blocks
from tests import tiny
from tests.support.parity import TOLERANCE, relative
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.threads import run_threads

Layout = dict[str, Any]
SYNCHRONOUS, STREAMING = {"warmup": "all"}, {"patch_rows": (2, 2, 3), "warmup": 1}
SIZE = 8  # bytes of a float64
ROWS, COLUMNS, STEPS = 7, 3, 3  # of tokens, which divide by nothing, and of denoising


def setup_module() -> None:
    quieten()


def build(name: str) -> Any:
    """A tiny pipeline in float64; ``pixart-4`` has four heads where ``pixart`` has three."""
    return tiny.pipeline(name, dtype=torch.float64)


def call(pipe: Any, name: str, guided: bool = True) -> Any:
    """Latents of one call, as an array; nothing on ranks that do not put out."""
    arguments = tiny.call_arguments(name, guided=guided, height=16 * ROWS, width=16 * COLUMNS, steps=STEPS)
    output = pipe(**arguments, generator=torch.Generator().manual_seed(0), output_type="latent")
    return None if output is None else output.images.numpy()


def paint(place: Place, names: list[str], layouts: list[Layout]) -> dict[tuple[str, str], float]:
    """The relative error of each pipeline under each layout, on rank 0."""
    errors = {}
    for name in names:
        pipe = build(name)
        for schedule in (SYNCHRONOUS, STREAMING):
            expected = _alone(pipe, name, schedule) if place.rank == 0 else None
            for layout in layouts:
                config = ParallelConfig(**layout, **schedule, timeout=60.0)
                patchpipe.parallelize(pipe, config, group=place.join(config))
                made = call(pipe, name)
                patchpipe.restore(pipe)
                if place.rank == 0:
                    errors[name, str((layout, schedule))] = relative(made, expected)
    return errors


def _alone(pipe: Any, name: str, schedule: Layout) -> Any:
    """Plain diffusers where every step is synchronous, else the same schedule on this process."""
    if schedule == SYNCHRONOUS:
        return call(pipe, name)
    config = ParallelConfig(**schedule)
    patchpipe.parallelize(pipe, config, group=Place(0, 1, None).join(config))
    made = call(pipe, name)
    patchpipe.restore(pipe)
    return made


SPLIT: list[tuple[list[str], list[Layout]]] = [
    (["flux", "sd35", "pixart-4"], [{"tensor": 2}]),
    (["pixart"], [{"tensor": 3}]),
    (
        ["flux", "sd35", "pixart-4"],
        [{"pipefusion": 2, "tensor": 2}, {"cfg": 2, "tensor": 2}, {"ulysses": 2, "tensor": 2}],
    ),
]


@pytest.mark.some(of=3)
@pytest.mark.parametrize(("names", "layouts"), SPLIT, ids=["2", "3", "4"])
def test_split_matrices_paint_what_whole_ones_paint(names: list[str], layouts: list[Layout]) -> None:
    """Synchronous steps equal plain diffusers, streaming ones the same schedule on one process."""
    errors = run_threads(ParallelConfig(**layouts[0]).world_size, paint, names, layouts)[0]
    assert len(errors) == len(names) * len(layouts) * 2
    assert max(errors.values()) <= TOLERANCE, errors


# -- traffic -----------------------------------------------------------------------------------------


def count(place: Place, names: list[str], degree: int) -> dict[tuple[str, str], tuple[int, int]]:
    """Bytes sent for the sums and bytes sent in all, of each pipeline under each schedule."""
    found = {}
    for name in names:
        pipe = build(name)
        for schedule in (SYNCHRONOUS, STREAMING):
            config = ParallelConfig(tensor=degree, **schedule, timeout=60.0)
            patchpipe.parallelize(pipe, config, group=place.join(config))
            call(pipe, name, guided=False)
            sums = pipe.patchpipe.group.lines["tensor"].sent_bytes
            found[name, str(schedule)] = (sums, pipe.patchpipe.last.sent_bytes)
            patchpipe.restore(pipe)
    return found


IMAGE, TEXT, CLIP = ROWS * COLUMNS, 8, 32  # rows of a picture, of T5's prompt and, before it in SD3, of CLIP's
SUMMED = {  # rows whose sums each step takes, of the width of the model
    "flux": 2 * 2 * (IMAGE + TEXT) + 2 * (IMAGE + TEXT),  # dual-stream blocks end two pairs, single-stream ones one
    "sd35": 3 * 2 * (IMAGE + CLIP + TEXT) + 2 * IMAGE + 2 * IMAGE,  # the last has no text; two attend twice
    "pixart": 4 * 3 * IMAGE,  # self-attention, cross-attention and feed-forward
}
WIDTHS = {"flux": 32, "sd35": 32, "pixart": 48}
ANSWERS = {"flux": IMAGE * 16, "sd35": IMAGE * 16, "pixart": IMAGE * 32}  # the first rank's, to each other one


@pytest.mark.some(of=2, first=1)
@pytest.mark.parametrize(("names", "degree"), [(["flux", "sd35"], 2), (["pixart"], 3)], ids=["2", "3"])
def test_tensor_sends_what_its_formula_says(names: list[str], degree: int) -> None:
    """``2·(T-1)/T`` of every sum from each rank, patched or not: text rides with one patch (arXiv 1909.08053)."""
    for rank, found in enumerate(run_threads(degree, count, names, degree)):
        for (name, schedule), (sums, sent) in found.items():
            expected = STEPS * SUMMED[name] * WIDTHS[name] * SIZE * 2 * (degree - 1) // degree
            assert sums == expected, (rank, name, schedule)
            answers = STEPS * ANSWERS[name] * SIZE * (degree - 1) if rank == 0 else 0
            assert sent == expected + answers, (rank, name, schedule)


# -- memory ------------------------------------------------------------------------------------------


def hold(place: Place, folders: dict[str, Path], layout: Layout) -> dict[str, tuple[int, bool, Any]]:
    """Of each pipeline loaded from disk: bytes of the transformer's parameters, whether restoring disarms it."""
    found = {}
    for name, folder in folders.items():
        config = ParallelConfig(**layout, warmup="all", timeout=60.0)
        pipe = patchpipe.from_pretrained(folder, config, dtype=torch.float32, group=place.join(config))
        memory = {
            parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
            for parameter in pipe.transformer.parameters()
            if not parameter.is_meta
        }
        made = call(pipe, name)
        patchpipe.restore(pipe)
        empty = any(parameter.is_meta for parameter in pipe.transformer.parameters())
        found[name] = (sum(memory.values()), empty, made)
    return found


def formula(model: Any, layout: Layout, stage: int) -> int:
    """Parameters of a stage: split matrices and the biases of their columns divided by T, the others whole."""
    config, plan = ParallelConfig(**layout, warmup="all"), plan_for(model)
    owned = split_blocks(model, plan, config)[stage].held
    names = owned_names(model, plan, owned)
    norms = ("norm", "time_text", "context_embedder", "x_embedder", "pos_embed", "adaln", "caption", "scale_shift")
    whole, split = 0, 0
    for name in (name for name, _ in model.named_parameters() if name in names):
        parts = name.split(".")
        size = model.get_parameter(name).numel()
        ends = ".to_out.0." in name or ".to_add_out." in name or ".net.2." in name or ".proj_out." in name
        if "blocks" not in name or any(word in part for word in norms for part in parts) or (ends and "bias" in name):
            whole += size
        else:
            split += size
    return whole + split // config.tensor


def test_a_rank_holds_its_slice_of_every_matrix(tmp_path: Path) -> None:
    layout, names = {"tensor": 2, "pipefusion": 2}, ["flux", "sd35"]
    folders = {name: tiny.save(name, tmp_path / name) for name in names}
    ranks = run_ranks(ParallelConfig(**layout).world_size, hold, folders, layout)
    for name in names:
        pipe = tiny.pipeline(name)
        for rank, found in enumerate(ranks):
            parameters, disarmed, _ = found[name]
            assert parameters == 4 * formula(pipe.transformer, layout, rank // 2), (name, rank)
            assert disarmed
        assert relative(ranks[0][name][2], call(pipe, name)) < 1e-4  # float32


def test_slices_make_up_the_whole_and_restoring_brings_it_back() -> None:
    for name, degree in (("flux", 2), ("sd35", 2), ("pixart", 3)):
        model = build(name).transformer
        plan, before = plan_for(model), {key: value.clone() for key, value in model.state_dict().items()}
        blocks = range(len(plan.blocks_of(model)))
        parts = [TensorPart(model, plan, blocks, index, degree) for index in range(degree)]
        for key in parts[0].slices:
            pieces = [part.slices[key] for part in parts]
            seen = sorted(at for piece in pieces for start, stop in piece.ranges for at in range(start, stop))
            assert seen == list(range(before[key].shape[pieces[0].dim])), key
        heads = {key: module.heads for key, module in model.named_modules() if hasattr(module, "heads")}
        parts[1].attach(None)  # type: ignore[arg-type]
        last = "transformer_blocks.0.ff.net.2.weight"
        assert model.get_parameter(last).shape[1] * degree == before[last].shape[1]
        parts[1].detach()
        assert {key: module.heads for key, module in model.named_modules() if hasattr(module, "heads")} == heads
        after = model.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[key], before[key]) for key in before)
        assert not any("forward" in module.__dict__ for module in model.modules())


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "degree", "nearest"),
    [("pixart", 2, "use tensor=1 or 3"), ("pixart", 5, "use tensor=3"), ("flux", 3, "use tensor=2")],
)
def test_heads_that_do_not_divide_are_refused_before_ranks_meet(name: str, degree: int, nearest: str) -> None:
    with pytest.raises(ValueError, match=nearest):
        patchpipe.parallelize(tiny.pipeline(name), ParallelConfig(tensor=degree))


def test_loading_refuses_before_ranks_meet(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not divide the 3 attention heads .* use tensor=1 or 3"):
        patchpipe.from_pretrained(tiny.save("pixart", tmp_path), ParallelConfig(tensor=2))


def test_models_that_cannot_be_split_are_refused() -> None:
    pipe = tiny.pipeline("sd35")
    model, plan = pipe.transformer, plan_for(pipe.transformer)
    with pytest.raises(ValueError, match="pipefusion=2"):
        check_tensor(model, dataclasses.replace(plan, tensor=None), 2)
    attention = model.transformer_blocks[0].attn
    kept, attention.norm_q = attention.norm_q, torch.nn.LayerNorm(32)
    with pytest.raises(ValueError, match="norm_q over all heads"):
        check_tensor(model, plan, 2)
    attention.norm_q = kept
    attention.to_q = torch.nn.Sequential(attention.to_q)
    attention.to_q.out_features = 32
    with pytest.raises(ValueError, match=r"transformer_blocks\.0\.attn\.to_q is a Sequential"):
        check_tensor(model, plan, 2)
