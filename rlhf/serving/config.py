"""The settings of a policy's server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf.errors import InputError
from rlhf.run.http import HttpConfig
from rlhf.run.settings import require_needed


@dataclass(frozen=True, kw_only=True)
class ServingConfig(HttpConfig):
    """Limits of a policy's server, and what it keeps."""

    max_queue: int = 256
    """Requests in the server at a time (arriving, waiting or being answered); a further one gets status 429."""
    max_rows: int = 64
    """Answers that one policy writes at a time; more wait."""
    max_cache_tokens: int = 65536
    """Tokens in one policy's key-value cache, padding included: a memory setting. A prompt and its answer must fit."""
    max_answer_tokens: int = 1024
    """The most tokens of an answer, and how many a chat answer may have where the request names no number."""
    store: str | None = None
    """The collection store (a file, made where it is not there) for feedback, and for conversations with `log`."""
    log: bool = False
    """Keep every conversation in the store, scrubbed, under a pseudonym, for `retention_days`. Without it, only
    conversations whose sender agrees are kept, with their feedback."""
    retention_days: float = 30.0
    """Days until a kept conversation expires, and its feedback with it."""
    scrub: str | None = None
    """A function of your own (file.py:name, text -> text) that removes personal data from what is kept; default: mail
    addresses, phone, card and account numbers, and addresses of machines."""
    compare_share: float = 0.0
    """Share of the chat page's turns that show two answers, of two policies where several are served, and ask which is
    better."""
    system_prompt: str | None = None
    """The chat page's system message; requests of other clients bring their own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_queue", "max_rows", "max_cache_tokens", "max_answer_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)} must be at least 1")
        if not 0 <= self.compare_share <= 1:
            raise InputError(f"compare_share={self.compare_share} must be a share from 0 to 1")
        if not 0 < self.retention_days < math.inf:
            raise InputError(f"retention_days={self.retention_days} must be above 0, and finite")
        if self.log and self.store is None:
            raise InputError("log: name the --store in which conversations are kept")
        require_needed(self, "store", "retention_days", "scrub")
