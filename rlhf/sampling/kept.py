"""Responses kept on disk, to which more can be added.

Response k of a prompt has a random seed of its own, which follows from the run's seed, the prompt's tokens and k. So 48
responses added to 16 are those that 64 drawn at once would have had, in whatever order and company the prompts come (up
to rounding: the rows beside a response may move its logits in their last bits).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from rlhf.errors import InputError
from rlhf.rows.jsonl import lines_of, read_rows, to_line
from rlhf.sampling.engine import Engine, RowGenerator


@dataclass(frozen=True)
class KeptResponse:
    """One response: the prompt's key, its number among that prompt's responses, and what was written."""

    key: str
    k: int
    seed: int
    ids: list[int]
    stopped: bool
    text: str


def key_of(prompt_ids: Sequence[int]) -> str:
    """Return a hash of a prompt's tokens."""
    return hashlib.sha256(" ".join(map(str, prompt_ids)).encode()).hexdigest()[:24]


def seed_of(seed: int, key: str, k: int) -> int:
    """Return the seed of response k to a prompt: 62 bits of a hash."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{key}:{k}".encode()).digest()[:8], "big") >> 2


class KeptSamples:
    """The responses in a JSONL file; what `draw` adds is on disk after every batch."""

    def __init__(self, file: str | Path, seed: int):
        self.file, self.seed = Path(file), seed
        self.rows: dict[tuple[str, int], KeptResponse] = {}
        if not self.file.is_file():
            return
        whole = sum(len(line) for line in lines_of(self.file) if line.endswith(b"\n"))
        if whole < self.file.stat().st_size:  # a killed run has cut the last line, behind which nothing can be added
            os.truncate(self.file, whole)
        for number, row in read_rows(self.file):
            try:
                kept = KeptResponse(**row)
            except TypeError as error:
                raise InputError(f"{self.file}:{number}: is no kept response ({error}); delete the file") from None
            self.rows[kept.key, kept.k] = kept

    def missing(self, prompt_ids: Sequence[Sequence[int]], n: int) -> list[tuple[int, int]]:
        """Return (index of the prompt, k) of every response that is still to be drawn."""
        keys = [key_of(ids) for ids in prompt_ids]
        return [(i, k) for i, key in enumerate(keys) for k in range(n) if (key, k) not in self.rows]

    def draw(
        self,
        engine: Engine,
        prompt_ids: Sequence[list[int]],
        n: int,
        decode: Callable[[list[int]], str],
        *,
        max_new_tokens: int,
        temperature: float,
        rows_at_once: int,
        device: torch.device | str,
        done: Callable[[int], None] = lambda rows: None,
    ) -> None:
        """Draw what is missing of `n` responses to every prompt. decode: turns a response's ids into its text. done: is
        told how many are drawn after every batch."""
        missing = self.missing(prompt_ids, n)
        for start in range(0, len(missing), rows_at_once):
            part = missing[start : start + rows_at_once]
            keys = [key_of(prompt_ids[i]) for i, _ in part]
            seeds = [seed_of(self.seed, key, k) for key, (_, k) in zip(keys, part, strict=True)]
            generator = RowGenerator.of(seeds, seeds[0], device)
            drawn = engine.generate([prompt_ids[i] for i, _ in part], max_new_tokens, temperature, generator)
            new = [
                KeptResponse(key, k, seed, ids, bool(stopped), decode(ids))
                for key, (_, k), seed, ids, stopped in zip(keys, part, seeds, drawn.ids, drawn.stopped, strict=True)
            ]
            with self.file.open("ab") as file:
                file.writelines(to_line(asdict(kept)) for kept in new)
                file.flush()
                os.fsync(file.fileno())
            self.rows |= {(kept.key, kept.k): kept for kept in new}
            done(start + len(part))

    def of(self, prompt_ids: Sequence[Sequence[int]], n: int) -> list[KeptResponse]:
        """Return the first `n` responses to every prompt, those of a prompt next to each other."""
        return [self.rows[key_of(ids), k] for ids in prompt_ids for k in range(n)]
