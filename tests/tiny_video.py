"""Tiny pipelines of the families that make clips, as in ``tests/tiny.py``, which has Wan and LTX-Video.

Where a text encoder is large in code and says nothing of the transformer, a call is given embeddings in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaConfig,
    LlamaModel,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from tests import tiny

SIZE = {"height": 64, "width": 48, "num_inference_steps": 3}
TEXT = {"prompt": tiny.PROMPT}
BOTH = {**TEXT, "negative_prompt": tiny.OTHER_PROMPT}


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((SIZE["width"], SIZE["height"]))


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stays(transformer: Any, name: str) -> Any:
    """The model, with a part that computes in float32 and takes no more than that."""
    part = getattr(transformer, name)
    if part is not None:
        part._apply = lambda *_, **__: part
    return transformer


# -- HunyuanVideo --------------------------------------------------------------------------------


def _hunyuan(blocks: int, channels: int = 4, condition: str | None = None) -> dict[str, Any]:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=channels, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=blocks // 2,
        num_single_layers=blocks - blocks // 2, num_refiner_layers=1, text_embed_dim=tiny.WIDTH,
        pooled_projection_dim=16, rope_axes_dim=(4, 6, 6), guidance_embeds=condition is None,
        image_condition_type=condition,
    )  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip
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


def _framepack(blocks: int) -> Any:
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


def _hunyuan15(blocks: int) -> Any:
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


# -- CogVideoX, Mochi ----------------------------------------------------------------------------


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


def _cogvideox_1(blocks: int) -> Any:
    return diffusers.CogVideoXPipeline(**_cogvideox(blocks))


def _cogvideox_1_5(blocks: int) -> Any:
    """Two frames of the latent are one of tokens: five for a clip of 37."""
    return diffusers.CogVideoXPipeline(**_cogvideox(blocks, of_1_5=True))


def _cogvideox_i2v(blocks: int) -> Any:
    return diffusers.CogVideoXImageToVideoPipeline(**_cogvideox(blocks, channels=8))


def _mochi(blocks: int) -> Any:
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


# -- relatives of Wan ----------------------------------------------------------------------------

WAN_LIKE = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "freq_dim": 32,
            "text_dim": tiny.WIDTH, "ffn_dim": 48, "cross_attn_norm": True}  # fmt: skip


def _clip_vision() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return CLIPVisionModel(vision).eval()


def _skyreels(blocks: int) -> Any:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN_LIKE, num_layers=blocks, rope_max_seq_len=32)
    return diffusers.SkyReelsV2Pipeline(**tiny._wan_parts(), transformer=transformer)


def _chronoedit(blocks: int) -> Any:
    settings = {**WAN_LIKE, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": tiny.WIDTH}
    return diffusers.ChronoEditPipeline(
        **tiny._wan_parts(), image_encoder=_clip_vision(),
        transformer=diffusers.ChronoEditTransformer3DModel(**settings, num_layers=blocks, rope_max_seq_len=32),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip


def _wan_vace(blocks: int) -> Any:
    """Blocks for what is given, and what they make of it is added after the first and third of the others."""
    transformer = diffusers.WanVACETransformer3DModel(
        **WAN_LIKE, num_layers=blocks, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=72
    )
    return diffusers.WanVACEPipeline(**tiny._wan_parts(), transformer=transformer)


def _wan_animate(blocks: int) -> Any:
    settings = {**WAN_LIKE, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": tiny.WIDTH}
    transformer = diffusers.WanAnimateTransformer3DModel(
        **settings, latent_channels=4, num_layers=blocks, rope_max_seq_len=32, motion_encoder_size=16,
        motion_encoder_channel_sizes={"4": 8, "8": 8, "16": 8}, motion_style_dim=8, motion_dim=4, motion_encoder_dim=8,
        face_encoder_hidden_dim=8, face_encoder_num_heads=2, inject_face_latents_blocks=2,
    )  # fmt: skip
    return diffusers.WanAnimatePipeline(
        **tiny._wan_parts(), image_encoder=_clip_vision(), transformer=transformer,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip


def _anyflow(blocks: int) -> Any:
    parts = {**tiny._wan_parts(), "scheduler": diffusers.FlowMapEulerDiscreteScheduler()}
    transformer = diffusers.AnyFlowTransformer3DModel(**WAN_LIKE, num_layers=blocks, rope_max_seq_len=32)
    return diffusers.AnyFlowPipeline(**parts, transformer=transformer)


def _helios(blocks: int) -> Any:
    """Two sections of five frames each."""
    transformer = diffusers.HeliosTransformer3DModel(
        **WAN_LIKE, num_layers=blocks, rope_dim=(4, 6, 6), is_amplify_history=True
    )
    parts = {**tiny._wan_parts(), "scheduler": diffusers.HeliosScheduler(stages=1)}
    return diffusers.HeliosPipeline(**parts, transformer=transformer)


# -- others with cross-attention -----------------------------------------------------------------


class Harmless(diffusers.ModelMixin, diffusers.ConfigMixin):
    """Stands in for Cosmos's guardrail, which finds no fault."""

    config_name = "config.json"

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def check_text_safety(self, text: str) -> bool:
        return True


