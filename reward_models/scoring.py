"""A trained reward model as a score function: messages in, scores out.

`RewardModel` has its own tokenizer, so it scores the responses of any policy, whatever that policy's vocabulary. It has
trl's reward-function signature: pass it to PPOTrainer or trl's GRPOTrainer as it is.
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
from rlhf.errors import InputError
from rlhf.messages import Messages
from rlhf.models import encoders
from rlhf.models import loading as models
from rlhf.models.positions import positions_of
from rlhf.models.pretrained import check_folder
from rlhf.models.scalar import ScoreNormalizer, last_token_scores, load_scalar_model
from rlhf.padding import pad
from rlhf.run import stages

logger = logging.getLogger("rlhf")

STAGES = ("reward_model", "judge")
"""Stages of a chain whose folder holds a reward model."""


class RewardModel:
    """A trained reward model that scores whole responses, normalised by the normaliser in its folder.

    Scores are float32 and depend on the conversation alone: the other conversations in a micro-batch change them by
    rounding only (below 1e-5 in float32). An encoder reads a limited number of tokens (BERT: 512); of a longer
    conversation it reads the end, with one warning.
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
        self.folder: str | None = None  # the path that `load` read
        self._warned = False
        self._limit = encoders.position_limit(model) if encoders.is_encoder(model.config) else None
        self._positions = positions_of(model)
        self.__name__ = name  # trl logs a reward function under this name

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_microbatch: int = 16384,
    ) -> RewardModel:
        """Load the reward model of a folder (full weights or a LoRA adapter) or hub id.

        device: by default the accelerator, where there is one.
        dtype: by default float32. bfloat16 halves the memory and moves scores by about a percent of their spread.
        tokens_per_microbatch: padded tokens per forward; a memory setting.

        Raises InputError where the folder holds no reward model, no tokenizer, or another stage's output.
        """
        check_folder(path)
        _check_stage(Path(path))
        tokenizer = models.load_tokenizer(path)
        model, normalizer = load_scalar_model(path, dtype)
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        nn.Module.to(model, torch.device(device) if device is not None else accelerator or torch.device("cpu"))
        scorer = cls(model, tokenizer, normalizer, tokens_per_microbatch=tokens_per_microbatch, name=Path(path).name)
        scorer.folder = str(path)
        return scorer

    def __call__(self, prompts: Texts, completions: Texts, **columns: object) -> list[float]:
        """Return normalised scores. A plain-text prompt is one user turn."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        return self.score([conversation(p, c) for p, c in zip(prompts, completions, strict=True)]).tolist()

    def score(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return normalised scores of conversations that end with an assistant turn, on the CPU in float32."""
        return self.normalizer(self.raw_scores(conversations))

    def raw_scores(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return the scalar head's outputs, before the normaliser."""
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
        """Shorten the sequences to the positions that an encoder has; InputError where another model has too few."""
        longest = max(map(len, sequences), default=0)
        if self._positions is not None:
            remedy = "lower max_new_tokens, or leave out such rows"
            self._positions.check(longest, f"{self.__name__}: the longest conversation has", remedy)
        if self._limit is None or longest <= self._limit:
            return sequences
        if not self._warned:
            text = "%s reads %d tokens: of longer conversations (this one has %d) it reads the end"
            logger.warning(text, self.__name__, self._limit, longest)
        self._warned = True
        return [encoders.shortened(ids, self._limit) for ids in sequences]


def _check_stage(folder: Path) -> None:
    """Raise InputError for a folder whose manifest names another stage."""
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
    """Return raw scores of token sequences, in their order, on the CPU in float32.

    Sequences of similar length share a micro-batch, so little is computed on padding."""
    scores = torch.empty(len(sequences), dtype=torch.float32)
    device = next(model.parameters()).device
    for indices in length_batches([len(ids) for ids in sequences], tokens_per_microbatch):
        input_ids, mask = pad([sequences[i] for i in indices], pad_id, device)
        scores[indices] = last_token_scores(model, input_ids, mask).cpu()
    return scores


def length_batches(lengths: Sequence[int], tokens_per_microbatch: int) -> Iterator[list[int]]:
    """Yield indices in micro-batches of at most that many padded tokens, longest first; a longer row is one by
    itself."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_per_microbatch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch
