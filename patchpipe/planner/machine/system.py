"""What distinguishes one program that runs a layout from another."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class System:
    """How a program runs a schedule.

    Attributes:
        name: The program.
        text_every_patch: Whether the text's stream is computed anew with every patch, rather than once a step.
        spreads_text: Whether long text is spread over patches.
        even_stages: Whether stages get as many blocks each, rounded up, rather than balanced ones.
        entries_overlap: Whether the entries of a batch follow one another through the stages in a synchronous step.
        sums: Sums of all rows a block under tensor parallelism; ``None`` takes the model's own.
        warmup: Synchronous steps by model, where they differ from one.
        text: Text tokens by model, where its published runs use other than the usual.
    """

    name: str
    text_every_patch: bool = False
    spreads_text: bool = True
    even_stages: bool = False
    entries_overlap: bool = True
    sums: int | None = None
    warmup: Mapping[str, int] = field(default_factory=dict)
    text: Mapping[str, int] = field(default_factory=dict)

    def warmup_of(self, model: str) -> int:
        """Synchronous steps of a model's published runs."""
        return self.warmup.get(model, 1)


PATCHPIPE = System("patchpipe")
# Read off xDiT's source (SD3 and FLUX transformer wrappers, base_transformer.py, the synchronous pipeline) and its cost
# table, which has four activations per block under tensor parallelism: two sums. Its README runs PixArt with
# --warmup_steps 0, and its FLUX.1 example passes max_sequence_length=256 (4352 tokens at 1024 pixels in its issue 600).
XDIT = System(
    "xDiT",
    text_every_patch=True,
    spreads_text=False,
    even_stages=True,
    entries_overlap=False,
    sums=2,
    warmup={"pixart-alpha": 0},
    text={"flux.1-dev": 256},
)
