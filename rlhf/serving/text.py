"""Text out of tokens while they are written: whole characters only, and nothing of a stop text.

All pieces together are the text that decoding the tokens at once gives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

HALF = "\ufffd"
"""What a decoder writes for a part of a character."""


class Decoding:
    """Tokens that come one by one, as text.

    anchor: the tokens before them: what a token looks like may depend on its left neighbour (a SentencePiece decoder
    drops a text's first space). before, after: white space that the template writes around an answer, which is no part
    of it; `after` is taken off only where the answer ended its turn.
    """

    def __init__(self, decode: Decode, anchor: Sequence[int] = (), before: str = "", after: str = "") -> None:
        self._decode, self._before, self._after = decode, before, after
        self._ids = list(anchor)
        self._start, self._read = 0, len(self._ids)
        self._held = ""  # may be of `before` or `after`

    def note(self, token: int) -> None:
        """Take a token whose text is not asked for yet."""
        self._ids.append(token)

    def add(self, token: int) -> str:
        """Return the text that a token completes; often nothing."""
        self._ids.append(token)
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        if whole.endswith(HALF) and not known.endswith(HALF):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._trimmed(whole[len(known) :])

    def end(self, stopped: bool) -> str:
        """Return the rest; stopped: a stop token, which is not among the tokens, has ended it."""
        known, whole = self._decode(self._ids[self._start : self._read]), self._decode(self._ids[self._start :])
        self._start = self._read = len(self._ids)
        text = self._trimmed(whole[len(known) :])
        rest, self._held = self._held, ""
        if self._before:  # the whole answer is a part of it
            rest = rest.removeprefix(self._before)
        return text + (rest.removesuffix(self._after) if stopped else rest)

    def _trimmed(self, piece: str) -> str:
        text = self._held + piece
        if self._before:
            if self._before.startswith(text):
                self._held = text
                return ""
            text, self._before = text.removeprefix(self._before), ""
        kept = overlap(text, self._after)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


class Stops:
    """Text that ends at the first of several stop texts."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._held = tuple(stops), ""

    def add(self, piece: str) -> tuple[str, bool]:
        """Return the text that is certain by now, and whether a stop text has ended it."""
        text = self._held + piece
        ends = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if ends:
            self._held = ""
            return text[: min(ends)], True
        kept = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept], False

    def end(self) -> str:
        """Return what was held back, since a stop text might have begun there."""
        rest, self._held = self._held, ""
        return rest


def overlap(text: str, beginning: str) -> int:
    """Return the length of the longest end of `text` that `beginning` starts with, short of a whole one where `text`
    goes no further."""
    for size in range(min(len(text), len(beginning)), 0, -1):
        if text.endswith(beginning[:size]):
            return size
    return 0


class Writing:
    """One answer's text while its tokens come.

    at_once: nobody reads a part of it and no text ends it, so it is decoded at its end alone.
    """

    def __init__(self, decoding: Decoding, stops: Sequence[str], at_once: bool) -> None:
        self._decoding, self._stops, self._at_once = decoding, Stops(stops), at_once and not stops

    def add(self, token: int) -> tuple[str, bool]:
        """Return the text that is certain with this token, and whether a stop text has ended the answer."""
        if self._at_once:
            self._decoding.note(token)
            return "", False
        return self._stops.add(self._decoding.add(token))

    def end(self, stopped: bool) -> tuple[str, bool]:
        """Return the rest, and whether a stop text was in it; stopped: a stop token has ended the answer."""
        text, cut = self._stops.add(self._decoding.end(stopped))
        return (text, True) if cut else (text + self._stops.end(), False)
