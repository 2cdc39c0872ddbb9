"""Tiny pipelines of the families that make clips, as in ``tests/tiny/__init__.py``, which has Wan and LTX-Video.

Where a text encoder is large in code and says nothing of the transformer, a call is given embeddings in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers import (
    CLIPImageProcessor,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests import tiny
from tests.tiny import video_cross as tiny_video_cross
from tests.tiny.video_cross import BOTH, GUIDED, SIZE, embeddings, hunyuan_vae, picture

# -- HunyuanVideo --------------------------------------------------------------------------------


def _hunyuan(blocks: int, channels: int = 4, condition: str | None = None) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=blocks // 2,
        num_single_layers=blocks - blocks // 2, num_refiner_layers=1, text_embed_dim=tiny.WIDTH,
        pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), guidance_embeds=condition is None,
        image_condition_type=condition,
    )  # fmt: skip
    vae = hunyuan_vae()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=7.0)
    return {
        "transformer": transformer, "vae": vae, "scheduler": scheduler, "text_encoder_2": tiny._clip(positions=77),
        "tokenizer_2": tiny._clip_tokenizer(), "tokenizer": tiny._t5_tokenizer(),
    }  # fmt: skip


def _hunyuan_video(blocks: int) -> diffusers.HunyuanVideoPipeline:
    config = LlamaConfig(
        vocab_size=3656, hidden_size=tiny.WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        pad_token_id=0,
    )  # fmt: skip
    return diffusers.HunyuanVideoPipeline(**_hunyuan(blocks), text_encoder=LlamaModel(config).eval())


def _hunyuan_i2v(blocks: int, condition: str = "latent_concat") -> diffusers.HunyuanVideoImageToVideoPipeline:
    parts = _hunyuan(blocks, 9 if condition == "latent_concat" else 4, condition)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    return diffusers.HunyuanVideoImageToVideoPipeline(**parts, text_encoder=None, image_processor=processor)


def _hunyuan_replace(blocks: int) -> diffusers.HunyuanVideoImageToVideoPipeline:
    """The picture stands in for the first frame, whose tokens have a time of their own."""
    return _hunyuan_i2v(blocks, "token_replace")


def _hunyuan_embeddings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        mask = torch.ones(1, 9, dtype=torch.float64)
        mask[:, 7 - seed :] = 0
        found |= {f"{kind}prompt_embeds": embeddings(seed, 1, 9, tiny.WIDTH), f"{kind}prompt_attention_mask": mask}
        found[f"{kind}pooled_prompt_embeds"] = embeddings(seed + 9, 1, 16)
    return {**found, "true_cfg_scale": 3.0, "num_frames": 17}


def _framepack(blocks: int) -> diffusers.HunyuanVideoFramepackPipeline:
    """Two sections of five frames each."""
    parts = _hunyuan(blocks)
    settings = {key: value for key, value in parts["transformer"].config.items() if not key.startswith("_")}
    parts["transformer"] = diffusers.HunyuanVideoFramepackTransformer3DModel(
        **settings, has_image_proj=True, image_proj_dim=16, has_clean_x_embedder=True
    )
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
    )
    return diffusers.HunyuanVideoFramepackPipeline(
        **parts, text_encoder=None, image_encoder=SiglipVisionModel(vision).eval(),
        feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
    )  # fmt: skip


# -- HunyuanVideo 1.5 ----------------------------------------------------------------------------


def _hunyuan15(blocks: int) -> diffusers.HunyuanVideo15Pipeline:
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=blocks,
        num_refiner_layers=1, text_embed_dim=tiny.WIDTH, text_embed_2_dim=tiny.WIDTH, image_embed_dim=16,
        rope_axes_dim=(4, 6, 6), target_size=64,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1
    )
    return diffusers.HunyuanVideo15Pipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), text_encoder=None,
        tokenizer=None, text_encoder_2=None, tokenizer_2=None,
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip


def _hunyuan15_embeddings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        for which, rows in (("", 7), ("_2", 4)):
            mask = torch.ones(1, rows, dtype=torch.int64)
            mask[:, rows - 1 - seed :] = 0
            found |= {f"{kind}prompt_embeds{which}": embeddings(seed, 1, rows, tiny.WIDTH)}
            found[f"{kind}prompt_embeds_mask{which}"] = mask
    return {**found, "num_frames": 17}


# -- CogVideoX, ConsisID, Mochi ------------------------------------------------------------------


def _cogvideox(blocks: int, channels: int = 4, of_1_5: bool = False) -> dict[str, Any]:
    transformer = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, time_embed_dim=8,
        text_embed_dim=tiny.WIDTH, num_layers=blocks, sample_width=6, sample_height=8, sample_frames=17, patch_size=2,
        max_text_seq_length=8, use_rotary_positional_embeddings=of_1_5, patch_size_t=2 if of_1_5 else None,
        use_learned_positional_embeddings=False, ofs_embed_dim=8 if of_1_5 and channels == 8 else None,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLCogVideoX(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2,
    )  # fmt: skip
    scheduler = diffusers.CogVideoXDPMScheduler() if of_1_5 else diffusers.CogVideoXDDIMScheduler()
    return {
        "transformer": transformer, "vae": vae, "scheduler": scheduler, "text_encoder": tiny._t5(),
        "tokenizer": tiny._t5_tokenizer(),
    }  # fmt: skip


def _cogvideox_1(blocks: int) -> diffusers.CogVideoXPipeline:
    return diffusers.CogVideoXPipeline(**_cogvideox(blocks))


def _cogvideox_1_5(blocks: int) -> diffusers.CogVideoXPipeline:
    """Two frames of the latent are one of tokens: five for a clip of 37."""
    return diffusers.CogVideoXPipeline(**_cogvideox(blocks, of_1_5=True))


def _cogvideox_i2v(blocks: int) -> diffusers.CogVideoXImageToVideoPipeline:
    return diffusers.CogVideoXImageToVideoPipeline(**_cogvideox(blocks, channels=8))


def _consisid(blocks: int) -> diffusers.ConsisIDPipeline:
    """What is seen of the face is added after every other block, the last one among them if their number is odd."""
    transformer = diffusers.ConsisIDTransformer3DModel(
        num_attention_heads=3, attention_head_dim=16, in_channels=8, out_channels=4, time_embed_dim=8,
        text_embed_dim=tiny.WIDTH, num_layers=blocks, sample_width=6, sample_height=8, sample_frames=17, patch_size=2,
        max_text_seq_length=8, use_rotary_positional_embeddings=True, is_train_face=True, cross_attn_dim_head=8,
        cross_attn_num_heads=2, LFE_id_dim=12, LFE_vit_dim=16, LFE_depth=2, LFE_dim_head=8, LFE_num_heads=2,
        LFE_num_querie=4, LFE_output_dim=32, LFE_ff_mult=2, LFE_num_scale=2,
    )  # fmt: skip
    return diffusers.ConsisIDPipeline(**{**_cogvideox(1), "transformer": transformer})


def _face() -> dict[str, Any]:
    return {"id_cond": embeddings(2, 1, 12), "id_vit_hidden": [embeddings(seed, 1, 6, 16) for seed in (3, 4)]}


def _mochi(blocks: int) -> diffusers.MochiPipeline:
    transformer = diffusers.MochiTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=blocks, pooled_projection_dim=24, in_channels=12,
        text_embed_dim=tiny.WIDTH, time_embed_dim=8, max_sequence_length=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMochi(
        encoder_block_out_channels=(32, 32, 32, 32), decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1), add_attention_block=(False,) * 5,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    return diffusers.MochiPipeline(scheduler, vae, tiny._t5(), tiny._t5_tokenizer(), transformer)


# ------------------------------------------------------------------------------------------------

HUNYUAN_TEXT = {
    **BOTH, "num_frames": 17, "max_sequence_length": 8, "true_cfg_scale": 3.0,
    "prompt_template": {"template": "{}", "crop_start": 0},
}  # fmt: skip

BUILD: dict[str, Callable[[int], Any]] = {
    "hunyuan-video": _hunyuan_video,
    "hunyuan-i2v": _hunyuan_i2v,
    "hunyuan-replace": _hunyuan_replace,
    "framepack": _framepack,
    "hunyuan-video15": _hunyuan15,
    "cogvideox": _cogvideox_1,
    "cogvideox-1.5": _cogvideox_1_5,
    "cogvideox-i2v": _cogvideox_i2v,
    "consisid": _consisid,
    "mochi": _mochi,
    **tiny_video_cross.BUILD,
}
CALLS: dict[str, Callable[[], dict[str, Any]]] = {
    "hunyuan-video": lambda: HUNYUAN_TEXT,
    "hunyuan-i2v": lambda: {**_hunyuan_embeddings(), "image": picture()},
    "hunyuan-replace": lambda: {**_hunyuan_embeddings(), "image": picture()},
    "framepack": lambda: {**_hunyuan_embeddings(), "image": picture(), "num_frames": 18, "latent_window_size": 5},
    "hunyuan-video15": _hunyuan15_embeddings,
    "cogvideox": lambda: GUIDED,
    "cogvideox-1.5": lambda: GUIDED | {"num_frames": 37},
    "cogvideox-i2v": lambda: GUIDED | {"image": picture()},
    "consisid": lambda: GUIDED | _face() | {"image": picture()},
    "mochi": lambda: GUIDED | {"num_frames": 25},
    **tiny_video_cross.CALLS,
}  # fmt: skip
FRAMES = dict.fromkeys(BUILD, 5)  # of tokens
IN_FLOAT64 = (
    "hunyuan",
    "framepack",
    "cogvideox",
    "consisid",
    "anyflow",
    "easyanimate",
)  # throughout, if that is the dtype
IN_BATCH = (
    "cogvideox",
    "consisid",
    "ltx2",
    "mochi",
    "anyflow",
    "allegro",
    "easyanimate",
)  # of both branches of guidance
TWO_CALLS = tuple(name for name in BUILD if not name.startswith(IN_BATCH))


def call_arguments(name: str) -> dict[str, Any]:
    """Call settings that suit a tiny pipeline of clips."""
    return {**SIZE, **CALLS[name]()}
