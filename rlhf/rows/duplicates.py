"""Near duplicates: how much of its character n-grams a text shares with others.

The similarity is Jaccard's, grams in both over grams in either, computed exactly: an index from grams to texts finds
those that share any. Case, punctuation and white space don't count.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from typing import NamedTuple

GRAM = 5
"""Characters of a gram: a word or so. Texts that differ in a word or two share most of them."""


class Near(NamedTuple):
    """The most similar text: its similarity, from 0 to 1 (equal but for case and punctuation), and the text."""

    similarity: float
    text: str


def normalised(text: str) -> str:
    """Return a text's letters and digits in lower case, words separated by one space."""
    return " ".join(re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold()))


def grams_of(text: str, size: int = GRAM) -> frozenset[str]:
    """Return the character n-grams of a normalised text; of a shorter one, itself."""
    plain = normalised(text)
    return frozenset(plain[i : i + size] for i in range(max(1, len(plain) - size + 1)))


class NearDuplicates:
    """Texts, of which the one most similar to another can be found."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._sizes: list[int] = []
        self._holding: dict[str, list[int]] = {}

    def add(self, text: str) -> None:
        """Add a text."""
        grams = grams_of(text)
        for gram in grams:
            self._holding.setdefault(gram, []).append(len(self.texts))
        self._sizes.append(len(grams))
        self.texts.append(text)

    def nearest(self, text: str) -> Near:
        """Return the most similar text, the first of equals; Near(0, "") where none shares a gram."""
        grams = grams_of(text)
        shared = Counter(number for gram in grams for number in self._holding.get(gram, ()))
        best = Near(0.0, "")
        for number, both in sorted(shared.items()):
            similarity = both / (len(grams) + self._sizes[number] - both)
            if similarity > best.similarity:
                best = Near(similarity, self.texts[number])
        return best
