"""The networks: built from random numbers or loaded from a pipeline folder, and exported to one."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

from .vocabulary import MAX_TOKENS, capital_copies

# Modulation layers, the output norm's and the output projection start at zero: a block starts shut.
ZERO_AT_START = ("norm1.linear", "norm1_context.linear", ".norm.linear", "norm_out.linear", "proj_out")


@dataclass(frozen=True)
class Shape:
    """Size of the transformer. The default is the bundled one, 13.5 M parameters."""

    heads: int = 4
    double: int = 3
    single: int = 6

    @classmethod
    def parse(cls, text: str) -> Shape:
        """Read ``"4,3,6"``: heads of 64, double blocks, single blocks."""
        try:
            heads, double, single = (int(part) for part in text.split(","))
        except ValueError:
            raise ValueError(f'expected "HEADS,DOUBLE,SINGLE" such as "4,3,6", got {text!r}') from None
        return cls(heads, double, single)


class Painter(nn.Module):
    """The three networks that learn together: transformer, CLIP text model, T5 encoder."""

    def __init__(self, transformer: FluxTransformer2DModel, clip: CLIPTextModel, t5: T5EncoderModel) -> None:
        super().__init__()
        self.transformer, self.clip, self.t5 = transformer, clip, t5

    def forward(self, latents: Tensor, s: Tensor, clip_ids: Tensor, t5_ids: Tensor) -> Tensor:
        """Predict the flow (noise - picture).

        Args:
            latents: Noised latents, shape (batch, 16, height, width).
            s: Noise levels, shape (batch,).
            clip_ids: Token ids for CLIP, shape (batch, any).
            t5_ids: Token ids for T5, padded, shape (batch, length).
        """
        height, width = latents.shape[2:]
        text = self.t5(t5_ids)[0]
        flow = self.transformer(
            hidden_states=pack(latents),
            timestep=s,
            pooled_projections=self.clip(clip_ids).pooler_output,
            encoder_hidden_states=text,
            txt_ids=torch.zeros(text.shape[1], 3, device=text.device),
            img_ids=image_ids(height // 2, width // 2, latents.device),
            return_dict=False,
        )[0]
        return unpack(flow, height, width)

    def matrices(self) -> Iterator[nn.Parameter]:
        """The attention and MLP matrices of the blocks, which Muon steps."""
        for name, param in self.transformer.named_parameters():
            if "transformer_blocks." in name and param.ndim == 2 and ".norm" not in name:
                yield param

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """The weights of both text encoders."""
        yield from self.clip.parameters()
        yield from self.t5.parameters()


def pack(latents: Tensor) -> Tensor:
    """(batch, 16, h, w) to tokens (batch, h/2 * w/2, 64), as FluxPipeline packs them."""
    b, c, h, w = latents.shape
    return latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of :func:`pack`."""
    b, _, c = tokens.shape
    boxes = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return boxes.reshape(b, c // 4, height, width)


def image_ids(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions of the image tokens, shape (rows * columns, 3)."""
    ids = torch.zeros(rows, columns, 3, device=device)
    ids[..., 1] = torch.arange(rows, device=device)[:, None]
    ids[..., 2] = torch.arange(columns, device=device)
    return ids.reshape(-1, 3)


def new_autoencoder(channels: tuple[int, ...]) -> AutoencoderKL:
    """An autoencoder with FLUX.1's latent layout: 16 channels, 8 pixels per latent."""
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        sample_size=128,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def new_transformer(shape: Shape) -> FluxTransformer2DModel:
    """A FLUX.1 transformer: Xavier matrices, zero biases, every residual branch shut."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=shape.double,
        num_single_layers=shape.single,
        attention_head_dim=64,
        num_attention_heads=shape.heads,
        joint_attention_dim=256,
        pooled_projection_dim=128,
        guidance_embeds=False,
        axes_dims_rope=(16, 24, 24),
    )
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            _start_linear(name, module)
    return model


def _start_linear(name: str, module: nn.Linear) -> None:
    # A single block's own "proj_out" carries its attention: only the model's last projection starts at zero.
    shut = name == "proj_out" or (name.endswith(ZERO_AT_START) and not name.endswith(".proj_out"))
    if shut:
        nn.init.zeros_(module.weight)
    else:
        nn.init.xavier_uniform_(module.weight)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def new_clip(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A small CLIP text model with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def new_t5(tokenizer: T5Tokenizer) -> T5EncoderModel:
    """A small T5 encoder with random weights, its pad row zero."""
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=256,
        d_kv=64,
        d_ff=768,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=32,
        relative_attention_max_distance=64,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = T5EncoderModel(config)
    with torch.no_grad():
        model.shared.weight.normal_()[tokenizer.pad_token_id] = 0
    return model


def new_pipeline(vae: AutoencoderKL, tokenizer: CLIPTokenizer, tokenizer_2: T5Tokenizer, shape: Shape) -> FluxPipeline:
    """A pipeline with a trained autoencoder and everything else random."""
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0),
        vae=vae,
        text_encoder=new_clip(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=new_t5(tokenizer_2),
        tokenizer_2=tokenizer_2,
        transformer=new_transformer(shape),
    )


def load_pipeline(folder: Path, dtype: torch.dtype = torch.float32) -> FluxPipeline:
    """Load a pipeline folder, without progress bars.

    Raises:
        FileNotFoundError: There is no such folder.
    """
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder} is no pipeline folder: it has no model_index.json")
    pipe = FluxPipeline.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def painter_of(pipe: FluxPipeline) -> Painter:
    """The networks of a pipeline that learn together."""
    return Painter(pipe.transformer, pipe.text_encoder, pipe.text_encoder_2)


@torch.no_grad()
def export(pipe: FluxPipeline, folder: Path, notes: Iterable[tuple[str, str]] = ()) -> None:
    """Write a pipeline folder with bf16 weights.

    Args:
        pipe: Pipeline with float32 weights.
        folder: Where to write.
        notes: Further text files, as (name, text).
    """
    parts: dict[str, Any] = dict(pipe.components)
    for name in ("transformer", "text_encoder", "text_encoder_2", "vae"):
        parts[name] = copy.deepcopy(parts[name]).to("cpu", torch.bfloat16)
    _copy_capitals(parts["text_encoder_2"], pipe.tokenizer_2)
    FluxPipeline(**parts).save_pretrained(folder, safe_serialization=True)
    for name in ("text_encoder", "text_encoder_2"):
        _load_as_float32(folder / name / "config.json")
    for file, text in notes:
        (folder / file).write_text(text, encoding="utf-8")


def _copy_capitals(t5: T5EncoderModel, tokenizer: T5Tokenizer) -> None:
    weight = t5.get_input_embeddings().weight
    for capital, lower in capital_copies(tokenizer):
        weight[capital] = weight[lower]


def _load_as_float32(config: Path) -> None:
    # transformers loads in the stored dtype unless told: the pipeline's other parts default to float32.
    data = json.loads(config.read_text(encoding="utf-8"))
    data["dtype"] = "float32"
    config.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
