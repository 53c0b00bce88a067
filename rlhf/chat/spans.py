"""Find, in a rendered conversation, what an assistant must write itself: from the end of each turn's generation prompt
up to and including its end of turn."""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from rlhf.chat import rendering
from rlhf.chat.rendering import Conversation, Offsets, shared
from rlhf.chat.template import Shape, Template, call, opening_of, prepared, template_of, tool, word
from rlhf.errors import InputError, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_THOUGHT = re.compile(r"\s*(?:<think>)?(.*?)</think>", re.DOTALL)
_REMEDIES: tuple[dict[str, Any], ...] = ({"enable_thinking": False}, {"thinking": False})


@dataclass(frozen=True)
class Encoded:
    """A conversation up to its last end of turn."""

    ids: list[int]
    mask: list[bool]
    """True on what the assistant writes in the turns that are trained."""
    answer_from: int
    """Number of tokens before the last turn's own."""
    rendered: list[int]
    """All that the template renders, with what it appends after the last end of turn."""
    sampled: bool
    """Whether the last turn begins as the generation prompt ends, token for token: what a policy samples can become
    this conversation."""


def encode_finished(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Mapping[str, Any]], trained: Sequence[bool], tools: Any
) -> Encoded:
    """Encode a conversation that ends with an assistant turn. Raises InputError where the template refuses messages or
    leaves out any part of them."""
    chat, last = prepared(template, messages, tools), len(messages) - 1
    text = rendering.render(tokenizer, chat, len(messages), generation_prompt=False)
    shape = check_shape(tokenizer, template, messages, tools, generation_prompt=False)
    rendered, offsets = rendering.encode(tokenizer, template.tokens, chat, text)
    turns = _Turns(tokenizer, template, chat, text, rendered, offsets)
    if shape.opens_last and (place := text.rfind(template.opening)) >= 0:
        turns.starts[last], turns.sampled[last] = place + len(template.opening), True
    mask = [False] * len(rendered)
    for index, message in enumerate(messages):
        if message["role"] == "assistant" and trained[index]:
            if index in shape.outside:
                raise InputError(
                    f"messages[{index}].content: the chat template writes it outside of the turn, behind the tool's "
                    "response, where it isn't trained; take it out, or set the turn's `train` to false"
                )
            first, final = _tokens_between(offsets, turns.start(index), turns.end(index)[0])
            mask[first:final] = [True] * (final - first)
    start, (end, added) = turns.start(last), turns.end(last)
    first, final = _tokens_between(offsets, start, end)
    content = str(messages[last].get("content") or "")
    blank = content[: len(content) - len(content.lstrip()) + 1] if content[:1].isspace() else ""
    # White space at the start of a content may join the template's line break: no fault of the template's.
    joined = bool(blank) and chat.restored(text[start:]).startswith(blank)
    whole = first >= final or offsets[first][0] >= start or joined
    own = text[offsets[first][0] :] if first < len(rendered) else ""
    _check_thought(messages[last], chat.restored(own), last)
    ids, mask = rendered[:final], mask[:final]
    if added:
        ids, mask = [*ids, template.tokens.ids[added]], [*mask, trained[last]]
    return Encoded(ids, mask, first, rendered, turns.sampled[last] and whole)


def encode_start(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Mapping[str, Any]], tools: Any
) -> list[int]:
    """Encode a prompt with the generation prompt. Spaces at its end belong to the response: tokenizers join them to the
    next word."""
    chat = prepared(template, messages, tools)
    text = rendering.render(tokenizer, chat, len(messages), generation_prompt=True).rstrip(" ")
    check_shape(tokenizer, template, messages, tools, generation_prompt=True)
    return rendering.encode(tokenizer, template.tokens, chat, text)[0]


def _tokens_between(offsets: Offsets, start: int, end: int) -> tuple[int, int]:
    """Return the first token that ends behind `start`, and the first that begins at `end` or behind it."""
    return bisect_right(offsets, start, key=itemgetter(1)), bisect_left(offsets, end, key=itemgetter(0))


