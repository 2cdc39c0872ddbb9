"""A pipeline whose weights come and go paints what it paints when they stay, to the bit."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import patchpipe
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.models import transformers_of
from patchpipe.offload import mover
from patchpipe.offload.choice import GIB
from patchpipe.offload.mover import Mover
from patchpipe.offload.ring import aligned, ring_bytes
from patchpipe.pipeline.pretrained import from_pretrained
from tests import tiny
from tests.support.parity import call_pipeline
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads
from tests.tiny import loras

HALF = OffloadConfig(resident=0.4, chunk=0.004, depth=3, gate="on")
NONE = OffloadConfig(resident=0.0, chunk=0.001, depth=2)
STREAM: dict[str, Any] = {"patch_rows": (3, 2, 2), "warmup": 1}
LAYOUTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("flux", {"pipefusion": 2}),
    ("flux", {"pipefusion": 2, "ulysses": 2}),
    ("flux", {"pipefusion": 2, "tensor": 2}),
    ("flux", {"ring": 2}),
    ("flux", {"distrifusion": 2}),
    ("sd3", {"pipefusion": 3, "split_batch": True}),
    ("sd3", {"cfg": 2, "ulysses": 2}),
    ("pixart", {"pipefusion": 2, "stage_blocks": (2.5, 1.5)}),
    ("wan-a14b", {"pipefusion": 2}),
    ("qwen", {"data": 2, "pipefusion": 2}),
)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a block leaves behind in the buffer is NaN at once: whoever still uses it shows it."""
    done = Mover.done

    def spoiled(mover: Mover) -> None:
        entry = mover._current
        assert entry is not None
        for run in entry.placement.runs:
            at = run.start % mover._ring.numel()
            mover._ring[at : at + run.size].fill_(255)
        done(mover)

    monkeypatch.setattr(Mover, "done", spoiled)
    quieten()


def paint(place: Place, name: str, config: ParallelConfig, calls: int = 1) -> tuple[list[Tensor | None], Any]:
    pipe = tiny.pipeline(name)
    patchpipe.parallelize(pipe, config, group=place.join(config))
    arguments = tiny.call_arguments(name, height=112)
    if config.data > 1:
        arguments |= {"num_images_per_prompt": 2, "seeds": [0, 1]}
    made = [call_pipeline(pipe, arguments) for _ in range(calls)]
    offload = pipe.patchpipe.offload
    told = None if offload is None else offload.as_dict()
    patchpipe.restore(pipe)
    return [None if each is None else tiny.painted(each) for each in made], told


