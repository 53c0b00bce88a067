"""Several reward models as one score function: their mean, their minimum, or their mean less their spread.

Members that differ in seed, data or trunk make different mistakes, so a response that exploits one of them seldom
fools all (Coste et al. 2310.02743; Eisenstein et al. 2312.09244). Where the members disagree, no score of theirs is to
be trusted: PPO logs their spread as `ensemble_std`, the report card shows it, and `spread` gives it for active choice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from reward_models.functions import Texts
from reward_models.scoring import RewardModel
from rlhf.errors import InputError
from rlhf.models.adapters import is_adapter
from rlhf.models.pretrained import base_of, check_folder
from rlhf.models.scalar import ScoreNormalizer, load_scalar_base
from rlhf.rows import fields
from rlhf.rows.jsonl import read_object
from rlhf.rows.messages import Messages
from rlhf.rows.records import read_demonstrations, read_rankings
from rlhf.rows.sources import Source, rows
from rlhf.run import sharing
from rlhf.run.checkpoint import write_json_atomic
from rlhf.run.fingerprint import of_path

Rule = Literal["mean", "min", "mean_minus_std"]
RULES = ("mean", "min", "mean_minus_std")
ENSEMBLE_FILE = "ensemble_members.json"


# ---------------------------------------------------------------- the rules


def mean_score(scores: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
    """Compute the members' mean (Coste et al. 2023, section 3.2)."""
    return scores.mean(0)


