"""A trained reward model as a score function: messages in, scores out.

`RewardModel` brings its own tokenizer, so it scores the responses of any policy, whatever that policy's
vocabulary. An object of it has trl's reward-function signature and goes into PPOTrainer or trl's GRPOTrainer
as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.functions import Texts, conversation
from rlhf import chat
from rlhf.chat import Messages
from rlhf.errors import InputError
from rlhf.models import encoders
from rlhf.models import loading as models
from rlhf.models.scalar import ScoreNormalizer, last_token_scores, load_scalar_model
from rlhf.padding import pad
from rlhf.run import stages

logger = logging.getLogger("rlhf")

STAGES = ("reward_model", "judge")
"""Stages of a chain whose folder holds a reward model."""


class RewardModel:
    """Scores of whole responses by a trained reward model, normalised as its folder says.

    Scores are float32 and belong to a conversation alone: which others share its micro-batch changes them by
    rounding only (below 1e-5 in float32). An encoder reads so many tokens and no more (BERT: 512): of a longer
    conversation it reads the end, which is told once.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ScoreNormalizer | None = None,
        *,
        tokens_per_microbatch: int = 16384,
        name: str = "reward_model",
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.normalizer = normalizer or ScoreNormalizer()
        self.tokens_per_microbatch = tokens_per_microbatch
        self.folder: str | None = None  # where `load` found it
        self._told = False
        self._limit = encoders.position_limit(model) if encoders.is_encoder(model.config) else None
        self.__name__ = name  # trl names a reward function's columns in the log by this

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_microbatch: int = 16384,
    ) -> RewardModel:
        """The reward model of a folder (full weights or a LoRA adapter) or hub id.

        device: default the accelerator, where there is one.
        dtype: default float32. bfloat16 halves the memory and moves scores by about a percent of their spread.
        tokens_per_microbatch: padded tokens per forward; a memory setting.

        Raises InputError where the folder holds no reward model, no tokenizer, or another stage's output.
        """
        models.check_folder(path)
        _check_stage(Path(path))
        tokenizer = models.load_tokenizer(path)
        model, normalizer = load_scalar_model(path, dtype)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        nn.Module.to(model, torch.device(device) if device is not None else accelerator or torch.device("cpu"))
        scorer = cls(model, tokenizer, normalizer, tokens_per_microbatch=tokens_per_microbatch, name=Path(path).name)
        scorer.folder = str(path)
        return scorer

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        """Normalised scores, in trl's reward-function signature. A plain-text prompt is one user turn."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        return self.score([conversation(p, c) for p, c in zip(prompts, completions, strict=True)]).tolist()

    def score(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Normalised scores of conversations that end with an assistant turn, on the CPU in float32."""
        return self.normalizer(self.raw_scores(conversations))

    def raw_scores(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """What the scalar head says, before the normaliser."""
        sequences = []
        for number, messages in enumerate(conversations, start=1):
            if not messages or messages[-1]["role"] != "assistant":
                last = messages[-1]["role"] if messages else "nothing"
                raise InputError(f"conversation {number} ends with {last}; a score is of an assistant's response")
            sequences.append(chat.encode_conversation(self.tokenizer, messages)[0])
        return score_sequences(
            self.model, self._fitting(sequences), chat.pad_id(self.tokenizer), self.tokens_per_microbatch
        )

    def _fitting(self, sequences: list[list[int]]) -> list[list[int]]:
        """The sequences, shortened to what an encoder has positions for."""
        longest = max(map(len, sequences), default=0)
        if self._limit is None or longest <= self._limit:
            return sequences
        if not self._told:
            text = "%s reads %d tokens: of longer conversations (this one has %d) it reads the end"
            logger.warning(text, self.__name__, self._limit, longest)
        self._told = True
        return [encoders.shortened(ids, self._limit) for ids in sequences]


def _check_stage(folder: Path) -> None:
    """Refuse a folder whose manifest says that another stage wrote it."""
    if (folder / "manifest.json").is_file():
        stage = stages.Manifest.read(folder).stage
        if stage not in STAGES:
            raise InputError(
                f"{folder}/manifest.json: stage: this is the output of {stage!r}, no reward model; "
                f"name the folder of a stage {' or '.join(map(repr, STAGES))}"
            )


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel | PeftModel, sequences: Sequence[Sequence[int]], pad_id: int, tokens_per_microbatch: int
) -> Float[Tensor, " B"]:
    """Raw scores of token sequences, in their order, on the CPU in float32.

    Sequences of like length share a micro-batch, so little is computed on padding."""
    scores = torch.empty(len(sequences), dtype=torch.float32)
    device = next(model.parameters()).device
    for indices in length_batches([len(ids) for ids in sequences], tokens_per_microbatch):
        input_ids, mask = pad([sequences[i] for i in indices], pad_id, device)
        scores[indices] = last_token_scores(model, input_ids, mask).cpu()
    return scores


def length_batches(lengths: Sequence[int], tokens_per_microbatch: int) -> Iterator[list[int]]:
    """Indices in micro-batches of at most that many padded tokens, longest first; a longer one goes alone."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_microbatch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
