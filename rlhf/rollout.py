"""Prompts in, responses out: the engine that samples, and the record of what was collected on them.

`TransformersEngine` is a plain decode loop. Another engine (vLLM, say) needs one method: `Engine.generate`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from peft import PeftModel
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel

from rlhf import InputError, few_rows, lora
from rlhf.memory import release_freed_memory
from rlhf.plain_generate import generate_agrees, generate_alike, most_apart, total_variation
from rlhf.records import Prompt
from rlhf.sampling import sample

log = logging.getLogger("rlhf")


@dataclass(frozen=True)
class Responses:
    """What an engine wrote: token ids (with the stop token where there is one), and whether each stopped.

    logprobs: each token's log-probability in nats under the distribution that the engine drew it from (at the
    temperature); None from an engine that computes as the trainer does, whose draws need no correction.
    """

    ids: list[list[int]]
    stopped: list[bool]
    logprobs: list[list[float]] | None = None

    def padded_logprobs(self) -> Float[Tensor, "N T"] | None:
        """`logprobs` in a rectangle, 0 on padding."""
        if self.logprobs is None:
            return None
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in self.logprobs], batch_first=True)


LAUNCH_TOKENS = {"cpu": 64, "cuda": 2048}  # what starting one more micro-batch costs, in tokens computed meanwhile
FEWEST = 1e9  # as if it cost so much that there are as few as possible


class Engine(Protocol):
    """Samples one response per prompt from the full softmax (no top-k, no top-p, no penalties)."""

    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses: ...


@runtime_checkable
class Follower(Engine, Protocol):
    """An engine with weights of its own: the trainer hands it the policy whose weights each `generate` must sample
    with, and the ids that end a response."""

    def follow(self, policy: Any, stop_ids: Sequence[int]) -> None: ...


class TransformersEngine:
    """Sampling with a transformers model: left-padded prompts, a KV cache, finished rows leave the batch.

    rows_per_batch bounds memory; rows are grouped by prompt length. A hub model's generation_config is
    ignored: the distribution sampled from is the one the trainer scores. The first call checks that the
    model's family can be sampled from in this way (`can_decode`); one that can't is left to transformers'
    `generate` (`rlhf.plain_generate`), and where that, too, differs from the model's own logits, InputError is raised.
    """

    def __init__(self, model: PreTrainedModel, stop_ids: Sequence[int], pad_id: int, rows_per_batch: int = 256):
        self.model = model
        self.stop_ids = tuple(stop_ids)
        self.pad_id = pad_id
        self.rows_per_batch = rows_per_batch
        # on a GPU, asking which rows have finished waits for it: there they leave the batch every so many steps
        self.check_every = 1 if model.device.type == "cpu" else 8
        self._own_loop: bool | None = None  # not yet known

    @contextmanager
    def leaving_at_once(self) -> Iterator[None]:
        """Inside, rows leave the batch at the step that finishes them, on a GPU too."""
        every, self.check_every = self.check_every, 1
        try:
            yield
        finally:
            self.check_every = every

    @torch.no_grad()
    def generate(
        self, prompt_ids: Sequence[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> Responses:
        order = sorted(range(len(prompt_ids)), key=lambda i: len(prompt_ids[i]))
        ids: list[list[int]] = [[] for _ in prompt_ids]
        training = self.model.training
        self.model.eval()  # gradient checkpointing in train mode would switch the cache off
        try:
            if self._own_loop is None:
                self._own_loop = can_decode(self.model, self.pad_id)
            most = min(len(prompt_ids), self.rows_per_batch)
            with lora.merged(self.model) as merged, few_rows.laid_out(self.model, most) as laid_out:
                if not self._own_loop:
                    settings = (max_new_tokens, temperature, generator, self.rows_per_batch)
                    ids = generate_alike(self.model, prompt_ids, self.stop_ids, self.pad_id, *settings)
                    order = []
                for start in range(0, len(order), self.rows_per_batch):
                    rows = order[start : start + self.rows_per_batch]
                    batch = self._decode([prompt_ids[i] for i in rows], max_new_tokens, temperature, generator)
                    for row, response in zip(rows, batch, strict=True):
                        ids[row] = response
        finally:
            self.model.train(training)
        if merged or laid_out:  # what is trained next would not fit into the places of their weights
            release_freed_memory()
        return Responses(ids, [response[-1] in self.stop_ids for response in ids])

    def _decode(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float, generator: torch.Generator
    ) -> list[list[int]]:
        device = self.model.device
        input_ids, mask = pad(prompts, self.pad_id, device, side="left")
        stop = torch.tensor(self.stop_ids, device=device)
        cache: Any = DynamicCache(config=self.model.config)  # its annotations ask for torch.LongTensor
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        attention = mask.long()
        alive = torch.arange(len(prompts), device=device)
        done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        written = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.long, device=device)
        for step in range(max_new_tokens):
            logits = next_logits(self.model, input_ids, attention, positions, cache)
            token = sample(logits, temperature, generator)
            written[alive, step] = torch.where(done, -1, token)
            done = done | torch.isin(token, stop)
            if (step + 1) % self.check_every == 0:
                keep = (~done).nonzero().squeeze(-1)
                if len(keep) == 0:
                    break
                if len(keep) < len(done):
                    cache.reorder_cache(keep)  # every layer type has it, recurrent and convolutional ones too
                    alive, token, attention, positions = alive[keep], token[keep], attention[keep], positions[keep]
                    done = done[keep]
            attention = torch.cat([attention, attention.new_ones(len(alive), 1)], dim=1)
            positions = positions[:, -1:] + 1
            input_ids = token[:, None]
        return [[t for t in row if t >= 0] for row in written.tolist()]


def next_logits(
    model: PreTrainedModel,
    input_ids: Int[Tensor, "B L"],
    attention: Int[Tensor, "B S"],
    positions: Int[Tensor, "B L"],
    cache: Cache,
) -> Float[Tensor, "B V"]:
    """Logits of the token after `input_ids`, whose S - L predecessors stand in the cache."""
    # as an index: a slice is no contiguous tensor, and its product with the head makes B copies of the head on a CPU
    last = torch.tensor([input_ids.shape[1] - 1], device=input_ids.device)
    return model(
        input_ids=input_ids,
        attention_mask=attention,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=last,
    ).logits[:, -1]


def can_decode(model: PreTrainedModel, pad_id: int) -> bool:
    """Whether the decode loop samples what the model scores; False where `generate` does, InputError if neither."""
    fault = decoding_fault(model, pad_id)
    if fault is None:
        return True
    family = type(model.get_base_model() if isinstance(model, PeftModel) else model).__name__
    if not generate_agrees(model, pad_id):
        raise InputError(
            f"{family}: {fault}, and transformers' generate fails or differs too; PPO needs a causal decoder with "
            "a working cache"
        )
    log.warning("%s: %s; so transformers' generate samples, rows of one prompt length at once: slower", family, fault)
    return False


@torch.no_grad()
def decoding_fault(model: PreTrainedModel, pad_id: int) -> str | None:
    """Why the decode loop would sample from another distribution than the one the model scores; None if it does not.

    Two short rows, left-padded, the longer one leaving after a step, against each row alone in one forward:
    the same next-token probabilities? Not where a family keeps a state of its own instead of a cache (Mamba,
    RWKV), sees later tokens (BERT), or takes padding for text (RecurrentGemma).
    """
    embeddings: Any = model.get_input_embeddings()
    vocabulary, device = embeddings.weight.shape[0], model.device
    long, short = [7 % vocabulary, 2, 5, 1], [1, 6 % vocabulary, 4]
    alone = [model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0] for ids in (long, short)]
    expected = torch.stack([alone[0][-1], alone[1][-2], alone[1][-1]])
    if bool(expected.isnan().any()):
        return None  # broken weights: sampling itself stops on them
    cache: Any = DynamicCache(config=model.config)
    input_ids, mask = pad([long, short[:-1]], pad_id, device, side="left")
    attention, last = mask.long(), torch.tensor([short[-1:]], device=device)
    positions = (attention.cumsum(-1) - 1).clamp(min=0)
    try:
        first = next_logits(model, input_ids, attention, positions, cache)
        cache.reorder_cache(torch.tensor([1], device=device))
        attention = torch.cat([attention[1:], attention.new_ones(1, 1)], dim=1)
        second = next_logits(model, last, attention, positions[1:, -1:] + 1, cache)
    except (AttributeError, NotImplementedError, TypeError, ValueError) as error:
        return f"sampling with transformers' key-value cache fails ({str(error).rstrip('.')})"
    apart, limit = total_variation(torch.cat([first, second]), expected), most_apart(expected.dtype)
    if apart <= limit:
        return None
    return (
        "next-token probabilities of a batch with left padding and a key-value cache differ from those of a row "
        f"alone by {apart:.2g} (total variation; at most {limit})"
    )


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, device: torch.device | str = "cpu", side: str = "right"
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Ids in a rectangle, and a mask that comes from the lengths, never from the pad id."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_id, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        places = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[i, places] = torch.tensor(row, dtype=torch.long)
        mask[i, places] = True
    return ids.to(device), mask.to(device)


@dataclass(frozen=True)
class Batch:
    """A micro-batch for the models: prompt + response in one row, right-padded.

    input_ids, attention_mask [B, L]; prompt_tokens [B]; targets, mask [B, T]: the response alone.
    """

    input_ids: Int[Tensor, "B L"]
    attention_mask: Bool[Tensor, "B L"]
    prompt_tokens: Int[Tensor, "B"]
    targets: Int[Tensor, "B T"]
    mask: Bool[Tensor, "B T"]

    def positions(self) -> Int[Tensor, "B T"]:
        """Where in the row the state before each response token stands."""
        steps = torch.arange(self.targets.shape[1], device=self.targets.device)
        return (self.prompt_tokens[:, None] - 1 + steps).clamp(max=self.input_ids.shape[1] - 1)


@dataclass(frozen=True)
class Rollout:
    """One process's prompts and responses and everything collected on them; N rows, T the longest response.

    Filled stage by stage: collect (ids, logprobs, values), score (scores), advantages (rewards, returns).
    Tensors lie on the CPU. `plan` is the micro-batch plan of the first inner epoch, with which the old
    log-probabilities were computed: a list of minibatches, each a list of micro-batches of row numbers.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    response_ids: list[list[int]]
    texts: list[str]
    stopped: Bool[Tensor, "N"]
    mask: Bool[Tensor, "N T"]
    plan: list[list[list[int]]]
    update: int
    logprobs: Float[Tensor, "N T"]
    reference_logprobs: Float[Tensor, "N T"]
    entropy: Float[Tensor, "N T"]
    values: Float[Tensor, "N T"]
    engine_logprobs: Float[Tensor, "N T"] | None = None  # what the engine says it drew the tokens with, where it does
    raw_scores: Float[Tensor, "N"] | None = None
    own_scores: Mapping[str, Float[Tensor, "N"]] = field(
        default_factory=dict
    )  # each function's, where there are several
    scores: Float[Tensor, "N"] | None = None
    used: Bool[Tensor, "N"] | None = None  # False: scoring it failed, nothing of it is trained on; None: all are used
    rewards: Float[Tensor, "N T"] | None = None
    advantages: Float[Tensor, "N T"] | None = None
    returns: Float[Tensor, "N T"] | None = None

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def kl(self) -> Float[Tensor, "N T"]:
        """k1 per token in nats, 0 on padding."""
        return torch.where(self.mask, self.logprobs - self.reference_logprobs, 0.0)

    @property
    def trained_mask(self) -> Bool[Tensor, "N T"]:
        """`mask` without the rows that are not used: what statistics, losses and metrics are over."""
        return self.mask if self.used is None else self.mask & self.used[:, None]

    @property
    def response_tokens(self) -> Int[Tensor, "N"]:
        return self.mask.sum(-1)

    def batch(self, rows: Sequence[int], pad_id: int, device: torch.device | str) -> Batch:
        return make_batch([self.prompt_ids[i] for i in rows], [self.response_ids[i] for i in rows], pad_id, device)


