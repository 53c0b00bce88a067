"""The random choices of a run, and how rows are divided into minibatches and micro-batches.

Both are pure functions of (seed, update, process), so that there is no state to save and none to lose.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from rlhf.ppo.rollout import Plan


@dataclass(frozen=True)
class Draws:
    """The random choices of one process's run."""

    seed: int
    process: int = 0
    processes: int = 1

    def prompt_rows(self, update: int, rollout_size: int, prompts: int) -> list[int]:
        """This process's share of the prompts of an update, as row numbers: every prompt once, in a shuffled order,
        before any comes twice."""
        orders: dict[int, list[int]] = {}
        rows = []
        first = update * rollout_size
        for place in range(first + self.process, first + rollout_size, self.processes):
            epoch, offset = divmod(place, prompts)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(_mix(self.seed, 1, epoch))
                orders[epoch] = torch.randperm(prompts, generator=generator).tolist()
            rows.append(orders[epoch][offset])
        return rows

    def generator(
        self, purpose: Literal["sample", "plan"], update: int, device: torch.device | str = "cpu", extra: int = 0
    ) -> torch.Generator:
        """The plan of minibatches is drawn alike on all processes: each takes its own rows of the same ones."""
        purposes = {"sample": 2, "plan": 3}
        process = 0 if purpose == "plan" else self.process
        return torch.Generator(device).manual_seed(_mix(self.seed, purposes[purpose], update, process, extra))


def _mix(*parts: int) -> int:
    """One 63-bit seed from several numbers; neighbours give unrelated streams."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = ((seed ^ (part + 0x9E3779B9)) * 0xBF58476D1CE4E5B9) % 2**64
        seed ^= seed >> 31
    return seed % 2**63


LAUNCH_TOKENS = {"cpu": 64, "cuda": 2048}
FEWEST = 1e9  # as if it cost so much that there are as few as possible


def launch_tokens(device: torch.device) -> float:
    """What starting one more micro-batch costs, in tokens computed meanwhile."""
    return LAUNCH_TOKENS.get(device.type, FEWEST)


def plan_minibatches(
    lengths: Sequence[int],
    minibatch_size: int,
    tokens_per_microbatch: int,
    generator: torch.Generator,
    process: int = 0,
    processes: int = 1,
    launch_tokens: float = FEWEST,
    padded: bool = True,
) -> Plan:
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