def _cosmos_transformer(blocks: int, **settings: Any) -> Any:
    transformer = diffusers.CosmosTransformer3DModel(
        **{"in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 16, "mlp_ratio": 2.0,
           "num_layers": blocks, "text_embed_dim": tiny.WIDTH, "adaln_lora_dim": 4, "max_size": (8, 32, 32),
           "concat_padding_mask": False} | settings
    )  # fmt: skip
    return stays(transformer, "learnable_pos_embed")


def _cosmos(blocks: int) -> Any:
    vae = diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8, 8), decode_block_out_channels=(8, 8, 8, 8),
        attention_resolutions=(8,), resolution=64, num_layers=1, patch_size=4, latents_mean=None, latents_std=None,
    )  # fmt: skip
    scheduler = diffusers.EDMEulerScheduler(
        sigma_min=0.002, sigma_max=80, sigma_data=0.5, sigma_schedule="karras", num_train_timesteps=1000,
        prediction_type="epsilon", rho=7.0, final_sigmas_type="sigma_min",
    )  # fmt: skip
    return diffusers.CosmosTextToWorldPipeline(
        text_encoder=tiny._t5(), tokenizer=tiny._t5_tokenizer(), transformer=_cosmos_transformer(blocks), vae=vae,
        scheduler=scheduler, safety_checker=Harmless(),
    )  # fmt: skip


def _cosmos_2_5(blocks: int) -> Any:
    """Every frame has a time of its own, since some are given."""
    transformer = _cosmos_transformer(
        blocks, in_channels=5, extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=tiny.WIDTH, encoder_hidden_states_channels=tiny.WIDTH,
    )  # fmt: skip
    parts = {**tiny._wan_parts(), "text_encoder": None, "tokenizer": None}
    return diffusers.Cosmos2_5_PredictBasePipeline(**parts, transformer=transformer, safety_checker=Harmless())


def _kandinsky5(blocks: int) -> Any:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=tiny.WIDTH, in_text_dim2=16, time_dim=16, model_dim=32,
        ff_dim=48, num_text_blocks=1, num_visual_blocks=blocks, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Kandinsky5T2VPipeline(
        transformer=stays(transformer, "time_embeddings"), vae=_hunyuan(2)["vae"], text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip


def _kandinsky_embeddings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds_qwen"] = embeddings(seed, 1, 7 - seed, tiny.WIDTH)
        found[f"{kind}prompt_embeds_clip"] = embeddings(seed, 1, 16)
        found[f"{kind}prompt_cu_seqlens"] = torch.tensor([0, 7 - seed], dtype=torch.int32)
    return {**found, "num_frames": 17, "guidance_scale": 3.0}


def _ltx2(blocks: int) -> Any:
    """Clips of 5 frames of 6 tokens, and 34 tokens of sound."""
    transformer = diffusers.LTX2VideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=2, audio_attention_head_dim=8,
        audio_cross_attention_dim=16, num_layers=blocks, caption_channels=16,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32,
        temporal_compression_ratio=8,
    )  # fmt: skip
    audio_vae = diffusers.AutoencoderKLLTX2Audio(base_channels=4, num_res_blocks=1, latent_channels=2, mel_bins=8)
    connector = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
    kinds = ("video", "audio")
    connectors = LTX2TextConnectors(
        caption_channels=16, text_proj_in_factor=2,
        **{f"{kind}_connector_{key}": value for kind in kinds for key, value in connector.items()},
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=16, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3]],
    )  # fmt: skip
    return diffusers.LTX2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=vae, audio_vae=audio_vae,
        text_encoder=None, tokenizer=None, connectors=connectors, transformer=transformer, vocoder=vocoder,
    )  # fmt: skip


