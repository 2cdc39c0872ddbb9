"""A text encoder in host memory gives what it gives on the device, and takes no more of the device than it says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from patchpipe import ParallelConfig, parallelize, restore
from patchpipe.loading.encoders.hosting import AHEAD, HostedEncoder
from patchpipe.loading.encoders.layers import Layers
from patchpipe.offload.ring import aligned
from tests import tiny
from tests.pipeline.test_encoders import CLASSES, call, painted, states
from tests.support.ranks import Place, quieten
from tests.support.threads import run_threads

CPU = torch.device("cpu")


def setup_module() -> None:
    quieten()


def encoder_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    kind: Callable[..., Any] = getattr(transformers, name)
    return kind(CLASSES[name]()).eval().to(dtype)


def hosted(model: nn.Module, throttle: float | None = None) -> HostedEncoder:
    return HostedEncoder("text_encoder", model, CPU, timeout=30, throttle=throttle)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLASSES)
def test_a_hosted_encoder_gives_what_it_gives_on_the_device(name: str, dtype: torch.dtype) -> None:
    model = encoder_of(name, dtype)
    before = dict(model.named_parameters(remove_duplicate=False))
    expected = states(model)
    encoder = hosted(model)
    undo = encoder.attach()
    assert all(not any(one.stride()) for one in model.parameters() if one.numel() > 1), "stand-ins alone"
    assert (model.device, model.dtype) == (CPU, dtype)
    for _ in range(2):
        for mine, its in zip(states(model), expected, strict=True):
            assert (mine == its).all()
    assert encoder.stats.out_of_turn == 0
    sizes = {id(one): aligned(one.nbytes) for one in before.values()}
    assert encoder.hosted == sum(sizes.values()), "what is tied is in memory once"
    undo()
    after = dict(model.named_parameters(remove_duplicate=False))
    assert list(after) == list(before)
    assert all(parameter is before[one] for one, parameter in after.items()), "tied ones too"
    for mine, its in zip(states(model), expected, strict=True):
        assert (mine == its).all()


def test_each_prompt_copies_the_layers_once_through_one_buffer() -> None:
    model = encoder_of("T5EncoderModel")
    layers = Layers.of(model)
    sizes = [sum(aligned(one.numel() * 4) for one in model.get_submodule(name).parameters()) for name in layers.layers]
    encoder = hosted(model)
    encoder.attach()
    for prompts in (1, 2):
        states(model)
        assert encoder.stats.bytes == prompts * sum(sizes)
        assert encoder.stats.blocks == prompts * len(sizes)
    chunk = -(-max(sizes) // 4)
    largest = max(aligned(one.numel() * 4) for one in encoder_of("T5EncoderModel").encoder.block.parameters())
    ring = max(sizes) + aligned(AHEAD * chunk) + largest
    norm = aligned(4 * 32)
    assert encoder.on_device == ring + norm
    assert encoder.stats.peak <= ring
    with pytest.raises(AssertionError):
        _ = encoder.ring  # its memory is the transformer's between prompts


def test_layers_come_while_those_before_compute() -> None:
    model = encoder_of("T5EncoderModel")
    encoder = hosted(model)
    encoder.attach()
    ahead: list[int] = []
    for name in Layers.of(model).layers[:-1]:
        leaf = next(one for one in model.get_submodule(name).modules() if isinstance(one, nn.Linear))

        def wait(*_: Any) -> None:
            threads = torch.randn(300, 300)
            for _ in range(20):
                threads @ threads
            ahead.append(encoder.mover._ahead())

        leaf.register_forward_pre_hook(wait)
    states(model)
    assert max(ahead) > 0


def test_a_layer_or_table_that_is_called_by_itself_is_right() -> None:
    model = encoder_of("Qwen3ForCausalLM")
    ids = torch.tensor([[1, 5, 2]])
    writing = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    with torch.no_grad():
        rows, written = model.model.embed_tokens(ids), model.generate(ids, **writing)
        told = model.lm_head(rows)
        encoder = hosted(model)
        encoder.attach()
        assert torch.equal(model.model.embed_tokens(ids), rows)
        assert torch.equal(model.lm_head(rows), told)
        before = encoder.stats.blocks
        assert torch.equal(model.generate(ids, **writing), written)
    assert encoder.stats.blocks - before == 3 * 5


def test_words_are_looked_up_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = encoder_of("GlmModel")
    expected = model.embed_tokens(torch.tensor([[1, 2]]))
    seen: list[tuple[str, torch.Tensor]] = []
    look_up = nn.functional.embedding

    def spied(ids: torch.Tensor, table: torch.Tensor, *rest: Any) -> torch.Tensor:
        rows = look_up(ids, table, *rest)
        seen.append((table.device.type, rows))
        return rows

    monkeypatch.setattr(nn.functional, "embedding", spied)
    HostedEncoder("text_encoder", model, torch.device("meta"), timeout=30).attach()
    rows = model.embed_tokens(torch.tensor([[1, 2]]))
    assert (rows.device.type, rows.shape, model.device.type) == ("meta", expected.shape, "meta")
    ((device, found),) = seen
    assert device == "cpu"
    assert torch.equal(found, expected)


def test_a_layer_that_has_become_another_is_refused() -> None:
    model = encoder_of("T5EncoderModel")
    hosted(model).attach()
    block = model.encoder.block[1].layer[0].SelfAttention
    block.q = nn.Linear(32, 16, bias=False)
    with pytest.raises(ValueError, match="layers of text_encoder have become others"):
        states(model)


def test_saving_is_refused() -> None:
    model = encoder_of("CLIPTextModel")
    undo = hosted(model).attach()
    with pytest.raises(ValueError, match="the weights of text_encoder are in host memory"):
        model.save_pretrained("unused")
    undo()
    assert "save_pretrained" not in vars(model)


def test_an_encoder_that_cannot_move_is_refused_and_left_alone() -> None:
    class Odd(torch.Tensor):
        pass

    model = encoder_of("T5EncoderModel")
    linear = model.encoder.block[1].layer[0].SelfAttention.q
    linear.weight = nn.Parameter(linear.weight.detach().as_subclass(Odd), requires_grad=False)
    with pytest.raises(ValueError, match=r'text_rank="host" cannot move a weight: .* is a Odd'):
        hosted(model).attach()
    assert "forward" not in vars(model)


def test_a_pipeline_in_memory_takes_its_encoders_to_the_host_and_back() -> None:
    expected = painted(tiny.pipeline("flux")(**call("flux")))

    def paint(place: Place) -> tuple[Any, bool, Any]:
        config = ParallelConfig(pipefusion=2, patches=2, warmup="all", text_rank="host", timeout=60)
        pipe = parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        picture = painted(pipe(**call("flux")))
        away = not any(pipe.text_encoder_2.shared.weight.stride())
        return picture, away, painted(restore(pipe)(**call("flux")))

    found = run_threads(2, paint)
    assert [away for _, away, _ in found] == [False, True], "on the rank that encodes"
    for one in (found[0][0], found[0][2], found[1][2]):
        assert (one == expected).all()


def test_lora_in_an_encoder_in_memory_is_refused_before_ranks_meet() -> None:
    pipe = tiny.pipeline("flux")
    pipe.text_encoder.peft_config = {"default": object()}
    with pytest.raises(ValueError, match="takes no LoRA in encoders, and text_encoder has some"):
        parallelize(pipe, ParallelConfig(text_rank="host"))
