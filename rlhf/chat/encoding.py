"""Encode conversations as token ids, by ChatML or the model's own template, safe against injected control tokens.

A finished conversation is what the template itself renders, token for token, wherever contents hold no structural
token. Trained is what the assistant must write itself: from the end of the generation prompt up to and including the
end of turn. `rendering` renders and encodes, `template` learns what a template does, `spans` finds the assistant's own
tokens.

Intended consequences:

* A structural token's string inside a message (``<|im_start|>``) stays text: it can't end a turn or forge a role. Other
  added tokens (``<think>``, ``<tool_call>``, a user's own) keep their ids.
* A conversation ends at its last end-of-turn token; anything that the template appends after it is dropped. Where the
  next turn's role marker is what ends a turn (GLM), the last turn gets that marker.
* White space that the template writes between the generation prompt and the content (Mistral's space) belongs to the
  response, and so do spaces at the end of the generation prompt: tokenizers join them to the next word.
* A template that leaves out a part of a message (thinking, a tool call, a turn) refuses the conversation, and so does
  one that writes a trained turn's content outside of the turn (Gemma 4: behind the tool's response); an earlier turn's
  thinking is left out where the template does so.
* A template whose role markers are ordinary text (Zephyr's ``<|user|>``) can be imitated by ordinary text; its
  control tokens (``</s>``) can't.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from rlhf.chat import answers, rendering, spans
from rlhf.chat import template as templates
from rlhf.chat.spans import Encoded
from rlhf.chat.template import Template, template_of
from rlhf.errors import InputError
from rlhf.rows.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>")


Row = Mapping[str, Any]
"""A row's further columns: `tools` and `chat_template_kwargs` are passed to its template."""


def encode_prompt(tokenizer: Tokenizer, messages: Messages, row: Row | None = None) -> list[int]:
    """Encode a prompt, ending with the generation prompt. Raises InputError where the template refuses its messages."""
    return spans.encode_start(tokenizer, _template(tokenizer, row), messages, (row or {}).get("tools"))


