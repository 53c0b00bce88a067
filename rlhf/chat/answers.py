"""Parse a sampled response into a message: its thinking and its answer, told apart as the chat template writes them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlhf.chat import rendering
from rlhf.chat.template import Template, prepared, source, word
from rlhf.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_THOUGHT = word(5)
_TAG = re.compile(r"(?:<[^<>\s]+>|\[[^\[\]\s]+\])$")


@dataclass(frozen=True)
class Thinking:
    """How a template writes thinking. Empty strings: it knows none, and a response is its answer."""

    open: str = ""
    close: str = ""
    answer: str = ""
    """What stands before an answer without thinking: GPT-OSS's channel header."""
    opened: bool = False
    """The generation prompt has opened it already."""


def thinking_of(tokenizer: Tokenizer, template: Template) -> Thinking:
    """Learn from a rendered probe how the template writes thinking; where it leaves thinking out but speaks of
    ``</think>`` (R1, QwQ), it is that."""
    asked = {"role": "user", "content": word(0)}
    plain = prepared(template, [asked, {"role": "assistant", "content": word(1)}])
    thought = prepared(template, [asked, {"role": "assistant", "content": word(1), "reasoning_content": _THOUGHT}])
    prompt = rendering.render(tokenizer, plain, 1, generation_prompt=True)
    answered = rendering.render(tokenizer, plain, 2, generation_prompt=False)
    before = answered[rendering.shared(answered, prompt) : answered.index(word(1))]
    answer = before.strip() if template.tokens.names.search(before) else ""
    try:
        text = rendering.render(tokenizer, thought, 2, generation_prompt=False)
    except InputError:
        text = ""
    if _THOUGHT in text and word(1) in text[text.index(_THOUGHT) :]:
        place = text.index(_THOUGHT)
        close = text[place + len(_THOUGHT) : text.index(word(1), place)].strip()
        if text.startswith(prompt) and text[len(prompt) : place].strip():
            return Thinking(text[len(prompt) : place].strip(), close, answer)
        tag = _TAG.search(text[:place].rstrip())  # the generation prompt writes it, and may close it at once
        if tag:
            return Thinking(tag[0], close, answer, prompt.rstrip().endswith(tag[0]))
    if "</think>" in source(tokenizer) or "<think>" in template.opening:
        return Thinking("<think>", "</think>", answer, template.opening.rstrip().endswith("<think>"))
    return Thinking(answer=answer)


def parse(text: str, how: Thinking) -> dict[str, Any]:
    """Return the message that a response's text is: `content` is the answer, `reasoning_content` the thinking, if any.

    A response that ends while thinking has no answer: its content is empty.
    """
    message: dict[str, Any] = {"role": "assistant", "content": text}
    body = text.lstrip()
    if how.close:
        begun = body.startswith(how.open)
        if begun or how.opened or (how.close in body and not body.startswith(how.answer or how.close)):
            thought, closed, answer = body.removeprefix(how.open).partition(how.close)
            message["content"] = answer.lstrip() if closed else ""
            if thought.strip():
                message["reasoning_content"] = thought.strip()
            return message
        message["content"] = body
    if how.answer and how.answer in text:
        message["content"] = text.rpartition(how.answer)[2]
    return message
