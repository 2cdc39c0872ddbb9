"""How a latent is cut into patches of token rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate

from patchpipe.config import ParallelConfig
from patchpipe.layout.axes import shares
from patchpipe.layout.patching import PatchCosts
from patchpipe.models.latent import Raster

EVEN = 1.15  # how many times the mean the dearest patch may cost before text is spread over more


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
        joined: Which part of what follows the picture along the latent's cut dim rides with this piece.
        text: Which part of the text rides with the patch, of how many; ``(0, 0)`` for none.
    """

    index: int
    units: tuple[int, int]
    rows: tuple[int, int]
    tokens: tuple[int, int]
    total_tokens: int
    whole: bool = False
    part: tuple[int, int] = (0, 1)
    joined: tuple[int, int] = (0, 0)
    text: tuple[int, int] = (0, 0)

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
        """Which rows of a segment, such as text, ride with this piece; ranks that share the patch share them."""
        if not self.carries_riders:
            return (0, 0)
        low, high = shares(rows, self.text[1])[self.text[0]]
        start, stop = shares(high - low, self.part[1])[self.part[0]]
        return low + start, low + stop

    @property
    def reference_range(self) -> tuple[int, int]:
        """Which rows of references ride with this piece: as many with each patch, shared by ranks."""
        start, stop = self.joined
        return (start - self.total_tokens, stop - self.total_tokens) if start < stop else (0, 0)

    @property
    def carries_riders(self) -> bool:
        """Whether text rides with it: with the first patch, or with as many as it is spread over."""
        return self.text[1] > 0

    @property
    def token_count(self) -> int:
        """Image tokens in this patch."""
        return self.tokens[1] - self.tokens[0]


@dataclass(frozen=True)
class Cut:
    """The patches of one latent shape; the same for every step of a request.

    Attributes:
        rows: Token rows of the picture.
        row_bounds: Where patches begin and end, in token rows.
        text_patches: Over how many of the first patches the text is spread.
    """

    rows: Raster
    row_bounds: tuple[int, ...]
    text_patches: int = 1

    @classmethod
    def of(
        cls,
        rows: Raster,
        config: ParallelConfig,
        text: int = 0,
        costs: PatchCosts | None = None,
        halves: int = 1,
        entries: int = 1,
        spreads: bool = False,
    ) -> Cut:
        """Cuts ``rows`` as ``config`` asks.

        Args:
            rows: Token rows of the picture.
            config: The layout.
            text: Text tokens that ride with the first patch, or are spread over some.
            costs: What a patch costs; nothing, if not given.
            halves: 2 where the batch goes through the stages in halves.
            entries: Of the batch, as a rank runs it: what a patch costs beside its tokens, it costs for all at once.
            spreads: Whether the model's text may be spread over patches; it is where it is long.

        Raises:
            ValueError: More patches than rows, or ``patch_rows`` that do not add up to the picture.
        """
        if config.distrifusion > 1:  # each rank's part is a patch: it needs no other to go on
            return cls(rows, (0, *(stop for _, stop in shares(rows.count, config.distrifusion))))
        tokens = entries // halves * (rows.count * rows.tokens + text)
        count = config.patches_for(rows.count, tokens, costs or PatchCosts(), halves)
        spread = config.text_patches or 1
        if config.text_patches is None and config.patch_rows is None and spreads:
            spread = spread_of(rows, count, text, config.ulysses * config.ring)
        if spread > count:
            raise ValueError(f"text_patches={spread} is more than the {count} patches of this picture: give fewer")
        sizes = config.patch_rows or balanced_rows(rows, count, text, config.ulysses * config.ring, spread)
        if sum(sizes) != rows.count:
            raise ValueError(
                f"patch_rows={sizes} adds up to {sum(sizes)} token rows but this picture has {rows.count}: "
                f"change them, or give patches={len(sizes)} for an even cut"
            )
        return cls(rows, (0, *accumulate(sizes)), spread)

    @property
    def bounds(self) -> tuple[int, ...]:
        """Offsets of the patches along the latent's cut dim, with what comes before the first or follows the last."""
        _, *ends = (self.rows.room + row * self.rows.units for row in self.row_bounds)
        return (0, *ends[:-1], ends[-1] + self.rows.joined)

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
        units, tokens, room = self.rows.units, self.rows.tokens, self.rows.room
        parts = 1 if whole else self.text_patches
        low, high = (0, self.rows.joined) if whole else shares(self.rows.joined, len(self.row_bounds) - 1)[index]
        return Patch(
            index=index,
            units=(room + start * units if start else 0, room + stop * units),
            rows=(start, stop),
            tokens=(start * tokens, stop * tokens),
            total_tokens=self.total_tokens,
            whole=whole,
            joined=(self.total_tokens + low, self.total_tokens + high) if low < high else (0, 0),
            text=(index, parts) if index < parts else (0, 0),
        )


def balanced_rows(rows: Raster, patches: int, text: int = 0, fewest: int = 1, text_patches: int = 1) -> tuple[int, ...]:
    """Sizes, in rows, of patches that cost about the same.

    A text token costs what an image token does, so patches that carry text have fewer rows: else every stage waits for
    them once a step where there are as many patches as stages.

    Args:
        rows: Token rows of the picture.
        patches: Number of patches, at most one a row.
        text: Text tokens.
        fewest: Rows every patch should have, if there are as many.
        text_patches: The first patches, which carry the text.

    Returns:
        Rows of the patches with text, then of the others. Either differ by one at most, the larger ones last.
    """
    if patches == text_patches:
        return _even(rows.count, patches)
    others = patches - text_patches

    def sizes(first: int) -> tuple[int, ...]:
        return *_even(first, text_patches), *_even(rows.count - first, others)

    def unevenness(first: int) -> tuple[float, float]:
        costs = _tokens(rows, sizes(first), text, text_patches)
        return max(costs), sum(cost * cost for cost in costs)

    low = text_patches * max(1, min(fewest, rows.count // patches))
    return sizes(min(range(low, max(low, text_patches * rows.count // patches) + 1), key=unevenness))


def spread_of(rows: Raster, patches: int, text: int, fewest: int = 1) -> int:
    """Over how many patches text is spread: one, or where it is long as few as make no patch much dearer than another.

    Args:
        rows: Token rows of the picture.
        patches: Number of patches.
        text: Text tokens.
        fewest: Rows every patch should have, if there are as many.
    """
    enough = EVEN * (rows.total + text) / patches

    def dearest(spread: int) -> int:
        return max(_tokens(rows, balanced_rows(rows, patches, text, fewest, spread), text, spread))

    spreads = range(1, patches + 1)
    return next((spread for spread in spreads if dearest(spread) <= enough), None) or min(spreads, key=dearest)


def _tokens(rows: Raster, sizes: tuple[int, ...], text: int, text_patches: int) -> list[int]:
    """Tokens of each patch, of which the first have their share of the text too."""
    share = -(-text // text_patches)
    return [size * rows.tokens + share * (at < text_patches) for at, size in enumerate(sizes)]


def _even(rows: int, patches: int) -> tuple[int, ...]:
    size, extra = divmod(rows, patches)
    return tuple(size + (index >= patches - extra) for index in range(patches))