def encode_response(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a response to a short question: what the assistant writes for `text`, its end of turn included."""
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
    encoded = spans.encode_finished(tokenizer, template_of(tokenizer), asked, [False, True], None)
    return encoded.ids[encoded.answer_from :]


def encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """Encode a text that is no conversation: without a template, and no id in it is a structural token's."""
    return rendering.encode_plain(tokenizer, template_of(tokenizer).tokens, text, first=True)[0] if text else []


def encode_conversation(
    tokenizer: Tokenizer, messages: Messages, trained_from: int = 0, row: Row | None = None
) -> tuple[list[int], list[bool]]:
    """Encode a conversation that ends with an assistant turn; return its ids and mask.

    The mask is True on what the assistant writes itself (thinking block, channel header, content, end of turn) in turns
    whose index in `messages` is at least `trained_from`, unless they say ``train: False`` or ``weight: 0``.
    """
    encoded = encode(tokenizer, messages, trained_from, row)
    return encoded.ids, encoded.mask


def encode(tokenizer: Tokenizer, messages: Messages, trained_from: int = 0, row: Row | None = None) -> Encoded:
    """Encode a conversation as `encode_conversation` does; return more about it."""
    if not messages or messages[-1].get("role") != "assistant":
        seen = messages[-1].get("role") if messages else "no message"
        raise InputError(f"messages: the last turn is {seen!r}; end the conversation with an assistant turn")
    trained = [n >= trained_from and is_trained(message) for n, message in enumerate(messages)]
    return spans.encode_finished(tokenizer, _template(tokenizer, row), messages, trained, (row or {}).get("tools"))


def encode_demonstration(
    tokenizer: Tokenizer, messages: Messages, trained_from: int = 0, row: Row | None = None
) -> tuple[list[int], list[bool]]:
    """Encode as `encode_conversation` does a conversation that a policy is to imitate.

    Raises InputError, with the remedies, where its last turn does not begin as the generation prompt ends, since the
    policy would then sample from a start that was never trained.
    """
    encoded = encode(tokenizer, messages, trained_from, row)
    if not encoded.sampled:
        raise spans.refused_start(tokenizer, _template(tokenizer, row), messages, (row or {}).get("tools"))
    return encoded.ids, encoded.mask


def template_arguments(
    tokenizer: Tokenizer, messages: Messages, row: Row | None = None
) -> tuple[Messages, list[Any] | None, dict[str, Any]]:
    """Return what a library that calls `apply_chat_template` itself must hand to it: messages, tools and the template's
    settings, the tokenizer's and the row's. It then renders as we do. Raises InputError."""
    template = _template(tokenizer, row)
    turns = [rendering.turn_of(message, template.parts) for message in messages]
    return turns, rendering.schemas_of((row or {}).get("tools")), dict(template.kwargs)


def is_trained(message: Mapping[str, Any]) -> bool:
    """Return whether a turn may be trained: it doesn't say ``train: False`` or ``weight: 0``."""
    return message.get("train") is not False and message.get("weight", 1) != 0


def decode_response(tokenizer: Tokenizer, ids: Sequence[int], stops: Collection[int] | None = None) -> str:
    """Decode a response up to its first stop token, as raw text: thinking and other control tokens stay visible.

    stops: by default `stop_ids` of the tokenizer alone."""
    template = template_of(tokenizer)
    ids, stops = [int(i) for i in ids], set(stop_ids(tokenizer) if stops is None else stops)
    cut = next((n for n, i in enumerate(ids) if i in stops), len(ids))
    anchor = templates.anchor(tokenizer, template)
    text = _decode(tokenizer, anchor + ids[:cut])[len(_decode(tokenizer, anchor)) :]
    text = text.removesuffix(template.tail) if cut < len(ids) else text
    return text.removeprefix(template.lead)


def parse_response(tokenizer: Tokenizer, text: str, row: Row | None = None) -> dict[str, Any]:
    """Parse a response's raw text into a message: `content` is the answer, `reasoning_content` the thinking, if any.

    A response that ends while thinking has an empty content. A template that knows no thinking leaves all in content.
    """
    template = _template(tokenizer, row)
    if template.thinking is None:
        template.thinking = answers.thinking_of(tokenizer, template)
    return answers.parse(text, template.thinking)


def structural_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the tokens that delimit turns, which stay text inside a message, and their ids."""
    return dict(template_of(tokenizer).tokens.ids)


def end_of_turn_id(tokenizer: Tokenizer) -> int:
    """Return the token that ends a plain last turn: the template's own; eos where it writes none."""
    template = template_of(tokenizer)
    return template.tokens.ids[spans.last_end(template)]


def stop_ids(tokenizer: Tokenizer, generation_config_eos: int | list[int] | None = None) -> tuple[int, ...]:
    """Return the ids that end a response: the template's ends of turn, eos, and those of the model's generation config
    if given."""
    ends = [tokenizer.convert_tokens_to_ids(name) for name, always in template_of(tokenizer).ends.items() if always]
    ids = [end_of_turn_id(tokenizer), *ends, tokenizer.eos_token_id]
    ids += [generation_config_eos] if isinstance(generation_config_eos, int) else list(generation_config_eos or [])
    return tuple(dict.fromkeys(int(i) for i in ids if i is not None))


def pad_id(tokenizer: Tokenizer) -> int:
    """Return the padding id, or the end of turn where the tokenizer has none. Masks never depend on it."""
    return end_of_turn_id(tokenizer) if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)


def set_template_kwargs(tokenizer: Tokenizer, kwargs: Mapping[str, Any] | None) -> Tokenizer:
    """Give a tokenizer the settings that its template gets wherever it is used, and return it; they are saved with it.
    None: as it is."""
    if kwargs is not None:
        tokenizer.init_kwargs["chat_template_kwargs"] = dict(kwargs)
    return tokenizer


def template_kwargs(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the settings that this tokenizer's template gets."""
    return templates.settings(tokenizer)


def template_hash(tokenizer: Tokenizer) -> str:
    """Return sixteen hex digits of the template's hash (and its settings'): two models may share rollouts only where it
    is equal."""
    own = template_kwargs(tokenizer)
    text = templates.source(tokenizer) + (json.dumps(own, sort_keys=True) if own else "")
    return hashlib.sha256(text.encode()).hexdigest()[:16]


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
        templates.forget(tokenizer)
    vocabulary = tokenizer.get_vocab()
    return [t for t in ("<|im_start|>", "<|im_end|>", "<|pad|>") if t in vocabulary and t not in before]


def _template(tokenizer: Tokenizer, row: Row | None) -> Template:
    kwargs = (row or {}).get("chat_template_kwargs")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise InputError(
            f"chat_template_kwargs: got {type(kwargs).__name__}; write a mapping of the template's settings"
        )
    return template_of(tokenizer, kwargs)


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    return cast(str, tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
