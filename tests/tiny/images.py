"""Tiny pipelines of the families that make pictures, beside FLUX, SD3, PixArt and others, which the package has.

Where a text encoder is large in code and says nothing of the transformer, a small T5 stands in for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AuraFlowPipeline,
    AuraFlowTransformer2DModel,
    AutoencoderDC,
    AutoencoderKLHunyuanImage,
    BriaFiboPipeline,
    BriaFiboTransformer2DModel,
    BriaPipeline,
    BriaTransformer2DModel,
    ChromaPipeline,
    ChromaTransformer2DModel,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogView3PlusPipeline,
    CogView3PlusTransformer2DModel,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    ErnieImagePipeline,
    ErnieImageTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    Flux2Transformer2DModel,
    FluxKontextPipeline,
    GlmImagePipeline,
    GlmImageTransformer2DModel,
    HiDreamImagePipeline,
    HiDreamImageTransformer2DModel,
    HunyuanDiT2DModel,
    HunyuanDiTPipeline,
    HunyuanImagePipeline,
    HunyuanImageTransformer2DModel,
    Ideogram4Pipeline,
    Ideogram4Transformer2DModel,
    Kandinsky5T2IPipeline,
    Kandinsky5Transformer3DModel,
    Krea2Pipeline,
    Krea2Transformer2DModel,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
    Lumina2Pipeline,
    Lumina2Transformer2DModel,
    OvisImagePipeline,
    OvisImageTransformer2DModel,
    PRXPipeline,
    PRXTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
)
from PIL import Image
from transformers import CLIPTextModelWithProjection, Qwen3VLConfig, Qwen3VLModel

from tests import tiny
from tests.tiny import prefixes

WIDTH = tiny.WIDTH
HEADS = {"attention_head_dim": 16, "num_attention_heads": 2}
FLUX_LIKE = {**HEADS, "in_channels": 16, "joint_attention_dim": WIDTH, "axes_dims_rope": (4, 6, 6)}


def _euler(**settings: Any) -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(**settings)


def _both(blocks: int) -> dict[str, int]:
    return {"num_layers": blocks // 2, "num_single_layers": blocks - blocks // 2}


def _t5_parts() -> dict[str, Any]:
    return {"text_encoder": tiny._t5(), "tokenizer": tiny._t5_tokenizer()}


def settled(pipe: Any) -> Any:
    """The pipeline, with settings that no folder keeps."""
    if isinstance(pipe, LongCatImagePipeline):
        pipe.tokenizer_max_length = 24  # rows of text, prompt and padding
    if isinstance(pipe, HiDreamImagePipeline):
        pipe.default_sample_size = 10  # else it enlarges pictures to 1024 pixels
    if isinstance(pipe, Kandinsky5T2IPipeline):
        pipe.resolutions = [(48, 112), (48, 64)]
    return pipe


# -- as FLUX.1 -----------------------------------------------------------------------------------


def _ovis(blocks: int) -> OvisImagePipeline:
    transformer = OvisImageTransformer2DModel(**FLUX_LIKE, **_both(blocks), out_channels=16)
    encoder, tokenizer = tiny._qwen3()
    return OvisImagePipeline(_euler(), tiny._vae(4), encoder.model, tokenizer, transformer)


def _longcat(blocks: int) -> LongCatImagePipeline:
    transformer = LongCatImageTransformer2DModel(**FLUX_LIKE | {"in_channels": 64}, **_both(blocks))
    tokenizer = tiny._qwen_tokenizer()
    encoder = tiny._qwen_encoder(len(tokenizer))
    return settled(LongCatImagePipeline(_euler(), tiny._vae(16), encoder, tokenizer, tokenizer, transformer))


def _bria(blocks: int) -> BriaPipeline:
    return BriaPipeline(BriaTransformer2DModel(**FLUX_LIKE, **_both(blocks)), _euler(), tiny._vae(4), **_t5_parts())


def _chroma(blocks: int) -> ChromaPipeline:
    transformer = ChromaTransformer2DModel(
        **FLUX_LIKE, **_both(blocks), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1
    )
    return ChromaPipeline(_euler(), tiny._vae(4), transformer=transformer, **_t5_parts())


def _fibo(blocks: int) -> BriaFiboPipeline:
    """Prompts of different lengths are padded and masked."""
    transformer = BriaFiboTransformer2DModel(
        **FLUX_LIKE | {"joint_attention_dim": 2 * WIDTH}, **_both(blocks), text_encoder_dim=WIDTH
    )
    encoder, tokenizer = tiny._qwen3()
    return BriaFiboPipeline(transformer, _euler(), tiny._wan_parts()["vae"], encoder, tokenizer)


# -- with pictures as references -----------------------------------------------------------------


def _picture(width: int, height: int) -> Image.Image:
    return Image.linear_gradient("L").convert("RGB").resize((width, height))


def _kontext(blocks: int) -> FluxKontextPipeline:
    parts = tiny._flux(blocks).components
    return FluxKontextPipeline(**{name: part for name, part in parts.items() if part is not None})


def _qwen_parts(blocks: int, **settings: Any) -> dict[str, Any]:
    """A tokenizer stands in for the processor, which only prompts need that are given with their picture."""
    parts = tiny._qwen(blocks).components
    own = {name: value for name, value in parts["transformer"].config.items() if not name.startswith("_")}
    parts["transformer"] = QwenImageTransformer2DModel(**{**own, **settings})
    assert all(parts["transformer"].config[name] == value for name, value in settings.items())
    return {**parts, "processor": parts["tokenizer"]}


def _qwen_edit(blocks: int) -> QwenImageEditPipeline:
    return QwenImageEditPipeline(**_qwen_parts(blocks))


def _qwen_edit_plus(blocks: int) -> QwenImageEditPlusPipeline:
    """References have a time of their own."""
    return QwenImageEditPlusPipeline(**_qwen_parts(blocks, zero_cond_t=True))


# -- one sequence --------------------------------------------------------------------------------


def _krea2(blocks: int) -> Krea2Pipeline:
    transformer = Krea2Transformer2DModel(
        **HEADS, in_channels=16, num_layers=blocks, num_key_value_heads=1, intermediate_size=48, timestep_embed_dim=32,
        text_hidden_dim=WIDTH, num_text_layers=2, text_num_attention_heads=2, text_num_key_value_heads=2,
        text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    qwen = tiny._qwen(1)
    return Krea2Pipeline(
        _euler(), qwen.vae, qwen.text_encoder, qwen.tokenizer, transformer, text_encoder_select_layers=(0, 1)
    )


def _lumina2(blocks: int) -> Lumina2Pipeline:
    """With a refiner of the picture among its blocks."""
    transformer = Lumina2Transformer2DModel(
        in_channels=4, hidden_size=WIDTH, num_layers=blocks - 1, num_refiner_layers=1, num_attention_heads=2,
        num_kv_heads=1, multiple_of=16, axes_dim_rope=(4, 6, 6), axes_lens=(64, 32, 32), cap_feat_dim=WIDTH,
    )  # fmt: skip
    return Lumina2Pipeline(transformer, _euler(), tiny._vae(4), **_t5_parts())


def _ernie(blocks: int) -> ErnieImagePipeline:
    transformer = ErnieImageTransformer2DModel(
        hidden_size=48, num_attention_heads=3, num_layers=blocks, ffn_hidden_size=64, in_channels=16, out_channels=16,
        text_in_dim=WIDTH, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    return ErnieImagePipeline(transformer, tiny._flux2(2).vae, scheduler=_euler(), **_t5_parts())


def _ideogram4(blocks: int) -> Ideogram4Pipeline:
    """The pipeline looks at layers of its text encoder up to the 36th."""
    sizes = {"in_channels": 16, "intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 13 * 8}
    both = [
        Ideogram4Transformer2DModel(**HEADS, **sizes, num_layers=blocks, rope_theta=10000, mrope_section=(3, 3, 2))
        for _ in range(2)
    ]
    tokenizer = tiny._qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'][0]['text'] }}{% endfor %}"
    text = {
        "hidden_size": 8, "num_hidden_layers": 36, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 16, "head_dim": 8, "vocab_size": len(tokenizer), "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }  # fmt: skip
    vision = {"hidden_size": 8, "depth": 1, "num_heads": 2, "intermediate_size": 16, "out_hidden_size": 8}
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config={**vision, "deepstack_visual_indexes": [0]}))
    return Ideogram4Pipeline(_euler(), tiny._flux2(2).vae, encoder.eval(), tokenizer, *both)


# -- two sequences -------------------------------------------------------------------------------


def _auraflow(blocks: int) -> AuraFlowPipeline:
    transformer = AuraFlowTransformer2DModel(
        **HEADS, sample_size=16, num_mmdit_layers=blocks // 2, num_single_dit_layers=blocks - blocks // 2,
        joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pos_embed_max_size=256,
    )  # fmt: skip
    return AuraFlowPipeline(vae=tiny._vae(4), transformer=transformer, scheduler=_euler(), **_t5_parts())


def _cogview3(blocks: int) -> CogView3PlusPipeline:
    transformer = CogView3PlusTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=blocks, text_embed_dim=WIDTH, time_embed_dim=16,
        condition_dim=4, pos_embed_max_size=16,
    )  # fmt: skip
    scheduler = CogVideoXDDIMScheduler()
    return CogView3PlusPipeline(vae=tiny._vae(4), transformer=transformer, scheduler=scheduler, **_t5_parts())


def _glm(blocks: int) -> GlmImagePipeline:
    """The call is given the tokens of a draft: what drafts is but a stand-in."""
    transformer = GlmImageTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=blocks, text_embed_dim=WIDTH, time_embed_dim=16,
        condition_dim=4, prior_vq_quantizer_codebook_size=16,
    )  # fmt: skip
    return GlmImagePipeline(
        processor=tiny._t5_tokenizer(), vision_language_encoder=tiny._t5(), vae=tiny._vae(4), transformer=transformer,
        scheduler=_euler(), **_t5_parts(),
    )  # fmt: skip


def _hidream(blocks: int) -> HiDreamImagePipeline:
    """Its pictures are filled up, since they are not square."""
    transformer = HiDreamImageTransformer2DModel(
        **HEADS, **_both(blocks), patch_size=2, in_channels=4, caption_channels=[WIDTH, WIDTH], text_emb_dim=WIDTH,
        num_routed_experts=2, num_activated_experts=1, axes_dims_rope=(4, 6, 6), max_resolution=(16, 16),
        llama_layers=list(range(blocks)),
    ).eval()  # fmt: skip
    encoder, tokenizer = tiny._qwen3()
    clips = [tiny._clip(CLIPTextModelWithProjection) for _ in range(2)]
    return settled(
        HiDreamImagePipeline(
            _euler(), tiny._vae(4), clips[0], tiny._clip_tokenizer(), clips[1], tiny._clip_tokenizer(), tiny._t5(),
            tiny._t5_tokenizer(), encoder, tokenizer, transformer,
        )
    )  # fmt: skip


# -- pictures alone ------------------------------------------------------------------------------


def _dit(blocks: int) -> DiTPipeline:
    """Its pictures are square, of seven rows of tokens. While it trains, it drops labels at random."""
    transformer = DiTTransformer2DModel(**HEADS, in_channels=4, out_channels=8, num_layers=blocks, sample_size=14)
    return DiTPipeline(transformer.eval(), tiny._vae(4), DDIMScheduler())


def _kandinsky5(blocks: int) -> Kandinsky5T2IPipeline:
    transformer = Kandinsky5Transformer3DModel(
        in_text_dim=WIDTH, in_text_dim2=16, time_dim=32, model_dim=WIDTH, ff_dim=48, num_text_blocks=1,
        num_visual_blocks=blocks, axes_dims=(4, 6, 6),
    )  # fmt: skip
    tokenizer = tiny._qwen_tokenizer()
    return settled(
        Kandinsky5T2IPipeline(
            transformer, tiny._vae(4), tiny._qwen_encoder(len(tokenizer)), tokenizer, tiny._clip(),
            tiny._clip_tokenizer(), _euler(),
        )
    )  # fmt: skip


def _sana(blocks: int) -> SanaPipeline:
    transformer = SanaTransformer2DModel(
        **HEADS, in_channels=4, out_channels=4, num_layers=blocks, num_cross_attention_heads=2,
        cross_attention_head_dim=16, cross_attention_dim=WIDTH, caption_channels=WIDTH, mlp_ratio=1.5, sample_size=8,
        patch_size=2,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, attention_head_dim=2, encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8), encoder_layers_per_block=(1,) * 4, decoder_layers_per_block=(1,) * 4,
        encoder_block_types="ResBlock", decoder_block_types="ResBlock", encoder_qkv_multiscales=((),) * 4,
        decoder_qkv_multiscales=((),) * 4, downsample_block_type="conv", upsample_block_type="interpolate",
    )  # fmt: skip
    return SanaPipeline(vae=vae, transformer=transformer, scheduler=_euler(), **_t5_parts())


def _prx(blocks: int) -> PRXPipeline:
    transformer = PRXTransformer2DModel(
        in_channels=4, context_in_dim=WIDTH, hidden_size=WIDTH, num_heads=2, depth=blocks, axes_dim=[8, 8], mlp_ratio=2
    )
    return PRXPipeline(transformer, _euler(), vae=tiny._vae(4), **_t5_parts())


def _hunyuan_dit(blocks: int) -> HunyuanDiTPipeline:
    transformer = HunyuanDiT2DModel(
        **HEADS, in_channels=4, patch_size=2, sample_size=16, hidden_size=WIDTH, num_layers=blocks,
        cross_attention_dim=WIDTH, cross_attention_dim_t5=WIDTH, pooled_projection_dim=WIDTH, text_len=6, text_len_t5=5,
    )  # fmt: skip
    return HunyuanDiTPipeline(
        vae=tiny._vae(4), transformer=transformer, scheduler=DDIMScheduler(), **_t5_parts(), text_encoder_2=tiny._t5(),
        tokenizer_2=tiny._t5_tokenizer(), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------

TEXT = {"prompt": tiny.PROMPT, "negative_prompt": tiny.OTHER_PROMPT, "guidance_scale": 3.0}
T5_TEXT = {**TEXT, "max_sequence_length": 8}


def _glm_call(height: int, width: int) -> dict[str, Any]:
    tokens = torch.arange(height * width // 256)[None] % 16
    return {"prompt": f"'{tiny.OTHER_PROMPT}'", "prior_token_ids": tokens, "guidance_scale": 3.0}


def _embeddings(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _hidream_call(*_: int) -> dict[str, Any]:
    found: dict[str, Any] = {"guidance_scale": 3.0}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds_t5"] = _embeddings(seed, 1, 6, WIDTH)
        found[f"{kind}prompt_embeds_llama3"] = _embeddings(seed + 2, 4, 1, 5, WIDTH)
        found[f"{kind}pooled_prompt_embeds"] = _embeddings(seed + 4, 1, WIDTH)
    return found


def _hunyuan_dit_call(*_: int) -> dict[str, Any]:
    found: dict[str, Any] = {"guidance_scale": 3.0, "use_resolution_binning": False}
    for seed, kind in enumerate(("", "negative_")):
        for index, length in (("", 6), ("_2", 5)):
            found[f"{kind}prompt_embeds{index}"] = _embeddings(seed + length, 1, length, WIDTH)
            found[f"{kind}prompt_attention_mask{index}"] = torch.arange(length)[None] < 3 + seed
    return found


def _qwen_edit_call(*_: int) -> dict[str, Any]:
    found: dict[str, Any] = {"true_cfg_scale": 3.0}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds"] = _embeddings(seed, 1, 9 + seed, WIDTH)
        found[f"{kind}prompt_embeds_mask"] = torch.ones(1, 9 + seed, dtype=torch.long)
    return found


def _kandinsky5_call(*_: int) -> dict[str, Any]:
    found: dict[str, Any] = {"guidance_scale": 3.0}
    for seed, kind in enumerate(("", "negative_")):
        found[f"{kind}prompt_embeds_qwen"] = _embeddings(seed, 1, 6, WIDTH)
        found[f"{kind}prompt_embeds_clip"] = _embeddings(seed + 2, 1, 16)
        found[f"{kind}prompt_cu_seqlens"] = torch.tensor([0, 6], dtype=torch.int32)
    return found


def _hunyuan_image(blocks: int) -> HunyuanImagePipeline:
    """Latents of a 32nd of the picture's height and width, as they are."""
    transformer = HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=blocks // 2,
        num_single_layers=blocks - blocks // 2, num_refiner_layers=1, text_embed_dim=WIDTH, text_embed_2_dim=WIDTH,
        rope_axes_dim=(8, 8),
    )  # fmt: skip
    vae = AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 6, layers_per_block=1,
        spatial_compression_ratio=32, sample_size=64, scaling_factor=0.5,
    )  # fmt: skip
    text = {"text_encoder": tiny._t5(), "tokenizer": tiny._t5_tokenizer()}  # under two names
    return HunyuanImagePipeline(
        transformer=transformer, vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **text,
        **{f"{name}_2": part for name, part in text.items()}, guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )  # fmt: skip


