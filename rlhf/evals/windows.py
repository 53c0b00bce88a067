"""Find windows of some texts (50 letters in a row, 8 words in a row) in a stream of other texts, fast and exactly.

Every window of the sought texts has a hash in a sorted table; the stream's windows are hashed as they go by, all of
them, and looked up. With s_i the symbols (letters, or hashes of words) and B an odd number, modulo 2^64::

    P_i = s_0 + s_1 B + ... + s_(i-1) B^(i-1)             hash of s_i ... s_(i+n-1)  =  (P_(i+n) - P_i) B^-i

so that a window of any length costs one subtraction and one product. A byte table of the hashes' upper bits answers for
most windows; what passes it is looked up in the sorted table, and the symbols themselves are compared before a window
counts as found. Memory: about 110 bytes per sought symbol, 200 while they are built, and some megabytes for the stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

BASE = 0x9E3779B97F4A7C15
INVERSE = pow(BASE, -1, 2**64)
MIX = np.uint64(0xD6E8FEB86659FD93)
CHUNK = 2**17
"""Characters of the stream that are hashed at once: what a processor's cache holds."""
OVERLAP = 2**12
"""Characters that the pieces of a longer text share."""
END = "\0"
LAST = 0x40000
"""No letter or digit of any script has a code point beyond."""


@dataclass(frozen=True)
class Symbols:
    """A text, or several with an END between them, as the symbols whose windows are compared."""

    values: np.ndarray
    """[n] uint64; 0 is an END, which is in no window that is sought."""
    letters: np.ndarray
    """The characters behind them, as code points."""
    begin: np.ndarray | None = None
    """[n] where each symbol's characters begin in `letters`; None where a symbol is one character."""
    end: np.ndarray | None = None

    def same(self, at: np.ndarray, other: Symbols, there: np.ndarray, size: int) -> np.ndarray:
        """Return [k] whether each window here is the one there, character by character."""
        alike = np.ones(len(at), dtype=bool)
        for n in range(size):
            if self.begin is None or self.end is None or other.begin is None or other.end is None:
                alike &= self.letters[at + n] == other.letters[there + n]
                continue
            here, over = self.begin[at + n], other.begin[there + n]
            length = self.end[at + n] - here
            alike &= length == other.end[there + n] - over
            for c in range(int(length.max(initial=0))):
                rows = np.flatnonzero(alike & (c < length))
                alike[rows] = self.letters[here[rows] + c] == other.letters[over[rows] + c]
        return alike


def letters_of(text: str) -> Symbols:
    """Return a text's letters and digits, of any script, as they are; everything else is dropped (GPT-4 report,
    appendix C)."""
    points = _points(text)
    kept = points[_tables()[0][points]]
    return Symbols(kept.astype(np.uint64), kept)


def words_of(text: str) -> Symbols:
    """Return a text's words, in small letters: what stands between characters that are neither letter nor digit."""
    points = _points(text)
    known, small = _tables()
    inside = np.concatenate([[False], known[points], [False]])
    edges = np.flatnonzero(inside[1:] != inside[:-1])
    begin, end = edges[::2], edges[1::2]
    letters = small[points]
    sums = prefix_sums(letters.astype(np.uint64))
    return Symbols((sums[end] - sums[begin]) * _powers(len(sums))[1][begin], letters, begin, end)


def join(texts: Sequence[str]) -> str:
    """Join texts so that no window and no word lies in two of them."""
    return f" {END} ".join(text.replace(END, " ") for text in texts)


def prefix_sums(values: np.ndarray) -> np.ndarray:
    """Return P [n + 1] of the module's equation."""
    sums = np.zeros(len(values) + 1, dtype=np.uint64)
    np.cumsum(values * _powers(len(values))[0][: len(values)], out=sums[1:])
    return sums


def window_hashes(sums: np.ndarray, size: int) -> np.ndarray:
    """Return the hash of every window of `size` symbols from their prefix sums [n + 1]: [n - size + 1]."""
    count = max(0, len(sums) - size)
    return (sums[size:] - sums[:count]) * _powers(len(sums))[1][:count] * MIX


