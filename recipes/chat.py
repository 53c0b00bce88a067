"""A chat with a policy in the terminal.

    rlhf chat runs/my/ppo
    rlhf chat http://127.0.0.1:8000 --model ppo

The first word is a policy's folder or a server's address. Commands: /regenerate answers again, /reset begins anew,
/quit (or Ctrl-D) ends. Ctrl-C stops an answer, which then stays as it is; a question that got none gives way to the
next one. What a model writes cannot move the cursor or change the terminal: control characters are shown. A server's
token is the environment's RLHF_SERVER_TOKEN.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Generator
from dataclasses import dataclass, field

from rlhf import config as configs
from rlhf.errors import InputError, RunStopped, visible
from rlhf.flags import first_word
from rlhf.rows.messages import Messages
from rlhf.run import console
from rlhf.urls import is_url
from rlhf_recipes.stage import SECTIONS

console.quiet()

HELP = "/regenerate answers again, /reset begins anew, /quit ends; Ctrl-C stops an answer"

Answering = Callable[[Messages, int], Generator[str]]
"""From a conversation and a seed to an answer, piece by piece."""


@dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A chat in the terminal."""

    policy: str
    """A policy's folder or hub id, or a server's address; also given as the first word, without a flag."""
    model: str | None = None
    """Which of a server's models; null: its only one."""
    system: str | None = None
    """System message; null: none."""
    temperature: float = 1.0
    """0 takes the most likely token each time."""
    top_p: float = 1.0
    """Only the likeliest tokens that have this probability together are drawn."""
    max_tokens: int = 512
    """The most tokens of an answer."""
    seed: int = 0
    """Of the first answer; each further one has the next."""
    timeout: float = 300.0
    """Seconds that a server's answer may take."""
    bf16: bool | None = None
    """Compute in bfloat16; null: where the hardware is fast at it."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or 0.001 <= self.temperature <= 2):
            raise InputError(f"temperature={self.temperature} must be 0, or from 0.001 to 2")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0, up to 1")
        if self.max_tokens < 1 or not self.timeout > 0:
            raise InputError(f"max_tokens={self.max_tokens} must be at least 1, and timeout={self.timeout} above 0")


@dataclass
class Conversation:
    """A chat: its messages, and how often it has been answered."""

    answer: Answering
    config: ChatConfig
    messages: Messages = field(default_factory=list)
    answers: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget all that was said."""
        self.messages = [{"role": "system", "content": self.config.system}] if self.config.system else []

    def say(self, line: str) -> bool:
        """Do what a line asks for; returns False where it ends the chat."""
        if line == "/quit":
            return False
        if line == "/reset":
            self.reset()
            tell("a new conversation")
        elif line == "/regenerate":
            self.regenerate()
        elif line.startswith("/"):
            tell(HELP)
        elif line:
            self.leave_unanswered()
            self.messages.append({"role": "user", "content": line})
            self.write()
        return True

    def leave_unanswered(self) -> None:
        """Take a question that got no answer out: many templates refuse two turns of a user in a row."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def regenerate(self) -> None:
        """Answer the last question again."""
        if self.messages and self.messages[-1]["role"] == "assistant":
            self.messages.pop()
        if self.messages and self.messages[-1]["role"] == "user":
            self.write()
        else:
            tell("there is nothing to answer yet")

    def write(self) -> None:
        """Print an answer as it is written; Ctrl-C stops it."""
        seed, text, ended = self.config.seed + self.answers, "", True
        self.answers += 1
        try:
            with contextlib.closing(self.answer(self.messages, seed)) as pieces:
                for piece in pieces:
                    text += piece
                    sys.stdout.write(visible(piece))
                    sys.stdout.flush()
        except KeyboardInterrupt:
            tell("\nstopped")
        except (InputError, RunStopped) as error:
            ended = False
            tell(f"\n{error}")
        print()
        if text.strip():
            self.messages.append({"role": "assistant", "content": text})
        elif ended:
            tell("(an empty answer: /regenerate asks again)")


def tell(line: str) -> None:
    """Print a line that no model wrote."""
    console.console().print(line, style="dim", markup=False, soft_wrap=True)


def from_server(config: ChatConfig) -> Answering:
    """Make what asks a server."""
    from rlhf.client import Client

    client = Client(config.policy, model=config.model, timeout=config.timeout)
    if config.model is not None:
        client = client.named(config.model)
    console.stage_line("chat", f"{client.model} on {client.url}; {HELP}")

    def answer(messages: Messages, seed: int) -> Generator[str]:
        return client.stream(
            messages, seed=seed, temperature=config.temperature, top_p=config.top_p, max_tokens=config.max_tokens
        )

    return answer


def from_folder(config: ChatConfig) -> Answering:
    """Load a policy, and make what asks it."""
    if config.model is not None:
        raise InputError(f"model={config.model}: only a server has several; leave it out")
    import torch

    from rlhf.run.precision import compute_dtype
    from rlhf.serving.decoder import Decoder, Row
    from rlhf.serving.policies import load_policies

    device = "cuda" if torch.cuda.is_available() else "cpu"
    (policy,) = load_policies({"policy": config.policy}, compute_dtype(config.bf16), device).values()
    decoder = Decoder(policy.model, policy.pad_id, 1, policy.most_tokens)
    console.stage_line("chat", f"{config.policy}; {HELP}")

    def answer(messages: Messages, seed: int) -> Generator[str]:
        prompt = policy.encode(messages)
        room = policy.most_tokens - len(prompt)
        if room < 1:
            raise InputError(f"the conversation has {len(prompt)} tokens of {policy.most_tokens}; /reset begins anew")
        row = Row(prompt, min(config.max_tokens, room), config.temperature, config.top_p, seed)
        writing = policy.chat_writing((), at_once=False)
        try:
            ((_, drawn),) = decoder.admit([row])
            while drawn.id not in policy.stop_ids:
                yield writing.add(drawn.id)[0]
                if row.written == row.max_tokens:
                    break
                ((_, drawn),) = decoder.step()
            yield writing.end(stopped=drawn.id in policy.stop_ids)[0]
        finally:
            decoder.clear()

    return answer


def talk(conversation: Conversation) -> None:
    """Read lines until /quit or the end of the input."""
    while True:
        try:
            line = input("\n> ").strip()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            tell("\n/quit or Ctrl-D ends")
            continue
        if not conversation.say(line):
            return


def main(argv: list[str]) -> None:
    words = first_word(
        argv, "policy", "rlhf chat FOLDER, or rlhf chat http://host:port", "a policy's folder or a server"
    )
    config = configs.load(ChatConfig, words, section="chat", known_sections=SECTIONS, description=__doc__ or "")
    remote = is_url(config.policy)
    talk(Conversation(from_server(config) if remote else from_folder(config), config))


if __name__ == "__main__":
    configs.run(main)
