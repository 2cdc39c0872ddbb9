"""Tiny pipelines that keep keys and values of their first call: of text, and of pictures they are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffusers import (
    AutoencoderKLQwenImage21,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinKVPipeline,
    QwenImage21Pipeline,
    QwenImage21Transformer2DModel,
)
from transformers import BatchFeature, Qwen2VLImageProcessor, Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests import tiny

SLOT = "<|image_pad|>"
MARKS = ("<|vision_start|>", SLOT, "<|vision_end|>")
LAYERS = {"hidden_size": tiny.WIDTH, "intermediate_size": 32, "num_attention_heads": 2}


class Processor:
    """What the pipeline asks of Qwen3-VL's own, which cannot be made without torchvision."""

    def __init__(self) -> None:
        self.tokenizer = tiny._qwen_tokenizer()
        special = ["<|im_start|>", "<|im_end|>", *MARKS]
        self.tokenizer.add_special_tokens({"additional_special_tokens": special})
        self.images = Qwen2VLImageProcessor(min_pixels=32 * 32, max_pixels=1 << 20, patch_size=16, merge_size=2)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **_: Any) -> list[list[int]]:
        text = messages[0]["content"][0]["text"]
        return [self.tokenizer.encode(f"<|im_start|>system\n{text}<|im_end|>\n")]

    def __call__(self, text: Sequence[str], images: Any = None, **options: Any) -> BatchFeature:
        """Tokens, with as many slots for each picture as it has groups of four patches."""
        found = {} if images is None else dict(self.images(images, return_tensors="pt"))
        slots = iter([int(grid.prod()) // 4 for grid in found.get("image_grid_thw", ())])
        parts = [each.split(SLOT) for each in text]
        texts = ["".join([first, *(SLOT * next(slots) + part for part in rest)]) for first, *rest in parts]
        tokens = dict(self.tokenizer(texts, **options))
        kinds = (tokens["input_ids"] == self.tokenizer.convert_tokens_to_ids(SLOT)).long()
        return BatchFeature({**tokens, "mm_token_type_ids": kinds, **found})


def _encoder(tokenizer: Any) -> Qwen3VLForConditionalGeneration:
    start, slot, end = map(tokenizer.convert_tokens_to_ids, MARKS)
    text = {
        **LAYERS, "num_hidden_layers": 1, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": len(tokenizer),
        "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": tiny.WIDTH,
        "deepstack_visual_indexes": [0], "num_position_embeddings": 16, "patch_size": 16,
    }  # fmt: skip
    tokens = {"image_token_id": slot, "vision_start_token_id": start, "vision_end_token_id": end}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **tokens)
    return Qwen3VLForConditionalGeneration(config).eval()


def kv_qwen(blocks: int) -> QwenImage21Pipeline:
    """Its autoencoder makes a token of 16 by 16 pixels, of which a slot of the text encoder has four."""
    transformer = QwenImage21Transformer2DModel(
        in_channels=4, out_channels=4, num_layers=blocks, attention_head_dim=16, num_attention_heads=2,
        context_in_dim=tiny.WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage21(
        base_dim=4, decoder_base_dim=4, z_dim=4, dim_mult=[1] * 5, num_res_blocks=1,
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.0, 1.5, 0.8, 1.2], temperal_downsample=[False] * 4,
    )  # fmt: skip
    processor = Processor()
    encoder = _encoder(processor.tokenizer)
    return QwenImage21Pipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, processor, transformer)


def flux2_kv(blocks: int) -> Flux2KleinKVPipeline:
    klein = tiny._flux2(blocks)
    return Flux2KleinKVPipeline(klein.scheduler, klein.vae, klein.text_encoder, klein.tokenizer, klein.transformer)