class Sought:
    """All windows of one size of some texts, and which of them have been found."""

    def __init__(self, symbols: Symbols, owner: np.ndarray, size: int, group: np.ndarray, most: np.ndarray) -> None:
        """symbols: the texts one after another, with an END between. owner [n]: the number of each symbol's text, -1 at
        an END. group [texts]: the number of each text's group. A window that more than `most` [groups] texts of a group
        have is boilerplate there, and not sought for them."""
        self.symbols, self.size = symbols, size
        hashes = window_hashes(prefix_sums(symbols.values), size)
        starts = np.flatnonzero((owner[: len(hashes)] == owner[size - 1 :]) & (owner[: len(hashes)] >= 0))
        self.hashes, first, self.number = np.unique(hashes[starts], return_index=True, return_inverse=True)
        self.first = starts[first]
        """[U] where each different window stands first."""
        self.starts = starts
        """[W] where every window begins; `number` [W] says which of the U different ones it is."""
        self.owner = owner[starts]
        count = int(self.owner.max(initial=0)) + 1
        of_group = self.number.astype(np.int64) * len(most) + group[self.owner]
        having, texts = np.unique(np.unique(of_group * count + self.owner) // count, return_counts=True)
        self.boilerplate = np.isin(of_group, having[texts > most[having % len(most)]])
        """[W] whether many texts of a window's own group have it."""
        self.place = np.full(len(self.hashes), -2)
        self.place[self.number[~self.boilerplate]] = -1
        """[U] where a window was found first, as an index of `places`; -1: nowhere, -2: not sought."""
        self.places: list[str] = []
        self.bits = int(min(27, max(16, np.ceil(np.log2(16 * max(1, len(self.hashes)))))))
        self.table = np.zeros(2**self.bits, dtype=bool)
        self.table[self._upper(self.hashes[self.place == -1])] = True

    def place_of(self, rows: np.ndarray) -> np.ndarray:
        """Return [k] where these windows were found first, as in `place`; -2 also for a group's own boilerplate."""
        return np.where(self.boilerplate[rows], -2, self.place[self.number[rows]])

    def _upper(self, hashes: np.ndarray) -> np.ndarray:
        return (hashes >> np.uint64(64 - self.bits)).astype(np.intp)

    def look(self, stream: Symbols, sums: np.ndarray, text_of: np.ndarray, wheres: Sequence[str]) -> None:
        """Look a part of the stream up; `text_of` [n] says in which of the texts `wheres` each symbol stands."""
        hashes = window_hashes(sums, self.size)
        likely = np.flatnonzero(self.table[self._upper(hashes)])
        if not len(likely) or not len(self.hashes):
            return
        number = np.minimum(np.searchsorted(self.hashes, hashes[likely]), len(self.hashes) - 1)
        right = (self.hashes[number] == hashes[likely]) & (self.place[number] == -1)
        number, at = number[right], likely[right]
        same = self.symbols.same(self.first[number], stream, at, self.size)
        number, first = np.unique(number[same], return_index=True)
        texts, which = np.unique(text_of[at[same][first]], return_inverse=True)
        self.place[number] = len(self.places) + which
        self.places += [wheres[text] for text in texts.tolist()]


def chunks(texts: Iterable[tuple[str, str]]) -> Iterator[tuple[list[str], str]]:
    """Join a stream of (where, text) into parts of about `CHUNK` characters, each with the places of its texts.

    A text longer than that is cut into pieces that overlap."""
    pieces: list[str] = []
    wheres: list[str] = []
    room = CHUNK
    for where, text in texts:
        for start in range(0, max(1, len(text) - OVERLAP), CHUNK - OVERLAP):
            piece = text[start : start + CHUNK]
            if pieces and len(piece) > room:
                yield wheres, join(pieces)
                pieces, wheres, room = [], [], CHUNK
            pieces.append(piece)
            wheres.append(where)
            room -= len(piece) + 3
    if pieces:
        yield wheres, join(pieces)


def owners(symbols: Symbols, numbers: np.ndarray) -> np.ndarray:
    """Return [n] the number of the text in which each symbol stands (one number per joined text), and -1 at an END."""
    is_end = symbols.values == 0
    return np.where(is_end, -1, numbers[np.cumsum(is_end) - is_end])


def _points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """Return, for every code point, whether it is kept (letters, digits and END), and its small letter."""
    points = [chr(n) for n in range(LAST)]
    kept = np.zeros(0x110000, dtype=bool)
    kept[:LAST] = [c.isalnum() for c in points]
    kept[0] = True
    small = np.arange(len(kept), dtype=np.uint32)
    for n in np.flatnonzero(kept).tolist():
        lower = points[n].lower()
        if len(lower) == 1:
            small[n] = ord(lower)
    return kept, small


_POWERS: list[np.ndarray] = [np.ones(1, dtype=np.uint64), np.ones(1, dtype=np.uint64)]


def _powers(count: int) -> list[np.ndarray]:
    """Return the powers of BASE and of its inverse, `count` of them or more."""
    if len(_POWERS[0]) < count:
        for n, base in enumerate((BASE, INVERSE)):
            factors = np.full(2 * count, base, dtype=np.uint64)
            factors[0] = 1
            _POWERS[n] = np.cumprod(factors)
    return _POWERS