def _ltx2_embeddings() -> dict[str, Any]:
    """Without the guidance that skips attention, or the one without sound, which nothing tests."""
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds"] = embeddings(seed, 1, 7, tiny.WIDTH)
        found[f"{kind}prompt_attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    off = {f"{kind}{what}": 0.0 for kind in ("", "audio_") for what in ("stg_scale", "guidance_rescale")}
    plain = {"modality_scale": 1.0, "audio_modality_scale": 1.0, "audio_guidance_scale": 3.0}
    return {**found, **off, **plain, "num_frames": 33, "height": 64, "width": 96, "guidance_scale": 3.0}


def _allegro(blocks: int) -> Any:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=18, in_channels=4, out_channels=4, num_layers=blocks,
        cross_attention_dim=36, caption_channels=tiny.WIDTH, sample_width=6, sample_height=8, sample_frames=5,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=64
    )
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    return diffusers.AllegroPipeline(tiny._t5_tokenizer(), tiny._t5(), vae, transformer, scheduler)


def _easyanimate(blocks: int) -> Any:
    transformer = diffusers.EasyAnimateTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, patch_size=2, num_layers=blocks,
        mmdit_layers=blocks // 2, time_embed_dim=8, text_embed_dim=tiny.WIDTH, sample_width=6, sample_height=8,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLMagvit(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2
    )
    return diffusers.EasyAnimatePipeline(vae, None, None, transformer, FlowMatchEulerDiscreteScheduler())


def _easyanimate_embeddings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds"] = embeddings(seed, 1, 7, tiny.WIDTH)
        found[f"{kind}prompt_attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    return {**found, "num_frames": 17, "guidance_scale": 3.0}


# ------------------------------------------------------------------------------------------------

HUNYUAN_TEXT = {
    **BOTH, "num_frames": 17, "max_sequence_length": 8, "true_cfg_scale": 3.0,
    "prompt_template": {"template": "{}", "crop_start": 0},
}  # fmt: skip
GUIDED = {**BOTH, "num_frames": 17, "max_sequence_length": 8, "guidance_scale": 3.0}

BUILD: dict[str, Callable[[int], Any]] = {
    "hunyuan-video": _hunyuan_video,
    "hunyuan-i2v": _hunyuan_i2v,
    "hunyuan-replace": _hunyuan_replace,
    "framepack": _framepack,
    "hunyuan-video15": _hunyuan15,
    "cogvideox": _cogvideox_1,
    "cogvideox-1.5": _cogvideox_1_5,
    "cogvideox-i2v": _cogvideox_i2v,
    "mochi": _mochi,
    "skyreels": _skyreels,
    "chronoedit": _chronoedit,
    "wan-vace": _wan_vace,
    "wan-animate": _wan_animate,
    "anyflow": _anyflow,
    "helios": _helios,
    "ltx2": _ltx2,
    "cosmos": _cosmos,
    "cosmos-2.5": _cosmos_2_5,
    "kandinsky5": _kandinsky5,
    "allegro": _allegro,
    "easyanimate": _easyanimate,
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
    "mochi": lambda: GUIDED | {"num_frames": 25},
    "skyreels": lambda: GUIDED,
    "chronoedit": lambda: GUIDED | {
        "image": picture(), "enable_temporal_reasoning": True, "num_temporal_reasoning_steps": 99,
    },
    "wan-vace": lambda: GUIDED,
    "wan-animate": lambda: {
        **BOTH, "image": picture(), "pose_video": [picture()] * 13, "face_video": [picture()] * 13,
        "segment_frame_length": 13, "guidance_scale": 3.0, "max_sequence_length": 8,
    },
    "anyflow": lambda: GUIDED,
    "helios": lambda: GUIDED | {"num_latent_frames_per_chunk": 5, "num_frames": 18},
    "ltx2": _ltx2_embeddings,
    "cosmos": lambda: GUIDED | {"num_frames": 33},
    "cosmos-2.5": lambda: {
        "prompt": None, "prompt_embeds": embeddings(0, 1, 7, tiny.WIDTH), "num_frames": 17, "guidance_scale": 3.0,
        "negative_prompt_embeds": embeddings(1, 1, 7, tiny.WIDTH),
    },
    "kandinsky5": _kandinsky_embeddings,
    "allegro": lambda: GUIDED | {"clean_caption": False},
    "easyanimate": _easyanimate_embeddings,
}  # fmt: skip
FRAMES = dict.fromkeys(BUILD, 5)  # of tokens
IN_FLOAT64 = ("hunyuan", "framepack", "cogvideox", "anyflow", "easyanimate")  # throughout, if that is the dtype
IN_BATCH = ("cogvideox", "ltx2", "mochi", "anyflow", "allegro", "easyanimate")  # of both branches of guidance
TWO_CALLS = tuple(name for name in BUILD if not name.startswith(IN_BATCH))


def call_arguments(name: str) -> dict[str, Any]:
    """Call settings that suit a tiny pipeline of clips."""
    return {**SIZE, **CALLS[name]()}