@dataclass
class _Turns:
    """The assistant's turns in a rendered conversation."""

    tokenizer: Tokenizer
    template: Template
    chat: Conversation
    text: str
    ids: list[int]
    offsets: Offsets
    sampled: dict[int, bool] = field(default_factory=dict)  # whether a turn follows its generation prompt
    starts: dict[int, int] = field(default_factory=dict)
    ends: dict[int, tuple[int, str]] = field(default_factory=dict)

    def start(self, index: int) -> int:
        """Return where the turn begins to be the assistant's own: where its generation prompt ends."""
        if index not in self.starts:
            self.starts[index], self.sampled[index] = self._start(index)
        return self.starts[index]

    def end(self, index: int) -> tuple[int, str]:
        """Return where the turn ends, its end-of-turn token included, and the token to add if there is none."""
        if index not in self.ends:
            self.ends[index] = self._end(index)
        return self.ends[index]

    def _start(self, index: int) -> tuple[int, bool]:
        text, opening = self.text, self.template.opening
        before = next((n for n in range(index - 1, -1, -1) if self.chat.messages[n]["role"] == "assistant"), None)
        if index > 0:
            prompt = self._render(index, generation_prompt=True).rstrip(" ")
            if text.startswith(prompt):
                return len(prompt), True
            opening = opening_of(self.template.tokens, self._render(index, generation_prompt=False), prompt)
            if text.startswith(prompt[: len(prompt) - len(opening)]):  # only the generation prompt differs (R1)
                prompt_ids = rendering.encode(self.tokenizer, self.template.tokens, self.chat, prompt)[0]
                same = shared(self.ids, prompt_ids)
                return (self.offsets[same][0] if same < len(self.ids) else len(text)), False
            # Later turns change how the template writes earlier ones: compare what follows the turn before.
            place = 0 if before is None else self.end(before)[0]
            for match in self.template.tokens.names.finditer(prompt) if before is not None else ():
                if text.startswith(prompt[match.end() :], place):
                    return place + len(prompt) - match.end(), True
        place = 0 if before is None else self.end(before)[0]
        head, tag, _ = opening.partition("<think>")
        place = text.find(head, place) if head.strip() else -1
        if place < 0:
            raise InputError(f"messages[{index}]: no telling where the chat template begins it; train on later turns")
        whole = next(part for part in (opening, head + tag, head) if text.startswith(part, place))
        return place + len(whole), whole == opening

    def _end(self, index: int) -> tuple[int, str]:
        text, template, start = self.text, self.template, self.start(index)
        last = index == len(self.chat.messages) - 1
        consecutive = not last and self.chat.messages[index + 1]["role"] == "assistant"
        for match in template.tokens.names.finditer(text, start):
            if match[0] not in template.ends and template.closing is None:
                continue
            after = text[match.end() :].lstrip()
            if consecutive or not template.header or not after.startswith(template.header):
                return match.end(), ""
        finished = text if last else self._render(index + 1, generation_prompt=False)
        finished = finished.removesuffix(template.tail)
        if not text.startswith(finished):
            raise InputError(f"messages[{index}]: no telling where the chat template ends it; train on later turns")
        if not last:
            return len(finished), ""
        own = [*template.tokens.names.finditer(text, start)]
        if own and not text[own[-1].end() :].strip():  # an end that no probe has shown
            return own[-1].end(), ""
        closing = template.closing_call if self.chat.messages[index].get("tool_calls") else None
        return max(start, len(finished)), closing or last_end(template)

    def _render(self, turns: int, generation_prompt: bool) -> str:
        return rendering.render(self.tokenizer, self.chat, turns, generation_prompt)


def last_end(template: Template) -> str:
    """Return the token that ends a plain last turn."""
    return next(iter(template.ends), None) or str(template.closing)


# ---------------------------------------------------------------------------------------------- what is left out


def reasoning_of(message: Mapping[str, Any]) -> str:
    """Return a message's thinking, under whichever of transformers' names it has."""
    return str(message.get("reasoning_content") or message.get("thinking") or message.get("reasoning") or "")


def check_shape(
    tokenizer: Tokenizer,
    template: Template,
    messages: Sequence[Mapping[str, Any]],
    tools: Any,
    generation_prompt: bool,
) -> Shape:
    """Raise InputError where the template leaves out a turn, thinking, a tool call or the tools; once per shape. Return
    what such a conversation shows."""
    shape: tuple[Any, ...] = (generation_prompt, bool(tools))
    for m in messages:
        shape += ((m["role"], bool(m.get("content")), bool(reasoning_of(m)), len(m.get("tool_calls") or ())),)
    if shape in template.shapes:
        return template.shapes[shape]
    probes = [_probe(n, message) for n, message in enumerate(messages)]
    roles = ", ".join(str(message["role"]) for message in messages)
    chat = prepared(template, probes, [tool("zqtool")] if tools else None)
    try:
        text = rendering.render(tokenizer, chat, len(probes), generation_prompt)
        for n, message in enumerate(probes):
            own = message["role"] == "assistant" and (message.get("tool_calls") or message.get("reasoning_content"))
            turn = rendering.render(tokenizer, chat, n + 1, False) if own and n + 1 < len(probes) else text
            _check_turn(message, n, turn, roles)
    except InputError as error:
        if "refuses" not in str(error):
            raise
        return Shape()
    if tools and "zqtool" not in text:
        raise InputError("tools: the chat template leaves them out; take the column out or use another template")
    seen = Shape()
    if not generation_prompt:
        seen = Shape(_opens_last(tokenizer, template, chat, text), _outside(tokenizer, template, chat, text, probes))
    template.shapes[shape] = seen
    return seen


