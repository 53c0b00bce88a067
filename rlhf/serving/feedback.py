"""What people say of answers, as /v1/feedback receives it: a thumb with reasons, a better answer, a comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from rlhf.errors import InputError
from rlhf.rows.messages import Messages, as_messages
from rlhf.serving.wire import Fields, Wrong, seen, storable

TAGS = ("correct", "helpful", "clear", "wrong", "unhelpful", "unclear", "too long", "too short", "unsafe", "refused")
"""The reasons that the page offers."""
KINDS = ("thumb", "edit", "comparison")
MOST_RESPONSES = 9
_ID = re.compile(r"[A-Za-z0-9_-]{8,64}")
_KNOWN = {
    "id", "person", "kind", "consent", "conversation", "messages", "model", "seed", "sampler", "turn", "responses",
    "policies", "order", "thumb", "ranks", "edit", "tags",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Given:
    """One submission. What is text in it is kept only with consent."""

    id: str
    """Drawn once for what is judged: a repeat is stored once, something else under it replaces what was there."""
    kind: Literal["thumb", "edit", "comparison"]
    consent: bool
    """Whether its sender agreed, beside the button, that the conversation is kept and used for training."""
    person: str | None = None
    """A pseudonym that the client drew, under which all of its submissions can be erased."""
    conversation: str | None = None
    messages: Messages = field(default_factory=list)
    """The conversation up to the answer that is meant, or up to the question that several answers are to."""
    model: str | None = None
    seed: int | None = None
    sampler: dict[str, Any] = field(default_factory=dict)
    responses: tuple[str, ...] = ()
    policies: tuple[str, ...] = ()
    order: tuple[int, ...] = ()
    thumb: int | None = None
    ranks: tuple[float, ...] | None = None
    edit: str | None = None
    tags: tuple[str, ...] = ()


def read_feedback(body: bytes) -> Given:
    """Read a submission. Raises Wrong."""
    fields = Fields(body, _KNOWN)
    kind = fields.text("kind")
    if kind not in KINDS:
        raise Wrong(f"kind: got {seen(kind)}; send one of {', '.join(KINDS)}", "kind")
    consent = fields.content.get("consent")
    if not isinstance(consent, bool):
        raise Wrong(f"consent: got {seen(consent)}; send true or false, as the sender chose", "consent")
    given = Given(
        id=_id(fields, "id"), kind=cast(Any, kind), consent=consent,
        person=_id(fields, "person") if fields.content.get("person") is not None else None,
        conversation=_id(fields, "conversation") if consent else None, messages=_messages(fields) if consent else [],
        model=fields.text("model"), seed=fields.whole("seed", None, -(2**63), 2**63 - 1), sampler=_sampler(fields),
        responses=_texts(fields, "responses", 2**20), policies=_texts(fields, "policies", 512),
        order=tuple(int(n) for n in _numbers(fields, "order")), thumb=fields.whole("thumb", None, -1, 1),
        ranks=_numbers(fields, "ranks") or None, edit=_edit(fields), tags=_texts(fields, "tags", 40),
    )  # fmt: skip
    _check(given)
    return given


def _check(given: Given) -> None:
    if unknown := set(given.tags) - {*TAGS}:
        raise Wrong(f"tags: {seen(min(unknown))} is none of {', '.join(TAGS)}", "tags")
    if given.kind == "thumb" and given.thumb not in (1, -1):
        raise Wrong(f"thumb: got {given.thumb}; send 1 or -1", "thumb")
    if given.kind == "edit" and not given.consent:
        raise Wrong("consent: a better answer is kept only where its sender agrees", "consent")
    if given.kind == "edit" and not (given.edit or "").strip():
        raise Wrong("edit: no text; send the answer as it should be", "edit")
    count = len(given.responses)
    if given.kind == "comparison" and not (2 <= count <= MOST_RESPONSES and len(given.ranks or ()) == count):
        raise Wrong(f"ranks: {len(given.ranks or ())} for {count} responses; send 2 to 9 and a rank for each", "ranks")
    if given.order and sorted(given.order) != list(range(count)):
        raise Wrong(f"order: send each index of the {count} responses once, in the order shown", "order")
    if given.policies and given.kind == "comparison" and len(given.policies) != count:
        raise Wrong(f"policies: {len(given.policies)} for {count} responses; send one for each", "policies")
    last = given.messages[-1]["role"] if given.messages else None
    wanted = "user" if given.kind == "comparison" else "assistant"
    if given.consent and last != wanted:
        raise Wrong(f"messages: the last turn is {last!r}; a {given.kind} needs {wanted!r} there", "messages")


def _id(fields: Fields, name: str) -> str:
    value = fields.content.get(name)
    if not isinstance(value, str) or not _ID.fullmatch(value):
        raise Wrong(f"{name}: got {seen(value)}; send 8 to 64 letters, digits, - or _, such as a UUID", name)
    return value


def _messages(fields: Fields) -> Messages:
    try:
        return as_messages(fields.content.get("messages") or [], "messages")
    except InputError as error:
        raise Wrong(str(error), "messages") from None


def _sampler(fields: Fields) -> dict[str, Any]:
    value = fields.content.get("sampler")
    if value is None:
        return {}
    if not isinstance(value, dict) or value.keys() - {"temperature", "top_p", "max_tokens"}:
        raise Wrong(f"sampler: got {seen(value)}; send temperature, top_p and max_tokens", "sampler")
    if not all(type(number) in (int, float) for number in value.values()):
        raise Wrong("sampler: send numbers", "sampler")
    return value


def _texts(fields: Fields, name: str, longest: int) -> tuple[str, ...]:
    value = fields.content.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(text, str) and len(text) <= longest for text in value):
        raise Wrong(f"{name}: got {seen(value)}; send a list of texts of at most {longest} characters", name)
    if len(value) > max(MOST_RESPONSES, len(TAGS)):
        raise Wrong(f"{name}: {len(value)} texts; that is too many", name)
    return tuple(storable(text, name) for text in value)


def _numbers(fields: Fields, name: str) -> tuple[float, ...]:
    value = fields.content.get(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(n) in (int, float) and abs(n) < 1e6 for n in value):
        raise Wrong(f"{name}: got {seen(value)}; send a list of numbers", name)
    return tuple(value)


def _edit(fields: Fields) -> str | None:
    value = fields.content.get("edit")
    if value is not None and not isinstance(value, str):
        raise Wrong(f"edit: got {seen(value)}; send text", "edit")
    return None if value is None else storable(value, "edit")
