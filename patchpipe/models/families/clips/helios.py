"""Helios (``HeliosTransformer3DModel``): clips in sections; what came before rides along."""

from patchpipe.models.latent import Latent
from patchpipe.models.plan import CROSS, BlockList, ModelPlan, of

HISTORY = tuple(f"latents_history_{part}" for part in ("short", "mid", "long"))
INDICES = ("indices_hidden_states", *(f"indices_{name}" for name in HISTORY))
CLIP = ("history", "image")

HELIOS = ModelPlan(
    model="HeliosTransformer3DModel", pipelines=("HeliosPipeline",),
    grid=Latent("bcfhw", cut="f"), guidance="calls", sections=True, frames_per_second=24,
    blocks=(BlockList(
        path="blocks", count="num_layers", streams=("hidden_states",),
        rows={"hidden_states": of(*CLIP), "rotary_emb": of(*CLIP), "temb": of(*CLIP, ndim=4)},
        attention={"attn1": CLIP, "attn2": CROSS}, counts=("original_context_length",),
    ),),
    inputs=("encoder_hidden_states", "timestep", *INDICES, *HISTORY), ignored_inputs=("attention_kwargs",),
    unbatched_inputs=INDICES, embed="patch_embedding",
)  # fmt: skip
