"""What is asked: a model's folder (an adapter's, too) in this process, or a server that speaks OpenAI's HTTP.

Both answer the same calls, and both say what decides their answers, for the file of answers.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlhf.errors import InputError
from rlhf.rows.messages import Messages
from rlhf.run.fingerprint import canonical, of_path

if TYPE_CHECKING:
    import torch

    from rlhf.client import Client
    from rlhf.evals.asks import Asks

SEEDS = 2**31
"""Seeds are below this: what OpenAI's HTTP takes everywhere."""


@dataclass(frozen=True)
class Prompt:
    """A conversation to be answered, as its target reads it."""

    messages: Messages
    ids: tuple[int, ...]
    """Its token ids, generation prompt included; () where a server renders it."""

    @property
    def content(self) -> list[Any]:
        """What of it decides an answer."""
        return list(self.ids) if self.ids else self.messages


@dataclass(frozen=True)
class Answer:
    """An answer as it was written, without the thinking before it."""

    text: str
    stopped: bool
    """It ended by itself, before the most tokens that it might have."""
    tokens: int | None = None
    thought: str = ""


class Target(Protocol):
    """A model that is asked."""

    name: str
    fingerprint: str
    """What tells its answers from those of other models."""

    def prompt(self, messages: Messages) -> Prompt: ...
    def check(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None: ...
    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[Answer]: ...
    def logprobs(self, prompt: Prompt, answers: Sequence[str]) -> list[float]: ...
    def asks(self) -> Asks: ...


def open_target(model: str, bf16: bool | None, rows: int, tokens_per_microbatch: int, at_once: int) -> Target:
    """Open a model: a folder, a hub id, or the address of a server, for which torch is not loaded. Raises InputError.

    bf16: as in a recipe's settings; null: where the hardware is fast at it."""
    if re.match(r"https?://", model):
        return Server(model, at_once)
    from rlhf.run.precision import compute_dtype

    return Local(model, compute_dtype(bf16), rows, tokens_per_microbatch)


class Local:
    """A model in this process, sampled by the decode loop that PPO uses."""

    def __init__(self, model: str, dtype: torch.dtype, rows: int, tokens_per_microbatch: int) -> None:
        from rlhf import chat, policies
        from rlhf.models import loading
        from rlhf.sampling.engine import model_stop_ids

        self.name = model
        self.fingerprint = f"{of_path(model)} {dtype}"
        self.tokenizer = loading.load_tokenizer(model)
        self.model: Any = policies.load(model, dtype)
        stops = model_stop_ids(self.model, self.tokenizer)
        self.engine = policies.SharedEngine(self.model, stops, chat.pad_id(self.tokenizer), rows)
        self.tokens_per_microbatch = tokens_per_microbatch

    def prompt(self, messages: Messages) -> Prompt:
        """Encode a conversation. Raises InputError where the template refuses it."""
        from rlhf import chat

        return Prompt(messages, tuple(chat.encode_prompt(self.tokenizer, messages)))

    def check(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raise InputError where the model lacks positions for a prompt and its answer, before any is asked."""
        from rlhf.models.positions import check_responses

        check_responses(self.model, [prompt.ids for prompt in prompts], max_new_tokens)

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[Answer]:
        """Sample one answer to each prompt by its own seed, whatever stands beside it."""
        from rlhf import chat
        from rlhf.sampling.engine import RowGenerator

        generator = RowGenerator.of(list(seeds), seeds[0], self.model.device)
        ids = [list(prompt.ids) for prompt in prompts]
        found = self.engine.generate(ids, max_new_tokens, temperature, generator)
        answers = []
        for row, stopped in zip(found.ids, found.stopped, strict=True):
            text = chat.decode_response(self.tokenizer, row, self.engine.stop_ids)
            message = chat.parse_response(self.tokenizer, text)
            answers.append(Answer(message["content"], stopped, len(row), message.get("reasoning_content", "")))
        return answers

    def logprobs(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Compute the log-probability in nats of each text as the whole answer, its end of turn included."""
        import torch

        from rlhf import chat
        from rlhf.models.forward import response_logprobs
        from rlhf.models.positions import check_responses
        from rlhf.padding import make_batch

        finished = [
            chat.encode(
                self.tokenizer, [*prompt.messages, {"role": "assistant", "content": text}], len(prompt.messages)
            )
            for text in answers
        ]
        before = [encoded.ids[: encoded.answer_from] for encoded in finished]
        own = [encoded.ids[encoded.answer_from :] for encoded in finished]
        check_responses(self.model, before, max(map(len, own)))
        batch = make_batch(before, own, chat.pad_id(self.tokenizer), self.model.device)
        with torch.no_grad():
            found: list[float] = response_logprobs(self.model, batch, 1.0)[0].sum(-1).tolist()
        return found

    def asks(self) -> Asks:
        """Return what asks this model for one of several choices."""
        from rlhf.evals import asks

        return asks.LocalModel(self.model, self.tokenizer, self.tokens_per_microbatch)


class Server:
    """A server that speaks OpenAI's HTTP, asked several questions at a time.

    Its answers are told from others' by its address and the name of its model: a server that serves other weights
    under the same name needs another file of answers (`--answers`)."""

    def __init__(self, url: str, at_once: int = 8) -> None:
        from rlhf.client import Client

        self.client: Client = Client(url)
        self.name = f"{self.client.url} ({self.client.model})"
        self.fingerprint = hashlib.sha256(canonical([self.client.url, self.client.model])).hexdigest()
        self.at_once = at_once

    def prompt(self, messages: Messages) -> Prompt:
        """Leave the rendering to the server."""
        return Prompt(messages, ())

    def check(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Leave it to the server, which refuses what is too long."""

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], max_new_tokens: int, temperature: float
    ) -> list[Answer]:
        """Ask for one answer to each prompt. Raises InputError and RunStopped, as the client does."""

        def one(prompt: Prompt, seed: int) -> Answer:
            options: dict[str, Any] = {"seed": seed, "temperature": temperature, "max_tokens": max_new_tokens}
            (found,) = self.client.chat(prompt.messages, **options)
            return Answer(found.text, found.finish_reason == "stop", None, found.reasoning)

        with ThreadPoolExecutor(self.at_once) as threads:
            return list(threads.map(one, prompts, seeds))

    def logprobs(self, prompt: Prompt, answers: Sequence[str]) -> list[float]:
        """Raise InputError: a server cannot be told where an answer ends in its template's tokens."""
        raise InputError(f"{self.name}: likelihood scoring needs the model's folder; a server only gives samples")

    def asks(self) -> Asks:
        """Return what asks this server for one of several choices."""
        from rlhf.evals import asks

        return asks.OverTheWire(self.client, self.at_once)
