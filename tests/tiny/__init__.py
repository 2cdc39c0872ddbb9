"""Tiny pipelines with random weights, built from the real diffusers classes and saved to disk."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, get_type_hints

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLLTXVideo,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    CogView4Pipeline,
    CogView4Transformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from PIL import Image
from tokenizers import Tokenizer, models, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    CLIPVisionModel,
    GlmConfig,
    GlmModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from patchpipe.demo import MODEL_DIR
from tests.support.copies import Original

MODELS = ("flux", "sd3", "pixart", "qwen")
PROMPT, OTHER_PROMPT = "red apple", "a blue dog in 3d style and a cherry blossom"
WIDTH = 32
_BUILDING = threading.Lock()  # weights are drawn from the process's generator, which ranks in threads share
QWEN_TEMPLATE = """<|im_start|>system
Describe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the objects \
and background:<|im_end|>
<|im_start|>user
{}<|im_end|>
<|im_start|>assistant
"""


def pipeline(name: str, *, blocks: int = 4, dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """``flux``, ``flux2``, ``sd3``, ``pixart``, ``qwen``, ``wan`` or a relative of theirs, or of tiny_video, tiny."""
    with _BUILDING:
        original, drawn = _original(name, blocks, dtype, seed)
        torch.set_rng_state(drawn)
        return original.copy()


@cache
def _original(name: str, blocks: int, dtype: torch.dtype, seed: int) -> tuple[Original, Tensor]:
    """What copies are made of, with no lambda in it, and how the process's generator stands once weights are drawn."""
    return Original(_pipeline(name, blocks, dtype, seed)), torch.get_rng_state()


