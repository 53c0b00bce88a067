"""What a chat template does, learnt by rendering probes: which tokens delimit turns, and which end a response.

Structural tokens are the tokenizer's special tokens and whatever other added tokens the template writes around turns
(DeepSeek's ``<｜User｜>``). Tags of contents (``<think>``, ``<tool_call>``) are not, even where a tokenizer calls them
special.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rlhf.chat import rendering
from rlhf.chat.rendering import Conversation, Tokens, shared
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_TAG = (
    "think|thinking|thought|thoughts|reason|reasoning|reflection|answer|solution|tools?|tool_calls?|tool_responses?|"
    "tool_results?|tool_outputs?|functions?|function_calls?|invoke|parameters?|arg_key|arg_value|code"
)
_CONTENT = re.compile(rf"</?(?:{_TAG})/?>|\[/?(?:{_TAG})\]", re.IGNORECASE)
_EMPTY_PAIR = re.compile(r"<(\w[\w:.-]*)>\s*</\1>")
_WORD = re.compile(r"[\w\s/]+")
_SCHEMA = {"type": "object", "properties": {"zqkey": {"type": "string", "description": "zq"}}, "required": ["zqkey"]}


def word(n: int) -> str:
    """Return the n-th of the words that no template writes by itself."""
    return f"zq{n}qz"


@dataclass(frozen=True)
class Shape:
    """What a template does with conversations of the same roles and kinds of content."""

    opens_last: bool = False  # the last turn's own text begins behind the last `opening`
    outside: frozenset[int] = frozenset()  # assistant's turns whose content is written elsewhere


@dataclass
class Template:
    """The analysis of one tokenizer, its chat template and the template's settings."""

    fingerprint: tuple
    kwargs: dict[str, Any]
    tokens: Tokens
    parts: bool  # it reads contents as lists of parts
    opening: str = ""  # what the generation prompt writes
    ends: dict[str, bool] = field(default_factory=dict)  # tokens that end a turn; False: within a response, too
    closing: str | None = None  # ends a last turn after which the template writes no token
    closing_call: str | None = None  # the same for a turn of tool calls
    ending: str = ""  # the last characters of a prompt
    lead: str = ""  # white space that a finished turn has before its content
    tail: str = ""  # what it writes between the content and the end of turn
    thinking: Any = None  # how it writes thinking (`rlhf.chat.answers`); None: not yet known
    shapes: dict[tuple, Shape] = field(default_factory=dict)  # of conversations of which nothing is left out

    @property
    def header(self) -> str:
        """The part of `opening` that every block of an assistant's turn begins with (GPT-OSS has several blocks)."""
        return self.opening.split("\n")[0]


_TEMPLATES: WeakKeyDictionary[Any, dict[str, Template]] = WeakKeyDictionary()


def source(tokenizer: Tokenizer) -> str:
    """Return the template's text."""
    template = tokenizer.chat_template
    if not template:
        raise InputError("chat template: the tokenizer has none; call rlhf.chat.prepare_tokenizer(tokenizer) first")
    return template if isinstance(template, str) else tokenizer.get_chat_template()


