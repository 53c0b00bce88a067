"""Render conversations by a chat template and encode the result, safe against control tokens in contents.

The template renders the real messages, so its logic runs on them. Only the strings of its structural tokens (those that
delimit turns) are taken out of the contents first, each replaced by a private character, and put back as ordinary text
after the rendered text has been cut at the template's own structural tokens. A content without such a string is encoded
exactly as `apply_chat_template(..., tokenize=True)` encodes it.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from rlhf.errors import InputError, reason, short

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

Offsets = list[tuple[int, int]]
"""First and last character (exclusive) of each token in a rendered text."""

_PRIVATE = 0x100000  # the last plane of private-use characters: no template touches or changes their case
_NOT_OURS = ("chat_template", "tokenize", "add_generation_prompt", "continue_final_message", "return_dict", "tools")


@dataclass(frozen=True)
class Conversation:
    """Messages and what else a template reads, with the structural tokens' strings in them replaced."""

    messages: list[dict[str, Any]]
    tools: Any
    kwargs: dict[str, Any]
    replaced: dict[str, str]  # what stands for each string that was taken out

    def restored(self, text: str) -> str:
        return text.translate({ord(mark): string for string, mark in self.replaced.items()}) if self.replaced else text


@dataclass
class Tokens:
    """The structural tokens of a tokenizer and its template, and the backends that encode with and without them."""

    ids: dict[str, int]
    counted: frozenset[int]  # ids that no content may encode to
    strips: dict[str, tuple[bool, bool]]  # tokens that swallow white space on their left or right
    whole: Any  # the backend as it is; None for a tokenizer without one
    joined: bool = False  # text after a token is encoded as in the middle of a text, not as its beginning
    names: re.Pattern = field(init=False)
    inert: re.Pattern = field(init=False)
    _plain: Any = None

    def __post_init__(self) -> None:
        names = "|".join(re.escape(name) for name in sorted(self.ids, key=len, reverse=True))
        self.names = re.compile(names or "(?!)")
        self.inert = re.compile(f"{names or '(?!)'}|[\U00100000-\U0010ffff]")

    @property
    def plain(self) -> Any:
        """The backend for which the structural tokens are ordinary text; other added tokens stay tokens."""
        if self._plain is None and self.whole is not None:
            from tokenizers import Tokenizer

            state = json.loads(self.whole.to_str())
            for token in state["added_tokens"]:  # special is what encode_special_tokens switches off
                token["special"] = token["content"] in self.ids
            self._plain = Tokenizer.from_str(json.dumps(state))
            self._plain.encode_special_tokens = True
        return self._plain


def tokens_of(tokenizer: Tokenizer, names: set[str]) -> Tokens:
    """Return the structural tokens of these names."""
    added = tokenizer.added_tokens_decoder.items()
    ids = {token.content: i for i, token in added if token.content in names}
    strips = {t.content: (t.lstrip, t.rstrip) for _, t in added if t.content in ids and (t.lstrip or t.rstrip)}
    tokens = Tokens(ids, frozenset(ids.values()) - {tokenizer.unk_token_id}, strips, _whole_backend(tokenizer))
    some = next((name for name in ids if name not in strips), None)
    if some is not None:
        after, alone = _encode(tokenizer, tokens.whole, some + "a"), _encode(tokenizer, tokens.whole, "a")
        tokens.joined = after[1:] != alone
    return tokens


def conversation(
    tokens: Tokens, messages: Sequence[Mapping[str, Any]], tools: Any, kwargs: Mapping[str, Any], parts: bool
) -> Conversation:
    """Prepare messages for the template. parts: it reads contents as lists of parts."""
    for name in kwargs:
        if name in _NOT_OURS:
            raise InputError(f"chat_template_kwargs: {name!r} is set by the trainer; take it out")
    replaced: dict[str, str] = {}
    turns = [turn_of(message, parts) for message in messages]
    own = schemas_of(tools)
    if own is None and not kwargs and _is_plain(turns, tokens.inert):
        return Conversation(turns, None, {}, replaced)
    marked, marked_tools, settings = (inert(value, tokens.inert, replaced) for value in (turns, own, dict(kwargs)))
    return Conversation(marked, marked_tools, settings, replaced)


