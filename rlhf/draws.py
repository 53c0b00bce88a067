"""What of a PPO run is random: the prompts' order, sampling, minibatches. Pure functions of (seed, update, process),
so that there is no state to save and none to lose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


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
