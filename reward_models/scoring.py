"""A trained reward model as a score function: messages in, scores out.

`RewardModel` has its own tokenizer, so it scores the responses of any policy, whatever that policy's vocabulary. It has
trl's reward-function signature: pass it to PPOTrainer or trl's GRPOTrainer as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import cast

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from reward_models.functions import SCORED_PREFIX, Texts, talks_of
from rlhf import chat, cpu
from rlhf.errors import InputError
from rlhf.models import encoders, packing
from rlhf.models import loading as models
from rlhf.models.heads import embedding_rows
from rlhf.models.positions import positions_of
from rlhf.models.pretrained import check_folder
from rlhf.models.scalar import NORMALIZER_FILE, ScoreNormalizer, last_token_scores, load_scalar_model
from rlhf.padding import pad
from rlhf.rows.messages import Messages
from rlhf.run import sharing, stages

logger = logging.getLogger("rlhf")

STAGES = ("reward_model", "judge")
"""Stages of a chain whose folder holds a reward model."""
PROCESS_FILE = "process.json"
"""What a process or outcome model's folder has beside a reward model's files."""
CATEGORIES_FILE = "categories.json"
"""What a moderation model's folder has beside them."""


class RewardModel:
    """A trained reward model that scores whole responses, normalised by the normaliser in its folder.

    Scored is the answer: thinking (`reasoning_content`) is left out unless `score_reasoning`. Scores are float32 and
    depend on the conversation alone: the other conversations in a micro-batch change them by rounding only (below 1e-5
    in float32). An encoder reads a limited number of tokens (BERT: 512); of a longer conversation it reads the end,
    with one warning.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        normalizer: ScoreNormalizer | None = None,
        *,
        tokens_per_microbatch: int = 16384,
        score_reasoning: bool = False,
        reads_rendered: bool = False,
        name: str = "reward_model",
    ) -> None:
        """reads_rendered: read the last token of the template's whole rendering that is no padding, as transformers
        does and trl's RewardTrainer trained it; default: the last end of turn, as our trainer trains it."""
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.normalizer = normalizer or ScoreNormalizer()
        self.tokens_per_microbatch = tokens_per_microbatch
        self.score_reasoning = score_reasoning
        self.reads_rendered = reads_rendered
        self.folder: str | None = None  # the path that `load` read
        self._warned = False
        self._packs: bool | None = None  # whether rows may be computed as one long row (`packing`); not asked yet
        self._compared: tuple[PreTrainedTokenizerBase, bool] | None = None
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
        score_reasoning: bool = False,
        base: PreTrainedModel | None = None,
    ) -> RewardModel:
        """Load the reward model of a folder (full weights or a LoRA adapter) or hub id.

        One that our trainer did not save (it has no normaliser) is read as transformers reads it, at the last token of
        the template's whole rendering.

        device: by default the accelerator, where there is one.
        dtype: by default float32. bfloat16 halves the memory and moves scores by about a percent of their spread.
        tokens_per_microbatch: padded tokens per forward; a memory setting.
        score_reasoning: score an answer's thinking with it.
        base: the base of an adapter, if it was read before (`rlhf.models.scalar.load_scalar_base`).

        Raises InputError where the folder holds no reward model, no tokenizer, or another stage's output.
        """
        check_folder(path)
        _check_stage(Path(path))
        tokenizer = models.load_tokenizer(path)
        model, normalizer = load_scalar_model(path, dtype, base=base)
        place(model, device)
        sharing.remember(model, _placed, str(path), device, dtype, base)
        foreign = not (Path(path) / NORMALIZER_FILE).is_file() and not encoders.is_encoder(model.config)
        scorer = cls(
            model, tokenizer, normalizer, tokens_per_microbatch=tokens_per_microbatch, score_reasoning=score_reasoning,
            reads_rendered=foreign, name=Path(path).name,
        )  # fmt: skip
        scorer.folder = str(path)
        return scorer

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        completion_ids: Sequence[Sequence[int]] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        stop_ids: Sequence[int] | None = None,
        parsed_completions: Messages | None = None,
        **columns: object,
    ) -> list[float]:
        """Return normalised scores. A plain-text prompt is one user turn.

        processing_class: the policy's tokenizer. Where it is this model's, too, an answer without thinking is read as
        the ids that were sampled, up to one of `stop_ids` (default: the tokenizer's). parsed_completions: the
        responses as messages, which hold the thinking that a plain-text completion leaves out; default: as the sampled
        ids say. columns: `scored_prompt` and `scored_prefix` change what is read (`talks_of`)."""
        if len(prompts) != len(completions):
            raise ValueError(f"{len(prompts)} prompts but {len(completions)} completions; give one of each per score")
        rows = rows_of(columns, len(completions))
        written = None if SCORED_PREFIX in columns else completion_ids
        sampled = self.sampled_ids(written, processing_class, stop_ids)
        completions = self.with_thinking(completions, parsed_completions, sampled, rows)
        talks = talks_of(prompts, completions, columns)
        sequences = [
            self._encoded(talk, row, number, None if sampled is None else sampled[number - 1])
            for number, (talk, row) in enumerate(zip(talks, rows, strict=True), start=1)
        ]
        return self.normalizer(self._scores(sequences)).tolist()

    def score(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return normalised scores of conversations that end with an assistant turn, on the CPU in float32."""
        return self.normalizer(self.raw_scores(conversations))

    def raw_scores(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return the scalar head's outputs, before the normaliser."""
        return self._scores([self._encoded(messages, {}, n) for n, messages in enumerate(conversations, start=1)])

    def _scores(self, sequences: list[list[int]]) -> Float[Tensor, " B"]:
        sequences, pad_id = self.fitting(sequences), chat.pad_id(self.tokenizer)
        if self._packs is None:
            self._packs = packs_here(self.model)
        return score_sequences(self.model, sequences, pad_id, self.tokens_per_microbatch, self._packs)

    def _encoded(
        self, messages: Messages, row: Mapping[str, object], number: int, sampled: Sequence[int] | None = None
    ) -> list[int]:
        """Encode a conversation as this model reads it. sampled: its response's ids, as `sampled_ids` gives them."""
        if not messages or messages[-1]["role"] != "assistant":
            last = messages[-1]["role"] if messages else "nothing"
            raise InputError(f"conversation {number} ends with {last}; a score is of an assistant's response")
        answer = messages[-1]
        if not self.score_reasoning and "reasoning_content" in answer:
            answer = {name: value for name, value in answer.items() if name != "reasoning_content"}
            messages, sampled = [*messages[:-1], answer], None
        if sampled is not None and not self.reads_rendered:
            prompt = chat.encode_prompt(self.tokenizer, messages[:-1], row)
            return [*prompt, *sampled, chat.end_of_turn_id(self.tokenizer)]
        encoded = chat.encode(self.tokenizer, messages, len(messages) - 1, row)
        return self._until_padding(encoded.rendered) if self.reads_rendered else encoded.ids

    def _until_padding(self, ids: list[int]) -> list[int]:
        """Cut a sequence behind the token that transformers' classes read: the last that is no padding."""
        pad_id = self.model.config.get_text_config().pad_token_id
        return ids[: max((n for n, i in enumerate(ids) if i != pad_id), default=len(ids) - 1) + 1]

    def sampled_ids(
        self,
        responses: Sequence[Sequence[int]] | None,
        processing_class: PreTrainedTokenizerBase | None,
        stop_ids: Sequence[int] | None,
    ) -> list[list[int] | None] | None:
        """Return sampled responses' ids without the stop token that ends them; None where a text is to be encoded
        anew, since another tokenizer gave the ids, or a policy with more embeddings one that this model has none for.
        stop_ids: those that sampling stopped at (default: the tokenizer's)."""
        if responses is None or not self.same_tokenizer(processing_class):
            return None
        stops, rows = chat.stop_ids(self.tokenizer) if stop_ids is None else stop_ids, embedding_rows(self.model)
        found = [list(ids[:-1] if ids and ids[-1] in stops else ids) for ids in responses]
        return [ids if max(ids, default=0) < rows else None for ids in found]

    def with_thinking(
        self,
        completions: Texts,
        parsed: Messages | None,
        sampled: Sequence[Sequence[int] | None] | None,
        rows: Sequence[Mapping[str, object]],
    ) -> Texts:
        """Return completions, with the whole message in place of a text that was written with thinking.

        parsed: the responses as messages; with None they are parsed from `sampled`, as of `sampled_ids`. rows: what
        each one's chat template reads."""
        if parsed is None and sampled is not None:
            end = chat.end_of_turn_id(self.tokenizer)
            texts = [chat.decode_response(self.tokenizer, [*(ids or []), end], [end]) for ids in sampled]
            parsed = [chat.parse_response(self.tokenizer, t, row) for t, row in zip(texts, rows, strict=True)]
        if parsed is None:
            return completions
        return [
            [message] if isinstance(text, str) and "reasoning_content" in message else text
            for text, message in zip(completions, parsed, strict=True)
        ]

    def same_tokenizer(self, other: PreTrainedTokenizerBase | None) -> bool:
        """Return whether another tokenizer gives every conversation the ids that this model's gives."""
        if other is None or other is self.tokenizer:
            return other is not None
        if self._compared is None or self._compared[0] is not other:
            same = other.get_vocab() == self.tokenizer.get_vocab()
            self._compared = other, same and chat.template_hash(other) == chat.template_hash(self.tokenizer)
        return self._compared[1]

    def fitting(self, sequences: list[list[int]]) -> list[list[int]]:
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


def place(model: nn.Module, device: torch.device | str | None) -> None:
    """Move a model to a device; by default the accelerator, where there is one."""
    nn.Module.to(model, models.default_device() if device is None else torch.device(device))


def _placed(
    path: str, device: torch.device | str | None, dtype: torch.dtype | None, base: PreTrainedModel | None
) -> PreTrainedModel | PeftModel:
    return RewardModel.load(path, device, dtype, base=base).model


def rows_of(columns: Mapping[str, object], count: int) -> list[dict[str, object]]:
    """Return, for each of `count` responses, the columns that its chat template reads."""
    names = [name for name in ("tools", "chat_template_kwargs") if isinstance(columns.get(name), list | tuple)]
    return [{name: cast(Sequence[object], columns[name])[n] for name in names} for n in range(count)]


def _check_stage(folder: Path) -> None:
    """Raise InputError for a process or moderation model's folder, or one whose manifest names another stage."""
    if (folder / PROCESS_FILE).is_file():
        raise InputError(f"{folder}: holds a process model; load it by reward_models.ProcessModel.load")
    if (folder / CATEGORIES_FILE).is_file():
        raise InputError(f"{folder}: holds a moderation model; load it by reward_models.ModerationModel.load")
    if (folder / "manifest.json").is_file():
        stage = stages.Manifest.read(folder).stage
        if stage not in STAGES:
            raise InputError(
                f"{folder}/manifest.json: stage: this is the output of {stage!r}, no reward model; "
                f"name the folder of a stage {' or '.join(map(repr, STAGES))}"
            )


@torch.no_grad()
def score_sequences(
    model: PreTrainedModel | PeftModel,
    sequences: Sequence[list[int]],
    pad_id: int,
    tokens_per_microbatch: int,
    packs: bool,
) -> Float[Tensor, " B"]:
    """Return raw scores of token sequences, in their order, on the CPU in float32.

    Sequences of similar length share a micro-batch, so little is computed on padding. packs: on a CPU, instead, those
    that begin alike do, as one long row in which that stands once (`packs_here`). Waiting processes do their share."""
    scores = torch.empty(len(sequences), dtype=torch.float32)
    with cpu.for_scoring(model) as by_rows:
        packs = packs and by_rows
    lengths, most = [len(ids) for ids in sequences], tokens_per_microbatch
    batches = list(beginning_batches(sequences, most) if packs else length_batches(lengths, most))
    parts = [[sequences[i] for i in indices] for indices in batches]
    for indices, own in zip(batches, sharing.share(partial(_score, pad_id, packs), parts, model), strict=True):
        scores[indices] = own
    return scores


@torch.no_grad()
def _score(
    pad_id: int, packs: bool, batches: Sequence[list[list[int]]], model: PreTrainedModel | PeftModel
) -> list[Float[Tensor, " B"]]:
    device = next(model.parameters()).device
    with cpu.for_scoring(model):
        padded = (pad(batch, pad_id, device) for batch in batches)
        return [last_token_scores(model, input_ids, mask, packs).float().cpu() for input_ids, mask in padded]


def packs_here(model: PreTrainedModel | PeftModel) -> bool:
    """Return whether a model scores several sequences as one long row: on a CPU, where that computes the same."""
    with cpu.for_scoring(model) as by_rows:
        return by_rows and packing.can_pack(model)


def begun_alike(one: list[int], other: list[int]) -> int:
    """Count the tokens with which both sequences begin."""
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def beginning_batches(sequences: Sequence[list[int]], tokens_per_microbatch: int) -> Iterator[list[int]]:
    """Yield indices in micro-batches of at most that many padded tokens whose own fit one long row; what a sequence
    begins with as the one before it counts once, and those that begin alike stand together. A longer row is one by
    itself."""
    # what is shared may be too little to stand there once
    most = packing.MOST_TOKENS * (packing.FEW - 1) // packing.FEW
    batch: list[int] = []
    tokens = longest = 0
    for index in sorted(range(len(sequences)), key=lambda i: sequences[i]):
        ids = sequences[index]
        own = len(ids) - (begun_alike(sequences[batch[-1]], ids) if batch else 0)
        longest = max(longest, len(ids))
        if batch and ((len(batch) + 1) * longest > tokens_per_microbatch or tokens + own > most):
            yield batch
            batch, tokens, longest, own = [], 0, len(ids), len(ids)
        batch.append(index)
        tokens += own
    if batch:
        yield batch


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
