"""A trained process or outcome reward model as a score function: the probability that each step of a solution is right.

A causal trunk reads a solution once and gives a probability at the last token of each step, which sees nothing behind
it. An encoder sees all that it reads, so it reads the solution up to the end of each step, once per step.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.functions import Texts, conversation
from reward_models.scoring import PROCESS_FILE, RewardModel, length_batches, place, rows_of
from reward_models.steps import answer_tokens, step_ends, step_spans
from rlhf import chat
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models import loading as models
from rlhf.models.adapters import backbone
from rlhf.models.pretrained import check_folder
from rlhf.models.scalar import load_scalar_model, score_head
from rlhf.padding import pad, position_ids
from rlhf.rows.jsonl import read_object
from rlhf.rows.messages import Messages

Solution = Literal["min", "product", "last"]
"""How the probabilities of a solution's steps become one score."""


@dataclass(frozen=True, kw_only=True)
class About:
    """What a process model's folder says of it, in process.json."""

    kind: str = "process"
    """process: a probability per step; outcome: one for the whole solution."""
    head: str = "scalar"
    """scalar: one logit, of being not wrong; three_class: wrong, neutral, right."""
    separator: str = "\n"
    """Text between two steps."""
    template_hash: str = ""
    """Of the chat template that it was trained with."""

    @property
    def labels(self) -> int:
        """Return how many numbers the head gives."""
        return 3 if self.head == "three_class" else 1

    def save(self, folder: str | Path) -> None:
        """Write process.json."""
        Path(folder, PROCESS_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: str | Path) -> About:
        """Read process.json. Raises InputError where the folder holds no process model."""
        content = read_object(
            Path(folder, PROCESS_FILE), f"{folder} holds no process model; train one", "process model"
        )
        fields: dict[str, tuple[str, ...]] = {"kind": ("process", "outcome"), "head": ("scalar", "three_class")}
        for name, known in fields.items():
            if content.get(name) not in known:
                raise InputError(
                    f"{folder}/{PROCESS_FILE}: {name}: got {content.get(name)!r}; one of {', '.join(known)}"
                )
        separator, template = content.get("separator"), content.get("template_hash")
        if not isinstance(separator, str) or not separator or not isinstance(template, str):
            raise InputError(
                f"{folder}/{PROCESS_FILE}: separator and template_hash must be texts; copy the folder again"
            )
        return cls(kind=content["kind"], head=content["head"], separator=separator, template_hash=template)


# ------------------------------------------------------------------------------------------------ reading


class Reading(NamedTuple):
    """A solution as a model reads it: token sequences, and the positions in each at which a probability is read.

    Over all sequences these are one per step, in their order; of an outcome model one. Without a step there is none."""

    sequences: list[list[int]]
    ends: list[list[int]]


def read_solution(
    tokenizer: PreTrainedTokenizerBase,
    about: About,
    encoder: bool,
    messages: Messages,
    row: Mapping[str, Any],
    sampled: Sequence[int] | None = None,
) -> Reading:
    """Encode a conversation that ends with a solution, for training and scoring alike.

    encoder: the trunk is one. sampled: the ids of the solution, as of `answer_tokens`."""
    content = messages[-1]["content"]
    spans = step_spans(content, about.separator)
    if about.kind == "process" and not spans:
        return Reading([], [])
    if about.kind == "process" and encoder:
        texts = [[*messages[:-1], {**messages[-1], "content": content[:last]}] for _, last in spans]
        parts = [chat.encode(tokenizer, text, len(text) - 1, row).ids for text in texts]
        return Reading(parts, [[len(ids) - 1] for ids in parts])
    prompt, own = answer_tokens(tokenizer, messages, row, sampled)
    if about.kind == "outcome":
        return Reading([prompt + own], [[len(prompt) + len(own) - 1]])
    ends = step_ends(tokenizer, own, content, about.separator)
    if len(ends) != len(spans):
        raise InputError(
            f"separator {about.separator!r}: the tokenizer makes {len(ends)} steps of a solution's {len(spans)}; "
            "choose one that its tokens keep, say a line break"
        )
    places = [len(prompt) + end for end in ends]
    return Reading([(prompt + own)[: places[-1] + 1]], [places])


def step_logits(
    model: PreTrainedModel | PeftModel,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Int[Tensor, "B T"],
    sequences: Int[Tensor, " n"],
    ends: Int[Tensor, " n"],
) -> Float[Tensor, "n ..."]:
    """Compute the head's numbers, [n] or [n, 3] in float32, at positions `ends` of the rows `sequences`, which are
    padded on the right. An encoder's own head reads a whole row."""
    if encoders.is_encoder(model.config):
        return encoders.encoder_scores(model, input_ids, attention_mask)[sequences]
    mask = attention_mask.long()
    hidden = backbone(model)(
        input_ids=input_ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False
    ).last_hidden_state
    head = score_head(model)
    return head(hidden[sequences, ends].to(cast(Tensor, head.weight).dtype)).squeeze(-1).float()


@torch.no_grad()
def read_logits(
    model: PreTrainedModel | PeftModel, readings: Sequence[Reading], pad_id: int, tokens_per_microbatch: int
) -> list[Float[Tensor, "n ..."]]:
    """Return each reading's numbers, on the CPU; of one without steps, none."""
    flat = [(ids, ends) for reading in readings for ids, ends in zip(*reading, strict=True)]
    found: list[Tensor] = [torch.zeros(0)] * len(flat)
    device = next(model.parameters()).device
    for indices in length_batches([len(ids) for ids, _ in flat], tokens_per_microbatch):
        input_ids, mask = pad([flat[i][0] for i in indices], pad_id, device)
        sizes = [len(flat[i][1]) for i in indices]
        rows = torch.arange(len(indices), device=device).repeat_interleave(torch.tensor(sizes, device=device))
        ends = torch.tensor([end for i in indices for end in flat[i][1]], device=device)
        logits = step_logits(model, input_ids, mask.long(), rows, ends).cpu()
        for i, part in zip(indices, logits.split(sizes), strict=True):
            found[i] = part
    parts = iter(found)
    return [torch.cat([next(parts) for _ in reading.sequences] or [torch.zeros(0)]) for reading in readings]


def probabilities(logits: Float[Tensor, "n ..."]) -> Float[Tensor, " n"]:
    """Compute the probability that a step is not wrong: ``sigmoid(z)``, or of three classes ``1 - softmax(z)[0]``."""
    return torch.sigmoid(logits) if logits.dim() == 1 else 1 - torch.softmax(logits, dim=-1)[:, 0]


# ------------------------------------------------------------------------------------------------ scores


def solution_score(steps: Sequence[float], solution: Solution) -> float:
    """Compute a solution's score from its steps' probabilities: the lowest, their product, or the last; 0 without a
    step."""
    if not steps:
        return 0.0
    if solution == "min":
        return min(steps)
    return math.prod(steps) if solution == "product" else steps[-1]


def step_changes(steps: Sequence[float], solution: Solution) -> list[float]:
    """Compute by how much each step changes the solution's score, which is 1 before the first step: their sum is the
    score less 1, whatever the number of steps, so that more steps earn nothing.

    (A difference of potentials: Ng, Harada and Russell 1999. The sum of the probabilities would reward many steps.)"""
    scores = [1.0, *(solution_score(steps[: n + 1], solution) for n in range(len(steps)))]
    return [after - before for before, after in pairwise(scores)]


