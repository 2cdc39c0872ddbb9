"""HunyuanVideo 1.0, Framepack and 1.5: clips; dual-stream, then single-stream blocks, padded text under a mask."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import BlockList, ModelPlan, of

GRID = Latent("bcfhw", cut="f")
STREAMS = ("hidden_states", "encoder_hidden_states")
TEXT_ROWS = {"encoder_hidden_states": of("text")}
LISTS = (
    ("transformer_blocks", "num_layers", "freqs_cis"),
    ("single_transformer_blocks", "num_single_layers", "image_rotary_emb"),
)
TIMED = ("time_text_embed", "context_embedder", "norm_out.linear")
TEXT = ("encoder_hidden_states", "encoder_attention_mask")
OTHER_TEXT = {"context_embedder_2": ("encoder_hidden_states_2",), "image_embedder": ("image_embeds",)}
HISTORY = tuple(f"latents_{kind}" for kind in ("clean", "history_2x", "history_4x"))
INDICES = ("indices_latents", *(f"indices_{name}" for name in HISTORY))


def _lists(*clip: str) -> tuple[BlockList, ...]:
    """The two lists of blocks, where the clip's stream has these segments."""
    rows = {"hidden_states": of(*clip), **TEXT_ROWS, "attention_mask": of(*clip, "text", dim=3)}
    return tuple(
        BlockList(
            path=path, count=count, streams=STREAMS, rows={**rows, rotary: of(*clip, dim=0)},
            attention={"attn": (*clip, "text")}, mask="attention_mask", never_empty=("encoder_hidden_states",),
            counts=("num_tokens",),
        )
        for path, count, rotary in LISTS
    )  # fmt: skip


HUNYUAN_VIDEO = ModelPlan(
    model="HunyuanVideoTransformer3DModel",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
    grid=GRID, blocks=_lists("image"), guidance="calls", frames_per_second=24,
    inputs=("timestep", *TEXT, "pooled_projections", "guidance"), ignored_inputs=("attention_kwargs",),
    embed="x_embedder", tail="proj_out", per_call=TIMED, per_request={"rope": ("hidden_states",)},
)  # fmt: skip

FRAMEPACK = ModelPlan(
    model="HunyuanVideoFramepackTransformer3DModel", pipelines=("HunyuanVideoFramepackPipeline",),
    grid=GRID, blocks=_lists("history", "image"), guidance="calls", sections=True, frames_per_second=30,
    lengths=("encoder_attention_mask",),
    inputs=("timestep", *TEXT, "pooled_projections", "guidance", "image_embeds", *HISTORY, *INDICES),
    ignored_inputs=("attention_kwargs",), unbatched_inputs=INDICES,
    embed="x_embedder", per_call=TIMED, per_request={"image_projection": ("image_embeds",)},
)  # fmt: skip

HUNYUAN_VIDEO_15 = ModelPlan(
    model="HunyuanVideo15Transformer3DModel", pipelines=("HunyuanVideo15Pipeline",),
    grid=GRID, guidance="calls", frames_per_second=24,
    blocks=(BlockList(
        path="transformer_blocks", count="num_layers", streams=STREAMS,
        rows={"hidden_states": of("image"), **TEXT_ROWS, "attention_mask": of("text"), "freqs_cis": of("image", dim=0)},
        attention={"attn": ("image", "text")}, mask="attention_mask", masks_queries=True,
        never_empty=("encoder_hidden_states", "attention_mask"),
    ),),
    inputs=("timestep", "timestep_r", "image_embeds", *TEXT, *(f"{name}_2" for name in TEXT)),
    ignored_inputs=("attention_kwargs",),
    embed="x_embedder", tail="proj_out", per_call=("time_embed", *TIMED[1:]),
    per_request={"rope": ("hidden_states",), **OTHER_TEXT},
)  # fmt: skip