def beside(name: str, layout: dict[str, Any], asked: OffloadConfig, calls: int = 1) -> list[dict[str, Any]]:
    """Paints with all weights on the device and with offload; what the ranks tell of it."""
    schedule = STREAM if "distrifusion" not in layout else {"warmup": 1}
    schedule = schedule if not name.startswith("wan") else {"patch_rows": (2, 2, 1), "warmup": 1}
    given = {**schedule, **layout}
    stays, goes = ParallelConfig(**given), ParallelConfig(**given, offload=asked)
    right = run_threads(stays.world_size, paint, name, stays, calls)
    found = run_threads(goes.world_size, paint, name, goes, calls)
    for (expected, _), (made, _) in zip(right, found, strict=True):
        for one, other in zip(expected, made, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    return [told for _, told in found]


@pytest.mark.some(of=3)
@pytest.mark.parametrize(("name", "layout"), LAYOUTS, ids=lambda value: value if isinstance(value, str) else str(value))
def test_offload_paints_the_same(name: str, layout: dict[str, Any]) -> None:
    told = beside(name, layout, HALF)
    for rank in told:
        assert 0.1 < rank["resident_share"] < 0.45
        assert rank["bytes"] > 0
        assert rank["peak"] <= rank["ring_bytes"]


def test_weights_come_once_for_every_patch() -> None:
    """One rank: so many passes, so many times the bytes that do not stay, and what came ahead in the end."""
    [told] = beside("flux", {}, NONE, calls=2)
    passes = 2 * 2 * (1 + 3 * 3)  # two calls, two branches; a synchronous step and three of three patches
    most_ahead = told["depth"] * told["chunk_bytes"]
    assert told["blocks"] % passes == 0
    assert 0 <= told["bytes"] - passes * told["streamed_bytes_per_pass"] <= most_ahead
    assert told["resident_bytes"] == 0
    assert told["out_of_turn"] == 0


def test_the_buffer_is_its_formula_and_nothing_grows() -> None:
    pipe = tiny.pipeline("flux")
    sizes = [[aligned(4 * one.numel()) for one in block.parameters()] for block in blocks_of(pipe)]
    config = ParallelConfig(patch_rows=(4, 3), offload=NONE)
    patchpipe.parallelize(pipe, config)
    arguments = tiny.call_arguments("flux", height=112, steps=6)
    counts = []
    for _ in range(3):
        call_pipeline(pipe, arguments)
        gc.collect()
        counts.append(sum(isinstance(each, Tensor) for each in gc.get_objects()))
    offload = pipe.patchpipe.offload
    assert offload.ring.numel() == ring_bytes(max(map(sum, sizes)), max(map(max, sizes)), 2, 1000)
    assert offload.stats.peak <= offload.ring.numel()
    assert counts[2] <= counts[1]
    patchpipe.restore(pipe)


def blocks_of(pipe: Any) -> list[nn.Module]:
    return [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]


def test_restore_gives_the_parameters_back() -> None:
    pipe = tiny.pipeline("sd3")
    before = {name: (one, one.detach().clone()) for name, one in pipe.transformer.named_parameters()}
    patchpipe.parallelize(pipe, ParallelConfig(offload=HALF))
    call_pipeline(pipe, tiny.call_arguments("sd3"))
    for name, parameter in pipe.transformer.named_parameters():  # between two calls they are at home
        assert torch.equal(parameter, before[name][1])
    patchpipe.restore(pipe)
    for name, parameter in pipe.transformer.named_parameters():
        assert parameter is before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_tied_weights_stay_once() -> None:
    pipe = tiny.pipeline("pixart")
    first, second = pipe.transformer.transformer_blocks[:2]
    second.attn1.to_q.weight = first.attn1.to_q.weight
    first.attn1.to_v.weight = first.attn1.to_k.weight  # within a block: comes once
    plain = tiny.painted(call_pipeline(pipe, tiny.call_arguments("pixart")))
    patchpipe.parallelize(pipe, ParallelConfig(warmup="all", offload=NONE))
    assert torch.equal(tiny.painted(call_pipeline(pipe, tiny.call_arguments("pixart"))), plain)
    told = pipe.patchpipe.offload.as_dict()
    assert told["resident_bytes"] == first.attn1.to_q.weight.nbytes * 2  # of both blocks it counts
    total = sum(one.nbytes for block in pipe.transformer.transformer_blocks for one in set(block.parameters()))
    assert told["streamed_bytes_per_pass"] < total
    patchpipe.restore(pipe)


def test_requests_in_flight_together() -> None:
    def fly(place: Place, config: ParallelConfig) -> list[Any]:
        pipe = tiny.pipeline("flux")
        patchpipe.parallelize(pipe, config, group=place.join(config))
        calls = [
            {
                **tiny.call_arguments("flux", height=height),
                "output_type": "latent",
                "generator": torch.Generator().manual_seed(height),  # torch's own one is shared by ranks in threads
            }
            for height in (64, 112)
        ]
        made = pipe.patchpipe.together(calls)
        patchpipe.restore(pipe)
        return [None if each is None else tiny.painted(each) for each in made]

    stays, goes = (ParallelConfig(pipefusion=2, patches=2, offload=asked) for asked in (None, HALF))
    right, found = (run_threads(2, fly, config) for config in (stays, goes))
    assert all(torch.equal(one, other) for one, other in zip(right[0], found[0], strict=True))


def test_exchanges_close_the_gate() -> None:
    def passages(place: Place, config: ParallelConfig) -> int:
        pipe = tiny.pipeline("flux")
        patchpipe.parallelize(pipe, config, group=place.join(config))
        call_pipeline(pipe, tiny.call_arguments("flux"))
        gate = pipe.patchpipe.group.lines["ulysses"].wire.gate
        assert (gate is None) == (config.offload is None or config.offload.gate == "off")
        return 0 if gate is None else gate.passages

    for gate, expected in (("on", 4 * 2 * 4 * 2), ("off", 0)):  # steps, branches, blocks, exchanges of each
        asked = OffloadConfig(resident=0.2, chunk=0.004, gate=gate)  # type: ignore[arg-type]
        assert run_threads(2, passages, ParallelConfig(ulysses=2, offload=asked))[0] == expected


# -- what is done to a pipeline ------------------------------------------------------------------


def test_lora_comes_with_its_block(tmp_path: Path) -> None:
    pipe, file = tiny.pipeline("flux"), loras.save(tiny.pipeline("flux"), tmp_path)
    arguments = tiny.call_arguments("flux")
    patchpipe.parallelize(pipe, ParallelConfig(warmup="all", offload=HALF))
    bare = tiny.painted(call_pipeline(pipe, arguments))
    pipe.load_lora_weights(str(file))
    adapted = tiny.painted(call_pipeline(pipe, arguments))
    pipe.fuse_lora()
    fused = tiny.painted(call_pipeline(pipe, arguments))
    assert not torch.equal(adapted, bare)
    patchpipe.restore(pipe)
    plain = tiny.pipeline("flux")
    plain.load_lora_weights(str(file))
    assert torch.equal(tiny.painted(call_pipeline(plain, arguments)), adapted)
    plain.fuse_lora()
    assert torch.equal(tiny.painted(call_pipeline(plain, arguments)), fused)


def test_quantised_weights_come_as_they_are() -> None:
    ao = pytest.importorskip("torchao.quantization")
    pipe = tiny.pipeline("flux")
    ao.quantize_(pipe.transformer, ao.Int8WeightOnlyConfig())
    arguments = tiny.call_arguments("flux")
    whole = sum(4 * one.numel() for block in blocks_of(pipe) for one in block.parameters())
    plain = tiny.painted(call_pipeline(pipe, arguments))
    patchpipe.parallelize(pipe, ParallelConfig(warmup="all", offload=NONE))
    assert torch.equal(tiny.painted(call_pipeline(pipe, arguments)), plain)
    assert pipe.patchpipe.offload.as_dict()["streamed_bytes_per_pass"] < whole / 2
    patchpipe.restore(pipe)
    assert torch.equal(tiny.painted(call_pipeline(pipe, arguments)), plain)


def test_other_offloading_is_refused() -> None:
    pipe = tiny.pipeline("flux")
    pipe.transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    with pytest.raises(ValueError, match=r"enable_layerwise_casting\(\) casts whole matrices .* without offload"):
        patchpipe.parallelize(pipe, ParallelConfig(offload=HALF))


# -- from disk -----------------------------------------------------------------------------------


def test_weights_from_disk(tmp_path: Path) -> None:
    folder = tiny.save("wan-a14b", tmp_path / "wan")
    arguments = tiny.call_arguments("wan-a14b", height=112)

    def load(place: Place, config: ParallelConfig) -> tuple[Tensor | None, Any]:
        pipe = from_pretrained(folder, config, group=place.join(config))
        pipe.set_progress_bar_config(disable=True)
        made = call_pipeline(pipe, arguments)
        told = None if config.offload is None else pipe.patchpipe.offload.as_dict()
        return None if made is None else tiny.painted(made), told

    found = []
    for asked in (None, HALF, OffloadConfig(resident=0.4, chunk=0.004, tier="disk")):
        config = ParallelConfig(pipefusion=2, patch_rows=(2, 2, 1), offload=asked)
        found.append(run_threads(2, load, config))
    for ranks in found[1:]:
        assert torch.equal(ranks[0][0], found[0][0][0])
        assert all(told["bytes"] > 0 for _, told in ranks)
    with pytest.raises(ValueError, match=r"stored in torch\.float32 but asked for in torch\.bfloat16"):
        from_pretrained(folder, ParallelConfig(offload=OffloadConfig(tier="disk")), dtype="bf16")


def test_disk_needs_the_models_files() -> None:
    with pytest.raises(ValueError, match="tier='disk' reads the model's files each time: use from_pretrained"):
        patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(offload=OffloadConfig(tier="disk")))


