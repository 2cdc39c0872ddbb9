"""Text encoders too large for one rank: their layers on all ranks, or read one after the other."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import nn

import patchpipe
from patchpipe import ParallelConfig
from patchpipe.layout.text import DISK, HOST, LAYERS, ON_THE_LAST, from_the_last
from patchpipe.loading.checkpoint import Checkpoint
from patchpipe.loading.encoders import passing
from patchpipe.loading.encoders.layers import Layers
from patchpipe.loading.encoders.placing import layered_encoders
from patchpipe.loading.folder import PipelineFolder
from patchpipe.pipeline.parts import Hooks, Parts
from patchpipe.planner.work.describe import describe_model
from tests import tiny
from tests.support.ranks import Place, quieten, run_ranks
from tests.support.threads import run_threads
from tests.tiny import loras

SEED = 7
TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 5, "num_heads": 2, "dropout_rate": 0.0}
VISION = {
    "depth": 2, "hidden_size": 16, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 32, "patch_size": 14,
    "fullatt_block_indexes": [1],
}  # fmt: skip
CLASSES: dict[str, Callable[[], Any]] = {
    "T5EncoderModel": lambda: transformers.T5Config(**T5),
    "UMT5EncoderModel": lambda: transformers.UMT5Config(**T5),
    "CLIPTextModel": lambda: transformers.CLIPTextConfig(**TEXT),
    "CLIPTextModelWithProjection": lambda: transformers.CLIPTextConfig(**TEXT, projection_dim=16),
    "Qwen2_5_VLForConditionalGeneration": lambda: transformers.Qwen2_5_VLConfig(
        text_config={**TEXT, "rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}},
        vision_config=VISION,
        tie_word_embeddings=False,
    ),
    "Mistral3ForConditionalGeneration": lambda: transformers.Mistral3Config(
        text_config=transformers.MistralConfig(**TEXT),
        vision_config=transformers.PixtralVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, head_dim=8
        ),
    ),
    "Gemma2Model": lambda: transformers.Gemma2Config(**TEXT),
    "Qwen3ForCausalLM": lambda: transformers.Qwen3Config(**TEXT, tie_word_embeddings=True),
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**TEXT),
    "GlmModel": lambda: transformers.GlmConfig(**TEXT),
}  # fmt: skip


def setup_module() -> None:
    quieten()


def save_encoder(name: str, folder: Path) -> Path:
    """A folder that is a pipeline as far as its text encoder goes."""
    torch.manual_seed(SEED)
    kind = getattr(transformers, name)
    kind(CLASSES[name]()).eval().save_pretrained(folder / "text_encoder")
    index = {"_class_name": "FluxPipeline", "text_encoder": ["transformers", name]}
    (folder / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    return folder


def states(encoder: Any) -> list[np.ndarray]:
    """All hidden states of two prompts of different lengths."""
    ids = torch.tensor([[1, 5, 9, 33, 7, 2], [1, 8, 2, 0, 0, 0]])
    with torch.no_grad():
        out = encoder(input_ids=ids, attention_mask=(ids != 0).long(), output_hidden_states=True)
    return [state.float().numpy() for state in out.hidden_states]


def states_of_layers(place: Place, folder: Path, dtype: torch.dtype) -> tuple[list[np.ndarray], int]:
    config = ParallelConfig(pipefusion=place.world_size, text_rank=LAYERS, timeout=60)
    group = place.join(config)
    device = torch.device("cpu")
    (one,) = layered_encoders(PipelineFolder(folder), config, dtype, device, {}.get, None)
    encoder = one.read(config, group.rank)
    runner: Any = SimpleNamespace(points=SimpleNamespace(passing=nullcontext))
    unused: Any = None
    Parts(config, group, runner, unused, unused).hook_encoders(
        SimpleNamespace(components={"text_encoder": encoder}), Hooks()
    )
    found = states(encoder)
    with pytest.raises(ValueError, match="cannot write text"):
        encoder.generate(torch.tensor([[1]]))
    return found, held(encoder)


def held(model: nn.Module) -> int:
    """Bytes of weights in memory; a stand-in has one element for all of a parameter."""
    own = [one.untyped_storage() for one in model.parameters() if not one.is_meta]
    whole = {one.data_ptr(): one.nbytes() for one in own if one.nbytes() > 4}
    return sum(whole.values())


@pytest.mark.some(of=3, first=1)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", CLASSES)
def test_streamed_layers_give_what_the_whole_encoder_gives(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_encoder(name, tmp_path)
    whole = getattr(transformers, name).from_pretrained(folder / "text_encoder", dtype=dtype)
    config = ParallelConfig(text_rank=DISK)
    (one,) = layered_encoders(PipelineFolder(folder), config, dtype, torch.device("cpu"), {}.get, None)
    encoder = one.read(config, 0)
    seen, most = states(whole), held_meanwhile(encoder, one.layers)
    for mine, its in zip(states(encoder), seen, strict=True):
        assert np.array_equal(mine, its)
    assert list(most) == list(one.layers.layers)
    for part, size in most.items():
        assert size == held(whole.get_submodule(part)), "one module at a time"
    assert held(encoder) == 0, "nothing stays"
    assert encoder.dtype == dtype
    assert encoder.device.type == "cpu"


def held_meanwhile(encoder: nn.Module, layers: Layers) -> dict[str, int]:
    """What is in memory while each layer runs, once the encoder has run."""
    found: dict[str, int] = {}

    def note(name: str, *_: Any) -> None:
        found[name] = held(encoder)

    for name in layers.layers:
        leaf = next(one for one in encoder.get_submodule(name).modules() if not list(one.children()))
        leaf.register_forward_pre_hook(partial(note, name))
    return found


@pytest.mark.some(of=3)
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", CLASSES)
def test_layers_on_several_ranks_give_what_the_whole_encoder_gives(name: str, ranks: int, tmp_path: Path) -> None:
    folder = save_encoder(name, tmp_path)
    whole = getattr(transformers, name).from_pretrained(folder / "text_encoder", dtype=torch.bfloat16)
    found = run_threads(ranks, states_of_layers, folder, torch.bfloat16)
    for mine, _ in found:
        for one, its in zip(mine, states(whole), strict=True):
            assert np.array_equal(one, its)
    sizes, everything = [size for _, size in found], held(whole)
    assert sum(sizes) == pytest.approx(everything, rel=0.01), "each weight on one rank"
    layers = Layers.of(whole)
    expected = layers.held(from_the_last(ranks, 0))
    assert sizes == [pytest.approx(2 * expected[rank], rel=0.01) for rank in range(ranks)]


# ------------------------------------------------------------------------------------------- whole pipelines


def deeper(name: str, folder: Path) -> Path:
    """A tiny pipeline whose encoders have four layers each."""
    pipe = tiny.pipeline(name)
    torch.manual_seed(SEED)
    for part in [part for part in pipe.components if part.startswith("text_encoder")]:
        config = getattr(pipe, part).config
        inner = getattr(config, "text_config", config)
        inner.update({"num_layers": 4} if hasattr(inner, "num_layers") else {"num_hidden_layers": 4})
        if hasattr(inner, "layer_types"):
            inner.layer_types = [inner.layer_types[0]] * 4
        pipe.register_modules(**{part: type(getattr(pipe, part))(config).eval()})
    pipe.save_pretrained(folder)
    return folder


def call(name: str, prompt: str = tiny.PROMPT) -> dict[str, Any]:
    given = tiny.call_arguments(name, steps=2)
    return {**given, "prompt": prompt, "output_type": "np", "generator": torch.Generator().manual_seed(3)}


def painted(output: Any) -> np.ndarray | None:
    return None if output is None else np.asarray(output[0])


def painting(place: Place, folder: Path, name: str, way: str, prompts: list[str]) -> tuple[list[Any], dict[str, int]]:
    config = ParallelConfig(pipefusion=place.world_size, patches=2, warmup="all", timeout=60, text_rank=way)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    pictures = [painted(pipe(**call(name, prompt))) for prompt in prompts]
    encoders = {part: held(model) for part, model in pipe.components.items() if part.startswith("text_encoder")}
    return pictures, encoders


@pytest.mark.some
@pytest.mark.parametrize("way", [LAYERS, HOST, DISK])
@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("name", ["flux", "sd3", "qwen", "wan"])
def test_pictures_are_those_of_plain_diffusers(name: str, ranks: int, way: str, tmp_path: Path) -> None:
    import diffusers

    folder = deeper(name, tmp_path / name)
    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    plain.set_progress_bar_config(disable=True)
    prompts = [tiny.PROMPT, tiny.OTHER_PROMPT, tiny.PROMPT]
    expected = [painted(plain(**call(name, prompt))) for prompt in prompts]
    found = run_threads(ranks, painting, folder, name, way, prompts)
    for mine, its in zip(found[0][0], expected, strict=True):
        assert np.array_equal(mine, its)
    whole = {part: held(model) for part, model in plain.components.items() if part.startswith("text_encoder")}
    for part, size in whole.items():
        together = sum(encoders[part] for _, encoders in found)
        assert together == (0 if way in ON_THE_LAST else size), part
        assert way in ON_THE_LAST or all(0 < encoders[part] < size for _, encoders in found), part


def test_a_streamed_prompt_is_encoded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = deeper("flux", tmp_path / "flux")
    pipe = patchpipe.from_pretrained(folder, ParallelConfig(text_rank=DISK))
    reads: list[set[str]] = []
    read = Checkpoint.read
    monkeypatch.setattr(Checkpoint, "read", lambda self, names: reads.append({*names}) or read(self, names))
    first = painted(pipe(**call("flux")))
    once = len(reads)
    assert once > 8, "layer by layer"
    again = painted(pipe(**{**call("flux"), "num_inference_steps": 3}))
    assert len(reads) == once
    assert again is not None
    assert np.array_equal(painted(pipe(**call("flux"))), first)
    pipe(**call("flux", "owl"))
    assert len(reads) == once + once // 2, "the negative prompt was seen"


def test_prompts_are_told_apart_by_all_that_the_pipeline_knows() -> None:
    class Pipe:
        _guidance_scale = 1.0

        def encode_prompt(self, prompt: str, picture: Any = None) -> tuple[torch.Tensor, None]:
            calls.append(prompt)
            return torch.full((2,), float(len(calls))), None

    calls: list[str] = []
    pipe = Pipe()
    encode = passing.Prompts().remembering(pipe.encode_prompt)
    first = encode("owl")
    first[0].zero_()  # nobody else's
    assert [encode("owl")[0][0].item(), encode(prompt="owl")[0][0].item()] == [1, 2]
    pipe._guidance_scale = 3.0
    assert encode("owl")[0][0].item() == 3, "the method may look at the pipeline"
    assert [encode("owl", torch.zeros(1))[0][0].item() for _ in range(2)] == [4, 5], "tensors are not compared"
    for number in range(passing.KEPT):
        encode(f"owl {number}")
    assert encode("owl")[0][0].item() == 6 + passing.KEPT, "the oldest are forgotten"


def test_what_was_given_is_not_sent() -> None:
    bias, mask = torch.ones(2, 2), torch.zeros(2)
    result = (torch.full((2,), 3.0), bias, None, [mask])
    sent = passing.mark_given(result, ((bias,), {"mask": mask}))
    assert sum(isinstance(one, torch.Tensor) for one in (*sent[:2], *sent[3])) == 1
    back = passing.put_given(sent, ((bias.clone(),), {"mask": mask.clone()}))
    assert torch.equal(back[1], bias)
    assert torch.equal(back[3][0], mask)


def painting_together(place: Place, folder: Path, way: str) -> list[Any]:
    config = ParallelConfig(pipefusion=2, patches=2, warmup="all", timeout=60, text_rank=way)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    calls = [call("flux"), call("flux", "owl")]
    return [painted(output) for output in pipe.patchpipe.together(calls)]


@pytest.mark.parametrize("way", [LAYERS, HOST, DISK])
def test_requests_in_flight_together_encode_in_turn(way: str, tmp_path: Path) -> None:
    import diffusers

    folder = deeper("flux", tmp_path / "flux")
    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    expected = [painted(plain(**call("flux", prompt))) for prompt in (tiny.PROMPT, "owl")]
    for mine, its in zip(run_threads(2, painting_together, folder, way)[0], expected, strict=True):
        assert np.array_equal(mine, its)


def painting_with_lora(place: Place, folder: Path, lora: Path, way: str) -> np.ndarray | None:
    config = ParallelConfig(pipefusion=place.world_size, patches=2, warmup="all", timeout=60, text_rank=way)
    pipe = patchpipe.from_pretrained(folder, config, group=place.join(config))
    pipe.load_lora_weights(lora)
    return painted(pipe(**call("flux")))


def test_lora_of_a_text_encoder_goes_with_its_layers(tmp_path: Path) -> None:
    import diffusers

    folder = deeper("flux", tmp_path / "flux")
    plain = diffusers.DiffusionPipeline.from_pretrained(folder)
    without = painted(plain(**call("flux")))
    lora = loras.save(plain, tmp_path / "lora", text=True)
    plain.load_lora_weights(lora)
    expected = painted(plain(**call("flux")))
    assert not np.array_equal(expected, without)
    # In processes: while it loads, peft changes torch for all threads.
    assert np.array_equal(run_ranks(2, painting_with_lora, folder, lora, LAYERS)[0], expected)
    for way in ON_THE_LAST:
        with pytest.raises(AssertionError, match=f'text_rank="{way}" has text_encoder as it is stored, for which LoRA'):
            run_ranks(2, painting_with_lora, folder, lora, way)


# --------------------------------------------------------------------------------------------------- refusals


def test_an_encoder_without_a_list_of_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="Linear has no list of layers, by which to spread or stream it: give text_r"):
        Layers.of(nn.Linear(2, 2))


def test_streaming_needs_files() -> None:
    with pytest.raises(ValueError, match="reads the encoders' files each time: use from_pretrained"):
        patchpipe.parallelize(tiny.pipeline("flux"), ParallelConfig(text_rank=DISK))


@pytest.mark.parametrize("way", [LAYERS, DISK])
def test_a_checkpoint_that_lacks_a_layer_is_refused_before_ranks_meet(way: str, tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path / "flux")
    weights = folder / "text_encoder" / "model.safetensors"
    from safetensors.torch import load_file, save_file

    stored = load_file(weights)
    gone = next(name for name in stored if "layers.1" in name)
    save_file({name: value for name, value in stored.items() if name != gone}, weights, {"format": "pt"})
    with pytest.raises(ValueError, match=r"text_encoder lack .*layers.1.* the checkpoint is incomplete"):
        patchpipe.from_pretrained(folder, ParallelConfig(text_rank=way))


def test_a_quantised_encoder_is_refused(tmp_path: Path) -> None:
    folder = tiny.save("flux", tmp_path / "flux")
    settings = folder / "text_encoder" / "config.json"
    told = {**json.loads(settings.read_text(encoding="utf-8")), "quantization_config": {"quant_method": "torchao"}}
    settings.write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ValueError, match="reads whole weights, and text_encoder is quantised: give text_rank a rank"):
        patchpipe.from_pretrained(folder, ParallelConfig(text_rank=LAYERS))
    settings.write_text(json.dumps({**told, "quantization_config": {"quant_method": "bitsandbytes"}}), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot move weights quantised with bitsandbytes, as text_encoder has them"):
        patchpipe.from_pretrained(folder, ParallelConfig(text_rank=HOST))


def test_layers_in_memory_stay_whole_and_are_run_by_their_ranks() -> None:
    expected = painted(tiny.pipeline("flux")(**call("flux")))

    def paint(place: Place) -> np.ndarray | None:
        config = ParallelConfig(pipefusion=2, patches=2, warmup="all", text_rank=LAYERS, timeout=60)
        pipe = patchpipe.parallelize(tiny.pipeline("flux"), config, group=place.join(config))
        return painted(pipe(**call("flux")))

    assert np.array_equal(run_threads(2, paint)[0], expected)


@pytest.mark.parametrize("way", [LAYERS, HOST, DISK])
def test_info_says_what_each_rank_holds(way: str, tmp_path: Path) -> None:
    folder = deeper("flux", tmp_path / "flux")
    told = describe_model(folder, ParallelConfig(pipefusion=2, text_rank=way))
    texts = [", ".join(stage.components) for stage in told.stages]
    if way in ON_THE_LAST:
        words = {HOST: "in host memory", DISK: "one layer at a time"}[way]
        assert texts == ["vae", f"text_encoder ({words}), text_encoder_2 ({words})"]
    else:
        assert texts == [
            "text_encoder layers 1…3, text_encoder_2 layers 1…3, vae",
            "text_encoder layers 0…0 and what surrounds them, text_encoder_2 layers 0…0 and what surrounds them",
        ]
