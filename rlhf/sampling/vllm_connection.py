"""A vLLM server over its own HTTP: the requests, and what is checked of the answers.

Only the standard library is imported: the trainer's environment needs no vllm.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from typing import Any

from rlhf.caller import Answer, Caller
from rlhf.errors import InputError, RunStopped

LARGEST_ANSWER = 64 * 2**20  # bytes
HEALTH_SECONDS = 10.0
POLL_SECONDS = 1.0
FULL_SOFTMAX = {
    "n": 1, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}  # fmt: skip
"""Always sent: a server's own defaults may be a hub model's."""


class ServerGone(RunStopped):
    """A server that no longer answers; the weights that it was sent are lost."""


class Server:
    """A vLLM server. Calls raise InputError for what it refuses (4xx), RunStopped for what fails.

    The environment's RLHF_SERVER_TOKEN is sent as the bearer token (`vllm serve --api-key`)."""

    def __init__(self, url: str, timeout_seconds: float):
        remedy = "ask for fewer or shorter responses"
        # no further attempts: a server that was restarted in between would answer with the weights it started with
        self.caller = Caller(url, None, timeout_seconds, 0, "a vLLM server", remedy)
        self._health = Caller(url, None, min(HEALTH_SECONDS, timeout_seconds), 0, "a vLLM server", remedy)
        self.url = self.caller.url

    def healthy(self) -> bool:
        """Return whether the server answers, and its engine runs."""
        try:
            return self._health.ask("/health", None, LARGEST_ANSWER).status == 200
        except RunStopped:
            return False

    def wait(self, gone: ServerGone, seconds: float) -> None:
        """Wait until the server is back. Raises RunStopped if it is not within `seconds`."""
        until = time.monotonic() + seconds
        while not self.healthy():
            if time.monotonic() >= until:
                raise RunStopped(
                    f"{gone}; it did not come back within {seconds:g} seconds: start it and run the same command again"
                )
            time.sleep(min(POLL_SECONDS, max(0.0, until - time.monotonic())))

    def post(self, path: str, body: object = None, known: Sequence[int] = (200,)) -> str:
        """Send JSON and return the answer's text; statuses other than those in `known` raise."""
        status, text = self._ask(path, {} if body is None else body)
        if status not in known:
            self.caller.refused(status, text)
        return text

    def get(self, path: str) -> dict[str, Any]:
        """Return the object at `path`."""
        status, text = self._ask(path, None)
        if status != 200:
            self.caller.refused(status, text)
        return self._object(text)

    def base_model(self) -> str:
        """Return the name of the model that the server was started with. Adapters have a parent."""
        rows = self.get("/v1/models").get("data")
        names = [row.get("id") for row in rows if not row.get("parent")] if isinstance(rows, list) else []
        if not names or not isinstance(names[0], str):
            raise RunStopped(f"{self.url}/v1/models: lists no model; is it a vLLM server?")
        return names[0]

    def serves(self, model: str) -> bool:
        """Return whether the server lists a model or an adapter of that name; False if it lists none."""
        try:
            rows = self.get("/v1/models").get("data")
        except (InputError, RunStopped):
            return False
        return isinstance(rows, list) and any(row.get("id") == model for row in rows)

    def settings(self) -> dict[str, Any]:
        """Return the server's settings; {} if its development endpoints are off, which tell them."""
        try:
            found = self.get("/server_info?config_format=json").get("vllm_config")
        except InputError:
            return {}
        return found if isinstance(found, dict) else {}

    def sample(
        self, model: str, prompt: Sequence[int], tokens: int, temperature: float, seed: int, stop_ids: Sequence[int]
    ) -> tuple[list[int], list[float]]:
        """Sample one response from the full softmax; return its token ids and their log-probabilities.

        Raises RunStopped for an answer that cannot be right."""
        choice = self._complete(
            model=model, prompt=list(prompt), max_tokens=tokens, temperature=temperature, seed=seed,
            stop_token_ids=list(stop_ids), logprobs=0, return_token_ids=True, return_tokens_as_token_ids=True,
        )  # fmt: skip
        try:
            return read_choice(choice, list(prompt), tokens, stop_ids)
        except (ValueError, TypeError, KeyError) as error:
            raise self._wrong(f"it sent no {error}" if isinstance(error, KeyError) else str(error)) from None

    def prompt_logprobs(self, model: str, ids: Sequence[int]) -> list[float]:
        """Return the log-probability of each token but the first, at temperature 1. Raises RunStopped as `sample`."""
        choice = self._complete(model=model, prompt=list(ids), max_tokens=1, temperature=1.0, prompt_logprobs=0)
        rows: Any = choice.get("prompt_logprobs")
        try:
            if len(rows) != len(ids):
                raise ValueError(f"{len(rows)} log-probabilities for {len(ids)} tokens of a prompt")
            return [logprob_of(row[str(token)]["logprob"], token) for row, token in zip(rows[1:], ids[1:], strict=True)]
        except (ValueError, TypeError, KeyError) as error:
            raise self._wrong(f"it sent no log-probabilities of the prompt ({error})") from None

    def _ask(self, path: str, body: object) -> Answer:
        try:
            return self.caller.ask(path, body, LARGEST_ANSWER)
        except RunStopped as error:
            if isinstance(error.__cause__, TimeoutError):
                raise
            raise ServerGone(str(error)) from None  # it may be up again by now, without the weights

    def _complete(self, **request: Any) -> dict[str, Any]:
        found = self._object(self.post("/v1/completions", FULL_SOFTMAX | {"ignore_eos": True} | request))
        choices = found.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise self._wrong("the answer has not one choice")
        return choices[0]

    def _object(self, text: str) -> dict[str, Any]:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            raise self._wrong(f"no JSON object in the answer {self.caller.shown(text)!r}")
        return found

    def _wrong(self, what: str) -> RunStopped:
        return RunStopped(f"{self.url}: {what}; look at the server's log, restart it and run the same command again")


def read_choice(
    choice: dict[str, Any], prompt: list[int], most: int, stop_ids: Sequence[int]
) -> tuple[list[int], list[float]]:
    """Read a response's token ids and their log-probabilities. Raises ValueError if they cannot be right."""
    if choice["prompt_token_ids"] != prompt:
        raise ValueError(f"it answered to other tokens than the {len(prompt)} of the prompt that it was sent")
    ids = choice["token_ids"]
    if not ids or len(ids) > most:
        raise ValueError(f"a response of {len(ids)} tokens, from 1 to {most} were asked for")
    if any(token in stop_ids for token in ids[:-1]):
        raise ValueError("a response goes on after a stop token")
    if len(ids) < most and ids[-1] not in stop_ids:
        raise ValueError(
            f"a response ended after {len(ids)} tokens of {most} without a stop token (is the server's "
            "--max-model-len too small?)"
        )
    if choice["logprobs"] is None:
        raise ValueError("it sent no log-probabilities")
    tokens, values = choice["logprobs"]["tokens"], choice["logprobs"]["token_logprobs"]
    if not len(values) == len(tokens) == len(ids):
        raise ValueError(f"{len(values)} log-probabilities for {len(ids)} tokens")
    if tokens != [f"token_id:{token}" for token in ids]:
        raise ValueError("the log-probabilities are those of other tokens than the response's")
    return ids, [logprob_of(value, token) for value, token in zip(values, ids, strict=True)]


def logprob_of(value: Any, token: int) -> float:
    """Return a token's log-probability, at most 0. Raises ValueError if it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > 1e-3:
        raise ValueError(f"the log-probability of token {token} is {value}")
    return min(float(value), 0.0)