def _opens_last(tokenizer: Tokenizer, template: Template, chat: Conversation, text: str) -> bool:
    """Return whether the generation prompt of the last turn ends with the last `opening` of the text."""
    turns, opening = len(chat.messages), template.opening
    if turns < 2 or not template.tokens.names.search(opening):
        return False
    prompt = rendering.render(tokenizer, chat, turns - 1, generation_prompt=True).rstrip(" ")
    return text.startswith(prompt) and prompt.endswith(opening) and text.rfind(opening) + len(opening) == len(prompt)


def _outside(
    tokenizer: Tokenizer, template: Template, chat: Conversation, text: str, probes: Sequence[Mapping[str, Any]]
) -> frozenset[int]:
    """Return the turns whose content stands in the text, but not between their start and end: what Gemma 4 says with a
    call comes behind the tool's response."""
    turns = _Turns(tokenizer, template, chat, text, *rendering.encode(tokenizer, template.tokens, chat, text))
    outside = set()
    for n, probe in enumerate(probes):
        if probe["role"] == "assistant" and probe["content"] in text:
            with suppress(InputError):  # no telling where: an error for those who train on it
                if probe["content"] not in text[turns.start(n) : turns.end(n)[0]]:
                    outside.add(n)
    return frozenset(outside)


def _check_turn(message: Mapping[str, Any], n: int, text: str, roles: str) -> None:
    if message["content"] not in text:
        raise InputError(
            f"messages: the chat template drops turn {n} ({message['role']}) of {roles}; merge it into another turn"
        )
    if message.get("reasoning_content", "") not in text:
        raise InputError(
            f"messages[{n}].reasoning_content: the chat template leaves it out; take it out or use another template"
        )
    for made in message.get("tool_calls", ()):
        if made["function"]["name"] not in text or made["function"]["arguments"]["zqkey"] not in text:
            raise InputError(
                f"messages[{n}].tool_calls: the chat template leaves a call out; write the turn as text or use another "
                "template"
            )


def _probe(n: int, message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message of the same shape whose texts are words that no template writes."""
    probe: dict[str, Any] = {"role": message["role"], "content": word(n) if message.get("content") else ""}
    if reasoning_of(message):
        probe["reasoning_content"] = word(1000 + n)
    if message.get("tool_calls"):
        numbers = range(len(message["tool_calls"]))
        probe["tool_calls"] = [call(f"call0000{c % 10}", f"zqname{c}", word(2000 + 100 * n + c)) for c in numbers]
    if message["role"] == "tool":
        probe |= {"name": "zqname0", "tool_call_id": "call00000"}
    return probe


def _check_thought(message: Mapping[str, Any], own: str, index: int) -> None:
    """Raise InputError where the last turn's thinking is written twice, or not at all. own: the turn as rendered."""
    content = message.get("content")
    match = _THOUGHT.match(content) if isinstance(content, str) else None
    if not match:
        return
    if reasoning_of(message):
        raise InputError(f"messages[{index}]: thinking in reasoning_content and in the content, too; keep one of them")
    if match[1].strip() not in own:
        raise InputError(
            f"messages[{index}].content: the chat template leaves out its thinking ({short(match[1].strip(), 30)!r}); "
            "take it out, or use a template that writes it"
        )


def refused_start(
    tokenizer: Tokenizer, template: Template, messages: Sequence[Mapping[str, Any]], tools: Any
) -> InputError:
    """Make the error for a conversation whose last turn does not begin as the generation prompt ends, with the
    remedies that help."""
    remedies = []
    on = [True] * len(messages)

    def helps(kwargs: Mapping[str, Any], turns: Sequence[Mapping[str, Any]]) -> bool:
        try:
            return encode_finished(
                tokenizer, template_of(tokenizer, {**template.kwargs, **kwargs}), turns, on, tools
            ).sampled
        except InputError:
            return False

    if not reasoning_of(messages[-1]) and helps({}, [*messages[:-1], {**messages[-1], "reasoning_content": "So."}]):
        remedies.append("add the answer's thinking (reasoning_content)")
    works = next((kwargs for kwargs in _REMEDIES if helps(kwargs, messages)), None)
    if works is not None:
        remedies.append(f"set chat_template_kwargs to {works}")
    advice = " or ".join(remedies) or "use a chat template whose finished turns begin as its generation prompt ends"
    return InputError(
        f"messages: the generation prompt ends with {template.opening[-20:]!r}, but the finished turn goes on in "
        f"another way, so a policy would start where nothing was trained; {advice}"
    )