def settings(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the template's settings that belong to this tokenizer; its folder keeps them."""
    return dict(tokenizer.init_kwargs.get("chat_template_kwargs") or {})


def template_of(tokenizer: Tokenizer, kwargs: Mapping[str, Any] | None = None) -> Template:
    """Return the analysis, made once and renewed when template, eos or vocabulary changes.

    kwargs: a row's own settings; they win over the tokenizer's.
    """
    own = tokenizer.init_kwargs.get("chat_template_kwargs") or {}
    own = {**own, **kwargs} if kwargs else own
    text = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else source(tokenizer)
    fingerprint = (text, tokenizer.eos_token_id, len(tokenizer))
    known = _TEMPLATES.setdefault(tokenizer, {})
    key = json.dumps(own, sort_keys=True, default=str) if own else ""
    if key not in known or known[key].fingerprint != fingerprint:
        known[key] = _analyse(tokenizer, fingerprint, dict(own))
    return known[key]


def anchor(tokenizer: Tokenizer, template: Template) -> list[int]:
    """Return the tokens to decode a response after: a SentencePiece decoder drops a text's first space."""
    prompt = template.ending
    if not prompt or any(prompt.endswith(name) for name in template.tokens.ids):
        return []
    return rendering.encode(tokenizer, template.tokens, Conversation([], None, {}, {}), prompt[-1])[0]


def forget(tokenizer: Tokenizer) -> None:
    """Forget the analysis: a word has become a control token, which no length shows."""
    _TEMPLATES.pop(tokenizer, None)


# ---------------------------------------------------------------------------------------------- the analysis


def _analyse(tokenizer: Tokenizer, fingerprint: tuple, kwargs: dict[str, Any]) -> Template:
    special = _structural(tokenizer, "")
    template = Template(fingerprint, kwargs, rendering.tokens_of(tokenizer, special), parts=False)
    one = _probe("user", "assistant")
    text = _rendered(tokenizer, template, one)
    if text is None or word(0) not in text or word(1) not in text:
        template.parts = True
        if word(1) not in (_rendered(tokenizer, template, one) or ""):
            template.parts = False
    text = rendering.render(tokenizer, prepared(template, one), 2, generation_prompt=False)
    several = _rendered(tokenizer, template, _probe("user", "assistant", "user", "assistant"))
    gaps = _gaps(several or text)
    structural = _structural(tokenizer, "\0".join(gaps))
    if structural != special:
        template.tokens = rendering.tokens_of(tokenizer, structural)
    _find_opening(tokenizer, template, one, text)
    _find_ends(tokenizer, template, text, gaps[1] if several else None)
    return template


def _probe(*roles: str, calls: int = 0) -> list[dict[str, Any]]:
    """Return messages whose contents are words that no template writes."""
    messages: list[dict[str, Any]] = [{"role": role, "content": word(n)} for n, role in enumerate(roles)]
    for n, message in enumerate(messages if calls else []):
        if message["role"] == "assistant" and n == 1:
            message["content"] = ""
            message["tool_calls"] = [call(f"call0000{c}", f"zqname{c}", word(100 + c)) for c in range(calls)]
        if message["role"] == "tool":
            message |= {"name": "zqname0", "tool_call_id": "call00000"}
    return messages


def call(number: str, name: str, value: str) -> dict[str, Any]:
    """Return a tool call as OpenAI writes it."""
    return {"id": number, "type": "function", "function": {"name": name, "arguments": {"zqkey": value}}}


def tool(name: str) -> dict[str, Any]:
    """Return a tool's schema."""
    return {"type": "function", "function": {"name": name, "description": "zq", "parameters": _SCHEMA}}


def prepared(template: Template, messages: Sequence[Mapping[str, Any]], tools: Any = None) -> Conversation:
    """Prepare messages for this template, with its settings."""
    return rendering.conversation(template.tokens, messages, tools, template.kwargs, template.parts)


def _rendered(
    tokenizer: Tokenizer, template: Template, messages: list[dict[str, Any]], tools: Any = None
) -> str | None:
    """Render a probe; None where the template refuses it."""
    try:
        return rendering.render(tokenizer, prepared(template, messages, tools), len(messages), generation_prompt=False)
    except InputError:
        return None


def _gaps(text: str) -> list[str]:
    """Return what a rendered probe has between its words and after the last one."""
    places = [text.find(word(n)) for n in range(4)]
    starts = [place for place in places if place >= 0]
    ends = [place + len(word(0)) for place in starts]
    return [text[a:b] for a, b in zip(ends, [*starts[1:], len(text)], strict=True)]


def _structural(tokenizer: Tokenizer, gaps: str) -> set[str]:
    """Return the names of the structural tokens; gaps: what the template writes between contents."""
    control = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    own = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    around, text = _EMPTY_PAIR.sub("", gaps), source(tokenizer)
    names = set()
    for i, token in tokenizer.added_tokens_decoder.items():
        name = token.content
        tag = bool(_CONTENT.fullmatch(name)) and i not in own
        if token.special or i in own or name in control:
            if not tag:
                names.add(name)
        elif not tag and not _WORD.fullmatch(name):
            piped = "|" in name or "｜" in name
            if name in around or (piped and name in text):
                names.add(name)
    return names


def _find_opening(tokenizer: Tokenizer, template: Template, one: list[dict[str, Any]], text: str) -> None:
    """Find what the generation prompt writes, and the white space between it and a content."""
    chat = prepared(template, one)
    before = rendering.render(tokenizer, chat, 1, generation_prompt=False)
    prompt = rendering.render(tokenizer, chat, 1, generation_prompt=True).rstrip(" ")
    template.opening = opening_of(template.tokens, before, prompt)
    template.ending = prompt[-16:]
    gap = text[len(prompt) : text.index(word(1))] if text.startswith(prompt) else ""
    template.lead = gap if gap.isspace() else ""


def opening_of(tokens: Tokens, before: str, prompt: str) -> str:
    """Return what the generation prompt adds to a conversation. (Phi-3 writes eos where there is none.)"""
    cut = shared(before, prompt)
    inside = (match.start() for match in tokens.names.finditer(prompt) if match.start() < cut < match.end())
    return prompt[next(inside, cut) :]


def _find_ends(tokenizer: Tokenizer, template: Template, text: str, between: str | None) -> None:
    """Find the tokens that end a turn: the last turn, one before a user's, and one of tool calls."""
    template.tail, last = _run(template.tokens, text[text.index(word(1)) + len(word(1)) :])
    middle = _run(template.tokens, between)[1] if between is not None else last
    common = last[: shared(last, middle)]
    if common:
        _add(template, common[-1])
    elif last:
        _add(template, last[-1])
        if middle:  # GPT-OSS: <|end|> ends an earlier turn, and each block of a turn but the last
            template.ends[middle[0]] = False
    elif middle:  # GLM: the next turn's role marker is what ends a turn
        _add(template, middle[0])
        template.closing = middle[0]
    if not template.ends:
        template.closing = tokenizer.eos_token
    if template.closing is None and not template.ends:
        raise InputError("tokenizer: the chat template ends a turn with no control token and there is no eos; set one")
    probe = partial(_rendered, tokenizer, template, tools=[tool("zqname0"), tool("zqname1")])
    for calls in (2, 1):
        called = probe(_probe("user", "assistant", calls=calls))
        if called is not None and word(99 + calls) in called:
            _find_ends_of_calls(template, called, probe(_probe("user", "assistant", "tool", "assistant", calls=calls)))
            break


def _find_ends_of_calls(template: Template, called: str, answered: str | None) -> None:
    """called: a rendered probe whose last turn calls tools; answered: the same with the tool's answer."""
    names = template.tokens.names
    value = max(called.rfind(word(100)), called.rfind(word(101)))
    found = [*names.finditer(called, value)]
    if found and not called[found[-1].end() :].strip():
        last = found[-1][0]
        if last not in template.ends and last not in called[:value]:
            _add(template, last)
        return
    value = -1 if answered is None else max(answered.rfind(word(100)), answered.rfind(word(101)))
    after = names.findall(answered[value : answered.find(word(2))]) if answered and value >= 0 else []
    if after and not template.ends.keys() & set(after):
        _add(template, after[0])
    template.closing_call = after[0] if after else None


def _add(template: Template, name: str) -> None:
    template.ends[name] = True


def _run(tokens: Tokens, text: str) -> tuple[str, list[str]]:
    """Return the text before the first structural token, and the tokens that stand there side by side."""
    match = tokens.names.search(text)
    before, run = (text[: match.start()] if match else text), []
    while match:
        run.append(match[0])
        match = tokens.names.match(text, match.end())
    return before, run
