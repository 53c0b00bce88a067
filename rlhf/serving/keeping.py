"""What a server keeps of conversations: nothing without consent or `--log`, and everything scrubbed and for a time.

A row's `consent` is true only where its sender agreed beside the button: logged conversations are for reading, and
never enter training.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from rlhf.collection.personal import drawn_salt, pseudonym
from rlhf.collection.store import Conversation, Feedback, Store
from rlhf.errors import InputError, RunStopped
from rlhf.run.http import Refused
from rlhf.serving.config import ServingConfig
from rlhf.serving.feedback import Given
from rlhf.serving.scrub import Scrub, scrub, scrubbed
from rlhf.serving.wire import Chat, Completion, Sampling, Wrong

log = logging.getLogger("rlhf")

DAY = 24 * 3600.0
ANONYMOUS = "anonymous"
"""Whom logged requests without a user belong to."""


class Keeper:
    """The door to a server's store. models: the policies' names and fingerprints."""

    def __init__(self, config: ServingConfig, models: Mapping[str, str], rule: Scrub = scrub) -> None:
        if config.store is None:
            raise InputError("store: name the file in which feedback is kept")
        self.store, self.config, self.models, self.rule = Store(config.store), config, models, rule
        with self.store.writing() as db:
            self._salt = drawn_salt(db)
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="keeping")

    def close(self) -> None:
        """Write what is still to be written, and close the store."""
        self._writer.shutdown()
        self.store.close()

    def pseudonym(self, user: str | None) -> str:
        """Return the name under which what a client calls `user` is kept, and can be erased."""
        return ANONYMOUS if user is None else pseudonym(user, self._salt)

    async def expire(self) -> None:
        """Erase what has expired, now and every hour, until cancelled."""
        while True:
            try:
                await self._write(self.store.expire)
            except Exception as error:  # whatever it is: retention must not end with it
                log.error("expired conversations could not be erased: %s: %s", type(error).__name__, error)
            await asyncio.sleep(3600)

    async def logged(
        self, request: Chat | Completion, answer_id: str, seed: int, model: str, texts: list[str], cut: bool = False
    ) -> None:
        """Keep a request with its answers, where `log` says so. cut: they were given up before their end."""
        if not self.config.log:
            return
        if isinstance(request, Chat):
            kept = [(answer_id, request.messages, texts)]
        else:
            n = request.sampling.n
            prompts = [str(p) if isinstance(p, str) else f"{len(p)} token ids" for p in request.prompts]
            kept = [
                (f"{answer_id}-{place}", [{"role": "user", "content": prompt}], texts[place * n : (place + 1) * n])
                for place, prompt in enumerate(prompts)
            ]
        for name, messages, answers in kept:
            answers = answers or [""]  # of several prompts, one whose answer had not begun
            columns = {"other_answers": self._clean(answers[1:])} if answers[1:] else {}
            conversation = Conversation(
                id=name, messages=self._clean([*messages, {"role": "assistant", "content": answers[0]}]),
                person=self.pseudonym(request.user), source="log", scrubbed=True, expires=self._expires(), policy=model,
                fingerprint=self.models.get(model, ""), sampler=sampler_of(request.sampling), seed=seed,
                columns=columns | ({"cut": True} if cut else {}),
            )  # fmt: skip
            await self._write(self.store.add_conversation, conversation)

    async def feedback(self, given: Given) -> dict[str, Any]:
        """Store a submission: its texts only with consent."""
        for name in (*given.policies, *([given.model] if given.model else [])):
            if name not in self.models:
                raise Wrong(f"policies: no policy {name!r:.60} is here; choose of {', '.join(self.models)}", "policies")
        expires, person = self._expires(), given.person or ANONYMOUS
        policies = given.policies or ((given.model,) if given.model else ())
        responses = given.responses
        if not responses and given.consent:
            responses = (given.messages[-1]["content"],)
        turn = len(given.messages) - (given.kind != "comparison") if given.consent else None
        kept = _record(
            id=given.id, person=person, kind=given.kind, conversation=given.conversation, turn=turn,
            responses=tuple(self._clean(responses) if given.consent else ["" for _ in responses or policies]),
            policies=policies, order=given.order, thumb=given.thumb, ranks=given.ranks,
            edit=self._clean(given.edit) if given.consent else None, tags=given.tags, consent=given.consent,
            scrubbed=True, expires=expires,
        )  # fmt: skip
        if given.consent:
            await self._write(self.store.add_conversation, self._conversation(given, person, expires))
        stored = await self._write(self.store.add_feedback, kept)
        return {"stored": bool(stored), "conversation_kept": given.consent, "expires": int(expires)}

    def _conversation(self, given: Given, person: str, expires: float) -> Conversation:
        fingerprints = {name: self.models[name] for name in given.policies}
        return Conversation(
            id=str(given.conversation), messages=self._clean(given.messages), person=person, consent=True,
            scrubbed=True, expires=expires, policy=given.model or "",
            fingerprint=self.models.get(given.model or "", ""), sampler=given.sampler, seed=given.seed,
            columns={"fingerprints": fingerprints} if fingerprints else {},
        )  # fmt: skip

    def _clean(self, value: Any) -> Any:
        return scrubbed(value, self.rule)

    def _expires(self) -> float:
        return time.time() + self.config.retention_days * DAY

    async def _write(self, work: Any, *values: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._writer, work, *values)
        except InputError as error:
            raise Wrong(str(error)) from None
        except RunStopped as error:
            raise Refused(503, str(error)) from None


def _record(**fields: Any) -> Feedback:
    """Make the store's record. Raises Wrong for what it refuses."""
    try:
        return Feedback(**fields)
    except InputError as error:
        raise Wrong(str(error)) from None


def sampler_of(sampling: Sampling) -> dict[str, Any]:
    """Return a request's settings as the store has them."""
    found: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p}
    found |= {"max_tokens": sampling.max_tokens} if sampling.max_tokens is not None else {}
    return found | ({"stop": list(sampling.stop)} if sampling.stop else {})


def texts_of(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the texts of an answer's choices, "" of one that has not begun: of a whole one, or a stream's chunks."""
    texts: dict[int, str] = {}
    for answer in answers:
        for choice in answer.get("choices") or ():
            part = choice.get("message") or choice.get("delta") or choice
            piece = part.get("content") if part is not choice else choice.get("text")
            texts[choice["index"]] = texts.get(choice["index"], "") + (piece or "")
    return [texts.get(index, "") for index in range(max(texts, default=-1) + 1)]
