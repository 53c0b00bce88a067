"""Messages read back from a prompt that a chat template has rendered.

Trainers that send a reward model text (OpenRLHF) send the prompt as the policy read it: plain text, or messages
rendered by the policy's chat template. A reward model encodes messages, so they are read back here, and believed only
if the template renders them to the same text again: another family's template is refused, never scored as if it were
words.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rlhf import chat
from rlhf.errors import InputError, short
from rlhf.rows.messages import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MARKS = ("zqsystemqz", "zqaskedqz", "zqansweredqz", "zqagainqz")  # words that no template writes
FOREIGN = re.compile(r"<\|\w+\|>|<｜[^｜]+｜>|\[/?INST\]|<(?:start|end)_of_turn>|<SPECIAL_\d+>")
"""Control tokens of the families that people train, in a text that would be no words."""

ReadText = Callable[[str, str], Messages]
"""From a prompt and the prompt with its response, both texts, to the conversation."""


class RenderedReader:
    """Reads conversations back from text, by the chat template of a reward model's tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.structural = chat.structural_tokens(tokenizer)
        self.stops = [str(tokenizer.convert_ids_to_tokens(i)) for i in chat.stop_ids(tokenizer)]
        ask, answer, again = ({"role": role, "content": mark} for role, mark in zip(_ROLES, MARKS[1:], strict=True))
        self.shapes: list[tuple[str, list[str]]] = []  # the first turn's role, and what stands around the marks
        for first in ([], [{"role": "system", "content": MARKS[0]}]):  # a template may write a system turn of its own
            text = self._rendered([*first, ask, answer, again])
            if text is not None and all(text.count(mark) == 1 for mark in MARKS[1 - len(first) :]):
                between = re.split("|".join(MARKS), text)
                self.shapes.append(("system" if first else "user", between))

    def __call__(self, prompt: str, query: str) -> Messages:
        """Return the conversation of a prompt and a `query`, which is the prompt with its response.

        One end of turn behind the response is not part of it. Raises InputError for a text that this template cannot
        have rendered."""
        if not query.startswith(prompt):
            raise InputError(
                "query does not begin with its prompt; send prompt + response, decoded with control tokens"
            )
        response = query[len(prompt) :]
        stop = next((stop for stop in self.stops if response.rstrip("\n").endswith(stop)), None)
        if stop is not None:
            response = response.rstrip("\n").removesuffix(stop)
        return [*self.messages(prompt), {"role": "assistant", "content": response}]

    def messages(self, prompt: str) -> Messages:
        """Return a prompt's messages: one user turn for plain text, else those that the template renders to it."""
        if not any(name in prompt for name in self.structural) and not FOREIGN.search(prompt):
            return [{"role": "user", "content": prompt}]
        for role, between in self.shapes:
            messages = _parsed(prompt, role, between)
            if messages is not None and self._rendered(messages) == prompt:
                return messages
        raise InputError(
            f"prompt {short(prompt, 60)!r} has control tokens, but not as this reward model's chat template sets them; "
            "send plain text, or render with the template in the reward model's folder"
        )

    def _rendered(self, messages: Messages) -> str | None:
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
        except Exception:  # a template that refuses such roles
            return None


_ROLES = ("user", "assistant", "user")


def _parsed(prompt: str, role: str, between: Sequence[str]) -> Messages | None:
    """Cut a prompt at the texts that stand between the turns; None where it does not begin and end as they do."""
    start, *gaps, end = between
    if not (prompt.startswith(start) and prompt.endswith(end) and len(prompt) >= len(start) + len(end)):
        return None
    rest, messages = prompt[len(start) : len(prompt) - len(end)], list[dict[str, str]]()
    if role == "system":
        content, gap, rest = rest.partition(gaps.pop(0))
        if not gap:
            return None
        messages.append({"role": "system", "content": content})
    asked = True
    while True:
        content, gap, after = rest.partition(gaps[0] if asked else gaps[1])
        messages.append({"role": "user" if asked else "assistant", "content": content})
        if not gap:
            return messages if asked else None
        rest, asked = after, not asked
