"""Encode rankings as token ids and as the reward trainer's batches."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict, cast

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from reward_models.config import RewardConfig
from reward_models.losses import pair_outcomes, ranked_pairs
from rlhf import chat
from rlhf.errors import InputError, short
from rlhf.models.positions import Positions
from rlhf.padding import pad
from rlhf.rows.records import BadRows, OnBadRow, Ranking, StepLabels

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

_LARGEST = 1e30
"""Margins and weights lie below it: batches hold them as float32, whose sums must be finite."""


class EncodedRanking(TypedDict):
    """A ranking as token ids, in trl's columns for tokenized preferences; `other_ids` holds the responses beyond two.

    `ranks` (0 for the best, 1 for the next one; ties share a number) and `texts` follow the order chosen, rejected,
    others. Equal numbers in `texts` mark equal texts.
    """

    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    other_ids: Sequence[Sequence[int]]
    ranks: list[float]
    texts: list[int]
    margin: float
    weight: float
    """Weight in the loss, 1 on average: the row's column `weight` times its labeler's weight."""
    row: int
    """Index of the ranking in the data."""


class RankingBatch(TypedDict):
    """Several rankings' responses as one flat batch, padded on the right."""

    input_ids: Int[Tensor, "n T"]
    attention_mask: Int[Tensor, "n T"]
    ranks: Float[Tensor, " n"]
    prompts: Int[Tensor, " n"]
    """Index, within the batch, of each response's prompt."""
    texts: Int[Tensor, " n"]
    row: Int[Tensor, " prompts"]
    """Indices of the rankings in the data."""
    margins: NotRequired[Float[Tensor, " n"]]
    """Absent where no ranking has a margin."""
    weights: NotRequired[Float[Tensor, " n"]]
    """Absent where all rankings count the same."""


def encode_rankings(
    tokenizer: PreTrainedTokenizerBase,
    rankings: Sequence[Ranking],
    max_length: int,
    name: str,
    labeler_weights: Mapping[str, float] | None = None,
    on_bad_row: OnBadRow = "refuse",
    positions: Positions | None = None,
) -> Dataset:
    """Encode rankings, one row each, with the columns of `EncodedRanking`.

    Leaves out, and counts in the log, rankings without a pair and rankings in which prompt and response exceed
    `max_length` tokens. on_bad_row: what becomes of those that the chat template refuses. Raises InputError when
    nothing remains, or a response that remains is longer than `positions`.
    """
    rows: list[EncodedRanking] = []
    ties, too_long = 0, {}
    refused = BadRows(name, on_bad_row)
    for number, ranking in enumerate(rankings):
        pairs = ranking.pairs()
        if not pairs:
            ties += 1
            continue
        turns = [[*ranking.prompt, {"role": "assistant", "content": text}] for text in ranking.responses]
        try:
            encoded = [chat.encode_conversation(tokenizer, turn, len(turn) - 1, ranking.columns)[0] for turn in turns]
        except InputError as error:
            refused.add(ranking.where, error)
            continue
        longest = max(map(len, encoded))
        if longest > max_length:
            too_long[number] = longest
            continue
        if positions is not None:
            what, remedy = f"{name}: ranking {number + 1} has", f"max_length={positions.limit} leaves such out"
            positions.check(longest, what, remedy)
        places = {rank: float(n) for n, rank in enumerate(sorted(set(ranking.ranks)))}  # which float32 tells apart
        order = [*pairs[0], *(i for i in range(len(encoded)) if i not in pairs[0])]
        ids = [compact(encoded[i]) for i in order]
        rows.append(
            {
                "chosen_ids": ids[0],
                "rejected_ids": ids[1],
                "other_ids": ids[2:],
                "ranks": [places[ranking.ranks[i]] for i in order],
                "texts": [ranking.responses.index(ranking.responses[i]) for i in order],
                "margin": _margin(ranking, f"{name}: ranking {number + 1}"),
                "weight": weight_of(ranking, labeler_weights, f"{name}: ranking {number + 1}"),
                "row": number,
            }
        )
    refused.tell(len(rows) + ties + len(too_long))
    _report_left_out(rankings, ties, too_long, max_length, name, remaining=len(rows))
    scale_weights(rows, name)
    from datasets import Dataset, Features, List, Value

    tokens = List(Value("int32"))
    features = {"chosen_ids": tokens, "rejected_ids": tokens, "other_ids": List(tokens), "margin": Value("float32")}
    features |= {"weight": Value("float32")}
    features |= {"ranks": List(Value("float32")), "texts": List(Value("int32")), "row": Value("int64")}
    return Dataset.from_list(rows, features=Features(features))


@dataclass(frozen=True)
class RankingCollator:
    """Collates encoded rankings into a batch."""

    pad_id: int

    def __call__(self, rows: Sequence[EncodedRanking]) -> RankingBatch:
        sequences = [responses_of(row) for row in rows]
        input_ids, mask = pad([ids for responses in sequences for ids in responses], self.pad_id)
        sizes = torch.tensor([len(responses) for responses in sequences])
        batch: RankingBatch = {
            "input_ids": input_ids,
            "attention_mask": mask.long(),
            "ranks": torch.tensor([rank for row in rows for rank in row["ranks"]], dtype=torch.float32),
            "prompts": torch.arange(len(rows)).repeat_interleave(sizes),
            "texts": torch.tensor([text for row in rows for text in row["texts"]]),
            "row": torch.tensor([row["row"] for row in rows]),
        }
        if any(row["margin"] for row in rows):
            margins = torch.tensor([row["margin"] or 0.0 for row in rows])
            batch["margins"] = margins.repeat_interleave(sizes)
        if any(row["weight"] != 1.0 for row in rows):
            batch["weights"] = torch.tensor([row["weight"] for row in rows]).repeat_interleave(sizes)
        return batch