def _hunyuan_image_call(*_: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for seed, kind in enumerate(("", "negative_")):
        for which, rows in (("", 7), ("_2", 4)):
            mask = torch.ones(1, rows, dtype=torch.int64)
            mask[:, rows - 1 - seed :] = 0
            found[f"{kind}prompt_embeds{which}"] = _embeddings(seed, 1, rows, WIDTH)
            found[f"{kind}prompt_embeds_mask{which}"] = mask
    return found


def _flux2_dev(blocks: int) -> Flux2Pipeline:
    """Its text encoder is large in code: calls are given embeddings."""
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=blocks // 2, num_single_layers=blocks - blocks // 2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip
    return Flux2Pipeline(FlowMatchEulerDiscreteScheduler(), tiny._flux2(2).vae, None, None, transformer)


BUILD: dict[str, Callable[[int], Any]] = {
    "chroma": _chroma,
    "ovis": _ovis,
    "longcat": _longcat,
    "bria": _bria,
    "flux-kontext": _kontext,
    "flux2-edit": tiny._flux2,
    "flux2-dev": _flux2_dev,
    "flux2-kv": prefixes.flux2_kv,
    "kv-qwen": prefixes.kv_qwen,
    "qwen-edit": _qwen_edit,
    "qwen-edit-plus": _qwen_edit_plus,
    "krea2": _krea2,
    "lumina2": _lumina2,
    "ernie": _ernie,
    "ideogram4": _ideogram4,
    "auraflow": _auraflow,
    "cogview3": _cogview3,
    "glm": _glm,
    "fibo": _fibo,
    "hidream": _hidream,
    "hunyuan-dit": _hunyuan_dit,
    "hunyuan-image": _hunyuan_image,
    "kandinsky5-picture": _kandinsky5,
    "sana": _sana,
    "dit": _dit,
    "prx": _prx,
}
CALLS: dict[str, Callable[[int, int], dict[str, Any]]] = {
    "chroma": lambda *_: T5_TEXT,
    "ovis": lambda *_: {**TEXT, "max_sequence_length": 32},
    "longcat": lambda *_: {**TEXT, "enable_prompt_rewrite": False},
    "bria": lambda *_: T5_TEXT,
    "flux-kontext": lambda height, width: {
        "prompt": tiny.PROMPT,
        "negative_prompt": tiny.OTHER_PROMPT,
        "true_cfg_scale": 3.0,
        "max_sequence_length": 8,
        "image": _picture(32, 64),
        "max_area": height * width,
        "_auto_resize": False,
    },
    "flux2-edit": lambda *_: {
        "prompt": tiny.PROMPT,
        "max_sequence_length": 24,
        "text_encoder_out_layers": (1,),
        "guidance_scale": 3.0,
        "image": [_picture(64, 64)],
    },
    "flux2-kv": lambda *_: {
        "prompt": tiny.PROMPT,
        "max_sequence_length": 24,
        "text_encoder_out_layers": (1,),
        "image": [_picture(64, 64)],
    },
    "kv-qwen": lambda *_: {
        "prompt": tiny.PROMPT,
        "negative_prompt": tiny.OTHER_PROMPT,
        "true_cfg_scale": 3.0,
        "image": [_picture(64, 64), _picture(64, 32)],
        "output_resolution": 64,
    },
    "flux2-dev": lambda *_: {"prompt_embeds": _embeddings(0, 1, 9, WIDTH), "image": [_picture(64, 64)]},
    "qwen-edit": lambda *_: {**_qwen_edit_call(), "image": _picture(48, 112)},
    "qwen-edit-plus": lambda *_: {**_qwen_edit_call(), "image": [_picture(48, 112), _picture(64, 64)]},
    "krea2": lambda *_: {**TEXT, "max_sequence_length": 24},
    "lumina2": lambda *_: {**T5_TEXT, "max_sequence_length": 24, "system_prompt": "a"},
    "ernie": lambda *_: {**TEXT, "use_pe": False},
    "ideogram4": lambda *_: {
        "prompt": tiny.PROMPT,
        "max_sequence_length": 24,
        "guidance_scale": 3.0,
        "guidance_schedule": None,
    },
    "auraflow": lambda *_: T5_TEXT,
    "cogview3": lambda *_: T5_TEXT,
    "glm": _glm_call,
    "fibo": lambda *_: {**TEXT, "max_sequence_length": 64},
    "hidream": _hidream_call,
    "hunyuan-dit": _hunyuan_dit_call,
    "hunyuan-image": _hunyuan_image_call,
    "dit": lambda *_: {"class_labels": [3], "guidance_scale": 3.0},
    "kandinsky5-picture": _kandinsky5_call,
    "sana": lambda *_: {
        **T5_TEXT,
        "use_resolution_binning": False,
        "clean_caption": False,
        "complex_human_instruction": None,
    },
    "prx": lambda *_: {**TEXT, "tokenizer_max_length": 8, "use_resolution_binning": False},
}
TWO_CALLS = (
    "flux2-edit",
    "qwen-edit",
    "chroma",
    "ovis",
    "longcat",
    "krea2",
    "lumina2",
    "glm",
    "hunyuan-image",
    "kandinsky5-picture",
)  # to guide
EXACT = ("flux", "qwen", "chroma", "ovis", "longcat", "bria")  # the others compute norms or rotations in float32
UNGUIDED = ("flux2-dev", "flux2-kv")  # but for a number it is given
UNSHARED = ("sana", "flux2-kv", "kv-qwen")  # whose patches no ranks can share
GIVEN: dict[str, Callable[[], dict[str, Any]]] = {
    "kv-qwen": lambda: {"processor": prefixes.Processor()}
}  # what is not read from a folder
UNCUT = ("kandinsky5-picture",)  # a clip of one frame, and clips are cut by frames
DTYPES = {"kandinsky5-picture": torch.float32}  # which cannot do other
REFERENCES = {
    "flux-kontext": 4 * 2,
    "flux2-edit": 4 * 4,
    "flux2-dev": 4 * 4,
    "qwen-edit": 6 * 2,
    "qwen-edit-plus": 6 * 2 + 4 * 4,
}  # tokens
ROWS = {"dit": 7, "kv-qwen": 6, "glm": 10, "hunyuan-image": 7, "sana": 10}


def call_arguments(
    name: str, *, guided: bool = True, height: int = 64, width: int = 48, steps: int = 4
) -> dict[str, Any]:
    """Call settings that suit a tiny pipeline of pictures."""
    if name in ("glm", "sana"):  # which take multiples of 32 pixels
        height, width = 160, 64
    if name == "hunyuan-image":
        height, width = 7 * 32, 3 * 32
    size = {} if name == "dit" else {"height": height, "width": width}
    guidance = {} if guided else {"guidance_scale": 1.0}
    return {**size, "num_inference_steps": steps, **CALLS[name](height, width), **guidance}
