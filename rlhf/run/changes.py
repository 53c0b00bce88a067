"""The one rule of what may change between a run's start and its resume, for recipes and trainers alike."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from rlhf.errors import short

NO_EFFECT = (
    "output_dir", "overwrite", "report_to", "run_name", "project", "logging_steps", "save_steps", "save_rollouts",
    "samples_logged", "microbatch_size", "tokens_per_microbatch", "packing", "gradient_checkpointing",
    "save_total_limit", "keep_checkpoint", "eval_steps", "on_alarm", "preflight", "on_score_failure",
    "score_timeout_seconds", "vllm_transport", "vllm_folder", "vllm_wait_seconds", "vllm_tolerance_nats",
    "vllm_colocated",
)  # fmt: skip
"""Fields that don't change what a run computes, or only what it does when something goes wrong: not part of its
fingerprint, so that an interrupted run may go on with others."""

GROWING = ("updates", "epochs")
"""Fields that may grow, also once the run is finished: it is extended. From there on the learning rate's schedule is
counted over the new length; with `constant` it is the run that was planned so long from the start."""

PRESENCE = ("vllm_server",)
"""Fields of which it matters only whether there is a value: another address serves the same engine."""


class Change(NamedTuple):
    """A setting or an input that is not what a run began with."""

    name: str
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {shown(self.before)}, now {shown(self.now)}"

    @property
    def grown(self) -> bool:
        """Return whether the run is only made longer."""
        numbers = isinstance(self.before, int | float) and isinstance(self.now, int | float)
        return self.name.rpartition(".")[2] in GROWING and numbers and self.before < self.now


def no_effect(config: Any) -> tuple[str, ...]:
    """Return the fields of a config that change no result; with `keep_best` or `best_by`, evaluations choose the
    weights, and KTO estimates its KL within a micro-batch."""
    chosen = getattr(config, "keep_best", False) or getattr(config, "best_by", None)
    matter = {"eval_steps": chosen, "microbatch_size": getattr(config, "method", None) == "kto"}
    return tuple(name for name in NO_EFFECT if not matter.get(name))


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """Return the differences that matter, in the order of ``now``: what a run began with, what it is given now.

    A setting that only one of them has is none of the other's version, and not compared; an input is, but for the file
    of a function that the run's version did not look at.
    """
    return [change for change in _differences(before, now, "") if not _alike(change)]


def _alike(change: Change) -> bool:
    field = change.name.rpartition(".")[2]
    if field in PRESENCE:
        return (change.before is None) == (change.now is None)
    older = re.fullmatch(r"config\.\w+", change.name) and (change.before is MISSING or change.now is MISSING)
    older = older or (re.match(r"code\b", change.name) and change.before is MISSING)
    return bool(older) or (field in NO_EFFECT and change.now is MISSING)


class _Missing:
    """A value that is not there, in JSON: null."""


MISSING = _Missing()


def _differences(before: object, now: object, name: str) -> Iterator[Change]:
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in [*now, *(key for key in before if key not in now)]:
            inner = f"{name}.{key}" if name else str(key)
            yield from _differences(before.get(key, MISSING), now.get(key, MISSING), inner)
    elif before != now:
        yield Change(name, before, now)


def shown(value: object) -> str:
    """Return a value as short JSON, of a hash its beginning."""
    text = "null" if value is MISSING else json.dumps(value, ensure_ascii=False)
    text = re.sub(r"\b([0-9a-f]{12})[0-9a-f]{52}\b", r"\1", text)
    return text[1:-1] if re.fullmatch(r'"[0-9a-f]{12}"', text) else short(text, 120)
