"""Encode conversations as token ids, by ChatML or the model's own template, safe against injected control tokens.

The template is rendered once per sequence of roles, with sentinels instead of the contents. The text between the
sentinels is the template's own and is encoded with its control tokens. The contents are encoded as ordinary text, so a
message that contains ``<|im_start|>`` (or any added token's string) can't end a turn or forge a role. This is also
fast: a row costs only the encoding of its contents.

Intended consequences:

* ``encode_conversation(tok, prompt + [assistant]) == encode_prompt(tok, prompt) + encode_response(tok, text)``,
  always. The last assistant turn follows the generation prompt, whatever the template would write for a finished turn
  (Qwen3 adds an empty ``<think>`` block there). White space that the template writes between the generation prompt and
  the content (Mistral's space) belongs to the response, and so do spaces at the end of the generation prompt:
  tokenizers join them to the next word.
* A conversation ends at its last end-of-turn token; anything that the template appends after it is dropped.
* Where the template strips contents (Llama-3), so do we. Template logic that reads a content (Qwen3 removes old
  ``<think>`` blocks) doesn't run: contents are data.
* A template that writes today's date writes the date of its first use in the process.
* A template whose role markers are ordinary text (Zephyr's ``<|user|>``) can be imitated by ordinary text; its
  control tokens (``</s>``) can't.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary

from rlhf.errors import InputError, reason, short
from rlhf.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")

# An em space on either side shows whether the template strips the content.
_EDGE = "\u2003"
_OPEN, _CLOSE = "\ue000", "\ue001"
_SENTINEL = re.compile(f"({_EDGE}?){_OPEN}(\\d+){_CLOSE}({_EDGE}?)")


@dataclass(frozen=True)
class _Slot:
    """A gap in a rendered template that a message's content fills."""

    index: int  # of the message
    strip_left: bool
    strip_right: bool
    lead: str  # white space that the template writes before the content; encoded together with it
    left: str = ""  # the character before `lead`; "" after a control token

    def text(self, content: str) -> str:
        if self.strip_left:
            content = content.lstrip()
        if self.strip_right:
            content = content.rstrip()
        return self.lead + content


@dataclass(frozen=True)
class _Skeleton:
    """A template rendered for one sequence of roles: ids, slot, ids, slot, ..., ids."""

    pieces: tuple[list[int], ...]
    texts: tuple[str, ...]  # the pieces as text; spaces before a content belong to its slot
    slots: tuple[_Slot, ...]


@dataclass
class _Chat:
    """The analysis of one tokenizer and its template."""

    fingerprint: tuple
    plain: Any  # the backend with every control token switched off, or None for a tokenizer without a backend
    control: frozenset[int]  # ids that are never in an encoded content
    anchored: bool  # the start of a text adds a token (SentencePiece's space), so contents are encoded in context
    response: _Slot = field(init=False)
    tail: list[int] = field(init=False)  # from the end of the content to the end-of-turn token
    skeletons: dict[tuple, _Skeleton] = field(default_factory=dict)


_CHATS: WeakKeyDictionary[Any, _Chat] = WeakKeyDictionary()


def encode_prompt(tokenizer: Tokenizer, messages: Messages) -> list[int]:
    """Encode a prompt, ending with the generation prompt. Raises InputError where the template refuses its roles."""
    return _fill(tokenizer, messages)[0]


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a response: `text` as ordinary text, then the end-of-turn token."""
    chat = _chat(tokenizer)
    return _encode_content(tokenizer, chat, chat.response, text) + chat.tail


def encode_conversation(
    tokenizer: Tokenizer, messages: Messages, trained_from: int = 0
) -> tuple[list[int], list[bool]]:
    """Encode a conversation that ends with an assistant turn; return its ids and mask.

    The mask is True on the contents and end-of-turn tokens of assistant turns whose index in `messages` is at
    least `trained_from`. (In a template that writes no control token after an assistant turn, only the last turn
    has an end-of-turn token: eos.)
    """
    if not messages or messages[-1].get("role") != "assistant":
        seen = messages[-1].get("role") if messages else "no message"
        raise InputError(f"messages: the last turn is {seen!r}; end the conversation with an assistant turn")
    ids, spans = _fill(tokenizer, messages[:-1])
    mask = [False] * len(ids)
    for index, start, end in spans:
        if index >= trained_from and messages[index]["role"] == "assistant":
            mask[start:end] = [True] * (end - start)
    response = encode_response(tokenizer, messages[-1]["content"])
    return ids + response, mask + [len(messages) - 1 >= trained_from] * len(response)


def decode_response(tokenizer: Tokenizer, ids: list[int]) -> str:
    """Decode a response up to its first stop token. Other control tokens stay visible."""
    chat = _chat(tokenizer)
    ids = [int(i) for i in ids]
    stops = set(stop_ids(tokenizer))
    cut = next((n for n, i in enumerate(ids) if i in stops), len(ids))
    if ids[: cut + 1][-len(chat.tail) :] == chat.tail:  # the template's own text before its end of turn
        cut -= len(chat.tail) - 1
    anchor = _encode_text(tokenizer, chat, chat.response.left) if chat.anchored else []
    text = _decode(tokenizer, anchor + ids[:cut])[len(_decode(tokenizer, anchor)) :]
    return text.removeprefix(chat.response.lead)


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Return the first control token that the template writes after an assistant's content; eos where it writes
    none."""
    return _chat(tokenizer).tail[-1]


