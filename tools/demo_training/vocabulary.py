"""The two tokenizers, built from the captions."""

from __future__ import annotations

import math
import string
from collections import Counter
from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import CLIPTokenizer, T5Tokenizer

START, END = "<|startoftext|>", "<|endoftext|>"
CLIP_WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
SUFFIX = "</w>"
MAX_TOKENS = 32
CHARACTER_SCORE = -14.0
CAPITAL_PENALTY = 0.5


def clip_tokenizer(captions: Iterable[str], size: int = 1963) -> CLIPTokenizer:
    """Train CLIP's byte-level BPE on the captions.

    Args:
        captions: The text to learn from.
        size: Entries of the vocabulary, the two special ones included.
    """
    learner = Tokenizer(BPE(end_of_word_suffix=SUFFIX, unk_token=END))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=size - 2 - len(letters),
        initial_alphabet=letters,
        end_of_word_suffix=SUFFIX,
        show_progress=False,
    )
    learner.train_from_iterator(captions, trainer)
    return _as_clip(learner, letters)


def _as_clip(learner: Tokenizer, letters: list[str]) -> CLIPTokenizer:
    import json

    model = json.loads(learner.to_str())["model"]
    learned = sorted(model["vocab"], key=model["vocab"].get)
    pieces = dict.fromkeys([*letters, *(letter + SUFFIX for letter in letters), *learned, START, END])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = [tuple(pair) for pair in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=MAX_TOKENS)


def t5_pieces(captions: Iterable[str]) -> list[tuple[str, float]]:
    """Pieces and scores: special, whole words by log frequency, single characters, capitalised words."""
    counts = Counter(word for text in captions for word in text.replace(",", " ").split())
    total = sum(counts.values())
    words = {f"▁{word}": math.log(count / total) for word, count in counts.most_common()}
    pieces = {"<pad>": 0.0, "</s>": 0.0, "<unk>": 0.0, ",": -3.0, "▁": -4.0} | words
    characters = string.printable.strip() + "".join(sorted({c for word in counts for c in word}))
    for character in characters:
        pieces.setdefault(character, CHARACTER_SCORE)
    for piece, score in words.items():
        pieces.setdefault(_capital(piece), score - CAPITAL_PENALTY)
    return list(pieces.items())


def _capital(piece: str) -> str:
    return piece[:2].upper() + piece[2:]


def t5_tokenizer(captions: Iterable[str]) -> T5Tokenizer:
    """Make a Unigram tokenizer whose pieces are the captions' whole words."""
    return T5Tokenizer(vocab=t5_pieces(captions), extra_ids=0, model_max_length=MAX_TOKENS)


def capital_copies(tokenizer: T5Tokenizer) -> list[tuple[int, int]]:
    """Pairs (capitalised piece, its lower-case piece), whose embeddings the export makes equal."""
    vocab: dict[str, int] = tokenizer.get_vocab()
    pairs = []
    for piece, index in vocab.items():
        lower = piece.lower()
        if piece.startswith("▁") and lower != piece and lower in vocab:
            pairs.append((index, vocab[lower]))
    return sorted(pairs)
