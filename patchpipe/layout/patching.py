"""How many patches make a request the shortest, by what a patch costs."""

from __future__ import annotations

from dataclasses import dataclass

USUAL_STEPS = 20  # of a request; its own number is not known when its first call is cut
MOST_PATCHES_OF_A_STAGE = 4


@dataclass(frozen=True)
class PatchCosts:
    """What a patch costs beside the compute of its tokens.

    Attributes:
        hop: Time it takes from stage to stage, as a share of the time its tokens take in a stage.
        tokens: The rest, calls and the weights read anew, in tokens that take as long to compute.
    """

    hop: float = 0.0
    tokens: float = 0.0


def quickest(stages: int, tokens: float, costs: PatchCosts, halves: int = 1) -> int:
    """Number of patches M that makes a usual request the shortest: steps of ``max(M·t, N·(t + c))``, and the fill.

    With as many patches as stages every stage waits N times for a hop c in each step; every further patch costs what
    a patch costs beside its tokens. Once in a request the last stage waits for N - 1 others to run a first patch. Where
    there are two halves of every patch, half as many patches do: they are larger and see fresher keys.

    Args:
        stages: Pipeline stages N.
        tokens: Tokens of a step that a rank computes.
        costs: Of a patch: the hop is c, and the rest is part of t.
        halves: 2 where every patch goes through the stages twice, for either half of the batch.
    """
    if stages == 1:
        return 1

    def request(patches: int) -> float:
        compute = tokens / patches
        stage, hop = compute + costs.tokens, costs.hop * compute
        back = stages * (stage + hop) + (halves - 1) * stage  # both halves of a patch, one behind the other
        period = max(halves * patches * stage, back)
        return USUAL_STEPS * period + (stages - 1) * (stage + hop)

    fewest = fewest_patches(stages, halves)
    return min(range(fewest, MOST_PATCHES_OF_A_STAGE * stages + 1), key=request)


def fewest_patches(stages: int, halves: int) -> int:
    """Patches that give every stage something to do; with one there would be nothing stale, and nothing to gain."""
    return stages if halves == 1 else max(2, -(-stages // halves))
