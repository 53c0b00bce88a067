"""The random choices of a run, and the division of rows into minibatches and micro-batches.

Both are pure functions of (seed, update, process), so a checkpoint needs no state for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rlhf.ppo.rollout import Plan
from rlhf.sampling.engine import RowGenerator


@dataclass(frozen=True)
class Draws:
    """The random choices of one process of a run."""

    seed: int
    process: int = 0
    processes: int = 1

    def prompt_rows(self, update: int, rollout_size: int, prompts: int) -> list[int]:
        """Return the row numbers of this process's share of an update's prompts.

        Prompts come in a shuffled order, every one once before any comes twice."""
        orders: dict[int, list[int]] = {}
        rows = []
        first = update * rollout_size
        for index in range(first + self.process, first + rollout_size, self.processes):
            epoch, offset = divmod(index, prompts)
            if epoch not in orders:
                generator = torch.Generator().manual_seed(_mix(self.seed, 1, epoch))
                orders[epoch] = torch.randperm(prompts, generator=generator).tolist()
            rows.append(orders[epoch][offset])
        return rows

    def sampling(self, update: int, rows: int, device: torch.device | str) -> RowGenerator:
        """Return the generator for this process's `rows` of an update's rollout.

        A row's seed follows from its place in the whole rollout, so the number of processes changes no response."""
        places = range(self.process, self.process + rows * self.processes, self.processes)
        seeds = [_mix(self.seed, 2, update, place) for place in places]
        return RowGenerator.of(seeds, _mix(self.seed, 4, update, self.process), device)

    def evaluation(self, rows: Sequence[int], device: torch.device | str) -> RowGenerator:
        """Return the generator for some rows of the evaluation prompts, the same at every evaluation."""
        return RowGenerator.of([_mix(self.seed, 5, row) for row in rows], _mix(self.seed, 6, self.process), device)

    def plan(self, update: int, inner_epoch: int) -> torch.Generator:
        """Return the generator for an inner epoch's minibatches. All processes draw the same plan, and each takes its
        own rows of it."""
        return torch.Generator().manual_seed(_mix(self.seed, 3, update, 0, inner_epoch))


def _mix(*parts: int) -> int:
    """Mix several numbers into one 63-bit seed; neighbouring numbers give unrelated streams."""
    seed = 0x9E3779B97F4A7C15
    for part in parts:
        seed = ((seed ^ (part + 0x9E3779B9)) * 0xBF58476D1CE4E5B9) % 2**64
        seed ^= seed >> 31
    return seed % 2**63


LAUNCH_TOKENS = {"cpu": 64, "cuda": 2048}
FEWEST = 1e9  # a cost so high that the plan has as few micro-batches as possible


def launch_tokens(device: torch.device) -> float:
    """Return the fixed cost of one more micro-batch, as the number of tokens computed in the same time."""
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
    """Shuffle rows into minibatches, and cut each into micro-batches of rows of similar length (`split_by_tokens`).

    Process `process` holds every `processes`-th row of the rollout and gets its part of every minibatch. Rows are
    dealt like cards instead of permuted freely, so that all processes get equal parts of the same minibatches: each
    minibatch gets exactly one of the rows whose numbers are equal modulo `minibatch_size`.
    """
    share = minibatch_size // processes
    minibatches = -(-len(lengths) // share)
    rounds = torch.rand(minibatch_size, minibatches, generator=generator).argsort(-1)[process::processes]
    dealt = (rounds * share + torch.arange(share)[:, None]).T.tolist()
    rows = ([row for row in minibatch if row < len(lengths)] for minibatch in dealt)
    return [split_by_tokens(minibatch, lengths, tokens_per_microbatch, launch_tokens, padded) for minibatch in rows]


def split_by_tokens(
    rows: Sequence[int],
    lengths: Sequence[int],
    tokens_per_microbatch: int,
    launch_tokens: float = FEWEST,
    padded: bool = True,
) -> list[list[int]]:
    """Cut rows, shortest first, into micro-batches of at most `tokens_per_microbatch` prompt + response tokens.

    A micro-batch has at least one row. padded=True counts padding tokens too. The cut is the cheapest possible one;
    its cost is the number of tokens plus `launch_tokens` per micro-batch (see the function of that name).
    """
    order = sorted(rows, key=lambda r: lengths[r])
    costs, starts = [0.0], [0]  # of the best cut of the first rows: its cost, and where its last micro-batch starts
    for end in range(1, len(order) + 1):
        longest, best, best_start = lengths[order[end - 1]], float("inf"), end - 1
        tokens = 0
        for start in range(end - 1, -1, -1):
            tokens = longest * (end - start) if padded else tokens + lengths[order[start]]
            if tokens > tokens_per_microbatch and start < end - 1:
                break
            if costs[start] + tokens + launch_tokens <= best:
                best, best_start = costs[start] + tokens + launch_tokens, start
        costs.append(best)
        starts.append(best_start)
    cuts, end = [], len(order)
    while end > 0:
        cuts.append(order[starts[end] : end])
        end = starts[end]
    return cuts[::-1]
