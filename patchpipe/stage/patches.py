"""How a latent is cut into patches of token rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import shares
from patchpipe.layout.patching import PatchCosts
from patchpipe.models.latent import Raster


@dataclass(frozen=True)
class Patch:
    """One piece of a cut latent, or the whole of it.

    Attributes:
        index: Its place among the patches.
        units: Its range along the latent's cut dim.
        rows: Its range of token rows.
        tokens: Its range of image tokens.
        total_tokens: Image tokens of the whole latent.
        whole: Whether it is the uncut latent, as in a synchronous step.
        part: Which of how many ranks share the patch; the ranges above are then this rank's own.
        joined: What follows the picture along the latent's cut dim and rides with this piece.
    """

    index: int
    units: tuple[int, int]
    rows: tuple[int, int]
    tokens: tuple[int, int]
    total_tokens: int
    whole: bool = False
    part: tuple[int, int] = (0, 1)
    joined: tuple[int, int] = (0, 0)

    @property
    def spans(self) -> list[tuple[int, int]]:
        """Its ranges along the latent's cut dim: its rows, and what follows the picture, as one where they touch."""
        if self.joined[0] == self.joined[1]:
            return [self.units]
        if self.units[1] == self.joined[0]:
            return [(self.units[0], self.joined[1])]
        return [self.units, self.joined]

    @property
    def extent(self) -> int:
        """Entries of the latent's cut dim that it has."""
        return sum(stop - start for start, stop in self.spans)

    @property
    def uncut(self) -> bool:
        """Whether the inputs of a call go in as they are."""
        return self.whole and self.part[1] == 1

    def rider_range(self, rows: int) -> tuple[int, int]:
        """Which rows of a segment, such as text, ride with this piece: all with the first patch, shared by ranks."""
        return shares(rows, self.part[1])[self.part[0]] if self.carries_riders else (0, 0)

    @property
    def reference_range(self) -> tuple[int, int]:
        """Which rows of references ride with this piece: all with the last patch, shared by ranks."""
        start, stop = self.joined
        return (start - self.total_tokens, stop - self.total_tokens) if start < stop else (0, 0)

    @property
    def carries_riders(self) -> bool:
        """Text rides with the first patch of a step."""
        return self.index == 0

    @property
    def token_count(self) -> int:
        """Image tokens in this patch."""
        return self.tokens[1] - self.tokens[0]


@dataclass(frozen=True)
class Cut:
    """The patches of one latent shape; the same for every step of a request."""

    rows: Raster
    row_bounds: tuple[int, ...]

    @classmethod
    def of(
        cls,
        rows: Raster,
        config: ParallelConfig,
        text: int = 0,
        costs: PatchCosts | None = None,
        halves: int = 1,
        entries: int = 1,
    ) -> Cut:
        """Cuts ``rows`` as ``config`` asks.

        Args:
            rows: Token rows of the picture.
            config: The layout.
            text: Text tokens that ride with the first patch.
            costs: What a patch costs; nothing, if not given.
            halves: 2 where the batch goes through the stages in halves.
            entries: Of the batch, as a rank runs it: what a patch costs beside its tokens, it costs for all at once.

        Raises:
            ValueError: More patches than rows, or ``patch_rows`` that do not add up to the picture.
        """
        if config.distrifusion > 1:  # each rank's part is a patch: it needs no other to go on
            return cls(rows, (0, *(stop for _, stop in shares(rows.count, config.distrifusion))))
        tokens = entries // halves * (rows.count * rows.tokens + text)
        count = config.patches_for(rows.count, tokens, costs or PatchCosts(), halves)
        sizes = config.patch_rows or balanced_rows(rows, count, text, config.ulysses * config.ring)
        if sum(sizes) != rows.count:
            raise ValueError(
                f"patch_rows={sizes} adds up to {sum(sizes)} token rows but this picture has {rows.count}: "
                f"change them, or give patches={len(sizes)} for an even cut"
            )
        return cls(rows, (0, *accumulate(sizes)))

    @property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the patches along the latent's cut dim; the last one has what follows the picture."""
        *starts, end = (row * self.rows.units for row in self.row_bounds)
        return (*starts, end + self.rows.joined)

    @property
    def total_tokens(self) -> int:
        """Image tokens of the latent."""
        return self.rows.count * self.rows.tokens

    @property
    def patches(self) -> tuple[Patch, ...]:
        """The patches in streaming order."""
        pairs = zip(self.row_bounds[:-1], self.row_bounds[1:], strict=True)
        return tuple(self._patch(index, start, stop) for index, (start, stop) in enumerate(pairs))

    def split(self, patch: Patch, parts: int) -> tuple[Patch, ...]:
        """The pieces of a patch for the ranks that share it.

        Raises:
            ValueError: There are fewer rows than ranks.
        """
        if parts == 1:
            return (patch,)
        start, stop = patch.rows
        if stop - start < parts:
            raise ValueError(
                f"a patch of {stop - start} token rows cannot be shared by {parts} ranks: use fewer patches, "
                f"a taller picture, or fewer ranks along ulysses, ring and distrifusion"
            )
        pieces = shares(stop - start, parts)
        first, joined = patch.joined[0], shares(patch.joined[1] - patch.joined[0], parts)
        return tuple(
            replace(
                self._patch(patch.index, start + low, start + high, patch.whole),
                part=(index, parts),
                joined=(first + joined[index][0], first + joined[index][1]),
            )
            for index, (low, high) in enumerate(pieces)
        )

    @property
    def whole(self) -> Patch:
        """The latent as one patch."""
        return self._patch(0, 0, self.rows.count, whole=True)

    def _patch(self, index: int, start: int, stop: int, whole: bool = False) -> Patch:
        units, tokens = self.rows.units, self.rows.tokens
        return Patch(
            index=index,
            units=(start * units, stop * units),
            rows=(start, stop),
            tokens=(start * tokens, stop * tokens),
            total_tokens=self.total_tokens,
            whole=whole,
            joined=(self.total_tokens, self.total_tokens + self.rows.joined) if stop == self.rows.count else (0, 0),
        )


def balanced_rows(rows: Raster, patches: int, text: int = 0, fewest: int = 1) -> tuple[int, ...]:
    """Sizes, in rows, of patches that cost about the same.

    A text token costs what an image token does, so the first patch, which carries the text, has fewer rows: else
    every stage waits for it once a step where there are as many patches as stages.

    Args:
        rows: Token rows of the picture.
        patches: Number of patches, at most one a row.
        text: Text tokens that ride with the first patch.
        fewest: Rows every patch should have, if there are as many.

    Returns:
        The first patch's rows, then the others', which differ by one at most, the larger ones last.
    """
    if patches == 1:
        return (rows.count,)
    others = patches - 1

    def unevenness(first: int) -> tuple[float, float]:
        costs = [first * rows.tokens + text, *(size * rows.tokens for size in _even(rows.count - first, others))]
        return max(costs), sum(cost * cost for cost in costs)

    low = max(1, min(fewest, rows.count // patches))
    first = min(range(low, max(low, rows.count // patches) + 1), key=unevenness)
    return first, *_even(rows.count - first, others)


def _even(rows: int, patches: int) -> tuple[int, ...]:
    size, extra = divmod(rows, patches)
    return tuple(size + (index >= patches - extra) for index in range(patches))
