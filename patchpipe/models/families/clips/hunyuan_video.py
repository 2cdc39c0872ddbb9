"""HunyuanVideo 1.0, Framepack and 1.5: clips; dual-stream, then single-stream blocks, padded text under a mask."""

from patchpipe.models.blocks import BlockList, of
from patchpipe.models.families.kinds import CLIP, JOINT, variants
from patchpipe.models.plan import ModelPlan

TIMED_TEXT = ("context_embedder",)
TEXT = "encoder_hidden_states"
HISTORY = tuple(f"latents_{kind}" for kind in ("clean", "history_2x", "history_4x"))
INDICES = ("indices_latents", *(f"indices_{name}" for name in HISTORY))


def _list(path: str, count: str, rotary: str, *clip: str) -> BlockList:
    """A list of blocks of HunyuanVideo, where the clip's stream has these segments."""
    return BlockList(
        path=path,
        count=count,
        streams=JOINT.streams,
        rows={
            "hidden_states": of(*clip),
            rotary: of(*clip, dim=0),
            "attention_mask": of(*clip, "text", dim=3),
        },
        attention={"attn": (*clip, "text")},
        mask="attention_mask",
        never_empty=(TEXT,),
        counts=("num_tokens",),
    )


def both_lists(*clip: str, rotary: str = "freqs_cis") -> tuple[BlockList, ...]:
    """Both of them; the dual-stream blocks' rotary embeddings have this name."""
    return (
        _list("transformer_blocks", "num_layers", rotary, *clip),
        _list("single_transformer_blocks", "num_single_layers", "image_rotary_emb", *clip),
    )


HUNYUAN_VIDEO = ModelPlan(
    model="HunyuanVideoTransformer3DModel",
    pipelines=variants("HunyuanVideo", "", "ImageToVideo"),
    grid=CLIP,
    blocks=both_lists("image"),
    inputs=("encoder_attention_mask", "pooled_projections", "guidance"),
    guidance="calls",
    per_call=TIMED_TEXT,
)

FRAMEPACK = ModelPlan(
    model="HunyuanVideoFramepackTransformer3DModel",
    grid=CLIP,
    blocks=both_lists("history", "image"),
    inputs=(*HUNYUAN_VIDEO.inputs, "image_embeds", *HISTORY, *INDICES),
    unbatched_inputs=INDICES,
    lengths=("encoder_attention_mask",),
    guidance="calls",
    sections=True,
    per_call=TIMED_TEXT,
    per_request={"image_projection": ("image_embeds",)},
    frames_per_second=30,
)

HUNYUAN_VIDEO_15 = ModelPlan(
    model="HunyuanVideo15Transformer3DModel",
    pipelines=variants("HunyuanVideo15", "", "ImageToVideo"),
    grid=CLIP,
    blocks=(
        BlockList(
            streams=JOINT.streams,
            rows={"attention_mask": of("text"), "freqs_cis": of("image", dim=0)},
            attention={"attn": ("image", "text")},
            mask="attention_mask",
            masks_queries=True,
            never_empty=(TEXT, "attention_mask"),
        ),
    ),
    inputs=("timestep_r", "image_embeds", "encoder_attention_mask", f"{TEXT}_2", "encoder_attention_mask_2"),
    guidance="calls",
    per_call=TIMED_TEXT,
    per_request={"context_embedder_2": (f"{TEXT}_2",), "image_embedder": ("image_embeds",)},
)