def rows_of(batch: Any) -> Iterator[tuple[Bool[Tensor, " n"], Any]]:
    """Split a batch by row (`prompts`): yield, for each, the mask of its scores in the batch and what is theirs."""
    for number, row in enumerate(batch["row"]):
        own = batch["prompts"] == number
        apart = {name: tensor[own] for name, tensor in batch.items() if len(tensor) == len(own) and name != "row"}
        yield own, apart | {"row": row[None]}


def compared(scores: Float[Tensor, " n"], inputs: RankingBatch) -> tuple[Tensor, Tensor]:
    """Return, per pair, 1, 0.5 or 0 (right, equal, wrong) and the better response's score minus the worse one's."""
    better, worse = ranked_pairs(inputs["ranks"], inputs["prompts"], inputs["texts"])
    outcomes = pair_outcomes(scores, inputs["ranks"], inputs["prompts"], inputs["texts"])
    return outcomes, scores[better] - scores[worse]


def tokens_read(inputs: Any, number: int) -> Int[Tensor, " t"]:
    """Return the ids of a batch up to the one at which its score of this number is read."""
    if "window_of" in inputs:  # of a text's windows the first
        number = int((inputs["window_of"] == number).nonzero()[0, 0])
    if "ends" in inputs:
        return inputs["input_ids"][inputs["sequences"][number]][: inputs["ends"][number] + 1]
    return inputs["input_ids"][number][inputs["attention_mask"][number].bool()]


def sample(records: list[Any], config: RewardConfig) -> list[Any]:
    """Return at most `max_eval_prompts` records, drawn with the seed, in their order."""
    if not 0 < config.max_eval_prompts < len(records):
        return records
    order = np.random.default_rng(config.seed).permutation(len(records))
    return [records[i] for i in sorted(order[: config.max_eval_prompts])]


def responses_of(row: EncodedRanking) -> list[Sequence[int]]:
    """Return the responses of an encoded ranking (each with the prompt), in the order of its `ranks`."""
    return [row["chosen_ids"], row["rejected_ids"], *row["other_ids"]]


def compact(ids: list[int]) -> Sequence[int]:
    """Store ids in four bytes each, since a whole data set is in memory at a time."""
    return cast(Sequence[int], np.asarray(ids, dtype=np.int32))


def _margin(ranking: Ranking, where: str) -> float:
    """Return trl's column `margin`, by how much the better response should win; 0 where there is none."""
    margin = ranking.columns.get("margin")
    if margin is None:
        return 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not abs(margin) < _LARGEST:
        raise InputError(f"{where}: margin: got {short(repr(margin))}; write a number, or take the column out")
    return float(margin)


def weight_of(ranking: Ranking | StepLabels, labeler_weights: Mapping[str, float] | None, where: str) -> float:
    """Return a ranking's weight before scaling: its column `weight` (default 1) times its labeler's weight."""
    weight = ranking.columns.get("weight")
    weight = 1.0 if weight is None else weight
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < _LARGEST:
        raise InputError(f"{where}: weight: got {short(repr(weight))}; write a number from 0 up")
    if not labeler_weights:
        return float(weight)
    labeler = ranking.columns.get("labeler")
    if labeler is None:
        raise InputError(f"{where}: no column labeler; labeler_weights needs one in every row")
    if str(labeler) not in labeler_weights:
        known = ", ".join(sorted(labeler_weights))
        raise InputError(f"{where}: labeler: {labeler!r} is not in labeler_weights ({known}); add it there, say as 1.0")
    return float(weight) * labeler_weights[str(labeler)]


def scale_weights(rows: Sequence[Any], name: str) -> None:
    """Scale the weights to 1 on average: they shift the loss between rankings, but don't act as a learning rate."""
    total = math.fsum(row["weight"] for row in rows)
    if rows and total <= 0:
        raise InputError(f"{name}: weight: all {len(rows)} rankings weigh 0; nothing can be learnt")
    for row in rows:
        row["weight"] *= len(rows) / total


def tell_too_long(
    records: Sequence[Any], too_long: dict[int, int], max_length: int, name: str, what: str, remaining: int
) -> None:
    """Count and name, in the log, the records that are left out as too long. too_long: index -> tokens. Raises
    InputError where nothing remains."""
    if not too_long:
        return
    first = {number: records[number].prompt[-1]["content"] for number in list(too_long)[:5]}
    named = [f"{number + 1} ({short(prompt, 30)!r})" for number, prompt in first.items()]
    text = (
        f"{name}: left out {len(too_long)} of {len(records)} {what}, longer than max_length={max_length} tokens "
        f"(the longest has {max(too_long.values())}): {', '.join(named)}{', ...' if len(too_long) > 5 else ''}"
    )
    if not remaining:
        raise InputError(f"{text}; nothing is left: raise max_length to {min(too_long.values())} or more")
    logger.warning(text)


def _report_left_out(
    rankings: Sequence[Ranking], ties: int, too_long: dict[int, int], max_length: int, name: str, remaining: int
) -> None:
    tell_too_long(rankings, too_long, max_length, name, "rankings", remaining)
    if ties:
        logger.warning("%s: left out %d of %d rankings, all ties or identical texts", name, ties, len(rankings))
    if not remaining:
        raise InputError(f"{name}: all {len(rankings)} rankings are ties or identical texts; nothing can be learnt")
