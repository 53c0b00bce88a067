"""The policies that a server has, by name: a run's base, sft and ppo, or folders. Equal weights are held once."""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rlhf import chat
from rlhf.chat import template as templates
from rlhf.errors import InputError
from rlhf.models.adapters import adapter_of, base_model, base_name
from rlhf.models.loading import load_policy, load_tokenizer
from rlhf.models.positions import positions_of
from rlhf.rows.messages import Messages
from rlhf.run.fingerprint import data_fingerprint
from rlhf.run.stages import Manifest
from rlhf.sampling.decode import decoding_fault
from rlhf.sampling.engine import model_stop_ids
from rlhf.serving import cache as caches
from rlhf.serving.text import Decode, Decoding, Writing

STAGES = ("base", "sft", "ppo")
"""What `run` serves of a run; its baselines are named one by one."""


@dataclass(eq=False)
class Policy:
    """A model that answers, with what is needed to encode for it and to decode what it writes."""

    name: str
    model: Any
    tokenizer: PreTrainedTokenizerBase
    fingerprint: str
    """Of its files, as rollouts and stores name it."""

    def __post_init__(self) -> None:
        self.stop_ids = frozenset(model_stop_ids(self.model, self.tokenizer))
        self.pad_id = chat.pad_id(self.tokenizer)
        positions = positions_of(self.model)
        self.most_tokens = 2**31 if positions is None else positions.limit
        self.vocabulary: int = self.model.get_input_embeddings().weight.shape[0]
        self.longest_token = max(map(len, self.tokenizer.get_vocab()), default=1)
        # a copy: prompts are encoded in another thread
        self._decode: Decode = functools.partial(  # type: ignore[assignment]
            copy.deepcopy(self.tokenizer).decode, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        template = templates.template_of(self.tokenizer)
        self._anchor = templates.anchor(self.tokenizer, template)
        self._around = template.lead, template.tail
        self._letter: list[int] = self.tokenizer.encode("a", add_special_tokens=False)
        self._texts: dict[int, str] = {}

    def encode(self, messages: Messages) -> list[int]:
        """Encode a conversation up to the answer. Thinking in earlier answers, which are sent back as they were
        written, goes where the template has it. Raises InputError where the template refuses the messages."""
        told = []
        for message in messages:
            parsed = {}
            if message["role"] == "assistant" and "reasoning_content" not in message:
                parsed = chat.parse_response(self.tokenizer, message["content"])
            told.append({**message, **parsed} if parsed.get("content") else message)
        return chat.encode_prompt(self.tokenizer, told)

    def chat_writing(self, stops: tuple[str, ...], at_once: bool) -> Writing:
        """Make what turns an answer's tokens into text, as `rlhf.chat.decode_response` does."""
        return Writing(Decoding(self._decode, self._anchor, *self._around), stops, at_once)

    def text_writing(self, prompt: list[int], stops: tuple[str, ...], at_once: bool) -> Writing:
        """Make what turns the tokens after a plain prompt into text."""
        return Writing(Decoding(self._decode, prompt[-8:]), stops, at_once)

    def token_text(self, token: int) -> str:
        """Return a token's own text, with the space before it."""
        if token not in self._texts:
            before, whole = self._decode(self._letter), self._decode([*self._letter, token])
            self._texts[token] = whole[len(before) :] if whole.startswith(before) else self._decode([token])
        return self._texts[token]

    def prompt_text(self, prompt: list[int]) -> str:
        """Return the text of a prompt that was given as ids."""
        return self._decode(prompt)


def policies_of_run(run: str) -> dict[str, str]:
    """Return the policies that a run has by now: stage -> folder. Raises InputError where there is none."""
    folder = Path(run)
    stages = {name: folder / name for name in STAGES}
    found = {name: str(stage) for name, stage in stages.items() if any(stage.glob("*config.json")) and _done(stage)}
    if "base" not in found and "sft" in found and (folder / "sft" / "manifest.json").is_file():
        base = Manifest.read(folder / "sft").base_model
        if base and Path(base).is_dir():
            found = {"base": base, **found}
    if not found:
        raise InputError(f"run={run}: no complete base, sft or ppo stage in it; name a run's folder, or a --model")
    return found


def _done(folder: Path) -> bool:
    return (folder / "manifest.json").is_file() or not (folder / "inputs.json").is_file()


def load_policies(folders: Mapping[str, str], dtype: torch.dtype | None, device: str) -> dict[str, Policy]:
    """Load policies by name -> folder or hub id. Raises InputError for one that the decode loop does not fit."""
    loaded: dict[str, Policy] = {}
    for name, folder in folders.items():
        tokenizer = load_tokenizer(folder)
        model: Any = load_policy(folder, dtype=dtype)
        model.requires_grad_(False).eval().to(device)
        share_weights(model, [policy.model for policy in loaded.values()])
        check(model, chat.pad_id(tokenizer), folder)
        loaded[name] = Policy(name, model, tokenizer, fingerprint_of(folder))
    return loaded


def share_weights(model: nn.Module, others: list[nn.Module]) -> int:
    """Let a model use those weights of others that equal its own, so that a base under several adapters is in memory
    once. Nothing may be trained afterwards. Return the number of shared tensors."""
    shared = 0
    for other in others:
        held = {_plain_name(name): weight for name, weight in other.named_parameters() if adapter_of(name) is None}
        for name, weight in model.named_parameters():
            twin = held.get(_plain_name(name)) if adapter_of(name) is None else None
            if twin is None or twin.data_ptr() == weight.data_ptr():
                continue
            if (twin.shape, twin.dtype, twin.device) == (weight.shape, weight.dtype, weight.device) and twin.equal(
                weight
            ):
                weight.data = twin.data
                shared += 1
    return shared


def _plain_name(name: str) -> str:
    return base_name(name).removeprefix("base_model.model.")


def check(model: PreTrainedModel, pad_id: int, name: str) -> None:
    """Raise InputError for a model whose rows cannot be decoded together."""
    fault = decoding_fault(model, pad_id)
    if fault is not None:
        family = type(base_model(model)).__name__
        raise InputError(
            f"{name}: {family}: {fault}; serve it with vLLM and name that server: --upstream http://host:port"
        )
    caches.check(DynamicCache(config=model.config))


def fingerprint_of(folder: str) -> str:
    """Return what identifies a policy: its stage's manifest, else its files, else its name."""
    path = Path(folder)
    if (path / "manifest.json").is_file():
        return Manifest.read(path).fingerprint
    return data_fingerprint(path) if path.exists() else folder
