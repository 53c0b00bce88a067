"""Ask a model what its file of answers does not hold yet, a batch at a time, and keep each batch at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rlhf.errors import InputError
from rlhf.evals.cache import Answers, key_of
from rlhf.evals.modelgraded import INVALID
from rlhf.evals.targets import SEEDS, Answer, Prompt, Target
from rlhf.rows.messages import Messages
from rlhf.run.fingerprint import canonical


@dataclass(frozen=True)
class Sampler:
    """How answers are sampled: from the full softmax at a temperature, 0 for the most likely answer."""

    max_new_tokens: int
    temperature: float


def seed_of(seed: int, messages: Messages, sample: int) -> int:
    """Return the seed of one of a prompt's answers. It depends on no other prompt, and two policies share it."""
    digest = hashlib.sha256(canonical([seed, messages, sample])).digest()
    return int.from_bytes(digest[:8], "big") % SEEDS


class Asker:
    """A model and its file of answers. `asked` counts the calls that the model answered, `known` those in the file."""

    def __init__(
        self, target: Target, answers: Answers, rows: int, progress: Callable[[int], None] | None = None
    ) -> None:
        self.target, self.answers, self.rows = target, answers, rows
        self.progress = progress or (lambda done: None)
        self.asked, self.known = 0, 0

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampler: Sampler) -> list[Answer]:
        """Return an answer to each prompt by its seed. At temperature 0 the seed decides nothing."""
        self.target.check(prompts, sampler.max_new_tokens)
        greedy = sampler.temperature == 0
        keys = [
            self._key("sample", prompt.content, **asdict(sampler), seed=None if greedy else seed)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        wanted = dict(zip(keys, zip(prompts, seeds, strict=True), strict=True))
        order = sorted(wanted, key=lambda key: len(wanted[key][0].ids))  # of like lengths in a batch

        def ask(batch: Sequence[str]) -> list[Answer]:
            ours = [wanted[key] for key in batch]
            return self.target.sample(
                [prompt for prompt, _ in ours], [seed for _, seed in ours], sampler.max_new_tokens, sampler.temperature
            )

        found = self._all(order, lambda batch: [asdict(answer) for answer in ask(batch)])
        return [Answer(**found[key]) for key in keys]

    def logprobs(self, prompts: Sequence[Prompt], choices: Sequence[Sequence[str]]) -> list[list[float]]:
        """Return the log-probability in nats of each of a prompt's choices as the whole answer."""
        keys = [
            self._key("logprobs", prompt.content, choices=list(texts))
            for prompt, texts in zip(prompts, choices, strict=True)
        ]
        wanted = dict(zip(keys, zip(prompts, choices, strict=True), strict=True))
        found = self._all(list(wanted), lambda batch: [self.target.logprobs(*wanted[key]) for key in batch])
        return [found[key] for key in keys]

    def choose(self, questions: Sequence[Messages], choices: Sequence[str]) -> list[dict[str, Any]]:
        """Return, for each question, the choice that is likeliest as its answer, and how likely it is.

        INVALID where the model would hardly have named any of them."""
        from rlhf.evals.asks import LITTLE, NoAnswer

        keys = [self._key("choice", question, choices=list(choices)) for question in questions]
        wanted, ask = dict(zip(keys, questions, strict=True)), self.target.asks()

        def answered(batch: Sequence[str]) -> list[dict[str, Any]]:
            found = []
            for answer in ask([wanted[key] for key in batch], choices):
                if isinstance(answer, NoAnswer):
                    found.append({"choice": INVALID, "reply": str(answer)})
                    continue
                if isinstance(answer, Exception):
                    raise answer
                named = choices[answer.best] if answer.together >= LITTLE else INVALID
                share = answer.probabilities[answer.best]
                reply = f"{choices[answer.best]} ({share:.0%}; all choices together {answer.together:.0%})"
                found.append({"choice": named, "reply": reply if answer.text is None else answer.text})
            return found

        known = self._all(list(wanted), answered)
        return [known[key] for key in keys]

    def _key(self, what: str, prompt: object, **decides: Any) -> str:
        return key_of(target=self.target.fingerprint, what=what, prompt=prompt, **decides)

    def _all(self, keys: Sequence[str], ask: Callable[[Sequence[str]], Sequence[Any]]) -> Mapping[str, Any]:
        """Return the answers of all keys: those in the file, and those of `ask`, kept batch by batch."""
        found = self.answers.known(keys)
        self.known += len(found)
        self.progress(len(found))
        missing = [key for key in keys if key not in found]
        for start in range(0, len(missing), self.rows):
            batch = missing[start : start + self.rows]
            new = ask(batch)
            if len(new) != len(batch):
                raise InputError(f"{self.target.name}: {len(new)} answers to {len(batch)} questions")
            fresh = dict(zip(batch, new, strict=True))
            self.answers.keep(fresh)
            self.asked += len(batch)
            self.progress(len(batch))
            found |= fresh
        return found