def stop_ids(tokenizer: Tokenizer, generation_config_eos: int | list[int] | None = None) -> tuple[int, ...]:
    """Return the ids that end a response: end of turn, eos, and those of the model's generation config if given."""
    ids = [end_of_turn_id(tokenizer), tokenizer.eos_token_id]
    ids += [generation_config_eos] if isinstance(generation_config_eos, int) else list(generation_config_eos or [])
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the padding id, or the end of turn where the tokenizer has none. Masks never depend on it."""
    return end_of_turn_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def template_hash(tokenizer: Tokenizer) -> str:
    """Return sixteen hex digits of the template's hash: two models may share rollouts only where it is equal."""
    return hashlib.sha256(_template(tokenizer).encode()).hexdigest()[:16]


def prepare_tokenizer(tokenizer: Tokenizer) -> list[str]:
    """Make a tokenizer ready for chat, in place; return the tokens added to its vocabulary.

    A tokenizer without a template gets ChatML, with <|im_end|> as its eos (so that other programs stop there too).
    Where there is no pad token, or it would end a turn, an unused one of its own becomes the pad token (<|pad|> and
    the like, the eos that ChatML has freed, the unknown token), or else a new <|pad|>. The caller resizes the
    embeddings by what is returned.
    """
    before = set(tokenizer.get_vocab())
    spare = [*_PADS, tokenizer.eos_token, tokenizer.unk_token]
    if not tokenizer.chat_template:
        tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"], special_tokens=True)
        tokenizer.chat_template = CHATML
        tokenizer.eos_token = "<|im_end|>"
    ends = stop_ids(tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        vocabulary = tokenizer.get_vocab()
        pad = next((t for t in spare if vocabulary.get(t, ends[0]) not in ends), "<|pad|>")
        tokenizer.add_tokens([pad], special_tokens=True)
        tokenizer.pad_token = pad
        _CHATS.pop(tokenizer, None)  # a word may have become a control token, which no length shows
    vocabulary = tokenizer.get_vocab()
    return [t for t in ("<|im_start|>", "<|im_end|>", "<|pad|>") if t in vocabulary and t not in before]


def _template(tokenizer: Tokenizer) -> str:
    template = tokenizer.chat_template
    if not template:
        raise InputError("chat template: the tokenizer has none; call rlhf.chat.prepare_tokenizer(tokenizer) first")
    return template if isinstance(template, str) else tokenizer.get_chat_template()


def _chat(tokenizer: Tokenizer) -> _Chat:
    """Return the analysis of this tokenizer, made once and renewed when its template, eos or vocabulary changes."""
    fingerprint = (
        tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else _template(tokenizer),
        tokenizer.eos_token_id,
        len(tokenizer),
    )
    chat = _CHATS.get(tokenizer)
    if chat is None or chat.fingerprint != fingerprint:
        chat = _analyse(tokenizer, fingerprint)
        _CHATS[tokenizer] = chat
    return chat


def _analyse(tokenizer: Tokenizer, fingerprint: tuple) -> _Chat:
    # Runs of spaces that some tokenizers hold as added tokens are vocabulary, not control.
    added = tokenizer.added_tokens_decoder.items()
    control = {i for i, token in added if token.special or not token.content.isspace()}
    chat = _Chat(fingerprint, _plain_backend(tokenizer, control), frozenset(control - {tokenizer.unk_token_id}), False)
    apart = _encode_text(tokenizer, chat, "\n") + _encode_text(tokenizer, chat, "a")
    chat.anchored = _encode_text(tokenizer, chat, "\na") != apart
    finished = _render(tokenizer, chat, ("user", "assistant"), generation_prompt=False)
    opening = _render(tokenizer, chat, ("user",), generation_prompt=True).texts[-1]
    slot = finished.slots[-1]
    header = finished.texts[-2] + slot.lead
    gap = header[len(opening) :] if header.startswith(opening) else ""
    left = "" if _ends_in_control(tokenizer, opening) else opening[-1:]
    chat.response = _Slot(0, slot.strip_left, slot.strip_right, gap if gap.isspace() else "", left)
    tail = finished.pieces[-1]
    end = next((n for n, i in enumerate(tail) if i in control), None)
    if end is None and tokenizer.eos_token_id is None:
        raise InputError("tokenizer: the chat template ends a turn with no control token and there is no eos; set one")
    chat.tail = [tokenizer.eos_token_id] if end is None else tail[: end + 1]
    return chat


def _plain_backend(tokenizer: Tokenizer, control: set[int]) -> Any:
    """Copy the fast tokenizer such that every control token is ordinary text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    from tokenizers import Tokenizer

    state = json.loads(backend.to_str())
    for token in state["added_tokens"]:  # special is what encode_special_tokens switches off
        token["special"] = token["id"] in control
    state["truncation"] = state["padding"] = None
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    return plain


def _encode_content(tokenizer: Tokenizer, chat: _Chat, slot: _Slot, content: str) -> list[int]:
    """Encode a message's content as in the middle of the rendered text, without control tokens."""
    text = slot.text(content)
    if chat.anchored and slot.left:
        anchor = _encode_text(tokenizer, chat, slot.left)
        ids = _encode_text(tokenizer, chat, slot.left + text)
        if ids[: len(anchor)] == anchor:
            return ids[len(anchor) :]
    return _encode_text(tokenizer, chat, text)


def _encode_text(tokenizer: Tokenizer, chat: _Chat, text: str) -> list[int]:
    """Encode ordinary text; no id is a control token's."""
    if chat.plain is not None:
        ids = chat.plain.encode(text, add_special_tokens=False).ids
    else:
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
    if not chat.control.isdisjoint(ids):
        ids = _encode_broken(tokenizer, chat, text)
    return ids


def _encode_broken(tokenizer: Tokenizer, chat: _Chat, text: str) -> list[int]:
    """Encode a text in two parts that break a control token's string, for vocabularies that have it as a word, too."""
    names = sorted((tokenizer.added_tokens_decoder[i].content for i in chat.control), key=len, reverse=True)
    name = next(name for name in [*names, ""] if name in text)
    left, _, right = text.partition(name) if name else (text, "", "")
    half = len(name) // 2
    parts = [left + name[:half], name[half:] + right] if half else [left, right]
    if text in parts:
        raise InputError(f"messages: {short(text, 40)!r} encodes to a control token; take it out of the text")
    return [i for part in parts for i in _encode_text(tokenizer, chat, part)]


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _fill(tokenizer: Tokenizer, messages: Messages) -> tuple[list[int], list[tuple[int, int, int]]]:
    """Encode a prompt; return its ids and, per slot, (message index, start, end incl. its end-of-turn token)."""
    chat = _chat(tokenizer)
    skeleton = _render(tokenizer, chat, tuple(m["role"] for m in messages), generation_prompt=True)
    ids = list(skeleton.pieces[0])
    spans = []
    for slot, piece in zip(skeleton.slots, skeleton.pieces[1:], strict=True):
        start = len(ids)
        ids += _encode_content(tokenizer, chat, slot, messages[slot.index]["content"])
        spans.append((slot.index, start, len(ids) + (len(chat.tail) if piece[: len(chat.tail)] == chat.tail else 0)))
        ids += piece
    return ids, spans


def _render(tokenizer: Tokenizer, chat: _Chat, roles: tuple[str, ...], generation_prompt: bool) -> _Skeleton:
    key = (roles, generation_prompt)
    if key not in chat.skeletons:
        chat.skeletons[key] = _render_anew(tokenizer, chat, roles, generation_prompt)
    return chat.skeletons[key]


def _render_anew(tokenizer: Tokenizer, chat: _Chat, roles: tuple[str, ...], generation_prompt: bool) -> _Skeleton:
    messages = [{"role": r, "content": f"{_EDGE}{_OPEN}{n}{_CLOSE}{_EDGE}"} for n, r in enumerate(roles)]
    try:
        rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation_prompt)
    except Exception as error:  # Jinja's raise_exception, or whatever a template does with roles it doesn't know
        raise InputError(
            f"messages: the chat template refuses the roles {', '.join(roles)}: {reason(error)}; merge or drop turns"
        ) from error
    text = cast(str, rendered)
    texts, slots, position = [], [], 0
    for match in _SENTINEL.finditer(text):
        piece = text[position : match.start()]
        texts.append(piece.rstrip(" "))
        left = "" if _ends_in_control(tokenizer, texts[-1]) else texts[-1][-1:]
        slots.append(_Slot(int(match[2]), not match[1], not match[3], piece[len(texts[-1]) :], left))
        position = match.end()
    texts.append(text[position:].rstrip(" ") if generation_prompt else text[position:])
    lost = sorted(set(range(len(roles))) - {slot.index for slot in slots})
    if lost:
        raise InputError(
            f"messages: the chat template drops turn {lost[0]} ({roles[lost[0]]}) of {', '.join(roles)}; "
            "merge it into another turn"
        )
    pieces = [_encode_piece(tokenizer, chat, t, first=n == 0) for n, t in enumerate(texts)]
    return _Skeleton(tuple(pieces), tuple(texts), tuple(slots))


def _encode_piece(tokenizer: Tokenizer, chat: _Chat, text: str, first: bool) -> list[int]:
    """Encode a template's own text, control tokens included."""
    anchor = "a" if chat.anchored and not first else ""

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)) if text else []

    left, ids = encode(anchor), encode(anchor + text)
    return ids[len(left) :] if ids[: len(left)] == left else encode(text)


def _ends_in_control(tokenizer: Tokenizer, text: str) -> bool:
    return any(text.endswith(token.content) for token in tokenizer.added_tokens_decoder.values())