class ProcessModel:
    """A trained process or outcome reward model, which scores solutions as a reward function does.

    A solution's score is `solution` of the probabilities that its steps are not wrong: their `min` (the default),
    `product`, or the `last` one; a response without a step scores 0. In PPO, `step_score_coef` adds step scores: by how
    much each step changes that score (`step_changes`), at the step's last token. Thinking (`reasoning_content`) is left
    out. An encoder reads a limited number of tokens; of a longer solution it reads the end, with one warning.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        about: About,
        *,
        solution: Solution = "min",
        tokens_per_microbatch: int = 16384,
        name: str = "process_model",
    ) -> None:
        if solution not in ("min", "product", "last"):
            raise InputError(f"solution={solution!r} must be min, product or last")
        self._scorer = RewardModel(model, tokenizer, tokens_per_microbatch=tokens_per_microbatch, name=name)
        self._encoder = encoders.is_encoder(model.config)
        self.model, self.tokenizer, self.about, self.solution = self._scorer.model, tokenizer, about, solution
        self.tokens_per_microbatch = tokens_per_microbatch
        self.folder: str | None = None  # the path that `load` read
        self.__name__ = name

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        solution: Solution = "min",
        tokens_per_microbatch: int = 16384,
    ) -> ProcessModel:
        """Load the process or outcome model of a folder (full weights or a LoRA adapter).

        device: by default the accelerator, where there is one. dtype: by default float32. tokens_per_microbatch: padded
        tokens per forward; a memory setting. Raises InputError where the folder holds no process model, or another chat
        template than the one it was trained with.
        """
        check_folder(path)
        about = About.read(path)
        tokenizer = models.load_tokenizer(path)
        if about.template_hash != chat.template_hash(tokenizer):
            raise InputError(
                f"{path}: its chat template is not the one that it was trained with; copy the folder again"
            )
        model, _ = load_scalar_model(path, dtype, about.labels)
        place(model, device)
        settings: dict[str, Any] = {"solution": solution, "tokens_per_microbatch": tokens_per_microbatch}
        loaded = cls(model, tokenizer, about, **settings, name=Path(path).name)
        loaded.folder = str(path)
        return loaded

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        completion_ids: Sequence[Sequence[int]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        give_step_scores: Callable[[list[list[float]]], None] | None = None,
        stop_ids: Sequence[int] | None = None,
        parsed_completions: Messages | None = None,
        **columns: object,
    ) -> list[float]:
        """Return solution scores, from 0 to 1. A plain-text prompt is one user turn.

        processing_class: the policy's tokenizer. Where it is this model's, too, a solution is read as the ids that were
        sampled, up to one of `stop_ids` (default: the tokenizer's); step scores are placed by its tokens.
        parsed_completions: as for `RewardModel`."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        rows = rows_of(columns, len(completions))
        ids = self._scorer.sampled_ids(completion_ids, processing_class, stop_ids)
        completions = self._scorer.with_thinking(completions, parsed_completions, ids, rows)
        talks = [_plain(conversation(p, c)) for p, c in zip(prompts, completions, strict=True)]
        messages = [talk for talk, _ in talks]
        sampled = [None if ids is None or thought else ids[number] for number, (_, thought) in enumerate(talks)]
        steps = self._steps(messages, rows, sampled)
        scores = [solution_score(own, self.solution) for own in steps]
        if give_step_scores is None or completion_ids is None or processing_class is None:
            return scores
        if self.about.kind == "process":
            responses = zip(completion_ids, messages, steps, strict=True)
            give_step_scores([self._placed(processing_class, *response) for response in responses])
        return scores

    def score(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return solution scores of conversations that end with an assistant turn."""
        return torch.tensor([solution_score(own, self.solution) for own in self.step_probabilities(conversations)])

    def step_probabilities(self, conversations: Sequence[Messages]) -> list[list[float]]:
        """Return, per conversation that ends with a solution, the probability of each step that it is not wrong; of an
        outcome model, one probability, of the solution."""
        plain = [_plain(messages)[0] for messages in conversations]
        return self._steps(plain, [{}] * len(plain), [None] * len(plain))

    def _steps(
        self,
        talks: Sequence[Messages],
        rows: Sequence[Mapping[str, object]],
        sampled: Sequence[Sequence[int] | None],
    ) -> list[list[float]]:
        readings = []
        for number, (messages, row, ids) in enumerate(zip(talks, rows, sampled, strict=True), start=1):
            if not messages or messages[-1]["role"] != "assistant":
                last = messages[-1]["role"] if messages else "nothing"
                raise InputError(f"conversation {number} ends with {last}; a score is of an assistant's response")
            read = read_solution(self.tokenizer, self.about, self._encoder, messages, row, ids)
            readings.append(Reading(self._scorer.fitting(read.sequences), read.ends))
        pad_id = chat.pad_id(self.tokenizer)
        logits = read_logits(self.model, readings, pad_id, self.tokens_per_microbatch)
        return [probabilities(own).tolist() for own in logits]

    def _placed(
        self, tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], messages: Messages, steps: Sequence[float]
    ) -> list[float]:
        """Return a number per token of a response: at the last token of each step the change of the score, else 0."""
        scores = [0.0] * len(ids)
        ends = step_ends(tokenizer, ids, messages[-1]["content"], self.about.separator)
        if len(ends) != len(steps):
            raise InputError(
                f"{self.__name__}: {len(steps)} steps are {len(ends)} in the policy's tokens; choose a separator that "
                "both tokenizers keep"
            )
        for end, change in zip(ends, step_changes(steps, self.solution), strict=True):
            scores[end] += change
        return scores


def _plain(messages: Messages) -> tuple[Messages, bool]:
    """Return a conversation without the last turn's thinking, and whether there was any."""
    thought = bool(messages) and "reasoning_content" in messages[-1]
    if not thought:
        return messages, False
    return [*messages[:-1], {k: v for k, v in messages[-1].items() if k != "reasoning_content"}], True
