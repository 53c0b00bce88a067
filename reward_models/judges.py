"""Judges by what a flag names: a reward model, a rubric grader, a function, a language model with a template, a URL.

`rlhf.evals.judge` compares with them; here stands what each is made of.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import import_function
from rlhf.errors import InputError
from rlhf.evals import asks
from rlhf.evals.answers import LITTLE
from rlhf.evals.judge import Judge, PairJudge, ScoreJudge
from rlhf.evals.questions import Rubric, read_template

if TYPE_CHECKING:
    import torch


def load_judge(
    judge: str,
    template: str | Path | None = None,
    *,
    served_as: str | None = None,
    dtype: torch.dtype | None = None,
    tokens_per_microbatch: int = 16384,
    margin: float = 0.0,
    least: float = LITTLE,
) -> Judge:
    """Load a judge.

    judge: without a template, a reward model (folder or hub id), an ensemble's folder, or a function (file.py:name, in
    the signature of a reward function). With one, a causal language model (folder or hub id), the address of a server
    that speaks OpenAI's HTTP, or a function from a question to its answer (file.py:name). template: a YAML file or the
    name of one of ours: of a pair's (pairwise, pairwise_forced), or a rubric (helpful). served_as: the model's name at
    a server of several. margin: scores that are no further apart are a tie. least: probability of a template's letters
    below which a comparison is an abstention. Raises InputError.
    """
    if template is None:
        if re.match(r"https?://", judge):
            raise InputError(f"judge={judge}: a server needs a template: --template pairwise, helpful or a YAML file")
        if is_function(judge):
            return ScoreJudge(import_function(judge), margin)
        from reward_models.ensemble import load_scorer

        model = load_scorer(judge, dtype=dtype, tokens_per_microbatch=tokens_per_microbatch)
        return ScoreJudge(model, margin)
    asked = read_template(template)
    answers = import_function(judge) if is_function(judge) else judge
    ask = asks.load(answers, dtype=dtype, tokens_per_microbatch=tokens_per_microbatch, served_as=served_as)
    if isinstance(asked, Rubric):
        from reward_models.grader import RubricGrader

        return ScoreJudge(RubricGrader(ask, asked, least=least), margin)
    return PairJudge(ask, asked, least)


def is_function(judge: str) -> bool:
    """Return whether a judge is written as file.py:name."""
    return ":" in judge and not Path(judge).exists() and not re.match(r"https?://", judge)