def _pipeline(name: str, blocks: int, dtype: torch.dtype, seed: int) -> Any:
    torch.manual_seed(seed)
    pipe = _build()[name](blocks)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            _stir(part)
            part.to(dtype)
            part.requires_grad_(False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _build() -> dict[str, Callable[[int], Any]]:
    from tests.tiny import images as tiny_images
    from tests.tiny import video as tiny_video

    return {
        **tiny_images.BUILD, **tiny_video.BUILD,
        "flux": _flux, "flux-guided": _flux_guided, "sd3": _sd3, "sd35": _sd35, "sd3-16": _sd3_16,
        "pixart": _pixart, "pixart-4": _pixart_4, "pixart-sigma": _pixart_sigma,
        "qwen": _qwen, "qwen-padded": _qwen, "flux2": _flux2, "zimage": _zimage, "cogview4": _cogview4, "ltx": _ltx,
        "wan": _wan, "wan-i2v": _wan_i2v, "wan-a14b": _wan_a14b, "wan-5b": _wan_5b,
    }  # fmt: skip


def kind_of(name: str) -> type:
    """The class of a tiny pipeline, without making it."""
    kind: type = get_type_hints(_build()[name])["return"]
    return kind


def save(name: str, folder: Path, **options: Any) -> Path:
    """Saves a tiny pipeline in diffusers format."""
    pipeline(name, **options).save_pretrained(folder)
    return Path(folder)


def call_arguments(
    name: str, *, guided: bool = True, height: int = 64, width: int = 48, steps: int = 4
) -> dict[str, Any]:
    """Call settings that suit the tiny pipelines; 16 pixels are one row of tokens.

    ``qwen-padded`` has two prompts of different lengths in each branch, so that attention is masked throughout.
    """
    from tests.tiny import images as tiny_images
    from tests.tiny import video as tiny_video

    if name in tiny_video.CALLS:
        return tiny_video.call_arguments(name)
    if name in tiny_images.CALLS:
        return tiny_images.call_arguments(name, guided=guided, height=height, width=width, steps=steps)
    arguments: dict[str, Any] = {
        "prompt": PROMPT,
        "height": height,
        "width": width,
        "num_inference_steps": steps,
    }
    if name == "flux2":
        arguments |= {"max_sequence_length": 24, "text_encoder_out_layers": (1,)}
        arguments["guidance_scale"] = 3.0 if guided else 1.0
    elif name.startswith("wan"):
        arguments |= {"max_sequence_length": 8, "num_frames": 17, "guidance_scale": 3.0 if guided else 1.0}
        arguments["negative_prompt"] = OTHER_PROMPT
        if name in ("wan-i2v", "wan-5b"):
            arguments["image"] = Image.linear_gradient("L").convert("RGB").resize((width, height))
    elif name == "ltx":
        arguments |= {"height": 64, "width": 32, "max_sequence_length": 8, "num_frames": 33}
        arguments |= {"guidance_scale": 3.0 if guided else 1.0, "negative_prompt": OTHER_PROMPT}
    elif name == "cogview4":
        arguments |= {"guidance_scale": 3.0 if guided else 1.0, "negative_prompt": OTHER_PROMPT}
    elif name == "zimage":
        arguments |= {"max_sequence_length": 40, "guidance_scale": 3.0 if guided else 0.0}
        arguments["negative_prompt"] = OTHER_PROMPT
    elif name.startswith("flux"):
        arguments["max_sequence_length"] = 8
        if guided:
            arguments |= {"negative_prompt": OTHER_PROMPT, "true_cfg_scale": 3.0}
    elif name.startswith("qwen"):
        prompts = [PROMPT, OTHER_PROMPT] if name == "qwen-padded" else PROMPT
        arguments |= {"prompt": prompts, "max_sequence_length": 16}
        if guided:
            negative = [OTHER_PROMPT, PROMPT] if name == "qwen-padded" else OTHER_PROMPT
            arguments |= {"negative_prompt": negative, "true_cfg_scale": 3.0}
    elif name.startswith("sd3"):
        arguments |= {"max_sequence_length": 8, "guidance_scale": 4.0 if guided else 1.0}
    else:
        arguments |= {
            "max_sequence_length": 8, "guidance_scale": 4.0 if guided else 1.0,
            "use_resolution_binning": False, "clean_caption": False,
        }  # fmt: skip
    return arguments


def painted(output: Any) -> Any:
    """The pictures of what a pipeline returned, or the frames of its clip."""
    found = next(getattr(output, name) for name in ("frames", "images", "image") if hasattr(output, name))
    return found[-1] if isinstance(found, list) and isinstance(found[-1], torch.Tensor) else found  # of all sections


def _stir(module: torch.nn.Module) -> None:
    """Random values everywhere: diffusers starts some layers at zero, where an error would not show."""
    with torch.no_grad():
        for parameter in module.parameters():
            scale = 0.5 if parameter.ndim < 2 else 1.2 / parameter[0].numel() ** 0.5
            noise = torch.randn_like(parameter) * scale
            parameter.copy_(1 + 0.2 * noise if parameter.ndim < 2 and parameter.abs().sum() else noise)


def _vae(channels: int) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=channels, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def _clip(kind: type = CLIPTextModel, positions: int = 32) -> Any:
    config = CLIPTextConfig(
        vocab_size=1963, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=positions, projection_dim=16, bos_token_id=1961, eos_token_id=1962,
    )  # fmt: skip
    return kind(config).eval()


def _t5() -> T5EncoderModel:
    config = T5Config(vocab_size=3656, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    return T5EncoderModel(config).eval()


def _clip_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL_DIR / "tokenizer")


def _t5_tokenizer() -> Any:
    """The bundled model's with a tenth of its pieces, which every copy of a pipeline reads again."""
    whole = AutoTokenizer.from_pretrained(MODEL_DIR / "tokenizer_2")
    spelled = {f"▁{word}" for word in f"{PROMPT} {OTHER_PROMPT}".split()}
    some = [each for at, each in enumerate(whole._vocab_scores) if at < 200 or len(each[0]) == 1 or each[0] in spelled]
    return T5Tokenizer(vocab=some, extra_ids=0, model_max_length=whole.model_max_length)


def _flux(blocks: int, guidance: bool = False) -> FluxPipeline:
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=blocks // 2, num_single_layers=blocks - blocks // 2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 6, 6),
        guidance_embeds=guidance,
    )  # fmt: skip
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(),
        _vae(4),
        _clip(),
        _clip_tokenizer(),
        _t5(),
        _t5_tokenizer(),
        transformer,
    )


