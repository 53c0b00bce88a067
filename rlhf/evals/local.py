"""Next-token probabilities of a few choices under a model in this process."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from rlhf import chat
from rlhf.errors import InputError, short
from rlhf.evals.answers import Answered, Spent, answered
from rlhf.rows.messages import Messages

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Question = str | Messages
"""What is asked: a user's message, or a whole conversation for the model to answer."""
Tokens = tuple[int, ...]


class LocalModel:
    """Reads answers from a causal model's next-token probabilities after the generation prompt.

    The probability of a choice is that of all its tokens, in the ways of writing it that `choice_tokens` lists. Tokens
    that every finished answer begins with (an empty thinking block, SentencePiece's space) are given to the model.
    Where a family reads padding as text (RWKV), only rows of one length share a batch.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, tokens_per_microbatch: int = 16384
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.tokens_per_microbatch = tokens_per_microbatch
        self.spent = Spent()
        self._pads: bool | None = None  # whether rows of unlike length may share a batch; not asked yet

    def __call__(self, questions: Sequence[Question], choices: Sequence[str]) -> list[Answered | Exception]:
        started = time.perf_counter()
        before, ways = choice_tokens(self.tokenizer, choices)
        asked = [self._asked(question, choices[0], len(before)) for question in questions]
        heads = {way[:end] for way in ways for end in range(len(way))}
        longest = [head for head in heads if not any(other[: len(head)] == head and other != head for other in heads)]
        self._check_length(max(map(len, asked), default=0) + max(map(len, longest)))
        logprobs: dict[tuple[int, Tokens], float] = {}
        for head in sorted(longest):  # a head's rows give the probabilities after all of its beginnings, too
            self._read(asked, head, ways, logprobs)
        tokens = sum(len(ids) + len(head) for ids in asked for head in longest)
        self.spent.add(len(questions), tokens, time.perf_counter() - started)
        return [answered(_shares(ways, len(choices), row, logprobs)) for row in range(len(asked))]

    def _read(
        self,
        asked: Sequence[list[int]],
        head: Tokens,
        ways: Mapping[Tokens, int],
        found: dict[tuple[int, Tokens], float],
    ) -> None:
        """Note, for each row and every way of answering that begins with a beginning of `head`, the log-probability of
        the way's last token there."""
        import torch

        from rlhf.padding import pad, position_ids
        from rlhf.sampling.decode import decoding_fault

        device, pad_id = next(self.model.parameters()).device, chat.pad_id(self.tokenizer)
        wanted = {end: sorted({w[end] for w in _prefixes(ways) if w[:end] == head[:end] and len(w) == end + 1})
                  for end in range(len(head) + 1)}  # fmt: skip
        if self._pads is None:
            self._pads = decoding_fault(cast("PreTrainedModel", self.model), pad_id) is None
        lengths = [len(ids) + len(head) for ids in asked]
        for rows in batches(lengths, self.tokens_per_microbatch, self._pads):
            input_ids, mask = pad([[*asked[row], *head] for row in rows], pad_id, device, side="left")
            with torch.no_grad():
                logits = self.model(
                    input_ids=input_ids, attention_mask=mask.long(), position_ids=position_ids(mask), use_cache=False,
                    logits_to_keep=len(head) + 1,
                ).logits  # fmt: skip
            for end, tokens in wanted.items():
                logprobs = logits[:, end].float().log_softmax(-1)[:, tokens].tolist()
                for row, values in zip(rows, logprobs, strict=True):
                    found.update({(row, (*head[:end], token)): v for token, v in zip(tokens, values, strict=True)})

    def _asked(self, question: Question, choice: str, before: int) -> list[int]:
        """Encode a question and what a finished answer has before its choice: `before` tokens."""
        turns = [{"role": "user", "content": question}] if isinstance(question, str) else list(question)
        encoded = chat.encode(self.tokenizer, [*turns, {"role": "assistant", "content": choice}], len(turns))
        return encoded.ids[: encoded.answer_from + before]

    def _check_length(self, tokens: int) -> None:
        limit = getattr(self.model.config, "max_position_embeddings", None)
        if limit is not None and tokens > limit:
            raise InputError(
                f"a question to the judge or grader has {tokens} tokens, and its model reads {limit}; take another "
                "model, or shorten what it is asked: prompts, answers (max_new_tokens), a rubric, a policy"
            )


