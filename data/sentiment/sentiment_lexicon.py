"""A judge of sentiment that learned nothing: vaderSentiment's word list and rules (Hutto and Gilbert 2014)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from rlhf.errors import InputError


@cache
def analyzer() -> Any:
    """Return the analyzer. Raises InputError where the package is missing."""
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise InputError("vaderSentiment is missing; pip install 'rlhf-recipes[sentiment]'") from None
    return SentimentIntensityAnalyzer()


def compound(text: str) -> float:
    """Return a text's sentiment, from -1 to 1; 0 where no word of the list is in it."""
    return float(analyzer().polarity_scores(text)["compound"])


def lexicon(
    prompts: Sequence[Any], completions: Sequence[Any], scored_prefix: Sequence[str | None] | None = None
) -> list[float]:
    """Score every response with its beginning (the column `scored_prefix`, where there is one) as one text, in trl's
    reward-function signature."""
    texts = [done if isinstance(done, str) else done[-1]["content"] for done in completions]
    begun = scored_prefix or [None] * len(texts)
    return [compound((start or "") + text) for start, text in zip(begun, texts, strict=True)]
