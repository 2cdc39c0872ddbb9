"""Tiny pipelines of the families whose clips attend to text across, or to sound; see ``tests/tiny/video.py``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors
from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from tests import tiny

SIZE = {"height": 64, "width": 48, "num_inference_steps": 3}
TEXT = {"prompt": tiny.PROMPT}
BOTH = {**TEXT, "negative_prompt": tiny.OTHER_PROMPT}
GUIDED = {**BOTH, "num_frames": 17, "max_sequence_length": 8, "guidance_scale": 3.0}


def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((SIZE["width"], SIZE["height"]))


def embeddings(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def stays(transformer: Any, name: str) -> Any:
    """The model, with a part that computes in float32 and takes no more than that."""
    part = getattr(transformer, name)
    if part is not None:
        part._apply = partial(_itself, part)
    return transformer


def _itself(part: Any, *_: Any, **__: Any) -> Any:
    return part


def hunyuan_vae() -> diffusers.AutoencoderKLHunyuanVideo:
    return diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False,
    )  # fmt: skip


# -- relatives of Wan ----------------------------------------------------------------------------

WAN_LIKE = {"num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "freq_dim": 32,
            "text_dim": tiny.WIDTH, "ffn_dim": 48, "cross_attn_norm": True}  # fmt: skip


def _clip_vision() -> Any:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return CLIPVisionModel(vision).eval()


def _skyreels(blocks: int) -> diffusers.SkyReelsV2Pipeline:
    transformer = diffusers.SkyReelsV2Transformer3DModel(**WAN_LIKE, num_layers=blocks, rope_max_seq_len=32)
    return diffusers.SkyReelsV2Pipeline(**tiny._wan_parts(), transformer=transformer)


def _chronoedit(blocks: int) -> diffusers.ChronoEditPipeline:
    settings = {**WAN_LIKE, "in_channels": 12, "image_dim": 16, "added_kv_proj_dim": tiny.WIDTH}
    return diffusers.ChronoEditPipeline(
        **tiny._wan_parts(), image_encoder=_clip_vision(),
        transformer=diffusers.ChronoEditTransformer3DModel(**settings, num_layers=blocks, rope_max_seq_len=32),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip


def _wan_vace(blocks: int) -> diffusers.WanVACEPipeline:
    """Blocks for what is given, and what they make of it is added after the first and third of the others."""
    transformer = diffusers.WanVACETransformer3DModel(
        **WAN_LIKE, num_layers=blocks, rope_max_seq_len=32, vace_layers=[0, 2], vace_in_channels=72
    )
    return diffusers.WanVACEPipeline(**tiny._wan_parts(), transformer=transformer)


def _wan_animate(blocks: int) -> diffusers.WanAnimatePipeline:
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


def _anyflow(blocks: int) -> diffusers.AnyFlowPipeline:
    parts = {**tiny._wan_parts(), "scheduler": diffusers.FlowMapEulerDiscreteScheduler()}
    transformer = diffusers.AnyFlowTransformer3DModel(**WAN_LIKE, num_layers=blocks, rope_max_seq_len=32)
    return diffusers.AnyFlowPipeline(**parts, transformer=transformer)


def _helios(blocks: int) -> diffusers.HeliosPipeline:
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


def _cosmos(blocks: int) -> diffusers.CosmosTextToWorldPipeline:
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


def _cosmos_2_5(blocks: int) -> diffusers.Cosmos2_5_PredictBasePipeline:
    """Every frame has a time of its own, since some are given."""
    transformer = _cosmos_transformer(
        blocks, in_channels=5, extra_pos_embed_type=None, use_crossattn_projection=True,
        crossattn_proj_in_channels=tiny.WIDTH, encoder_hidden_states_channels=tiny.WIDTH,
    )  # fmt: skip
    parts = {**tiny._wan_parts(), "text_encoder": None, "tokenizer": None}
    return diffusers.Cosmos2_5_PredictBasePipeline(**parts, transformer=transformer, safety_checker=Harmless())


def _kandinsky5(blocks: int) -> diffusers.Kandinsky5T2VPipeline:
    transformer = diffusers.Kandinsky5Transformer3DModel(
        in_visual_dim=4, out_visual_dim=4, in_text_dim=tiny.WIDTH, in_text_dim2=16, time_dim=16, model_dim=32,
        ff_dim=48, num_text_blocks=1, num_visual_blocks=blocks, axes_dims=(4, 6, 6),
    )  # fmt: skip
    return diffusers.Kandinsky5T2VPipeline(
        transformer=stays(transformer, "time_embeddings"), vae=hunyuan_vae(), text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )  # fmt: skip


def _kandinsky_embeddings() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds_qwen"] = embeddings(seed, 1, 7 - seed, tiny.WIDTH)
        found[f"{kind}prompt_embeds_clip"] = embeddings(seed, 1, 16)
        found[f"{kind}prompt_cu_seqlens"] = torch.tensor([0, 7 - seed], dtype=torch.int32)
    return {**found, "num_frames": 17, "guidance_scale": 3.0}


def _ltx2(blocks: int) -> diffusers.LTX2Pipeline:
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
    """Without the guidance that skips attention, or the one without sound, which another test has."""
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds"] = embeddings(seed, 1, 7, tiny.WIDTH)
        found[f"{kind}prompt_attention_mask"] = torch.ones(1, 7, dtype=torch.int64)
    off = {f"{kind}{what}": 0.0 for kind in ("", "audio_") for what in ("stg_scale", "guidance_rescale")}
    plain = {"modality_scale": 1.0, "audio_modality_scale": 1.0, "audio_guidance_scale": 3.0}
    return {**found, **off, **plain, "num_frames": 33, "height": 64, "width": 96, "guidance_scale": 3.0}


def _allegro(blocks: int) -> diffusers.AllegroPipeline:
    transformer = diffusers.AllegroTransformer3DModel(
        num_attention_heads=2, attention_head_dim=18, in_channels=4, out_channels=4, num_layers=blocks,
        cross_attention_dim=36, caption_channels=tiny.WIDTH, sample_width=6, sample_height=8, sample_frames=5,
    )  # fmt: skip
    vae = diffusers.AutoencoderKLAllegro(
        block_out_channels=(8, 8, 8, 8), latent_channels=4, layers_per_block=1, norm_num_groups=2, sample_size=64
    )
    scheduler = diffusers.DDIMScheduler()
    return diffusers.AllegroPipeline(tiny._t5_tokenizer(), tiny._t5(), vae, transformer, scheduler)


def _easyanimate(blocks: int) -> diffusers.EasyAnimatePipeline:
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

BUILD: dict[str, Callable[[int], Any]] = {
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
