"""How many of the attacks that succeeded are different, and how new an attack is.

Two attacks are one where their similarity (Jaccard, of character 5-grams: `rlhf.rows.duplicates`) reaches a stated
limit: at 0.5, about one word in six is another. A count of successes without such a limit counts one success many
times.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf.rows.duplicates import NearDuplicates, grams_of, normalised
from rlhf.rows.jsonl import read_rows
from rlhf.rows.records import write_jsonl

SIMILARITY = 0.5
"""From which similarity on two attacks count as one, where nothing else is said."""


def distinct(texts: Sequence[str], similarity: float = SIMILARITY) -> list[int]:
    """Return the indices of texts that are different: in their order, each that is less similar than `similarity` to
    all that were kept before it. Counts are comparable between attackers with as many attempts."""
    kept, found = NearDuplicates(), []
    for number, text in enumerate(texts):
        if kept.nearest(text).similarity < similarity:
            kept.add(text)
            found.append(number)
    return found


class Bank:
    """The attacks that have succeeded so far, in a file that grows by a step at a time.

    Each step's additions can be taken back: a run that was killed in a step, and does it again, finds the bank as it
    was before."""

    def __init__(self, path: str | Path, first: Sequence[str] = ()) -> None:
        """first: attacks that are known before step 0."""
        self.path, self.first = Path(path), tuple(first)
        self.steps: list[tuple[int, str]] = []
        if self.path.is_file():
            self.steps = [(int(row["step"]), str(row["attack"])) for _, row in read_rows(self.path)]
        self._index()

    def __len__(self) -> int:
        return len(self._known.texts)

    def _index(self) -> None:
        self._known, self._seen = NearDuplicates(), set[str]()
        for text in (*self.first, *(text for _, text in self.steps)):
            self._put(text)

    def _put(self, text: str) -> bool:
        if normalised(text) in self._seen:
            return False
        self._seen.add(normalised(text))
        self._known.add(text)
        return True

    def rewind(self, step: int) -> None:
        """Forget what this step and later ones have added."""
        if any(at >= step for at, _ in self.steps):
            self.steps = [(at, text) for at, text in self.steps if at < step]
            self._index()

    def novelty(self, texts: Sequence[str], hits: Sequence[bool]) -> list[float]:
        """Return 1 minus each text's similarity to the nearest other success: those in the bank, and those of the same
        batch (`hits`). 1 where nothing is like it, 0 for what is known already, or stands in the batch twice."""
        grams = [grams_of(text) for text in texts]
        found = []
        for number, text in enumerate(texts):
            near = self._known.nearest(text).similarity
            for other, hit in enumerate(hits):
                if hit and other != number:
                    both = len(grams[number] & grams[other])
                    near = max(near, both / (len(grams[number]) + len(grams[other]) - both))
            found.append(1.0 - near)
        return found

    def add(self, step: int, texts: Sequence[str]) -> None:
        """Add a step's successes, those that are not there yet, and write the file."""
        self.steps += [(step, text) for text in texts if self._put(text)]
        write_jsonl(self.path, ({"step": at, "attack": text} for at, text in self.steps))