def _flux_guided(blocks: int) -> FluxPipeline:
    return _flux(blocks, guidance=True)


def _sd3(
    blocks: int, dual: tuple[int, ...] = (), qk_norm: str | None = None, channels: int = 4
) -> StableDiffusion3Pipeline:
    transformer = SD3Transformer2DModel(
        sample_size=32, patch_size=2, in_channels=channels, num_layers=blocks, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=WIDTH, caption_projection_dim=WIDTH, pooled_projection_dim=32,
        out_channels=channels,
        pos_embed_max_size=24, dual_attention_layers=dual, qk_norm=qk_norm,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(channels),
        _clip(CLIPTextModelWithProjection), _clip_tokenizer(), _clip(CLIPTextModelWithProjection), _clip_tokenizer(),
        _t5(), _t5_tokenizer(),
    )  # fmt: skip


def _sd35(blocks: int) -> StableDiffusion3Pipeline:
    return _sd3(blocks, dual=tuple(range(max(1, blocks // 2))), qk_norm="rms_norm")


def _sd3_16(blocks: int) -> StableDiffusion3Pipeline:
    """With as many channels as the inpainting pipeline asks for."""
    return _sd3(blocks, channels=16)


def _pixart_transformer(blocks: int, sample_size: int, heads: int = 3) -> PixArtTransformer2DModel:
    return PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=48 // heads, in_channels=4, out_channels=8, num_layers=blocks,
        cross_attention_dim=48, sample_size=sample_size, patch_size=2, caption_channels=WIDTH,
        use_additional_conditions=sample_size == 128,
    )  # fmt: skip


def _pixart(blocks: int, heads: int = 3) -> PixArtAlphaPipeline:
    transformer = _pixart_transformer(blocks, 128, heads)
    return PixArtAlphaPipeline(_t5_tokenizer(), _t5(), _vae(4), transformer, DPMSolverMultistepScheduler())


def _pixart_4(blocks: int) -> PixArtAlphaPipeline:
    return _pixart(blocks, heads=4)


def _pixart_sigma(blocks: int) -> PixArtSigmaPipeline:
    return PixArtSigmaPipeline(
        _t5_tokenizer(), _t5(), _vae(4), _pixart_transformer(blocks, 8), DPMSolverMultistepScheduler()
    )


def _qwen(blocks: int) -> QwenImagePipeline:
    transformer = QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=blocks, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=WIDTH, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, latents_mean=[0.1, -0.1, 0.2, 0.0],
        latents_std=[1.0, 1.5, 0.8, 1.2],
    )  # fmt: skip
    tokenizer = _qwen_tokenizer()
    encoder = _qwen_encoder(len(tokenizer))
    return QwenImagePipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer, transformer)


def _qwen_encoder(vocabulary: int) -> Qwen2_5_VLForConditionalGeneration:
    layers = {"num_hidden_layers": 1, "hidden_size": WIDTH, "intermediate_size": 32}
    text = {
        **layers, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": vocabulary,
        "bos_token_id": 0, "eos_token_id": 0,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH}
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)).eval()