def _is_plain(turns: list[dict[str, Any]], pattern: re.Pattern) -> bool:
    """Return whether all values are texts in which `pattern` finds nothing; most rows are so."""
    values = [value for turn in turns for value in turn.values()]
    return all(type(value) is str for value in values) and not pattern.search("\0".join(values))


def schemas_of(tools: Any) -> list[Any] | None:
    """Read a row's tools: schemas, or JSON text of them (as a dataset must hold schemas of different fields); None
    where there are none. Raises InputError."""
    if not tools:
        return None
    try:
        listed = json.loads(tools) if isinstance(tools, str) and tools.strip() else tools or None
        listed = [listed] if isinstance(listed, Mapping) else listed
        schemas = [json.loads(tool) if isinstance(tool, str) else tool for tool in listed or ()]
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"tools: {reason(error)}; write a list of tools' JSON schemas") from None
    if not all(isinstance(schema, Mapping) for schema in schemas):
        raise InputError(f"tools: got {short(repr(tools), 40)}; write a list of tools' JSON schemas")
    return schemas or None


def turn_of(message: Mapping[str, Any], parts: bool) -> dict[str, Any]:
    """Return a message as a template reads it: without our own fields, a call's arguments as a mapping."""
    turn = {name: value for name, value in message.items() if name not in ("weight", "train")}
    if parts and isinstance(turn.get("content"), str):
        turn["content"] = [{"type": "text", "text": turn["content"]}]
    if turn.get("tool_calls"):
        turn["tool_calls"] = [_with_arguments(call, parsed) for call in turn["tool_calls"]]
    return turn