def least_score(scores: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
    """Compute the members' minimum: the worst case (Coste et al. 2023, equation 3)."""
    return scores.amin(0)


def mean_minus_std(scores: Float[Tensor, "M B"], k: float) -> Float[Tensor, " B"]:
    """Compute the members' mean minus k times their (population) standard deviation.

    Coste et al. (2023, equation 4) subtract a multiple of the variance. The standard deviation has the score's own
    unit, so k keeps its meaning where scores are scaled."""
    return scores.mean(0) - k * spread_of(scores)


def spread_of(scores: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
    """Compute the (population) standard deviation of the members' scores of each response."""
    return scores.std(0, correction=0)


# ---------------------------------------------------------------- the ensemble


class RewardEnsemble:
    """A score function (trl's signature) of several reward models, each normalised by its own normaliser.

    rule: "mean", "min" or "mean_minus_std", which subtracts `k` standard deviations. The members' normalisers should
    have been measured on the same responses: see `align`. In PPO the mean spread is logged as `ensemble_std`, and
    samples.jsonl holds each response's; the value model starts from the first member.
    """

    def __init__(
        self, members: Sequence[RewardModel], rule: Rule = "mean", k: float = 1.0, name: str = "ensemble"
    ) -> None:
        if len(members) < 2:
            raise InputError(f"ensemble: got {len(members)} reward models; give at least two")
        if rule not in RULES:
            raise InputError(f"ensemble: rule={rule!r} must be one of {', '.join(RULES)}")
        if not 0 <= k < float("inf"):
            raise InputError(f"ensemble: k={k} must be 0 or more")
        self.members = tuple(members)
        self.rule: Rule = rule
        self.k = k
        self.__name__ = name  # trainers log a reward function under this name

    @classmethod
    def load(
        cls,
        folders: Sequence[str | Path],
        rule: Rule = "mean",
        k: float = 1.0,
        *,
        responses: Source | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_microbatch: int = 16384,
    ) -> RewardEnsemble:
        """Load the members from folders (full weights or adapters) and hub ids. Adapters over one base share it.

        responses: rankings or demonstrations, on whose responses every member's normaliser is measured anew; None: the
        members keep their own. The other arguments are those of `RewardModel.load`.

        Raises InputError where a member cannot be loaded, or has no normaliser and `responses` are not given: its
        scores would have another unit than the others'.
        """
        if isinstance(folders, str | Path):
            raise InputError(f"ensemble: got one folder, {folders}; give a list of at least two")
        members = _load_members(folders, device, dtype, tokens_per_microbatch)
        ensemble = cls(members, rule, k)
        if responses is not None:
            ensemble.align(conversations_of(responses))
        for member in members:
            if not member.normalizer.count:
                raise InputError(
                    f"ensemble: {member.folder} has no measured normaliser, so its scores have another unit than the "
                    "others'; name responses to measure all of them on"
                )
        return ensemble

    @classmethod
    def saved(
        cls,
        folder: str | Path,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        tokens_per_microbatch: int = 16384,
    ) -> RewardEnsemble:
        """Load an ensemble that `save` has written. Raises InputError where a member has changed since."""
        file = Path(folder, ENSEMBLE_FILE)
        content = read_object(file)
        try:
            rule, k, listed = content["rule"], float(content["k"]), list(content["members"])
            places = [_found(Path(folder), member["path"]) for member in listed]
            normalizers = [ScoreNormalizer(**member["normalizer"]) for member in listed]
            prints = [member["fingerprint"] for member in listed]
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{file}: is no list of an ensemble's members ({error}); make it again") from None
        for place, fingerprint in zip(places, prints, strict=True):
            check_folder(place)
            if weights_fingerprint(place) != fingerprint:
                raise InputError(f"{file}: {place} has changed since the ensemble was made; make it again")
        members = _load_members(places, device, dtype, tokens_per_microbatch)
        for member, normalizer in zip(members, normalizers, strict=True):
            member.normalizer = normalizer
        return cls(members, rule, k, name=Path(folder).name)

    def save(self, folder: str | Path) -> Path:
        """Write the rule, the members' paths and their normalisers into a folder; the members stay where they are."""
        listed: list[dict[str, Any]] = []
        for member in self.members:
            if member.folder is None:
                raise InputError("ensemble: a member was not loaded from a folder; save it and load it from there")
            local = Path(member.folder).is_dir()
            path = os.path.relpath(member.folder, folder) if local else member.folder
            normalizer, fingerprint = asdict(member.normalizer), weights_fingerprint(member.folder)
            listed.append({"path": path, "normalizer": normalizer, "fingerprint": fingerprint})
        file = Path(folder, ENSEMBLE_FILE)
        write_json_atomic(file, {"rule": self.rule, "k": self.k, "members": listed})
        return file

    @property
    def model(self) -> Any:
        """Return the first member's model: PPO lets a base that is the policy's own, too, share its memory."""
        return self.members[0].model

    def __call__(
        self,
        prompts: Texts,
        completions: Texts,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[float]], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Return a score per response, from the members' normalised scores."""
        if not len(prompts):
            return []
        scores = torch.tensor([member(prompts, completions, **columns) for member in self.members])
        spread = spread_of(scores)
        if log_metric is not None:
            log_metric("ensemble_std", float(spread.mean()))
        if log_extra is not None:
            log_extra("ensemble_std", spread.tolist())
        return self._combined(scores).tolist()

    def score(self, conversations: Sequence[Messages]) -> Float[Tensor, " B"]:
        """Return scores of conversations that end with an assistant turn, on the CPU in float32."""
        return self._combined(self.member_scores(conversations))

    def member_scores(self, conversations: Sequence[Messages]) -> Float[Tensor, "M B"]:
        """Return every member's normalised scores."""
        return torch.stack([member.score(conversations) for member in self.members])

    def spread(self, conversations: Sequence[Messages]) -> list[float]:
        """Return how far the members disagree on each conversation, in standard deviations of a score: what active
        choice asks people about first."""
        return cast(list[float], spread_of(self.member_scores(conversations)).tolist())

    def align(self, conversations: Sequence[Messages]) -> None:
        """Measure every member's normaliser on these conversations: mean 0 and spread 1 on the same responses."""
        for member in self.members:
            member.normalizer = measured(member, conversations)

    def _combined(self, scores: Float[Tensor, "M B"]) -> Float[Tensor, " B"]:
        if self.rule == "mean":
            return mean_score(scores)
        return least_score(scores) if self.rule == "min" else mean_minus_std(scores, self.k)


def load_scorer(
    path: str | Path,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    tokens_per_microbatch: int = 16384,
) -> RewardModel | RewardEnsemble:
    """Load what a folder holds: an ensemble that was saved there, or a reward model."""
    if Path(path, ENSEMBLE_FILE).is_file():
        return RewardEnsemble.saved(path, device, dtype, tokens_per_microbatch)
    return RewardModel.load(path, device, dtype, tokens_per_microbatch)


# ---------------------------------------------------------------- members and responses


def _load_members(
    folders: Sequence[str | Path],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    tokens_per_microbatch: int,
) -> list[RewardModel]:
    """Load the reward models; a base under several adapters is read once, and held once."""
    bases: dict[str, PreTrainedModel] = {}
    members = []
    for folder in folders:
        check_folder(folder)
        base = None
        if is_adapter(folder):
            named = base_of(folder)
            name = os.path.realpath(named) if Path(named).is_dir() else named
            if name not in bases:
                bases[name] = load_scalar_base(folder, dtype)
                sharing.remember(bases[name], load_scalar_base, str(folder), dtype)
            base = bases[name]
        members.append(RewardModel.load(folder, device, dtype, tokens_per_microbatch, base=base))
    return members


def _found(folder: Path, path: str) -> str:
    """Return a member's path as it is seen from here: it was written relative to the ensemble's folder."""
    return str(folder / path) if (folder / path).is_dir() else path


def weights_fingerprint(folder: str | Path) -> str:
    """Compute the fingerprint of a folder's weights alone: reports may be written beside them. Of a hub id: its
    name's."""
    files = sorted(file for pattern in ("*.safetensors", "adapter_model.bin") for file in Path(folder).glob(pattern))
    return hashlib.sha256("".join(map(of_path, files)).encode()).hexdigest() if files else of_path(folder)


def conversations_of(source: Source, count: int = 2048, seed: int = 0) -> list[Messages]:
    """Read at most `count` conversations, drawn with the seed: every response of rankings, or demonstrations."""
    ranked = any(fields.is_ranking(row) or hasattr(row, "ranks") for _, row in islice(rows(source, "train"), 1))
    if ranked:
        found = [
            [*ranking.prompt, {"role": "assistant", "content": text}]
            for ranking in read_rankings(source)
            for text in ranking.responses
        ]
    else:
        found = [demonstration.messages for demonstration in read_demonstrations(source)]
    order = np.random.default_rng(seed).permutation(len(found))[:count]
    return [found[i] for i in sorted(order.tolist())]


def measured(member: RewardModel, conversations: Sequence[Messages]) -> ScoreNormalizer:
    """Measure mean and (population) standard deviation of a reward model's raw scores. Raises InputError where it gives
    all conversations one score."""
    raw = member.raw_scores(conversations).double()
    try:
        return ScoreNormalizer(float(raw.mean()), float(raw.std(correction=0)), len(raw))
    except InputError as error:
        raise InputError(f"{member.folder or member.__name__}: on {len(raw)} responses: {error}") from None
