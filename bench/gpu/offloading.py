"""Part i: blocks and a text encoder whose weights come from host memory, beside diffusers' own group offloading."""

from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers

import patchpipe
from bench.gpu.memory import built
from bench.gpu.painting import apart, numbers
from bench.gpu.setting import Note, Setting
from bench.one_device import request, timed
from patchpipe import OffloadConfig, ParallelConfig
from patchpipe.loading.encoders.hosting import HostedEncoder

GIB = 24.0
LAYERS = (8, 16)  # of FLUX.1's 19 and 38: 10 GB in 16 bits
MEMORY = 3.0  # GiB of them on the card
BLOCK = 680.0  # megabytes of the largest
SHORT, LONG = 2, 5  # steps: a step is the difference
ROUNDS = 3
OFF = 0.05  # of the formula for what the weights take
WORDS = 512

Prepare = Callable[[Any], Any]


def run(setting: Setting, note: Note) -> None:
    """A row for every way to hold the blocks' weights, and one for the encoder."""
    setting.needs(GIB)
    place = setting.places(1, own=False)[0]
    share = {"resident": 0.3} if setting.tiny else {"memory": MEMORY}
    ways: dict[str, Prepare] = {
        "all on the card": lambda pipe: None,
        "chunks, no gate": partial(_offload, OffloadConfig(**share, gate="off")),
        "whole layers, one ahead": partial(_offload, OffloadConfig(**share, gate="off", chunk=BLOCK, depth=1)),
        "diffusers' group offload, by block": partial(_group, place, "block_level"),
        "diffusers' group offload, by leaf": partial(_group, place, "leaf_level"),
    }
    whole: dict[str, Any] = {}
    for name, prepare in ways.items():
        found = measure(place, prepare)
        whole = whole or found
        note(name, *_judged(found, whole))
    note("text encoder from host memory", *_encoder(setting, place))


def _offload(config: OffloadConfig, pipe: Any) -> Any:
    layout = ParallelConfig(offload=config, split_batch=False, share_blocks=False, patches=1)
    return patchpipe.parallelize(pipe, layout).patchpipe.offload


def _group(place: str, kind: str, pipe: Any) -> None:
    by = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    pipe.transformer.enable_group_offload(
        onload_device=torch.device(place), offload_device=torch.device("cpu"), offload_type=kind,
        use_stream=place != "cpu", **by,
    )  # fmt: skip


def measure(place: str, prepare: Prepare) -> dict[str, Any]:
    """Seconds of a step, the peak in a request, and what offload says of itself."""
    gc.collect()
    on_gpu = place != "cpu"
    if on_gpu:
        torch.cuda.empty_cache()
    torch.manual_seed(0)  # weights are made on the device
    pipe, call = built(place, None if place == "cpu" else LAYERS)
    offload = prepare(pipe)
    latents = numbers(request(pipe, call, SHORT))
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(place)
    seconds = []
    for _ in range(ROUNDS):
        short, long = (timed(partial(request, pipe, call, steps)) for steps in (SHORT, LONG))
        seconds.append((long - short) / (LONG - SHORT))
    found = {"latents": latents, "step_seconds": median(seconds)}
    if on_gpu:
        found["peak"] = torch.cuda.max_memory_allocated(place)
    if offload is not None:
        chosen = offload.chosen
        found |= {"offload": offload.describe(), "blocks_bytes": chosen.bytes, "stalls": offload.stats.stalls}
        found |= {"predicted_seconds": chosen.waiting.seconds, "streamed": sum(chosen.streamed), "stays": chosen.stays}
    return found


def _judged(found: dict[str, Any], whole: dict[str, Any]) -> tuple[bool | None, dict[str, Any]]:
    """Right where the picture is that of all weights on the card, and memory is what the formula says."""
    figures = {name: value for name, value in found.items() if name != "latents"}
    figures["apart"] = apart(found["latents"], whole["latents"])
    if "blocks_bytes" not in found:
        return None, figures
    fine = figures["apart"] == 0.0
    if "peak" in found:
        gone = found["streamed"] + found["stays"] - found["blocks_bytes"]  # of the blocks' weights, from the card
        expected = whole["peak"] - gone
        figures["expected_peak"] = expected
        fine &= abs(found["peak"] - expected) <= OFF * expected
    return fine, figures


def _encoder(setting: Setting, place: str) -> tuple[bool, dict[str, Any]]:
    """Seconds of a prompt with T5-XXL's sizes, on the card and from the host."""
    sizes = {"num_layers": 2, "d_model": 64, "d_ff": 128, "num_heads": 2, "d_kv": 32, "vocab_size": 100}
    if not setting.tiny:
        sizes = {"num_layers": 24, "d_model": 4096, "d_ff": 10240, "num_heads": 64, "d_kv": 64, "vocab_size": 32128}
    torch.manual_seed(0)
    with torch.device(place):
        config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", dropout_rate=0.0)
        model: Any = transformers.T5EncoderModel(config).eval().to(torch.bfloat16)
    ids = torch.arange(WORDS, device=place)[None] % sizes["vocab_size"]

    def encode() -> Any:
        with torch.no_grad():
            return model(input_ids=ids).last_hidden_state

    expected, on_card = encode(), median(timed(encode) for _ in range(ROUNDS))
    encoder = HostedEncoder("text_encoder", model, torch.device(place), timeout=60)
    encoder.attach()
    same = torch.equal(encode(), expected)
    if place != "cpu":
        torch.cuda.reset_peak_memory_stats(place)
    seconds = median(timed(encode) for _ in range(ROUNDS))
    figures = {"on_card_seconds": on_card, "step_seconds": seconds, "offload": encoder.describe()}
    figures["streamed"] = encoder.stats.bytes // (ROUNDS + 1)
    if place != "cpu":
        figures["peak"] = torch.cuda.max_memory_allocated(place)
    return same, figures
