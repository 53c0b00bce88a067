"""What answers are made of, and how they are written as OpenAI's JSON: whole, or chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scored:
    """A token and its log-probability in nats, before temperature and top_p. None: it has nothing before it."""

    text: str
    logprob: float | None
    top: tuple[tuple[str, float], ...] = ()
    """The likeliest tokens in its place, the likeliest first."""


@dataclass(frozen=True)
class Piece:
    """A part of one choice, in the order of writing; the last one has `finish`."""

    index: int
    text: str
    tokens: tuple[Scored, ...] = ()
    finish: str | None = None
    """stop: at an end of turn or a stop text; length: at max_tokens."""
    count: int = 0
    """Tokens written by now, the one that ended it included."""


@dataclass(frozen=True)
class About:
    """What all parts of an answer repeat."""

    id: str
    created: int
    model: str
    fingerprint: str
    """Of the policy's weights."""
    seed: int
    """The first choice's, also where the request named none: with it the answer can be drawn again."""


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Join the pieces of each choice; in the choices' order."""
    by_index: dict[int, list[Piece]] = {}
    for piece in pieces:
        by_index.setdefault(piece.index, []).append(piece)
    return [
        Piece(
            index,
            "".join(part.text for part in parts),
            tuple(token for part in parts for token in part.tokens),
            parts[-1].finish,
            parts[-1].count,
        )
        for index, parts in sorted(by_index.items())
    ]


def usage(prompt_tokens: int, pieces: Sequence[Piece]) -> dict[str, int]:
    """Count the tokens of an answer's choices."""
    written = sum(piece.count for piece in pieces)
    return {"prompt_tokens": prompt_tokens, "completion_tokens": written, "total_tokens": prompt_tokens + written}


def chat_answer(about: About, pieces: Sequence[Piece], logprobs: bool, counts: dict[str, int]) -> dict[str, Any]:
    """Write a whole chat answer."""
    choices = [
        {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": _chat_logprobs(piece) if logprobs else None,
            "finish_reason": piece.finish,
        }
        for piece in pieces
    ]
    return _head(about, "chat.completion") | {"choices": choices, "usage": counts}


def chat_chunk(about: About, piece: Piece, logprobs: bool, first: bool) -> dict[str, Any]:
    """Write one chunk of a streamed chat answer; first: of its choice."""
    delta = ({"role": "assistant"} if first else {}) | ({"content": piece.text} if piece.text or first else {})
    choice = {
        "index": piece.index,
        "delta": delta,
        "logprobs": _chat_logprobs(piece) if logprobs and piece.tokens else None,
        "finish_reason": piece.finish,
    }
    return _head(about, "chat.completion.chunk") | {"choices": [choice]}


def text_answer(about: About, pieces: Sequence[Piece], logprobs: bool, counts: dict[str, int]) -> dict[str, Any]:
    """Write a whole answer of /v1/completions."""
    choices = [_text_choice(piece, logprobs, 0) for piece in pieces]
    return _head(about, "text_completion") | {"choices": choices, "usage": counts}


def text_chunk(about: About, piece: Piece, logprobs: bool, offset: int) -> dict[str, Any]:
    """Write one chunk of a streamed answer of /v1/completions, which begins at this character of its choice."""
    return _head(about, "text_completion") | {"choices": [_text_choice(piece, logprobs, offset)]}


def usage_chunk(about: About, kind: str, counts: dict[str, int]) -> dict[str, Any]:
    """Write the chunk that ends a stream with its counts of tokens."""
    return _head(about, kind) | {"choices": [], "usage": counts}


def _head(about: About, kind: str) -> dict[str, Any]:
    return {
        "id": about.id,
        "object": kind,
        "created": about.created,
        "model": about.model,
        "system_fingerprint": about.fingerprint,
        "seed": about.seed,
    }


def _chat_logprobs(piece: Piece) -> dict[str, Any]:
    def row(text: str, logprob: float | None) -> dict[str, Any]:
        whole = None if "\ufffd" in text else list(text.encode())  # a part of a character has no text of its own
        return {"token": text, "logprob": logprob, "bytes": whole}

    rows = [
        row(token.text, token.logprob) | {"top_logprobs": [row(*likely) for likely in token.top]}
        for token in piece.tokens
    ]
    return {"content": rows, "refusal": None}


def _text_choice(piece: Piece, logprobs: bool, offset: int) -> dict[str, Any]:
    found = None
    if logprobs:
        offsets = []
        for token in piece.tokens:
            offsets.append(offset)
            offset += len(token.text)
        tops = [  # of two tokens with the same text the likelier one is told
            None if token.logprob is None else {token.text: token.logprob} | dict(reversed(token.top))
            for token in piece.tokens
        ]
        found = {
            "tokens": [token.text for token in piece.tokens],
            "token_logprobs": [token.logprob for token in piece.tokens],
            "top_logprobs": tops,
            "text_offset": offsets,
        }
    return {"index": piece.index, "text": piece.text, "logprobs": found, "finish_reason": piece.finish}