def inert(value: Any, pattern: re.Pattern, replaced: dict[str, str]) -> Any:
    """Replace what `pattern` finds in every string of a JSON value; `replaced` says by what."""

    def mark(match: re.Match) -> str:
        if match[0] not in replaced:
            if len(replaced) > 0xFFF0:
                raise InputError("messages: more than 65,000 private-use characters; take them out")
            replaced[match[0]] = chr(_PRIVATE + len(replaced))
        return replaced[match[0]]

    if isinstance(value, str):
        return pattern.sub(mark, value)
    if isinstance(value, Mapping):
        return {
            inert(k, pattern, replaced) if pattern.search(k) else k: inert(v, pattern, replaced)
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [inert(item, pattern, replaced) for item in value]
    return value


def render(tokenizer: Tokenizer, chat: Conversation, turns: int, generation_prompt: bool) -> str:
    """Render the first `turns` messages. Raises InputError where the template refuses them."""
    messages = chat.messages[:turns]

    def apply(messages: list[dict[str, Any]]) -> str:
        rendered = tokenizer.apply_chat_template(
            messages, tools=chat.tools, tokenize=False, add_generation_prompt=generation_prompt, **chat.kwargs
        )
        return cast(str, rendered)

    try:
        return apply(messages)
    except Exception as error:  # Jinja's raise_exception, or whatever a template does with what it doesn't know
        if any(message.get("tool_calls") for message in messages):
            with suppress(Exception):  # DeepSeek's templates want a call's arguments as text; else the first one counts
                return apply([_calls_as_text(message) for message in messages])
        roles = ", ".join(str(message["role"]) for message in messages)
        raise InputError(
            f"messages: the chat template refuses the roles {roles}: {reason(error)}; merge or drop turns"
        ) from error


def _calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = message.get("tool_calls")
    return message | {"tool_calls": [_with_arguments(call, written) for call in calls]} if calls else message


def _with_arguments(call: Any, form: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"], form)}
    return {**call, "arguments": form(call["arguments"])} if "arguments" in call else dict(call)


def parsed(arguments: Any) -> Any:
    """Return a call's arguments as a mapping, where they are JSON text (OpenAI's rows) of one."""
    try:
        value = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, Mapping) else arguments


def written(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def shared(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Return how many items two sequences (or texts) have in common at their beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((n for n, (a, b) in pairs if a != b), min(len(one), len(other)))


# ---------------------------------------------------------------------------------------------- encoding


def encode(tokenizer: Tokenizer, tokens: Tokens, chat: Conversation, text: str) -> tuple[list[int], Offsets]:
    """Encode a rendered text; return its ids and each token's characters in `text`."""
    if not chat.replaced and tokens.whole is not None:
        encoding = tokens.whole.encode(text, add_special_tokens=False)
        if tokens.whole.normalizer is None:
            return encoding.ids, encoding.offsets
        # A normaliser could make a structural token of other characters (say, of their capitals).
        wanted = sum(tokens.ids[name] in tokens.counted for name in tokens.names.findall(text))
        if sum(map(tokens.counted.__contains__, encoding.ids)) == wanted:
            return encoding.ids, encoding.offsets
    ids: list[int] = []
    offsets: Offsets = []
    position, strip_left = 0, False
    for match in [*tokens.names.finditer(text), None]:
        strip_right, strip_next = tokens.strips.get(match[0], (False, False)) if match else (False, False)
        segment = text[position : match.start() if match else len(text)]
        segment = segment.rstrip() if strip_right else segment
        if strip_left:
            position += len(segment) - len(segment.lstrip())
            segment = segment.lstrip()
        if segment:
            new, places = encode_plain(tokenizer, tokens, chat.restored(segment), first=not ids)
            ids += new
            offsets += [(position + a, position + b) for a, b in _before_restoring(chat, segment, places)]
        if match:
            ids.append(tokens.ids[match[0]])
            offsets.append(match.span())
            position, strip_left = match.end(), strip_next
    return ids, offsets


def _before_restoring(chat: Conversation, segment: str, places: Offsets) -> Offsets:
    """Return the places in `segment` of places in the text that it became."""
    if not chat.replaced:
        return places
    strings = {mark: string for string, mark in chat.replaced.items()}
    starts, position = [], 0
    for character in segment:
        starts.append(position)
        position += len(strings.get(character, character))
    return [(bisect_right(starts, a) - 1, bisect_left(starts, b)) for a, b in places]


def encode_plain(tokenizer: Tokenizer, tokens: Tokens, text: str, first: bool) -> tuple[list[int], Offsets]:
    """Encode ordinary text from the middle of a rendered one; no id is a structural token's."""
    before = "\n" if tokens.joined and not first else ""
    if tokens.plain is None:
        ids = list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True))
        places = _places(tokenizer, ids, len(text))
    else:
        encoding = tokens.plain.encode(before + text, add_special_tokens=False)
        ids, places = encoding.ids, encoding.offsets
        shift = tokens.plain.encode(before, add_special_tokens=False).ids if before else []
        if before and ids[: len(shift)] == shift:
            ids, places = ids[len(shift) :], [(max(0, a - 1), b - 1) for a, b in places[len(shift) :]]
        elif before:
            encoding = tokens.plain.encode(text, add_special_tokens=False)
            ids, places = encoding.ids, encoding.offsets
    if not tokens.counted.isdisjoint(ids):
        return _encode_broken(tokenizer, tokens, text, first)
    return ids, places


def _encode_broken(tokenizer: Tokenizer, tokens: Tokens, text: str, first: bool) -> tuple[list[int], Offsets]:
    """Encode a text in two parts that break a structural token's string, for vocabularies that have it as a word."""
    match = tokens.names.search(text)
    cut = (match.start() + match.end()) // 2 if match else 0
    if not 0 < cut < len(text):
        raise InputError(f"messages: {short(text, 40)!r} encodes to a control token; take it out of the text")
    left, places = encode_plain(tokenizer, tokens, text[:cut], first)
    right, more = encode_plain(tokenizer, tokens, text[cut:], first=False)
    return left + right, places + [(cut + a, cut + b) for a, b in more]


def _places(tokenizer: Tokenizer, ids: list[int], length: int) -> Offsets:
    """Estimate the tokens' characters for a tokenizer that does not tell them: by the lengths of their texts."""
    ends = [min(length, len(tokenizer.decode(ids[: n + 1]))) for n in range(len(ids))]
    ends[-1:] = [length]
    return list(zip([0, *ends[:-1]], ends, strict=True)) if ids else []


def _encode(tokenizer: Tokenizer, backend: Any, text: str) -> list[int]:
    if backend is None:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False))
    return cast(list[int], backend.encode(text, add_special_tokens=False).ids)


def _whole_backend(tokenizer: Tokenizer) -> Any:
    """Copy the fast tokenizer: truncation and padding may be switched on in the original."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    state["truncation"] = state["padding"] = None
    return Tokenizer.from_str(json.dumps(state))