# -- too little ----------------------------------------------------------------------------------


def test_too_little_memory_says_what_it_would_take() -> None:
    def refused(place: Place) -> str:
        config = ParallelConfig(pipefusion=2, offload=OffloadConfig(memory=1e-6))
        pipe = tiny.pipeline("flux")
        with pytest.raises(ValueError) as raised:
            patchpipe.parallelize(pipe, config, group=place.join(config))
        return str(raised.value)

    told = run_threads(2, refused)
    assert "need at least " in told[0]
    assert "on the device" in told[0]
    assert "use more stages" in told[0]
    assert told[0] == told[1]


def test_a_memory_that_is_given_is_kept() -> None:
    pipe = tiny.pipeline("flux")
    total = sum(one.nbytes for block in blocks_of(pipe) for one in block.parameters())
    config = ParallelConfig(offload=OffloadConfig(memory=0.6 * total / GIB))
    patchpipe.parallelize(pipe, config)
    call_pipeline(pipe, tiny.call_arguments("flux"))
    told = pipe.patchpipe.offload.as_dict()
    assert told["resident_bytes"] + told["ring_bytes"] <= 0.6 * total
    assert told["resident_bytes"] > 0.1 * total
    assert len(transformers_of(pipe)) == 1
    patchpipe.restore(pipe)


def test_a_pipeline_that_is_dropped_goes_with_its_weights_and_its_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a notebook that makes the next pipeline in place of one that nobody restored."""
    monkeypatch.setattr(mover, "IDLE_SECONDS", 0.05)
    before = set(threading.enumerate())
    pipe = tiny.pipeline("flux")
    patchpipe.parallelize(pipe, ParallelConfig(offload=NONE))
    call_pipeline(pipe, tiny.call_arguments("flux"))
    [thread] = [each for each in threading.enumerate() if each.name == "patchpipe weights" and each not in before]
    transformer = weakref.ref(pipe.transformer)
    del pipe
    until = time.monotonic() + 60
    while thread.is_alive() and time.monotonic() < until:
        gc.collect()
        time.sleep(0.05)
    assert not thread.is_alive()
    assert transformer() is None