def _qwen_tokenizer() -> Qwen2Tokenizer:
    """Knows the pipeline's template word by word, as the real one does: the pipeline drops its first 34 tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer()._tokenizer.pre_tokenizer
    texts = [*re.split(r"<\|im_\w+\|>", QWEN_TEMPLATE), PROMPT, OTHER_PROMPT]
    learner.train_from_iterator(texts, trainers.BpeTrainer(special_tokens=special, show_progress=False))
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(pair) for pair in learned["merges"]]
    return Qwen2Tokenizer(learned["vocab"], merges, additional_special_tokens=special[1:])


def _qwen3() -> tuple[Qwen3ForCausalLM, Qwen2Tokenizer]:
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval(), tokenizer


def _zimage(blocks: int) -> ZImagePipeline:
    """With two refiners of the picture among its blocks."""
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=WIDTH, n_layers=blocks - 2, n_refiner_layers=2, n_heads=2, n_kv_heads=2,
        cap_feat_dim=WIDTH, axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    encoder, tokenizer = _qwen3()
    return ZImagePipeline(FlowMatchEulerDiscreteScheduler(shift=3.0), _vae(4), encoder.model, tokenizer, transformer)


def _flux2(blocks: int) -> Flux2KleinPipeline:
    transformer = Flux2Transformer2DModel(
        patch_size=1, in_channels=16, num_layers=blocks // 2, num_single_layers=blocks - blocks // 2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=WIDTH, timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    vae = AutoencoderKLFlux2(
        block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip
    encoder, tokenizer = _qwen3()
    return Flux2KleinPipeline(FlowMatchEulerDiscreteScheduler(), vae, encoder, tokenizer, transformer)


def _cogview4(blocks: int) -> CogView4Pipeline:
    transformer = CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=blocks, attention_head_dim=16, num_attention_heads=2, out_channels=4,
        text_embed_dim=WIDTH, time_embed_dim=16, condition_dim=4, sample_size=16, rope_axes_dim=(32, 32),
    )  # fmt: skip
    tokenizer = _qwen_tokenizer()
    config = GlmConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, pad_token_id=0, eos_token_id=0,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True)
    return CogView4Pipeline(tokenizer, GlmModel(config).eval(), _vae(4), transformer, scheduler)


def _ltx(blocks: int) -> LTXPipeline:
    """Five frames of the latent for a clip of 33."""
    transformer = LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=WIDTH,
        num_layers=blocks, caption_channels=WIDTH,
    )  # fmt: skip
    vae = AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=2,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return LTXPipeline(scheduler, vae, _t5(), _t5_tokenizer(), transformer)


def _wan_transformer(blocks: int, channels: int = 4, image_dim: int | None = None) -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=channels, out_channels=4, text_dim=WIDTH, freq_dim=32,
        ffn_dim=48, num_layers=blocks, cross_attn_norm=True, rope_max_seq_len=32, image_dim=image_dim,
        added_kv_proj_dim=None if image_dim is None else WIDTH,
    )  # fmt: skip


def _wan_parts() -> dict[str, Any]:
    """Five frames of the latent for a clip of 17."""
    vae = AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.1, 0.2, 0.0], latents_std=[1.0, 1.5, 0.8, 1.2],
    )  # fmt: skip
    config = UMT5Config(vocab_size=3656, d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    encoder = UMT5EncoderModel(config).eval()
    return {"tokenizer": _t5_tokenizer(), "text_encoder": encoder, "vae": vae, "scheduler": scheduler}


def _wan(blocks: int) -> WanPipeline:
    return WanPipeline(**_wan_parts(), transformer=_wan_transformer(blocks))


def _wan_a14b(blocks: int) -> WanPipeline:
    """Wan 2.2: one transformer for the first steps, another one for the others."""
    both = {"transformer": _wan_transformer(blocks), "transformer_2": _wan_transformer(blocks)}
    return WanPipeline(**_wan_parts(), **both, boundary_ratio=0.875)


def _wan_i2v(blocks: int) -> WanImageToVideoPipeline:
    """Wan 2.1 from a picture, which joins the latent's channels and the text."""
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=16
    )
    return WanImageToVideoPipeline(
        **_wan_parts(), transformer=_wan_transformer(blocks, channels=12, image_dim=16),
        image_encoder=CLIPVisionModel(vision).eval(),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
    )  # fmt: skip


def _wan_5b(blocks: int) -> WanImageToVideoPipeline:
    """Wan 2.2 5B: the picture is the first frame, and every token has a time of its own."""
    return WanImageToVideoPipeline(**_wan_parts(), transformer=_wan_transformer(blocks), expand_timesteps=True)
