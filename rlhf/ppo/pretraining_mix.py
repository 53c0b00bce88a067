"""PPO-ptx: the gradient of language modelling on other data, mixed into PPO's (InstructGPT, Ouyang et al. 2022, 3.5).

The objective gains ``pretraining_coef * E[log pi(x)]``, so every optimizer step adds the gradient of

    pretraining_coef * (-sum of log-probabilities of a minibatch's trained tokens / their number)

to the policy's. In this unit the paper's coefficient is 27.8. Rows are texts or conversations. Which of them an
optimizer step gets is a pure function of seed and step, so a checkpoint needs no state for it; neither the split into
micro-batches nor the number of processes changes the gradient.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf import chat
from rlhf.errors import InputError
from rlhf.models.positions import positions_of
from rlhf.padding import make_batch, pad
from rlhf.ppo import plan
from rlhf.ppo.actor_critic import ActorCritic, Role
from rlhf.ppo.config import PPOConfig
from rlhf.rows.records import BadRows, read_demonstrations
from rlhf.rows.sources import rows as rows_of
from rlhf.run import distributed

log = logging.getLogger("rlhf")

OTHER_STREAM = 2**40
"""Added to the seed, so that these rows are drawn by other random numbers than the prompts."""


@dataclass(frozen=True)
class Row:
    """A piece of a text, or a conversation: its tokens, and for each but the first whether it is trained."""

    ids: list[int]
    trained: list[bool]


class PretrainingMix:
    """The data of PPO-ptx, and its part of an optimizer step; without `args.pretraining_data` it does nothing."""

    def __init__(
        self, args: PPOConfig, tokenizer: PreTrainedTokenizerBase, models: ActorCritic, accelerator: Accelerator
    ):
        self.args, self.models, self.accelerator = args, models, accelerator
        process, processes = accelerator.process_index, accelerator.num_processes
        self.draws = plan.Draws(args.seed + OTHER_STREAM, process, processes)
        self.pad_id = chat.pad_id(tokenizer)
        self.rows: list[Row] = []
        self.held_out: list[Row] = []
        self.given: Mapping[str, Any] = {}
        """The fingerprint of the rows, for checkpoints: it takes the place of their path."""
        if args.pretraining_data is None:
            return
        documents = read_documents(args, tokenizer)
        positions = positions_of(models.policy)
        if positions is not None:
            longest = max(len(row.ids) for pieces in documents for row in pieces)
            positions.check(longest, "pretraining_data: the longest row has", "lower pretraining_length")
        self.given = {"pretraining_data": fingerprint(documents)}
        held = min(args.pretraining_held_out, len(documents) // 10)
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(args.seed)).tolist()
        self.held_out = [row for number in sorted(order[:held]) for row in documents[number]]
        self.rows = [row for number in sorted(order[held:]) for row in documents[number]]

    def add_gradient(self, module: Any, update: int, step: int) -> dict[str, Tensor]:
        """Add an optimizer step's share of the gradient to the policy's parameters; return the loss, as this process's
        share of it, by its metric's name.

        module: what accelerate made of the models. step: the optimizer step within the update. The micro-batches come
        before PPO's, the last of which exchanges all gradients between processes."""
        args, accelerator = self.args, self.accelerator
        if not self.rows or args.pretraining_coef == 0 or update < args.value_warmup_updates:
            return {}
        number = update * args.inner_epochs * (args.rollout_size // args.minibatch_size) + step
        rows = [self.rows[i] for i in self.draws.prompt_rows(number, args.pretraining_rows, len(self.rows))]
        count = distributed.total(accelerator, sum(sum(row.trained) for row in rows))
        mean = torch.zeros((), device=accelerator.device)
        for batch in self._micro_batches(rows, module):
            with distributed.no_sync(accelerator, module):
                loss = self._loss(module, batch, "policy") / count
                accelerator.backward(args.pretraining_coef * loss * accelerator.num_processes)
            mean += loss.detach()
            del loss  # and its graph, whose nodes would lie between what the next one could take
        return {"pretraining_loss": mean}

    @torch.no_grad()
    def alignment_tax(self, module: Any) -> dict[str, float]:
        """Measure the policy's loss on the held-out rows, and by how much it is above the reference's: by default that
        is the model before PPO. In nats per token; a collective."""
        if not self.held_out:
            return {}
        accelerator = self.accelerator
        own = self.held_out[accelerator.process_index :: accelerator.num_processes]
        sums = dict.fromkeys(("policy", "reference"), 0.0)
        for batch in self._micro_batches(own or self.held_out[:1], module):  # a sharded model needs every process
            for role in sums:
                loss = self._loss(module, batch, role)  # type: ignore[arg-type]
                sums[role] += float(loss) if own else 0.0
        count = distributed.total(accelerator, sum(sum(row.trained) for row in own))
        after, before = (distributed.total(accelerator, total) / count for total in sums.values())
        return {"eval_pretraining_loss": after, "alignment_tax_nats": after - before}

    def _micro_batches(self, rows: Sequence[Row], module: Any) -> Iterator[list[Row]]:
        """Cut rows into micro-batches as PPO's are cut, on every process into as many."""
        lengths, models = [len(row.ids) for row in rows], self.models
        tokens, launch = (
            models.most_tokens(self.args.tokens_per_microbatch),
            plan.launch_tokens(self.accelerator.device),
        )
        cut = plan.split_by_tokens(range(len(rows)), lengths, tokens, launch, not models.packs)
        for numbers in distributed.even_plan([cut], module)[0]:
            yield [rows[number] for number in numbers]

    def _loss(self, module: Any, rows: Sequence[Row], role: Role) -> Tensor:
        """Compute the summed loss of the rows' trained tokens under a role's model, at temperature 1."""
        device = self.accelerator.device
        batch = make_batch([row.ids[:1] for row in rows], [row.ids[1:] for row in rows], self.pad_id, device)
        trained, _ = pad([[int(flag) for flag in row.trained] for row in rows], 0, device)
        outputs = module(batch, 1.0, (role,))
        logprobs = outputs.logprobs if role == "policy" else outputs.reference_logprobs
        return -torch.where(trained.bool(), logprobs.float(), 0.0).sum()


def fingerprint(documents: Sequence[Sequence[Row]]) -> str:
    """Compute the sha256 of the rows' tokens and of which are trained."""
    digest = hashlib.sha256()
    for row in (row for rows in documents for row in rows):
        digest.update(f"{row.ids} {row.trained}\n".encode())
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


def read_documents(args: PPOConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[Row]]:
    """Read and encode `pretraining_data`: of each document its rows, one after the other.

    A text ends with the eos token, unless that ends a turn of a chat, and is cut into rows of at most
    `pretraining_length` tokens. Each begins with the last token of the one before, so that every token but the first is
    predicted once. A conversation is one row, trained where a demonstration is. One that is longer, or that trains
    nothing, is left out and counted in the log. Raises InputError where nothing remains.
    """
    name, limit = f"pretraining_data: {args.pretraining_data}", args.pretraining_length
    refused = BadRows(name, args.on_bad_row)
    documents: list[list[Row]] = []
    left_out: Counter[str] = Counter()
    for where, row in rows_of(str(args.pretraining_data), "train"):
        try:
            text = text_of(row)
            found = _conversation(row, tokenizer) if text is None else _pieces(text, tokenizer, limit)
        except InputError as error:
            refused.add(where, error)
            continue
        if len(found[0].ids) > limit:
            left_out[f"longer than pretraining_length={limit} tokens"] += 1
        elif not any(found[0].trained):
            left_out["without a trained turn"] += 1
        else:
            documents.append(found)
    refused.tell(len(documents) + sum(left_out.values()))
    counted = ", ".join(f"{count} {why}" for why, count in left_out.items())
    if not documents:
        raise InputError(f"{name}: nothing is left to train on ({counted or 'no rows'}); raise pretraining_length")
    if counted:
        log.warning("%s: left out of %d conversations: %s", name, len(documents) + sum(left_out.values()), counted)
    return documents


def text_of(row: object) -> str | None:
    """Return a row's text: its column `text`, or the line of a .txt file; None for a conversation."""
    if not isinstance(row, dict) or "messages" in row or "completion" in row:
        return row if isinstance(row, str) else None
    text = row.get("text", row.get("prompt") if set(row) == {"prompt"} else None)
    return text if isinstance(text, str) else None


def _pieces(text: str, tokenizer: PreTrainedTokenizerBase, limit: int) -> list[Row]:
    ids, eos = list(tokenizer(text)["input_ids"]), tokenizer.eos_token_id
    if eos is not None and ids[-1:] != [eos] and eos != chat.end_of_turn_id(tokenizer):
        ids.append(int(eos))
    if len(ids) < 2:
        raise InputError(f"text: {len(ids)} tokens, of which none can be predicted; take the row out")
    starts = range(0, max(1, len(ids) - 1), limit - 1)
    return [Row(piece, [True] * (len(piece) - 1)) for piece in (ids[start : start + limit] for start in starts)]


def _conversation(row: object, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    (demonstration,) = read_demonstrations([row])
    turns, trained_from = demonstration.messages, demonstration.trained_from
    ids, mask = chat.encode_demonstration(tokenizer, turns, trained_from, demonstration.columns)
    return [Row(ids, mask[1:])]