def choice_tokens(tokenizer: PreTrainedTokenizerBase, choices: Sequence[str]) -> tuple[list[int], dict[Tokens, int]]:
    """Return the tokens that every finished answer begins with, and each way of going on -> the choice's index.

    A way is the choice as the chat template writes it, and, where nothing comes before it, as the tokenizer writes it
    alone and behind a space; these only where they need no forward pass of their own. Raises InputError where two
    choices are the same tokens.
    """
    rows = [tuple(chat.encode_response(tokenizer, choice)[:-1]) for choice in choices]
    if not rows or not all(rows):
        raise InputError(f"choices: got {short(repr(list(choices)))}; write one or more, none of them empty")
    shared = 0
    while len(rows) > 1 and len({row[shared : shared + 1] for row in rows}) == 1 and len(rows[0]) > shared:
        shared += 1
    shared = min(shared, *(len(row) - 1 for row in rows))
    ways: dict[Tokens, int] = {}
    for index, row in enumerate(rows):
        if ways.setdefault(row[shared:], index) != index:
            raise InputError(
                f"the grader's tokenizer writes {choices[ways[row[shared:]]]!r} and {choices[index]!r} alike"
            )
    heads = {way[:end] for way in ways for end in range(len(way))}
    for index, choice in enumerate(choices) if not shared else ():
        for text in (choice, f" {choice}"):
            way = tuple(tokenizer.encode(text, add_special_tokens=False))
            if way and way[:-1] in heads:
                ways.setdefault(way, index)
    return list(rows[0][:shared]), ways


def letter_tokens(tokenizer: PreTrainedTokenizerBase, letters: Sequence[str]) -> tuple[list[int], list[int]]:
    """Return the tokens that every letter's answer begins with (say SentencePiece's space), and each letter's own first
    token. Raises InputError where two letters begin with the same token."""
    before, ways = choice_tokens(tokenizer, letters)
    first: dict[int, int] = {}
    for way, index in ways.items():
        first.setdefault(index, way[0])
    tokens = [first[index] for index in range(len(letters))]
    if len(set(tokens)) < len(tokens):
        raise InputError(f"the grader's tokenizer gives two of the letters {', '.join(letters)} the same first token")
    return before, tokens


def batches(lengths: Sequence[int], tokens_per_microbatch: int, pads: bool = True) -> list[list[int]]:
    """Return indices in batches of at most that many padded tokens, longest first; a longer row is one by itself.
    pads: rows of unlike length may share a batch."""
    found: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        longest = lengths[found[-1][0]] if found else 0
        alike = pads or longest == lengths[index]
        if found and alike and (len(found[-1]) + 1) * longest <= tokens_per_microbatch:
            found[-1].append(index)
        else:
            found.append([index])
    return found


def _prefixes(ways: Mapping[Tokens, int]) -> set[Tokens]:
    return {way[: end + 1] for way in ways for end in range(len(way))}


def _shares(
    ways: Mapping[Tokens, int], count: int, row: int, logprobs: Mapping[tuple[int, Tokens], float]
) -> list[float]:
    """Sum the probabilities of each choice's ways. One that goes on as another ("1" as "10") loses the other's."""
    shares = [0.0] * count
    for way, index in ways.items():
        share = math.exp(sum(logprobs[row, way[: end + 1]] for end in range(len(way))))
        shares[index] += share
        inside = next((ways[way[:end]] for end in range(len(way) - 1, 0, -1) if way[:end] in ways), None)
        if inside is not None:
            shares[inside] -= share
    return [max(0.0, share) for share in shares]
