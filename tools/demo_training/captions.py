"""Captions: the style words, the variants seen in training, and the pairs held out of it."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

STYLES = ("noto", "twemoji", "flat", "3d")
SKIN_TONE = re.compile(r"skin-tone|-(light|medium-light|medium|medium-dark|dark)$")


def is_skin_tone(icon: str) -> bool:
    """Whether an icon name is one of the skin-tone variants, which are left out."""
    return SKIN_TONE.search(icon) is not None


def concept_of(icon: str) -> str:
    """``"cherry-blossom"`` becomes ``"cherry blossom"``."""
    return icon.replace("-", " ")


@dataclass(frozen=True)
class Caption:
    """What a picture shows: a concept drawn in a style."""

    concept: str
    style: str

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"unknown style {self.style!r}; the styles are {', '.join(STYLES)}")

    def __str__(self) -> str:
        return f"{self.concept}, {self.style} style"

    @classmethod
    def parse(cls, line: str) -> Caption:
        """Read ``"cherry blossom, flat style"``."""
        concept, comma, style = line.strip().rpartition(", ")
        if not comma or not style.endswith(" style"):
            raise ValueError(f'expected "NAME, STYLE style", got {line!r}')
        return cls(concept, style.removesuffix(" style"))


@dataclass(frozen=True)
class CaptionMix:
    """How often each way to say a caption is drawn; the rest is the plain form.

    Args:
        empty: Share of empty captions, which classifier-free guidance needs.
        bare: Share of ``"NAME"`` without a style.
        leading: Share of ``"STYLE style NAME"``.
        sentence: Share of ``"a NAME in STYLE style"``.
    """

    empty: float = 0.10
    bare: float = 0.06
    leading: float = 0.06
    sentence: float = 0.06

    def draw(self, caption: Caption, rng: random.Random) -> str:
        """Say a caption in one of the forms, at random."""
        forms = ("", caption.concept, leading_form(caption), sentence_form(caption))
        u = rng.random()
        for share, form in zip((self.empty, self.bare, self.leading, self.sentence), forms, strict=True):
            if u < share:
                return form
            u -= share
        return str(caption)


def leading_form(caption: Caption) -> str:
    return f"{caption.style} style {caption.concept}"


def sentence_form(caption: Caption) -> str:
    return f"a {caption.concept} in {caption.style} style"


def all_forms(caption: Caption) -> tuple[str, ...]:
    """Every non-empty way to say a caption, the plain one first."""
    return str(caption), caption.concept, leading_form(caption), sentence_form(caption)


def split_held_out(captions: Sequence[Caption], held_out: Iterable[str]) -> tuple[list[int], list[int]]:
    """Return the indices of the captions to train on and of those held out.

    Raises:
        ValueError: A held-out caption names no picture, or its concept would be seen in no other style.
    """
    wanted = {Caption.parse(line) for line in held_out}
    missing = wanted - set(captions)
    if missing:
        raise ValueError(f"held-out captions without a picture: {', '.join(sorted(map(str, missing)))}")
    seen = [i for i, caption in enumerate(captions) if caption not in wanted]
    held = [i for i, caption in enumerate(captions) if caption in wanted]
    known = {captions[i].concept for i in seen}
    strangers = [str(captions[i]) for i in held if captions[i].concept not in known]
    if strangers:
        raise ValueError(f"held-out concepts that no other style shows: {', '.join(strangers)}")
    return seen, held