def make_batch(
    prompt_ids: Sequence[list[int]], response_ids: Sequence[list[int]], pad_id: int, device: torch.device | str
) -> Batch:
    input_ids, attention = pad([p + r for p, r in zip(prompt_ids, response_ids, strict=True)], pad_id, device)
    targets, mask = pad(response_ids, pad_id, device)
    lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    return Batch(input_ids, attention, lengths, targets, mask)


def plan_minibatches(
    lengths: Sequence[int],
    minibatch_size: int,
    tokens_per_microbatch: int,
    generator: torch.Generator,
    process: int = 0,
    processes: int = 1,
    launch_tokens: float = FEWEST,
    padded: bool = True,
) -> list[list[list[int]]]:
    """Rows shuffled into minibatches, each cut into micro-batches of rows of similar length.

    Of `processes`, number `process` holds every `processes`-th row of the rollout and gets its part of every
    minibatch. To give all of them equal parts of the same minibatches, rows are dealt, not permuted freely: of
    the rows with the same number modulo `minibatch_size`, each minibatch gets one. Micro-batches: `split_by_tokens`.
    """
    share = minibatch_size // processes
    minibatches = -(-len(lengths) // share)
    places = torch.rand(minibatch_size, minibatches, generator=generator).argsort(-1)[process::processes]
    dealt = (places * share + torch.arange(share)[:, None]).T.tolist()
    rows = ([row for row in minibatch if row < len(lengths)] for minibatch in dealt)
    return [split_by_tokens(minibatch, lengths, tokens_per_microbatch, launch_tokens, padded) for minibatch in rows]


def split_by_tokens(
    rows: Sequence[int],
    lengths: Sequence[int],
    tokens_per_microbatch: int,
    launch_tokens: float = FEWEST,
    padded: bool = True,
) -> list[list[int]]:
    """Cut rows, shortest first, into micro-batches of at most `tokens_per_microbatch` prompt + response tokens (one row
    at the least); padded: where rows are, those of padding count, too.

    Of all such cuts the cheapest: tokens in all, and `launch_tokens` for each micro-batch, which is what starting one
    costs beside its arithmetic.
    """
    order = sorted(rows, key=lambda r: lengths[r])
    costs, starts = [0.0], [0]
    for end in range(1, len(order) + 1):
        longest, best, where = lengths[order[end - 1]], float("inf"), end - 1
        tokens = 0
        for start in range(end - 1, -1, -1):
            tokens = longest * (end - start) if padded else tokens + lengths[order[start]]
            if tokens > tokens_per_microbatch and start < end - 1:
                break
            if costs[start] + tokens + launch_tokens <= best:
                best, where = costs[start] + tokens + launch_tokens, start
        costs.append(best)
        starts.append(where)
    cuts, end = [], len(order)
    while end > 0:
        cuts.append(order[starts[end] : end])
        end = starts[end]
    return cuts[::-1]
